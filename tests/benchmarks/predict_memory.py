"""A prediction, not a measurement: the GPU memory of a LoRA step for every cell of the tutorial's table, counted
without a GPU by `rwkv_nb.memory`, beside the tutorial's own figure and the computed floor.

    python tests/benchmarks/predict_memory.py [--out results/memory_prediction.json]

r=64, lora_alpha=32, lora_dropout=0.05, ctx_len=1024, micro_bsz=1, bf16. GB = 1e9 bytes, with 0.5 for the CUDA context.
`make gpu-check PART=memory` measures the same cells where there is a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from rwkv_nb.model import PUBLISHED, PUBLISHED_OLDER
from rwkv_nb.widgets.memory import QUANTS, TUTORIAL, predict

BARS = {"balanced": 0.70, "small": 0.58}   # the geometric mean of ours ÷ the tutorial's that is asked for
FLOOR = {  # the least that a cell can take, computed from the shapes: bf16, int8, nf4 of "safe" and of "lean"
    "0.1B": ((1.05, 0.97, 0.93), (0.90, 0.82, 0.78)), "0.4B": ((1.87, 1.58, 1.45), (1.57, 1.27, 1.13)),
    "1.5B": ((4.49, 3.32, 2.79), (3.89, 2.71, 2.13)), "2.9B": ((7.99, 5.53, 4.42), (7.04, 4.58, 3.36)),
    "v6 1.6B": ((4.59, 3.31, 2.74), (4.01, 2.73, 2.09)), "v6 3B": ((8.21, 5.53, 4.34), (7.30, 4.62, 3.30)),
    "v6 7B": ((18.19, 11.33, 8.27), (16.74, 9.87, 6.49))}


def cell(name: str, preset: str, i: int) -> dict:
    """One cell of the table under one preset."""
    shape = (PUBLISHED | PUBLISHED_OLDER)[name]
    told = predict(shape, preset, QUANTS[i])
    gb = round(told.total / 1e9, 3)
    row = {"model": name, "quant": QUANTS[i], "preset": preset, "predicted_gb": gb, "tutorial_gb": TUTORIAL[name][i],
           "ratio": round(gb / TUTORIAL[name][i], 3),
           "floor_gb": dict(zip(("safe", "lean"), (kind[i] for kind in FLOOR[name]), strict=True)),
           "at_peak_mb": {part: round(size / 1e6, 1) for part, size in told.at_peak.items()}}
    print(f"{name:8} {preset:8} {QUANTS[i]:5} {gb:6.2f} GB, tutorial {TUTORIAL[name][i]:5.1f}", flush=True)
    return row


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "memory_prediction.json")
    out = options.parse_args().out
    cells = [cell(name, preset, i) for preset in BARS for name in TUTORIAL for i in range(3)]
    means = {p: round(statistics.geometric_mean(c["ratio"] for c in cells if c["preset"] == p), 3) for p in BARS}
    result = {"what": "PREDICTION, made without a GPU: " + " ".join(__doc__.split("\n\n")[0].split()),
              "settings": " ".join(__doc__.split("\n\n")[2].split()),
              "geometric_mean_of_ratios": {p: {"predicted": means[p], "bar": f"<= {BARS[p]}"} for p in BARS},
              "every_cell_below_the_tutorial": all(c["ratio"] < 1 for c in cells), "cells": cells}
    out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "cells"}, indent=1))


if __name__ == "__main__":
    main()
