"""Every notebook against its committed outputs."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(0)     # a cell has its own limit
def test_every_notebook_prints_what_it_printed(tmp_path):
    """Each once, in a copy: they hand on through its runs/, and those of the checkout stay as they are."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    (tmp_path / "data_samples").symlink_to(ROOT / "data_samples")
    names = sorted(path.name for path in (tmp_path / "notebooks").glob("*.ipynb"))
    command = [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", ".", "--timeout=600",
               "--durations=10", "--nbval", "--nbval-current-env", "--nbval-sanitize-with",
               ROOT / "tests" / "nbval_sanitize.cfg", *names]
    done = subprocess.run(command, cwd=tmp_path / "notebooks", text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    print(done.stdout)   # how long the cells took: seen with -rP
