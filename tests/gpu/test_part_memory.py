"""The memory part of `make gpu-check`, tried on the CPU at a small size: its figures are near the prediction."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest


@pytest.fixture
def part(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])
    import part_memory
    return part_memory


def test_every_case_is_good_on_a_cpu_too(part, tmp_path):
    results = {name: work() for name, work in part.cases(Namespace(device="cpu", out=tmp_path))}
    assert all(result["ok"] for result in results.values()), results
    name, cell = next(iter(results.items()))
    assert cell["op"] == "cpu" and cell["with_context_gb"] == pytest.approx(cell["predicted_gb"], abs=0.01)
    assert name in part.table(results)


def test_a_missed_bar_is_not_good_once_all_cells_are_there(part, tmp_path):
    cells = [name for name, _ in part.cases(Namespace(device="cuda", out=tmp_path)) if name.count(" ") >= 2 and
             name.split()[-1] in part.QUANTS]
    assert len(cells) == 7 * 3 * 3

    def results(ratio, speed):
        return {name: {"peak_gb": 1, "with_context_gb": ratio * (0.8 if " small " in name else 1), "tutorial_gb": 1.0,
                       "tokens_per_s": speed if " small " in name else 300} for name in cells}

    assert part.bars(results(0.65, 250))["ok"]
    assert not part.bars(results(0.75, 250))["ok"] and not part.bars(results(0.65, 150))["ok"]
    lines = [json.dumps({"case": name, "machine": {}, "result": r}) for name, r in results(0.75, 250).items()]
    for found, expected in ((lines[:-1], []), (lines, [False])):
        (tmp_path / "memory.jsonl").write_text("\n".join(found))
        works = dict(part.cases(Namespace(device="cuda", out=tmp_path)))
        assert [works[name]()["ok"] for name in works if name == "bars"] == expected
    assert "balanced: geometric mean 0.75, asked for <= 0.7" in part.table(results(0.75, 250))
