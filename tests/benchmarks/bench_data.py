"""jsonl → binidx: ours against json2binidx_tool on the same text in the same run; and our memory as the text grows.

    python tests/benchmarks/bench_data.py [--tool FOLDER] [--tool-python PYTHON] [--megabytes 100] [--rounds 3]

--tool is a copy of json2binidx_tool (its folder has tools/preprocess_data.py), --tool-python a Python that has what it
needs; without it only ours is measured. The text is the quickstart's, English and Chinese, in a random order, over and
over. Each program runs as a process of its own, one after the other in each round, with its start-up in the time; the
figure is the median over the rounds. The tool is run as its README says, and with a process on each core. The tokens
of both must be the same. Writes results/data.json.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import describe

from rwkv_nb.data.binidx import BinIdx

ROOT = Path(__file__).parents[2]
BAR = 10.0
OURS = """
import resource, sys
from rwkv_nb.data.convert import jsonl_to_binidx
from rwkv_nb.tokenizer import WorldTokenizer
jsonl_to_binidx(sys.argv[1], sys.argv[2], WorldTokenizer())
print(max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
"""


def make_text(path: Path, megabytes: float) -> None:
    """A jsonl file of about this size."""
    lines = [line for name in ("quickstart_train", "general_heldout") for line in
             (ROOT / "data_samples" / f"{name}.jsonl").read_bytes().splitlines(keepends=True)]
    rng = random.Random(0)
    with open(path, "wb") as file:
        while file.tell() < megabytes * 1e6:
            rng.shuffle(lines)
            file.writelines(lines)


def timed(command: list, folder: Path) -> tuple[float, str]:
    """(wall seconds, what it printed) of a process."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    began = time.perf_counter()
    done = subprocess.run([str(part) for part in command], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.perf_counter() - began, done.stdout


def tool_command(tool: Path, python: str, text: Path, out: Path, workers: int) -> list:
    return [python, tool / "tools" / "preprocess_data.py", "--input", text, "--output-prefix", out, "--vocab",
            tool / "rwkv_vocab_v20230424.txt", "--dataset-impl", "mmap", "--tokenizer-type", "RWKVTokenizer",
            "--append-eod", "--workers", workers]


def measure(folder: Path, arguments) -> dict:
    text, cores = folder / "text.jsonl", len(os.sched_getaffinity(0))
    make_text(text, arguments.megabytes / 4)
    peaks = [int(timed([sys.executable, "-c", OURS, text, folder / "ours"], folder)[1])]
    make_text(text, arguments.megabytes)
    seconds = {"ours": [], "tool": [], "tool_all_cores": []}
    for _ in range(arguments.rounds):
        wall, printed = timed([sys.executable, "-c", OURS, text, folder / "ours"], folder)
        seconds["ours"].append(wall)
        peaks.append(int(printed))
        for name, workers in (("tool", 1), ("tool_all_cores", cores)) if arguments.tool else ():
            command = tool_command(Path(arguments.tool).resolve(), arguments.tool_python, text, folder / name, workers)
            seconds[name].append(timed(command, folder)[0])
    megabytes, ours = text.stat().st_size / 1e6, BinIdx(folder / "ours")
    result = {"machine": describe(), "megabytes": round(megabytes, 1), "documents": len(ours),
              "tokens": int(np.sum(ours.sizes, dtype=np.int64)),
              "peak_mb_of_one_process": [round(peak / 1024) for peak in (peaks[0], max(peaks[1:]))],
              "mb_per_s": {name: round(megabytes / statistics.median(walls), 2) for name, walls in seconds.items()
                           if walls}}
    if arguments.tool:
        theirs = BinIdx(folder / "tool_text_document")
        result["same_tokens"] = len(ours) == len(theirs) and all(map(np.array_equal, ours, theirs))
        result["times_faster"] = {
            name: round(statistics.median(b / a for a, b in zip(seconds["ours"], walls, strict=True)), 1)
            for name, walls in seconds.items() if name != "ours"}
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tool")
    parser.add_argument("--tool-python", default=sys.executable)
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", default=ROOT / "tests" / "benchmarks" / "results" / "data.json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), arguments)
    print(json.dumps(result, indent=1))
    if not arguments.tool:
        print("no --tool: nothing to compare with, nothing written")
        return 0
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if result["same_tokens"] and result["times_faster"]["tool"] >= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
