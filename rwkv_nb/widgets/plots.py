"""Figures of a run, through matplotlib's object API: no pyplot, no state, so any thread may paint.

Rows are those of metrics.jsonl: steps (`step`, `loss`, `lr`, `tokens_per_s`, …) and events (`step`, `event`, …).
Colours: Okabe & Ito's eight, told apart by colour-blind readers too; the background is opaque, for dark pages.
"""

import functools
import io
import warnings
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
INK, GRID, TICK = "#333333", "#e3e3e3", "#7a7a7a"
_DASHES = ("-", "--", ":", "-.")
_MOST_POINTS = 1500    # a line has no more; beyond that, each pair of points is the least and the most of a bin
_LABEL_LEVELS = 3      # labels of changes stand on so many levels above the plot
_TOLD = {"pause": "paused", "skip": "skipped"}
_CJK = ("Noto Sans CJK SC", "Source Han Sans SC", "Noto Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei",
        "Microsoft YaHei", "SimHei", "PingFang SC", "Droid Sans Fallback")


def png(figure: Figure, dpi: int = 100) -> bytes:
    """The figure as the bytes of a PNG file."""
    out = io.BytesIO()
    figure.set_dpi(dpi)
    with warnings.catch_warnings():  # where no font has Chinese, boxes say so; a warning a second would not help
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        FigureCanvasAgg(figure).print_png(out, pil_kwargs={"compress_level": 3})  # savefig would lay out twice
    return out.getvalue()


def plain(axes: Axes, grid: str = "both") -> Axes:
    """Axes in the project's plain dress: a faint grid (along "x", "y" or both) behind the data, no frame."""
    axes.grid(color=GRID, lw=0.8, axis=grid)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=INK)
    return axes


def stacked_bars(rows: Mapping[str, Mapping[str, float]], colours: Mapping[str, str]) -> tuple[Figure, Axes]:
    """A bar a row, from the top down, its parts side by side; colours: of each part, in order. Room for a legend."""
    height = 1.05 + 0.32 * len(rows)
    figure = Figure(figsize=(8.6, height), facecolor="white")
    axes = figure.add_axes((0.11, 0.5 / height, 0.78, 1 - 0.95 / height))
    left = np.zeros(len(rows))
    for part, colour in colours.items():
        widths = np.array([parts[part] for parts in rows.values()])
        axes.barh(list(rows), widths, left=left, color=colour, label=part, height=0.72)
        left += widths
    axes.invert_yaxis()
    axes.tick_params(labelsize=9, colors=INK, length=0)
    axes.spines[:].set_visible(False)
    return figure, axes


def loss_figure(rows: Sequence[Mapping], *, title: str = "", smooth: float | None = None) -> Figure:
    """Loss (thin) and smoothed loss (thick) over steps, a labelled tick at each change, a mark at each save, lr below.

    rows:   metrics.jsonl, steps and events in order
    smooth: width of the smoothed line's window in steps (a Gaussian's standard deviation); None takes a fiftieth
    """
    step, loss, lr = _columns(rows, "loss", "lr")
    changes = _changes(rows)
    heldout = [(row["step"], row["heldout_loss"]) for row in rows
               if row.get("event") == "eval" and np.isfinite(row["heldout_loss"])]
    at = [*step[:1], *step[-1:], *(x for x, _ in (*changes, *heldout))] or [0, 1]
    limits = min(at) - 0.5, max(at) + max(0.5, 0.01 * (max(at) - min(at)))
    labels = _place_labels(changes, limits)
    above = 0.14 + 0.17 * (1 + max((level for _, _, level, _ in labels), default=-1)) + (0.26 if title else 0.04)
    figure, (top, low) = _panels(7.6, 3.3 + above, above, ((0, 1, 0.30, 1), (0, 1, 0, 0.19)))
    if not len(step):
        top.text(0.5, 0.5, "the first step is still to come", transform=top.transAxes, ha="center", color=TICK)
    else:
        _draw_loss(top, step, loss, smooth, COLOURS[0], [y for _, y in heldout])
        if heldout:
            top.plot(*zip(*heldout, strict=True), color=COLOURS[3], lw=1.6, marker="D", ms=4, label="held out")
        saves = [row["step"] for row in rows if row.get("event") == "save"]
        if saves:
            top.plot(saves, np.zeros(len(saves)), ls="", marker="^", ms=6, color=COLOURS[2], label="saved",
                     transform=top.get_xaxis_transform(), clip_on=False, zorder=3)
        top.legend(loc="upper right", framealpha=0.8, edgecolor="none", fontsize=8)
        low.plot(*_decimated(step, lr), color=COLOURS[1], lw=1.4, marker="" if len(step) > 1 else "o")
    for axes in (top, low):
        axes.set_xlim(*limits)
    top.tick_params(labelbottom=False)
    top.set_ylabel("loss", color=INK)
    low.set_ylim(bottom=0)
    low.yaxis.set_major_formatter(lambda value, _: _value(value))
    low.set_ylabel("lr", color=INK)
    low.set_xlabel("optimizer step", color=INK)
    _draw_changes(top, low, labels)
    if title:
        figure.text(0.5, 1 - 0.08 / figure.get_figheight(), title, ha="center", va="top", fontsize=11, color=INK,
                    fontfamily=_families(), parse_math=False)
    return figure


def compare_figure(runs: Mapping[str, Sequence[Mapping]], *, smooth: float | None = None) -> Figure:
    """Runs side by side: loss, smoothed loss, learning rate, tokens/s, each over steps. runs: rows by name."""
    levels = -(-max(len(runs), 1) // 4)
    boxes = ((0, 0.45, 0.58, 1), (0.55, 1, 0.58, 1), (0, 0.45, 0, 0.42), (0.55, 1, 0, 0.42))
    figure, (raw, smoothed, low, speed) = _panels(9.6, 5.4 + 0.22 * levels, 0.36 + 0.22 * levels, boxes)
    lines = []
    for i, rows in enumerate(runs.values()):
        style = {"color": COLOURS[i % len(COLOURS)], "ls": _DASHES[i // len(COLOURS) % len(_DASHES)]}
        step, loss, lr, rate = _columns(rows, "loss", "lr", "tokens_per_s")
        raw.plot(*_decimated(step, loss), lw=0.9, **style)
        lines += smoothed.plot(*_smoothed(step, loss, smooth), lw=2, **style)
        low.plot(*_decimated(step, lr), lw=1.5, **style)
        speed.plot(*_smoothed(step, rate, smooth), lw=1.5, **style)
    for axes, name in ((raw, "loss"), (smoothed, "loss, smoothed"), (low, "learning rate"), (speed, "tokens/s")):
        axes.set_title(name, loc="left", fontsize=10, color=INK)
    for axes in (raw, smoothed):
        axes.tick_params(labelbottom=False)
    for axes in (low, speed):
        axes.set_xlabel("optimizer step", color=INK)
        axes.set_ylim(bottom=0)
    low.yaxis.set_major_formatter(lambda value, _: _value(value))
    speed.yaxis.set_major_formatter(EngFormatter(sep=""))
    if lines:
        names = [name if len(name) <= 28 else name[:27] + "…" for name in runs]
        legend = figure.legend(lines, names, loc="upper left", ncols=4, frameon=False,
                               prop={"family": _families(), "size": 9})
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure


def _panels(width: float, height: float, above: float, boxes: Iterable[tuple]) -> tuple[Figure, list[Axes]]:
    """A figure (inches) with axes in boxes (left, right, bottom, top, as shares of the room inside fixed margins).

    Margins by hand: matplotlib's layout engines cost more than the drawing itself.
    """
    figure = Figure(figsize=(width, height), facecolor="white")
    x0, x1 = 0.72 / width, 1 - 0.18 / width
    y0, y1 = 0.50 / height, 1 - above / height
    made = []
    for left, right, bottom, top in boxes:
        axes = plain(figure.add_axes((x0 + left * (x1 - x0), y0 + bottom * (y1 - y0),
                                      (right - left) * (x1 - x0), (top - bottom) * (y1 - y0))))
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1, steps=(1, 2, 5, 10)))
        axes.yaxis.set_major_locator(MaxNLocator(5 if top - bottom > 0.3 else 2, steps=(1, 2, 2.5, 5, 10)))
        made.append(axes)
    return figure, made


def _draw_loss(axes: Axes, step, loss, smooth, colour, others: list[float]) -> None:
    """The two lines, and limits that hold `others` too, and that one spike does not stretch."""
    many = len(step) > 1
    axes.plot(*_decimated(step, loss), color=colour, lw=0.8, alpha=0.4, label="each step", marker="" if many else "o")
    x, y = _smoothed(step, loss, smooth)
    axes.plot(x, y, color=colour, lw=2.2, label="smoothed", marker="" if many else "o")
    highest = max(min(loss.max(), max(np.quantile(loss, 0.99), 2 * y.max())), *others, -np.inf)
    lowest = min(loss.min(), y.min(), *others)
    room = 0.08 * (highest - lowest) or 0.05 * abs(highest) or 1.0
    bottom = 0 if 0 <= lowest < 0.4 * highest else lowest - room
    axes.set_ylim(bottom, highest + room)


def _draw_changes(top: Axes, low: Axes, labels: list[tuple]) -> None:
    """A dashed line through both panels, a mark and a label above it."""
    at = sorted({x for x, *_ in labels})
    for axes in (top, low):
        axes.vlines(at, 0, 1, transform=axes.get_xaxis_transform(), color=TICK, lw=0.9, ls=(0, (2, 2)))
    top.plot(at, [1] * len(at), "v", ms=5, color=COLOURS[1], transform=top.get_xaxis_transform(), clip_on=False)
    for x, text, level, side in labels:
        if text:
            top.annotate(text, (x, 1), xycoords=("data", "axes fraction"), xytext=(0, 4 + 12 * level), ha=side,
                         textcoords="offset points", fontsize=8, color=INK, annotation_clip=False)


def _columns(rows: Sequence[Mapping], *names: str) -> tuple[np.ndarray, ...]:
    """Step numbers and the named figures of the step rows, events left out; what is no number is left out too."""
    table = np.array([[row["step"], *(row.get(name, 0) for name in names)] for row in rows if "loss" in row], float)
    table = table.reshape(-1, 1 + len(names))
    return tuple(table[np.isfinite(table).all(1)].T)


def _bins(n: int) -> np.ndarray:
    """Where bins begin, for n points in at most half of _MOST_POINTS bins."""
    return np.unique(np.linspace(0, n, min(n, _MOST_POINTS // 2), endpoint=False).astype(int))


def _decimated(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same line with at most _MOST_POINTS points: the least and the most of each bin, so no spike is lost."""
    if len(x) <= _MOST_POINTS:
        return x, y
    starts = _bins(len(x))
    ends = np.stack([np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)], 1)
    return np.repeat(x[starts], 2), ends.reshape(-1)


def _smoothed(x: np.ndarray, y: np.ndarray, steps: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Means under a Gaussian window (it does not lag behind), of bins' means where there are many points."""
    if len(x) > _MOST_POINTS:
        starts = _bins(len(x))
        if steps is not None:
            steps *= len(starts) / len(x)
        x, y = x[starts], np.add.reduceat(y, starts) / np.diff(starts, append=len(y))
    if not len(x):
        return x, y
    width = max(len(x) / 50 if steps is None else steps, 0.1)
    reach = int(np.ceil(3 * width))
    window = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    total, weight = (np.convolve(line, window)[reach: reach + len(x)] for line in (y, np.ones(len(x))))
    return x, total / weight


def _changes(rows: Sequence[Mapping]) -> list[tuple[float, str]]:
    """(step, text) of each change and pause; a value changed again within one step counts once."""
    changed: dict[tuple, list] = {}
    for row in rows:
        event = row.get("event")
        if event == "change":
            changed.setdefault((row["step"], row["name"]), [row["from"], None])[1] = row["to"]
        elif event in _TOLD:
            changed[row["step"], _TOLD[event]] = []
    return [(step, f"{name} {_value(values[0])} → {_value(values[1])}" if values else name)
            for (step, name), values in changed.items()]


def _value(value) -> str:
    """2e-4 where Python writes 0.0002 or 2e-04."""
    if not isinstance(value, float):
        return str(value)
    if value == 0 or 0.01 <= abs(value) < 1000:
        return f"{value:.3g}"
    return np.format_float_scientific(value, precision=2, trim="-", exp_digits=1)


def _place_labels(changes: list[tuple[float, str]], limits: tuple[float, float]) -> list[tuple[float, str, int, str]]:
    """(step, text, level, side): a label takes the lowest level with room; where none has, the last one counts +1."""
    begin, end = limits
    free, placed, more = [-np.inf] * _LABEL_LEVELS, [], {}
    for x, text in changes:
        at, width = (x - begin) / (end - begin), 0.0105 * (len(text) + 4)  # 8-point letters; room for " +9"
        side = "left" if at + width < 1.02 else "right"
        left = at if side == "left" else at - width
        level = next((i for i, taken in enumerate(free) if taken <= left), None)
        if level is None:
            last = max(i for i, (_, label, *_) in enumerate(placed) if label)
            more[last] = more.get(last, 0) + 1
            placed.append((x, "", 0, side))
        else:
            free[level] = left + width
            placed.append((x, text, level, side))
    return [(x, f"{text} +{more[i]}" if i in more else text, *rest) for i, (x, text, *rest) in enumerate(placed)]


@functools.cache
def _families() -> list[str]:
    """Font families for text that may be Chinese: the first one found here behind matplotlib's own."""
    here = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *[name for name in _CJK if name in here][:1]]
