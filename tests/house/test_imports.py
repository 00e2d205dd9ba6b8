"""Importing the library does nothing: no variable read or set, no kernel built, no thread, no setting of torch."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

LIBRARY = Path(__file__).parents[2] / "rwkv_nb"
# The rooms of the house from the ground up: each imports only what stands before it.
ROOMS = """errors words fields config extras tokenizer runs wkv dropout quant data model loss lora generate evaluate
           talk hub memory fit export train compat check notebook_runner cli widgets""".split()
IMPORT_ALL = """
import importlib, os, pkgutil, sys, threading
import rwkv_nb
def import_all(leave_out="nothing"):
    for module in pkgutil.walk_packages(rwkv_nb.__path__, "rwkv_nb."):
        if not module.name.startswith(leave_out):
            importlib.import_module(module.name)
"""


def run(script, folder):
    """Run a script in a fresh Python whose home is `folder`/home."""
    home = folder / "home"
    home.mkdir()
    variables = {"HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache"), "MPLCONFIGDIR": str(folder / "matplotlib"),
                 "IPYTHONDIR": str(folder / "ipython")}
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL + script], cwd=folder, env=os.environ | variables,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(home.rglob("*")) == [], "importing wrote files"
    return done.stdout.strip()


def test_importing_every_module_changes_nothing(tmp_path):
    assert run("""
import torch, IPython.display, ipywidgets, matplotlib, nbclient, jupyter_client, pyrwkv_tokenizer, safetensors.torch
def state():
    return (dict(os.environ), os.getcwd(), threading.active_count(), torch.get_num_threads(), torch.initial_seed(),
            torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(), torch.cuda.is_initialized(),
            matplotlib.get_backend(auto_select=False))
before = state()
import_all()
print(state() == before)
""", tmp_path) == "True"


def test_widgets_and_matplotlib_live_in_one_room(tmp_path):
    assert run("""
import_all(leave_out="rwkv_nb.widgets")
print({"ipywidgets", "matplotlib"} & set(sys.modules) or "neither")
""", tmp_path) == "neither"


@pytest.mark.parametrize("path", sorted(LIBRARY.rglob("*.py")), ids=lambda path: str(path.relative_to(LIBRARY)))
def test_no_environment_variable_is_read_at_import(path):
    def at_import(node):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        yield node
        for child in ast.iter_child_nodes(node):
            yield from at_import(child)

    names = [getattr(node, "attr", getattr(node, "id", "")) for node in at_import(ast.parse(path.read_text()))]
    assert not {"environ", "getenv"} & set(names)


@pytest.mark.parametrize("path", sorted(LIBRARY.rglob("*.py")), ids=lambda path: str(path.relative_to(LIBRARY)))
def test_each_room_imports_only_what_stands_below_it(path):
    package = [LIBRARY.name, *path.relative_to(LIBRARY).parent.parts]
    room = [*package, path.stem][1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            whole = package[:len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            for other in whole[1:2] or [alias.name for alias in node.names if alias.name in ROOMS]:
                assert ROOMS.index(other) < ROOMS.index(room) or other == room, f"{room} imports {other}"
