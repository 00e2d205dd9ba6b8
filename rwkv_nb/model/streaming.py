"""A model's tensors changed and written one at a time, whatever its size: memory holds one of them, a file the rest."""

import contextlib
import io
import mmap
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError

Change = Callable[[str, Tensor], Tensor]
Progress = Callable[[int, int], None]   # bytes done, bytes in all


def unseen(done: int, total: int) -> None:
    """Progress that nobody looks at."""


@contextlib.contextmanager
def parked(weights: Mapping[str, Tensor], folder: Path, change: Change | None = None,
           progress: Progress = unseen) -> Iterator[dict[str, Tensor]]:
    """The tensors, changed, contiguous on the CPU, each with storage of its own.

    Those that were that already stay what they are (such as memory-mapped weights); the others lie in an unnamed
    file in `folder`, mapped, until the block ends. change: (key, tensor) → the tensor that takes its place.
    """
    total, done, places = sum(v.nbytes for v in weights.values()), 0, {}
    with tempfile.TemporaryFile(dir=folder) as file:
        for key, old in weights.items():
            new = change(key, old) if change else old
            ready = new.data_ptr() == old.data_ptr() and new.device.type == "cpu" and new.is_contiguous()
            if not ready or new.untyped_storage().nbytes() != new.nbytes:
                places[key] = (_append(new, file), new.dtype, new.shape)
            done += old.nbytes
            progress(done, 2 * total)   # the other half is writing
        # mapped at the end: small lasting objects between large passing ones would make the heap grow and grow
        file.flush()
        data = mmap.mmap(file.fileno(), 0) if places else b""
        yield {key: _mapped(data, *places[key]) if key in places else old.detach() for key, old in weights.items()}


def _append(tensor: Tensor, file) -> int:
    """Write to the file, not through a mapping: a full disk would kill the process there. Returns the place."""
    start = file.seek(-(-file.seek(0, io.SEEK_END) // 64) * 64)
    file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return start


def _mapped(data: mmap.mmap, start: int, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    return torch.frombuffer(data, dtype=dtype, count=shape.numel(), offset=start).view(shape)


class WatchedFile(io.BufferedWriter):
    """A new file that reports how much of `total` bytes is written, as the second half of the work."""

    def __init__(self, path: Path, total: int, progress: Progress = unseen):
        super().__init__(io.FileIO(path, "w"))
        self.total, self.done, self.progress = total, 0, progress

    def write(self, data) -> int:
        self.done += len(data)
        self.progress(self.total + min(self.done, self.total), 2 * self.total)
        return super().write(data)


def cast(key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another dtype. Raises CheckpointError where a value does not fit it (fp16 ends at 65504)."""
    out = tensor.to(dtype)
    if dtype == torch.float16 and tensor.dtype != dtype and not out.isfinite().all():
        raise CheckpointError(f"a value of {tensor.abs().max():.3g} does not fit float16", where=key,
                              fix="write bfloat16, which has the range of float32")
    return out
