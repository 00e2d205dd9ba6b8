"""Errors as a person meets them."""

import re

import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell

from rwkv_nb.errors import SettingsError, out_of_memory


def test_a_notebook_shows_what_is_wrong_and_what_to_do_and_no_pages_of_code(capsys):
    shell = InteractiveShell()
    shell.run_cell("from rwkv_nb.runs import Run\nRun('/proc/none').update(micro_bsz=0)")
    shown = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).strip().splitlines()
    assert shown[:2] == ["SettingsError: micro_bsz is 0", "→ it must be at least 1"]
    assert re.match(r"\(raised in \w+\.py, line \d+", shown[2]) and len(shown) == 3


def test_the_place_is_said_once():
    assert str(SettingsError("r is 0", where="r", fix="raise it")) == "r is 0\n→ raise it"
    assert str(SettingsError("this is not JSON", where="a.jsonl:3")) == "a.jsonl:3: this is not JSON"


@pytest.mark.parametrize("error, is_it", [
    (MemoryError(), True),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), True),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True),
    (RuntimeError("WKV on the GPU failed: CUDA error 2"), True),
    (RuntimeError("WKV on the GPU failed: CUDA error 209"), False),     # no kernel for this GPU
    (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), False),
    (OSError("out of memory"), False),
])
def test_what_says_that_memory_ran_out(error, is_it):
    assert out_of_memory(error) == is_it
