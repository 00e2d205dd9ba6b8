"""Memory that really runs out: the run offers a smaller setting, frees everything, and ends as it would have."""

import json
import subprocess
import sys

import pytest

from rwkv_nb.config import replace, to_json
from rwkv_nb.model import RWKV, Shape, init_weights, save_weights
from rwkv_nb.runs import Run

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
