"""Weights from and to files: strict, memory-mapped, never running code from a file."""

import hashlib
import os
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, out_of_memory
from ..quant import Held, QuantLinear
from ..runs import atomic_path
from .ai00 import from_ai00, read_safetensors
from .rwkv import RWKV
from .shape import Shape, read_shape
from .streaming import Change, Progress, WatchedFile, parked, unseen

SAFETENSORS = (".st", ".safetensors")
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # by precision


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """The flat dict of tensors in a .pth, .st (Ai00) or .safetensors, memory-mapped on the CPU, under its .pth names.

    Raises CheckpointError for a file that is absent, empty, truncated, or a pickle of anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError("this is a folder" if path.is_dir() else "there is no such file",
                              where=os.path.abspath(path), fix="check the path of the base model, load_model")
    if path.stat().st_size == 0:
        raise CheckpointError("the file is empty", where=path, fix="download or copy it again")
    weights = _in_original_form(path) if path.suffix in SAFETENSORS else _read_pth(path)
    flat = isinstance(weights, dict) and weights and all(
        isinstance(k, str) and isinstance(v, Tensor) and v.is_floating_point() for k, v in weights.items())
    if not flat:
        raise CheckpointError("the file holds something else than a flat dict of weights", where=path,
                              fix="use the model's .pth, not a training checkpoint or a data file")
    return weights


def _read_pth(path: Path):
    try:
        mapped = zipfile.is_zipfile(path)  # torch.save's old format cannot be memory-mapped
        return torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except (pickle.UnpicklingError, AttributeError, ImportError) as error:
        raise CheckpointError("this is not a file of weights alone, and nothing in it was run", where=path,
                              fix="use the model's published .pth; do not trust this file") from error
    except Exception as error:  # there is no end of what torch raises for a damaged file: struct.error, TypeError, …
        if out_of_memory(error):
            raise
        raise CheckpointError("the file is damaged or cut off", where=path,
                              fix="download or copy it again") from error


def _in_original_form(path: Path) -> dict[str, Tensor]:
    """A safetensors file, which keeps no order of its own, in the order of a released .pth."""
    weights = read_safetensors(path)[0]
    if "emb.weight" not in weights:
        return weights
    weights = from_ai00(weights)
    order = {key: i for i, key in enumerate(read_shape(weights).key_shapes())}
    return dict(sorted(weights.items(), key=lambda item: order.get(item[0], len(order))))


def save_weights(path: str | Path, weights: Mapping[str, Tensor], *, change: Change | None = None,
                 progress: Progress = unseen) -> None:
    """Write a .pth whole: contiguous tensors on the CPU, each with storage of its own, in the order given.

    change: (key, tensor) → what is written in its place; one tensor at a time is in memory (model.streaming).
    """
    with atomic_path(Path(path)) as temporary, parked(weights, temporary.parent, change, progress) as alone, \
            WatchedFile(temporary, sum(v.nbytes for v in alone.values()), progress) as file:
        torch.save(alone, file)


def check_keys(weights: Mapping[str, Tensor], shape: Shape, where="") -> None:
    """Raise CheckpointError that names every missing, unexpected and misshapen key."""
    wrong = misfits(weights, shape.key_shapes())
    if not wrong and shape.n_embd % shape.head_size:
        wrong = [f"att.r_k or att.time_faaaa: heads of {shape.head_size} channels do not make up {shape.n_embd}"]
    if wrong:
        raise CheckpointError(f"{len(wrong)} of its keys do not fit an {shape.version} model:\n  " + "\n  ".join(wrong),
                              where=where, fix="use a whole, unchanged base model")


def misfits(got: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Every key that is missing, unexpected or of another shape, in words."""
    return [*(f"missing: {k}" for k in expected if k not in got),
            *(f"unexpected: {k}" for k in got if k not in expected),
            *(f"{k} is {list(got[k].shape)}, expected {list(size)}" for k, size in expected.items()
              if k in got and tuple(got[k].shape) != size)]


def load_model(path: str | Path, **how) -> RWKV:
    """The model in a .pth, its shape read from the file; `how` as of `assemble`, whose dtype None keeps the file's.

    Raises CheckpointError for damaged files, versions to come, and keys that do not fit (all are named), SettingsError
    where quantising is not possible here.
    """
    weights = load_weights(path)
    shape = read_shape(weights)
    check_keys(weights, shape, where=path)
    return assemble(shape, weights.items(), **how)


def assemble(shape: Shape, weights: Iterable[tuple[str, Tensor]], *, device="cpu", dtype: torch.dtype | None = None,
             quant: str = "none", quant_double: bool = True, quant_head: bool = False, emb_cpu: bool = False) -> RWKV:
    """A model of pairs (key, tensor), taken one at a time.

    quant: "int8" or "nf4" holds the linears of att and ffn in fewer bytes, quant_head the head in int8; each matrix is
    quantised as it comes, so that the whole model never exists in `dtype`. emb_cpu leaves the embedding on the CPU:
    only the rows of the tokens at hand cross to the device.
    """
    model = RWKV(shape, device="meta")
    plain = {}
    for key, W in weights:
        kind = ("int8" if quant_head else "none") if key == "head.weight" else quant
        name, on = key.removesuffix(".weight"), "cpu" if emb_cpu and key == "emb.weight" else device
        if kind != "none" and isinstance(model.get_submodule(name) if name != key else None, nn.Linear):
            held = Held(W.to(on), kind, dtype=dtype or W.dtype, double=quant_double)
            model.set_submodule(name, QuantLinear(held))
        else:
            plain[key] = W.to(device=on, dtype=dtype or W.dtype)
    model.load_state_dict(plain, strict=True, assign=True)
    return model


def fingerprint(path: str | Path) -> str:
    """16 hex digits that tell one base from another: names, shapes, dtypes and both ends of every tensor.

    Reads a few hundred bytes a tensor, so that a 14B file takes a moment, not minutes.
    """
    digest = hashlib.sha256()
    weights = load_weights(path)
    for key in sorted(weights):
        flat = weights[key].contiguous().view(-1)
        digest.update(f"{key} {list(weights[key].shape)} {flat.dtype}".encode())
        for end in (flat[:64], flat[-64:]):
            digest.update(end.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
