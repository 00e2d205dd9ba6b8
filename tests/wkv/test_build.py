"""Compiling and caching, each in a process of its own with a cache folder of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_nb.wkv import build, compiler_info

CHECK = """
import warnings
from rwkv_nb.wkv import pick_op, self_test
from rwkv_nb.errors import KernelError
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print("auto:", pick_op("auto", "cpu"), pick_op("auto", "cpu"), "warnings:", len(caught))
for w in caught: print(w.message)
for row in self_test(["cpu"]): print("self-test:", row.ok, row.note)
"""


def start(cache, **env):
    """CHECK in a fresh process."""
    env = {**os.environ, "XDG_CACHE_HOME": str(cache), **env}
    return subprocess.Popen([sys.executable, "-c", CHECK], env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, cwd=Path(build.__file__).parents[2])


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, err


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A cache folder in which two processes have compiled at once, and what they said. Before they start it holds
    what a killed build leaves behind: half a library, and the lock file on which torch would wait for ever."""
    cache = tmp_path_factory.mktemp("cache")
    left = cache / "rwkv_nb" / (build.library_name() + ".build")
    left.mkdir(parents=True)
    (left / "lock").touch()
    (left / "rwkv_nb_cpu.so").write_bytes(b"half")
    return cache, [finish(p) for p in (start(cache), start(cache))]


def test_two_processes_compile_once(built):
    cache, said = built
    for out, _ in said:
        assert "auto: cpu cpu warnings: 0" in out and "self-test: True" in out
    assert sum(err.count("compiling the C++ WKV kernels") for _, err in said) == 1
    assert [p.name for p in cache.rglob("*.so")] == [build.library_name() + ".so"]
    assert not list(cache.rglob("*.build"))


def test_a_built_library_needs_no_compiler(built, tmp_path):
    out, err = finish(start(built[0], PATH=str(tmp_path)))
    assert "auto: cpu cpu warnings: 0" in out and "self-test: True" in out
    assert "compiling" not in err


def test_no_compiler_is_a_warning_and_the_chunked_form(tmp_path):
    out, _ = finish(start(tmp_path, PATH=str(tmp_path)))
    assert "auto: chunked chunked warnings: 1" in out
    assert 'WKV runs without op "cpu"' in out and "no C++ compiler was found" in out and "apt install g++" in out
    assert "self-test: False no C++ compiler was found" in out


def test_a_compiler_that_fails_is_quoted(tmp_path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho this compiler is broken\nexit 1\n")
    broken.chmod(0o755)
    out, _ = finish(start(tmp_path, CXX=str(broken)))
    assert "auto: chunked chunked warnings: 1" in out
    assert "did not compile" in out and "this compiler is broken" in out and "→ install a C++ compiler" in out


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "rwkv_nb").write_text("a file where the folder should be")
    out, _ = finish(start(tmp_path))
    assert "auto: chunked chunked warnings: 1" in out and str(tmp_path / "rwkv_nb") in out


def test_compiler_info_says_what_would_compile():
    info = compiler_info()
    assert set(info) == {"compiler", "version", "ninja", "library", "flags"}
    assert "-march=native" in info["flags"] and "fast-math" not in info["flags"]
