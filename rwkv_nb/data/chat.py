"""Templates: which words of a document are trained, and how a question is put to the model.

A template is data. Its markers count only at the start of a document or after a blank line, so a user who
writes "Assistant:" inside a sentence changes nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..errors import SettingsError


@dataclass(frozen=True)
class Template:
    """How documents of one kind are read."""

    name: str
    given: tuple[str, ...] = ()     # markers of turns that the model is shown
    learnt: tuple[str, ...] = ()    # markers of turns that the model is to write
    question: str = "{text}"        # how a user's text is put to the model; no space at the end (it joins the answer)
    stop: tuple[str, ...] = ()      # an answer ends before the first of these (or at token 0)

    @cached_property
    def markers(self) -> re.Pattern[bytes]:
        names = "|".join(re.escape(marker) for marker in (*self.given, *self.learnt))
        return re.compile(rf"(?:\A\s*|(?:\r?\n){{2}})({names})".encode())


TEMPLATES = {template.name: template for template in (
    Template("chat", given=("System:", "User:"), learnt=("Assistant:",),
             question="User: {text}\n\nAssistant:", stop=("\n\n",)),
    Template("plain"),
)}


def get_template(name: str) -> Template:
    """The template of that name. Raises SettingsError for an unknown one."""
    if name not in TEMPLATES:
        raise SettingsError(f"there is no template {name!r}", where="template",
                            fix=f"use one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def trained_spans(data: bytes, template: Template) -> list[tuple[int, int]]:
    """(start, stop) in bytes of what is trained in one document, in order; stop may equal len(data).

    A learnt turn goes from behind its marker to the next marker, with the blank line between them: writing
    that blank line is how the model says that its turn is over. Text without any marker is trained whole.
    """
    turns = list(template.markers.finditer(data)) if template.learnt else []
    if not turns:
        return [(0, len(data))]
    stops = [turn.start(1) for turn in turns[1:]] + [len(data)]
    return [(turn.end(), stop) for turn, stop in zip(turns, stops, strict=True)
            if turn[1].decode() in template.learnt]


def loss_mask(tokens: np.ndarray, tokenizer, template: str | Template = "chat") -> np.ndarray:
    """Which tokens are trained as targets: int [T] → bool [T].

    A token is trained where its first byte is. The 0 that closes a document belongs to the last turn: it is
    trained behind an assistant's turn (the answer ends here), not behind a user's.
    """
    template = get_template(template) if isinstance(template, str) else template
    mask = np.ones(len(tokens), dtype=bool)
    if template.learnt:
        ends = [*(np.flatnonzero(tokens == 0) + 1), len(tokens)]  # a 0 inside begins a new text
        for start, stop in zip([0, *ends], ends, strict=False):
            mask[start:stop] = _mask_of_one(tokens[start:stop], tokenizer, template)
    return mask


def _mask_of_one(tokens: np.ndarray, tokenizer, template: Template) -> np.ndarray:
    data = b"".join([tokenizer.table[token] for token in tokens.tolist()])
    trained = np.zeros(len(data) + 1, dtype=bool)  # one place more: the closing 0 stands behind the last byte
    for start, stop in trained_spans(data, template):
        trained[start:stop + (stop == len(data))] = True
    lengths = tokenizer.lengths[tokens]
    return trained[np.cumsum(lengths, dtype=np.int64) - lengths]


def prompt(text: str, template: str | Template = "chat") -> str:
    """A user's text as the model is asked. Runs of newlines become one: a blank line would end the turn."""
    template = get_template(template) if isinstance(template, str) else template
    if template.learnt:
        text = re.sub(r"(?:\r?\n\s*)+", "\n", text.strip())
    return template.question.replace("{text}", text)
