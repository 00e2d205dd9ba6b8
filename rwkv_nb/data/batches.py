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
    """One micro-batch, padded with 0 on the right to its longest piece."""

    inputs: Tensor   # int64 [B,T]
    targets: Tensor  # int64 [B,T]
    mask: Tensor     # bool [B,T]: is this target trained; False on padding


class Batches:
    """Batches of `documents` for one run.

    Every epoch is its own permutation of all pieces. With epoch_steps 0 an epoch is once through them, and its last
    step may be smaller; otherwise every step is full, and the order goes on where the last epoch stopped.
    `items` int64 [n,3] holds (document, start, stop) of each piece. Raises DataError where nothing can be trained.
    """

    def __init__(self, documents: Sequence[Document], *, ctx_len: int, micro_bsz: int, accumulate: int, seed: int,
                 epoch_steps: int = 0, device: str | torch.device = "cpu"):
        self.documents, self.ctx_len, self.micro_bsz, self.seed = documents, ctx_len, micro_bsz, seed
        self.device, self._epoch_steps, self._whole_epochs = device, epoch_steps, not epoch_steps
        self.accumulate(accumulate)
        self._cut()
        self._position = 0         # pieces handed out since the beginning
        self._order = (-1, None)   # an epoch and its permutation

    def _cut(self) -> None:
        """Make `items`, and a checksum of everything that is trained on."""
        items, checksum, self._n_split, self._n_idle, self._longest = [], 0, 0, 0, 0
        for i in range(len(self.documents)):
            tokens, mask = self.documents[i]
            checksum = zlib.crc32(np.packbits(mask), zlib.crc32(tokens, checksum))
            self._longest = max(self._longest, len(tokens))
            starts = range(0, max(len(tokens) - 1, 1), self.ctx_len)
            self._n_split += len(starts) > 1
            for start in starts:
                stop = min(start + self.ctx_len + 1, len(tokens))
                if mask[start + 1:stop].any():
                    items.append((i, start, stop))
                else:
                    self._n_idle += 1
        if not items:
            raise DataError("nothing in the data is trained", where=getattr(self.documents, "source", "documents"),
                            fix="check the template: with chat, only assistant turns are; plain trains everything")
        self.items = np.array(items, dtype=np.int64)
        self._checksum = zlib.crc32(self.items, checksum)

    def accumulate(self, micro_batches: int) -> None:
        """Micro-batches in each step from the next one on."""
        self.step_items = self.micro_bsz * micro_batches

    @property
    def steps_per_epoch(self) -> int:
        """Steps of a whole epoch as things are."""
        return self._epoch_steps or -(-len(self.items) // self.step_items)

    def progress(self, step: int) -> tuple[int, float]:
        """Epochs completed after `step` steps, and the share of the next one that is done."""
        done, unit = (step, self._epoch_steps) if self._epoch_steps else (self._position, len(self.items))
        return done // unit, done % unit / unit

    def total_steps(self, step: int, epochs: int) -> int:
        """Steps of a run of so many epochs, `step` of them done, if nothing changes any more."""
        if self._epoch_steps:
            return epochs * self._epoch_steps
        done, place = divmod(self._position, len(self.items))
        return step - (place - len(self.items)) // self.step_items + (epochs - done - 1) * self.steps_per_epoch

    @property
    def epoch(self) -> int:
        """Times that every piece has been handed out."""
        return self._position // len(self.items)

    def next_step(self) -> list[Batch]:
        """The micro-batches of the next optimizer step."""
        n, count = len(self.items), self.step_items
        if self._whole_epochs:
            count = min(count, n - self._position % n)
        pieces = self.items[[self._piece(self._position + k) for k in range(count)]]
        self._position += count
        # Within a step the order means nothing: pieces of like length side by side leave little to pad.
        pieces = pieces[np.argsort(pieces[:, 1] - pieces[:, 2], kind="stable")]
        return [self._batch(pieces[k:k + self.micro_bsz]) for k in range(0, count, self.micro_bsz)]

    def _piece(self, position: int) -> int:
        epoch, place = divmod(position, len(self.items))
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.items))
        return self._order[1][place]

    def _batch(self, pieces: np.ndarray) -> Batch:
        shape = len(pieces), int((pieces[:, 2] - pieces[:, 1]).max()) - 1
        inputs, targets = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        mask = np.zeros(shape, dtype=bool)
        for row, (i, start, stop) in enumerate(pieces):
            document, length = self.documents[i], stop - start - 1
            inputs[row, :length] = document.tokens[start:stop - 1]
            targets[row, :length] = document.tokens[start + 1:stop]
            mask[row, :length] = document.mask[start + 1:stop]
        return Batch(*(torch.from_numpy(a).to(self.device) for a in (inputs, targets, mask)))

    def state(self) -> dict[str, int]:
        """Where the order stands, and what it is an order of."""
        return {"position": self._position, "seed": self.seed, "items": len(self.items), "checksum": self._checksum}

    def load(self, state: dict[str, int]) -> None:
        """Go on from state(). Raises DataError where seed or data are others."""
        now = self.state()
        if differing := [name for name in ("seed", "items", "checksum") if state[name] != now[name]]:
            told = ", ".join(f"{name} {state[name]} then, {now[name]} now" for name in differing)
            raise DataError(f"the run began with other data ({told})", where=getattr(self.documents, "source", ""),
                            fix="give data_file, template, ctx_len and random_seed as they were, or start a new run")
        self._position = state["position"]

    def notices(self) -> list[str]:
        """What a person should know before training, a sentence each."""
        n, told = len(self.items), list(getattr(self.documents, "notices", []))
        if self._longest <= self.ctx_len:
            told.append(f"the longest document has {self._longest} tokens: a ctx_len of {self.ctx_len} is more than "
                        "it needs")
        if self._n_split:
            told.append(f"{self._n_split} of {len(self.documents)} documents are longer than ctx_len {self.ctx_len} "
                        "and are split; nothing is lost")
        if self._n_idle:
            told.append(f"{self._n_idle} pieces have nothing that is trained and are left out")
        if n < self.step_items:
            told.append(f"a step takes {self.step_items} pieces, the data has {n}: " + (
                "each step is smaller" if self._whole_epochs else "a step sees some of them more than once"))
        if not self._whole_epochs:
            share = self.steps_per_epoch * self.step_items / n
            told.append(f"an epoch is {self.steps_per_epoch} steps, {share:.2f} times through the data; "
                        "the next epoch goes on from there")
        return told
