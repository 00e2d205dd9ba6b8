"""How well a model does: held-out answers right to the letter, loss on text, and what a simple rule would score."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .errors import DataError
from .generate import PREFILL, eval_mode, generate
from .model import RWKV

MARKER = "Assistant:"


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


def split_example(text: str, marker: str = MARKER) -> tuple[str, str]:
    """(prompt up to and with the last marker, answer without the white space around it).

    Raises DataError for a text without the marker.
    """
    at = text.rfind(marker)
    if at < 0:
        raise DataError(f"there is no {marker!r} in this example", where=repr(text[:60]),
                        fix="held-out examples are chat documents that end in the right answer")
    at += len(marker)
    return text[:at], text[at:].strip()


def exact_match(model: RWKV, tokenizer, examples: Sequence[str], *, max_tokens: int | None = None,
                marker: str = MARKER, op: str = "auto", batch: int = 64) -> Score:
    """Greedy answers to the examples' prompts, compared letter by letter.

    max_tokens: None allows 8 more than the longest right answer has.
    """
    prompts, answers = zip(*(split_example(text, marker) for text in examples), strict=True)
    max_tokens = max_tokens or 8 + max(len(ids) for ids in tokenizer.encode_batch(list(answers)))
    written = generate(model, tokenizer, prompts, max_tokens=max_tokens, op=op, batch=batch)
    rows = [Row(p, a, w.strip(), a == w.strip()) for p, a, w in zip(prompts, answers, written, strict=True)]
    right = sum(row.right for row in rows)
    return Score(len(rows), right, right / len(rows), rows)


@torch.inference_mode()
def text_loss(model: RWKV, documents: Iterable, *, op: str = "auto", batch: int = 32) -> float:
    """Mean cross-entropy, nats per trained token, over documents (tokens [T], mask [T] each; data.sources).

    A token is predicted from all that stands before it in its document; the first is not predicted.
    Long documents are read in pieces, the state carried over, so memory stays constant.
    """
    order = sorted(documents, key=lambda document: len(document.tokens))
    total, count = 0.0, 0
    with eval_mode(model):
        for i in range(0, len(order), batch):
            inputs, targets = _padded(order[i:i + batch], model.emb.weight.device)
            state = None
            for x, y in zip(inputs.split(PREFILL, 1), targets.split(PREFILL, 1), strict=True):
                hidden, state = model.hidden(x, state, op=op)
                trained = y >= 0
                logits = model.head(hidden[trained]).float()
                total += F.cross_entropy(logits, y[trained], reduction="sum").item()
                count += int(trained.sum())
    if not count:
        raise DataError("no token of these documents is trained", fix="check data_type and the template's markers")
    return total / count


def _padded(documents: Sequence, device) -> tuple[torch.Tensor, torch.Tensor]:
    """inputs, targets int64 [B,T]; a target that is padding or masked out is -1."""
    longest = max(2, *(len(document.tokens) for document in documents), 2)
    inputs, targets = torch.zeros(2, len(documents), longest - 1, dtype=torch.int64)
    targets -= 1
    for row, (tokens, mask) in enumerate(documents):
        tokens, mask = torch.from_numpy(tokens.astype("int64")), torch.from_numpy(mask)
        inputs[row, :len(tokens) - 1] = tokens[:-1]
        targets[row, :len(tokens) - 1] = torch.where(mask[1:], tokens[1:], -1)
    return inputs.to(device), targets.to(device)


def constant_baseline(train: Sequence[str], heldout: Sequence[str], marker: str = MARKER) -> float:
    """Share of held-out answers that the commonest training answer gets right. Texts without a marker are left out."""
    (best, _), = Counter(split_example(text, marker)[1] for text in train if marker in text).most_common(1)
    return sum(split_example(text, marker)[1] == best for text in heldout) / len(heldout)


def nearest_neighbour_baseline(train: Sequence[str], heldout: Sequence[str], marker: str = MARKER) -> float:
    """Share that is right when each prompt gets the answer of the training prompt most like it.

    Likeness: shared character trigrams over the number that either has (Jaccard's index). Training texts without a
    marker are left out.
    """
    pairs = [split_example(text, marker) for text in train if marker in text]
    sizes, holders = [], defaultdict(list)
    for i, (prompt, _) in enumerate(pairs):
        grams = _trigrams(prompt)
        sizes.append(len(grams))
        for gram in grams:
            holders[gram].append(i)
    right = 0
    for prompt, answer in (split_example(text, marker) for text in heldout):
        grams = _trigrams(prompt)
        shared = Counter(i for gram in grams for i in holders[gram])
        nearest = max(shared, key=lambda i: shared[i] / (len(grams) + sizes[i] - shared[i]), default=0)
        right += pairs[nearest][1] == answer
    return right / len(heldout)


def _trigrams(text: str) -> set[str]:
    return {text[i:i + 3] for i in range(len(text) - 2)}
