"""From a data file to documents: tokens and, from the template, which of them are trained."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..config import DataSettings
from ..errors import DataError
from .binidx import BinIdx, check_ids
from .chat import get_template, loss_mask
from .jsonl import Problem, check_jsonl, encode_jsonl, read_jsonl

__all__ = ["DataFile", "Document", "Documents", "Problem", "check_jsonl", "find_data_file", "open_documents",
           "read_jsonl"]


class Document(NamedTuple):
    """One text as the model sees it."""

    tokens: np.ndarray  # uint16 [T], the closing 0 with them
    mask: np.ndarray    # bool [T]: is token t trained, as a target


class DataFile(NamedTuple):
    """A data file that is there."""

    path: Path
    data_type: str      # "jsonl" or "binidx"
    notice: str = ""    # which one was taken, where several fit


class Documents(Sequence):
    """All documents of a source: len(), [i] → Document. Tokens may be memory-mapped; masks are kept as bits.

    `sizes` int64 [n] is the length of each in tokens; `notices` says what a person should know before training.
    """

    def __init__(self, tokens: Sequence[np.ndarray], tokenizer, template: str, source: str, notice: str = ""):
        self._tokens, self.source = tokens, source
        self.sizes = np.array([len(t) for t in tokens], dtype=np.int64)
        self.notices = [notice] if notice else []
        template, whole, bits = get_template(template), 0, []
        for number, document in enumerate(tokens, 1):
            check_ids(document, tokenizer, f"{source}: document {number}")
            if template.learnt:
                mask = loss_mask(document, tokenizer, template)
                whole += bool(mask.all())
                bits.append(np.packbits(mask))
        # Bits of all documents in one array, each document's from a byte of its own; None: everything is trained.
        self._bits = np.concatenate(bits) if template.learnt else None
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


def open_documents(data: DataSettings, tokenizer) -> Documents:
    """Documents of data.data_file, masked by data.template. A jsonl file is tokenised now, a 0 closes each document.

    Raises DataError for a file that is missing, damaged, empty or made with another vocabulary.
    """
    found = find_data_file(data.data_file, data.data_type)
    if found.data_type == "binidx":
        tokens = BinIdx(found.path)
    else:
        tokens = [np.array(t, dtype=np.uint16) for t in encode_jsonl(found.path, tokenizer)]
    return Documents(tokens, tokenizer, data.template, str(found.path), found.notice)


def find_data_file(path: str | Path, data_type: str = "auto") -> DataFile:
    """The file that a name means: itself, or with .jsonl, .bin/.idx or json2binidx_tool's _text_document behind it.

    An exact name comes first, then jsonl, then binidx. Raises DataError where nothing fits.
    """
    path = Path(path)
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
    if not fitting:
        raise DataError("there is no such data file" + ("" if data_type == "auto" else f" of type {data_type}"),
                        where=path, fix=_nearest(path))
    if len(fitting) > 1:
        names = ", ".join(f.path.name for f in fitting)
        return fitting[0]._replace(notice=f"{names} all fit {path.name!r}: {fitting[0].path.name} is read; "
                                          "give a suffix to choose another")
    return fitting[0]


def _kind(path: Path, data_type: str) -> str | None:
    """What an existing file of that name is: data_type, where given, else by its suffix."""
    by_suffix = {".jsonl": "jsonl", ".bin": "binidx", ".idx": "binidx"}.get(path.suffix)
    if data_type != "auto" and by_suffix not in (None, data_type):
        raise DataError(f"this is a {by_suffix} file, data_type says {data_type}", where=path,
                        fix="set data_type to auto")
    return by_suffix if data_type == "auto" else data_type


def _nearest(path: Path) -> str:
    here = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, here, 1, cutoff=0.4)
    return f"did you mean {near[0]}?" if near else "check the name; .jsonl or .bin/.idx files can be read"
