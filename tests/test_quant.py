"""Frozen matrices in int8 and nf4: what they train is what their dense copy would train, and no dense copy stays."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from rwkv_nb.config import LoraSettings
from rwkv_nb.errors import SettingsError
from rwkv_nb.lora.layers import attach, lora_layers, set_dropout_step
from rwkv_nb.memory import LiveBytes
from rwkv_nb.model import RWKV, Shape, load_model, save_weights
from rwkv_nb.quant import HEAD_ROWS, Held, QuantLinear, bitsandbytes

KINDS = [("int8", False), ("nf4", False), ("nf4", True)]
FARTHEST = {"int8": 0.011, "nf4": 0.11}   # ‖W - dense‖ / ‖W‖ of a normal W


@pytest.mark.parametrize("kind, double", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_comes_back_nearly_as_it_was(kind, double, dtype):
    W = torch.randn(96, 256)
    held = Held(W.to(dtype), kind, dtype=dtype, double=double)
    assert held.dense().dtype == dtype and held.dense().shape == W.shape
    assert 1e-3 < (held.dense() - W).norm() / W.norm() < FARTHEST[kind]
    bytes_each = 1 if kind == "int8" else 0.5 + (1 / 64 if double else 4 / 64)
    assert 0 <= held.nbytes - bytes_each * W.numel() < 1600   # tables, and int8's scales
    if kind == "int8":
        assert torch.equal(held.dense(slice(7, 20)), held.dense()[7:20])


def test_no_row_of_int8_is_longer_or_shorter_than_it_was():
    """A row's scale is rounded to bf16, by up to 0.4 %: before the codes are made, or the row would be off by that."""
    W = torch.randn(96, 4096)
    W[3] = 0
    dense = Held(W, "int8", dtype=torch.bfloat16).dense().float()
    assert torch.equal(dense[3], W[3])
    along = (dense * W).sum(1)[W.any(1)] / W.square().sum(1)[W.any(1)]
    assert (along - 1).square().mean().sqrt() < 6e-4


def twins(kind, double, dtype, p):
    """The same adapter beside a held matrix and beside its dense copy."""
    held = Held(torch.randn(48, 128), kind, dtype=dtype, double=double)
    dense = nn.Linear(128, 48, bias=False, dtype=dtype)
    dense.weight.data.copy_(held.dense())
    nets = [nn.ModuleDict({"key": layer}) for layer in (QuantLinear(held), dense)]
    for net in nets:
        attach(net, LoraSettings(5, 15.0, target_modules=("key",)), seed=0)
        for layer in lora_layers(net).values():
            layer.dropout = p
            nn.init.normal_(layer.lora_B, std=0.3, generator=torch.Generator().manual_seed(1))
        set_dropout_step(net, 1, 2, 3)
    return [net["key"] for net in nets]


@pytest.mark.parametrize("kind, double", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_gradients_equal_the_dense_computation(kind, double, dtype, p):
    x, dy = torch.randn(3, 7, 128, dtype=dtype), torch.randn(3, 7, 48, dtype=dtype)
    results = []
    for layer in twins(kind, double, dtype, p):
        x_ = x.clone().requires_grad_()
        y = layer(x_)
        results.append([y, *torch.autograd.grad(y, [x_, layer.lora_A, layer.lora_B], dy)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("adapter", [True, False])
def test_no_dense_copy_is_kept_for_backward(adapter):
    layer = twins("nf4", True, torch.float32, 0.1)[0] if adapter else QuantLinear(
        Held(torch.randn(48, 128), "int8", dtype=torch.float32))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        y = layer(torch.randn(4, 128, requires_grad=True))
    assert max(saved, default=0) < 48 * 128 // 4
    y.sum().backward()


def test_a_linear_without_an_adapter_passes_its_gradient_on():
    layer, x = QuantLinear(Held(torch.randn(8, 64), "nf4", dtype=torch.float32)), torch.randn(5, 64, requires_grad=True)
    dy = torch.randn(5, 8)
    layer(x).backward(dy)
    torch.testing.assert_close(x.grad, dy @ layer.held.dense())


def test_without_bitsandbytes_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(SettingsError, match=r"bitsandbytes is needed.*\n.*rwkv_nb\[quant\]"):
        Held(torch.randn(8, 64), "nf4", dtype=torch.float32)


def test_a_bitsandbytes_without_a_library_for_this_gpu_is_said_in_short(monkeypatch):
    broken = bitsandbytes().cextension.ErrorHandlerMockBNBNativeLibrary("CUDA binary not found at …")
    monkeypatch.setattr(bitsandbytes().cextension, "lib", broken)
    with pytest.raises(SettingsError, match=r"bitsandbytes [\d.]+ has no library that fits torch.*\n→ pip install -U"):
        Held(torch.randn(8, 64), "nf4", dtype=torch.float32)


@torch.no_grad()
def test_a_large_int8_matrix_is_dense_a_slice_at_a_time():
    layer, x = QuantLinear(Held(torch.randn(2 * HEAD_ROWS + 9, 96), "int8", dtype=torch.float32)), torch.randn(1, 2, 96)
    dense = layer.held.dense()
    with LiveBytes() as live:
        y = layer(x)
    torch.testing.assert_close(y, x @ dense.t())
    assert live.peak < dense.nbytes


# -- whole models ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_model_is_quantised_as_it_is_read(base, kind):
    plain, tokens = load_model(base), torch.randint(1, 257, (2, 9))
    model = load_model(base, quant=kind, quant_head=True, emb_cpu=True)
    for name, module in plain.named_modules():
        twin = model.get_submodule(name)
        if isinstance(module, nn.Linear):
            assert isinstance(twin, QuantLinear) and twin.held.kind == ("int8" if name == "head" else kind)
            module.weight.data.copy_(twin.held.dense())
    torch.testing.assert_close(model(tokens)[0], plain(tokens)[0], rtol=1e-5, atol=1e-5)
    assert not isinstance(load_model(base, quant=kind).head, QuantLinear)
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in model.state_dict().items())


LOAD = """
import sys, threading, time
import torch
from rwkv_nb.model import load_model
from rwkv_nb.quant import Held
def anonymous():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))
torch.set_num_threads(1)
Held(torch.randn(512, 512), sys.argv[2], dtype=torch.bfloat16)  # what bitsandbytes takes for itself
before, seen, done = anonymous(), [0], threading.Event()
def watch():
    while not done.is_set():
        seen.append(anonymous())
        time.sleep(0.001)
watcher = threading.Thread(target=watch)
watcher.start()
model = load_model(sys.argv[1], dtype=torch.bfloat16, quant=sys.argv[2])
done.set()
watcher.join()
print(max(seen) - before, len(seen))
"""


def test_the_whole_model_is_never_in_memory(tmp_path):
    C, F, L = 768, 3072, 12
    with torch.device("meta"):
        model = RWKV(Shape(L, C, 257, 16, 16, 16, 16, F), dtype=torch.bfloat16)
    path, some = tmp_path / "base.pth", torch.randn(C * F).bfloat16()
    save_weights(path, {k: some[:v.numel()].view(v.shape).clone() for k, v in model.state_dict().items()})
    for kind, each in (("int8", 1.0), ("nf4", 0.53)):
        done = subprocess.run([sys.executable, "-c", LOAD, str(path), kind], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        most, samples = map(int, done.stdout.split())
        held = L * (4 * C * C + 2 * C * F) * each
        assert samples > 20
        assert most < held + 60e6 < 0.87 * path.stat().st_size, f"{kind}: {most / 1e6:.0f} MB"
