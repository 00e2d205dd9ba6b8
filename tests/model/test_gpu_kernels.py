"""The GPU's kernels beside WKV, without a GPU: their own source on the CPU against the formulas in float64.

What no machine without a GPU can show is in tests/gpu/.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from host_build import compile_on_host
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rwkv_nb.config import LiveSettings, LoraSettings, TrainSettings
from rwkv_nb.dropout import Dropout
from rwkv_nb.lora.layers import adapter_parameters, attach, set_dropout_step
from rwkv_nb.loss import MAX_LOGIT, head_loss
from rwkv_nb.memory import LiveBytes, _step
from rwkv_nb.model import RWKV, Shape, State
from rwkv_nb.wkv import kernels

B, T, H, N = 2, 7, 3, 64   # the last block of threads is not full
C = H * N
DTYPES = {torch.float32: 5e-7, torch.bfloat16: 3e-3, torch.float16: 4e-4}  # with the one rounding of each result


@pytest.fixture(scope="module", autouse=True)
def operators(tmp_path_factory):
    kernels.load()
    torch.ops.load_library(compile_on_host(tmp_path_factory, "pointwise", "loss"))


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty is filled with NaN, in C++ too, so that a place which a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


def numbers(dtype, *shape, count=1):
    return [torch.randn(shape).to(dtype) for _ in range(count)]


def exact(*tensors):
    return [x.double().requires_grad_() for x in tensors]


def check(dtype, found, expected):
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == dtype and (x.double() - y.view(x.shape)).norm() <= DTYPES[dtype] * y.norm()


def heads(x):
    return x.unflatten(-1, (H, N))


@pytest.mark.parametrize("each", [False, True], ids=["one-mix", "a-mix-a-token"])
@pytest.mark.parametrize("texts", [False, True], ids=["rows", "texts"])
@pytest.mark.parametrize("count", [1, 6])
def test_token_shift(dtype, each, texts, count):
    x, = numbers(dtype, B, T, C)
    last, = numbers(dtype, B, C)
    mixes = numbers(dtype, *((B, T, C) if each else (1, 1, C)), count=count)
    dy = numbers(dtype, B, T, C, count=count)
    starts = torch.rand(B, T) < 0.4
    starts[:, 0] = True
    before = starts if texts else last

    x64, last64, *mixes64 = exact(x, last, *mixes)
    back = torch.cat([last64[:, None], x64[:, :-1]], 1)
    back = back.masked_fill(starts[..., None], 0) if texts else back
    expected = [x64 + (back - x64) * mix for mix in mixes64]
    wanted = [x64, *([] if texts else [last64]), *(mixes64 if each else [])]
    grads = torch.autograd.grad(expected, wanted, [d.double() for d in dy])
    check(dtype, torch.ops.rwkv_nb.shift(x, before, mixes), [y.detach() for y in expected])
    check(dtype, torch.ops.rwkv_nb.shift_backward(x, before, mixes, dy), grads)


@pytest.mark.parametrize("first", [True, False], ids=["block-0", "others"])
def test_before_wkv7(dtype, first):
    inputs = [3 * numbers(dtype, B, T, C)[0], *numbers(dtype, B, T, C, count=3), *numbers(dtype, 1, 1, C, count=2)]
    more = [None, None] if first else numbers(dtype, B, T, C, count=2)
    decay, rate, k, v, k_k, k_a, *mixed = exact(*inputs, *(more[:0] if first else more))
    a, kk = torch.sigmoid(rate), F.normalize(heads(k * k_k), dim=-1).flatten(2)
    value = v if first else torch.lerp(v, mixed[1], torch.sigmoid(mixed[0]))
    expected = [F.logsigmoid(decay) - 0.5, k * (1 + (a - 1) * k_a), value, kk, -kk * a]
    upstream = numbers(dtype, B, T, C, count=5)
    grads = torch.autograd.grad(expected, [decay, rate, k, v, *mixed], [d.double() for d in upstream])
    check(dtype, torch.ops.rwkv_nb.prepare(inputs, *more), [y.detach() for y in expected])
    check(dtype, torch.ops.rwkv_nb.prepare_backward(inputs, *more, upstream), grads)


@pytest.mark.parametrize("version", [7, 6])
def test_behind_wkv(dtype, version):
    (y, gate, *rkv), vectors = numbers(dtype, B, T, C, count=5), numbers(dtype, C, count=3)
    weight, bias, r_k = vectors
    exact_ones = exact(y, gate, *rkv)
    y64, gate64, r, k, v = exact_ones
    normed = F.layer_norm(heads(y64), (N,), eps=64e-5).flatten(2) * weight.double() + bias.double()
    bonus = ((heads(r) * heads(k) * heads(r_k.double())).sum(-1, keepdim=True) * heads(v)).flatten(2)
    expected = (normed + bonus) * gate64 if version == 7 else normed * F.silu(gate64)
    d_out, = numbers(dtype, B, T, C)
    grads = torch.autograd.grad(expected, exact_ones if version == 7 else [y64, gate64], d_out.double())
    call = [y, gate, weight, bias], [*rkv, r_k] if version == 7 else [], 64e-5
    check(dtype, [torch.ops.rwkv_nb.finish(*call)], [expected.detach()])
    check(dtype, torch.ops.rwkv_nb.finish_backward(*call, d_out), grads)


def test_other_heads_and_dtypes_are_refused():
    with pytest.raises(RuntimeError, match="not Double"):
        torch.ops.rwkv_nb.shift(torch.randn(1, 2, 8).double(), torch.randn(1, 8), [torch.randn(8)])
    with pytest.raises(RuntimeError, match="7 mixes"):
        torch.ops.rwkv_nb.shift(torch.randn(1, 2, 8), torch.randn(1, 8), [torch.randn(8)] * 7)


class Called(TorchDispatchMode):
    """Names of this project's operators that really ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "rwkv_nb":
            self.names.append(function._opname)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("version", ["x070", "x060", "x052"])
@pytest.mark.parametrize("rows", ["state", "texts"])
@pytest.mark.parametrize("grad_cp", ["none", "block"])
def test_a_whole_model_is_the_same_with_them(lively, version, rows, grad_cp, monkeypatch):
    """A LoRA model, as if the CPU were a GPU, against itself without the kernels: all that it learns from."""
    model = lively(version)
    attach(model, LoraSettings(r=4), seed=0)
    for p in adapter_parameters(model):
        torch.nn.init.normal_(p, std=0.1)
    tokens, starts = torch.randint(model.shape.vocab_size, (2, 9)), torch.rand(2, 9) < 0.3
    starts[:, 0] = True
    state = State(*(x.normal_().mul_(0.3) for x in model.zero_state(2)))

    def outcome(dtype=torch.float32):
        alike = copy.deepcopy(model).to(dtype)
        mine = State(*(x.to(dtype).requires_grad_() for x in state))
        how, more = ({"starts": starts, "keep_state": False}, ()) if rows == "texts" else ({"state": mine}, mine)
        with Called() as called:
            hidden, after = alike.hidden(tokens, grad_cp=grad_cp, **how)
            outputs = [hidden, *(after or ())]
            sum(x.square().sum() for x in outputs).backward()
        return [*outputs, *(x.grad for x in (*adapter_parameters(alike), *more))], set(called.names)

    (exact, _), (plain, names) = outcome(torch.float64), outcome()
    assert not {"shift", "finish"} & names
    monkeypatch.setattr(kernels, "_loaded", {"cpu"})
    fused, names = outcome()
    there = ("shift", "finish", "prepare") if version == "x070" else ("shift", "finish")
    assert {*there, *(f"{name}_backward" for name in there)} <= names
    for x, y, z in zip(fused, plain, exact, strict=True):  # where a norm divides by little, either is off, by luck
        assert (x - z).norm() <= 10 * (y - z).norm() + 2e-4 * z.norm()


@pytest.mark.parametrize("version", ["x070", "x060", "x052"])
@pytest.mark.parametrize("grad_cp", ["none", "selective", "block"])
def test_they_keep_no_more_for_backward(lively, version, grad_cp, monkeypatch):
    model = lively(version)
    attach(model, LoraSettings(r=4), seed=0)
    tokens = torch.randint(model.shape.vocab_size, (2, 33))

    def kept():
        with LiveBytes() as live:
            hidden, _ = model.hidden(tokens, grad_cp=grad_cp, keep_state=False)
            return live.now

    plain = kept()
    monkeypatch.setattr(kernels, "_loaded", {"cpu"})
    assert kept() <= plain


@pytest.mark.parametrize("shape", [Shape(3, 128, 9, 32, 32, 32, 32, 512),
                                   Shape(3, 128, 9, 32, 0, 0, 0, 448, version="x060", rank_mix=16)])
@pytest.mark.parametrize("grad_cp", ["none", "selective", "block"])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_a_gpus_step_takes_what_was_told(shape, grad_cp, p, monkeypatch):
    """All but WKV, whose CPU's kernels keep no states."""
    B, T, lora = 2, 64, LoraSettings(r=4)
    t = TrainSettings(precision="bf16", grad_cp=grad_cp, micro_bsz=B,
                      live=LiveSettings(accumulate_grad_batches=1, lora_dropout=p))
    told = _step(shape, lora, T, True, t)
    monkeypatch.setattr(kernels, "_loaded", {"cpu"})
    monkeypatch.setattr(Dropout, "draw", lambda *_: None)
    model = RWKV(shape, dtype=torch.bfloat16)
    attach(model.train(), lora, seed=0)
    set_dropout_step(model, 0, 0, 0, p)
    with LiveBytes() as live:
        for parameter in model.parameters():
            live.count(parameter)
        before = live.now
        hidden, _ = model.hidden(torch.zeros(B, T, dtype=torch.long), op="cpu", grad_cp=grad_cp, keep_state=False)
        forward, live.peak = live.now - before, live.now
        hidden.backward(torch.empty_like(hidden))
    states, layers = T // 16 * B * 128 * 64 * 4, shape.n_layer * (grad_cp != "block")
    assert told["forward"] == pytest.approx(forward + states * layers, rel=0.01)
    assert told["backward"] == pytest.approx(live.peak - before + states * (layers or 1), rel=0.01)


def test_what_is_learnt_beside_the_adapter_is_computed_without_them(lively, monkeypatch):
    monkeypatch.setattr(kernels, "_loaded", {"cpu"})
    model = lively()
    with Called() as called:
        model.hidden(torch.randint(model.shape.vocab_size, (1, 5)))[0].sum().backward()
    assert not {"shift", "prepare", "finish"} & set(called.names)
    assert all(p.grad is not None for p in model.blocks[1].att.parameters())


@pytest.mark.parametrize("version", ["x070", "x060"])
def test_torch_compile_is_told_their_shapes(lively, version, monkeypatch):
    """Without numbers, as torch.compile traces."""
    monkeypatch.setattr(kernels, "_loaded", {"cpu"})
    model = lively(version)
    attach(model, LoraSettings(r=4), seed=0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        hidden, _ = model.hidden(torch.zeros(2, 9, dtype=torch.long))
        grads = torch.autograd.grad(hidden.sum(), list(adapter_parameters(model)))
    assert hidden.shape == (2, 9, model.shape.n_embd)
    assert [grad.shape for grad in grads] == [p.shape for p in adapter_parameters(model)]


@pytest.mark.parametrize("dtype, far", [(torch.float32, 1e-6), (torch.bfloat16, 3e-3), (torch.float16, 4e-4)])
@pytest.mark.parametrize("M, V", [(1, 4), (3, 260), (2, 4096), (2, 8196)])  # fewer logits than threads, and more
def test_loss(M, V, dtype, far):
    logits, targets = (6 * torch.randn(M, V)).to(dtype), torch.randint(V, (M,))
    z = logits.double().requires_grad_()
    ce = torch.nn.functional.cross_entropy(z, targets, reduction="none")
    squares = z.max(1).values.square()
    gradient, = torch.autograd.grad((ce + MAX_LOGIT / 2 * squares).sum(), z)
    before = logits.clone()
    for wanted in (False, True):
        sums = torch.ops.rwkv_nb.loss(logits, targets, MAX_LOGIT, wanted)
        torch.testing.assert_close(sums.double(), torch.stack([ce, squares], 1).detach(), rtol=1e-5, atol=1e-5)
        assert wanted or torch.equal(logits, before)
    # A gradient is a share less 1, or a share: what is left of a difference may be small.
    assert (logits.double() - gradient).norm() <= far * gradient.norm().clamp(min=1)


def test_a_loss_that_is_not_a_number_is_not_hidden():
    logits = torch.randn(2, 64)
    logits[1, 7] = torch.nan
    sums = torch.ops.rwkv_nb.loss(logits, torch.tensor([3, 3]), MAX_LOGIT, True)
    assert sums[0].isfinite().all() and not sums[1, 0].isfinite() and logits[1].isnan().all()


@pytest.mark.parametrize("learnt", [False, True], ids=["frozen-head", "learnt-head"])
def test_the_whole_loss_is_the_same_with_it(learnt, monkeypatch):
    """As if the CPU were a GPU."""
    hidden, targets, mask = torch.randn(2, 19, 24), torch.randint(64, (2, 19)), torch.rand(2, 19) < 0.7
    head = torch.nn.Linear(24, 64, bias=False).requires_grad_(learnt)

    def outcome():
        x = hidden.clone().requires_grad_()
        loss, ce = head_loss(x, head, targets, mask, 20, chunk=7)
        return loss, ce, *torch.autograd.grad(loss, [x, *(p for p in head.parameters() if learnt)])

    plain = outcome()
    monkeypatch.setattr(kernels, "_loaded", {"cpu"})
    for got, expected in zip(outcome(), plain, strict=True):
        assert (got - expected).norm() <= 3e-6 * expected.norm()
