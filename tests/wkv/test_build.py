"""Where nothing can be compiled or kept, each in a process of its own. Compiling itself is in house/test_wheel.py."""

import os
import subprocess
import sys
from pathlib import Path

from rwkv_nb.wkv import build, compiler_info, pick_op

CHECK = """
import warnings
import torch
from rwkv_nb.wkv import left_out, pick_op, self_test
from rwkv_nb.errors import KernelError
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print("auto:", pick_op("auto", "cpu"), pick_op("auto", "cpu"), "warnings:", len(caught))
for w in caught: print(w.message)
print("left out:", *(why.split(":")[0] for why in left_out(pick_op("auto", "cpu"), "cpu", torch.float32)))
for row in self_test(["cpu"]): print("self-test:", row.ok, row.note)
"""


def check(**env):
    """CHECK in a fresh process; what it printed."""
    done = subprocess.run([sys.executable, "-c", CHECK], env=os.environ | env, text=True, capture_output=True,
                          cwd=Path(build.__file__).parents[2])
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_a_built_library_needs_no_compiler(tmp_path):
    pick_op("cpu", "cpu")
    out, err = check(PATH=str(tmp_path))
    assert "auto: cpu cpu warnings: 0" in out and "self-test: True" in out
    assert "compiling" not in err


def test_no_compiler_is_a_warning_and_the_chunked_form(tmp_path):
    out, _ = check(XDG_CACHE_HOME=str(tmp_path), PATH=str(tmp_path))
    assert "auto: chunked chunked warnings: 1" in out
    assert 'left out: WKV runs without op "cpu", perhaps several times slower' in out
    assert "no C++ compiler was found" in out and "apt install g++" in out
    assert "self-test: False no C++ compiler was found" in out


def test_a_compiler_that_fails_is_quoted(tmp_path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho this compiler is broken\nexit 1\n")
    broken.chmod(0o755)
    out, _ = check(XDG_CACHE_HOME=str(tmp_path), CXX=str(broken))
    assert "auto: chunked chunked warnings: 1" in out
    assert "did not compile" in out and "this compiler is broken" in out and "→ install a C++ compiler" in out


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "rwkv_nb").write_text("a file where the folder should be")
    out, _ = check(XDG_CACHE_HOME=str(tmp_path))
    assert "auto: chunked chunked warnings: 1" in out and str(tmp_path / "rwkv_nb") in out


def test_compiler_info_says_what_would_compile():
    info = compiler_info()
    assert set(info) == {"compiler", "version", "ninja", "library", "flags"}
    assert "-march=native" in info["flags"] and "fast-math" not in info["flags"]
