"""Adapters of other programs, several at once, other dtypes, and back again: each merge against its formula."""

import json
import random
import re

import pytest
import torch
from lora_files import LORA, make_adapter, make_base
from safetensors.torch import save_file

from rwkv_nb import config
from rwkv_nb.errors import AdapterError, CheckpointError, SettingsError
from rwkv_nb.lora.adapter import load_adapter
from rwkv_nb.lora.merge import merge
from rwkv_nb.model import load_model, load_weights

TARGETS = ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")


def older_file(path, base, *, r=4, dtype=torch.bfloat16, targets=TARGETS, norms=True, prefix=""):
    """A file as older RWKV-PEFT writes it; returns its tensors."""
    weights, tensors = load_weights(base), {}
    for key, W in weights.items():
        name = key.removesuffix(".weight")
        if name.endswith(targets):
            tensors |= {f"{name}.lora_A": 0.1 * torch.randn(r, W.shape[1]),
                        f"{name}.lora_B": 0.1 * torch.randn(W.shape[0], r)}
        elif norms and re.search(r"\bln", key):
            tensors[key] = W.float() + 0.1 * torch.randn(W.shape)
    tensors = {prefix + k: v.to(dtype) for k, v in tensors.items()}
    torch.save(tensors, path)
    return {k.removeprefix(prefix): v for k, v in tensors.items()}


def by_formula(base, adapters):
    """Every tensor of the merged model in fp32. adapters: (tensors, scale) each."""
    out = {k: v.float() for k, v in load_weights(base).items()}
    for tensors, _ in adapters:
        out |= {k: v.float() for k, v in tensors.items() if "lora_" not in k}
    for tensors, scale in adapters:
        for key in [k for k in tensors if k.endswith("lora_A")]:
            A, B = tensors[key].float(), tensors[key.replace("lora_A", "lora_B")].float()
            out[key.replace("lora_A", "weight")] = out[key.replace("lora_A", "weight")] + scale * B @ A
    return out


def assert_equal(path, expected, dtype):
    written = load_weights(path)
    assert {v.dtype for v in written.values()} == {dtype} and written.keys() == expected.keys()
    for key, tensor in written.items():
        torch.testing.assert_close(tensor.float(), expected[key], rtol=0.51 * torch.finfo(dtype).eps, atol=2e-6,
                                   msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("seed", range(6))
def test_an_older_adapter_merges_by_its_programs_formula(tmp_path, seed):
    """Random shapes, dtypes, ranks and targets; the trained norms overwrite, alpha comes from the caller."""
    draw = random.Random(seed)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    base = make_base(tmp_path / "base.pth", seed=seed, dtype=draw.choice(dtypes), n_layer=draw.choice((2, 3)),
                     n_embd=draw.choice((64, 128)))
    r, alpha = draw.randint(1, 9), draw.choice((8.0, 32.0))
    tensors = older_file(tmp_path / "rwkv-0.pth", base, r=r, dtype=draw.choice(dtypes),
                         targets=tuple(draw.sample(TARGETS, draw.randint(1, 6))), prefix=draw.choice(("", "model.")))
    dtype = draw.choice((None, torch.float16, torch.bfloat16))
    proof = merge(base, tmp_path / "rwkv-0.pth", tmp_path / "merged.pth", lora_alpha=alpha, dtype=dtype)
    assert proof.ok and proof.logit_effect > 0 and proof.parts == sum("lora_" not in k for k in tensors)
    out = dtype or load_weights(base)["emb.weight"].dtype
    assert_equal(proof.path, by_formula(base, [(tensors, alpha / r)]), out)


def test_alpha_is_required_where_the_file_lacks_it_and_only_there(lively, tmp_path):
    older_file(tmp_path / "rwkv-0.pth", lively)
    with pytest.raises(AdapterError, match="does not say its lora_alpha") as caught:
        merge(lively, tmp_path / "rwkv-0.pth", tmp_path / "out.pth")
    assert "--lora_alpha" in caught.value.fix
    ours, _ = make_adapter(tmp_path / "a.safetensors", lively)
    with pytest.raises(AdapterError, match="it says lora_alpha 12, and 24 is given"):
        merge(lively, ours, tmp_path / "out.pth", lora_alpha=24.0)
    with pytest.raises(AdapterError, match="no LoRA in this file") as caught:
        merge(lively, lively, tmp_path / "out.pth", lora_alpha=24.0)
    assert "complete" in caught.value.fix and not (tmp_path / "out.pth").exists()
    torch.save({"blocks.0.att.key.lora_A": torch.zeros(0, 64), "blocks.0.att.key.lora_B": torch.zeros(64, 0)},
               tmp_path / "rank0.pth")
    with pytest.raises(AdapterError, match=r"its ranks are \[0\]"):
        merge(lively, tmp_path / "rank0.pth", tmp_path / "out.pth", lora_alpha=24.0)


@pytest.mark.parametrize("form", ["saved by peft", "rank-stabilised", "one .pth"])
def test_the_hugging_face_form(lively, tmp_path, tokens, form):
    """An adapter that the peft library made and applies itself; RWKV-PEFT's newer form is this one."""
    import peft  # it takes seconds: only the process that needs it waits for it

    model = peft.get_peft_model(load_model(lively), peft.LoraConfig(
        r=4, lora_alpha=10, target_modules=list(TARGETS[:4]), init_lora_weights=False,
        use_rslora=form == "rank-stabilised"))
    with torch.no_grad():
        expected = model.eval()(tokens)[0]
    model.save_pretrained(tmp_path / "adapter")
    path, alpha = tmp_path / "adapter", None
    if form == "one .pth":
        path, alpha = tmp_path / "adapter.pth", 10.0
        torch.save(peft.get_peft_model_state_dict(model), path)
    proof = merge(lively, path, tmp_path / "merged.pth", lora_alpha=alpha)
    assert proof.ok and proof.merged_layers == 8
    with torch.no_grad():
        torch.testing.assert_close(load_model(proof.path)(tokens)[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("change, complaint", [
    ({"use_dora": True}, "use_dora"), ({"alpha_pattern": {"att.key": 3}}, "alpha_pattern"),
    ({"lora_alpha": "x"}, "read"),
    ({"peft_type": "LOKR"}, "LOKR"), ({"lora_alpha": float("inf")}, "plain LoRA"), (None, "cannot be read")])
def test_a_config_that_is_not_plain_lora_is_refused(lively, tmp_path, change, complaint):
    key = "base_model.model.blocks.0.att.key.lora_"
    save_file({f"{key}A.weight": torch.zeros(2, 64), f"{key}B.weight": torch.zeros(64, 2)},
              tmp_path / "adapter_model.safetensors")
    words = {"peft_type": "LORA", "lora_alpha": 4, "r": 2}
    (tmp_path / "adapter_config.json").write_text(json.dumps(words | change) if change else "[")
    with pytest.raises(AdapterError, match=complaint):
        load_adapter(tmp_path)


def test_several_adapters_with_weights(lively, tmp_path):
    ours, model = make_adapter(tmp_path / "a.safetensors", lively, seed=1)
    other, _ = make_adapter(tmp_path / "b.safetensors", lively, seed=2,
                            lora=config.replace(LORA, r=7, target_modules=("att.key", "head")))
    old = older_file(tmp_path / "old.pth", lively, r=2)
    adapters = [load_adapter(ours), load_adapter(other), load_adapter(tmp_path / "old.pth", 12.0)]
    proof = merge(lively, [ours, other], tmp_path / "two.pth", strength=[0.5, -2])
    assert proof.ok and proof.merged_layers == 13
    two = [(a.tensors, a.scale * s) for a, s in zip(adapters, (0.5, -2), strict=False)]
    assert_equal(proof.path, by_formula(lively, two), torch.float32)
    proof = merge(lively, [ours, tmp_path / "old.pth"], tmp_path / "three.pth", strength=(0.5, 1), lora_alpha=12.0)
    assert proof.ok
    assert_equal(proof.path, by_formula(lively, [two[0], (old, 6.0)]), torch.float32)
    with pytest.raises(SettingsError, match="cannot be taken out"):
        merge(proof.path, tmp_path / "old.pth", tmp_path / "no.pth", strength=-1, lora_alpha=12.0)
    with pytest.raises(SettingsError, match="strength cannot be"):
        merge(lively, [ours, other], tmp_path / "no.pth", strength=[1, 1, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_taking_it_out_again_restores_the_base_to_rounding(tmp_path, dtype):
    base = make_base(tmp_path / "base.pth", dtype=dtype)
    adapter, _ = make_adapter(tmp_path / "a.safetensors", base)
    merged = merge(base, adapter, tmp_path / "merged.pth").path
    with pytest.raises(AdapterError, match="other weights"):
        merge(merged, adapter, tmp_path / "back.pth", strength=-1)
    back = merge(merged, adapter, tmp_path / "back.pth", strength=-1, allow_other_base=True)
    assert back.ok
    before, after, between = (load_weights(path) for path in (base, back.path, merged))
    for key in before:      # rounded twice: once on the scale of the merged weight, once on its own
        step = torch.finfo(dtype).eps * (between[key].float().abs() + before[key].float().abs()) + 1e-6
        assert ((after[key].float() - before[key].float()).abs() <= step).all(), key


def test_a_value_that_fp16_cannot_hold_is_refused_by_name(lively, tmp_path):
    adapter, _ = make_adapter(tmp_path / "a.safetensors", lively)
    weights = {k: v.clone() for k, v in load_weights(lively).items()}
    weights["blocks.1.ln2.weight"][3] = 1e5
    torch.save(weights, tmp_path / "large.pth")
    with pytest.raises(CheckpointError, match=r"blocks\.1\.ln2\.weight: a value of 1e\+05 does not fit float16"):
        merge(tmp_path / "large.pth", adapter, tmp_path / "m.pth", dtype=torch.float16, allow_other_base=True)
    assert not (tmp_path / "m.pth").exists()


def test_progress_runs_to_its_end(lively, tmp_path):
    adapter, _ = make_adapter(tmp_path / "a.safetensors", lively)
    seen = []
    merge(lively, adapter, tmp_path / "m.pth", prove=False, progress=lambda done, total: seen.append(done / total))
    assert seen == sorted(seen) and 0 < seen[0] < 0.5 and seen[-1] == 1
