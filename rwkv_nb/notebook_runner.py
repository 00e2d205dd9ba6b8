"""Runs the notebooks in order from a shell, with progress that can be seen, and stops where one fails.

`make run` and `rwkv-nb run` call it. A notebook runs as in JupyterLab: its own kernel, its own folder.
"""

import contextlib
import os
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

from .errors import RunError, SettingsError
from .runs import Run, write_text
from .words import duration_text

PRODUCTS = {
    "settings.json": "the settings",
    "train_log.txt": "a line an epoch",
    "metrics.jsonl": "a row a step",
    "adapter-*.safetensors": "the adapter",
    "rwkv-*.pth": "the model with its adapter merged, as it was saved in training",
    "merged.pth": "the merged model",
    "loss.png": "the loss curve",
    "score.json": "held-out score before and after",
    "score.txt": "the same as a table",
    "score.png": "the same as a picture",
    "notebooks/*.ipynb": "the notebooks as they ran",
}


def run_notebooks(folder: str | Path = "notebooks") -> int:
    """Execute the notebooks 0*.ipynb in the order of their names; returns the exit code, 0 or 1.

    They leave their results in runs/quickstart beside `folder`; what an earlier run left there is moved to a folder
    with its date. Raises RunError when there is no notebook, or when a training run is at work there right now.
    """
    folder = Path(folder).resolve()
    run = Run(folder.parent / "runs" / "quickstart")
    notebooks = sorted(folder.glob("0*.ipynb"))
    if not notebooks:
        raise RunError("there are no notebooks here", where=folder / "0*.ipynb",
                       fix="run it in the folder that was cloned, or name theirs with --notebooks")
    _set_aside(run)
    began = time.monotonic()
    for i, path in enumerate(notebooks, 1):
        print(f"[{i}/{len(notebooks)}] {path.stem}", flush=True)
        if not _execute(path, run):
            return 1
    print(f"\nAll {len(notebooks)} notebooks ran in {duration_text(time.monotonic() - began)}. What they made:")
    for pattern, meaning in PRODUCTS.items():
        for path in sorted(run.folder.glob(pattern)):
            print(f"  {os.path.relpath(path)}  ({meaning})")
    return 0


def _set_aside(run: Run) -> None:
    """Move an earlier run to a folder with its date, so that nothing is overwritten."""
    if not run.folder.exists():
        return
    with run.lock():
        made = [path for path in run.folder.iterdir() if path.name != ".lock"]
        if not made:
            return
        date = datetime.fromtimestamp(max(path.stat().st_mtime for path in made))
        kept = run.folder.rename(run.folder.with_name(f"{run.name}-{date:%Y-%m-%d-%H%M%S}"))
    print(f"An earlier run was here; it is kept in {os.path.relpath(kept)}\n", flush=True)


def _execute(path: Path, run: Run) -> bool:
    """Run one notebook in a kernel of this environment, save what ran, say how it went; True when every cell ran."""
    notebook, copy = nbformat.read(path, as_version=4), run.folder / "notebooks" / path.name
    client = NotebookClient(
        notebook, kernel_name="python3", timeout=None, store_widget_state=False, record_timing=False,
        shutdown_kernel="immediate", extra_arguments=["--log-level=CRITICAL"],
        resources={"metadata": {"path": str(path.parent)}})
    # Without folders to search, "python3" is this environment's Python, whatever kernels the user has installed.
    client.create_kernel_manager().kernel_spec_manager = KernelSpecManager(kernel_dirs=[])
    code = [(i, cell) for i, cell in enumerate(notebook.cells) if cell.cell_type == "code" and cell.source.strip()]
    line, began, place, cell = _Line(), time.monotonic(), "cells", None
    try:
        with client.setup_kernel():
            for number, (i, cell) in enumerate(code, 1):
                place = f"cell {number} of {len(code)}"
                with line.following(place, cell, run):
                    client.execute_cell(cell, i)
    except (CellExecutionError, RuntimeError, KeyboardInterrupt) as error:
        line.say("stopped" if isinstance(error, KeyboardInterrupt) else "failed", keep=True)
        source = cell.source if cell else "(its kernel was starting)"
        print(f"\n{path.name}, code {place}:\n\n{textwrap.indent(source, '    ')}\n\n"
              f"{_reason(error)}\n\nThe cells above it ran; they and the whole traceback are in "
              f"{os.path.relpath(copy)}\nTo try again cell by cell: make lab", file=sys.stderr, flush=True)
        return False
    finally:
        write_text(copy, nbformat.writes(notebook) + "\n")
    line.say(f"done in {duration_text(time.monotonic() - began)}", keep=True)
    return True


def _reason(error: BaseException) -> str:
    if isinstance(error, CellExecutionError):
        return f"{error.ename}: {error.evalue}"
    if isinstance(error, KeyboardInterrupt):
        return "stopped by Ctrl-C"
    return "its kernel died (out of memory is the usual reason)" if isinstance(error, DeadKernelError) else str(error)


class _Line:
    """A line on the terminal that says where a notebook is; in a file or pipe, a line every 15 seconds."""

    def __init__(self):
        self._told = time.monotonic()

    def say(self, text: str, *, keep: bool = False) -> None:
        """Put `text` in the place of what was said last; keep it: the next goes below."""
        if sys.stdout.isatty():
            text = text[:shutil.get_terminal_size().columns - 8]
            print(f"\r\x1b[K      {text}", end="\n" if keep else "", flush=True)
        elif keep or time.monotonic() - self._told > 15:
            self._told = time.monotonic()
            print(f"      {text}", flush=True)

    @contextlib.contextmanager
    def following(self, place: str, cell, run: Run) -> Iterator[None]:
        """Say once a second how far a cell is while it runs; what took long stays to be read."""
        began, over = time.monotonic(), threading.Event()

        def where() -> str:
            seconds = time.monotonic() - began
            return " · ".join(filter(None, (place, duration_text(seconds), _sign_of_life(cell, run, seconds))))

        def tick() -> None:
            while not over.wait(1):
                self.say(where())

        ticker = threading.Thread(target=tick, name="rwkv_nb run", daemon=True)
        ticker.start()
        try:
            yield
        finally:
            over.set()
            ticker.join()
        if time.monotonic() - began >= 5:
            self.say(where(), keep=True)


def _sign_of_life(cell, run: Run, seconds: float) -> str:
    """The latest of a cell that has run for so long: the training's step, or the last line it printed."""
    with contextlib.suppress(OSError, IndexError, SettingsError):
        if time.time() - run.metrics_file.stat().st_mtime < seconds:   # written while this cell runs
            row = [row for row in run.metrics() if "loss" in row][-1]
            return (f"training: step {row['step']} · epoch {row['epoch']:.2f} of {run.settings().train.epoch_count} · "
                    f"loss {row['loss']:.4f}")
    printed = "\n".join(output.text for output in cell.get("outputs", ()) if output.output_type == "stream")
    return printed.strip().rpartition("\n")[2]
