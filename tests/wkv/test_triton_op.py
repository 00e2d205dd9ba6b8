"""The Triton kernels without a GPU: in Triton's interpreter against float64, and through its compiler for GPUs.

Left out where triton is not installed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_nb.errors import KernelError
from rwkv_nb.wkv import pick_op, triton_op

triton = pytest.importorskip("triton", reason="triton is not installed")

CASES = [
    *({"version": v, "T": T, "B": 2, "N": 16, "state": T != 16, "wide": T != 17} for v in (7, 6) for T in (1, 16, 17)),
    *({"version": v, "T": 19, "H": 2, "N": 32, "dtype": d} for v in (7, 6, 5) for d in ("bfloat16", "float16")),
    *({"version": v, "T": 5, "B": 2, "H": 2, "N": 16, "odd": True} for v in (7, 6, 5)),
    *({"version": 7, "T": 3, "N": 16, "only": only} for only in ("y", "last")),
    {"version": 7, "T": 4},
    {"version": 5, "T": 250, "N": 16, "slow": True},
]


@pytest.fixture(scope="module")
def interpreted():
    script = Path(__file__).parent / "in_triton.py"
    done = subprocess.run([sys.executable, script, "triton_op", json.dumps(CASES)], capture_output=True, text=True,
                          env=os.environ | {"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("i", range(len(CASES)), ids=["-".join(f"{k}={v}" for k, v in c.items()) for c in CASES])
def test_in_the_interpreter_against_float64(interpreted, i):
    cut = CASES[i].get("odd") or CASES[i].get("dtype") == "bfloat16"  # the interpreter cuts to bf16, a GPU rounds
    for name, error in interpreted[i].items():
        assert error <= (4e-3 if cut else 2e-6), name


@pytest.mark.parametrize("delta", [True, False], ids=["WKV-7", "WKV-6"])
@pytest.mark.parametrize("kernel", ["_forward", "_backward"])
def test_triton_compiles_it_for_a_gpu(kernel, delta, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(triton_op, kernel)
    constants = {"N": 64, "ROWS": triton_op.ROWS, "SAVE": triton_op.SAVE, "DELTA": delta, "KEEP": True}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    fp32 = {"state", "last", "saved", "dlast", "dstate", "scratch"} | (set() if delta else {"da"})
    types = dict.fromkeys(constants, "constexpr") | dict.fromkeys(("T", "H"), "i32") | dict.fromkeys(fp32, "*fp32")
    source = triton.compiler.ASTSource(kernel, {name: types.get(name, "*bf16") for name in kernel.arg_names},
                                       {(kernel.arg_names.index(name),): value for name, value in constants.items()})
    built = triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", 90, 32))
    assert built.asm["cubin"] and ".target sm_90" in built.asm["ptx"]


def test_what_it_does_not_take_is_said():
    with pytest.raises(KernelError, match="does not take heads of 40 channels"):
        pick_op("triton", "cuda", head_size=40)
    with pytest.raises(KernelError, match="does not take torch.float32 on cpu"):
        pick_op("triton", "cpu")
