"""LoRA: a frozen linear W with a narrow trained path beside it.

    x ──┬─────────── W [out,in], frozen ─────────────┬── y
        │                                            │
        └─ dropout ─ A [R,in] ─ B [out,R] ─ · α/R ───┘      B starts at 0, so training starts at the base

Source: Hu et al. 2021, arXiv 2106.09685; initial values as in Hugging Face peft. Axes: M rows (B·T), R rank.
"""

import contextlib
import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import LoraSettings
from ..dropout import Dropout
from ..errors import SettingsError, did_you_mean
from ..quant import frozen_product
from .parts import train_parts, trained_parts


@dataclass
class DropoutClock:
    """What dropout masks follow from, shared by all layers of a model: no random state to save or restore."""

    seed: int = 0
    step: int = 0
    micro: int | str = 0  # "micro.chunk" where a text is computed in chunks
    masks: bool = False   # as of Dropout

    def dropout(self, p: float, layer: int) -> Dropout:
        """One layer's in one micro-batch."""
        text = f"{self.seed} {self.step} {self.micro} {layer}"
        seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")
        return Dropout(p, seed, self.masks)


class LoraLinear(nn.Linear):
    """y = W x + strength · α/R · B A dropout(x); `.weight` stays the base's own, under the checkpoint's key (None where
    the base is quantised: `.held` has it then).

    lora_A [R,in] and lora_B [out,R] are fp32 whatever the base's dtype; x and y are [..., in] and [..., out] in the
    base's dtype. dropout and strength may change at any time; strength 0 is the base exactly.
    """

    squares = True  # forward knows `squared`

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float, generator: torch.Generator,
                 clock: DropoutClock, index: int):
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight, self.bias, self.held = base.weight, base.bias, getattr(base, "held", None)
        device = (self.held or self.weight).device
        A = nn.init.kaiming_uniform_(torch.empty(r, self.in_features), a=math.sqrt(5), generator=generator)
        self.lora_A = nn.Parameter(A.to(device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, device=device))
        self.r, self.alpha, self.dropout, self.strength = r, alpha, dropout, 1.0
        self.clock, self.index = clock, index
        self.training = base.training

    @property
    def scale(self) -> float:
        """α/R"""
        return self.alpha / self.r

    def forward(self, x: Tensor, squared: bool = False) -> Tensor:
        """squared: max(x, 0)² takes x's place."""
        W = self.held or self.weight
        if self.strength == 0:
            return frozen_product(x, W, self.bias, squared=squared)
        p = self.dropout if self.training else 0.0
        dropout = self.clock.dropout(p, self.index) if p else None
        scale = self.scale * self.strength / (1 - p)
        return frozen_product(x, W, self.bias, self.lora_A, self.lora_B, scale, dropout, squared)


def attach(model: nn.Module, lora: LoraSettings, seed: int) -> list[str]:
    """Give every linear that is `matching` lora.target_modules an adapter, in place; freeze all the rest
    but lora.train_parts. There is no dropout until set_dropout_step asks for it.

    Works on any device, meta too (to count parameters). Returns the linears' full names, in the model's order.
    Raises SettingsError for a target that matches nothing (with the nearest names) and for a second attach.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    names = matching(lora.target_modules, linears)
    if lora_layers(model):
        raise SettingsError("this model has an adapter already", where="attach", fix="load the base anew")
    model.requires_grad_(False)
    generator, clock = torch.Generator().manual_seed(seed), DropoutClock(seed)
    for index, name in enumerate(names):
        parent, _, child = name.rpartition(".")
        layer = LoraLinear(linears[name], lora.r, lora.lora_alpha, 0.0, generator, clock, index)
        setattr(model.get_submodule(parent), child, layer)
    adapted = [f"{name}.{part}" for name in names for part in ("weight", "lora_A", "lora_B")]
    model._trained_parts = train_parts(model, lora.train_parts, adapted)
    return names


def matching(targets: Iterable[str], linears: Iterable[str]) -> list[str]:
    """The linears' full names that end with one of the targets, in order; SettingsError for a target without any.

    No targets: every linear but the head, which is what is usual for each version.
    """
    targets, linears = list(targets), list(linears)
    if not targets:
        return [name for name in linears if name != "head"]

    def fits(name: str, target: str) -> bool:
        return name == target or name.endswith(f".{target}")

    ends = endings(linears)
    for target in targets:
        if not any(fits(name, target) for name in linears):
            raise SettingsError(f"no linear layer's name ends with {target!r}", where="target_modules",
                                fix=f"{did_you_mean(target, [*ends, *linears])} there are {', '.join(ends)}".lstrip())
    return [name for name in linears if any(fits(name, target) for target in targets)]


def endings(names: Iterable[str]) -> tuple[str, ...]:
    """The last two parts of layers' names, each once: blocks.0.att.key → att.key."""
    return tuple(dict.fromkeys(".".join(name.split(".")[-2:]) for name in names))


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Layers with an adapter, by full name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """lora_A and lora_B of every layer, in the model's order, then the trained parts: all that is trained, fp32."""
    for layer in lora_layers(model).values():
        yield from (layer.lora_A, layer.lora_B)
    yield from (part.value for part in trained_parts(model).values())


def set_dropout_step(model: nn.Module, seed: int, step: int, micro: int | str, p: float | None = None) -> None:
    """Choose the dropout masks of the next forward, and the share p that they hit, where given.

    The same numbers bring the same masks back.
    """
    for layer in lora_layers(model).values():
        layer.clock.seed, layer.clock.step, layer.clock.micro = seed, step, micro
        layer.dropout = layer.dropout if p is None else p


def set_strength(model: nn.Module, value: float) -> None:
    """Multiply the adapter's part of every layer by `value`: 0 is the base, 1 as trained."""
    for layer in lora_layers(model).values():
        layer.strength = float(value)
    for part in trained_parts(model).values():
        part.use(float(value))


@contextlib.contextmanager
def strength(model: nn.Module, value: float) -> Iterator[nn.Module]:
    """set_strength for a while: `with strength(model, 0): …`"""
    before = [layer.strength for layer in lora_layers(model).values()]
    set_strength(model, value)
    try:
        yield model
    finally:
        set_strength(model, next(iter(before), 1.0))
