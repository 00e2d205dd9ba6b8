"""Two vocabularies with one face: RWKV's World vocabulary and its single bytes alone.

Both turn text into ids by way of UTF-8 bytes, and id 0, which closes a document, stands for no text.
The byte vocabulary uses World's own ids for single bytes (byte b is id b + 1), so a tiny model
with 257 rows reads the same ids as a large one would.
"""

import ast
import functools
from collections.abc import Iterable

import numpy as np

from .errors import SettingsError

WORLD_IDS = 65530   # 0..65529; models round it up to 65536 rows
LONGEST = 128       # bytes of a token, at the most: what stands further on does not change it
PIECE = 1 << 20     # characters, or ids, worked on at once: as Python's own numbers, ids take 40 bytes each


class _Tokenizer:
    """What both vocabularies share: everything that follows from the bytes of each id."""

    name: str
    vocab_size: int
    table: list[bytes]  # the bytes of every id, vocab_size entries; b"" for 0 and for ids that are not used

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """How many bytes each id stands for: uint8 [vocab_size]."""
        return np.array([len(token) for token in self.table], dtype=np.uint8)

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD. Never raises for ids below vocab_size."""
        return self.bytes(np.asarray(tokens, dtype=np.int64)).decode("utf-8", errors="replace")

    def bytes(self, tokens: np.ndarray) -> bytes:
        """The bytes of ids, int [T]; memory stays near theirs, however many there are."""
        return b"".join([b"".join([self.table[t] for t in tokens[i:i + PIECE].tolist()])
                         for i in range(0, len(tokens), PIECE)])

    def documents(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of many texts, uint16 [T] each, with the closing 0; a text of any length in little memory."""
        short = iter(self.encode_batch([text for text in texts if len(text) <= PIECE]))
        return [np.array([*next(short), 0], np.uint16) if len(text) <= PIECE else self._long(text) for text in texts]

    def _long(self, text: str) -> np.ndarray:
        """The same for one long text, piece by piece."""
        parts, at = [], 0
        while at < len(text):
            ids = self.encode(text[at:at + PIECE])
            if at + PIECE < len(text):
                n = len(ids) - LONGEST      # the rest may be other tokens where the text goes on
                while self.table[ids[n]][0] & 0xC0 == 0x80:     # inside a character
                    n -= 1
                ids = ids[:n]
            parts.append(np.array(ids, np.uint16))
            at += len(self.bytes(parts[-1]).decode())
        return np.concatenate([*parts, np.zeros(1, np.uint16)])


class WorldTokenizer(_Tokenizer):
    """RWKV's World vocabulary (ids 1..65529; models have 65536 rows), encoded by `pyrwkv-tokenizer`."""

    name, vocab_size = "world", 65536

    def __init__(self):
        self._encoder = _encoder()

    @functools.cached_property
    def table(self) -> list[bytes]:
        # The package's own decode panics on ids that are not in the vocabulary and on half a character,
        # and its get_vocab() leaves out tokens that are not UTF-8. The file it ships has them all:
        # one `id literal length` a line.
        table = [b""] * self.vocab_size
        with open(self._encoder.vocab_filepath, encoding="utf-8") as file:
            for line in file:
                first, last = line.index(" "), line.rindex(" ")
                token = ast.literal_eval(line[first + 1:last])
                table[int(line[:first])] = token.encode() if isinstance(token, str) else token
        return table

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without a closing 0."""
        return self._encoder.encode(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of many texts at once, on all cores."""
        return self._encoder.encode_batch(texts)


@functools.cache
def _encoder():
    """One for all tokenizers of a process: it takes a third of a second and 240 MB, so it comes where it is used."""
    from pyrwkv_tokenizer import RWKVTokenizer

    return RWKVTokenizer()


class ByteTokenizer(_Tokenizer):
    """Single bytes under World's ids: byte b is id b + 1, id 0 closes a document. 257 rows."""

    name, vocab_size = "byte", 257

    @functools.cached_property
    def table(self) -> list[bytes]:
        return [b""] + [bytes([b]) for b in range(256)]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without a closing 0."""
        return [b + 1 for b in text.encode("utf-8")]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of many texts."""
        return [self.encode(text) for text in texts]


def get_tokenizer(name: str = "auto", vocab_size: int | None = None) -> WorldTokenizer | ByteTokenizer:
    """The tokenizer called "world" or "byte", or with "auto" the one that a model's vocab_size rows ask for.

    Raises SettingsError for an unknown name, for a model that has too few rows for the vocabulary,
    and where "auto" cannot tell.
    """
    if name not in ("auto", "world", "byte"):
        raise SettingsError(f"there is no tokenizer {name!r}", where="tokenizer", fix="use auto, world or byte")
    if name == "auto":
        if vocab_size is None:
            raise SettingsError("tokenizer is 'auto', but there is no model yet to pick it from", where="tokenizer",
                                fix="say world (released models) or byte (tiny models of 257 rows)")
        name = "byte" if vocab_size == ByteTokenizer.vocab_size else "world"
    least, most = (WORLD_IDS, 2**31) if name == "world" else (ByteTokenizer.vocab_size, WORLD_IDS - 1)
    if vocab_size is not None and not least <= vocab_size <= most:
        raise SettingsError(f"a model of {vocab_size} rows does not read {name} tokens, which are {least}",
                            where="tokenizer", fix="set tokenizer to auto: a model of 65536 rows reads World tokens, "
                            "one of 257 bytes; data made for the other is to be prepared again (01_prepare_data)")
    return WorldTokenizer() if name == "world" else ByteTokenizer()
