"""Every committed notebook ran from top to bottom without an error and reads like the others."""

import json
import re
from pathlib import Path

import pytest
from nbval.plugin import get_sanitize_patterns

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return json.loads(request.param.read_text(encoding="utf-8"))


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def tags(cell):
    return cell["metadata"].get("tags", [])


def test_ran_in_order_without_an_error(notebook):
    assert [cell["execution_count"] for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    for cell in code_cells(notebook):
        kinds = [output["output_type"] for output in cell["outputs"]]
        assert "raises-exception" in tags(cell) or "error" not in kinds, "".join(cell["source"])


def test_carries_no_widget_state_and_names_the_plain_kernel(notebook):
    assert "widgets" not in notebook["metadata"]
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"


def test_has_one_parameters_cell_and_short_cells(notebook):
    assert sum("parameters" in tags(cell) for cell in code_cells(notebook)) == 1
    assert max(len("".join(cell["source"]).splitlines()) for cell in code_cells(notebook)) <= 25


def test_opens_and_closes_with_words(notebook):
    assert notebook["cells"][0]["cell_type"] == notebook["cells"][-1]["cell_type"] == "markdown"
    assert "".join(notebook["cells"][0]["source"]).startswith("# ")


def test_each_leads_to_the_next():
    for path, following in zip(NOTEBOOKS, NOTEBOOKS[1:], strict=False):
        last = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][-1]["source"])
        assert f"({following.name})" in last, f"{path.name} has no link to {following.name} at its end"


def test_shows_nothing_of_the_machine_it_ran_on():
    for path in NOTEBOOKS:
        text = path.read_text(encoding="utf-8")
        assert str(ROOT) not in text and str(Path.home()) + "/" not in text, path.name


def test_the_sanitize_file_is_read_whole_by_nbval():
    text = (ROOT / "tests" / "nbval_sanitize.cfg").read_text()
    patterns = get_sanitize_patterns(text)
    assert len(patterns) == len(re.findall(r"^\[", text, re.MULTILINE)) > 0
    for pattern, _ in patterns:
        re.compile(pattern)
