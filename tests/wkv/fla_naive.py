"""The recurrences of flash-linear-attention in plain PyTorch, under our signature: somebody else's definition.

They are read file by file from a copy of the package, since importing it asks for a GPU.
"""

import importlib.util
from pathlib import Path

import torch
from einops import rearrange


def load(folder=None):
    """{version: function of wkv7's, wkv6's or wkv5's arguments} from `folder`, one that holds fla/, or from the
    installed package. {} where it is not installed."""
    if folder is None:
        found = importlib.util.find_spec("fla")
        if found is None:
            return {}
        folder = Path(found.submodule_search_locations[0]).parent
    dplr = _module(folder, "fla/ops/generalized_delta_rule/dplr/naive.py").dplr_recurrence
    rwkv6 = _module(folder, "fla/ops/rwkv6/recurrent_naive.py").naive_recurrent_rwkv6

    def wkv7(r, w, k, v, a, b, state):
        logd = -torch.exp(w)  # theirs scales r by N^-1/2
        y, last = dplr(*map(_heads, (r * r.shape[-1] ** 0.5, k, v, a, b, logd)), initial_state=state.mT)
        return _heads(y), last.mT

    def wkv6(r, w, k, v, u, state):
        y, last = rwkv6(*map(_heads, (r, k, v, -torch.exp(w))), u, scale=1.0, initial_state=state.mT,
                        output_final_state=True)
        return _heads(y), last.mT

    def wkv5(r, w, k, v, u, state):
        return wkv6(r, w.expand(r.shape), k, v, u, state)

    return {7: wkv7, 6: wkv6, 5: wkv5}


def _heads(x):
    return rearrange(x, "B T H N -> B H T N")


def _module(folder, path):
    spec = importlib.util.spec_from_file_location(Path(path).stem, Path(folder) / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
