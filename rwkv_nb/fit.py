"""What makes a run fit: the memory that there is, and what to change where it will not do, before a run and in it."""

import bisect
import contextlib
import functools
import importlib.util
import operator
import re
from collections.abc import Callable, Iterator

import psutil
import torch

from . import config
from .config import Settings
from .errors import SettingsError
from .memory import CONTEXT, estimate, rows
from .model import Shape

# Share of a GPU's free memory that no run is planned into. Torch's allocator holds more than the tensors, in gaps
# between them: 1 to 9 % in tests/benchmarks/results/memory_prediction.json. A part of that it gives back when short.
SPARE = 0.05
BUSY = 4096   # tokens of a micro-batch with which a device has enough to do: our guess, not measured
OF_STEPS = ("grad_cp", "micro_bsz", "accumulate_grad_batches", "chunk_ctx")   # what is loaded is the same under these
# What costs no more than time for less memory, and leaves every step as it was but for rounding and dropout's masks.
SAME_NUMBERS = ("emb_cpu", *OF_STEPS)
TOO_LARGE = "take a smaller base, r or ctx_len"


def card(accelerator: str = "auto", number: int = 0) -> tuple[str, int, bool]:
    """Name of what a run would train on, the bytes that it may plan with, and whether it is a GPU (of that number).

    That is what is free now, and what this process holds, which its last run gives back; on a GPU SPARE less.
    """
    if accelerator != "cpu" and torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info(number)
        mine = torch.cuda.memory_reserved(number) + CONTEXT
        return torch.cuda.get_device_name(number), int((free + mine) * (1 - SPARE)), True
    mine = psutil.Process().memory_info()   # what is shared are pages of files
    return "this machine's memory", psutil.virtual_memory().available + mine.rss - mine.shared, False


def smaller(settings: Settings, *, gpu: bool) -> Iterator[dict]:
    """Changes of settings that need less memory, each alone, what costs least first; none that others here forbid.

    What costs no time comes first: bf16, and smaller micro-batches while they are large (more of them leave every step
    as it was). Then what costs time, then what makes the frozen base coarser.
    """
    t, ctx_len, B = settings.train, settings.data.ctx_len, rows(settings)
    T, packed = min(ctx_len, t.chunk_ctx or ctx_len), importlib.util.find_spec("bitsandbytes") is not None
    parts = [{"micro_bsz": b, "accumulate_grad_batches": t.live.accumulate_grad_batches * B // b}
             for b in range(B - 1, 0, -1) if B % b == 0]
    busy = sum(part["micro_bsz"] * T >= BUSY for part in parts)
    for possible, change in (
        (t.precision in ("fp32", "tf32") and _has_bf16(gpu), {"precision": "bf16"}),
        (gpu and not t.emb_cpu, {"emb_cpu": 1}),
        *((True, part) for part in parts[:busy]),
        (t.adam_state == "fp32", {"adam_state": "bf16"}),
        (t.grad_cp == "none", {"grad_cp": "selective"}),
        (t.grad_cp != "block", {"grad_cp": "block"}),
        *((True, part) for part in parts[busy:]),
        (T > 256, {"chunk_ctx": T // 2}),
        (packed and t.adam_state != "8bit", {"adam_state": "8bit"}),
        (packed and not t.quant_head, {"quant_head": 1}),
        (packed and t.quant == "none", {"quant": "int8"}),
        (packed and t.quant != "nf4", {"quant": "nf4"}),
    ):
        with contextlib.suppress(SettingsError):
            if possible:
                config.check_together(config.replace(settings, **change))
                yield change


def _has_bf16(gpu: bool) -> bool:
    """Whether the device computes in bf16 by itself; elsewhere it would be slow."""
    if gpu:
        return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        return re.search(r"\b(avx512_bf16|amx_bf16)\b", file.read()) is not None


def words(change: dict) -> str:
    """A change as a person reads it: micro_bsz 2, accumulate_grad_batches 4."""
    return ", ".join(f"{name} {value}" for name, value in change.items())


def cheapest_change(shape: Shape, settings: Settings, limit: int, *, gpu: bool,
                    before_each: Callable[[], None] = lambda: None) -> dict | None:
    """What to change so that the run fits into `limit` bytes: nothing of `smaller` that comes later than it must, and
    nothing that is not needed beside it. {} where it fits already, None where all of `smaller` together does not do.

    before_each: called before each estimate, a second or so; what it raises ends the search
    """
    def fits(changes: list[dict]) -> bool:
        before_each()
        together = functools.reduce(operator.or_, changes, {})
        return estimate(shape, config.replace(settings, **together), gpu=gpu).total <= limit

    if fits([]):
        return {}
    every = list(smaller(settings, gpu=gpu))
    if not fits(every):
        return None
    # an estimate takes its time, so the number of changes that are enough is found by halving
    needed = every[:1 + bisect.bisect_left(range(len(every)), True, key=lambda last: fits(every[:last + 1]))]
    for change in needed[-2::-1]:
        others = [other for other in needed if other is not change]
        needed = others if fits(others) else needed
    return functools.reduce(operator.or_, needed, {})


def warning(shape: Shape, settings: Settings, name: str, limit: int, *, gpu: bool) -> str:
    """What to say before a run that needs more than the `limit` bytes of `name`, with the cheapest change; else ""."""
    need = estimate(shape, settings, gpu=gpu).total
    if need <= limit:
        return ""
    change = cheapest_change(shape, settings, limit, gpu=gpu)
    return (f"WARNING: this run needs about {need / 1e9:.2f} GB, and {name} has {limit / 1e9:.2f} GB free; "
            + (f"it should fit with {words(change)}" if change else f"no setting makes it fit: {TOO_LARGE}"))


def next_smaller(shape: Shape, settings: Settings, *, loading: bool = False, resumed: bool = True, gpu: bool
                 ) -> dict | None:
    """What to try after a run was out of memory: the first of `smaller` that saves 3 % or more, of a step or (loading)
    of what is there before one. resumed: the run is under way; its optimizer keeps its state, and what leaves its
    steps as they are comes first."""
    def size(change: dict) -> int:
        told = estimate(shape, config.replace(settings, **change), gpu=gpu)
        return sum(told.largest[part] for part in ("weights", "LoRA", "optimizer")) if loading else told.allocated

    changes = [change for change in smaller(settings, gpu=gpu) if not (loading and change.keys() & set(OF_STEPS))]
    if resumed:
        changes = sorted((change for change in changes if "adam_state" not in change),
                         key=lambda change: not change.keys() <= set(SAME_NUMBERS))
    return next((change for change in changes if size(change) <= 0.97 * size({})), None)


def largest_micro_bsz(shape: Shape, settings: Settings, limit: int, *, gpu: bool,
                      before_each: Callable[[], None] = lambda: None) -> int:
    """The largest micro_bsz up to 1024 with which the run fits into `limit` bytes; 0 where not even 1 does.
    before_each: as of cheapest_change."""
    def over(B: int) -> int:
        before_each()
        return estimate(shape, config.replace(settings, micro_bsz=B), gpu=gpu).total - limit

    fits, fails, B, seen = 0, 1025 if settings.data.dataload != "only" else 2, 1, []
    while fails - fits > 1:
        B = min(max(B, fits + 1), fails - 1)
        seen = [*seen[-1:], (B, over(B))]
        fits, fails = (B, fails) if seen[-1][1] <= 0 else (fits, B)
        # bytes grow along a line, or nearly: next comes what lies where the last two estimates point
        (one, over_one), (two, over_two) = seen[0], seen[-1]
        B = two - over_two * (two - one) // (over_two - over_one) if over_two != over_one else two + 1
    return fits
