"""The processes of one run, on one machine or several: what they agree on, and sums over all of them.

torch.distributed carries it: NCCL between GPUs, gloo between CPUs and for everything that is not a tensor.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """A run of one process: it agrees with itself. `rank` counts the processes, `local` those of this machine."""

    rank, local, size = 0, 0, 1

    def tell(self, value: Any) -> Any:
        """The first process's value, in every process."""
        return value

    def ask(self, value: Any) -> list[Any]:
        """Every process's value, by rank."""
        return [value]

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor, in place, by its sum over all processes."""


class JoinedRanks(Ranks):
    """The processes that torchrun started: torch reads rank, size and address from what torchrun sets."""

    def __init__(self, local: int, gpu: bool):
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
        self.rank, self.size, self.local = dist.get_rank(), dist.get_world_size(), local

    def tell(self, value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def ask(self, value: Any) -> list[Any]:
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def add(self, tensors: Iterable[Tensor]) -> None:
        tensors = list(tensors)
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        for t, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(part.view_as(t))
