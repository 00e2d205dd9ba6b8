"""Token files as other programs write them, which several folders' tests use."""

import numpy as np

from rwkv_nb.data.binidx import Slices, pair, write_index
from rwkv_nb.data.sources import Documents


def source_of(documents):
    """A source of a list of documents, with their own masks."""
    tokens, mask = (np.concatenate(part) for part in zip(*documents, strict=True))
    sizes = np.array([len(document.tokens) for document in documents])
    return Documents(Slices(tokens, np.cumsum(sizes) - sizes, sizes), lambda *_: mask)


def write_binidx(prefix, documents):
    """Write a .bin/.idx pair of documents of uint16 ids, as they are; returns how many."""
    bin_file, idx_file = pair(prefix)
    tokens = [np.asarray(document, dtype="<u2") for document in documents]
    bin_file.write_bytes(b"".join(document.tobytes() for document in tokens))
    write_index(idx_file, np.array([len(document) for document in tokens], dtype="<i4"))
    return len(tokens)
