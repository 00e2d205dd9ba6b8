"""Everything wrong with a data file, in one pass and before anything is written; and what can safely be mended."""

from __future__ import annotations

import codecs
import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..config import DataSettings
from ..errors import DataError
from ..runs import atomic_path
from .binidx import check_ids
from .chat import Template, loss_mask, mask_template
from .jsonl import BATCH, DEFAULTS, Problem, likely_encoding, parse, python_literal, row_writer
from .sources import find_data_file, open_tokens, scan

TEXT = ("jsonl", "sft", "utf-8", "utf-16le")


@dataclass
class Report:
    """What check_data found. `problems` are to be mended, `notices` to be known; lengths in tokens."""

    path: Path
    unit: str = "line"                              # what a problem's number counts: a line, or a document
    problems: list[Problem] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)  # of the documents that can be used, the closing 0 with them
    trained: int = 0                                # tokens
    notices: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        head = (f"{self.path.name}: {len(self.sizes)} documents, {sum(self.sizes)} tokens, {self.trained} trained · "
                f"problems: {len(self.problems)}")
        place = f"{self.path.name}:" if self.unit == "line" else f"{self.path.name}: document "
        rows = [f"{place}{p.line}: {p.what}" + (f"\n    {p.text}" if p.text else "") for p in self.problems]
        return "\n".join([head, *rows, *self.notices])


def check_data(data: DataSettings, tokenizer) -> Report:
    """Read data.data_file through and list every problem.

    Lines that cannot be read, rows without the fields, wrong encodings, empty documents, ids beyond the vocabulary, an
    .idx that does not fit its .bin, turns out of order, documents of which nothing is trained; and, as a notice,
    documents longer than ctx_len. Raises DataError only where there is no such file.
    """
    found, template = find_data_file(data.data_file, data.data_type), mask_template(data)
    text = found.data_type in TEXT
    report = Report(found.path, "line" if text else "document", notices=[found.notice] if found.notice else [])
    if text:
        documents = _encoded(scan(found, data), tokenizer, report)
    else:
        documents = _opened(lambda: open_tokens(found, data, tokenizer), report)
    whole = 0
    for number, tokens in documents:
        what, mask = _wrong(tokens, tokenizer, template)
        if what:
            report.problems.append(Problem(number, what, _words(tokens, tokenizer)))
        report.sizes.append(len(tokens))
        report.trained += int(mask.sum())
        whole += bool(template.learnt and mask.all())
    report.problems.sort(key=lambda problem: problem.line)
    over = np.array(report.sizes, dtype=np.int64) - data.ctx_len - 1
    if (over > 0).any():
        report.notices.append(f"{(over > 0).sum()} documents are longer than ctx_len {data.ctx_len}: split keeps all "
                              f"of them in pieces, pad and only would lose {over[over > 0].sum()} tokens")
    if whole:
        report.notices.append(f"{whole} documents have no marker ({', '.join(template.given + template.learnt)}) and "
                              "are trained whole")
    return report


def _encoded(found: Iterator, tokenizer, report: Report) -> Iterator[tuple[int, np.ndarray]]:
    """(line, tokens) of each text; problems go into the report."""
    with _reported(report):
        while batch := list(itertools.islice(found, BATCH)):
            report.problems += [one for one in batch if isinstance(one, Problem)]
            good = [one for one in batch if not isinstance(one, Problem)]
            for (line, _), tokens in zip(good, tokenizer.encode_batch([text for _, text in good]), strict=True):
                yield line, np.array([*tokens, 0])


def _opened(open_them: Callable, report: Report) -> Iterator[tuple[int, np.ndarray]]:
    with _reported(report):
        yield from enumerate(open_them(), 1)


@contextlib.contextmanager
def _reported(report: Report) -> Iterator[None]:
    """A file that cannot be read further is a problem like the others."""
    try:
        yield
    except DataError as error:
        report.problems.append(Problem(0, error.what, str(error.where)))


def _wrong(tokens: np.ndarray, tokenizer, template: Template) -> tuple[str, np.ndarray]:
    """("" or what is wrong with a document, its loss mask)."""
    nothing = np.zeros(len(tokens), dtype=bool)
    if not (tokens != 0).any():
        return "the document is empty", nothing
    try:
        check_ids(tokens, tokenizer, "")
    except DataError as error:
        return error.what, nothing
    mask = loss_mask(tokens, tokenizer, template)
    if turns := _out_of_order(b"".join(tokenizer.table[t] for t in tokens.tolist()), template):
        return turns, mask
    return "" if mask[1:].any() else "nothing of it is trained: no turn is the model's", mask


def _out_of_order(text: bytes, template: Template) -> str:
    """What is wrong with the order of a written document's turns; "" for nothing."""
    if template.loose or not template.learnt:
        return ""
    turns = [(turn[1].decode(), text[turn.end():]) for turn in template.markers.finditer(text)]
    for (one, _), (two, rest) in itertools.pairwise(turns):
        if one == two and not rest.startswith(b" <tool_response>") or two == "System:":
            return f"turns are out of order: {two!r} behind {one!r}"
    return ""


def _words(tokens: np.ndarray, tokenizer) -> str:
    known = [t for t in tokens[:40].tolist() if 0 < t < tokenizer.vocab_size]
    return " ".join(tokenizer.decode(known).split())[:60]


class Mended(NamedTuple):
    """What mend_jsonl wrote: documents; lines it changed, and lines it had to leave out, with the reasons."""

    documents: int
    changed: list[Problem]
    left_out: list[Problem]


def mend_jsonl(path: str | Path, target: str | Path, data: DataSettings = DEFAULTS) -> Mended:
    """Write a jsonl file's good lines, and those that can be read in one sure way, to a new file, as UTF-8.

    Mended are another encoding, single or curly quotes, a comma too many and a bracket too few. A line is changed only
    where the result is a row that can be used. Raises DataError where the target exists or nothing would be in it.
    """
    path, target, write = Path(path), Path(target), row_writer(data)
    if target.exists():
        raise DataError("this file exists already", where=target, fix="give the mended file a new name")
    changed, left_out, kept = [], [], 0
    with atomic_path(target) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(_lines(path), 1):
            if not line.strip():
                continue
            found = parse(line, write)
            row, told = (line.decode(), "") if isinstance(found, str) else _mended(line, write)
            if row:
                file.write(row + "\n")
                kept += 1
            if told or not row:
                (changed if row else left_out).append(Problem(number, told or found[0], found[1]))
        if not kept:
            raise DataError("no line of it can be used", where=path, fix="see what check_data says of it")
    return Mended(kept, changed, left_out)


def _lines(path: Path) -> Iterator[bytes]:
    """Lines without their ends, of UTF-16 files too; a byte-order mark is left out."""
    with open(path, "rb") as file:
        encoding = likely_encoding(file.read(4000))
        file.seek(0)
        if encoding.startswith("UTF-16"):
            try:
                text = file.read().decode(encoding).removeprefix("\ufeff")
                yield from text.replace("\r\n", "\n").encode().split(b"\n")
            except UnicodeError as error:
                raise DataError(f"it cannot be read as {encoding}", where=path, fix="save it as UTF-8") from error
        else:
            yield from (line.rstrip(b"\r\n").removeprefix(codecs.BOM_UTF8) for line in file)


_CURLY = str.maketrans("“”„‟＂", '"""""')
_REPAIRS = (("", str), ("curly quotes made straight", lambda text: text.translate(_CURLY)),
            ("a bracket closed", lambda text: text + "}"))


def _mended(line: bytes, write: Callable) -> tuple[str, str]:
    """(the row as JSON, what was done), or ("", "")."""
    encoding = "UTF-8"
    with contextlib.suppress(UnicodeDecodeError):
        line.decode()
        encoding = ""
    encoding = encoding and likely_encoding(line)
    with contextlib.suppress(UnicodeDecodeError):
        text = line.decode(encoding or "UTF-8").strip().removesuffix(",")
        told = f"read as {encoding}" if encoding else ""
        for done, change in (*((done, lambda t, c=change: json.loads(c(t))) for done, change in _REPAIRS),
                             ("single quotes made double", python_literal)):
            with contextlib.suppress(ValueError, RecursionError, DataError):
                row = change(text)
                write(row)
                return json.dumps(row, ensure_ascii=False), ", ".join(filter(None, (told, done))) or "a comma taken out"
    return "", ""
