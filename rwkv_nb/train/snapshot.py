"""What a session says of itself, and what it tells its processes."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from ..config import LiveSettings

DONE = ("finished", "stopped", "failed")


@dataclass(frozen=True)
class Sample:
    """Base and adapter answering one prompt, at one step."""

    step: int
    prompt: str
    base: str
    adapter: str


@dataclass(frozen=True)
class Orders:
    """What the next step is to do, the same in every process of a run."""

    live: LiveSettings
    stop: bool
    save: bool
    hold: bool
    checkpoint: bool


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a panel shows of a session at one moment."""

    live: LiveSettings
    status: str                          # ready, preparing, training, paused, saving, finished, stopped, failed
    paused: bool = False                 # from pause() to resume(); the step under way at pause() still ends
    stopping: bool = False               # from stop() on
    step: int = 0
    total_steps: int = 0
    epochs: float = 0.0
    rows: tuple[dict, ...] = ()          # metrics.jsonl: steps and events
    samples: tuple[Sample, ...] = ()
    notices: tuple[str, ...] = ()
    files: tuple[str, ...] = ()          # what was saved, by name
    seconds_left: float | None = None
    error: str = ""

    @property
    def done(self) -> bool:
        return self.status in DONE

    @property
    def shown(self) -> str:
        """The status, or what the session has been asked to become: pausing or stopping."""
        if self.stopping and self.status not in ("ready", *DONE):
            return "stopping"
        return "pausing" if self.paused and self.status == "training" else self.status


class Waiting:
    """Waiting for the end of what has snapshot(), stop() and result()."""

    async def wait(self) -> Snapshot:
        """Wait for the end with the kernel free: `await session.wait()`. Raises what stopped the training."""
        while not self.snapshot().done:
            await asyncio.sleep(0.2)
        return self.result()

    def join(self, show: Callable[[Snapshot], None] = lambda now: None) -> Snapshot:
        """Wait for the end in a script, and show where it stands; Ctrl-C stops the run with everything saved."""
        while True:
            try:
                now = self.snapshot()
                show(now)
                if now.done:
                    return self.result()
                time.sleep(0.05)
            except KeyboardInterrupt:
                self.stop()
