"""What the versions' time mixes and channel mixes are made of.

Axes: B batch, T time, C channels, H heads, N head size.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LN_X_EPS = 64e-5  # the published 1e-5 times the squared divisor 8: RWKV-5's norm of x / 8 is the same


class Linear(nn.Linear):
    """A linear layer. One row alone goes through mv: in bf16 on a CPU it reads the weights up to 1.5 times as fast."""

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == self.in_features and self.bias is None:
            return torch.mv(self.weight, x.view(-1)).view(*x.shape[:-1], -1)
        return F.linear(x, self.weight, self.bias)


def of_squared_relu(linear: nn.Module, x: Tensor) -> Tensor:
    """linear(max(x, 0)²). Ours with something beside the matrix (lora, quant) square on their own, which keeps one
    tensor less for backward; what other libraries put in a linear's place need not know of it."""
    if getattr(linear, "squares", False):
        return linear(x, squared=True)
    return linear(torch.relu(x).square())


class Part(nn.Module):
    """A module whose parameters, linears and ln_x are those that the checkpoint's keys name (Shape.att_keys)."""

    def __init__(self, keys: Mapping[str, tuple[int, ...]], n_head: int, **on):
        super().__init__()
        for key, size in keys.items():
            name, _, kind = key.partition(".")
            if not kind:
                self.register_parameter(name, nn.Parameter(torch.empty(size, **on)))
            elif len(size) == 2:
                setattr(self, name, Linear(size[1], size[0], bias=False, **on))
            elif kind == "weight":
                setattr(self, name, nn.GroupNorm(n_head, size[0], eps=LN_X_EPS, **on))
        self.n_head = n_head

    def heads(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """[B,T,C] → [B,T,H,N], each."""
        return tuple([x.unflatten(-1, (self.n_head, -1)) for x in tensors])  # einops costs as much as a step's sums
