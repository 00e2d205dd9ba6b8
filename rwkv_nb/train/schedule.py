"""Learning rate by step."""

import math

from ..config import TrainSettings


def learning_rate(step: int, total_steps: int, train: TrainSettings) -> float:
    """Learning rate of optimizer step `step` (0-based): linear warm-up to lr_init, then train.lr_schedule to lr_final.

    lr_final is reached at step live.lr_end, or the last one, and kept. Sources: cosine, Loshchilov & Hutter 2017,
    arXiv 1608.03983; warm-up, stable, decay, Hu et al. 2024, arXiv 2404.06395.
    """
    live, warmup, end = train.live, train.warmup_steps, train.live.lr_end or total_steps
    if step < warmup:
        return live.lr_init * (step + 1) / warmup
    if train.lr_schedule == "wsd":
        warmup = max(warmup, end - 1 - (train.decay_steps or math.ceil(end / 10)))  # the stable part is over then
    progress = min(max((step - warmup) / max(end - 1 - warmup, 1), 0), 1)
    share = 1 - progress if train.lr_schedule == "wsd" else 0.5 * (1 + math.cos(math.pi * progress))
    return live.lr_final + (live.lr_init - live.lr_final) * share
