"""An adapter as a file has it: tensors, and what it says about itself."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..config import LoraSettings
from ..model import Shape


@dataclass(frozen=True)
class AdapterMeta:
    """What an adapter file says about itself; another program's says nothing of its base."""

    r: int
    lora_alpha: float
    target_modules: tuple[str, ...]
    base_shape: Shape | None = None
    base_fingerprint: str = ""
    base_name: str = ""        # the base's file name, for people
    template: str = ""
    tokenizer: str = ""
    epoch: int = 0
    step: int = 0
    quant: str = "none"        # how the base was held meanwhile


@dataclass(frozen=True)
class Adapter:
    """An adapter file in memory. tensors: lora_A and lora_B by key, fp32, on the CPU."""

    tensors: dict[str, Tensor]
    meta: AdapterMeta
    path: Path

    @property
    def scale(self) -> float:
        """α/R"""
        return self.meta.lora_alpha / self.meta.r

    @property
    def parts(self) -> tuple[str, ...]:
        """Parameters of the base that were trained beside it."""
        return tuple(key for key in self.tensors if not key.endswith((".lora_A", ".lora_B")))

    def lora_settings(self) -> LoraSettings:
        """What attach() needs."""
        m = self.meta
        return LoraSettings(m.r, m.lora_alpha, target_modules=m.target_modules, train_parts=self.parts)
