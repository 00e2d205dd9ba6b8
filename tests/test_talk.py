"""A talk equals reading its whole text again; its state is saved, restored and never grows; penalties count."""

import itertools

import pytest
import torch

from rwkv_nb.data.chat import prompt
from rwkv_nb.errors import CheckpointError
from rwkv_nb.generate import generate, read, stream
from rwkv_nb.model import RWKV, Shape, init_weights
from rwkv_nb.talk import Talk
from rwkv_nb.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()


def lively(n_embd=64, seed=1):
    model = init_weights(RWKV(Shape(2, n_embd, 257, 8, 8, 8, 8, ffn_dim=128)), seed)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


@pytest.fixture(scope="module")
def model():
    return lively()


@pytest.mark.parametrize("template", ["chat", "g1", "g1_nothink"])
def test_each_turn_sees_all_turns_before_it(model, template):
    talk, text = Talk(model, TOKENIZER, template), ""
    for i, said in enumerate(("Hello", "And\n\nyou?", "北京")):
        text += ("\n\n" if text else "") + prompt(said, template)
        expected, = generate(model, TOKENIZER, [text], max_tokens=15, temperature=0.8, top_p=0.9, seed=i,
                             stop=("\n\n",))
        answer = "".join(talk.say(said, max_tokens=15, temperature=0.8, top_p=0.9, seed=i))
        assert answer.split("\n\n")[0] == expected
        text += answer


def test_a_saved_talk_goes_on_as_if_it_had_not_stopped(model, tmp_path):
    talk = Talk(model, TOKENIZER)
    for said in ("one", "two"):
        list(talk.say(said, max_tokens=8))
    talk.save(tmp_path / "talk.st")
    size = (tmp_path / "talk.st").stat().st_size
    other = Talk(lively(), TOKENIZER)
    other.restore(tmp_path / "talk.st")
    assert list(talk.say("three", max_tokens=20)) == list(other.say("three", max_tokens=20))
    talk.save(tmp_path / "later.st")
    assert (tmp_path / "later.st").stat().st_size == size       # constant memory


def test_a_talk_that_is_broken_off_remembers_what_was_written(model):
    talk, whole = Talk(model, TOKENIZER), Talk(model, TOKENIZER)
    answer = talk.say("one", max_tokens=40, temperature=1.0)
    written = "".join(itertools.islice(answer, 5))
    answer.close()
    whole.state = read(model, TOKENIZER.encode(prompt("one") + written))[1]
    for ours, again in zip(talk.state, whole.state, strict=True):
        torch.testing.assert_close(ours, again, atol=1e-4, rtol=1e-4)


def test_states_of_other_things_are_refused(model, tmp_path):
    talk = Talk(model, TOKENIZER)
    with pytest.raises(CheckpointError, match="no such file"):
        talk.restore(tmp_path / "absent.st")
    Talk(lively(128), TOKENIZER).save(tmp_path / "large.st")
    with pytest.raises(CheckpointError, match="model of this size"):
        talk.restore(tmp_path / "large.st")
    (tmp_path / "cut.st").write_bytes((tmp_path / "large.st").read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="damaged"):
        talk.restore(tmp_path / "cut.st")


def test_a_state_and_a_prompt_are_one_text(model):
    ids = TOKENIZER.encode("Anna Berg lives in Oslo")
    for cut in (1, 7, len(ids) - 1):
        state = read(model, ids[:cut])[1]
        pieces = "".join(stream(model, TOKENIZER, ids[cut:], max_tokens=10, stop=(), state=state))
        assert pieces == generate(model, TOKENIZER, ["Anna Berg lives in Oslo"], max_tokens=10, stop=())[0]


def test_penalties_keep_tokens_from_coming_again(model):
    free, = generate(model, TOKENIZER, ["a"], max_tokens=40, stop=())
    once, = generate(model, TOKENIZER, ["a"], max_tokens=40, stop=(), presence=1e4)
    often = list(TOKENIZER.encode(free))
    assert len(often) > len(set(often))                     # greedy text repeats itself here
    assert len(set(once.encode())) == len(once.encode()) or "�" in once
    slightly, = generate(model, TOKENIZER, ["a"], max_tokens=40, stop=(), frequency=1e-6)
    assert slightly == free
    together = generate(model, TOKENIZER, ["a", "bc"], max_tokens=20, stop=(), frequency=0.7, temperature=0.5, seed=3)
    assert together == [generate(model, TOKENIZER, [p], max_tokens=20, stop=(), frequency=0.7, temperature=0.5,
                                 seed=3 + i)[0] for i, p in enumerate(("a", "bc"))]
