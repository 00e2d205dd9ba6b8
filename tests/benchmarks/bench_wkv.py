"""The C++ WKV-7, -6 and -5 against PyTorch on this CPU, one T=512 H=12 N=64 sequence in float32.

    python tests/benchmarks/bench_wkv.py [--out results/wkv.json] [--threads 4] [--rounds 15] [--fla FOLDER]

Compared with it: op "torch" (the per-step loop that defines each), the same loop as it is usually written, taking
x[:, t] at every step (its backward pays for a whole zero tensor each time), op "chunked", and where it is installed,
or FOLDER holds fla/, the naive recurrence of flash-linear-attention. All take turns round after round; a ratio is the
median of the rounds' ratios, so that what else runs on the machine falls on all alike. glibc keeps freed memory, for
all alike, as it does in a training run.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from machine import describe

from rwkv_nb.train.shrink import keep_freed_memory
from rwkv_nb.wkv import WKV, pick_op
from rwkv_nb.wkv.selftest import outputs_and_grads, realistic_inputs, relative_error

B, T, H, N = 1, 512, 12, 64
BAR = 40.0  # forward and backward, against the per-step loops


def loop_7(r, w, k, v, a, b, state):
    """The definition as it is usually written."""
    decay, y = torch.exp(-torch.exp(w)), []
    for t in range(r.shape[1]):
        sa = state @ a[:, t, :, :, None]
        state = (state * decay[:, t, :, None, :] + sa * b[:, t, :, None, :]
                 + v[:, t, :, :, None] * k[:, t, :, None, :])
        y.append((state @ r[:, t, :, :, None])[..., 0])
    return torch.stack(y, 1), state


def loop_6(r, w, k, v, u, state):
    decay, y = torch.exp(-torch.exp(w)).expand(r.shape), []
    for t in range(r.shape[1]):
        vk = v[:, t, :, :, None] * k[:, t, :, None, :]
        y.append(((state + u[:, None] * vk) @ r[:, t, :, :, None])[..., 0])
        state = state * decay[:, t, :, None, :] + vk
    return torch.stack(y, 1), state


def ways(version, fla) -> dict:
    ops = {f'op "{op}"': lambda *x, op=op: WKV[version](*x, op=op) for op in ("cpu", "torch", "chunked")}
    theirs = {"fla's naive form": fla[version]} if fla else {}
    return ops | {"the loop with x[:, t]": loop_7 if version == 7 else loop_6} | theirs


def seconds(work) -> float:
    """One call; a fast one is repeated for 50 ms, since the clock and the threads' wake-up are noise to it."""
    start, calls = time.perf_counter(), 0
    while not calls or time.perf_counter() - start < 0.05:
        work()
        calls += 1
    return (time.perf_counter() - start) / calls


def measure(version, forms: dict, rounds: int) -> dict:
    """{way: {"forward": seconds a round, "forward + backward": the same}}."""
    inputs = realistic_inputs(B, T, H, N, version=version)
    upstream = torch.randn(B, T, H, N), torch.randn(B, H, N, N)
    leaves = [x.clone().requires_grad_() for x in inputs]
    works = {}
    for name, way in forms.items():
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


def summary(version, fla, rounds) -> dict:
    forms = ways(version, fla)
    times = measure(version, forms, rounds)
    fast = times['op "cpu"']
    ratios = {name: {what: round(statistics.median(x / y for x, y in zip(t, fast[what], strict=True)), 1)
                     for what, t in parts.items()} for name, parts in times.items() if parts is not fast}
    return {"milliseconds": {name: {what: round(statistics.median(t) * 1e3, 2) for what, t in parts.items()}
                             for name, parts in times.items()},
            'ratio to op "cpu"': ratios, "error": errors(version, forms)}


def errors(version, forms) -> dict:
    """Largest relative error of each way's outputs and gradients against float64, on the measured shape."""
    inputs = realistic_inputs(B, T, H, N, version=version)
    upstream = torch.randn(B, T, H, N), torch.randn(B, H, N, N)
    reference = outputs_and_grads(WKV[version], inputs, upstream, torch.float64, op="torch")
    found = {}
    for name, way in forms.items():
        out = outputs_and_grads(way, inputs, upstream, torch.float32)
        found[name] = float(f"{max(map(relative_error, out, reference)):.1e}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "wkv.json")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--fla", type=Path, help="a folder that holds fla/")
    chosen = parser.parse_args()
    sys.path.append(str(Path(__file__).parents[1] / "wkv"))
    import fla_naive
    keep_freed_memory()
    torch.set_num_threads(chosen.threads)
    machine, fla = describe(), fla_naive.load(chosen.fla)
    assert pick_op("cpu", "cpu") == "cpu"
    result = {"what": __doc__.splitlines()[0], "machine": machine, "rounds": chosen.rounds, "bar": BAR}
    result |= {f"WKV-{version}": summary(version, fla, chosen.rounds) for version in WKV}
    chosen.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
