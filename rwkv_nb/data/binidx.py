"""binidx: token files of RWKV's tools, `name.bin` (all tokens, one after another) and `name.idx` (where each begins).

Little-endian. `.idx`: magic, u64 version 1, u8 dtype code, u64 n_sizes, u64 n_doc_idx, then int32 sizes,
int64 byte pointers and int64 doc_idx. One item is one document here, as RWKV's tools write it.
"""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import DataError

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
REMAKE = "make the pair again from its jsonl (notebook 01_prepare_data)"


def pair(prefix: str | Path) -> tuple[Path, Path]:
    """(.bin, .idx) of a prefix, which may itself end in one of the two."""
    prefix = Path(prefix)
    prefix = prefix.with_suffix("") if prefix.suffix in (".bin", ".idx") else prefix
    return prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")


def write_index(path: Path, sizes: np.ndarray) -> None:
    """The .idx of documents of these sizes, int32 [n] in uint16 tokens; it is written in parts, so n may be large."""
    n, step, at = len(sizes), 1 << 20, 0
    with open(path, "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 8, n, n + 1))
        for i in range(0, n, step):
            file.write(sizes[i:i + step].astype("<i4").tobytes())
        for i in range(0, n, step):
            ends = at + 2 * np.cumsum(sizes[i:i + step], dtype="<i8")
            file.write(np.concatenate([[at], ends[:-1]]).astype("<i8").tobytes())
            at = ends[-1]
        for i in range(0, n + 1, step):
            file.write(np.arange(i, min(i + step, n + 1), dtype="<i8").tobytes())


class Slices(Sequence):
    """Documents of one long array: [i] → tokens[starts[i]:starts[i] + sizes[i]], in its own dtype."""

    def __init__(self, tokens: np.ndarray, starts: np.ndarray, sizes: np.ndarray):
        # plain arrays: a slice of a memmap is one again, which takes longer than reading it
        self._tokens, self._starts, self.sizes = map(np.asarray, (tokens, starts, sizes))

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, i: int) -> np.ndarray:
        start = self._starts[i]
        return self._tokens[start:start + self.sizes[i]]


class BinIdx(Slices):
    """Documents of a .bin/.idx pair, memory-mapped: [i] → tokens [T] in the file's own dtype.

    Raises DataError, naming the file, for a pair that is incomplete, damaged or does not belong together.
    """

    def __init__(self, prefix: str | Path):
        self.bin_file, self.idx_file = pair(prefix)
        for path in (self.bin_file, self.idx_file):
            if not path.is_file():
                raise DataError("this half of the .bin/.idx pair is missing", where=path, fix=REMAKE)
        self.dtype, sizes, pointers = _read_index(self.idx_file)
        self._check_fit(sizes, pointers)
        super().__init__(np.memmap(self.bin_file, dtype=self.dtype, mode="r"), pointers // self.dtype.itemsize, sizes)

    def _check_fit(self, sizes: np.ndarray, pointers: np.ndarray) -> None:
        held = self.bin_file.stat().st_size
        if (sizes < 0).any() or (pointers < 0).any() or (pointers % self.dtype.itemsize).any():
            raise DataError("sizes or places in it make no sense", where=self.idx_file, fix=REMAKE)
        # a place near 2**63 plus its size would come out negative: the place itself counts too
        told = max(int((pointers + sizes.astype(np.int64) * self.dtype.itemsize).max()), int(pointers.max()))
        if held != told:
            why = "it is cut off or" if held < told else "it"
            raise DataError(f"it holds {held} bytes, its .idx tells of {told}: {why} belongs to another .idx",
                            where=self.bin_file, fix=REMAKE)


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray]:
    """dtype of the .bin, sizes int32 [n] in tokens, pointers int64 [n] in bytes."""
    with open(path, "rb") as file:
        head, held = file.read(HEADER.size), path.stat().st_size
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise DataError("this is no .idx file: it is empty, cut off or begins otherwise", where=path, fix=REMAKE)
    _, version, code, n, n_doc = HEADER.unpack(head)
    if version != 1 or code not in DTYPES:
        raise DataError(f"version {version}, dtype code {code} cannot be read (version 1, codes {list(DTYPES)} can)",
                        where=path, fix=REMAKE)
    if n == 0:
        raise DataError("there is no document in it", where=path, fix=REMAKE)
    told = HEADER.size + 12 * n + 8 * n_doc
    if held != told:
        raise DataError(f"it has {held} bytes where {n} documents need {told}: the file is cut off or damaged",
                        where=path, fix=REMAKE)
    sizes = np.memmap(path, "<i4", "r", HEADER.size, (n,))
    return np.dtype(DTYPES[code]), sizes, np.memmap(path, "<i8", "r", HEADER.size + 4 * n, (n,))


def unknown_ids(tokens: np.ndarray, tokenizer) -> str:
    """What is wrong with ids that this vocabulary does not have; "" for nothing."""
    if not len(tokens) or 0 <= tokens.min() <= tokens.max() < tokenizer.vocab_size:
        return ""
    bad = tokens.min() if tokens.min() < 0 else tokens.max()
    return f"it has id {bad}; the {tokenizer.name} vocabulary ends at {tokenizer.vocab_size - 1}"
