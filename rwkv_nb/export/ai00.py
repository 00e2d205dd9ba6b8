"""Ai00 and web-rwkv: a .st file of float16 tensors under web-rwkv's names, of a complete model or of a LoRA alone."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import AdapterError
from ..lora.adapter import load_adapter
from ..lora.foreign import is_adapter
from ..model import load_weights, read_shape
from ..model.ai00 import to_ai00
from ..model.checkpoint import check_keys
from ..model.streaming import Progress, cast, parked
from ..runs import atomic_path, check_output
from .runner import check_for_other_programs

# What web-rwkv adds a LoRA to, and what it replaces by a LoRA file's own values.
_ADDED = re.compile(r"blocks\.\d+\.(att|ffn)\.(key|value|receptance|gate|output)\.lora_[AB]")


def export_ai00(source: str | Path, out: str | Path, *, lora_alpha: float | None = None,
                progress: Progress | None = None) -> str:
    """A complete model, or an adapter by itself, as the .st that Ai00 loads: all float16, one tensor at a time.

    Returns what to do with the file; a LoRA's alpha is typed in there. Raises CheckpointError and AdapterError for
    what web-rwkv could not load or would apply otherwise.
    """
    if not is_adapter(source):
        weights = load_weights(source)
        shape = read_shape(weights)
        check_keys(weights, shape, where=source)
        check_for_other_programs(shape, source)
        _write(source, out, weights, progress)
        return f"{out}: put it into Ai00's models folder"
    adapter = load_adapter(source, lora_alpha)
    odd = [k for k, v in adapter.tensors.items() if not _ADDED.fullmatch(k) and (k not in adapter.parts
                                                                                  or v.numel() != v.shape[-1])]
    if odd:
        raise AdapterError(f"Ai00 takes no LoRA on {odd[0].removesuffix('.lora_A')}", where=source,
                           fix="merge the adapter and export the merged model")
    _write(source, out, adapter.tensors, progress)
    return f"{out}: give it to Ai00 as a LoRA with alpha = {adapter.meta.lora_alpha:g}; Ai00 divides it by the rank"


def _write(source: str | Path, out: str | Path, tensors: dict[str, Tensor], progress: Progress | None) -> None:
    check_output(Path(out), ".st", source)

    def change(key: str, tensor: Tensor) -> Tensor:
        return to_ai00(key, cast(key, tensor, torch.float16))[1]

    with atomic_path(Path(out)) as temporary, parked(tensors, temporary.parent, change, progress) as ready:
        save_file({to_ai00(key, tensor)[0]: tensor for key, tensor in ready.items()}, temporary, {"format": "pt"})
    if progress:
        progress(1, 1)
