"""What a new held-out loss means beside the ones before it."""

from collections.abc import Sequence


def judge(before: Sequence[float], now: float, step: int, early_stop: int) -> tuple[bool, list[str], bool]:
    """Whether `now`, after `step` steps, is the best, what to tell of it, and whether to stop (early_stop 0: never)."""
    best = min(before, default=float("inf"))
    if now < best:
        return True, [], False
    told, worse = [], len(before) - before.index(best)      # evaluations since the best one, this one with them
    if worse == 2:
        told.append(f"WARNING: the held-out loss has turned up: {best:.4f} at its best, {now:.4f} after step {step}. "
                    "From here on the adapter learns the training data by heart; adapter-best is the one to use")
    stop = 0 < early_stop <= worse
    if stop:
        told.append(f"stopped early after step {step}: {worse} evaluations without a lower held-out loss")
    return False, told, stop
