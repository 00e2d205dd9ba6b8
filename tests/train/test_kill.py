"""kill -9 at any moment, resume, and nobody can tell from losses and logs."""

import random
import subprocess
import sys
import time

import pytest
from training import steps, train

from rwkv_nb.config import replace
from rwkv_nb.runs import Run
from rwkv_nb.train.checkpoint import load_checkpoint


def kill_after(run, rows):
    """Train in another process and kill it without a word once that many rows are written; was it still at work?"""
    process = subprocess.Popen([sys.executable, "-m", "rwkv_nb.cli", "train", "--proj_dir", run.folder],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(run.metrics()) < rows:
        time.sleep(0.005)
    at_work = process.poll() is None
    process.kill()  # SIGKILL
    process.wait()
    return at_work


@pytest.mark.parametrize("kills, epochs", [(3, 15), pytest.param(50, 30, marks=pytest.mark.soak)])
def test_killed_and_resumed_equals_never_killed(tmp_path, settings, kills, epochs):
    settings = replace(settings, epoch_count=epochs, checkpoint_seconds=0.05)
    whole, run = Run(tmp_path / "whole"), Run(tmp_path / "killed")
    train(whole.folder, settings)
    run.save_settings(settings)
    longest = 2 * len(whole.metrics()) // (kills + 1)
    at_work = [kill_after(run, len(run.metrics()) + random.randint(1, longest)) for _ in range(kills)]
    assert any(at_work)
    saved = load_checkpoint(run)    # it may have ended, or begun once more, a moment before the last kill
    if not (saved and saved.finished):
        train(run.folder, None, start="resume" if saved else "auto")
    assert steps(run.metrics()) == steps(whole.metrics())

    def epochs(log):
        return [line.split()[:4] for line in log.read_text().splitlines() if line[:1].isdigit()]

    assert epochs(run.log_file) == epochs(whole.log_file)
