"""What only a GPU can show, in parts of a few minutes each, on a machine with nothing but torch, ninja and nvcc.

    python tests/gpu/gpu_check.py kernels|memory|train|tune [--out FOLDER] [--peer FILE.py] [--only WORDS]

What must be there: torch >= 2.11 for CUDA, einops, safetensors, ninja, a C++ compiler, for `memory` numpy, and nvcc of
torch's major CUDA version (without it op "cuda" is left out). More is measured with triton, fla (op "fla") and
bitsandbytes (int8 and nf4 in `memory`). Nothing is downloaded, and nothing of the notebooks is imported.

A first session of half an hour, the most important first: 8, 8, 5 minutes, then which constants of the kernels are
best on this GPU, and the rest (triton, chunked). Each line can be cut and repeated, and ends with a table:

    python tests/gpu/gpu_check.py kernels --only "ops|cuda|PEFT" --peer tests/gpu/peer_rwkv_peft.py
    python tests/gpu/gpu_check.py memory
    python tests/gpu/gpu_check.py train
    python tests/gpu/gpu_check.py tune
    python tests/gpu/gpu_check.py kernels

A part is a module part_NAME.py beside this file with

    cases(options)   every case in order: (its name, a function without arguments that returns a dict for JSON)
    table(results)   a short table of {name: dict} for the end

Each case that ends is appended to FOLDER/NAME.jsonl with the machine it ran on. A run that was cut goes on where it
was; a case that raised is tried again. Where a case costs the GPU (an illegal address), the rest is run in a fresh
process. The exit code is 1 if a case raised or says {"ok": false}.
"""

import argparse
import contextlib
import importlib
import json
import os
import platform
import re
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]


def machine(device: str) -> dict:
    """What decides the figures: device, torch, CUDA, driver's version."""
    if device == "cpu":
        return {"device": "cpu", "torch": torch.__version__}
    card = torch.cuda.get_device_properties(0)
    return {"device": card.name, "memory_gb": round(card.total_memory / 1e9), "sm": f"{card.major}{card.minor}",
            "torch": torch.__version__, "cuda": torch.version.cuda, "driver": _driver(),
            "python": platform.python_version()}


def _driver() -> str:
    with contextlib.suppress(OSError):  # not every container has it
        said = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                              capture_output=True, text=True)
        return said.stdout.partition("\n")[0].strip()
    return ""


def earlier(path: Path, here: dict) -> dict:
    """The results of an earlier run on the same machine: {case: result}. Half a line, of a run that was cut, goes."""
    if not path.exists():
        return {}
    whole = "".join(line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n"))
    path.write_text(whole)
    lines = map(json.loads, whole.splitlines())
    return {line["case"]: line["result"] for line in lines if line["machine"] == here and "error" not in line["result"]}


def run(part, path: Path, options) -> dict:
    here = machine(options.device)
    results = earlier(path, here) | {name: {"error": "it cost the GPU"} for name in options.but}
    for name, work in part.cases(options):
        if name in results or not re.search(options.only, name):
            continue
        start = time.monotonic()
        try:
            result = work()
        except Exception as error:  # one case must not cost the others
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"}
        results[name] = result
        with open(path, "a") as file:
            file.write(json.dumps({"case": name, "machine": here, "result": result}) + "\n")
        print(f"{name}: {json.dumps(result)}  ({time.monotonic() - start:.1f} s)", flush=True)
        if "error" in result and options.device == "cuda" and _gpu_is_lost():
            os.execv(sys.executable, [sys.executable, *sys.argv, "--but", name])
    return results


def _gpu_is_lost() -> bool:
    """Whether CUDA has failed in a way after which this process gets nothing else from it."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=sorted(p.stem.removeprefix("part_") for p in HERE.glob("part_*.py")))
    parser.add_argument("--out", type=Path, default=HERE.parent / "benchmarks" / "results" / "gpu")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: to try this script, small")
    parser.add_argument("--only", default="", help="the cases whose name fits this regular expression")
    parser.add_argument("--but", action="append", default=[], help="a case to leave out, as one that fails")
    parser.add_argument("--peer", type=Path, help="a Python file with KERNELS = {name: (version, function)}; a "
                        "function takes what wkv7 and its like take, but the state, and returns y")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no GPU: nothing was measured", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    part = importlib.import_module(f"part_{options.part}")
    results = run(part, options.out / f"{options.part}.jsonl", options)
    bad = [name for name, result in results.items() if "error" in result or result.get("ok") is False]
    print(f"\n{json.dumps(machine(options.device))}\n\n{part.table(results)}\n")
    print(f"{len(results) - len(bad)} of {len(results)} cases are good" + "".join(f"\n  not: {name}" for name in bad))
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
