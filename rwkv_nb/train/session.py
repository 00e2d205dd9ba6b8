"""A run that trains on a thread of its own, so that the notebook's kernel stays free and widgets stay alive.

Nothing here knows a widget: a panel asks through the controls (train.controls) and paints from snapshot().
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from .. import config
from ..config import LiveSettings, Settings
from ..errors import SettingsError, TrainingError
from ..fit import TOO_LARGE, words
from ..memory import rows
from ..runs import Run, absolute, write_text
from .before import description, notices, quant_notice
from .checkpoint import Checkpoint, load_checkpoint, to_resume
from .controls import Controls
from .log import as_it_was
from .loop import Trainer
from .ranks import Ranks
from .shrink import Room, Stopped, forget_frames, free_memory, if_memory_lasts
from .snapshot import Orders, Sample

T = TypeVar("T")


class TrainSession(Controls):
    """Fine-tune in the background: session = TrainSession(run); session.start(); await session.wait().

    run:      the run's folder, or its path
    settings: by default the run's settings.json
    prompts:  texts that base and adapter answer side by side at each save
    start:    "auto" goes on from an unfinished checkpoint of the same settings and else begins anew;
              "resume" insists on the checkpoint; "fresh" begins anew. What an earlier run left is moved to
              previous-N/ inside the folder, never overwritten.
    planned:  changes of LiveSettings by the number of steps done before them
    ranks:    the processes of this run; the first one decides and writes, see train.launch
    ask:      when memory runs out, pause until resume() takes the smaller setting that is offered; False takes it

    Once it is done nothing of the model is left in memory; where it stands, its rows and notices still are.
    """

    def __init__(self, run: Run | str, settings: Settings | None = None, *, prompts: Sequence[str] = (),
                 start: str = "auto", max_tokens: int = 60, planned: Mapping[int, dict] | None = None,
                 ranks: Ranks | None = None, ask: bool = True):
        if start not in ("auto", "resume", "fresh"):
            raise SettingsError(f"start cannot be {start!r}", where="start", fix="use auto, resume or fresh")
        run = Run(run)
        settings = absolute(settings or run.settings())   # as settings.json has them: a checkpoint knows its own again
        config.check_together(settings)
        super().__init__(run, settings)
        self.prompts, self._start_from, self._max_tokens = tuple(prompts), start, max_tokens
        self._planned, self.ranks, self._ask = dict(planned or {}), ranks or Ranks(), ask
        self._base_answers: list[str] = []
        self._checkpoint_at = 0.0         # the first step writes one

    @classmethod
    def replay(cls, run: Run | str, into: Run | str | None = None, **options) -> TrainSession:
        """The same run once more with every change at its step, from its started.json and metrics.jsonl.

        into: the new run's folder, by default `replay` inside the old one. On a CPU, with as many threads, its losses
        are the same bit for bit. Raises RunError where nothing was started.
        """
        run = Run(run)
        began, planned = as_it_was(run)
        return cls(into or run.folder / "replay", began, start="fresh", planned=planned, **options)

    # -- the training thread -------------------------------------------------------------------------------------

    def _main(self) -> None:
        status = "stopped"
        try:
            with contextlib.nullcontext() if self.ranks.rank else self.run.lock(), contextlib.suppress(Stopped):
                self._prepare()
                status = self._train()
            self._let_go()
        except BaseException as error:  # whatever it is, the panel shows it and wait() raises it
            self._error, status = error, "failed"
            forget_frames(error)
            with contextlib.suppress(Exception):  # the first error is the one to show
                self._let_go()
        self._status = status

    def _let_go(self) -> None:
        if self.trainer:
            self.trainer.release()
        free_memory()

    def _prepare(self) -> None:
        first = not self.ranks.rank
        self._room = Room(self.settings, self.ranks.local)
        self._tell(*filter(None, [self._room.warning]))
        self._build()
        saved = self.ranks.tell(self._choose_start() if first else None)
        self._tell(*notices(self.trainer))
        if saved:
            self._restore_live(saved)
            self.trainer.resume(saved)
            self._rows = self.ranks.tell(self.run.metrics() if first else [])
        self._answer(base=True)

    def _choose_start(self) -> Checkpoint | None:
        """The checkpoint to go on from, or None: a new run is begun, and the earlier one's files moved aside."""
        saved, reason = to_resume(self.run, self.settings, self._start_from, self.trainer.base,
                                  self.trainer.batches.state())
        if saved:
            self._tell(f"resumed after step {saved.step}")
        else:
            if moved := self.run.set_aside():
                self._tell(f"the earlier run's files are in {moved.name}/ ({reason})")
            write_text(self.run.started_file, json.dumps(description(self.trainer), indent=2, ensure_ascii=False))
            self.trainer.logs.new_run()
        self.run.save_settings(self.settings)
        return saved

    def _restore_live(self, saved: Checkpoint) -> None:
        """Live settings as they were, and on top of them what was changed in settings.json since.

        Another micro_bsz, or number of devices, leaves each step as large as it was, unless accumulate_grad_batches was
        changed with it.
        """
        then, live, name = saved.settings, saved.live, "accumulate_grad_batches"
        began = config.values(then.train.live)
        asked = {key: value for key, value in config.values(self._live).items() if value != began[key]}
        if _at_once(then) != _at_once(self.settings) and name not in asked:
            live = self._as_large(live, then)
            self._tell(f"{_at_once(self.settings)} documents are worked on at once now, {_at_once(then)} before: "
                       f"{name} {live.accumulate_grad_batches} keeps each step as large")
        self._live_from(live, config.replace(live, **asked))

    def _train(self) -> str:
        self._status = "training"
        if self.trainer.step == 0:
            self._evaluate()              # the base's: what can be wrong with held-out data is wrong now
        while self.trainer.step < self.trainer.total_steps:
            orders, began = self._orders(), time.monotonic()
            live = orders.live
            if orders.stop:
                self._save_adapter(f"step-{self.trainer.step}")
                self._checkpoint(live)
                return "stopped"
            row = self._step(orders)
            if row is None:
                continue                  # it is taken again, with smaller settings
            trainer = self.trainer
            with self._lock:              # snapshot() walks through them
                self._seconds.append(time.monotonic() - began)
            if "event" in row or _due(live.log_every, trainer.step) or trainer.step == trainer.total_steps:
                self._row(row)
            if _due(live.eval_every, trainer.step) if live.eval_every else trainer.epoch_ended:
                self._evaluate()
            if trainer.save_due:
                self._save_adapter(trainer.epoch)
            elif _due(live.save_every, trainer.step):
                self._save_adapter(f"step-{trainer.step}")
            elif _due(live.sample_every, trainer.step):
                self._answer()
        self._checkpoint(self._read_live())
        return "finished"

    def _step(self, orders: Orders) -> dict | None:
        """One optimizer step's row; None where memory ran out, and the trainer is another one now."""
        gradients = self._attempt(partial(self.trainer.gradients, orders.live))
        if gradients is None:
            self._checkpoint(orders.live)     # nothing has changed since the last step
        else:
            if orders.checkpoint and not gradients.fault:
                self._checkpoint(orders.live)
            if row := self._attempt(partial(self.trainer.update, gradients)):
                return row
        self._go_on_smaller()

    # -- where memory runs out -------------------------------------------------------------------------------------

    def _attempt(self, work: Callable[[], T]) -> T | None:
        """work's result, or None where memory ran out. Raises TrainingError then if other processes wait for it."""
        result = if_memory_lasts(work)
        if result is None and self.ranks.size > 1:
            change = self._room.smaller(self._settings_now())
            raise TrainingError(f"memory ran out in process {self.ranks.rank} of this run", where=self.run.folder,
                                fix=f"start again with {words(change)}" if change else TOO_LARGE)
        return result

    def _settings_now(self) -> Settings:
        return config.replace(self.settings, **config.values(self._live))

    def _build(self, saved: Checkpoint | None = None) -> None:
        """Make the trainer, at a checkpoint if one is given; with smaller settings as often as there is no memory."""
        def made() -> Trainer:
            trainer = Trainer(self.run, self.settings, self.ranks)
            if saved:
                trainer.resume(saved)
            return trainer

        while not (trainer := self._attempt(made)):
            self._take_less("while the base was loaded", loading=True, resumed=bool(saved))
        self.trainer = trainer

    def _go_on_smaller(self) -> None:
        """Free everything, and go on from the last checkpoint with smaller settings."""
        before = self.trainer
        before.release()
        free_memory()
        saved = load_checkpoint(self.run)  # on the CPU
        lost = before.step - saved.step
        change = self._take_less(f"in step {before.step + 1}", f"The run goes back {lost} steps, to its checkpoint"
                                 if lost else "Nothing is lost")
        self._build(saved)
        self._rows = self.run.metrics()
        self._live_from(*(self._as_large(live, saved.settings) for live in (saved.live, self._live)))
        self._row({"step": self.trainer.step, "event": "out of memory", "offer": change})
        self._tell(*quant_notice(self.settings.train) if "quant" in change else ())
        self._checkpoint(self._live)      # what is on the disk has the new settings too

    def _take_less(self, where: str, outcome: str = "Nothing is lost", **how) -> dict:
        """Offer the next settings that need less (`how`: as of Room.smaller), and take them after resume(), or at once
        if not asked. Raises TrainingError where nothing smaller is left, Stopped where stop() is the answer."""
        change = self._room.smaller(self._settings_now(), **how)
        if not change:
            raise TrainingError("memory ran out, and no setting is left that needs less", where=where, fix=TOO_LARGE)
        self._tell(f"WARNING: memory ran out {where}. {outcome}: "
                   + ("resume to go on with " if self._ask else "going on with ") + words(change))
        if self._ask and not self._stop:
            self._go.clear()
        self._status = "preparing" if self._go.is_set() else "paused"
        while not self._stop and not self._go.wait(0.1):
            pass                          # stop() may have come a moment before the clear() above
        if self._stop:
            raise Stopped
        self._status = "preparing"
        self.settings = config.replace(self.settings, **change)
        if self.run.settings_file.exists():
            self.run.update(**change)     # and leaves what was set in the form meanwhile
        return change

    def _as_large(self, live: LiveSettings, before: Settings) -> LiveSettings:
        """`live` with which a step is as large as under the settings before."""
        count = max(1, round(live.accumulate_grad_batches * _at_once(before) / _at_once(self.settings)))
        return config.replace(live, accumulate_grad_batches=count)

    # -- between the steps ---------------------------------------------------------------------------------------

    def _orders(self) -> Orders:
        """What every process does next; a pause lasts in here, so that all of them keep in touch."""
        while True:
            mine = self.ranks.ask(Orders(self._read_live(), self._stop, self._save, not self._go.is_set(),
                                         time.monotonic() >= self._checkpoint_at))
            orders = dataclasses.replace(mine[0], stop=any(order.stop for order in mine))
            if orders.save:
                self._save_adapter(f"step-{self.trainer.step}")
                if orders.hold:
                    self._checkpoint(orders.live)
            if orders.stop or not orders.hold:
                self._status = "training"
                return orders
            self._status = "paused"
            self._go.wait(0.1)

    def _evaluate(self) -> None:
        """Measure the held-out loss; keep the best adapter, warn where it turns up, stop where that was asked for."""
        trainer = self.trainer
        if not trainer.heldout:
            return
        now = self._attempt(trainer.heldout_loss)
        if now is None:
            return self._tell("WARNING: memory ran out: the held-out loss is left out")
        before = [row["heldout_loss"] for row in self._rows if row.get("event") == "eval"]
        self._row({"step": trainer.step, "event": "eval", "heldout_loss": now})
        best = min(filter(math.isfinite, before), default=math.inf)   # a base may begin with NaN
        if now < best:
            return self._save_adapter("best")
        worse = len(before) - before.index(best) if best < math.inf else 0   # evaluations since, this one with them
        if worse == 2:
            self._tell(f"WARNING: the held-out loss has turned up: {best:.4f} at its best, {now:.4f} after step "
                       f"{trainer.step}. From here on the adapter learns the training data by heart; adapter-best is "
                       "the one to use")
        if 0 < self.settings.train.early_stop <= worse:
            self._tell(f"stopped early after step {trainer.step}: {worse} evaluations without a lower held-out loss")
            self._stop = True

    def _checkpoint(self, live: LiveSettings) -> None:
        self.trainer.checkpoint(live)
        self._checkpoint_at = time.monotonic() + self.settings.train.checkpoint_seconds

    def _read_live(self) -> LiveSettings:
        """LiveSettings for the next step; events since the last one are written with the steps done so far."""
        self.change(**self._planned.pop(self.trainer.step, {}))
        with self._lock:
            events, self._pending, live = self._pending, [], self._live
        for event in events:
            self._row({"step": self.trainer.step, **event})
        return live

    def _row(self, row: dict) -> None:
        self.trainer.logs.row(row)
        with self._lock:
            self._rows.append(row)

    def _save_adapter(self, name: int | str) -> None:
        self._save = False
        self._status = "saving"
        files = self.trainer.save(name)
        self._row({"step": self.trainer.step, "event": "save", "name": files[0].name})
        self._checkpoint_at = 0.0         # the next step writes one, once its loss has shown this adapter sound
        with self._lock:
            self._files += [f.name for f in files if f.name not in self._files]  # adapter-best is written anew
        self._answer()
        self._status = "training"

    def _answer(self, base: bool = False) -> None:
        """Let the adapter answer the prompts, or the base without it."""
        trainer = self.trainer
        if not self.prompts or (self._samples and self._samples[-1].step == trainer.step):
            return                        # the best adapter and an epoch's are one: it has just answered
        answers = self._attempt(lambda: trainer.answers(self.prompts, self._max_tokens, base=base))
        if answers is None:
            self._tell("WARNING: memory ran out: the prompts' answers are left out")
            answers = [""] * len(self.prompts)
        if base:
            self._base_answers = answers
            return
        with self._lock:
            self._samples += [Sample(trainer.step, *texts)
                              for texts in zip(self.prompts, self._base_answers, answers, strict=True)]


def _at_once(settings: Settings) -> int:
    """Rows of the micro-batches that all devices work on together."""
    return rows(settings) * settings.train.devices * settings.train.num_nodes


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
