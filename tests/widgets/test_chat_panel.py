"""Side by side: each column writes what generation alone would; stop, new talk, save and restore."""

import time

import pytest
from lora_files import make_adapter, make_base

from rwkv_nb.data.chat import prompt
from rwkv_nb.generate import generate
from rwkv_nb.lora.layers import lora_layers, strength
from rwkv_nb.tokenizer import get_tokenizer
from rwkv_nb.widgets.chat import SHOWN, ChatPanel

BYTES = get_tokenizer("byte")
HOW = {"temperature": 0.7, "top_p": 0.8, "presence": 0.1, "frequency": 0.2, "seed": 4, "max_tokens": 15}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    return make_adapter(folder / "a.safetensors", make_base(folder / "base.pth"))[1]


@pytest.fixture
def panel(model, tmp_path):
    panel = ChatPanel({"base": (model, 0), "adapter": (model, 1)}, BYTES, folder=tmp_path, question="Hello <b>?")
    for name, value in HOW.items():
        panel.sampling[name].value = value
    return panel


def press(panel, name):
    next(b for b in panel.children[1].children if getattr(b, "description", "") == name).click()


@pytest.mark.parametrize("thinking, template", [
    ("as trained", "chat"), ("thinking", "g1"), ("no thinking", "g1_nothink")])
def test_columns_answer_the_same_question_with_the_same_seed(panel, model, thinking, template):
    panel.thinking.value = thinking
    press(panel, "Send")
    written = panel.join()
    for name, value in (("base", 0), ("adapter", 1)):
        with strength(model, value):
            expected, = generate(model, BYTES, [prompt("Hello <b>?", template)], stop=("\n\n",), **HOW)
        assert written[name].startswith("▸ Hello <b>?\n" + expected)
        assert "Hello &lt;b&gt;?" in panel._views[name].value
    assert written["base"] != written["adapter"]
    assert {layer.strength for layer in lora_layers(model).values()} == {1.0}


def test_save_restore_and_a_new_talk(panel, tmp_path):
    first = (press(panel, "Send"), panel.join())[1]
    press(panel, "Save")
    assert {p.name for p in tmp_path.iterdir()} == {"talk-base.st", "talk-adapter.st"}
    second = (press(panel, "Send"), panel.join())[1]
    press(panel, "New talk")
    assert panel.texts == {"base": "", "adapter": ""}
    assert (press(panel, "Send"), panel.join())[1] == first
    press(panel, "Restore")
    again = (press(panel, "Send"), panel.join())[1]
    for name in second:
        assert again[name] == second[name]


def test_stop_ends_it_and_what_is_shown_is_bounded(panel):
    panel.sampling["max_tokens"].value = 10**6
    panel.texts["base"] = "x" * 10**6
    press(panel, "Send")
    press(panel, "Send")
    assert "Stop first" in panel.said.value
    time.sleep(0.3)
    press(panel, "Stop")
    assert len(panel.join()["base"]) < SHOWN + 10_000


def test_an_error_is_shown(panel, tmp_path):
    press(panel, "Restore")
    assert "no such file" in panel.said.value
