"""Out of memory is a choice, not a crash: everything is freed, a smaller setting is offered, and once it is taken
training goes on from the last completed step."""

from __future__ import annotations

import gc

import torch

from .. import config
from ..config import LiveSettings
from ..errors import TrainingError
from ..memory import card, next_smaller, warning
from ..model import load_weights, read_shape
from .checkpoint import load_checkpoint
from .loop import Trainer

_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or a CPU."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS))


class Shrinking:
    """The part of TrainSession that takes a step and, where memory runs out, offers a smaller setting."""

    def _memory_notices(self) -> list[str]:
        """A warning, before anything is loaded, where a GPU's memory will not do."""
        name, limit, gpu = card(self.settings.train.accelerator)
        base = self.settings.train.load_model
        told = warning(read_shape(load_weights(base)), self.settings, name, limit, gpu=gpu) if gpu and base else ""
        return [told] if told else []

    def _step(self, live: LiveSettings) -> dict | None:
        """One optimizer step's row, or None where memory ran out; nothing of the step is left then."""
        try:
            return self.trainer.train_step(live, lambda: self._checkpoint_if_due(live))
        except Exception as error:
            if self.ranks.size > 1 or not out_of_memory(error):
                raise
        return None  # outside of except: the error held the step's tensors

    def _go_on_smaller(self, live: LiveSettings) -> Trainer:
        """Free everything, offer the next smaller setting, and go on with it after resume(), or at once if not asked.

        Raises TrainingError where nothing smaller is left.
        """
        trainer, step = self.trainer, self.trainer.step
        trainer.optimizer.zero_grad()
        shape, gpu = trainer.model.shape, trainer.device.type == "cuda"
        change = next_smaller(shape, self.settings, gpu=gpu)
        where = f"step {step + 1}"
        if not change:
            raise TrainingError("memory ran out, and no setting is left that needs less", where=where,
                                fix="take a smaller base, r or ctx_len; the last checkpoint is good")
        words = ", ".join(f"{name} {value}" for name, value in change.items())
        self._row({"step": step, "event": "out of memory", "offer": change})
        with self._lock:
            self._notices.append(f"WARNING: memory ran out in {where}. Nothing is lost: "
                                 + (f"resume to go on with {words}" if self._ask else f"going on with {words}"))
        self._checkpoint(live)
        saved = load_checkpoint(self.run)  # on the CPU
        trainer.release()
        gc.collect()
        torch.cuda.empty_cache()
        if self._ask and not self._stop:
            self._go.clear()
        self._status = "paused"
        self._go.wait()
        self.settings = config.replace(self.settings, **change)
        self.run.save_settings(self.settings)
        self.trainer = Trainer(self.run, self.settings, self.ranks)
        self.trainer.resume(saved)
        self.change(accumulate_grad_batches=change.get("accumulate_grad_batches", live.accumulate_grad_batches))
        return self.trainer
