"""A run's folder: whole writes, a lock that dies with its process, settings and logs that survive."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_nb import runs
from rwkv_nb.config import Settings, replace
from rwkv_nb.errors import RunError, SettingsError
from rwkv_nb.runs import Run

FULL_DISK = """
import resource, sys
import torch
from safetensors.torch import save_file
from rwkv_nb.errors import InUseError, RunError
from rwkv_nb.model import save_weights
from rwkv_nb.runs import Run, atomic_path, write_text
folder, weights = sys.argv[1], {"w": torch.randn(100_000)}
def save_adapter(path):
    with atomic_path(path) as temporary:
        save_file(weights, temporary)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))      # no file may grow longer: as on a full disk
for name, write in {
    "notes.txt": lambda path: write_text(path, "x" * 60_000),
    "model.pth": lambda path: save_weights(path, weights),
    "adapter.safetensors": save_adapter,
}.items():
    try:
        write(f"{folder}/{name}")
    except RunError as error:
        print(name, "is intact" in str(error))
"""
FULL_FROM_THE_START = """
import resource, sys
from rwkv_nb.errors import RunError
from rwkv_nb.runs import Run
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
try:
    with Run(sys.argv[1]).lock():
        pass
except RunError as error:
    print(error)
"""
HOLD = """
import sys
from pathlib import Path
from rwkv_nb.runs import Run
with Run(sys.argv[1]).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_full_disk_leaves_the_old_file(tmp_path):
    names = ["notes.txt", "model.pth", "adapter.safetensors"]
    for name in names:
        (tmp_path / name).write_text("old")
    out = subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path], capture_output=True, text=True, check=True).stdout
    assert out.splitlines() == [f"{name} True" for name in names]
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(names, "old")


def test_a_run_on_a_full_disk_is_refused(tmp_path):
    said = subprocess.run([sys.executable, "-c", FULL_FROM_THE_START, tmp_path], capture_output=True, text=True).stdout
    assert "cannot be written" in said and "free some disk space" in said


def test_an_error_of_the_writer_itself_passes_through(tmp_path):
    target = tmp_path / "a.txt"
    runs.write_text(target, "old")
    with pytest.raises(ZeroDivisionError), runs.atomic_path(target) as path:
        path.write_text(str(1 / 0))
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"] and target.read_text() == "old"


def test_threads_that_write_one_file_at_once_each_write_it_whole(tmp_path):
    target, together = tmp_path / "a.txt", threading.Barrier(2, timeout=60)

    def write(text):
        with runs.atomic_path(target) as path:
            together.wait()
            path.write_text(text)
            together.wait()

    with ThreadPoolExecutor() as threads:
        for writing in [threads.submit(write, text) for text in ("one", "two")]:
            writing.result()
    assert target.read_text() in ("one", "two") and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="could not write"):
        runs.write_text(tmp_path / "file" / "below.txt", "x")


def test_what_the_disk_cannot_hold_is_refused_before_it_is_written(tmp_path):
    runs.check_disk(1, tmp_path / "not there yet" / "a.pth")
    with pytest.raises(RunError, match="needs 8796093 GB and .* are free"):
        runs.check_disk(8_796_093 * 10**9, tmp_path / "a.pth")


@given(st.text())
def test_text_is_written_as_it_is(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("run") / "a.txt"
    runs.write_text(path, text)
    assert path.read_bytes() == text.encode()


def test_one_run_at_a_time(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(RunError, match=f"process {holder.pid}"), Run(tmp_path).lock():
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with Run(tmp_path).lock():           # the system frees what a dead process held
            assert (tmp_path / ".lock").read_text() == f"process {os.getpid()}\n"
            with pytest.raises(RunError), Run(tmp_path).lock():
                pass
        with Run(tmp_path).lock():
            pass
    finally:
        holder.kill()
        holder.communicate()


def test_a_file_stays_held_by_those_it_was_given_to(tmp_path):
    """As a log by the processes that write to it, where the one that started them is dead."""
    held = tmp_path / "log"
    assert not runs.in_use(held)
    with runs.locked(held) as log:
        reader = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=log)
    assert runs.in_use(held)
    with pytest.raises(match=f"process {os.getpid()}"), runs.locked(held):
        pass
    reader.communicate(b"said")
    assert not runs.in_use(held) and held.read_text().endswith("said")


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "a file").touch()
    run = Run(tmp_path / "a file" / "run")
    with pytest.raises(RunError, match="a file/run: this folder cannot be written"), run.lock():
        pass


def test_what_a_killed_process_had_half_written_goes_with_the_next_run(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    names = {f".rwkv-1.pth.{dead.pid}.tmp", f".merged.pth.{os.getpid()}.tmp", ".a.b.tmp"}
    for name in names:
        (tmp_path / name).touch()
    with Run(tmp_path).lock():
        assert {path.name for path in tmp_path.glob(".*.tmp")} == names - {f".rwkv-1.pth.{dead.pid}.tmp"}


def test_settings_go_from_one_notebook_to_the_next(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run("runs/first")
    assert run.settings() == Settings() and run.name == "first"
    run.update(data_file="data/a.jsonl", ctx_len=77)
    assert run.update(r=8, lora_alpha=16) == replace(Settings(), data_file=str(tmp_path / "data" / "a.jsonl"),
                                                     ctx_len=77, r=8, lora_alpha=16.0)
    run.settings_file.write_text(run.settings_file.read_text(), encoding="utf-8-sig")     # as some editors save it
    monkeypatch.chdir("/")
    assert Run(tmp_path / "runs" / "first").settings().data.data_file == str(tmp_path / "data" / "a.jsonl")


@pytest.mark.parametrize("text", ["", "{", "null", '{"lora": {"rank": 1}}', '{"lora": {"r": "8"}}', "\x00\x00"])
def test_damaged_settings_are_refused_and_kept(tmp_path, text):
    run = Run(tmp_path)
    run.settings_file.write_text(text)
    with pytest.raises(SettingsError, match="settings.json: "):
        run.update(r=4)
    assert run.settings_file.read_text() == text


def test_refused_settings_are_not_written(tmp_path):
    run = Run(tmp_path)
    run.update(r=4)
    with pytest.raises(SettingsError):
        run.update(r=0)
    assert run.settings().lora.r == 4


def test_a_log_cut_off_in_a_line_or_a_letter_is_read_up_to_there(tmp_path):
    run = Run(tmp_path)
    assert run.metrics() == []
    run.metrics_file.write_bytes('{"step": 1}\n{"step": 2, "event": "变'.encode()[:-1])
    assert run.metrics() == [{"step": 1}]


def test_what_an_earlier_run_left_is_set_aside(tmp_path):
    run = Run(tmp_path)
    assert run.set_aside() is None
    run.update(r=4)
    with pytest.raises(RunError, match="no adapter"):
        run.last_adapter()
    for round_ in (1, 2):
        for path in (run.metrics_file, run.adapter_file(1), run.adapter_file("step-7"), run.merged_file(1)):
            path.write_text(str(round_))
        assert {path.name for path in run.adapters()} == {"adapter-1.safetensors", "adapter-step-7.safetensors"}
        aside = run.set_aside()
        assert aside.name == f"previous-{round_}" and (aside / "rwkv-1.pth").read_text() == str(round_)
        assert (aside / "settings.json").exists() and run.settings().lora.r == 4 and not run.adapters()


def test_the_last_adapter_is_the_one_saved_last(tmp_path):
    run = Run(tmp_path)
    for time, name in enumerate((10, 9, "step-3"), start=1):
        run.adapter_file(name).touch()
        os.utime(run.adapter_file(name), ns=(time, time))
    assert [path.stem for path in run.adapters()] == ["adapter-10", "adapter-9", "adapter-step-3"]
    assert run.last_adapter().stem == "adapter-step-3"


def test_a_run_is_a_path(tmp_path):
    assert Run(Run(tmp_path)).folder == Path(Run(tmp_path)) == tmp_path
