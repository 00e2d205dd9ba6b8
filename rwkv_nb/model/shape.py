"""What a checkpoint's keys and sizes say about the model: nobody types n_layer by hand."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..errors import CheckpointError

NAMES = {"x070": "RWKV-7", "x060": "RWKV-6", "x052": "RWKV-5"}
_NOT_YET = {
    "x070a": "RWKV-7a model: RWKV-7 with DeepEmbed, channel mixes scaled by each token's own vector (ffn.s_emb)",
    "x070b": "RWKV-7b model: RWKV-7a with DeepEmbed attention beside the recurrence (blocks.*.qkv)"}


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. rank_*: widths of the low-rank parts, 0 where the version has none.

    w (decay: x070, x060); a, v (value residual), g (gate): x070; mix (each of the five token shifts): x060.
    rank_v_layer0: width of block 0's unused v0 v1 v2 where an x070 file has them, else 0.
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
    rank_mix: int = 0

    @property
    def n_head(self) -> int:
        return self.n_embd // self.head_size

    @property
    def generation(self) -> int:
        """7, 6 or 5: which WKV operator it needs."""
        return int(self.version[2])

    def key_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every checkpoint key with its tensor's shape, in the order of a released file."""
        C, V = self.n_embd, self.vocab_size
        keys = {"emb.weight": (V, C)}
        for i in range(self.n_layer):
            norms = ("ln1", "ln2", "ln0") if i == 0 else ("ln1", "ln2")
            block = {f"{ln}.{p}": (C,) for ln in norms for p in ("weight", "bias")}
            block |= {f"att.{name}": size for name, size in self.att_keys(i).items()}
            block |= {f"ffn.{name}": size for name, size in self.ffn_keys().items()}
            keys |= {f"blocks.{i}.{name}": size for name, size in block.items()}
        return keys | {"ln_out.weight": (C,), "ln_out.bias": (C,), "head.weight": (V, C)}

    def att_keys(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Names and sizes inside a block's time mix."""
        C, heads = self.n_embd, (self.n_head, self.head_size)
        linears = ["receptance", "key", "value", "output"]
        if self.version == "x070":
            keys = {f"x_{c}": (1, 1, C) for c in "rwkvag"}
            ranks = {"w": self.rank_w, "a": self.rank_a, "v": self.rank_v if layer else self.rank_v_layer0}
            for c, rank in ranks.items():
                if rank:
                    keys |= {f"{c}0": (1, 1, C), f"{c}1": (C, rank), f"{c}2": (rank, C)}
            keys |= {"g1": (C, self.rank_g), "g2": (self.rank_g, C)}
            keys |= {"k_k": (1, 1, C), "k_a": (1, 1, C), "r_k": heads}
        elif self.version == "x060":
            keys = {f"time_maa_{c}": (1, 1, C) for c in "xwkvrg"}
            keys |= {"time_maa_w1": (C, 5 * self.rank_mix), "time_maa_w2": (5, self.rank_mix, C)}
            keys |= {"time_decay": (1, 1, C), "time_decay_w1": (C, self.rank_w), "time_decay_w2": (self.rank_w, C)}
        else:
            keys = {f"time_mix_{c}": (1, 1, C) for c in "kvrg"} | {"time_decay": heads}
        if self.version != "x070":
            keys |= {"time_faaaa": heads}
            linears += ["gate"]
        keys |= {f"{name}.weight": (C, C) for name in linears}
        return keys | {"ln_x.weight": (C,), "ln_x.bias": (C,)}

    def ffn_keys(self) -> dict[str, tuple[int, ...]]:
        """Names and sizes inside a block's channel mix."""
        C, F = self.n_embd, self.ffn_dim
        if self.version == "x070":
            return {"x_k": (1, 1, C), "key.weight": (F, C), "value.weight": (C, F)}
        mix = "time_maa" if self.version == "x060" else "time_mix"
        return {f"{mix}_k": (1, 1, C), f"{mix}_r": (1, 1, C), "key.weight": (F, C), "receptance.weight": (C, C),
                "value.weight": (C, F)}

    def linears(self) -> dict[str, tuple[int, int]]:
        """Full name and [out, in] of every linear layer, in order."""
        return {key.removesuffix(".weight"): size for key, size in self.key_shapes().items()
                if key.endswith(".weight") and len(size) == 2 and key != "emb.weight"}

    def n_params(self) -> int:
        """Parameters in all, block 0's unused v0 v1 v2 included where the file has them."""
        return sum(math.prod(shape) for shape in self.key_shapes().values())


def _x070(n_layer: int, n_embd: int, rank_wa: int, rank_v: int, rank_g: int) -> Shape:
    return Shape(n_layer, n_embd, 65536, rank_wa, rank_wa, rank_v, rank_g, ffn_dim=4 * n_embd)


def _older(version: str, n_layer: int, n_embd: int, rank_w: int = 0, rank_mix: int = 0) -> Shape:
    return Shape(n_layer, n_embd, 65536, rank_w, 0, 0, 0, ffn_dim=n_embd * 7 // 2 // 32 * 32, version=version,
                 rank_mix=rank_mix)


# Released RWKV-7 models; the low-rank widths follow no formula.
PUBLISHED = {
    "0.1B": _x070(12, 768, 64, 32, 128),
    "0.4B": _x070(24, 1024, 64, 32, 128),
    "1.5B": _x070(24, 2048, 96, 64, 256),
    "2.9B": _x070(32, 2560, 96, 64, 320),
    "7.2B": _x070(32, 4096, 128, 96, 480),
    "13.3B": _x070(61, 4096, 192, 128, 384),
}
# Released "World" models of the older versions (Peng et al. 2024, arXiv 2404.05892; the 14B is the 7B stacked).
PUBLISHED_OLDER = {
    "v6 1.6B": _older("x060", 24, 2048, 64, 32),
    "v6 3B": _older("x060", 32, 2560, 64, 32),
    "v6 7B": _older("x060", 32, 4096, 128, 64),
    "v6 14B": _older("x060", 61, 4096, 128, 64),
    "v5 0.4B": _older("x052", 24, 1024),
    "v5 1.5B": _older("x052", 24, 2048),
    "v5 3B": _older("x052", 32, 2560),
    "v5 7B": _older("x052", 32, 4096),
}


def detect_version(keys: Iterable[str]) -> str:
    """x070, x070a, x070b, x060 or x052, from key names alone. Raises CheckpointError for none of them."""
    keys = list(keys)

    def has(part: str) -> bool:
        return any(part in key for key in keys)

    if has("att.r_k"):
        if has(".qkv."):
            return "x070b"
        return "x070a" if has("ffn.s_emb") else "x070"
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
    if version not in NAMES:
        raise CheckpointError(f"this is an {_NOT_YET[version]}, {version}, which is not supported yet",
                              fix=f"use a base of {', '.join(f'{n} ({v})' for v, n in NAMES.items())}")
    numbered = [re.match(r"blocks\.(\d{1,18})\.", key) for key in weights]
    layers = 1 + max((int(found[1]) for found in numbered if found), default=0)
    if layers > len(weights):
        raise CheckpointError(f"it has a block {layers - 1} and {len(weights)} tensors", where=f"blocks.{layers - 1}",
                              fix="use a whole, unchanged base model")

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

    ranks = dict.fromkeys(("rank_w", "rank_a", "rank_v", "rank_g"), 0)
    if version == "x070":
        v_layer0 = size(1, "blocks.0.att.v1") if "blocks.0.att.v1" in weights else 0
        ranks |= {f"rank_{c}": size(1, *blocks(f"att.{c}1")) for c in "wag"}
        ranks |= {"rank_v": size(1, *blocks("att.v1", 1)) if layers > 1 else v_layer0, "rank_v_layer0": v_layer0}
    elif version == "x060":
        ranks |= {"rank_w": size(1, *blocks("att.time_decay_w1")), "rank_mix": size(1, *blocks("att.time_maa_w2"))}
    return Shape(
        n_layer=layers, n_embd=size(1, "emb.weight", "head.weight"), vocab_size=size(0, "emb.weight", "head.weight"),
        ffn_dim=size(0, *blocks("ffn.key.weight")), version=version, **ranks,
        head_size=size(1, *blocks("att.r_k" if version == "x070" else "att.time_faaaa")),
    )
