"""From gradients to a step: summed over the processes, clipped, and taken by AdamW; fp16's loss scale is kept here.

fp16 has few small numbers, so its losses are scaled up before backward; a step that overflows moves nothing and halves
the scale. For the other precisions the scale is 1.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..config import TrainSettings
from .optimizer import make_optimizer
from .ranks import Ranks

LARGEST_SCALE, SCALE_UP_AFTER = 2.0**16, 500  # the loss scale's start, and good steps before it is doubled


class Update:
    """Every process holds all of the adapter, its gradients and AdamW's averages (data parallel).

    parameters: fp32, what is trained; .scale is what each loss must be multiplied by.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], t: TrainSettings, ranks: Ranks):
        self.parameters, self.ranks = parameters, ranks
        self.adamw = make_optimizer(parameters, t)
        self.scale, self.good_steps = (LARGEST_SCALE if t.precision == "fp16" else 1.0), 0

    def compute(self, work: Callable[[], Any]) -> Any:
        """What `work` returns, which uses the model; all processes call this equally often."""
        return work()

    def whole(self) -> contextlib.AbstractContextManager:
        """While it is entered, by all processes, self.parameters can be read."""
        return contextlib.nullcontext()

    def step(self, lr: float, clip: float) -> float:
        """Take a step; returns the gradient's L2 norm before clipping (0: none). If it is not finite, nothing moves."""
        norm = self._step(lr, clip)
        if math.isfinite(norm):
            self.good_steps += 1
            if self.scale > 1 and self.good_steps % SCALE_UP_AFTER == 0:
                self.scale = min(2 * self.scale, LARGEST_SCALE)
        elif self.scale > 1:
            self.scale, self.good_steps = self.scale / 2, 0
        return norm

    def _step(self, lr: float, clip: float) -> float:
        grads = [p.grad for p in self.parameters if p.grad is not None]
        self.ranks.add(grads)
        for grad in grads if self.scale != 1 else ():
            grad.div_(self.scale)
        norm = float(nn.utils.clip_grad_norm_(self.parameters, clip or math.inf))
        if math.isfinite(norm):
            for group in self.adamw.param_groups:
                group["lr"] = lr
            self.adamw.step()
        self.zero_grad()
        return norm

    def zero_grad(self) -> None:
        """Forget the gradients since the last step."""
        self.adamw.zero_grad()

    def state_dict(self) -> dict:
        """AdamW's state, the same however it is shared out."""
        return self.adamw.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Go on from state_dict()."""
        self.adamw.state.clear()  # else both would be there at once
        self.adamw.load_state_dict(state)
