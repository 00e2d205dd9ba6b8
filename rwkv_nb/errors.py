"""One family of errors: each says what is wrong, where, and what to do about it."""

import difflib
import re
import traceback
from collections.abc import Iterable
from pathlib import Path


class RwkvNbError(Exception):
    """Base of every error that this library raises on purpose.

    what:  the problem, in one plain sentence
    where: file:line, checkpoint key, setting or notebook cell; empty if the sentence says it
    fix:   what the reader can do next
    """

    def __init__(self, what: str, *, where: str = "", fix: str = ""):
        self.what, self.where, self.fix = what, str(where), fix
        said = not where or what.startswith(self.where)
        parts = [what if said else f"{self.where}: {what}"]
        if fix:
            parts.append(f"→ {fix}")
        super().__init__("\n".join(parts))

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in a notebook: it is about the reader's files, so no pages of this library's code."""
        raised = traceback.extract_tb(self.__traceback__)[-1]
        return [f"\x1b[1;31m{type(self).__name__}\x1b[0m: {self}",
                f"\x1b[2m(raised in {Path(raised.filename).name}, line {raised.lineno}; %debug goes there)\x1b[0m"]


class SettingsError(RwkvNbError):
    """A setting that is unknown, out of range or contradicts another."""


class DataError(RwkvNbError):
    """Training text or a token file that cannot be used as it is."""


class CheckpointError(RwkvNbError):
    """Model weights that are missing, damaged, of another version or of another shape."""


class AdapterError(RwkvNbError):
    """A LoRA file that is damaged or does not belong to this base."""


class KernelError(RwkvNbError):
    """A WKV operator that cannot run here."""


class RunError(RwkvNbError):
    """A run's folder that is in use, incomplete or not writable."""


class InUseError(RunError):
    """A run's folder that another process is at work in."""


class TrainingError(RwkvNbError):
    """Training that had to stop, such as a loss that is not a number."""


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """A fix for a mistyped word: the nearest known one, or `otherwise` where none is near."""
    near = difflib.get_close_matches(str(word), list(map(str, known)), 1, 0.5)
    return f"did you mean {near[0]}?" if near else otherwise


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; torch's are RuntimeErrors, of a GPU and of a CPU.

    cuBLAS says ALLOC_FAILED, or NOT_INITIALIZED where there is no room for its handle; CUDA's error 2 is
    cudaErrorMemoryAllocation, by its number in what our own kernels raise.
    """
    words = ("out of memory|allocate memory|not enough memory|bad_alloc|CUBLAS_STATUS_ALLOC_FAILED"
             r"|CUBLAS_STATUS_NOT_INITIALIZED|CUDA error 2\b")
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and bool(re.search(words, str(error)))
