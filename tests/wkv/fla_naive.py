"""The recurrences of flash-linear-attention in plain PyTorch, under our signature: somebody else's definition.

They are read file by file from a copy of the package, since importing it asks for triton.
"""

import functools
import importlib.util
from pathlib import Path

from einops import rearrange

from rwkv_nb.wkv import fla_op


def load(folder=None):
    """{version: function of wkv7's, wkv6's or wkv5's arguments} from `folder`, one that holds fla/, or from the
    installed package. {} where it is not installed."""
    theirs = as_kernels(folder)
    ways = {7: fla_op.wkv7, 6: fla_op.wkv6, 5: fla_op.wkv5}
    return {v: functools.partial(way, chunk=theirs[max(v, 6)]) for v, way in ways.items()} if theirs else {}


def as_kernels(folder=None):
    """{7, 6: a function that is called as chunk_rwkv7 and chunk_rwkv6 are}, {} where fla is not installed."""
    if folder is None:
        found = importlib.util.find_spec("fla")
        if found is None:
            return {}
        folder = Path(found.submodule_search_locations[0]).parent
    dplr = _module(folder, "fla/ops/generalized_delta_rule/dplr/naive.py").dplr_recurrence
    rwkv6 = _module(folder, "fla/ops/rwkv6/recurrent_naive.py").naive_recurrent_rwkv6

    def chunk_rwkv7(r, w, k, v, a, b, scale, initial_state, output_final_state):
        r = r * scale * r.shape[-1] ** 0.5  # the naive form scales by N^-1/2 in any case
        y, last = dplr(*map(_heads, (r, k, v, a, b, w)), initial_state=initial_state)
        return _heads(y), last

    def chunk_rwkv6(r, k, v, w, u, scale, initial_state, output_final_state):
        y, last = rwkv6(*map(_heads, (r, k, v, w)), u, scale, initial_state, output_final_state)
        return _heads(y), last

    return {7: chunk_rwkv7, 6: chunk_rwkv6}


def _heads(x):
    return rearrange(x, "B T H N -> B H T N")


def _module(folder, path):
    spec = importlib.util.spec_from_file_location(Path(path).stem, Path(folder) / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
