"""A run's settings before it starts: as a form, and as a shell command."""

import os
import shlex
import threading
from dataclasses import Field

import ipywidgets as widgets

from .. import config
from ..config import Settings
from ..runs import Run, path_settings
from .common import errors_shown

FIELDS = ("r", "lora_alpha", "ctx_len", "micro_bsz", "epoch_count", "epoch_steps", "lr_init", "lr_final",
          "precision")


class SettingsForm(widgets.VBox):
    """All settings of a run as widgets, set from its settings.json and written back at each change.

    language: en or zh, that of the explanations. Those in FIELDS are in sight, the others fold out. Text and bounds
    come from config.py.
    """

    def __init__(self, run: Run, language: str = "en"):
        self._run, self._language, self._message, self.inputs = run, language, widgets.HTML(), {}
        self._writing = threading.Lock()    # a value may be set by a thread beside the page
        self._known = {field.name: field for field in config.leaf_fields(Settings()) if field.name != "proj_dir"}
        values = config.values(run.settings())
        rows = {name: self._row(field, values[name]) for name, field in self._known.items()}
        others = widgets.VBox([row for name, row in rows.items() if name not in FIELDS])
        super().__init__([*(rows[name] for name in FIELDS),
                          widgets.Accordion([others], titles=("all the others · 其他设置",)), self._message])

    def _row(self, field: Field, value) -> widgets.HBox:
        made = self.inputs[field.name] = setting_input(field, value, self._language)
        made.observe(self._write, "value")
        unit = f" [{field.metadata['unit']}]" if field.metadata["unit"] and self._language == "en" else ""
        text = f'<div style="opacity:.75;line-height:1.3;padding:5px 0">{field.metadata[self._language]}{unit}</div>'
        return widgets.HBox([made, widgets.HTML(text)])

    def __repr__(self) -> str:
        return f"SettingsForm({self._run.name})"

    def _write(self, change) -> None:
        name = change.owner.description
        with self._writing, errors_shown(self._message):
            words = isinstance(self._known[name].default, tuple)
            self._run.update(**{name: tuple(change.new.split()) if words else change.new})
            self._message.value = ""


def setting_input(field: Field, value, language: str = "en") -> widgets.Widget:
    """The widget that fits a field's type, choices and bounds; several words are one text with spaces."""
    text = field.metadata
    value = " ".join(value) if isinstance(value, tuple) else value
    shared = {"description": field.name, "tooltip": text[language], "value": value,
              "style": {"description_width": "180px"}, "layout": {"width": "300px", "flex": "0 0 auto"}}
    if text["choices"]:
        return widgets.Dropdown(options=text["choices"], **shared)
    low = -1e12 if text["low"] is None else text["low"]
    high = 10**12 if text["high"] is None else text["high"]
    if isinstance(field.default, float):
        return widgets.BoundedFloatText(min=low, max=high, step=None, **shared)
    if isinstance(field.default, int):
        return widgets.BoundedIntText(min=int(low), max=int(high), **shared)
    shared["layout"]["width"] = "450px"    # for paths
    return widgets.Text(continuous_update=False, **shared)


def shell_command(settings: Settings, run: Run, relative_to: str | None = None) -> str:
    """The same run as a shell command: every setting that differs from its default, a flag a line.

    relative_to: a folder from which the paths are given; by default they are absolute.
    """
    def path(value) -> str:
        return os.path.relpath(value, relative_to) if relative_to else os.path.abspath(value)

    values, defaults = config.values(settings), config.values(Settings())
    values |= {name: path(value) for name, value in path_settings(settings).items()}
    values["proj_dir"] = path(run.folder)
    names = ["load_model", "proj_dir", "data_file"]
    names += [name for name in values if name not in names]
    words = {name: value if isinstance(value, tuple) else (value,) for name, value in values.items()}
    flags = [shlex.join([f"--{name}", *map(str, words[name])]) for name in names if values[name] != defaults[name]]
    return " \\\n    ".join(["rwkv-nb train", *flags])
