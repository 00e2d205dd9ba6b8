"""How well a model does: held-out answers right to the letter, loss on text, multiple choice."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from .config import Settings
from .data.chat import get_template, loss_mask, prompt, trained_spans
from .data.jsonl import good, scan_jsonl
from .data.sources import Document, open_split, read_jsonl
from .errors import DataError
from .generate import PREFILL, eval_mode, generate
from .loss import CHUNK
from .model import RWKV

TEXTS = 64  # documents that are read side by side at the most


class Row(NamedTuple):
    """One held-out example and what the model made of it."""

    prompt: str
    expected: str
    got: str
    right: bool


class Score(NamedTuple):
    """n examples, of which `right` were answered exactly; share = right / n."""

    n: int
    right: int
    share: float
    rows: list[Row]


def split_example(text: str, template: str = "chat") -> tuple[str, str] | None:
    """(prompt up to and with the marker of the model's last turn, answer without the white space around it); None for
    a text without such a turn."""
    data = text.encode()
    start, stop = (trained_spans(data, get_template(template)) or [(0, 0)])[-1]
    return (data[:start].decode(), data[start:stop].decode().strip()) if start else None


def exact_match(model: RWKV, tokenizer, examples: Sequence[str], *, template: str = "chat",
                max_tokens: int | None = None, op: str = "auto", batch: int = 64) -> Score:
    """Greedy answers to the examples' prompts, compared letter by letter. Texts without an answer are left out.

    max_tokens: None allows 8 more than the longest right answer has. Of no examples the share is NaN.
    """
    pairs = [pair for text in examples if (pair := split_example(text, template))]
    if not pairs:
        return Score(0, 0, math.nan, [])
    prompts, answers = zip(*pairs, strict=True)
    max_tokens = max_tokens or 8 + max(len(ids) for ids in tokenizer.encode_batch(list(answers)))
    written = generate(model, tokenizer, prompts, max_tokens=max_tokens, template=template, op=op, batch=batch)
    rows = [Row(p, a, w.strip(), a == w.strip()) for p, a, w in zip(prompts, answers, written, strict=True)]
    right = sum(row.right for row in rows)
    return Score(len(rows), right, right / len(rows), rows)


def text_loss(model: RWKV, documents: Iterable, **how) -> float:
    """Mean cross-entropy, nats per trained token, over documents (tokens [T], mask [T] each; data.sources).

    A token is predicted from all that stands before it in its document; the first is not predicted.
    how: as of document_losses
    """
    losses = document_losses(model, documents, **how)
    count = sum(n for _, n in losses)
    if not count:
        raise DataError("no token of these documents is trained", fix="check data_type and the template's markers")
    return sum(total for total, _ in losses) / count


@torch.inference_mode()
def document_losses(model: RWKV, documents: Iterable, *, op: str = "auto", at_once: int = 32 * PREFILL,
                    texts: int = TEXTS) -> list[tuple[float, int]]:
    """Each document's summed cross-entropy (nats) and its number of trained tokens, in the documents' order.

    at_once: tokens worked on together, of `texts` documents at the most: each has a state, 12.6 MB at 1.5B. Long
    documents are read in pieces, the state carried over, and logits are made for a few rows at a time, so memory stays
    constant.
    """
    documents = list(documents)
    order = sorted(range(len(documents)), key=lambda i: -len(documents[i].tokens))
    out: list[tuple[float, int]] = [(0.0, 0)] * len(documents)
    with eval_mode(model):
        while order:
            n = max(1, min(at_once // max(1, min(len(documents[order[0]].tokens), PREFILL)), texts))
            some, order = order[:n], order[n:]
            inputs, targets = _padded([documents[i] for i in some], model.ln_out.weight.device)
            state, totals = None, torch.zeros(len(some), dtype=torch.float64)
            for x, y in zip(inputs.split(PREFILL, 1), targets.split(PREFILL, 1), strict=True):
                hidden, state = model.hidden(x, state, op=op)
                trained = y >= 0
                losses = [F.cross_entropy(model.head(h).float(), t, reduction="none")
                          for h, t in zip(hidden[trained].split(CHUNK), y[trained].split(CHUNK), strict=True)]
                totals.index_add_(0, trained.nonzero()[:, 0].cpu(), torch.cat(losses).double().cpu())
            for i, total, n in zip(some, totals.tolist(), (targets >= 0).sum(1).tolist(), strict=True):
                out[i] = (total, n)
    return out


def hardest(model: RWKV, documents: Sequence, *, op: str = "auto") -> list[tuple[float, int]]:
    """(loss a token, index) of each document, the highest first: bad data stands at the top. Untrained ones are left
    out."""
    losses = document_losses(model, documents, op=op)
    return sorted(((total / n, i) for i, (total, n) in enumerate(losses) if n), reverse=True)


class Choice(NamedTuple):
    """A multiple-choice question, its answers, the right one's index, and the one that the model takes."""

    question: str
    choices: list[str]
    right: int
    taken: int


def multiple_choice(model: RWKV, tokenizer, path: str | Path, *, template: str = "chat", op: str = "auto"
                    ) -> list[Choice]:
    """A jsonl of {"question", "choices": […], "answer": index or text}: the answer that the model finds likeliest.

    Likeliest: the highest sum of log-probabilities, each answer behind the question as the template puts it.
    Raises DataError, with file and line, for a row of another form.
    """
    rows = [row for _, row in good(scan_jsonl(Path(path), _choice_row), path)]
    documents, space = [], "" if template == "plain" else " "
    for question, choices, _ in rows:
        asked = tokenizer.encode(prompt(question, template)) or [0]
        for choice in choices:
            answer = tokenizer.encode(space + choice)
            trained = np.repeat([False, True], [len(asked), len(answer)])
            documents.append(Document(np.array(asked + answer, np.uint16), trained))
    losses = iter(document_losses(model, documents, op=op))
    out = []
    for question, choices, right in rows:
        each = [next(losses)[0] for _ in choices]
        out.append(Choice(question, choices, right, each.index(min(each))))
    return out


def _choice_row(row) -> tuple[str, list[str], int]:
    """(question, choices, the right one's index). Raises DataError (`what` only) for a row of another form."""
    choices = row.get("choices") if isinstance(row, dict) else None
    fine = isinstance(choices, list) and len(choices) > 1 and all(isinstance(c, str) and c for c in choices)
    if not fine or not isinstance(row.get("question"), str):
        raise DataError('a row is {"question": "…", "choices": ["…", "…"], "answer": 0}')
    answer = row.get("answer")
    if answer in choices:
        answer = choices.index(answer)
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise DataError(f"the answer {answer!r} is neither one of the choices nor its index, from 0")
    return row["question"], choices, answer


class Judgement(NamedTuple):
    """What a model scores; None where there was nothing to score it on."""

    heldout_loss: float             # nats a trained token, on held-out documents
    exact: float | None             # share of held-out answers that are right to the letter
    general_loss: float | None      # on text that has nothing to do with the task: what it retains
    choices: float | None           # share of multiple-choice questions answered right


def judge(model: RWKV, tokenizer, heldout: Sequence[str], *, general: Iterable | None = None,
          choices: str | Path | None = None, template: str = "chat", op: str = "auto") -> Judgement:
    """One model's Judgement: call it for base and merged. heldout: texts, with answers or without; general: documents
    (data.sources); choices: a jsonl (multiple_choice)."""
    documents = [Document(tokens, loss_mask(tokens, tokenizer, template)) for tokens in tokenizer.documents(heldout)]
    answered = exact_match(model, tokenizer, heldout, template=template, op=op)
    taken = multiple_choice(model, tokenizer, choices, template=template, op=op) if choices else []
    return Judgement(
        heldout_loss=text_loss(model, documents, op=op),
        exact=answered.share if answered.n else None,
        general_loss=None if general is None else text_loss(model, general, op=op),
        choices=sum(c.right == c.taken for c in taken) / len(taken) if taken else None)


def heldout_texts(path: str | Path, settings: Settings, tokenizer) -> list[str]:
    """The texts of a jsonl, its rows written by the run's template; with path "" those that the run itself kept out of
    training (heldout, eval_file).

    Raises DataError where it kept out none.
    """
    if path:
        return [text for _, text in read_jsonl(path, settings.data)]
    kept = open_split(settings.data, tokenizer, settings.train.eval_file)[1]
    if not len(kept):
        raise DataError("this run kept no documents out of training", where="HELDOUT",
                        fix="give a jsonl of held-out texts, or train with heldout=0.02")
    return [tokenizer.decode(document.tokens[:-1].tolist()) for document in kept]


def judgement_table(judged: Mapping[str, Judgement]) -> str:
    """The judgements as text, a row a measure and a column a model."""
    forms = {"held-out loss": "{:.4f}", "exact answers": "{:.1%}", "general loss": "{:.4f}",
             "multiple choice": "{:.1%}"}
    lines = [f"{'':16}" + "".join(f"{name:>12}" for name in judged)]
    for (name, form), values in zip(forms.items(), zip(*judged.values(), strict=True), strict=True):
        if None not in values:
            lines.append(f"{name:16}" + "".join(f"{form.format(v):>12}" for v in values))
    return "\n".join(lines)


def _padded(documents: Sequence, device) -> tuple[torch.Tensor, torch.Tensor]:
    """inputs, targets int64 [B,T]; a target that is padding or masked out is -1."""
    longest = max(2, *(len(document.tokens) for document in documents))
    inputs, targets = torch.zeros(2, len(documents), longest - 1, dtype=torch.int64)
    targets -= 1
    for row, (tokens, mask) in enumerate(documents):
        tokens, mask = torch.from_numpy(tokens.astype("int64")), torch.from_numpy(mask)
        n = len(tokens[1:])     # 0 of a document without any token, too
        inputs[row, :n], targets[row, :n] = tokens[:-1], torch.where(mask[1:], tokens[1:], -1)
    return inputs.to(device), targets.to(device)
