"""jsonl: one {"text": "…"} a line. Every complaint names the line and shows the text around it."""

from __future__ import annotations

import codecs
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from ..errors import DataError

BATCH = 512  # documents given to the tokenizer at once


class Problem(NamedTuple):
    """What is wrong with one line (counted from 1), and the text around it."""

    line: int
    what: str
    text: str


def read_jsonl(path: str | Path) -> Iterator[tuple[int, str]]:
    """(line number, text) of each document; blank lines and a byte-order mark are passed over.

    Raises DataError, with file and line, at the first line that cannot be used, and for a file without documents.
    """
    for found in _scan(Path(path)):
        if isinstance(found, Problem):
            raise DataError(f"{found.what}\n    {found.text}" if found.text else found.what,
                            where=f"{path}:{found.line}",
                            fix='a line is one {"text": "…"}; check_jsonl (notebook 01) lists every bad line at once')
        yield found


def check_jsonl(path: str | Path) -> list[Problem]:
    """Every line that cannot be used, in one pass; empty where the file is good."""
    return [found for found in _scan(Path(path)) if isinstance(found, Problem)]


def encode_jsonl(path: str | Path, tokenizer, progress: Callable[[int], None] | None = None) -> Iterator[list[int]]:
    """Tokens of each document, a 0 at the end of each. `progress` is told how many are done, now and then.

    Raises DataError as read_jsonl does.
    """
    lines, done = read_jsonl(path), 0
    while batch := [text for _, text in itertools.islice(lines, BATCH)]:
        for tokens in tokenizer.encode_batch(batch):
            yield [*tokens, 0]
        done += len(batch)
        if progress:
            progress(done)


def _scan(path: Path) -> Iterator[tuple[int, str] | Problem]:
    """Each document or problem of a file, in order."""
    number, empty = 0, True
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if line.strip():
                    empty = False
                    found = _parse(line.rstrip(b"\r\n"))
                    yield Problem(number, *found) if isinstance(found, tuple) else (number, found)
    except OSError as error:
        raise DataError(f"the file cannot be read ({error.strerror})", where=path, fix="check its name") from error
    if empty:
        yield Problem(max(number, 1), "the file holds no document: it is empty", "")


def _parse(line: bytes) -> str | tuple[str, str]:
    """A line's text, or (what is wrong, the text around it)."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"byte {error.start + 1} is not UTF-8 (GBK perhaps): save the file as UTF-8", _around(line, error.start)
    except json.JSONDecodeError as error:
        at = len(error.doc[:error.pos].encode("utf-8"))
        return f"this is not JSON: {error.msg}, column {error.colno}", _around(line, at)
    except (ValueError, RecursionError) as error:
        return f"this is not JSON that can be read: {error}", _around(line, 0)
    if not isinstance(row, dict):
        return f"a JSON object is needed, this is a {type(row).__name__}", _around(line, 0)
    if "text" not in row:
        return f'there is no "text"; its fields are {", ".join(map(repr, row)) or "none"}', _around(line, 0)
    text = row["text"]
    if not isinstance(text, str) or not text:
        return f'"text" is {"empty" if text == "" else f"a {type(text).__name__}, not a string"}', _around(line, 0)
    lone = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
    if lone is not None:
        return f'"text" has half a surrogate pair at character {lone + 1}', _around(line, 0)
    return text


def _around(line: bytes, at: int, width: int = 30) -> str:
    """Some text left and right of a byte, on one line."""
    start = max(at - width, 0)
    stop = start + 2 * width
    left, right = "…" if start else "", "…" if stop < len(line) else ""
    return left + line[start:stop].decode("utf-8", errors="replace") + right
