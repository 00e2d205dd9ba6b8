"""Runs the GPU kernels' sources on the CPU, in a process of its own, where their operators replace the CPU's.

    python on_host.py LIBRARY CASES       CASES in JSON; prints a line of JSON a case: {name of a result: its error}
"""

import functools
import json
import sys

import torch

from rwkv_nb.wkv import kernels, wkv5, wkv6, wkv7
from rwkv_nb.wkv.packed import borders
from rwkv_nb.wkv.selftest import realistic_inputs

WKV = {7: wkv7, 6: wkv6, 5: wkv5}
NAMES = {7: ("dr", "dw", "dk", "dv", "da", "db", "dstate"), 6: ("dr", "dw", "dk", "dv", "du", "dstate")}


def excess(x, reference) -> float:
    """‖x - reference‖ / ‖reference‖ beyond the rounding of x's own dtype once; sums of a handful of numbers are
    measured against 1 a number, for they may all be small differences of large ones."""
    unit = torch.finfo(x.dtype)
    rounding = reference.abs() * unit.eps / 2 + unit.smallest_normal * unit.eps / 2
    size = max(reference.norm().item(), reference.numel() ** 0.5 if reference.numel() < 1000 else 1e-30)
    return ((x.double() - reference).abs() - rounding).clamp(min=0).norm().item() / size


def results(wkv, inputs, upstream, dtype=None):
    """y, last state and all gradients; those of y and the last state (None: not used) are `upstream`."""
    leaves = [x if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    y, last = wkv(*leaves)
    used = [(out, grad.to(out.dtype)) for out, grad in zip((y, last), upstream, strict=True) if grad is not None]
    outs, grads = zip(*used, strict=True)
    wanted = [x for x in leaves if x is not None]
    return [y, last, *torch.autograd.grad(outs, wanted, grads, allow_unused=True, materialize_grads=True)]


def errors(version, T, B=1, H=1, N=64, dtype="float32", state=True, wide=False, only=None, odd=False, slow=False,
           texts=False, way=None):
    """way: what to test, by default the operators. only: "y" or "last", the one result that is used. odd: mixed
    dtypes, no tensor whole or at a round address. slow: decays so near 1 that thousands of steps are remembered.
    texts: the rows are some texts of random lengths each, and there are no states."""
    dtype, way = getattr(torch, dtype), way or functools.partial(kernels.run, f"wkv{version}")
    definition = functools.partial(WKV[version], op="torch")
    *inputs, first = realistic_inputs(B, T, H, N, version=version, wide=wide)
    if slow:
        inputs[1].uniform_(-10, -6)
    inputs = [x.to(dtype) for x in inputs] + [first if state else None]
    if odd:
        inputs[1] = inputs[1].bfloat16()
        inputs[2:5] = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in inputs[2:5]]
        inputs[0] = inputs[0].transpose(0, 1).contiguous().transpose(0, 1)
        inputs[3] = inputs[3][:, :1].expand(B, T, H, N)
    if texts:
        only, starts = "y", torch.rand(B, T) < 0.1
        starts[:, 0] = True
        inputs[-1] = None
        definition, way = _on_texts(definition, starts), _on_texts(way, borders(starts))
    upstream = (None if only == "last" else torch.randn(B, T, H, N).to(dtype),
                None if only == "y" else torch.randn(B, H, N, N))
    reference = results(definition, inputs, upstream, torch.float64)
    out = results(way, inputs, upstream)
    assert [x.dtype for x in out[2:]] == [x.dtype for x in inputs if x is not None]
    names = "y", "last", *NAMES[max(version, 6)]
    return {name: excess(x, ref) for name, x, ref in zip(names, out, reference, strict=False)}


def _on_texts(way, before):
    def with_texts(*inputs):
        y, _ = way(*inputs[:-1], before)
        return y, y.new_zeros(())  # there is no last state
    return with_texts


def check_what_is_kept():
    """What the operators keep for backward is as large as torch.compile is told, and below 2048 bytes a token."""
    for version in WKV:
        inputs = realistic_inputs(2, 1024, 3, 64, version=version)
        kept = getattr(torch.ops.rwkv_nb, f"wkv{version}")(*inputs, True)[2]
        begins = torch.tensor([0, 5, 1024, 1999, 2048])
        of_texts = getattr(torch.ops.rwkv_nb, f"wkv{version}")(*inputs[:-1], begins, True)
        with kernels.meta_as_gpu():
            *told, state = [x.to("meta") for x in inputs]
            assert getattr(torch.ops.rwkv_nb, f"wkv{version}")(*told, state, True)[2].shape == kept.shape
            borders = begins.to("meta")
            fakes = getattr(torch.ops.rwkv_nb, f"wkv{version}")(*told, borders, True)
            assert [x.shape for x in fakes] == [x.shape for x in of_texts]
        assert kept.nbytes / (2 * 1024 * 3) == 1024 + 256 * (version == 7)


def main():
    library, cases = sys.argv[1:]
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)   # torch.empty is filled with NaN: a forgotten place is seen
    kernels.load()
    torch.ops.load_library(library)
    for case in json.loads(cases):
        if case:
            print(json.dumps(errors(**case)), flush=True)
        else:
            check_what_is_kept()
            print("{}", flush=True)


if __name__ == "__main__":
    main()
