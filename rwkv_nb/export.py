"""A model or an adapter in other programs' formats: RWKV Runner, Ai00 and Hugging Face peft. One function each.

Each returns what to do with what it wrote; progress is called with bytes done and bytes in all.
"""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save, save_file
from torch import Tensor

from .errors import AdapterError, CheckpointError
from .lora.adapter import load_adapter
from .lora.foreign import CONFIG, is_adapter
from .model import Shape, load_weights, read_shape, save_weights
from .model.ai00 import to_ai00
from .model.checkpoint import check_keys
from .model.streaming import Progress, cast, parked, unseen
from .runs import atomic_path, check_output, write_bytes, write_text

WORLD_ROWS = 65536
# What web-rwkv adds a LoRA to; what else a LoRA file has, vectors such as norms, takes the place of the base's own.
_ADDED = re.compile(r"blocks\.\d+\.(att|ffn)\.(key|value|receptance|gate|output)\.lora_[AB]")


def export_runner(source: str | Path, out: str | Path, *, progress: Progress = unseen) -> str:
    """A complete model (.pth or Ai00's .st) as RWKV Runner's engine, the rwkv package, loads it: original names,
    orientation and order, dtypes kept. Raises CheckpointError for a model that Runner would not load."""
    weights, shape = _whole_model(source)
    check_output(Path(out), ".pth", source)
    save_weights(out, {key: weights[key] for key in shape.key_shapes()}, progress=progress)
    return f"{out}: put it into RWKV Runner's models folder"


def export_ai00(source: str | Path, out: str | Path, *, lora_alpha: float | None = None,
                progress: Progress = unseen) -> str:
    """A complete model, or an adapter by itself, as the .st that Ai00's engine, web-rwkv, loads: its names, all
    float16, one tensor at a time. A LoRA's alpha is typed in there.

    Raises CheckpointError and AdapterError for what web-rwkv could not load or would apply otherwise.
    """
    if not is_adapter(source):
        _write_ai00(source, out, _whole_model(source)[0], progress)
        return f"{out}: put it into Ai00's models folder"
    adapter = load_adapter(source, lora_alpha)
    for key, tensor in adapter.tensors.items():
        vector = key in adapter.parts and tensor.numel() == tensor.shape[-1]
        if not vector and not _ADDED.fullmatch(key):
            raise AdapterError(f"Ai00 takes no LoRA on {key.removesuffix('.lora_A')}", where=source,
                               fix="merge the adapter and export the merged model")
    _write_ai00(source, out, adapter.tensors, progress)
    return f"{out}: give it to Ai00 as a LoRA with alpha = {adapter.meta.lora_alpha:g}; Ai00 divides it by the rank"


def export_peft(source: str | Path, out: str | Path, *, lora_alpha: float | None = None,
                progress: Progress = unseen) -> str:
    """An adapter as a folder that PeftModel.from_pretrained loads onto any module with RWKV's parameter names.

    Raises AdapterError for one with trained norms, which have no place there.
    """
    adapter, out = load_adapter(source, lora_alpha), Path(out)
    if adapter.parts:
        raise AdapterError(f"it trained {adapter.parts[0]} beside the LoRA, which peft's form has no place for",
                           where=source, fix="merge it and use the merged model")
    tensors = {f"base_model.model.{key}.weight": tensor for key, tensor in adapter.tensors.items()}
    meta = adapter.meta
    words = {"peft_type": "LORA", "task_type": None, "base_model_name_or_path": meta.base_name, "r": meta.r,
             "lora_alpha": meta.lora_alpha, "lora_dropout": 0.0, "target_modules": list(meta.target_modules),
             "bias": "none", "fan_in_fan_out": False, "inference_mode": True}
    write_bytes(out / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))
    write_text(out / CONFIG, json.dumps(words, indent=2) + "\n")
    progress(1, 1)
    return f"{out}: PeftModel.from_pretrained(model, {str(out)!r})"


EXPORTS = {"runner": export_runner, "ai00": export_ai00, "peft": export_peft}


def _whole_model(source: str | Path) -> tuple[dict[str, Tensor], Shape]:
    """A model's weights and shape. Raises CheckpointError for one that Runner and Ai00 would not load."""
    weights = load_weights(source)
    shape = read_shape(weights)
    check_keys(weights, shape, where=source)
    if shape.vocab_size < WORLD_ROWS:
        raise CheckpointError(f"its vocabulary has {shape.vocab_size} rows; RWKV Runner and Ai00 know the World "
                              f"vocabulary of {WORLD_ROWS}", where=source, fix="train a released base; a tiny model of "
                              "bytes runs here and in the rwkv package")
    if shape.n_layer < 2:
        raise CheckpointError("it has one block; RWKV Runner and Ai00 know a model's version by its second",
                              where=source, fix="use a model of two blocks or more")
    return weights, shape


def _write_ai00(source: str | Path, out: str | Path, tensors: dict[str, Tensor], progress: Progress) -> None:
    check_output(Path(out), ".st", source)

    def change(key: str, tensor: Tensor) -> Tensor:
        return to_ai00(key, cast(key, tensor, torch.float16))[1]

    with atomic_path(Path(out)) as temporary, parked(tensors, temporary.parent, change, progress) as ready:
        save_file({to_ai00(key, tensor)[0]: tensor for key, tensor in ready.items()}, temporary, {"format": "pt"})
    progress(1, 1)
