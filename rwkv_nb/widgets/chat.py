"""Notebook 06's chat: two or more models (or one at several strengths of its adapter) answer the same, side by side."""

import threading
from collections.abc import Mapping
from contextlib import nullcontext
from html import escape
from pathlib import Path

import ipywidgets as W

from ..lora.layers import strength
from ..model import RWKV
from ..talk import Talk
from .common import button, errors_shown, write_live

SHOWN = 20_000  # characters of a talk that stay on the screen
THINKING = {"as trained": "", "thinking": "g1", "no thinking": "g1_nothink"}


class ChatPanel(W.VBox):
    """Ask, and every column answers with the same seed: ChatPanel({"base": (model, 0), "adapter": (model, 1)}, …).

    columns: name → (model, strength of its adapter, or None for a model without one)
    The models are used by nobody else meanwhile. folder: where talks are saved.
    """

    def __init__(self, columns: Mapping[str, tuple[RWKV, float | None]], tokenizer, *, template: str = "chat",
                 folder: str | Path = ".", question: str = "", max_tokens: int = 300):
        self._template, self._folder, self._lock = template, Path(folder), threading.Lock()
        self._columns = {name: (Talk(model, tokenizer, template), value) for name, (model, value) in columns.items()}
        self.texts, self._stop, self._thread = dict.fromkeys(columns, ""), False, None
        self.question = W.Textarea(value=question, rows=2, placeholder="ask something", layout={"width": "620px"})
        self.sampling = {
            "temperature": _slider(0.0, 2.0, 0.05, 1.0, "0 takes the likeliest token"),
            "top_p": _slider(0.05, 1.0, 0.05, 0.5, "sample from the likeliest tokens that hold this share"),
            "presence": _slider(0.0, 2.0, 0.1, 0.0, "taken off a token that was written already"),
            "frequency": _slider(0.0, 2.0, 0.1, 0.0, "taken off for each time that it was written"),
            "max_tokens": W.IntText(max_tokens, layout={"width": "150px"}),
            "seed": W.IntText(0, layout={"width": "150px"})}
        for name, control in self.sampling.items():
            control.description = name
        self.thinking = W.ToggleButtons(options=list(THINKING), tooltips=["the run's template", "G1 models think first",
                                                                          "G1 models answer at once"])
        self.said = W.HTML()
        self._views = {name: W.HTML(layout={"width": "48%", "min_width": "300px"}) for name in columns}
        buttons = [button("Send", self.send, icon="paper-plane"), button("Stop", self.stop, icon="stop"),
                   button("New talk", self.forget, icon="eraser"), button("Save", self.save, icon="save"),
                   button("Restore", self.restore, icon="folder-open")]
        controls = list(self.sampling.values())
        super().__init__([self.question, W.HBox([*buttons, self.said]), W.HBox(controls[:2]), W.HBox(controls[2:4]),
                          W.HBox([*controls[4:], self.thinking]), W.HBox(list(self._views.values()))])
        self._paint()

    def __repr__(self) -> str:
        return f"ChatPanel({', '.join(self._columns)})"

    def send(self) -> None:
        """Put the question to every column, on a thread of its own."""
        if self._thread and self._thread.is_alive():
            self.said.value = "still writing: Stop first"
            return
        self.said.value, self._stop, how = "", False, {name: control.value for name, control in self.sampling.items()}
        template = THINKING[self.thinking.value] or self._template
        self._thread = threading.Thread(target=self._answer, args=(self.question.value, template, how), daemon=True,
                                        name="rwkv_nb chat")
        self._thread.start()

    def join(self) -> dict[str, str]:
        """Wait for the answers; returns each column's whole talk."""
        if self._thread:
            self._thread.join()
        return dict(self.texts)

    def stop(self) -> None:
        """End the answers at their next token."""
        self._stop = True

    def forget(self) -> None:
        """Begin a new talk."""
        self._between(lambda name, talk: setattr(talk, "state", None), "a new talk")
        self.texts = dict.fromkeys(self.texts, "")
        self._paint()

    def save(self) -> None:
        """Write every column's state into the folder."""
        self._between(lambda name, talk: talk.save(self._file(name)), f"saved in {self._folder}")

    def restore(self) -> None:
        """Take up the saved states; what was said before is remembered by the models, not shown."""
        self._between(lambda name, talk: talk.restore(self._file(name)), "restored: the models remember")

    def _file(self, name: str) -> Path:
        return self._folder / f"talk-{name}.st"

    def _between(self, do, done: str) -> None:
        self.stop()
        with self._lock, errors_shown(self.said):
            for name, (talk, _) in self._columns.items():
                do(name, talk)
            self.said.value = done

    def _answer(self, question: str, template: str, how: dict) -> None:
        with self._lock, errors_shown(self.said):
            for name, (talk, value) in self._columns.items():
                talk.template = template
                with nullcontext() if value is None else strength(talk.model, value):
                    self._write(name, talk.say(question, **how), question)
            self.said.value = ""

    def _write(self, name: str, pieces, question: str) -> None:
        before = (self.texts[name] + f"\n\n▸ {question.strip()}\n").lstrip()[-SHOWN:]

        def paint(text: str, speed: float) -> None:
            self.texts[name] = before + text
            self._paint(name, f"{speed:.0f} pieces of text/s …")

        self.texts[name] = before
        self.texts[name] += write_live(pieces, paint, lambda: self._stop)
        self._paint(name)

    def _paint(self, only: str = "", note: str = "") -> None:
        for name in [only] if only else self._views:
            self._views[name].value = (
                f'<div style="line-height:1.5"><b>{escape(name)}</b> <span style="opacity:.6">{note}</span>'
                # in a column from below, what is newest stays in sight
                f'<div style="display:flex;flex-direction:column-reverse;max-height:420px;overflow-y:auto">'
                f'<div style="white-space:pre-wrap;font-family:monospace">{escape(self.texts[name])}</div></div></div>')


def _slider(low: float, high: float, step: float, value: float, tooltip: str) -> W.FloatSlider:
    return W.FloatSlider(value, min=low, max=high, step=step, tooltip=tooltip, continuous_update=False,
                         style={"description_width": "95px"})
