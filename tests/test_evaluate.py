"""Scores and losses against counting by hand."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from rwkv_nb import evaluate
from rwkv_nb.config import DataSettings, Settings, TrainSettings
from rwkv_nb.data.chat import TEMPLATES
from rwkv_nb.data.sources import open_documents
from rwkv_nb.errors import DataError
from rwkv_nb.evaluate import (
    exact_match,
    hardest,
    heldout_texts,
    judge,
    judgement_table,
    multiple_choice,
    split_example,
    text_loss,
)
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


@pytest.mark.parametrize("at_once", [1, 100, 10_000])
def test_text_loss_is_the_mean_over_trained_tokens(model, at_once, monkeypatch):
    docs = [*documents(9), Doc((np.zeros(0, np.uint16), np.zeros(0, bool)))]     # such as other tools' pairs may hold
    assert text_loss(model, docs, at_once=at_once) == pytest.approx(loss_by_hand(model, docs), abs=1e-5)
    monkeypatch.setattr(evaluate, "PREFILL", 8)
    monkeypatch.setattr(evaluate, "CHUNK", 3)
    assert text_loss(model, docs, at_once=at_once) == pytest.approx(loss_by_hand(model, docs), abs=1e-5)


def test_no_more_texts_than_asked_are_read_side_by_side(model, monkeypatch):
    seen, hidden = [], model.hidden
    monkeypatch.setattr(model, "hidden", lambda x, *args, **how: seen.append(len(x)) or hidden(x, *args, **how))
    docs = documents(9)
    assert text_loss(model, docs, texts=2) == pytest.approx(loss_by_hand(model, docs), abs=1e-5)
    assert max(seen) == 2 < len(docs)


def test_text_that_trains_nothing_is_an_error(model):
    with pytest.raises(DataError, match="no token"):
        text_loss(model, [Doc((np.array([1, 2, 3], dtype=np.uint16), np.zeros(3, dtype=bool)))])


def test_split_takes_the_templates_last_turn():
    text = "User: a\n\nAssistant: b\n\nUser: c\n\nAssistant: d e "
    assert split_example(text) == split_example(text, "g1") == (
        "User: a\n\nAssistant: b\n\nUser: c\n\nAssistant:", "d e")
    assert split_example("Instruction: a\n\nResponse: b", "instruction") == ("Instruction: a\n\nResponse:", "b")
    assert split_example("User: a\n\nAssistant: Say Assistant: hi.\n\nUser: thanks") == (
        "User: a\n\nAssistant:", "Say Assistant: hi.")      # a marker inside a sentence is none
    assert split_example("User: a") is None
    assert split_example("no turn here") is split_example(text, "plain") is split_example(text, "instruction") is None


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


@pytest.mark.parametrize("template, marker", [("chat", "Assistant:"), ("instruction", "Response:")])
def test_exact_match_reads_and_stops_as_the_template_says(model, monkeypatch, template, marker):
    prompts = [f"a {i}\n\n{marker}" for i in range(3)]
    free = generate(model, TOKENIZER, prompts, max_tokens=8, template="plain")
    stop = free[0][2]
    monkeypatch.setitem(TEMPLATES, template, dataclasses.replace(TEMPLATES[template], stop=(stop,)))
    examples = [f"{p} {text.split(stop)[0]}" for p, text in zip(prompts, free, strict=True)]
    examples += [f"another marker: {i}" for i in range(2)]
    assert exact_match(model, TOKENIZER, examples, max_tokens=8, template=template)[:3] == (3, 3, 1.0)
    assert judge(model, TOKENIZER, examples, template=template).exact is not None


# -- the judge ---------------------------------------------------------------------------------------------------------

def test_documents_sorted_by_loss_put_the_odd_one_first(model, monkeypatch):
    docs = documents(9)
    untrained = Doc((np.array([1, 2, 3], dtype=np.uint16), np.zeros(3, dtype=bool)))
    monkeypatch.setattr(evaluate, "PREFILL", 8)
    ranked = hardest(model, [untrained, *docs])
    by_hand = [loss_by_hand(model, [doc]) for doc in docs if len(doc.tokens) > 1 and doc.mask[1:].any()]
    assert [loss for loss, _ in ranked] == pytest.approx(sorted(by_hand, reverse=True), abs=1e-5)
    for loss, i in ranked[:3]:
        assert loss == pytest.approx(loss_by_hand(model, [docs[i - 1]]), abs=1e-5)


def test_multiple_choice_takes_the_likeliest_answer(model, tmp_path):
    rows = [{"question": f"Which {i}?", "choices": ["red", "no", "blue green", "北京"], "answer": 0} for i in range(6)]
    rows[3]["answer"] = "blue green"
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    taken = multiple_choice(model, TOKENIZER, tmp_path / "q.jsonl")
    for row, choice in zip(rows, taken, strict=True):
        asked, scores = TOKENIZER.encode(f"User: {row['question']}\n\nAssistant:"), []
        for answer in row["choices"]:
            ids = torch.tensor([asked + TOKENIZER.encode(" " + answer)])
            with torch.no_grad():
                p = torch.log_softmax(model(ids[:, :-1])[0][0], -1)
            scores.append(sum(p[t - 1, ids[0, t]].item() for t in range(len(asked), ids.shape[1])))
        assert choice.taken == int(np.argmax(scores))
    assert [c.right for c in taken] == [0, 0, 0, 2, 0, 0]


@pytest.mark.parametrize("row, complaint", [
    ({"question": "a", "choices": ["b"], "answer": 0}, "a row is"), ({"choices": ["b", "c"], "answer": 0}, "a row is"),
    ({"question": "a", "choices": ["b", "c"], "answer": 2}, "answer 2"),
    ({"question": "a", "choices": ["b", "c"], "answer": "d"}, "answer 'd'"), (["a"], "a row is")])
def test_questions_of_another_form_are_refused_with_their_line(model, tmp_path, row, complaint):
    fine = {"question": "a", "choices": ["b", "c"], "answer": 1}
    (tmp_path / "q.jsonl").write_text(json.dumps(fine) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=complaint) as caught:
        multiple_choice(model, TOKENIZER, tmp_path / "q.jsonl")
    assert "q.jsonl:2" in str(caught.value)


def test_a_judgement_is_its_parts(model, tmp_path):
    texts = [f"User: {i}\n\nAssistant: {i}" for i in range(4)]
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": "a", "choices": ["b", "c"], "answer": 1}) + "\n")
    general = documents(3)
    whole = judge(model, TOKENIZER, texts, general=general, choices=tmp_path / "q.jsonl")
    assert whole.exact == exact_match(model, TOKENIZER, texts).share and whole.choices in (0, 1)
    assert whole.general_loss == text_loss(model, general)
    answers = [Doc((np.array([*TOKENIZER.encode(t), 0], np.uint16), np.arange(len(t) + 1) >= t.index("t:") + 2))
               for t in texts]
    assert whole.heldout_loss == pytest.approx(text_loss(model, answers), abs=1e-6)
    part = judge(model, TOKENIZER, ["plain words"], template="plain")
    assert part.exact is part.general_loss is part.choices is None
    assert "exact" in judgement_table({"a": whole, "b": whole})
    assert "exact" not in judgement_table({"a": whole, "b": part})


def test_heldout_texts_are_those_that_the_run_did_not_train_on(tmp_path):
    texts = [f"User: {i}?\n\nAssistant: {i}!" for i in range(20)]
    mine, other = tmp_path / "mine.jsonl", tmp_path / "other.jsonl"
    mine.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    other.write_text(json.dumps({"text": "User: a\n\nAssistant: b"}) + "\n")
    settings = Settings(data=DataSettings(str(mine), heldout=0.2))
    kept = heldout_texts("", settings, TOKENIZER)
    trained = {TOKENIZER.decode(d.tokens[:-1].tolist()) for d in open_documents(settings.data, TOKENIZER)}
    assert len(kept) == 4 and trained.isdisjoint(kept) and trained.union(kept) == set(texts)
    apart = Settings(data=settings.data, train=TrainSettings(eval_file=str(other)))
    assert heldout_texts("", apart, TOKENIZER) == heldout_texts(other, settings, TOKENIZER) == [
        "User: a\n\nAssistant: b"]
    other.write_text(json.dumps({"query": "a", "response": "b"}))
    thinks = Settings(data=DataSettings(str(mine), template="g1"))     # the run's template writes the rows
    assert heldout_texts(other, thinks, TOKENIZER) == ["User: a\n\nAssistant: <think>\n</think>\nb"]
    with pytest.raises(DataError, match="kept no documents"):
        heldout_texts("", Settings(data=DataSettings(str(mine))), TOKENIZER)
    assert exact_match(None, TOKENIZER, []).n == 0
