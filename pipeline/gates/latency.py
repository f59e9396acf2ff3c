"""Gates on latency: which measurement counts, and what its upper confidence bound says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from fusepress.pipeline.evidence import UNSTABLE, Measurement, RunRecord, Verdict
from fusepress.pipeline.gates.intervals import Interval
from fusepress.pipeline.gates.verdicts import (
    RELATION,
    Finding,
    decide,
    more_needed,
    shown,
    spread,
    tell,
    without_number,
)
from fusepress.pipeline.recipe import LatencyGate

PREDICTED_PERCENT = 90  # of the predictor's intervals; every other one is of 95 %


def judge_latency(record: RunRecord, gate: LatencyGate) -> list[Finding]:
    """One finding for each limit of the gate."""
    findings = []
    if gate.mean_ms is not None:
        findings.append(_judge_one(record, "latency.mean_ms", gate.mean_ms, gate.evidence))
    if gate.p99_ms is not None:
        allowed = tuple(kind for kind in gate.evidence if kind == "measured")
        findings.append(_judge_one(record, "latency.p99_ms", gate.p99_ms, allowed))
    for part, limit in gate.parts.items():
        findings.append(_judge_one(record, f"latency.{part}.mean_ms", limit, gate.evidence))
    return findings


def _judge_one(record: RunRecord, name: str, limit: float, kinds: Sequence[str]) -> Finding:
    chosen, why_not = pick_latency(record, name, kinds)
    if chosen is None:
        return without_number(name, limit, why_not)
    found = latency_interval(chosen)
    if found is None:
        why = f"the {chosen.kind} latency {shown(chosen.value)} ms has no interval, so it cannot decide; measure again"
        return Finding(Verdict(gate=name, verdict="INCONCLUSIVE", limit=limit, value=chosen.value, why=why))
    told = spread(found, " ms", percent=PREDICTED_PERCENT if chosen.kind == "predicted" else 95)
    where = f"{chosen.kind} for {_place(chosen.device, chosen.power_mode, chosen.precision)}"
    if _doubtful(record, chosen):
        why = f"latency {told}, {where}, cannot be trusted ({chosen.note}); measure again"
        return tell(name, "INCONCLUSIVE", limit, found, why)
    if chosen.extrapolating:
        why = f"latency {told}, {where}, extrapolates beyond what the predictor was validated on; measure on the device"
        return tell(name, "INCONCLUSIVE", limit, found, why)
    says = decide(found, limit)
    why = f"latency {told}, {where}, is {RELATION[says]} {shown(limit)} ms"
    if says == "INCONCLUSIVE":
        why += _what_decides(chosen, found, limit)
    return tell(name, says, limit, found, why, p=found.p_within(limit))


def _doubtful(record: RunRecord, measurement: Measurement) -> bool:
    """Whether a device's figure was told with --allow-unstable. This host is gated as it is, other work included."""
    return record.target_profile.get("family") != "host" and UNSTABLE in (measurement.note or "")


def latency_interval(measurement: Measurement) -> Interval | None:
    """Its interval, widened to hold the value; None where it has none."""
    if measurement.low is None or measurement.high is None:
        return None
    value = measurement.value
    return Interval(value, min(measurement.low, value), max(measurement.high, value))


def _what_decides(chosen: Measurement, found: Interval, limit: float) -> str:
    if chosen.kind == "predicted":
        return "; measure on the device to decide"
    more = more_needed(found, limit, chosen.n) if chosen.n else None
    if chosen.n and more is None:
        return "; the value is at the limit, so no number of runs is likely to decide"
    return f"; about {more:,} more runs would decide it (now {chosen.n:,})" if chosen.n else "; measure more runs"


def pick_latency(record: RunRecord, name: str, kinds: Sequence[str]) -> tuple[Measurement | None, str]:
    """The last measured latency that counts, else the last predicted one, else why none counts."""
    if not kinds:
        return (
            None,
            f"{name} needs measured evidence, which the recipe excludes; add it to gates.latency.evidence",
        )
    expected = _place(record.target, record.target_profile.get("power_mode"), record.final_precision)
    artifacts = {record.artifacts[key].sha256 for key in ("onnx", "engine") if key in record.artifacts}
    if not artifacts:
        return None, "there is no ONNX to release; mend the stage that stopped and run again"
    matching: list[Measurement] = []
    refused: Counter[str] = Counter()
    for stage in record.stages:
        for measurement in stage.measurements:
            if measurement.name != name:
                continue
            reason = _why_not(measurement, expected, artifacts, kinds)
            if reason is None:
                matching.append(measurement)
            else:
                refused[reason] += 1
    for kind in ("measured", "predicted"):
        for measurement in reversed(matching):
            if measurement.kind == kind:
                return measurement, ""
    reasons = "; ".join(f"{count} {reason}" for reason, count in refused.items()) or "none was recorded"
    return None, f"no {name} of the released artifact on {expected} ({' or '.join(kinds)}): {reasons}"


def _why_not(measurement: Measurement, expected: str, artifacts: set[str], kinds: Sequence[str]) -> str | None:
    place = _place(measurement.device, measurement.power_mode, measurement.precision)
    if measurement.artifact_sha256 not in artifacts:
        return "of another artifact"
    if place != expected:
        return f"of {place}"
    if measurement.kind not in kinds:
        return f"{measurement.kind}, which does not count here"
    if measurement.batch not in (None, 1):
        return f"of batch {measurement.batch}"
    return None


def _place(device: str | None, power_mode: Any, precision: Any) -> str:
    parts = [device or "an unnamed device", *(str(part) for part in (power_mode, precision) if part is not None)]
    return " / ".join(parts)
