"""AdamW with its two averages in fp32, bf16 or 8 bits. All that it keeps is there before the first step: a run that
has memory for its optimizer has it to the end."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..config import TrainSettings
from ..memory import ADAM_AT_ONCE
from ..quant import bitsandbytes

AVERAGES = ("exp_avg", "exp_avg_sq")   # torch's names for them


def make_optimizer(parameters: Sequence[nn.Parameter], t: TrainSettings) -> torch.optim.Optimizer:
    """AdamW under a run's settings; t.adam_state says how its averages are kept.

    Raises SettingsError for 8bit without bitsandbytes.
    """
    options = {"lr": t.live.lr_init, "betas": (t.beta1, t.beta2), "eps": t.adam_eps, "weight_decay": t.weight_decay}
    if t.adam_state == "8bit":
        return _adamw_8bit(parameters, options)
    if t.adam_state == "bf16":
        return HalfStateAdamW(parameters, options)
    optimizer = torch.optim.AdamW(parameters, **options, fused=True)
    for p in parameters:
        optimizer.state[p] = {"step": torch.zeros((), device=p.device),
                              **{name: torch.zeros_like(p) for name in AVERAGES}}
    return optimizer


def _adamw_8bit(parameters: Sequence[nn.Parameter], options: dict) -> torch.optim.Optimizer:
    class AdamW8bit(bitsandbytes().optim.AdamW8bit):
        @torch.no_grad()
        def step(self, closure=None) -> None:
            """bitsandbytes' own step, but that waits for the GPU after every single parameter."""
            for index, p in enumerate(parameters):
                if p.grad is not None:
                    self.update_step(self.param_groups[0], p, 0, index)

    optimizer = AdamW8bit(parameters, **options)
    for index, p in enumerate(parameters):
        optimizer.init_state(optimizer.param_groups[0], p, 0, index)
    return optimizer


class HalfStateAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) whose averages are kept in bf16, rounded at random.

    An average moves by a part of 1 - beta a step, less than bf16 resolves: rounded to the nearest it would stand
    still. Which way a number is rounded follows from the step alone, so that a resumed run goes on exactly.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], options: dict):
        super().__init__(parameters, options)
        for p in parameters:
            self.state[p] = {"step": 0, **{name: torch.zeros_like(p, dtype=torch.bfloat16)
                                           for name in ("mean", "square")}}

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for index, some in self._together(group["params"]):
                self._move(some, index, **group)

    def _together(self, parameters: Sequence[nn.Parameter]) -> Iterator[tuple[int, list[nn.Parameter]]]:
        """Parameters that have a gradient and as many steps behind them, up to ADAM_AT_ONCE elements, and a number
        for each such list: on a GPU each operation is one launch for all of them."""
        some, size = [], 0
        for index, p in enumerate(parameters):
            if p.grad is None:
                continue
            if some and (size + p.numel() > ADAM_AT_ONCE or self.state[p]["step"] != self.state[some[0]]["step"]):
                yield index, some
                some, size = [], 0
            some.append(p)
            size += p.numel()
        if some:
            yield len(parameters), some

    def _move(self, parameters: list[nn.Parameter], index: int, *, betas, lr, eps, weight_decay, **_) -> None:
        states, (beta1, beta2) = [self.state[p] for p in parameters], betas
        for state in states:
            state["step"] += 1
        step = states[0]["step"]
        generator = torch.Generator(parameters[0].device).manual_seed(step * 2**20 + index)
        grad = _flat([p.grad for p in parameters])
        mean = _flat([state["mean"] for state in states]).float().lerp_(grad, 1 - beta1)
        square = _flat([state["square"] for state in states]).float().mul_(beta2)
        square.addcmul_(grad, grad, value=1 - beta2)
        del grad
        for name, average in (("mean", mean), ("square", square)):
            kept = _dithered(average, generator).bfloat16()
            torch._foreach_copy_([state[name] for state in states], _parts(kept, parameters))
        root = square.div_(1 - beta2 ** step).sqrt_().add_(eps)
        torch._foreach_mul_(parameters, 1 - lr * weight_decay)
        torch._foreach_add_(parameters, _parts(mean.div_(root), parameters), alpha=-lr / (1 - beta1 ** step))

    def load_state_dict(self, state_dict: dict) -> None:
        """As of any optimizer, but the averages stay in bf16 (torch would give them the parameter's dtype)."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state.update({name: state[name].bfloat16() for name in ("mean", "square")})


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def _parts(flat: Tensor, like: list[nn.Parameter]) -> list[Tensor]:
    """The parts of a flat tensor that belong to each parameter, in its shape."""
    return [part.view_as(p) for part, p in zip(flat.split([p.numel() for p in like]), like, strict=True)]


def _dithered(x: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 x rounded to what bf16 can hold, up or down at random in proportion to the distance."""
    noise = torch.randint(0, 2**16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    return noise.add_(x.view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32)
