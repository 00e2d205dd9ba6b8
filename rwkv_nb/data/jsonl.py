"""Text files to documents: jsonl, plain text, and tables of rows. Every complaint names the line and shows the text
around it."""

from __future__ import annotations

import ast
import codecs
import csv
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ..config import DataSettings
from ..errors import DataError, SettingsError
from ..extras import extra
from .chat import get_template, row_text

DEFAULTS = DataSettings()
BATCH = 512  # documents given to the tokenizer at once
TABLES = (".json", ".jsonl", ".csv", ".parquet")
FIX = 'a line is one {"text": "…"}; check_data (notebook 01) lists every problem at once'
Found = Iterator["tuple[int, str] | Problem"]


class Problem(NamedTuple):
    """What is wrong with one line (counted from 1), and the text around it."""

    line: int
    what: str
    text: str


def read_jsonl(path: str | Path, data: DataSettings = DEFAULTS) -> Iterator[tuple[int, str]]:
    """(line number, text) of each document; blank lines and a byte-order mark are passed over.

    Raises DataError, with file and line, at the first line that cannot be used, and for a file without documents.
    """
    return good(scan_jsonl(Path(path), row_writer(data)), path)


def good(found: Found, path: str | Path) -> Iterator[tuple[int, str]]:
    """Documents as they come. Raises DataError at the first problem."""
    for one in found:
        if isinstance(one, Problem):
            raise DataError(f"{one.what}\n    {one.text}" if one.text else one.what, where=f"{path}:{one.line}",
                            fix=FIX)
        yield one


def encode(texts: Iterable[tuple[int, str]], tokenizer, progress: Callable[[int], None] | None = None
           ) -> Iterator[list[int]]:
    """Tokens of each document, a 0 at the end of each. `progress` is told how many are done, now and then."""
    texts, done = iter(texts), 0
    while batch := [text for _, text in itertools.islice(texts, BATCH)]:
        for tokens in tokenizer.encode_batch(batch):
            yield [*tokens, 0]
        done += len(batch)
        if progress:
            progress(done)


def row_writer(data: DataSettings) -> Callable[[object], str]:
    """From a row to its text, by the settings' template; raises DataError (`what` only) for a row that has none."""
    template = get_template(data.template)
    fields = data.sft_field if data.data_type == "sft" else ()
    if data.data_type == "sft" and len(fields) < 2:
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


def scan_jsonl(path: Path, write: Callable[[object], str]) -> Found:
    """Each document or problem of a file, in order; that it holds none of either is a problem too."""
    try:
        with open(path, "rb") as file:
            found = scan_lines(file, write)
            yield next(found, Problem(1, "the file holds no document: it is empty", ""))
            yield from found
    except OSError as error:
        raise DataError(f"the file cannot be read ({error.strerror})", where=path, fix="check its name") from error


def scan_lines(lines: Iterable[bytes], write: Callable[[object], str]) -> Found:
    """The same for lines of bytes; blank ones are passed over."""
    for number, line in enumerate(lines, 1):
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if line.strip():
            found = parse(line.rstrip(b"\r\n"), write)
            yield Problem(number, *found) if isinstance(found, tuple) else (number, found)


def parse(line: bytes, write: Callable[[object], str]) -> str | tuple[str, str]:
    """A line's text, or (what is wrong, the text around it)."""
    try:
        return write(json.loads(line.decode("utf-8")))
    except DataError as error:
        return error.what, around(line, 0)
    except UnicodeDecodeError as error:
        likely = likely_encoding(line)
        text, before = (part.decode(likely, "replace").encode() for part in (line, line[:error.start]))
        return (f"byte {error.start + 1} is not UTF-8 ({likely} perhaps): save the file as UTF-8",
                around(text, len(before)))
    except json.JSONDecodeError as error:
        at = len(error.doc[:error.pos].encode("utf-8"))
        return f"this is not JSON: {error.msg}, column {error.colno}{quotes(error.doc)}", around(line, at)
    except (ValueError, RecursionError) as error:
        return f"this is not JSON that can be read: {error}", around(line, 0)


def quotes(text: str) -> str:
    """A hint where the quotes around names and values are the wrong ones; else ""."""
    if re.match(r"\s*\{\s*'", text):
        return "; JSON needs double quotes (\"), not single ones (')"
    if re.match(r"\s*\{\s*[“”„‟«＂]", text):
        return '; JSON needs straight quotes ("), not curly ones (“”)'
    return ""


def likely_encoding(data: bytes) -> str:
    """What bytes that are not UTF-8 probably are: UTF-16 by its mark or its zeros, GB18030 or Big5 where common
    characters come out, else Windows-1252."""
    if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "UTF-16"
    if data.count(0) * 4 > len(data):
        return "UTF-16LE" if data[1::2].count(0) >= data[::2].count(0) else "UTF-16BE"
    for name, common in (("GB18030", "gb2312"), ("Big5", "big5")):
        try:
            text = data.decode(name)
        except UnicodeDecodeError:
            continue
        high = [c for c in text if c > "\x7f"]
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
    data = path.read_bytes()
    try:
        text = data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        likely = likely_encoding(data[:2000]) if encoding == "utf-8" else "UTF-8"
        yield Problem(line, f"byte {error.start + 1} is not {encoding} ({likely} perhaps)", around(data, error.start))
        return
    yield (1, text) if text.strip() else Problem(1, "the file holds no document: it is empty", "")


def scan_table(path: Path, data: DataSettings) -> Found:
    """Rows of a .json, .jsonl, .csv or .parquet file, of such a file named after the split in a folder, or of a data
    set by its name, which the `datasets` package loads (from the mirror that HF_ENDPOINT names, where it is set)."""
    name, start, stop = parse_split(data.sft_split)
    write = row_writer(data)
    if path.is_dir():
        path = next((path / (name + suffix) for suffix in TABLES if (path / (name + suffix)).is_file()), path)
    if path.suffix == ".jsonl" and path.is_file():
        found = scan_jsonl(path, write)
    else:
        found = (_written(number, row, write) for number, row in enumerate(_rows(path, data.sft_split), 1))
        if not path.is_file():
            start, stop = "", ""  # the package has taken the split's slice already
    if "%" in start + stop:
        found = list(found)
        start, stop = (str(len(found) * int(part[:-1]) // 100) if part.endswith("%") else part
                       for part in (start, stop))
    found = itertools.islice(found, int(start or 0), int(stop) if stop else None)
    first = next(found, Problem(1, f"no row is left of {data.sft_split}", ""))
    return itertools.chain([first], found)


def parse_split(split: str) -> tuple[str, str, str]:
    """("train", "", "1000") of "train[:1000]"; bounds may be per cent. Raises SettingsError for anything else."""
    match = re.fullmatch(r"([\w.-]+)(?:\[(\d*%?):(\d*%?)\])?", split)
    if not match or "%" in match.groups("")[1:]:
        raise SettingsError(f"sft_split cannot be {split!r}", where="sft_split", fix="write it like train[:1000]")
    return match[1], match[2] or "", match[3] or ""


def _written(number: int, row, write) -> tuple[int, str] | Problem:
    try:
        return number, write(row)
    except DataError as error:
        return Problem(number, error.what, around(repr(row).encode(), 0))


def _rows(path: Path, split: str) -> Iterable:
    try:
        if path.suffix == ".csv":
            with open(path, encoding="utf-8-sig", newline="") as file:
                return list(csv.DictReader(file))
        if path.suffix == ".json":
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
            rows = rows.get("data") if isinstance(rows, dict) else rows
            if not isinstance(rows, list):
                raise ValueError("it is no list of rows")
            return rows
        if path.suffix == ".parquet":
            return extra("pyarrow.parquet", "datasets").read_table(path).to_pylist()
        return extra("datasets", "datasets").load_dataset(str(path), split=split)
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise DataError(f"it cannot be read as {path.suffix or 'a data set'}: {error}", where=path,
                        fix="check the file, and sft_split; a data set by name needs a connection") from error


def python_literal(text: str) -> object:
    """What Python would read: single quotes, trailing commas, True. Raises ValueError for anything else."""
    try:
        return ast.literal_eval(text.strip().removesuffix(","))
    except (SyntaxError, MemoryError, RecursionError, TypeError) as error:
        raise ValueError(str(error)) from error
