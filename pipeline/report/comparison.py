"""A page that holds runs of one task against each other: accuracy over latency, verdicts, and what they differ in."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fusepress.pipeline.comparing import Compared, Comparison
from fusepress.pipeline.evidence import Kind, Measurement, Verdict
from fusepress.pipeline.report.pages import page
from fusepress.pipeline.report.svg import domain, drawing, line, marker, markup, nice_ticks, path, text, whisker
from fusepress.pipeline.report.view import DASH, Figure, count, figure, number, quantity, three, words_of
from fusepress.pipeline.store import atomic_write_text

NEAR = 12.0  # points closer than this share a label
MOST_CHARACTERS = 120
Place = Callable[[float, float], tuple[float, float]]  # milliseconds and metric -> where they are drawn


@dataclass(frozen=True, slots=True)
class RunRow:
    """One run, ready to print."""

    index: int
    run: Compared
    accuracy: Figure | None
    latency: Figure | None
    macs: str
    size: str
    worst_failure: str


def write_comparison(comparison: Comparison, path: Path) -> Path:
    """Write the page; the same comparison gives the same bytes.

    Args:
        comparison: of `compare_runs`.
        path: of the page.

    Returns:
        The path of the page.

    Raises:
        StoreError: the page cannot be written.
    """
    atomic_write_text(path, render(comparison))
    return path


def render(comparison: Comparison) -> str:
    """The page as text."""
    rows = [_row(index, run) for index, run in enumerate(comparison.runs, start=1)]
    first = comparison.runs[0]
    return page(
        "comparison.html.j2",
        comparison=comparison,
        metric=first.metric,
        rows=rows,
        fronts=_fronts(rows),
        unplaced=[row for row in rows if not row.run.placed],
        gates=_gates(comparison.runs),
        has_sizes=any(row.run.size_mib is not None for row in rows),
        index_of={row.run.name: row.index for row in rows},
        differences=[
            ("Recipes", "h-recipes", _printed(comparison.recipe)),
            ("Environments", "h-environments", _printed(comparison.environment)),
        ],
        quantity=quantity,
        corner="upper left" if first.more_is_better else "lower left",
    )


def _row(index: int, run: Compared) -> RunRow:
    worst = run.worst_failure
    return RunRow(
        index=index,
        run=run,
        accuracy=figure(run.accuracy),
        latency=figure(run.latency),
        macs=DASH if run.macs is None else count(run.macs),
        size=DASH if run.size_mib is None else quantity("size.onnx_mib", run.size_mib),
        worst_failure=DASH
        if worst is None
        else f"{words_of(worst[0]).replace('.', ' ')}: {quantity('robustness.', worst[1])}",
    )


def _gates(runs: Sequence[Compared]) -> list[tuple[str, list[Verdict | None]]]:
    """(gate, its verdict in each run) of every gate that any run has."""
    verdicts = [{verdict.gate: verdict for verdict in run.gates} for run in runs]
    names = dict.fromkeys(gate for one in verdicts for gate in one)
    return [(gate, [one.get(gate) for one in verdicts]) for gate in names]


def _printed(differences: Mapping[str, Sequence[Any]]) -> list[tuple[str, list[str]]]:
    return [(key, [_value(value) for value in values]) for key, values in differences.items()]


def _value(value: Any) -> str:
    """As it stands in a recipe; a hash by its beginning."""
    if value is None:
        return DASH
    if isinstance(value, str):
        is_hash = len(value) == 64 and all(letter in "0123456789abcdef" for letter in value)
        return f"{value[:12]}\u2026" if is_hash else value
    written = json.dumps(value, ensure_ascii=False)
    return written if len(written) <= MOST_CHARACTERS else f"{written[: MOST_CHARACTERS - 1]}\u2026"


# ----------------------------------------------------------------------------------------------------------- the front


def _fronts(rows: Sequence[RunRow]) -> list[tuple[str, Markup, str]]:
    """(target, drawing, remark) of every target that has a run with both figures; latencies of two are no front."""
    targets = dict.fromkeys(row.run.target for row in rows if row.run.placed)
    found = []
    for target in targets:
        mine = [row for row in rows if row.run.target == target and row.run.placed]
        front = ", ".join(str(row.index) for row in mine if row.run.on_front)
        beaten = ", ".join(str(row.index) for row in mine if not row.run.on_front)
        remark = f"On the front: {front}." + (f" Beaten: {beaten}." if beaten else "")
        found.append((target, front_chart(mine, title=f"Accuracy over latency on {target}"), remark))
    return found


def front_chart(rows: Sequence[RunRow], *, title: str, width: float = 520.0, height: float = 300.0) -> Markup:
    """Runs by latency and accuracy with their intervals, the dense models as squares, and the front as a line.

    Args:
        rows: runs for one target that have both figures.
        title: what a screen reader says first; the figures follow it.
        width: of the drawing, in its own units.
        height: of the drawing.
    """
    runs = [row.run for row in rows]
    pairs = [(run.latency, run.accuracy) for run in runs] + [(run.dense_latency, run.dense_accuracy) for run in runs]
    whole = [(across, up) for across, up in pairs if across is not None and up is not None]
    left_most, right_most = domain(_ends([across for across, _ in whole]), from_zero=False)
    lowest, highest = domain(_ends([up for _, up in whole]), from_zero=False)
    left, right, top, bottom = 58.0, width - 14, 12.0, height - 40

    def place(across: float, up: float) -> tuple[float, float]:
        x = left + (across - left_most) / (right_most - left_most) * (right - left)
        return x, bottom - (up - lowest) / (highest - lowest) * (bottom - top)

    parts = []
    for tick in nice_ticks(left_most, right_most, 5):
        x, _ = place(tick, lowest)
        parts += [line("c-grid", (x, top), (x, bottom)), text("c-tick", x, bottom + 15, number(tick))]
    for tick in nice_ticks(lowest, highest, 5):
        _, y = place(left_most, tick)
        parts += [line("c-grid", (left, y), (right, y)), text("c-small c-end", left - 6, y + 4, number(tick))]
    parts.append(text("c-small c-end", right, bottom + 32, "mean latency, ms"))
    parts.append(text("c-small", 0.0, bottom + 32, rows[0].run.metric))
    parts.append(path("c-front", _stairs(runs, place)))
    for across, up in dict.fromkeys(_dense(runs)):
        x, y = place(across, up)
        parts.append(markup('<rect class="c-hollow" x="{}" y="{}" width="9" height="9"/>', x - 4.5, y - 4.5))
        parts.append(text("c-small c-muted", x + 9, y - 6, "dense", anchor=_side(x, right)))
    points = [_point(run, place) for run in runs]
    parts += [Markup("").join(_intervals(run, point, place)) for run, point in zip(runs, points, strict=True)]
    parts += [marker(_kind(run.latency), *point) for run, point in zip(runs, points, strict=True)]
    parts += _labels(rows, points, right)
    told = "; ".join(f"run {row.index}, {row.run.name}: {_said(row.run)}" for row in rows)
    return drawing(width, height, title, parts, told=told)


def _ends(figures: Sequence[Measurement]) -> list[float]:
    return [end for m in figures for end in (m.value, m.low, m.high) if end is not None]


def _kind(measurement: Measurement | None) -> Kind:
    assert measurement is not None
    return measurement.kind


def _point(run: Compared, place: Place) -> tuple[float, float]:
    assert run.latency is not None
    assert run.accuracy is not None
    return place(run.latency.value, run.accuracy.value)


def _dense(runs: Sequence[Compared]) -> list[tuple[float, float]]:
    pairs = [(run.dense_latency, run.dense_accuracy) for run in runs]
    return [(across.value, up.value) for across, up in pairs if across is not None and up is not None]


def _stairs(runs: Sequence[Compared], place: Place) -> list[tuple[float, float]]:
    """From point to point of the front: what is reached with no more than so much latency."""
    sign = 1 if runs[0].more_is_better else -1
    pairs = [(run.latency, run.accuracy) for run in runs if run.on_front]
    ends = sorted((across.value, sign * up.value) for across, up in pairs if across is not None and up is not None)
    points: list[tuple[float, float]] = []
    for across, up in ends:
        x, y = place(across, sign * up)
        if points:
            points.append((x, points[-1][1]))
        points.append((x, y))
    return points


def _intervals(run: Compared, point: tuple[float, float], place: Place) -> list[Markup]:
    parts = []
    assert run.latency is not None
    assert run.accuracy is not None
    if run.latency.low is not None and run.latency.high is not None:
        ends = [(place(end, run.accuracy.value)[0], point[1]) for end in (run.latency.low, run.latency.high)]
        parts.append(whisker(ends[0], ends[1], run.latency.kind))
    if run.accuracy.low is not None and run.accuracy.high is not None:
        ends = [(point[0], place(run.latency.value, end)[1]) for end in (run.accuracy.low, run.accuracy.high)]
        parts.append(whisker(ends[0], ends[1], run.accuracy.kind))
    return parts


def _labels(rows: Sequence[RunRow], points: Sequence[tuple[float, float]], right: float) -> list[Markup]:
    """Every run's number, and its verdict if it did not pass; marks that lie on one another share one label."""
    clusters: list[tuple[tuple[float, float], list[str]]] = []
    for row, point in zip(rows, points, strict=True):
        near = next((c for c in clusters if max(abs(c[0][0] - point[0]), abs(c[0][1] - point[1])) < NEAR), None)
        if near is None:
            near = (point, [])
            clusters.append(near)
        near[1].append(
            str(row.index) if row.run.verdict == "PASS" else f"{row.index} ({row.run.verdict or 'not judged'})"
        )
    return [
        text("c-value", x + (9 if _side(x, right) == "start" else -9), y - 8, ", ".join(names), anchor=_side(x, right))
        for (x, y), names in clusters
    ]


def _side(x: float, right: float) -> str:
    return "start" if x < right - 110 else "end"


def _said(run: Compared) -> str:
    assert run.latency is not None
    assert run.accuracy is not None
    return (
        f"{run.metric} {quantity('accuracy.', run.accuracy.value)} ({run.accuracy.kind}), "
        f"{three(run.latency.value)} ms ({run.latency.kind})"
    )
