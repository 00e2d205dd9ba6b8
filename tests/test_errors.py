"""Errors as a person meets them."""

import re

from IPython.core.interactiveshell import InteractiveShell

from rwkv_nb.errors import SettingsError


def test_a_notebook_shows_what_is_wrong_and_what_to_do_and_no_pages_of_code(capsys):
    shell = InteractiveShell()
    shell.run_cell("from rwkv_nb.runs import Run\nRun('/proc/none').update(micro_bsz=0)")
    shown = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).strip().splitlines()
    assert shown[:2] == ["SettingsError: micro_bsz is 0", "→ it must be at least 1"]
    assert re.match(r"\(raised in \w+\.py, line \d+", shown[2]) and len(shown) == 3


def test_the_place_is_said_once():
    assert str(SettingsError("r is 0", where="r", fix="raise it")) == "r is 0\n→ raise it"
    assert str(SettingsError("this is not JSON", where="a.jsonl:3")) == "a.jsonl:3: this is not JSON"
