"""Files: what is loaded is what was written, and everything else is refused with a reason."""

import os
import pickle
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_nb.errors import CheckpointError
from rwkv_nb.model import RWKV, Shape, fingerprint, init_weights, load_model, load_weights, read_shape, save_weights

TINY = {"x070": Shape(2, 64, 257, 8, 6, 7, 9, 96),
        "x060": Shape(2, 64, 257, 8, 0, 0, 0, 96, version="x060", rank_mix=5),
        "x052": Shape(2, 64, 257, 0, 0, 0, 0, 96, version="x052")}
KEYS = [(version, key) for version, shape in TINY.items() for key in shape.key_shapes()]


@pytest.fixture(scope="module")
def of_version():
    return {version: dict(init_weights(RWKV(shape), 1).state_dict()) for version, shape in TINY.items()}


@pytest.fixture
def weights(of_version):
    return of_version["x070"]


@pytest.fixture
def save(tmp_path):
    """Write a dict as a .pth; returns its path."""
    def write(values, **how):
        torch.save(values, tmp_path / "model.pth", **how)
        return tmp_path / "model.pth"
    return write


def refusal(path):
    with pytest.raises(CheckpointError) as caught:
        load_model(path)
    assert caught.value.fix
    return str(caught.value)


def test_what_was_read_is_written_back(tmp_path, model):
    """With and without block 0's v0 v1 v2; names, order, values and dtypes as in the file."""
    first, second = tmp_path / "a.pth", tmp_path / "b.pth"
    released = {k: model.half().state_dict()[k] for k in model.shape.key_shapes()}
    save_weights(first, released)
    loaded = load_model(first)
    assert ("blocks.0.att.v1" in loaded.state_dict()) == bool(loaded.shape.rank_v_layer0)
    save_weights(second, {k: loaded.state_dict()[k] for k in load_weights(first)})
    again = load_weights(second)
    assert list(again) == list(released)
    assert all(torch.equal(again[k], v) and again[k].dtype == v.dtype for k, v in released.items())
    assert loaded.shape == model.shape == read_shape(again)


def test_dtype_and_shape_come_from_the_file(save, weights):
    path = save({k: v.bfloat16() for k, v in weights.items()})
    assert load_model(path).emb.weight.dtype == torch.bfloat16
    model = load_model(path, dtype=torch.float32)
    assert model.shape == TINY["x070"] and {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("version, key", KEYS)
def test_each_missing_or_misshapen_key_is_named(save, of_version, version, key):
    weights = of_version[version]
    assert key in refusal(save({k: v for k, v in weights.items() if k != key}))
    for other in (weights[key].flatten()[:-1], weights[key][None]):
        assert key in refusal(save({**weights, key: other}))


def test_all_that_is_wrong_is_said_at_once(save, weights):
    wrong = {**weights, "blocks.1.att.extra": torch.zeros(3), "ln_out.bias": torch.zeros(63)}
    for key in ("blocks.0.att.w1", "blocks.0.ffn.key.weight", "emb.weight"):    # the shape is read from these
        del wrong[key]
    text = refusal(save(wrong))
    for part in ("5 of its keys", "missing: blocks.0.ffn.key.weight", "missing: emb.weight", "model.pth",
                 "unexpected: blocks.1.att.extra", "ln_out.bias is [63], expected [64]"):
        assert part in text


@pytest.mark.parametrize("version, key", [("x070", "att.r_k"), ("x060", "att.time_faaaa")])
def test_heads_that_do_not_divide_the_channels_are_refused(save, of_version, version, key):
    heads = {f"blocks.{i}.{key}": torch.zeros(3, 20) for i in range(2)}
    assert "heads of 20 channels do not make up 64" in refusal(save({**of_version[version], **heads}))


def test_a_missing_block_is_named(save, weights):
    assert "missing: blocks.1.att.key.weight" in refusal(
        save({k.replace("blocks.1.", "blocks.2."): v for k, v in weights.items()}))


@pytest.mark.parametrize("extra, name", [
    (["blocks.0.ffn.s_emb.weight", "blocks.0.ffn.s0"], "RWKV-7a"),
    (["blocks.0.qkv.q.weight", "blocks.0.ffn.s_emb.weight"], "RWKV-7b"),
])
def test_versions_to_come_are_refused_by_name(save, weights, extra, name):
    text = refusal(save({**weights, **{k: torch.zeros(1, 1, 64) for k in extra}}))
    assert f"{name} model" in text and "DeepEmbed" in text and "not supported yet" in text and "x070" in text


@pytest.mark.parametrize("values", [
    {}, [1, 2], torch.zeros(3), {"model": {"emb.weight": torch.zeros(3)}}, {"step": 3}, {1: torch.zeros(3)},
    {"emb.weight": torch.zeros(3, dtype=torch.int64)},
], ids=["empty", "list", "tensor", "nested", "numbers", "integer keys", "integer tensor"])
def test_other_things_than_weights_are_refused(save, values):
    assert "flat dict of weights" in refusal(save(values))


def test_a_lora_file_alone_is_refused(save):
    assert "LoRA file alone" in refusal(save({"blocks.0.att.key.lora_A": torch.zeros(4, 64)}))


class Code:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("how", ["pickle", "zip", "old", "beside weights"])
def test_nothing_in_a_file_is_run(tmp_path, weights, how):
    path, marker = tmp_path / "model.pth", str(tmp_path / "it ran")
    if how == "pickle":
        path.write_bytes(pickle.dumps(Code(marker), protocol=2))
    else:
        values = {**weights, "extra": Code(marker)} if how == "beside weights" else Code(marker)
        torch.save(values, path, _use_new_zipfile_serialization=how != "old")
    assert "nothing in it was run" in refusal(path)
    assert not os.path.exists(marker)


def test_absent_and_empty_files(tmp_path):
    assert "no such file" in refusal(tmp_path / "absent.pth")
    assert "this is a folder" in refusal(tmp_path)
    (tmp_path / "empty.pth").touch()
    assert "empty" in refusal(tmp_path / "empty.pth")


@pytest.fixture(scope="module", params=[True, False], ids=["zip", "old"])
def whole(request, of_version, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "model.pth"
    torch.save(of_version["x070"], path, _use_new_zipfile_serialization=request.param)
    assert zipfile.is_zipfile(path) == request.param
    return path


def test_both_formats_of_torch_load(whole, weights):
    loaded = load_model(whole).state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in weights.items())


@settings(max_examples=40, deadline=None)
@given(share=st.floats(0.0001, 0.9999))
def test_a_cut_off_file_is_refused(whole, share):
    data, cut = whole.read_bytes(), whole.with_name("cut.pth")
    cut.write_bytes(data[: int(len(data) * share)])
    assert "cut.pth" in refusal(cut)


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=1, max_size=100))
def test_a_file_of_anything_is_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("any") / "model.pth"
    path.write_bytes(data)
    refusal(path)


def test_saved_tensors_carry_no_more_than_themselves(tmp_path, weights):
    """A slice of a large tensor is written alone, and a failed save leaves no rest behind."""
    large = torch.randn(1000, 1000)
    save_weights(tmp_path / "a.pth", {**weights, "part": large[:2], "turned": large[:3, :3].T})
    assert (tmp_path / "a.pth").stat().st_size < sum(v.nbytes for v in weights.values()) + 100_000
    assert torch.equal(load_weights(tmp_path / "a.pth")["turned"], large[:3, :3].T)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


def test_fingerprint_knows_a_base(tmp_path, lively):
    weights, path = lively().state_dict(), tmp_path / "a.pth"

    def of(values, **how):
        torch.save(values, path, **how)
        return fingerprint(path)

    base = of(weights)
    assert base == of(dict(reversed(weights.items()))) == of(weights, _use_new_zipfile_serialization=False)
    assert len(base) == 16 and int(base, 16)
    key = "blocks.1.ffn.key.weight"
    first, last = weights[key].clone(), weights[key].clone()
    first[0, 0] += 1e-3
    last[-1, -1] += 1e-3
    others = [{**weights, key: first}, {**weights, key: last}, {**weights, key: weights[key].half()},
              {**weights, key: weights[key].T}, {**weights, "more": torch.zeros(1)},
              {k.replace(key, "other"): v for k, v in weights.items()}, lively().state_dict()]
    assert len({base, *map(of, others)}) == 8
