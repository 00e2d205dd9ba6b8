"""The gradients written by hand are those of the formulas."""

import torch

from rwkv_nb.model.pointwise import token_shift


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
