"""The training panel as a person meets it: JupyterLab in Chromium, Run All, a slider, Pause, a reload, Stop."""

import time
from pathlib import Path

import nbformat
import pytest

from rwkv_nb.config import Settings, replace
from rwkv_nb.lora.adapter import load_adapter
from rwkv_nb.runs import Run

pytest.importorskip("playwright")
from lab import SECONDS, browser_page, chromium_path, jupyter_lab, run_all  # noqa: E402

ROOT = Path(__file__).parents[2]
PARAMETERS = "\nSETTINGS |= dict(micro_bsz=4, epoch_steps=100_000, epoch_count=1)"   # Stop ends it


@pytest.fixture
def scratch(tmp_path):
    """notebooks/ without outputs beside data_samples/, and a run as the notebooks before leave it."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "data_samples").symlink_to(ROOT / "data_samples")
    notebook = nbformat.read(ROOT / "notebooks" / "03_train_lora.ipynb", as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            cell.source += PARAMETERS * ("parameters" in cell.metadata.get("tags", []))
    nbformat.write(notebook, tmp_path / "notebooks" / "03_train_lora.ipynb")
    run = Run(tmp_path / "runs" / "quickstart")
    samples = ROOT / "data_samples"
    run.save_settings(replace(Settings(), load_model=str(samples / "tiny_base.pth"),
                              data_file=str(samples / "quickstart_train.jsonl"), ctx_len=160))
    return tmp_path


def until(condition, what):
    """Wait for a truthy value and return it."""
    end = time.monotonic() + SECONDS
    while not (value := condition()):
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.1)
    return value


def events(run, kind):
    return [row for row in run.metrics() if row.get("event") == kind]


def steps(run):
    return sum("loss" in row for row in run.metrics())


@pytest.mark.skipif(not chromium_path(), reason="there is no chromium on this machine (Debian: apt install chromium)")
def test_run_all_slider_pause_reload_stop(scratch):
    run = Run(scratch / "runs" / "quickstart")
    notebook = scratch / "notebooks" / "03_train_lora.ipynb"
    with jupyter_lab(scratch) as address, browser_page() as page:
        def button(name):
            return page.locator("button.jupyter-button", has_text=name)

        run_all(page, address.format(path="notebooks/03_train_lora.ipynb"))
        until(lambda: steps(run) >= 3, "training to begin")

        handle = page.locator(".noUi-handle").first
        handle.scroll_into_view_if_needed()
        for moved in (1, 2):
            box = handle.bounding_box()
            x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
            page.mouse.move(x, y)
            page.mouse.down()
            page.mouse.move(x - 20, y, steps=5)
            page.mouse.up()
            changes = until(lambda moved=moved: events(run, "change")[moved - 1:], "the change in metrics.jsonl")
            assert changes[0]["name"] == "lr_init" and changes[0]["to"] < changes[0]["from"]

        button("Pause").click()
        until(lambda: events(run, "pause"), "the pause in metrics.jsonl")
        button("Resume").wait_for()
        held = steps(run)

        page.keyboard.press("Control+s")
        until(lambda: "widget-view+json" in notebook.read_text(), "the notebook to be saved with its panel")
        page.reload()
        button("Resume").wait_for()
        button("Resume").click()
        until(lambda: steps(run) > held, "training to go on after the reload")

        button("Stop").click()
        page.get_by_text("stopped", exact=True).wait_for()
        until(lambda: (run.folder / "loss.png").exists(), "the cells below the panel to run")
    rows = run.metrics()
    assert [row["event"] for row in rows if row.get("event") in ("change", "pause", "resume")] == \
        ["change", "change", "pause", "resume"]
    assert load_adapter(run.last_adapter()).meta.step == steps(run)
