"""kill -9 at any moment, resume, and nobody can tell from losses and logs."""

import os
import random
import subprocess
import sys
import time

import pytest
from training import steps

from rwkv_nb.runs import Run

SECONDS = 240
# Bit for bit holds for one thread count: every process gets the same.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(run, settings):
    flags = {"load_model": settings.train.load_model, "data_file": settings.data.data_file, "proj_dir": run,
             "ctx_len": 64, "r": 4, "lora_alpha": 8.0, "lora_dropout": 0.1, "micro_bsz": 4, "epoch_count": 30,
             "warmup_steps": 2, "lr_init": 1e-3, "merge": 0, "checkpoint_seconds": 0.05}
    return [sys.executable, "-m", "rwkv_nb.cli", "train", *(str(x) for k, v in flags.items() for x in (f"--{k}", v))]


def kill_after(run, settings, rows):
    """Train in another process and kill it without a word once that many rows are written; was it still at work?"""
    process = subprocess.Popen(command(run.folder, settings), stderr=subprocess.PIPE, env=ENVIRONMENT)
    end = time.monotonic() + SECONDS
    while process.poll() is None and len(run.metrics()) < rows:
        assert time.monotonic() < end, process.stderr.read()
        time.sleep(0.005)
    at_work = process.poll() is None
    process.kill()  # SIGKILL
    process.wait()
    process.stderr.close()
    return at_work


def train_in_a_process(run, settings):
    subprocess.run(command(run.folder, settings), check=True, timeout=SECONDS, capture_output=True, env=ENVIRONMENT)


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.soak)])
def test_killed_and_resumed_equals_never_killed(tmp_path, settings, kills):
    whole, run = Run(tmp_path / "whole"), Run(tmp_path / "killed")
    train_in_a_process(whole, settings)
    longest = 2 * len(whole.metrics()) // (kills + 1)
    at_work = [kill_after(run, settings, len(run.metrics()) + random.randint(1, longest)) for _ in range(kills)]
    assert any(at_work)
    train_in_a_process(run, settings)
    assert steps(run.metrics()) == steps(whole.metrics())

    def epochs(log):
        return [line.split()[:4] for line in log.read_text().splitlines() if line[:1].isdigit()]

    assert epochs(run.log_file) == epochs(whole.log_file)
