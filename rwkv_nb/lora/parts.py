"""Base parameters that are trained beside the adapter, such as layer norms, and saved with it.

The trained values are fp32, as the adapter is: in bf16 a small step would vanish in rounding. The model computes with
a copy in the base's dtype.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..errors import SettingsError, did_you_mean


class TrainedPart:
    """One parameter of the model, its value in the base, and the fp32 value that is trained."""

    def __init__(self, parameter: nn.Parameter):
        self.parameter, self.base = parameter, parameter.detach().clone()
        self.value = nn.Parameter(self.base.to(torch.float32, copy=True))
        parameter.requires_grad_()
        parameter.register_post_accumulate_grad_hook(self._take_gradient)

    def _take_gradient(self, parameter: nn.Parameter) -> None:
        grad = parameter.grad.float()
        self.value.grad = grad if self.value.grad is None else self.value.grad.add_(grad)
        parameter.grad = None

    @torch.no_grad()
    def use(self, strength: float = 1.0) -> None:
        """Let the model compute with base + strength · (value - base)."""
        self.parameter.copy_(torch.lerp(self.base.float(), self.value, strength))


def train_parts(model: nn.Module, wanted: Iterable[str], taken: Iterable[str]) -> dict[str, TrainedPart]:
    """Parts by parameter name, for all parameters whose name contains one of `wanted`; `taken` have an adapter.

    Raises SettingsError for a name that fits nothing, with the nearest ones.
    """
    parameters = {name: p for name, p in model.named_parameters() if name not in set(taken)}
    for text in wanted:
        if not any(text in name for name in parameters):
            ends = sorted({part for name in parameters for part in name.split(".")} - set(map(str, range(1000))))
            raise SettingsError(f"no parameter without an adapter has {text!r} in its name", where="train_parts",
                                fix=did_you_mean(text, ends, f"there are {', '.join(ends)}"))
    return {name: TrainedPart(p) for name, p in parameters.items() if any(text in name for text in wanted)}


def trained_parts(model: nn.Module) -> dict[str, TrainedPart]:
    """The parts that attach() gave the model, by name; none for a bare model."""
    return getattr(model, "_trained_parts", {})


def part_values(model: nn.Module) -> dict[str, Tensor]:
    """Their fp32 values by name, the trained tensors themselves."""
    return {name: part.value.detach() for name, part in trained_parts(model).items()}
