"""Ai00's .st: read by a loader written here from web-rwkv's naming, and back again as a base."""

import json
import random
import struct

import numpy as np
import pytest
import torch

from rwkv_nb.errors import AdapterError, CheckpointError
from rwkv_nb.export import export_ai00
from rwkv_nb.lora.adapter import load_adapter
from rwkv_nb.lora.merge import merge
from rwkv_nb.model import Shape, fingerprint, load_model, load_weights, read_shape, save_weights

SHAPES = {
    7: Shape(2, 64, 65536, 8, 9, 10, 24, 256, rank_v_layer0=10),
    6: Shape(2, 64, 65536, 8, 0, 0, 0, 224, version="x060", rank_mix=4),
    5: Shape(2, 64, 65536, 0, 0, 0, 0, 224, version="x052"),
}


class WebRwkv:
    """A .st file by web-rwkv's rules: every tensor F16, its version and sizes told by names and shapes alone."""

    def __init__(self, path):
        data = path.read_bytes()
        size, = struct.unpack("<Q", data[:8])
        header = json.loads(data[8:8 + size])
        assert header.pop("__metadata__") == {"format": "pt"}
        self.tensors = {}
        for name, entry in header.items():
            assert entry["dtype"] == "F16" and name == name.lower(), name
            start, stop = entry["data_offsets"]
            flat = np.frombuffer(data[8 + size:][start:stop], dtype="<f2")
            self.tensors[name] = torch.from_numpy(flat.copy()).view(entry["shape"])

    def info(self):
        def has(*names):
            return all(f"blocks.0.{name}" in self.tensors for name in names)

        def size(name, axis):
            return self.tensors[name].shape[axis]

        v5 = has("att.gate.weight", "att.ln_x.weight", "att.ln_x.bias")
        v6 = has(*(f"att.time_mix_{c}" for c in "xwkvrg"), "att.time_mix_w1", "att.time_mix_w2", "att.time_decay_w1",
                 "att.time_decay_w2", "ffn.time_mix_k", "ffn.time_mix_r")
        v7 = has(*(f"att.x_{c}" for c in "rwkvag"), *(f"att.{c}{i}" for c in "wa" for i in range(3)), "att.g1",
                 "att.g2", "att.r_k", "att.k_k", "att.k_a")
        layers = 1 + max(int(name.split(".")[1]) for name in self.tensors if name.startswith("blocks."))
        out = {"version": 7 if v7 else 6 if v6 else 5 if v5 else None, "layers": layers, "vocab": size("emb.weight", 0),
               "embed": size("emb.weight", 1), "hidden": size("blocks.0.ffn.key.weight", 0),
               "heads": size("blocks.0.att.r_k" if v7 else "blocks.0.att.time_first", 0)}
        if v7:
            out["ranks"] = {c: size(f"blocks.1.att.{c}1", 0) for c in "wavg"}
        elif v6:
            out["ranks"] = {"mix": size("blocks.0.att.time_mix_w1", 0) / 5, "w": size("blocks.0.att.time_decay_w1", 0)}
        return out


def make(path, version, dtype=torch.float16):
    weights = {k: torch.randn(size).to(dtype) for k, size in SHAPES[version].key_shapes().items()}
    save_weights(path, weights)
    return weights


@pytest.mark.parametrize("version", [7, 6, 5])
def test_a_model_as_web_rwkv_reads_it_and_back(tmp_path, version):
    weights, shape = make(tmp_path / "model.pth", version), SHAPES[version]
    export_ai00(tmp_path / "model.pth", tmp_path / "model.st")
    theirs = WebRwkv(tmp_path / "model.st")
    info = theirs.info()
    assert (info["version"], info["layers"], info["vocab"]) == (version, 2, 65536)
    assert (info["embed"], info["hidden"], info["heads"]) == (64, shape.ffn_dim, 1)
    if version == 7:
        assert info["ranks"] == {"w": 8, "a": 9, "v": 10, "g": 24}
        turned = [f"blocks.1.att.{c}{i}" for c in "wavg" for i in (1, 2)]
    else:
        assert version == 5 or info["ranks"] == {"mix": 4, "w": 8}
        turned = [f"blocks.1.att.time_{c}_w{i}" for c in ("mix", "decay") for i in (1, 2)] if version == 6 else []
    for name in turned:     # applied as its linears are: [out, in]
        ours = weights[name.replace("time_mix", "time_maa")]
        assert torch.equal(theirs.tensors[name], ours.transpose(-2, -1)), name
    for name in ("blocks.1.att.output.weight", "blocks.0.ffn.key.weight", "emb.weight", "head.weight"):
        assert torch.equal(theirs.tensors[name], weights[name])
    if version < 7:
        assert torch.equal(theirs.tensors["blocks.1.att.time_first"], weights["blocks.1.att.time_faaaa"])

    back = load_weights(tmp_path / "model.st")
    assert list(back) == list(weights) and all(torch.equal(back[k], weights[k]) for k in weights)
    assert read_shape(back) == shape and fingerprint(tmp_path / "model.st") == fingerprint(tmp_path / "model.pth")
    assert load_model(tmp_path / "model.st", dtype=torch.float32).shape == shape


def test_a_base_in_this_form_is_merged_into(lively_world, tmp_path):
    base, adapter = lively_world
    export_ai00(base, tmp_path / "base.st")
    proof = merge(tmp_path / "base.st", adapter, tmp_path / "merged.pth", allow_other_base=True)
    assert proof.ok and proof.dtype == "float16"
    assert list(load_weights(proof.path)) == list(load_weights(base))


def test_a_lora_as_web_rwkv_applies_it(lively_world, tmp_path):
    base, adapter = lively_world
    said = export_ai00(adapter, tmp_path / "lora.st")
    assert "alpha = 12" in said
    lora, merged = WebRwkv(tmp_path / "lora.st").tensors, load_weights(merge(base, adapter, tmp_path / "m.pth").path)
    applied = 0
    for name, W in load_weights(base).items():
        x, y = (lora.get(f"{name.removesuffix('.weight')}.lora.{i}") for i in (0, 1))
        if x is not None:
            rank = x.shape[1]
            W = W.float() + 12 / rank * (y.float() @ x.float().mT)
            applied += 1
        torch.testing.assert_close(W.float(), merged[name].float(), atol=1e-2, rtol=1e-2)
    assert applied == 12 and len(lora) == 24


def test_what_ai00_would_not_apply_is_refused(lively_world, tmp_path):
    adapter = load_adapter(lively_world[1])
    torch.save({"head.lora_A": torch.zeros(4, 64), "head.lora_B": torch.zeros(65536, 4)}, tmp_path / "head.pth")
    with pytest.raises(AdapterError, match="no LoRA on head"):
        export_ai00(tmp_path / "head.pth", tmp_path / "x.st", lora_alpha=4.0)
    norms = {**adapter.tensors, "blocks.1.ln2.weight": torch.randn(64)}
    torch.save(norms, tmp_path / "norms.pth")
    export_ai00(tmp_path / "norms.pth", tmp_path / "norms.st", lora_alpha=4.0)
    assert torch.equal(WebRwkv(tmp_path / "norms.st").tensors["blocks.1.ln2.weight"],
                       norms["blocks.1.ln2.weight"].half())
    make(tmp_path / "model.pth", 7, torch.float32)
    weights = {k: v.clone() for k, v in load_weights(tmp_path / "model.pth").items()}
    weights["emb.weight"][5, 5] = -7e4
    save_weights(tmp_path / "model.pth", weights)
    with pytest.raises(CheckpointError, match=r"emb\.weight: a value of 7e\+04 does not fit"):
        export_ai00(tmp_path / "model.pth", tmp_path / "x.st")
    assert not (tmp_path / "x.st").exists()


# -- hostile files ---------------------------------------------------------------------------------------------------

def st_bytes(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(start, stop, shape, dtype="F16"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize("data", [
    st_bytes({"a": entry(0, 8, [4]), "b": entry(4, 12, [4])}, bytes(12)),
    st_bytes({"a": entry(0, 2**62, [2**61])}, bytes(8)), st_bytes({"a": entry(8, 0, [4])}, bytes(8)),
    st_bytes({"a": entry(0, 8, [2**63, 2**63])}, bytes(8)), st_bytes({"a": entry(-8, 0, [4])}, bytes(8)),
    st_bytes({"a": entry(2, 10, [4])}, bytes(10)), st_bytes({"a": entry(0, 8, [4])}, bytes(4)),
    st_bytes({"a": entry(0, 8, [4])}, bytes(80)), st_bytes(b"[" * 100_000), st_bytes({}), st_bytes(b"\xff\xfe{}"),
    struct.pack("<Q", 2**60) + b"{}", b"", b"\x80\x04N.",
    st_bytes({"emb.weight": entry(0, 8, [4]), "blocks.0.att.w1": entry(8, 16, [4])}, bytes(16)),
    st_bytes({"emb.weight": entry(0, 2, []), "blocks.0.att.r_k": entry(2, 4, [])}, bytes(4)),
    st_bytes({"emb.weight": entry(0, 8, [2, 2]), "blocks.99999999999.att.r_k": entry(8, 16, [2, 2])}, bytes(16)),
    st_bytes({"emb.weight": entry(0, 16, [2, 2], "I32")}, bytes(16)),
], ids=["overlap", "huge", "backwards", "product overflows", "negative", "gap", "short", "long", "deep", "empty",
        "no text", "header beyond the end", "nothing", "pickle", "flat", "no dimensions", "a billion blocks",
        "integers"])
def test_hostile_safetensors_are_refused(tmp_path, data):
    for name in ("a.st", "a.safetensors"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CheckpointError):
            load_model(tmp_path / name)


def test_one_wrong_byte_is_refused_or_does_not_matter(tmp_path):
    shape = Shape(2, 64, 257, 8, 9, 10, 24, 128)
    torch.manual_seed(0)
    save_weights(tmp_path / "model.pth", {k: torch.randn(size) for k, size in shape.key_shapes().items()})
    from safetensors.torch import save_file
    save_file(load_weights(tmp_path / "model.pth"), tmp_path / "whole.st")
    whole, rng = (tmp_path / "whole.st").read_bytes(), random.Random(0)
    header, intact = 8 + struct.unpack("<Q", whole[:8])[0], load_model(tmp_path / "whole.st").state_dict()
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[rng.randrange(header)] ^= 1 << rng.randrange(8)
        (tmp_path / "cut.st").write_bytes(damaged)
        try:
            read = load_model(tmp_path / "cut.st").state_dict()
        except CheckpointError:
            continue
        assert all(torch.equal(read[key], tensor) for key, tensor in intact.items())
