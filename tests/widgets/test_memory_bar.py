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


def shown(bar):
    """Bar and advice, when all is counted."""
    bar.newest.join()
    return bar._bar.value, bar._advice.value


def told(run):
    settings = run.settings()
    return estimate(read_shape(load_weights(settings.train.load_model)), settings, gpu=False).total


def test_it_follows_the_form(run):
    form = SettingsForm(run)
    bar = MemoryBar(form, run, limit=10**9)
    before, advice = shown(bar)
    assert f"{told(run) / 1e9:.2f} GB" in before and "of 1.0 GB free" in before and advice == ""
    form.inputs["ctx_len"].value = 4096
    assert f"{told(run) / 1e9:.2f} GB" in shown(bar)[0] != before


def test_what_does_not_fit_is_said_with_the_cheapest_change(run):
    run.update(grad_cp="block", adam_state="bf16", accumulate_grad_batches=2)    # what comes first is done already
    limit = told(run)
    run.update(accumulate_grad_batches=1)
    form = SettingsForm(run)
    bar = MemoryBar(form, run, limit=limit)
    form.inputs["micro_bsz"].value = 8
    _, advice = shown(bar)
    assert "does not fit" in advice and "<code>micro_bsz 4, accumulate_grad_batches 2</code>" in advice
    bar.apply.click()
    assert told(run) <= limit and shown(bar)[1] == ""
    assert (run.settings().train.micro_bsz, form.inputs["accumulate_grad_batches"].value) == (4, 2)
    assert "smaller base" in shown(MemoryBar(form, run, limit=10**6))[1]


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
    assert f"{told(run) / 1e9:.2f} GB" in shown(bar)[0] and "smaller base" in said[-1][0]
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
    assert "rwkv_nb[quant]" in shown(bar)[0]
    form.inputs["quant"].value = "none"
    assert "GB</b> of" in shown(bar)[0]


def test_settings_beyond_reason_or_against_each_other_are_said_in_a_line_and_can_be_mended(run):
    form = SettingsForm(run)
    bar = MemoryBar(form, run, limit=10**9)
    before = shown(bar)
    form.inputs["ctx_len"].value = 10**12
    error, advice = shown(bar)
    assert "× 1,000,000,000,000 tokens is more than torch can count" in error and advice == ""
    bar.largest.click()
    assert "more than torch can count" in shown(bar)[0] and run.settings().train.micro_bsz == 4
    form.inputs["ctx_len"].value = 64
    assert shown(bar) == before
    form.inputs["truncated_bptt"].value = 1
    assert "set chunk_ctx" in shown(bar)[0]
    form.inputs["micro_bsz"].value = 10**18
    assert run.settings().train.micro_bsz == 65_536


def test_a_base_that_cannot_be_read_is_said(run):
    run.save_settings(replace(run.settings(), load_model="/nowhere.pth"))
    assert "no such file" in shown(MemoryBar(SettingsForm(run), run))[0]


def test_the_table_and_the_figure(run):
    sizes = {"a base": PUBLISHED["0.1B"], "0.1B": PUBLISHED["0.1B"]}
    text = table_html(sizes, presets=("small",))
    assert text.count("<tr") == 3 and ">2.7<" in text and "–" in text
    assert png(memory_figure(sizes, "small", "nf4")).startswith(b"\x89PNG")
