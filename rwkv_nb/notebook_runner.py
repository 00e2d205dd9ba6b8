"""Runs the notebooks in order from a shell, with progress that can be seen, and stops where one fails.

`make run` and `rwkv-nb run` call it. A notebook runs as in JupyterLab: its own kernel, its own folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

from .errors import RunError
from .runs import Run, write_text

PRODUCTS = {
    "settings.json": "the settings",
    "train_log.txt": "a line an epoch",
    "metrics.jsonl": "a row a step",
    "adapter-*.safetensors": "the adapter",
    "rwkv-*.pth": "the model with its adapter merged, as it was saved in training",
    "merged.pth": "the merged model",
    "loss.png": "the loss curve",
    "score.json": "held-out score before and after",
    "score.png": "the same as a picture",
    "notebooks/*.ipynb": "the notebooks as they ran",
}
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


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
        if not asyncio.run(_Execution(path, run).run()):
            return 1
    print(f"\nAll {len(notebooks)} notebooks ran in {_clock(time.monotonic() - began)}. What they made:")
    _print_products(run)
    return 0


def _set_aside(run: Run) -> None:
    """Move an earlier run to a folder with its date, so that nothing is overwritten."""
    if not run.folder.exists():
        return
    with run.lock():
        made = [p for p in run.folder.iterdir() if p.name != ".lock"]
        if not made:
            return
        date = datetime.fromtimestamp(max(p.stat().st_mtime for p in made))
        kept = run.folder.with_name(f"{run.name}-{date:%Y-%m-%d-%H%M%S}")
        run.folder.rename(kept)
    print(f"An earlier run was here; it is kept in {_near(kept)}\n", flush=True)


class _Execution:
    """One notebook on its way through a kernel of this environment."""

    def __init__(self, path: Path, run: Run):
        self.path, self.run_folder, self.progress = path, run, _Progress()
        self.notebook = nbformat.read(path, as_version=4)
        code = [i for i, cell in enumerate(self.notebook.cells) if cell.cell_type == "code" and cell.source.strip()]
        self.numbers = {index: number for number, index in enumerate(code, 1)}   # as a person counts: code cells
        self.number, self.cell, self.stopped = 0, None, False
        # Without folders to search, "python3" is this environment's Python, whatever kernels the user has installed.
        self.kernel = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
        self.client = NotebookClient(
            self.notebook, km=self.kernel, timeout=None, store_widget_state=False, record_timing=False,
            extra_arguments=["--log-level=CRITICAL"], resources={"metadata": {"path": str(path.parent)}},
            on_cell_execute=self._cell_begins, on_cell_executed=self._cell_ended)

    async def run(self) -> bool:
        """Execute, save what ran, say how it went; True when every cell ran."""
        self.task, ticker, began = asyncio.current_task(), asyncio.create_task(self._tick()), time.monotonic()
        try:
            await self.client.async_execute()
            self.progress.line(f"done in {_clock(time.monotonic() - began)}")
            return True
        except (CellExecutionError, DeadKernelError) as error:
            self.progress.line("stopped" if self.stopped else "failed")
            self._print_failure(error)
            return False
        finally:
            ticker.cancel()
            self._save()
            if self.kernel.has_kernel:
                await self.kernel.shutdown_kernel(now=True)

    def _cell_begins(self, cell, cell_index, **_) -> None:
        # In nbclient's own handler's place, which makes Ctrl-C look like a kernel that died by itself.
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, self._stop)
        if cell_index in self.numbers:
            self.number, self.cell, self.cell_began = self.numbers[cell_index], cell, time.monotonic()
            self.progress.live(self._describe(), at_once=True)

    def _stop(self) -> None:
        self.stopped = True
        self.task.cancel()

    def _cell_ended(self, cell_index, **_) -> None:
        if cell_index in self.numbers and time.monotonic() - self.cell_began >= 5:
            self.progress.line(self._describe())

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(1)
            if self.cell is not None:
                self.progress.live(self._describe())

    def _describe(self) -> str:
        """The cell that runs, for how long, and its latest sign of life."""
        seconds = time.monotonic() - self.cell_began
        sign = self._training() or _last_printed(self.cell)
        return f"cell {self.number}/{len(self.numbers)} · {_clock(seconds)}" + (f" · {sign}" if sign else "")

    def _training(self) -> str:
        """The newest row of metrics.jsonl, if it was written while this cell runs."""
        with contextlib.suppress(OSError):
            file = self.run_folder.metrics_file
            if time.time() - file.stat().st_mtime < time.monotonic() - self.cell_began:
                rows = [row for row in self.run_folder.metrics() if "loss" in row]
                epochs = self.run_folder.settings().train.epoch_count
                return f"training: step {rows[-1]['step']} · epoch {rows[-1]['epoch']:.2f} of {epochs} · " \
                       f"loss {rows[-1]['loss']:.4f}" if rows else ""
        return ""

    @property
    def _copy(self) -> Path:
        return self.run_folder.folder / "notebooks" / self.path.name

    def _save(self) -> None:
        write_text(self._copy, nbformat.writes(self.notebook) + "\n")

    def _print_failure(self, error: Exception) -> None:
        """Notebook, cell number, the cell itself and its error."""
        source = "\n".join(f"    {line}" for line in self.cell.source.splitlines())
        if self.stopped:
            reason = "stopped by Ctrl-C"
        elif isinstance(error, CellExecutionError):
            reason = f"{error.ename}: {error.evalue}"
        else:
            reason = "its kernel died (out of memory is the usual reason)"
        print(f"\n{self.path.name}, code cell {self.number} of {len(self.numbers)}:\n\n{source}\n\n"
              f"{COLOUR.sub('', reason)}\n\n"
              f"The cells above it ran; they and the whole traceback are in {_near(self._copy)}\n"
              "To try again cell by cell: make lab", file=sys.stderr, flush=True)


class _Progress:
    """One live line on a terminal; in a file or pipe, a line every 15 seconds."""

    def __init__(self):
        self.tty, self.last = sys.stdout.isatty(), time.monotonic()

    def live(self, text: str, at_once: bool = False) -> None:
        if self.tty:
            print(f"\r\x1b[K      {text[:shutil.get_terminal_size().columns - 8]}", end="", flush=True)
        elif not at_once and time.monotonic() - self.last > 15:
            self.line(text)

    def line(self, text: str) -> None:
        self.last = time.monotonic()
        print(("\r\x1b[K" if self.tty else "") + f"      {text}", flush=True)


def _last_printed(cell) -> str:
    """The last line that a running cell printed."""
    printed = [line for output in cell.get("outputs", []) if output.output_type == "stream"
               for line in output.text.splitlines() if line.strip()]
    return printed[-1].strip() if printed else ""


def _print_products(run: Run) -> None:
    for pattern, meaning in PRODUCTS.items():
        for path in sorted(run.folder.glob(pattern)):
            print(f"  {_near(path)}  ({meaning})")


def _clock(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def _near(path: Path) -> str:
    """The path as one would type it from here, if it lies below."""
    path = path.resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """python -m rwkv_nb.notebook_runner [FOLDER]"""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return run_notebooks(*arguments[:1])
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
