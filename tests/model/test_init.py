"""Initial values follow RWKV-7's published rules (RWKV-LM, train_temp), here worked out element by element."""

import math

import pytest
import torch

from rwkv_nb.model import RWKV, Shape, init_weights

L, C, N, V = 4, 128, 64, 257


@pytest.fixture(scope="module")
def weights():
    shape = Shape(L, C, V, rank_w=32, rank_a=24, rank_v=16, rank_g=40, ffn_dim=512, rank_v_layer0=16)
    return init_weights(RWKV(shape), seed=3).state_dict()


def zigzag(n):
    z = (n % N - (N - 1) / 2) / ((N - 1) / 2)
    return z * abs(z)


def linear(n):
    return n / (C - 1) - 0.5


RULES = {
    "att.x_r": lambda i, n: 1 - (n / C) ** (0.2 * (1 - i / L)),
    "att.x_w": lambda i, n: 1 - (n / C) ** (0.9 * (1 - i / L)),
    "att.x_k": lambda i, n: 1 - (n / C) ** (0.7 * (1 - i / L)),
    "att.x_v": lambda i, n: 1 - (n / C) ** (0.7 * (1 - i / L)),
    "att.x_a": lambda i, n: 1 - (n / C) ** (0.9 * (1 - i / L)),
    "att.x_g": lambda i, n: 1 - (n / C) ** (0.2 * (1 - i / L)),
    "att.w0": lambda i, n: -6 + 6 * (n / (C - 1)) ** (1 + (i / (L - 1)) ** 0.3) + 0.5 + zigzag(n) * 2.5,
    "att.a0": lambda i, n: -0.19 + zigzag(n) * 0.3 + linear(n) * 0.4,
    "att.v0": lambda i, n: 0.73 - linear(n) * 0.4,
    "att.k_k": lambda i, n: 0.71 - linear(n) * 0.1,
    "att.k_a": lambda i, n: 1.02,
    "att.r_k": lambda i, n: -0.04,
    "att.ln_x.weight": lambda i, n: ((1 + i) / L) ** 0.7,
    "att.ln_x.bias": lambda i, n: 0.0,
    "ffn.x_k": lambda i, n: 1 - (n / C) ** ((1 - i / L) ** 4),
    **{f"{ln}.{p}": (lambda i, n, value=value: value) for ln in ("ln1", "ln2") for p, value in
       (("weight", 1.0), ("bias", 0.0))},
}


@pytest.mark.parametrize("key", RULES)
def test_vectors(weights, key):
    for i in range(L):
        values = weights[f"blocks.{i}.{key}"].flatten()
        for n in (0, 1, 31, 63, 64, 100, 127):
            assert float(values[n]) == pytest.approx(RULES[key](i, n), abs=2e-6), (i, n)


def test_what_begins_at_zero(weights):
    """Output matrices and the narrow ends of the gates: at first a block adds nothing."""
    for i in range(L):
        for key in ("att.output.weight", "ffn.value.weight", "att.w1", "att.a1", "att.v1", "att.g1"):
            assert not weights[f"blocks.{i}.{key}"].any(), key


@pytest.mark.parametrize("key, width", [("att.receptance", 0.5), ("att.key", 0.05), ("att.value", 0.5),
                                        ("ffn.key", 0.5), ("emb", None)])
def test_uniform_matrices_fill_their_width(weights, key, width):
    bound = 1e-4 if width is None else width / math.sqrt(C)
    for name in [name for name in weights if name.endswith(f"{key}.weight")]:
        w = weights[name]
        assert 0.99 * bound < w.abs().max() <= bound
        assert float(w.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_orthogonal_matrices(weights):
    head = weights["head.weight"]
    torch.testing.assert_close(head.T @ head, torch.eye(C) * 0.25 * V / C, atol=1e-5, rtol=0)
    for i in range(L):
        for c in "wavg":
            w = weights[f"blocks.{i}.att.{c}2"]
            torch.testing.assert_close(w @ w.T, torch.eye(w.shape[0]) * 0.01, atol=1e-6, rtol=0)


def test_one_seed_one_model():
    shape = Shape(1, 64, 257, 8, 8, 8, 8, 128)
    a, b, c = (init_weights(RWKV(shape), seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["head.weight"], c["head.weight"])
    assert all(v.isfinite().all() for v in a.values())    # one layer: nothing is divided by L - 1


OLDER = {version: Shape(L, C, V, rank_w, 0, 0, 0, ffn_dim=448, version=version, rank_mix=mix)
         for version, rank_w, mix in (("x060", 24, 12), ("x052", 0, 0))}
MIX = {  # how much of a token itself is seen at first: RWKV-5's files say so, RWKV-6's say one minus that
    **{f"att.{c}": lambda i, n: (n / C) ** (1 - i / L) for c in "xwk"}, "ffn.k": lambda i, n: (n / C) ** (1 - i / L),
    "att.v": lambda i, n: (n / C) ** (1 - i / L) + 0.3 * i / (L - 1), "ffn.r": lambda i, n: (n / C) ** (1 - i / L),
    "att.r": lambda i, n: (n / C) ** (0.5 * (1 - i / L)), "att.g": lambda i, n: (n / C) ** (0.5 * (1 - i / L)),
}
OLDER_RULES = {
    "att.time_decay": lambda i, n: -6 + 5 * (n / (C - 1)) ** (0.7 + 1.3 * i / (L - 1)),
    "att.time_faaaa": lambda i, n: i / (L - 1) * (1 - n / (C - 1)) + ((n + 1) % 3 - 1) * 0.1,
    "att.ln_x.weight": RULES["att.ln_x.weight"],
}


@pytest.mark.parametrize("version", OLDER)
def test_older_versions(version):
    """RWKV-6's rules, and the same for RWKV-5 (RWKV-LM, rwkv_v6_demo)."""
    weights = init_weights(RWKV(OLDER[version]), seed=3).state_dict()
    kind, new = ("time_maa", True) if version == "x060" else ("time_mix", False)
    rules = OLDER_RULES | {f"{part}.{kind}_{c}": (lambda i, n, own=own: 1 - own(i, n)) if new else own
                           for (part, c), own in ((name.split("."), own) for name, own in MIX.items())
                           if new or c not in "xw"}
    seen = set()
    for key, rule in rules.items():
        for i in range(L):
            seen.add(f"blocks.{i}.{key}")
            values = weights[f"blocks.{i}.{key}"].flatten()
            for n in (0, 1, 31, 64, 127):
                assert float(values[n]) == pytest.approx(rule(i, n), abs=2e-6), (key, i, n)
    for i in range(L):
        for name, gain in (("att.receptance", 1), ("att.key", 0.1), ("att.value", 1), ("att.gate", 0.1), ("ffn.key", 1),
                           ("att.output", 0), ("ffn.value", 0), ("ffn.receptance", 0)):
            seen.add(f"blocks.{i}.{name}.weight")
            w = weights[f"blocks.{i}.{name}.weight"]
            torch.testing.assert_close(w.T @ w, torch.eye(w.shape[1]) * gain**2, atol=1e-5, rtol=0)
        for name in ("time_maa", "time_decay") if new else ():
            assert not weights[f"blocks.{i}.att.{name}_w1"].any()
            assert 0.0099 < weights[f"blocks.{i}.att.{name}_w2"].abs().max() <= 0.01
            seen |= {f"blocks.{i}.att.{name}_w1", f"blocks.{i}.att.{name}_w2"}
    assert all(key in seen or "ln" in key or key in ("emb.weight", "head.weight") for key in weights)
