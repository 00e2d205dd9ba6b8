"""Hugging Face peft: a folder with adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save

from ..errors import AdapterError
from ..lora.adapter import load_adapter
from ..lora.foreign import CONFIG
from ..model.streaming import Progress
from ..runs import write_bytes, write_text


def export_peft(source: str | Path, out: str | Path, *, lora_alpha: float | None = None,
                progress: Progress | None = None) -> str:
    """An adapter as a folder that PeftModel.from_pretrained loads onto any module with RWKV's parameter names.

    Returns what to do with it. Raises AdapterError for one with trained norms, which have no place there.
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
    data = save(tensors, metadata={"format": "pt"})
    write_bytes(out / "adapter_model.safetensors", data)
    write_text(out / CONFIG, json.dumps(words, indent=2) + "\n")
    if progress:
        progress(1, 1)
    return f"{out}: PeftModel.from_pretrained(model, {str(out)!r})"
