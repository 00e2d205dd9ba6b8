"""binidx: what is written is read, other writers' files are read, damaged files are refused by name."""

import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_files import write_binidx

from rwkv_nb.data.binidx import BinIdx
from rwkv_nb.data.convert import jsonl_to_binidx
from rwkv_nb.errors import DataError
from rwkv_nb.tokenizer import ByteTokenizer, WorldTokenizer


@settings(max_examples=50, deadline=None)
@given(documents=st.lists(st.lists(st.integers(0, 65535), max_size=20), min_size=1, max_size=8))
def test_what_is_written_is_read(tmp_path_factory, documents):
    prefix = tmp_path_factory.mktemp("pair") / "a.b"
    if not any(documents):
        documents = [*documents, [0]]
    assert write_binidx(prefix, iter(documents)) == len(documents)
    pair = BinIdx(prefix)
    assert [d.tolist() for d in pair] == documents and len(pair) == len(documents) and pair.dtype == np.uint16
    assert pair[-1].tolist() == documents[-1]
    with pytest.raises(IndexError):
        pair[len(documents)]


def test_the_bytes_are_the_formats(tmp_path):
    """Against the format's description, written out by hand."""
    write_binidx(tmp_path / "a", [[1, 2, 0], [65535, 0]])
    assert (tmp_path / "a.bin").read_bytes() == struct.pack("<5H", 1, 2, 0, 65535, 0)
    assert (tmp_path / "a.idx").read_bytes() == (
        b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 2, 3) + struct.pack("<2i", 3, 2)
        + struct.pack("<2q", 0, 6) + struct.pack("<3q", 0, 1, 2))


def foreign(folder, documents, dtype, code):
    """A pair as another program writes it."""
    sizes = [len(d) for d in documents]
    pointers = (np.cumsum([0, *sizes[:-1]]) * np.dtype(dtype).itemsize).tolist()
    n = len(documents)
    (folder / "f.bin").write_bytes(np.concatenate(documents).astype(dtype).tobytes())
    (folder / "f.idx").write_bytes(
        b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, n, n + 1) + struct.pack(f"<{n}i", *sizes)
        + struct.pack(f"<{n}q", *pointers) + struct.pack(f"<{n + 1}q", *range(n + 1)))
    return folder / "f"


@pytest.mark.parametrize("dtype, code", [("<u1", 1), ("<i1", 2), ("<i2", 3), ("<i4", 4), ("<i8", 5), ("<u2", 8)])
def test_the_dtype_code_is_honoured(tmp_path, dtype, code):
    documents = [[5, 100, 0], [7, 0]]
    pair = BinIdx(foreign(tmp_path, documents, dtype, code))
    assert [d.tolist() for d in pair] == documents and pair.dtype == np.dtype(dtype)


def damage_idx(change):
    def damage(folder):
        data = bytearray((folder / "a.idx").read_bytes())
        (folder / "a.idx").write_bytes(change(data))
    return damage


def put(offset, value):
    return damage_idx(lambda d: d[:offset] + value + d[offset + len(value):])


DAMAGE = {
    "no idx": ("a.idx", "missing", lambda f: (f / "a.idx").unlink()),
    "no bin": ("a.bin", "missing", lambda f: (f / "a.bin").unlink()),
    "empty idx": ("a.idx", "it is empty", lambda f: (f / "a.idx").write_bytes(b"")),
    "empty bin": ("a.bin", "it holds 0 bytes", lambda f: (f / "a.bin").write_bytes(b"")),
    "bad magic": ("a.idx", "begins otherwise", put(0, b"PK")),
    "cut in header": ("a.idx", "cut off", damage_idx(lambda d: d[:20])),
    "cut in sizes": ("a.idx", "cut off", damage_idx(lambda d: d[:-1])),
    "version 2": ("a.idx", "version 2", put(9, b"\2")),
    "floats": ("a.idx", "code 6", put(17, b"\6")),
    "many documents": ("a.idx", "cut off", put(18, b"\xff" * 8)),
    "no documents": ("a.idx", "no document", put(18, b"\0" * 8)),
    "negative size": ("a.idx", "no sense", put(34, b"\xff" * 4)),
    "odd pointer": ("a.idx", "no sense", put(42, b"\1")),
    "huge pointer": ("a.bin", "another .idx", put(50, struct.pack("<q", 2**60))),
    "short bin": ("a.bin", "cut off", lambda f: (f / "a.bin").write_bytes(b"1234")),
    "long bin": ("a.bin", "another .idx", lambda f: (f / "a.bin").write_bytes(b"1" * 40)),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(tmp_path, kind):
    file, what, damage = DAMAGE[kind]
    write_binidx(tmp_path / "a", [[1, 2, 0], [3, 0]])
    damage(tmp_path)
    with pytest.raises(DataError, match=what) as caught:
        BinIdx(tmp_path / "a")
    assert caught.value.where == str(tmp_path / file) and caught.value.fix


@pytest.mark.parametrize("tokenizer", [WorldTokenizer(), ByteTokenizer()], ids=["world", "byte"])
def test_jsonl_there_and_back(tmp_path, tokenizer):
    texts = ["User: 你好\n\nAssistant: hi 🙂", " .\n", "tab\t\0nul", "a" * 3000]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    assert jsonl_to_binidx(tmp_path / "a.jsonl", tmp_path / "a", tokenizer) == 4
    assert all(d[-1] == 0 and 0 not in d[:-1] for d in BinIdx(tmp_path / "a"))
    assert [tokenizer.decode(d) for d in BinIdx(tmp_path / "a")] == texts


def test_a_bad_line_leaves_nothing(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": ""}\n')
    with pytest.raises(DataError, match="a.jsonl:2"):
        jsonl_to_binidx(tmp_path / "a.jsonl", tmp_path / "a", ByteTokenizer())
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def independent_reader(prefix):
    """Documents by the format's description alone, number by number."""
    with open(f"{prefix}.idx", "rb") as idx, open(f"{prefix}.bin", "rb") as bin_:
        assert idx.read(9) == b"MMIDIDX\0\0"
        version, code, n, n_docs = struct.unpack("<QBQQ", idx.read(25))
        assert (version, code) == (1, 8)
        sizes, places = (struct.unpack(f"<{n}{kind}", idx.read(n * width)) for kind, width in (("i", 4), ("q", 8)))
        assert struct.unpack(f"<{n_docs}q", idx.read()) == tuple(range(n + 1))
        documents = []
        for size, place in zip(sizes, places, strict=True):
            bin_.seek(place)
            documents.append(list(struct.unpack(f"<{size}H", bin_.read(2 * size))))
        assert not bin_.read()
    return documents


@settings(max_examples=50, deadline=None)
@given(documents=st.lists(st.lists(st.integers(0, 65535), max_size=20), min_size=1, max_size=8).filter(any))
def test_independent_programs_read_and_write_the_same(tmp_path_factory, documents):
    folder = tmp_path_factory.mktemp("pair")
    write_binidx(folder / "ours", documents)
    assert independent_reader(folder / "ours") == documents
    foreign(folder, documents, "<u2", 8)
    assert [d.tolist() for d in BinIdx(folder / "f")] == documents
    for end in ("bin", "idx"):
        assert (folder / f"f.{end}").read_bytes() == (folder / f"ours.{end}").read_bytes()
