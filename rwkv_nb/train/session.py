"""A run that trains on a thread of its own, so that the notebook's kernel stays free and widgets stay alive.

Nothing here knows a widget. Controls set a request or replace a frozen LiveSettings under a lock; the thread reads
both once per optimizer step. A panel paints from snapshot().
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence

from .. import config
from ..config import LiveSettings, Settings
from ..errors import RunError, SettingsError
from ..runs import Run, write_text
from .before import description, notices
from .checkpoint import Checkpoint, to_resume
from .heldout import judge
from .log import as_it_was
from .loop import Trainer
from .ranks import Ranks
from .shrink import Shrinking
from .snapshot import DONE, Orders, Sample, Snapshot, Waiting

__all__ = ["DONE", "Sample", "Snapshot", "TrainSession"]


class TrainSession(Shrinking, Waiting):
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
    """

    def __init__(self, run: Run | str, settings: Settings | None = None, *, prompts: Sequence[str] = (),
                 start: str = "auto", max_tokens: int = 60, planned: Mapping[int, dict] | None = None,
                 ranks: Ranks | None = None, ask: bool = True):
        if start not in ("auto", "resume", "fresh"):
            raise SettingsError(f"start cannot be {start!r}", where="start", fix="use auto, resume or fresh")
        self.run = run if isinstance(run, Run) else Run(run)
        self.settings = settings or self.run.settings()
        config.check(self.settings)
        config.check_together(self.settings)
        self.prompts, self._start_from, self._max_tokens = tuple(prompts), start, max_tokens
        self._planned, self.ranks, self._ask = dict(planned or {}), ranks or Ranks(), ask
        self.trainer: Trainer | None = None
        self._lock = threading.Lock()
        self._go = threading.Event()      # cleared while paused
        self._go.set()
        self._stop = self._save = False
        self._live = self.settings.train.live
        self._pending: list[dict] = []    # events, stamped with their step by the training thread
        self._rows: list[dict] = []
        self._samples: list[Sample] = []
        self._notices: list[str] = []
        self._files: list[str] = []
        self._base_answers: list[str] = []
        self._status, self._error = "ready", None
        self._checkpoint_at, self._checkpoint_due = 0.0, False
        self._seconds: deque[float] = deque(maxlen=20)
        self._thread = threading.Thread(target=self._main, name="rwkv_nb training", daemon=True)
        self._thread.session = self       # found by whoever asks for a run that is at work in this process

    @classmethod
    def replay(cls, run: Run | str, into: Run | str | None = None, **options) -> TrainSession:
        """The same run once more with every change at its step, from its started.json and metrics.jsonl.

        into: the new run's folder, by default `replay` inside the old one. On a CPU, with as many threads, its losses
        are the same bit for bit. Raises RunError where nothing was started.
        """
        run = run if isinstance(run, Run) else Run(run)
        began, planned = as_it_was(run)
        return cls(into or run.folder / "replay", began, start="fresh", planned=planned, **options)

    # -- controls: callable from any thread ----------------------------------------------------------------------

    def start(self) -> TrainSession:
        """Begin on the session's own thread; returns at once. One at work goes on; one that has ended is an error."""
        if self._status in DONE:
            raise RunError(f"this session has ended ({self._status})", where=self.run.folder,
                           fix="make a new TrainSession to train again")
        if self._status == "ready":
            self._status = "preparing"
            self._thread.start()
        return self

    def pause(self) -> None:
        """Hold after the optimizer step that is under way."""
        if self._go.is_set() and not self.snapshot().done:
            self._go.clear()
            self._event({"event": "pause"})

    @property
    def paused(self) -> bool:
        """From pause() to resume(); the step under way at pause() still ends."""
        return not self._go.is_set()

    def resume(self) -> None:
        """Go on after pause()."""
        if not self._go.is_set():
            self._event({"event": "resume"})
            self._go.set()

    def stop(self) -> None:
        """Save a checkpoint and an adapter after the step under way, then end. A later session resumes there."""
        self._stop = True
        self._go.set()

    def save_now(self) -> None:
        """Save an adapter and a checkpoint after the step under way; also while paused."""
        self._save = True

    def change(self, **changes) -> LiveSettings:
        """Change LiveSettings by name, from the next optimizer step on; each change is recorded with that step."""
        with self._lock:
            before, self._live = self._live, config.replace(self._live, **changes)
            for name in changes:
                old, new = getattr(before, name), getattr(self._live, name)
                if old != new:
                    self._pending.append({"event": "change", "name": name, "from": old, "to": new})
            return self._live

    def snapshot(self) -> Snapshot:
        """The session as it is now."""
        trainer = self.trainer
        with self._lock:
            step, total = (trainer.step, trainer.total_steps) if trainer else (0, 0)
            pace = sum(self._seconds) / len(self._seconds) if self._seconds else None
            return Snapshot(
                status=self._status, step=step, total_steps=total,
                epochs=trainer.epoch + trainer.part_of_epoch if trainer else 0.0, rows=tuple(self._rows),
                samples=tuple(self._samples), notices=tuple(self._notices), files=tuple(self._files),
                live=self._live, seconds_left=None if pace is None else pace * (total - step),
                error=str(self._error or ""))

    def result(self) -> Snapshot:
        """The last snapshot. Raises what stopped the training."""
        if self._error:
            raise self._error
        return self.snapshot()

    # -- the training thread -------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            with contextlib.nullcontext() if self.ranks.rank else self.run.lock():
                self._prepare()
                status = self._train()
            self.trainer.logs.close()
        except BaseException as error:  # whatever it is, the panel shows it and wait() raises it
            self._error = error
            status = "failed"
        self._status = status

    def _prepare(self) -> None:
        first = not self.ranks.rank
        self._warn_of_memory()
        self.trainer = self._built()
        saved = self.ranks.tell(self._choose_start() if first else None)
        self._tell(*notices(self.trainer))
        if saved:
            self.trainer.resume(saved)
            self._rows = self.ranks.tell(self.run.metrics() if first else [])
            self._restore_live(saved)
        elif first:
            self.run.save_settings(self.settings)
            write_text(self.run.started_file, json.dumps(description(self.trainer), indent=2, ensure_ascii=False))
            self.trainer.logs.new_run()
        self._answer(base=True)

    def _choose_start(self) -> Checkpoint | None:
        """The checkpoint to go on from, or None for a new run, the earlier one's files moved aside."""
        saved, reason = to_resume(self.run, self.settings, self._start_from)
        if saved:
            self._tell(f"resumed after step {saved.step}")
        elif moved := self.run.set_aside():
            self._tell(f"the earlier run's files are in {moved.name}/ ({reason})")
        return saved

    def _restore_live(self, saved: Checkpoint) -> None:
        """Live settings as they were, and on top of them what was changed in settings.json since."""
        began = config.values(config.from_dict(LiveSettings, saved.settings["train"]["live"]))
        asked = {name: value for name, value in config.values(self._live).items() if value != began[name]}
        with self._lock:
            self._live = saved.live_settings()
        self.change(**asked)

    def _train(self) -> str:
        trainer, self._status = self.trainer, "training"
        self._checkpoint_at = time.monotonic() + self.settings.train.checkpoint_seconds
        if trainer.step == 0:
            self._evaluate()              # the base's: what can be wrong with held-out data is wrong now
        while trainer.step < trainer.total_steps:
            orders, began = self._orders(), time.monotonic()
            live = orders.live
            if orders.stop:
                self._save_adapter(f"step-{trainer.step}")
                self._checkpoint(live)
                return "stopped"
            row = self._step(live)
            if row is None:
                trainer = self._go_on_smaller(live)
                continue
            with self._lock:              # snapshot() walks through them
                self._seconds.append(time.monotonic() - began)
            if "event" in row or _due(live.log_every, trainer.step) or trainer.step == trainer.total_steps:
                self._row(row)
            if trainer.epoch_ended:
                trainer.end_epoch(row["lr"])
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

    def _orders(self) -> Orders:
        """What every process does next; a pause lasts in here, so that all of them keep in touch."""
        while True:
            mine = self.ranks.ask(Orders(self._read_live(), self._stop, self._save, self.paused,
                                         time.monotonic() >= self._checkpoint_at))
            orders = dataclasses.replace(mine[0], stop=any(order.stop for order in mine))
            if orders.save:
                self._save_adapter(f"step-{self.trainer.step}")
                if orders.hold:
                    self._checkpoint(orders.live)
            if orders.stop or not orders.hold:
                self._status, self._checkpoint_due = "training", orders.checkpoint
                return orders
            self._status = "paused"
            self._go.wait(0.1)

    def _evaluate(self) -> None:
        """Measure the held-out loss; keep the best adapter, warn where it turns up, stop where that was asked for."""
        trainer = self.trainer
        if not trainer.heldout:
            return
        now = self._if_memory_lasts(trainer.heldout_loss)
        if now is None:
            return self._tell("WARNING: memory ran out: the held-out loss is left out")
        before = [row["heldout_loss"] for row in self._rows if row.get("event") == "eval"]
        best, told, stop = judge(before, now, trainer.step, self.settings.train.early_stop)
        self._row({"step": trainer.step, "event": "eval", "heldout_loss": now})
        self._tell(*told)
        self._stop |= stop
        if best:
            self._save_adapter("best")

    def _checkpoint_if_due(self, live: LiveSettings) -> None:
        if self._checkpoint_due:
            self._checkpoint(live)

    def _checkpoint(self, live: LiveSettings) -> None:
        self.trainer.checkpoint(live)
        self._checkpoint_at, self._checkpoint_due = time.monotonic() + self.settings.train.checkpoint_seconds, False

    def _read_live(self) -> LiveSettings:
        """LiveSettings for the next step; events since the last one are written with the steps done so far."""
        self.change(**self._planned.pop(self.trainer.step, {}))
        with self._lock:
            events, self._pending, live = self._pending, [], self._live
        for event in events:
            self._row({"step": self.trainer.step, **event})
        return live

    def _tell(self, *notices: str) -> None:
        with self._lock:
            self._notices += notices

    def _event(self, event: dict) -> None:
        with self._lock:
            self._pending.append(event)

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
        answers = self._if_memory_lasts(lambda: trainer.answers(self.prompts, self._max_tokens, base=base))
        if answers is None:
            self._tell("WARNING: memory ran out: the prompts' answers are left out")
            answers = [""] * len(self.prompts)
        if base:
            self._base_answers = answers
            return
        with self._lock:
            self._samples += [Sample(trainer.step, *texts)
                              for texts in zip(self.prompts, self._base_answers, answers, strict=True)]


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
