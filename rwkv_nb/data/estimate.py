"""What a ctx_len makes of documents, from their lengths alone: how many are cut, and how much is padding."""

from typing import NamedTuple

import numpy as np


class Fit(NamedTuple):
    """Documents of some lengths at one ctx_len. Shares lie between 0 and 1."""

    cut: float       # share of the documents that are longer: split, or cut by dataload pad and only
    lost: float      # share of the tokens that pad and only would lose
    pieces: int      # that split makes
    padding: float   # share of what a micro-batch computes that is padding; packed rows have none
    rows: int        # that pack makes of the pieces, at least


def fit(sizes: np.ndarray, ctx_len: int, micro_bsz: int = 1, accumulate: int = 1, seed: int = 0) -> Fit:
    """sizes: int [n], tokens of each document, the closing 0 with them. Batches are made as data.batches does."""
    sizes = np.asarray(sizes)
    inputs = sizes[sizes > 1] - 1  # the last token is only a target
    pieces = -(-inputs // ctx_len)
    lengths = np.full(pieces.sum(), ctx_len)
    lengths[np.cumsum(pieces) - 1] = inputs - (pieces - 1) * ctx_len
    n, step = len(lengths), micro_bsz * accumulate
    rows = np.zeros(-(-n // step) * step, dtype=np.int64)
    rows[:n] = lengths[np.random.default_rng([seed, 0]).permutation(n)]
    # Within a step rows are sorted by length, so that like ones share a micro-batch.
    rows = -np.sort(-rows.reshape(-1, step), axis=1).reshape(-1, micro_bsz)
    computed = (rows.max(1) * (rows > 0).sum(1)).sum()
    over = np.maximum(inputs - ctx_len, 0)
    return Fit(cut=float((over > 0).mean()) if n else 0.0, lost=float(over.sum() / max(np.sum(sizes), 1)), pieces=n,
               padding=float(1 - lengths.sum() / computed) if n else 0.0, rows=int(-(-lengths.sum() // ctx_len)))
