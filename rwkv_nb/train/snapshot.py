"""What a session says of itself, and what it tells its processes."""

from __future__ import annotations

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


@dataclass(frozen=True)
class Snapshot:
    """What a panel shows of a session at one moment."""

    status: str                          # ready, preparing, training, paused, saving, finished, stopped, failed
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
