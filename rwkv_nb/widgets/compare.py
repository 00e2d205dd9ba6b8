"""Runs side by side: the controls of 04_plot_loss."""

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import ipywidgets as W
import numpy as np

from ..errors import RunError
from ..runs import Run
from .common import button
from .panel_html import rows_html
from .plots import compare_figure, png


def find_runs(folder: str | Path) -> dict[str, Run]:
    """Runs in `folder` that have metrics, by name, in the order of their names; what a fresh start set aside too."""
    logs = [*Path(folder).glob("*/metrics.jsonl"), *Path(folder).glob("*/previous-*/metrics.jsonl")]
    return {str(log.parent.relative_to(folder)): Run(log.parent) for log in sorted(logs)}


def summary(rows: Sequence[Mapping]) -> dict[str, float | None]:
    """Steps taken, mean loss of the first and the last tenth of them, lowest held-out loss (None where none was
    measured), median tokens/s, peak memory in MB.

    Raises RunError for a run without a step.
    """
    steps = [row for row in rows if "loss" in row]
    if not steps:
        raise RunError("no step has been written yet", fix="train it first: notebook 03_train_lora, or `rwkv-nb train`")
    tenth = max(len(steps) // 10, 1)
    loss = [row["loss"] for row in steps]
    return {"steps": steps[-1]["step"], "first_loss": float(np.mean(loss[:tenth])),
            "last_loss": float(np.mean(loss[-tenth:])),
            "heldout_loss": min((row["heldout_loss"] for row in rows if row.get("event") == "eval"), default=None),
            "tokens_per_s": float(np.median([row["tokens_per_s"] for row in steps])),
            "peak_memory_mb": max(row["peak_memory_mb"] for row in steps)}


def summary_html(runs: Mapping[str, Sequence[Mapping]]) -> str:
    """The summaries as a table, a row a run. runs: rows of metrics.jsonl by name."""
    table = [("run", "steps", "loss at first", "loss at last", "best held-out", "tokens/s", "peak memory, MB")]
    for name, rows in runs.items():
        cells = ["no step yet", "", "", "", "", ""]
        if any("loss" in row for row in rows):
            formats = ("{:,}", "{:.4f}", "{:.4f}", "{:.4f}", "{:,.0f}", "{:,.0f}")
            figures = zip(formats, summary(rows).values(), strict=True)
            cells = ["–" if value is None else form.format(value) for form, value in figures]
        table.append((html.escape(name), *cells))
    return rows_html(table)


class ComparePanel(W.VBox):
    """Choose runs from a folder and see them side by side; "Read again" looks at the disk once more.

    folder: where the runs are; chosen: names that are selected at first
    """

    def __init__(self, folder: str | Path, chosen: Iterable[str] = ()):
        self.folder = Path(folder)
        self._choice = W.SelectMultiple(layout=W.Layout(width="220px", flex="0 0 auto"))
        again = button("Read again", lambda: self._choose(self._choice.value), icon="refresh",
                       tooltip="Look for new runs and new steps")
        self._table, self._picture = W.HTML(), W.Image(format="png", layout=W.Layout(max_width="960px"))
        super().__init__([W.HBox([W.VBox([self._choice, again]), self._table]), self._picture])
        self._choice.observe(self._paint, "value")
        self._choose(chosen)

    @property
    def chosen(self) -> dict[str, list[dict]]:
        """Metrics of the chosen runs, by name."""
        runs = find_runs(self.folder)
        return {name: runs[name].metrics() for name in self._choice.value if name in runs}

    def _choose(self, names: Iterable[str]) -> None:
        self._choice.options = list(find_runs(self.folder))
        self._choice.value = [name for name in names if name in self._choice.options]
        self._paint()

    def _paint(self, _=None) -> None:
        runs = self.chosen
        self._table.value, self._picture.value = summary_html(runs), png(compare_figure(runs))
