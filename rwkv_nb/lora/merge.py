"""Merging: W + Σ strength · α/R · B A for every adapted linear, written as one complete model, with a proof."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import SettingsError
from ..model import fingerprint, load_model, load_weights, read_shape, save_weights
from ..model.checkpoint import check_keys
from ..model.streaming import Progress, cast, unseen
from ..runs import check_disk, check_output
from .adapter import apply_adapter, check_adapter, combine, load_adapter
from .meta import Adapter

# Largest logit difference that counts as rounding: a part of what the adapter does, and a part of the largest logit
# for the arithmetic of the comparison itself (fp32, or the file's own dtype for a large model).
OF_EFFECT, OF_LOGIT = 0.1, {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
IN_FP32 = 200_000_000        # parameters up to which the comparison is done in fp32


@dataclass(frozen=True)
class Proof:
    """What was checked after a merged file was written, read back from the disk.

    Logits are compared on fixed random token sequences.
    """

    path: Path
    merged_layers: int
    parts: int                   # other tensors that were trained beside them, such as layer norms
    dtype: str                   # of the merged weights
    largest_weight_change: float
    same_keys: bool              # names, order and shapes are the base's, dtypes as asked; the strict loader took it
    others_untouched: bool       # every other tensor is equal to the base's, bit for bit
    largest_logit: float
    logit_effect: float          # largest logit difference, base against base with adapter
    logit_difference: float      # largest logit difference, base with adapter against merged file
    quant: str                   # how the base was held when the adapter was trained: "none", "int8" or "nf4"
    tolerance: float             # what counts as the same

    @property
    def ok(self) -> bool:
        """The file computes what base and adapter do."""
        return self.same_keys and self.others_untouched and self.logit_difference <= self.tolerance

    @property
    def rounded(self) -> bool:
        """The file is sound, but its dtype too coarse for so small a change: nothing failed, and a person should know.
        Rounding takes away what the adapter does, or a part; a larger difference has another cause."""
        return (self.same_keys and self.others_untouched and self.dtype != "float32"
                and self.tolerance < self.logit_difference <= self.logit_effect + self.tolerance)

    def __str__(self) -> str:
        lines = [f"merged {self.merged_layers} layers into {self.path} ({self.dtype})"]
        if self.parts:
            lines[0] += f", with {self.parts} trained norms and the like"
        if self.quant != "none":
            lines.append(f"  trained on a base in {self.quant}, merged into the original: it may score a little lower, "
                         "judge it")
        lost = min(self.logit_difference / max(self.logit_effect, 1e-30), 1)
        finer = "fp16 or fp32" if self.dtype == "bfloat16" else "fp32"
        return "\n".join([
            *lines,
            f"  reloads, with the base's keys, order and shapes: {self.same_keys}",
            f"  all other tensors as in the base, bit for bit: {self.others_untouched}",
            f"  largest change of a weight: {self.largest_weight_change:.3g}",
            f"  largest change of a logit by the adapter: {self.logit_effect:.3g} "
            f"(largest logit: {self.largest_logit:.3g})",
            f"  largest logit difference, adapter against merged: {self.logit_difference:.2g} "
            f"(allowed: {self.tolerance:.2g})",
            f"  merged == adapter: {self.ok}",
            *[f"  warning: the file is sound, but {self.dtype} is too coarse for so small a change: {lost:.0%} of what "
              f"the adapter does is rounded away\n  → set dtype to {finer}, train longer, or raise the strength"
              ] * self.rounded])


def merge(base_path: str | Path, adapter_path: str | Path | Sequence[str | Path], out_path: str | Path, *,
          strength: float | Sequence[float] = 1.0, dtype: torch.dtype | None = None, lora_alpha: float | None = None,
          prove: bool = True, allow_other_base: bool = False, progress: Progress = unseen) -> Proof | None:
    """Write the base with one adapter or several in it as one .pth; returns what was proved of the written file.

    strength: one for all adapters, or one each; -1 takes an adapter out of a file that was merged with it
    dtype: of the written file; None keeps the base's. Sums are fp32 in any case
    lora_alpha: required for adapters that do not say their own (older RWKV-PEFT)
    progress: called with bytes done and bytes in all; prove=False writes only, and returns None
    Base and result stay memory-mapped; one tensor at a time is in memory, and for the proof, up to IN_FP32
    parameters, 4 bytes a parameter. Raises CheckpointError and AdapterError for files that cannot be used or do not
    belong together, RunError when the disk cannot hold the result: then nothing was written.
    """
    base_path, out_path = Path(base_path), Path(out_path)
    paths = [adapter_path] if isinstance(adapter_path, str | Path) else list(adapter_path)
    strengths = [strength] * len(paths) if isinstance(strength, int | float) else list(strength)
    if not paths or len(strengths) != len(paths) or not all(math.isfinite(s) for s in strengths):
        raise SettingsError(f"strength cannot be {strength} for {len(paths)} adapters", where="strength",
                            fix="one number for all, or one each: 0 is the base, 1 as trained")
    adapters = [load_adapter(path, lora_alpha) for path in paths]
    weights, base = load_weights(base_path), fingerprint(base_path)
    shape = read_shape(weights)
    check_output(out_path, ".pth", base_path, *paths)
    check_keys(weights, shape, where=base_path)
    for adapter in adapters:
        check_adapter(adapter, shape, base, allow_other_base=allow_other_base)
    adapter = combine(adapters, strengths, weights)
    check_disk(_bytes(weights, adapter, dtype), out_path)
    save_weights(out_path, weights, change=lambda key, W: merged_tensor(key, W, adapter, dtype), progress=progress)
    return _prove(base_path, weights, adapter, out_path, dtype) if prove else None


def merged_tensor(key: str, W: Tensor, adapter: Adapter, dtype: torch.dtype | None = None) -> Tensor:
    """W as it is in the merged file: added up in fp32, in W's dtype or another. An untouched W is returned itself."""
    dtype, name = dtype or W.dtype, key.removesuffix(".weight")
    A, B = (adapter.tensors.get(f"{name}.{half}") for half in ("lora_A", "lora_B"))
    if A is not None:
        W = W.to(torch.float32, copy=True).addmm_(B, A, alpha=adapter.scale)
    return cast(key, adapter.tensors.get(key, W), dtype)


def _changed(adapter: Adapter) -> set[str]:
    """Keys of the base that the adapter changes."""
    return {f"{target}.weight" for target in adapter.meta.target_modules} | set(adapter.parts)


def _bytes(weights: dict[str, Tensor], adapter: Adapter, dtype: torch.dtype | None) -> int:
    """What the disk must hold: the result, and once more the tensors that change, which wait beside it."""
    changed = _changed(adapter)
    return sum(W.numel() * (dtype or W.dtype).itemsize * (1 + (key in changed or dtype not in (None, W.dtype)))
               for key, W in weights.items())


def _prove(base_path: Path, weights: dict[str, Tensor], adapter: Adapter, out_path: Path, dtype: torch.dtype | None
           ) -> Proof:
    written, changed = load_weights(out_path), sorted(_changed(adapter))
    same_keys = list(written) == list(weights) and all(
        (v.shape, v.dtype) == (weights[k].shape, dtype or weights[k].dtype) for k, v in written.items())
    own, out = weights[changed[0]].dtype, written[changed[0]].dtype
    compared = torch.float32 if read_shape(weights).n_params() <= IN_FP32 else own
    before, after = _logits(base_path, compared, adapter)
    merged, = _logits(out_path, compared)
    largest, effect = after.abs().max().item(), (after - before).abs().max().item()
    coarsest = max(OF_LOGIT[compared], OF_LOGIT[out] if out != own else 0)
    return Proof(
        path=out_path, merged_layers=len(changed) - len(adapter.parts), parts=len(adapter.parts),
        dtype=str(out).removeprefix("torch."),
        largest_weight_change=max((written[k].float().sub_(weights[k])).abs_().max().item() for k in changed),
        same_keys=same_keys,
        others_untouched=all(torch.equal(written[k], W.to(written[k].dtype)) for k, W in weights.items()
                             if k not in changed),
        largest_logit=largest, logit_effect=effect, logit_difference=(merged - after).abs().max().item(),
        quant=adapter.meta.quant, tolerance=OF_EFFECT * effect + coarsest * largest)


@torch.no_grad()
def _logits(path: Path, dtype: torch.dtype, adapter: Adapter | None = None) -> list[Tensor]:
    """Logits [B,T,V] of a file's model on fixed sequences; with an adapter: without it and with it.

    One model at a time, and memory-mapped where dtype is the file's own.
    """
    model = load_model(path, dtype=dtype).eval()
    tokens = torch.randint(1, model.shape.vocab_size, (4, 32), generator=torch.Generator().manual_seed(0))
    out = [model(tokens)[0].float()]
    if adapter:
        apply_adapter(model, adapter, "", allow_other_base=True)  # merge() has checked the base
        out.append(model(tokens)[0].float())
    return out
