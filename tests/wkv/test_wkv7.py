"""Every WKV-7 op against the definition in float64: output, last state and all gradients, fresh random inputs."""

import contextlib
import functools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from rwkv_nb.errors import KernelError
from rwkv_nb.wkv import pick_op, self_test, wkv7
from rwkv_nb.wkv.selftest import outputs_and_grads, realistic_inputs

FAST = ("chunked", "cpu")
NAMES = ("y", "state", "dr", "dw", "dk", "dv", "da", "db", "dstate")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@contextlib.contextmanager
def threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def one_thread():
    """The references are made of thousands of tiny operations; more threads would mostly wait for each other."""
    with threads(1):
        yield


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty is filled with NaN, in C++ too, so that a place which an op forgets to write is seen."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@functools.cache
def case(T, B, H, N, with_state, clamped, dtype):
    """Inputs rounded to dtype, gradients at y and the state, and the float64 results."""
    *six, state = realistic_inputs(B, T, H, N, clamped=clamped)
    inputs = [x.to(dtype) for x in six] + [state if with_state else None]
    upstream = torch.randn(B, T, H, N).to(dtype), torch.randn(B, H, N, N)
    return inputs, upstream, outputs_and_grads(wkv7, inputs, upstream, torch.float64, op="torch")


def check(out, reference):
    """Each result within 2e-6 of the reference as a vector, beyond the rounding of its own dtype once.

    The exception: a handful of dot products may all be small differences of large numbers (or exactly 0, such as dw
    of a first step without a state); there the error is measured against 1 a number.
    """
    for name, x, ref in zip(NAMES, out, reference, strict=False):
        unit = torch.finfo(x.dtype)
        rounding = ref.abs() * unit.eps / 2 + unit.smallest_normal * unit.eps / 2
        excess = ((x.double() - ref).abs() - rounding).clamp(min=0)
        size = max(ref.norm(), ref.numel() ** 0.5) if ref.numel() < 1000 else ref.norm()
        assert excess.norm() <= 2e-6 * size, f"{name}: {excess.norm() / size:.1e}"  # NaN fails too


@pytest.mark.parametrize("op", ["torch", *FAST])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("heads", [(1, 1), (2, 5)], ids=["few-heads", "many-heads"])  # below and above the threads
@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 100])
def test_against_float64(op, dtype, heads, T):
    for with_state, clamped in ((True, True), (False, False)):
        inputs, upstream, reference = case(T, *heads, 64, with_state, clamped, dtype)
        with threads(2 if op == "cpu" else 1):
            out = outputs_and_grads(wkv7, inputs, upstream, dtype, op=op)
        assert out[0].dtype == dtype and out[1].dtype == torch.float32
        check(out, reference)


@pytest.mark.parametrize("op", FAST)
@pytest.mark.parametrize("clamped", [True, False])
def test_long_sequence(op, clamped):
    inputs, upstream, reference = case(512, 1, 5, 64, True, clamped, torch.float32)
    check(outputs_and_grads(wkv7, inputs, upstream, torch.float32, op=op), reference)


@pytest.mark.parametrize("op", FAST)
@hypothesis_settings(max_examples=15, deadline=None)
@given(B=st.integers(1, 3), T=st.integers(1, 40), H=st.integers(1, 3), N=st.integers(1, 100), seed=st.integers(0, 999))
def test_any_shape(op, B, T, H, N, seed):
    torch.manual_seed(seed)
    inputs = realistic_inputs(B, T, H, N)
    upstream = torch.randn(B, T, H, N), torch.randn(B, H, N, N)
    reference = outputs_and_grads(wkv7, inputs, upstream, torch.float64, op="torch")
    check(outputs_and_grads(wkv7, inputs, upstream, torch.float32, op=op), reference)


def test_definition_against_the_formula_in_numpy():
    """From the formula alone, one head and one number at a time.

    By hand, once, all ops also agreed with fla's naive_recurrent_rwkv7 (float64: 4e-14) and its dplr_recurrence
    (float32: 3e-7), output and all gradients, T in {1, 17, 100}, clamped and unclamped decays. Present releases of
    fla no longer carry the former, so it is no dependency of this test.
    """
    B, T, H, N = 2, 6, 2, 5
    inputs = [x.double() for x in realistic_inputs(B, T, H, N)]
    r, w, k, v, a, b, S = (x.numpy().copy() for x in inputs)
    y = np.zeros((B, T, H, N))
    for bi, h, t in np.ndindex(B, H, T):
        old, new = S[bi, h].copy(), S[bi, h]
        for i, j in np.ndindex(N, N):
            sa = sum(old[i, m] * a[bi, t, h, m] for m in range(N))
            new[i, j] = (old[i, j] * np.exp(-np.exp(w[bi, t, h, j])) + sa * b[bi, t, h, j]
                         + v[bi, t, h, i] * k[bi, t, h, j])
        y[bi, t, h] = [sum(new[i, m] * r[bi, t, h, m] for m in range(N)) for i in range(N)]
    for op in ("torch", "chunked"):
        out, last = wkv7(*inputs, op=op)
        np.testing.assert_allclose(out.numpy(), y, rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(last.numpy(), S, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("op", ["torch", "chunked"])
def test_gradcheck(op):
    inputs = [x.double().requires_grad_() for x in realistic_inputs(1, 18, 1, 2)]
    assert torch.autograd.gradcheck(lambda *x: wkv7(*x, op=op), inputs, fast_mode=True)


@pytest.mark.parametrize("op", FAST)
def test_a_sequence_in_two_pieces(op):
    """The state carries value and gradient from one piece to the next."""
    inputs, upstream, reference = case(100, 2, 5, 64, True, True, torch.float32)

    def in_pieces(*x):
        *six, state = x
        first, state = wkv7(*(z[:, :37] for z in six), state, op=op)
        second, state = wkv7(*(z[:, 37:] for z in six), state, op=op)
        return torch.cat([first, second], 1), state

    check(outputs_and_grads(in_pieces, inputs, upstream, torch.float32), reference)


@pytest.mark.parametrize("which", ["y", "state"])
def test_only_one_result_used(which):
    inputs, _, _ = case(17, 2, 5, 64, True, True, torch.float32)
    grads = []
    for op, dtype in (("torch", torch.float64), ("cpu", torch.float32)):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        y, state = wkv7(*leaves, op=op)
        grads.append(torch.autograd.grad((y if which == "y" else state).sum(), leaves, allow_unused=True,
                                         materialize_grads=True))
    for name, x, ref in zip(NAMES[2:], grads[1], grads[0], strict=True):
        assert (x - ref).norm() <= 2e-6 * max(ref.norm(), 1), name


def test_cpu_op_takes_any_strides_and_mixed_dtypes():
    B, T, H, N = 2, 19, 3, 64
    r, w, k, v, a, b, state = realistic_inputs(B, T, H, N)
    odd = [r.transpose(1, 2).contiguous().transpose(1, 2), w.bfloat16(), k.mT.contiguous().mT,
           v[:, :1].expand(B, T, H, N), torch.cat([a, a], -1)[..., N:], b.half(),
           state.mT.contiguous().mT]
    plain = [x.float().contiguous() for x in odd]
    upstream = torch.randn(()).expand(B, T, H, N), state.mT

    def run(inputs, op):
        leaves = [x.detach().requires_grad_() for x in inputs]
        y, last = wkv7(*leaves, op=op)
        return [y, last, *torch.autograd.grad([y, last], leaves, upstream)]

    got = run(odd, "cpu")
    assert [x.dtype for x in got[2:]] == [x.dtype for x in odd]
    check(got, [x.double() for x in run(plain, "cpu")])


def test_cpu_op_does_not_depend_on_the_number_of_threads():
    inputs, upstream, _ = case(100, 1, 1, 64, True, True, torch.float32)
    runs = []
    for n in (1, 2, 3):
        with threads(n):
            runs.append(outputs_and_grads(wkv7, inputs, upstream, torch.float32, op="cpu"))
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


@pytest.mark.parametrize("op, dtype, ran", [("auto", torch.float32, "cpu"), ("auto", torch.bfloat16, "cpu"),
                                            ("auto", torch.float64, "chunked"), ("cpu", torch.float16, "cpu"),
                                            ("chunked", torch.float32, "chunked"), ("torch", torch.float32, "torch")])
def test_which_op_ran(op, dtype, ran):
    assert pick_op(op, "cpu", dtype) == ran
    six = [x.to(dtype).requires_grad_() for x in realistic_inputs(1, 20, 1, 8)[:6]]
    with Recorded() as record:
        wkv7(*six, op=op)[0].sum().backward()
    assert ("rwkv_nb::wkv7" in record.names) == ("rwkv_nb::wkv7_backward" in record.names) == (ran == "cpu")
    assert ("aten::linalg_solve_triangular" in record.names) == (ran == "chunked")


def test_nothing_is_saved_without_grad():
    six = realistic_inputs(1, 20, 1, 8)[:6]
    pick_op("cpu", "cpu")
    assert torch.ops.rwkv_nb.wkv7(*six, None, False)[2].numel() == 0
    assert wkv7(*six, op="cpu")[0].grad_fn is None


@pytest.mark.parametrize("op", ["auto", "cpu"])
def test_torch_compile_holds_the_cpu_op(op):
    six = [x.requires_grad_() for x in realistic_inputs(1, 20, 2, 16)[:6]]
    pick_op("cpu", "cpu")
    torch.library.opcheck(torch.ops.rwkv_nb.wkv7, (*six, None, True))
    whole = torch.compile(lambda *x: wkv7(*x, op=op)[0].sin(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(whole(*six), wkv7(*six)[0].sin())
    grads = [torch.autograd.grad(f(*six).sum(), six) for f in (whole, lambda *x: wkv7(*x)[0].sin())]
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y)


def test_autocast_leaves_the_recurrence_in_float32():
    inputs, _, reference = case(100, 2, 5, 64, True, True, torch.float32)
    for op in ("torch", *FAST):
        with torch.autocast("cpu", torch.bfloat16):
            y, last = wkv7(*inputs, op=op)
        check([y, last], reference[:2])


def test_denormals_survive_loading():
    pick_op("cpu", "cpu")
    tiny = torch.full((100_000,), 1e-40)
    assert (tiny * 0.5 > 0).all()  # in every thread of torch's
    assert np.float32(1e-40) * np.float32(0.5) > 0


def test_a_wrong_call_says_what_is_wrong():
    r, w, k, v, a, b, state = realistic_inputs(1, 4, 2, 8)
    for what, call in {
        "there is no WKV op 'gpu'": lambda: wkv7(r, w, k, v, a, b, op="gpu"),
        "k is [1, 3, 2, 8]": lambda: wkv7(r, w, k[:, :3], v, a, b),
        "the state is [1, 2, 8, 4]": lambda: wkv7(r, w, k, v, a, b, state[..., :4]),
        'does not take torch.float64 on cpu': lambda: wkv7(*(x.double() for x in (r, w, k, v, a, b)), op="cpu"),
        'does not take torch.float32 on cuda': lambda: pick_op("cpu", "cuda"),
        "r is [1, 0, 2, 8]": lambda: wkv7(*(x[:, :0] for x in (r, w, k, v, a, b))),
    }.items():
        with pytest.raises(KernelError) as error:
            call()
        assert what in str(error.value) and "→" in str(error.value)


def test_self_test_is_green():
    assert [(row.op, row.ok) for row in self_test()] == [("torch", True), ("chunked", True), ("cpu", True)]
