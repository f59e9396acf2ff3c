"""Charts as inline SVG, drawn from plain numbers: no fonts, no scripts, colours from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from markupsafe import Markup

from fusepress.pipeline.report.svg import domain, drawing, markup, nice_ticks

LINE_STYLES = ("none", "7 3", "2 3", "9 3 2 3", "4 2", "12 4")
MOST_LABEL = 17


def gate_chart(
    *, value: float, low: float | None, high: float | None, limit: float, at_most: bool, tone: str, title: str
) -> Markup:
    """A gate at a glance: the allowed side shaded, the limit, the value with its interval."""
    width, height, middle = 168.0, 30.0, 15.0
    ends = [end for end in (value, low, high, limit) if end is not None]
    start, stop = min(ends), max(ends)
    pad = (stop - start) * 0.18 or max(abs(limit) * 0.5, 1e-6)
    start, stop = start - pad, stop + pad

    def x(number: float) -> float:
        return (number - start) / (stop - start) * width

    edge = x(limit)
    begin, end = (0.0, edge) if at_most else (edge, width)
    parts = [
        markup('<rect class="c-track" x="0" y="9" width="{}" height="12" rx="3"/>', width),
        markup('<rect class="c-allowed" x="{}" y="9" width="{}" height="12" rx="3"/>', begin, end - begin),
        markup('<line class="c-limit" x1="{0}" x2="{0}" y1="3" y2="27"/>', edge),
    ]
    if low is not None and high is not None:
        span = max(x(high) - x(low), 1.5)
        parts.append(
            markup('<rect class="c-span t-{}" x="{}" y="12.5" width="{}" height="5" rx="2.5"/>', tone, x(low), span)
        )
    parts.append(markup('<circle class="c-dot t-{}" cx="{}" cy="{}" r="4.5"/>', tone, x(value), middle))
    return drawing(width, height, title, parts, name="chart gate-chart")


def share_bar(share: float, title: str) -> Markup:
    """How much is left: the whole as a track, the rest filled."""
    kept = min(1.0, max(0.0, share))
    parts = [
        Markup('<rect class="c-track" x="0" y="0" width="120" height="8" rx="4"/>'),
        markup('<rect class="c-fill" x="0" y="0" width="{}" height="8" rx="4"/>', max(2.0, 120 * kept)),
    ]
    return drawing(120, 8, title, parts, name="chart share")


def width_chart(rows: Sequence[tuple[str, int, int]], *, title: str, most: int) -> Markup:
    """Layer widths: the dense width as a track, what was kept filled.

    Args:
        rows: (label, dense width, kept width).
        title: what a screen reader says.
        most: the width that fills the plot, common to the charts of all branches.
    """
    width, label, value, row = 500.0, 192.0, 68.0, 18.0
    plot = width - label - value
    parts = []
    for index, (name, before, after) in enumerate(rows):
        y = index * row
        parts.append(markup('<text class="c-small" x="0" y="{}">{}</text>', y + 12, name))
        for kind, size in (("c-track", before), ("c-fill", after)):
            parts.append(
                markup(
                    '<rect class="{}" x="{}" y="{}" width="{}" height="10" rx="2"/>',
                    kind, label, y + 3, plot * size / max(1, most),
                )
            )  # fmt: skip
        text = f"{before} \u2192 {after}" if after != before else f"{before}"
        parts.append(markup('<text class="c-small c-end" x="{}" y="{}">{}</text>', width, y + 12, text))
    return drawing(width, row * len(rows) + 2, title, parts)


def log_bar_chart(
    rows: Sequence[tuple[str, float, bool]], *, title: str, show: Callable[[float], str], least: float, most: float
) -> Markup:
    """Positive values over several orders of magnitude, as bars on a logarithmic axis.

    Args:
        rows: (label, value, whether it is struck out: its bar is drawn as a track).
        title: what a screen reader says.
        show: how a value is printed.
        least: the value of an empty bar.
        most: the value of a full one; both are common to the charts of all groups.
    """
    width, label, value, row = 500.0, 192.0, 68.0, 18.0
    plot, span = width - label - value, math.log(most / least) if most > least else 1.0
    parts = []
    for index, (name, size, struck) in enumerate(rows):
        y = index * row
        share = min(1.0, max(0.0, math.log(size / least) / span)) if size > 0 else 0.0
        parts.append(markup('<text class="c-small" x="0" y="{}">{}</text>', y + 12, name))
        parts.append(
            markup(
                '<rect class="{}" x="{}" y="{}" width="{}" height="10" rx="2"/>',
                "c-track" if struck else "c-fill", label, y + 3, max(2.0, plot * share),
            )
        )  # fmt: skip
        parts.append(markup('<text class="c-small c-end" x="{}" y="{}">{}</text>', width, y + 12, show(size)))
    return drawing(width, row * len(rows) + 2, title, parts)


def line_chart(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    show: Callable[[float], str],
    logarithmic: bool = False,
    width: float = 520.0,
    height: float = 190.0,
) -> Markup:
    """Lines over the steps of a training, each named at its end; dashes tell them apart without colour.

    Args:
        lines: name -> (step, value) points, at most as many as LINE_STYLES has entries.
        title: what a screen reader says first; the first and the last value of every line follow it.
        show: how a value is printed.
        logarithmic: of the values, which then are all above 0.
        width: of the drawing, in its own units.
        height: of the plot.
    """
    scale: Callable[[float], float] = math.log10 if logarithmic else float
    values = [scale(value) for line in lines.values() for _, value in line]
    steps = [step for line in lines.values() for step, _ in line]
    low, high = domain(values, from_zero=not logarithmic)
    first, last = min(steps), max(max(steps), min(steps) + 1)
    left, right, top, bottom = 52.0, width - 118.0, 8.0, 8.0 + height

    def x(step: float) -> float:
        return left + (step - first) / (last - first) * (right - left)

    def y(value: float) -> float:
        return bottom - (scale(value) - low) / (high - low) * (bottom - top)

    parts = [markup('<line class="c-grid" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/>', left, right, bottom)]
    for tick in nice_ticks(low, high, 4):
        value = 10**tick if logarithmic else tick
        at = y(value)
        parts.append(markup('<line class="c-grid" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/>', left, right, at))
        text = markup('<text class="c-small c-end" x="{}" y="{}">{}</text>', left - 6, y(value) + 4, show(value))
        parts.append(text)
    parts += [
        markup('<text class="c-tick" x="{}" y="{}">{}</text>', x(tick), bottom + 15, show(tick))
        for tick in nice_ticks(first, last, 5)
    ]
    ends = _apart([y(line[-1][1]) for line in lines.values()], top + 4, bottom)
    for number, ((name, line), end) in enumerate(zip(lines.items(), ends, strict=True)):
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in line)
        style = LINE_STYLES[number]
        parts.append(
            markup('<polyline class="c-line c-line-{}" stroke-dasharray="{}" points="{}"/>', number, style, path)
        )
        label = name if len(name) <= MOST_LABEL else f"{name[: MOST_LABEL - 1]}\u2026"
        parts.append(
            markup('<text class="c-small c-text-{}" x="{}" y="{}">{}</text>', number, right + 8, end + 4, label)
        )
    told = "; ".join(f"{name} from {show(line[0][1])} to {show(line[-1][1])}" for name, line in lines.items())
    return drawing(width, bottom + 22, title, parts, told=told)


def _apart(wanted: Sequence[float], top: float, bottom: float, least: float = 13.0) -> list[float]:
    """Heights of labels near the wanted ones, a line apart where there is room."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    placed = [0.0] * len(wanted)
    above = top - least
    for index in order:
        above = placed[index] = max(wanted[index], above + least)
    below = bottom + least
    for index in reversed(order):
        below = placed[index] = min(placed[index], below - least)
    return placed
