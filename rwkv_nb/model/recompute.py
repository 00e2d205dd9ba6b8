"""Gradient checkpointing of a block: its inputs are kept, all else is computed again in backward.

Source: Chen et al. 2016, arXiv 1604.06174. torch.utils.checkpoint would do, but its own way calls Python for every
tensor that is saved: a quarter of a step's time where a GPU waits for the CPU.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge


def recomputed(block: nn.Module, *inputs, op: str) -> tuple[Tensor | None, ...]:
    """block(*inputs, op), whose graph is made in backward. inputs: tensors or None; random numbers are the block's own
    affair (dropout's follow from a seed). Gradients reach the block's parameters by backward(), not by
    torch.autograd.grad()."""
    spark = torch.empty(0, requires_grad=True)  # the parameters need a gradient even where no input does
    return _Recomputed.apply(spark, block, op, *inputs)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spark, block, op, *inputs):
        ctx.block, ctx.op = block, op
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        return block(*inputs, op)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        inputs = [x if x is None else x.detach().requires_grad_(needed)
                  for x, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[3:], strict=True)]
        with torch.enable_grad():
            outputs = ctx.block(*inputs, ctx.op)
        # Where the gradients start: the outputs themselves, and what they are views of, need not live through it.
        starts = [(get_gradient_edge(y), dy) for y, dy in zip(outputs, grads, strict=True)
                  if dy is not None and y.requires_grad]
        del outputs
        torch.autograd.backward(*zip(*starts, strict=True))
        return None, None, None, *(x if x is None else x.grad for x in inputs)
