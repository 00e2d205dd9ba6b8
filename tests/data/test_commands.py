"""rwkv-nb check-data and convert: what they print, write and return."""

import os
from pathlib import Path

import pytest

from rwkv_nb.cli import main
from rwkv_nb.data.binidx import BinIdx

SAMPLES = Path(__file__).parents[2] / "data_samples"
BASE = ["--load_model", str(SAMPLES / "tiny_base.pth")]


def test_problems_are_listed_and_mended(tmp_path, capsys):
    bad, new = str(SAMPLES / "bad_lines"), tmp_path / "new.jsonl"
    assert main(["check-data", bad, *BASE]) == 1
    told = capsys.readouterr().out
    assert "bad_lines.jsonl:2: this is not JSON" in told and "problems: 7" in told and "173 tokens" in told
    assert main(["check-data", bad, "--mend", str(new)]) == 1  # some lines had to be left out
    told = capsys.readouterr().out
    assert "bad_lines.jsonl:6: mended: single quotes" in told and "bad_lines.jsonl:7: left out: \"text\"" in told
    assert "new.jsonl: 6 documents" in told and len(new.read_text(encoding="utf-8").splitlines()) == 6
    assert main(["check-data", str(new)]) == 0
    assert main(["check-data", bad, "--mend", str(new)]) == 1 and "exists already" in capsys.readouterr().err


def test_a_pair_is_written(tmp_path, capsys):
    assert main(["convert", str(SAMPLES / "kinds" / "messages.jsonl"), str(tmp_path / "out.bin"), *BASE]) == 0
    assert f"{tmp_path}/out.bin and .idx: 3 documents of byte" in capsys.readouterr().out
    assert len(BinIdx(tmp_path / "out")) == 3
    assert main(["convert", str(SAMPLES / "kinds" / "sft.csv"), str(tmp_path / "other")]) == 1
    assert "this is a sft file, not jsonl" in capsys.readouterr().err
    assert main(["convert", "a.jsonl", "a", "--sft_split", "train[:1]"]) == 1    # all of a file is converted
    assert "there is no option --sft_split" in capsys.readouterr().err


def test_on_a_terminal_one_line_follows_the_work(tmp_path, monkeypatch):
    screen, terminal = os.openpty()
    with os.fdopen(terminal, "w") as stderr:
        monkeypatch.setattr("sys.stderr", stderr)
        assert main(["convert", str(SAMPLES / "kinds" / "messages.jsonl"), str(tmp_path / "out"), *BASE]) == 0
        line = os.read(screen, 4000).decode()
    os.close(screen)
    assert line.startswith("\x1b[K") and "3 documents" in line and line.endswith("0 s left\r\n")


@pytest.mark.parametrize("more, count", [((), 8), (("--sft_field", "query", "response", "--sft_split", "train[:3]"), 3)
                                         ])
def test_flags_are_the_settings(capsys, more, count):
    assert main(["check-data", str(SAMPLES / "kinds" / "sft.csv"), *more]) == 0
    assert f"sft.csv: {count} documents" in capsys.readouterr().out
