"""ZeRO: what every process would hold is shared out between them (Rajbhandari et al. 2020, arXiv 1910.02054).

    stage    shared out, beside what the stage above it does
    1        AdamW's averages
    2        the gradient that they take in
    3        all parameters, the frozen base's too: gathered layer by layer where they are used
    offload  what is shared out stays in the host's memory

The loop computes gradients as always; DeepSpeed sums them once a step, clips and updates.
"""

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..config import TrainSettings
from ..extras import extra
from .optimizer import AVERAGES
from .ranks import Ranks
from .update import Update


class DeepSpeedUpdate(Update):
    """The same update by a DeepSpeed engine. From here on stage 3 holds the model in parts.

    Raises SettingsError where DeepSpeed is not installed.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter], t: TrainSettings, ranks: Ranks,
                 device: torch.device):
        super().__init__(parameters, t, ranks)
        self.adamw.state.clear()  # DeepSpeed makes its own, of this process's share
        os.environ.setdefault("DS_ACCELERATOR", device.type)  # DeepSpeed's own way to be told
        self._deepspeed = extra("deepspeed", "deepspeed")
        stage, _, offload = t.strategy.removeprefix("deepspeed_stage_").partition("_")
        zero = {"stage": int(stage)} | ({"offload_optimizer": {"device": "cpu"}} if offload else {})
        plan = {"train_micro_batch_size_per_gpu": t.micro_bsz, "zero_optimization": zero,
                "zero_force_ds_cpu_optimizer": False}
        self._parted, module = stage == "3", nn.ParameterList(parameters)
        if self._parted:
            zero["stage3_param_persistence_threshold"] = 10 * model.shape.n_embd  # vectors are not shared out
            zero |= {"offload_param": {"device": "cpu"}} if offload else {}
            self._deepspeed.zero.Init(module=model, config_dict_or_path=plan)
            self._deepspeed.utils.set_z3_leaf_modules(model, [type(model.blocks[0])])  # a block is gathered at once
            # A block whose input has no gradient would be let go of before its own backward.
            model.emb.register_forward_hook(lambda emb, tokens, x: x.requires_grad_(torch.is_grad_enabled()))
            module = _Forward(model)
            self._deepspeed.zero.register_external_parameter(module, model.head.weight)  # which the loss reads itself
        self.engine = self._deepspeed.initialize(model=module, optimizer=self.adamw, config=plan)[0]
        self._summing = contextlib.ExitStack()
        self._sum_once()

    def _sum_once(self) -> None:
        """Gradients stay in the process that computed them until the step that is next."""
        self._summing.enter_context(self.engine.coalesce_grad_reduction())

    def compute(self, work: Callable[[], Any]) -> Any:
        if not self._parted:
            return work()
        result = self.engine(work)[0]
        self.engine.empty_partition_cache()  # what was gathered in inference_mode could not be trained with
        return result

    def whole(self):
        return self._deepspeed.zero.GatheredParameters(self.parameters, enabled=self._parted)

    def _step(self, lr: float, clip: float) -> float:
        self._summing.close()
        optimizer = self.engine.optimizer
        optimizer.clip_grad = clip
        optimizer.loss_scale = self.scale / self.ranks.size  # DeepSpeed takes the mean of what we add up
        for group in optimizer.param_groups:
            group["lr"] = lr
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.step()
        self._sum_once()
        return math.inf if optimizer.overflow else float(self.engine.get_global_grad_norm())

    def zero_grad(self) -> None:
        """DeepSpeed leaves out a step whose gradient is not finite, and forgets the gradient."""
        for p in self.parameters:
            if p.grad is not None:
                p.grad.fill_(math.nan)
        self._step(0.0, 0.0)

    def state_dict(self) -> dict:
        own = self.engine.optimizer.optimizer
        steps = [state["step"] for state in own.state.values() if "step" in state]
        whole = self._deepspeed.utils.safe_get_full_optimizer_state
        # each parameter has a step of its own: one that all shared would be counted up by each of them
        state = {i: {"step": steps[0].clone().cpu(), **{name: whole(p, name).cpu() for name in AVERAGES}}
                 for i, p in enumerate(self.parameters)} if steps else {}
        groups = [{**own.param_groups[0], "params": list(range(len(self.parameters)))}]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state: dict) -> None:
        if not state["state"]:
            return
        self._make_state()
        for i, p in enumerate(self.parameters):
            for name in AVERAGES:
                value = state["state"][i][name].to(p.device)
                self._deepspeed.utils.safe_set_full_optimizer_state(p, value, name)
        for own in self.engine.optimizer.optimizer.state.values():
            own["step"].fill_(float(state["state"][0]["step"]))

    def _make_state(self) -> None:
        """DeepSpeed makes its averages in the first step: one of gradient and learning rate 0 moves nothing."""
        with self.whole():
            for p in self.parameters:
                p.grad = torch.zeros_like(p)
        self._step(0.0, 0.0)


class _Forward(nn.Module):
    """A module whose forward is whatever uses the model: DeepSpeed hands out parameters while a forward runs."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], Any]) -> tuple:
        return (work(),)
