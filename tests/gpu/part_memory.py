"""Every cell of the tutorial's memory table: a model of its true shape with random weights, full steps with optimizer.

The peak of torch's allocator with 0.5 GB for CUDA is beside the tutorial's figure, the computed floor and
rwkv_nb.memory's own prediction; the whole device's memory and tokens a second are there too. Once all cells are there a
case "bars" says whether their means are as low as asked for.

Then what no CPU can show of fitting a card: whole runs under a limit that torch's allocator keeps to. The models are
made here.
"""

import contextlib
import functools
import importlib.util
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from rwkv_nb.config import PRESETS, Settings, replace
from rwkv_nb.errors import SettingsError
from rwkv_nb.fit import SPARE, largest_micro_bsz
from rwkv_nb.lora.layers import adapter_parameters, attach, set_dropout_step
from rwkv_nb.loss import head_loss
from rwkv_nb.memory import CONTEXT, QUANTS, TUTORIAL, TUTORIAL_SETTINGS, LiveBytes, estimate
from rwkv_nb.model import PUBLISHED, PUBLISHED_OLDER, RWKV, Shape, init_weights, save_weights
from rwkv_nb.model.checkpoint import assemble
from rwkv_nb.quant import Held, bitsandbytes, frozen_product
from rwkv_nb.runs import Run
from rwkv_nb.train.loop import Trainer
from rwkv_nb.train.optimizer import make_optimizer
from rwkv_nb.train.session import TrainSession
from rwkv_nb.train.shrink import free_memory, if_memory_lasts
from rwkv_nb.train.snapshot import Snapshot
from rwkv_nb.wkv import pick_op

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from predict_memory import BARS, FLOOR  # noqa: E402

TINY = Shape(4, 128, 512, 16, 16, 16, 16, 512)
RUN = {"cpu": (Shape(2, 64, 257, 16, 16, 16, 16, 128), 32), "cuda": (Shape(8, 768, 257, 32, 32, 32, 32, 3072), 512)}
KINDS = {"balanced": "safe", "small": "lean"}   # the floor that each preset is measured by
PACKED = importlib.util.find_spec("bitsandbytes") is not None   # it is not on every machine
STEPS, SLOWEST = 6, 2 / 3                       # timed steps; the least that `small` may have of the speed of `fast`


def cases(options):
    device, names = options.device, [f"{name} {preset} {quant}" for name, quant, preset in
                                     itertools.product(TUTORIAL, QUANTS, PRESETS)]
    if device == "cpu":
        yield "tiny small nf4", functools.partial(_cell, TINY, "small", "nf4", None, "cpu")
    else:
        shapes = PUBLISHED | PUBLISHED_OLDER
        for name, (i, quant), preset in itertools.product(TUTORIAL, enumerate(QUANTS), PRESETS):
            told = TUTORIAL[name][i] if preset in BARS else None
            floor = FLOOR[name][preset == "small"][i] if preset in BARS else None
            yield f"{name} {preset} {quant}", functools.partial(_cell, shapes[name], preset, quant, told, "cuda", floor)
        found = _recorded(options.out / "memory.jsonl")
        if all(name in found for name in names):
            yield "bars", functools.partial(bars, found)
    yield "a run out of memory goes on smaller", functools.partial(_goes_on_smaller, device)
    yield "the largest micro_bsz that fits runs", functools.partial(_largest_runs, device)
    for kind in ("int8", "nf4") if PACKED else ("int8",):
        yield f"{kind} against its dense copy", functools.partial(_held_product, kind, device)
    yield "adam_state: each learns the same", functools.partial(_adam_states, device)
    yield "grad_cp: each has the same gradient, in less memory", functools.partial(_checkpointing, device)


def _recorded(path: Path) -> dict:
    """The cells that are measured so far, the last of each name. One that ran on another GPU is measured by the same
    bars."""
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return {line["case"]: line["result"] for line in lines if "error" not in line["result"]}


def bars(results: dict) -> dict:
    """The geometric mean of each preset's cells ÷ the tutorial's, the least speed of `small` ÷ `fast`, and whether
    they are as asked for."""
    means, speeds = {}, {}
    for preset in BARS:
        ratios = [r["with_context_gb"] / r["tutorial_gb"] for name, r in results.items()
                  if f" {preset} " in name and r.get("tutorial_gb")]
        means |= {preset: round(statistics.geometric_mean(ratios), 3)} if ratios else {}
    for name, r in results.items():
        fast = results.get(name.replace(" small ", " fast "), {})
        if " small " in name and "tokens_per_s" in r and "tokens_per_s" in fast:
            speeds[name] = r["tokens_per_s"] / fast["tokens_per_s"]
    slowest = round(min(speeds.values()), 2) if speeds else None
    return {"means": means, "slowest": slowest, "cells": len(results),
            "ok": all(means[preset] <= bar for preset, bar in BARS.items() if preset in means)
            and (slowest is None or slowest >= round(SLOWEST, 2))}


def table(results) -> str:
    columns = ("peak_gb", "with_context_gb", "predicted_gb", "tutorial_gb", "floor_gb", "reserved_gb", "context_gb",
               "device_gb", "tokens_per_s")
    rows = [f"| {name} | {' | '.join(str(r.get(c, '–')) for c in columns)} |" for name, r in results.items()
            if "peak_gb" in r]
    lines = ["| cell | peak GB | + context | predicted | tutorial | floor | reserved | context | whole device | "
             "tokens/s |", "|---" * 10 + "|", *rows]
    now = bars({name: r for name, r in results.items() if "peak_gb" in r})
    lines += [f"{preset}: geometric mean {mean}, asked for <= {BARS[preset]}" for preset, mean in now["means"].items()]
    if now["slowest"]:
        lines.append(f"small ÷ fast, tokens/s: {now['slowest']} at the least, asked for >= {SLOWEST:.2f}")
    return "\n".join(lines)


def _cell(shape: Shape, preset: str, quant: str, tutorial: float | None, device: str, floor: float | None = None
          ) -> dict:
    settings = replace(TUTORIAL_SETTINGS, **PRESETS[preset], quant=quant, ctx_len=1024 if device == "cuda" else 64)
    try:
        if quant == "nf4" or settings.train.adam_state == "8bit":
            bitsandbytes()  # before a model is made for nothing
        result = if_memory_lasts(lambda: _measure(shape, settings, device))
    except SettingsError as error:
        return {"note": str(error).splitlines()[0]}
    free_memory()
    if result is None:
        return {"note": "more memory is needed than this GPU has"}
    whole, predicted = result["peak_gb"] + CONTEXT / 1e9, estimate(shape, settings, gpu=device == "cuda")
    near = abs(result["peak_gb"] * 1e9 / predicted.allocated - 1) <= 0.05
    return result | {"with_context_gb": round(whole, 3), "predicted_gb": round(predicted.total / 1e9, 3),
                     "tutorial_gb": tutorial, "floor_gb": floor, "within_5_percent": near,
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
        tokens = torch.randint(1, shape.vocab_size, (1, T + 1))
        inputs, targets = tokens[:, :-1].to("cpu" if t.emb_cpu else device), tokens[:, 1:].to(device)
        mask = torch.ones(1, T, dtype=torch.bool)

        def step() -> None:
            hidden, _ = model.hidden(inputs, op=op, grad_cp=t.grad_cp, keep_state=False)
            loss, ce = head_loss(hidden, model.head, targets, mask, T)
            loss.backward()
            float(ce), float(torch.nn.utils.clip_grad_norm_(parameters, 1.0))  # a run looks at both
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


# -- whole runs -------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def _run_of(device: str, **asked) -> Iterator[tuple[Shape, Settings]]:
    """The settings of a run on 64 documents of ctx_len tokens and a base that are there meanwhile; the base's shape."""
    shape, T = RUN[device]
    with tempfile.TemporaryDirectory() as name:
        base, data = Path(name, "base.pth"), Path(name, "data.jsonl")
        save_weights(base, init_weights(RWKV(shape), seed=0).state_dict())
        data.write_text("".join(json.dumps({"text": letter * T}) + "\n" for letter in "abcdefgh" * 8))
        yield shape, replace(Settings(), **{
            "load_model": str(base), "data_file": str(data), "proj_dir": name, "template": "plain", "tokenizer": "byte",
            "ctx_len": T, "accelerator": "gpu" if device == "cuda" else "cpu", "precision": "bf16", "micro_bsz": 16,
            "lora_dropout": 0.0, "lr_init": 2e-3, "warmup_steps": 0, "merge": 0, **asked})


def _train(settings: Settings, size: int, device: str) -> tuple[Snapshot, list[dict]]:
    """The end of a run whose allocator has `size` bytes (on a CPU there is no such limit), and what it was offered."""
    free_memory()
    whole = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else 0
    if whole:
        torch.cuda.set_per_process_memory_fraction(size / whole)
    try:
        end = TrainSession(Run(settings.train.proj_dir), settings, ask=False).start().join()
    finally:
        if whole:
            torch.cuda.set_per_process_memory_fraction(1.0)
    return end, [row["offer"] for row in end.rows if row.get("event") == "out of memory"]


def _goes_on_smaller(device: str) -> dict:
    """There is room for two thirds of a step: the run takes what is offered, and every step is as large as asked."""
    with _run_of(device) as (shape, settings):
        size = int(estimate(shape, settings, gpu=device == "cuda").allocated * 2 / 3)
        end, offers = _train(settings, size, device)
        rows = [row for row in end.rows if "loss" in row]
        peak = round(rows[-1]["peak_memory_mb"] / 1e3, 2)
        return {"gb": round(size / 1e9, 2), "offers": offers, "peak_gb_after": peak,
                "ok": end.status == "finished" and bool(offers) == (device == "cuda") and len(rows) == end.total_steps
                and len({row["tokens"] for row in rows}) == 1}


def _largest_runs(device: str) -> dict:
    """micro_bsz as the button of 03 sets it, for a card with so much memory: two steps without running out."""
    with _run_of(device, epoch_steps=2) as (shape, settings):
        size = 3 * 10**9 if device == "cuda" else 10**8
        B = largest_micro_bsz(shape, settings, int((size + CONTEXT) * (1 - SPARE)), gpu=device == "cuda")
        end, offers = _train(replace(settings, micro_bsz=B), size, device)
        return {"gb": size / 1e9, "micro_bsz": B, "offers": offers, "ok": end.status == "finished" and not offers}


def _held_product(kind: str, device: str) -> dict:
    """A held matrix's product and gradients, and those of its dense copy; the dense copy, and that of a CPU."""
    draw = torch.Generator().manual_seed(0)
    W, x, A, B, dy = (torch.randn(size, generator=draw).to(device, torch.bfloat16)
                      for size in ((192, 256), (64, 256), (8, 256), (192, 8), (64, 192)))
    held, there = Held(W, kind, dtype=torch.bfloat16), Held(W.cpu(), kind, dtype=torch.bfloat16)
    results = []
    for matrix in (held, held.dense()):
        leaves = [t.detach().clone().requires_grad_() for t in (x, A, B)]
        y = frozen_product(leaves[0], matrix, None, leaves[1], leaves[2], 2.0)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
    apart = max(_apart(a, b) for a, b in zip(*results, strict=True))
    devices_apart, lost = _apart(held.dense().cpu(), there.dense()), _apart(held.dense(), W)
    return {"from_dense": apart, "from_a_cpus": devices_apart, "from_the_matrix": lost,
            "ok": apart < 1e-3 and devices_apart < 0.01 and lost < (0.02 if kind == "int8" else 0.12)}


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return round(float((a.float() - b.float()).norm() / b.float().norm()), 6)


def _adam_states(device: str) -> dict:
    with _run_of(device) as (_, settings):
        losses = {state: [row["loss"] for row in _steps(settings, 8, adam_state=state)]
                  for state in (("fp32", "bf16", "8bit") if PACKED else ("fp32", "bf16"))}
    first, last = losses["fp32"][0], losses["fp32"][-1]
    return {"first": round(first, 4), **{state: round(each[-1], 4) for state, each in losses.items()},
            "ok": last < 0.9 * first and all(math.isclose(each[-1], last, rel_tol=0.05) for each in losses.values())}


def _checkpointing(device: str) -> dict:
    with _run_of(device) as (_, settings):
        rows = {way: _steps(settings, 3, grad_cp=way)[-1] for way in ("none", "selective", "block")}
    peaks, norm = [row["peak_memory_mb"] for row in rows.values()], rows["none"]["grad_norm"]
    same = all(math.isclose(row["grad_norm"], norm, rel_tol=0.01) for row in rows.values())
    return {"peak_gb_each": [round(peak / 1e3, 3) for peak in peaks],
            "ok": same and (device == "cpu" or peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 3)}


def _steps(settings: Settings, n: int, **changes) -> list[dict]:
    """The rows of a trainer's first steps."""
    trainer = Trainer(Run(settings.train.proj_dir), replace(settings, **changes))
    rows = [trainer.train_step(trainer.settings.train.live) for _ in range(n)]
    trainer.release()
    free_memory()
    return rows
