"""Notebook 05's widget and picture: an answer that follows the adapter's strength, and the scores before and after."""

from __future__ import annotations

import threading
import time
from html import escape

import ipywidgets as widgets
from matplotlib.figure import Figure

from ..data.chat import prompt
from ..generate import stream
from ..lora.layers import strength
from ..model import RWKV
from .panel_html import error_html
from .plots import COLOURS, GRID, INK

PAINT = 0.5  # seconds between two paints of an answer that is being written


class StrengthSlider(widgets.VBox):
    """A question, a slider for the adapter's strength (0 to 1.5), and the answer: display(StrengthSlider(…)).

    model: a model with its adapter applied, used by nobody else meanwhile
    Each change writes a new answer on a thread of its own; one that is still being written is given up.
    """

    def __init__(self, model: RWKV, tokenizer, question: str, *, template: str = "chat", max_tokens: int = 80):
        self._model, self._tokenizer, self._template, self._max_tokens = model, tokenizer, template, max_tokens
        self._lock, self._request, self._thread = threading.Lock(), 0, None
        self.text = ""                     # the answer as far as it is written
        self.question = widgets.Textarea(value=question, continuous_update=False, description="question", rows=2,
                                         layout={"width": "620px"})
        self.slider = widgets.FloatSlider(value=1.0, min=0.0, max=1.5, step=0.05, continuous_update=False,
                                          description="strength", tooltip="0 is the base, 1 the adapter as trained",
                                          layout={"width": "620px"})
        self.answer = widgets.HTML(layout={"margin": "0 0 0 90px"})  # under the question and the slider
        super().__init__([self.question, self.slider, self.answer], layout={"grid_gap": "4px"})
        for control in (self.question, self.slider):
            control.observe(self._ask, "value")
        self._ask()

    def __repr__(self) -> str:
        return f"StrengthSlider({self.slider.value:g})"

    def join(self) -> str:
        """Wait for the answer to the last change; returns it."""
        self._thread.join()
        return self.text

    def _ask(self, _=None) -> None:
        self._request += 1
        self._thread = threading.Thread(target=self._write, args=(self._request,), name="rwkv_nb answer", daemon=True)
        self._thread.start()

    def _write(self, request: int) -> None:
        """Write the answer to the newest request; an older one ends at its next token."""
        with self._lock:
            text, painted, value = "", time.monotonic(), self.slider.value
            try:
                with strength(self._model, value):
                    for piece in stream(self._model, self._tokenizer, prompt(self.question.value, self._template),
                                        max_tokens=self._max_tokens):
                        if request != self._request:
                            return
                        text += piece
                        if time.monotonic() - painted > PAINT:
                            self._paint(value, text + " …")
                            painted = time.monotonic()
            except Exception as error:  # shown in place of the answer: nobody waits for this thread
                self.answer.value = error_html(error)
                return
            if request == self._request:
                self.text = text.strip()
                self._paint(value, self.text)

    def _paint(self, value: float, text: str) -> None:
        name = {0.0: "base", 1.0: "adapter as trained"}.get(value, f"strength {value:g}")
        self.answer.value = (f'<div style="line-height:1.5"><span style="opacity:.65">{name}:</span> '
                             f'<span style="white-space:pre-wrap;font-family:monospace">{escape(text)}</span></div>')


def score_figure(score: tuple[float, float], loss: tuple[float, float], n: int) -> Figure:
    """Before and after, two panels of bars: share of n held-out answers that are right, and loss on general text."""
    figure = Figure(figsize=(7.6, 1.7), facecolor="white")
    panels = ((0.13, f"held-out answers that are right, of {n}", score, [f"{s:.0%}" for s in score], 1.0),
              (0.60, "loss on general text (lower is better)", loss, [f"{x:.3f}" for x in loss], 1.25 * max(loss)))
    for left, title, values, texts, right in panels:
        axes = figure.add_axes((left, 0.16, 0.36, 0.62))
        bars = axes.barh(["base", "merged"], values, color=[COLOURS[1], COLOURS[0]], height=0.62)
        axes.bar_label(bars, texts, padding=4, fontsize=9, color=INK)
        axes.set_xlim(0, right)
        axes.invert_yaxis()
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        axes.grid(color=GRID, lw=0.8, axis="x")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, colors=INK, left=False)
    figure.axes[0].xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    figure.axes[1].set_yticklabels([])
    return figure
