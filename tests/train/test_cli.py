"""The command line: the same engine, the tutorial's names, clear refusals."""

import json
import os
import subprocess
import sys

import pytest
import torch

from rwkv_nb.cli import main, parser, settings_from
from rwkv_nb.config import PRESETS, Settings, leaf_fields, replace
from rwkv_nb.errors import SettingsError
from rwkv_nb.lora.adapter import load_adapter
from rwkv_nb.model import load_weights
from rwkv_nb.runs import Run, absolute


def flags(settings, run, **more):
    values = {"load_model": settings.train.load_model, "data_file": settings.data.data_file, "proj_dir": run,
              "ctx_len": 64, "micro_bsz": 4, "epoch_count": 1, **more}
    return [str(x) for name, value in values.items() for x in (f"--{name}", value)]


def test_train_then_merge(tmp_path, settings, capsys):
    config = json.dumps({"r": 8, "lora_alpha": 32, "lora_dropout": 0.05})
    assert main(["train", *flags(settings, tmp_path / "run", peft_config=config, data_type="jsonl")]) == 0
    assert "finished" in capsys.readouterr().out
    run = Run(tmp_path / "run")
    meta = load_adapter(run.last_adapter()).meta
    assert (meta.r, meta.lora_alpha) == (8, 32)
    out = tmp_path / "merged.pth"
    assert main(["merge", "--load_model", settings.train.load_model, "--adapter", str(run.folder),
                 "--output", str(out)]) == 0
    merged, at_save = load_weights(out), load_weights(run.merged_file(1))
    assert all(torch.equal(merged[key], at_save[key]) for key in at_save)


def test_data_file_without_its_suffix(tmp_path, settings):
    assert main(["train", *flags(settings, tmp_path, data_file=settings.data.data_file.removesuffix(".jsonl"))]) == 0


def test_a_run_goes_on_from_its_own_settings(tmp_path, settings):
    Run(tmp_path).save_settings(settings)
    assert main(["train", "--proj_dir", str(tmp_path), "--epoch_count", "1"]) == 0
    assert load_adapter(Run(tmp_path).last_adapter()).meta.r == 4


def test_it_goes_on_by_its_folder_alone_where_its_paths_were_relative(tmp_path, settings, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = [os.path.relpath(path) for path in (settings.train.load_model, settings.data.data_file)]
    run, began = settings_from(parser().parse_args(
        ["train", "--load_model", paths[0], "--data_file", paths[1], "--proj_dir", "run"]))
    run.save_settings(began)
    assert settings_from(parser().parse_args(["train", "--proj_dir", "run"]))[1] == absolute(began)


@pytest.mark.parametrize("language, flags", [("en", []), ("zh", ["--zh"])])
def test_the_table_of_settings_says_each_in_both_languages(capsys, language, flags):
    assert main(["settings", *flags]) == 0
    told = capsys.readouterr().out
    assert all(f"`{field.name}`" in told and field.metadata[language] in told for field in leaf_fields(Settings()))


@pytest.mark.parametrize("arguments, said", [
    (["train", "--micro_bz", "3"], "did you mean --micro_bsz"),
    (["train", "--r", "many"], "invalid int"),
    (["train", "--proj_dir", "x", "--precision", "fp8"], "fp32"),
    (["train", "--proj_dir", "x", "--peft", "disha"], "lora"),
    (["train", "--proj_dir", "x", "--lr_schedule", "cosine"], "cos_decay"),
    (["train", "--proj_dir", "x", "--r", "0"], "at least 1"),
    (["train", "--peft_config", "{r:8}"], "not JSON"),
    (["train", "--load_model", "a.pth"], "proj_dir is not given"),
    (["train", "--load_model", "no.pth", "--data_file", "no", "--proj_dir", "x"], "no such file"),
    (["train", "--peft_config", "[8]"], "not JSON"),
    (["import", "run_lora.sh", "--proj_dri", "x"], "did you mean --proj_dir"),
    (["trian"], "train"),
])
def test_mistakes_are_answered_with_the_mend(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert "Traceback" not in error


def test_the_table_ends_quietly_where_it_is_read_no_further():
    program = f"{sys.executable} -m rwkv_nb.cli settings | head -c 9"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout == "| | defau" and done.stderr == ""


def test_a_preset_sets_what_is_not_given_and_old_words_for_checkpointing_still_do(tmp_path):
    def read(*flags):
        return settings_from(parser().parse_args(["train", "--proj_dir", str(tmp_path), *flags]))[1]

    wanted = PRESETS["small"] | {"emb_cpu": 0, "grad_cp": "block"}
    assert read("--preset", "small", "--emb_cpu", "0", "--grad_cp", "1") == replace(read(), **wanted)
    assert read("--grad_cp", "0") == read("--grad_cp", "none") != read("--grad_cp", "block")
    assert replace(Settings(), grad_cp=1) == replace(Settings(), grad_cp="block")
    with pytest.raises(SettingsError, match="grad_cp"):
        replace(Settings(), grad_cp=2)
