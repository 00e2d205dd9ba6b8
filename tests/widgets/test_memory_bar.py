"""The bar follows the form, says what would fit, and its buttons write the run's settings."""

import sys
import threading

import pytest

from rwkv_nb.config import PRESETS, Settings, replace, values
from rwkv_nb.memory import _tracing, estimate
from rwkv_nb.model import PUBLISHED, read_shape
from rwkv_nb.model.checkpoint import load_weights
from rwkv_nb.runs import Run
from rwkv_nb.widgets.memory import MemoryBar, memory_figure, table_html
from rwkv_nb.widgets.panel_form import SettingsForm
from rwkv_nb.widgets.plots import png


@pytest.fixture
def run(tmp_path, base):
    run = Run(tmp_path)
    run.save_settings(replace(Settings(), load_model=str(base), accelerator="cpu", ctx_len=64, micro_bsz=4,
                              precision="bf16"))
    return run


def told(run):
    settings = run.settings()
    return estimate(read_shape(load_weights(settings.train.load_model)), settings, gpu=False).total


def test_it_follows_the_form(run):
    form = SettingsForm(run)
    bar = MemoryBar(form, run, limit=10**9)
    assert bar._advice.value == "counting …"
    bar.newest.join()
    before = bar._bar.value
    assert f"{told(run) / 1e9:.2f} GB" in before and "of 1.0 GB free" in before and bar._advice.value == ""
    form.inputs["ctx_len"].value = 4096
    bar.newest.join()
    assert bar._bar.value != before and f"{told(run) / 1e9:.2f} GB" in bar._bar.value


def test_what_does_not_fit_is_said_with_the_cheapest_change(run):
    run.update(grad_cp="block", adam_state="bf16", accumulate_grad_batches=2)    # what comes first is done already
    limit = told(run)
    run.update(accumulate_grad_batches=1)
    form = SettingsForm(run)
    bar = MemoryBar(form, run, limit=limit)
    form.inputs["micro_bsz"].value = 8
    bar.newest.join()
    assert "does not fit" in bar._advice.value
    assert "<code>micro_bsz 4, accumulate_grad_batches 2</code>" in bar._advice.value
    bar.apply.click()
    bar.newest.join()
    assert told(run) <= limit and bar._advice.value == ""
    assert (run.settings().train.micro_bsz, form.inputs["accumulate_grad_batches"].value) == (4, 2)
    bar = MemoryBar(form, run, limit=10**6)
    bar.newest.join()
    assert "smaller base" in bar._advice.value


def test_a_change_during_a_search_is_answered_for_the_newest_settings(run):
    form, said, searching = SettingsForm(run), [], threading.Event()

    def follow(change):
        said.append((change.new, threading.current_thread()))
        if "looking for" in change.new and not searching.is_set():
            _tracing.acquire()                       # the search stands still at its first estimate
            searching.set()

    with _tracing:
        bar = MemoryBar(form, run, limit=10**6)
        bar._advice.observe(follow, "value")
    searching.wait()
    first = bar.newest.thread
    form.inputs["ctx_len"].value = 4096              # waits for nothing
    assert first.is_alive() and said[-1] == ("counting …", threading.current_thread())
    said.clear()
    _tracing.release()
    bar.newest.join()
    assert f"{told(run) / 1e9:.2f} GB" in bar._bar.value and "smaller base" in said[-1][0]
    assert {thread for _, thread in said} == {bar.newest.thread} != {first}
    with _tracing:
        bar.largest.click()
        form.inputs["micro_bsz"].value = 3           # by hand, meanwhile: it stays
    bar.newest.join()
    assert run.settings().train.micro_bsz == form.inputs["micro_bsz"].value == 3


def test_the_largest_micro_bsz_and_the_presets_are_set(run):
    form, limit = SettingsForm(run), told(run) + 20_000_000
    bar = MemoryBar(form, run, limit=limit)
    bar.largest.click()
    bar.newest.join()
    found = run.settings().train.micro_bsz
    assert found == form.inputs["micro_bsz"].value > 4 and told(run) <= limit
    form.inputs["micro_bsz"].value = found + 1
    assert told(run) > limit
    for name in ("small", "fast", "small"):    # also back, and once more after a change by hand
        bar.presets[name].click()
        assert PRESETS[name].items() <= values(run.settings()).items()
        form.inputs["grad_cp"].value = "selective"


def test_what_cannot_be_quantised_here_is_said(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    form = SettingsForm(run)
    bar = MemoryBar(form, run)
    form.inputs["quant"].value = "nf4"
    bar.newest.join()
    assert "rwkv_nb[quant]" in bar._bar.value
    form.inputs["quant"].value = "none"
    bar.newest.join()
    assert "GB</b> of" in bar._bar.value


def test_settings_beyond_reason_or_against_each_other_are_said_in_a_line_and_can_be_mended(run):
    form = SettingsForm(run)
    bar = MemoryBar(form, run, limit=10**9)
    bar.newest.join()
    before = bar._bar.value
    form.inputs["ctx_len"].value = 10**12
    bar.newest.join()
    assert "× 1,000,000,000,000 tokens is more than torch can count" in bar._bar.value and bar._advice.value == ""
    bar.largest.click()
    bar.newest.join()
    assert "more than torch can count" in bar._bar.value and run.settings().train.micro_bsz == 4
    form.inputs["ctx_len"].value = 64
    bar.newest.join()
    assert bar._bar.value == before
    form.inputs["truncated_bptt"].value = 1
    bar.newest.join()
    assert "set chunk_ctx" in bar._bar.value
    form.inputs["micro_bsz"].value = 10**18
    assert run.settings().train.micro_bsz == 65_536


def test_a_base_that_cannot_be_read_is_said(run):
    run.save_settings(replace(run.settings(), load_model="/nowhere.pth"))
    bar = MemoryBar(SettingsForm(run), run)
    bar.newest.join()
    assert "no such file" in bar._bar.value


def test_the_table_and_the_figure(run):
    sizes = {"a base": PUBLISHED["0.1B"], "0.1B": PUBLISHED["0.1B"]}
    text = table_html(sizes, presets=("small",))
    assert text.count("<tr") == 3 and ">2.7<" in text and "–" in text
    assert png(memory_figure(sizes, "small", "nf4")).startswith(b"\x89PNG")
