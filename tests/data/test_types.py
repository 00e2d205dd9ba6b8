"""Every data_type gives its documents; what cannot be read is named."""

import csv
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batches import make_documents
from token_files import source_of

from rwkv_nb.config import DataSettings
from rwkv_nb.data.mixing import mixed, repeated, split
from rwkv_nb.data.sources import open_documents, open_split
from rwkv_nb.errors import DataError, RwkvNbError, SettingsError
from rwkv_nb.tokenizer import ByteTokenizer, WorldTokenizer

BYTE, WORLD = ByteTokenizer(), WorldTokenizer()
ROWS = [{"query": f"问 {i}", "response": f"answer {i}"} for i in range(20)]


def opened(path, tokenizer=BYTE, **values):
    documents = open_documents(DataSettings(data_file=str(path), **values), tokenizer)
    assert all(d.tokens.dtype == np.uint16 and d.mask.dtype == bool and len(d.tokens) == len(d.mask)
               for d in documents)
    return [d.tokens.tolist() for d in documents]


@settings(max_examples=40, deadline=None)
@given(text=st.text(min_size=1).filter(str.strip), encoding=st.sampled_from(["utf-8", "utf-16le"]), bom=st.booleans())
def test_plain_text(tmp_path_factory, text, encoding, bom):
    text = text.removeprefix("\ufeff") or "a"
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(("\ufeff" * bom + text).encode(encoding))
    assert opened(path, data_type=encoding) == [[*BYTE.encode(text), 0]]


def test_text_of_another_encoding_is_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("第一行\n".encode() + "你好，世界".encode("gbk"))
    with pytest.raises(DataError, match="a.txt:2: byte 11 is not UTF-8"):
        opened(path)
    path.write_bytes(b"odd")
    with pytest.raises(DataError, match="UTF-16LE .UTF-8 perhaps"):
        opened(path, data_type="utf-16le")
    path.write_text(" \n")
    with pytest.raises(DataError, match="empty"):
        opened(path)


streams = st.lists(st.lists(st.integers(1, 65535), max_size=8).map(lambda d: [*d, 0]), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(documents=streams, closed=st.booleans(), dtype=st.sampled_from(["<u2", "<i4", "<i8", ">u2"]))
def test_token_arrays_are_cut_behind_their_zeros(tmp_path_factory, documents, closed, dtype):
    documents = documents if closed else [*documents, [7, 8]]
    folder, stream = tmp_path_factory.mktemp("npy"), np.concatenate(documents)
    np.save(folder / "a.npy", stream.astype(dtype))
    stream.astype("<u2").tofile(folder / "a.bin")
    assert opened(folder / "a.npy", WORLD) == opened(folder / "a.bin", WORLD, data_type="uint16") == documents


def test_rows_of_an_array_are_documents(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[1, 0, 2], [3, 4, 0]]))
    assert opened(tmp_path / "a.npy") == [[1, 0, 2], [3, 4, 0]]
    for bad in (np.ones((2, 2)), np.ones((1, 1, 1), dtype=int), np.array([], dtype=int), np.array(["a"])):
        np.save(tmp_path / "a.npy", bad)
        with pytest.raises(DataError, match="whole numbers"):
            opened(tmp_path / "a.npy")
    np.save(tmp_path / "a.npy", np.array([{"pickled": 1}], dtype=object))
    with pytest.raises(DataError, match="cannot be read as numpy"):
        opened(tmp_path / "a.npy")
    np.save(tmp_path / "a.npy", np.array([1, 300]))
    with pytest.raises(DataError, match="id 300"):
        opened(tmp_path / "a.npy")


def write_rows(path, rows):
    if path.suffix == ".csv":
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pytest.importorskip("pyarrow.parquet").write_table(
            pytest.importorskip("pyarrow").Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.parquet"])
@pytest.mark.parametrize("split, chosen", [("train", range(20)), ("train[:3]", range(3)), ("train[5:7]", range(5, 7)),
                                           ("train[50%:]", range(10, 20)), ("train[18:99]", range(18, 20))])
def test_sft(tmp_path, name, split, chosen):
    write_rows(tmp_path / name, ROWS)
    wanted = [[*BYTE.encode(f"User: 问 {i}\n\nAssistant: answer {i}"), 0] for i in chosen]
    assert opened(tmp_path / name, data_type="sft", sft_split=split) == wanted
    (tmp_path / name).rename((tmp_path / name).with_stem("train"))
    assert opened(tmp_path, data_type="sft", sft_split=split) == wanted


def test_sft_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "a.json"
    write_rows(path, [*ROWS, {"query": "x"}])
    with pytest.raises(DataError, match='a.json:21: there is no "response"; its fields are .query.'):
        opened(path, data_type="sft", sft_field=("query", "response"))
    assert len(opened(path, sft_field=("query", "response"), sft_split="train[:20]")) == 20
    for text, what in (("{", "a.json:1: this is not JSON"), ("3", "no list"), ('{"data": [3]}', "an? JSON object")):
        path.write_text(text)
        with pytest.raises(DataError, match=what):
            opened(path)
    for values in ({"sft_split": "train[-3:]"}, {"sft_field": ("query",)}, {"sft_split": "train[%:]"}):
        with pytest.raises(SettingsError):
            opened(path, data_type="sft", **values)
    write_rows(path, ROWS)
    with pytest.raises(DataError, match="no row is left"):
        opened(path, sft_split="train[20:]")


def test_a_json_file_may_hold_lines(tmp_path):
    write_rows(tmp_path / "a.json", ROWS)
    (tmp_path / "b.json").write_text("\n".join(map(json.dumps, ROWS)))
    assert opened(tmp_path / "a.json") == opened(tmp_path / "b.json", data_type="jsonl")


def test_a_data_set_by_name_or_what_is_missing_for_it(tmp_path):
    with pytest.raises(RwkvNbError) as caught:
        opened(tmp_path / "no" / "such", data_type="sft")
    assert "rwkv_nb[datasets]" in str(caught.value) or "cannot be read as a data set" in str(caught.value)


def test_dummy_documents_fit_ctx_len():
    one, two = (opened("", WORLD, data_type="dummy", template="plain", ctx_len=16) for _ in range(2))
    assert one == two and {len(d) for d in one} == {17} and max(map(max, one)) > 60_000 and min(map(min, one)) > 0


@pytest.fixture
def two_files(tmp_path):
    for name, n in (("a", 40), ("b", 10)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{name}{i:03}"}) + "\n" for i in range(n)))
    return tmp_path


def test_held_out_documents_are_the_same_ones_each_time(two_files):
    data = DataSettings(data_file=str(two_files / "a"), heldout=0.25)
    (train, held), again = open_split(data, BYTE), open_split(data, BYTE)
    texts = [[BYTE.decode(d.tokens) for d in part] for part in (train, held)]
    assert [len(t) for t in texts] == [30, 10] and len(set(sum(texts, []))) == 40
    assert texts == [[BYTE.decode(d.tokens) for d in part] for part in again]
    other = open_split(DataSettings(data_file=str(two_files / "a"), heldout=0.25, data_seed=7), BYTE)[1]
    assert texts[1] != [BYTE.decode(d.tokens) for d in other]
    assert train.sizes.tolist() == [5] * 30 and any("10 of 40" in n for n in train.notices)


def test_repeats_and_a_second_source_by_weight(two_files):
    data = dict(data_file=str(two_files / "a"), repeat=2.5, mix_file=str(two_files / "b"), mix_share=0.2)
    documents = open_documents(DataSettings(**data), BYTE)
    texts = [BYTE.decode(d.tokens) for d in documents]
    counts = {text: texts.count(text) for text in texts}
    assert len(documents) == 125 and sum(t[0] == "b" for t in texts) == 25
    assert {counts[t] for t in counts if t[0] == "a"} == {counts[t] for t in counts if t[0] == "b"} == {2, 3}
    assert any("20.0% of the tokens come from" in n for n in documents.notices)


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 30), share=st.floats(0, 0.9), times=st.floats(0.05, 4), seed=st.integers(0, 9))
def test_selections_by_construction(n, share, times, seed):
    def numbers(documents):     # document i has i + 1 tokens
        assert documents.sizes.tolist() == [len(d.tokens) for d in documents]
        assert documents.trained.tolist() == [d.mask.sum() for d in documents]
        return [len(d.tokens) - 1 for d in documents]

    source = source_of(make_documents(range(1, n + 1)))
    if round(share * n) < n:
        train, held = split(source, share, seed)
        assert sorted(numbers(train) + numbers(held)) == list(range(n)) and len(held) == round(share * n)
    again = list(repeated(source, times, seed))
    assert len(again) == (int(times) * n + round(times % 1 * n) or 1)
    both = mixed(source, source, 0.5, seed)
    assert numbers(both) == [*range(n), *range(n)]
    assert both.checksum != mixed(source, source_of(make_documents([n + 1])), 0.5, seed).checksum
    with pytest.raises(IndexError):
        both[2 * n]
