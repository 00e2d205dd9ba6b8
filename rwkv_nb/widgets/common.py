"""What several widgets share: a button, a bar, errors, and text that is shown while it is being written."""

import contextlib
import time
from collections.abc import Callable, Generator, Iterator

import ipywidgets as widgets
from IPython import get_ipython

from ..data.convert import Progress
from .panel_html import error_html

PAINT = 0.5     # seconds between two paints of text that is being written


def button(text: str, do: Callable[[], None], *, icon: str = "", tooltip: str = "", style: str = "",
           width: str = "110px") -> widgets.Button:
    """A button that calls `do`. icon: of Font Awesome; style: success, danger, …"""
    made = widgets.Button(description=text, icon=icon, tooltip=tooltip, button_style=style, layout={"width": width})
    made.on_click(lambda _: do())
    return made


@contextlib.contextmanager
def errors_shown(place: widgets.HTML) -> Iterator[None]:
    """What goes wrong inside is shown in `place`: nobody waits for what a button does."""
    try:
        yield
    except Exception as error:
        place.value = error_html(error)


def confirm_changes() -> None:
    """Let every control of this notebook be moved again and again while a cell awaits something.

    ipykernel 7.4 takes what a page says during such a cell, but does not tell it that it has: the page waits for that
    before it says a second change of the same control, for good.
    """
    if hasattr(shell := get_ipython(), "kernel"):
        shell.events.register("post_execute", _confirm)     # which comes after each message of a widget too


def _confirm() -> None:
    kernel = get_ipython().kernel
    message = kernel.get_parent("shell")
    if message["header"]["msg_type"] == "comm_msg":
        for status in ("idle", "busy"):     # done with this; where no cell is running, the kernel says idle once more
            kernel.session.send(kernel.iopub_socket, "status", {"execution_state": status}, parent=message)


class Bar(widgets.HBox):
    """How far something is: display(bar := Bar()), then merge(…, progress=bar.report), an export or a download, or
    jsonl_to_binidx(…, bar.show)."""

    def __init__(self):
        self._bar, self._text = widgets.FloatProgress(max=1.0, layout={"width": "400px"}), widgets.HTML()
        super().__init__([self._bar, self._text])

    def __repr__(self) -> str:
        return "Bar()"

    @property
    def value(self) -> float:
        """The share that is shown."""
        return self._bar.value

    def report(self, done: int, total: int) -> None:
        """Paint the share that is done, in steps that can be seen."""
        share = done / max(total, 1)
        if share in (0, 1) or share - self._bar.value > 0.01:
            self._bar.value = share

    def show(self, now: Progress) -> None:
        """The same of a conversion, with its speed and the time left."""
        self._bar.value, self._text.value = now.done / max(now.total, 1), str(now)


def write_live(pieces: Generator[str, None, None], paint: Callable[[str, float], None],
               stopped: Callable[[], bool]) -> str:
    """Put pieces of text together until there is no more, or stopped(); returns the text.

    paint(the text so far, pieces a second) is called twice a second.
    """
    text, began = "", time.monotonic()
    painted = began
    for n, piece in enumerate(pieces, 1):
        text += piece
        if stopped():
            break
        now = time.monotonic()
        if now - painted > PAINT:
            paint(text, n / (now - began))
            painted = now
    pieces.close()  # who writes them learns that no more is wanted
    return text
