"""What keys and sizes say about a model, for each version."""

import pytest
import torch

from rwkv_nb.model import PUBLISHED, PUBLISHED_OLDER, RWKV, Shape, read_shape
from rwkv_nb.model.shape import detect_version

ALL = {**PUBLISHED, **PUBLISHED_OLDER}
ODD = [Shape(2, 48, 99, 5, 0, 0, 0, 33, 16, version="x060", rank_mix=3),
       Shape(1, 64, 50, 0, 0, 0, 0, 7, version="x052")]


def on_meta(shape):
    return {key: torch.empty(size, device="meta") for key, size in shape.key_shapes().items()}


@pytest.mark.parametrize("shape", [PUBLISHED["0.1B"], PUBLISHED_OLDER["v6 7B"], PUBLISHED_OLDER["v5 0.4B"], *ODD])
def test_the_model_has_the_keys_of_its_shape(shape):
    keys = {key: tuple(W.shape) for key, W in RWKV(shape, device="meta").state_dict().items()}
    assert keys == shape.key_shapes()


@pytest.mark.parametrize("shape", [*ALL.values(), *ODD], ids=[*ALL, "odd v6", "odd v5"])
def test_sizes_are_read_from_the_file(shape):
    weights = on_meta(shape)
    assert read_shape(weights) == shape and detect_version(weights) == shape.version
    assert shape.n_params() == sum(w.numel() for w in weights.values())
    assert {name: tuple(weights[f"{name}.weight"].shape) for name in shape.linears()} == shape.linears()


# by hand, from the formulas of arXiv 2404.05892: V rows of 2C, and L times the matrices, vectors and narrow layers
@pytest.mark.parametrize("size, L, C, mix, decay, billions", [
    ("v6 1.6B", 24, 2048, 32, 64, 1.6), ("v6 3B", 32, 2560, 32, 64, 3.1), ("v6 7B", 32, 4096, 64, 128, 7.6),
    ("v6 14B", 61, 4096, 64, 128, 14.1), ("v5 0.4B", 24, 1024, 0, 0, 0.46), ("v5 1.5B", 24, 2048, 0, 0, 1.58),
    ("v5 3B", 32, 2560, 0, 0, 3.06), ("v5 7B", 32, 4096, 0, 0, 7.52)])
def test_older_models(size, L, C, mix, decay, billions):
    shape = PUBLISHED_OLDER[size]
    vectors = 4 + 2 + (8 + 2 if mix else 6 + 2)    # ln1 ln2, ln_x; of each mix
    block = 13 * C * C + vectors * C + 2 * 5 * mix * C + 2 * decay * C
    assert (shape.n_layer, shape.n_embd, shape.ffn_dim, shape.n_head) == (L, C, 3.5 * C, C // 64)
    assert shape.n_params() == 2 * 65536 * C + L * block + 4 * C
    assert shape.n_params() / 1e9 == pytest.approx(billions, rel=0.01)
