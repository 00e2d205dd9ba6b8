"""What any thread may ask of a session, and what it shows of itself: the side of it that a panel sees.

Requests and a frozen LiveSettings are set under a lock; the training thread reads both once per optimizer step.
"""

from __future__ import annotations

import threading
from collections import deque

from .. import config
from ..config import LiveSettings, Settings
from ..errors import RunError
from ..runs import Run
from .loop import Trainer
from .snapshot import DONE, Sample, Snapshot, Waiting


class Controls(Waiting):
    """The requests, and what the training thread (`_main`, of TrainSession) has to tell."""

    def __init__(self, run: Run, settings: Settings):
        self.run, self.settings = run, settings
        self.trainer: Trainer | None = None
        self._lock = threading.Lock()
        self._go = threading.Event()      # cleared while paused
        self._go.set()
        self._stop = self._save = False
        self._live = settings.train.live
        self._pending: list[dict] = []    # events, stamped with their step by the training thread
        self._rows: list[dict] = []
        self._samples: list[Sample] = []
        self._notices: list[str] = []
        self._files: list[str] = []
        self._status, self._error = "ready", None
        self._seconds: deque[float] = deque(maxlen=20)
        self._thread = threading.Thread(target=self._main, name="rwkv_nb training", daemon=True)
        self._thread.session = self       # found by whoever asks for a run that is at work in this process

    def start(self) -> Controls:
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

    def resume(self) -> None:
        """Go on after pause()."""
        if not self._go.is_set():
            self._event({"event": "resume"})
            self._go.set()

    def stop(self) -> None:
        """Save a checkpoint and an adapter after the step under way, then end. A later session resumes there.

        Where memory has run out it ends at the last checkpoint, without the smaller setting that is offered.
        """
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
                status=self._status, paused=not self._go.is_set(), stopping=self._stop, step=step, total_steps=total,
                epochs=trainer.epoch + trainer.part_of_epoch if trainer else 0.0, rows=tuple(self._rows),
                samples=tuple(self._samples), notices=tuple(self._notices), files=tuple(self._files),
                live=self._live, seconds_left=None if pace is None else pace * (total - step),
                error=str(self._error or ""))

    def result(self) -> Snapshot:
        """The last snapshot. Raises what stopped the training."""
        if self._error:
            raise self._error
        return self.snapshot()

    # -- for the training thread -----------------------------------------------------------------------------------

    def _tell(self, *notices: str) -> None:
        with self._lock:
            self._notices += notices

    def _event(self, event: dict) -> None:
        with self._lock:
            self._pending.append(event)

    def _live_from(self, before: LiveSettings, now: LiveSettings) -> None:
        """Take `now`; what differs from `before`, where the run goes on, is recorded as changed."""
        with self._lock:
            self._pending = [event for event in self._pending if event["event"] != "change"]
            self._live = before
        self.change(**config.values(now))
