"""Damaged files: each is read, or refused by an error of our own; nothing crashes, hangs or is lost in silence."""

import json
import random
import struct

import numpy as np
import pytest
from token_files import write_binidx

from rwkv_nb.config import DataSettings
from rwkv_nb.data.binidx import BinIdx
from rwkv_nb.data.check import check_data
from rwkv_nb.data.convert import jsonl_to_binidx
from rwkv_nb.data.sources import read_jsonl
from rwkv_nb.errors import RwkvNbError
from rwkv_nb.tokenizer import ByteTokenizer

BYTE = ByteTokenizer()
DOCUMENTS = [[*BYTE.encode(text), 0] for text in ("User: 问\n\nAssistant: 答", "a story", "x" * 50, "é")]
ROWS = [{"text": BYTE.decode(d)} for d in DOCUMENTS] + [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"query": "q", "response": "r"}]
NUMBERS = [struct.pack("<q", n) for n in (0, 1, -1, 2**31, 2**62, 2**63 - 1, -2**63)]


def mutate(data, rng):
    """A file with one to four changes: bytes changed, cut out, doubled, cut off, or a number put in."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        i, j = sorted(rng.integers(0, len(data) + 1, 2).tolist())
        kind = rng.integers(6)
        if kind == 0 and i < len(data):
            data[i] = rng.integers(256)
        elif kind == 1:
            del data[i:min(j, i + 40)]
        elif kind == 2:
            data[i:i] = data[i:j][:100]
        elif kind == 3:
            del data[max(i, 1):]
        elif kind == 4:
            data[i:i + 8] = NUMBERS[rng.integers(len(NUMBERS))]
        elif data:
            data[i:i + 1] = rng.choice([b'"', b"{", b"}", b"\\", b"\n", b"\xff", b"\0", b"'", b"\\ud800"])
    return bytes(data)


def refused_or_read(read):
    try:
        return read()
    except RwkvNbError as error:
        assert error.what and error.where is not None
        return None


def check_pair(folder, name, data):
    (folder / name).write_bytes(data)
    pair = refused_or_read(lambda: BinIdx(folder / "a"))
    if pair is not None:
        sizes = np.frombuffer((folder / "a.idx").read_bytes(), "<i4", len(pair), 34)
        assert [len(d) for d in pair] == sizes.tolist()     # every document is as long as the .idx says
        assert sum(sizes) * pair.dtype.itemsize <= 10_000 * (folder / "a.bin").stat().st_size
    found = check_data(DataSettings(data_file=str(folder / "a.bin")), BYTE)
    assert found.problems or pair is not None


def check_jsonl(folder, data):
    path = folder / "b.jsonl"
    path.write_bytes(data)
    found = check_data(DataSettings(data_file=str(path)), BYTE)
    good = refused_or_read(lambda: list(read_jsonl(path)))
    written = refused_or_read(lambda: jsonl_to_binidx(path, folder / "out", BYTE))
    assert (good is None) == (written is None)
    lines = {number for number, line in enumerate(data.split(b"\n"), 1) if line.removeprefix(b"\xef\xbb\xbf").strip()}
    told = {p.line for p in found.problems}
    if good is not None:
        assert {line for line, _ in good} == lines and written == len(lines) == len(found.sizes)
        assert [BYTE.decode(d) for d in BinIdx(folder / "out")] == [text for _, text in good]
    else:
        assert told == {0} or told and len(found.sizes) + len(found.problems) >= len(lines)


def fuzz(folder, count, seed):
    rng = np.random.default_rng(seed)
    write_binidx(folder / "a", DOCUMENTS)
    whole = {name: (folder / name).read_bytes() for name in ("a.bin", "a.idx")}
    text = "\n".join(json.dumps(row, ensure_ascii=bool(i % 2)) for i, row in enumerate(ROWS)).encode()
    for i in range(count):
        name = ("a.idx", "a.bin", "b.jsonl")[i % 3]
        if name == "b.jsonl":
            check_jsonl(folder, mutate(text, rng))
        else:
            check_pair(folder, name, mutate(whole[name], rng))
            (folder / name).write_bytes(whole[name])


def test_500_damaged_files(tmp_path):
    fuzz(tmp_path, 500, seed=random.getrandbits(32))


@pytest.mark.soak
def test_10000_damaged_files(tmp_path):
    fuzz(tmp_path, 10_000, seed=random.getrandbits(32))
