"""What notebook 01 shows of the data: safe, whole characters, true counts."""

import html
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_nb.data.chat import loss_mask
from rwkv_nb.data.convert import Progress
from rwkv_nb.data.sources import Document
from rwkv_nb.tokenizer import ByteTokenizer, WorldTokenizer
from rwkv_nb.widgets.common import Bar
from rwkv_nb.widgets.documents import (
    DocumentBrowser,
    LengthSlider,
    document_html,
    groups,
    length_figure,
)
from rwkv_nb.widgets.plots import png

WORLD, BYTE = WorldTokenizer(), ByteTokenizer()
CHAT = "User: 饸饹 <b>&🙂\n\nAssistant: 一种\t面食。"
both = pytest.mark.parametrize("tokenizer", [WORLD, BYTE], ids=["world", "byte"])


def document(text, tokenizer):
    tokens = np.array([*tokenizer.encode(text), 0], dtype=np.uint16)
    return Document(tokens, loss_mask(tokens, tokenizer))


@both
def test_groups_hold_whole_characters(tokenizer):
    chat = document(CHAT, tokenizer)
    found = list(groups(chat, tokenizer))
    assert "".join(g.text for g in found) == CHAT and found[-1] == ([0], "", True)
    assert [i for g in found for i in g.ids] == chat.tokens.tolist()
    assert {len(g.ids) for g in found if g.text in ("饸", "饹")} == {3}
    assert "".join(g.text for g in found if g.trained) == " 一种\t面食。"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 256), max_size=30))
def test_any_bytes_can_be_shown(ids):
    found = list(groups(Document(np.array(ids, dtype=np.uint16), np.ones(len(ids), dtype=bool)), BYTE))
    assert [i for g in found for i in g.ids] == ids


@both
def test_the_page_is_escaped_and_complete(tokenizer):
    page = document_html(document(CHAT, tokenizer), tokenizer)
    assert "<b>" not in page and page.count("<span") == page.count("</span>")
    body = re.sub("<[^>]*>", "", re.sub("<sub.*?</sub>", "", page.split("margin-top")[0]))
    assert html.unescape(body).replace("↵\n", "\n").replace("⇥\t", "\t").startswith(CHAT + "end")
    trained = document(CHAT, tokenizer).mask.sum()
    assert f"{trained} of {len(document(CHAT, tokenizer).tokens)} tokens" in page


def test_long_documents_are_cut_and_it_is_said():
    page = document_html(document("x" * 5000, BYTE), BYTE, most=100)
    assert "and 4,901 more tokens" in page and "5,001 of 5,001" in page and len(page) < 20_000


@pytest.mark.parametrize("sizes, ctx_len, told", [
    ([5], 512, "every document fits"), ([0, 1], 2, "every document fits"), ([513, 514], 512, "50.0% of the documents"),
    ([2, 30, 100_000], 1024, "33.3%"), ([99, 118, 147] * 50, 2, "100.0%"),
])
def test_length_figure_tells_the_share_that_is_split(sizes, ctx_len, told):
    figure = length_figure(np.array(sizes), ctx_len)
    (axes,) = figure.axes
    assert told in axes.texts[0].get_text()
    counts = sum(patch.get_height() for patch in axes.patches if patch.get_height())
    assert counts == sum(size > 0 for size in sizes)
    assert png(figure).startswith(b"\x89PNG")


def test_the_slider_tells_what_is_cut_and_padded():
    view = LengthSlider(np.array([10, 20, 30, 101]), 40, micro_bsz=4)
    assert "25.0% of the documents" in view.children[1].value and view.value == 40
    before = view.children[2].value
    view._slider.value = 20
    assert "50.0% of the documents" in view.children[1].value and view.children[2].value != before
    assert "padding" in view.children[1].value
    view._pack.value = True
    assert "no padding" in view.children[1].value and "ctx_len 20" in repr(view)


def test_the_browser_turns_to_every_document_and_stops_at_the_ends():
    documents = [document(f"User: {i}\n\nAssistant: answer {i}", BYTE) for i in range(3)]
    browser = DocumentBrowser(documents, BYTE)
    left, _, right, _ = browser.children[0].children
    for i, press in ((0, right), (1, right), (2, right), (2, left), (1, None)):
        assert browser.children[1].value == document_html(documents[i], BYTE)
        if press:
            press.click()
    browser.turn_to(-5)
    assert browser.children[1].value == document_html(documents[0], BYTE)


def test_the_bar_tells_speed_and_time_left():
    bar = Bar()
    bar.show(Progress(25_000_000, 100_000_000, 1234, 12.5, 6.0))
    assert bar.children[0].value == 0.25
    assert bar.children[1].value == "25.0 of 100.0 MB · 1,234 documents · 12.5 MB/s · 6 s left"
