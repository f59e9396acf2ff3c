"""Several runs side by side: what each released, and which of them no other one beats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fusepress.pipeline.errors import UsageError
from fusepress.pipeline.evidence import Measurement, RunRecord, read_run

LATENCY = "latency.mean_ms"


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One run among others.

    Attributes:
        name: of the run.
        target: device and power mode.
        precision: of the released file.
        verdict: of its gates; None where they were not reached.
        metric: the task's primary metric.
        more_is_better: of that metric.
        accuracy: of the released file; None where the run did not get there.
        latency: mean, in milliseconds, on the target.
        macs: multiply-accumulates of one sample.
        size_mib: of the released ONNX.
        worst_failure: the sensor failure that the release bears worst, and the metric under it.
        beaten_by: runs for the same target and metric that are no worse in accuracy and latency and better in one.
    """

    name: str
    target: str
    precision: str | None
    verdict: str | None
    metric: str
    more_is_better: bool
    accuracy: Measurement | None
    latency: Measurement | None
    macs: float | None
    size_mib: float | None
    worst_failure: tuple[str, float] | None
    beaten_by: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        figures = {
            name: None if figure is None else figure.model_dump(exclude_none=True)
            for name, figure in (("accuracy", self.accuracy), ("latency", self.latency))
        }
        return {
            "name": self.name,
            "target": self.target,
            "precision": self.precision,
            "verdict": self.verdict,
            "metric": self.metric,
            **figures,
            "macs": self.macs,
            "size_mib": self.size_mib,
            "worst_failure": None if self.worst_failure is None else list(self.worst_failure),
            "pareto": not self.beaten_by and self.accuracy is not None and self.latency is not None,
            "beaten_by": list(self.beaten_by),
        }


def compare_runs(folders: Sequence[Path]) -> list[Compared]:
    """Read runs and find those that no other run for the same target, power mode and metric beats.

    Values are compared as they are; the intervals beside them say how sure that is.

    Args:
        folders: run folders, two or more.

    Raises:
        UsageError: fewer than two, or one that is no run.
        StoreError: a run record is damaged.
    """
    if len(folders) < 2:
        raise UsageError(f"expected two or more runs to compare; got {len(folders)}; name another run folder")
    rows = [_row(read_run(folder), folder.name) for folder in folders]
    return [_with_rivals(row, rows) for row in rows]


def _row(record: RunRecord, name: str) -> Compared:
    metrics: dict[str, str] = record.task.get("metrics", {})
    metric = next(iter(metrics), "")
    more = metrics.get(metric) != "min"
    mode = record.target_profile.get("power_mode")
    macs, size = _last(record, "macs"), _last(record, "size.onnx_mib")
    return Compared(
        name=name,
        target=f"{record.target} / {mode}" if mode else record.target,
        precision=record.final_precision,
        verdict=record.verdict,
        metric=metric,
        more_is_better=more,
        accuracy=_of_release(record, f"accuracy.{metric}"),
        latency=_of_release(record, LATENCY),
        macs=None if macs is None else macs.value,
        size_mib=None if size is None else size.value,
        worst_failure=_worst_failure(record, metric, more_is_better=more),
    )


def _of_release(record: RunRecord, name: str) -> Measurement | None:
    """The last figure that `verify` has of the released file."""
    verify = record.stage("verify")
    found = [] if verify is None else [m for m in verify.measurements if m.name == name]
    return found[-1] if found else None


def _last(record: RunRecord, name: str) -> Measurement | None:
    found = [m for stage in record.stages for m in stage.measurements if m.name == name]
    return found[-1] if found else None


def _worst_failure(record: RunRecord, metric: str, *, more_is_better: bool) -> tuple[str, float] | None:
    verify = record.stage("verify")
    under = {}
    for m in verify.measurements if verify is not None else []:
        kind, _, rest = m.name.partition(".")
        if kind == "robustness" and rest.endswith(f".{metric}") and not rest.endswith(f".dense.{metric}"):
            under[rest.removesuffix(f".{metric}")] = m.value
    if not under:
        return None
    worst = min(under, key=lambda name: under[name] if more_is_better else -under[name])
    return worst, under[worst]


def _with_rivals(row: Compared, rows: Sequence[Compared]) -> Compared:
    return replace(row, beaten_by=tuple(other.name for other in rows if other is not row and _beats(other, row)))


def _beats(one: Compared, other: Compared) -> bool:
    if (one.target, one.metric) != (other.target, other.metric):
        return False
    if one.accuracy is None or one.latency is None or other.accuracy is None or other.latency is None:
        return False
    sign = 1 if one.more_is_better else -1
    gains = (sign * (one.accuracy.value - other.accuracy.value), other.latency.value - one.latency.value)
    return min(gains) >= 0 and max(gains) > 0
