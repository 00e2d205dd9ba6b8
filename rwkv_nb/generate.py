"""Text from a model, token by token from a state: memory does not grow with the text."""

import codecs
import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .data.chat import Template, get_template
from .errors import SettingsError
from .model import RWKV, State
from .model.token7 import TokenSteps

PREFILL = 512  # tokens of a prompt that are read at once
DECAY = 0.996  # of a penalty, a token (as in ChatRWKV): what was written long ago may come again


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. Raises SettingsError for a value out of range."""

    temperature: float = 0.0    # 0 takes the likeliest token
    top_p: float = 1.0          # sample from the likeliest tokens that hold this share
    presence: float = 0.0       # taken off the logit of a token that was written already
    frequency: float = 0.0      # and this for each time that it was

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1:
            raise SettingsError(f"temperature {self.temperature}, top_p {self.top_p} cannot be sampled with",
                                where="generate", fix="temperature ≥ 0 (0 takes the likeliest token), 0 < top_p ≤ 1")


def generate(model: RWKV, tokenizer, prompts: Sequence[str], *, max_tokens: int, template: str | Template = "chat",
             stop: Sequence[str] | None = None, seed: int = 0, op: str = "auto", batch: int = 64, **sampling
             ) -> list[str]:
    """What the model writes after each prompt, in the prompts' order.

    max_tokens: at most this many tokens each; token 0 or a stop text ends a row earlier (neither is returned)
    template: whose stop texts are taken, where none are given (chat's is a blank line)
    seed: row i draws from a generator of its own, seeded with seed + i, so `batch` changes nothing
    batch: rows worked on at once; sampling: fields of Sampling. Raises SettingsError for a value out of range.
    """
    how = Sampling(**sampling)
    stop = get_template(template).stop if stop is None else stop
    rows = [_Row(prompt, tokenizer, seed + i, max_tokens, stop) for i, prompt in enumerate(prompts)]
    order = sorted(rows, key=lambda row: len(row.prompt)) if max_tokens > 0 else []
    for i in range(0, len(order), batch):
        for _ in _run(model, order[i:i + batch], how, op):
            pass
    return [row.text for row in rows]


def stream(model: RWKV, tokenizer, prompt: str | list[int], *, max_tokens: int, template: str | Template = "chat",
           stop: Sequence[str] | None = None, seed: int = 0, op: str = "auto", state: State | None = None, **sampling
           ) -> Iterator[str]:
    """The same for one prompt (text or ids), yielded in pieces of whole characters as they come.

    state: what was read before the prompt (`read`); None starts a text.
    """
    how = Sampling(**sampling)
    stop = get_template(template).stop if stop is None else stop
    row, shown = _Row(prompt, tokenizer, seed, max_tokens, stop), 0
    for _ in _run(model, [row], how, op, state) if max_tokens > 0 else ():
        sure = len(row.text) if row.done else len(row.text) - row.possible_stop()
        if sure > shown:
            yield row.text[shown:sure]
            shown = sure


@torch.inference_mode()
def read(model: RWKV, tokens: list[int] | Tensor, state: State | None = None, *, op: str = "auto"
         ) -> tuple[Tensor | None, State | None]:
    """Ids [T] or [B,T] read in pieces: the last piece's hidden states [B,t,C] (None for no ids) and the state behind
    it. Memory does not grow with the text."""
    tokens, hidden = torch.as_tensor(tokens, device=model.ln_out.weight.device), None
    for piece in tokens.reshape(-1, tokens.shape[-1]).split(PREFILL, 1) if tokens.numel() else ():
        hidden, state = model.hidden(piece, state, op=op)
    return hidden, state


class _Row:
    """One prompt, what was written after it, and whether that is finished."""

    def __init__(self, prompt: str | list[int], tokenizer, seed: int, max_tokens: int, stop: Sequence[str]):
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        self.prompt, self.written = ids or [0], {}  # 0 closes a document, so it opens one as well
        self.table, self.text = tokenizer.table, ""
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # holds back half a character
        self.left, self.stop, self.done = max_tokens, tuple(stop), False
        self.random = torch.Generator().manual_seed(seed)

    def push(self, token: int) -> None:
        self.left -= 1
        self.done = token == 0 or self.left <= 0
        before = len(self.text)
        if token:
            self.written[token] = self.written.get(token, 0.0) + 1
            self.text += self.decoder.decode(self.table[token])
        if self.done:
            self.text += self.decoder.decode(b"", final=True)
        found = [at for s in self.stop if (at := self.text.find(s, max(0, before - len(s) + 1))) >= 0]
        if found:
            self.text, self.done = self.text[:min(found)], True

    def possible_stop(self) -> int:
        """How many characters at the end may be the beginning of a stop text."""
        return max((n for s in self.stop for n in range(1, len(s)) if self.text.endswith(s[:n])), default=0)


@torch.inference_mode()
def _run(model: RWKV, rows: list[_Row], how: Sampling, op: str, state: State | None = None) -> Iterator[None]:
    """Write all rows to their ends, yielding after each token.

    The shortest prompt's length is read at once; then a row that is still in its prompt is fed that, another its own
    token. Finished rows leave the batch.
    """
    with eval_mode(model):
        step = TokenSteps(model, op)
        fed = min(len(row.prompt) for row in rows)
        hidden, state = read(model, [row.prompt[:fed] for row in rows], state, op=op)
        while True:
            chosen = _choose(model.head(hidden[:, -1]).float(), rows, fed, how)
            for row, token in zip(rows, chosen, strict=True):
                if fed >= len(row.prompt):
                    row.push(token)
            yield
            going = [i for i, row in enumerate(rows) if not row.done]
            if not going:
                return
            if len(going) < len(rows):
                rows, chosen = [rows[i] for i in going], [chosen[i] for i in going]
                state = State(*(part[:, going] for part in state))
            hidden, state = step(chosen, state)
            fed += 1


def _choose(logits: Tensor, rows: list[_Row], fed: int, how: Sampling) -> list[int]:
    """logits [B,V] → each row's next token: from its prompt while that lasts, else the model's choice."""
    if how.presence or how.frequency:
        for row, own in zip(rows, logits, strict=True):
            for token in row.written:
                row.written[token] *= DECAY
            counts = torch.tensor(list(row.written.values()), device=own.device)
            own[list(row.written)] -= how.presence * (counts > 0) + how.frequency * counts
    likeliest = logits.argmax(-1).tolist() if how.temperature == 0 else None
    chosen = []
    for i, row in enumerate(rows):
        if fed < len(row.prompt):
            chosen.append(row.prompt[fed])
        elif likeliest:
            chosen.append(likeliest[i])
        else:
            chosen.append(_sample(logits[i].cpu(), row.random, how))
    return chosen


def _sample(logits: Tensor, random: torch.Generator, how: Sampling) -> int:
    """logits [V] → a token drawn from the smallest set of likeliest tokens that holds top_p (the nucleus;
    Holtzman et al. 2020, arXiv 1904.09751)."""
    p = torch.softmax((logits - logits.max()) / how.temperature, -1)    # at 1e-40 too
    if how.top_p == 1:
        return int(torch.multinomial(p, 1, generator=random))
    top, tokens = p.topk(min(256, len(p)))       # as a rule enough; sorting 65536 takes longer than a layer
    if top.sum() < how.top_p:
        top, tokens = p.sort(descending=True)
    top[1:][top.cumsum(0)[:-1] >= how.top_p] = 0
    return int(tokens[torch.multinomial(top, 1, generator=random)])


@contextlib.contextmanager
def eval_mode(model: RWKV):
    """Dropout off meanwhile."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
