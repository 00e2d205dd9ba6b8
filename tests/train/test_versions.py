"""RWKV-6 and RWKV-5 all the way: train, stop and resume, merge, generate, evaluate."""

import json

import pytest
import torch
from safetensors.torch import save_file
from training import steps, train, until

from rwkv_nb.config import replace
from rwkv_nb.errors import AdapterError, SettingsError
from rwkv_nb.evaluate import text_loss
from rwkv_nb.generate import generate
from rwkv_nb.lora.adapter import apply_adapter, load_adapter
from rwkv_nb.lora.merge import merge
from rwkv_nb.model import RWKV, Shape, fingerprint, init_weights, load_model, load_weights, save_weights
from rwkv_nb.model.ai00 import to_ai00
from rwkv_nb.runs import Run
from rwkv_nb.tokenizer import get_tokenizer
from rwkv_nb.train.session import TrainSession

SHAPES = {"x060": Shape(2, 64, 257, 8, 0, 0, 0, 224, version="x060", rank_mix=4),
          "x052": Shape(2, 64, 257, 0, 0, 0, 0, 224, version="x052")}
USUAL = tuple(f"{part}.{name}" for part, names in (("att", ("receptance", "key", "value", "output", "gate")),
                                                   ("ffn", ("key", "receptance", "value"))) for name in names)


@pytest.fixture(scope="module", params=SHAPES)
def version(request):
    return request.param


@pytest.fixture(scope="module")
def base(version, tmp_path_factory):
    """Path of a random base of the version, in bf16, with every layer taking part."""
    model, generator = init_weights(RWKV(SHAPES[version]), 1), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * p.shape[-1] ** -0.5 * torch.randn(p.shape, generator=generator)
    path = tmp_path_factory.mktemp(version) / "base.pth"
    save_weights(path, model.bfloat16().state_dict())
    return path


@torch.no_grad()
def test_trains_resumes_merges_and_generates(tmp_path, settings, base, version):
    settings = replace(settings, my_testing=version, train_parts=("time_", "ln"), grad_cp=1, lr_init=3e-3, merge=1)
    whole = train(tmp_path / "whole", settings, prompts=["User: red"], max_tokens=8)
    assert whole.rows[-2]["loss"] < 0.9 * whole.rows[0]["loss"]
    assert any("deprecated" in notice for notice in whole.notices) == (version == "x052")
    session = TrainSession(Run(tmp_path / "cut"), settings).start()
    until(lambda: session.snapshot().step >= 3)
    session.stop()
    session.join()
    resumed = train(tmp_path / "cut", settings, start="resume")
    assert steps(resumed.rows) == steps(whole.rows)

    adapter = load_adapter(Run(tmp_path / "cut").last_adapter())
    assert adapter.meta.target_modules == USUAL and adapter.meta.base_shape == SHAPES[version]
    moved = {key.split(".", 2)[-1] for key in adapter.parts}
    assert {"ln1.weight", "att.time_decay", "att.time_faaaa", "att.ln_x.bias"} < moved
    merged = merge(base, adapter.path, tmp_path / "merged.pth")
    assert merged.ok and merged.merged_layers == 2 * 8 and merged.logit_effect > 0.1
    assert list(load_weights(merged.path)) == list(load_weights(base))

    bytes_, adapted = get_tokenizer("byte", 257), load_model(base, dtype=torch.float32)
    apply_adapter(adapted, adapter, fingerprint(base))
    alone = load_model(merged.path, dtype=torch.float32)
    assert generate(alone, bytes_, ["User: red", "a"], max_tokens=6, stop=()) != ["", ""]
    documents = session.trainer.documents
    assert text_loss(alone, documents) == pytest.approx(text_loss(adapted, documents), abs=0.02)
    assert text_loss(alone, documents) < 0.9 * text_loss(load_model(base, dtype=torch.float32), documents)


def test_another_version_than_the_bases_is_refused_with_both(tmp_path, settings, version):
    with pytest.raises(SettingsError, match=f"my_testing is x070, base.pth has {version}"):
        train(tmp_path, replace(settings, my_testing="x070"))


def test_an_adapter_of_another_version_is_refused_with_both(tmp_path, settings, base, version):
    train(tmp_path, replace(settings, epoch_count=1, epoch_steps=1))
    other = next(name for name in SHAPES if name != version)
    save_weights(tmp_path / "other.pth", init_weights(RWKV(SHAPES[other]), 1).state_dict())
    with pytest.raises(AdapterError, match=f"base.pth .{version}, 2 layers.*this base is {other}, 2 layers"):
        merge(tmp_path / "other.pth", Run(tmp_path).last_adapter(), tmp_path / "merged.pth")


def test_the_usual_linears_can_be_chosen_from(tmp_path, settings):
    train(tmp_path, replace(settings, target_modules=("att.gate", "ffn.receptance"), epoch_count=1, epoch_steps=1))
    assert {key.rsplit(".", 1)[0].split(".", 2)[2] for key in load_adapter(Run(tmp_path).last_adapter()).tensors} == {
        "att.gate", "ffn.receptance"}
    assert json.loads(Run(tmp_path).settings_file.read_text())["lora"]["target_modules"] == [
        "att.gate", "ffn.receptance"]


def test_an_older_adapter_with_its_time_tensors_merges_by_its_programs_formula(tmp_path, base):
    weights = load_weights(base)
    trained = {key: W.float() + 0.1 for key, W in weights.items() if "time" in key or "ln" in key}
    expected = {key: trained.get(key, W.float()) for key, W in weights.items()}
    for key in [key for key in weights if key.endswith(tuple(f"{name}.weight" for name in USUAL))]:
        A, B = torch.randn(4, weights[key].shape[1]), 0.1 * torch.randn(weights[key].shape[0], 4)
        trained |= {key.replace("weight", "lora_A"): A, key.replace("weight", "lora_B"): B}
        expected[key] = expected[key] + 3 * B @ A
    torch.save(trained, tmp_path / "rwkv-0.pth")
    merged = merge(base, tmp_path / "rwkv-0.pth", tmp_path / "merged.pth", lora_alpha=12, dtype=torch.float32)
    for key, W in load_weights(merged.path).items():
        torch.testing.assert_close(W, expected[key], rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_ai00s_file_is_the_same_base(tmp_path, base):
    weights = dict(to_ai00(key, W) for key, W in load_weights(base).items())
    save_file({key: W.half().contiguous() for key, W in weights.items()}, tmp_path / "base.st")
    ours, theirs = (load_model(path, dtype=torch.float32) for path in (base, tmp_path / "base.st"))
    tokens = torch.randint(257, (2, 20))
    torch.testing.assert_close(ours(tokens)[0], theirs(tokens)[0], rtol=0, atol=1e-3)


def test_chunks_of_a_text_give_the_whole_texts_gradient(tmp_path, settings):
    whole, chunks = (train(tmp_path / str(n), replace(settings, chunk_ctx=n, lora_dropout=0.0)) for n in (0, 7))
    for a, b in zip(steps(whole.rows), steps(chunks.rows), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
