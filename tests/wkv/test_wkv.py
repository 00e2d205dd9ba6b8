"""Every op of every version against its definition in float64: output, last state and all gradients, fresh inputs."""

import contextlib
import functools
import itertools
import subprocess

import fla_naive
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from rwkv_nb.errors import KernelError
from rwkv_nb.wkv import WKV, pick_op, self_test, selftest, wkv5, wkv6, wkv7
from rwkv_nb.wkv.selftest import outputs_and_grads, realistic_inputs, relative_error

INPUTS = {7: "rwkvab", 6: "rwkvu", 5: "rwkvu"}
FAST = list(itertools.product(WKV, ("chunked", "cpu")))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CASES = [(version, op, dtype) for version, op, dtype in itertools.product(WKV, ("torch", "chunked", "cpu"), DTYPES)
         if op != "cpu" or dtype != torch.float64]


@contextlib.contextmanager
def threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty is filled with NaN, in C++ too, so that a place which an op forgets to write is seen."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@functools.cache
def case(version, T, B, H, N, with_state, wide, dtype):
    """Inputs rounded to dtype, gradients at y and the state, and the float64 results."""
    torch.manual_seed(torch.initial_seed())  # the same ones whichever test is the first to ask
    *inputs, state = realistic_inputs(B, T, H, N, version=version, wide=wide)
    inputs = [x.to(dtype) for x in inputs] + [state if with_state else None]
    upstream = torch.randn(B, T, H, N).to(dtype), torch.randn(B, H, N, N)
    return inputs, upstream, outputs_and_grads(WKV[version], inputs, upstream, torch.float64, op="torch")


def check(version, out, reference, bar=2e-6):
    """Each result within `bar` (float64: 1e-12) of the reference as a vector, beyond the rounding of its dtype once.

    The error is measured against at least 1e-6 a number, for dw where every decay is nearly 0; against at least 1
    where a handful of dot products may all be small differences of large numbers, or exactly 0.
    """
    bar = 1e-12 if out[0].dtype == torch.float64 else bar
    for name, x, ref in zip(("y", "state", *(f"d{n}" for n in INPUTS[version]), "dstate"), out, reference,
                            strict=False):
        unit = torch.finfo(x.dtype)
        rounding = ref.abs() * unit.eps / 2 + unit.smallest_normal * unit.eps / 2
        excess = ((x.double() - ref).abs() - rounding).clamp(min=0)
        size = max(ref.norm(), (1 if ref.numel() < 1000 else 1e-6) * ref.numel() ** 0.5)
        assert excess.norm() <= bar * size, f"{name}: {excess.norm() / size:.1e}"  # NaN fails too


@pytest.mark.parametrize("version, op, dtype", CASES, ids=lambda x: str(x).removeprefix("torch."))
@pytest.mark.parametrize("heads", [(1, 1), (3, 2)], ids=["few-heads", "many-heads"])  # below and above the threads
@pytest.mark.parametrize("T", [1, 15, 16, 17, 64, 257])
def test_against_float64(version, op, dtype, heads, T):
    for with_state, wide in ((True, False), (False, True)):
        inputs, upstream, reference = case(version, T, *heads, 64, with_state, wide, dtype)
        with threads(2 if op == "cpu" else 1):
            out = outputs_and_grads(WKV[version], inputs, upstream, dtype, op=op)
        assert out[0].dtype == dtype and out[1].dtype == torch.promote_types(dtype, torch.float32)
        # The definition in float32 rounds a decay near 1 the same way at every step.
        check(version, out, reference, bar=max(2e-6, T * 2**-25) if op == "torch" else 2e-6)


@pytest.mark.parametrize("version, op", FAST)
@pytest.mark.parametrize("wide", [False, True])
def test_long_sequence(version, op, wide):
    inputs, upstream, reference = case(version, 512, 1, 3, 64, True, wide, torch.float32)
    check(version, outputs_and_grads(WKV[version], inputs, upstream, torch.float32, op=op), reference)


@pytest.mark.parametrize("version, op", FAST)
@pytest.mark.parametrize("w", [-10.0, 2.0, 4.5, 8.0, 100.0])
def test_every_decay_at_an_extreme(version, op, w):
    """From 1 - 5e-5 a step down to 0 in every channel at once."""
    inputs, upstream, _ = case(version, 64, 1, 2, 64, True, True, torch.float32)
    inputs = [torch.full_like(x, w) if i == 1 else x for i, x in enumerate(inputs)]
    reference = outputs_and_grads(WKV[version], inputs, upstream, torch.float64, op="torch")
    check(version, outputs_and_grads(WKV[version], inputs, upstream, torch.float32, op=op), reference)


@pytest.mark.parametrize("version, op", FAST)
@hypothesis_settings(max_examples=15, deadline=None)
@given(B=st.integers(1, 3), T=st.integers(1, 40), H=st.integers(1, 3), N=st.integers(1, 100), seed=st.integers(0, 999))
def test_any_shape(version, op, B, T, H, N, seed):
    torch.manual_seed(seed)
    inputs = realistic_inputs(B, T, H, N, version=version)
    upstream = torch.randn(B, T, H, N), torch.randn(B, H, N, N)
    reference = outputs_and_grads(WKV[version], inputs, upstream, torch.float64, op="torch")
    check(version, outputs_and_grads(WKV[version], inputs, upstream, torch.float32, op=op), reference)


def by_the_formula(version, r, w, k, v, *rest):
    """One head's y [T,N] and last state from the published formulas alone, one number at a time."""
    *ab, S = rest
    (T, N), y = r.shape, np.zeros(r.shape)
    for t in range(T):
        old, S = S, np.zeros((N, N))
        decay = np.exp(-np.exp(w if version == 5 else w[t]))
        for i, j in np.ndindex(N, N):
            S[i, j] = old[i, j] * decay[j] + v[t, i] * k[t, j]
            if version == 7:
                S[i, j] += sum(old[i, m] * ab[0][t, m] for m in range(N)) * ab[1][t, j]
            else:
                y[t, i] += r[t, j] * (old[i, j] + ab[0][j] * k[t, j] * v[t, i])
        if version == 7:
            y[t] = [sum(S[i, m] * r[t, m] for m in range(N)) for i in range(N)]
    return y, S


@pytest.mark.parametrize("version", WKV)
@pytest.mark.parametrize("op", ["torch", "chunked"])
def test_definition_against_the_formula_in_numpy(version, op):
    inputs = [x.double() for x in realistic_inputs(2, 19, 2, 5, version=version, wide=True)]
    y, last = WKV[version](*inputs, op=op)
    for b, h in np.ndindex(2, 2):
        one = [(x[h] if x.dim() == 2 else x[b, h] if x is inputs[-1] else x[b, :, h]).numpy() for x in inputs]
        for out, expected in zip((y[b, :, h], last[b, h]), by_the_formula(version, *one), strict=True):
            np.testing.assert_allclose(out.numpy(), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("version", WKV)
def test_against_fla(version):
    """Somebody else's definition, in float32. By hand, once, WKV-7 also agreed with the naive_recurrent_rwkv7 of
    earlier releases (float64: 4e-14), output and all gradients."""
    theirs = fla_naive.load()
    if not theirs:
        pytest.skip("flash-linear-attention is not installed")
    inputs, upstream, _ = case(version, 64, 3, 2, 64, True, False, torch.float32)
    expected = outputs_and_grads(theirs[version], inputs, upstream, torch.float32)
    for op in ("torch", "chunked", "cpu"):
        out = outputs_and_grads(WKV[version], inputs, upstream, torch.float32, op=op)
        assert max(map(relative_error, out, expected)) < 2e-6


@pytest.mark.parametrize("version", WKV)
@pytest.mark.parametrize("op", ["torch", "chunked"])
def test_gradcheck(version, op):
    inputs = [x.double().requires_grad_() for x in realistic_inputs(1, 18, 1, 2, version=version)]
    assert torch.autograd.gradcheck(lambda *x: WKV[version](*x, op=op), inputs, fast_mode=True)


@pytest.mark.parametrize("version, op", FAST)
def test_a_sequence_in_two_pieces(version, op):
    """The state carries value and gradient from one piece to the next."""
    inputs, upstream, reference = case(version, 64, 3, 2, 64, True, False, torch.float32)

    def in_pieces(*x):
        *x, state = x
        y = []
        for part in (slice(37), slice(37, None)):
            out, state = WKV[version](*(z[:, part] if z.dim() == 4 else z for z in x), state, op=op)
            y.append(out)
        return torch.cat(y, 1), state

    check(version, outputs_and_grads(in_pieces, inputs, upstream, torch.float32), reference)


@pytest.mark.parametrize("version", WKV)
@pytest.mark.parametrize("which", ["y", "state"])
def test_only_one_result_used(version, which):
    inputs, _, _ = case(version, 17, 3, 2, 64, True, False, torch.float32)
    grads = []
    for op, dtype in (("torch", torch.float64), ("cpu", torch.float32)):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        y, state = WKV[version](*leaves, op=op)
        grads.append(torch.autograd.grad((y if which == "y" else state).sum(), leaves, allow_unused=True,
                                         materialize_grads=True))
    for x, ref in zip(grads[1], grads[0], strict=True):
        assert (x - ref).norm() <= 2e-6 * max(ref.norm(), 1)


@pytest.mark.parametrize("version", WKV)
def test_cpu_op_takes_any_strides_and_mixed_dtypes(version):
    B, T, H, N = 2, 19, 3, 64
    *inputs, state = realistic_inputs(B, T, H, N, version=version)
    inputs[1] = inputs[1].bfloat16()
    inputs[4] = inputs[4].half()
    odd = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs[:2]]
    odd += [inputs[2].mT.contiguous().mT, inputs[3][:, :1].expand(B, T, H, N)]
    odd += [torch.cat([x, x], -1)[..., N:] for x in inputs[4:]] + [state.mT.contiguous().mT]
    plain = [x.float().contiguous() for x in odd]
    upstream = torch.randn(()).expand(B, T, H, N), state.mT

    def run(inputs, op):
        leaves = [x.detach().requires_grad_() for x in inputs]
        y, last = WKV[version](*leaves, op=op)
        return [y, last, *torch.autograd.grad([y, last], leaves, upstream)]

    got = run(odd, "cpu")
    assert [x.dtype for x in got[2:]] == [x.dtype for x in odd]
    check(version, got, [x.double() for x in run(plain, "cpu")])


@pytest.mark.parametrize("version", WKV)
def test_cpu_op_does_not_depend_on_the_number_of_threads(version):
    inputs, upstream, _ = case(version, 64, 1, 1, 64, True, False, torch.float32)
    runs = []
    for n in (1, 2, 3):
        with threads(n):
            runs.append(outputs_and_grads(WKV[version], inputs, upstream, torch.float32, op="cpu"))
    for other in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], other, strict=True))


class Recorded(TorchDispatchMode):
    """Names of the operators that really ran."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("version", WKV)
@pytest.mark.parametrize("op, dtype, ran", [("auto", torch.float32, "cpu"), ("auto", torch.bfloat16, "cpu"),
                                            ("auto", torch.float64, "chunked"), ("cpu", torch.float16, "cpu"),
                                            ("chunked", torch.float32, "chunked"), ("torch", torch.float32, "torch")])
def test_which_op_ran(version, op, dtype, ran):
    assert pick_op(op, "cpu", dtype, version) == ran
    inputs = [x.to(dtype).requires_grad_() for x in realistic_inputs(1, 20, 1, 8, version=version)[:-1]]
    with Recorded() as record:
        WKV[version](*inputs, op=op)[0].sum().backward()
    name = f"rwkv_nb::wkv{version}"
    assert (name in record.names) == (f"{name}_backward" in record.names) == (ran == "cpu")
    assert ("aten::tril" in record.names) == (ran == "chunked")


@pytest.mark.parametrize("version", WKV)
def test_nothing_is_saved_without_grad(version):
    inputs = realistic_inputs(1, 20, 1, 8, version=version)[:-1]
    pick_op("cpu", "cpu")
    assert getattr(torch.ops.rwkv_nb, f"wkv{version}")(*inputs, None, False)[2].numel() == 0
    assert WKV[version](*inputs, op="cpu")[0].grad_fn is None


@pytest.mark.parametrize("version", WKV)
@pytest.mark.parametrize("op", ["auto", "cpu"])
def test_torch_compile_holds_the_cpu_op(version, op):
    inputs = [x.requires_grad_() for x in realistic_inputs(1, 20, 2, 16, version=version)[:-1]]
    pick_op("cpu", "cpu")
    torch.library.opcheck(getattr(torch.ops.rwkv_nb, f"wkv{version}"), (*inputs, None, True))
    whole = torch.compile(lambda *x: WKV[version](*x, op=op)[0].sin(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(whole(*inputs), WKV[version](*inputs)[0].sin())
    grads = [torch.autograd.grad(f(*inputs).sum(), inputs) for f in (whole, lambda *x: WKV[version](*x)[0].sin())]
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("version, op", [(7, "torch"), (6, "torch"), *FAST])
def test_autocast_leaves_the_recurrence_in_float32(version, op):
    inputs, _, reference = case(version, 64, 3, 2, 64, True, False, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, last = WKV[version](*inputs, op=op)
    check(version, [y, last], reference[:2])


def test_denormals_survive_loading():
    pick_op("cpu", "cpu")
    tiny = torch.full((100_000,), 1e-40)
    assert (tiny * 0.5 > 0).all()  # in every thread of torch's
    assert np.float32(1e-40) * np.float32(0.5) > 0


def test_a_wrong_call_says_what_is_wrong():
    r, w, k, v, a, b, state = realistic_inputs(1, 4, 2, 8)
    w5, u = (x[0, 0] for x in (w, a))
    for what, call in {
        "there is no WKV op 'gpu'": lambda: wkv7(r, w, k, v, a, b, op="gpu"),
        "k is [1, 3, 2, 8]": lambda: wkv7(r, w, k[:, :3], v, a, b),
        "the state is [1, 2, 8, 4]": lambda: wkv7(r, w, k, v, a, b, state[..., :4]),
        'does not take torch.float64 on cpu': lambda: wkv7(*(x.double() for x in (r, w, k, v, a, b)), op="cpu"),
        'does not take torch.float32 on cuda': lambda: pick_op("cpu", "cuda"),
        "w is [1, 4, 2, 8]": lambda: wkv5(r, w, k, v, u),
        "w is [2, 8]": lambda: wkv6(r, w5, k, v, u),
        "u is [1, 4, 2, 8]": lambda: wkv6(r, w, k, v, a),
        "r is [4, 2, 8]": lambda: wkv6(*(x[0] for x in (r, w, k, v)), u),
        "r is [1, 0, 2, 8]": lambda: wkv7(*(x[:, :0] for x in (r, w, k, v, a, b))),
    }.items():
        with pytest.raises(KernelError) as error:
            call()
        assert what in str(error.value) and "→" in str(error.value)


@pytest.mark.parametrize("error, expected", [
    (subprocess.CalledProcessError(1, "gcc"), KernelError), (RuntimeError("no kernel image"), KernelError),
    (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError)])
def test_whatever_a_gpu_kernel_fails_with_another_op_is_taken(error, expected, monkeypatch):
    """But for too little memory, which is another op's trouble too."""
    monkeypatch.setattr(selftest, "realistic_inputs", lambda *shape, device: [torch.zeros(1)])

    def wkv(*inputs):
        raise error

    with pytest.raises(expected):
        selftest.try_out(wkv)


def test_self_test_is_green():
    assert [(row.op, row.ok) for row in self_test()] == [("torch", True), ("chunked", True), ("cpu", True)]
