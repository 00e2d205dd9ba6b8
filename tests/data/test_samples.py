"""data_samples/kinds: the script makes what is committed; what is good opens, what is bad is named."""

import importlib.util
from pathlib import Path

import pytest

from rwkv_nb.config import DataSettings
from rwkv_nb.data.check import check_data, mend_jsonl
from rwkv_nb.data.sources import open_documents
from rwkv_nb.tokenizer import ByteTokenizer

SAMPLES = Path(__file__).parents[2] / "data_samples"
BYTE = ByteTokenizer()
SPEC = importlib.util.spec_from_file_location("make_samples", SAMPLES / "make_samples.py")
make_samples = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(make_samples)
TYPES = {"story_utf16le.txt": "utf-16le", "stream_uint16.bin": "uint16"}
TEMPLATES = {"thinking_and_tools.jsonl": "g1", "instruction.jsonl": "instruction", "story.txt": "plain",
             "story_utf16le.txt": "plain", "rows.npy": "plain"}
WRONG = {
    "bad_quotes.jsonl": "quotes", "bad_fields.jsonl": "its fields are 'question', 'answer'", "bad_empty.jsonl": "empty",
    "bad_gbk.jsonl": "GB18030 perhaps", "bad_utf16.jsonl": "the file is UTF-16", "bad_gbk.txt": "GB18030 perhaps",
    "bad_turns.jsonl": "out of order", "bad_untrained.jsonl": "nothing of it is trained",
    "bad_vocabulary.npy": "id 300", "bad_cut.bin": "cut off", "bad_cut.idx": "cut off"}


def settings(name):
    return DataSettings(data_file=str(SAMPLES / "kinds" / name), data_type=TYPES.get(name, "auto"),
                        template=TEMPLATES.get(name, "chat"))


def test_the_script_makes_the_committed_files():
    made = make_samples.good() | make_samples.bad()
    assert {path.name: path.read_bytes() for path in (SAMPLES / "kinds").iterdir()} == made


@pytest.mark.parametrize("name", make_samples.good())
def test_good_ones_open(name):
    report, documents = check_data(settings(name), BYTE), open_documents(settings(name), BYTE)
    text = "".join(BYTE.decode(document.tokens) for document in documents)
    assert not report.problems and report.sizes == documents.sizes.tolist() and report.trained > 0
    assert text.isascii() is False and any("a" <= c <= "z" for c in text)
    wanted = len(make_samples.PAIRS)
    if name.partition(".")[0] in ("text", "prompt", "sft", "stream", "stream_uint16", "pair", "pair_int32"):
        assert text == "".join("User: {}\n\nAssistant: {}".format(*pair) for pair in make_samples.PAIRS)
        assert len(documents) == wanted


@pytest.mark.parametrize("name", make_samples.bad())
def test_bad_ones_are_named(name):
    problems = check_data(settings(name), BYTE).problems
    assert problems and any(WRONG[name] in problem.what for problem in problems)


@pytest.mark.parametrize("name, kept", [("bad_quotes.jsonl", 3), ("bad_gbk.jsonl", 1), ("bad_utf16.jsonl", 1)])
def test_what_can_be_mended_is(tmp_path, name, kept):
    mended = mend_jsonl(SAMPLES / "kinds" / name, tmp_path / "mended.jsonl")
    assert mended.documents == kept
    assert not check_data(DataSettings(data_file=str(tmp_path / "mended.jsonl")), BYTE).problems
