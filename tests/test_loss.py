"""The one loss against its plain definition, and its independence of how a step is cut up."""

import copy

import pytest
import torch
import torch.nn.functional as F

from rwkv_nb.config import LoraSettings
from rwkv_nb.lora.layers import adapter_parameters, attach
from rwkv_nb.loss import SLICE, head_loss
from rwkv_nb.quant import HEAD_ROWS, Held, QuantLinear


def plain_loss(hidden, head, targets, mask, n_trained):
    """The definition, with all logits at once."""
    logits = head(hidden[mask])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ce = F.cross_entropy(logits, targets[mask], reduction="sum")
    return (ce + 0.5e-4 * logits.max(-1).values.square().sum()) / n_trained, ce


def assert_same(got, expected):
    """Equal to rounding, measured over the whole tensor: single elements near 0 have few digits."""
    assert (got - expected).norm() <= 3e-6 * expected.norm()


def example(B=3, T=17, C=24, V=61, dtype=torch.float32, share=0.6):
    hidden = torch.randn(B, T, C, dtype=dtype).requires_grad_()
    head = torch.nn.Linear(C, V, bias=False, dtype=dtype).requires_grad_(False)
    head.weight.mul_(10)  # large logits, so that the max-logit term counts
    return hidden, head, torch.randint(0, V, (B, T)), torch.rand(B, T) < share


@pytest.mark.parametrize("chunk", [1, 5, 256])
def test_equals_the_plain_computation(chunk):
    hidden, head, targets, mask = example()
    n = int(mask.sum())
    loss, ce = head_loss(hidden, head, targets, mask, n, chunk=chunk)
    (grad,) = torch.autograd.grad(3 * loss, hidden)
    expected, expected_ce = plain_loss(hidden, head, targets, mask, n)
    (expected_grad,) = torch.autograd.grad(3 * expected, hidden)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ce, expected_ce, rtol=2e-6, atol=1e-5)
    assert_same(grad, expected_grad)


def test_large_vocabularies_are_worked_on_in_slices():
    """Sums over 131,072 rows: how far fp32 is from float64 depends on this machine's BLAS, so plain fp32 is the bar."""
    hidden, head, targets, mask = example(T=7, C=4, V=SLICE // 4)
    n = int(mask.sum())
    exact = plain_loss(hidden.double(), copy.deepcopy(head).double(), targets, mask, n)[0]
    got, plain = (f(hidden, head, targets, mask, n)[0] for f in (head_loss, plain_loss))
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-6)
    expected, *grads = (torch.autograd.grad(loss, hidden)[0] for loss in (exact, got, plain))
    error, error_of_plain = ((grad - expected).norm() / expected.norm() for grad in grads)
    assert error <= 1.5 * error_of_plain + 3e-6


def test_an_int8_head_is_made_dense_a_slice_at_a_time():
    hidden, head, targets, mask = example(C=8, V=HEAD_ROWS + 300)
    held = QuantLinear(Held(head.weight, "int8", dtype=torch.float32))
    head.weight.copy_(held.held.dense())
    n = int(mask.sum())
    got, expected = (torch.autograd.grad(head_loss(hidden, h, targets, mask, n, chunk=7)[0], hidden)[0]
                     for h in (held, head))
    torch.testing.assert_close(head_loss(hidden, held, targets, mask, n)[0],
                               plain_loss(hidden, head, targets, mask, n)[0], rtol=1e-6, atol=1e-6)
    assert_same(got, expected)


def test_a_trained_head_gets_its_gradient():
    hidden, head, targets, mask = example()
    head.weight.requires_grad_()
    n = int(mask.sum())
    got = torch.autograd.grad(head_loss(hidden, head, targets, mask, n, chunk=7)[0], [hidden, head.weight])
    expected = torch.autograd.grad(plain_loss(hidden, head, targets, mask, n)[0], [hidden, head.weight])
    for a, b in zip(got, expected, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("quantised", [True, False])
def test_an_adapter_on_the_head_gets_its_gradient(quantised):
    hidden, head, targets, mask = example(C=64)
    head = QuantLinear(Held(head.weight, "int8", dtype=torch.float32)) if quantised else head
    net = torch.nn.ModuleDict({"head": head})
    attach(net, LoraSettings(4, 8.0, target_modules=("head",)), seed=0)
    parameters = list(adapter_parameters(net))
    torch.nn.init.normal_(parameters[1])
    n = int(mask.sum())
    got, expected = (torch.autograd.grad(f(hidden, net["head"], targets, mask, n)[0], [hidden, *parameters])
                     for f in (head_loss, plain_loss))
    for a, b in zip(got, expected, strict=True):
        assert_same(a, b)


def test_micro_batches_add_up_to_one_large_batch():
    hidden, head, targets, mask = example(B=4)
    n = int(mask.sum())
    whole = torch.autograd.grad(head_loss(hidden, head, targets, mask, n)[0], hidden)[0]
    parts = [head_loss(hidden[i:i + 1], head, targets[i:i + 1], mask[i:i + 1], n)[0] for i in range(4)]
    assert_same(torch.autograd.grad(sum(parts), hidden)[0], whole)


def test_no_trained_token_gives_zero_and_no_gradient():
    hidden, head, targets, mask = example(share=0.0)
    loss, ce = head_loss(hidden, head, targets, mask, 0)
    loss.backward()
    assert loss == 0 and ce == 0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_works_without_gradients_and_in_bf16():
    hidden, head, targets, mask = example(dtype=torch.bfloat16)
    n = int(mask.sum())
    with torch.no_grad():
        loss, _ = head_loss(hidden, head, targets, mask, n)
    expected, _ = plain_loss(hidden, head, targets, mask, n)
    assert not loss.requires_grad
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
