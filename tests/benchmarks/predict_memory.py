"""A prediction, not a measurement: the GPU memory of a LoRA step for every cell of the tutorial's table, counted
without a GPU by `rwkv_nb.memory`, beside the tutorial's own figure and the computed floor.

    python tests/benchmarks/predict_memory.py [--out results/memory_prediction.json]

r=64, lora_alpha=32, lora_dropout=0.05, ctx_len=1024, micro_bsz=1, bf16. GB = 1e9 bytes, with 0.5 for the CUDA context.
`make gpu-check PART=memory` measures the same cells where there is a GPU.

Beside the sum of all tensors, two steps of the whole model, block by block, go through what torch's allocator does
with each tensor's size: `rounding` is what its blocks are larger than the tensors, and is in the prediction; `idle` is
what its segments hold beyond that.
"""

import argparse
import bisect
import dataclasses
import json
import statistics
from pathlib import Path
from typing import NamedTuple

import torch

from rwkv_nb.config import PRESETS, Settings, replace
from rwkv_nb.lora.layers import adapter_parameters
from rwkv_nb.loss import GPU_CHUNK
from rwkv_nb.memory import ADAM_BYTES, QUANTS, TUTORIAL, TUTORIAL_SETTINGS, LiveBytes, estimate, numberless
from rwkv_nb.model import PUBLISHED, PUBLISHED_OLDER, Shape
from rwkv_nb.wkv.kernels import load, meta_as_gpu

BARS = {"balanced": 0.70, "small": 0.58}   # the geometric mean of ours ÷ the tutorial's that is asked for
FLOOR = {  # the least that a cell can take, computed from the shapes: bf16, int8, nf4 of "safe" and of "lean"
    "0.1B": ((1.05, 0.97, 0.93), (0.90, 0.82, 0.78)), "0.4B": ((1.87, 1.58, 1.45), (1.57, 1.27, 1.13)),
    "1.5B": ((4.49, 3.32, 2.79), (3.89, 2.71, 2.13)), "2.9B": ((7.99, 5.53, 4.42), (7.04, 4.58, 3.36)),
    "v6 1.6B": ((4.59, 3.31, 2.74), (4.01, 2.73, 2.09)), "v6 3B": ((8.21, 5.53, 4.34), (7.30, 4.62, 3.30)),
    "v6 7B": ((18.19, 11.33, 8.27), (16.74, 9.87, 6.49))}


MIB, HOPPER = 2**20, 2 * (2**25 - 2**23 - 2**17)   # the second: what cuBLAS's workspaces take more from Hopper on


class Block(NamedTuple):
    """A part of a segment. Free ones are looked for by size, then by age and place, as the allocator does."""

    size: int
    segment: int
    at: int


class CachingAllocator(LiveBytes):
    """Torch's CUDA allocator (c10/cuda/CUDACachingAllocator.cpp) by its rules alone: sizes in steps of 512 B; up to
    1 MiB from segments of 2 MiB, else from 20 MiB, or from 10 MiB on from what is asked for in steps of 2 MiB; the
    smallest free block that is large enough is taken, and cut where more than 512 B, or 1 MiB, would be over."""

    def __init__(self):
        super().__init__()
        self.blocks = self.most = self.reserved = self.segments = 0   # bytes of blocks, their most, of segments; count
        self.free = {True: [], False: []}                             # by whether they are small
        self.taken: dict[int, tuple[bool, Block]] = {}

    def born(self, key: int, size: int) -> None:
        super().born(key, size)
        size = -(-size // 512) * 512
        small = size <= MIB
        free = self.free[small]
        i = bisect.bisect_left(free, (size,))
        if i == len(free):
            total = 2 * MIB if small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
            free.append(Block(total, self.segments, 0))
            self.reserved, self.segments = self.reserved + total, self.segments + 1
        whole = free.pop(i)
        if whole.size - size >= (512 if small else MIB + 1):
            bisect.insort(free, Block(whole.size - size, whole.segment, whole.at + size))
            whole = whole._replace(size=size)
        self.taken[key] = small, whole
        self.blocks += whole.size
        self.most = max(self.most, self.blocks)

    def freed(self, key: int, size: int) -> None:
        super().freed(key, size)
        small, block = self.taken.pop(key)
        self.blocks -= block.size
        free = self.free[small]
        for other in [b for b in free if b.segment == block.segment
                      and (b.at + b.size == block.at or block.at + block.size == b.at)]:
            free.remove(other)
            block = Block(other.size + block.size, block.segment, min(other.at, block.at))
        bisect.insort(free, block)


def whole_model(shape: Shape, settings: Settings) -> tuple[int, int]:
    """(rounding, idle), in bytes, of two steps of a model of this shape whose embedding is on the CPU."""
    t, V, T = settings.train, shape.vocab_size, settings.data.ctx_len

    def room(*sizes: float) -> list[torch.Tensor]:
        return [torch.empty(int(size), dtype=torch.uint8) for size in sizes]

    with torch.device("meta"):
        model = numberless(dataclasses.replace(shape, vocab_size=1), settings.lora, t, gpu=True)
    with torch.device("meta"), meta_as_gpu(), CachingAllocator() as allocator:
        stays = room(V * shape.n_embd * (1 if t.quant_head else 2), *[2**23 + 2**17] * 2)   # head, workspaces
        for module in model.blocks.modules():
            held = getattr(module, "held", None)
            for tensor in [*module.parameters(recurse=False), *([held.codes] if held else ())]:
                allocator.count(tensor)
        parameters = list(adapter_parameters(model))
        for step in range(2):
            hidden, _ = model.hidden(torch.zeros(1, T, dtype=torch.long), op="cpu", grad_cp=t.grad_cp, keep_state=False)
            gradient = torch.empty_like(hidden)
            room(hidden.nbytes, GPU_CHUNK * V * 2)                                          # the loss
            hidden.backward(gradient)
            del hidden, gradient
            if step == 0:
                stays += room(*[p.numel() * ADAM_BYTES[t.adam_state] / 2 for p in parameters for _ in range(2)])
            for p in parameters:
                p.grad = None
    return allocator.most - allocator.peak, allocator.reserved - allocator.most


def cell(name: str, preset: str, i: int) -> dict:
    """One cell of the table under one preset."""
    shape = (PUBLISHED | PUBLISHED_OLDER)[name]
    settings = replace(TUTORIAL_SETTINGS, **PRESETS[preset], quant=QUANTS[i])
    told, (rounding, idle) = estimate(shape, settings), whole_model(shape, settings)
    gb, tutorial = (told.total + rounding) / 1e9, TUTORIAL[name][i]
    row = {"model": name, "quant": QUANTS[i], "preset": preset, "predicted_gb": round(gb, 3), "tutorial_gb": tutorial,
           "ratio": round(gb / tutorial, 3), "below_the_tutorial_gb": round(tutorial - gb, 3),
           "floor_gb": dict(zip(("safe", "lean"), (kind[i] for kind in FLOOR[name]), strict=True)),
           "rounding_mb": round(rounding / 1e6, 1), "idle_mb": round(idle / 1e6, 1),
           "at_peak_mb": {part: round(size / 1e6, 1) for part, size in told.at_peak.items()}}
    print(f"{name:8} {preset:8} {QUANTS[i]:5} {gb:6.2f} GB, tutorial {tutorial:5.1f}, "
          f"rounding {rounding / 1e6:.0f} MB, idle {idle / 1e6:.0f} MB", flush=True)
    return row


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "memory_prediction.json")
    out = options.parse_args().out
    load()
    cells = [cell(name, preset, i) for preset in BARS for name in TUTORIAL for i in range(3)]

    def mean(preset: str, more: float = 0) -> float:
        return round(statistics.geometric_mean((c["predicted_gb"] + more) / c["tutorial_gb"] for c in cells
                                               if c["preset"] == preset), 3)

    result = {"what": "PREDICTION, made without a GPU: " + " ".join(__doc__.split("\n\n")[0].split()),
              "settings": " ".join(__doc__.split("\n\n")[2].split()),
              "columns": " ".join(__doc__.split("\n\n")[3].split()),
              "geometric_mean_of_ratios": {p: {"predicted": mean(p), "on Hopper and later": mean(p, HOPPER / 1e9),
                                               "bar": f"<= {bar}"} for p, bar in BARS.items()},
              "every_cell_below_the_tutorial": all(c["below_the_tutorial_gb"] > 0 for c in cells), "cells": cells}
    out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "cells"}, indent=1))


if __name__ == "__main__":
    main()
