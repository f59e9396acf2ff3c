"""Charts as inline SVG, drawn from plain numbers: no fonts, no scripts, colours from the page's style sheet.

Every function returns markup in which all text from outside is escaped. Shapes tell evidence kinds apart without
colour: measured is a filled disc, simulated a filled diamond, predicted a ring with a dashed interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from fusepress.pipeline.evidence import Kind

LABEL, VALUE = 78.0, 84.0  # columns beside the plot
ROW = 27.0
LINE_STYLES = ("none", "7 3", "2 3", "9 3 2 3", "4 2", "12 4")
MOST_LABEL = 17


@dataclass(frozen=True, slots=True)
class Step:
    """One row of a step chart: a stage, its number, its evidence."""

    label: str
    value: float
    low: float | None
    high: float | None
    kind: Kind


def nice_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers within [low, high], about as many as wanted (never more than twice as many)."""
    span = high - low
    if not math.isfinite(span) or span <= 0:
        return [low]
    rough = span / max(1, wanted)
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(scale * factor for factor in (1, 2, 5, 10) if scale * factor >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def step_chart(
    steps: Sequence[Step],
    *,
    title: str,
    show: Callable[[float], str],
    show_tick: Callable[[float], str],
    limit: float | None = None,
    limit_label: str = "",
    from_zero: bool = False,
    width: float = 520.0,
) -> Markup:
    """A number after each stage, from top to bottom, with its interval.

    Args:
        steps: one row each.
        title: what a screen reader says first; the numbers follow it.
        show: how a number is printed.
        show_tick: how a number on the axis is printed.
        limit: a vertical line; its label stands above the plot.
        limit_label: what that line is.
        from_zero: whether the axis starts at 0 (for ratios to be seen).
        width: of the drawing, in its own units.
    """
    ends = [end for s in steps for end in (s.value, s.low, s.high) if end is not None]
    if limit is not None:
        ends.append(limit)
    low, high = _domain(ends, from_zero=from_zero)
    left, right = LABEL, width - VALUE
    top = 24.0 if limit is not None else 8.0
    bottom = top + ROW * len(steps)

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    parts = [_axis(x, nice_ticks(low, high), top, bottom, show_tick)]
    if limit is not None:
        parts.append(_limit_line(x(limit), top, bottom, limit_label, left, right))
    points = [(x(s.value), top + ROW * (index + 0.5)) for index, s in enumerate(steps)]
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    parts.append(_markup('<polyline class="c-path" points="{}"/>', path))
    for step, (a, b) in zip(steps, points, strict=True):
        parts.append(_markup('<text class="c-label" x="0" y="{}">{}</text>', _n(b + 4), step.label))
        if step.low is not None and step.high is not None:
            parts.append(_whisker(x(step.low), x(step.high), b, step.kind))
        parts.append(marker(step.kind, a, b))
        parts.append(
            _markup('<text class="c-value" x="{}" y="{}">{}</text>', _n(right + 14), _n(b + 4), show(step.value))
        )
    told = "; ".join(f"{s.label} {show(s.value)} ({s.kind})" for s in steps)
    return _svg(width, bottom + 22, f"{title}: {told}", parts)


def _domain(ends: Sequence[float], *, from_zero: bool) -> tuple[float, float]:
    low, high = min(ends), max(ends)
    pad = (high - low) * 0.07 or max(abs(high) * 0.05, 1e-6)
    if from_zero and low >= 0:
        return 0.0, high + pad
    return low - pad, high + pad


def _axis(
    x: Callable[[float], float], ticks: Sequence[float], top: float, bottom: float, show: Callable[[float], str]
) -> Markup:
    parts = []
    for tick in ticks:
        at = _n(x(tick))
        parts.append(_markup('<line class="c-grid" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>', at, _n(top), _n(bottom)))
        parts.append(_markup('<text class="c-tick" x="{}" y="{}">{}</text>', at, _n(bottom + 15), show(tick)))
    return Markup("").join(parts)


def _limit_line(at: float, top: float, bottom: float, label: str, left: float, right: float) -> Markup:
    anchor = "start" if at < left + (right - left) * 0.25 else "end" if at > right - (right - left) * 0.25 else "middle"
    line = _markup('<line class="c-limit" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>', _n(at), _n(top - 6), _n(bottom))
    text = _markup(
        '<text class="c-limit-label" x="{}" y="{}" text-anchor="{}">{}</text>', _n(at), _n(top - 11), anchor, label
    )
    return line + text


def _whisker(low: float, high: float, y: float, kind: Kind) -> Markup:
    name = "c-whisker c-dashed" if kind == "predicted" else "c-whisker"
    line = _markup('<line class="{}" x1="{}" x2="{}" y1="{}" y2="{}"/>', name, _n(low), _n(high), _n(y), _n(y))
    caps = [
        _markup('<line class="c-whisker" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>', _n(end), _n(y - 4), _n(y + 4))
        for end in (low, high)
    ]
    return line + Markup("").join(caps)


def marker(kind: Kind, x: float, y: float) -> Markup:
    """The shape of an evidence kind, centred on (x, y)."""
    if kind == "measured":
        return _markup('<circle class="c-mark" cx="{}" cy="{}" r="4.5"/>', _n(x), _n(y))
    if kind == "simulated":
        points = f"{_n(x)},{_n(y - 5.5)} {_n(x + 5.5)},{_n(y)} {_n(x)},{_n(y + 5.5)} {_n(x - 5.5)},{_n(y)}"
        return _markup('<polygon class="c-mark" points="{}"/>', points)
    return _markup('<circle class="c-ring" cx="{}" cy="{}" r="4"/>', _n(x), _n(y))


def legend_mark(kind: Kind) -> Markup:
    """A marker alone, for badges and legends; hidden from screen readers, for the word stands beside it."""
    return (
        Markup('<svg class="mark" width="12" height="12" viewBox="0 0 12 12" aria-hidden="true" focusable="false">')
        + marker(kind, 6, 6)
        + Markup("</svg>")
    )


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
        _markup('<rect class="c-track" x="0" y="9" width="{}" height="12" rx="3"/>', _n(width)),
        _markup('<rect class="c-allowed" x="{}" y="9" width="{}" height="12" rx="3"/>', _n(begin), _n(end - begin)),
        _markup('<line class="c-limit" x1="{0}" x2="{0}" y1="3" y2="27"/>', _n(edge)),
    ]
    if low is not None and high is not None:
        span = max(x(high) - x(low), 1.5)
        parts.append(
            _markup(
                '<rect class="c-span t-{}" x="{}" y="12.5" width="{}" height="5" rx="2.5"/>', tone, _n(x(low)), _n(span)
            )
        )
    parts.append(_markup('<circle class="c-dot t-{}" cx="{}" cy="{}" r="4.5"/>', tone, _n(x(value)), _n(middle)))
    return _svg(width, height, title, parts, name="chart gate-chart")


def share_bar(share: float, title: str) -> Markup:
    """How much is left: the whole as a track, the rest filled."""
    kept = min(1.0, max(0.0, share))
    parts = [
        Markup('<rect class="c-track" x="0" y="0" width="120" height="8" rx="4"/>'),
        _markup('<rect class="c-fill" x="0" y="0" width="{}" height="8" rx="4"/>', _n(max(2.0, 120 * kept))),
    ]
    return _svg(120, 8, title, parts, name="chart share")


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
        parts.append(_markup('<text class="c-small" x="0" y="{}">{}</text>', _n(y + 12), name))
        for kind, size in (("c-track", before), ("c-fill", after)):
            parts.append(
                _markup(
                    '<rect class="{}" x="{}" y="{}" width="{}" height="10" rx="2"/>',
                    kind, _n(label), _n(y + 3), _n(plot * size / max(1, most)),
                )
            )  # fmt: skip
        text = f"{before} \u2192 {after}" if after != before else f"{before}"
        parts.append(_markup('<text class="c-small c-end" x="{}" y="{}">{}</text>', _n(width), _n(y + 12), text))
    return _svg(width, row * len(rows) + 2, title, parts)


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
        parts.append(_markup('<text class="c-small" x="0" y="{}">{}</text>', _n(y + 12), name))
        parts.append(
            _markup(
                '<rect class="{}" x="{}" y="{}" width="{}" height="10" rx="2"/>',
                "c-track" if struck else "c-fill", _n(label), _n(y + 3), _n(max(2.0, plot * share)),
            )
        )  # fmt: skip
        parts.append(_markup('<text class="c-small c-end" x="{}" y="{}">{}</text>', _n(width), _n(y + 12), show(size)))
    return _svg(width, row * len(rows) + 2, title, parts)


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
    low, high = _domain(values, from_zero=not logarithmic)
    first, last = min(steps), max(max(steps), min(steps) + 1)
    left, right, top, bottom = 52.0, width - 118.0, 8.0, 8.0 + height

    def x(step: float) -> float:
        return left + (step - first) / (last - first) * (right - left)

    def y(value: float) -> float:
        return bottom - (scale(value) - low) / (high - low) * (bottom - top)

    parts = [_markup('<line class="c-grid" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/>', _n(left), _n(right), _n(bottom))]
    for tick in nice_ticks(low, high, 4):
        value = 10**tick if logarithmic else tick
        at = _n(y(value))
        parts.append(_markup('<line class="c-grid" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/>', _n(left), _n(right), at))
        text = _markup(
            '<text class="c-small c-end" x="{}" y="{}">{}</text>', _n(left - 6), _n(y(value) + 4), show(value)
        )
        parts.append(text)
    parts += [
        _markup('<text class="c-tick" x="{}" y="{}">{}</text>', _n(x(tick)), _n(bottom + 15), show(tick))
        for tick in nice_ticks(first, last, 5)
    ]
    ends = _apart([y(line[-1][1]) for line in lines.values()], top + 4, bottom)
    for number, ((name, line), end) in enumerate(zip(lines.items(), ends, strict=True)):
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in line)
        style = LINE_STYLES[number]
        parts.append(
            _markup('<polyline class="c-line c-line-{}" stroke-dasharray="{}" points="{}"/>', number, style, path)
        )
        label = name if len(name) <= MOST_LABEL else f"{name[: MOST_LABEL - 1]}\u2026"
        parts.append(
            _markup(
                '<text class="c-small c-text-{}" x="{}" y="{}">{}</text>', number, _n(right + 8), _n(end + 4), label
            )
        )
    told = "; ".join(f"{name} from {show(line[0][1])} to {show(line[-1][1])}" for name, line in lines.items())
    return _svg(width, bottom + 22, f"{title}: {told}", parts)


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


def _svg(width: float, height: float, title: str, parts: Sequence[Markup], *, name: str = "chart") -> Markup:
    head = _markup(
        '<svg class="{}" viewBox="0 0 {} {}" role="img" aria-label="{}">', name, _n(width), _n(height), title
    )
    return head + Markup("").join(parts) + Markup("</svg>")


def _markup(template: str, *values: object) -> Markup:
    """Fill a literal template with escaped values."""
    return Markup(template.format(*(escape(value) for value in values)))  # noqa: S704 - every value is escaped


def _n(value: float) -> str:
    """A coordinate: one decimal, no trailing zero, never -0."""
    return f"{round(value, 1) + 0.0:g}"
