"""Settings are frozen dataclasses, one inside the other, whose fields carry their own text, bounds and choices.

What is done with them here knows no field by name: check, change, read, write.
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any

from .errors import SettingsError, did_you_mean


def option(default: Any, en: str, zh: str, *, unit: str = "", choices: tuple = (), low=None, high=None):
    """A documented dataclass field. low and high are inclusive bounds, in the field's unit."""
    text = {"en": en, "zh": zh, "unit": unit, "choices": choices, "low": low, "high": high}
    return dataclasses.field(default=default, metadata=text)


def _leaves(settings) -> Iterator[tuple[dataclasses.Field, Any]]:
    """Each field that is no group of fields, with its value, in order."""
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value)
        else:
            yield f, value


def leaf_fields(settings) -> list[dataclasses.Field]:
    """All documented fields of nested settings (an instance), in order; metadata carries the text."""
    return [f for f, _ in _leaves(settings)]


def values(settings) -> dict[str, Any]:
    """Values of all leaf fields of nested settings by name, in order."""
    return {f.name: value for f, value in _leaves(settings)}


def check(settings) -> None:
    """Raise SettingsError for the first field of a wrong type or outside its choices or bounds. Nested ones too."""
    for f, value in _leaves(settings):
        rule, low, high = f.metadata, f.metadata["low"], f.metadata["high"]
        if not _has_type_of(f.default, value):
            raise SettingsError(f"{f.name} is {value!r}", where=f.name, fix=f"give it a value like {f.default!r}")
        if rule["choices"] and value not in rule["choices"]:
            fixes = [f"use one of {', '.join(map(str, rule['choices']))}", did_you_mean(value, rule["choices"])]
            raise SettingsError(f"{f.name} cannot be {value!r}", where=f.name, fix="; ".join(filter(None, fixes)))
        if low is not None and value < low:
            raise SettingsError(f"{f.name} is {value!r}", where=f.name, fix=f"it must be at least {low}")
        if high is not None and value > high:
            raise SettingsError(f"{f.name} is {value!r}", where=f.name, fix=f"it must be at most {high}")


def _has_type_of(default, value) -> bool:
    """Whole numbers, finite numbers, text and tuples of text each take only their own kind; a float takes an int."""
    if isinstance(default, tuple):
        return isinstance(value, tuple) and all(isinstance(part, str) for part in value)
    if isinstance(default, float):
        return isinstance(value, (int, float)) and math.isfinite(value)
    return isinstance(value, type(default))


def replace(settings, **changes):
    """A checked copy with fields changed, found by name at any depth: replace(s, r=64, lr_init=1e-4). A list is taken
    for a tuple.

    Raises SettingsError for a name that no field has (with the nearest right one) or a bad value.
    """
    known = values(settings)
    for name in changes:
        if name not in known:
            raise SettingsError(f"there is no setting {name!r}", where=name,
                                fix=did_you_mean(name, known, f"known: {', '.join(known)}"))
    new = _replaced(settings, {name: tuple(v) if isinstance(v, list) else v for name, v in changes.items()})
    check(new)
    return new


def _replaced(settings, changes: dict):
    new = {}
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        new[f.name] = _replaced(value, changes) if dataclasses.is_dataclass(value) else changes.get(f.name, value)
    return dataclasses.replace(settings, **new)


def to_json(settings) -> str:
    """Nested settings as readable JSON."""
    return json.dumps(dataclasses.asdict(settings), indent=2, ensure_ascii=False)


def from_dict(cls, values: dict):
    """Nested settings from to_json's dict; a key that is not there keeps its default.

    Raises SettingsError for a key that no field has, or where a group of settings is something else.
    """
    if not isinstance(values, dict):
        raise SettingsError(f"{cls.__name__} cannot be made from {values!r}", fix="use {} for the defaults")
    known, made = {f.name: f.default for f in dataclasses.fields(cls)}, {}
    for name, value in values.items():
        if name not in known:
            raise SettingsError(f"unknown setting {name!r}", where=cls.__name__,
                                fix=did_you_mean(name, known, f"known: {', '.join(known)}"))
        if dataclasses.is_dataclass(known[name]):
            value = from_dict(type(known[name]), value)
        elif isinstance(known[name], tuple) and isinstance(value, list):
            value = tuple(value)
        made[name] = value
    return cls(**made)
