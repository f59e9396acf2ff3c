"""Both models under failed sensors: the rows of the table, a radar of what is kept, and every failure and severity.

What is kept is the primary metric under the failure against the dense model's with all sensors (its inverse where less
is better), so that failures of any metric fit one drawing: 1 is as good as the dense model undisturbed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fusepress.pipeline.evidence import Measurement, RunRecord, Verdict
from fusepress.pipeline.report.svg import drawing, line, markup, nice_ticks, path, text
from fusepress.pipeline.report.view import (
    BASELINE,
    MINUS,
    Figure,
    figure,
    metrics_of,
    number,
    primary_of,
    quantity,
    steps,
    verdicts_of,
    words_of,
)

FEWEST_AXES = 3  # of a radar
MOST_AXES = 16
LONGEST = 20  # characters of a label
Pair = tuple[Measurement | None, Measurement | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureRow:
    """Both models under one sensor failure.

    Attributes:
        dense_kept, compressed_kept: shares of the dense model's undisturbed metric; None where there is none.
        verdict: of the gate on what the compressed model loses more; `floor` of the one on its metric.
    """

    failure: str
    severity: int
    dense: Figure | None
    compressed: Figure | None
    dense_drop: str
    compressed_drop: str
    extra: str
    dense_kept: float | None
    compressed_kept: float | None
    verdict: Verdict | None
    floor: Verdict | None

    @property
    def label(self) -> str:
        """Failure and severity, short enough for a drawing."""
        name = self.failure if len(self.failure) <= LONGEST else f"{self.failure[: LONGEST - 1]}\u2026"
        return f"{name} {self.severity}"


def failure_rows(record: RunRecord) -> list[FailureRow]:
    """Both models under every sensor failure that was tried, by the primary metric."""
    metric = primary_of(record)
    seen = _failures(record, metric)
    return [_row(record, metric, where, pair, seen) for where, pair in seen.items()]


def _row(
    record: RunRecord, metric: str, where: tuple[str, int], pair: Pair, seen: Mapping[tuple[str, int], Pair]
) -> FailureRow:
    (failure, severity), (dense, compressed) = where, pair
    less = metrics_of(record).get(metric) == "min"
    before, after = _clean(record, metric)
    drops = _drop(before, dense, less=less), _drop(after, compressed, less=less)
    return FailureRow(
        failure=words_of(failure),
        severity=severity,
        dense=figure(dense),
        compressed=figure(compressed),
        dense_drop="" if drops[0] is None else quantity("accuracy.", drops[0]),
        compressed_drop="" if drops[1] is None else quantity("accuracy.", drops[1]),
        extra="" if drops[0] is None or drops[1] is None else _signed(drops[1] - drops[0]),
        dense_kept=_kept(before, None if dense is None else dense.value, less=less),
        compressed_kept=_kept(before, None if compressed is None else compressed.value, less=less),
        verdict=_judged(record, failure, severity, seen, ""),
        floor=_judged(record, failure, severity, seen, ".min"),
    )


def constant_kept(record: RunRecord) -> float | None:
    """The share that a constant answer keeps: below it a model is of no use; None where it is not known."""
    stage, metric = record.stage("verify"), primary_of(record)
    value = (stage.details.get("constant") or {}).get(metric) if stage is not None else None
    less = metrics_of(record).get(metric) == "min"
    return _kept(_clean(record, metric)[0], value, less=less)


def _clean(record: RunRecord, metric: str) -> tuple[float | None, float | None]:
    """The dense and the compressed model's metric with all sensors."""
    clean = steps(record, f"accuracy.{metric}")
    before = next((m.value for stage, m in clean if stage == BASELINE), None)
    after = next((m.value for stage, m in reversed(clean) if stage != BASELINE), None)
    return before, after


def _kept(clean: float | None, under: float | None, *, less: bool) -> float | None:
    """Ratios of figures that are not above 0 say nothing; a metric that fell below 0 keeps nothing."""
    if clean is None or under is None or clean <= 0:
        return None
    if less:
        return clean / under if under > 0 else None
    return max(0.0, under / clean)


def _judged(
    record: RunRecord, failure: str, severity: int, seen: Mapping[tuple[str, int], Pair], ending: str
) -> Verdict | None:
    """The gate of a failure at a severity: by its name, by what it says, or because there is only one severity."""
    verdicts = {verdict.gate: verdict for verdict in verdicts_of(record)}
    named = verdicts.get(f"robustness.{failure}@{severity}{ending}")
    if named is not None:
        return named
    verdict = verdicts.get(f"robustness.{failure}{ending}")
    alone = sum(1 for name, _ in seen if name == failure) == 1
    return verdict if verdict is not None and (alone or f"(severity {severity})" in verdict.why) else None


def _failures(record: RunRecord, metric: str) -> dict[tuple[str, int], Pair]:
    found: dict[tuple[str, int], Pair] = {}
    for stage in record.stages:
        for measurement in stage.measurements:
            match = re.fullmatch(rf"robustness\.(.+)\.(\d+)\.(dense\.)?{re.escape(metric)}", measurement.name)
            if match is None:
                continue
            where = (match[1], int(match[2]))
            dense, compressed = found.get(where, (None, None))
            found[where] = (measurement, compressed) if match[3] else (dense, measurement)
    return dict(sorted(found.items()))


def _drop(clean: float | None, under: Measurement | None, *, less: bool) -> float | None:
    if clean is None or under is None:
        return None
    return under.value - clean if less else clean - under.value


def _signed(value: float) -> str:
    words = f"{value:+.4f}"
    return ("0.0000" if float(words) == 0 else words).replace("-", MINUS)


# ------------------------------------------------------------------------------------------------------------ drawings


def drawings(record: RunRecord) -> list[tuple[str, Markup, str]]:
    """(heading, drawing, remark): a radar where there are axes enough, and what every failure keeps."""
    rows = [row for row in failure_rows(record) if row.dense_kept is not None and row.compressed_kept is not None]
    if not rows:
        return []
    constant, metric = constant_kept(record), primary_of(record)
    worst = list({row.failure: row for row in rows}.values())  # severities rise, so the last one stays
    found = []
    if len(worst) >= FEWEST_AXES:
        remark = (
            f"{metric} under each failure at its highest severity, as a share of the dense model's with all sensors."
        )
        if len(worst) > MOST_AXES:
            remark += f" {len(worst) - MOST_AXES} more failures are in the table."
        found.append(("At the highest severity", radar(worst[:MOST_AXES], constant), remark))
    remark = "Disc: compressed. Ring: dense. A line to the left of the ring is what compression costs on top."
    found.append(("Every failure and severity", ladder(rows, constant), remark))
    return found


def _told(rows: Sequence[FailureRow]) -> str:
    return "; ".join(
        f"{row.failure} severity {row.severity}: dense {number(row.dense_kept or 0, 3)}, "
        f"compressed {number(row.compressed_kept or 0, 3)}"
        for row in rows
    )


def radar(rows: Sequence[FailureRow], constant: float | None, *, width: float = 520.0, height: float = 330.0) -> Markup:
    """One axis a failure, from nothing kept in the middle to the dense model's undisturbed metric on the ring of 1.

    Args:
        rows: three or more, both shares known.
        constant: the share that a constant answer keeps, drawn as a dotted ring.
        width: of the drawing, in its own units.
        height: of the drawing.
    """
    most = max(1.0, *(max(row.dense_kept or 0, row.compressed_kept or 0) for row in rows))
    angles = [2 * math.pi * index / len(rows) for index in range(len(rows))]
    # as large as labels beside, above and below leave room for: few axes do not fill a circle
    wide = 2 * max(math.sin(angle) for angle in angles)
    low = min(math.cos(angle) for angle in angles)
    reach = min((width - 240) / wide, (height - 84) / (1 - low))
    middle = (width / 2, 26 + reach)

    def at(angle: float, share: float) -> tuple[float, float]:
        far = reach * share / most
        return middle[0] + far * math.sin(angle), middle[1] - far * math.cos(angle)

    parts = [path("c-web", [at(angle, ring) for angle in angles], closed=True) for ring in (0.25, 0.5, 0.75, 1.0)]
    parts += [line("c-grid", middle, at(angle, most)) for angle in angles]
    parts += [
        text("c-tick", at(0.0, ring)[0] + 4, at(0.0, ring)[1] + 10, number(ring), anchor="start") for ring in (0.5, 1.0)
    ]
    if constant is not None:
        parts.append(path("c-constant", [at(angle, constant) for angle in angles], closed=True))
    dense = [at(angle, row.dense_kept or 0) for angle, row in zip(angles, rows, strict=True)]
    small = [at(angle, row.compressed_kept or 0) for angle, row in zip(angles, rows, strict=True)]
    parts += [path("c-dense", dense, closed=True), path("c-compressed", small, closed=True)]
    parts += [markup('<circle class="c-hollow" cx="{}" cy="{}" r="3.5"/>', *point) for point in dense]
    parts += [markup('<circle class="c-mark" cx="{}" cy="{}" r="3"/>', *point) for point in small]
    parts += [_axis_label(row, angle, at(angle, most)) for row, angle in zip(rows, angles, strict=True)]
    parts += _legend(constant, height - 6)
    return drawing(width, height, "What is kept when a sensor fails", parts, told=_told(rows))


def _axis_label(row: FailureRow, angle: float, end: tuple[float, float]) -> Markup:
    across, up = math.sin(angle), math.cos(angle)
    anchor = "middle" if abs(across) < 0.2 else "start" if across > 0 else "end"
    return text("c-small", end[0] + 10 * across, end[1] - 12 * up + 4, row.label, anchor=anchor)


def _legend(constant: float | None, y: float) -> list[Markup]:
    parts = [
        markup('<circle class="c-hollow" cx="8" cy="{}" r="3.5"/>', y - 4),
        text("c-small", 18.0, y, "dense"),
        markup('<circle class="c-mark" cx="72" cy="{}" r="3"/>', y - 4),
        text("c-small", 82.0, y, "compressed"),
    ]
    if constant is not None:
        parts += [line("c-constant", (164.0, y - 4), (186.0, y - 4)), text("c-small", 192.0, y, "a constant answer")]
    return parts


def ladder(rows: Sequence[FailureRow], constant: float | None, *, width: float = 520.0) -> Markup:
    """What both models keep under every failure and severity, a row each.

    Args:
        rows: both shares known.
        constant: the share that a constant answer keeps, drawn as an upright dotted line.
        width: of the drawing, in its own units.
    """
    most = max(1.0, *(max(row.dense_kept or 0, row.compressed_kept or 0) for row in rows))
    left, right, top, height = 150.0, width - 84, 6.0, 21.0
    bottom = top + height * len(rows)

    def x(share: float) -> float:
        return left + share / most * (right - left)

    parts = []
    for tick in nice_ticks(0.0, most, 5):
        parts += [line("c-grid", (x(tick), top), (x(tick), bottom)), text("c-tick", x(tick), bottom + 15, number(tick))]
    if constant is not None:
        parts.append(line("c-constant", (x(constant), top), (x(constant), bottom)))
    for index, row in enumerate(rows):
        y = top + height * (index + 0.5)
        dense, compressed = x(row.dense_kept or 0), x(row.compressed_kept or 0)
        parts.append(text("c-small", 0.0, y + 4, row.label))
        parts.append(line("c-loss-line" if compressed < dense else "c-gain-line", (dense, y), (compressed, y)))
        parts.append(markup('<circle class="c-hollow" cx="{}" cy="{}" r="4.5"/>', dense, y))
        parts.append(markup('<circle class="c-mark" cx="{}" cy="{}" r="3"/>', compressed, y))
        if row.extra:
            parts.append(text("c-small c-end", width, y + 4, row.extra))
    parts += _legend(constant, bottom + 36)
    parts.append(text("c-small c-end", width, bottom + 15, "extra drop"))
    return drawing(width, bottom + 40, "What is kept under every failure and severity", parts, told=_told(rows))
