"""Masks that follow from a seed: each element is hit equally often, whichever way a mask is drawn."""

import pytest
import torch

from rwkv_nb.dropout import Dropout


def of_a_gpu(x, dropout, out=None):
    return dropout.of(x, None, out)


def of_a_cpu(x, dropout, out=None):
    return dropout.of(x, dropout.draw(x), out)


WAYS = [of_a_gpu, of_a_cpu]   # both run on a CPU


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("p", [0.01, 0.3, 0.9])
def test_every_element_is_hit_equally_often(way, p):
    x, rounds = torch.arange(1.0, 25).view(3, 8), 4000
    kept = torch.zeros(3, 8)
    for seed in range(rounds):
        y = way(x, Dropout(p, seed))
        assert torch.equal(y, torch.where(y == 0, y, x))
        kept += y != 0
    six_sigma = 6 * (p * (1 - p) / rounds) ** 0.5
    assert (kept / rounds - (1 - p)).abs().max() < six_sigma
    assert abs(kept.sum() / rounds / kept.numel() - (1 - p)) < six_sigma / kept.numel() ** 0.5


@pytest.mark.parametrize("way", WAYS)
def test_neighbours_are_independent(way):
    hit = way(torch.ones(500, 64), Dropout(0.5, 0)).flatten() == 0
    assert abs((hit[1:] & hit[:-1]).float().mean() - 0.25) < 6 * (0.25 * 0.75 / hit.numel()) ** 0.5


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_in_place_or_not_the_mask_is_the_same(way, dtype):
    x = torch.randn(7, 33).to(dtype)
    before = x.clone()
    y = way(x, Dropout(0.3, 3))
    assert torch.equal(x, before) and not torch.equal(y, x) and y.dtype == dtype
    assert way(x, Dropout(0.3, 3), x) is x and torch.equal(x, y)


@pytest.mark.parametrize("way", WAYS)
def test_a_mask_follows_from_its_seed_alone(way):
    x = torch.randn(9, 24)
    first = way(x, Dropout(0.5, 1))
    torch.manual_seed(5)
    assert torch.equal(way(x, Dropout(0.5, 1)), first) and not torch.equal(way(x, Dropout(0.5, 2)), first)
