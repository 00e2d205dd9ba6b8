"""The compiled kernels as torch operators: shapes for torch.compile, and gradients. Sources: cuda/.

Every version's operator is wkvX(*inputs, state, save) -> (y, last state, what backward needs) with a
wkvX_backward(*inputs, state, saved, dy, dlast) -> (gradients of the inputs, of the state). On a GPU, the place of the
state may hold int64 [texts + 1]: where texts begin in the B·T steps, and the end; then no state goes in or comes out.
"""

import contextlib
import functools
import threading
from collections.abc import Iterator

import torch

from .build import load_cpu_kernels, remembered
from .nvcc import load_cuda_kernels
from .selftest import try_out

VERSIONS = ("wkv7", "wkv6", "wkv5")
SAVE = 16       # steps between two states that the GPU kernels keep for backward
CUDA_HEAD = 64  # channels of a head that the GPU kernels take
BUSY = 512      # heads times pieces of time that keep a GPU busy

_lock = threading.Lock()
_loaded: set[str] = set()  # types of device whose pointwise kernels and loss are loaded


def run(name, *inputs):
    """One operator of torch.ops.rwkv_nb by its name ("wkv7"); `inputs` and results as of `wkv7` and its like, the
    state, or None, last. `load` comes first."""
    *inputs, state = inputs
    inputs = (*inputs, state if state is None or _are_texts(state) else state.float())
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    y, last, _ = getattr(torch.ops.rwkv_nb, name)(*inputs, save)
    return y, last


@torch.compiler.assume_constant_result
def load() -> None:
    """Load the kernels, compiling them if need be, and register what autograd and torch.compile must know.

    Safe to call often and from several threads. Raises KernelError where the kernels cannot be had.
    """
    with _lock:
        _load_once()


@torch.compiler.assume_constant_result
def load_cuda() -> None:
    """`load` for GPUs, and a step of time on one. The CPU's kernels come along: the schemas are theirs."""
    load()
    with _lock:
        _load_cuda_once()


@functools.cache
def _load_once() -> None:
    load_cpu_kernels()
    for name in VERSIONS:
        torch.library.register_fake(f"rwkv_nb::{name}", functools.partial(_fake, name))
        torch.library.register_fake(f"rwkv_nb::{name}_backward", _fake_backward)
        torch.library.register_autograd(f"rwkv_nb::{name}", functools.partial(_backward, name), setup_context=_setup)
    _register_gpu_operators()


@remembered
def _load_cuda_once() -> None:
    load_cuda_kernels()
    try_out(functools.partial(run, "wkv7"))
    _loaded.add("cuda")


@contextlib.contextmanager
def meta_as_gpu() -> Iterator[None]:
    """Inside, tensors on meta, sizes without numbers, are computed with as a GPU's are. `load` comes first."""
    _loaded.add("meta")
    try:
        yield
    finally:
        _loaded.discard("meta")


def _register_gpu_operators() -> None:
    """The shapes of the operators that are the GPU's alone: of the pointwise steps and the loss."""
    def like(x):
        return x.new_empty(x.shape)

    def shift_back(x, before, mixes, dy):
        last = [] if before.dtype == torch.bool else [like(before)]
        return [like(x), *last, *(like(mix) for mix in mixes if mix.numel() > x.shape[-1])]

    for name, fake in {
            "shift": lambda x, before, mixes: [like(x) for _ in mixes],
            "shift_backward": shift_back,
            "prepare": lambda inputs, mix, v_first: [like(inputs[2]) for _ in range(5)],
            "prepare_backward": lambda inputs, mix, v_first, grads: [
                like(inputs[2]) for _ in range(4 if mix is None else 6)],
            "finish": lambda inputs, rkv, eps: like(inputs[1]),
            "finish_backward": lambda inputs, rkv, eps, d_out: [*map(like, inputs[:2]), *map(like, rkv[:3])],
            "loss": lambda logits, *_: logits.new_empty(len(logits), 2, dtype=torch.float32)}.items():
        torch.library.register_fake(f"rwkv_nb::{name}", fake)


def on_gpu(*tensors) -> bool:
    """Whether the GPU's kernels are loaded and take these tensors, None left out: all on a GPU, of one dtype."""
    if not _loaded:     # a CPU's steps need not look at each tensor
        return False
    there = [x for x in tensors if x is not None]
    kinds = {(x.device.type, x.dtype) for x in there}
    return len(kinds) == 1 and there[0].device.type in _loaded and there[0].dtype != torch.float64


def _fake(name, r, *others):
    *_, state, save = others
    B, T, H, N = r.shape
    last = r.new_empty(0 if _are_texts(state) else B, H, N, N, dtype=torch.float32)
    sa = name == "wkv7"
    if r.device.type in _loaded:
        states = B * T // SAVE + len(state) - 1 if _are_texts(state) else -(-T // SAVE) * B
        return r.new_empty(r.shape), last, last.new_empty((sa * r.numel() + states * H * N * N) if save else 0)
    return r.new_empty(r.shape), last, last.new_empty(B, T if sa and save else 0, H, N)


def _fake_backward(*args):
    *inputs, state, saved, _dy, _dlast = args
    B, _, H, N = inputs[0].shape
    begun = state is not None and not _are_texts(state)
    return *(x.new_empty(x.shape) for x in inputs), saved.new_empty(B if begun else 0, H, N, N)


def room_of(function, args) -> int:
    """Bytes that an operator takes for itself while it works: those of a GPU's wkvX_backward are gradients of states,
    one for each piece of time, and WKV-7's gb."""
    name = function.name() if function.namespace == "rwkv_nb" else ""
    if not ("::wkv" in name and "_backward" in name and args[0].device.type in _loaded):
        return 0
    B, T, H, N = args[0].shape
    return 4 * (B * H * pieces_of(B * H, T) * N * N + ("wkv7" in name) * args[0].numel())


def pieces_of(heads: int, T: int) -> int:
    """Pieces of time that a GPU's backward works on side by side; as of cuda/wkv_gpu.h."""
    chunks = -(-T // SAVE)
    return -(-chunks // -(-chunks // min(-(-BUSY // heads), chunks)))


def _are_texts(state) -> bool:
    return state is not None and not state.is_floating_point()


def _setup(ctx, inputs, output):
    *tensors, _save = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)


def _backward(name, ctx, dy, dlast, _dsaved):
    *inputs, state, saved = ctx.saved_tensors
    if dy is None and dlast is None:
        return (None,) * (len(inputs) + 2)
    *grads, dstate = getattr(torch.ops.rwkv_nb, f"{name}_backward")(*inputs, state, saved, dy, dlast)
    return *grads, None if state is None or _are_texts(state) else dstate, None
