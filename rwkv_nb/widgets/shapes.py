"""Where a model's parameters sit, and what an adapter adds: the tables, pictures and controls of 02_inspect_shapes.

Nothing is loaded: counts come from names and shapes alone, so a 13.3B model is counted as fast as a tiny one.
"""

import html
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import ipywidgets as W
from matplotlib.figure import Figure

from .. import config
from ..config import LoraSettings
from ..lora.layers import adapter_parameters, attach, matching
from ..model import RWKV, Shape
from ..runs import Run
from ..words import number_text
from .common import errors_shown
from .panel_html import rows_html
from .plots import COLOURS, INK, TICK, plain, png, stacked_bars

# Parameters of the released models as their files have them, without block 0's unused v0 v1 v2.
KNOWN_TOTALS = {"0.1B": 191_034_624, "0.4B": 450_767_872, "1.5B": 1_527_404_544, "2.9B": 2_947_735_040,
                "v6 1.6B": 1_599_873_024}
RANKS = (4, 8, 16, 32, 64, 128, 256)
USUAL_SCALE = 2.0    # alpha / r
KINDS = {"embedding": COLOURS[5], "time mix": COLOURS[1], "low-rank gates": COLOURS[4], "channel mix": COLOURS[2],
         "vectors and norms": COLOURS[3], "head": COLOURS[0]}
_PARTS = {  # name: (kind, keys it takes); the first that fits takes a key
    "emb": ("embedding", r"emb\..*"),
    "blocks/ln": ("vectors and norms", r"blocks\.\d+\.ln\d\..*"),
    "blocks/att/x_r x_w x_k x_v x_a x_g": ("vectors and norms", r".*\.att\.x_."),
    "blocks/att/w0 w1 w2 (decay)": ("low-rank gates", r".*\.att\.w\d"),
    "blocks/att/a0 a1 a2 (in-context rate)": ("low-rank gates", r".*\.att\.a\d"),
    "blocks/att/v0 v1 v2 (value residual)": ("low-rank gates", r".*\.att\.v\d"),
    "blocks/att/g1 g2 (gate)": ("low-rank gates", r".*\.att\.g\d"),
    "blocks/att/time_maa_x w k v r g": ("vectors and norms", r".*\.att\.time_maa_."),
    "blocks/att/time_mix_k v r g": ("vectors and norms", r".*\.att\.time_mix_."),
    "blocks/att/time_maa_w1 w2 (token shift)": ("low-rank gates", r".*\.att\.time_maa_w\d"),
    "blocks/att/time_decay_w1 w2 (decay)": ("low-rank gates", r".*\.att\.time_decay_w\d"),
    "blocks/att/time_decay time_faaaa": ("vectors and norms", r".*\.att\.time_(decay|faaaa)"),
    "blocks/att/k_k k_a r_k": ("vectors and norms", r".*\.att\.(k_k|k_a|r_k)"),
    **{f"blocks/att/{name}": ("time mix", rf".*\.att\.{name}\.weight")
       for name in ("receptance", "key", "value", "output", "gate")},
    "blocks/att/ln_x": ("vectors and norms", r".*\.att\.ln_x\..*"),
    "blocks/ffn/x_k": ("vectors and norms", r".*\.ffn\.x_k"),
    **{f"blocks/ffn/time_{m}_k r": ("vectors and norms", rf".*\.ffn\.time_{m}_.") for m in ("maa", "mix")},
    **{f"blocks/ffn/{name}": ("channel mix", rf".*\.ffn\.{name}\.weight") for name in ("key", "receptance", "value")},
    "ln_out": ("vectors and norms", r"ln_out\..*"),
    "head": ("head", r"head\..*"),
}


@dataclass(frozen=True)
class Part:
    """One row of the table: tensors of one role, over all layers."""

    name: str                              # slash-named: blocks/att/key
    kind: str                              # a key of KINDS
    shapes: tuple[tuple[int, ...], ...]    # the different shapes among them
    tensors: int
    params: int
    lora: int                              # parameters an adapter adds here


def parts(shape: Shape, lora: LoraSettings | None = None) -> list[Part]:
    """A model's parameters by role, in the order of its file; every parameter is in exactly one part."""
    keys: dict[str, list[str]] = {name: [] for name in _PARTS}
    sizes, adds = shape.key_shapes(), _lora_params(shape, lora)
    for key in sizes:
        role = next(name for name, (_, pattern) in _PARTS.items() if re.fullmatch(pattern, key))
        keys[role].append(key)
    return [Part(name, _PARTS[name][0], tuple(dict.fromkeys(sizes[k] for k in mine)), len(mine),
                 sum(math.prod(sizes[k]) for k in mine), sum(adds.get(k, 0) for k in mine))
            for name, mine in keys.items() if mine]


def lora_params(shape: Shape, lora: LoraSettings) -> int:
    """Parameters of an adapter, by the formula: r · (in + out) for every linear it is given to."""
    return sum(_lora_params(shape, lora).values())


def attached_params(shape: Shape, lora: LoraSettings) -> int:
    """The same, counted on a model that really got the adapter (on the meta device: sizes without numbers)."""
    model = RWKV(shape, device="meta")
    attach(model, lora, seed=0)
    return sum(p.numel() for p in adapter_parameters(model))


def _lora_params(shape: Shape, lora: LoraSettings | None) -> dict[str, int]:
    """Parameters that an adapter adds, by the key of the weight that it is added to."""
    linears = shape.linears()
    names = matching(lora.target_modules, linears) if lora else ()
    return {f"{name}.weight": lora.r * sum(linears[name]) for name in names}


def table_html(shape: Shape, lora: LoraSettings | None = None) -> str:
    """The parts as an HTML table: name, shapes, tensors, parameters, share as a bar, what LoRA adds."""
    rows, total = parts(shape, lora), shape.n_params()
    head = ("name", "shape of one", "tensors", "parameters", "share", f"LoRA, r {lora.r}" if lora else "")
    foot = ("all", "", sum(p.tensors for p in rows), f"{total:,}", "", f"{lora_params(shape, lora):,}" if lora else "")
    return rows_html([head, *(_cells(part, part.params / total) for part in rows), [f"<b>{text}</b>" for text in foot]],
                     ("left", "left", "right", "right", "left", "right"))


def _cells(part: Part, share: float) -> tuple:
    shapes = " ".join(f"[{', '.join(map(str, s))}]" for s in part.shapes)
    bar = (f"<span style='display:inline-block;width:48px;text-align:right;margin-right:6px'>{share:.2%}</span>"
           f"<span style='display:inline-block;height:9px;width:{max(share * 150, 1):.0f}px;"
           f"background:{KINDS[part.kind]}'></span>")
    adds = f"{part.lora:,}" if part.lora else ""
    return f"<code style='font-size:11px'>{part.name}</code>", shapes, part.tensors, f"{part.params:,}", bar, adds


def share_figure(sizes: Mapping[str, Shape]) -> Figure:
    """A stacked bar for each size: which kinds of layers its parameters sit in."""
    shares = {name: {kind: sum(p.params for p in parts(shape) if p.kind == kind) / shape.n_params() for kind in KINDS}
              for name, shape in sizes.items()}
    figure, axes = stacked_bars(shares, KINDS)
    for kind, bars in zip(KINDS, axes.containers, strict=True):
        axes.bar_label(bars, fmt=lambda share: f"{share:.0%}" if share > 0.055 else "", label_type="center", fontsize=8,
                       color="white" if kind in ("time mix", "channel mix", "head") else "black")
    for i, shape in enumerate(sizes.values()):
        axes.text(1.01, i, number_text(shape.n_params()), va="center", fontsize=9, color=INK)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    axes.set_xlabel("share of all parameters", color=INK, fontsize=9)
    figure.legend(loc="upper center", ncols=6, frameon=False, fontsize=8.5, handlelength=1, columnspacing=1.4)
    return figure


def rank_figure(sizes: Mapping[str, Shape], chosen: str, lora: LoraSettings) -> Figure:
    """Parameters of an adapter over its rank, a line a size (both axes in powers of two) of the version that is chosen;
    the chosen one is thick."""
    figure = Figure(figsize=(5.6, 3.9), facecolor="white")
    axes = plain(figure.add_axes((0.135, 0.13, 0.70, 0.76)))
    ranks = sorted({*RANKS, lora.r})
    for name, shape in sizes.items():
        if shape.generation != sizes[chosen].generation:
            continue
        counts = [lora_params(shape, config.replace(lora, r=r)) for r in ranks]
        colour, width, weight = (COLOURS[1], 2.6, "bold") if name == chosen else (TICK, 0.9, "normal")
        axes.plot(ranks, counts, color=colour, lw=width, zorder=3 if name == chosen else 2)
        axes.annotate(name if len(name) < 12 else name[:11] + "…", (ranks[-1], counts[-1]), xytext=(5, -3),
                      textcoords="offset points", fontsize=8.5, color=colour, weight=weight, annotation_clip=False)
    here, total = lora_params(sizes[chosen], lora), sizes[chosen].n_params()
    axes.plot([lora.r], [here], "o", ms=8, color=COLOURS[1], zorder=4)
    axes.set_title(f"{chosen}, r {lora.r}: {number_text(here)} trained, {here / total:.2%} of the base",
                   loc="left", fontsize=10, color=INK)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(RANKS, map(str, RANKS))
    axes.set_xlim(ranks[0], ranks[-1])
    axes.yaxis.set_major_formatter(lambda y, _: number_text(y))
    axes.set_xlabel("rank r", color=INK, fontsize=9)
    axes.set_ylabel("parameters of the adapter", color=INK, fontsize=9)
    axes.minorticks_off()
    return figure


def advice_html(lora: LoraSettings) -> str:
    """What alpha / r means for the chosen values, and what to do about the learning rate."""
    scale = lora.lora_alpha / lora.r
    if scale == USUAL_SCALE:
        verdict = "alpha is twice r, as is usual: keep the learning rate as it is."
    else:
        if scale > USUAL_SCALE:
            moves, do = f"{scale / USUAL_SCALE:.3g}× further", "lower"
        else:
            moves, do = f"{USUAL_SCALE / scale:.3g}× less far" if scale else "nowhere", "raise"
        verdict = (f"{USUAL_SCALE:g} is usual. With {scale:.3g} each step moves the model {moves}: {do} lr_init by as "
                   f"much, or set alpha to {USUAL_SCALE * lora.r:g}.")
    return (f"<div style='font-size:13px;line-height:1.5'>The adapter is added with the scale "
            f"<b>alpha / r = {lora.lora_alpha:g} / {lora.r} = {scale:.3g}</b>; {verdict}</div>")


class ShapePanel(W.VBox):
    """Controls for size, r and alpha over a live table and picture. r and alpha go into run's settings.json at once.

    run:   where the choice is written
    sizes: shapes to look at, by name; the size is for looking, the base decides what is trained
    """

    def __init__(self, run: Run, sizes: Mapping[str, Shape], *, size: str, r: int, alpha: float):
        self.run, self.sizes = run, dict(sizes)
        narrow = W.Layout(width="auto")
        self._size = W.Dropdown(options=list(sizes), value=size, description="size", layout=narrow)
        self._r = W.SelectionSlider(options=sorted({*RANKS, r}), value=r, description="r", layout=narrow)
        self._alpha = W.BoundedFloatText(alpha, min=0, max=1e5, step=8, description="alpha", layout=narrow)
        self._table, self._advice, self._note = W.HTML(), W.HTML(), W.HTML()
        self._picture = W.Image(format="png", layout=W.Layout(max_width="560px"))
        left = W.VBox([self._size, self._r, self._alpha, self._advice, self._note], layout=W.Layout(width="330px"))
        super().__init__([W.HBox([left, self._picture], layout=W.Layout(flex_flow="row wrap")), self._table])
        self._r.observe(self._keep_scale, "value")
        for control in (self._size, self._alpha):
            control.observe(self._changed, "value")
        self._changed()

    @property
    def lora(self) -> LoraSettings:
        """LoRA settings of the run with the chosen r and alpha."""
        return config.replace(self.run.settings().lora, r=self._r.value, lora_alpha=self._alpha.value)

    def _keep_scale(self, change) -> None:
        if self._alpha.value:
            self._alpha.value *= change["new"] / change["old"]  # its own observer paints
        else:
            self._changed()

    def _changed(self, _=None) -> None:
        with errors_shown(self._note):
            self.run.update(r=self._r.value, lora_alpha=self._alpha.value)
            shape, lora = self.sizes[self._size.value], self.lora
            self._table.value, self._advice.value = table_html(shape, lora), advice_html(lora)
            self._picture.value = png(rank_figure(self.sizes, self._size.value, lora))
            self._note.value = ("<span style='font-size:12px;opacity:.7'>r and alpha are written to "
                                f"{html.escape(self.run.name)}/settings.json</span>")
