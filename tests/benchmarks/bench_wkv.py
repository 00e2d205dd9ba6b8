"""The C++ WKV-7 against PyTorch on this CPU, one T=512 H=12 N=64 sequence in float32.

    python tests/benchmarks/bench_wkv.py [--out results/wkv.json] [--threads 4] [--rounds 15]

Compared with it: op "torch" (the per-step loop that defines WKV-7), the same loop as it is usually written, taking
x[:, t] at every step (its backward pays for a whole zero tensor each time), and op "chunked". All take turns round
after round; a ratio is the median of the rounds' ratios, so that what else runs on the machine falls on all alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from machine import describe

from rwkv_nb.wkv import pick_op, wkv7
from rwkv_nb.wkv.selftest import outputs_and_grads, realistic_inputs, relative_error

B, T, H, N = 1, 512, 12, 64
BAR = 40.0  # forward and backward, against the per-step loop


def indexed_loop(r, w, k, v, a, b, state):
    """The definition as it is usually written."""
    decay, y = torch.exp(-torch.exp(w)), []
    for t in range(r.shape[1]):
        sa = state @ a[:, t, :, :, None]
        state = (state * decay[:, t, :, None, :] + sa * b[:, t, :, None, :]
                 + v[:, t, :, :, None] * k[:, t, :, None, :])
        y.append((state @ r[:, t, :, :, None])[..., 0])
    return torch.stack(y, 1), state


def ways() -> dict:
    ops = {f'op "{op}"': lambda *x, op=op: wkv7(*x, op=op) for op in ("cpu", "torch", "chunked")}
    return ops | {"the loop with x[:, t]": indexed_loop}


def seconds(work) -> float:
    """One call; a fast one is repeated for 50 ms, since the clock and the threads' wake-up are noise to it."""
    start, calls = time.perf_counter(), 0
    while not calls or time.perf_counter() - start < 0.05:
        work()
        calls += 1
    return (time.perf_counter() - start) / calls


def measure(rounds: int) -> dict:
    inputs = realistic_inputs(B, T, H, N)
    upstream = torch.randn(B, T, H, N), torch.randn(B, H, N, N)
    leaves = [x.requires_grad_() for x in realistic_inputs(B, T, H, N)]
    works = {}
    for name, way in ways().items():
        def forward(way=way):
            with torch.no_grad():
                way(*inputs)

        def both(way=way):
            torch.autograd.grad(way(*leaves), leaves, upstream)

        works[name] = {"forward": forward, "forward + backward": both}
    times = {name: {what: [] for what in parts} for name, parts in works.items()}
    for round_ in range(rounds + 1):
        for name, parts in works.items():
            for what, work in parts.items():
                took = seconds(work)
                if round_:  # the first round warms up
                    times[name][what].append(took)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "wkv.json")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    machine = describe()
    assert pick_op("cpu", "cpu") == "cpu"
    times = measure(chosen.rounds)
    fast = times.pop('op "cpu"')
    result = {"what": __doc__.splitlines()[0], "machine": machine, "rounds": chosen.rounds, "bar": BAR,
              "milliseconds": {'op "cpu"': {what: _ms(t) for what, t in fast.items()}}, 'ratio to op "cpu"': {},
              "error": _error()}
    for name, parts in times.items():
        result["milliseconds"][name] = {what: _ms(t) for what, t in parts.items()}
        result['ratio to op "cpu"'][name] = {
            what: round(statistics.median(x / y for x, y in zip(t, fast[what], strict=True)), 1)
            for what, t in parts.items()}
    chosen.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def _ms(times) -> float:
    return round(statistics.median(times) * 1e3, 2)


def _error() -> dict:
    """Largest relative error of each op's outputs and gradients against float64, on the measured shape."""
    inputs = realistic_inputs(B, T, H, N)
    upstream = torch.randn(B, T, H, N), torch.randn(B, H, N, N)
    reference = outputs_and_grads(wkv7, inputs, upstream, torch.float64, op="torch")
    errors = {}
    for op in ("cpu", "torch", "chunked"):
        out = outputs_and_grads(wkv7, inputs, upstream, torch.float32, op=op)
        errors[op] = float(f"{max(map(relative_error, out, reference)):.1e}")
    return errors


if __name__ == "__main__":
    main()
