"""Tokenizers: ids equal to the `rwkv` package's, decoding that never fails."""

import os

import numpy as np
import pytest
import rwkv
from hypothesis import given, settings
from hypothesis import strategies as st
from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

from rwkv_nb.errors import SettingsError
from rwkv_nb.tokenizer import LONGEST, ByteTokenizer, WorldTokenizer, get_tokenizer

WORLD, BYTE = WorldTokenizer(), ByteTokenizer()
MIXED = "The 猫 sat. Ça va? Привет, мир! こんにちは 안녕 🙂👨‍👩‍👧 नमस्ते\r\n\tx = [1, 2]\n\n１２３ \u200b\ufeff e\u0301"
texts = st.text(max_size=60) | st.lists(
    st.sampled_from(["User:", " ", "\n\n", "的", "中文", "été", "🙂", "the", " Привет", "def f(x):\n    ", "١٢", "\0"])
).map("".join)


@pytest.fixture(scope="module")
def oracle():
    return TRIE_TOKENIZER(os.path.join(os.path.dirname(rwkv.__file__), "rwkv_vocab_v20230424.txt"))


def test_world_ids_equal_the_rwkv_packages(oracle):
    @settings(max_examples=300, deadline=None)
    @given(texts)
    def same(text):
        assert WORLD.encode(text) == oracle.encode(text)

    same()
    assert WORLD.encode(MIXED) == oracle.encode(MIXED)
    assert WORLD.encode_batch([MIXED, "", "a"]) == [oracle.encode(MIXED), [], oracle.encode("a")]


def test_world_table_is_the_rwkv_packages_table(oracle):
    assert {i: token for i, token in enumerate(WORLD.table) if token} == oracle.idx2token
    assert WORLD.table[0] == WORLD.table[65530] == WORLD.table[65535] == b""


@pytest.mark.parametrize("tokenizer", [WORLD, BYTE], ids=lambda t: t.name)
def test_text_comes_back(tokenizer):
    @settings(max_examples=100, deadline=None)
    @given(texts)
    def back(text):
        ids = tokenizer.encode(text)
        assert all(0 < i < tokenizer.vocab_size for i in ids)
        assert tokenizer.decode([*ids, 0]) == text
        assert tokenizer.lengths[ids].sum() == len(text.encode())

    back()


@pytest.mark.parametrize("tokenizer", [WORLD, BYTE], ids=lambda t: t.name)
def test_a_long_text_in_pieces_has_the_same_ids(tokenizer, monkeypatch):
    monkeypatch.setattr("rwkv_nb.tokenizer.PIECE", 30_000)
    assert max(tokenizer.lengths) <= LONGEST
    some = texts.filter(len) | st.integers(1, 90).map(lambda n: " " * n) | st.sampled_from(["饸饹", "=" * 70, MIXED])

    @settings(max_examples=20, deadline=None)
    @given(st.lists(some, min_size=1, max_size=30).map("".join))
    def same(text):
        text *= 100_000 // len(text) + 1
        long, short = tokenizer.documents([text, "a"])
        assert long.dtype == np.uint16 and long.tolist() == [*tokenizer.encode(text), 0]
        assert short.tolist() == [*tokenizer.encode("a"), 0]
        assert tokenizer.bytes(long) == text.encode()

    same()


@pytest.mark.parametrize("tokenizer", [WORLD, BYTE], ids=lambda t: t.name)
def test_any_ids_decode(tokenizer):
    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.integers(0, tokenizer.vocab_size - 1) | st.integers(0, 256), max_size=40))
    def decodes(ids):
        data = b"".join(tokenizer.table[i] for i in ids)
        assert tokenizer.decode(ids) == data.decode(errors="replace")

    decodes()


def test_bytes_have_worlds_ids():
    assert BYTE.table == WORLD.table[:257]
    assert BYTE.encode("aé") == [98, 196, 170]


def test_auto_follows_the_models_rows():
    assert get_tokenizer("auto", 257).name == "byte"
    assert get_tokenizer("auto", 65536).name == get_tokenizer("auto", 65530).name == "world"
    assert get_tokenizer("byte").name == get_tokenizer("byte", 257).name == "byte"
    for name, rows in [("auto", 50277), ("auto", None), ("world", 257), ("byte", 100), ("byte", 65536), ("gpt2", None)]:
        with pytest.raises(SettingsError):
            get_tokenizer(name, rows)
