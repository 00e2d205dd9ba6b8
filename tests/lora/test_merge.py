"""Merging: the merged file is the base with its adapter, to the letter of what other people's programs read."""

import dataclasses
import os
import re
import subprocess
import sys

import pytest
import torch
from lora_files import LORA, TARGETS, make_adapter, make_base

from rwkv_nb import config
from rwkv_nb.cli import main
from rwkv_nb.errors import AdapterError, CheckpointError, RunError, SettingsError
from rwkv_nb.lora.layers import set_strength
from rwkv_nb.lora.merge import merge
from rwkv_nb.model import load_model, load_weights, read_shape, save_weights

PACKAGE = """
import sys
import torch
from rwkv.model import RWKV
path, tokens, out = sys.argv[1:]
model = RWKV(model=path.removesuffix(".pth"), strategy="cpu fp32")
torch.save(model.forward(torch.load(tokens).tolist(), None, full_output=True)[0], out)
"""


@torch.no_grad()
def logits(model, tokens):
    return model.eval()(tokens)[0]


@pytest.mark.parametrize("strength, targets", [(1.0, TARGETS), (0.0, TARGETS),
                                               (1.5, ("head", "att.output"))])
def test_merged_is_base_with_adapter(lively, tmp_path, tokens, strength, targets):
    lora = config.replace(LORA, target_modules=targets)
    adapter, model = make_adapter(tmp_path / "a.safetensors", lively, lora=lora)
    set_strength(model, strength)
    proof = merge(lively, adapter, tmp_path / "merged.pth", strength=strength)
    torch.testing.assert_close(logits(load_model(proof.path), tokens), logits(model, tokens), atol=1e-4, rtol=1e-4)
    base, merged = load_weights(lively), load_weights(proof.path)
    assert list(base) == list(merged)
    changed = {k.removesuffix(".weight") for k in base if not torch.equal(base[k], merged[k])}
    assert all(name.endswith(targets) for name in changed) and len(changed) == (proof.merged_layers if strength else 0)
    assert proof.ok and "merged == adapter: True" in str(proof) and proof.logit_difference < 1e-4
    assert (proof.logit_effect > 0.1) == (strength > 0)
    assert proof.largest_weight_change == max((merged[k] - base[k]).abs().max().item() for k in base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once_from_fp32(tmp_path, dtype):
    base = make_base(tmp_path / "base.pth", dtype=dtype)
    adapter, model = make_adapter(tmp_path / "a.safetensors", base)
    proof = merge(base, adapter, tmp_path / "merged.pth")
    merged = load_weights(proof.path)
    assert {v.dtype for v in merged.values()} == {dtype} and proof.ok
    key = model.blocks[1].ffn.key
    exact = key.weight + key.scale * key.lora_B @ key.lora_A
    half_a_step = 0.501 * torch.finfo(dtype).eps
    torch.testing.assert_close(merged["blocks.1.ffn.key.weight"].float(), exact.detach(), rtol=half_a_step, atol=1e-7)


def test_what_rounding_takes_away_is_a_warning(tmp_path, capsys):
    """As of an adapter that was trained for a few steps only."""
    base = make_base(tmp_path / "base.pth", dtype=torch.bfloat16)
    adapter, _ = make_adapter(tmp_path / "a.safetensors", base)
    command = ["merge", "--load_model", str(base), "--adapter", str(adapter), "--output", str(tmp_path / "merged.pth"),
               "--strength", "0.002"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "merged == adapter: False" in said and re.search(r"\d+% of what the adapter does is rounded away", said)
    assert "set dtype to fp16 or fp32, train longer" in said
    assert main([*command, "--dtype", "fp32"]) == 0
    said = capsys.readouterr().out
    assert "merged == adapter: True" in said and "warning" not in said


def test_a_proof_that_fails_says_so(lively, tmp_path):
    adapter, _ = make_adapter(tmp_path / "a.safetensors", lively)
    proof = merge(lively, adapter, tmp_path / "merged.pth")
    for wrong in ({"logit_difference": proof.logit_effect}, {"logit_difference": float("nan")}, {"same_keys": False},
                  {"others_untouched": False}):
        failed = dataclasses.replace(proof, **wrong)
        assert not failed.ok and not failed.rounded and "merged == adapter: False" in str(failed)
    beyond = {"dtype": "bfloat16", "logit_difference": 3 * proof.logit_effect}    # more than rounding can take away
    assert not dataclasses.replace(proof, **beyond).rounded


def test_what_a_quantised_base_means_is_said(lively, tmp_path):
    for quant in ("none", "nf4"):
        adapter, _ = make_adapter(tmp_path / f"{quant}.safetensors", lively, quant=quant)
        assert ("judge it" in str(merge(lively, adapter, tmp_path / "merged.pth"))) == (quant == "nf4")


def test_nothing_is_written_where_something_is_wrong(lively, tmp_path):
    adapter, _ = make_adapter(tmp_path / "a.safetensors", lively)
    other, out = make_base(tmp_path / "other.pth", seed=5), tmp_path / "merged.pth"
    out.write_bytes(b"what was there before")
    with pytest.raises(AdapterError, match=r"trained on lively\.pth"):
        merge(other, adapter, out)
    cut = tmp_path / "cut.pth"
    cut.write_bytes(lively.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="damaged"):
        merge(cut, adapter, out)
    save_weights(cut, {k: v for k, v in load_weights(lively).items() if k != "blocks.1.ffn.value.weight"})
    with pytest.raises(CheckpointError, match=r"missing: blocks\.1\.ffn\.value\.weight"):
        merge(cut, adapter, out)
    before = adapter.read_bytes()
    for name in (other, adapter):
        with pytest.raises(RunError, match="would replace what it is made from"):
            merge(other, adapter, name, allow_other_base=True)
    with pytest.raises(RunError, match=r"ends in \.pth"):
        merge(other, adapter, tmp_path / "merged.safetensors", allow_other_base=True)
    assert adapter.read_bytes() == before
    with pytest.raises(SettingsError, match="nan"):
        merge(lively, adapter, out, strength=float("nan"))
    assert out.read_bytes() == b"what was there before" and not list(tmp_path.glob("*.tmp"))
    assert merge(other, adapter, out, allow_other_base=True).ok


# -- other people's programs -----------------------------------------------------------------------------------------

def runner_complaints(path) -> list[str]:
    """RWKV Runner's rules for an RWKV-7 model that it is to load (formats.md); none if it will."""
    weights = torch.load(path, weights_only=True)
    if not isinstance(weights, dict) or not all(torch.is_tensor(v) and v.is_floating_point() for v in weights.values()):
        return ["not a flat dict of float tensors"]
    said, keys = [], list(weights)
    layers = {int(k.split(".")[1]) for k in keys if k.startswith("blocks.")}
    if layers != set(range(max(layers) + 1)):
        return ["stray block indices"]
    first_ln_x = next((i for i, k in enumerate(keys) if "ln_x" in k), len(keys))
    if not any(k.endswith("att.r_k") for k in keys[first_ln_x:]):
        said.append("not recognised as version 7: no att.r_k after an ln_x")
    if any(v.dim() != 2 for k, v in weights.items() if k.endswith("att.r_k")):
        said.append("r_k is not two-dimensional")
    if weights["emb.weight"].shape[0] < 65536 or weights["head.weight"].shape[0] < 65536:
        said.append("vocabulary trimmed below 65536")
    try:
        if {k: tuple(v.shape) for k, v in weights.items()} != read_shape(weights).key_shapes():
            said.append("other names or orientations than the original's")
    except CheckpointError as error:
        said.append(error.what)
    if any(not v.is_contiguous() or v.untyped_storage().nbytes() != v.nbytes for v in weights.values()):
        said.append("tensors share storage or have gaps")
    return said


@pytest.fixture(scope="module")
def world_model(tmp_path_factory):
    """A random bf16 base with the World vocabulary, merged; its path."""
    folder = tmp_path_factory.mktemp("world")
    base = make_base(folder / "base.pth", dtype=torch.bfloat16, vocab_size=65536)
    adapter, _ = make_adapter(folder / "a.safetensors", base)
    return merge(base, adapter, folder / "merged.pth").path


def test_merged_model_passes_runners_rules(world_model):
    assert runner_complaints(world_model) == []
    weights = load_weights(world_model)
    assert list(weights) == list(read_shape(weights).key_shapes())  # the order of a released file


def test_the_rules_notice_what_runner_would_not_load(world_model, tmp_path):
    weights = load_weights(world_model)
    one_block = {k: v for k, v in weights.items() if not k.startswith("blocks.1.")}
    stray = {re.sub(r"^blocks\.1", "blocks.5", k): v for k, v in weights.items()}
    flat = {k: v.flatten() if k.endswith("r_k") else v for k, v in weights.items()}
    for changed, complaint in ((one_block, "not recognised"), (stray, "stray"), (flat, "two-dimensional"),
                               (weights | {"emb.weight": weights["emb.weight"][:65530].clone()}, "trimmed"),
                               (weights | {"head.weight": weights["emb.weight"].t().contiguous().t()}, "gaps")):
        torch.save(changed, tmp_path / "wrong.pth")
        assert any(complaint in said for said in runner_complaints(tmp_path / "wrong.pth")), complaint


def test_merged_model_loads_in_the_rwkv_package_with_equal_logits(world_model, tmp_path):
    tokens, out = torch.randint(1, 65530, (40,)), tmp_path / "logits.pt"
    torch.save(tokens, tmp_path / "tokens.pt")
    environment = {**os.environ, "RWKV_V7_ON": "1", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
    subprocess.run([sys.executable, "-c", PACKAGE, world_model, tmp_path / "tokens.pt", out], check=True,
                   env=environment, cwd=tmp_path, capture_output=True)
    ours = logits(load_model(world_model, dtype=torch.float32), tokens[None])[0]
    assert ours.std() > 0.2
    torch.testing.assert_close(ours, torch.load(out), atol=1e-4, rtol=1e-4)
