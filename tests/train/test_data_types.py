"""`rwkv-nb train` takes every data_type, loader and mask that it names."""

import json
import os

import numpy as np
import pytest
from token_files import write_binidx

from rwkv_nb.cli import main
from rwkv_nb.runs import Run, path_settings
from rwkv_nb.tokenizer import ByteTokenizer

TEXTS = [f"User: what is {i}?\n\nAssistant: {i} 是数字" for i in range(6)]
TOKENS = [[*ByteTokenizer().encode(text), 0] for text in TEXTS]


@pytest.fixture
def files(tmp_path):
    rows = [{"query": f"what is {i}?", "response": f"{i}"} for i in range(6)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    (tmp_path / "sft.json").write_text(json.dumps(rows))
    (tmp_path / "utf-8.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    (tmp_path / "utf-16le.txt").write_text("\n".join(TEXTS), encoding="utf-16-le")
    np.save(tmp_path / "numpy.npy", np.concatenate(TOKENS))
    np.concatenate(TOKENS).astype("<u2").tofile(tmp_path / "uint16.bin")
    write_binidx(tmp_path / "pair", TOKENS)
    return tmp_path


def train(base, folder, *flags):
    code = main(["train", "--load_model", str(base), "--proj_dir", str(folder / "run"), "--ctx_len", "32",
                 "--micro_bsz", "2", "--epoch_steps", "1", "--epoch_count", "1", "--r", "4", "--merge", "0", *flags])
    losses = [row["loss"] for row in Run(folder / "run").metrics() if "loss" in row]
    return code == 0 and len(losses) == 1 and 0 < losses[0] < 20


@pytest.mark.parametrize("data_type, name", [
    ("jsonl", "a"), ("binidx", "pair"), ("utf-8", "utf-8.txt"), ("utf-16le", "utf-16le.txt"), ("numpy", "numpy.npy"),
    ("uint16", "uint16.bin"), ("sft", "sft.json"), ("dummy", "")])
def test_every_data_type_trains(base, files, data_type, name):
    more = ("--sft_field", "query", "response", "--sft_split", "train[:5]") if data_type == "sft" else ()
    more = ("--template", "plain") if data_type == "dummy" else more
    assert train(base, files, "--data_file", str(files / name) if name else "", "--data_type", data_type, *more)


@pytest.mark.parametrize("dataload", ["split", "pack", "pad", "only", "get"])
def test_every_loader_trains(base, files, dataload):
    assert train(base, files, "--data_file", str(files / "a"), "--dataload", dataload)


@pytest.mark.parametrize("mask", [["template"], ["pad"], ["none"], ["qa"], ["se", "--mask_id", "what", "?"]])
def test_every_mask_trains(base, files, mask):
    assert train(base, files, "--data_file", str(files / "a"), "--loss_mask", *mask)


def test_packed_rows_and_chunks_contradict_each_other(base, files, capsys):
    assert not train(base, files, "--data_file", str(files / "a"), "--dataload", "pack", "--chunk_ctx", "16")
    assert "packed documents are not cut into chunks" in capsys.readouterr().err


def test_a_data_sets_name_stays_a_name(files, monkeypatch):
    monkeypatch.chdir(files)
    run = Run("run")
    run.update(data_file="somebody/some-set", data_type="sft", mix_file="a.jsonl")
    assert run.settings().data.data_file == "somebody/some-set"
    assert run.settings().data.mix_file == str(files / "a.jsonl")
    run.update(data_file="sft.json")
    assert os.path.isabs(path_settings(run.settings())["data_file"])
