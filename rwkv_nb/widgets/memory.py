"""Memory told before a run: a bar that follows the form of 03, and the tutorial's table with ours beside it."""

import html
from collections.abc import Callable, Mapping
from functools import partial

import ipywidgets as W
from matplotlib.figure import Figure

from .. import config, fit, memory
from ..config import PRESETS, Settings
from ..memory import QUANTS, TUTORIAL, TUTORIAL_SETTINGS
from ..model import Shape, load_weights, read_shape
from ..quant import bitsandbytes
from ..runs import Run
from ..words import bytes_text
from .common import Newest, button
from .panel_form import SettingsForm
from .panel_html import rows_html
from .plots import COLOURS, INK, stacked_bars

_PART_COLOURS = {"weights": COLOURS[0], "LoRA": COLOURS[1], "gradients": COLOURS[4], "optimizer": COLOURS[3],
                 "checkpoints": COLOURS[2], "block peak": COLOURS[5], "loss": "#999999", "context": "#cccccc"}
_NOT = f"<b style='color:{COLOURS[1]}'>This run does not fit.</b>"


def predict(shape: Shape, preset: str, quant: str) -> memory.Estimate:
    """A LoRA step on a GPU under the tutorial's settings and a preset."""
    return memory.estimate(shape, config.replace(TUTORIAL_SETTINGS, **PRESETS[preset], quant=quant))


def table_html(sizes: Mapping[str, Shape], presets: tuple[str, ...] = ("balanced", "small")) -> str:
    """GB of every size, bf16 · int8 · nf4: the tutorial's, and what is predicted here for each preset."""
    head = ["", "tutorial: bf16", "int8", "nf4", *(f"{p}: {q}" if q == "bf16" else q for p in presets
                                                   for q in ("bf16", "int8", "nf4"))]
    rows = []
    for name, shape in sizes.items():
        told = [f"{x:.1f}" for x in TUTORIAL.get(name, ())] or ["–"] * 3
        rows.append([name, *told, *(f"<b>{predict(shape, p, q).total / 1e9:.2f}</b>" for p in presets for q in QUANTS)])
    return rows_html([head, *rows])


def memory_figure(sizes: Mapping[str, Shape], preset: str, quant: str) -> Figure:
    """A bar a size, its parts at the moment of the peak; a tick where the tutorial stands."""
    told = {name: predict(shape, preset, quant).at_peak for name, shape in sizes.items()}
    figure, axes = stacked_bars({name: {part: n / 1e9 for part, n in parts.items()} for name, parts in told.items()},
                                _PART_COLOURS)
    marks = [(TUTORIAL[name][QUANTS.index(quant)], name) for name in sizes if name in TUTORIAL]
    if marks:
        axes.plot(*zip(*marks, strict=True), "|", ms=15, mew=2.5, color=INK, label="tutorial")
    axes.set_xlabel(f"GB predicted, preset {preset}, quant {quant}", color=INK, fontsize=9)
    figure.legend(loc="upper center", ncols=9, frameon=False, fontsize=8, handlelength=1, columnspacing=1)
    return figure


def bar_html(told: memory.Estimate, name: str, limit: int) -> str:
    """The parts as one bar against a card's memory, and their bytes below it."""
    scale = 100 / max(limit, told.total)
    pieces = "".join(
        f"<span title='{part} {size / 1e9:.2f} GB' style='display:inline-block;height:18px;width:{size * scale:.2f}%;"
        f"background:{_PART_COLOURS[part]}'></span>" for part, size in told.at_peak.items())
    words = " · ".join(f"<span style='border-left:9px solid {_PART_COLOURS[part]};padding-left:4px'>{part} "
                       f"{bytes_text(told.largest[part])}</span>" for part in told.largest)
    colour = COLOURS[1] if told.total > limit else COLOURS[2]
    return (f"<div style='font-size:13px'><b style='color:{colour}'>{told.total / 1e9:.2f} GB</b> of "
            f"{limit / 1e9:.1f} GB free, {html.escape(name)}</div><div style='width:100%;white-space:nowrap;"
            f"font-size:0;background:#eee'>{pieces}</div><div style='font-size:12px;line-height:1.6'>{words} "
            "(each at its most; the bar is the moment when all together take most; of what a GPU has free now "
            f"{fit.SPARE:.0%} is left out, for gaps between tensors)</div>")


class MemoryBar(W.VBox):
    """What the run in a form would need, against the card that is there; follows the form as it changes.

    Says what to change where it does not fit, with a button for that, for each preset and for the largest micro_bsz.
    It counts on a thread of its own, which takes seconds, and more beside a training.
    limit: bytes to fit into, by default those of the GPU, or of the machine where it has none.
    """

    def __init__(self, form: SettingsForm, run: Run, limit: int | None = None):
        self._form, self._run, self._limit = form, run, limit
        self._bar, self._advice = W.HTML(layout=W.Layout(width="99%")), W.HTML()
        self.newest = Newest("rwkv_nb memory", self._paint)
        self.apply = button("change that", lambda: self._set(self._offer or {}))
        self.presets = {name: button(name, partial(self._set, changes), tooltip=fit.words(changes), width="auto")
                        for name, changes in PRESETS.items()}
        self.largest = button("largest micro_bsz that fits", lambda: self._ask(self._fill), width="auto")
        super().__init__([self._bar, W.HBox([self._advice, self.apply]),
                          W.HBox([W.Label("preset:"), *self.presets.values(), self.largest])])
        for control in form.inputs.values():
            control.observe(lambda _: self._ask(self._count), "value")
        self._ask(self._count)

    def __repr__(self) -> str:
        return f"MemoryBar({self._run.name})"

    def _read(self) -> tuple[Shape, Settings, str, int, bool]:
        settings = self._run.settings()
        config.check_together(settings)
        name, size, gpu = fit.card(settings.train.accelerator)
        return read_shape(load_weights(settings.train.load_model)), settings, name, self._limit or size, gpu

    def _ask(self, work: Callable) -> None:
        self.newest.ask(work, self._bar.value, "counting …")

    def _count(self, say: Callable[..., None]) -> None:
        shape, settings, name, limit, gpu = self._read()
        told = memory.estimate(shape, settings, gpu=gpu)
        bar, t = bar_html(told, name, limit), settings.train
        if t.quant != "none" or t.quant_head or t.adam_state == "8bit":
            bitsandbytes()
        if told.total <= limit:
            return say(bar)
        change = fit.cheapest_change(shape, settings, limit, gpu=gpu, before_each=partial(
            say, bar, f"{_NOT} looking for what would make it fit …"))
        say(bar, f"{_NOT} " + (f"it fits with <code>{fit.words(change)}</code>&nbsp;" if change else
                               f"no setting makes it fit: {fit.TOO_LARGE}"), change)

    def _fill(self, say: Callable[..., None]) -> None:
        shape, settings, _, limit, gpu = self._read()
        fits = fit.largest_micro_bsz(shape, settings, limit, gpu=gpu, before_each=say)
        with self.newest.lock:
            say()
            self._set({"micro_bsz": max(fits, 1)})

    def _paint(self, bar: str, advice: str = "", offer: dict | None = None) -> None:
        self._bar.value, self._advice.value, self._offer = bar, advice, offer
        self.apply.layout.display = "" if offer else "none"

    def _set(self, changes: dict) -> None:
        with self.newest.lock:    # counted when the last is set
            for name, value in changes.items():
                self._form.inputs[name].value = value
            self._ask(self._count)
