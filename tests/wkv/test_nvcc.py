"""The GPU kernels without a GPU: their own source on the CPU against float64, and through nvcc for every GPU.

What no machine without a GPU can show is in tests/gpu/.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from host_build import CUDA, compile_on_host, run

from rwkv_nb.errors import KernelError
from rwkv_nb.wkv import kernels, nvcc, pick_op

HERE = Path(__file__).parent
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
NVCC = nvcc.find_nvcc()
BUILD = """
import os, sys
import torch
from rwkv_nb.wkv import kernels, nvcc
compile = nvcc.Nvcc.compile
nvcc.Nvcc.compile = lambda *args: print(compile(*args, "-Xptxas=-v"))
kernels.load()
os.environ["XDG_CACHE_HOME"], *architectures = sys.argv[1:]
nvcc.build_for(architectures)
print("registered:", *(torch._C._dispatch_has_kernel_for_dispatch_key(f"rwkv_nb::{name}", "CUDA")
                       for name in ("wkv7", "wkv6_backward", "wkv5", "shift", "loss")))
"""
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc here")

# Chunks of 16 steps: lengths around their ends. 128 heads and more take another kernel than fewer. Backward's time is
# in pieces, of a chunk each or, where there are many heads, of more.
CASES = [
    *({"version": v, "T": T, "B": 2 if T < 60 else 1, "state": T != 16, "wide": T % 2 == 0}
      for v in (7, 6, 5) for T in (1, 8, 15, 16, 17, 64, 257)),
    *({"version": v, "T": T, "H": 2, "dtype": dtype, "state": T == 17, "wide": T != 17}
      for v in (7, 6, 5) for T in (17, 33) for dtype in ("bfloat16", "float16")),
    {"version": 7, "T": 70, "H": 128},
    *({"version": v, "T": 19, "H": 128, "wide": True} for v in (6, 5)),
    *({"version": v, "T": 77, "B": 2, "H": 2, "texts": True, "dtype": d} for v in (7, 6, 5)
      for d in ("float32", "bfloat16")),
    {"version": 7, "T": 50, "B": 3, "H": 14, "texts": True},
    *({"version": v, "T": 19, "B": 2, "H": 2, "odd": True} for v in (7, 6, 5)),
    *({"version": v, "T": 18, "only": only} for v in (7, 6) for only in ("y", "last")),
    *({"version": v, "T": 1500, "slow": True} for v in (7, 5)),
]


def on_host(library, cases):
    lines = run(sys.executable, HERE / "on_host.py", library, json.dumps(cases)).splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def host_errors(tmp_path_factory):
    return on_host(compile_on_host(tmp_path_factory, "wkv"), [*CASES, None])


@pytest.mark.parametrize("i", range(len(CASES)), ids=["-".join(f"{k}={v}" for k, v in c.items()) for c in CASES])
def test_the_kernels_source_against_float64(host_errors, i):
    for name, error in host_errors[i].items():
        assert error <= (1e-5 if name == "dw" else 2e-6), name  # NaN fails too; dw is a small rest of large sums


def test_what_is_kept_for_backward(host_errors):
    assert len(host_errors) == len(CASES) + 1  # the last looked at it


def test_memory_is_told_of_as_many_pieces_as_there_are(tmp_path):
    sizes = [(heads, T) for heads in (1, 3, 32, 100, 511, 512, 600) for T in (1, 16, 17, 100, 512, 1000, 4096)]
    asked = "".join(f'std::printf("%ld ", long(rwkv_nb::pieces_of({heads}, {T})));' for heads, T in sizes)
    (tmp_path / "a.cpp").write_text('#include "wkv_gpu.h"\n#include <cstdio>\nint main() {' + asked + "}")
    run("c++", "-std=c++17", f"-I{CUDA}", tmp_path / "a.cpp", "-o", tmp_path / "a")
    assert list(map(int, run(tmp_path / "a").split())) == [kernels.pieces_of(*size) for size in sizes]


def test_a_missing_barrier_is_seen(tmp_path, tmp_path_factory):
    """The fibers of host.h run in random order, so that the tests above say something about barriers."""
    unsafe = Path(shutil.copytree(CUDA, tmp_path / "unsafe"))
    source = unsafe / "wkv_values.cuh"
    whole = source.read_text()
    source.write_text(whole.replace("    __syncthreads();\n    if (i + 1 < chunks)", "    if (i + 1 < chunks)"))
    assert source.read_text() != whole
    result, = on_host(compile_on_host(tmp_path_factory, "wkv", sources=unsafe), [{"version": 7, "T": 40}])
    assert result["y"] > 1e-3


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """What a process says that builds and loads the library for all architectures."""
    cache = tmp_path_factory.mktemp("cache")
    said = run(sys.executable, "-c", BUILD, cache, *ARCHITECTURES)
    assert len(list(cache.rglob("*.so"))) == 1
    return said


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_without_spills(built, architecture):
    functions = re.findall(rf"Compiling entry function '\S+' for '{architecture}'\n(.*\n.*\n.*Used .*)", built)
    registers = [int(n) for text in functions for n in re.findall(r"Used (\d+) registers", text)]
    spills = [numbers for text in functions for numbers in re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)]
    # 5 a version and dtype (WKV-6 and -5 share float's), 18 pointwise, 3 of the loss
    assert len(registers) == len(spills) == 61
    assert set(spills) == {("0", "0", "0")} and max(registers) <= 255
    assert "warning" not in built


@needs_nvcc
def test_the_built_library_registers_its_operators(built):
    assert built.splitlines()[-1] == "registered: True True True True True"


def fake_nvcc(path, version):
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\necho release {version}, V{version}.1\n")
    path.chmod(0o755)


def test_the_compiler_is_looked_for_in_order(tmp_path, monkeypatch):
    """The first of system, conda and pip that has torch's CUDA version, else the first of all."""
    for name, version in (("system", "12.8"), ("conda", "13.0")):
        fake_nvcc(tmp_path / name / "bin" / "nvcc", version)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "system"))
    monkeypatch.setenv("CONDA_PREFIX", str(tmp_path / "conda"))
    assert nvcc.find_nvcc("12.4") == (tmp_path / "system/bin/nvcc", "system", "12.8.1")
    assert nvcc.find_nvcc("13.0")[1:] != ("system", "12.8.1")
    assert nvcc.find_nvcc("99.9") == nvcc.find_nvcc("12.4")
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setattr(nvcc, "_places", lambda: ())
    assert nvcc.find_nvcc() is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_gpu_or_compiler_is_told(tmp_path, monkeypatch):
    with pytest.raises(KernelError, match="torch sees no GPU"):
        pick_op("cuda", "cuda")
    with pytest.raises(KernelError, match="does not take torch.float32 on cpu"):
        pick_op("cuda", "cpu")
    monkeypatch.setattr(nvcc, "_places", lambda: ())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(KernelError, match=r"no CUDA compiler was found\n→ install .*rwkv_nb\[cuda\]"):
        nvcc.build_for(["sm_80"])


@needs_nvcc
def test_a_compiler_that_fails_is_quoted(tmp_path):
    with pytest.raises(KernelError, match="sm_1"):
        NVCC.compile(tmp_path, "-arch=sm_1")


def test_heads_of_another_width_are_refused_before_anything_is_compiled():
    with pytest.raises(KernelError, match='"cuda" does not take heads of 8 channels'):
        pick_op("cuda", "cuda", head_size=8)
