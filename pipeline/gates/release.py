"""Gates against a stored release: the reviewed file that holds its figures, and what is judged against it.

The file holds figures and hashes, no samples. Where its dense model scored exactly what this run's dense model scores
on as many samples and clusters, both are taken for the same, and the two paired drops are compared: what the samples
have in common is out of both. Otherwise the metrics themselves are compared, which takes far more samples to decide.
The half-widths are joined in quadrature, as if the two errors were independent. They are positively correlated where
the same samples are hard for both releases, and the interval is then wider than it need be.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from fusepress.pipeline.errors import StoreError, UsageError
from fusepress.pipeline.evidence import Kind, RunRecord, Strict, Verdict
from fusepress.pipeline.gates.intervals import Interval
from fusepress.pipeline.gates.latency import latency_interval, pick_latency
from fusepress.pipeline.gates.replicates import Direction, Replicates, drop_interval
from fusepress.pipeline.gates.verdicts import (
    RELATION,
    Finding,
    decide,
    shown,
    spread,
    tell,
    weighed,
    without_interval,
    without_number,
)
from fusepress.pipeline.recipe import ReleaseGate
from fusepress.pipeline.store import atomic_write_text

LATENCY = "latency.mean_ms"


class Figure(Strict):
    """A number with its 95 % interval around it."""

    value: float = Field(allow_inf_nan=False)
    low: float = Field(allow_inf_nan=False)
    high: float = Field(allow_inf_nan=False)

    @model_validator(mode="after")
    def _ordered(self) -> Figure:
        if not self.low <= self.value <= self.high:
            raise ValueError(f"expected low <= value <= high; got {self.low}, {self.value}, {self.high}")
        return self

    def interval(self) -> Interval:
        """As the gates use it."""
        return Interval(self.value, self.low, self.high)


class MetricFigures(Strict):
    """A metric of the stored release.

    Attributes:
        released: of the released ONNX.
        dense: of the dense model, over the same samples.
        drop: paired, against the dense model; positive is worse.
    """

    released: Figure
    dense: float
    drop: Figure


class LatencyFigures(Figure):
    """A latency of the stored release, in milliseconds."""

    kind: Kind


class Baseline(Strict):
    """The stored release, schema 1: what `fusepress gate RUN --update-baseline` writes and a person reviews."""

    schema_: Literal[1] = Field(default=1, alias="schema")
    release: str
    target: str
    power_mode: str | None = None
    precision: str | None = None
    onnx_sha256: str
    recipe_sha256: str
    task_sha256: str
    checkpoint_sha256: str
    samples: int
    clusters: int
    metrics: dict[str, MetricFigures]
    latency: dict[str, LatencyFigures] = Field(default_factory=dict)

    def to_json(self) -> str:
        """Stable JSON text."""
        return json.dumps(self.model_dump(mode="json", by_alias=True, exclude_none=True), indent=1) + "\n"


def load_baseline(path: Path) -> Baseline | None:
    """Read a stored release; None where there is no file.

    Raises:
        StoreError: it is no baseline of schema 1.
    """
    try:
        return Baseline.model_validate_json(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StoreError(
            f"expected a stored release of schema 1; got a file that does not fit at {path} "
            f"({str(error).splitlines()[0]}); restore it, or write it anew with `fusepress gate RUN --update-baseline`"
        ) from error


def make_baseline(
    record: RunRecord, replicates: Replicates, verdicts: list[Verdict], direction: Mapping[str, Direction]
) -> Baseline:
    """The figures of a run as a stored release.

    Args:
        record: the run.
        replicates: what its `verify` stored.
        verdicts: of its gates; those against an earlier stored release may be anything.
        direction: metric -> "max" or "min".

    Raises:
        UsageError: another gate did not pass.
    """
    refused = [v.gate for v in verdicts if v.verdict != "PASS" and not v.gate.startswith("release.")]
    if refused or "onnx" not in record.artifacts:
        raise UsageError(
            f"expected a run that passed its gates, to store it as the release; got {', '.join(refused) or 'no ONNX'} "
            f"of {record.name}; mend the run first"
        )
    chosen, _ = pick_latency(record, LATENCY, ("measured", "predicted"))
    found = None if chosen is None else latency_interval(chosen)
    latency = {}
    if chosen is not None and found is not None:
        latency[LATENCY] = LatencyFigures(value=found.value, low=found.low, high=found.high, kind=chosen.kind)
    mode = record.target_profile.get("power_mode")
    return Baseline(
        release=record.name,
        target=record.target,
        power_mode=None if mode is None else str(mode),
        precision=record.final_precision,
        onnx_sha256=record.artifacts["onnx"].sha256,
        recipe_sha256=record.recipe_sha256,
        task_sha256=record.task_sha256,
        checkpoint_sha256=record.checkpoint_sha256,
        samples=replicates.samples,
        clusters=replicates.clusters,
        metrics=_metric_figures(replicates, direction),
        latency=latency,
    )


def _metric_figures(replicates: Replicates, direction: Mapping[str, Direction]) -> dict[str, MetricFigures]:
    figures = {}
    for name, way in direction.items():
        if name not in replicates.clean.replicates:
            continue
        _, released = replicates.spread(replicates.clean, name, (0, 1))
        _, drop = drop_interval(replicates, name, way)
        if released is not None and drop is not None:
            figures[name] = MetricFigures(
                released=Figure(value=released.value, low=released.low, high=released.high),
                dense=replicates.clean.dense[name],
                drop=Figure(value=drop.value, low=drop.low, high=drop.high),
            )
    return figures


def save_baseline(path: Path, baseline: Baseline) -> list[str]:
    """Write a stored release.

    Returns:
        What changed, a line each: `key: before -> after`; empty where nothing did.

    Raises:
        StoreError: the file that is there is no baseline, or it cannot be written.
    """
    before = load_baseline(path)
    old = {} if before is None else _flat(before.model_dump(mode="json", by_alias=True, exclude_none=True))
    new = _flat(baseline.model_dump(mode="json", by_alias=True, exclude_none=True))
    atomic_write_text(path, baseline.to_json())
    keys = [*new, *(key for key in old if key not in new)]
    return [f"{key}: {old.get(key, 'none')} -> {new.get(key, 'none')}" for key in keys if old.get(key) != new.get(key)]


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, object] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat


def judge_release(
    record: RunRecord,
    replicates: Replicates | None,
    reason: str,
    gate: ReleaseGate,
    direction: Mapping[str, Direction],
    baseline: Baseline | None,
) -> list[Finding]:
    """One finding for each metric of the gate, and one for the latency.

    Args:
        record: the run.
        replicates: of its `verify`.
        reason: why there are none.
        gate: its limits.
        direction: metric -> "max" or "min".
        baseline: the stored release; None where its file is missing.
    """
    why = (
        None
        if baseline is not None
        else (f"there is no stored release at {gate.file}; write it with `fusepress gate RUN --update-baseline`")
    )
    why = why or _other_place(record, baseline)
    findings = []
    for metric, limit in gate.max_drop.items():
        name = f"release.{metric}"
        lacking = why or _lacking(metric, replicates, reason, direction, baseline)
        if lacking is not None or baseline is None or replicates is None:
            findings.append(without_number(name, limit, lacking or reason))
        else:
            findings.append(_judge_metric(name, metric, limit, replicates, direction[metric], baseline))
    if gate.max_slowdown is not None:
        findings.append(_judge_slowdown(record, gate.max_slowdown, baseline, why))
    return findings


def _other_place(record: RunRecord, baseline: Baseline | None) -> str | None:
    if baseline is None:
        return None
    mode = record.target_profile.get("power_mode")
    here = (record.target, None if mode is None else str(mode))
    if here == (baseline.target, baseline.power_mode):
        return None
    return (
        f"the stored release {baseline.release} is for {baseline.target} / {baseline.power_mode}, this run for "
        f"{here[0]} / {here[1]}; keep one file for each target"
    )


def _lacking(
    metric: str,
    replicates: Replicates | None,
    reason: str,
    direction: Mapping[str, Direction],
    baseline: Baseline | None,
) -> str | None:
    if metric not in direction:
        return f"the task has no metric {metric!r}; it has {', '.join(direction) or 'none'}; correct the recipe"
    if replicates is None:
        return reason
    if metric not in replicates.clean.replicates:
        return f"no bootstrap replicates of {metric!r} were stored; run again from verify"
    if baseline is not None and metric not in baseline.metrics:
        return f"the stored release {baseline.release} has no {metric!r}; write it anew with --update-baseline"
    return None


def _judge_metric(
    name: str, metric: str, limit: float, replicates: Replicates, direction: Direction, baseline: Baseline
) -> Finding:
    then, clean = baseline.metrics[metric], replicates.clean
    same_samples = (replicates.samples, replicates.clusters) == (baseline.samples, baseline.clusters)
    if same_samples and then.dense == clean.dense[metric]:
        value, now = drop_interval(replicates, metric, direction)
        before, basis = then.drop.interval(), "both against the same dense model"
    else:
        sign = 1 if direction == "max" else -1
        value, now = replicates.spread(clean, metric, (0, -sign))
        released = then.released.interval()
        before, basis = (-released if sign > 0 else released), "on other samples or from another dense model, unpaired"
    what = f"the drop of {metric} against the stored release {baseline.release}"
    if now is None:
        return without_interval(name, limit, value - before.value, what)
    where = " in both releases"  # the stored error stays else
    return weighed(name, limit, _difference(now, before), what, replicates, basis=basis, where=where)


def _difference(now: Interval, before: Interval) -> Interval:
    value = now.value - before.value
    up = math.hypot(now.high - now.value, before.value - before.low)
    down = math.hypot(now.value - now.low, before.high - before.value)
    return Interval(value, value - down, value + up, now.df)


def _judge_slowdown(record: RunRecord, limit: float, baseline: Baseline | None, why: str | None) -> Finding:
    """The relative rise of the mean latency, joined on the scale of logarithms."""
    name = f"release.{LATENCY}"
    chosen, why_not = pick_latency(record, LATENCY, ("measured", "predicted"))
    if why is not None or chosen is None or baseline is None:
        return without_number(name, limit, why or why_not)
    then = baseline.latency.get(LATENCY)
    now = latency_interval(chosen)
    if then is None or now is None or min(then.low, now.low) <= 0 or not math.isfinite(then.high):
        return without_number(name, limit, "one of the two latencies has no interval; measure both releases")
    logs = _difference(*(Interval(*map(math.log, (f.value, f.low, f.high))) for f in (now, then.interval())))
    found = Interval(*map(math.expm1, (logs.value, logs.low, logs.high)))
    what = f"the rise of the mean latency over the stored release {baseline.release}'s {shown(then.value)} ms"
    if then.kind != chosen.kind or chosen.extrapolating:
        how = f"is not judged: this one is {chosen.kind}, the stored one {then.kind}; measure both on the device"
        return tell(name, "INCONCLUSIVE", limit, found, f"{what} {spread(found)} {how}")
    says = decide(found, limit)
    why = f"{what} {spread(found)}, {chosen.kind}, is {RELATION[says]} {shown(limit)}"
    if says == "INCONCLUSIVE":
        why += (
            "; measure both releases longer, in one session" if chosen.kind == "measured" else "; measure on the device"
        )
    return tell(name, says, limit, found, why, p=found.p_within(limit))
