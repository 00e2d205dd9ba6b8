"""Training text for the eye: how long documents are, and one of them token by token, coloured by what is trained.

The colours are translucent over the page's own, so that light and dark themes both work; trained tokens have a line
below them too, for readers who do not tell the colours apart.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from html import escape
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..data.sources import Document
from .plots import COLOURS, GRID, INK

_TRAINED = "background:rgba(0,158,115,.25);border-bottom:2px solid rgb(0,158,115)"
_SHOWN = "background:rgba(128,128,128,.14);border-bottom:2px solid transparent"
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
    axes = figure.add_axes((0.09, 0.19, 0.89, 0.68))
    fits = sizes <= ctx_len + 1  # one token more: the last one is only a target
    axes.hist([sizes[fits], sizes[~fits]], bins=edges, stacked=True, color=[COLOURS[0], COLOURS[1]])
    axes.axvline(ctx_len + 1.5, color=COLOURS[1], lw=1.6, ls="--")
    axes.set_xscale("log" if edges[-1] / edges[0] > 100 else "linear")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True, steps=(1, 2, 5, 10)))
    left, right = axes.get_xlim()
    axes.set_xlim(left, max(right, ctx_len * 1.02))
    middle = np.sqrt(left * right) if axes.get_xscale() == "log" else (left + right) / 2
    axes.annotate(f" ctx_len {ctx_len}: {_split_text(fits)} ", (ctx_len + 1.5, 1), xycoords=("data", "axes fraction"),
                  ha="right" if ctx_len > middle else "left", va="bottom", fontsize=9, color=INK, annotation_clip=False)
    axes.set_xlabel("tokens in a document", color=INK)
    axes.set_ylabel("documents", color=INK)
    axes.grid(color=GRID, lw=0.8, axis="y")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=INK)
    return figure


def _edges(sizes: np.ndarray, ctx_len: int) -> np.ndarray:
    """Edges of some 40 bins; each wider than the one before where lengths differ by orders of magnitude.

    Else a bin takes whole numbers of tokens, and one begins with the first length that ctx_len splits.
    """
    low, high = max(int(sizes.min()), 1), int(sizes.max()) + 1
    if high / low > 100:
        return np.geomspace(low, high, 41)
    width = -(-(high - low) // 40)
    return np.arange(low - (low - ctx_len - 2) % width, high + width, width) - 0.5


def _split_text(fits: np.ndarray) -> str:
    if fits.all():
        return "every document fits"
    return f"{1 - fits.mean():.1%} of the documents are split"


def groups(document: Document, tokenizer) -> Iterator[Group]:
    """A document's tokens, those that hold parts of one character together."""
    decoder, ids, trained = codecs.getincrementaldecoder("utf-8")(), [], False
    for token, mask in zip(document.tokens.tolist(), document.mask.tolist(), strict=True):
        if token == 0:  # nothing can be completed behind the end of a document
            if ids:
                yield Group(ids, tokenizer.decode(ids), trained)
            yield Group([0], "", mask)
            ids, trained = [], False
            decoder.reset()
            continue
        ids, trained = [*ids, token], trained or mask
        try:
            decoder.decode(tokenizer.token_bytes(token))
            whole = not decoder.getstate()[0]
        except UnicodeDecodeError:
            whole = True
        if whole:
            yield Group(ids, tokenizer.decode(ids), trained)
            ids, trained = [], False
            decoder.reset()
    if ids:
        yield Group(ids, tokenizer.decode(ids), trained)


def document_html(document: Document, tokenizer, *, most: int = 2000) -> str:
    """A document as the model sees it: a box a token, its id as a tooltip, trained ones coloured; a legend below.

    Documents longer than `most` tokens are cut there, which is said.
    """
    shown = Document(document.tokens[:most], document.mask[:most])
    runs, last = [], None
    for group in groups(shown, tokenizer):
        if group.trained is not last:  # one coloured stretch for neighbours that are alike keeps the page small
            runs.append(f"</span>{_open(group.trained)}" if runs else _open(group.trained))
            last = group.trained
        runs.append(_token_html(group))
    more = len(document.tokens) - len(shown.tokens)
    rest = f'<span style="{_MARK}"> … and {more:,} more tokens</span>' if more else ""
    return (f'<div style="font-family:var(--jp-code-font-family,monospace);font-size:13px;line-height:1.9;'
            f'white-space:pre-wrap;overflow-wrap:anywhere">{"".join(runs)}{"</span>" if runs else ""}{rest}</div>'
            + _legend(document))


def _open(trained: bool) -> str:
    return f'<span style="{_TRAINED if trained else _SHOWN}">'


def _token_html(group: Group) -> str:
    text = escape(group.text)
    text = text.replace("\r", f'<span style="{_MARK}">␍</span>').replace("\t", f'<span style="{_MARK}">⇥</span>\t')
    text = text.replace("\n", f'<span style="{_MARK}">↵</span>\n')
    if group.ids == [0]:
        text = f'<span style="{_MARK}">end</span>'
    elif len(group.ids) > 1:
        text += f'<sub style="{_MARK}">{len(group.ids)}</sub>'
    ids = " ".join(map(str, group.ids))
    return f'<span style="{_TOKEN}" title="{ids}">{text}</span>'


def _legend(document: Document) -> str:
    trained, n = int(document.mask.sum()), len(document.tokens)
    parts = (f'{_open(True)} trained </span> {trained:,} of {n:,} tokens ({trained / max(n, 1):.0%})',
             f"{_open(False)} only shown </span>",
             "字<sub>3</sub> a character in 3 tokens", "↵ a line ends", "end: id 0 closes the document")
    return (f'<div style="margin-top:6px;font-size:12px;line-height:1.8;opacity:.85">{" · ".join(parts)}'
            "</div>")
