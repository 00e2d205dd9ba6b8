"""Models whose every parameter takes part: initialisation alone leaves half of them at zero."""

import dataclasses

import pytest
import torch

from rwkv_nb.model import RWKV, Shape, init_weights

SHAPES = {
    "x070": Shape(n_layer=3, n_embd=128, vocab_size=257, rank_w=32, rank_a=24, rank_v=16, rank_g=40, ffn_dim=512),
    "x060": Shape(3, 128, 257, 24, 0, 0, 0, ffn_dim=448, version="x060", rank_mix=12),
    "x052": Shape(3, 128, 257, 0, 0, 0, 0, ffn_dim=448, version="x052"),
}


@pytest.fixture(scope="session")
def lively():
    """lively(version, seed, n_layer=…, …): a model at its initial values with noise on all of them; sizes as in SHAPES
    where not said."""
    @torch.no_grad()
    def make(version="x070", seed=None, **shape):
        seed = int(torch.randint(10**6, ())) if seed is None else seed
        model = init_weights(RWKV(dataclasses.replace(SHAPES[version], **shape)), seed).eval()
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            size = parameter.shape[-1] ** -0.5 if min(parameter.shape) > 1 else 0.1
            parameter += size * torch.randn(parameter.shape, generator=generator)
        return model
    return make


@pytest.fixture(params=["x070", "x070 with v0", "x060", "x052"])
def model(request, lively):
    """A lively model; of x070, block 0 with and without its unused v0 v1 v2."""
    version, _, v0 = request.param.partition(" ")
    return lively(version, rank_v_layer0=16 if v0 else 0)
