"""Memory that really runs out: the run offers a smaller setting, frees everything, and ends as it would have."""

import contextlib
import json
import subprocess
import sys
import weakref

import pytest
import torch
from training import steps, stopped, train, until

from rwkv_nb.config import replace, to_json
from rwkv_nb.errors import SettingsError, TrainingError
from rwkv_nb.model import RWKV, Shape, init_weights, save_weights
from rwkv_nb.runs import Run
from rwkv_nb.train.checkpoint import differences, load_checkpoint
from rwkv_nb.train.loop import Trainer
from rwkv_nb.train.ranks import Ranks
from rwkv_nb.train.session import TrainSession
from rwkv_nb.train.shrink import Room

SCRIPT = """
import json, resource, sys, time
import torch
from rwkv_nb.config import Settings, from_dict
from rwkv_nb.memory import estimate
from rwkv_nb.model import load_weights, read_shape
from rwkv_nb.runs import Run
from rwkv_nb.train.session import TrainSession
torch.set_num_threads(1)
settings, room = from_dict(Settings, json.load(open(sys.argv[2]))), float(sys.argv[3])
shape = read_shape(load_weights(settings.train.load_model))
need = estimate(shape, settings, gpu=False).allocated
session = TrainSession(Run(sys.argv[1]), settings, ask=room > 0)
train_step = session._step
ballast = []
def step(orders):
    if session.trainer.step == 2 and room and not ballast:   # memory is filled but for a part of what a step needs
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 2**26, -1))
        try:
            while True:
                ballast.append(torch.empty(2**20))
        except RuntimeError:
            del ballast[-int(room * need / 2**22):]
    return train_step(orders)
session._step = step
session.start()
resumed = 0
while not session.snapshot().done:
    time.sleep(0.05)
    now = session.snapshot()
    if now.paused and now.status == "paused" and resumed < 20:
        resumed += 1
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        resource.setrlimit(resource.RLIMIT_AS, (limit + 2**27, -1))   # what tensors leave is not free for a mapped file
        session.resume()
end = session.result()
print(json.dumps([resumed, end.notices, session.settings.train.grad_cp, session.settings.train.micro_bsz]))
"""


@pytest.fixture
def roomy(tmp_path, settings):
    """Settings of a run whose steps need some 700 MB."""
    path = tmp_path / "base.pth"
    save_weights(path, init_weights(RWKV(Shape(6, 256, 257, 32, 32, 32, 32, 1024)), seed=0).state_dict())
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": c * 511}) + "\n" for c in "abcdefgh" * 4))
    return replace(settings, load_model=str(path), data_file=str(tmp_path / "data.jsonl"), template="plain",
                   ctx_len=512, micro_bsz=8, epoch_count=1, lora_dropout=0.0)


def run_with(tmp_path, settings, name, room):
    (tmp_path / "settings").write_text(to_json(settings))
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / name), str(tmp_path / "settings"), str(room)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout), Run(tmp_path / name).metrics()


def test_a_run_out_of_memory_goes_on_from_its_last_step(tmp_path, roomy):
    _, whole = run_with(tmp_path, roomy, "whole", 0)
    (resumed, notices, *ends), rows = run_with(tmp_path, roomy, "cut", 0.25)
    offers = [row for row in rows if row.get("event") == "out of memory"]
    assert resumed == len(offers) >= 1 and ends != ["none", 8]
    assert offers[0]["step"] == 2 and offers[0]["offer"] == {"grad_cp": "selective"}
    told = "memory ran out in step 3. Nothing is lost: resume to go on with grad_cp selective"
    assert any(told in notice for notice in notices)
    losses, expected = ([row["loss"] for row in some if "loss" in row] for some in (rows, whole))
    assert losses == pytest.approx(expected, rel=1e-4)
    assert Run(tmp_path / "cut").settings().train.grad_cp == ends[0]


LOAD = """
import json, os, resource, sys, time
import torch
torch.set_num_threads(1)   # no thread has to start where no memory is left: libgomp ends the process then
from rwkv_nb.config import Settings, from_dict
from rwkv_nb.fit import next_smaller
from rwkv_nb.model import load_weights, read_shape
from rwkv_nb.runs import Run
from rwkv_nb.train.session import TrainSession
settings = from_dict(Settings, json.load(open(sys.argv[2])))
base = settings.train.load_model
next_smaller(read_shape(load_weights(base)), settings, loading=True, gpu=False)   # all that it imports is there
session = TrainSession(Run(sys.argv[1]), settings, max_tokens=2)
built, limits = session._build, resource.getrlimit(resource.RLIMIT_AS)
def build():   # with room for the mapped file
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + int(1.1 * os.path.getsize(base)), limits[1]))
    built()
session._build = build
session.start()
while not session.snapshot().paused and not session.snapshot().done:
    time.sleep(0.05)
resource.setrlimit(resource.RLIMIT_AS, limits)
told = session.snapshot().notices
getattr(session, sys.argv[3])()
end = session.join()
print(json.dumps([end.status, end.step, told, Run(sys.argv[1]).settings().train.quant]))
"""


@pytest.fixture(scope="module")
def large_base(tmp_path_factory):
    path = tmp_path_factory.mktemp("large") / "base.pth"
    save_weights(path, init_weights(RWKV(Shape(8, 768, 257, 32, 32, 32, 32, 3072)), seed=0).state_dict())
    return path


@pytest.mark.parametrize("answer, outcome", [("resume", ["finished", 1, "int8"]), ("stop", ["stopped", 0, "none"])])
def test_a_base_for_which_there_is_no_memory_is_held_in_less(tmp_path, settings, large_base, answer, outcome):
    (tmp_path / "settings").write_text(to_json(replace(settings, load_model=str(large_base), precision="bf16",
                                                       epoch_count=1, epoch_steps=1)))
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path / "run"), str(tmp_path / "settings"), answer],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    status, step, told, quant = json.loads(done.stdout)
    assert len(told) == 1 and "ran out while the base was loaded" in told[0] and "go on with quant int8" in told[0]
    assert [status, step, quant] == outcome


# Below, a hook of torch's own raises what an allocator raises, at a moment that is chosen.

def held(folder, settings, **options):
    """A session that is held before its first step."""
    session = TrainSession(Run(folder), settings, **options)
    session.pause()
    session.start()
    until(lambda: session.snapshot().status in ("paused", "failed"))
    return session


def no_room_for(session, rows):
    """From now on a block of the model that is there finds no memory for so many rows."""
    def check(block, args):
        if len(args[0]) >= rows:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    session.trainer.model.blocks[-1].register_forward_pre_hook(check)


def offered(session):
    """Wait until memory has run out; what is said then."""
    session.resume()
    until(lambda: session.snapshot().paused or session.snapshot().done)
    until(lambda: session.snapshot().status != "training")
    return session.snapshot().notices[-1]


@pytest.mark.parametrize("adam_state", ["fp32", "bf16", "8bit"])
def test_a_run_out_of_memory_while_its_adapter_changes_goes_back_to_the_checkpoint(tmp_path, settings, adam_state):
    asked = replace(settings, adam_state=adam_state, r=64, lora_dropout=0.0, epoch_count=1)
    whole, session, calls = train(tmp_path / "whole", asked), held(tmp_path / "cut", asked), []

    def fail(*_):
        calls.append(1)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    session.trainer.optimizer.adamw.register_step_post_hook(fail)      # the fourth step has moved the adapter
    told = offered(session)
    assert "memory ran out in step 4. The run goes back 3 steps, to its checkpoint: resume to go on with" in told
    session.resume()
    end = session.join()
    losses, expected = ([row["loss"] for row in steps(some.rows)] for some in (end, whole))
    assert losses == pytest.approx(expected, rel=1e-4)
    assert steps(end.rows) == steps(Run(tmp_path / "cut").metrics())


def test_what_was_changed_live_stays_and_each_step_is_as_large(tmp_path, settings):
    """micro_bsz 4 and accumulate 4, which the run did not begin with: still 16 documents a step."""
    asked = replace(settings, grad_cp="block", lora_dropout=0.0, epoch_count=8)
    changes = {1: {"accumulate_grad_batches": 4}}
    whole = train(tmp_path / "whole", asked, planned=changes)
    session = held(tmp_path / "cut", asked, planned=changes)
    session.trainer.update = one_step_more(session, lambda: no_room_for(session, 4))
    assert "Nothing is lost: resume to go on with micro_bsz 2, accumulate_grad_batches 8" in offered(session)
    Run(tmp_path / "cut").update(lr_final=1e-7)                        # in the form, meanwhile
    session.resume()
    end = session.join()
    for a, b in zip(steps(end.rows), steps(whole.rows), strict=True):
        assert a["tokens"] == b["tokens"] and a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    now = Run(tmp_path / "cut").settings().train
    assert (now.micro_bsz, now.live.accumulate_grad_batches, now.live.lr_final) == (2, 8, 1e-7)
    again = TrainSession.replay(tmp_path / "cut").start().join()       # whose memory lasts
    assert [row["tokens"] for row in steps(again.rows)] == [row["tokens"] for row in steps(end.rows)]


def one_step_more(session, then):
    """The trainer's update, after the second of which something happens."""
    update = session.trainer.update

    def updated(gradients):
        row = update(gradients)
        if row["step"] == 2:
            then()
        return row
    return updated


def test_what_is_on_the_disk_has_the_setting_that_was_taken(tmp_path, settings):
    asked = replace(settings, precision="bf16", grad_cp="block", micro_bsz=1, quant_head=1, epoch_count=100,
                    epoch_save=100)
    session = held(tmp_path, asked)
    no_room_for(session, 1)
    assert "quant int8" in offered(session)
    session.resume()
    until(lambda: session.snapshot().step >= 2)
    assert not differences(load_checkpoint(Run(tmp_path)), Run(tmp_path).settings())
    assert any("merging goes into the original base" in notice for notice in session.snapshot().notices)
    session.stop()
    session.join()


def test_stop_where_memory_has_run_out_takes_nothing(tmp_path, settings):
    asked = replace(settings, lora_dropout=0.0, epoch_count=1)
    whole, session = train(tmp_path / "whole", asked), held(tmp_path / "cut", asked)
    session.trainer.update = one_step_more(session, lambda: no_room_for(session, 4))
    assert "resume to go on with" in offered(session)
    before = Run(tmp_path / "cut").settings_file.read_text()
    session.stop()
    end = session.join()
    assert (end.status, end.step) == ("stopped", 2) and session.settings == asked
    assert Run(tmp_path / "cut").settings_file.read_text() == before
    assert steps(train(tmp_path / "cut", asked, start="resume").rows) == steps(whole.rows)


def test_nothing_of_the_model_is_left_when_a_session_is_done(tmp_path, settings):
    def wrong(*_):
        raise ValueError("of the model")

    models = {}
    for status, answer in (("finished", lambda session: None), ("stopped", lambda session: session.stop()),
                           ("failed", lambda session: session.trainer.model.blocks[1].register_forward_hook(wrong)),
                           ("stopped", lambda session: no_room_for(session, 4))):
        session = held(tmp_path / str(len(models)), replace(settings, epoch_count=1))
        models[session] = weakref.ref(session.trainer.model)
        answer(session)
        offered(session)
        session.stop()
        with contextlib.suppress(ValueError):
            session.join()
        end = session.snapshot()
        assert end.status == status and end.total_steps == 8 and end.epochs == end.step / 8
    assert [model() for model in models.values()] == [None] * 4


def test_several_processes_are_told_what_to_change(tmp_path, settings):
    class Two(Ranks):
        size = 2

    def full():
        raise MemoryError

    session = TrainSession(Run(tmp_path), settings, ranks=Two())
    session._room = Room(settings)
    with pytest.raises(TrainingError, match="memory ran out in process 0.*\n→ start again with grad_cp selective"):
        session._attempt(full)


@pytest.mark.parametrize("changes, accumulate, told", [
    ({"grad_cp": "block", "emb_cpu": 1}, 1, None),
    ({"micro_bsz": 2}, 2,
     "2 documents are worked on at once now, 4 before: accumulate_grad_batches 2 keeps each step as large"),
    ({"chunk_ctx": 16, "micro_bsz": 1, "accumulate_grad_batches": 4}, 4, None),
])
def test_a_stopped_run_goes_on_with_settings_that_need_less(tmp_path, settings, changes, accumulate, told):
    settings = replace(settings, lora_dropout=0.0)
    whole = train(tmp_path / "whole", settings)
    stopped(tmp_path / "cut", settings, after=5)
    end = train(tmp_path / "cut", replace(settings, **changes))
    losses, expected = ([row["loss"] for row in steps(some.rows)] for some in (end, whole))
    assert losses == pytest.approx(expected, rel=1e-4)
    assert end.live.accumulate_grad_batches == accumulate
    assert (told in end.notices) if told else not any("keeps each step" in notice for notice in end.notices)


def test_a_run_of_two_devices_goes_on_with_one_in_steps_as_large(tmp_path, settings):
    stopped(tmp_path, settings)
    saved = torch.load(Run(tmp_path).checkpoint_file, weights_only=True)
    saved["settings"]["train"] |= {"devices": 2, "micro_bsz": 2}
    torch.save(saved, Run(tmp_path).checkpoint_file)
    end = train(tmp_path, replace(settings, micro_bsz=2), start="resume")
    assert end.live.accumulate_grad_batches == 2 and end.total_steps == 3 * 8


def test_settings_that_contradict_each_other_are_refused_wherever_they_come_from(tmp_path, settings):
    with pytest.raises(SettingsError, match="packed documents are not cut into chunks"):
        Trainer(Run(tmp_path), replace(settings, dataload="pack", chunk_ctx=16))
