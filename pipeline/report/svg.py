"""What every drawing of the report is made of: SVG text, escaped, with coordinates, ticks and marks.

Shapes tell evidence kinds apart without colour: measured is a filled disc, simulated a filled diamond, predicted a
ring. Colours come from the page's style sheet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup, escape

from fusepress.pipeline.evidence import Kind


def drawing(
    width: float, height: float, title: str, parts: Sequence[Markup], *, told: str = "", name: str = "chart"
) -> Markup:
    """A drawing in a frame of its own units.

    Args:
        width: of the frame.
        height: of the frame.
        title: shown while the pointer rests on it, and what a screen reader says first.
        parts: what is drawn.
        told: the numbers, said after the title.
        name: its classes in the style sheet.
    """
    said = f"{title}: {told}" if told else title
    head = markup(
        '<svg class="{}" viewBox="0 0 {} {}" role="img" aria-label="{}"><title>{}</title>',
        name, width, height, said, title,
    )  # fmt: skip
    return head + Markup("").join(parts) + Markup("</svg>")


def markup(template: str, *values: object) -> Markup:
    """Fill a literal template; floats are coordinates, all else is escaped."""
    filled = (coordinate(value) if isinstance(value, float) else escape(value) for value in values)
    return Markup(template.format(*filled))  # noqa: S704 - every value is escaped


def coordinate(value: float) -> str:
    """A coordinate: one decimal, no trailing zero, never -0."""
    return f"{round(value, 1) + 0.0:g}"


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


def domain(ends: Sequence[float], *, from_zero: bool) -> tuple[float, float]:
    """The ends of an axis on which all these values lie, with some room."""
    low, high = min(ends), max(ends)
    pad = (high - low) * 0.07 or max(abs(high) * 0.05, 1e-6)
    if from_zero and low >= 0:
        return 0.0, high + pad
    return low - pad, high + pad


def axis_below(
    x: Callable[[float], float], ticks: Sequence[float], top: float, bottom: float, show: Callable[[float], str]
) -> Markup:
    """Upright grid lines with their numbers below."""
    lines = [line("c-grid", (x(tick), top), (x(tick), bottom)) for tick in ticks]
    words = [text("c-tick", x(tick), bottom + 15, show(tick)) for tick in ticks]
    return Markup("").join(lines + words)


def whisker(low: tuple[float, float], high: tuple[float, float], kind: Kind) -> Markup:
    """An interval from point to point, lying or standing; dashed where it is predicted."""
    across, down = (0.0, 4.0) if low[1] == high[1] else (4.0, 0.0)
    caps = [line("c-whisker", (x - across, y - down), (x + across, y + down)) for x, y in (low, high)]
    body = line("c-whisker c-dashed" if kind == "predicted" else "c-whisker", low, high)
    return body + Markup("").join(caps)


def marker(kind: Kind, x: float, y: float) -> Markup:
    """The shape of an evidence kind, centred on (x, y)."""
    if kind == "measured":
        return markup('<circle class="c-mark" cx="{}" cy="{}" r="4.5"/>', x, y)
    if kind == "simulated":
        return path("c-mark", [(x, y - 5.5), (x + 5.5, y), (x, y + 5.5), (x - 5.5, y)], closed=True)
    return markup('<circle class="c-ring" cx="{}" cy="{}" r="4"/>', x, y)


def legend_mark(kind: Kind) -> Markup:
    """A marker alone, for badges and legends; hidden from screen readers, for the word stands beside it."""
    return (
        Markup('<svg class="mark" width="12" height="12" viewBox="0 0 12 12" aria-hidden="true" focusable="false">')
        + marker(kind, 6, 6)
        + Markup("</svg>")
    )


def line(name: str, start: tuple[float, float], end: tuple[float, float]) -> Markup:
    """A straight line of a class of the style sheet."""
    return markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>', name, *start, *end)


def rect(name: str, x: float, y: float, width: float, height: float, *, radius: float = 2.0) -> Markup:
    """A rectangle of a class of the style sheet."""
    return markup('<rect class="{}" x="{}" y="{}" width="{}" height="{}" rx="{}"/>', name, x, y, width, height, radius)


def text(name: str, x: float, y: float, words: str, *, anchor: str = "") -> Markup:
    """Words of a class of the style sheet; the class anchors them where `anchor` is empty."""
    if not anchor:
        return markup('<text class="{}" x="{}" y="{}">{}</text>', name, x, y, words)
    return markup('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>', name, x, y, anchor, words)


def path(name: str, points: Sequence[tuple[float, float]], *, closed: bool = False) -> Markup:
    """A line through points, or the area that they enclose."""
    shape = "polygon" if closed else "polyline"
    places = " ".join(f"{coordinate(x)},{coordinate(y)}" for x, y in points)
    return markup(f'<{shape} class="{{}}" points="{{}}"/>', name, places)
