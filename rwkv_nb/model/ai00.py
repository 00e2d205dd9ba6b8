"""Names and orientation of tensors in Ai00's and web-rwkv's .st files, both ways.

Source: web-rwkv's converter and loader. A file under the original names and orientation is read as well.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError

_RENAMED = (("time_faaaa", "time_first"), ("time_maa", "time_mix"), ("lora_A", "lora.0"), ("lora_B", "lora.1"))
# Low-rank matrices; linear weights keep their orientation. (web-rwkv's list has time_state too: no base model does.)
_TURNED = re.compile(r"att\.(time_(mix|decay)_w[12]|[wavg][12])$|lora\.0$")


def to_ai00(key: str, tensor: Tensor) -> tuple[str, Tensor]:
    """A tensor's name there, and the tensor as it lies there (a view)."""
    for ours, theirs in _RENAMED:
        key = key.replace(ours, theirs)
    key = key.lower()
    return key, tensor.mT if _TURNED.search(key) else tensor


def from_ai00(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The original names and orientation. v6's time_mix_* are renamed back, v5's own time_mix_* are not."""
    width = weights["emb.weight"].shape[-1:]
    turned = any(key.endswith(("att.w1", "att.time_decay_w1")) and tensor.dim() > 1 and tensor.shape[-1:] == width
                 for key, tensor in weights.items())
    v6 = any("time_mix_w1" in key for key in weights)
    out = {}
    for key, tensor in weights.items():
        if turned and tensor.dim() > 1 and _TURNED.search(key):
            tensor = tensor.mT.contiguous()
        key = key.replace("time_first", "time_faaaa")
        out[key.replace("time_mix", "time_maa") if v6 else key] = tensor
    return out


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (memory-mapped, CPU) and metadata. Raises CheckpointError for a damaged or hostile file."""
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"the file is damaged, cut off or no safetensors file ({error})", where=path,
                              fix="download or copy it again") from error
