"""What is checked and told before a run, and what is written down of it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .. import __version__
from ..config import TrainSettings
from ..errors import SettingsError
from ..model import DTYPES, Shape
from ..runs import free_bytes
from ..wkv import left_out
from ..words import bytes_text

if TYPE_CHECKING:
    from .loop import Trainer


def pick_device(accelerator: str, number: int = 0) -> torch.device:
    """auto takes the GPU of that number where there is one. Raises SettingsError for a gpu that is not there."""
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise SettingsError("there is no GPU that torch can use", where="accelerator",
                            fix="set accelerator to cpu or auto; 00_check says what is missing")
    if accelerator != "cpu" and number >= torch.cuda.device_count() > 0:
        raise SettingsError(f"there are {torch.cuda.device_count()} GPUs, and {number + 1} are asked for",
                            where="devices", fix="set devices to as many as there are, or accelerator to cpu")
    gpu = accelerator != "cpu" and torch.cuda.is_available()
    return torch.device("cuda", number) if gpu else torch.device("cpu")


def check_shape(t: TrainSettings, shape: Shape) -> None:
    """Raise SettingsError where my_testing, n_layer, n_embd or vocab_size is given and is not the base's."""
    for name in ("my_testing", "n_layer", "n_embd", "vocab_size"):
        given, there = getattr(t, name), getattr(shape, "version" if name == "my_testing" else name)
        if given not in ("auto", 0, there):
            raise SettingsError(f"{name} is {given}, {Path(t.load_model).name} has {there}", where=name,
                                fix="leave it out: it is read from the file")


def notices(trainer: Trainer) -> list[str]:
    """What a person should know before the run, a sentence each."""
    told, t, size = [], trainer.settings.train, trainer.ranks.size
    if trainer.model.shape.version == "x052":
        told.append(f"{Path(t.load_model).name} is an RWKV-5 (x052) model: that version is deprecated, take a "
                    "newer base for new work")
    if t.live.lr_init > 5e-4 and trainer.model.shape.n_embd >= 768:
        told.append(f"WARNING: lr_init {t.live.lr_init:g} is high for a model of this size: 2e-5 … 1e-4 are usual")
    if t.strategy.startswith("deepspeed") and size == 1:
        told.append(f"strategy {t.strategy} is not needed: one device trains alone")
    told += quant_notice(t)
    if t.op == "auto":
        told += left_out(trainer.op, trainer.device, DTYPES[t.precision])
    together = f", {size} processes ({'ddp' if t.strategy == 'auto' else t.strategy})" if size > 1 else ""
    return [*told, *trainer.batches.notices(), _disk_notice(trainer),
            f"operator: {trainer.op}, on {trainer.device}{together}"]


def quant_notice(t: TrainSettings) -> list[str]:
    """What a person should know of a quantised base; nothing of another."""
    return [] if t.quant == "none" else [f"the base is held in {t.quant} while it trains; merging goes into the "
                                         "original base, as its file has it"]


def _disk_notice(trainer: Trainer) -> str:
    t, adapter = trainer.settings.train, sum(p.nbytes for p in trainer.parameters)
    models = -(-t.epoch_count // t.epoch_save)
    files = models + bool(trainer.heldout) + (trainer.total_steps // t.live.save_every if t.live.save_every else 0)
    need = (files + 3) * adapter  # the checkpoint holds three: adapter and AdamW's two averages
    if t.merge:
        need += models * Path(t.load_model).stat().st_size
    free = free_bytes(trainer.run.folder)
    text = (f"disk: {files} adapters of {bytes_text(adapter)}" + (f", {models} merged models," if t.merge else "")
            + f" need {bytes_text(need)}; {bytes_text(free)} are free")
    return f"WARNING {text}: save less often (epoch_save, save_every) or set merge to 0" if need > free else text


def description(trainer: Trainer) -> dict:
    """What this run is made of, for started.json: settings, data, base, versions."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "pyrwkv-tokenizer")}
    return {"settings": dataclasses.asdict(trainer.settings), "base": trainer.base, "data": trainer.batches.state(),
            "op": trainer.op, "device": str(trainer.device), "processes": trainer.ranks.size,
            "threads": torch.get_num_threads(),
            "versions": {"rwkv_nb": __version__, "python": platform.python_version(), **versions}}
