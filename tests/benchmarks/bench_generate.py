"""Tokens/s of generation and of reading a prompt on the CPU at the 0.1B shape, against the rwkv package in one run.

Rounds alternate between the two, so that what else the machine does falls on both; medians are written.
    python tests/benchmarks/bench_generate.py [--rounds 5] [--tokens 64] [--prompt 1024]
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from machine import describe

from rwkv_nb.generate import read, stream
from rwkv_nb.model import PUBLISHED, RWKV, init_weights, load_model, save_weights
from rwkv_nb.tokenizer import get_tokenizer

RESULTS = Path(__file__).parent / "results" / "generate.json"


class Package:
    """The rwkv package (its own engine, JIT on, as RWKV Runner sets it)."""

    def __init__(self, path, dtype):
        os.environ.update(RWKV_V7_ON="1", RWKV_JIT_ON="1", RWKV_CUDA_ON="0")
        from rwkv.model import RWKV as Engine

        self.model = Engine(model=str(path).removesuffix(".pth"), strategy=f"cpu {dtype}")

    def prompt(self, ids):
        self.model.forward(ids, None)

    def write(self, ids, n):
        logits, state = self.model.forward(ids, None)
        for _ in range(n):
            logits, state = self.model.forward([int(logits.argmax())], state)


class Ours:
    """load_model and generate.stream, greedy, as the chat uses them."""

    def __init__(self, path, dtype):
        self.model = load_model(path, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]).eval()
        self.tokenizer = get_tokenizer("world")

    def prompt(self, ids):
        hidden, _ = read(self.model, ids)
        with torch.inference_mode():
            self.model.head(hidden[:, -1])

    def write(self, ids, n):
        for _ in stream(self.model, self.tokenizer, ids, max_tokens=n + 1, stop=()):
            pass


def seconds(do, *args):
    start = time.perf_counter()
    do(*args)
    return time.perf_counter() - start


def measure(path, dtype, rounds, tokens, prompt):
    """Tokens/s: {"ours": {"write", "prompt"}, "package": …} for one dtype."""
    ids = torch.randint(1, 65530, (prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    both, taken = {"ours": Ours(path, dtype), "package": Package(path, dtype)}, {}
    for number in range(rounds + 1):                    # the first round warms up
        for name, engine in both.items():
            for what, args in (("write", (ids[:8], tokens)), ("prompt", (ids,))):
                t = seconds(getattr(engine, what), *args)
                if number:
                    taken.setdefault((name, what), []).append(t)
    n = {"write": tokens, "prompt": prompt}
    return {name: {what: n[what] / statistics.median(taken[name, what]) for what in n} for name in both}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rounds", 5), ("tokens", 64), ("prompt", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options, out = parser.parse_args(), {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pth"
        model = init_weights(RWKV(PUBLISHED["0.1B"]), 0)
        with torch.no_grad():       # token 0 would end the text: it is never the likeliest
            model.head.weight.normal_(std=0.02)
            model.head.weight[0] = 0
        save_weights(path, model.to(torch.bfloat16).state_dict())
        for dtype in ("fp32", "bf16"):
            out[dtype] = measure(path, dtype, options.rounds, options.tokens, options.prompt)
            ours, package = out[dtype]["ours"], out[dtype]["package"]
            for what in ours:
                print(f"{dtype} {what:7} ours {ours[what]:8.1f} tokens/s   package {package[what]:8.1f}   "
                      f"ratio {ours[what] / package[what]:.2f}", flush=True)
    RESULTS.write_text(json.dumps({"machine": describe(), **vars(options), "tokens_per_s": out}, indent=1) + "\n")


if __name__ == "__main__":
    main()
