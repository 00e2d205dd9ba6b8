"""jsonl → binidx on several cores: the same bytes as one by one, resumed where it stopped, whole or not there."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from token_files import write_binidx

from rwkv_nb.config import DataSettings, replace
from rwkv_nb.data.binidx import BinIdx
from rwkv_nb.data.convert import jsonl_to_binidx
from rwkv_nb.errors import DataError, RunError
from rwkv_nb.tokenizer import ByteTokenizer, WorldTokenizer

WORLD = WorldTokenizer()


@pytest.fixture
def source(tmp_path):
    rng = random.Random(0)
    words = ["The ", "猫", "sat\n", "\n\nUser: ", "🙂", "1234 "]
    rows = [{"text": "".join(rng.choices(words, k=rng.randint(1, 60)))} for _ in range(400)]
    rows += [{"query": "q", "response": "r"}]
    path = tmp_path / "a.jsonl"
    path.write_text("\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=rng.random() < 0.5) for row in rows))
    texts = [row.get("text", "User: q\n\nAssistant: r") for row in rows]
    write_binidx(tmp_path / "wanted", ([*WORLD.encode(text), 0] for text in texts))
    return path


def pair_of(folder, name):
    return [(folder / f"{name}.{end}").read_bytes() for end in ("bin", "idx")]


def names(folder):
    return {p.name for p in folder.iterdir()} - {"wanted.bin", "wanted.idx", "a.jsonl"}


@pytest.mark.parametrize("block, workers", [(1, 1), (700, 1), (3000, 2), (1 << 30, 0)])
def test_blocks_and_processes_change_nothing(source, tmp_path, block, workers):
    told = []
    assert jsonl_to_binidx(source, tmp_path / "out", WORLD, told.append, block=block, workers=workers) == 401
    assert pair_of(tmp_path, "out") == pair_of(tmp_path, "wanted")
    assert names(tmp_path) == {"out.bin", "out.idx"}
    assert [p.done for p in told] == sorted({p.done for p in told}) and told[-1].done == told[-1].total
    assert told[-1].documents == 401 and told[-1].mb_per_s > 0 and told[-1].seconds_left == 0


class Stop(Exception):
    pass


def test_it_goes_on_where_it_stopped(source, tmp_path):
    size, stops = source.stat().st_size, 0
    places = []

    def stop_after_three(progress):
        places.append(progress.done)
        if len(places) == 3 and progress.done < size:
            raise Stop

    while True:
        places.clear()
        try:
            jsonl_to_binidx(source, tmp_path / "out", WORLD, stop_after_three, block=2000, workers=1)
            break
        except Stop:
            stops += 1
            assert not {"out.bin", "out.idx"} & names(tmp_path)
    assert stops > 5 and pair_of(tmp_path, "out") == pair_of(tmp_path, "wanted")
    assert names(tmp_path) == {"out.bin", "out.idx"}


def running(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""     # empty: it has ended, and nobody has asked
    except OSError:
        return False


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_process_loses_at_most_a_second_and_leaves_no_other_behind(source, tmp_path, how):
    script = ("import os, sys, time; from rwkv_nb.data.convert import jsonl_to_binidx; "
              "from rwkv_nb.tokenizer import WorldTokenizer; source, to, note = sys.argv[1:]; "
              "rest = lambda progress: time.sleep(1000 if os.path.exists(note) else 0.05); "
              "jsonl_to_binidx(source, to, WorldTokenizer(), rest, block=500)")
    note = tmp_path / ".out.bin.json"
    process = subprocess.Popen([sys.executable, "-c", script, source, tmp_path / "out", note], stderr=subprocess.PIPE,
                               start_new_session=True, text=True)
    while not note.exists() and process.poll() is None:
        time.sleep(0.02)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    if how == signal.SIGINT:
        os.killpg(process.pid, how)     # as a terminal does
    else:
        process.kill()
    assert process.communicate(timeout=60)[1].count("Traceback") == (how == signal.SIGINT)
    while any(map(running, workers)):
        time.sleep(0.05)
    done = json.loads(note.read_text())["offset"]
    first = []
    jsonl_to_binidx(source, tmp_path / "out", WORLD, lambda p: first.append(p.done), block=500, workers=1)
    assert done > 0 and first[0] > done and pair_of(tmp_path, "out") == pair_of(tmp_path, "wanted")


@pytest.mark.parametrize("change", ["source", "template", "note", "part"])
def test_what_belongs_to_something_else_is_not_taken_up(source, tmp_path, change):
    def stop(progress):
        if progress.documents > 200:
            raise Stop

    with pytest.raises(Stop):
        jsonl_to_binidx(source, tmp_path / "out", WORLD, stop, block=2000, workers=1)
    data = DataSettings()
    if change == "source":
        source.write_text(json.dumps({"text": "new"}))
        write_binidx(tmp_path / "wanted", [[*WORLD.encode("new"), 0]])
    elif change == "template":
        data = DataSettings(template="plain")
    elif change == "note":
        (tmp_path / ".out.bin.json").write_text('{"key": ')
    else:
        (tmp_path / ".out.bin.part").write_bytes(b"")
    jsonl_to_binidx(source, tmp_path / "out", WORLD, block=2000, workers=1, data=data)
    assert pair_of(tmp_path, "out") == pair_of(tmp_path, "wanted")


def test_nor_are_rows_read_by_other_fields(tmp_path):
    def stop(progress):
        raise Stop

    (tmp_path / "a.jsonl").write_text('{"a": "q", "b": "r"}\n' * 3)
    data = DataSettings(data_type="sft", sft_field=("a", "b"))
    with pytest.raises(Stop):
        jsonl_to_binidx(tmp_path / "a.jsonl", tmp_path / "out", WORLD, stop, block=1, workers=1, data=data)
    data = replace(data, sft_field=("b", "a"))
    jsonl_to_binidx(tmp_path / "a.jsonl", tmp_path / "out", WORLD, workers=1, data=data)
    assert {WORLD.decode(tokens) for tokens in BinIdx(tmp_path / "out")} == {"User: r\n\nAssistant: q"}


@pytest.mark.parametrize("workers", [1, 2])
def test_the_bad_lines_number_is_the_files(tmp_path, workers):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' * 99 + '{"text": }\n' + '{"text": "a"}\n' * 50)
    with pytest.raises(DataError, match="a.jsonl:100: this is not JSON"):
        jsonl_to_binidx(path, tmp_path / "out", WORLD, block=300, workers=workers)
    assert names(tmp_path) == set()


def test_two_writers_of_one_pair_are_refused(source, tmp_path):
    def again(progress):
        with pytest.raises(RunError, match="another process"):
            jsonl_to_binidx(source, tmp_path / "out", WORLD)
        raise Stop

    with pytest.raises(Stop):
        jsonl_to_binidx(source, tmp_path / "out", WORLD, again)


def test_a_missing_or_empty_file(tmp_path):
    with pytest.raises(DataError, match="nothing.jsonl: there is no such data file"):
        jsonl_to_binidx(tmp_path / "nothing.jsonl", tmp_path / "out", WORLD)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="no document"):
        jsonl_to_binidx(tmp_path / "empty.jsonl", tmp_path / "out", ByteTokenizer())
    assert {p.name for p in tmp_path.iterdir()} == {"empty.jsonl"}


def test_an_old_pair_stays_until_the_new_one_is_whole(source, tmp_path):
    write_binidx(tmp_path / "out", [[1, 2, 0]])

    def look(progress):
        assert np.array_equal(BinIdx(tmp_path / "out")[0], [1, 2, 0])

    jsonl_to_binidx(source, tmp_path / "out", WORLD, look, block=5000, workers=1)
    assert len(BinIdx(tmp_path / "out")) == 401
