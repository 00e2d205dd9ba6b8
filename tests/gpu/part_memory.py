"""Every cell of the tutorial's memory table: a model of its true shape with random weights, full steps with optimizer.

The peak of torch's allocator with 0.5 GB for CUDA is beside the tutorial's figure and rwkv_nb.memory's own prediction;
the whole device's memory and tokens a second are there too.
"""

from __future__ import annotations

import functools
import gc
import itertools
import statistics
import time

import torch

from rwkv_nb.config import PRESETS, replace
from rwkv_nb.lora.layers import adapter_parameters, attach, set_dropout_step
from rwkv_nb.loss import head_loss
from rwkv_nb.memory import CONTEXT, QUANTS, TUTORIAL, TUTORIAL_SETTINGS, LiveBytes, estimate
from rwkv_nb.model import PUBLISHED, PUBLISHED_OLDER, Shape
from rwkv_nb.model.checkpoint import assemble
from rwkv_nb.train.optimizer import make_optimizer
from rwkv_nb.wkv import pick_op

TINY = Shape(4, 128, 512, 16, 16, 16, 16, 512)
BARS = {"balanced": 0.70, "small": 0.58}   # the geometric mean of (peak + 0.5 GB) ÷ the tutorial's
STEPS, SLOWEST = 6, 2 / 3                  # timed steps; the least that `small` may have of the speed of `fast`


def cases(options):
    if options.device == "cpu":
        yield "tiny small nf4", functools.partial(_cell, TINY, "small", "nf4", None, "cpu")
        return
    shapes = PUBLISHED | PUBLISHED_OLDER
    for name, (i, quant), preset in itertools.product(TUTORIAL, enumerate(QUANTS), PRESETS):
        told = TUTORIAL[name][i] if preset in BARS else None
        yield f"{name} {preset} {quant}", functools.partial(_cell, shapes[name], preset, quant, told, "cuda")


def table(results) -> str:
    columns = ("peak_gb", "with_context_gb", "predicted_gb", "tutorial_gb", "device_gb", "tokens_per_s")
    rows = [f"| {name} | {' | '.join(str(r[c]) for c in columns)} |" for name, r in results.items() if "peak_gb" in r]
    lines = ["| cell | peak GB | + context | predicted | tutorial | whole device | tokens/s |", "|---" * 7 + "|", *rows]
    for preset, bar in BARS.items():
        ratios = [r["with_context_gb"] / r["tutorial_gb"] for name, r in results.items()
                  if f" {preset} " in name and r.get("tutorial_gb")]
        if ratios:
            lines.append(f"{preset}: geometric mean {statistics.geometric_mean(ratios):.3f} of {len(ratios)} cells, "
                         f"asked for <= {bar}")
    speeds = [r["tokens_per_s"] / results[fast]["tokens_per_s"] for name, r in results.items()
              if " small " in name and "tokens_per_s" in r
              and "tokens_per_s" in results.get(fast := name.replace(" small ", " fast "), {})]
    if speeds:
        lines.append(f"small ÷ fast, tokens/s: {min(speeds):.2f} at the least, asked for >= {SLOWEST:.2f}")
    return "\n".join(lines)


def _cell(shape: Shape, preset: str, quant: str, tutorial: float | None, device: str) -> dict:
    settings = replace(TUTORIAL_SETTINGS, **PRESETS[preset], quant=quant, ctx_len=1024 if device == "cuda" else 64)
    try:
        result = _measure(shape, settings, device)
    except torch.OutOfMemoryError:
        return {"note": "more memory is needed than this GPU has"}
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    whole, predicted = result["peak_gb"] + CONTEXT / 1e9, estimate(shape, settings, gpu=device == "cuda")
    near = abs(result["peak_gb"] * 1e9 / predicted.allocated - 1) <= 0.05
    return result | {"with_context_gb": round(whole, 3), "predicted_gb": round(predicted.total / 1e9, 3),
                     "tutorial_gb": tutorial, "within_5_percent": near,
                     "ok": (device == "cpu" or near) and (tutorial is None or whole < tutorial)}


def _measure(shape: Shape, settings, device: str) -> dict:
    t, T, gpu = settings.train, settings.data.ctx_len, device == "cuda"
    live = LiveBytes()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    with live if not gpu else torch.cuda.device(0):
        model = assemble(shape, _random(shape, device), device=device, dtype=torch.bfloat16, quant=t.quant,
                         quant_double=bool(t.quant_double), quant_head=bool(t.quant_head), emb_cpu=bool(t.emb_cpu))
        attach(model, settings.lora, seed=0)
        set_dropout_step(model.train(), 0, 0, 0, t.live.lora_dropout)
        parameters = list(adapter_parameters(model))
        optimizer = make_optimizer(parameters, t)
        op = pick_op("auto", device, torch.bfloat16, shape.generation)
        tokens = torch.randint(1, shape.vocab_size, (1, T + 1), device=device)
        mask = torch.ones(1, T, dtype=torch.bool, device=device)

        def step() -> None:
            hidden, _ = model.hidden(tokens[:, :-1], op=op, grad_cp=t.grad_cp, keep_state=False)
            head_loss(hidden, model.head, tokens[:, 1:], mask, T)[0].backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(2):
            step()
        free, total = torch.cuda.mem_get_info() if gpu else (0, 0)
        if gpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(STEPS):
            step()
        if gpu:
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - began) / STEPS
    peak = torch.cuda.max_memory_allocated() if gpu else live.peak
    reserved = torch.cuda.max_memory_reserved() if gpu else 0
    return {"op": op, "peak_gb": round(peak / 1e9, 4), "reserved_gb": round(reserved / 1e9, 3),
            "context_gb": round((total - free - torch.cuda.memory_reserved()) / 1e9, 3) if gpu else 0,
            "device_gb": round((total - free) / 1e9, 3), "tokens_per_s": round(T / seconds)}


def _random(shape: Shape, device: str):
    """Weights as a checkpoint has them, one at a time, made where they will be."""
    for key, size in shape.key_shapes().items():
        weight = torch.empty(size, dtype=torch.bfloat16, device=device).normal_(0, 0.02)  # a CPU would take seconds
        yield key, weight.cpu() if key == "emb.weight" else weight
