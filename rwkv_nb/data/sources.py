"""From a data file of any type to documents: tokens and, from the template, which of them are trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..config import DataSettings
from ..errors import DataError, did_you_mean
from .binidx import BinIdx, Slices, check_ids
from .chat import Template, loss_mask, mask_template
from .jsonl import Found, Problem, encode, good, read_jsonl, row_writer, scan_jsonl, scan_table, scan_text
from .mixing import Selection, mixed, repeated, split

__all__ = ["DataFile", "Document", "Documents", "Problem", "find_data_file", "open_documents",
           "open_split", "read_jsonl"]
SUFFIXES = {  # that a file of each type may have; auto takes the type that names its suffix first
    "jsonl": (".jsonl", ".json"), "binidx": (".bin", ".idx"), "numpy": (".npy",), "utf-8": (".txt", ".md"),
    "sft": (".json", ".csv", ".parquet", ".jsonl"), "utf-16le": (".txt",), "uint16": (".bin",)}
DUMMY = 1000  # documents of a dummy source


class Document(NamedTuple):
    """One text as the model sees it."""

    tokens: np.ndarray  # uint16 [T], the closing 0 with them
    mask: np.ndarray    # bool [T]: is token t trained, as a target


class DataFile(NamedTuple):
    """A data file that is there."""

    path: Path
    data_type: str      # one of SUFFIXES, or dummy
    notice: str = ""    # which one was taken, where several fit


class Documents(Sequence):
    """All documents of a source: len(), [i] → Document. Tokens may be memory-mapped; masks are kept as bits.

    `sizes` int64 [n] is the length of each in tokens; `notices` says what a person should know before training.
    """

    def __init__(self, tokens: Sequence[np.ndarray], tokenizer, template: Template, source: str, notice: str = ""):
        self._tokens, self.source = tokens, source
        self.sizes = np.array([len(t) for t in tokens], dtype=np.int64)
        self.notices = [notice] if notice else []
        whole, bits = 0, []
        for number, document in enumerate(tokens, 1):
            check_ids(document, tokenizer, f"{source}: document {number}")
            if template.learnt:
                mask = loss_mask(document, tokenizer, template)
                whole += bool(mask.all())
                bits.append(np.packbits(mask))
        # Bits of all documents in one array, each document's from a byte of its own; None: everything is trained.
        self._bits = np.concatenate(bits) if bits else None
        self._first = np.concatenate([[0], np.cumsum(-(-self.sizes // 8))])
        if whole:
            markers = ", ".join(template.given + template.learnt)
            self.notices.append(f"{whole} of {len(self)} documents are trained whole: they have no marker ({markers})")

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, i: int) -> Document:
        i = range(len(self))[i]
        tokens = self._tokens[i].astype(np.uint16, copy=False)
        if self._bits is None:
            return Document(tokens, np.ones(len(tokens), dtype=bool))
        bits = self._bits[self._first[i]:self._first[i + 1]]
        return Document(tokens, np.unpackbits(bits, count=len(tokens)).view(bool))


def open_documents(data: DataSettings, tokenizer) -> Documents | Selection:
    """What a run trains on: the documents of data.data_file that are not held out, repeated and mixed as data says.

    Texts are tokenised now, a 0 closes each document; token files are memory-mapped. Raises DataError for a file that
    is missing, damaged, empty or made with another vocabulary.
    """
    return open_split(data, tokenizer)[0]


def open_split(data: DataSettings, tokenizer) -> tuple[Documents | Selection, Documents | Selection]:
    """(what is trained on, what is held out): the same documents each time for the same data.data_seed."""
    documents, heldout = split(_open(data, tokenizer), data.heldout, data.data_seed)
    documents = repeated(documents, data.repeat, data.data_seed)
    if data.mix_file:
        more = _open(dataclasses.replace(data, data_file=data.mix_file, data_type="auto"), tokenizer)
        documents = mixed(documents, more, data.mix_share, data.data_seed)
    return documents, heldout


def _open(data: DataSettings, tokenizer) -> Documents:
    found = find_data_file(data.data_file, data.data_type)
    template = mask_template(data)
    return Documents(open_tokens(found, data, tokenizer), tokenizer, template, str(found.path), found.notice)


def open_tokens(found: DataFile, data: DataSettings, tokenizer) -> Sequence[np.ndarray]:
    """Tokens of each document of a data file."""
    if found.data_type == "binidx":
        return BinIdx(found.path)
    if found.data_type in ("numpy", "uint16"):
        return read_array(found.path, found.data_type)
    if found.data_type == "dummy":
        rng = np.random.default_rng(data.data_seed)
        return rng.integers(1, tokenizer.vocab_size, (DUMMY, data.ctx_len + 1), dtype=np.uint16)
    texts = good(scan(found, data), found.path)
    return [np.array(tokens, dtype=np.uint16) for tokens in encode(texts, tokenizer)]


def scan(found: DataFile, data: DataSettings) -> Found:
    """The texts of a file that holds text, and the problems among them, in order."""
    data = dataclasses.replace(data, data_type=found.data_type)
    if found.data_type == "jsonl":
        return scan_jsonl(found.path, row_writer(data))
    return scan_table(found.path, data) if found.data_type == "sft" else scan_text(found.path, found.data_type)


def read_array(path: Path, data_type: str) -> Sequence[np.ndarray]:
    """Documents of token ids in a .npy file (a row each, or one row that is cut behind its 0s) or of raw uint16."""
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False) if data_type == "numpy" else np.memmap(
            path, dtype="<u2", mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"it cannot be read as {data_type}: {error}", where=path,
                        fix="save it with numpy.save" if data_type == "numpy" else "check the file") from error
    if tokens.dtype.kind not in "iu" or tokens.ndim not in (1, 2) or not tokens.size:
        raise DataError(f"it holds {tokens.dtype} {list(tokens.shape)}; token ids are whole numbers, [T] or [n,T]",
                        where=path, fix="save the ids as uint16")
    if tokens.ndim == 2:
        return tokens
    stops = np.flatnonzero(tokens == 0) + 1
    stops = stops if stops.size and stops[-1] == len(tokens) else np.append(stops, len(tokens))
    return Slices(tokens, np.concatenate([[0], stops[:-1]]), np.diff(stops, prepend=0))


def find_data_file(path: str | Path, data_type: str = "auto") -> DataFile:
    """The file that a name means: itself, or with .jsonl, .bin/.idx or json2binidx_tool's _text_document behind it.

    An exact name comes first, then jsonl, then binidx. Of type sft a folder, or a data set's name, will do; dummy
    needs no file. Raises DataError where nothing fits.
    """
    path = Path(path)
    if data_type == "dummy":
        return DataFile(path, data_type)
    exact = _kind(path, data_type)
    if exact and path.is_file():
        return DataFile(path, exact)
    if path.is_file():
        raise DataError(f"its suffix {path.suffix!r} does not say what it holds", where=path,
                        fix="set data_type, or rename it to .jsonl")
    fitting = [DataFile(candidate, kind) for kind, candidate in (
        ("jsonl", path.with_name(path.name + ".jsonl")),
        ("binidx", path.with_name(path.name + ".bin")),
        ("binidx", path.with_name(path.name + "_text_document.bin")),
    ) if candidate.is_file() and data_type in ("auto", kind)]
    if data_type == "sft" and path.suffix not in SUFFIXES["sft"]:
        return DataFile(path, "sft")
    if not fitting:
        here = [p.name for p in path.absolute().parent.glob("*") if p.is_file()]
        raise DataError("this is a folder" if path.is_dir() else "there is no such data file"
                        + ("" if data_type == "auto" else f" of type {data_type}"), where=path.absolute(),
                        fix="name a file in it" if path.is_dir() else
                        did_you_mean(path.name, here, "check the name and the folder"))
    if len(fitting) > 1:
        names = ", ".join(f.path.name for f in fitting)
        return fitting[0]._replace(notice=f"{names} all fit {path.name!r}: {fitting[0].path.name} is read; "
                                          "give a suffix to choose another")
    return fitting[0]


def _kind(path: Path, data_type: str) -> str | None:
    """What an existing file of that name is: data_type, where given, else by its suffix."""
    by_suffix = [kind for kind, suffixes in SUFFIXES.items() if path.suffix in suffixes]
    if data_type == "auto":
        return min(by_suffix, key=lambda kind: SUFFIXES[kind].index(path.suffix), default=None)
    if by_suffix and data_type not in by_suffix:
        raise DataError(f"this is a {by_suffix[0]} file, data_type says {data_type}", where=path,
                        fix="set data_type to auto")
    return data_type
