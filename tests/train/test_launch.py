"""Two processes on this machine: the same run as one, steered from outside, and nothing lost when one dies."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from training import steps, train, until

from rwkv_nb.config import check_together, replace
from rwkv_nb.errors import RunError, SettingsError, TrainingError
from rwkv_nb.lora.adapter import load_adapter
from rwkv_nb.runs import Run, in_use, locked
from rwkv_nb.train import launch
from rwkv_nb.train.launch import LaunchedSession, session_for, torchrun
from rwkv_nb.train.session import TrainSession


@pytest.fixture
def two(settings):
    return replace(settings, devices=2, accelerator="cpu", micro_bsz=2, lora_dropout=0.0, lr_init=3e-3)


def test_two_processes_equal_one_are_steered_and_go_on_as_one(tmp_path, two):
    """One launch for all of it: starting processes is what takes the time."""
    session = session_for(tmp_path / "two", replace(two, epoch_count=6), prompts=["User: red\n\nAssistant:"],
                          max_tokens=2)
    assert isinstance(session, LaunchedSession) and session.snapshot().status == "ready"
    session.start()
    session.pause()
    another = LaunchedSession(session.run).start()
    now = another.snapshot()
    assert now.paused and "at work here already" in now.notices[0]
    until(lambda: session.snapshot().status == "paused")
    assert another.snapshot().status == "paused" and len(processes(session.run, "torch.distributed.run")) == 1
    held = session.snapshot().step
    session.change(lr_init=1e-3)
    session.save_now()
    until(lambda: session.snapshot().files)
    session.resume()
    assert not another.snapshot().paused
    until(lambda: session.snapshot().step >= held + 5)
    another.stop()
    assert session.snapshot().shown == "stopping" or session.snapshot().done
    end = session.join()
    assert end.status == "stopped" and end.samples and any("2 processes" in notice for notice in end.notices)
    assert [row["event"] for row in end.rows if "event" in row][:4] == ["pause", "change", "save", "resume"]
    alone = replace(two, devices=1, micro_bsz=4, epoch_count=6)
    planned = {held: {"lr_init": 1e-3}}
    one = TrainSession(Run(tmp_path / "one"), alone, planned=planned).start().join()
    for a, b in zip(steps(end.rows), steps(one.rows), strict=False):
        assert (a["step"], a["tokens"], a["lr"]) == (b["step"], b["tokens"], b["lr"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    # the checkpoint of two is one's: go on alone, with the same micro-batches in a step
    resumed = train(tmp_path / "two", replace(two, devices=1, epoch_count=6, accumulate_grad_batches=2),
                    start="resume")
    assert resumed.status == "finished"
    mine, theirs = (load_adapter(Run(tmp_path / name).last_adapter()).tensors for name in ("two", "one"))
    for key in mine:
        torch.testing.assert_close(mine[key], theirs[key], rtol=1e-3, atol=1e-5)


def test_a_run_at_work_in_this_process_is_followed(tmp_path, settings):
    """The notebook's cell, run again while it trains, has the same session; after the end a new one."""
    long = replace(settings, epoch_count=2000, epoch_save=2000)
    session = session_for(tmp_path, long).start()
    assert session_for(tmp_path / ".", long).start() is session
    assert session_for(tmp_path / "another", long) is not session
    assert session_for(tmp_path, long, start="fresh") is not session
    session.stop()
    session.join()
    with pytest.raises(RunError, match="has ended"):
        session.start()
    assert session_for(tmp_path, long) is not session


LAUNCH = """
import sys, time
from rwkv_nb.train import launch
from rwkv_nb.train.launch import session_for
session_for(sys.argv[1]).start()
print("started", flush=True)
time.sleep(600)
"""


def test_it_outlives_its_launcher_and_ends_where_a_process_dies_and_the_checkpoint_goes_on(tmp_path, two, monkeypatch):
    long = replace(two, epoch_count=200, epoch_save=200, checkpoint_seconds=0)
    Run(tmp_path).save_settings(long)
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCH, tmp_path], stdout=subprocess.PIPE)
    launcher.stdout.readline()
    launcher.kill()
    launcher.communicate()
    session = session_for(tmp_path).start()
    assert len(processes(tmp_path, "torch.distributed.run")) == 1
    until(lambda: session.snapshot().step >= 3 or session.snapshot().done)
    workers = processes(tmp_path)
    assert len(workers) == 2
    os.kill(max(workers), signal.SIGKILL)
    with pytest.raises(TrainingError):
        session.join()
    until(lambda: not in_use(tmp_path / "launch-0.log"))
    (tmp_path / "status.json").write_text('{"status": "finished"}')     # as of a run whose processes do not end
    with locked(tmp_path / "launch-0.log"), monkeypatch.context() as patient:
        patient.setattr(launch, "LOOKS", 2)
        with pytest.raises(RunError, match="still there"):
            session_for(tmp_path).start()
    saved = torch.load(Run(tmp_path).checkpoint_file, weights_only=True)
    assert saved["step"] >= 2
    resumed = TrainSession(Run(tmp_path), replace(long, devices=1), start="resume").start()
    until(lambda: resumed.snapshot().step > saved["step"])
    resumed.stop()
    resumed.join()
    numbers = [row["step"] for row in steps(Run(tmp_path).metrics())]
    assert numbers == list(range(1, len(numbers) + 1))


def test_two_machines_learn_as_one_and_end_together(tmp_path, two):
    """Each with a folder of its own, as here on one machine; the first one's is steered."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    both = replace(two, devices=1, num_nodes=2, master_addr=address, epoch_count=100, epoch_save=100,
                   checkpoint_seconds=0)
    first, second = (session_for(tmp_path / str(node), replace(both, node_rank=node)) for node in (0, 1))
    second.start()
    first.start()
    until(lambda: first.snapshot().step >= 3 or first.snapshot().done)
    first.change(lr_init=1e-3)
    held = first.snapshot().step
    until(lambda: any(row.get("event") == "change" for row in first.snapshot().rows) or first.snapshot().done)
    until(lambda: first.snapshot().step >= held + 3 or first.snapshot().done)
    worker, = processes(tmp_path / "1")
    os.kill(worker, signal.SIGKILL)
    for session in (first, second):
        with pytest.raises(TrainingError):
            session.join()
    rows, alone = Run(tmp_path / "0").metrics(), replace(two, devices=1, micro_bsz=4, epoch_count=100, epoch_save=100)
    changed = next(row["step"] for row in rows if row.get("event") == "change")
    one = TrainSession(Run(tmp_path / "one"), alone, planned={changed: {"lr_init": 1e-3}}).start()
    until(lambda: one.snapshot().step >= len(steps(rows)))
    one.stop()
    for a, b in zip(steps(rows), steps(one.join().rows), strict=False):
        assert (a["step"], a["tokens"], a["lr"]) == (b["step"], b["tokens"], b["lr"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    assert torch.load(Run(tmp_path / "0").checkpoint_file, weights_only=True)["step"] > held
    assert not Run(tmp_path / "1").metrics()


def test_what_stops_a_process_is_said(tmp_path, two):
    session = session_for(tmp_path, replace(two, data_file=str(tmp_path / "none.jsonl")))
    session.change(lr_init=1e-4)                     # before the start: the run begins with it
    session.start()
    with pytest.raises(TrainingError, match="none.jsonl"):
        session.join()
    assert session.snapshot().live.lr_init == 1e-4


def test_what_keeps_processes_from_starting_leaves_the_session_ready(tmp_path, two):
    session = session_for(tmp_path, replace(two, accelerator="gpu", devices=1000))
    with pytest.raises(SettingsError):
        session.start()
    assert session.snapshot().status == "ready"


def test_a_cell_and_a_panel_read_each_row_once_and_none_of_an_earlier_run(tmp_path, two):
    run, rows = Run(tmp_path), [{"step": step, "loss": 1.0} for step in range(20_000)]
    run.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "status.json").write_text(json.dumps({"status": "preparing"}))
    with locked(tmp_path / "launch-0.log"):   # as a run that is there to be followed
        session = session_for(run, two).start()
        assert session.snapshot().rows == ()
        (tmp_path / "status.json").write_text(json.dumps({"status": "training"}))
        with ThreadPoolExecutor() as threads:
            seen = [future.result().rows for future in [threads.submit(session.snapshot) for _ in range(4)]]
    assert all(list(each) == rows for each in seen)


def test_a_run_of_one_process_is_no_run_to_follow(tmp_path, two):
    with Run(tmp_path).lock(), pytest.raises(TrainingError, match=f"another training run .*process {os.getpid()}"):
        session_for(tmp_path, two).start().join()


def processes(folder, program="rwkv_nb.train.launch"):
    """Numbers of the processes that run this module for a run."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError, ValueError):
            words = open(f"/proc/{pid}/cmdline").read().split("\0")
            if words[words.index("-m") + 1] == program and words[-2].startswith(os.path.join(folder, "launch-")):
                found.append(int(pid))
    return found


def test_machines_meet_where_they_are_told(settings):
    many = replace(settings, num_nodes=2, node_rank=1, devices=4, master_addr="10.0.0.1:29500")
    check_together(many)
    words = torchrun(many.train)
    pairs = dict(zip(words, words[1:], strict=False))
    assert {name: pairs[f"--{name}"] for name in ("nnodes", "node_rank", "master_addr", "master_port",
                                                  "nproc_per_node")} == \
        {"nnodes": "2", "node_rank": "1", "master_addr": "10.0.0.1", "master_port": "29500", "nproc_per_node": "4"}
    for wrong in ({"node_rank": 2}, {"master_addr": ""}, {"master_addr": "10.0.0.1"}, {"master_addr": ":29500"}):
        with pytest.raises(SettingsError):
            check_together(replace(many, **wrong))
