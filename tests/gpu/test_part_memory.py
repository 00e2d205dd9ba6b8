"""The memory part of `make gpu-check`, tried on the CPU at a small size: its figures are near the prediction."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest


def test_memory(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])
    import part_memory

    (name, work), = part_memory.cases(Namespace(device="cpu"))
    result = work()
    assert result["ok"] and result["op"] == "cpu"
    assert result["with_context_gb"] == pytest.approx(result["predicted_gb"], abs=0.01)
    assert name in part_memory.table({name: result})
    assert len(list(part_memory.cases(Namespace(device="cuda")))) == 7 * 3 * 3
