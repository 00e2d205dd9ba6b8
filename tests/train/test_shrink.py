"""Memory that really runs out: the run offers a smaller setting, frees everything, and ends as it would have."""

import json
import subprocess
import sys

import pytest
from training import steps, train, until

from rwkv_nb.config import replace, to_json
from rwkv_nb.model import RWKV, Shape, init_weights, save_weights
from rwkv_nb.runs import Run
from rwkv_nb.train.session import TrainSession

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
def step(live):
    if session.trainer.step == 2 and room and not ballast:   # memory is filled but for a part of what a step needs
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 2**26, -1))
        try:
            while True:
                ballast.append(torch.empty(2**20))
        except RuntimeError:
            del ballast[-int(room * need / 2**22):]
    return train_step(live)
session._step = step
session.start()
resumed = 0
while not session.snapshot().done:
    time.sleep(0.05)
    if session.paused and session.snapshot().status == "paused" and resumed < 20:
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
from rwkv_nb.memory import next_smaller
from rwkv_nb.model import load_weights, read_shape
from rwkv_nb.runs import Run
from rwkv_nb.train.session import TrainSession
settings = from_dict(Settings, json.load(open(sys.argv[2])))
base = settings.train.load_model
next_smaller(read_shape(load_weights(base)), settings, "weights", gpu=False)   # all that it imports is there
session = TrainSession(Run(sys.argv[1]), settings, max_tokens=2)
built, limits = session._built, resource.getrlimit(resource.RLIMIT_AS)
def build():   # with room for the mapped file
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + int(1.1 * os.path.getsize(base)), limits[1]))
    return built()
session._built = build
session.start()
while not session.paused and not session.snapshot().done:
    time.sleep(0.05)
resource.setrlimit(resource.RLIMIT_AS, limits)
told = session.snapshot().notices
session.resume()
print(json.dumps([session.join().step, told, Run(sys.argv[1]).settings().train.quant]))
"""


def test_a_base_for_which_there_is_no_memory_is_held_in_less(tmp_path, settings):
    path = tmp_path / "base.pth"
    save_weights(path, init_weights(RWKV(Shape(8, 768, 257, 32, 32, 32, 32, 3072)), seed=0).state_dict())
    (tmp_path / "settings").write_text(to_json(replace(settings, load_model=str(path), precision="bf16", epoch_count=1,
                                                       epoch_steps=1)))
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path / "run"), str(tmp_path / "settings")],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    step, told, quant = json.loads(done.stdout)
    assert len(told) == 1 and "ran out while the base was loaded" in told[0] and "go on with quant int8" in told[0]
    assert (step, quant) == (1, "int8")


def test_a_stopped_run_goes_on_with_settings_that_need_less(tmp_path, settings):
    whole, session = train(tmp_path / "whole", settings), TrainSession(Run(tmp_path / "cut"), settings).start()
    until(lambda: session.snapshot().step >= 5)
    session.stop()
    session.join()
    end = train(tmp_path / "cut", replace(settings, grad_cp="block", emb_cpu=1), start="resume")
    losses, expected = ([row["loss"] for row in steps(some.rows)] for some in (end, whole))
    assert losses == pytest.approx(expected, rel=1e-4)
