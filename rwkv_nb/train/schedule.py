"""Learning rate by step."""

from __future__ import annotations

import math

from ..config import LiveSettings


def learning_rate(step: int, total_steps: int, warmup_steps: int, live: LiveSettings) -> float:
    """Learning rate of optimizer step `step` (0-based): linear warm-up to lr_init, then a cosine to lr_final.

    Source of the cosine: Loshchilov & Hutter 2017, arXiv 1608.03983.
    """
    if step < warmup_steps:
        return live.lr_init * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - 1 - warmup_steps, 1)
    return live.lr_final + (live.lr_init - live.lr_final) * 0.5 * (1 + math.cos(math.pi * min(progress, 1)))
