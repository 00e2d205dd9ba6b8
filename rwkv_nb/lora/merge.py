"""Merging: W + strength · α/R · B A for every adapted linear, written as one complete model, with a proof."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import RunError, SettingsError
from ..model import fingerprint, load_model, load_weights, read_shape, save_weights
from ..model.checkpoint import check_keys
from .adapter import Adapter, apply_adapter, check_adapter, load_adapter
from .layers import set_strength

# Largest logit difference that counts as rounding: a part of what the adapter does, and a part of the largest logit
# for the arithmetic of the comparison itself (fp32, or the file's own dtype for a large model).
OF_EFFECT, OF_LOGIT = 0.1, {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
IN_FP32 = 1_000_000_000      # parameters up to which the comparison is done in fp32


@dataclass(frozen=True)
class Proof:
    """What was checked after a merged file was written, read back from the disk.

    Logits are compared on fixed random token sequences.
    """

    path: Path
    strength: float
    merged_layers: int
    dtype: str                   # of the merged weights, as in the base
    largest_weight_change: float
    same_keys: bool              # names, order, shapes and dtypes are the base's; the strict loader took the file
    others_untouched: bool       # every tensor without an adapter is equal to the base's, bit for bit
    largest_logit: float
    logit_effect: float          # largest logit difference, base against base with adapter
    logit_difference: float      # largest logit difference, base with adapter against merged file
    tolerance: float             # what counts as rounding; more means that the file's dtype swallowed the adapter

    @property
    def ok(self) -> bool:
        return self.same_keys and self.others_untouched and self.logit_difference <= self.tolerance

    def __str__(self) -> str:
        return "\n".join([
            f"merged {self.merged_layers} layers at strength {self.strength:g} into {self.path} ({self.dtype})",
            f"  reloads, with the base's keys, order, shapes and dtypes: {self.same_keys}",
            f"  all other tensors as in the base, bit for bit: {self.others_untouched}",
            f"  largest change of a weight: {self.largest_weight_change:.3g}",
            f"  largest change of a logit by the adapter: {self.logit_effect:.3g} "
            f"(largest logit: {self.largest_logit:.3g})",
            f"  largest logit difference, adapter against merged: {self.logit_difference:.2g} "
            f"(allowed: {self.tolerance:.2g})",
            f"  merged == adapter: {self.ok}"])


def merged_state(weights: dict[str, Tensor], adapter: Adapter, names: list[str], strength: float = 1.0
                 ) -> dict[str, Tensor]:
    """`weights` with the named linears merged: sums in fp32, results in the base's dtype, keys in the base's order."""
    merged = dict(weights)
    for name in names:
        W, A, B = weights[f"{name}.weight"], adapter.tensors[f"{name}.lora_A"], adapter.tensors[f"{name}.lora_B"]
        merged[f"{name}.weight"] = torch.addmm(W.float(), B, A, alpha=strength * adapter.scale).to(W.dtype)
    for key in adapter.parts:
        merged[key] = torch.lerp(weights[key].float(), adapter.tensors[key], strength).to(weights[key].dtype)
    return merged


def merge(base_path: str | Path, adapter_path: str | Path, out_path: str | Path, *, strength: float = 1.0,
          prove: bool = True, allow_other_base: bool = False) -> Proof | None:
    """Write the base with the adapter in it as one .pth; returns what was proved of the written file.

    The base is memory-mapped; the adapted layers' size is needed in memory, and the proof needs 4 bytes a parameter
    up to a billion parameters (above, the files stay mapped).
    prove=False writes only, and returns None. Raises CheckpointError and AdapterError for files that cannot be used
    or do not belong together, RunError when the disk cannot hold the result: then nothing was written.
    """
    if not math.isfinite(strength):
        raise SettingsError(f"strength cannot be {strength}", where="strength", fix="0 is the base, 1 as trained")
    base_path, out_path, adapter = Path(base_path), Path(out_path), load_adapter(adapter_path)
    if out_path.exists() and out_path.samefile(base_path):
        raise RunError("the merged model would replace its own base", where=out_path, fix="choose another output")
    weights = load_weights(base_path)
    shape = read_shape(weights)
    check_keys(weights, shape, where=base_path)
    names = check_adapter(adapter, shape, fingerprint(base_path), allow_other_base=allow_other_base)
    check_disk(base_path, out_path)
    save_weights(out_path, merged_state(weights, adapter, names, strength))
    return _prove(base_path, weights, adapter, names, out_path, strength) if prove else None


def check_disk(base_path: Path, out_path: Path) -> None:
    """Raise RunError unless a model as large as the base fits where out_path is to be; an old file stays until then."""
    folder = next(parent for parent in out_path.absolute().parents if parent.exists())
    need, free = base_path.stat().st_size, shutil.disk_usage(folder).free
    if need > free:
        raise RunError(f"the merged model needs {need / 1e9:.2f} GB and {free / 1e9:.2f} GB are free", where=out_path,
                       fix="free some disk space or choose another folder")


def _prove(base_path: Path, weights: dict[str, Tensor], adapter: Adapter, names: list[str], out_path: Path,
           strength: float) -> Proof:
    written, adapted = load_weights(out_path), {*(f"{name}.weight" for name in names), *adapter.parts}

    def like(a: dict, b: dict) -> bool:
        return [(k, v.shape, v.dtype) for k, v in a.items()] == [(k, v.shape, v.dtype) for k, v in b.items()]

    change = max((written[k].float() - weights[k].float()).abs().max().item() for k in adapted)
    dtype = weights[next(iter(adapted))].dtype
    compared = torch.float32 if read_shape(weights).n_params() <= IN_FP32 else dtype
    before, after = _logits(base_path, compared, adapter, strength)
    merged, = _logits(out_path, compared)
    largest, effect = after.abs().max().item(), (after - before).abs().max().item()
    return Proof(
        out_path, strength, len(names), str(dtype).removeprefix("torch."), change, like(written, weights),
        all(torch.equal(written[k], weights[k]) for k in weights if k not in adapted), largest, effect,
        (merged - after).abs().max().item(), OF_EFFECT * effect + OF_LOGIT[compared] * largest)


@torch.no_grad()
def _logits(path: Path, dtype: torch.dtype, adapter: Adapter | None = None, strength: float = 1.0) -> list[Tensor]:
    """Logits [B,T,V] of a file's model on fixed sequences; with an adapter: without it and with it.

    One model at a time, and memory-mapped where dtype is the file's own.
    """
    model = load_model(path, dtype=dtype).eval()
    tokens = torch.randint(1, model.shape.vocab_size, (4, 32), generator=torch.Generator().manual_seed(0))
    if adapter is None:
        return [model(tokens)[0].float()]
    apply_adapter(model, adapter, adapter.meta.base_fingerprint)  # merge() has checked the base
    out = []
    for value in (0.0, strength):
        set_strength(model, value)
        out.append(model(tokens)[0].float())
    return out
