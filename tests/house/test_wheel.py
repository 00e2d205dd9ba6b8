"""The wheel alone is enough: in an environment of its own it builds the C++ kernel from the sources it carries."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys, torch, rwkv_nb
from pathlib import Path
from rwkv_nb.wkv import wkv7
here = Path(rwkv_nb.__file__).parent
assert here.is_relative_to(sys.prefix), here
inputs = [torch.randn(2, 17, 3, 64).requires_grad_() for _ in range(6)]
results = []
for op in ("cpu", "torch"):
    scaled = [x * 0.1 for x in inputs]
    y, state = wkv7(*scaled, op=op)
    results.append([y, state, *torch.autograd.grad(y.square().sum() + state.sum(), inputs)])
torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
print("built and right")
"""


def run(*command, **variables):
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}   # it would lead to the checkout
    done = subprocess.run(command, cwd=variables.pop("cwd"), env=own | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


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


def test_the_wheel_builds_the_kernel_from_its_own_sources(environment, tmp_path):
    shipped, = environment.glob("lib/*/site-packages/rwkv_nb/cuda")
    assert contents(shipped) == contents(ROOT / "cuda")
    empty = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    assert "built and right" in run(environment / "bin/python", "-c", SCRIPT, cwd=tmp_path, **empty)


def test_the_command_is_there(environment, tmp_path):
    assert run(environment / "bin/rwkv-nb", "--version", cwd=tmp_path).strip()
