"""Adapters that other programs wrote: RWKV-PEFT's older .pth, and the form of Hugging Face's peft library.

Older:  `blocks.0.att.key.lora_A` [R,in], `….lora_B` [out,R], and layer norms that were trained whole; no alpha.
Newer:  `base_model.model.blocks.0.att.key.lora_A.weight`, with r and alpha in adapter_config.json beside the file.
"""

import json
import math
import re
from pathlib import Path

from ..errors import AdapterError, CheckpointError
from ..model import load_weights
from .meta import Adapter, AdapterMeta

CONFIG, PICKLED = "adapter_config.json", (".pth", ".pt", ".bin")
_PREFIX = re.compile(r"^(base_model\.model\.|model\.)+")
_HALF = re.compile(r"(.+)\.(lora_[AB])(?:\.default)?(?:\.weight)?")


def read_foreign(path: Path, lora_alpha: float | None = None) -> Adapter:
    """What such a file holds, under our names. path: the file, or peft's folder.

    Raises AdapterError where alpha is neither there nor given.
    """
    where, folder = path, path if path.is_dir() else path.parent
    if path.is_dir():
        path = next((p for p in sorted(path.glob("adapter_model.*")) if p.suffix in (".safetensors", ".bin")),
                    path / "adapter_model.safetensors")
    try:
        raw = load_weights(path)
    except CheckpointError as error:
        raise AdapterError(error.what, where=path, fix="copy it again, or use another adapter") from error
    tensors = {}
    for key, tensor in raw.items():
        half = _HALF.fullmatch(_PREFIX.sub("", key))
        if not tensor.isfinite().all():
            raise AdapterError("holds values that are not finite", where=f"{path}: {key}", fix="use another adapter")
        tensors[f"{half[1]}.{half[2]}" if half else _PREFIX.sub("", key)] = tensor.float()
    linears = tuple(key.removesuffix(".lora_A") for key in tensors if key.endswith(".lora_A"))
    if not linears:
        raise AdapterError("there is no LoRA in this file", where=path,
                           fix="a complete (merged) model is not an adapter: use it as it is" if "emb.weight" in raw
                           else "use an adapter's file")
    ranks = {t.shape[0] for key, t in tensors.items() if key.endswith(".lora_A") and t.dim() == 2}
    if len(ranks) != 1 or 0 in ranks:
        raise AdapterError(f"its ranks are {sorted(ranks)}; one rank for all layers is read", where=path,
                           fix="merge it with the program that wrote it")
    r = ranks.pop()
    hugging_face = any(key.endswith(".weight") and "lora_" in key for key in raw)
    config = folder / CONFIG if hugging_face and (folder / CONFIG).is_file() else None
    return Adapter(tensors, AdapterMeta(r, _alpha(config, r, lora_alpha, path), linears), where)


def is_adapter(path: str | Path) -> bool:
    """Whether a file or folder holds a LoRA, rather than a complete model. Raises CheckpointError for neither."""
    return Path(path).is_dir() or any("lora_" in key for key in load_weights(path))


def _alpha(config: Path | None, r: int, given: float | None, path: Path) -> float:
    """lora_alpha from adapter_config.json, else as given: never guessed, as a wrong one shows nowhere."""
    if config is None:
        if given is None or not math.isfinite(given):
            raise AdapterError(f"the file does not say its lora_alpha (its rank is {r})", where=path,
                               fix="give lora_alpha as it was in training (--lora_alpha)")
        return float(given)
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
        alpha, kind = float(values["lora_alpha"]), values.get("peft_type", "LORA")
        special = [name for name in ("use_dora", "alpha_pattern", "fan_in_fan_out") if values.get(name)]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise AdapterError(f"it cannot be read ({error!r})", where=config, fix="copy it again") from error
    if kind != "LORA" or special or not math.isfinite(alpha):
        raise AdapterError(f"{', '.join(special) or kind} is not plain LoRA", where=config,
                           fix="merge it with the program that wrote it")
    check_alpha(alpha, given, config)
    return alpha * math.sqrt(r) if values.get("use_rslora") else alpha   # rank-stabilised: alpha/√r, not alpha/r


def check_alpha(alpha: float, given: float | None, where: Path) -> None:
    """Raise AdapterError where somebody gives another alpha than the file says."""
    if given not in (None, alpha):
        raise AdapterError(f"it says lora_alpha {alpha:g}, and {given:g} is given", where=where,
                           fix="leave lora_alpha out: the file's is the one that it was trained with")
