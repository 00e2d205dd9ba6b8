"""Adapter files: what was saved comes back, a wrong base is refused by name, and no file at all breaks the loader."""

import json
import random
import struct

import pytest
import torch
from lora_files import TARGETS, make_adapter, make_base
from safetensors import safe_open
from safetensors.torch import save_file

from rwkv_nb.errors import AdapterError, RunError
from rwkv_nb.lora.adapter import adapter_tensors, apply_adapter, check_adapter, load_adapter
from rwkv_nb.lora.layers import lora_layers
from rwkv_nb.model import fingerprint, load_model, read_shape


@pytest.fixture(scope="module")
def saved(lively, tmp_path_factory):
    """An adapter file and the model it was saved from."""
    return make_adapter(tmp_path_factory.mktemp("adapter") / "adapter-2.safetensors", lively)


def rewritten(path, to, tensors=(), **words):
    """The same file with some tensors (None: left out) and some JSON words of its description changed."""
    with safe_open(path, "pt") as f:
        kept, before = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()
    kept |= dict(tensors)
    save_file({k: v for k, v in kept.items() if v is not None}, to, metadata=before | words)
    return to


@torch.no_grad()
def test_comes_back_and_describes_itself(saved, lively, tokens):
    path, model = saved
    adapter = load_adapter(path)
    meta = adapter.meta
    assert (meta.r, meta.lora_alpha, meta.target_modules) == (4, 12.0, TARGETS) and adapter.scale == 3
    assert (meta.template, meta.tokenizer, meta.epoch, meta.step) == ("chat", "byte", 2, 34)
    assert (meta.base_name, meta.base_fingerprint) == ("lively.pth", fingerprint(lively))
    assert meta.base_shape == model.shape
    applied = apply_adapter(load_model(lively), adapter, fingerprint(lively))
    assert torch.equal(applied.eval()(tokens)[0], model(tokens)[0])
    assert {layer.scale for layer in lora_layers(applied).values()} == {3.0}


def test_a_file_from_before_there_were_other_versions(saved, lively, tmp_path):
    with safe_open(saved[0], "pt") as f:
        shape = json.loads(f.metadata()["base_shape"])
    del shape["rank_mix"]
    old = load_adapter(rewritten(saved[0], tmp_path / "old.safetensors", base_shape=json.dumps(shape)))
    assert len(check_adapter(old, read_shape(load_model(lively).state_dict()), fingerprint(lively))) == 12


def test_keys_are_the_checkpoints_names(saved):
    with safe_open(saved[0], "pt") as f:
        keys = {k: f.get_tensor(k) for k in f.keys()}
    assert set(keys) == set(adapter_tensors(saved[1])) and len(keys) == 24
    assert keys["blocks.0.ffn.key.lora_A"].shape == (4, 64) and keys["blocks.0.ffn.key.lora_B"].shape == (256, 4)
    assert {v.dtype for v in keys.values()} == {torch.float32}


def test_a_base_of_another_shape_is_refused_with_both_shapes(saved, tmp_path):
    other = make_base(tmp_path / "other.pth", n_layer=3)
    with pytest.raises(AdapterError, match=r"lively\.pth \(x070, 2 layers of 64, .*this base is x070, 3 layers of 64"):
        apply_adapter(load_model(other), load_adapter(saved[0]), fingerprint(other), allow_other_base=True)


def test_another_base_of_the_same_shape_is_refused_by_name(saved, tmp_path):
    other = make_base(tmp_path / "other.pth", seed=5)
    model, adapter = load_model(other), load_adapter(saved[0])
    with pytest.raises(AdapterError, match=r"trained on lively\.pth") as caught:
        apply_adapter(model, adapter, fingerprint(other))
    assert fingerprint(other) in str(caught.value) and "allow_other_base" in caught.value.fix
    assert not lora_layers(model)
    assert len(lora_layers(apply_adapter(model, adapter, fingerprint(other), allow_other_base=True))) == 12


def test_keys_that_do_not_fit_are_all_named(saved, lively, tmp_path):
    path = rewritten(saved[0], tmp_path / "a.safetensors", {
        "blocks.0.att.key.lora_A": None, "blocks.7.att.key.lora_A": torch.zeros(4, 64),
        "blocks.1.ffn.value.lora_B": torch.zeros(64, 5)})
    with pytest.raises(AdapterError) as caught:
        check_adapter(load_adapter(path), read_shape(load_model(lively).state_dict()), fingerprint(lively))
    for line in ("missing: blocks.0.att.key.lora_A", "unexpected: blocks.7.att.key.lora_A",
                 "blocks.1.ffn.value.lora_B is [64, 5], expected [64, 4]"):
        assert line in str(caught.value)


@pytest.mark.parametrize("words", [
    {"format": "pt"}, {"version": "2"}, {"r": "true"}, {"r": "0"}, {"r": '"4"'}, {"r": "{"}, {"r": "[" * 100_000},
    {"lora_alpha": "NaN"}, {"lora_alpha": "null"}, {"target_modules": "[]"}, {"target_modules": "[3]"},
    {"target_modules": "7"}, {"base_shape": "{}"}, {"base_shape": '{"n_layer": 2, "exec": 1}'}, {"base_name": "[]"}],
    ids=lambda words: " ".join(f"{k}={v[:24]}" for k, v in words.items()))
def test_a_hostile_description_is_refused(saved, tmp_path, words):
    with pytest.raises(AdapterError):
        load_adapter(rewritten(saved[0], tmp_path / "a.safetensors", **words))


@pytest.mark.parametrize("words", [{"r": "1000000000000"}, {"target_modules": '["../../etc"]'}])
def test_a_description_that_lies_is_refused(saved, lively, tmp_path, words):
    adapter = load_adapter(rewritten(saved[0], tmp_path / "a.safetensors", **words))
    with pytest.raises(AdapterError):
        apply_adapter(load_model(lively), adapter, fingerprint(lively))


@pytest.mark.parametrize("value", [torch.full((4, 64), torch.nan), torch.zeros(4, 64).half(), torch.zeros(4, 64).int()])
def test_values_that_are_not_finite_fp32_are_refused(saved, tmp_path, value):
    path = rewritten(saved[0], tmp_path / "a.safetensors", {"blocks.0.att.key.lora_A": value})
    with pytest.raises(AdapterError, match=r"blocks\.0\.att\.key\.lora_A"):
        load_adapter(path)


def test_no_file_breaks_the_loader(saved, lively, tmp_path):
    whole, path, rng = saved[0].read_bytes(), tmp_path / "a.safetensors", random.Random(0)
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    cut = [whole[:n] for n in (0, 1, 7, 8, 9, header - 1, header, len(whole) - 1, *rng.sample(range(len(whole)), 20))]
    other = [lively.read_bytes(), b"\x80\x04N.", b"\xff" * 64, struct.pack("<Q", 2**62) + whole[8:],
             struct.pack("<Q", 2) + b"{}", json.dumps({"r": 4}).encode(), whole + b"more"]
    for data in cut + other:
        path.write_bytes(data)
        with pytest.raises(AdapterError):
            load_adapter(path)
    for _ in range(200):  # one wrong byte in the description: an AdapterError, or it did not matter
        damaged = bytearray(whole)
        damaged[rng.randrange(header)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            check_adapter(load_adapter(path), saved[1].shape, fingerprint(lively))
        except AdapterError:
            continue
    with pytest.raises(AdapterError, match="no such file"):
        load_adapter(tmp_path / "absent.safetensors")


def test_a_runs_folder_means_its_last_adapter(saved, tmp_path):
    with pytest.raises(RunError, match="no adapter in this run"):
        load_adapter(tmp_path)
    for epoch in (1, 2):
        (tmp_path / f"adapter-{epoch}.safetensors").write_bytes(saved[0].read_bytes())
    assert load_adapter(tmp_path).path == tmp_path / "adapter-2.safetensors"
