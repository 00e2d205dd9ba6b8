"""Templates: how turns are written down, which words of a document are trained, how a question is put to the model.

A template is data. Its markers count only at the start of a document or after a blank line, so a user who
writes "Assistant:" inside a sentence changes nothing.
"""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ..config import DataSettings
from ..errors import DataError, SettingsError

# Other names of the same roles.
ROLES = {"human": "user", "gpt": "assistant", "function": "tool", "observation": "tool", "developer": "system"}
BEFORE = {"system": ("",), "user": ("", "system", "assistant"), "input": ("user", "input"),  # role → who may precede it
          "assistant": ("user", "input", "tool", "system", ""), "tool": ("assistant", "tool")}
ANSWERS = {"instruction": "output", "query": "response", "prompt": "completion"}  # question → answer, by field name


@dataclass(frozen=True)
class Template:
    """How documents of one kind are read and written."""

    name: str
    given: tuple[str, ...] = ()     # markers of turns that the model is shown
    learnt: tuple[str, ...] = ()    # markers of turns that the model is to write
    question: str = "{text}"        # how a user's text is put to the model; no space at the end (it joins the answer)
    stop: tuple[str, ...] = ()      # an answer ends before the first of these (or at token 0)
    turns: dict[str, str] = field(default_factory=dict)  # role → how its turn is written; {} is the text
    think: str = ""                 # how an answer with its {reasoning} is written; "" leaves reasoning out of reach
    no_think: str = "{answer}"      # how an answer without any is
    call: str = ""                  # how an answer calls a tool: {} is the call as JSON; "" knows no tools
    tools: str = ""                 # how a system turn lists the tools: {} is their JSON, one a line
    loose: bool = False             # markers count anywhere, and a learnt one is trained with its turn

    @cached_property
    def markers(self) -> re.Pattern[bytes]:
        names = "|".join(re.escape(marker) for marker in (*self.given, *self.learnt))
        return re.compile((f"({names})" if self.loose else rf"(?:\A\s*|\n\r?\n)({names})").encode())


_CHAT = dict(given=("System:", "User:"), learnt=("Assistant:",),
             turns={"system": "System: {}", "user": "User: {}", "assistant": "Assistant: {}"})
_G1 = _CHAT | dict(
    turns=_CHAT["turns"] | {"tool": "User: <tool_response>\n{}\n</tool_response>"}, stop=("\n\nUser:", "\n\nSystem:"),
    think="<think>\n{reasoning}\n</think>\n{answer}", no_think="<think>\n</think>\n{answer}",
    call="<tool_call>\n{}\n</tool_call>", tools="<tools>\n{}\n</tools>")
TEMPLATES = {template.name: template for template in (
    Template("chat", **_CHAT, question="User: {text}\n\nAssistant:", stop=("\n\n",)),
    Template("plain", turns=_CHAT["turns"]),
    Template("g1", **_G1, question="User: {text}\n\nAssistant: <think"),
    Template("g1_nothink", **_G1, question="User: {text}\n\nAssistant: <think>\n</think"),
    Template("instruction", given=("Instruction:", "Input:"), learnt=("Response:",), stop=("\n\n",),
             turns={"user": "Instruction: {}", "input": "Input: {}", "assistant": "Response: {}"},
             question="Instruction: {text}\n\nResponse:"),
)}


def get_template(template: str | Template) -> Template:
    """The template of that name, or the given one itself. Raises SettingsError for an unknown name."""
    if isinstance(template, Template):
        return template
    if template not in TEMPLATES:
        raise SettingsError(f"there is no template {template!r}", where="template",
                            fix=f"use one of {', '.join(TEMPLATES)}")
    return TEMPLATES[template]


def mask_template(data: DataSettings) -> Template:
    """What decides the loss mask: the template itself, or data.loss_mask where that says pad, qa or se."""
    if data.loss_mask == "template":
        return get_template(data.template)
    if data.loss_mask in ("pad", "none"):
        return get_template("plain")
    off_on = ("User:", "Assistant:") if data.loss_mask == "qa" else data.mask_id
    if len(off_on) != 2 or not all(off_on) or off_on[0] == off_on[1]:
        raise SettingsError(f"mask_id is {off_on!r}", where="mask_id",
                            fix='give two texts: where training goes off and where it goes on, like "Q:" "A:"')
    return Template(data.loss_mask, given=off_on[:1], learnt=off_on[1:], loose=True)


def trained_spans(data: bytes, template: Template) -> list[tuple[int, int]]:
    """(start, stop) in bytes of what is trained in one document, in order; stop may equal len(data).

    A learnt turn goes from behind its marker to the next marker, with the blank line between them: writing
    that blank line is how the model says that its turn is over. Text without any marker is trained whole.
    """
    turns = list(template.markers.finditer(data)) if template.learnt else []
    if not turns:
        return [(0, len(data))]
    stops = [turn.start(1) for turn in turns[1:]] + [len(data)]
    spans = []
    for turn, stop in zip(turns, stops, strict=True):
        if turn[1].decode() in template.learnt:
            spans.append((turn.start(1) if template.loose else turn.end(), stop))
    return spans


def loss_mask(tokens: np.ndarray, tokenizer, template: str | Template = "chat",
              begins: Sequence[int] | np.ndarray = (0,)) -> np.ndarray:
    """Which tokens are trained as targets: int [T] → bool [T].

    A token is trained where its first byte is. The 0 that closes a document belongs to the last turn: it is
    trained behind an assistant's turn (the answer ends here), not behind a user's.
    begins: where texts begin, of many documents in a row; behind a 0 one always does
    """
    template = get_template(template)
    if not template.learnt:
        return np.ones(len(tokens), dtype=bool)
    opens = np.zeros(len(tokens) + 1, dtype=bool)   # does a text begin with token t
    opens[1:] = tokens == 0
    opens[np.asarray(begins)] = opens[-1] = True
    # In places of bytes, of which each text has one more than bytes: its closing 0 stands behind the last of them.
    data, spans = tokenizer.bytes(tokens), []
    ends = (tokenizer.lengths[tokens] + opens[1:]).astype(np.int64)
    np.cumsum(ends, out=ends)   # in its place: of a long text it is the largest array of all
    texts = [0, *ends[opens[1:]].tolist()]
    for number, (start, stop) in enumerate(itertools.pairwise(texts)):
        spans += [(start + a, start + b + (b == stop - start - 1))
                  for a, b in trained_spans(data[start - number:stop - number - 1], template)]
    del data    # as large as the text
    trained = np.zeros(texts[-1], dtype=bool)
    for start, stop in spans:
        trained[start:stop] = True
    return np.concatenate([trained[:1], trained[ends[:-1]]])


def prompt(text: str, template: str | Template = "chat") -> str:
    """A user's text as the model is asked. Runs of newlines become one: a blank line would end the turn."""
    template = get_template(template)
    if template.learnt:
        text = _one_turn(text)
    return template.question.replace("{text}", text)


def _one_turn(text: str) -> str:
    return re.sub(r"(?:\r?\n\s*)+", "\n", text.strip())


def row_text(row: dict, template: Template, fields: tuple[str, ...] = ()) -> str:
    """The document in a row of data, written by the template.

    In this order: the named fields (questions first, the answer last); "text", taken as it is; "messages", a list of
    {"role", "content"}, or "conversations", of {"from", "value"}; a question and its answer by the usual names. Raises
    DataError (`what` only) for other rows.
    """
    if fields:
        return _asked_and_answered(row, fields, template)
    if "text" in row:
        return _text(row, "text")
    for name in ("messages", "conversations"):
        if name in row:
            return render(_messages(row, name), template)
    for question, answer in ANSWERS.items():
        if question in row and answer in row:
            more = ("input",) if row.get("input") else ()
            return _asked_and_answered(row, (question, *more, answer), template)
    return _text(row, "text")  # it is not there, and that is told


def _asked_and_answered(row: dict, fields: tuple[str, ...], template: Template) -> str:
    question, *more, answer = fields
    turns = [{"role": "user", "content": _text(row, question)}]
    turns += [{"role": "input", "content": _text(row, name)} for name in more]
    return render([*turns, {"role": "assistant", "content": _text(row, answer)}], template)


def _text(row: dict, name: str, of: str = "", *, optional: bool = False) -> str:
    """A row's or turn's own text; where it is optional, perhaps an empty one. `of` says whose it is."""
    value = row.get(name)
    if value is None and optional:
        return ""
    if name not in row:
        hint = "" if of else " (with data_type sft, sft_field names others)"
        raise DataError(f'there is no "{name}"; its fields are {", ".join(map(repr, row)) or "none"}{hint}')
    if not isinstance(value, str):
        raise DataError(f'"{name}"{of} is a {type(value).__name__}, not a string')
    if not optional and not value.strip():
        raise DataError(f'"{name}"{of} is empty')
    return value


def _list(turn: dict, name: str, of: str) -> list:
    """A turn's own list; an empty one where it has none."""
    value = turn.get(name)
    if value is not None and not isinstance(value, list):
        raise DataError(f'"{name}"{of} is a {type(value).__name__}, not a list')
    return value or []


def _messages(row: dict, name: str) -> list[dict]:
    """A row's messages, with roles by one name and the tools in the system turn."""
    found = row[name]
    if not isinstance(found, list) or not found or not all(isinstance(m, dict) for m in found):
        raise DataError(f'"{name}" is not a list of {{"role": …, "content": …}}')
    turns = []
    for message in found:
        role = str(message.get("role", message.get("from", ""))).lower()
        turns.append({"content": message.get("value")} | message | {"role": ROLES.get(role, role)})
    if row.get("tools"):
        system = turns.pop(0) if turns[0]["role"] == "system" else {"role": "system", "content": ""}
        turns.insert(0, system | {"tools": row["tools"]})
    return turns


def render(turns: list[dict], template: Template) -> str:
    """Turns ({"role", "content", perhaps "reasoning_content", "tool_calls", "tools"}) as one document.

    Raises DataError (`what` only) for turns out of order, without text, or with what the template has no form for.
    """
    written, last = [], ""
    for number, turn in enumerate(turns, 1):
        role = turn["role"]
        if role not in BEFORE:
            raise DataError(f"turn {number} is {role!r}: roles are {', '.join(BEFORE)}")
        if last not in BEFORE[role]:
            raise DataError(f"turn {number} is {role!r} behind {last!r}: turns are out of order")
        of = f" of turn {number}"
        text = _assistant(turn, template, of) if role == "assistant" else _given(turn, template, of)
        if role == "input" and role not in template.turns:
            written[-1] += "\n" + text
        elif role in template.turns:
            written.append(template.turns[role].replace("{}", text))
        else:
            raise DataError(f"the {template.name} template has no {role!r} turn (turn {number})")
        last = role
    return "\n\n".join(written)


def _given(turn: dict, template: Template, of: str) -> str:
    tools = _list(turn, "tools", of)
    text = _text(turn, "content", of, optional=bool(tools))
    if tools:
        lines = [json.dumps(tool, ensure_ascii=False) for tool in tools]
        text += "\n" + _filled(template, "tools", "\n".join(lines))
    return _one_turn(text)


def _assistant(turn: dict, template: Template, of: str) -> str:
    """An answer with its reasoning and calls. Where a blank line ends an answer there is none inside; where it does
    not, none stands before a marker."""
    calls = _list(turn, "tool_calls", of)
    reasoning = _text(turn, "reasoning_content", of, optional=True).strip()
    text = _text(turn, "content", of, optional=bool(calls)).strip()
    for call in calls:
        if isinstance(call, dict):
            call = call.get("function", call)
        written = _filled(template, "call", json.dumps(call, ensure_ascii=False))
        text = f"{text}\n{written}".lstrip()
    if reasoning:
        text = _filled(template, "think", text, "{answer}").replace("{reasoning}", reasoning)
    elif not text.startswith("<think>"):
        text = template.no_think.replace("{answer}", text)
    if "\n\n" in template.stop:
        return _one_turn(text)
    markers = "|".join(map(re.escape, template.given + template.learnt))
    return re.sub(rf"(?:\r?\n\s*){{2,}}(?={markers})", "\n", text) if markers else text


def _filled(template: Template, form: str, text: str, slot: str = "{}") -> str:
    if not getattr(template, form):
        raise DataError(f"the {template.name} template has no form for {form}: use g1")
    return getattr(template, form).replace(slot, text)
