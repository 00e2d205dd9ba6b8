"""Settings: every field documented and checked, found by name, and the same after a trip through JSON."""

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_nb import config
from rwkv_nb.config import Settings, replace
from rwkv_nb.errors import SettingsError
from rwkv_nb.wkv import OPS

FIELDS = {f.name: f for f in config.leaf_fields(Settings())}


def values(f):
    """A strategy for what a field may hold."""
    rule, kind = f.metadata, type(f.default)
    if rule["choices"]:
        return st.sampled_from(rule["choices"])
    if kind is tuple:
        return st.lists(st.text(max_size=9)).map(tuple)
    if kind is str:
        return st.text(max_size=20)
    if kind is int:
        return st.integers(rule["low"], rule["high"] or 10**9)
    return st.floats(rule["low"], rule["high"], allow_nan=False, allow_infinity=False)


def test_every_setting_says_what_it_is_in_both_languages():
    assert len(FIELDS) == len(config.values(Settings())) > 25     # names are unique at any depth
    for f in FIELDS.values():
        assert f.metadata["en"] and f.metadata["zh"], f.name
    config.check(Settings())


@given(st.fixed_dictionaries({name: values(f) for name, f in FIELDS.items()}))
def test_settings_survive_json(changes):
    settings = replace(Settings(), **changes)
    assert config.from_dict(Settings, json.loads(config.to_json(settings))) == settings
    assert {f: getattr(part, f) for part in (settings.data, settings.lora, settings.train, settings.train.live)
            for f in changes if hasattr(part, f)} == changes


@pytest.mark.parametrize("name", FIELDS)
def test_a_value_outside_bounds_choices_or_type_is_refused_by_name(name):
    rule, kind = FIELDS[name].metadata, type(FIELDS[name].default)
    wrong = [None, b"bytes"] + ([math.nan, math.inf] if kind is float else []) + ([1.5, "3"] if kind is int else [])
    wrong += [rule[side] + step for side, step in (("low", -1), ("high", 1)) if rule[side] is not None]
    wrong += ["atuo"] * bool(rule["choices"]) + [[1], "att.key", (1,)] * (kind is tuple)
    for value in wrong:
        with pytest.raises(SettingsError) as caught:
            replace(Settings(), **{name: value})
        assert caught.value.where == name


def test_a_list_of_words_is_taken():
    assert replace(Settings(), target_modules=["att.key"]) == replace(Settings(), target_modules=("att.key",))


def test_nearest_right_name_and_choice_are_offered():
    with pytest.raises(SettingsError, match="did you mean micro_bsz"):
        replace(Settings(), micro_bzs=2)
    with pytest.raises(SettingsError, match="did you mean binidx"):
        replace(Settings(), data_type="bin_idx")
    with pytest.raises(SettingsError, match="known: data_file"):
        replace(Settings(), qqqqq=1)


def test_every_operator_can_be_chosen():
    assert FIELDS["op"].metadata["choices"] == OPS


def test_settings_cannot_change_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().train.live.lr_init = 1.0


@pytest.mark.parametrize("damaged", [{"lora": {"rank": 3}}, {"lora": 3}, {"train": {"live": []}}, [], {"nothing": 1}])
def test_unknown_groups_in_a_file_are_refused(damaged):
    with pytest.raises(SettingsError):
        config.from_dict(Settings, damaged)
