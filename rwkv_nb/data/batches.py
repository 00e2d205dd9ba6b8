"""Documents in a seeded order, cut into pieces that fit ctx_len, in batches; resumes at the exact place.

A piece of T+1 tokens gives T inputs and, one further on, T targets. A long document becomes several pieces, each
beginning with the last token of the one before, so every token but a document's first is a target exactly once.
"""

import zlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from .mixing import Selection
from .sources import Document, Documents


class Batch(NamedTuple):
    """One micro-batch, padded with 0 on the right to its longest row."""

    inputs: Tensor   # int64 [B,T]
    targets: Tensor  # int64 [B,T]
    mask: Tensor     # bool [B,T] on the CPU: is this target trained; False on padding
    starts: Tensor | None = None  # bool [B,T] on the CPU, packed rows only: does a document begin with this input


class Pieces:
    """Rows of documents cut into pieces: row k is items[first[k]:first[k + 1]]. Each epoch is an order of all rows."""

    def __init__(self, documents: Documents | Selection, items: np.ndarray, first: np.ndarray):
        self._documents, self._items, self._first = documents, items, first

    def __len__(self) -> int:
        return len(self._first) - 1

    def draw(self, random: np.random.Generator) -> np.ndarray:
        """An epoch's rows, int [n], in order."""
        return random.permutation(len(self))

    def row(self, k: int) -> list[Document]:
        """The pieces of row k."""
        return [self._documents.piece(*item) for item in self._items[self._first[k]:self._first[k + 1]].tolist()]


class Places:
    """Rows of ctx_len inputs from any place of all documents' tokens in a row. Each epoch draws other places."""

    def __init__(self, documents: Documents | Selection, ctx_len: int):
        self._documents, self._ctx_len = documents, ctx_len
        ends = np.cumsum(documents.sizes)
        self._starts, self._total = np.concatenate([[0], ends[:-1]]), int(ends[-1])

    def __len__(self) -> int:
        return max((self._total - 1) // self._ctx_len, 1)

    def draw(self, random: np.random.Generator) -> np.ndarray:
        """An epoch's places, int [n], in order."""
        return random.integers(0, max(self._total - self._ctx_len, 1), len(self))

    def row(self, place: int) -> list[Document]:
        """ctx_len + 1 tokens from there on, or what there is, as one piece."""
        i = int(np.searchsorted(self._starts, place, side="right")) - 1
        start, left, parts = place - int(self._starts[i]), self._ctx_len + 1, []
        while left > 0 and i < len(self._documents):
            parts.append(self._documents.piece(i, start, start + left))
            left -= len(parts[-1].tokens)
            start, i = 0, i + 1
        return [Document(*(np.concatenate(part) for part in zip(*parts, strict=True)))]


class Batches:
    """Batches of `documents` for one run.

    Every epoch is its own permutation of all rows. With epoch_steps 0 an epoch is once through them, and its last
    step may be smaller; otherwise every step is full, and the order goes on where the last epoch stopped.
    `items` int64 [n,3] holds (document, start, stop) of each piece. Raises DataError where nothing can be trained.

    dataload: "split"  a row is a piece; a long document is several
              "pack"   a row is some pieces of up to ctx_len inputs together, a micro-batch one long row of micro_bsz
                       such rows: nothing is padded, and `starts` says where a document begins
              "pad"    a row is a document, cut at ctx_len
              "only"   the same, one row a micro-batch whatever micro_bsz says
              "get"    a row is ctx_len inputs from any place of all tokens in a row, drawn anew each epoch
    rank, world_size: this process's share of each step: every world_size-th row. All ranks get as many micro-batches;
              one that has no row left for one gets a row of which nothing is trained.
    """

    def __init__(self, documents: Documents | Selection, *, ctx_len: int, micro_bsz: int, accumulate: int, seed: int,
                 epoch_steps: int = 0, device: str | torch.device = "cpu", dataload: str = "split", rank: int = 0,
                 world_size: int = 1):
        self.documents, self.ctx_len, self.seed, self.dataload = documents, ctx_len, seed, dataload
        self.micro_bsz = 1 if dataload == "only" else micro_bsz
        self.device, self._epoch_steps = device, epoch_steps
        self._rank, self._ranks = rank, world_size
        self.accumulate(accumulate)
        self._cut()
        if dataload == "get":
            self._rows = Places(documents, ctx_len)
        else:
            first = self._pack() if dataload == "pack" else np.arange(len(self.items) + 1)
            self._rows = Pieces(documents, self.items, first)
        self._position = 0         # rows handed out since the beginning
        self._order = (-1, None)   # an epoch and its order

    def _cut(self) -> None:
        """Make `items`, and a checksum of everything that is trained on."""
        sizes, whole = self.documents.sizes, self.documents.trained == self.documents.sizes
        counts = np.maximum(-(-(sizes - 1) // self.ctx_len), 1)
        self._n_split, self._longest, self._n_lost = int((counts > 1).sum()), int(sizes.max(initial=0)), 0
        if self.dataload in ("pad", "only"):
            counts[:] = 1
            self._n_lost = int(np.maximum(sizes - self.ctx_len - 1, 0).sum())
        first = np.cumsum(counts) - counts
        number = np.repeat(np.arange(len(sizes)), counts)
        start = (np.arange(len(number)) - first[number]) * self.ctx_len
        stop = np.minimum(start + self.ctx_len + 1, sizes[number])
        trained = stop - start > 1
        # Most documents are trained whole, or are one piece with several trained tokens: no need to look at those.
        for i in np.flatnonzero(~whole & ((sizes > self.ctx_len + 1) | (self.documents.trained < 2))):
            pieces = slice(first[i], first[i] + counts[i])
            before = np.cumsum(self.documents[i].mask)
            trained[pieces] &= before[stop[pieces] - 1] > before[start[pieces]]
        self._n_idle = int((~trained).sum())
        if not trained.any():
            raise DataError("nothing in the data is trained", where=self.documents.source,
                            fix="check the template: with chat, only assistant turns are; plain trains everything")
        self.items = np.stack([number, start, stop], 1)[trained]
        self._checksum = zlib.crc32(self.items, zlib.crc32(f"{self.dataload} {self.documents.checksum}".encode()))

    def _pack(self) -> np.ndarray:
        """Put the pieces in an order of their own, as many in a row as fit; returns where each row begins, and the end.
        Rows stay together in every epoch."""
        self.items = self.items[np.random.default_rng(self.seed).permutation(len(self.items))]
        first, room = [0], self.ctx_len
        for k, size in enumerate((self.items[:, 2] - self.items[:, 1] - 1).tolist()):
            if size > room:
                first.append(k)
                room = self.ctx_len
            room -= size
        return np.array([*first, len(self.items)])

    def accumulate(self, micro_batches: int) -> None:
        """Micro-batches in each step from the next one on."""
        self.step_items = self.micro_bsz * micro_batches * self._ranks

    @property
    def steps_per_epoch(self) -> int:
        """Steps of a whole epoch as things are."""
        return self._epoch_steps or -(-len(self._rows) // self.step_items)

    def progress(self, step: int) -> tuple[int, float]:
        """Epochs completed after `step` steps, and the share of the next one that is done."""
        if self._epoch_steps:
            done, unit = step, self._epoch_steps
        else:
            done, unit = self._position, len(self._rows)
        return done // unit, done % unit / unit

    def total_steps(self, step: int, epochs: int) -> int:
        """Steps of a run of so many epochs, `step` of them done, if nothing changes any more."""
        if self._epoch_steps:
            return epochs * self._epoch_steps
        done, place = divmod(self._position, len(self._rows))
        in_this_epoch = -(-(len(self._rows) - place) // self.step_items)
        return step + in_this_epoch + (epochs - done - 1) * self.steps_per_epoch

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next optimizer step."""
        count, size = self.step_items, self.micro_bsz
        if not self._epoch_steps:
            count = min(count, len(self._rows) - self._position % len(self._rows))
        rows = [self._row(self._position + k) for k in range(count)]
        self._position += count
        # Within a step the order means nothing: rows of like length side by side leave little to pad.
        rows.sort(key=lambda row: -sum(len(piece.tokens) for piece in row))
        mine, most = rows[self._rank::self._ranks], -(-count // self._ranks)
        batches = [self._batch(mine[k:k + size]) for k in range(0, len(mine), size)]
        while len(batches) < -(-most // size):
            spare = self._batch(rows[-1:])
            batches.append(spare._replace(mask=torch.zeros_like(spare.mask)))
        return batches

    def _row(self, position: int) -> list[Document]:
        """The pieces of the row at this place of the order; one, unless rows are packed."""
        epoch, place = divmod(position, len(self._rows))
        if self._order[0] != epoch:
            self._order = epoch, self._rows.draw(np.random.default_rng([self.seed, epoch]))
        return self._rows.row(int(self._order[1][place]))

    def _batch(self, rows: list[list[Document]]) -> Batch:
        packed = self.dataload == "pack"
        if packed:
            rows = [[piece for row in rows for piece in row]]
        shape = len(rows), max(sum(len(piece.tokens) - 1 for piece in row) for row in rows)
        inputs, targets = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        mask, starts = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
        for number, row in enumerate(rows):
            start = 0
            for tokens, trained in row:
                stop = start + len(tokens) - 1
                inputs[number, start:stop] = tokens[:-1]
                targets[number, start:stop] = tokens[1:]
                mask[number, start:stop] = trained[1:]
                starts[number, start] = True
                start = stop
        inputs, targets = (torch.from_numpy(a).to(self.device, non_blocking=True) for a in (inputs, targets))
        return Batch(inputs, targets, torch.from_numpy(mask), torch.from_numpy(starts) if packed else None)

    def state(self) -> dict[str, int]:
        """Where the order stands, and what it is an order of."""
        return {"position": self._position, "seed": self.seed, "items": len(self._rows), "checksum": self._checksum}

    def load(self, state: dict[str, int]) -> None:
        """Go on from state(), on any number of ranks. Raises DataError where seed or data are others."""
        now = self.state()
        if differing := [name for name in ("seed", "items", "checksum") if state[name] != now[name]]:
            told = ", ".join(f"{name} {state[name]} then, {now[name]} now" for name in differing)
            raise DataError(f"the run began with other data ({told})", where=self.documents.source,
                            fix="give data_file, template, ctx_len and random_seed as they were, or start a new run")
        self._position = state["position"]

    def notices(self) -> list[str]:
        """What a person should know before training, a sentence each."""
        told, n = list(self.documents.notices), len(self._rows)
        if self._longest <= self.ctx_len:
            told.append(f"the longest document has {self._longest} tokens: a ctx_len of {self.ctx_len} is more than "
                        "it needs")
        if self.dataload != "get":
            if self._n_split:
                how = f"cut: {self._n_lost} tokens are lost" if self._n_lost else "split; nothing is lost"
                told.append(f"{self._n_split} of {len(self.documents)} documents are longer than ctx_len "
                            f"{self.ctx_len} and are {how}")
            if self._n_idle:
                told.append(f"{self._n_idle} pieces have nothing that is trained and are left out")
        if n < self.step_items:
            then = "a step sees some of them more than once" if self._epoch_steps else "each step is smaller"
            told.append(f"a step takes {self.step_items} pieces, the data has {n}: {then}")
        if self._epoch_steps:
            share = self.steps_per_epoch * self.step_items / n
            told.append(f"an epoch is {self.steps_per_epoch} steps, {share:.2f} times through the data; "
                        "the next epoch goes on from there")
        return told
