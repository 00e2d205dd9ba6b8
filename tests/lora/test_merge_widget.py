"""The strength slider answers what generate answers at that strength; the score picture can be drawn."""

import dataclasses
import threading

import pytest
from lora_files import make_adapter

from rwkv_nb.data.chat import TEMPLATES, prompt
from rwkv_nb.evaluate import Judgement
from rwkv_nb.generate import generate
from rwkv_nb.lora.layers import lora_layers, strength
from rwkv_nb.lora.merge import merge
from rwkv_nb.tokenizer import ByteTokenizer, get_tokenizer
from rwkv_nb.widgets.common import Bar
from rwkv_nb.widgets.merge import StrengthSlider, score_figure
from rwkv_nb.widgets.plots import png

BYTES = get_tokenizer("byte")


@pytest.fixture
def model(lively, tmp_path):
    return make_adapter(tmp_path / "a.safetensors", lively)[1]


def test_each_strength_writes_its_answer(model):
    slider = StrengthSlider(model, BYTES, "Hello?", max_tokens=12)
    for value in (1.0, 0.0, 1.5):
        slider.slider.value = value
        written = slider.join()  # before the model is used here
        with strength(model, value):
            expected, = generate(model, BYTES, [prompt("Hello?")], max_tokens=12)
        assert written == expected.strip()
    assert {layer.strength for layer in lora_layers(model).values()} == {1.0}


def test_the_last_of_many_changes_wins(model):
    slider = StrengthSlider(model, BYTES, "one", max_tokens=60)
    for value in (0.2, 0.9, 0.4):
        slider.slider.value = value
    slider.question.value = "two <b>"
    written = slider.join()
    with strength(model, 0.4):
        expected, = generate(model, BYTES, [prompt("two <b>")], max_tokens=60)
    assert written == expected.strip()
    assert "strength 0.4" in slider.answer.value


def test_a_change_that_another_has_overtaken_leaves_the_model_alone(model):
    asked_by = set()

    class Watched(ByteTokenizer):
        def encode(self, text):
            asked_by.add(threading.current_thread())
            return super().encode(text)

    slider = StrengthSlider(model, Watched(), "one", max_tokens=4)
    slider.join()
    asked_by.clear()
    with slider.newest._turn:   # all of them wait for the model, and take their turns in any order
        for value in (0.2, 0.9, 0.4):
            slider.slider.value = value
        waiting = [thread for thread in threading.enumerate() if thread.name == "rwkv_nb answer"]
    for thread in waiting:
        thread.join()
    assert len(waiting) == 3 and asked_by == {slider.newest.thread}


def test_an_answer_ends_where_the_templates_do(model, monkeypatch):
    free, = generate(model, BYTES, [prompt("Hello?", "instruction")], max_tokens=12, template="plain")
    stop = free[4]
    monkeypatch.setitem(TEMPLATES, "instruction", dataclasses.replace(TEMPLATES["instruction"], stop=(stop,)))
    written = StrengthSlider(model, BYTES, "Hello?", template="instruction", max_tokens=12).join()
    assert written == free.split(stop)[0].strip()


def test_an_error_is_shown_in_place_of_the_answer(model):
    slider = StrengthSlider(model, BYTES, "one", template="no such template")
    slider.join()
    assert "no such template" in slider.answer.value


def test_score_picture():
    judged = {"base": Judgement(1.2, 0.0, 0.71, None), "merged": Judgement(0.2, 0.985, 0.72, None)}
    assert png(figure := score_figure(judged)).startswith(b"\x89PNG")
    assert [len(axes.patches) for axes in figure.axes] == [2, 2, 2]


def test_the_bar_follows_a_merge(lively, tmp_path):
    bar = Bar()
    merge(lively, make_adapter(tmp_path / "a.safetensors", lively)[0], tmp_path / "m.pth", prove=False,
          progress=bar.report)
    assert bar.children[0].value == 1
