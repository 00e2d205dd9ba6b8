"""RWKV models whose parameter names are the checkpoint's keys."""

from .checkpoint import DTYPES, fingerprint, load_model, load_weights, save_weights
from .init import init_weights
from .rwkv import RWKV, State
from .shape import PUBLISHED, PUBLISHED_OLDER, Shape, read_shape

__all__ = ["DTYPES", "PUBLISHED", "PUBLISHED_OLDER", "RWKV", "Shape", "State", "fingerprint", "init_weights",
           "load_model", "load_weights", "read_shape", "save_weights"]
