"""AdamW with smaller averages: near AdamW, and exact in resuming."""

import pytest
import torch
from training import steps, stopped, train

from rwkv_nb.config import TrainSettings, replace
from rwkv_nb.lora.adapter import load_adapter
from rwkv_nb.runs import Run
from rwkv_nb.train.optimizer import make_optimizer

STATES = ("fp32", "bf16", "8bit")


def fit(state, updates=150, lr=0.02):
    """Distance from the goal after so many steps with noisy gradients, from the same start."""
    generator = torch.Generator().manual_seed(0)
    goal, noise = torch.randn(80, 64, generator=generator), torch.randn(updates, 80, 64, generator=generator)
    p = torch.nn.Parameter(torch.zeros(80, 64))
    optimizer = make_optimizer([p], replace(TrainSettings(), adam_state=state, lr_init=lr, weight_decay=0.01))
    for extra in noise:
        p.grad = p.detach() - goal + 0.3 * extra
        optimizer.step()
    return (p - goal).norm().item() / goal.norm().item(), optimizer


def test_small_averages_fit_as_well():
    distance = {state: fit(state)[0] for state in STATES}
    assert distance["fp32"] < 0.2
    assert all(d < 1.1 * distance["fp32"] + 0.01 for d in distance.values()), distance


def test_bytes_of_the_averages():
    for state, each in (("bf16", 4), ("8bit", 2.2)):
        held = sum(t.nbytes for t in fit(state, 2)[1].state_dict()["state"][0].values() if torch.is_tensor(t))
        assert held <= each * 80 * 64 + 2100, state


@pytest.mark.parametrize("state", STATES)
def test_the_first_step_takes_no_more_memory_to_keep(state):
    p = torch.nn.Parameter(torch.zeros(80, 64))
    optimizer = make_optimizer([p], replace(TrainSettings(), adam_state=state))
    before = {name: getattr(value, "data_ptr", int)() for name, value in optimizer.state[p].items()}
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert {name: getattr(value, "data_ptr", int)() for name, value in optimizer.state[p].items()} == before


def test_bf16_averages_move_many_parameters_together_as_adamw_moves_each():
    """Of all sizes, one larger than what is moved at once, one that has no gradient at first and one without any."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2048, 1030), (300, 7), (5,), (), (64, 64), (3, 5), (1000, 1000), (1200, 1000))
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    moved = {}
    for state in ("fp32", "bf16"):
        parameters = [torch.nn.Parameter(p.clone()) for p in start]
        optimizer = make_optimizer(parameters, replace(TrainSettings(), adam_state=state, lr_init=0.1,
                                                       weight_decay=0.1))
        generator.manual_seed(1)
        for step in range(2):
            for i, p in enumerate(parameters):
                grad = torch.randn(p.shape, generator=generator)
                p.grad = None if i == 5 or (i == 4 and step == 0) else grad
            optimizer.step()
            moved[state, step] = [p.detach().clone() for p in parameters]
    for step, most in ((0, 1e-5), (1, 0.02)):    # the first step's averages have not been rounded yet
        for p, expected, at_first in zip(moved["bf16", step], moved["fp32", step], start, strict=True):
            assert (p - expected).norm() <= most * (expected - at_first).norm()
    assert torch.equal(moved["bf16", 1][5], start[5]) and torch.equal(moved["bf16", 0][4], start[4])


def test_an_average_that_moves_less_than_bf16_resolves_still_arrives():
    p = torch.nn.Parameter(torch.zeros(4096))
    optimizer = make_optimizer([p], replace(TrainSettings(), adam_state="bf16", beta2=0.999))
    for _ in range(3000):
        p.grad = torch.ones(4096)
        optimizer.step()
    assert optimizer.state[p]["square"].float().mean() == pytest.approx(1 - 0.999**3000, rel=0.02)


@pytest.mark.parametrize("state", ["bf16", "8bit"])
def test_a_run_resumes_exactly(tmp_path, settings, state):
    asked = replace(settings, adam_state=state, r=64, grad_cp="block", quant="nf4", emb_cpu=1, quant_head=1)
    whole = train(tmp_path / "whole", asked)
    stopped(tmp_path / "cut", asked, after=5)
    assert steps(train(tmp_path / "cut", asked, start="resume").rows) == steps(whole.rows)
    a, b = (load_adapter(Run(tmp_path / name).last_adapter()).tensors for name in ("whole", "cut"))
    assert all(torch.equal(a[key], b[key]) for key in a)
