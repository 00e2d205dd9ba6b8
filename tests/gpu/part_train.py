"""One LoRA step of each published size on random weights, as a run takes it: tokens a second and peak memory.

Some of them without dropout as well, and some with PyTorch's own pointwise steps and loss in place of our kernels'.
"""

import functools
import itertools
import time

import torch

from rwkv_nb.config import LoraSettings, TrainSettings
from rwkv_nb.lora.layers import adapter_parameters, attach, set_dropout_step
from rwkv_nb.loss import head_loss
from rwkv_nb.model.rwkv import RWKV
from rwkv_nb.model.shape import PUBLISHED, PUBLISHED_OLDER, Shape
from rwkv_nb.train.optimizer import make_optimizer
from rwkv_nb.train.shrink import free_memory, if_memory_lasts
from rwkv_nb.wkv import kernels, pick_op

SIZES = ("0.1B", "0.4B", "1.5B", "2.9B", "v6 1.6B", "v6 3B")
BATCHES = ((1, 1024), (8, 1024))
TINY = Shape(2, 64, 257, 16, 16, 16, 16, 128)


def cases(options):
    if options.device == "cpu":
        yield "tiny B1 T16 none", functools.partial(_step, TINY, 1, 16, "none", "cpu")
        return
    shapes = PUBLISHED | PUBLISHED_OLDER
    for size, (B, T), grad_cp in itertools.product(SIZES, BATCHES, ("none", "block")):
        yield f"{size} B{B} T{T} {grad_cp}", functools.partial(_step, shapes[size], B, T, grad_cp, "cuda")
        if size == "1.5B" and grad_cp == "none":
            for what, how in (("no dropout", {"dropout": 0.0}), ("PyTorch's pointwise steps", {"fused": False})):
                yield f"{size} B{B} T{T} {what}", functools.partial(_step, shapes[size], B, T, grad_cp, "cuda", **how)


def table(results) -> str:
    lines = ["| bf16, r 64 | op | thousand tokens/s | peak GB |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| {name} | {r['op']} | {r['ktokens']} | {r['peak_gb']} |"
                              for name, r in results.items() if "ktokens" in r])


def _step(shape, B, T, grad_cp, device, dropout=0.01, fused=True) -> dict:
    """The median of ten steps: forward, the library's head and loss, backward, clipping, AdamW."""
    op, loaded = pick_op("auto", device, torch.bfloat16, shape.generation), set(kernels._loaded)
    if not fused:
        kernels._loaded.clear()
    try:
        result = if_memory_lasts(lambda: _measure(shape, B, T, grad_cp, device, dropout))
    finally:
        kernels._loaded.update(loaded)
    free_memory()
    return {"note": "more memory is needed"} if result is None else {"op": op} | result


def _measure(shape, B, T, grad_cp, device, dropout) -> dict:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model = RWKV(shape, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    attach(model.train(), LoraSettings(r=64, lora_alpha=128), seed=1)
    parameters = list(adapter_parameters(model))
    optimizer = make_optimizer(parameters, TrainSettings())
    tokens = torch.randint(1, shape.vocab_size, (B, T + 1), device=device)
    mask = torch.ones(B, T, dtype=torch.bool)  # on the CPU, as batches have it

    def step(number):
        set_dropout_step(model, 0, number, 0, dropout)
        hidden, _ = model.hidden(tokens[:, :-1], grad_cp=grad_cp, keep_state=False)
        loss, ce = head_loss(hidden, model.head, tokens[:, 1:], mask, B * T)
        loss.backward()
        float(ce), float(torch.nn.utils.clip_grad_norm_(parameters, 1.0))  # a run looks at both
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    took = []
    for i in range(12):
        start = time.perf_counter()
        step(i)
        if i > 1:
            took.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0
    return {"ktokens": round(B * T / sorted(took)[5] / 1e3, 1), "peak_gb": round(peak, 2)}
