"""Of each version: two forms that agree, blocks that can be recomputed, and the logits of the `rwkv` package."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_nb.memory import LiveBytes
from rwkv_nb.model import PUBLISHED, RWKV, State, load_model, save_weights
from rwkv_nb.model.pointwise import gated_norm

PACKAGE = """
import sys, torch
from rwkv.model import RWKV
torch.set_num_threads(1)
for path in sys.argv[1:]:
    model = RWKV(model=path + ".wide", strategy="cpu fp32")
    logits, state = model.forward(torch.load(path + ".tokens")[0].tolist(), None, full_output=True)
    step, _ = model.forward([5], state)
    torch.save((logits, step), path + ".logits")
"""


VERSIONS = ("x070", "x060", "x052")


def tokens(B, T, V=257):
    return torch.randint(V, (B, T))


def close(mine, expected):
    """Equal to 1e-4 of the largest value (see the comment on ln_x below)."""
    torch.testing.assert_close(mine, expected, atol=1e-4 * max(1.0, float(expected.abs().max())), rtol=0)


def by_pieces(model, x, pieces, op):
    """Logits of x [B,T] in pieces of the given lengths, each from the state that the last one left."""
    out, state = [], None
    for piece in x.split(pieces, dim=1):
        logits, state = model(piece, state, op=op)
        out.append(logits)
    return torch.cat(out, 1), state


@pytest.mark.parametrize("op", ["torch", "chunked", "auto"])
@torch.inference_mode()
def test_training_form_equals_rnn_form(model, op):
    x = tokens(3, 53)
    whole, state = model(x, op="torch")
    for pieces in ([1] * 53, [1, 16, 17, 2, 15, 2], [52, 1], [53]):
        logits, last = by_pieces(model, x, pieces, op)
        for mine, expected in zip((logits, *last), (whole, *state), strict=True):
            close(mine, expected)
            assert (mine - expected).norm() <= 1e-5 * expected.norm()


@settings(max_examples=25, deadline=None)
@given(st.data())
@torch.inference_mode()
def test_forms_agree_at_any_small_shape(lively, data):
    def draw(*choices):
        return data.draw(st.sampled_from(choices))

    N, H, L, V, T = draw(16, 32, 64), draw(1, 2, 3), draw(1, 2), draw(3, 70), data.draw(st.integers(1, 20))
    model = lively(draw(*VERSIONS), n_layer=L, n_embd=N * H, head_size=N, vocab_size=V, rank_w=draw(1, 8),
                   rank_a=draw(1, 5), rank_v=draw(1, 7), rank_g=draw(1, 9), ffn_dim=draw(16, 100),
                   rank_v_layer0=draw(0, 7), rank_mix=draw(1, 6))
    x = tokens(2, T, V)
    whole, state = model(x)
    logits, last = by_pieces(model, x, [1] * T, "torch")
    close(logits, whole)
    assert [tuple(part.shape) for part in last] == [(L, 2, N * H), (L, 2, H, N, N), (L, 2, N * H)]
    assert last.wkv.dtype == state.wkv.dtype == torch.float32


@torch.inference_mode()
def test_texts_in_a_batch_do_not_touch_each_other(model):
    x = tokens(4, 20)
    together, state = model(x)
    alone, _ = model(x[2:3])
    close(together[2:3], alone)
    picked, _ = model(x[2:3, :1], State(*(part[:, 2:3] for part in state)))
    close(picked, model(torch.cat([x[2:3], x[2:3, :1]], 1))[0][:, -1:])


@torch.inference_mode()
def test_the_future_does_not_change_the_past(model):
    x = tokens(2, 30)
    y = x.clone()
    y[:, 20:] = tokens(2, 10)
    a, b = model(x)[0], model(y)[0]
    close(a[:, :20], b[:, :20])
    assert (a[:, 20:] - b[:, 20:]).abs().max() > 0.01


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad_cp", ["block", "selective"])
@pytest.mark.parametrize("with_state", [True, False])
def test_recomputing_blocks_changes_nothing(lively, version, dtype, grad_cp, with_state):
    model, x = lively(version).to(dtype), tokens(2, 33)
    state = State(*(torch.randn_like(part).mul(0.1).requires_grad_() for part in model.zero_state(2)))

    def gradients(grad_cp):
        model.zero_grad()
        hidden, after = model.hidden(x, state if with_state else None, grad_cp=grad_cp)
        sum(part.float().square().sum() for part in (hidden, *(after if with_state else ()))).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if name != "head.weight"}
        for name, part in state._asdict().items() if with_state else ():
            grads[name], part.grad = part.grad, None
        return hidden.detach(), grads

    (off, without), (on, with_) = gradients("none"), gradients(grad_cp)
    assert torch.equal(off, on)
    for name, gradient in without.items():
        assert gradient is not None and gradient.abs().max() > 0 or ".0.att.v" in name, name
        assert gradient is None or torch.equal(gradient, with_[name]), name


def test_a_recomputed_block_keeps_its_inputs_alone(lively):
    model, x, kept = lively(), tokens(2, 33), {}
    for grad_cp in ("none", "block"):
        with LiveBytes() as live:
            for parameter in model.parameters():
                live.count(parameter)
            before = live.now
            hidden, _ = model.hidden(x, grad_cp=grad_cp, keep_state=False)
            kept[grad_cp] = (live.now - before) / hidden.nbytes
    assert kept["block"] < model.shape.n_layer + 4 < kept["none"] / 9   # what goes in and out, and v_first


def test_gradients_reach_the_state(model):
    state = State(*(torch.randn(part.shape).mul(0.1).requires_grad_() for part in model.zero_state(2)))
    model(tokens(2, 5), state)[0].square().sum().backward()
    assert all(part.grad.abs().amax(dim=tuple(range(1, part.dim()))).min() > 0 for part in state)


@torch.inference_mode()
def test_ln_x_is_the_published_norm_of_y_over_8(lively):
    att, y = lively("x052").double().blocks[1].att, torch.randn(2, 5, 2, 64, dtype=torch.float64)
    published = torch.nn.functional.group_norm(y.flatten(2).flatten(0, 1) / 8, 2, att.ln_x.weight, att.ln_x.bias, 1e-5)
    nothing = torch.zeros_like(y), torch.zeros_like(y), torch.zeros_like(y), torch.zeros(y.shape[-2:])
    normed = gated_norm(y, torch.ones_like(y).flatten(2), att.ln_x, nothing)
    torch.testing.assert_close(normed.flatten(0, 1), published)


@pytest.mark.parametrize("version", VERSIONS)
@torch.inference_mode()
def test_bf16_is_near_fp32(lively, version):
    model, x = lively(version), tokens(2, 70)
    exact = model(x)[0]
    rounded, state = model.bfloat16()(x)
    assert rounded.dtype == torch.bfloat16 and state.wkv.dtype == torch.float32
    assert (rounded.float() - exact).norm() / exact.norm() < 0.05
    assert (by_pieces(model, x, [1, 40, 29], "auto")[0].float() - rounded.float()).norm() / exact.norm() < 0.03


@torch.inference_mode()
def steady_text(path):
    """A text on which rounding stays small. In one of a thousand a head's first y, v times one dot product, is near 0,
    and ln_x makes its rounding, anybody's, up to 40 times larger."""
    model, exact = load_model(path, dtype=torch.float32), load_model(path, dtype=torch.float64)
    for _ in range(30):
        x = tokens(1, 90)
        logits = exact(x, op="torch")[0]
        if all((model(x, op=op)[0] - logits).abs().max() < 2e-5 for op in ("torch", "cpu")):
            return x
    pytest.fail("rounding was large on all of 30 texts")


@pytest.mark.parametrize("version", VERSIONS)
def test_logits_are_the_rwkv_packages(tmp_path, lively, version):
    stored = {tmp_path / "a.pth": (torch.float32, 0), tmp_path / "b.pth": (torch.float16, 16),
              tmp_path / "c.pth": (torch.bfloat16, 0)}
    for path, (dtype, layer0) in stored.items():
        weights = lively(version, rank_v_layer0=layer0).to(dtype).state_dict()
        save_weights(path, weights)
        save_weights(f"{path}.wide.pth", {k: v.float() for k, v in weights.items()})  # v6, v5: it rounds ln0 as stored
        torch.save(steady_text(path), f"{path}.tokens")
    environment = {**os.environ, "RWKV_V7_ON": str(int(version == "x070")), "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
    subprocess.run([sys.executable, "-c", PACKAGE, *stored], check=True, env=environment, capture_output=True)
    for path in stored:
        theirs, their_step = torch.load(f"{path}.logits")
        with torch.inference_mode():
            ours = load_model(path, dtype=torch.float32)
            logits, state = ours(torch.load(f"{path}.tokens"))
            step, _ = ours(torch.tensor([[5]]), state)
        assert theirs.std() > 0.3 and ours.shape.version == version
        torch.testing.assert_close(logits[0], theirs, atol=1e-4, rtol=0)
        torch.testing.assert_close(step[0, 0], their_step, atol=1e-4, rtol=0)


@pytest.mark.parametrize("version", VERSIONS)
def test_torch_compile_holds_the_whole_model(lively, version):
    """Without a break in the graph, with gradients and without, and the compiled operator in it."""
    model, x = lively(version, n_layer=2), tokens(2, 20)
    compiled = torch.compile(lambda x: model(x)[0], backend="aot_eager", fullgraph=True)

    def run(form):
        logits = form(x)
        return logits, *torch.autograd.grad(logits.square().sum(), list(model.blocks[1].parameters()))

    for mine, expected in zip(run(compiled), run(lambda x: model(x)[0]), strict=True):
        torch.testing.assert_close(mine, expected)
    with torch.inference_mode():
        close(compiled(x), model(x)[0])


@pytest.mark.parametrize("size, expected", [("0.1B", 191_034_624), ("0.4B", 450_767_872), ("1.5B", 1_527_404_544),
                                            ("2.9B", 2_947_735_040)])
def test_known_totals(size, expected):
    assert PUBLISHED[size].n_params() == expected
    assert sum(p.numel() for p in RWKV(PUBLISHED[size], device="meta").parameters()) == expected
