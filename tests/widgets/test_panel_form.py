"""The form writes settings.json, and a run's shell command is the same run."""

import errno
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_nb.cli import parser, settings_from
from rwkv_nb.config import Settings, leaf_fields, replace
from rwkv_nb.errors import SettingsError
from rwkv_nb.runs import Run
from rwkv_nb.widgets.panel_form import SettingsForm, shell_command


def test_it_opens_with_what_is_written_and_writes_back(tmp_path):
    run = Run(tmp_path)
    run.save_settings(replace(Settings(), r=7, lr_init=3e-4, ctx_len=96, precision="bf16"))
    form = SettingsForm(run)
    assert {name: form.inputs[name].value for name in ("r", "lr_init", "ctx_len", "precision")} == \
        {"r": 7, "lr_init": 3e-4, "ctx_len": 96, "precision": "bf16"}
    form.inputs["r"].value, form.inputs["lr_init"].value, form.inputs["precision"].value = 16, 1e-3, "fp32"
    assert run.settings() == replace(Settings(), r=16, lr_init=1e-3, ctx_len=96)


def test_bounds_and_texts_are_those_of_the_settings(tmp_path):
    form, chinese = SettingsForm(Run(tmp_path)), SettingsForm(Run(tmp_path), "zh")
    for field in leaf_fields(Settings()):
        if field.name != "proj_dir":
            assert form.inputs[field.name].tooltip == field.metadata["en"]
            assert chinese.inputs[field.name].tooltip == field.metadata["zh"]
    form.inputs["r"].value = 0
    assert form.inputs["r"].value == 1
    form.inputs["lora_dropout"].value = 5
    assert form.inputs["lora_dropout"].value == 0.99
    form.inputs["target_modules"].value = "att.key  ffn.key"
    assert Run(tmp_path).settings().lora.target_modules == ("att.key", "ffn.key")


def test_settings_that_cannot_be_written_are_said(tmp_path):
    run = Run(tmp_path)
    form = SettingsForm(run)
    run.settings_file.write_text("{")
    form.inputs["r"].value = 16
    assert "settings cannot be read" in form.children[-1].value
    with pytest.raises(SettingsError):
        run.settings()


def test_a_disk_that_is_full_is_said(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    form = SettingsForm(Run(tmp_path))
    monkeypatch.setattr("rwkv_nb.runs.os.replace", full)
    form.inputs["r"].value = 16
    assert "No space left" in form.children[-1].value


@settings(max_examples=25, deadline=None)
@given(r=st.integers(1, 512), lora_dropout=st.floats(0, 0.99), lr_init=st.floats(0, 1), grad_cp=st.sampled_from((0, 1)),
       target_modules=st.lists(st.sampled_from(("att.key", "ffn.value", "att.output")), min_size=1).map(tuple),
       data_file=st.text("ab 'ö据\"$\\", min_size=1, max_size=12).map(lambda name: f"/data/{name}.jsonl"))
def test_the_shell_command_is_the_same_run(tmp_path_factory, data_file, **changes):
    asked = replace(Settings(), load_model="/models/a base.pth", data_file=data_file, **changes)
    run = Run(tmp_path_factory.getbasetemp() / "a run")
    read_by_a_shell = subprocess.run(["bash", "-c", f"printf '%s\\0' {shell_command(asked, run)}"], capture_output=True)
    program, command, *arguments = read_by_a_shell.stdout.decode().split("\0")[:-1]
    assert (program, command) == ("rwkv-nb", "train")
    read_run, read = settings_from(parser().parse_args([command, *arguments]))
    assert read_run.folder == run.folder
    assert replace(read, proj_dir="") == asked


def test_the_shell_command_says_no_default_and_can_be_relative(tmp_path):
    asked = replace(Settings(), load_model=str(tmp_path / "models" / "base.pth"), data_file=str(tmp_path / "d.jsonl"))
    assert shell_command(asked, Run(tmp_path / "runs" / "a"), relative_to=tmp_path).replace("\\\n", " ").split() == \
        ["rwkv-nb", "train", "--load_model", "models/base.pth", "--proj_dir", "runs/a", "--data_file", "d.jsonl"]
