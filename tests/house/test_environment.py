"""pyproject.toml, environment.yml and constraints.txt say the same."""

import ast
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
COME_WITH_JUPYTERLAB = {"IPython", "jupyter_client"}   # it and the kernel are these


def test_the_conda_environment_has_the_same_packages():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pip = next(entry["pip"] for entry in conda if isinstance(entry, dict))
    assert [entry for entry in pip if not entry.startswith("-")] == PROJECT["dependencies"]
    assert "-c constraints.txt" in pip and "-e ." in pip
    assert "python" + PROJECT["requires-python"] in conda
    assert {"pip", "make", "cxx-compiler", "cuda-nvcc"} <= {entry for entry in conda if isinstance(entry, str)}


def test_every_requirement_is_pinned_to_a_version_that_fits():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    extras = PROJECT["optional-dependencies"]
    asked = [text for extra in ("test", "quant", "fla", "deepspeed", "datasets", "cuda") for text in extras[extra]
             if not text.startswith("rwkv_nb[")]
    for text in PROJECT["dependencies"] + asked:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text


def test_every_package_is_shipped():
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "rwkv_nb").rglob("*.py")}
    assert folders | {"rwkv_nb.cuda"} == set(PYPROJECT["tool"]["setuptools"]["packages"])


def test_what_is_imported_is_required():
    """A module that only a dependency's dependency, or the tests, brings in is missing one day."""
    imported = {name for path in (ROOT / "rwkv_nb").rglob("*.py") for name in top_level_imports(path)}
    owners = packages_distributions()
    extras = [text for extra, texts in PROJECT["optional-dependencies"].items() if extra != "test" for text in texts]
    required = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"] + extras}
    for name in imported - sys.stdlib_module_names - {"rwkv_nb", *COME_WITH_JUPYTERLAB}:
        # an extra that is not installed here goes by its module's name
        assert required & {canonicalize_name(owner) for owner in owners.get(name, [name])}, name


def top_level_imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]
