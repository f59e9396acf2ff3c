"""How a figure of the model went from stage to stage: what each one changed, with interval and evidence."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fusepress.pipeline.evidence import Kind
from fusepress.pipeline.report.svg import axis_below, domain, drawing, line, marker, nice_ticks, rect, text, whisker

LABEL, NUMBERS = 78.0, 148.0  # columns beside the plot
ROW, BAR = 27.0, 13.0
SAME = "same"


@dataclass(frozen=True, slots=True)
class Step:
    """One row: a stage, its figure, its evidence."""

    label: str
    value: float
    low: float | None
    high: float | None
    kind: Kind


def waterfall(
    steps: Sequence[Step],
    *,
    title: str,
    show: Callable[[float], str],
    show_change: Callable[[float], str],
    show_tick: Callable[[float], str],
    more_is_better: bool,
    limit: float | None = None,
    limit_label: str = "",
    from_zero: bool = False,
    width: float = 520.0,
) -> Markup:
    """A figure after each stage, from top to bottom, with its interval and a bar of what the stage changed.

    Figures of different evidence are not subtracted: there is no bar where a stage's kind is another than the last's.

    Args:
        steps: one row each.
        title: what a screen reader says first; the numbers follow it.
        show: how a figure is printed.
        show_change: how a difference is printed.
        show_tick: how a number on the axis is printed.
        more_is_better: which way a bar is drawn as a gain.
        limit: an upright line; its label stands above the plot.
        limit_label: what that line is.
        from_zero: whether the axis starts at 0 (for ratios to be seen).
        width: of the drawing, in its own units.
    """
    ends = [end for s in steps for end in (s.value, s.low, s.high) if end is not None]
    low, high = domain(ends if limit is None else [*ends, limit], from_zero=from_zero)
    left, right = LABEL, width - NUMBERS
    top = 24.0 if limit is not None else 8.0
    bottom = top + ROW * len(steps)

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    parts = [axis_below(x, nice_ticks(low, high, 4), top, bottom, show_tick)]
    if limit is not None:
        parts.append(_limit_line(x(limit), top, bottom, limit_label, left, right))
    changes = [""] + [_change(*pair, show, show_change) for pair in itertools.pairwise(steps)]
    for index, (step, change) in enumerate(zip(steps, changes, strict=True)):
        y = top + ROW * (index + 0.5)
        before = steps[index - 1] if index else None
        if before is not None and before.kind == step.kind:
            parts.append(_bar(x(before.value), x(step.value), y, gain=(step.value > before.value) == more_is_better))
        parts += _row(step, x, y, show(step.value), change, right, width)
    told = "; ".join(f"{s.label} {show(s.value)} ({s.kind})" for s in steps)
    return drawing(width, bottom + 22, title, parts, told=told)


def _change(before: Step, step: Step, show: Callable[[float], str], show_change: Callable[[float], str]) -> str:
    if before.kind != step.kind:
        return f"now {step.kind}"
    return SAME if show(before.value) == show(step.value) else show_change(step.value - before.value)


def _bar(start: float, end: float, y: float, *, gain: bool) -> Markup:
    """From the figure before to this one, with a line from the row above to where it starts."""
    body = rect("c-gain" if gain else "c-loss", min(start, end), y - BAR / 2, abs(end - start), BAR)
    return line("c-path", (start, y - ROW), (start, y)) + body


def _row(
    step: Step, x: Callable[[float], float], y: float, value: str, change: str, right: float, width: float
) -> list[Markup]:
    base = y + 4
    parts = [text("c-label", 0.0, base, step.label)]
    if step.low is not None and step.high is not None:
        parts.append(whisker((x(step.low), y), (x(step.high), y), step.kind))
    parts.append(marker(step.kind, x(step.value), y))
    parts.append(text("c-value", right + 12, base, value))
    parts.append(text("c-small c-end", width, base, change))
    return parts


def _limit_line(at: float, top: float, bottom: float, label: str, left: float, right: float) -> Markup:
    anchor = "start" if at < left + (right - left) * 0.25 else "end" if at > right - (right - left) * 0.25 else "middle"
    return line("c-limit", (at, top - 6), (at, bottom)) + text("c-limit-label", at, top - 11, label, anchor=anchor)
