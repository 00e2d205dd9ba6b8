"""The mapping to flash-linear-attention against our definition: its naive recurrences, called as its kernels are, and
its kernels in Triton's interpreter."""

import functools
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fla_naive
import pytest
import torch

from rwkv_nb.errors import KernelError
from rwkv_nb.wkv import WKV, fla_op
from rwkv_nb.wkv.selftest import outputs_and_grads, realistic_inputs, relative_error

pytest.importorskip("fla", reason="flash-linear-attention is not installed")
WAYS = {7: fla_op.wkv7, 6: fla_op.wkv6, 5: fla_op.wkv5}


@pytest.mark.parametrize("version", WKV)
@pytest.mark.parametrize("with_state", [True, False])
def test_the_mapping_of_arguments_and_states(version, with_state):
    chunk = fla_naive.as_kernels()[max(version, 6)]
    *inputs, state = realistic_inputs(2, 19, 3, 16, version=version)
    inputs.append(state if with_state else None)
    upstream = torch.randn(2, 19, 3, 16), torch.randn(2, 3, 16, 16)
    expected = outputs_and_grads(WKV[version], inputs, upstream, torch.float64, op="torch")
    out = outputs_and_grads(functools.partial(WAYS[version], chunk=chunk), inputs, upstream, torch.float32)
    assert max(map(relative_error, out, expected)) < 2e-6


@pytest.mark.parametrize("version", (7, 6))
def test_the_kernels_still_take_these_arguments(version):
    """The naive forms above stand in for kernels that want a GPU; those must be called the same way."""
    pytest.importorskip("triton", reason="fla's kernels need triton")
    kernel = getattr(pytest.importorskip(f"fla.ops.rwkv{version}"), f"chunk_rwkv{version}")
    ours = inspect.signature(fla_naive.as_kernels()[version]).parameters
    theirs = inspect.signature(kernel).parameters
    assert list(ours)[:6] == list(theirs)[:6] if version == 7 else list(ours)[:5] == list(theirs)[:5]
    assert set(ours) <= set(theirs)


CASES = [{"version": 7, "dtype": "float16"}, {"version": 7, "dtype": "float16", "state": False},
         {"version": 6}, {"version": 6, "state": False, "wide": True}, {"version": 5}]


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """The errors of CASES by a copy of the package without what the interpreter cannot do: there a loop's variable is a
    number of Python's own, which has no .to(), and no kernel may call tl.gather by another name."""
    pytest.importorskip("triton", reason="fla's kernels need triton")
    copy = tmp_path_factory.mktemp("fla")
    shutil.copytree(importlib.util.find_spec("fla").submodule_search_locations[0], copy / "fla")
    for path in copy.rglob("*.py"):
        text = re.sub(r"\b(i_[a-z]+|T)\.to\(tl\.int64\)", r"\1", path.read_text())
        path.write_text(re.sub(r"^IS_GATHER_SUPPORTED =.*", "IS_GATHER_SUPPORTED = False", text, flags=re.MULTILINE))
    script, places = Path(__file__).parent / "in_triton.py", filter(None, (str(copy), os.environ.get("PYTHONPATH")))
    done = subprocess.run(
        [sys.executable, script, "fla_op", json.dumps([{"T": 19} | case for case in CASES])], text=True,
        capture_output=True, env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(places)})
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("i", range(len(CASES)), ids=["-".join(f"{k}={v}" for k, v in c.items()) for c in CASES])
def test_its_kernels_in_the_interpreter_against_float64(interpreted, i):
    for name, error in interpreted[i].items():
        assert error <= (4e-3 if "dtype" in CASES[i] else 1e-4 if "wide" in CASES[i] else 2e-6), name


def test_what_it_does_not_take_is_said(monkeypatch):
    with pytest.raises(KernelError, match="takes no float32 for WKV-7"):
        fla_op.wkv7(*torch.randn(6, 1, 2, 1, 16))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(KernelError, match=r"fla is not installed\n→ pip install 'rwkv_nb\[fla\]'"):
        fla_op.load()
