"""Text files to documents: jsonl, plain text, and tables of rows. Every complaint names the line and shows the text
around it."""

import codecs
import contextlib
import csv
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from ..config import DataSettings
from ..errors import DataError, SettingsError
from ..extras import extra
from .chat import get_template, row_text

DEFAULTS = DataSettings()
BATCH = 1 << 20  # characters given to the tokenizer at once
TABLES = (".json", ".jsonl", ".csv", ".parquet")
FIX = "check_data (notebook 01), or rwkv-nb check-data, lists every problem at once"


class Problem(NamedTuple):
    """What is wrong with one line (counted from 1; 0 is the whole file), and the text around it."""

    line: int
    what: str
    text: str = ""

    def __str__(self) -> str:
        return f"{self.what}\n    {self.text}" if self.text else self.what


Found = Iterator[tuple[int, Any] | Problem]     # documents (or what is made of them) with their lines, and problems
EMPTY = Problem(0, "the file holds no document: it is empty")


def raise_problem(problem: Problem, path: str | Path) -> NoReturn:
    """Raise a problem of a file as a DataError."""
    raise DataError(str(problem), where=f"{path}:{problem.line}" if problem.line else path, fix=FIX)


def good(found: Found, path: str | Path) -> Iterator[tuple[int, Any]]:
    """Documents as they come. Raises DataError at the first problem."""
    for one in found:
        if isinstance(one, Problem):
            raise_problem(one, path)
        yield one


def encode(found: Found, tokenizer) -> Iterator[tuple[int, np.ndarray] | Problem]:
    """(line, tokens uint16 [T] with a 0 at the end) of each document, in order; problems as they are."""
    for batch in _batches(found):
        documents = iter(tokenizer.documents([one[1] for one in batch if not isinstance(one, Problem)]))
        yield from (one if isinstance(one, Problem) else (one[0], next(documents)) for one in batch)


def _batches(found: Found) -> Iterator[list]:
    batch, size = [], 0
    for one in found:
        batch.append(one)
        size += len(one[1])
        if size > BATCH:
            yield batch
            batch, size = [], 0
    yield batch


def row_writer(data: DataSettings) -> Callable[[object], str]:
    """From a row to its text, by the settings' template; raises DataError (`what` only) for a row that has none."""
    template = get_template(data.template)
    fields = data.sft_field if data.data_type == "sft" else ()
    if len(fields) == 1:
        raise SettingsError(f"sft_field is {fields!r}", where="sft_field", fix="name two fields: query response")

    def write(row) -> str:
        if not isinstance(row, dict):
            raise DataError(f"a JSON object is needed, this is a {type(row).__name__}")
        text = row_text(row, template, fields)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f'"text" has half a surrogate pair at character {error.start + 1}') from error
        return text
    return write


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"the file cannot be read ({error.strerror})", where=path,
                        fix="check its name, and that you may read it") from error


def scan_jsonl(path: Path, write: Callable[[object], Any]) -> Found:
    """Each document or problem of a file, in order; that it holds none of either is a problem too.

    write: from a row to its document; raises DataError (`what` only) for a row that has none (row_writer)
    """
    with _readable(path), open(path, "rb") as file:
        head = file.read(4000)
        file.seek(0)
        likely = likely_encoding(head)
        if likely.startswith("UTF-16"):
            yield Problem(0, f"the file is {likely}: save it as UTF-8")
        elif re.match(rb"\s*\[\s*\{", head.removeprefix(codecs.BOM_UTF8)):
            yield Problem(0, "the file is one JSON list, not a row a line: rename it to .json")
        else:
            found = scan_lines(file, write)
            yield next(found, EMPTY)
            yield from found


def scan_lines(lines: Iterable[bytes], write: Callable[[object], Any]) -> Found:
    """The same for lines of bytes; blank ones are passed over."""
    for number, line in enumerate(lines, 1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            found = parse(line.rstrip(b"\r\n"), write)
            yield found._replace(line=number) if isinstance(found, Problem) else (number, found)


def parse(line: bytes, write: Callable[[object], Any]) -> Any | Problem:
    """What `write` makes of a line's row, or what is wrong with the line; its number is the caller's to say."""
    try:
        return write(read_row(line.decode()))
    except DataError as error:
        return Problem(1, error.what, around(line, 0))
    except UnicodeDecodeError as error:
        return undecodable(line, error.start)
    except json.JSONDecodeError as error:
        at = len(error.doc[:error.pos].encode())
        what = f"this is not JSON: {error.msg}, column {error.colno}{quotes(error.doc)}"
        return Problem(1, what, around(line, at))
    except (ValueError, RecursionError) as error:
        return Problem(1, f"this is not JSON that can be read: {error}", around(line, 0))


def _row(fields: list[tuple[str, object]]) -> dict:
    row = dict(fields)
    if len(row) < len(fields):
        raise DataError(f"a field stands twice among {', '.join(repr(name) for name, _ in fields)}")
    return row


read_row = json.JSONDecoder(object_pairs_hook=_row).decode  # json.loads would keep the last of equal fields in silence


def quotes(text: str) -> str:
    """A hint where the quotes around names and values are the wrong ones; else ""."""
    if re.match(r"\s*\{\s*'", text):
        return "; JSON needs double quotes (\"), not single ones (')"
    if re.match(r"\s*\{\s*[“”„‟«＂]", text):
        return '; JSON needs straight quotes ("), not curly ones (“”)'
    return ""


def undecodable(data: bytes, at: int, encoding: str = "utf-8") -> Problem:
    """That byte `at` cannot be read, with its line, and the text around it in the encoding it probably is in."""
    start = data.rfind(b"\n", 0, at) + 1
    line = data[start:].partition(b"\n")[0]
    likely = likely_encoding(line) if encoding == "utf-8" else "UTF-8"
    text, before = (part.decode(likely, "replace").encode() for part in (line, line[:at - start]))
    what = f"byte {at + 1} is not {encoding.upper()} ({likely} perhaps): save the file as UTF-8"
    return Problem(data.count(b"\n", 0, at) + 1, what, around(text, len(before)))


def likely_encoding(data: bytes) -> str:
    """What bytes that are not UTF-8 probably are: UTF-16 by its mark or its zeros, GB18030 or Big5 where common
    characters come out, else Windows-1252."""
    if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "UTF-16"
    if data.count(0) * 4 > len(data):
        return "UTF-16LE" if data[1::2].count(0) >= data[::2].count(0) else "UTF-16BE"
    for name, common in (("GB18030", "gb2312"), ("Big5", "big5")):
        with contextlib.suppress(UnicodeDecodeError):
            high = [c for c in data.decode(name) if c > "\x7f"]
            if sum(bool(c.encode(common, "ignore")) for c in high) * 10 >= len(high) * 9:
                return name
    return "Windows-1252"


def around(line: bytes, at: int, width: int = 30) -> str:
    """Some text left and right of a byte, on one line."""
    start = max(at - width, 0)
    stop = start + 2 * width
    left, right = "…" if start else "", "…" if stop < len(line) else ""
    return left + line[start:stop].decode("utf-8", errors="ignore") + right


def scan_text(path: Path, encoding: str) -> Found:
    """A plain text file: one document. encoding: "utf-8" or "utf-16le"; a byte-order mark is passed over."""
    text = _text(path, encoding)
    if isinstance(text, Problem):
        yield text
    elif text.strip():
        yield 1, text
    else:
        yield EMPTY


def _text(path: Path, encoding: str = "utf-8") -> str | Problem:
    with _readable(path):
        data = path.read_bytes()
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        return undecodable(data, error.start, encoding)


class _Unreadable(Exception):
    """A problem of a whole file: it counts whatever rows of it are asked for."""


def scan_table(path: Path, data: DataSettings) -> Found:
    """Rows of a .json, .jsonl, .csv or .parquet file, of such a file named after the split in a folder, or of a data
    set by its name, which the `datasets` package loads (from the mirror that HF_ENDPOINT names, where it is set)."""
    name, start, stop = parse_split(data.sft_split)
    if path.is_dir():
        path = next((path / (name + suffix) for suffix in TABLES if (path / (name + suffix)).is_file()), path)
    try:
        found = _scan_rows(path, data)
        if path.is_file():      # a data set by its name is sliced already
            n = sum(1 for _ in _scan_rows(path, data)) if "%" in start + stop else 0
            found = itertools.islice(found, _bound(start, n), _bound(stop, n))
        yield next(found, Problem(0, f"no row is left of {data.sft_split}"))
        yield from found
    except _Unreadable as error:
        yield error.args[0]
    except json.JSONDecodeError as error:
        yield Problem(error.lineno, f"this is not JSON: {error.msg}, column {error.colno}; where each line is a row, "
                      "rename it to .jsonl")
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise DataError(f"it cannot be read as {path.suffix.lower() or 'a data set'}: {error}", where=path,
                        fix="check the file, and sft_split; a data set by name needs a connection") from error


def parse_split(split: str) -> tuple[str, str, str]:
    """("train", "", "1000") of "train[:1000]"; bounds may be per cent. Raises SettingsError for anything else."""
    match = re.fullmatch(r"([\w.-]+)(?:\[(\d+%?|):(\d+%?|)\])?", split)
    if not match:
        raise SettingsError(f"sft_split cannot be {split!r}", where="sft_split", fix="write it like train[:1000]")
    return match.groups("")


def _bound(text: str, n: int) -> int | None:
    """One of parse_split's bounds as the index of a list of n."""
    if text.endswith("%"):
        return n * int(text[:-1]) // 100
    return int(text) if text else None


def _scan_rows(path: Path, data: DataSettings) -> Found:
    """Each row's text or problem, as they are read, with a number: of a .jsonl its line, of a .csv the line that the
    row ends in, of others its place, from 1."""
    kind, write = path.suffix.lower(), row_writer(data)
    if kind == ".jsonl" and path.is_file():
        for one in scan_jsonl(path, write):
            if not one[0]:
                raise _Unreadable(one)
            yield one
        return
    if kind == ".parquet":
        parts = extra("pyarrow.parquet", "datasets").ParquetFile(path).iter_batches(1000)
        rows = enumerate((row for part in parts for row in part.to_pylist()), 1)
    elif kind in (".csv", ".json"):
        rows = _csv_rows(path) if kind == ".csv" else enumerate(_json_rows(path), 1)
    else:
        rows = enumerate(extra("datasets", "datasets").load_dataset(str(path), split=data.sft_split), 1)
    for number, row in rows:
        try:
            yield number, write(row)
        except DataError as error:
            yield Problem(number, error.what, around(repr(row).encode(), 0))


def _csv_rows(path: Path) -> Iterator[tuple[int, dict]]:
    csv.field_size_limit(max(csv.field_size_limit(), path.stat().st_size))  # of itself it ends at 131,072 characters
    try:
        with _readable(path), open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            yield from ((reader.line_num, row) for row in reader)
    except UnicodeDecodeError as error:
        raise _Unreadable(_text(path)) from error


def _json_rows(path: Path) -> list:
    text = _text(path)
    if isinstance(text, Problem):
        raise _Unreadable(text)
    rows = json.loads(text)
    if isinstance(rows, dict):
        rows = rows.get("data")
    if not isinstance(rows, list):
        raise _Unreadable(Problem(0, "it is no list of rows"))
    return rows
