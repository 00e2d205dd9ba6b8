"""A drop-down of published base models, with a button that fetches one."""

import threading
from pathlib import Path

import ipywidgets as W

from ..hub import KNOWN, find, get
from ..words import bytes_text
from .common import Bar, button, errors_shown


class BaseChooser(W.VBox):
    """Choose a released model, see its size, fetch it: display(BaseChooser("../models")). `path` is where it then lies.

    endpoint: a mirror's address; None takes the HF_ENDPOINT setting, else the hub itself
    """

    def __init__(self, folder: str | Path = "models", *, endpoint: str | None = None):
        self._folder, self._endpoint, self._thread = Path(folder), endpoint, None
        self.path: Path | None = None
        self.name = W.Combobox(value=next(iter(KNOWN)), options=list(KNOWN), description="model", ensure_option=False)
        self.said, self.bar = W.HTML(), Bar()
        size = button("Size", lambda: self._start(self._size))
        get_it = button("Get", lambda: self._start(self._get), icon="download")
        super().__init__([W.HBox([self.name, size, get_it, self.bar]), self.said])

    def __repr__(self) -> str:
        return f"BaseChooser({self.name.value})"

    def join(self) -> Path | None:
        """Wait for what was begun; returns the fetched file."""
        if self._thread:
            self._thread.join()
        return self.path

    def _start(self, do) -> None:
        if not (self._thread and self._thread.is_alive()):
            self._thread = threading.Thread(target=errors_shown(self.said)(do), name="rwkv_nb get", daemon=True)
            self._thread.start()

    def _size(self) -> None:
        found = find(self.name.value, endpoint=self._endpoint)
        self.said.value = f"{found.file}: {bytes_text(found.size)}"

    def _get(self) -> None:
        self.bar.report(0, 1)
        self.path = get(self.name.value, self._folder, endpoint=self._endpoint, progress=self.bar.report,
                        say=lambda text: setattr(self.said, "value", text))
        self.bar.report(1, 1)
