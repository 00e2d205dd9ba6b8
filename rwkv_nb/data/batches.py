"""Documents in a seeded order, cut into pieces that fit ctx_len, in batches; resumes at the exact place.

A piece of T+1 tokens gives T inputs and, one further on, T targets. A long document becomes several pieces, each
beginning with the last token of the one before, so every token but a document's first is a target exactly once.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from .sources import Document


class Batch(NamedTuple):
    """One micro-batch, padded with 0 on the right to its longest row."""

    inputs: Tensor   # int64 [B,T]
    targets: Tensor  # int64 [B,T]
    mask: Tensor     # bool [B,T] on the CPU: is this target trained; False on padding
    starts: Tensor | None = None  # bool [B,T] on the CPU, packed rows only: does a document begin with this input


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

    def __init__(self, documents: Sequence[Document], *, ctx_len: int, micro_bsz: int, accumulate: int, seed: int,
                 epoch_steps: int = 0, device: str | torch.device = "cpu", dataload: str = "split", rank: int = 0,
                 world_size: int = 1):
        self.documents, self.ctx_len, self.seed, self.dataload = documents, ctx_len, seed, dataload
        self.micro_bsz = 1 if dataload == "only" else micro_bsz
        self.device, self._epoch_steps, self._whole_epochs = device, epoch_steps, not epoch_steps
        self._rank, self._ranks = rank, world_size
        self.accumulate(accumulate)
        self._cut()
        self._position = 0         # rows handed out since the beginning
        self._order = (-1, None)   # an epoch and its order

    def _cut(self) -> None:
        """Make `items`, the rows of them, and a checksum of everything that is trained on."""
        items, checksum, self._n_split, self._n_idle, self._longest, self._n_lost = [], 0, 0, 0, 0, 0
        whole = self.dataload in ("split", "pack")
        for i in range(len(self.documents)):
            tokens, mask = self.documents[i]
            checksum = zlib.crc32(np.packbits(mask), zlib.crc32(tokens, checksum))
            self._longest = max(self._longest, len(tokens))
            starts = range(0, max(len(tokens) - 1, 1), self.ctx_len)
            self._n_split += len(starts) > 1
            self._n_lost += 0 if whole else max(len(tokens) - self.ctx_len - 1, 0)
            for start in starts if whole else starts[:1]:
                stop = min(start + self.ctx_len + 1, len(tokens))
                if mask[start + 1:stop].any():
                    items.append((i, start, stop))
                else:
                    self._n_idle += 1
        if not items:
            raise DataError("nothing in the data is trained", where=getattr(self.documents, "source", "documents"),
                            fix="check the template: with chat, only assistant turns are; plain trains everything")
        self.items = np.array(items, dtype=np.int64)
        self._checksum = zlib.crc32(self.items, zlib.crc32(self.dataload.encode(), checksum))
        self._first = np.arange(len(items) + 1)  # row k is items[first[k]:first[k + 1]]
        if self.dataload == "pack":
            self._pack()
        self._n_rows = len(self._first) - 1
        if self.dataload == "get":
            self._ends = np.cumsum([len(document.tokens) for document in self.documents])
            self._n_rows = max(int(self._ends[-1] - 1) // self.ctx_len, 1)

    def _pack(self) -> None:
        """Pieces in an order of their own, as many in a row as fit. Rows stay together in every epoch."""
        self.items = self.items[np.random.default_rng(self.seed).permutation(len(self.items))]
        first, room = [0], self.ctx_len
        for k, size in enumerate((self.items[:, 2] - self.items[:, 1] - 1).tolist()):
            if size > room:
                first.append(k)
                room = self.ctx_len
            room -= size
        self._first = np.array([*first, len(self.items)])

    def accumulate(self, micro_batches: int) -> None:
        """Micro-batches in each step from the next one on."""
        self.step_items = self.micro_bsz * micro_batches * self._ranks

    @property
    def steps_per_epoch(self) -> int:
        """Steps of a whole epoch as things are."""
        return self._epoch_steps or -(-self._n_rows // self.step_items)

    def progress(self, step: int) -> tuple[int, float]:
        """Epochs completed after `step` steps, and the share of the next one that is done."""
        done, unit = (step, self._epoch_steps) if self._epoch_steps else (self._position, self._n_rows)
        return done // unit, done % unit / unit

    def total_steps(self, step: int, epochs: int) -> int:
        """Steps of a run of so many epochs, `step` of them done, if nothing changes any more."""
        if self._epoch_steps:
            return epochs * self._epoch_steps
        done, place = divmod(self._position, self._n_rows)
        return step - (place - self._n_rows) // self.step_items + (epochs - done - 1) * self.steps_per_epoch

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next optimizer step."""
        n, count, size = self._n_rows, self.step_items, self.micro_bsz
        if self._whole_epochs:
            count = min(count, n - self._position % n)
        rows = [self._row(self._position + k) for k in range(count)]
        self._position += count
        # Within a step the order means nothing: rows of like length side by side leave little to pad.
        rows.sort(key=lambda row: -sum(len(piece.tokens) for piece in row))
        mine, most = rows[self._rank::self._ranks], -(-count // self._ranks)
        batches = [self._batch(mine[k:k + size]) for k in range(0, len(mine), size)]
        for _ in range(len(batches), -(-most // size)):
            spare = self._batch(rows[-1:])
            batches.append(spare._replace(mask=torch.zeros_like(spare.mask)))
        return batches

    def _row(self, position: int) -> list[Document]:
        """The pieces of the row at this place of the order; one, unless rows are packed."""
        epoch, place = divmod(position, self._n_rows)
        if self._order[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._order = epoch, (rng.permutation(self._n_rows) if self.dataload != "get" else rng.integers(
                0, max(int(self._ends[-1]) - self.ctx_len, 1), self._n_rows))
        row = self._order[1][place]
        if self.dataload == "get":
            return [self._slice(int(row))]
        pieces = self.items[self._first[row]:self._first[row + 1]].tolist()
        return [Document(*(part[start:stop] for part in self.documents[i])) for i, start, stop in pieces]

    def _slice(self, start: int) -> Document:
        """ctx_len + 1 tokens, or what there is, from a place in all documents in a row."""
        parts, left, i = [], self.ctx_len + 1, int(np.searchsorted(self._ends, start, side="right"))
        start -= int(self._ends[i - 1]) if i else 0
        while left > 0 and i < len(self.documents):
            parts.append(Document(*(part[start:start + left] for part in self.documents[i])))
            left, start, i = left - len(parts[-1].tokens), 0, i + 1
        return Document(*(np.concatenate(part) for part in zip(*parts, strict=True)))

    def _batch(self, rows: list[list[Document]]) -> Batch:
        if packed := self.dataload == "pack":
            rows = [[piece for row in rows for piece in row]]
        shape = len(rows), max(sum(len(piece.tokens) - 1 for piece in row) for row in rows)
        inputs, targets = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        mask, starts = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
        for number, row in enumerate(rows):
            at = 0
            for tokens, trained in row:
                place = number, slice(at, at := at + len(tokens) - 1)
                inputs[place], targets[place], mask[place] = tokens[:-1], tokens[1:], trained[1:]
                starts[number, place[1].start] = True
        inputs, targets = (torch.from_numpy(a).to(self.device, non_blocking=True) for a in (inputs, targets))
        return Batch(inputs, targets, torch.from_numpy(mask), torch.from_numpy(starts) if packed else None)

    def state(self) -> dict[str, int]:
        """Where the order stands, and what it is an order of."""
        return {"position": self._position, "seed": self.seed, "items": self._n_rows, "checksum": self._checksum}

    def load(self, state: dict[str, int]) -> None:
        """Go on from state(), on any number of ranks. Raises DataError where seed or data are others."""
        now = self.state()
        if differing := [name for name in ("seed", "items", "checksum") if state[name] != now[name]]:
            told = ", ".join(f"{name} {state[name]} then, {now[name]} now" for name in differing)
            raise DataError(f"the run began with other data ({told})", where=getattr(self.documents, "source", ""),
                            fix="give data_file, template, ctx_len and random_seed as they were, or start a new run")
        self._position = state["position"]

    def notices(self) -> list[str]:
        """What a person should know before training, a sentence each."""
        n, told = self._n_rows, list(getattr(self.documents, "notices", []))
        if self._longest <= self.ctx_len:
            told.append(f"the longest document has {self._longest} tokens: a ctx_len of {self.ctx_len} is more than "
                        "it needs")
        if self._n_split and self.dataload != "get":
            told.append(f"{self._n_split} of {len(self.documents)} documents are longer than ctx_len {self.ctx_len} "
                        "and are " + (f"cut: {self._n_lost} tokens are lost" if self._n_lost else
                                      "split; nothing is lost"))
        if self._n_idle and self.dataload != "get":
            told.append(f"{self._n_idle} pieces have nothing that is trained and are left out")
        if n < self.step_items:
            told.append(f"a step takes {self.step_items} pieces, the data has {n}: " + (
                "each step is smaller" if self._whole_epochs else "a step sees some of them more than once"))
        if not self._whole_epochs:
            share = self.steps_per_epoch * self.step_items / n
            told.append(f"an epoch is {self.steps_per_epoch} steps, {share:.2f} times through the data; "
                        "the next epoch goes on from there")
        return told
