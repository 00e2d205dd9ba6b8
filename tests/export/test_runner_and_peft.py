"""RWKV Runner's .pth by its rules, peft's folder by the library itself, and both from the command line."""

import json

import pytest
import torch

from rwkv_nb.cli import main
from rwkv_nb.errors import AdapterError, CheckpointError
from rwkv_nb.export import export_ai00, export_peft, export_runner
from rwkv_nb.lora.adapter import apply_adapter, load_adapter
from rwkv_nb.model import Shape, load_model, load_weights, save_weights


def save_random(path, shape):
    save_weights(path, {k: torch.randn(size).bfloat16() for k, size in shape.key_shapes().items()})
    return path


def test_runners_file_is_the_model_in_the_released_order(lively_world, tmp_path, capsys):
    base, _ = lively_world
    weights = load_weights(base)
    save_weights(tmp_path / "mixed.pth", dict(sorted(weights.items(), reverse=True)))
    export_ai00(base, tmp_path / "model.st")
    for source in ("mixed.pth", "model.st"):
        out = tmp_path / f"{source}.out.pth"
        assert main(["export", "--to", "runner", "--input", str(tmp_path / source), "--output", str(out),
                     "--lora_alpha", "8"]) == 0     # which a model has no use for
        assert "models folder" in capsys.readouterr().out
        written = torch.load(out, weights_only=True)
        assert list(written) == list(weights) and all(torch.equal(written[k], weights[k]) for k in weights)


@pytest.mark.parametrize("shape, complaint", [
    (Shape(2, 64, 257, 8, 8, 8, 8, 128), "257 rows"),
    (Shape(1, 64, 65536, 8, 8, 8, 8, 128, rank_v_layer0=8), "one block")])
def test_what_runner_and_ai00_would_not_load_is_refused(tmp_path, shape, complaint):
    source = save_random(tmp_path / "model.pth", shape)
    for export in (export_runner, export_ai00):
        with pytest.raises(CheckpointError, match=complaint):
            export(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_the_peft_library_loads_and_applies_it(lively_world, tmp_path, capsys):
    import peft  # it takes seconds: only the process that needs it waits for it

    base, adapter = lively_world
    assert main(["export", "--to", "peft", "--input", str(adapter), "--output", str(tmp_path / "folder")]) == 0
    assert "from_pretrained" in capsys.readouterr().out
    model = load_model(base, dtype=torch.float32).eval()
    ours = apply_adapter(load_model(base, dtype=torch.float32), load_adapter(adapter), "", allow_other_base=True).eval()
    tokens = torch.randint(1, 65530, (2, 15))
    before = model(tokens)[0]
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "folder").eval()
    torch.testing.assert_close(theirs(tokens)[0], ours(tokens)[0], atol=1e-4, rtol=1e-4)
    assert (theirs(tokens)[0] - before).abs().max() > 0.1
    again, first = load_adapter(tmp_path / "folder"), load_adapter(adapter)     # and back to us, exactly
    assert again.scale == first.scale and again.tensors.keys() == first.tensors.keys()
    assert all(torch.equal(again.tensors[k], v) for k, v in first.tensors.items())
    assert json.loads((tmp_path / "folder" / "adapter_config.json").read_text())["r"] == 4


def test_trained_norms_have_no_place_in_pefts_form(lively_world, tmp_path):
    norms = {**load_adapter(lively_world[1]).tensors, "blocks.1.ln2.weight": torch.randn(64)}
    torch.save(norms, tmp_path / "norms.pth")
    with pytest.raises(AdapterError, match=r"trained blocks\.1\.ln2\.weight"):
        export_peft(tmp_path / "norms.pth", tmp_path / "out", lora_alpha=4.0)


def test_pickled_adapters_run_nothing(tmp_path, capsys):
    class Code:
        def __reduce__(self):
            return open, (str(tmp_path / "it ran"), "w")

    for name, value in (("a.pth", Code()), ("b.pth", {"blocks.0.att.key.lora_A": Code()})):
        torch.save(value, tmp_path / name)
        for to in ("peft", "ai00", "runner"):
            assert main(["export", "--to", to, "--input", str(tmp_path / name), "--output", str(tmp_path / "o")]) == 1
            assert "nothing in it was run" in capsys.readouterr().err
        with pytest.raises(AdapterError, match="nothing in it was run"):
            load_adapter(tmp_path / name, 4.0)
    torch.save({"blocks.0.att.key.lora_A": torch.zeros(4, 64)}, tmp_path / "c.pth")
    data = (tmp_path / "c.pth").read_bytes()
    for share in range(1, 10):
        (tmp_path / "cut.pth").write_bytes(data[:len(data) * share // 10])
        with pytest.raises(AdapterError, match="damaged"):
            load_adapter(tmp_path / "cut.pth", 4.0)
    assert not (tmp_path / "it ran").exists()
