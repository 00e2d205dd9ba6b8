"""Counting parameters, and the controls of 02."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_nb.config import LoraSettings
from rwkv_nb.model import PUBLISHED, PUBLISHED_OLDER, Shape
from rwkv_nb.runs import Run
from rwkv_nb.widgets.plots import png
from rwkv_nb.widgets.shapes import (
    KINDS,
    KNOWN_TOTALS,
    ShapePanel,
    advice_html,
    attached_params,
    lora_params,
    parts,
    rank_figure,
    share_figure,
    table_html,
)

shapes = st.builds(lambda version, L, H, N, V, F, *r: Shape(L, H * N, V, *r[:4], F, N, r[4], version, r[5]),
                   st.sampled_from(["x070", "x060", "x052"]), st.integers(1, 4), st.integers(1, 3),
                   st.sampled_from([16, 64]), st.integers(2, 300), st.integers(1, 99), *[st.integers(1, 40)] * 4,
                   st.integers(0, 9), st.integers(1, 40))
targets = st.lists(st.sampled_from(["att.receptance", "att.key", "att.output", "key", "ffn.value", "head",
                                    "blocks.0.att.value"]), max_size=4, unique=True).map(tuple)


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(1, 70), targets)
def test_every_parameter_is_in_one_part_and_lora_counts_as_attached(shape, r, names):
    lora = LoraSettings(r=r, target_modules=names)
    rows = parts(shape, lora)
    assert sum(row.params for row in rows) == shape.n_params()
    assert sum(row.tensors for row in rows) == len(shape.key_shapes())
    assert sum(row.lora for row in rows) == lora_params(shape, lora) == attached_params(shape, lora)
    assert {row.kind for row in rows} <= set(KINDS)


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes(size):
    shape, lora = PUBLISHED[size], LoraSettings(r=8)
    assert shape.n_params() == KNOWN_TOTALS.get(size, shape.n_params())
    C = shape.n_embd
    assert attached_params(shape, lora) == lora_params(shape, lora) == shape.n_layer * 8 * (4 * 2 * C + 2 * 5 * C)
    table = table_html(shape, lora)
    assert f"{shape.n_params():,}" in table and f"[{4 * C}, {C}]" in table and "LoRA, r 8" in table


@pytest.mark.parametrize("size", PUBLISHED_OLDER)
def test_older_sizes(size):
    shape, lora = PUBLISHED_OLDER[size], LoraSettings(r=8)
    C, table = shape.n_embd, table_html(PUBLISHED_OLDER[size], lora)
    assert shape.n_params() == KNOWN_TOTALS.get(size, shape.n_params())
    assert attached_params(shape, lora) == lora_params(shape, lora) == shape.n_layer * 8 * (6 * 2 * C + 2 * 4.5 * C)
    assert "blocks/att/gate" in table and "blocks/ffn/receptance" in table and f"{shape.n_params():,}" in table
    assert ("time_maa_w1 w2" in table) == (shape.version == "x060")


@pytest.mark.parametrize("r, alpha, words", [(32, 64, "keep the learning rate"), (8, 32, "2× further: lower"),
                                             (64, 32, "4× less far: raise"), (8, 0, "nowhere")])
def test_advice(r, alpha, words):
    text = advice_html(LoraSettings(r=r, lora_alpha=alpha))
    assert words in text and f"alpha / r = {alpha} / {r} = {alpha / r:g}" in text


def test_figures_are_painted():
    sizes = {"a_very_long_name_of_a_base": Shape(2, 64, 257, 8, 8, 8, 8, 128), **PUBLISHED, **PUBLISHED_OLDER}
    for figure in (share_figure(sizes), rank_figure(sizes, "1.5B", LoraSettings(r=33))):
        assert png(figure).startswith(b"\x89PNG")


def test_moving_r_takes_alpha_along_and_is_written(tmp_path):
    run = Run(tmp_path / "a run")
    panel = ShapePanel(run, PUBLISHED, size="0.1B", r=32, alpha=64)
    assert run.settings().lora == panel.lora == LoraSettings(r=32, lora_alpha=64.0)
    before = panel._picture.value
    panel._r.value = 128
    assert run.settings().lora == LoraSettings(r=128, lora_alpha=256.0)
    panel._alpha.value = 128
    panel._r.value = 64
    assert run.settings().lora == LoraSettings(r=64, lora_alpha=64.0)     # its scale of 1 is kept
    panel._size.value = "13.3B"
    assert "13,269,245,952" in panel._table.value and panel._picture.value != before
    assert "a run/settings.json" in panel._note.value


def test_a_choice_that_cannot_be_written_is_said(tmp_path):
    run = Run(tmp_path)
    panel = ShapePanel(run, PUBLISHED, size="0.1B", r=32, alpha=64)
    run.settings_file.write_text("{")
    panel._r.value = 16
    assert "settings cannot be read" in panel._note.value and run.settings_file.read_text() == "{"
    run.settings_file.write_text(json.dumps({}))
    panel._r.value = 8
    assert "written to" in panel._note.value and run.settings().lora.r == 8
