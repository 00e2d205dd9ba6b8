"""Loss masks: what is trained, and what is not."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_nb.config import DataSettings
from rwkv_nb.data.chat import TEMPLATES, loss_mask, mask_template, prompt
from rwkv_nb.errors import SettingsError
from rwkv_nb.tokenizer import ByteTokenizer, WorldTokenizer

WORLD, BYTE = WorldTokenizer(), ByteTokenizer()
both = pytest.mark.parametrize("tokenizer", [WORLD, BYTE], ids=["world", "byte"])


def trained(text, tokenizer, template="chat", closing=(0,)):
    """The trained text of a document, with $ for a trained closing 0."""
    tokens = np.array([*tokenizer.encode(text), *closing], dtype=np.uint16)
    mask = loss_mask(tokens, tokenizer, template)
    assert mask.shape == tokens.shape and mask.dtype == bool
    return b"".join(tokenizer.table[t] or b"$" for t in tokens[mask]).decode("utf-8", errors="replace")


@both
@pytest.mark.parametrize("text, expected", [
    ("User: hi\n\nAssistant: hello", " hello$"),
    ("System: be kind\n\nUser: hi\n\nAssistant: hello", " hello$"),
    ("User: a?\n\nAssistant: b\n\nUser: c?\n\nAssistant: d", " b\n\n d$"),
    ("User: 你好,世界\n\nAssistant: 你好!\n\nUser: 再见\n\nAssistant: 再见。", " 你好!\n\n 再见。$"),
    ("User: say Assistant: or\nAssistant: please\n\nAssistant: no", " no$"),
    ("User: hi\n\nAssistant: one\n\ntwo\n\nUser:", " one\n\ntwo\n\n"),
    ("Assistant: I begin", " I begin$"),
    ("User: only a question", ""),
    ("User: a\r\n\r\nAssistant: b\r\n\r\nUser: c", " b\r\n\r\n"),
    ("User: hi\n\nAssistant:", "$"),
    ("A story of an Assistant: it has no turns.", "A story of an Assistant: it has no turns.$"),
])
def test_chat(tokenizer, text, expected):
    assert trained(text, tokenizer) == expected


@both
def test_plain_trains_everything(tokenizer):
    assert trained("User: hi\n\nAssistant: 好", tokenizer, "plain") == "User: hi\n\nAssistant: 好$"


def test_without_a_closing_zero_and_with_zeros_inside():
    assert trained("User: a\n\nAssistant: b", BYTE, closing=()) == " b"
    two = [*BYTE.encode("User: a\n\nAssistant: b"), 0, *BYTE.encode("User: c\n\nAssistant: d"), 0]
    assert BYTE.decode(np.array(two)[loss_mask(np.array(two), BYTE)]) == " b d"


def test_a_token_is_trained_where_its_first_byte_is():
    text = "User: a.\n\nAssistant: b.\n\nUser: c.\n\nAssistant: d."
    mask = loss_mask(np.array(WORLD.encode(text)), WORLD)
    for at, token in enumerate(WORLD.encode(text)):
        before = len(WORLD.decode(WORLD.encode(text)[:at]))
        in_answer = text.index(" b") <= before < text.index("User: c") or text.index(" d") <= before
        assert mask[at] == in_answer, WORLD.table[token]


turn = st.text(st.sampled_from("ab :的\n🙂"), min_size=1, max_size=12).map(lambda s: " " + " ".join(s.split()))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(turn, turn), min_size=1, max_size=4), st.sampled_from([WORLD, BYTE]))
def test_any_conversation(turns, tokenizer):
    text = "\n\n".join(f"User:{q}\n\nAssistant:{a}" for q, a in turns)
    wanted = "\n\n".join(a for _, a in turns) + "$"
    if tokenizer is BYTE:  # World may have one token for the end of a question and the blank line behind it
        assert trained(text, tokenizer) == wanted
    tokens = np.array([*tokenizer.encode(text), 0])
    mask = loss_mask(tokens, tokenizer)
    assert mask[-1] and not mask[0]
    assert prompt(turns[0][0]) == "User: " + turns[0][0].strip() + "\n\nAssistant:"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.sampled_from([*map(BYTE.encode, ("User:", "Assistant:", "\n\n", "\r\n", "a", "好")), [0]]),
                         max_size=8), min_size=1, max_size=8), st.sampled_from(["chat", "qa"]))
def test_many_in_a_row_are_masked_as_each_alone(documents, template):
    """Empty ones too, and those that no 0 closes."""
    template = mask_template(DataSettings(loss_mask=template)) if template == "qa" else template
    documents = [np.array(sum(parts, []), np.int64) for parts in documents]
    begins = np.cumsum([0, *map(len, documents)])[:-1]
    together = loss_mask(np.concatenate(documents), BYTE, template, begins)
    assert together.tolist() == [bool(m) for document in documents for m in loss_mask(document, BYTE, template)]


def test_prompt_keeps_to_one_turn():
    assert prompt("hi\n\n\nthere\r\n\r\nyou \n") == "User: hi\nthere\nyou\n\nAssistant:"
    assert prompt("as it {is}\n\n", "plain") == "as it {is}\n\n"
    assert TEMPLATES["chat"].stop == ("\n\n",)
    with pytest.raises(SettingsError, match="chat, plain"):
        prompt("hi", "alpaca")
