"""From a data file of any type to documents: tokens and, from the template, which of them are trained."""

import array
import dataclasses
import itertools
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..config import DataSettings
from ..errors import DataError, did_you_mean
from .binidx import BinIdx, Slices, unknown_ids
from .chat import loss_mask, mask_template
from .jsonl import DEFAULTS, Found, encode, good, row_writer, scan_jsonl, scan_table, scan_text
from .mixing import Selection, mixed, repeated, split

TEXT = ("jsonl", "sft", "utf-8", "utf-16le")  # types of text; the others are tokens
KINDS = {  # what a file of each suffix may hold, what auto takes first
    ".jsonl": ("jsonl", "sft"), ".json": ("sft", "jsonl"), ".csv": ("sft",), ".parquet": ("sft",), ".npy": ("numpy",),
    ".txt": ("utf-8", "utf-16le"), ".md": ("utf-8",), ".bin": ("binidx", "uint16"), ".idx": ("binidx",)}
BLOCK = 1 << 18  # tokens that are looked at together
DUMMY = 1000  # documents of a dummy source
SAVE = "save the ids as uint16, with numpy.save or array.tofile"


class Document(NamedTuple):
    """One text as the model sees it."""

    tokens: np.ndarray  # uint16 [T], the closing 0 with them
    mask: np.ndarray    # bool [T]: is token t trained, as a target


class DataFile(NamedTuple):
    """A data file that is there."""

    path: Path
    data_type: str      # any but auto
    notice: str = ""    # which one was taken, where several fit


class Documents(Sequence):
    """All documents of a source: len(), [i] → Document. Tokens may be memory-mapped; masks are kept as bits.

    sizes, trained: int64 [n], tokens of each document, and how many of them are trained
    checksum: of all tokens and masks; notices: what a person should know before training
    """

    def __init__(self, tokens: Slices, mask: Callable[[np.ndarray, np.ndarray, int], np.ndarray],
                 source: str = "documents"):
        """mask: (tokens [T] of some documents, where in them each begins, the first one's index) → bool [T], which are
        trained"""
        self._tokens, self.source, self.notices = tokens, source, []
        self.sizes = np.asarray(tokens.sizes, np.int64)
        self.trained, self._at = np.zeros_like(self.sizes), np.zeros_like(self.sizes)
        self.checksum, bits = 0, bytearray()
        firsts = np.unique(np.cumsum(self.sizes) // BLOCK, return_index=True)[1].tolist()
        for i, j in itertools.pairwise([*firsts, len(self)]):
            flat = np.concatenate([tokens[k] for k in range(i, j)])
            begins = np.cumsum(self.sizes[i:j]) - self.sizes[i:j]
            trained = mask(flat, begins, i)
            packed = np.packbits(trained)
            self.trained[i:j] = sums(trained, begins, self.sizes[i:j])
            self.checksum = zlib.crc32(packed, zlib.crc32(flat.astype(np.uint16, copy=False), self.checksum))
            self._at[i:j] = 8 * len(bits) + begins    # the place of a document's first bit
            bits += packed.tobytes()
        self._bits = np.array(bits, np.uint8)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, i: int) -> Document:
        return self.piece(range(len(self))[i], 0, None)

    def piece(self, i: int, start: int, stop: int | None) -> Document:
        """Tokens start:stop of document i."""
        tokens = self._tokens[i][start:stop].astype(np.uint16, copy=False)
        first, skip = divmod(int(self._at[i]) + start, 8)
        bits = np.unpackbits(self._bits[first:first + (skip + len(tokens) + 7) // 8], count=skip + len(tokens))
        return Document(tokens, bits[skip:].view(bool))


def sums(values: np.ndarray, begins: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Of bools [T], which documents of these sizes have in a row, each document's sum: int64 [n]."""
    each = np.add.reduceat(np.append(values, False), begins, dtype=np.int64)
    return each * (sizes > 0)   # of an empty document it is the next value


def open_documents(data: DataSettings, tokenizer) -> Documents | Selection:
    """What a run trains on: the documents of data.data_file that are not held out, repeated and mixed as data says.

    Texts are tokenised now, a 0 closes each document; token files are memory-mapped. Raises DataError for a file that
    is missing, damaged, empty or made with another vocabulary.
    """
    return open_split(data, tokenizer)[0]


def open_split(data: DataSettings, tokenizer, eval_file: str = ""
               ) -> tuple[Documents | Selection, Documents | Selection]:
    """(what is trained on, what is held out): the same documents each time for the same data.data_seed. eval_file is
    held-out data of its own, read as data says, in place of a share."""
    documents, heldout = split(_open(data, tokenizer), data.heldout, data.data_seed)
    documents = repeated(documents, data.repeat, data.data_seed)
    if data.mix_file:
        more = _open(dataclasses.replace(data, data_file=data.mix_file, data_type="auto"), tokenizer)
        documents = mixed(documents, more, data.mix_share, data.data_seed)
    if eval_file:
        heldout = _open(dataclasses.replace(data, data_file=eval_file), tokenizer)
    return documents, heldout


def _open(data: DataSettings, tokenizer) -> Documents:
    found = find_data_file(data.data_file, data.data_type)
    template, tokens = mask_template(data), open_tokens(found, data, tokenizer)

    def mask(flat: np.ndarray, begins: np.ndarray, first: int) -> np.ndarray:
        some = np.split(flat, begins[1:]) if unknown_ids(flat, tokenizer) else ()
        for number, document in enumerate(some, first + 1):
            if what := unknown_ids(document, tokenizer):
                raise DataError(what, where=f"{found.path}: document {number}",
                                fix="use the tokenizer that it was made with, or make it again from its jsonl")
        return loss_mask(flat, tokenizer, template, begins)

    documents = Documents(tokens, mask, str(found.path))
    if found.notice:
        documents.notices.append(found.notice)
    if template.learnt and (whole := int((documents.trained == documents.sizes).sum())):
        markers = ", ".join(template.given + template.learnt)
        documents.notices.append(f"{whole} of {len(documents)} documents are trained whole: they have no marker "
                                 f"({markers})")
    return documents


def open_tokens(found: DataFile, data: DataSettings, tokenizer) -> Slices:
    """Tokens of each document of a data file."""
    if found.data_type == "binidx":
        return BinIdx(found.path)
    if found.data_type in ("numpy", "uint16"):
        return read_array(found.path, found.data_type)
    if found.data_type == "dummy":
        rng = np.random.default_rng(data.data_seed)
        return _cut(rng.integers(1, tokenizer.vocab_size, (DUMMY, data.ctx_len + 1), dtype=np.uint16))
    # in one piece each: an array for each document, or a number of Python's, takes more than its tokens
    tokens, sizes = bytearray(), array.array("q")
    for _, document in good(encode(scan(found, data), tokenizer), found.path):
        tokens.extend(document.data)
        sizes.append(len(document))
    sizes = np.frombuffer(sizes, np.int64)
    return Slices(np.frombuffer(tokens, np.uint16), np.cumsum(sizes) - sizes, sizes)


def scan(found: DataFile, data: DataSettings) -> Found:
    """The texts of a file that holds text, and the problems among them, in order."""
    data = dataclasses.replace(data, data_type=found.data_type)
    if found.data_type == "jsonl":
        return scan_jsonl(found.path, row_writer(data))
    if found.data_type == "sft":
        return scan_table(found.path, data)
    return scan_text(found.path, found.data_type)


def read_jsonl(path: str | Path, data: DataSettings = DEFAULTS) -> Iterator[tuple[int, str]]:
    """(line number, text) of each document; blank lines and a byte-order mark are passed over.

    Raises DataError, with file and line, at the first line that cannot be used, and for a file without documents.
    """
    return good(scan_jsonl(Path(path), row_writer(data)), path)


def read_array(path: Path, data_type: str) -> Slices:
    """Documents of token ids in a .npy file or of raw uint16: one row, cut behind its 0s, or a row each."""
    try:
        if data_type == "numpy":
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            tokens = np.memmap(path, dtype="<u2", mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"it cannot be read as {data_type}: {error}", where=path, fix=SAVE) from error
    if tokens.dtype.kind not in "iu" or tokens.ndim not in (1, 2) or not tokens.size:
        raise DataError(f"it holds {tokens.dtype} {list(tokens.shape)}; token ids are whole numbers, [T] or [n,T]",
                        where=path, fix=SAVE)
    return _cut(tokens)


def _cut(tokens: np.ndarray) -> Slices:
    """Documents of ids [T], cut behind their 0s, or [n,T], a row each: of the 0s that pad it, the first closes it and
    the others are left out."""
    if tokens.ndim == 2:
        n, width = tokens.shape
        used = (width - (tokens[:, ::-1] != 0).argmax(1)) * tokens.any(1)
        return Slices(tokens.reshape(-1), np.arange(n) * width, np.minimum(used + 1, width))
    stops = np.union1d(np.flatnonzero(tokens == 0) + 1, [len(tokens)])
    return Slices(tokens, np.concatenate([[0], stops[:-1]]), np.diff(stops, prepend=0))


def find_data_file(path: str | Path, data_type: str = "auto") -> DataFile:
    """The file that a name means: itself, or with .jsonl, .bin/.idx or json2binidx_tool's _text_document behind it.

    An exact name comes first, then jsonl, then binidx. Of type sft a folder, or a data set's name, will do; dummy
    needs no file. Raises DataError where nothing fits.
    """
    path = Path(path)
    if path.is_file() or data_type == "dummy":
        return DataFile(path, _kind(path, data_type))
    fitting = []
    for kind, ending in (("jsonl", ".jsonl"), ("binidx", ".bin"), ("binidx", "_text_document.bin")):
        candidate = Path(f"{path}{ending}")
        if data_type in ("auto", kind) and candidate.is_file():
            fitting.append(DataFile(candidate, kind))
    if len(fitting) > 1:
        names = ", ".join(f.path.name for f in fitting)
        return fitting[0]._replace(notice=f"{names} all fit {path.name!r}: {fitting[0].path.name} is read; "
                                          "give a suffix to choose another")
    if fitting:
        return fitting[0]
    if data_type == "sft" and "sft" not in KINDS.get(path.suffix.lower(), ()):
        return DataFile(path, "sft")
    if path.is_dir():
        raise DataError("this is a folder", where=os.path.abspath(path), fix="name a file in it")
    here = [p.name for p in path.absolute().parent.glob("*") if p.is_file() and p.suffix.lower() in KINDS]
    kind = "" if data_type == "auto" else f" of type {data_type}"
    raise DataError(f"there is no such data file{kind}", where=os.path.abspath(path),
                    fix=did_you_mean(path.name, here, "check the name and the folder"))


def _kind(path: Path, data_type: str) -> str:
    """What an existing file holds: data_type, where given, else by its suffix."""
    kinds = KINDS.get(path.suffix.lower(), ())
    if data_type == "auto" and not kinds:
        raise DataError(f"its suffix {path.suffix!r} does not say what it holds", where=path,
                        fix=f"set data_type, or save it as one of {' '.join(KINDS)}")
    if kinds and data_type not in ("auto", "dummy", *kinds):
        raise DataError(f"this is a {kinds[0]} file, not {data_type}", where=path,
                        fix=f"give a {data_type} file, or set data_type to auto")
    return kinds[0] if data_type == "auto" else data_type
