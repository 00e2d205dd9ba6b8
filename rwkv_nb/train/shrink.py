"""Out of memory is a choice, not a crash: everything is freed, a smaller setting is offered, and once it is taken
training goes on from the last completed step."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from .. import config
from ..config import LiveSettings
from ..errors import TrainingError, out_of_memory
from ..memory import card, next_smaller, warning
from ..model import load_weights, read_shape
from .checkpoint import load_checkpoint
from .loop import Trainer

T = TypeVar("T")


class Shrinking:
    """The part of TrainSession that looks after memory: where it runs out, a smaller setting is offered."""

    def _warn_of_memory(self) -> None:
        """Say, before anything is loaded, where a GPU's memory will not do."""
        base = self.settings.train.load_model
        self._shape = read_shape(load_weights(base)) if base else None
        name, limit, self._on_gpu = card(self.settings.train.accelerator)
        told = warning(self._shape, self.settings, name, limit, gpu=True) if self._on_gpu and base else ""
        self._tell(*[told] if told else ())

    def _if_memory_lasts(self, work: Callable[[], T]) -> T | None:
        """work's result, or None where memory ran out; nothing of it is left then."""
        try:
            return work()
        except Exception as error:
            if self.ranks.size > 1 or not out_of_memory(error):
                raise
        gc.collect()  # outside of except: the error held what the work had made
        torch.cuda.empty_cache()
        return None

    def _built(self) -> Trainer:
        """The trainer, with smaller settings as often as there is no memory for it."""
        while True:
            trainer = self._if_memory_lasts(lambda: Trainer(self.run, self.settings, self.ranks))
            if trainer:
                return trainer
            self._shrink("while the base was loaded", "weights")

    def _step(self, live: LiveSettings) -> dict | None:
        """One optimizer step's row, or None where memory ran out."""
        return self._if_memory_lasts(lambda: self.trainer.train_step(live, lambda: self._checkpoint_if_due(live)))

    def _go_on_smaller(self, live: LiveSettings) -> Trainer:
        """Free everything, and go on from the last completed step with smaller settings."""
        trainer = self.trainer
        trainer.optimizer.zero_grad()
        self._checkpoint(live)
        saved = load_checkpoint(self.run)  # on the CPU
        trainer.release()
        change = self._shrink(f"in step {trainer.step + 1}")
        self.trainer = self._built()
        self.trainer.resume(saved)
        self._row({"step": trainer.step, "event": "out of memory", "offer": change})
        self.change(accumulate_grad_batches=change.get("accumulate_grad_batches", live.accumulate_grad_batches))
        return self.trainer

    def _shrink(self, where: str, part: str | None = None) -> dict:
        """Offer the next setting that needs less, for a part alone if told so, and take it after resume(), or at once
        if not asked. Raises TrainingError where nothing smaller is left."""
        change = next_smaller(self._shape, self.settings, part, gpu=self._on_gpu)
        if not change:
            raise TrainingError("memory ran out, and no setting is left that needs less", where=where,
                                fix="take a smaller base, r or ctx_len; the last checkpoint is good")
        words = ", ".join(f"{name} {value}" for name, value in change.items())
        self._tell(f"WARNING: memory ran out {where}. Nothing is lost: "
                   + (f"resume to go on with {words}" if self._ask else f"going on with {words}"))
        gc.collect()
        torch.cuda.empty_cache()
        if self._ask and not self._stop:
            self._go.clear()
        self._status = "paused"
        self._go.wait()
        self.settings = config.replace(self.settings, **change)
        self.run.save_settings(self.settings)
        return change
