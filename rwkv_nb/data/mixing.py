"""Some documents of a source, in any order and number: what is held out, repeated, mixed with another source.

Only indices are made; the documents stay where they are.
"""

import zlib
from collections.abc import Sequence

import numpy as np

from ..errors import DataError


class Selection(Sequence):
    """Documents chosen from sources by index (int [n], counting through all of them): len(), [i] → Document."""

    def __init__(self, sources: Sequence[Sequence], index: np.ndarray, notice: str = ""):
        self._sources, self._index = sources, index
        self._starts = np.cumsum([0, *(len(source) for source in sources)])[:-1]
        self.sizes = np.concatenate([source.sizes for source in sources])[index]
        self.trained = np.concatenate([source.trained for source in sources])[index]
        self.checksum = zlib.crc32(index, zlib.crc32(repr([source.checksum for source in sources]).encode()))
        self.source = " + ".join(source.source for source in sources)
        self.notices = [told for source in sources for told in source.notices]
        if notice:
            self.notices.append(notice)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, i: int):
        return self.piece(range(len(self))[i], 0, None)

    def piece(self, i: int, start: int, stop: int | None):
        """Tokens start:stop of document i."""
        place = int(self._index[i])
        which = int(np.searchsorted(self._starts, place, side="right")) - 1
        return self._sources[which].piece(place - int(self._starts[which]), start, stop)


def split(documents: Sequence, share: float, seed: int) -> tuple[Sequence, Sequence]:
    """(the others, round(share · n) documents drawn by seed), both in the order they stand in."""
    n = len(documents)
    out = np.zeros(n, dtype=bool)
    out[np.random.default_rng([seed, 1]).permutation(n)[:round(share * n)]] = True
    if out.all():
        raise DataError(f"holding out {share:.0%} of {n} documents leaves none", where="heldout", fix="make it smaller")
    if not out.any():
        return documents, Selection([documents], np.arange(0))
    return (Selection([documents], np.flatnonzero(~out), f"{out.sum()} of {n} documents are held out"),
            Selection([documents], np.flatnonzero(out)))


def repeated(documents: Sequence, times: float, seed: int) -> Sequence:
    """All documents ⌊times⌋ times over, and a part of them, drawn by seed, once more."""
    if times == 1:
        return documents
    index = _times(len(documents), times, seed)
    return Selection([documents], index, f"{len(documents)} documents are read {times:g} times: {len(index)} an epoch")


def mixed(documents: Sequence, more: Sequence, share: float, seed: int) -> Selection:
    """All documents once, and so much of `more`, repeated or drawn by seed, that it makes `share` of all tokens."""
    n, times = len(documents), share / (1 - share) * documents.sizes.sum() / max(more.sizes.sum(), 1)
    index = np.concatenate([np.arange(n), n + _times(len(more), times, seed)])
    part = int(more.sizes[index[n:] - n].sum())
    notice = (f"{part / (part + documents.sizes.sum()):.1%} of the tokens come from {more.source}, "
              f"{len(index) - n} documents of its {len(more)}")
    return Selection([documents, more], index, notice)


def _times(n: int, times: float, seed: int) -> np.ndarray:
    whole, part = divmod(times, 1)
    some = np.sort(np.random.default_rng([seed, 2]).permutation(n)[:round(part * n)])
    index = np.concatenate([np.tile(np.arange(n), int(whole)), some])
    return index if len(index) else np.arange(min(n, 1))
