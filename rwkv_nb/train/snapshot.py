"""What a session says of itself, and what it tells its processes."""

import asyncio
import time
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


@dataclass(frozen=True)
class Snapshot:
    """What a panel shows of a session at one moment."""

    status: str                          # ready, preparing, training, pausing, paused, saving, stopping, one of DONE
    paused: bool                         # from pause() to resume(); the step under way at pause() still ends
    step: int
    total_steps: int
    epochs: float
    rows: tuple[dict, ...]               # metrics.jsonl: steps and events
    samples: tuple[Sample, ...]
    notices: tuple[str, ...]
    files: tuple[str, ...]               # what was saved, by name
    live: LiveSettings
    seconds_left: float | None
    error: str

    @property
    def done(self) -> bool:
        return self.status in DONE


def shown(status: str, *, stop: bool, paused: bool) -> str:
    """A session's status, or what it has been asked to become."""
    if stop and status not in ("ready", *DONE):
        return "stopping"
    return "pausing" if paused and status == "training" else status


class Waiting:
    """Waiting for the end of what has snapshot(), stop() and result()."""

    async def wait(self) -> Snapshot:
        """Wait for the end with the kernel free: `await session.wait()`. Raises what stopped the training."""
        while not self.snapshot().done:
            await asyncio.sleep(0.2)
        return self.result()

    def join(self) -> Snapshot:
        """Wait for the end in a script; Ctrl-C stops the run with everything saved."""
        while True:
            try:
                if self.snapshot().done:
                    return self.result()
                time.sleep(0.05)
            except KeyboardInterrupt:
                self.stop()
