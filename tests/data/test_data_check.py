"""The validator finds every mistake of a data file in one pass; what is mended is right, the rest is named."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_files import write_binidx

from rwkv_nb.config import DataSettings
from rwkv_nb.data.check import check_data, mend_jsonl
from rwkv_nb.data.jsonl import likely_encoding
from rwkv_nb.data.sources import read_jsonl
from rwkv_nb.errors import DataError
from rwkv_nb.tokenizer import ByteTokenizer, WorldTokenizer

BYTE = ByteTokenizer()
GOOD = '{"text": "User: 问\\n\\nAssistant: 答"}'
MISTAKES = {  # line → (what is said, what mending makes of it, or None)
    '{"text": "a"': ("not JSON", {"text": "a"}),
    "{'text': 'a'}": ("not single ones", {"text": "a"}),
    '{“text”: “a”}': ("not curly ones", {"text": "a"}),
    '{"text": "a"},': ("not JSON", {"text": "a"}),
    '\u3000{"text": "a"}': ("not JSON", {"text": "a"}),
    '{"text": "say "hi""}': ("not JSON", None),
    '{"txt": "a"}': ('no "text"', None),
    '{"text": ""}': ("empty", None),
    '{"text": "User: a\\n\\nUser: b\\n\\nAssistant: c"}': ("turns are out of order: 'User:' behind 'User:'", ...),
    '{"text": "User: a\\n\\nSystem: b\\n\\nAssistant: c"}': ("turns are out of order: 'System:' behind", ...),
    '{"text": "User: only a question"}': ("nothing of it is trained", ...),
    '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}': ("out of order", None),
    '{"messages": [{"role": "user", "content": "a"}]}': ("nothing of it is trained", ...),
    '{"query": "a", "response": ""}': ('"response" is empty', None),
}


def report(path, **values):
    return check_data(DataSettings(data_file=str(path), **values), BYTE)


def test_every_mistake_is_listed_with_its_line(tmp_path):
    path = tmp_path / "a.jsonl"
    good = "".join(f"{GOOD}\n{line}\n" for line in MISTAKES).encode()
    path.write_bytes(good + '{"text": "你好，世界"}'.encode("gbk"))
    found = report(path, ctx_len=10)
    assert [p.line for p in found.problems] == [2 * i + 2 for i in range(len(MISTAKES))] + [2 * len(MISTAKES) + 1]
    for problem, (what, _) in zip(found.problems, MISTAKES.values(), strict=False):
        assert what in problem.what and problem.text
    assert len(found.sizes) == 2 * len(MISTAKES) - sum(mended is not ... for _, mended in MISTAKES.values())
    lost = sum(size - 11 for size in found.sizes if size > 11)
    assert any(f"would lose {lost} tokens" in n for n in found.notices)
    assert f"{path.name}:2: this is not JSON" in str(found)
    assert "GB18030" in found.problems[-1].what and "你好，世界" in str(found)


def test_mending_writes_a_new_file_and_names_what_is_left_out(tmp_path):
    path, target = tmp_path / "a.jsonl", tmp_path / "mended.jsonl"
    data = "".join(f"{GOOD}\n{line}\n" for line in MISTAKES).encode() + '{"text": "你好，世界"}'.encode("gbk")
    path.write_bytes(b"\xef\xbb\xbf" + data)
    mended = mend_jsonl(path, target)
    assert path.read_bytes() == b"\xef\xbb\xbf" + data
    wanted = [json.loads(line) if row is ... else row for line, (_, row) in MISTAKES.items() if row is not None]
    rows = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    assert [row for row in rows if row != json.loads(GOOD)] == [*wanted, {"text": "你好，世界"}]
    assert rows.count(json.loads(GOOD)) == len(MISTAKES) and mended.documents == len(rows)
    assert [p.line for p in mended.left_out] == [2 * i + 2 for i, (_, row) in enumerate(MISTAKES.values())
                                                 if row is None]
    assert [p.what for p in mended.changed] == ["a bracket closed", "single quotes made double",
                                                "curly quotes made straight", "a comma taken out",
                                                "white space taken out", "read as GB18030"]
    with pytest.raises(DataError, match="exists already"):
        mend_jsonl(path, target)
    path.write_text("nothing")
    with pytest.raises(DataError, match="no line"):
        mend_jsonl(path, tmp_path / "none.jsonl")
    assert not (tmp_path / "none.jsonl").exists()


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])).filter(str.strip), min_size=1, max_size=5),
       encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
def test_a_good_file_is_mended_to_itself(tmp_path_factory, texts, encoding):
    folder = tmp_path_factory.mktemp("mend")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding=encoding)
    mended = mend_jsonl(folder / "a.jsonl", folder / "b.jsonl")
    assert not mended.left_out and not mended.changed
    assert [text for _, text in read_jsonl(folder / "b.jsonl")] == texts


def test_token_files(tmp_path):
    write_binidx(tmp_path / "a", [[98, 0], [0], [300, 301, 0], [], [*BYTE.encode("User: x"), 0]])
    found = report(tmp_path / "a.bin")
    assert [(p.line, p.what[:24]) for p in found.problems] == [
        (2, "the document is empty"), (3, "it has id 301; the byte "), (4, "the document is empty"),
        (5, "nothing of it is trained")]
    assert "a.bin: document 3: it has id 301" in str(found) and len(found.sizes) == 5
    (tmp_path / "a.bin").write_bytes(b"12")
    (problem,) = report(tmp_path / "a.bin").problems
    assert "its .idx tells of" in problem.what and "a.bin: it holds 2 bytes" in str(report(tmp_path / "a.bin"))
    assert "a.bin: a.idx: this half of the" in str(report((tmp_path / "a.idx").rename(tmp_path / "b.idx").with_name(
        "a.bin")))
    np.save(tmp_path / "b.npy", np.array([1.5]))
    assert "whole numbers" in report(tmp_path / "b.npy").problems[0].what
    with pytest.raises(DataError, match="no such data file"):
        report(tmp_path / "c.jsonl")


def test_of_a_great_many_problems_the_first_are_told(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"text": "你好，世界"}\n'.encode("gb18030") * 300 + b"{\n")
    told = str(report(tmp_path / "a.jsonl"))
    assert "problems: 301" in told and told.count("\n") == 201 and "… and 201 more" in told
    told = str(mend_jsonl(tmp_path / "a.jsonl", tmp_path / "b.jsonl"))
    assert "… and 200 more" in told and "a.jsonl:301: left out" in told


def test_other_files_are_checked_too(tmp_path):
    (tmp_path / "a.csv").write_text(f'query,response\n"a\n\nb",{"b" * 200_000}\n,c\n')
    checked = report(tmp_path / "a.csv")
    assert [(p.line, p.what) for p in checked.problems] == [(5, '"query" is empty')] and len(checked.sizes) == 1
    (tmp_path / "a.txt").write_bytes("你好，世界".encode("gbk"))
    assert "GB18030 perhaps" in report(tmp_path / "a.txt", template="plain").problems[0].what
    (tmp_path / "b.txt").write_text("a story")
    good = report(tmp_path / "b.txt")
    assert not good.problems and good.trained == 8 and "trained whole" in good.notices[0]


@pytest.mark.parametrize("text, encoding, likely", [
    ("今天天气很好，我们去公园。", "gbk", "GB18030"), ("海水為什麼是鹹的?因為有鹽。", "big5", "Big5"),
    ("Grüße aus Köln, déjà vu", "cp1252", "Windows-1252"), ('{"text": "plain"}', "utf-16", "UTF-16"),
    ('{"text": "plain"}', "utf-16-le", "UTF-16LE"), ('{"text": "plain"}', "utf-16-be", "UTF-16BE")])
def test_the_likely_encoding(text, encoding, likely):
    assert likely_encoding(text.encode(encoding)) == likely


def test_a_checked_file_can_be_trained_on():
    """What the validator passes without a problem opens, in both vocabularies."""
    for tokenizer in (BYTE, WorldTokenizer()):
        found = check_data(DataSettings(data_file="data_samples/quickstart_heldout.jsonl"), tokenizer)
        assert not found.problems and len(found.sizes) == 200 and 0 < found.trained < sum(found.sizes)
