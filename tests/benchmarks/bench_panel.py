"""Training with the panel open in a browser against training without it, on two cores.

    python tests/benchmarks/bench_panel.py [--rounds 6] [--steps 250] [--cores 2]

JupyterLab, its kernel and Chromium share the cores. One notebook trains the quickstart again and again; in every
other session a panel is on the page. Seconds per step are taken between two moments of a session, so loading and
saving are left out; the figure is the median over the rounds of the ratio within a round. Writes results/panel.json.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "browser"))
BAR = 1.05
HOLDER = """
import asyncio, json, time
from pathlib import Path
import ipywidgets
from rwkv_nb.config import Settings, replace
from rwkv_nb.runs import Run
from rwkv_nb.train.session import TrainSession
from rwkv_nb.widgets.panel import TrainPanel

page = ipywidgets.VBox()
page
"""
MEASURE = """
settings = replace(Settings(), load_model="data_samples/tiny_base.pth", data_file="data_samples/quickstart_train.jsonl",
                   ctx_len=160, micro_bsz=16, lr_init=1e-3, epoch_count=1, epoch_steps=STEPS, merge=0, tokenizer="byte")
seconds = {"with": [], "without": []}

async def seconds_per_step(name):
    session = TrainSession(Run(f"runs/{name}"), settings, start="fresh")
    page.children = [TrainPanel(session)] if name == "with" else []
    session.start()
    marks = []
    for step in (STEPS // 10, STEPS - 2):
        while session.snapshot().step < step:
            await asyncio.sleep(0.01)
        marks.append((session.snapshot().step, time.perf_counter()))
    await session.wait()
    return (marks[1][1] - marks[0][1]) / (marks[1][0] - marks[0][0])

for i in range(ROUNDS + 1):
    for name in ("with", "without")[::1 if i % 2 else -1]:
        seconds[name].append(await seconds_per_step(name))
    Path("seconds.json").write_text(json.dumps(seconds))
Path("done").touch()
"""


def measure(folder: Path, rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds per step, a list with and a list without the panel; the first round warms up and is left out."""
    from lab import browser_page, jupyter_lab, run_all

    numbers = MEASURE.replace("ROUNDS", str(rounds)).replace("STEPS", str(steps))
    cells = [nbformat.v4.new_code_cell(text.strip()) for text in (HOLDER, numbers)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), folder / "bench.ipynb")
    (folder / "data_samples").symlink_to(ROOT / "data_samples")
    file = folder / "seconds.json"
    with jupyter_lab(folder) as address, browser_page() as page:
        run_all(page, address.format(path="bench.ipynb"))
        page.get_by_text("tokens/s").first.wait_for()          # the panel is on the page
        while not (folder / "done").exists():
            if page.locator('[data-mime-type="application/vnd.jupyter.stderr"]').count():
                raise SystemExit(page.locator('[data-mime-type="application/vnd.jupyter.stderr"]').first.inner_text())
            time.sleep(1)
    return {name: values[1:] for name, values in json.loads(file.read_text()).items()}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=6)
    options.add_argument("--steps", type=int, default=250)
    options.add_argument("--cores", type=int, default=2)
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "panel.json")
    chosen = options.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:chosen.cores])   # what is started below inherits it

    from machine import describe

    with tempfile.TemporaryDirectory() as name:
        seconds = measure(Path(name), chosen.rounds, chosen.steps)
    ratios = [a / b for a, b in zip(seconds["with"], seconds["without"], strict=True)]
    result = {
        "what": "seconds per step of the quickstart's training, panel open in Chromium ÷ no panel",
        "ratio": round(statistics.median(ratios), 3), "bar": BAR, "ratios": [round(r, 3) for r in ratios],
        "milliseconds": {name: round(1000 * statistics.median(values), 2) for name, values in seconds.items()},
        "cores": chosen.cores, "rounds": chosen.rounds, "steps": chosen.steps, "machine": describe()}
    chosen.out.parent.mkdir(exist_ok=True)
    chosen.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(f"panel open ÷ without: {result['ratio']} (bar {BAR}); {result['milliseconds']} ms a step → {chosen.out}")


if __name__ == "__main__":
    main()
