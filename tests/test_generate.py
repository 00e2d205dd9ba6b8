"""Generation: batches change nothing, prompts of any length, stops, sampling with a generator of its own."""

import pytest
import torch

from rwkv_nb.config import replace
from rwkv_nb.errors import SettingsError
from rwkv_nb.generate import generate, stream
from rwkv_nb.model import RWKV, Shape, init_weights, load_model
from rwkv_nb.runs import Run
from rwkv_nb.tokenizer import ByteTokenizer
from rwkv_nb.train.loop import Trainer

TOKENIZER = ByteTokenizer()
PROMPTS = ["a", "User: where is 北京?\n\nAssistant:", "", "x" * 40, "Anna Berg lives in Oslo", "é"]


@pytest.fixture(scope="module")
def model():
    """Random weights everywhere, so that every part of the state matters to the next token."""
    model = init_weights(RWKV(Shape(2, 64, 257, 8, 8, 8, 8, ffn_dim=128)), 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def by_hand(model, prompt: str, n: int) -> str:
    """Greedy text, the whole sequence read again for each token."""
    tokens = TOKENIZER.encode(prompt) or [0]
    start = len(tokens)
    for _ in range(n):
        with torch.no_grad():
            token = int(model(torch.tensor([tokens]))[0][0, -1].argmax())
        if token == 0:
            break
        tokens.append(token)
    return TOKENIZER.decode(tokens[start:])


def test_a_batch_writes_what_each_prompt_alone_gets(model):
    together = generate(model, TOKENIZER, PROMPTS, max_tokens=12, stop=())
    assert together == [generate(model, TOKENIZER, [p], max_tokens=12, stop=())[0] for p in PROMPTS]
    assert together == generate(model, TOKENIZER, PROMPTS, max_tokens=12, stop=(), batch=2)
    assert together == [by_hand(model, p, 12) for p in PROMPTS]


def test_a_long_prompt_is_read_in_pieces(model, monkeypatch):
    prompt = "Anna Berg lives in Oslo. " * 3
    whole = generate(model, TOKENIZER, [prompt], max_tokens=8, stop=())
    monkeypatch.setattr("rwkv_nb.generate.PREFILL", 7)
    assert generate(model, TOKENIZER, [prompt], max_tokens=8, stop=()) == whole


def test_sampling_repeats_with_its_seed_and_leaves_the_global_generator_alone(model):
    def sampled(seed, **options):
        return generate(model, TOKENIZER, PROMPTS, max_tokens=20, temperature=1.0, seed=seed, stop=(), **options)

    before = torch.random.get_rng_state()
    first = sampled(3)
    assert torch.equal(before, torch.random.get_rng_state())
    assert first == sampled(3) == sampled(3, batch=1)
    assert first != sampled(4)
    greedy = generate(model, TOKENIZER, PROMPTS, max_tokens=20, stop=())
    assert sampled(3, top_p=1e-6) == greedy


def test_a_stop_text_ends_a_row_and_is_cut_off(model):
    whole = generate(model, TOKENIZER, PROMPTS, max_tokens=20, temperature=1.0, stop=())
    stop = next(text[5:7] for text in whole if len(text) > 8)
    cut = generate(model, TOKENIZER, PROMPTS, max_tokens=20, temperature=1.0, stop=(stop, "never"))
    assert cut == [text.split(stop)[0] for text in whole]
    assert cut != whole


def test_token_0_ends_a_row(model):
    head = model.head.weight.detach().clone()
    try:
        with torch.no_grad():
            model.head.weight.zero_()  # all logits equal: the first token, 0, is the choice
        assert generate(model, TOKENIZER, PROMPTS, max_tokens=5) == [""] * len(PROMPTS)
    finally:
        model.head.weight.data.copy_(head)


def test_a_stream_adds_up_to_the_text_and_shows_no_part_of_a_stop(model):
    for seed in range(100):     # a text that does not end early by itself
        options = {"max_tokens": 60, "temperature": 1.0, "seed": seed}
        whole, = generate(model, TOKENIZER, [PROMPTS[1]], stop=(), **options)
        if len(whole) > 40:
            break
    stop = next(whole[i:i + 3] for i in range(15, len(whole)) if whole.find(whole[i:i + 3]) == i)
    pieces = list(stream(model, TOKENIZER, PROMPTS[1], stop=(stop,), **options))
    assert len(pieces) > 3
    assert "".join(pieces) == whole.split(stop)[0]


def test_a_stream_holds_back_half_a_character():
    """A model that writes 猫 for ever, a byte at a time."""
    model, ids = init_weights(RWKV(Shape(1, 64, 257, 8, 8, 8, 8, ffn_dim=128))), TOKENIZER.encode("猫")
    with torch.no_grad():
        for matrix in (model.emb.weight, model.head.weight, model.blocks[0].att.output.weight,
                       model.blocks[0].ffn.value.weight):
            matrix.zero_()
        for i, token in enumerate(ids):
            model.emb.weight[token, i] = model.head.weight[ids[(i + 1) % 3], i] = 1
    assert list(stream(model, TOKENIZER, "猫", max_tokens=7)) == ["猫", "猫", "\ufffd"]


@pytest.mark.parametrize("template, stop", [("chat", ("\n\n",)), ("g1", ("\n\nUser:", "\n\nSystem:")), ("plain", ())])
def test_answers_end_where_the_templates_do(newlines, template, stop):
    model = load_model(newlines)
    answer, = generate(model, TOKENIZER, ["a"], max_tokens=6, template=template)
    assert answer == "".join(stream(model, TOKENIZER, "a", max_tokens=6, template=template))
    assert answer == generate(model, TOKENIZER, ["a"], max_tokens=6, stop=stop)[0] == (
        "" if template == "chat" else "\n" * 6)


@pytest.mark.parametrize("template, answer", [("chat", ""), ("g1", "\n" * 6)])
def test_a_trainer_answers_by_its_runs_template(newlines, settings, tmp_path, template, answer):
    trainer = Trainer(Run(tmp_path), replace(settings, load_model=str(newlines), template=template))
    assert trainer.answers(["a"], 6, base=True) == trainer.answers(["a"], 6, base=False) == [answer]


def test_nothing_asked_nothing_written(model):
    assert generate(model, TOKENIZER, [], max_tokens=5) == []
    assert generate(model, TOKENIZER, ["a"], max_tokens=0) == [""]
    assert list(stream(model, TOKENIZER, "a", max_tokens=0)) == []


def test_training_mode_comes_back(model):
    model.train()
    generate(model, TOKENIZER, ["a"], max_tokens=2)
    assert model.training


def test_a_temperature_near_0_is_0(model):
    cold = generate(model, TOKENIZER, PROMPTS, max_tokens=8, temperature=1e-40, stop=())
    assert cold == generate(model, TOKENIZER, PROMPTS, max_tokens=8, temperature=0.0, stop=())


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"temperature": float("nan")},
                                     {"temperature": 1.0, "top_p": 0.0}, {"top_p": 1.5}])
def test_sampling_values_out_of_range_are_refused(model, options):
    with pytest.raises(SettingsError, match="temperature"):
        generate(model, TOKENIZER, ["a"], max_tokens=2, **options)
