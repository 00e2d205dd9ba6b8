"""Figures: whatever a run holds, they are painted, quickly read and without a warning."""

import io
import math
import re
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread

from rwkv_nb.widgets import plots
from rwkv_nb.widgets.plots import compare_figure, loss_figure, png


def steps(n, seed=0):
    rng = np.random.default_rng(seed)
    return [{"step": i, "epoch": i / 10, "loss": 2 * 0.99**i + float(rng.random()), "lr": 1e-4, "grad_norm": 1.0,
             "tokens": 9, "tokens_per_s": 1000.0, "peak_memory_mb": 300.0} for i in range(1, n + 1)]


def change(step, name="lr_init", old=2e-4, new=1e-4):
    return {"step": step, "event": "change", "name": name, "from": old, "to": new}


def texts(figure):
    return [t.get_text() for t in (*figure.texts, *figure.axes[0].texts) if t.get_text()]


def picture(figure):
    """Pixels [height, width, RGBA] as painted."""
    return imread(io.BytesIO(png(figure)))


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@settings(max_examples=12, deadline=None)
@given(st.lists(st.one_of(
    st.builds(lambda loss, lr: {"loss": loss, "lr": lr},
              st.floats(-1e30, 1e30) | st.sampled_from([math.nan, math.inf]), st.floats(0, 1)),
    st.builds(lambda name, old, new: change(0, name, old, new), st.sampled_from(["lr_init", "log_every"]),
              st.floats(0, 1) | st.integers(1, 9), st.floats(0, 1)),
    st.builds(lambda loss: {"event": "eval", "heldout_loss": loss}, st.floats(-1e30, 1e30) | st.just(math.nan)),
    st.sampled_from([{"event": "pause"}, {"event": "resume"}, {"event": "save", "name": "adapter-1.safetensors"}]),
), max_size=12), st.text(max_size=12))
def test_any_rows_are_painted(rows, title):
    rows = [{**row, "step": i} for i, row in enumerate(rows)]
    picture_of = png(loss_figure(rows, title=title)), png(compare_figure({title: rows, "other": []}))
    assert all(data.startswith(b"\x89PNG") for data in picture_of)


def test_the_background_is_opaque_and_no_text_is_cut():
    rows = steps(60)
    rows[30:30] = [change(30)] * 3
    for figure in (loss_figure(rows + [change(60, "grad_clip", 1.0, 0.5)], title="快速开始 quickstart"),
                   compare_figure({"快速开始": rows, "other": steps(20)}), loss_figure([])):
        pixels = picture(figure)
        assert (pixels[..., 3] == 1).all()
        edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (edge == 1).all()


@pytest.mark.parametrize("title", ["2 $ for 3 $", "$\\frac{$", "a_b <c>"])
def test_a_title_is_taken_literally(title):
    picture(loss_figure(steps(5), title=title))
    picture(compare_figure({title: steps(5), "_hidden": steps(3)}))


def test_changes_are_labelled_with_both_values():
    rows = steps(100)
    rows[40:40] = [change(40), change(40, new=5e-5), {"step": 40, "event": "pause"}, {"step": 40, "event": "resume"}]
    rows += [change(100, "log_every", 1, 5)]
    assert texts(loss_figure(rows)) == ["lr_init 2e-4 → 5e-5", "paused", "log_every 1 → 5"]


def test_crowded_labels_do_not_overlap_and_none_is_lost():
    rows = steps(300)
    for at in range(50, 90, 4):
        rows.append(change(at))
    figure = loss_figure(rows)
    labels = [t for t in figure.axes[0].texts if t.get_text()]
    picture(figure)
    boxes = [label.get_window_extent() for label in labels]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    more = sum(int(n) for label in labels for n in re.findall(r"\+(\d+)$", label.get_text()))
    assert len(labels) + more == 10


def test_held_out_losses_are_inside_the_picture():
    before, after = ({"step": step, "event": "eval", "heldout_loss": loss} for step, loss in ((0, 9.0), (20, -3.0)))
    rows = [before, *steps(20), after]
    low, high = loss_figure(rows).axes[0].get_ylim()
    assert low < -3 and high > 9


def test_a_long_run_keeps_its_spike_in_few_points():
    rows = steps(50_000)
    rows[33_333]["loss"] = 40.0
    axes = loss_figure(rows).axes[0]
    thin, thick = (line.get_ydata() for line in axes.get_lines()[:2])
    assert len(thin) <= plots._MOST_POINTS and max(thin) == 40.0
    assert axes.get_ylim()[1] < 8              # and it does not press the rest flat
    assert abs(thick[-100:].mean() - 0.5) < 0.1


def test_the_smoothed_line_follows_without_lag():
    n = np.arange(1.0, 1001)
    _, y = plots._smoothed(n, 3 - n / 500, None)
    assert np.abs(y - (3 - n / 500))[100:-100].max() < 1e-9
    assert (plots._smoothed(n, np.ones(1000), 7)[1] == pytest.approx(1))


def test_runs_are_told_apart():
    runs = {f"run {i}": steps(10, i) for i in range(12)}
    lines = compare_figure(runs).axes[1].get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 12
    assert len(compare_figure({}).axes) == 4
