"""`rwkv-nb run`: order, visible progress, a failing cell, an earlier run."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from rwkv_nb.errors import RunError
from rwkv_nb.notebook_runner import _sign_of_life, run_notebooks
from rwkv_nb.runs import Run


def write(folder, name, *sources):
    folder.mkdir(exist_ok=True)
    cells = [new_markdown_cell("# Title"), *map(new_code_cell, sources)]
    nbformat.write(new_notebook(cells=cells), folder / name)


def test_notebooks_run_in_order_in_their_folder_with_this_python(tmp_path, capsys):
    write(tmp_path / "notebooks", "00_a.ipynb", "import sys; print(sys.executable)",
          "from ipywidgets import Text; Text()")
    write(tmp_path / "notebooks", "01_b.ipynb", "open('../runs/quickstart/loss.png', 'a').close()")
    assert run_notebooks(tmp_path / "notebooks") == 0
    out = capsys.readouterr().out
    assert out.index("[1/2] 00_a") < out.index("[2/2] 01_b") < out.index("loss.png")
    ran = nbformat.read(tmp_path / "runs/quickstart/notebooks/00_a.ipynb", 4)
    assert ran.cells[1].outputs[0].text.strip() == sys.executable
    assert "widgets" not in ran.metadata


def test_a_failing_cell_stops_the_run_and_is_shown(tmp_path, capsys):
    write(tmp_path / "notebooks", "00_a.ipynb", "print('ran')", "x = 1\nraise ValueError('no such luck')", "x = 2")
    write(tmp_path / "notebooks", "01_b.ipynb", "print('never')")
    assert run_notebooks(tmp_path / "notebooks") == 1
    said = capsys.readouterr()
    assert "code cell 2 of 3" in said.err and "x = 1" in said.err and "ValueError: no such luck" in said.err
    assert "01_b" not in said.out
    kept = nbformat.read(tmp_path / "runs/quickstart/notebooks/00_a.ipynb", 4)
    assert kept.cells[1].outputs[0].text == "ran\n"


def test_a_kernel_that_dies_is_named(tmp_path, capsys):
    write(tmp_path / "notebooks", "00_a.ipynb", "import os; os._exit(1)")
    assert run_notebooks(tmp_path / "notebooks") == 1
    assert "kernel died" in capsys.readouterr().err


def test_a_kernel_that_does_not_start_is_said(tmp_path, capsys, monkeypatch):
    def setup_kernel(client):
        raise RuntimeError("Kernel didn't respond in 60 seconds")

    monkeypatch.setattr("nbclient.NotebookClient.setup_kernel", setup_kernel)
    write(tmp_path / "notebooks", "00_a.ipynb", "1 + 1")
    assert run_notebooks(tmp_path / "notebooks") == 1
    said = capsys.readouterr().err
    assert "its kernel was starting" in said and "didn't respond" in said


def test_a_broken_settings_file_does_not_end_the_progress(tmp_path):
    run = Run(tmp_path)
    run.metrics_file.write_text('{"step": 3, "epoch": 0.5, "loss": 1.0}\n')
    run.settings_file.write_text("{")
    assert _sign_of_life(new_code_cell(outputs=[new_output("stream", text="one\ntwo\n")]), run, 1e9) == "two"


def test_ctrl_c_stops_the_run_and_its_kernel_and_keeps_what_ran(tmp_path):
    write(tmp_path / "notebooks", "00_a.ipynb", "print('ran')",
          "import os, pathlib, time\npathlib.Path('pid').write_text(str(os.getpid()))\ntime.sleep(600)")
    process = subprocess.Popen([sys.executable, "-m", "rwkv_nb.cli", "run", "--notebooks", tmp_path / "notebooks"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    pid = tmp_path / "notebooks" / "pid"
    while not (pid.exists() and pid.read_text()) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1]
    assert process.returncode == 1 and "code cell 2 of 2" in error and "stopped by Ctrl-C" in error
    assert "Traceback" not in error and not Path(f"/proc/{pid.read_text()}").exists()
    kept = nbformat.read(tmp_path / "runs/quickstart/notebooks/00_a.ipynb", 4)
    assert kept.cells[1].outputs[0].text == "ran\n"


def test_an_earlier_run_is_kept_under_its_date(tmp_path, capsys):
    write(tmp_path / "notebooks", "00_a.ipynb", "1 + 1")
    run = Run(tmp_path / "runs" / "quickstart")
    run.folder.mkdir(parents=True)
    (run.folder / "merged.pth").write_text("hours of work")
    assert run_notebooks(tmp_path / "notebooks") == 0
    kept, = tmp_path.glob("runs/quickstart-*")
    assert (kept / "merged.pth").read_text() == "hours of work"
    assert kept.name in capsys.readouterr().out


def test_a_folder_in_use_and_a_folder_without_notebooks_are_refused(tmp_path):
    with pytest.raises(RunError, match="no notebooks"):
        run_notebooks(tmp_path)
    write(tmp_path / "notebooks", "00_a.ipynb", "1 + 1")
    run = Run(tmp_path / "runs" / "quickstart")
    with run.lock(), pytest.raises(RunError, match="another training run"):
        (run.folder / "metrics.jsonl").write_text("")
        run_notebooks(tmp_path / "notebooks")
