"""Models whose every parameter takes part: initialisation alone leaves half of them at zero."""

import dataclasses

import pytest
import torch

from rwkv_nb.model import RWKV7, Shape, init_weights

SHAPE = Shape(n_layer=3, n_embd=128, vocab_size=257, rank_w=32, rank_a=24, rank_v=16, rank_g=40, ffn_dim=512)


@pytest.fixture(scope="session")
def lively():
    """lively(seed, n_layer=…, …): a model at its initial values with noise on all of them, SHAPE where not said."""
    @torch.no_grad()
    def make(seed=None, **shape):
        seed = int(torch.randint(10**6, ())) if seed is None else seed
        model = init_weights(RWKV7(dataclasses.replace(SHAPE, **shape)), seed).eval()
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            size = parameter.shape[-1] ** -0.5 if min(parameter.shape) > 1 else 0.1
            parameter += size * torch.randn(parameter.shape, generator=generator)
        return model
    return make


@pytest.fixture(params=[0, 16], ids=["without v0", "with v0"])
def model(request, lively):
    """A lively model; block 0 with and without its unused v0 v1 v2."""
    return lively(rank_v_layer0=request.param)
