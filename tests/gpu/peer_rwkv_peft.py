"""RWKV-PEFT's CUDA kernels beside ours: `--peer` of gpu_check.py. Their folder `cuda/` lies at build/RWKV-PEFT/cuda.

Built as its rwkvt/operator/rwkvop.py builds them, at the first call. They take bfloat16, contiguous, and T % 16 == 0;
WKV-6's w as -exp(w) in float32.
"""

import functools
from pathlib import Path

import torch
from einops import rearrange
from torch.utils import cpp_extension

from rwkv_nb.wkv.nvcc import find_nvcc

SOURCES = Path(__file__).parents[2] / "build" / "RWKV-PEFT" / "cuda"
CHUNK, LONGEST = 16, 4096
FLAGS = ("-res-usage", "--use_fast_math", "-O3", "-Xptxas -O3", "--extra-device-vectorization")


@functools.cache
def _ops(name, *defines):
    cpp_extension.CUDA_HOME = str(find_nvcc().root())  # torch's guess from PATH may be a script's folder
    files = [str(SOURCES / f"{name}_cuda.cu"), str(SOURCES / f"{name}_op.cpp")]
    module = cpp_extension.load(f"{name}_peer", files, is_python_module=name == "wkv6",
                                extra_cuda_cflags=[*FLAGS, *defines])
    return module if name == "wkv6" else torch.ops.wind_backstepping


class _Wkv7(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        B, T, H, N = inputs[0].shape
        kernels, y = _ops("wkv7", "-D_C_=64", f"-D_CHUNK_LEN_={CHUNK}"), torch.empty_like(inputs[0])
        fp32 = {"dtype": torch.float32, "device": y.device}
        states, sa = torch.empty(B, H, T // CHUNK, N, N, **fp32), torch.empty(B, T, H, N, **fp32)
        kernels.forward(*inputs, y, states, sa)
        ctx.save_for_backward(*inputs, states, sa)
        return y

    @staticmethod
    def backward(ctx, dy):
        *inputs, states, sa = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in inputs]
        _ops("wkv7", "-D_C_=64", f"-D_CHUNK_LEN_={CHUNK}").backward(*inputs, dy.contiguous(), states, sa, *grads)
        return tuple(grads)


class _Wkv6(torch.autograd.Function):
    @staticmethod
    def forward(ctx, r, k, v, w, u):
        (B, T, H, N), kernels = r.shape, _ops("wkv6", "-D_N_=64", f"-D_T_={LONGEST}")
        flat = [rearrange(x, "B T H N -> B T (H N)") for x in (r, k, v, -w.float().exp())]
        y = torch.empty_like(flat[0])
        kernels.forward(B, T, H * N, H, *flat, u, y)
        ctx.save_for_backward(*flat, u)
        return y.view(r.shape)

    @staticmethod
    def backward(ctx, dy):
        *flat, u = ctx.saved_tensors
        (B, T, C), (H, _) = flat[0].shape, u.shape
        *grads, du = [torch.empty_like(flat[0]) for _ in flat] + [u.new_empty(B, C)]
        _ops("wkv6", "-D_N_=64", f"-D_T_={LONGEST}").backward(B, T, C, H, *flat, u, dy.reshape(B, T, C), *grads, du)
        return *(x.view(dy.shape) for x in grads), du.sum(0).view(u.shape)


def wkv7(r, w, k, v, a, b):
    """y [B,T,H,64]. They name r q, a z and b a."""
    return _Wkv7.apply(w, r, k, v, a, b)


def wkv6(r, w, k, v, u):
    """As `wkv7`."""
    return _Wkv6.apply(r, k, v, w, u)


KERNELS = {"RWKV-PEFT": (7, wkv7), "RWKV-PEFT v6": (6, wkv6)}
