"""Files as people have them: each is read, or its report says what is wrong, where, and what to do."""

import json
import os

import numpy as np
import pytest

from rwkv_nb.config import DataSettings
from rwkv_nb.data.check import check_data, mend_jsonl
from rwkv_nb.data.convert import jsonl_to_binidx
from rwkv_nb.data.sources import find_data_file, open_documents
from rwkv_nb.errors import DataError
from rwkv_nb.tokenizer import ByteTokenizer

BYTE = ByteTokenizer()
ROW = json.dumps({"text": "User: 你好\n\nAssistant: 您好"}, ensure_ascii=False)
MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def turns(**changes):
    """A row of messages whose answer is changed."""
    return json.dumps({"messages": [MESSAGES[0], MESSAGES[1] | changes]})


REPORTS = {  # file → (what it holds, the report's lines below its first, how many documents can be used)
    "a.jsonl": (ROW.encode("utf-16") * 2, ["a.jsonl: the file is UTF-16: save it as UTF-8"], 0),
    "b.jsonl": (f"[\n {ROW},\n {ROW}\n]", ["b.jsonl: the file is one JSON list, not a row a line: rename it to .json"],
                0),
    "c.jsonl": ('{"text": "a", "text": "b"}', ["c.jsonl:1: a field stands twice among 'text', 'text'"], 0),
    "d.jsonl": (f'{ROW}\n{{"text": " \\n"}}', ['d.jsonl:2: "text" is empty'], 1),
    "e.jsonl": (turns(tool_calls=5), ['e.jsonl:1: "tool_calls" of turn 2 is a int, not a list'], 0),
    "f.jsonl": (turns(reasoning_content=["x"]),
                ['f.jsonl:1: "reasoning_content" of turn 2 is a list, not a string'], 0),
    "g.jsonl": (json.dumps({"messages": MESSAGES, "tools": "clock"}),
                ['g.jsonl:1: "tools" of turn 1 is a str, not a list'], 0),
    "h.jsonl": (turns(role="Assistant").replace("user", "USER"), [], 1),
    "i.jsonl": ('{"question": "a", "answer": "b"}', ['i.jsonl:1: there is no "text"; its fields are \'question\', '
                "'answer' (with data_type sft, sft_field names others)"], 0),
    "j.csv": ("query,response\n问题,回答\n".encode("gbk"), ["j.csv:2: byte 16 is not UTF-8 (GB18030 perhaps): save the "
                                                            "file as UTF-8", "    问题,回答"], 0),
    "k.json": (f"{ROW}\n{ROW}", ["k.json:2: this is not JSON: Extra data, column 1; where each line is a row, rename "
                                 "it to .jsonl"], 0),
    "l.json": ('{"train": []}', ["l.json: it is no list of rows"], 0),
    "m.json": (f"[{ROW}, {turns()}]", [], 2),
    "N.TXT": ("a story", ["1 documents have no marker (System:, User:, Assistant:) and are trained whole"], 1),
    "o.txt": ("你好,世界".encode("utf-16"), ["o.txt:1: byte 1 is not UTF-8 (UTF-16 perhaps): save the file as UTF-8",
                                            "    你好,世界"], 0),
    "p.parquet": (b"PAR1", None, 0),
    "q.npy": (b"\x93NUMPY??", None, 0),
    "r.bin": (b"12", ["r.bin: r.idx: this half of the .bin/.idx pair is missing"], 0),
}


@pytest.mark.parametrize("name", REPORTS)
def test_the_report(tmp_path, name):
    held, lines, count = REPORTS[name]
    (tmp_path / name).write_bytes(held if isinstance(held, bytes) else held.encode())
    data = DataSettings(str(tmp_path / name))
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    report = check_data(data, BYTE)
    told = [line for line in str(report).split("\n")[1:] if "    {" not in line]
    assert lines is None and "it cannot be read as" in told[0] or told == lines
    assert len(report.sizes) == count and bool(report.problems) == (count == 0 or name == "d.jsonl")
    if report.problems:
        with pytest.raises(DataError, match=report.problems[0].what[:7]):
            open_documents(data, BYTE)
    else:
        assert len(open_documents(data, BYTE)) == count


@pytest.mark.parametrize("name", ["a.jsonl", "j.csv", "k.json", "l.json"])
def test_a_split_hides_no_problem_of_the_file(tmp_path, name):
    held, lines, _ = REPORTS[name]
    (tmp_path / name).write_bytes(held if isinstance(held, bytes) else held.encode())
    report = check_data(DataSettings(str(tmp_path / name), "sft", sft_split="train[5:]"), BYTE)
    assert str(report).split("\n")[1:] == lines


def test_what_is_no_file_is_said(tmp_path):
    (tmp_path / "文件 夹").mkdir()
    os.symlink(tmp_path / "gone", tmp_path / "link.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name, what in (("文件 夹", "this is a folder"), ("", "folder"), ("link.jsonl", "no such"),
                       ("pipe.jsonl", "no such")):
        for use in (lambda p: find_data_file(p), lambda p: jsonl_to_binidx(p, tmp_path / "out", BYTE)):
            with pytest.raises(DataError, match=what) as caught:
                use(tmp_path / name)
            assert "did you mean" not in str(caught.value)
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    with pytest.raises(DataError, match="save it as one of .jsonl .json .csv"):
        find_data_file(tmp_path / "a.xlsx")
    with pytest.raises(DataError, match="did you mean 数据 集.jsonl"):
        (tmp_path / "文件 夹" / "数据 集.jsonl").write_text(ROW, encoding="utf-8")
        find_data_file(tmp_path / "文件 夹" / "数据集.jsonl")
    assert len(open_documents(DataSettings(str(tmp_path / "文件 夹" / "数据 集")), BYTE)) == 1


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.csv"])
def test_a_file_that_may_not_be_read_is_named(tmp_path, name):
    os.symlink("/proc/self/mem", tmp_path / name)  # reading its first byte is an error for everybody
    (problem,) = check_data(DataSettings(str(tmp_path / name)), BYTE).problems
    assert "the file cannot be read" in problem.what


def test_mending_never_guesses(tmp_path):
    lines = ["Grüße".encode("cp1252"), b'{"text": "a", "text": "b"}', b'{"text": "a", "text": "b"},',
             "{'text': '\u3053\u3093\u306b\u3061\u306f'}".encode("shift-jis"), b'{"text": "a\tb"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    mended = mend_jsonl(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert (tmp_path / "b.jsonl").read_text(encoding="utf-8") == '{"text": "a\\tb"}\n'
    assert [p.line for p in mended.left_out] == [1, 2, 3, 4]
    assert "a.jsonl:5: mended: tabs and the like escaped" in str(mended) and "a.jsonl:1: left out: byte" in str(mended)


def test_zeros_that_pad_a_row_are_left_out(tmp_path):
    rows = np.array([[5, 6, 0, 0], [0, 0, 0, 0], [7, 0, 8, 0], [7, 8, 9, 1]])
    np.save(tmp_path / "a.npy", rows)
    documents = open_documents(DataSettings(str(tmp_path / "a.npy"), template="plain"), BYTE)
    assert [d.tokens.tolist() for d in documents] == [[5, 6, 0], [0], [7, 0, 8, 0], [7, 8, 9, 1]]
