"""Gates: verdicts from stored numbers, never from the user's code. Pure numpy and scipy.

**What is judged.** `judge` reads a `RunRecord` (latency measurements, artifacts, the target) and the paired bootstrap
replicates that the stage `verify` stored (accuracy, floors, robustness). A missing number fails its gate.

**Bootstrap.** Clusters (scenes, drives) are drawn with replacement and their samples concatenated; both models are
scored on the same draw, so that what the samples have in common cancels in the difference. The draws depend only on
the cluster structure, the number of replicates and the seed: the clean condition and every failure use the same draws
as long as these three agree, which is what pairs them. With a single cluster, samples are drawn instead, and every
verdict says so.

**Interval.** 95 %, from the stored replicates alone. BCa would need a jackknife, which is not stored, so:

* ten or more clusters: the expanded percentile interval (Hesterberg 2015, "What Teachers Should Know About the
  Bootstrap", section 5): percentiles at level Phi(-t * sqrt(k / (k - 1))) in place of 2.5 %, with t the quantile of
  Student's t at k - 1 degrees of freedom, for plain percentiles are too narrow when k is small;
* fewer: point +- t * standard error * sqrt(k / (k - 1)), for the percentiles of few clusters never leave the range of
  the most extreme cluster.

The interval is widened to hold the point estimate, so that no gate passes with a value beyond its limit.

**replicates.npz**, schema 1 (plain arrays, no pickles, byte-identical for the same content), `<p>` being empty for the
clean condition and `robustness/<failure>/<severity>/` for a failure:

* `<p>dense/<metric>`, `<p>compressed/<metric>`: float64 (R,), row r of both is the same draw;
* `<p>dense_point/<metric>`, `<p>compressed_point/<metric>`: float64 (), the metric over all samples;
* `constant_point/<metric>`: float64 (), what the best constant prediction reaches (optional);
* `meta/schema`, `meta/samples`, `meta/clusters`: int64 (); `meta/artifact_sha256`: text (), the judged ONNX (optional).

**Gate names**: `accuracy.<metric>`, `latency.mean_ms`, `latency.p99_ms`, `floors.<metric>`, `robustness.<failure>`
(extra drop) and `robustness.<failure>.min` (absolute floor).
"""

from __future__ import annotations

import io
import math
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import stats as distributions

from fusepress.pipeline.errors import (
    EXIT_GATE_FAILED,
    EXIT_INCONCLUSIVE,
    EXIT_RELEASED,
    StoreError,
    TaskError,
)
from fusepress.pipeline.evidence import GateVerdict, Measurement, RunRecord, Verdict
from fusepress.pipeline.recipe import GatesConfig, LatencyGate, RobustnessGate
from fusepress.pipeline.store import atomic_write_bytes

Floats = npt.NDArray[np.float64]
Stats = Mapping[str, npt.NDArray[Any]]
Score = Callable[[dict[str, npt.NDArray[Any]]], Mapping[str, float]]
Direction = Literal["max", "min"]

REPLICATES_NPZ = "replicates.npz"
SCHEMA = 1
CONFIDENCE = 0.95
FEW_CLUSTERS = 10
MOST_UNDEFINED = 0.05  # share of draws in which a metric may be undefined (a class that was not drawn)
SLACK = 1e-9  # 0.66 - 0.63 is more than 0.03 in floating point
NO_GATE = "no gate was set: nothing was judged"


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """Both models under one condition (clean, or a failure at a severity).

    Attributes:
        dense: metrics of the dense model over all samples.
        compressed: metrics of the compressed model over all samples.
        replicates: metric -> (R, 2), column 0 dense and column 1 compressed.
    """

    dense: dict[str, float]
    compressed: dict[str, float]
    replicates: dict[str, Floats]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replicates:
    """All that the accuracy, floor and robustness gates read.

    Attributes:
        clean: the undisturbed condition.
        failures: (failure, severity) -> condition, drawn with the same seed and clusters as `clean`.
        constant: metrics of the best constant prediction; it sees no input, so it holds under every failure.
        samples: number of samples.
        clusters: number of clusters among them.
        artifact_sha256: hash of the ONNX whose outputs are in the compressed columns.
    """

    clean: Condition
    failures: dict[tuple[str, int], Condition] = field(default_factory=dict)
    constant: dict[str, float] = field(default_factory=dict)
    samples: int
    clusters: int
    artifact_sha256: str | None = None

    @property
    def units(self) -> int:
        """How many things were drawn from: clusters, or samples where there is one cluster."""
        return self.clusters if self.clusters > 1 else self.samples

    @property
    def note(self) -> str:
        """What a reader must know about the draws; empty when nothing."""
        if self.clusters == 1:
            return "; all samples are of one cluster, so samples were resampled and the interval may be too narrow"
        if self.clusters < FEW_CLUSTERS:
            return f"; there are only {self.clusters} clusters"
        return ""


@dataclass(frozen=True, slots=True)
class Interval:
    """A point estimate with its 95 % interval."""

    value: float
    low: float
    high: float

    def __neg__(self) -> Interval:
        return Interval(-self.value, -self.high, -self.low)


def bootstrap_replicates(
    stats_dense: Stats,
    stats_compressed: Stats,
    score: Score,
    groups: Sequence[str],
    *,
    replicates: int,
    seed: int,
) -> dict[str, Floats]:
    """Score both models on the same resampled clusters.

    Args:
        stats_dense: per-sample statistics of the dense model, leading dimension N.
        stats_compressed: the same of the compressed model, same samples in the same order.
        score: the task's metrics from statistics.
        groups: N cluster names; with one distinct name, samples are resampled instead.
        replicates: R, number of draws.
        seed: of the draws.

    Returns:
        metric -> float64 (R, 2), column 0 dense and column 1 compressed; NaN where a metric is undefined in a draw.

    Raises:
        TaskError: the statistics do not fit each other or the groups, or `score` changes its metrics.
    """
    _check_stats(stats_dense, stats_compressed, len(groups))
    names = list(score(dict(stats_dense)))
    out = {name: np.empty((replicates, 2)) for name in names}
    for index, rows in enumerate(_draws(groups, replicates, seed)):
        for column, stats in enumerate((stats_dense, stats_compressed)):
            metrics = score({name: array[rows] for name, array in stats.items()})
            if set(metrics) != set(names):
                raise TaskError(
                    f"expected score() to return the metrics {names} for any samples; got {sorted(metrics)} "
                    f"in bootstrap draw {index}; return NaN for a metric that is undefined"
                )
            for name in names:
                out[name][index, column] = metrics[name]
    return out


def compare(
    stats_dense: Stats,
    stats_compressed: Stats,
    score: Score,
    groups: Sequence[str],
    *,
    replicates: int,
    seed: int,
) -> Condition:
    """`bootstrap_replicates` together with both models' metrics over all samples; arguments as there."""
    drawn = bootstrap_replicates(stats_dense, stats_compressed, score, groups, replicates=replicates, seed=seed)
    return Condition(
        dense={name: float(value) for name, value in score(dict(stats_dense)).items()},
        compressed={name: float(value) for name, value in score(dict(stats_compressed)).items()},
        replicates=drawn,
    )


def _check_stats(dense: Stats, compressed: Stats, n: int) -> None:
    if set(dense) != set(compressed) or not dense:
        raise TaskError(
            f"expected the same statistics of both models; got {sorted(dense)} and {sorted(compressed)}; "
            "return the same keys from sample_stats() whatever the outputs"
        )
    for name in dense:
        for label, array in (("dense", dense[name]), ("compressed", compressed[name])):
            if array.ndim == 0 or array.shape[0] != n or n == 0:
                raise TaskError(
                    f"expected statistics with a leading dimension of {n} samples (at least 1); got shape "
                    f"{array.shape} at {name!r} of the {label} model; return one row a sample from sample_stats()"
                )


def _draws(groups: Sequence[str], replicates: int, seed: int) -> Iterator[npt.NDArray[np.intp]]:
    members = _clusters(groups)
    if len(members) == 1:
        members = [np.array([row], dtype=np.intp) for row in range(len(groups))]
    generator = np.random.default_rng(seed)
    for _ in range(replicates):
        picks = generator.integers(0, len(members), size=len(members))
        yield np.concatenate([members[pick] for pick in picks])


def _clusters(groups: Sequence[str]) -> list[npt.NDArray[np.intp]]:
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(groups):
        rows.setdefault(name, []).append(row)
    return [np.array(indices, dtype=np.intp) for indices in rows.values()]


def interval(point: float, drawn: npt.NDArray[np.floating[Any]], units: int) -> Interval | None:
    """The 95 % interval of a statistic from its bootstrap replicates (which one, and why: see the module).

    Args:
        point: the statistic over all samples.
        drawn: (R,) its replicates; NaN where undefined.
        units: number of clusters (or samples) that were drawn from.

    Returns:
        None where it is undefined: no point, one unit, or too many undefined draws.
    """
    finite = np.asarray(drawn, dtype=np.float64)
    finite = finite[np.isfinite(finite)]
    enough = len(drawn) > 0 and len(finite) >= (1 - MOST_UNDEFINED) * len(drawn)
    if not math.isfinite(point) or units < 2 or not enough:
        return None
    reach = float(distributions.t.ppf(0.5 + CONFIDENCE / 2, units - 1)) * math.sqrt(units / (units - 1))
    if units < FEW_CLUSTERS:
        half = reach * float(np.std(finite))
        return Interval(point, point - half, point + half)
    tail = float(distributions.norm.cdf(-reach))
    low, high = np.quantile(finite, [tail, 1 - tail])
    return Interval(point, min(float(low), point), max(float(high), point))


def metric_intervals(replicates: Replicates, *, compressed: bool = True) -> dict[str, Interval]:
    """The interval of every clean metric of one model, for its measurements; undefined ones are left out."""
    column, points = (1, replicates.clean.compressed) if compressed else (0, replicates.clean.dense)
    found = {
        name: interval(points[name], drawn[:, column], replicates.units)
        for name, drawn in replicates.clean.replicates.items()
    }
    return {name: value for name, value in found.items() if value is not None}


def drop_interval(replicates: Replicates, metric: str, direction: Direction) -> tuple[float, Interval | None]:
    """How much worse the compressed model is than the dense one, paired; negative where it is better.

    Args:
        replicates: both models, drawn together.
        metric: one of theirs.
        direction: which way the metric is better.

    Returns:
        The drop over all samples, and its 95 % interval or None where that is undefined.
    """
    sign = 1 if direction == "max" else -1
    drop = sign * (replicates.clean.dense[metric] - replicates.clean.compressed[metric])
    drawn = replicates.clean.replicates[metric]
    return drop, interval(drop, sign * (drawn[:, 0] - drawn[:, 1]), replicates.units)


# ---------------------------------------------------------------------------------------------------- the stored file


def save_replicates(path: Path, replicates: Replicates) -> None:
    """Write replicates.npz: the same content gives the same bytes; written aside, then renamed.

    Raises:
        StoreError: a failure's name holds a slash, or the file cannot be written.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, array in sorted(_arrays(replicates).items()):
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            content = io.BytesIO()
            np.lib.format.write_array(content, np.asarray(array), version=(1, 0), allow_pickle=False)
            archive.writestr(entry, content.getvalue())
    atomic_write_bytes(path, buffer.getvalue())


def _arrays(replicates: Replicates) -> dict[str, npt.NDArray[Any]]:
    out: dict[str, npt.NDArray[Any]] = {
        "meta/schema": np.array(SCHEMA),
        "meta/samples": np.array(replicates.samples),
        "meta/clusters": np.array(replicates.clusters),
    }
    if replicates.artifact_sha256 is not None:
        out["meta/artifact_sha256"] = np.array(replicates.artifact_sha256)
    for name, value in replicates.constant.items():
        out[f"constant_point/{name}"] = np.array(float(value))
    conditions = {"": replicates.clean}
    for (failure, severity), condition in replicates.failures.items():
        if "/" in failure:
            raise StoreError(f"expected a failure name without '/'; got {failure!r}; rename the failure in the task")
        conditions[f"robustness/{failure}/{severity}/"] = condition
    for prefix, condition in conditions.items():
        for name, drawn in condition.replicates.items():
            for column, model in enumerate(("dense", "compressed")):
                out[f"{prefix}{model}/{name}"] = np.ascontiguousarray(drawn[:, column], dtype=np.float64)
        for model, points in (("dense", condition.dense), ("compressed", condition.compressed)):
            for name, value in points.items():
                out[f"{prefix}{model}_point/{name}"] = np.array(float(value))
    return out


def load_replicates(path: Path) -> Replicates:
    """Read replicates.npz (no pickles).

    Raises:
        StoreError: it is missing, damaged or of another schema.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        if int(arrays["meta/schema"]) != SCHEMA:
            raise ValueError(f"schema {int(arrays['meta/schema'])}, not {SCHEMA}")
        return _from_arrays(arrays)
    except FileNotFoundError as error:
        raise StoreError(
            f"expected bootstrap replicates; got no file at {path}; run `fusepress compress` again"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise StoreError(
            f"expected bootstrap replicates of schema {SCHEMA}; got a file that does not fit at {path} ({error}); "
            "run `fusepress compress --from verify` again"
        ) from error


def _from_arrays(arrays: Mapping[str, npt.NDArray[Any]]) -> Replicates:
    parts: dict[tuple[str, int] | None, dict[str, npt.NDArray[Any]]] = {None: {}}
    for name, array in arrays.items():
        if name.startswith("robustness/"):
            _, failure, severity, rest = name.split("/", 3)
            parts.setdefault((failure, int(severity)), {})[rest] = array
        else:
            parts[None][name] = array
    clean = parts.pop(None)
    sha256 = clean.get("meta/artifact_sha256")
    return Replicates(
        clean=_condition(clean),
        failures={where: _condition(part) for where, part in parts.items() if where is not None},
        constant=_points(clean, "constant_point/"),
        samples=int(clean["meta/samples"]),
        clusters=int(clean["meta/clusters"]),
        artifact_sha256=None if sha256 is None else str(sha256),
    )


def _condition(part: Mapping[str, npt.NDArray[Any]]) -> Condition:
    names = [name.removeprefix("dense/") for name in part if name.startswith("dense/")]
    return Condition(
        dense=_points(part, "dense_point/"),
        compressed=_points(part, "compressed_point/"),
        replicates={name: np.stack([part[f"dense/{name}"], part[f"compressed/{name}"]], axis=1) for name in names},
    )


def _points(part: Mapping[str, npt.NDArray[Any]], prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): float(array) for name, array in part.items() if name.startswith(prefix)}


# ------------------------------------------------------------------------------------------------------------ judging


def judge(
    record: RunRecord,
    replicates: Replicates | None,
    gates: GatesConfig,
    metrics_direction: Mapping[str, Direction],
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

    Returns:
        One verdict a gate (two for a robustness gate with `min`), in the order of the recipe's schema.
    """
    usable, reason = _usable(record, replicates)
    numbers = _Numbers(usable, reason, dict(metrics_direction))
    verdicts = []
    if gates.accuracy is not None:
        metric = gates.accuracy.metric or numbers.primary
        verdicts.append(_judge_accuracy(numbers, metric, gates.accuracy.max_drop))
    if gates.latency is not None:
        verdicts += _judge_latency(record, gates.latency)
    verdicts += [_judge_floor(numbers, metric, limit) for metric, limit in gates.floors.items()]
    for failure, gate in gates.robustness.items():
        verdicts += _judge_robustness(numbers, failure, gate)
    asked, made = record.asked_precision, record.final_precision
    if asked is not None and asked != made:
        note = f"; judged in {made}: {asked} was asked for and not released, see quantize for the reason"
        verdicts = [verdict.model_copy(update={"why": verdict.why + note}) for verdict in verdicts]
    return verdicts


def overall(verdicts: Sequence[Verdict]) -> tuple[GateVerdict, str]:
    """The verdict of a run and why: FAIL over ANOMALOUS over INCONCLUSIVE over PASS; no gate is a PASS that says so."""
    if not verdicts:
        return "PASS", NO_GATE
    order: tuple[GateVerdict, ...] = ("FAIL", "ANOMALOUS", "INCONCLUSIVE", "PASS")
    worst = next(level for level in order if any(v.verdict == level for v in verdicts))
    if worst == "PASS":
        return "PASS", "the gate passed" if len(verdicts) == 1 else f"all {len(verdicts)} gates passed"
    counts = Counter(v.verdict for v in verdicts)
    words = {"FAIL": "failed", "ANOMALOUS": "anomalous", "INCONCLUSIVE": "inconclusive", "PASS": "passed"}
    others = [f"{counts[level]} {words[level]}" for level in order if counts[level] and level != worst]
    gates = "gate" if len(verdicts) == 1 else "gates"
    tally = ", ".join([f"{counts[worst]} of {len(verdicts)} {gates} {words[worst]}", *others])
    reasons = "; ".join(f"{v.gate}: {v.why}" for v in verdicts if v.verdict == worst)
    return worst, f"{tally}. {reasons}"


def exit_code(verdict: GateVerdict) -> int:
    """0 released, 3 a gate failed, 4 inconclusive or anomalous."""
    if verdict == "PASS":
        return EXIT_RELEASED
    return EXIT_GATE_FAILED if verdict == "FAIL" else EXIT_INCONCLUSIVE


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
    if replicates.artifact_sha256 not in (None, candidate.sha256):
        return None, (
            f"the bootstrap replicates are of another ONNX ({str(replicates.artifact_sha256)[:12]}, not "
            f"{candidate.sha256[:12]}); run again from verify"
        )
    return replicates, ""


def _missing(gate: str, limit: float, why: str) -> Verdict:
    return Verdict(gate=gate, verdict="FAIL", limit=limit, why=f"missing number: {why}")


def _undefined(gate: str, limit: float, value: float, what: str) -> Verdict:
    if not math.isfinite(value):
        return _missing(gate, limit, f"{what} is not a number; give the evaluation samples in which it is defined")
    return Verdict(
        gate=gate,
        verdict="INCONCLUSIVE",
        limit=limit,
        value=value,
        why=f"{what} {_f(value)} has no interval: too few samples, or undefined in more than "
        f"{MOST_UNDEFINED:.0%} of the draws; evaluate on more samples",
    )


def _decide(found: Interval, limit: float) -> GateVerdict:
    """At most `limit`: PASS if the whole interval is within, FAIL if the whole interval is beyond."""
    if found.high <= limit + SLACK:
        return "PASS"
    return "FAIL" if found.low > limit + SLACK else "INCONCLUSIVE"


_RELATION = {"PASS": "within", "FAIL": "beyond", "INCONCLUSIVE": "on both sides of"}


def _needed(found: Interval, limit: float, n: int) -> str:
    """How many more samples decide, were the point estimate to stay: the half-width goes with 1 / sqrt(n)."""
    distance = abs(limit - found.value)
    half = found.high - found.value if found.value <= limit else found.value - found.low
    if half > 1000 * distance:
        return "; the value is at the limit, so no number of samples is likely to decide"
    more = max(1, math.ceil(n * (half / distance) ** 2) - n)
    return f"; about {more:,} more samples would decide it (now {n:,})"


def _judge_accuracy(numbers: _Numbers, metric: str, limit: float) -> Verdict:
    gate = f"accuracy.{metric}"
    missing = numbers.missing(metric)
    if missing is not None or numbers.replicates is None:
        return _missing(gate, limit, missing or numbers.reason)
    replicates = numbers.replicates
    drop, found = drop_interval(replicates, metric, numbers.direction[metric])
    what = f"the drop of {metric} against the dense model"
    if found is None:
        return _undefined(gate, limit, drop, what)
    verdict = _decide(found, limit)
    why = f"{what} {_spread(found)} is {_RELATION[verdict]} {_f(limit)}"
    if verdict == "INCONCLUSIVE":
        why += _needed(found, limit, replicates.samples)
    elif found.high < -SLACK:
        verdict = "ANOMALOUS"
        why = (
            f"{metric} is better than the dense model's by {_spread(-found)}, which is beyond noise; check that "
            "evaluation samples were not trained on and that the dense checkpoint was trained to the end"
        )
    return _verdict(gate, verdict, limit, found, why + replicates.note)


def _judge_floor(numbers: _Numbers, metric: str, limit: float) -> Verdict:
    gate = f"floors.{metric}"
    missing = numbers.missing(metric)
    if missing is not None or numbers.replicates is None:
        return _missing(gate, limit, missing or numbers.reason)
    return _floor(gate, metric, limit, numbers.replicates.clean, numbers.replicates, numbers.sign(metric))


def _floor(gate: str, metric: str, limit: float, condition: Condition, replicates: Replicates, sign: int) -> Verdict:
    value = condition.compressed[metric]
    found = interval(value, condition.replicates[metric][:, 1], replicates.units)
    if found is None:
        return _undefined(gate, limit, value, metric)
    # a floor is a ceiling of the negated metric; metrics of which less is better have a ceiling already
    upside = -found if sign > 0 else found
    verdict = _decide(upside, -sign * limit)
    word = "floor" if sign > 0 else "ceiling"
    why = f"{metric} {_spread(found)} is {_RELATION[verdict]} the {word} {_f(limit)}"
    if verdict == "INCONCLUSIVE":
        why += _needed(upside, -sign * limit, replicates.samples)
    return _verdict(gate, verdict, limit, found, why + replicates.note)


def _judge_robustness(numbers: _Numbers, failure: str, gate: RobustnessGate) -> list[Verdict]:
    metric, name = numbers.primary, f"robustness.{failure}"
    missing = numbers.missing(metric)
    condition = None if numbers.replicates is None else numbers.replicates.failures.get((failure, gate.severity))
    if missing is None and numbers.replicates is not None:
        if condition is None:
            tried = [f"{key} (severity {level})" for key, level in sorted(numbers.replicates.failures)]
            known = ", ".join(tried) or "none"

            missing = f"{failure} at severity {gate.severity} was not tried; tried: {known}; run again from verify"
        elif metric not in condition.replicates:
            missing = f"no bootstrap replicates of {metric!r} under {failure}; run again from verify"
        elif len(condition.replicates[metric]) != len(numbers.replicates.clean.replicates[metric]):
            missing = f"the replicates under {failure} are not paired with the clean ones; run again from verify"
    if missing is not None or numbers.replicates is None or condition is None:
        verdicts = [_missing(name, gate.max_extra_drop, missing or numbers.reason)]
        return verdicts if gate.min is None else [*verdicts, _missing(f"{name}.min", gate.min, missing or "")]
    verdicts = [_extra_drop(numbers, numbers.replicates, condition, failure, gate)]
    if gate.min is not None:
        sign = numbers.sign(metric)
        verdicts.append(_floor(f"{name}.min", metric, gate.min, condition, numbers.replicates, sign))
    return verdicts


def _extra_drop(
    numbers: _Numbers, replicates: Replicates, condition: Condition, failure: str, gate: RobustnessGate
) -> Verdict:
    """How much more the compressed model loses under the failure than the dense one does."""
    metric, name, limit = numbers.primary, f"robustness.{failure}", gate.max_extra_drop
    sign, clean = numbers.sign(metric), replicates.clean
    drawn, under = clean.replicates[metric], condition.replicates[metric]
    lost = sign * (drawn - under)
    extra = sign * (
        (clean.compressed[metric] - condition.compressed[metric]) - (clean.dense[metric] - condition.dense[metric])
    )
    found = interval(extra, lost[:, 1] - lost[:, 0], replicates.units)
    what = f"under {failure} (severity {gate.severity}) the compressed model's extra drop of {metric}"
    if found is None:
        return _undefined(name, limit, extra, what)
    blind = _says_nothing(replicates, condition, metric, sign)
    if blind is not None:
        return _verdict(name, "INCONCLUSIVE", limit, found, f"under {failure} {blind}")
    verdict = _decide(found, limit)
    why = f"{what} {_spread(found)} is {_RELATION[verdict]} {_f(limit)}"
    if verdict == "INCONCLUSIVE":
        why += _needed(found, limit, replicates.samples)
    if metric not in replicates.constant:
        why += "; not compared with a constant predictor, for none was stored"
    return _verdict(name, verdict, limit, found, why + replicates.note)


def _says_nothing(replicates: Replicates, condition: Condition, metric: str, sign: int) -> str | None:
    """Why a failure tells nothing: the dense model is no better than a constant prediction beyond noise."""
    constant = replicates.constant.get(metric)
    if constant is None:
        return None
    dense = interval(condition.dense[metric], condition.replicates[metric][:, 0], replicates.units)
    worst = None if dense is None else (dense.low if sign > 0 else dense.high)
    if worst is not None and sign * (worst - constant) > SLACK:
        return None
    shown = _f(condition.dense[metric]) if dense is None else _spread(dense)
    return (
        f"the dense model's own {metric} {shown} is no better than the constant predictor's {_f(constant)}, so the "
        "gate says nothing; take a milder severity or train the dense model to survive the failure"
    )


# ------------------------------------------------------------------------------------------------------------ latency


def _judge_latency(record: RunRecord, gate: LatencyGate) -> list[Verdict]:
    verdicts = []
    if gate.mean_ms is not None:
        verdicts.append(_judge_one_latency(record, "latency.mean_ms", gate.mean_ms, gate.evidence))
    if gate.p99_ms is not None:
        allowed = tuple(kind for kind in gate.evidence if kind == "measured")
        verdicts.append(_judge_one_latency(record, "latency.p99_ms", gate.p99_ms, allowed))
    return verdicts


def _judge_one_latency(record: RunRecord, name: str, limit: float, kinds: Sequence[str]) -> Verdict:
    chosen, why_not = _pick_latency(record, name, kinds)
    if chosen is None:
        return _missing(name, limit, why_not)
    if chosen.low is None or chosen.high is None:
        why = f"the {chosen.kind} latency {_f(chosen.value)} ms has no interval, so it cannot decide; measure again"
        return Verdict(gate=name, verdict="INCONCLUSIVE", limit=limit, value=chosen.value, why=why)
    found = Interval(chosen.value, min(chosen.low, chosen.value), max(chosen.high, chosen.value))
    where = f"{chosen.kind} for {_place(chosen.device, chosen.power_mode, chosen.precision)}"
    if chosen.extrapolating:
        why = (
            f"latency {_spread(found, ' ms')}, {where}, extrapolates beyond what the predictor was validated on; "
            "measure on the device"
        )
        return _verdict(name, "INCONCLUSIVE", limit, found, why)
    verdict = _decide(found, limit)
    why = f"latency {_spread(found, ' ms')}, {where}, is {_RELATION[verdict]} {_f(limit)} ms"
    if verdict == "INCONCLUSIVE" and chosen.kind == "predicted":
        why += "; measure on the device to decide"
    elif verdict == "INCONCLUSIVE":
        why += _needed(found, limit, chosen.n).replace("samples", "runs") if chosen.n else "; measure more runs"
    return _verdict(name, verdict, limit, found, why)


def _pick_latency(record: RunRecord, name: str, kinds: Sequence[str]) -> tuple[Measurement | None, str]:
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


# --------------------------------------------------------------------------------------------------------------- text


def _verdict(gate: str, verdict: GateVerdict, limit: float, found: Interval, why: str) -> Verdict:
    return Verdict(gate=gate, verdict=verdict, limit=limit, value=found.value, low=found.low, high=found.high, why=why)


def _f(value: float) -> str:
    """Four significant digits, never -0, and rounding noise as 0."""
    return f"{value:.4g}" if abs(value) >= 5e-7 else "0"


def _spread(found: Interval, unit: str = "") -> str:
    return f"{_f(found.value)}{unit} (95 % interval {_f(found.low)} to {_f(found.high)})"
