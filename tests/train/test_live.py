"""What may change while it trains, told and replayed; held-out loss; SIGTERM; versions with the run."""

import importlib.util
import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from training import steps, train, until

from rwkv_nb.config import Settings, from_dict, replace
from rwkv_nb.errors import RunError, SettingsError
from rwkv_nb.lora.adapter import load_adapter
from rwkv_nb.runs import Run
from rwkv_nb.train.session import TrainSession

CHANGES = {"lr_init": 5e-4, "lr_final": 1e-6, "lr_end": 30, "grad_clip": 0.02, "accumulate_grad_batches": 3,
           "lora_dropout": 0.6, "log_every": 1, "save_every": 7, "eval_every": 9, "sample_every": 8}


def changed_run(folder, settings):
    """A run that is held after a few steps, changed in every live setting, and let go."""
    session = TrainSession(Run(folder), replace(settings, epoch_count=5, epoch_steps=8, log_every=2),
                           prompts=["User: red\n\nAssistant:"], max_tokens=2).start()
    until(lambda: session.snapshot().step >= 3)
    session.pause()
    until(lambda: session.snapshot().status == "paused")
    held = session.snapshot().step
    session.change(**CHANGES)
    session.resume()
    return held, session.join()


def test_every_live_setting_acts_within_one_step_and_the_run_can_be_replayed(tmp_path, settings, chats):
    held, end = changed_run(tmp_path / "a", replace(settings, eval_file=str(chats)))
    rows = Run(tmp_path / "a").metrics()
    told = {row["name"]: (row["step"], row["to"]) for row in rows if row.get("event") == "change"}
    assert told == {name: (held, value) for name, value in CHANGES.items()}
    after = [row for row in steps(rows) if row["step"] > held]
    assert [row["step"] for row in after] == list(range(held + 1, end.total_steps + 1))        # log_every
    assert after[0]["tokens"] > 1.5 * max(row["tokens"] for row in steps(rows) if row["step"] <= held)  # accumulation
    assert all(row["lr"] == pytest.approx(1e-6) for row in after if row["step"] >= 30)         # lr_end, lr_final
    saved = {row["step"] for row in rows if row.get("event") == "save" and row["name"] != "adapter-best.safetensors"}
    assert {step for step in range(held + 1, end.total_steps) if step % 7 == 0} <= saved
    assert [row["step"] for row in rows if row.get("event") == "eval"][-1] % 9 == 0
    assert {sample.step for sample in end.samples} >= {step for step in range(held + 1, end.total_steps)
                                                       if step % 8 == 0}
    again = TrainSession.replay(tmp_path / "a").start().join()
    assert steps(again.rows) == steps(end.rows)
    assert Run(tmp_path / "a" / "replay").metrics_file.exists()


def test_a_resumed_run_replays_too(tmp_path, settings):
    session = TrainSession(Run(tmp_path), replace(settings, checkpoint_seconds=0)).start()
    until(lambda: session.snapshot().step >= 4)
    session.change(lora_dropout=0.4)
    session.stop()
    session.join()
    Run(tmp_path).update(lr_init=2e-3)
    whole = train(tmp_path, None)
    assert any(row.get("name") == "lr_init" for row in whole.rows)
    assert steps(TrainSession.replay(tmp_path).start().join().rows) == steps(whole.rows)


def test_nothing_to_replay_is_said(tmp_path):
    with pytest.raises(RunError, match="cannot be replayed"):
        TrainSession.replay(tmp_path)
    Run(tmp_path).started_file.write_text("[]")
    with pytest.raises(RunError, match="cannot be replayed"):
        TrainSession.replay(tmp_path)


def test_what_the_run_was_made_of_is_written_with_it(tmp_path, settings):
    train(tmp_path, replace(settings, epoch_count=1))
    told = json.loads(Run(tmp_path).started_file.read_text())
    assert from_dict(Settings, told["settings"]) == replace(settings, epoch_count=1)
    assert torch.__version__.startswith(told["versions"]["torch"].partition("+")[0])
    assert told["data"]["checksum"] and told["base"]


def test_held_out_loss_keeps_the_best_adapter_warns_and_stops_early(tmp_path, settings):
    """Training on one sentence: what is held out gets better for a while, then worse."""
    data, heldout = tmp_path / "train.jsonl", tmp_path / "heldout.jsonl"
    for path, answers in ((data, "aaaaaaaaaa"), (heldout, "zqxjkvbpyg")):
        path.write_text("".join(json.dumps({"text": f"User: x\n\nAssistant: {a}{a}{a}"}) + "\n" for a in answers))
    end = train(tmp_path / "run", replace(settings, data_file=str(data), eval_file=str(heldout), eval_every=2,
                                          early_stop=3, epoch_count=100, lr_init=3e-2, lora_dropout=0.0))
    evals = [row for row in end.rows if row.get("event") == "eval"]
    losses = [row["heldout_loss"] for row in evals]
    best = losses.index(min(losses))
    assert end.status == "stopped" and len(losses) - 1 - best == 3
    assert evals[0]["step"] == 0
    assert load_adapter(tmp_path / "run" / "adapter-best.safetensors").meta.step == evals[best]["step"]
    assert any("has turned up" in notice for notice in end.notices)
    assert any("stopped early" in notice for notice in end.notices)


def test_sigterm_ends_with_everything_saved(tmp_path, settings):
    run = Run(tmp_path)
    run.save_settings(replace(settings, epoch_count=500, epoch_save=500))
    process = subprocess.Popen([sys.executable, "-m", "rwkv_nb.cli", "train", "--proj_dir", str(tmp_path)],
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    end = time.monotonic() + 120
    while len(run.metrics()) < 3:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "stopped" in said
    saved = torch.load(run.checkpoint_file, weights_only=True)
    assert saved["step"] == run.metrics()[-1]["step"] == load_adapter(run.last_adapter()).meta.step


def test_wandb_gets_the_rows_offline(tmp_path, settings, monkeypatch):
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    end = train(tmp_path / "my run", replace(settings, epoch_count=1, wandb="a project"))
    written, = (tmp_path / "my run" / "wandb").glob("offline-run-*/run-*.wandb")
    told = written.read_bytes()
    for words in ("a project", "my run", "grad_norm", "lora_alpha", *(repr(row["loss"]) for row in steps(end.rows))):
        assert words.encode() in told


def test_wandb_that_is_not_there_is_said(tmp_path, settings):
    if importlib.util.find_spec("wandb"):
        pytest.skip("it is there")
    with pytest.raises(SettingsError, match=r"rwkv_nb\[wandb\]"):
        train(tmp_path, replace(settings, wandb="project"))
