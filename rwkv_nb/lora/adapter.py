"""Adapter files: a safetensors file that says by itself how it is applied, and to which base.

Tensors: `blocks.0.att.key.lora_A` [R,in], `….lora_B` [out,R], and trained parts under their own names,
fp32. Nobody retypes alpha: it is in the file. Other programs' adapters are read as well (lora.foreign).
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from ..errors import AdapterError, CheckpointError, SettingsError
from ..model.ai00 import read_safetensors
from ..model.checkpoint import misfits
from ..model.shape import Shape
from ..runs import Run, write_bytes
from .foreign import CONFIG, PICKLED, check_alpha, read_foreign
from .layers import attach, endings, lora_layers, matching
from .meta import Adapter, AdapterMeta
from .parts import part_values, trained_parts

FORMAT, VERSION = "rwkv_nb", 1


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """lora_A, lora_B and trained parts by key, the model's own fp32 tensors."""
    return {f"{name}.{part}": getattr(layer, part).detach() for name, layer in lora_layers(model).items()
            for part in ("lora_A", "lora_B")} | part_values(model)


def set_adapter_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give the model's adapter the values that adapter_tensors() had."""
    for key, own in adapter_tensors(model).items():
        own.copy_(tensors[key])
    for part in trained_parts(model).values():
        part.use()


def save_adapter(path: str | Path, model: nn.Module, meta: AdapterMeta) -> None:
    """Write the adapter that `model` got from attach(), whole; no target_modules in meta are all that have one.

    Raises RunError when the disk is full.
    """
    meta = dataclasses.replace(meta, lora_alpha=float(meta.lora_alpha),
                               target_modules=meta.target_modules or endings(lora_layers(model)))
    words = {k: json.dumps(v) for k, v in dataclasses.asdict(meta).items()}
    tensors = {k: v.cpu().contiguous() for k, v in adapter_tensors(model).items()}
    data = save(tensors, metadata={"format": FORMAT, "version": str(VERSION), **words})
    write_bytes(Path(path), data)


def load_adapter(path: str | Path, lora_alpha: float | None = None) -> Adapter:
    """Read an adapter: ours, the last one of a run's folder, RWKV-PEFT's .pth, or a file or folder of Hugging Face's
    peft library.

    lora_alpha: required for a file that does not say its own; another than the file says is refused.
    Raises AdapterError for one that is absent, cut off, damaged or of another kind, RunError for a run that has none.
    """
    path = Path(path)
    if not path.exists():
        raise AdapterError("there is no such file", where=path, fix="train first, or check the adapter's path")
    if path.is_dir() and not (path / CONFIG).is_file():
        path = Run(path).last_adapter()
    if path.is_dir() or path.suffix in PICKLED:
        return read_foreign(path, lora_alpha)
    try:
        tensors, words = read_safetensors(path)
    except CheckpointError as error:
        raise AdapterError(error.what, where=path, fix="copy it again, or use an adapter saved earlier") from error
    if any(key.endswith(".lora_A.weight") for key in tensors):
        return read_foreign(path, lora_alpha)
    if (words.get("format"), words.get("version")) != (FORMAT, str(VERSION)):
        raise AdapterError(f"this is not an adapter of {FORMAT}, format {VERSION} (it says {words.get('format')!r}, "
                           f"{words.get('version')!r})", where=path, fix="use an adapter-*.safetensors file of a run")
    meta = _read_meta(words, path)
    check_alpha(meta.lora_alpha, lora_alpha, path)
    for key, tensor in tensors.items():
        if tensor.dtype != torch.float32 or not tensor.isfinite().all():
            raise AdapterError("holds values that are not finite fp32 numbers", where=f"{path}: {key}",
                               fix="use an adapter saved earlier")
    return Adapter(tensors, meta, path)


def _read_meta(words: Mapping[str, str], path: Path) -> AdapterMeta:
    """The metadata's JSON, with its types checked."""
    words = {"quant": '"none"', **words}        # older files do not say it
    try:
        values = {f.name: json.loads(words[f.name]) for f in dataclasses.fields(AdapterMeta)}
        values["base_shape"] = Shape(**values["base_shape"])
        values["target_modules"] = tuple(values["target_modules"])
        meta = AdapterMeta(**values)
        names = (*meta.target_modules, meta.base_fingerprint, meta.base_name, meta.template, meta.tokenizer,
                 meta.quant)
        sane = (type(meta.r) is int and meta.r > 0 and type(meta.lora_alpha) is float
                and math.isfinite(meta.lora_alpha) and meta.target_modules and all(type(n) is str for n in names))
        if not sane:
            raise ValueError(f"r {meta.r!r}, lora_alpha {meta.lora_alpha!r}, target_modules {meta.target_modules!r}")
        return meta
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise AdapterError(f"its description cannot be read ({error})", where=path,
                           fix="use an adapter saved earlier") from error


def check_adapter(adapter: Adapter, shape: Shape, fingerprint: str, *, allow_other_base=False) -> list[str]:
    """The linears that the adapter belongs to. Raises AdapterError unless it was trained on this base and is whole.

    allow_other_base lets another base of the same shape pass, such as one that was trained a little further.
    """
    meta = adapter.meta
    if meta.base_shape not in (shape, None):
        sizes = [f"{s.version}, {s.n_layer} layers of {s.n_embd}, {s.vocab_size} tokens"
                 for s in (meta.base_shape, shape)]
        if sizes[0] == sizes[1]:
            sizes = [str(meta.base_shape), str(shape)]
        raise AdapterError(f"this adapter was trained on {meta.base_name} ({sizes[0]}); this base is {sizes[1]}",
                           where=adapter.path, fix=f"load {meta.base_name}")
    if meta.base_fingerprint not in (fingerprint, "") and not allow_other_base:
        raise AdapterError(f"this adapter was trained on {meta.base_name} (fingerprint {meta.base_fingerprint}); this "
                           f"base has the same shape and other weights (fingerprint {fingerprint})",
                           where=adapter.path, fix=f"load {meta.base_name}, or try it here with allow_other_base=True "
                           "(--other_base)")
    linears = shape.linears()
    try:
        names = matching(meta.target_modules, linears)
    except SettingsError as error:
        raise AdapterError(error.what, where=adapter.path, fix=error.fix) from error
    sizes = shape.key_shapes()
    expected = {key: sizes[key] for key in adapter.parts if key in sizes}
    for name in names:
        expected |= {f"{name}.lora_A": (meta.r, linears[name][1]), f"{name}.lora_B": (linears[name][0], meta.r)}
    if wrong := misfits(adapter.tensors, expected):
        raise AdapterError(f"{len(wrong)} of its keys do not fit:\n  " + "\n  ".join(wrong),
                           where=adapter.path, fix="use an adapter saved earlier")
    return names


def apply_adapter(model: nn.Module, adapter: Adapter, base_fingerprint: str, *, allow_other_base=False) -> nn.Module:
    """Attach the adapter to a bare model, in place; returns the model. Switch it with lora.layers.strength.

    base_fingerprint: model.fingerprint() of the file that the model came from. Raises AdapterError for another base
    and for keys that do not fit; the model is untouched then.
    """
    check_adapter(adapter, model.shape, base_fingerprint, allow_other_base=allow_other_base)
    attach(model, adapter.lora_settings(), seed=0)
    set_adapter_tensors(model, adapter.tensors)
    return model


def combine(adapters: Sequence[Adapter], strengths: Sequence[float], base: Mapping[str, Tensor]) -> Adapter:
    """Adapters of one base as one, of all their ranks together: its B A is the sum of strength · α/R · B A of each.

    base: its weights; trained parts are moved from there, by strength. Raises SettingsError for a negative strength
    where an adapter has parts: what they were before is not in the file.
    """
    r, tensors = sum(adapter.meta.r for adapter in adapters), {}
    pairs = list(zip(adapters, strengths, strict=True))
    halves: dict[str, list[tuple[Tensor, Tensor]]] = {}     # by linear: each adapter's A, and its B with its scale
    for adapter, s in pairs:
        for key, A in adapter.tensors.items():
            if key.endswith(".lora_A"):
                name = key.removesuffix(".lora_A")
                B = adapter.tensors[f"{name}.lora_B"] * (adapter.scale * s)
                halves.setdefault(name, []).append((A, B))
    for name, each in halves.items():
        A, B = torch.cat([A for A, _ in each]), torch.cat([B for _, B in each], 1)
        tensors[f"{name}.lora_A"] = F.pad(A, (0, 0, 0, r - len(A)))
        tensors[f"{name}.lora_B"] = F.pad(B, (0, r - B.shape[1]))
    for adapter, s in pairs:
        for key in adapter.parts:
            if s < 0:
                raise SettingsError(f"it trained {key} itself: it cannot be taken out again", where=adapter.path,
                                    fix="go back to the base's file")
            old, new = base[key].float(), adapter.tensors[key]
            tensors[key] = tensors[key] + s * (new - old) if key in tensors else torch.lerp(old, new, s)
    quant = next((a.meta.quant for a in adapters if a.meta.quant != "none"), "none")
    meta = dataclasses.replace(adapters[0].meta, quant=quant, r=r, lora_alpha=float(r), target_modules=tuple(halves))
    return Adapter(tensors, meta, adapters[0].path)
