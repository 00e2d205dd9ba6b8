"""What a checkpoint's keys and sizes say about the model: nobody types n_layer by hand."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..errors import CheckpointError

SUPPORTED = ("x070",)
_NAMES = {"x070": "RWKV-7", "x070a": "RWKV-7a", "x070b": "RWKV-7b", "x060": "RWKV-6", "x052": "RWKV-5"}


@dataclass(frozen=True)
class Shape:
    """Sizes of an RWKV-7 model. rank_*: widths of the low-rank gates w (decay), a, v (value residual), g.

    rank_v_layer0: width of block 0's unused v0 v1 v2 where the file has them, else 0.
    """

    n_layer: int
    n_embd: int
    vocab_size: int
    rank_w: int
    rank_a: int
    rank_v: int
    rank_g: int
    ffn_dim: int
    head_size: int = 64
    rank_v_layer0: int = 0
    version: str = "x070"

    @property
    def n_head(self) -> int:
        return self.n_embd // self.head_size

    def key_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every checkpoint key with its tensor's shape, in the order of a released file."""
        C, V = self.n_embd, self.vocab_size
        keys = {"emb.weight": (V, C)}
        for i in range(self.n_layer):
            keys |= {f"blocks.{i}.{name}": shape for name, shape in self._block_keys(i).items()}
        return keys | {"ln_out.weight": (C,), "ln_out.bias": (C,), "head.weight": (V, C)}

    def _block_keys(self, i: int) -> dict[str, tuple[int, ...]]:
        C, H, N = self.n_embd, self.n_head, self.head_size
        norms = ("ln1", "ln2", "ln0") if i == 0 else ("ln1", "ln2")
        keys = {f"{ln}.{p}": (C,) for ln in norms for p in ("weight", "bias")}
        keys |= {f"att.x_{c}": (1, 1, C) for c in "rwkvag"}
        ranks = {"w": self.rank_w, "a": self.rank_a, "v": self.rank_v if i else self.rank_v_layer0}
        for c, rank in ranks.items():
            if rank:
                keys |= {f"att.{c}0": (1, 1, C), f"att.{c}1": (C, rank), f"att.{c}2": (rank, C)}
        keys |= {"att.g1": (C, self.rank_g), "att.g2": (self.rank_g, C)}
        keys |= {"att.k_k": (1, 1, C), "att.k_a": (1, 1, C), "att.r_k": (H, N)}
        keys |= {f"att.{name}.weight": (C, C) for name in ("receptance", "key", "value", "output")}
        keys |= {"att.ln_x.weight": (C,), "att.ln_x.bias": (C,), "ffn.x_k": (1, 1, C)}
        return keys | {"ffn.key.weight": (self.ffn_dim, C), "ffn.value.weight": (C, self.ffn_dim)}

    def n_params(self) -> int:
        """Parameters in all, block 0's unused v0 v1 v2 included where the file has them."""
        return sum(math.prod(shape) for shape in self.key_shapes().values())


def _published(n_layer: int, n_embd: int, rank_wa: int, rank_v: int, rank_g: int) -> Shape:
    return Shape(n_layer, n_embd, 65536, rank_wa, rank_wa, rank_v, rank_g, ffn_dim=4 * n_embd)


# Released RWKV-7 models; the low-rank widths follow no formula.
PUBLISHED = {
    "0.1B": _published(12, 768, 64, 32, 128),
    "0.4B": _published(24, 1024, 64, 32, 128),
    "1.5B": _published(24, 2048, 96, 64, 256),
    "2.9B": _published(32, 2560, 96, 64, 320),
    "7.2B": _published(32, 4096, 128, 96, 480),
    "13.3B": _published(61, 4096, 192, 128, 384),
}


def detect_version(keys: Iterable[str]) -> str:
    """x070, x070a, x070b, x060 or x052, from key names alone. Raises CheckpointError for none of them."""
    keys = list(keys)

    def has(part: str) -> bool:
        return any(part in key for key in keys)

    if has("att.r_k"):
        return "x070b" if has(".qkv.") else "x070a" if has("ffn.s_emb") else "x070"
    if has("att.time_maa"):
        return "x060"
    if has("att.time_mix") and has("att.gate"):
        return "x052"
    some = ", ".join(sorted(keys)[:4]) or "none"
    raise CheckpointError("these are not the weights of a known RWKV version", where=f"keys: {some} …",
                          fix="give a base model's .pth (a LoRA file alone has no base in it)")


def read_shape(weights: Mapping) -> Shape:
    """Shape of a flat dict of tensors (real, memory-mapped or on the meta device).

    Raises CheckpointError for a version that is not supported yet, and for missing keys, by name.
    """
    version = detect_version(weights)
    if version not in SUPPORTED:
        raise CheckpointError(f"this is an {_NAMES[version]} model ({version}), which is not supported yet",
                              fix="use an RWKV-7 (x070) base")
    layers = 1 + max(int(n[1]) for n in (re.match(r"blocks\.(\d+)\.", key) for key in weights) if n)

    def size(dim: int, *keys: str) -> int:
        """Size along dim of the first of these that is there: the others may be what check_keys has to name."""
        key = next((key for key in keys if key in weights), None)
        if key is None:
            raise CheckpointError("the key is missing, the file is not a whole model", where=keys[0],
                                  fix="download or copy the base again")
        if weights[key].dim() <= dim or not weights[key].shape[dim]:
            raise CheckpointError(f"{key} is {list(weights[key].shape)}", where=key, fix="use an unchanged base model")
        return weights[key].shape[dim]

    def blocks(name: str, first: int = 0) -> list[str]:
        return [f"blocks.{i}.{name}" for i in range(first, layers)]

    v_layer0 = size(1, "blocks.0.att.v1") if "blocks.0.att.v1" in weights else 0
    return Shape(
        n_layer=layers, n_embd=size(1, "emb.weight", "head.weight"), vocab_size=size(0, "emb.weight", "head.weight"),
        rank_w=size(1, *blocks("att.w1")), rank_a=size(1, *blocks("att.a1")),
        rank_v=size(1, *blocks("att.v1", 1)) if layers > 1 else v_layer0, rank_g=size(1, *blocks("att.g1")),
        ffn_dim=size(0, *blocks("ffn.key.weight")), head_size=size(1, *blocks("att.r_k")), rank_v_layer0=v_layer0,
    )
