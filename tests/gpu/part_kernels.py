"""Every op of every version against float64, under streams, graphs and torch.compile, and timed; and the kernels around
them, a whole model with against without."""

import functools
import importlib.util
import itertools
import time

import torch

from rwkv_nb.config import LoraSettings
from rwkv_nb.errors import KernelError
from rwkv_nb.lora.layers import adapter_parameters, attach
from rwkv_nb.loss import head_loss
from rwkv_nb.model import RWKV, Shape, init_weights
from rwkv_nb.wkv import WKV, kernels, pick_op
from rwkv_nb.wkv.selftest import outputs_and_grads, realistic_inputs

NAMES = {7: ("dr", "dw", "dk", "dv", "da", "db", "dstate"), 6: ("dr", "dw", "dk", "dv", "du", "dstate")}
LENGTHS = (1, 15, 16, 17, 64, 257)
SHAPES = {"B8 T4096 H64": (8, 4096, 64), "B1 T1024 H32": (1, 1024, 32)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BARS = {"cuda": 2e-3, "triton": 2e-3, "chunked": 4e-3, "fla": 4e-3, "cpu": 4e-3}  # of 16 bits, rounding included


def cases(options):
    """First what a run that is cut should have shown: our own kernels, and the peers' times beside theirs."""
    gpu = options.device == "cuda"
    ops = ("cuda", "triton", "chunked", "fla") if gpu else ("cpu",)
    yield "ops", lambda: {op: _why_not(op, options.device) for op in ops}
    for op in (op for op in ops if not _why_not(op, options.device)):
        for version, dtype in itertools.product(WKV, DTYPES):
            if not (op == "fla" and version == 7 and dtype == torch.float32):
                work = functools.partial(_right, version, op, dtype, options.device, LENGTHS if gpu else (1, 17))
                yield f"right: WKV-{version} {op} {str(dtype)[6:]}", work
        for version in WKV if op in ("cuda", "cpu") else ():
            yield f"around: WKV-{version} {op}", functools.partial(_around, version, op, options.device)
        for version in WKV:
            yield from _times(version, op, options)
        for version in WKV if op in ("cuda", "triton") else ():
            yield f"long: WKV-{version} {op}", functools.partial(_right, version, op, torch.float32, "cuda", (4096,))
            yield f"graph: WKV-{version} {op}", functools.partial(_graph, version, op)
            yield f"compile: WKV-{version} {op}", functools.partial(_compiled, version, op)
            yield f"texts: WKV-{version} {op}", functools.partial(_texts, version, op)


def _times(version, op, options):
    peers = _peers(version, options.peer) if op in ("cuda", "cpu") else {}
    ways = {op: functools.partial(WKV[version], op=op)} | peers
    shapes = SHAPES if options.device == "cuda" else {"B1 T64 H2": (1, 64, 2)}
    for (shape, size), (name, way) in itertools.product(shapes.items(), ways.items()):
        if name != "chunked" or size[0] == 1:  # its float64 sums would not fit
            yield f"time: WKV-{version} {name} {shape}", functools.partial(_time, version, way, size, options.device)


def table(results) -> str:
    lines = ["| | largest error | bar |", "|---|---|---|"]
    for name, result in results.items():
        if "largest" in result:
            lines.append(f"| {name} | {result['largest']:.1e} at {result['where']} | {result['bar']:.0e} |")
    lines += ["", "| time, bf16 | forward ms | forward + backward ms | kernels alone ms | peak GB |", "|---" * 5 + "|"]
    lines += [f"| {name[6:]} | {r['forward_ms']} | {r['both_ms']} | {r['kernels_ms']} | {r['peak_gb']} |"
              for name, r in results.items() if name.startswith("time") and "both_ms" in r]
    return "\n".join(lines)


@functools.cache
def _why_not(op, device) -> str:
    try:
        pick_op(op, device)
    except KernelError as error:
        return str(error)
    return ""


def _right(version, op, dtype, device, lengths) -> dict:
    """Forward and every gradient, with and without a state, few heads and many; the largest relative error."""
    found = []
    shapes = [(2, 3, T) for T in lengths] + ([(8, 64, 33)] if device == "cuda" and len(lengths) > 1 else [])
    for (B, H, T), with_state in itertools.product(shapes, (True, False)):
        wide = not with_state and (op, version) != ("fla", 7)   # it loses dw's digits; RWKV-7 has no such decays
        *inputs, state = realistic_inputs(B, T, H, 64, version=version, wide=wide, device=device)
        inputs = [x.to(dtype) for x in inputs] + [state if with_state else None]
        upstream = torch.randn(B, T, H, 64, device=device).to(dtype), torch.randn(B, H, 64, 64, device=device)
        reference = outputs_and_grads(WKV[version], inputs, upstream, torch.float64, op="torch")
        out = outputs_and_grads(WKV[version], inputs, upstream, dtype, op=op)
        names = ("y", "last", *NAMES[max(version, 6)])
        for name, x, ref in zip(names, out, reference, strict=False):
            size = max(ref.norm().item(), ref.numel() ** 0.5 if ref.numel() < 1000 else 1e-30)
            found.append(((x.double() - ref).norm().item() / size, f"{name} T{T} B{B} H{H}"))
    bar = BARS[op] if dtype != torch.float32 else 1e-4 if op == "fla" else 1e-5
    largest = max(found, key=lambda pair: float("inf") if pair[0] != pair[0] else pair[0])
    return {"largest": largest[0], "where": largest[1], "bar": bar, "ok": largest[0] <= bar}


def _leaves(version, B, T, H, device, dtype=torch.bfloat16):
    return [x.to(dtype).requires_grad_() for x in realistic_inputs(B, T, H, 64, version=version, device=device)[:-1]]


def _both(way, leaves, dy):
    y = way(*leaves)
    y = y[0] if isinstance(y, tuple) else y
    return y, *torch.autograd.grad(y, leaves, dy)


def _graph(version, op) -> dict:
    """Forward and backward captured into a CUDA graph, which replays on other numbers."""
    way = functools.partial(WKV[version], op=op)
    leaves, fresh = _leaves(version, 1, 100, 4, "cuda"), _leaves(version, 1, 100, 4, "cuda")
    dy = torch.randn(1, 100, 4, 64, device="cuda", dtype=torch.bfloat16)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # a capture is not on the default stream, nor is the warm-up before it
        _both(way, leaves, dy)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = _both(way, leaves, dy)
    with torch.no_grad():
        for x, new in zip(leaves, fresh, strict=True):
            x.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    return {"ok": all(torch.equal(x, y) for x, y in zip(out, _both(way, fresh, dy), strict=True))}


def _compiled(version, op) -> dict:
    leaves = _leaves(version, 1, 100, 4, "cuda")
    dy = torch.randn(1, 100, 4, 64, device="cuda", dtype=torch.bfloat16)
    way = functools.partial(WKV[version], op=op)
    whole = torch.compile(lambda *x: way(*x)[0], fullgraph=True)
    expected = _both(way, leaves, dy)
    return {"ok": all(torch.allclose(x, y, atol=1e-2) for x, y in zip(_both(whole, leaves, dy), expected, strict=True))}


def _texts(version, op) -> dict:
    """Rows of several texts, as dataload "pack" makes them, against each text alone."""
    leaves, starts = _leaves(version, 2, 500, 4, "cuda", torch.float32), torch.rand(2, 500) < 0.02
    starts[:, 0] = True
    dy = torch.randn(2, 500, 4, 64, device="cuda")
    found, expected = (_both(functools.partial(WKV[version], state=starts, op=name), leaves, dy)
                       for name in (op, "torch"))
    largest = max(((x - y).norm() / y.norm()).item() for x, y in zip(found, expected, strict=True))
    return {"largest": largest, "where": f"{int(starts.sum())} texts", "bar": 2e-5, "ok": largest <= 2e-5}


def _around(version, op, device) -> dict:
    """The loss of a LoRA model in float32 and all its gradients, with the GPU's kernels around WKV and for the loss,
    against the same without."""
    sizes = (32, 32, 32, 32, 1024) if version == 7 else (32, 0, 0, 0, 896)
    shape = Shape(2, 256, 1024, *sizes, version={7: "x070", 6: "x060", 5: "x052"}[version], rank_mix=32)
    model = init_weights(RWKV(shape)).to(device)
    attach(model, LoraSettings(r=8), seed=0)
    parameters, tokens = list(adapter_parameters(model)), torch.randint(1, 1024, (3, 101), device=device)
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.02)
    mask = torch.rand(3, 100) < 0.7

    def outcome():
        hidden, _ = model.hidden(tokens[:, :-1], op=op, keep_state=False)
        loss, _ = head_loss(hidden, model.head, tokens[:, 1:], mask, 200)
        return loss, *torch.autograd.grad(loss, parameters)

    found, loaded = outcome(), set(kernels._loaded)
    kernels._loaded.clear()
    try:
        expected = outcome()
    finally:
        kernels._loaded.update(loaded)
    largest = max(((x - y).norm() / y.norm()).item() for x, y in zip(found, expected, strict=True))
    return {"largest": largest, "where": f"{len(found)} results", "bar": 1e-4,
            "ok": largest <= 1e-4 and (device == "cpu" or "cuda" in loaded)}


def _peers(version, file) -> dict:
    if not file:
        return {}
    spec = importlib.util.spec_from_file_location("peer", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {name: way for name, (its_version, way) in module.KERNELS.items() if its_version == version}


def _time(version, way, size, device) -> dict:
    """Median times, after a warm-up, of as many rounds as fit into two seconds each; peak memory of both; and on a GPU
    what its kernels alone take, without what a small call costs the CPU."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    B, T, H = size
    leaves = _leaves(version, B, T, H, device)
    dy = torch.randn(B, T, H, 64, device=device, dtype=torch.bfloat16)

    def forward():
        with torch.no_grad():
            way(*leaves)

    def both():
        _both(way, leaves, dy)
    result = {"forward_ms": _median(forward, device), "both_ms": _median(both, device)}
    if device == "cpu":
        return result | {"kernels_ms": None, "peak_gb": 0}
    return result | {"kernels_ms": _kernels(both), "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)}


def _kernels(work, rounds=5) -> float:
    """Milliseconds that the GPU's kernels of one round take together."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(rounds):
            work()
        torch.cuda.synchronize()
    return round(sum(event.self_device_time_total for event in profile.key_averages()) / rounds / 1e3, 3)


def _median(work, device) -> float:
    """Milliseconds. By the wall clock around a wait for the GPU, which adds some 10 µs."""
    def once():
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start
    first = [once(), once()][-1]
    took = sorted(once() for _ in range(max(3, min(50, int((2 if device == "cuda" else 0.1) / first)))))
    return round(took[len(took) // 2] * 1e3, 3)
