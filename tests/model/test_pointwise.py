"""The gradients written by hand are those of the formulas."""

import pytest
import torch
import torch.nn.functional as F

from rwkv_nb.model.pointwise import decay, keys, token_shift

DTYPES = [(torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)]


def numbers(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def test_token_shift():
    B, T, C = 2, 5, 3
    x, last, mixes = numbers(B, T, C), numbers(B, C), [numbers(1, 1, C), numbers(1, 1, C), numbers(B, T, C)]
    assert torch.autograd.gradcheck(token_shift, (x, last, *mixes))
    before = torch.cat([last[:, None], x[:, :-1]], 1)
    for mixed, mix in zip(token_shift(x, last, *mixes), mixes, strict=True):
        torch.testing.assert_close(mixed, (1 - mix) * x + mix * before)


def test_token_shift_of_one_token_with_frozen_mixes():
    x, last, mixes = numbers(2, 1, 3), numbers(2, 3), [numbers(1, 1, 3).detach() for _ in range(2)]
    assert torch.autograd.gradcheck(token_shift, (x, last, *mixes))


def test_token_shift_of_texts_in_a_row():
    x, mixes = numbers(2, 6, 3), [numbers(1, 1, 3), numbers(2, 6, 3)]
    starts = torch.tensor([[True, False, True, True, False, False], [True] + [False] * 5])
    assert torch.autograd.gradcheck(lambda x, *mixes: token_shift(x, starts, *mixes), (x, *mixes))
    mixed = torch.cat(token_shift(x, starts, *mixes), -1)
    for row, a, b in ((0, 0, 2), (0, 2, 3), (0, 3, 6), (1, 0, 6)):
        part = slice(row, row + 1), slice(a, b)
        alone = token_shift(x[part], torch.zeros(1, 3), mixes[0], mixes[1][part])
        torch.testing.assert_close(mixed[part], torch.cat(alone, -1))


def plain_decay(x):
    return F.logsigmoid(x) - 0.5


def plain_keys(k, a, k_k, k_a, n_head):
    """As published, but for the sign, which stands at the third in place of the second."""
    kk = F.normalize((k * k_k).unflatten(-1, (n_head, -1)), dim=-1)
    a, k = (x.unflatten(-1, (n_head, -1)) for x in (a, k * (1 + (a - 1) * k_a)))
    return k, kk, -kk * a


def assert_like(way, plain, inputs, dtype, far):
    """Forward and all gradients of way in dtype against plain in float64, over each whole tensor."""
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    upstream, found = None, []
    for f, x in ((way, inputs), (plain, exact)):
        out = f(*x)
        out = out if isinstance(out, tuple) else (out,)
        upstream = upstream or [torch.randn(y.shape).to(dtype) for y in out]
        found.append([*out, *torch.autograd.grad(out, x, [dy.to(out[0].dtype) for dy in upstream])])
    for got, expected in zip(*found, strict=True):
        assert got.shape == expected.shape and (got - expected).norm() <= far * expected.norm()


def test_decay():
    x = numbers(7, 5)
    assert torch.autograd.gradcheck(decay, x)
    torch.testing.assert_close(decay(x), plain_decay(x))


@pytest.mark.parametrize("dtype, far", DTYPES)
def test_decay_in_each_dtype(dtype, far):
    assert_like(decay, plain_decay, [4 * torch.randn(3, 17, 24)], dtype, far)


def test_a_decay_has_the_digits_of_its_dtype():
    """Slow ones and fast ones alike: all within the rounding of the last step."""
    x = torch.linspace(-20, 10, 999).bfloat16()
    torch.testing.assert_close(decay(x), plain_decay(x.double()).bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("frozen", [True, False])
def test_keys(frozen):
    k, a, *vectors = numbers(2, 3, 12), numbers(2, 3, 12), numbers(1, 1, 12), numbers(1, 1, 12)
    vectors = [x.detach() if frozen else x for x in vectors]
    assert torch.autograd.gradcheck(keys, (k, a, *vectors, 3))
    for got, expected in zip(keys(k, a, *vectors, 3), plain_keys(k, a, *vectors, 3), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype, far", DTYPES)
def test_keys_in_each_dtype(dtype, far):
    inputs = torch.randn(3, 17, 24), torch.rand(3, 17, 24), 1 + torch.randn(1, 1, 24) / 4, torch.rand(1, 1, 24)
    assert_like(lambda *x: keys(*x, 2), lambda *x: plain_keys(*x, 2), inputs, dtype, far)
