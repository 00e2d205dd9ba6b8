"""What several widgets share: a button, a bar, errors, and text that is shown while it is being written."""

import contextlib
import threading
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

    def report(self, done: int, total: int) -> None:
        """Paint the share that is done, in steps that can be seen."""
        share = done / max(total, 1)
        if share in (0, 1) or share - self._bar.value > 0.01:
            self._bar.value = share

    def show(self, now: Progress) -> None:
        """The same of a conversion, with its speed and the time left."""
        self._bar.value, self._text.value = now.done / max(now.total, 1), str(now)


def write_live(pieces: Generator[str, None, None], paint: Callable[[str, float], None],
               stopped: Callable[[], bool | None]) -> str:
    """Put pieces of text together until there is no more, or stopped(); returns the text.

    paint(the text so far, pieces a second) is called twice a second.
    """
    text, began = "", time.monotonic()
    painted = began
    with contextlib.closing(pieces):    # who writes them learns that no more is wanted
        for n, piece in enumerate(pieces, 1):
            text += piece
            if stopped():
                break
            now = time.monotonic()
            if now - painted > PAINT:
                paint(text, n / (now - began))
                painted = now
    return text


class Overtaken(BaseException):
    """Something newer was asked for. No Exception: nothing went wrong."""


class Newest:
    """Does what was asked for last on a thread of its own, one thing at a time; what is overtaken ends.

    paint: shows what there is to say; an error comes as HTML, alone
    lock: held while something is painted; nothing is overtaken meanwhile
    """

    def __init__(self, name: str, paint: Callable[..., None]):
        self.lock, self.thread = threading.RLock(), None
        self._name, self._paint, self._turn, self._asked = name, paint, threading.Lock(), 0

    def ask(self, work: Callable[[Callable[..., None]], None], *shown) -> None:
        """Do work(say) next; shown is painted till then. say(…) paints, and raises Overtaken in a work that is."""
        with self.lock:
            self._asked += 1
            if shown:
                self._paint(*shown)
            self.thread = threading.Thread(target=self._do, args=(work, self._asked), name=self._name, daemon=True)
            self.thread.start()

    def join(self) -> None:
        """Wait until all is done, what a work asked for too."""
        while self.thread.is_alive():
            self.thread.join()

    def _do(self, work: Callable, number: int) -> None:
        def say(*shown) -> None:
            with self.lock:
                if number != self._asked:
                    raise Overtaken
                if shown:
                    self._paint(*shown)

        with self._turn, contextlib.suppress(Overtaken):
            try:
                say()
                work(say)
            except Exception as error:
                say(error_html(error))
