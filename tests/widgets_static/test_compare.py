"""Runs are found, summed up and compared."""

import json

import pytest

from rwkv_nb.errors import RunError
from rwkv_nb.widgets.compare import ComparePanel, find_runs, summary, summary_html


def write(folder, losses, step=1):
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"step": i, "loss": loss, "lr": 1e-4, "tokens_per_s": 100.0 * i, "peak_memory_mb": 50.0 + i}
            for i, loss in enumerate(losses, step)]
    with open(folder / "metrics.jsonl", "a") as f:
        f.write("".join(json.dumps(row) + "\n" for row in [*rows, {"step": 1, "event": "pause"}]))


def test_runs_and_what_was_set_aside_are_found(tmp_path):
    for name in ("b", "a", "a/previous-1"):
        write(tmp_path / name, [1.0])
    (tmp_path / "untrained").mkdir()
    found = find_runs(tmp_path)
    assert list(found) == ["a", "a/previous-1", "b"]
    assert found["a/previous-1"].metrics()[0]["loss"] == 1.0
    assert find_runs(tmp_path / "nowhere") == {}


def test_summary(tmp_path):
    write(tmp_path / "a", [4.0] * 10 + [3.0] * 80 + [1.0] * 10)
    assert summary(find_runs(tmp_path)["a"].metrics()) == {
        "steps": 100, "first_loss": 4.0, "last_loss": 1.0, "heldout_loss": None, "tokens_per_s": 5050.0,
        "peak_memory_mb": 150.0}
    evals = [{"step": step, "event": "eval", "heldout_loss": loss} for step, loss in ((0, 4.0), (50, 2.5), (100, 2.6))]
    assert summary([*find_runs(tmp_path)["a"].metrics(), *evals])["heldout_loss"] == 2.5
    with pytest.raises(RunError, match="no step has been written"):
        summary([{"step": 0, "event": "pause"}])
    table = summary_html({"<b>": find_runs(tmp_path)["a"].metrics(), "new": []})
    assert "&lt;b&gt;" in table and "4.0000" in table and "no step yet" in table


def test_panel_follows_the_choice_and_the_disk(tmp_path):
    write(tmp_path / "a", [2.0, 1.0])
    panel = ComparePanel(tmp_path, ["a", "not there"])
    assert list(panel.chosen) == ["a"]
    one = panel._picture.value
    write(tmp_path / "b", [3.0, 2.0, 1.0])
    again = next(w for w in panel.children[0].children[0].children if hasattr(w, "click"))
    again.click()
    assert panel._choice.options == ("a", "b") and list(panel.chosen) == ["a"]
    panel._choice.value = ("a", "b")
    assert "3.0000" in panel._table.value and panel._picture.value != one
    write(tmp_path / "b", [0.5], step=4)
    both = panel._picture.value
    again.click()
    assert "0.5000" in panel._table.value and panel._picture.value != both
    panel._choice.value = ()
    assert panel.chosen == {} and panel._picture.value
