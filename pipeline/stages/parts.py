"""Latency of a network's branches, each as an engine of its own, and of the whole pipeline with what lies outside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusepress.pipeline.errors import TaskError
from fusepress.pipeline.evidence import UNSTABLE, Kind, Measurement
from fusepress.targets.critical_path import (
    PARALLEL_NOTE,
    REST,
    PipelineLatency,
    Schedule,
    Span,
    pipeline_latency,
)

if TYPE_CHECKING:
    from fusepress.pipeline.stages.base import Context

APART = "as an engine of its own, cut out of the released model"
E2E = "e2e"


def outside_ms(outside: Mapping[str, Any], target: str) -> dict[str, float]:
    """Declared milliseconds of stages outside the network on a target.

    Args:
        outside: stage -> target -> milliseconds, as a task declares it.
        target: name of the profile.

    Raises:
        TaskError: a stage has no latency for the target.
    """
    found = {}
    for stage, by_target in outside.items():
        if not isinstance(by_target, Mapping) or not isinstance(by_target.get(target), int | float):
            known = ", ".join(map(str, by_target)) if isinstance(by_target, Mapping) else repr(by_target)
            raise TaskError(
                f"expected milliseconds of the outside stage {stage!r} on {target}; got {known or 'none'}; add them to "
                "the task's `outside`"
            )
        found[stage] = float(by_target[target])
    return found


def pipeline_of(
    rows: Sequence[Measurement], branches: Sequence[str], outside: Mapping[str, float], schedule: Schedule
) -> PipelineLatency:
    """The whole from measurements `latency.<part>.mean_ms` of every branch and of the rest."""
    by_name = {row.name: row for row in rows}
    spans = {part: _span(by_name[f"latency.{part}.mean_ms"]) for part in (*branches, REST)}
    rest = spans.pop(REST)
    return pipeline_latency(spans, rest, outside, schedule=schedule)


def _span(row: Measurement) -> Span:
    low, high = row.low, row.high
    return Span(
        value_ms=row.value,
        low_ms=row.value if low is None else low,
        high_ms=row.value if high is None else high,
    )


def pipeline_row(found: PipelineLatency, rows: Sequence[Measurement], declared: Sequence[str]) -> Measurement:
    """The whole as a measurement, of the kind of its parts; where one of them cannot be trusted, it cannot be either.

    Args:
        found: the whole.
        rows: its parts, as `pipeline_of` found them, among others.
        declared: names of outside stages.
    """
    names = {f"latency.{part.name}.mean_ms" for part in found.parts}
    parts = [row for row in rows if row.name in names]
    notes = ["sum of engines of their own" if found.schedule == "serial" else f"longest way; {PARALLEL_NOTE}"]
    notes += [f"{row.name}: {row.note}" for row in parts if UNSTABLE in (row.note or "")]
    if declared:
        notes.append(f"declared, not measured: {', '.join(declared)}")
    whole = found.whole
    return parts[0].model_copy(
        update={
            "name": f"latency.{E2E}.mean_ms",
            "value": whole.value_ms,
            "low": whole.low_ms,
            "high": whole.high_ms,
            "n": None,
            "note": "; ".join(notes),
            "extrapolating": any(row.extrapolating for row in parts),
        }
    )


def predicted_parts(ctx: Context, onnx_path: Path, precision: str, sha256: str, folder: Path) -> list[Measurement]:
    """Predicted latency of each branch and the rest, and of the whole pipeline, where a gate names parts.

    Raises:
        ExportError: the branches exchange tensors midway.
        TaskError: an outside stage has no latency for the target.
    """
    gate = ctx.recipe.gates.latency
    if gate is None or not gate.parts or ctx.on_host:
        return []
    from fusepress.export.branches import split_branches
    from fusepress.pipeline.stages.common import latency_measurements

    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for part, path in split_branches(onnx_path, ctx.task.branches, folder).items():
        (row,) = latency_measurements(ctx, path, precision, artifact_sha256=sha256)
        rows.append(row.model_copy(update={"name": f"latency.{part}.mean_ms", "note": APART}))
    outside = outside_ms(ctx.task.outside, ctx.profile.name)
    found = pipeline_of(rows, list(ctx.task.branches), outside, gate.schedule)
    return [*rows, pipeline_row(found, rows, list(outside))]


def renamed(row: Measurement, part: str, sha256: str, kind: Kind = "measured") -> Measurement:
    """A part's latency as one of the released model."""
    name = f"latency.{part}.{row.name.rpartition('.')[2]}"
    return row.model_copy(update={"name": name, "artifact_sha256": sha256, "kind": kind, "note": row.note or APART})
