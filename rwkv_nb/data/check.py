"""Everything wrong with a data file, in one pass and before anything is written; and what can safely be mended."""

import ast
import codecs
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
from .binidx import unknown_ids
from .chat import Template, loss_mask, mask_template
from .jsonl import DEFAULTS, Problem, encode, likely_encoding, parse, read_row, row_writer
from .sources import TEXT, DataFile, find_data_file, open_tokens, scan, sums

BATCH = 64      # documents that are looked at together
SHOWN = 100     # problems of a file


@dataclass
class Report:
    """What check_data found. `problems` are to be mended, `notices` to be known; lengths in tokens."""

    path: Path
    unit: str = ""                                  # what a problem's number counts: "" lines, or documents
    problems: list[Problem] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)  # of the documents that can be used, the closing 0 with them
    trained: int = 0                                # tokens
    notices: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        head = (f"{self.path.name}: {len(self.sizes)} documents, {sum(self.sizes)} tokens, {self.trained} trained · "
                f"problems: {len(self.problems)}")
        return "\n".join([head, *told(self.path, self.problems, self.unit), *self.notices])


def told(path: Path, problems: list[Problem], unit: str = "") -> Iterator[str]:
    """Each problem with file and line, and the text around it below; of a great many, such as every line of a file in
    another encoding, the first."""
    for problem in problems[:SHOWN]:
        where = f"{path.name}:{unit}{problem.line}" if problem.line else path.name
        yield f"{where}: {problem}"
    if len(problems) > SHOWN:
        yield f"… and {len(problems) - SHOWN} more"


def check_data(data: DataSettings, tokenizer) -> Report:
    """Read data.data_file through and list every problem.

    Lines that cannot be read, rows without the fields, wrong encodings, empty documents, ids beyond the vocabulary, an
    .idx that does not fit its .bin, turns out of order, documents of which nothing is trained; and, as a notice,
    documents longer than ctx_len. Raises DataError only where there is no such file.
    """
    found, template = find_data_file(data.data_file, data.data_type), mask_template(data)
    report = Report(found.path, unit="" if found.data_type in TEXT else " document ")
    if found.notice:
        report.notices.append(found.notice)
    whole, stream = 0, _tokens(found, data, tokenizer)
    while batch := list(itertools.islice(stream, BATCH)):
        report.problems += [one for one in batch if isinstance(one, Problem)]
        if documents := [one for one in batch if not isinstance(one, Problem)]:
            problems, trained = _examined(documents, tokenizer, template)
            sizes = [len(tokens) for _, tokens in documents]
            report.problems += problems
            report.sizes += sizes
            report.trained += int(trained.sum())
            whole += int((trained == sizes).sum()) if template.learnt else 0
    report.problems.sort(key=lambda problem: problem.line)
    over = np.array(report.sizes, dtype=np.int64) - data.ctx_len - 1
    if (over > 0).any():
        report.notices.append(f"{(over > 0).sum()} documents are longer than ctx_len {data.ctx_len}: split keeps all "
                              f"of them in pieces, pad and only would lose {over[over > 0].sum()} tokens")
    if whole:
        report.notices.append(f"{whole} documents have no marker ({', '.join(template.given + template.learnt)}) and "
                              "are trained whole")
    return report


def _tokens(found: DataFile, data: DataSettings, tokenizer) -> Iterator[tuple[int, np.ndarray] | Problem]:
    """(line or number, tokens) of each document, and the problems before that; that a file cannot be read is one."""
    try:
        if found.data_type in TEXT:
            yield from encode(scan(found, data), tokenizer)
        else:
            yield from enumerate(open_tokens(found, data, tokenizer), 1)
    except DataError as error:
        other = Path(error.where).name
        yield Problem(0, error.what if other == found.path.name else f"{other}: {error.what}")


def _examined(documents: list[tuple[int, np.ndarray]], tokenizer, template: Template
              ) -> tuple[list[Problem], np.ndarray]:
    """(what is wrong with some documents, how many tokens of each are trained, int64 [n])."""
    wrong = [unknown_ids(tokens, tokenizer) for _, tokens in documents]
    known = [tokens[:0] if what else tokens for (_, tokens), what in zip(documents, wrong, strict=True)]
    sizes, flat = np.array([len(tokens) for tokens in known]), np.concatenate(known)
    begins = np.cumsum(sizes) - sizes
    mask = loss_mask(flat, tokenizer, template, begins)
    trained = sums(mask, begins, sizes)
    mask[begins[sizes > 0]] = False     # a document's first token is no target
    targets = sums(mask, begins, sizes)
    for k, tokens in enumerate(known):
        text = tokenizer.bytes(tokens)
        if not wrong[k] and not text.strip():
            wrong[k], trained[k] = "the document is empty", 0
        wrong[k] = wrong[k] or _out_of_order(text, template)
        if not wrong[k] and not targets[k]:
            wrong[k] = "nothing of it is trained: no turn is the model's"
    return [Problem(number, what, _words(tokens, tokenizer))
            for (number, tokens), what in zip(documents, wrong, strict=True) if what], trained


def _out_of_order(text: bytes, template: Template) -> str:
    """What is wrong with the order of a written document's turns; "" for nothing."""
    if template.loose or not template.learnt:
        return ""
    for one, two in itertools.pairwise(template.markers.finditer(text)):
        twice = one[1] == two[1] and not text.startswith(b" <tool_response>", two.end())
        if twice or two[1] == b"System:":
            return f"turns are out of order: {two[1].decode()!r} behind {one[1].decode()!r}"
    return ""


def _words(tokens: np.ndarray, tokenizer) -> str:
    known = [t for t in tokens[:40].tolist() if 0 < t < tokenizer.vocab_size]
    return " ".join(tokenizer.decode(known).split())[:60]


class Mended(NamedTuple):
    """What mend_jsonl wrote: documents; lines it changed, and lines it had to leave out, with the reasons."""

    path: Path
    documents: int
    changed: list[Problem]
    left_out: list[Problem]

    def __str__(self) -> str:
        changed = [Problem(line, f"mended: {what}") for line, what, _ in self.changed]
        left_out = [Problem(line, f"left out: {what}") for line, what, _ in self.left_out]
        return "\n".join([f"documents in the new file: {self.documents}", *told(self.path, changed),
                          *told(self.path, left_out)])


def mend_jsonl(path: str | Path, target: str | Path, data: DataSettings = DEFAULTS) -> Mended:
    """Write a jsonl file's good lines, and those that can be read in one sure way, to a new file, as UTF-8.

    Mended are another encoding, single or curly quotes, a comma too many, a bracket too few, bare tabs. A line is
    changed only where the result is a row that can be used. Raises DataError where the target exists or nothing would
    be in it.
    """
    path, target, write = find_data_file(path, "jsonl").path, Path(target), row_writer(data)
    if target.exists():
        raise DataError("this file exists already", where=target, fix="give the mended file a new name")
    documents, changed, left_out = 0, [], []
    with atomic_path(target) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(_lines(path), 1):
            if not line.strip():
                continue
            problem = parse(line, write)
            if not isinstance(problem, Problem):
                row = line.decode()
            elif mended := _mended(line, write):
                row, done = mended
                changed.append(Problem(number, done, problem.text))
            else:
                left_out.append(problem._replace(line=number))
                continue
            file.write(row + "\n")
            documents += 1
        if not documents:
            raise DataError("no line of it can be used", where=path, fix="see what check_data says of it")
    return Mended(path, documents, changed, left_out)


def _lines(path: Path) -> Iterator[bytes]:
    """Lines without their ends, of UTF-16 files as UTF-8; a byte-order mark is left out."""
    with open(path, "rb") as file:
        encoding = likely_encoding(file.read(4000))
    utf16 = encoding.startswith("UTF-16")
    try:
        with open(path, encoding=encoding, newline="\n") if utf16 else open(path, "rb") as file:
            for line in file:
                yield (line.encode() if utf16 else line).rstrip(b"\r\n").removeprefix(codecs.BOM_UTF8)
    except UnicodeError as error:
        raise DataError(f"it cannot be read as {encoding}", where=path, fix="save it as UTF-8") from error


_CURLY = str.maketrans("“”„‟＂", '"""""')
_REPAIRS = (("", read_row), ("curly quotes made straight", lambda text: read_row(text.translate(_CURLY))),
            ("a bracket closed", lambda text: read_row(text + "}")),
            ("tabs and the like escaped", lambda text: json.loads(text, strict=False)),
            ("single quotes made double", ast.literal_eval))


def _mended(line: bytes, write: Callable) -> tuple[str, str] | None:
    """(the row as JSON, what was done), or None where there is no one sure way."""
    done = []
    try:
        text = line.decode()
    except UnicodeDecodeError:
        encoding = likely_encoding(line)
        if not encoding.startswith(("GB", "Big5")):  # any bytes could be Windows-1252
            return None
        text, done = line.decode(encoding), [f"read as {encoding}"]
    bare = text.strip().removesuffix(",")
    if bare != text.strip():
        done.append("a comma taken out")
    for repair, read in _REPAIRS:
        try:
            row = read(bare)
            write(row)
        except DataError:  # it can be read, so it is not the form that is wrong
            return None
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # literal_eval's
            continue
        if repair:
            done.append(repair)
        return json.dumps(row, ensure_ascii=False), ", ".join(done) or "white space taken out"
    return None
