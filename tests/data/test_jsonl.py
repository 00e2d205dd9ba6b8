"""jsonl: good lines come through, bad ones are named by line with the text around them."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_nb.config import DataSettings
from rwkv_nb.data.check import check_data
from rwkv_nb.data.jsonl import encode
from rwkv_nb.data.sources import read_jsonl
from rwkv_nb.errors import DataError
from rwkv_nb.tokenizer import ByteTokenizer


def check_jsonl(path):
    return check_data(DataSettings(data_file=str(path), template="plain"), ByteTokenizer()).problems


GOOD = '{"text": "猫"}'
BAD = {
    '{"text": "a"': "not JSON",
    '{"text": "a"} {"text": "b"}': "not JSON",
    "User: hello": "not JSON",
    '["a"]': "needed, this is a list",
    '{"txt": "a"}': "no \"text\"; its fields are 'txt'",
    "{}": "none",
    '{"text": 3}': "a int, not a string",
    '{"text": null}': "NoneType",
    '{"text": ""}': "empty",
    '{"text": "a\\ud800b"}': "character 2",
    "[" * 100_000: "not JSON",
    '{"text": "x", "n": ' + "9" * 5000 + "}": "not JSON that can be read",
}


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])).filter(str.strip), min_size=1, max_size=5),
       ascii=st.booleans(), bom=st.booleans(), newline=st.sampled_from(["\n", "\r\n", "\n\n", "\n  \n"]))
def test_texts_come_through(tmp_path_factory, texts, ascii, bom, newline):
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    content = newline.join(json.dumps({"text": t, "id": 1}, ensure_ascii=ascii) for t in texts)
    path.write_bytes(b"\xef\xbb\xbf" * bom + content.encode())
    step = newline.count("\n")
    assert list(read_jsonl(path)) == [(1 + step * i, t) for i, t in enumerate(texts)]
    assert check_jsonl(path) == []
    tok = ByteTokenizer()
    assert [(line, tokens.tolist()) for line, tokens in encode(read_jsonl(path), tok)] == [
        (1 + step * i, [*tok.encode(t), 0]) for i, t in enumerate(texts)]


@pytest.mark.parametrize("line", BAD, ids=[re.sub(r"\W+", " ", line)[:20] for line in BAD])
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")
    with pytest.raises(DataError, match=re.escape(f"{path}:3: ")) as caught:
        list(read_jsonl(path))
    assert BAD[line] in str(caught.value) and len(str(caught.value)) < 600
    assert line[:20] in str(caught.value)
    assert [p.line for p in check_jsonl(path)] == [3]


def test_all_problems_in_one_pass(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xff\n" + "\n".join([GOOD, *list(BAD)[:5], GOOD]).encode())
    problems = check_jsonl(path)
    assert [p.line for p in problems] == [1, 3, 4, 5, 6, 7]
    assert "UTF-8" in problems[0].what


def test_the_text_around_a_mistake_is_shown(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "' + "长" * 200 + '" oops ' + "y" * 200 + "}")
    (problem,) = check_jsonl(path)
    assert "oops" in problem.text and problem.text[0] == problem.text[-1] == "…" and len(problem.text) < 70
    path.write_text('{"text": "abc"\n')
    assert check_jsonl(path)[0].what.endswith("column 15")


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match="empty"):
        list(read_jsonl(path))
    assert len(check_jsonl(path)) == 1


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="nothing.jsonl"):
        list(read_jsonl(tmp_path / "nothing.jsonl"))
