"""Runs the notebooks in order from a shell, with progress that can be seen, and stops where one fails.

`make run` and `rwkv-nb run` call it. A notebook runs as in JupyterLab: its own kernel, its own folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import textwrap
import time
from datetime import datetime
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

from .errors import RunError
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


def run_notebooks(folder: str | Path = "notebooks", run_folder: str | Path | None = None,
                  pattern: str = "0*.ipynb") -> int:
    """Execute the notebooks that match `pattern`, in the order of their names; returns the exit code, 0 or 1.

    run_folder: where the notebooks leave their results; by default runs/quickstart beside `folder`. What an earlier
    run left there is moved to a folder with its date. Raises RunError when there is no notebook, or when a training
    run uses run_folder right now.
    """
    folder = Path(folder).resolve()
    run = Run(run_folder or folder.parent / "runs" / "quickstart")
    notebooks = sorted(folder.glob(pattern))
    if not notebooks:
        raise RunError("there are no notebooks here", where=folder / pattern,
                       fix="run it in the folder that was cloned, or name theirs with --notebooks")
    _set_aside(run)
    began = time.monotonic()
    for i, path in enumerate(notebooks, 1):
        print(f"[{i}/{len(notebooks)}] {path.stem}", flush=True)
        if not asyncio.run(_Execution(path, run).execute()):
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
        if not (made := [p for p in run.folder.iterdir() if p.name != ".lock"]):
            return
        date = datetime.fromtimestamp(max(p.stat().st_mtime for p in made))
        kept = run.folder.rename(run.folder.with_name(f"{run.name}-{date:%Y-%m-%d-%H%M%S}"))
    print(f"An earlier run was here; it is kept in {os.path.relpath(kept)}\n", flush=True)


class _Execution:
    """One notebook on its way through a kernel of this environment, with a line on the terminal that says where it is;
    in a file or pipe, with a line every 15 seconds."""

    def __init__(self, path: Path, run: Run):
        self.path, self.run, self.copy = path, run, run.folder / "notebooks" / path.name
        self.notebook = nbformat.read(path, as_version=4)
        code = [i for i, cell in enumerate(self.notebook.cells) if cell.cell_type == "code" and cell.source.strip()]
        self.numbers = {index: number for number, index in enumerate(code, 1)}   # as a person counts: code cells
        self.number, self.cell, self.began, self.told = 0, None, 0.0, time.monotonic()
        self.client = NotebookClient(
            self.notebook, kernel_name="python3", timeout=None, store_widget_state=False, record_timing=False,
            shutdown_kernel="immediate", extra_arguments=["--log-level=CRITICAL"],
            resources={"metadata": {"path": str(path.parent)}},
            on_cell_execute=self._cell_begins, on_cell_executed=self._cell_ended)
        # Without folders to search, "python3" is this environment's Python, whatever kernels the user has installed.
        self.client.create_kernel_manager().kernel_spec_manager = KernelSpecManager(kernel_dirs=[])

    async def execute(self) -> bool:
        """Execute, save what ran, say how it went; True when every cell ran."""
        self.task, ticker, began = asyncio.current_task(), asyncio.create_task(self._tick()), time.monotonic()
        try:
            await self.client.async_execute()
            self._say(f"done in {duration_text(time.monotonic() - began)}", keep=True)
            return True
        except (CellExecutionError, DeadKernelError) as error:
            self._explain(error)
            return False
        finally:
            ticker.cancel()
            write_text(self.copy, nbformat.writes(self.notebook) + "\n")

    def _cell_begins(self, cell, cell_index, **_) -> None:
        # In nbclient's own handler's place, which makes Ctrl-C look like a kernel that died by itself.
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, self.task.cancel)
        if cell_index in self.numbers:
            self.number, self.cell, self.began = self.numbers[cell_index], cell, time.monotonic()

    def _cell_ended(self, cell_index, **_) -> None:
        if cell_index in self.numbers and time.monotonic() - self.began >= 5:
            self._say(self._where(), keep=True)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(1)
            if self.cell is not None:
                self._say(self._where())

    def _say(self, text: str, *, keep: bool = False) -> None:
        if sys.stdout.isatty():
            print(f"\r\x1b[K      {text[:shutil.get_terminal_size().columns - 8]}", end="\n" * keep, flush=True)
        elif keep or time.monotonic() - self.told > 15:
            self.told = time.monotonic()
            print(f"      {text}", flush=True)

    def _where(self) -> str:
        """The cell that runs, for how long, and its latest sign of life: the training's step, or what it printed."""
        seconds, sign = time.monotonic() - self.began, ""
        for output in self.cell.get("outputs", ()):
            if output.output_type == "stream":
                sign = output.text.strip().rpartition("\n")[2] or sign
        with contextlib.suppress(OSError, IndexError):
            if time.time() - self.run.metrics_file.stat().st_mtime < seconds:   # written while this cell runs
                row = [row for row in self.run.metrics() if "loss" in row][-1]
                sign = (f"training: step {row['step']} · epoch {row['epoch']:.2f} of "
                        f"{self.run.settings().train.epoch_count} · loss {row['loss']:.4f}")
        return " · ".join(filter(None, (f"cell {self.number}/{len(self.numbers)}", duration_text(seconds), sign)))

    def _explain(self, error: Exception) -> None:
        """Notebook, cell number, the cell itself and its error."""
        stopped = self.task.cancelling()
        self._say("stopped" if stopped else "failed", keep=True)
        reason = f"{error.ename}: {error.evalue}" if isinstance(error, CellExecutionError) else \
            "stopped by Ctrl-C" if stopped else "its kernel died (out of memory is the usual reason)"
        print(f"\n{self.path.name}, code cell {self.number} of {len(self.numbers)}:\n\n"
              f"{textwrap.indent(self.cell.source if self.cell else '', '    ')}\n\n{reason}\n\n"
              f"The cells above it ran; they and the whole traceback are in {os.path.relpath(self.copy)}\n"
              "To try again cell by cell: make lab", file=sys.stderr, flush=True)
