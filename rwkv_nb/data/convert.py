"""jsonl → binidx on all cores: the file passes through in blocks, so memory stays constant whatever its size.

What is done is kept beside the target in `.name.*.part` files. Whoever asks again after an interruption goes on from
there; the pair appears under its own name when it is whole.
"""

import contextlib
import fcntl
import functools
import io
import json
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

import numpy as np

from ..config import DataSettings
from ..errors import DataError, RunError
from ..runs import atomic_path, write_text
from ..tokenizer import get_tokenizer
from ..words import duration_text
from .binidx import pair, write_index
from .jsonl import DEFAULTS, Problem, raise_problem, row_writer, scan_lines
from .sources import find_data_file

BLOCK = 4 << 20  # bytes of text in one piece of work
SAVED = 1.0      # seconds between two notes of how far the work is


class Progress(NamedTuple):
    """How far a conversion is."""

    done: int            # bytes of the source
    total: int
    documents: int
    mb_per_s: float      # of this session
    seconds_left: float

    def __str__(self) -> str:
        return (f"{self.done / 1e6:,.1f} of {self.total / 1e6:,.1f} MB · {self.documents:,} documents · "
                f"{self.mb_per_s:.1f} MB/s · {duration_text(self.seconds_left)} left")


class Encoded(NamedTuple):
    """One block: tokens and sizes as the files' bytes, and the lines it had."""

    tokens: bytes
    sizes: bytes
    lines: int


def jsonl_to_binidx(path: str | Path, prefix: str | Path, tokenizer,
                    progress: Callable[[Progress], None] = lambda now: None, *, data: DataSettings = DEFAULTS,
                    workers: int = 0, block: int = BLOCK) -> int:
    """Write a jsonl file as a .bin/.idx pair, a 0 at the end of each document; returns how many documents.

    Rows become text by data.template. workers 0: as many processes as there are cores and blocks; each holds a
    tokenizer of its own (World: about 240 MB) and a few blocks, whatever the file's size. Raises DataError where there
    is no such file and, with its line, at the first row that cannot be used; nothing is written then. Raises RunError
    where another process writes the same pair, or the disk is full.
    """
    path, began = find_data_file(path, "jsonl").path, time.monotonic()
    try:
        told = path.stat()
        size = told.st_size
        key = [str(path.resolve()), size, told.st_mtime_ns, tokenizer.name, data.template, data.data_type,
               list(data.sft_field)]
        with open(path, "rb") as file, _Part(prefix, key) as part:
            first = part.offset
            file.seek(first)
            workers = workers or min(len(os.sched_getaffinity(0)), -(-(size - first) // block))
            work = functools.partial(_encode, name=tokenizer.name, data=data)
            for encoded, offset in _in_order(_blocks(file, block), work, workers):
                if isinstance(encoded, Problem):
                    raise_problem(encoded._replace(line=part.lines + encoded.line), path)
                part.add(encoded, offset)
                speed = (offset - first) / max(time.monotonic() - began, 1e-9)
                progress(Progress(offset, size, part.documents, speed / 1e6, (size - offset) / speed))
            if not part.documents:
                raise DataError("the file holds no document: it is empty", where=path, fix="check the file")
            part.finish()
            return part.documents
    except BrokenProcessPool as error:
        raise RunError("a process that makes tokens died", where=path, fix="start again: it goes on from there; in a "
                       "script, call it under `if __name__ == '__main__':`") from error
    except OSError as error:
        raise RunError(f"{error.strerror or error}", where=error.filename or path,
                       fix="check the file's name and the free disk space, then start again: it goes on from there"
                       ) from error


def _blocks(file: BinaryIO, size: int) -> Iterator[tuple[bytes, int]]:
    """Whole lines, some `size` bytes at a time, with the place in the file behind them."""
    while text := file.read(size):
        text += file.readline()
        yield text, file.tell()


def _encode(text: bytes, name: str, data: DataSettings) -> Encoded | Problem:
    """One block's documents, or its first problem, the line counted from the block's own first. The tokenizer comes by
    name: it cannot be sent to another process."""
    encode, tokens, sizes = get_tokenizer(name).encode, [], []
    for found in scan_lines(io.BytesIO(text), row_writer(data)):
        if isinstance(found, Problem):
            return found
        ids = np.array([*encode(found[1]), 0], dtype="<u2")
        tokens.append(ids.tobytes())
        sizes.append(len(ids))
    return Encoded(b"".join(tokens), np.array(sizes, dtype="<i4").tobytes(), text.count(b"\n"))


def _in_order(blocks: Iterator[tuple[bytes, int]], work: Callable, workers: int) -> Iterator[tuple]:
    """(what work makes of a block, the place behind it), in the blocks' order; few blocks wait at any time."""
    if workers <= 1:
        yield from ((work(text), offset) for text, offset in blocks)
        return
    # spawn: a copy of a process that has threads (torch's, a notebook's) may hang
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_end_with_parent)
    try:
        waiting = deque()
        for text, offset in blocks:
            with _no_interrupt():   # it starts the processes
                waiting.append((pool.submit(work, text), offset))
            if len(waiting) > 2 * workers:
                done, offset = waiting.popleft()
                yield done.result(), offset
        for done, offset in waiting:
            yield done.result(), offset
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Let this process end where the one that it works for is killed: it would wait for work for ever."""
    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """Processes that are started meanwhile never hear Ctrl-C, which the terminal sends to all: this one ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Part(contextlib.AbstractContextManager):
    """The files under way for a pair, of one source (`key`, as JSON holds it): held for one process."""

    def __init__(self, prefix: str | Path, key: list):
        self.target, self.key = pair(prefix), key
        self.bin, self.sizes = (p.with_name(f".{p.name}.part") for p in self.target)
        self.note = self.bin.with_suffix(".json")

    def __enter__(self) -> Self:
        self.bin.parent.mkdir(parents=True, exist_ok=True)
        self._files = [open(self.bin, "ab"), open(self.sizes, "ab")]
        try:
            fcntl.flock(self._files[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError("another process is writing this pair", where=self.target[0], fix="wait for it") from error
        self._take_up()
        return self

    def _take_up(self) -> None:
        """Cut the files back to what is noted of the same source, or begin anew."""
        self.offset, self.lines, self.documents, held = 0, 0, 0, [0, 0]
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            note = json.loads(self.note.read_text())
            sizes = [os.fstat(file.fileno()).st_size for file in self._files]
            whole = all(size >= n for size, n in zip(sizes, note["held"], strict=True))
            if note["key"] == self.key and whole:
                self.offset, self.lines, held = note["offset"], note["lines"], note["held"]
                self.documents = held[1] // 4
        for file, n in zip(self._files, held, strict=True):
            file.truncate(n)
            file.seek(n)
        self._noted = time.monotonic()

    def add(self, encoded: Encoded, offset: int) -> None:
        """Append one block, which ends at byte `offset` of the source."""
        self._files[0].write(encoded.tokens)
        self._files[1].write(encoded.sizes)
        self.offset, self.lines = offset, self.lines + encoded.lines
        self.documents += len(encoded.sizes) // 4
        if time.monotonic() - self._noted > SAVED:
            self._take_note()

    def _take_note(self) -> None:
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        held = [file.tell() for file in self._files]
        write_text(self.note, json.dumps({"key": self.key, "offset": self.offset, "lines": self.lines, "held": held}))
        self._noted = time.monotonic()

    def finish(self) -> None:
        """Put the pair under its name. The .bin takes its name first: who sees the .idx finds its tokens."""
        self._take_note()
        with atomic_path(self.target[1]) as path:
            write_index(path, np.memmap(self.sizes, dtype="<i4", mode="r"))
            os.replace(self.bin, self.target[0])
        self._remove()

    def _remove(self) -> None:
        for path in (self.bin, self.sizes, self.note):
            path.unlink(missing_ok=True)

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, DataError):
            self._remove()  # the source has to change, so nothing of this can be used
        elif error is not None:
            with contextlib.suppress(OSError, RunError):
                self._take_note()
        for file in self._files:
            file.close()
