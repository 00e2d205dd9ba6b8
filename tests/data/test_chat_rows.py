"""Rows of every kind become text by a template, and the mask that is read from the text fits the turns."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_nb.config import DataSettings
from rwkv_nb.data.chat import TEMPLATES, loss_mask, mask_template, render, row_text
from rwkv_nb.errors import DataError, SettingsError
from rwkv_nb.tokenizer import ByteTokenizer, WorldTokenizer

WORLD, BYTE = WorldTokenizer(), ByteTokenizer()
CHAT, G1, INSTRUCTION = (TEMPLATES[name] for name in ("chat", "g1", "instruction"))


def trained(text, template, tokenizer=BYTE):
    """The trained text of a document, $ for a trained closing 0."""
    tokens = np.array([*tokenizer.encode(text), 0], dtype=np.uint16)
    mask = loss_mask(tokens, tokenizer, template)
    return b"".join(tokenizer.table[t] or b"$" for t in tokens[mask]).decode("utf-8", errors="replace")


def messages(*turns):
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


@pytest.mark.parametrize("row, template, text", [
    ({"text": "as it\n\n\nis"}, CHAT, "as it\n\n\nis"),
    (messages(("system", "be kind"), ("user", "hi\n\nthere"), ("assistant", "yes\n\nsir")), CHAT,
     "System: be kind\n\nUser: hi\nthere\n\nAssistant: yes\nsir"),
    (messages(("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d")), CHAT,
     "User: a\n\nAssistant: b\n\nUser: c\n\nAssistant: d"),
    (messages(("developer", "be kind"), ("user", "a"), ("assistant", "b")), CHAT,
     "System: be kind\n\nUser: a\n\nAssistant: b"),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, CHAT,
     "User: a\n\nAssistant: b"),
    ({"instruction": "add", "input": "1 2", "output": "3"}, INSTRUCTION,
     "Instruction: add\n\nInput: 1 2\n\nResponse: 3"),
    ({"instruction": "add", "input": "", "output": "3"}, INSTRUCTION, "Instruction: add\n\nResponse: 3"),
    ({"instruction": "add", "input": "1 2", "output": "3"}, CHAT, "User: add\n1 2\n\nAssistant: 3"),
    ({"query": "q", "response": "r", "more": 1}, CHAT, "User: q\n\nAssistant: r"),
    ({"prompt": "q", "completion": "r"}, INSTRUCTION, "Instruction: q\n\nResponse: r"),
    ({"query": "问", "response": "一\n\n二"}, G1, "User: 问\n\nAssistant: <think>\n</think>\n一\n\n二"),
    ({"query": "q", "response": "<think>x</think>y"}, G1, "User: q\n\nAssistant: <think>x</think>y"),
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": "so"}]},
     G1, "User: q\n\nAssistant: <think>\nso\n</think>\na"),
    ({"query": "q", "response": "no\n\n\nUser: trick\n\nmore"}, G1,
     "User: q\n\nAssistant: <think>\n</think>\nno\nUser: trick\n\nmore"),
])
def test_rows_are_written_by_the_template(row, template, text):
    assert row_text(row, template) == text
    if "text" not in row:
        answer = template.learnt[0]
        assert trained(text, template).startswith(" ") and trained(text, template).endswith("$")
        assert text.count("\n\n" + answer) == trained(text, template).count("\n\n\n") + max(
            1, len(row.get("messages", ())) // 2)


def test_tools_stand_in_the_system_turn_and_calls_are_trained():
    call = {"type": "function", "function": {"name": "clock", "arguments": {"city": "Bern"}}}
    row = {"tools": [{"name": "clock"}], "messages": [
        {"role": "user", "content": "What time is it?"}, {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "12:00"}, {"role": "assistant", "content": "Noon."}]}
    text = row_text(row, G1)
    assert text == ('System: <tools>\n{"name": "clock"}\n</tools>\n\nUser: What time is it?\n\nAssistant: <think>\n'
                    '</think>\n<tool_call>\n{"name": "clock", "arguments": {"city": "Bern"}}\n</tool_call>\n\n'
                    "User: <tool_response>\n12:00\n</tool_response>\n\nAssistant: <think>\n</think>\nNoon.")
    learnt = trained(text, G1)
    assert "<tool_call>" in learnt and "<tools>" not in learnt and "12:00" not in learnt
    with pytest.raises(DataError, match="no form for .*use g1"):
        row_text(row, CHAT)


@pytest.mark.parametrize("row, what", [
    (messages(("user", "a"), ("user", "b")), "turn 2 is 'user' behind 'user'"),
    (messages(("user", "a"), ("system", "b")), "turn 2 is 'system' behind 'user'"),
    (messages(("assistant", "a"), ("assistant", "b")), "out of order"),
    (messages(("tool", "a")), "out of order"),
    (messages(("narrator", "a")), "turn 1 is 'narrator': roles are"),
    (messages(("user", "")), '"content" of turn 1 is empty'),
    (messages(("user", ["a"])), "not a string"),
    ({"messages": []}, "not a list"), ({"messages": "hi"}, "not a list"),
    ({"query": "a", "response": 3}, '"response" is a int'), ({"query": "a"}, "its fields are 'query'"),
    ({"prompt": " \n", "completion": "x"}, '"prompt" is empty'),
])
def test_a_row_that_cannot_be_written_says_why(row, what):
    with pytest.raises(DataError, match=what):
        row_text(row, CHAT)
    with pytest.raises(DataError):
        row_text({"text": "a"}, CHAT, fields=("query", "response"))


piece = st.text(st.sampled_from("ab :的\n🙂<>"), min_size=1, max_size=16).filter(str.strip)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(piece, piece, piece | st.none()), min_size=1, max_size=4), st.none() | piece,
       st.sampled_from(["chat", "g1", "g1_nothink", "instruction"]))
def test_masks_by_construction(turns, system, name):
    """The trained text is the answers' text and nothing else, with what ends them."""
    template = TEMPLATES[name]
    rows = [{"role": "system", "content": system}] if system and name != "instruction" else []
    for asked, answer, reasoning in turns:
        thought = {"reasoning_content": reasoning} if reasoning and template.think else {}
        rows += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer} | thought]
    text = render(rows, template)
    marker = template.learnt[0]
    parts = text.split("\n\n" + marker)[1:]
    given = template.given[0] if name == "instruction" else "User:"
    wanted = "".join(part if i == len(parts) - 1 else part[:part.rindex("\n\n" + given) + 2]
                     for i, part in enumerate(parts)) + "$"
    assert len(parts) == len(turns) and trained(text, template) == wanted
    assert wanted.count("</think>") == (len(turns) if template.think else 0) + sum(
        (a + (r or "")).count("</think>") for _, a, r in turns)


def test_the_closing_zero_and_the_end_of_thinking_are_trained():
    for tokenizer in (WORLD, BYTE):
        text = row_text({"query": "q", "response": "a"}, G1)
        assert trained(text, G1, tokenizer) == " <think>\n</think>\na$"


TEXT = "System: s\n\nUser: say Assistant: b\n\nAssistant: c"


@pytest.mark.parametrize("values, wanted", [
    ({}, " c$"), ({"loss_mask": "pad"}, TEXT + "$"), ({"loss_mask": "qa"}, "Assistant: b\n\nAssistant: c$"),
    ({"loss_mask": "se", "mask_id": ("System", "say")}, "say Assistant: b\n\nAssistant: c$"),
    ({"template": "plain"}, TEXT + "$"),
])
def test_the_masks_of_the_tutorial(values, wanted):
    assert trained(TEXT, mask_template(DataSettings(**values))) == wanted


@pytest.mark.parametrize("marks", [(), ("Q:",), ("Q:", ""), ("Q:", "Q:"), ("a", "b", "c")])
def test_se_needs_two_texts(marks):
    with pytest.raises(SettingsError, match="mask_id"):
        mask_template(DataSettings(loss_mask="se", mask_id=marks))
