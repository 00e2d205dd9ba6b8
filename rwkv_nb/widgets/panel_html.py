"""The panel's texts as HTML: everything that came from data, models or errors is escaped.

Colours are the page's own, made fainter by opacity, so that light and dark themes both work.
"""

import re
from collections.abc import Iterable, Sequence
from html import escape
from itertools import repeat

from ..errors import RwkvNbError
from ..train.snapshot import Sample, Snapshot
from ..words import bytes_text, duration_text

LINE = "1px solid rgba(128,128,128,.35)"
STATUS = {  # status: (colour of the badge, what it means)
    "ready": ("#6c757d", "press Start"),
    "preparing": ("#6c757d", "loading the base model and the data"),
    "training": ("#1f77b4", ""),
    "pausing": ("#b8860b", "after the step that is under way"),
    "paused": ("#b8860b", "press Resume to go on"),
    "saving": ("#1f77b4", "writing the files, then the adapter answers the prompts"),
    "stopping": ("#b8860b", "after the step that is under way, with everything saved"),
    "finished": ("#2e8b57", "everything is saved"),
    "stopped": ("#6c757d", "everything is saved; run this cell again to go on from here"),
    "failed": ("#c0392b", "the reason is below"),
}


def status_html(name: str, status: str) -> str:
    """The run's name and a coloured badge."""
    colour, meaning = STATUS[status]
    return (f'<span style="font-size:1.15em;font-weight:600">{escape(name)}</span> '
            f'<span style="background:{colour};color:white;border-radius:9px;padding:2px 10px;margin:0 .6em">'
            f'{status}</span><span style="opacity:.7">{meaning}</span>')


def figures_html(snapshot: Snapshot, epoch_count: int) -> str:
    """Step, epoch, loss, speed, memory and time left, each under its caption."""
    row = next((row for row in reversed(snapshot.rows) if "loss" in row), None)
    heldout = [row["heldout_loss"] for row in snapshot.rows if row.get("event") == "eval"]
    seconds = None if snapshot.done else snapshot.seconds_left
    figures = {"step": f"{snapshot.step} / {snapshot.total_steps}" if snapshot.total_steps else "–",
               "epoch": f"{snapshot.epochs:.2f} / {epoch_count}",
               "loss": f"{row['loss']:.4f}" if row else "–"}
    if heldout:
        figures["held-out loss"] = f"{heldout[-1]:.4f}"
    figures |= {"learning rate": f"{row['lr']:.2e}" if row else "–",
                "tokens/s": f"{row['tokens_per_s']:,.0f}" if row else "–",
                "peak memory": bytes_text(row["peak_memory_mb"] * 1e6) if row else "–",
                "time left": "–" if seconds is None else duration_text(seconds)}
    cells = (f'<div style="min-width:5.2em"><div style="opacity:.65;font-size:.85em">{caption}</div>'
             f'<div style="font-weight:600;font-variant-numeric:tabular-nums">{escape(value)}</div></div>'
             for caption, value in figures.items())
    return ('<div style="display:flex;flex-wrap:wrap;gap:4px 20px;line-height:1.4;margin:4px 0 8px">'
            f'{"".join(cells)}</div>')


def notices_html(notices: Iterable[str]) -> str:
    """A sentence a line; warnings stand out."""
    return "".join(f'<div style="line-height:1.5;{"font-weight:600" if text.startswith("WARNING") else "opacity:.8"}">'
                   f"• {escape(text)}</div>" for text in notices)


def error_html(error: BaseException) -> str:
    """What is wrong, where, and what to do about it."""
    rows = [("", f"{type(error).__name__}: {error}")]
    if isinstance(error, RwkvNbError):
        rows = [("", error.what), ("where", error.where), ("what to do", error.fix)]
    lines = "".join(f'<div style="white-space:pre-wrap;overflow-wrap:anywhere">'
                    f'{f"<b>{caption}:</b> " if caption else ""}{escape(text)}</div>' for caption, text in rows if text)
    return ('<div style="border-left:4px solid #c0392b;background:rgba(192,57,43,.12);padding:8px 12px;'
            f'line-height:1.5">{lines}</div>')


def rows_html(rows: Iterable[Sequence], sides: Iterable[str] = repeat("right")) -> str:
    """Cells of HTML as a small table, the first row its head; sides: "left" or "right" for each column."""
    lines, kind = [], "th"
    for row in rows:
        cells = (f'<{kind} style="text-align:{side};padding:1px 9px;border:0">{text}</{kind}>'
                 for side, text in zip(sides, row, strict=False))
        lines.append(f'<tr style="background:none">{"".join(cells)}</tr>')
        kind = "td"
    return ('<div style="overflow-x:auto;white-space:nowrap"><table style="border-collapse:collapse;font-size:12px;'
            f'line-height:1.4">{"".join(lines)}</table></div>')


def samples_html(samples: Iterable[Sample]) -> str:
    """Base and adapter side by side, the newest save first."""
    samples = sorted(samples, key=lambda sample: -sample.step)
    if not samples:
        return ""
    style = f"padding:5px 10px;border-bottom:{LINE};text-align:left;vertical-align:top;"
    wide = f'style="{style}width:33%;white-space:pre-wrap;overflow-wrap:anywhere"'
    head = "".join(f'<th style="{style}">{text}</th>' for text in ("step", "prompt", "base", "with the adapter"))
    body = "".join(f'<tr><td style="{style}">{s.step}</td>'
                   + "".join(f"<td {wide}>{escape(_compact(text))}</td>" for text in (s.prompt, s.base, s.adapter))
                   + "</tr>" for s in samples)
    return (f'<div style="max-height:320px;overflow:auto"><table style="width:100%;border-collapse:collapse;'
            f'line-height:1.4"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>')


def _compact(text: str) -> str:
    return re.sub(r"\n\s*\n", "\n", text.strip())


def files_html(folder: str, files: Iterable[str]) -> str:
    """Saved files, by name."""
    names = " · ".join(f"<code>{escape(name)}</code>" for name in files)
    return f'<div style="line-height:1.5">saved in {escape(folder)}: {names}</div>' if names else ""


def command_html(command: str) -> str:
    """A command that one click selects whole."""
    return ('<details><summary style="cursor:pointer">the same run as a shell command</summary>'
            '<pre style="user-select:all;white-space:pre-wrap;overflow-wrap:anywhere;padding:8px 12px;margin:6px 0;'
            f'border:{LINE};line-height:1.5">{escape(command)}</pre></details>')
