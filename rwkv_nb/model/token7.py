"""Token by token: what a chat waits for. RWKV-7 has one operator for it on a CPU (cuda/token7_cpu.cpp).

Axes: B batch, C channels, H heads, N head size, L layers, R rank.
"""

import torch
from torch import Tensor

from ..wkv import pick_op
from .rwkv import RWKV, State

# What the operator takes of each block, in its order. Linears come with their adapters, the low-rank matrices turned.
VECTORS = ("ln1.weight", "ln1.bias", "ln2.weight", "ln2.bias", "att.ln_x.weight", "att.ln_x.bias", "att.x_r", "att.x_w",
           "att.x_k", "att.x_v", "att.x_a", "att.x_g", "att.w0", "att.a0", "att.v0", "att.k_k", "att.k_a", "att.r_k",
           "ffn.x_k")
LINEARS = ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")
LOW_RANK = ("att.w1", "att.w2", "att.a1", "att.a2", "att.v1", "att.v2", "att.g1", "att.g2")


class TokenSteps:
    """model.hidden of one token a row, for one text after another: weights must not change meanwhile."""

    def __init__(self, model: RWKV, op: str = "auto"):
        weight, version = model.ln_out.weight, model.shape.generation
        picked = pick_op(op, weight.device, weight.dtype, version)
        # One step of the chunked form is the definition with more work around it.
        self.model, self.op, self._given = model, "torch" if picked == "chunked" else op, None
        quantised = any(block.get_submodule(name).weight is None for block in model.blocks for name in LINEARS)
        # DeepSpeed's stage 3 gathers a layer's weights when its forward is called: they cannot be read beside it.
        parted = any(hasattr(p, "ds_id") for p in model.parameters())
        self.fused = version == 7 and picked == "cpu" and not quantised and not parted

    def __call__(self, tokens: list[int], state: State) -> tuple[Tensor, State]:
        """tokens, B of them, and the state before → hidden [B,1,C], state. The state given may be changed in place."""
        model, ids = self.model, torch.tensor(tokens)[:, None]
        if len(tokens) > 1 or not self.fused:
            return model.hidden(ids, state, op=self.op)
        self._given = self._given or _weights(model)
        x = torch.ops.rwkv_nb.token7(model.blocks[0].ln0(model.emb(ids)).flatten(), *self._given, *state)
        return model.ln_out(x.to(model.ln_out.weight.dtype))[None, None], state


def _weights(model: RWKV) -> tuple[Tensor, list[Tensor]]:
    """Vectors [L,19,C] in fp32, and each layer's matrices [out,in]."""
    none, vectors, matrices = model.ln_out.weight.new_empty(0, 0), [], []
    for block in model.blocks:
        own = dict(block.named_parameters())
        if block.first:
            own |= {"att.v0": torch.zeros_like(own["att.w0"]), "att.v1": none, "att.v2": none}     # not used there
        vectors.append(torch.stack([own[name].flatten().float() for name in VECTORS]))
        for name in LINEARS:
            layer = block.get_submodule(name)
            scale = layer.scale * layer.strength if f"{name}.lora_A" in own else 0
            matrices += [layer.weight, *((layer.lora_A, layer.lora_B * scale) if scale else (none, none))]
        matrices += [own[name].mT.contiguous() for name in LOW_RANK]
    return torch.stack(vectors), matrices
