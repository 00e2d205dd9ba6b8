"""Training text for the eye: how long documents are against a ctx_len that a slider moves, and the documents one by
one, token by token, coloured by what is trained.

The colours are translucent over the page's own, so that light and dark themes both work; trained tokens have a line
below them too, for readers who do not tell the colours apart.
"""

import codecs
import itertools
from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

import ipywidgets as widgets
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..data.estimate import Fit, fit
from ..data.sources import Document
from .common import button
from .plots import COLOURS, INK, plain, png

_OPEN = {True: '<span style="background:rgba(0,158,115,.25);border-bottom:2px solid rgb(0,158,115)">',   # trained
         False: '<span style="background:rgba(128,128,128,.14);border-bottom:2px solid transparent">'}
_TOKEN = "border-left:1px solid rgba(128,128,128,.55);padding:0 1px"
_MARK = "opacity:.55;font-size:.8em"  # what stands for something that cannot be seen


class Group(NamedTuple):
    """Tokens that make whole characters together: one as a rule, several where a character is cut."""

    ids: list[int]
    text: str       # "" for the closing 0
    trained: bool


def length_figure(sizes: np.ndarray, ctx_len: int) -> Figure:
    """Histogram of document lengths in tokens (int [n]), with ctx_len and the share of documents it splits."""
    sizes = np.asarray(sizes)
    edges = _edges(sizes, ctx_len)
    figure = Figure(figsize=(7.6, 2.9), facecolor="white")
    axes = plain(figure.add_axes((0.09, 0.19, 0.89, 0.68)), grid="y")
    fits = sizes <= ctx_len + 1  # one token more: the last one is only a target
    axes.hist([sizes[fits], sizes[~fits]], bins=edges, stacked=True, color=[COLOURS[0], COLOURS[1]])
    axes.axvline(ctx_len + 1.5, color=COLOURS[1], lw=1.6, ls="--")
    axes.set_xscale("log" if edges[-1] / edges[0] > 100 else "linear")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True, steps=(1, 2, 5, 10)))
    left, right = axes.get_xlim()
    axes.set_xlim(left, max(right, ctx_len * 1.02))
    middle = np.sqrt(left * right) if axes.get_xscale() == "log" else (left + right) / 2
    told = "every document fits" if fits.all() else f"{1 - fits.mean():.1%} of the documents are split"
    axes.annotate(f" ctx_len {ctx_len}: {told} ", (ctx_len + 1.5, 1), xycoords=("data", "axes fraction"), va="bottom",
                  ha="right" if ctx_len > middle else "left", fontsize=9, color=INK, annotation_clip=False)
    axes.set_xlabel("tokens in a document", color=INK)
    axes.set_ylabel("documents", color=INK)
    return figure


def _edges(sizes: np.ndarray, ctx_len: int) -> np.ndarray:
    """Edges of some 40 bins; each wider than the one before where lengths differ by orders of magnitude.

    Else a bin takes whole numbers of tokens, and one begins with the first length that ctx_len splits.
    """
    low, high = max(int(sizes.min()), 1), int(sizes.max()) + 1
    if high / low > 100:
        return np.geomspace(low, high, 41)
    width = -(-(high - low) // 40)
    first = low - (low - (ctx_len + 2)) % width     # so that ctx_len + 2, which is split, begins a bin
    return np.arange(first, high + width, width) - 0.5


def groups(document: Document, tokenizer) -> Iterator[Group]:
    """A document's tokens, those that hold parts of one character together."""
    ids, trained, characters = [], False, codecs.getincrementaldecoder("utf-8")("replace")
    for token, mask in zip(document.tokens.tolist(), document.mask.tolist(), strict=True):
        cut, _ = characters.getstate()     # the bytes of a character that is not complete
        if ids and (token == 0 or ids == [0] or not cut):
            yield Group(ids, tokenizer.decode(ids), trained)
            ids, trained = [], False
            characters.reset()
        ids, trained = [*ids, token], trained or mask
        characters.decode(tokenizer.table[token])
    if ids:
        yield Group(ids, tokenizer.decode(ids), trained)


def document_html(document: Document, tokenizer, *, most: int = 2000) -> str:
    """A document as the model sees it: a box a token, its id as a tooltip, trained ones coloured; a legend below.

    Documents longer than `most` tokens are cut there, which is said.
    """
    shown = Document(document.tokens[:most], document.mask[:most])
    # one coloured stretch for neighbours that are alike keeps the page small
    runs = [f"{_OPEN[trained]}{''.join(map(_token_html, alike))}</span>"
            for trained, alike in itertools.groupby(groups(shown, tokenizer), lambda group: group.trained)]
    more = len(document.tokens) - len(shown.tokens)
    rest = f'<span style="{_MARK}"> … and {more:,} more tokens</span>' if more else ""
    trained, n = int(document.mask.sum()), len(document.tokens)
    legend = (f'{_OPEN[True]} trained </span> {trained:,} of {n:,} tokens ({trained / max(n, 1):.0%})',
              f"{_OPEN[False]} only shown </span>",
              "字<sub>3</sub> a character in 3 tokens", "↵ a line ends", "end: id 0 closes the document")
    return (f'<div style="font-family:var(--jp-code-font-family,monospace);font-size:13px;line-height:1.9;'
            f'white-space:pre-wrap;overflow-wrap:anywhere">{"".join(runs)}{rest}</div>'
            f'<div style="margin-top:6px;font-size:12px;line-height:1.8;opacity:.85">{" · ".join(legend)}</div>')


def _token_html(group: Group) -> str:
    text = escape(group.text)
    for hidden, mark, kept in (("\r", "␍", ""), ("\t", "⇥", "\t"), ("\n", "↵", "\n")):
        text = text.replace(hidden, f'<span style="{_MARK}">{mark}</span>{kept}')
    if group.ids == [0]:
        text = f'<span style="{_MARK}">end</span>'
    elif len(group.ids) > 1:
        text += f'<sub style="{_MARK}">{len(group.ids)}</sub>'
    ids = " ".join(map(str, group.ids))
    return f'<span style="{_TOKEN}" title="{ids}">{text}</span>'


class LengthSlider(widgets.VBox):
    """Documents' lengths (int [n], tokens) against a ctx_len that can be moved: what is cut, what is padding.

    `value` is the ctx_len that is chosen.
    """

    def __init__(self, sizes: np.ndarray, ctx_len: int, micro_bsz: int = 8):
        self._sizes, self._micro_bsz = np.asarray(sizes), micro_bsz
        longest = max(int(self._sizes.max()), ctx_len, 3)
        # at 2, 4, 6 … or, of long documents, at steps of 16: a slider has few places
        step = 2 if longest <= 1024 else 16
        self._slider = widgets.IntSlider(ctx_len, 2, -(-longest // step) * step, step, description="ctx_len",
                                         continuous_update=False, layout={"width": "420px"})
        self._pack = widgets.Checkbox(False, description="packed", indent=False)
        self._text, self._image = widgets.HTML(), widgets.Image(format="png", layout={"max_width": "720px"})
        self._slider.observe(self._show, "value")
        self._pack.observe(self._show, "value")
        super().__init__([widgets.HBox([self._slider, self._pack]), self._text, self._image])
        self._show()

    def __repr__(self) -> str:
        return f"LengthSlider({len(self._sizes)} documents, ctx_len {self.value})"

    @property
    def value(self) -> int:
        return self._slider.value

    def _show(self, _=None) -> None:
        self._text.value = escape(fit_text(fit(self._sizes, self.value, self._micro_bsz), self._pack.value))
        self._image.value = png(length_figure(self._sizes, self.value))


def fit_text(found: Fit, packed: bool) -> str:
    """A Fit in a sentence."""
    rest = f"packed into {found.rows:,} rows or a few more, no padding" if packed else f"{found.padding:.1%} padding"
    return (f"{found.cut:.1%} of the documents are split (cutting would lose {found.lost:.1%} of the tokens) · "
            f"{found.pieces:,} pieces · {rest}")


class DocumentBrowser(widgets.VBox):
    """Documents one by one, as document_html shows them; `turn_to(i)` shows document i (from 0)."""

    def __init__(self, documents: Sequence[Document], tokenizer, most: int = 2000):
        self._documents, self._tokenizer, self._most = documents, tokenizer, most
        self._number = widgets.BoundedIntText(1, 1, len(documents), description="document", layout={"width": "180px"})
        back = button("◀", lambda: self.turn_to(self._number.value - 2), width="44px")
        on = button("▶", lambda: self.turn_to(self._number.value), width="44px")
        self._page = widgets.HTML()
        self._number.observe(self._show, "value")
        super().__init__([widgets.HBox([back, self._number, on, widgets.HTML(f"of {len(documents):,}")]), self._page])
        self._show()

    def __repr__(self) -> str:
        return f"DocumentBrowser({len(self._documents)} documents)"

    def turn_to(self, i: int) -> None:
        """Show document i; behind either end, to the last one there."""
        self._number.value = min(max(i, 0), len(self._documents) - 1) + 1

    def _show(self, _=None) -> None:
        self._page.value = document_html(self._documents[self._number.value - 1], self._tokenizer, most=self._most)
