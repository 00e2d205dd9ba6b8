"""Data files by name, and the documents in them."""

import json

import numpy as np
import pytest
from token_files import write_binidx

from rwkv_nb.config import DataSettings
from rwkv_nb.data.chat import loss_mask
from rwkv_nb.data.convert import jsonl_to_binidx
from rwkv_nb.data.sources import find_data_file, open_documents
from rwkv_nb.errors import DataError
from rwkv_nb.tokenizer import ByteTokenizer, WorldTokenizer

BYTE = ByteTokenizer()
TEXTS = ["User: 你好\n\nAssistant: hi", "a story", "User: x\n\nAssistant: " + "long " * 50]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(json.dumps({"text": t}) for t in TEXTS))
    return path


@pytest.mark.parametrize("tokenizer", [BYTE, WorldTokenizer()], ids=["byte", "world"])
@pytest.mark.parametrize("template", ["chat", "plain"])
def test_jsonl_and_binidx_give_the_same_documents(data, tokenizer, template):
    jsonl_to_binidx(data, data.with_suffix(""), tokenizer)
    one = open_documents(DataSettings(data_file=str(data), template=template), tokenizer)
    two = open_documents(DataSettings(data_file=str(data.with_suffix(".bin")), template=template), tokenizer)
    assert len(one) == len(two) == 3
    for a, b, text in zip(one, two, TEXTS, strict=True):
        assert a.tokens.dtype == b.tokens.dtype == np.uint16 and a.mask.dtype == bool
        assert a.tokens.tolist() == b.tokens.tolist() == [*tokenizer.encode(text), 0]
        assert np.array_equal(a.mask, b.mask) and np.array_equal(a.mask, loss_mask(a.tokens, tokenizer, template))
    assert one.sizes.tolist() == [len(d.tokens) for d in one]
    assert one[-1].tokens.tolist() == one[2].tokens.tolist()
    assert (template == "chat") == any("1 of 3 documents are trained whole" in n for n in one.notices)


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_documents_in_blocks_are_the_same(data, template, monkeypatch):
    """Whole and in pieces, whatever number of documents is looked at together."""
    settings = DataSettings(data_file=str(data), template=template)
    whole = open_documents(settings, BYTE)
    monkeypatch.setattr("rwkv_nb.data.sources.BLOCK", 30)
    for one, two in zip(whole, open_documents(settings, BYTE), strict=True):
        assert np.array_equal(one.tokens, two.tokens) and np.array_equal(one.mask, two.mask)
    for i, one in enumerate(whole):
        for start, stop in ((0, 5), (3, 11), (9, 10), (4, 10_000)):
            piece = whole.piece(i, start, stop)
            assert np.array_equal(piece.tokens, one.tokens[start:stop])
            assert np.array_equal(piece.mask, one.mask[start:stop])
    assert whole.trained.tolist() == [d.mask.sum() for d in whole]


def test_a_name_without_suffix_finds_its_file(data):
    bare = data.with_suffix("")
    found = find_data_file(bare)
    assert (found.path, found.data_type, found.notice) == (data, "jsonl", "")
    write_binidx(bare, [[1, 0]])
    found = find_data_file(bare)
    assert found.path == data and "train.jsonl is read" in found.notice and "train.bin" in found.notice
    assert find_data_file(bare, "binidx").path.name == "train.bin"
    assert find_data_file(bare.with_suffix(".idx"))[:2] == (bare.with_suffix(".idx"), "binidx")
    data.unlink()
    assert find_data_file(bare)[1:] == ("binidx", "")
    assert open_documents(DataSettings(data_file=str(bare)), BYTE)[0].tokens.tolist() == [1, 0]


def test_json2binidx_tools_names_are_found(tmp_path):
    write_binidx(tmp_path / "train_text_document", [[1, 0]])
    assert find_data_file(tmp_path / "train").path.name == "train_text_document.bin"


def test_the_exact_name_comes_first(data):
    data.rename(data.with_suffix(""))
    write_binidx(data.with_suffix(""), [[1, 0]])
    found = find_data_file(data.with_suffix(""), "jsonl")
    assert found.path == data.with_suffix("") and len(open_documents(
        DataSettings(data_file=str(found.path), data_type="jsonl"), BYTE)) == 3
    with pytest.raises(DataError, match="does not say what it holds"):
        find_data_file(data.with_suffix(""))


def test_what_is_not_there_is_said(data):
    with pytest.raises(DataError, match="did you mean train.jsonl"):
        find_data_file(data.with_name("trian.jsonl"))
    with pytest.raises(DataError, match="of type binidx"):
        find_data_file(data.with_suffix(""), "binidx")
    with pytest.raises(DataError, match="a jsonl file, not binidx"):
        find_data_file(data, "binidx")


def test_a_file_of_another_vocabulary_is_refused(data):
    jsonl_to_binidx(data, data.with_suffix(""), WorldTokenizer())
    with pytest.raises(DataError, match="document 1: it has id .* byte vocabulary ends at 256"):
        open_documents(DataSettings(data_file=str(data.with_suffix(".bin"))), BYTE)
