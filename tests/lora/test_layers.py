"""The adapter beside a frozen linear: equal to Hugging Face peft, replayable dropout, nothing frozen ever moves."""

import copy

import pytest
import torch
import torch.nn.functional as F
from lora_files import LORA, make_adapter
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from rwkv_nb.config import LoraSettings
from rwkv_nb.errors import SettingsError
from rwkv_nb.lora.layers import (
    adapter_parameters,
    attach,
    lora_layers,
    set_dropout_step,
    set_strength,
    strength,
)
from rwkv_nb.model import RWKV, Shape, load_model


class Net(nn.Module):
    """Linears under a checkpoint's names."""

    def __init__(self):
        super().__init__()
        self.att = nn.ModuleDict({"key": nn.Linear(24, 40, bias=False)})
        self.ffn = nn.ModuleDict({"key": nn.Linear(40, 48, bias=False),
                                  "value": nn.Linear(48, 16, bias=False)})

    def forward(self, x):
        return self.ffn["value"](torch.relu(self.ffn["key"](torch.tanh(self.att["key"](x)))))


def adapted(net, p=0.0, r=5, targets=("att.key", "ffn.value")):
    """net with an adapter whose both halves are random."""
    attach(net, LoraSettings(r, 15.0, target_modules=targets), seed=1)
    set_dropout_step(net, 1, 0, 0, p)
    for layer in lora_layers(net).values():
        nn.init.normal_(layer.lora_B, std=0.3)
    return net


def gradients(net, x, dy):
    for tensor in (x, *net.parameters()):
        tensor.grad = None
    net(x).backward(dy)
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None} | {"x": x.grad.clone()}


def test_forward_gradients_and_a_step_equal_peft():
    import peft  # it takes seconds: only the process that needs it waits for it

    ours = Net()
    theirs = peft.get_peft_model(copy.deepcopy(ours), peft.LoraConfig(
        r=5, lora_alpha=15, lora_dropout=0.0, target_modules=["att.key", "ffn.value"], init_lora_weights=False))
    adapted(ours)
    layers = lora_layers(ours)
    for name, layer in layers.items():
        twin = theirs.base_model.model.get_submodule(name)
        layer.lora_A.data.copy_(twin.lora_A["default"].weight)
        layer.lora_B.data.copy_(twin.lora_B["default"].weight)
    x, dy = torch.randn(3, 7, 24, requires_grad=True), torch.randn(3, 7, 16)
    torch.testing.assert_close(ours(x), theirs(x))

    def by_our_name(name):
        return name.removeprefix("base_model.model.").removesuffix(".default.weight")

    mine = gradients(ours, x, dy)
    for name, gradient in gradients(theirs, x, dy).items():
        torch.testing.assert_close(mine.pop(by_our_name(name)), gradient)
    assert not mine
    gradients(ours, x, dy)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    for parameters in (list(adapter_parameters(ours)), trained):
        torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1).step()
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(ours.get_parameter(by_our_name(name)), parameter)


def test_starts_at_the_base_with_pefts_initial_values():
    net = Net()
    x = torch.randn(4, 24)
    before = net(x)
    attach(net, LoraSettings(r=16, target_modules=("att.key", "ffn.key")), seed=3)
    assert torch.equal(net.eval()(x), before)
    for layer in lora_layers(net).values():
        bound = layer.in_features**-0.5  # kaiming_uniform with a = √5
        assert layer.lora_A.abs().max() <= bound and abs(layer.lora_A.std() / bound - 3**-0.5) < 0.1
    again = Net()
    attach(again, LoraSettings(r=16, target_modules=("att.key", "ffn.key")), seed=3)
    assert torch.equal(again.att["key"].lora_A, net.att["key"].lora_A)


@pytest.mark.parametrize("squared", [True, False])
def test_gradients_are_the_derivatives_with_dropout(squared):
    layer = adapted(Net().double().train(), p=0.3).double().att["key"]
    x = torch.randn(2, 3, 24, dtype=torch.double, requires_grad=True)
    halves = [half.detach().clone().requires_grad_() for half in (layer.lora_A, layer.lora_B)]
    assert torch.autograd.gradcheck(
        lambda x, A, B: functional_call(layer, {"lora_A": A, "lora_B": B}, (x, squared)), (x, *halves))


@pytest.mark.parametrize("dtype, far", [(torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 0.003)])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("adapter", [True, False])
def test_of_squares_is_the_formula(dtype, far, p, adapter):
    """ffn.value reads max(x, 0)², which is made inside of its product; the twin makes it outside, in float64."""
    layer = adapted(Net().to(dtype).train(), p, targets=("ffn.value",)).ffn["value"]
    twin = copy.deepcopy(layer).double()
    layer.strength = twin.strength = float(adapter)
    x, dy = torch.randn(3, 7, 48).to(dtype).requires_grad_(), torch.randn(3, 7, 16).to(dtype)
    x64 = x.detach().double().requires_grad_()
    ways = (layer(x, squared=True), dy, x, layer), (twin(x64.clamp(min=0) ** 2), dy.double(), x64, twin)
    found = [[y, *torch.autograd.grad(y, [x, layer.lora_A, layer.lora_B] if adapter else x, dy)]
             for y, dy, x, layer in ways]
    for got, expected in zip(*found, strict=True):
        assert (got - expected).norm() <= far * expected.norm()


def test_frozen_weights_get_no_gradient_and_do_not_move():
    net = adapted(Net())
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net(torch.randn(5, 24)).square().sum().backward()  # an x that needs no gradient, as behind a frozen embedding
    torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.1).step()
    for name, parameter in net.named_parameters():
        trained = name.endswith(("lora_A", "lora_B"))
        assert (parameter.grad is not None) == trained
        assert torch.equal(parameter, before[name]) != trained


def test_bf16_base_keeps_an_fp32_adapter():
    net, x, dy = adapted(Net()).att["key"], torch.randn(6, 24, requires_grad=True), torch.randn(6, 40)
    half = adapted(Net().bfloat16()).att["key"]
    half.load_state_dict(net.state_dict())
    exact, x16 = gradients(net, x, dy), x.detach().bfloat16().requires_grad_()
    assert half(x16).dtype == half.weight.dtype == torch.bfloat16
    for name, gradient in gradients(half, x16, dy.bfloat16()).items():
        assert gradient.dtype == (torch.bfloat16 if name == "x" else torch.float32)
        assert (gradient.float() - exact[name]).norm() < 0.03 * exact[name].norm()


# -- dropout ---------------------------------------------------------------------------------------------------------

def test_the_gradient_meets_the_same_mask():
    """A layer that returns dropout(x): no base, A = B = identity."""
    net, p = nn.ModuleDict({"key": nn.Linear(8, 8, bias=False)}), 0.3
    nn.init.zeros_(net["key"].weight)
    attach(net, LoraSettings(8, 8.0, target_modules=("key",)), seed=0)
    for half in adapter_parameters(net):
        nn.init.eye_(half)
    x = torch.ones(3, 8, requires_grad=True)
    for step in range(9):
        set_dropout_step(net, 7, step, 0, p)
        y = net["key"](x)
        assert ((y == 0) | ((y - 1 / (1 - p)).abs() < 1e-6)).all()
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y)


def test_dropout_masks_follow_seed_step_micro_batch_and_layer():
    net, x = adapted(Net(), p=0.5, targets=("key", "value")), torch.randn(9, 24)

    def at(*clock):
        set_dropout_step(net, *clock)
        return net(x)

    first = at(1, 2, 3)
    assert all(not torch.equal(first, at(*other)) for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0), (1, 3, 2)))
    torch.manual_seed(5)
    assert torch.equal(first, at(1, 2, 3)) and torch.equal(first, net(x))
    twins = adapted(nn.ModuleDict({name: nn.Linear(24, 24, bias=False) for name in ("key", "value")}), p=0.5,
                    targets=("key", "value"))
    twins["key"].load_state_dict(twins["value"].state_dict())
    assert not torch.equal(twins["key"](x), twins["value"](x))


def test_dropout_is_off_in_eval_mode_and_may_change_while_training():
    net, x = adapted(Net(), p=0.5), torch.randn(9, 24)
    plain = adapted(copy.deepcopy(Net()))
    plain.load_state_dict(net.state_dict())
    assert not torch.equal(net(x), plain(x))
    assert torch.equal(net.eval()(x), plain(x))
    for layer in lora_layers(net.train()).values():
        layer.dropout = 0.0
    assert torch.equal(net(x), plain(x))


def test_recomputed_blocks_draw_the_same_masks():
    net, x, dy = adapted(Net(), p=0.3), torch.randn(4, 24, requires_grad=True), torch.randn(4, 16)
    plain = gradients(net, x, dy)
    again = {name.removeprefix("net."): gradient for name, gradient in gradients(Recomputed(net), x, dy).items()}
    assert set(again) == set(plain) and all(torch.equal(plain[name], again[name]) for name in plain)


class Recomputed(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return checkpoint(self.net, x, use_reentrant=False, preserve_rng_state=False)


def test_a_checkpointed_model_trains_alike(lively, tokens):
    found = []
    for grad_cp in ("none", "selective", "block"):
        model = load_model(lively).train()
        attach(model, LORA, seed=0)
        for layer in lora_layers(model).values():
            nn.init.normal_(layer.lora_B, std=0.1, generator=torch.Generator().manual_seed(layer.index))
        set_dropout_step(model, 1, 2, 3, 0.1)
        model.hidden(tokens, grad_cp=grad_cp)[0].square().mean().backward()
        found.append([p.grad for p in adapter_parameters(model)])
    for plain, *recomputed in zip(*found, strict=True):
        for gradient in recomputed:
            torch.testing.assert_close(gradient, plain)


# -- strength --------------------------------------------------------------------------------------------------------

def test_strength_goes_from_the_base_through_the_adapter(lively, tmp_path, tokens):
    _, model = make_adapter(tmp_path / "a.safetensors", lively)
    base, layer, x = load_model(lively), model.blocks[0].att.key, torch.randn(5, 64)
    with torch.no_grad():
        full = layer(x) - F.linear(x, layer.weight)
        with strength(model, 0):
            assert torch.equal(model(tokens)[0], base(tokens)[0])
        with pytest.raises(KeyboardInterrupt), strength(model, 1.5):
            torch.testing.assert_close(layer(x) - F.linear(x, layer.weight), 1.5 * full, rtol=1e-4, atol=1e-5)
            raise KeyboardInterrupt
        assert torch.equal(layer(x) - F.linear(x, layer.weight), full)
        set_strength(model, 0.25)
        assert {layer.strength for layer in lora_layers(model).values()} == {0.25}


# -- attach ----------------------------------------------------------------------------------------------------------

def test_attach_takes_linears_by_the_end_of_their_names(lively):
    model = load_model(lively)
    key = model.blocks[0].att.key.weight
    names = attach(model, LoraSettings(r=4), seed=0)
    assert len(names) == 12 and names == list(lora_layers(model)) and names[1] == "blocks.0.att.key"
    assert model.blocks[0].att.key.weight is key
    assert [k for k in model.state_dict() if k.startswith("blocks.0.att.key")] == [
        f"blocks.0.att.key.{part}" for part in ("weight", "lora_A", "lora_B")]
    assert attach(load_model(lively), LoraSettings(target_modules=("head", "1.ffn.value")), seed=0) == [
        "blocks.1.ffn.value", "head"]
    with pytest.raises(SettingsError, match="already"):
        attach(model, LoraSettings(), seed=0)


def test_a_target_that_matches_nothing_is_answered_with_the_nearest_name(lively):
    model = load_model(lively)
    with pytest.raises(SettingsError, match=r"att\.kye.*\n.*did you mean att\.key.*ffn\.value"):
        attach(model, LoraSettings(target_modules=("ffn.key", "att.kye")), seed=0)
    with pytest.raises(SettingsError, match="'ey'"):  # whole names only
        attach(model, LoraSettings(target_modules=("ey",)), seed=0)
    assert not lora_layers(model) and model.head.weight.requires_grad


def test_attach_counts_parameters_on_the_meta_device():
    model = RWKV(Shape(2, 128, 257, 16, 16, 16, 16, 512), device="meta")
    attach(model, LoraSettings(r=8), seed=0)
    counted = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counted == 2 * 8 * (4 * (128 + 128) + 2 * (128 + 512))
    assert all(p.is_meta for p in adapter_parameters(model))
