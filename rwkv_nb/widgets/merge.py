"""Notebook 05's widget and picture: an answer that follows the adapter's strength, and the scores before and after."""

from collections.abc import Callable, Mapping
from html import escape

import ipywidgets as widgets
from matplotlib.figure import Figure

from ..data.chat import prompt
from ..evaluate import Judgement
from ..generate import stream
from ..lora.layers import strength
from ..model import RWKV
from .common import Newest, write_live
from .plots import COLOURS, INK, plain


class StrengthSlider(widgets.VBox):
    """A question, a slider for the adapter's strength (0 to 1.5), and the answer: display(StrengthSlider(…)).

    model: a model with its adapter applied, used by nobody else meanwhile
    Each change writes a new answer on a thread of its own; one that is still being written is given up.
    """

    def __init__(self, model: RWKV, tokenizer, question: str, *, template: str = "chat", max_tokens: int = 80):
        self._model, self._tokenizer, self._template, self._max_tokens = model, tokenizer, template, max_tokens
        self.text = ""                     # the answer as far as it is written
        self.question = widgets.Textarea(value=question, continuous_update=False, description="question", rows=2,
                                         layout={"width": "620px"})
        self.slider = widgets.FloatSlider(value=1.0, min=0.0, max=1.5, step=0.05, continuous_update=False,
                                          description="strength", tooltip="0 is the base, 1 the adapter as trained",
                                          layout={"width": "620px"})
        self.answer = widgets.HTML(layout={"margin": "0 0 0 90px"})  # under the question and the slider
        self.newest = Newest("rwkv_nb answer", lambda text: setattr(self.answer, "value", text))
        super().__init__([self.question, self.slider, self.answer], layout={"grid_gap": "4px"})
        for control in (self.question, self.slider):
            control.observe(lambda _: self.newest.ask(self._write), "value")
        self.newest.ask(self._write)

    def __repr__(self) -> str:
        return f"StrengthSlider({self.slider.value:g})"

    def join(self) -> str:
        """Wait for the answer to the last change; returns it."""
        self.newest.join()
        return self.text

    def _write(self, say: Callable[..., None]) -> None:
        value = self.slider.value
        name = {0.0: "base", 1.0: "adapter as trained"}.get(value, f"strength {value:g}")

        def paint(text: str) -> None:
            say(f'<div style="line-height:1.5"><span style="opacity:.65">{name}:</span> '
                f'<span style="white-space:pre-wrap;font-family:monospace">{escape(text)}</span></div>')

        pieces = stream(self._model, self._tokenizer, prompt(self.question.value, self._template),
                        max_tokens=self._max_tokens, template=self._template)
        with strength(self._model, value):
            text = write_live(pieces, lambda text, _: paint(text + " …"), say)
        paint(text.strip())
        self.text = text.strip()


def score_figure(judged: Mapping[str, Judgement]) -> Figure:
    """A panel of bars a measure, a bar a model; measures that were not taken are left out."""
    titles = {"heldout_loss": "held-out loss (lower is better)", "exact": "held-out answers that are right",
              "general_loss": "loss on general text (lower is better)", "choices": "multiple choice, right"}
    taken = [name for name in titles if all(getattr(j, name) is not None for j in judged.values())]
    high = -(-len(taken) // 2)
    figure = Figure(figsize=(8.4, 1.7 * high), facecolor="white", layout="constrained")
    for panel, name in enumerate(taken, 1):
        values, share = [getattr(j, name) for j in judged.values()], name in ("exact", "choices")
        axes = plain(figure.add_subplot(high, 2, panel), grid="x")
        bars = axes.barh(list(judged), values, color=[COLOURS[1], COLOURS[0]], height=0.62)
        axes.bar_label(bars, [f"{v:.0%}" if share else f"{v:.3f}" for v in values], padding=4, fontsize=9, color=INK)
        axes.set_xlim(0, 1.25 if share else 1.25 * max(values))
        axes.invert_yaxis()
        axes.set_title(titles[name], loc="left", fontsize=10, color=INK)
        axes.tick_params(left=False)
        if share:
            axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    return figure
