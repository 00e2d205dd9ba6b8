"""Out of memory is a choice, not a crash: what is still left to try, and how what was held is let go of, or kept."""

import ctypes
import gc
import traceback
from collections.abc import Callable
from typing import TypeVar

import torch

from ..config import Settings
from ..errors import out_of_memory
from ..fit import card, next_smaller, warning
from ..model import load_weights, read_shape

T = TypeVar("T")


class Stopped(Exception):
    """Stop was pressed where a run waited for memory: it ends without another step."""


class Room:
    """What a run's device has for it. number: the GPU's, of those of this machine.

    .warning is what to say, before anything is loaded, where a GPU's memory will not do; else "".
    """

    def __init__(self, settings: Settings, number: int = 0):
        base = settings.train.load_model
        self._shape = read_shape(load_weights(base)) if base else None
        name, limit, self._gpu = card(settings.train.accelerator, number)
        self.warning = warning(self._shape, settings, name, limit, gpu=True) if self._gpu and self._shape else ""

    def smaller(self, settings: Settings, *, loading: bool = False, resumed: bool = True) -> dict | None:
        """The settings to go on with where memory ran out in a step, or over loading; as of fit.next_smaller."""
        return next_smaller(self._shape, settings, loading=loading, resumed=resumed, gpu=self._gpu)


def if_memory_lasts(work: Callable[[], T]) -> T | None:
    """work's result, or None where memory ran out; nothing of it is left then."""
    try:
        return work()
    except Exception as error:
        if not out_of_memory(error):
            raise
    free_memory()  # outside of except: the error held what the work had made
    return None


def free_memory() -> None:
    """Give back what nothing refers to any more; a GPU's peak begins anew."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def forget_frames(error: BaseException | None) -> None:
    """Let go of what the functions were at work on that an error, and those that led to it, came from: whoever keeps
    the error would keep the model. The lines of its traceback stay."""
    while error:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def keep_freed_memory() -> None:
    """Let glibc keep what a CPU step frees for the next step, which needs the same again: pages given back to the
    kernel are cleared and mapped anew each time, about a tenth of a step at the 0.1B shape. Elsewhere: nothing."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD (malloc.h), bytes
            mallopt(parameter, 2**30)
