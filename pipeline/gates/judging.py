"""Every gate of a recipe, from stored numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fusepress.pipeline.evidence import RunRecord, Verdict
from fusepress.pipeline.gates.bootstrap import Condition
from fusepress.pipeline.gates.family import together
from fusepress.pipeline.gates.intervals import SLACK
from fusepress.pipeline.gates.latency import judge_latency
from fusepress.pipeline.gates.release import Baseline, judge_release
from fusepress.pipeline.gates.replicates import Direction, Replicates, drop_interval, extra_drop_interval
from fusepress.pipeline.gates.verdicts import Finding, shown, spread, tell, weighed, without_interval, without_number
from fusepress.pipeline.recipe import EVERY_STRATUM, GatesConfig, RobustnessGate, failure_parts, floor_parts


def judge(
    record: RunRecord,
    replicates: Replicates | None,
    gates: GatesConfig,
    metrics_direction: Mapping[str, Direction],
    *,
    baseline: Baseline | None = None,
) -> list[Verdict]:
    """Judge every gate of the recipe from stored numbers.

    The candidate is `record.artifacts["onnx"]`. A latency counts when its device is `record.target`, its power mode
    `record.target_profile["power_mode"]`, its precision `record.final_precision`, its batch 1 (or not said), and its
    artifact the candidate or the engine of this run (`record.artifacts["engine"]`). Where the recipe asked for another
    precision, every verdict says so.

    Args:
        record: the run; its own verdicts are not read.
        replicates: what `verify` stored; None when it did not get there.
        gates: the budgets.
        metrics_direction: metric -> "max" (more is better) or "min"; the first is the primary metric.
        baseline: the stored release that `gates.release` compares with; None where its file is missing.

    Returns:
        One verdict a gate (two for a robustness gate with `min`, one a metric for a release gate), in the order of the
        recipe's schema.
    """
    usable, reason = _usable(record, replicates)
    numbers = _Numbers(usable, reason, dict(metrics_direction))
    findings = []
    if gates.accuracy is not None:
        metric = gates.accuracy.metric or numbers.primary
        findings.append(_judge_accuracy(numbers, metric, gates.accuracy.max_drop))
    if gates.latency is not None:
        findings += judge_latency(record, gates.latency)
    for name, limit in gates.floors.items():
        findings += _judge_floor(numbers, name, limit)
    for key, robustness in gates.robustness.items():
        findings += _judge_robustness(numbers, key, robustness)
    if gates.release is not None:
        findings += judge_release(record, usable, reason, gates.release, numbers.direction, baseline)
    verdicts = together(findings)
    asked, made = record.asked_precision, record.final_precision
    if asked is not None and asked != made:
        note = f"; judged in {made}: {asked} was asked for and not released, see quantize for the reason"
        verdicts = [verdict.model_copy(update={"why": verdict.why + note}) for verdict in verdicts]
    return verdicts


@dataclass(frozen=True, slots=True)
class _Numbers:
    replicates: Replicates | None
    reason: str
    direction: dict[str, Direction]

    @property
    def primary(self) -> str:
        return next(iter(self.direction), "")

    def sign(self, metric: str) -> int:
        return 1 if self.direction[metric] == "max" else -1

    def missing(self, metric: str) -> str | None:
        """Why a clean metric cannot be judged, or None."""
        if metric not in self.direction:
            known = ", ".join(self.direction) or "none"
            return f"the task has no metric {metric!r}; it has {known}; correct the recipe"
        if self.replicates is None:
            return self.reason
        clean = self.replicates.clean
        if metric not in clean.replicates or metric not in clean.dense or metric not in clean.compressed:
            return f"no bootstrap replicates of {metric!r} were stored; run again from verify"
        return None


def _usable(record: RunRecord, replicates: Replicates | None) -> tuple[Replicates | None, str]:
    """Replicates count only for the artifact that they were made with."""
    candidate = record.artifacts.get("onnx")
    if candidate is None:
        return None, "there is no ONNX to release; mend the stage that stopped and run again"
    if replicates is None:
        return None, "no bootstrap replicates were stored; run again from verify"
    if replicates.artifact_sha256 is None:
        return None, "the bootstrap replicates do not say of which ONNX they are; run again from verify"
    if replicates.artifact_sha256 != candidate.sha256:
        return None, (
            f"the bootstrap replicates are of another ONNX ({replicates.artifact_sha256[:12]}, not "
            f"{candidate.sha256[:12]}); run again from verify"
        )
    return replicates, ""


def _judge_accuracy(numbers: _Numbers, metric: str, limit: float) -> Finding:
    """Non-inferiority: the whole interval of the paired drop must be within the limit."""
    gate = f"accuracy.{metric}"
    missing = numbers.missing(metric)
    if missing is not None or numbers.replicates is None:
        return without_number(gate, limit, missing or numbers.reason)
    replicates = numbers.replicates
    drop, found = drop_interval(replicates, metric, numbers.direction[metric])
    what = f"the drop of {metric} against the dense model"
    if found is None:
        return without_interval(gate, limit, drop, what)
    if replicates.trusted and found.high < -SLACK:
        why = (
            f"{metric} is better than the dense model's by {spread(-found)}, which is beyond noise; check that "
            "evaluation samples were not trained on and that the dense checkpoint was trained to the end"
        )
        return tell(gate, "ANOMALOUS", limit, found, why + replicates.note, p=1.0)
    return weighed(gate, limit, found, what, replicates)


def _judge_floor(numbers: _Numbers, name: str, limit: float) -> list[Finding]:
    """A floor of a metric over all samples, over those of one stratum, or over those of each."""
    gate = f"floors.{name}"
    metric, label = floor_parts(name)
    missing = numbers.missing(metric)
    if missing is not None or numbers.replicates is None:
        return [without_number(gate, limit, missing or numbers.reason)]
    sign, strata = numbers.sign(metric), numbers.replicates.strata
    if label is None:
        return [_floor(gate, metric, limit, numbers.replicates.clean, numbers.replicates, sign)]
    if not strata or label not in {*strata, EVERY_STRATUM}:
        known = ", ".join(sorted(strata)) or "none: the task has no strata(batch), or too many to judge"
        why = f"no evaluation sample is of the stratum {label!r}; there are {known}; correct the recipe"
        return [without_number(gate, limit, why)]
    chosen = sorted(strata) if label == EVERY_STRATUM else [label]
    return [
        _floor(f"floors.{metric}@{one}", metric, limit, strata[one].clean, strata[one], sign, f" in {one!r}")
        for one in chosen
    ]


def _floor(
    gate: str, metric: str, limit: float, condition: Condition, replicates: Replicates, sign: int, where: str = ""
) -> Finding:
    value, found = replicates.spread(condition, metric, (0, 1))
    if found is None:
        return without_interval(gate, limit, value, metric + where)
    return weighed(gate, limit, found, metric + where, replicates, word="floor" if sign > 0 else "ceiling")


def _judge_robustness(numbers: _Numbers, key: str, gate: RobustnessGate) -> list[Finding]:
    metric, name = numbers.primary, f"robustness.{key}"
    failure, severity = failure_parts(key, gate)
    missing = numbers.missing(metric)
    condition = None if numbers.replicates is None else numbers.replicates.failures.get((failure, severity))
    if missing is None and numbers.replicates is not None:
        if condition is None:
            tried = [f"{other} (severity {level})" for other, level in sorted(numbers.replicates.failures)]
            known = ", ".join(tried) or "none"
            missing = f"{failure} at severity {severity} was not tried; tried: {known}; run again from verify"
        elif metric not in condition.replicates:
            missing = f"no bootstrap replicates of {metric!r} under {failure}; run again from verify"
        elif len(condition.replicates[metric]) != len(numbers.replicates.clean.replicates[metric]):
            missing = f"the replicates under {failure} are not paired with the clean ones; run again from verify"
    if missing is not None or numbers.replicates is None or condition is None:
        findings = [without_number(name, gate.max_extra_drop, missing or numbers.reason)]
        return findings if gate.min is None else [*findings, without_number(f"{name}.min", gate.min, missing or "")]
    findings = [_extra_drop(numbers, numbers.replicates, condition, key, gate)]
    if gate.min is not None:
        sign = numbers.sign(metric)
        findings.append(_floor(f"{name}.min", metric, gate.min, condition, numbers.replicates, sign))
    return findings


def _extra_drop(
    numbers: _Numbers, replicates: Replicates, condition: Condition, key: str, gate: RobustnessGate
) -> Finding:
    """How much more the compressed model loses under the failure than the dense one does."""
    metric, name, limit = numbers.primary, f"robustness.{key}", gate.max_extra_drop
    failure, severity = failure_parts(key, gate)
    extra, found = extra_drop_interval(replicates, condition, metric, numbers.direction[metric])
    what = f"under {failure} (severity {severity}) the compressed model's extra drop of {metric}"
    if found is None:
        return without_interval(name, limit, extra, what)
    blind = _says_nothing(replicates, condition, metric, numbers.sign(metric))
    if blind is not None:
        return tell(name, "INCONCLUSIVE", limit, found, f"under {failure} {blind}")
    finding = weighed(name, limit, found, what, replicates)
    if metric in replicates.constant:
        return finding
    why = f"{finding.verdict.why}; not compared with a constant predictor, for none was stored"
    return Finding(finding.verdict.model_copy(update={"why": why}), finding.p)


def _says_nothing(replicates: Replicates, condition: Condition, metric: str, sign: int) -> str | None:
    """Why a failure tells nothing: the dense model is no better than a constant prediction beyond noise."""
    constant = replicates.constant.get(metric)
    if constant is None:
        return None
    value, dense = replicates.spread(condition, metric, (1, 0))
    worst = None if dense is None else (dense.low if sign > 0 else dense.high)
    if worst is not None and sign * (worst - constant) > SLACK:
        return None
    told = shown(value) if dense is None else spread(dense)
    return (
        f"the dense model's own {metric} {told} is no better than the constant predictor's {shown(constant)}, so the "
        "gate says nothing; take a milder severity or train the dense model to survive the failure"
    )
