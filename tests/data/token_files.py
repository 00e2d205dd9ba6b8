"""Token files as other programs write them, which several folders' tests use."""

import numpy as np

from rwkv_nb.data.binidx import pair, write_index


def write_binidx(prefix, documents):
    """Write a .bin/.idx pair of documents of uint16 ids, as they are; returns how many."""
    bin_file, idx_file = pair(prefix)
    tokens = [np.asarray(document, dtype="<u2") for document in documents]
    bin_file.write_bytes(b"".join(document.tobytes() for document in tokens))
    write_index(idx_file, np.array([len(document) for document in tokens], dtype="<i4"))
    return len(tokens)
