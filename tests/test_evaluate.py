"""Scores and losses against counting by hand."""

import numpy as np
import pytest
import torch

from rwkv_nb import evaluate
from rwkv_nb.errors import DataError
from rwkv_nb.evaluate import constant_baseline, exact_match, nearest_neighbour_baseline, split_example, text_loss
from rwkv_nb.generate import generate
from rwkv_nb.model import RWKV, Shape, init_weights
from rwkv_nb.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()


class Doc(tuple):
    tokens, mask = property(lambda self: self[0]), property(lambda self: self[1])


@pytest.fixture(scope="module")
def model():
    model = init_weights(RWKV(Shape(2, 64, 257, 8, 8, 8, 8, ffn_dim=128)), 1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def documents(n: int) -> list[Doc]:
    rng = np.random.default_rng(4)
    return [Doc((rng.integers(1, 257, T).astype(np.uint16), rng.random(T) < 0.5)) for T in rng.integers(1, 40, n)]


def loss_by_hand(model, docs) -> float:
    losses = []
    for tokens, mask in docs:
        if len(tokens) < 2:
            continue
        ids = torch.from_numpy(tokens.astype("int64"))
        with torch.no_grad():
            p = torch.log_softmax(model(ids[None, :-1])[0][0], -1)
        losses += [-p[t - 1, ids[t]].item() for t in range(1, len(ids)) if mask[t]]
    return float(np.mean(losses))


@pytest.mark.parametrize("batch", [1, 4, 32])
def test_text_loss_is_the_mean_over_trained_tokens(model, batch, monkeypatch):
    docs = documents(9)
    assert text_loss(model, docs, batch=batch) == pytest.approx(loss_by_hand(model, docs), abs=1e-5)
    monkeypatch.setattr(evaluate, "PREFILL", 8)
    assert text_loss(model, docs, batch=batch) == pytest.approx(loss_by_hand(model, docs), abs=1e-5)


def test_text_that_trains_nothing_is_an_error(model):
    with pytest.raises(DataError, match="no token"):
        text_loss(model, [Doc((np.array([1, 2, 3], dtype=np.uint16), np.zeros(3, dtype=bool)))])


def test_split_takes_the_last_turn():
    assert split_example("User: a\n\nAssistant: b\n\nUser: c\n\nAssistant: d e ") == \
        ("User: a\n\nAssistant: b\n\nUser: c\n\nAssistant:", "d e")
    with pytest.raises(DataError, match="Assistant"):
        split_example("no turn here")


def test_exact_match_counts_what_the_model_writes(model):
    prompts = [f"User: {i} 北京\n\nAssistant:" for i in range(5)]
    answers = [text.strip() for text in generate(model, TOKENIZER, prompts, max_tokens=6)]
    answers[2] += "?"
    answers[4] = "something else"
    examples = [f"{p} {a}" for p, a in zip(prompts, answers, strict=True)]
    score = exact_match(model, TOKENIZER, examples, max_tokens=6)
    assert [row.right for row in score.rows] == [True, True, False, True, False]
    assert (score.n, score.right, score.share) == (5, 3, 0.6)
    assert score.rows[4].expected == "something else"


def test_baselines():
    train = ["User: I have a red cat\n\nAssistant: cat", "User: I see two dogs\n\nAssistant: dog",
             "User: my cat is old\n\nAssistant: cat"]
    heldout = ["User: I see three dogs\n\nAssistant: dog", "User: a red cat!\n\nAssistant: cat",
               "User: one horse\n\nAssistant: horse", "User: the cat is old\n\nAssistant: cat"]
    assert constant_baseline(train, heldout) == 0.5
    assert nearest_neighbour_baseline(train, heldout) == 0.75
