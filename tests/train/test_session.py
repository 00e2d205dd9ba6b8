"""TrainSession as a person uses it: start, change, pause, stop, resume, and what it leaves behind."""

import asyncio
import contextlib
import json
import math
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from training import TIMING, steps, stopped, train, until

from rwkv_nb.config import LiveSettings, replace
from rwkv_nb.errors import RunError, SettingsError, TrainingError
from rwkv_nb.lora.adapter import load_adapter
from rwkv_nb.model import RWKV, Shape, init_weights, load_model, load_weights, save_weights
from rwkv_nb.runs import Run, path_settings
from rwkv_nb.train.before import notices
from rwkv_nb.train.log import Logs
from rwkv_nb.train.loop import Trainer
from rwkv_nb.train.schedule import learning_rate
from rwkv_nb.train.session import TrainSession
from rwkv_nb.train.shrink import Stopped
from rwkv_nb.train.snapshot import Snapshot, Waiting


def test_a_run_leaves_logs_adapters_and_a_merged_model(tmp_path, settings, base):
    end = train(tmp_path, replace(settings, merge=1, epoch_save=2, epoch_count=3), prompts=["User: red"])
    assert end.status == "finished"
    assert end.step == end.total_steps == 3 * 8
    run = Run(tmp_path)
    assert [p.name for p in run.adapters()] == ["adapter-2.safetensors", "adapter-3.safetensors"]
    assert steps(run.metrics()) == steps(end.rows)
    assert {"step", "epoch", "loss", "lr", "grad_norm", "tokens", *TIMING} <= set(end.rows[0])
    log = run.log_file.read_text().splitlines()
    assert log[0].startswith("NEW RUN ")
    assert [line.split()[0] for line in log[-3:]] == ["1", "2", "3"]
    assert len(end.samples) == 2
    assert load_weights(run.merged_file(3)).keys() == load_weights(base).keys()


def test_training_reduces_the_loss_and_leaves_the_base_alone(tmp_path, settings):
    session = TrainSession(Run(tmp_path), replace(settings, epoch_count=12, lr_init=3e-3)).start()
    until(lambda: session.trainer)
    model = session.trainer.model         # the session itself lets go of it at the end
    rows = steps(session.join().rows)
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    before, after = load_model(settings.train.load_model).state_dict(), model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path, settings):
    one, two = (train(tmp_path / name, settings) for name in "ab")
    other = train(tmp_path / "c", replace(settings, random_seed=7))
    assert steps(one.rows) == steps(two.rows) != steps(other.rows)


def test_accumulation_equals_a_larger_batch(tmp_path, settings):
    plain = replace(settings, lora_dropout=0.0)
    whole = train(tmp_path / "whole", plain)
    cut = train(tmp_path / "cut", replace(plain, micro_bsz=1, accumulate_grad_batches=4))
    for a, b in zip(steps(whole.rows), steps(cut.rows), strict=True):
        assert a["tokens"] == b["tokens"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_gradient_checkpointing_changes_nothing(tmp_path, settings):
    off, on = (train(tmp_path / str(cp), replace(settings, grad_cp=cp)) for cp in ("none", 1))
    for a, b in zip(steps(off.rows), steps(on.rows), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_bf16_learns_too(tmp_path, settings):
    fast = replace(settings, epoch_count=6, lr_init=3e-3)
    fp32, bf16 = (steps(train(tmp_path / p, replace(fast, precision=p)).rows) for p in ("fp32", "bf16"))
    assert bf16[-1]["loss"] == pytest.approx(fp32[-1]["loss"], rel=0.05)


def test_changes_pause_and_save_are_recorded_with_their_step(tmp_path, settings):
    session = TrainSession(Run(tmp_path), replace(settings, epoch_count=40)).start()
    until(lambda: session.snapshot().step >= 3)
    session.pause()
    until(lambda: session.snapshot().status == "paused")
    held = session.snapshot().step
    session.change(lr_init=5e-4, grad_clip=0.5)
    session.save_now()
    until(lambda: session.snapshot().files)
    assert session.snapshot().step == held
    assert session.snapshot().files == (f"adapter-step-{held}.safetensors",)
    session.resume()
    until(lambda: session.snapshot().step > held + 12)
    session.stop()
    end = session.join()
    assert end.status == "stopped"
    events = [(row["event"], row["step"]) for row in Run(tmp_path).metrics() if "event" in row]
    assert events[:5] == [("pause", held), ("change", held), ("change", held), ("save", held), ("resume", held)]
    after = next(row for row in end.rows if "loss" in row and row["step"] == held + 1)
    now = replace(settings.train, lr_init=5e-4)
    assert after["lr"] == learning_rate(held, end.total_steps, now)


def test_a_stopped_run_resumes_to_the_same_end(tmp_path, settings):
    whole = train(tmp_path / "whole", settings)
    stopped(tmp_path / "cut", settings, after=5)
    resumed = train(tmp_path / "cut", settings, start="resume")
    assert resumed.status == "finished"
    assert steps(resumed.rows) == steps(whole.rows) == steps(Run(tmp_path / "cut").metrics())
    a, b = (load_adapter(Run(tmp_path / name).last_adapter()).tensors for name in ("whole", "cut"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_finished_run_is_moved_aside_not_overwritten(tmp_path, settings):
    train(tmp_path, replace(settings, epoch_count=1))
    before = Run(tmp_path).metrics_file.read_text()
    end = train(tmp_path, replace(settings, epoch_count=1, r=2))
    assert any("previous-1" in notice for notice in end.notices)
    assert (tmp_path / "previous-1" / "metrics.jsonl").read_text() == before
    assert load_adapter(Run(tmp_path).last_adapter()).meta.r == 2


def test_resume_refuses_other_settings_by_name(tmp_path, settings):
    stopped(tmp_path, settings)
    with pytest.raises(RunError, match="r: 4 → 8"):
        train(tmp_path, replace(settings, r=8), start="resume")


def test_a_run_of_an_older_version_goes_on(tmp_path, settings):
    """Settings that it did not have yet were at their defaults; one that differs from its default is a change."""
    stopped(tmp_path, settings)
    older = torch.load(Run(tmp_path).checkpoint_file, weights_only=True)
    for name in ("spike_factor", "truncated_bptt"):
        del older["settings"]["train"][name]
    torch.save(older, Run(tmp_path).checkpoint_file)
    with pytest.raises(RunError, match="truncated_bptt: 0 → 1"):
        train(tmp_path, replace(settings, truncated_bptt=1, chunk_ctx=8), start="resume")
    assert train(tmp_path, settings, start="resume").status == "finished"


def test_a_run_that_a_nan_stopped_goes_on_with_skip(tmp_path, settings):
    session = TrainSession(Run(tmp_path), replace(settings, checkpoint_seconds=0)).start()
    until(lambda: session.snapshot().step >= 3)
    session.change(lr_init=1e30)
    with pytest.raises(TrainingError):
        session.join()
    end = train(tmp_path, replace(settings, checkpoint_seconds=0, on_spike="skip", lr_init=1e-4), start="resume")
    assert end.status == "finished" and steps(end.rows)[-1]["lr"] < 1e-3


def test_a_second_run_on_the_same_folder_is_refused(tmp_path, settings):
    first = TrainSession(Run(tmp_path), replace(settings, epoch_count=100)).start()
    until(lambda: first.snapshot().step >= 1)
    with pytest.raises(RunError, match="another training run"):
        train(tmp_path, settings)
    first.stop()
    assert first.join().status == "stopped"


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_checkpoint(tmp_path, settings):
    session = TrainSession(Run(tmp_path), replace(settings, epoch_count=50, checkpoint_seconds=0)).start()
    until(lambda: session.snapshot().step >= 3)
    session.change(lr_init=1e30)
    with pytest.raises(TrainingError, match="not a number"):
        session.join()
    assert session.snapshot().status == "failed"
    saved = torch.load(Run(tmp_path).checkpoint_file, weights_only=True)
    assert all(torch.isfinite(t).all() for t in saved["adapter"].values())


def test_a_run_that_began_with_relative_paths_is_found_again(tmp_path, settings, monkeypatch):
    """The shell's flags name files from the folder where they were typed; a notebook opens settings.json elsewhere."""
    monkeypatch.chdir(tmp_path)
    here = {name: os.path.relpath(value) for name, value in path_settings(settings).items()}
    stopped("run", replace(settings, **here))
    assert train(tmp_path / "run", None, start="resume").status == "finished"


@pytest.mark.parametrize("name", ["load_model", "data_file", "mix_file"])
def test_a_file_that_was_moved_is_the_same_file(tmp_path, settings, name):
    settings, run = replace(settings, mix_file=settings.data.data_file), Run(tmp_path / "run")
    stopped(run, settings)
    path = path_settings(settings)[name]
    moved = replace(settings, **{name: str(shutil.copy(path, tmp_path / f"moved{os.path.splitext(path)[1]}"))})
    assert train(run, moved, start="resume").status == "finished"
    assert run.settings() == moved         # whoever opens the run finds it too


@pytest.mark.parametrize("name, said", [
    ("load_model", "load_model: another base"), ("data_file", "data_file, mix_file: other documents")])
def test_another_file_in_its_place_is_another_run(tmp_path, settings, name, said):
    mine = shutil.copy(path_settings(settings)[name], tmp_path)
    settings = replace(settings, **{name: mine})
    stopped(tmp_path / "run", settings)
    if name == "load_model":
        save_weights(mine, init_weights(RWKV(Shape(2, 64, 257, 16, 16, 16, 16, 128)), seed=2).state_dict())
    else:
        Path(mine).write_text(Path(mine).read_text().replace("red", "RED"))
    with pytest.raises(RunError, match=said):
        train(tmp_path / "run", settings, start="resume")
    assert any("previous-1" in notice and said in notice for notice in train(tmp_path / "run", settings).notices)


def test_a_held_out_loss_that_begins_with_nan_still_finds_the_best_adapter(tmp_path, settings, monkeypatch):
    losses = iter([math.nan, math.nan, 2.0, 1.0])
    monkeypatch.setattr(Trainer, "heldout_loss", lambda trainer: next(losses))
    end = train(tmp_path, replace(settings, heldout=0.1))
    assert load_adapter(tmp_path / "adapter-best.safetensors").meta.epoch == 3
    assert not any("turned up" in notice for notice in end.notices)


def test_stop_counts_where_a_pause_and_a_lack_of_memory_meet(tmp_path, settings):
    session = TrainSession(tmp_path, settings, ask=False)
    session._room = SimpleNamespace(smaller=lambda *_, **__: {"grad_cp": "block"})
    session.stop()
    session.pause()

    def run_out_of_memory():
        with contextlib.suppress(Stopped):
            session._take_less("in a test")

    waiting = threading.Thread(target=run_out_of_memory, daemon=True)
    waiting.start()
    waiting.join(20)
    assert not waiting.is_alive()


def test_ctrl_c_in_the_middle_of_a_look_at_the_run_stops_it_too():
    class Interrupted(Waiting):
        stopped = False

        def snapshot(self):
            if not self.stopped:
                raise KeyboardInterrupt
            return SimpleNamespace(done=True)

        def stop(self):
            self.stopped = True

        def result(self):
            return "saved"

    assert Interrupted().join() == "saved"


def test_one_process_alone_cuts_the_logs(tmp_path, settings):
    Run(tmp_path).metrics_file.write_text("written by the first process meanwhile")
    Logs(Run(tmp_path), settings, write=False).cut({"metrics": 0, "train_log": 0})
    assert Run(tmp_path).metrics_file.stat().st_size > 0


@pytest.mark.parametrize("status, stop, paused, told", [
    ("training", False, True, "pausing"), ("paused", False, True, "paused"), ("saving", False, True, "saving"),
    ("paused", True, False, "stopping"), ("stopped", True, True, "stopped"), ("ready", True, True, "ready")])
def test_a_status_says_what_the_session_was_asked_to_become(status, stop, paused, told):
    assert Snapshot(live=LiveSettings(), status=status, stopping=stop, paused=paused).shown == told


def test_wait_leaves_the_event_loop_free(tmp_path, settings):
    async def both():
        ticks = 0
        session = TrainSession(Run(tmp_path), settings).start()
        waiting = asyncio.ensure_future(session.wait())
        while not waiting.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return ticks, await waiting

    ticks, end = asyncio.run(both())
    assert end.status == "finished"
    assert ticks > 5


@pytest.mark.parametrize("changes, said", [
    ({"load_model": ""}, "load_model is not given"), ({"data_file": ""}, "data_file is not given")])
def test_what_is_not_given_is_named(tmp_path, settings, changes, said):
    with pytest.raises(SettingsError, match=said):
        train(tmp_path, replace(settings, **changes))


def test_the_examples_learning_rate_on_a_real_model_is_warned_of(tmp_path, settings):
    wide = tmp_path / "wide.pth"
    save_weights(wide, init_weights(RWKV(Shape(1, 768, 257, 16, 16, 16, 16, 768))).state_dict())
    for base, lr_init, said in ((wide, 2e-3, True), (wide, 1e-4, False), (settings.train.load_model, 2e-3, False)):
        notices_of = notices(Trainer(Run(tmp_path), replace(settings, load_model=str(base), lr_init=lr_init)))
        assert any("lr_init 0.002 is high" in text for text in notices_of) == said


def test_settings_are_written_with_the_run(tmp_path, settings):
    train(tmp_path, replace(settings, epoch_count=1))
    assert json.loads((tmp_path / "settings.json").read_text())["lora"]["r"] == 4
