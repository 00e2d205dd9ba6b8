"""Notebook 00's report: what this machine has, and what a machine that lacks something is told."""

import sys

import pytest

from rwkv_nb import check
from rwkv_nb.check import Finding, Report, check_machine


@pytest.fixture(scope="module")
def report():
    return check_machine(disk_gb=0.01, memory_gb=0.01)


def test_this_machine_passes_its_own_tests(report):
    assert report.everything_needed, report
    by_name = {finding.name: finding for finding in report}
    assert not by_name['WKV "torch"'].mend and not by_name['WKV "chunked"'].mend
    assert {"Python", "torch", "ipywidgets", "GPU", "C++ compiler", "CUDA compiler", "System", "Disk"} <= set(by_name)


def test_too_little_disk_and_memory_are_said(tmp_path):
    short = {f.name: f for f in check_machine(tmp_path, disk_gb=99999, memory_gb=99999) if f.mend}
    assert {"Disk", "Memory"} <= set(short)
    assert "99999 GB" in short["Disk"].mend


def test_without_a_compiler_the_chunked_form_is_named_and_nothing_needed_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    finding = check._compiler()
    assert "chunked" in finding.found and finding.mend and not finding.needed


def test_a_report_reads_well_in_a_terminal_and_a_notebook():
    report = Report([Finding("good", "1.0"), Finding("slow", "none <b>", "install it", needed=False)])
    assert report.everything_needed
    assert repr(report).splitlines() == ["✓ good  1.0", "! slow  none <b>", "        → install it"]
    assert "none &lt;b&gt;" in report._repr_html_()
    missing = Report([*report, Finding("gone", "not installed", "mend it")])
    assert not missing.everything_needed and "✗ gone" in repr(missing)


def test_a_missing_bitsandbytes_is_said_with_its_command(monkeypatch):
    assert "bitsandbytes" in check._quant().found and not check._quant().mend
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    finding = check._quant()
    assert "cannot be used here" in finding.found and "rwkv_nb[quant]" in finding.mend and not finding.needed
