"""AdamW with its two averages in fp32, bf16 or 8 bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..config import TrainSettings
from ..quant import bitsandbytes


def make_optimizer(parameters: Sequence[nn.Parameter], t: TrainSettings) -> torch.optim.Optimizer:
    """AdamW under a run's settings; t.adam_state says how its averages are kept.

    Raises SettingsError for 8bit without bitsandbytes.
    """
    options = {"lr": t.live.lr_init, "betas": (t.beta1, t.beta2), "eps": t.adam_eps, "weight_decay": t.weight_decay}
    if t.adam_state == "8bit":
        return bitsandbytes().optim.AdamW8bit(parameters, **options)
    if t.adam_state == "bf16":
        return HalfStateAdamW(parameters, options)
    return torch.optim.AdamW(parameters, **options, fused=True)


class HalfStateAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) whose averages are kept in bf16, rounded at random.

    An average moves by a part of 1 - beta a step, less than bf16 resolves: rounded to the nearest it would stand
    still. Which way a number is rounded follows from the step alone, so that a resumed run goes on exactly.
    """

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for index, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                state = self.state[p] or self._begin(p)
                state["step"] += 1
                generator = torch.Generator(p.device).manual_seed(state["step"] * 2**20 + index)
                mean = state["mean"].float().lerp_(p.grad, 1 - beta1)
                square = state["square"].float().mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                state["mean"].copy_(_dithered(mean, generator))
                state["square"].copy_(_dithered(square, generator))
                root = square.div_(1 - beta2 ** state["step"]).sqrt_().add_(group["eps"])
                p.mul_(1 - lr * group["weight_decay"])
                p.addcdiv_(mean, root, value=-lr / (1 - beta1 ** state["step"]))

    def _begin(self, p: nn.Parameter) -> dict:
        self.state[p] = {"step": 0, **{name: torch.zeros_like(p, dtype=torch.bfloat16) for name in ("mean", "square")}}
        return self.state[p]

    def load_state_dict(self, state_dict: dict) -> None:
        """As of any optimizer, but the averages stay in bf16 (torch would give them the parameter's dtype)."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state.update({name: state[name].bfloat16() for name in ("mean", "square")})


def _dithered(x: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 x rounded to what bf16 can hold, up or down at random in proportion to the distance."""
    noise = torch.randint(0, 2**16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    return noise.add_(x.view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32)
