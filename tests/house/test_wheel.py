"""The wheel alone is enough: in an environment of its own it builds the C++ kernel from the sources it carries, once
for all processes that want it."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from rwkv_nb.wkv import build

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys, torch, rwkv_nb
from pathlib import Path
from rwkv_nb.wkv import wkv7
here = Path(rwkv_nb.__file__).parent
assert here.is_relative_to(sys.prefix), here
torch.manual_seed(0)
inputs = [torch.randn(2, 17, 3, 64).requires_grad_() for _ in range(6)]
results = []
for op in ("cpu", "torch"):
    scaled = [x * 0.1 for x in inputs]
    y, state = wkv7(*scaled, op=op)
    results.append([y, state, *torch.autograd.grad(y.square().sum() + state.sum(), inputs)])
torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
print("built and right")
"""


def start(*command, cwd, **variables):
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}   # it would lead to the checkout
    return subprocess.Popen(command, cwd=cwd, env=own | variables, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def finish(process):
    out, err = process.communicate()
    assert process.returncode == 0, out + err
    return out, err


def run(*command, cwd):
    return finish(start(*command, cwd=cwd))[0]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.*")}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """An empty virtual environment with the wheel in it; returns its folder.

    Torch and the other dependencies are borrowed from this environment through a .pth file, for they are gigabytes;
    pip still checks them against the wheel's own list, and all of rwkv_nb comes from the wheel.
    """
    folder = tmp_path_factory.mktemp("wheel")
    source, new = folder / "source", folder / "env"
    for name in ("rwkv_nb", "cuda"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source, cwd=folder)
    run(sys.executable, "-m", "venv", "--without-pip", new, cwd=folder)
    site = run(new / "bin/python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    Path(site, "borrowed.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    wheel, = folder.glob("*.whl")
    run(*pip, "--python", new, "install", "-q", "--no-index", wheel, cwd=folder)
    return new


def test_two_processes_build_the_kernel_once_from_the_wheels_own_sources(environment, tmp_path):
    """Before they start the cache holds what a killed build leaves behind: half a library, and the lock file on which
    torch would wait for ever."""
    shipped, = environment.glob("lib/*/site-packages/rwkv_nb/cuda")
    assert contents(shipped) == contents(ROOT / "cuda")
    cache, name = tmp_path / "cache", f"{build._stem()}-{build.digest(build._compiler_version())}"
    left = cache / "rwkv_nb" / f"{name}.build"
    left.mkdir(parents=True)
    (left / "lock").touch()
    (left / "rwkv_nb_cpu.so").write_bytes(b"half")
    empty = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(cache)}
    both = [start(environment / "bin/python", "-c", SCRIPT, cwd=tmp_path, **empty) for _ in range(2)]
    said = [finish(process) for process in both]
    assert [out.strip() for out, _ in said] == ["built and right"] * 2
    assert sum(err.count("compiling the C++ WKV kernels") for _, err in said) == 1
    assert [path.name for path in cache.rglob("*.so")] == [f"{name}.so"]
    assert not list(cache.rglob("*.build"))


def test_the_command_is_there(environment, tmp_path):
    assert run(environment / "bin/rwkv-nb", "--version", cwd=tmp_path).strip()
