"""What the HTML, JUnit and Markdown reports show, worked out once from a `RunRecord`.

Besides measurements and verdicts the record's free-form fields are read where present:

* `record.task["metrics"]`: metric -> "max" or "min", the first is the primary metric;
* `record.target_profile["power_mode"]`, `["precision"]`: what the run was made for; `record.final_precision`: what it
  ended in;
* `details["groups"]` of `prune`: [{"id", "branch", "width", "kept"}], kept a count or a list of channels;
* `details["branches"]` of `prune`: {branch: {"macs_before", "macs_after", "params_before", "params_after"}};
* `details["pictures"]` of any stage: [{"path", "title"}], relative to the run folder or to the stage's folder in it;
* `details["layers"]` of `sparsify`: what every mask kept (`sparsity.py`);
* `details["choice"]`, `details["calibration"]`, `details["sparsity"]` of any stage: a mapping of figures;
* `details["history"]` and `details["looks"]` of stages that train (report/training.py);
* `details["ladder"]`, `["sensitivity"]` and `["coverage"]` of `quantize` (report/quantization.py);
* `details["constant"]` of `verify`: the metrics of a constant answer (robustness.py);
* `details["note"]` of any stage: what a reader must know; `details["executed"]` of `build`: whether its engine ran;
* other plain values in `details` are listed with their stage.

Under a failure, `robustness.<failure>.<severity>.<metric>` is the compressed model's and
`robustness.<failure>.<severity>.dense.<metric>` the dense one's. Where the two were timed in turns, the last stage
holds `latency.dense.mean_ms` and `latency.speedup`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fusepress.pipeline.evidence import Kind, Measurement, RunRecord, StageRecord, Verdict
from fusepress.pipeline.gates import NO_GATE
from fusepress.pipeline.recipe import floor_parts

Tone = Literal["pass", "fail", "inconclusive", "anomalous", "pending"]

MINUS = "\u2212"
DASH = "\u2013"
TIMES = "\u00d7"
BASELINE = "baseline"
FUSION = "fusion"
LATENCY = "latency.mean_ms"
DENSE_LATENCY = "latency.dense.mean_ms"
SPEEDUP = "latency.speedup"
TONES: dict[str, Tone] = {"PASS": "pass", "FAIL": "fail", "INCONCLUSIVE": "inconclusive", "ANOMALOUS": "anomalous"}
STATUS_TONES: dict[str, Tone] = {"done": "pass", "cached": "pass", "failed": "fail", "interrupted": "inconclusive"}
MODEL_STAGES = ("macs", "params", "size.onnx_mib")
SHOWN_ELSEWHERE = (
    *("groups", "branches", "pictures", "choice", "calibration", "sparsity", "layers", "ranks", "spread_search"),
    *("note", "history", "looks", "ladder", "sensitivity", "reconstructed"),
)
MOST_ITEMS = 8
MOST_CHARACTERS = 320


@dataclass(frozen=True, slots=True)
class Banner:
    """The verdict of the run, first thing on the page."""

    tone: Tone
    word: str
    why: str
    culprits: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Figure:
    """A number ready to print, with its evidence."""

    text: str
    spread: str = ""
    kind: Kind | None = None
    extrapolating: bool = False


@dataclass(frozen=True, slots=True)
class Tile:
    """A headline number: the released model's against the dense one's."""

    label: str
    after: Figure
    before: Figure | None
    change: str


@dataclass(frozen=True, slots=True)
class GateRow:
    """A gate and what it said."""

    verdict: Verdict
    title: str
    tone: Tone
    relation: str
    limit: str
    value: str
    spread: str
    kind: Kind | None
    at_most: bool


@dataclass(frozen=True, slots=True)
class StageRow:
    """A stage and the model it made."""

    name: str
    status: str
    tone: Tone
    seconds: str
    why: str
    figures: dict[str, Figure | None]
    facts: list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class BranchRow:
    """What was removed from one modality."""

    name: str
    macs_before: float
    macs_after: float
    params_before: float
    params_after: float
    channels_before: int
    channels_after: int


@dataclass(frozen=True, slots=True)
class GroupRow:
    """Width of one coupled group before and after."""

    id: str
    label: str
    branch: str
    width: int
    kept: int


# ------------------------------------------------------------------------------------------------------------- numbers


def number(value: float, digits: int = 4) -> str:
    """A number to so many significant digits, without an exponent where that is readable; a true minus sign."""
    if not math.isfinite(value):
        return DASH
    if value == 0:
        return "0"
    text = f"{value:.{digits}g}"
    if "e" in text and 1e-4 <= abs(value) < 1e7:
        text = f"{value:,.0f}"
    return text.replace("-", MINUS)


def three(value: float) -> str:
    """Three significant digits, trailing zeros kept, so that columns of latencies line up."""
    if not math.isfinite(value) or value == 0 or abs(value) >= 1000 or abs(value) < 1e-4:
        return number(value, 4)
    return f"{value:#.3g}".rstrip(".").replace("-", MINUS)


def count(value: float) -> str:
    """A count with an SI prefix: 1.24 G."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{number(value / factor, 3)} {prefix}"
    return number(value, 4)


def percent(value: float, *, signed: bool = False) -> str:
    """A fraction as a percentage without decimals, with one below 10 %."""
    shown = value * 100
    text = f"{shown:+.0f}" if signed else f"{shown:.1f}" if 0 < abs(shown) < 9.95 else f"{shown:.0f}"
    return text.replace("-", MINUS) + " %"


def quantity(name: str, value: float) -> str:
    """A measurement's value as its kind of number is read: decimals for metrics, ms, MiB, SI counts."""
    if name.startswith("latency."):
        return f"{three(value)}{TIMES}" if name.startswith(SPEEDUP) else f"{three(value)} ms"
    if name in ("macs", "params"):
        return count(value)
    if name.startswith("size.") and name.endswith("_mib"):
        return f"{three(value)} MiB"
    if name.startswith(("accuracy.", "robustness.", "floors.")) and abs(value) < 10:
        return f"{value:.4f}".replace("-", MINUS)
    return number(value)


def signed(name: str, change: float) -> str:
    """A difference of two such values, with its sign and without a unit."""
    shown = quantity(name, abs(change)).removesuffix(" ms")
    return shown if not shown.strip("0.") else f"{'+' if change > 0 else MINUS}{shown}"


def figure(measurement: Measurement | None) -> Figure | None:
    """A measurement ready to print."""
    if measurement is None:
        return None
    name = measurement.name
    spread = ""
    if measurement.low is not None and measurement.high is not None:
        low, high = (quantity(name, end) for end in (measurement.low, measurement.high))
        spread = f"{low.removesuffix(' ms')} to {high}"
    text = quantity(name, measurement.value)
    return Figure(text, spread, measurement.kind, measurement.extrapolating)


def plain(value: Any) -> str:
    """Any JSON value as short text."""
    text = _plain(value)
    return text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 1] + "\u2026"


def _plain(value: Any) -> str:
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, int):
        return f"{value:,}".replace("-", MINUS)
    if isinstance(value, Mapping):
        return _some([f"{words_of(str(key))} {_plain(item)}" for key, item in value.items()])
    if isinstance(value, Sequence) and not isinstance(value, str):
        return _some([_plain(item) for item in value])
    return str(value)


def _some(items: list[str]) -> str:
    rest = len(items) - MOST_ITEMS
    return ", ".join(items[:MOST_ITEMS]) + (f" and {rest} more" if rest > 0 else "")


# ------------------------------------------------------------------------------------------------------------ selection


def metrics_of(record: RunRecord) -> dict[str, str]:
    """Metrics and their "max" or "min"; from the measurements where the record does not say."""
    told = record.task.get("metrics")
    if isinstance(told, Mapping) and told:
        return {str(name): str(direction) for name, direction in told.items()}
    names = [m.name.removeprefix("accuracy.") for s in record.stages for m in s.measurements if _is_accuracy(m)]
    return dict.fromkeys(names, "max")


def precision_of(record: RunRecord) -> str:
    """What the released file computes in, and what was asked for where that is another."""
    asked, made = record.asked_precision, record.final_precision
    return (made or "") if asked in (None, made) else f"{made} ({asked} was asked for)"


def primary_of(record: RunRecord) -> str:
    """The primary metric, or an empty text."""
    return next(iter(metrics_of(record)), "")


def verdicts_of(record: RunRecord) -> list[Verdict]:
    """All verdicts, in order."""
    return [verdict for stage in record.stages for verdict in stage.verdicts]


def at_target(record: RunRecord, measurement: Measurement) -> bool:
    """Whether a latency is of the run's target (or does not say)."""
    return measurement.device in (None, record.target)


def of_stage(record: RunRecord, stage: StageRecord, name: str) -> Measurement | None:
    """The last measurement of that name in a stage; a latency only of the target, measured before predicted."""
    found = [m for m in stage.measurements if m.name == name]
    if name.startswith("latency."):
        found = [m for m in found if at_target(record, m)]
        measured = [m for m in found if m.kind == "measured"]
        found = measured or found
    return found[-1] if found else None


def steps(record: RunRecord, name: str) -> list[tuple[str, Measurement]]:
    """A measurement after each stage that reports it."""
    return [(s.name, m) for s in record.stages if (m := of_stage(record, s, name)) is not None]


def _is_accuracy(measurement: Measurement) -> bool:
    return measurement.name.startswith("accuracy.")


# --------------------------------------------------------------------------------------------------------------- parts


def banner(record: RunRecord) -> Banner:
    """The verdict, or how far the run got."""
    stopped = next((s for s in record.stages if s.status in ("failed", "interrupted")), None)
    if stopped is not None:
        word = "STAGE FAILED" if stopped.status == "failed" else "INTERRUPTED"
        tone: Tone = "fail" if stopped.status == "failed" else "inconclusive"
        return Banner(tone, word, f"{stopped.name}: {stopped.why or 'no reason was recorded'}")
    if record.verdict is None:
        waiting = [s.name for s in record.stages if s.status in ("pending", "running")]
        return Banner("pending", "NOT FINISHED", f"still to do: {', '.join(waiting) or 'the gates'}")
    if not verdicts_of(record):
        return Banner(TONES[record.verdict], record.verdict, _sentence(record.why or NO_GATE))
    rows = [row for row in gate_rows(record) if row.verdict.verdict == record.verdict != "PASS"]
    # the reasons stand in the table below, so the first sentence of `why` and the names are enough here
    why = record.why.partition(". ")[0] if rows else record.why
    return Banner(TONES[record.verdict], record.verdict, _sentence(why), [_culprit(row) for row in rows])


def _culprit(row: GateRow) -> str:
    spread = f" ({row.spread})" if row.spread else ""
    return f"{row.title}: {row.value}{spread}, {row.relation} {row.limit}"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def tiles(record: RunRecord) -> list[Tile]:
    """The headline numbers: primary metric, latency, MACs, parameters, file size."""
    primary = primary_of(record)
    names = {f"accuracy.{primary}": primary, LATENCY: "mean latency", "macs": "MACs", "params": "parameters"}
    names["size.onnx_mib"] = "ONNX file"
    made = [_tile(record, name, label) for name, label in names.items()]
    return [tile for tile in made if tile is not None]


def _tile(record: RunRecord, name: str, label: str) -> Tile | None:
    seen = steps(record, name)
    if not seen:
        return None
    stage, last = seen[-1]
    dense = next((m for s, m in seen if s == BASELINE), None)
    if name == LATENCY:
        dense = _dense_latency(record, stage, last)
    after = figure(last)
    assert after is not None
    if dense is None or stage == BASELINE:
        return Tile(label, after, None, "")
    return Tile(
        label,
        after,
        figure(dense),
        _speedup(record, stage) if dense.name == DENSE_LATENCY else _change(name, dense.value, last.value),
    )


def _dense_latency(record: RunRecord, stage: str, last: Measurement) -> Measurement | None:
    """Timed in turns with the last one, else of the baseline; of the same kind, or the ratio would be neither."""
    found = record.stage(stage)
    beside = of_stage(record, found, DENSE_LATENCY) if found is not None else None
    if beside is not None and beside.kind == last.kind:
        return beside
    return _same_kind(record, last.kind)


def _speedup(record: RunRecord, stage: str) -> str:
    found = record.stage(stage)
    ratio = of_stage(record, found, SPEEDUP) if found is not None else None
    if ratio is None:
        return ""
    spread = f" ({ratio.low:.2f} to {ratio.high:.2f})" if ratio.low is not None and ratio.high is not None else ""
    return f"{ratio.value:.2f}{TIMES} as fast{spread}"


def _same_kind(record: RunRecord, kind: Kind) -> Measurement | None:
    stage = record.stage(BASELINE)
    found = [m for m in stage.measurements if m.name == LATENCY and m.kind == kind] if stage is not None else []
    return next((m for m in found if at_target(record, m)), None)


def _change(name: str, before: float, after: float) -> str:
    if _plain_metric(name):
        return f"{after - before:+.4f}".replace("-", MINUS)
    if before <= 0 or after <= 0:
        return ""
    if name.startswith("latency."):
        return f"{before / after:.2f}{TIMES} as fast"
    return f"{percent(after / before)} kept"


def _plain_metric(name: str) -> bool:
    return name.startswith("accuracy.")


def gate_rows(record: RunRecord) -> list[GateRow]:
    """Every gate with its limit, value and interval."""
    return [_gate_row(record, verdict) for verdict in verdicts_of(record)]


def _gate_row(record: RunRecord, verdict: Verdict) -> GateRow:
    title, at_most, name = _gate_meaning(record, verdict.gate)
    found = _gate_evidence(record, verdict)
    spread = ""
    if verdict.low is not None and verdict.high is not None:
        spread = f"{quantity(name, verdict.low).removesuffix(' ms')} to {quantity(name, verdict.high)}"
    return GateRow(
        verdict=verdict,
        title=title,
        tone=TONES[verdict.verdict],
        relation="at most" if at_most else "at least",
        limit=DASH if verdict.limit is None else _limit(name, verdict.limit),
        value="missing" if verdict.value is None else quantity(name, verdict.value),
        spread=spread,
        kind=None if found is None else found.kind,
        at_most=at_most,
    )


def _limit(name: str, limit: float) -> str:
    return f"{number(limit)} ms" if name.startswith("latency.") else number(limit)


def _gate_meaning(record: RunRecord, gate: str) -> tuple[str, bool, str]:
    """(title, whether the value must be at most the limit, the name that tells how to print it)."""
    kind, _, rest = gate.partition(".")
    metrics = metrics_of(record)
    if kind == "accuracy":
        return f"Drop of {rest} against the dense model", True, gate
    if kind == "latency":
        words = {"mean_ms": "Mean latency", "p99_ms": "99th percentile of latency"}
        return words.get(rest, gate), True, gate
    if kind == "floors":
        metric, stratum = floor_parts(rest)
        ceiling = metrics.get(metric) == "min"
        where = "" if stratum is None else f" in {stratum}"
        return f"{'Ceiling' if ceiling else 'Floor'} of {metric}{where}", ceiling, gate
    if kind == "robustness" and rest.endswith(".min"):
        ceiling = metrics.get(primary_of(record)) == "min"
        return f"{primary_of(record)} under {_failure_words(rest.removesuffix('.min'))}", ceiling, gate
    if kind == "robustness":
        return f"Extra drop under {_failure_words(rest)}", True, gate
    if kind == "release":
        slower = rest.startswith("latency.")
        return "Rise of the latency over the stored release" if slower else f"Drop of {rest} since then", True, gate
    return gate, True, gate


def _failure_words(key: str) -> str:
    """camera_noise@2 -> camera noise (severity 2)."""
    failure, separator, severity = key.partition("@")
    return f"{words_of(failure)} (severity {severity})" if separator else words_of(failure)


def words_of(identifier: str) -> str:
    """camera_blank -> camera blank."""
    return identifier.replace("_", " ")


def _gate_evidence(record: RunRecord, verdict: Verdict) -> Measurement | None:
    """The measurement that a gate judged: the very latency, or the last metric of the released model."""
    kind, _, rest = verdict.gate.partition(".")
    if kind == "latency":
        seen = [m for s in record.stages for m in s.measurements if m.name == verdict.gate and m.value == verdict.value]
        return seen[-1] if seen else None
    metric = primary_of(record) if kind == "robustness" else rest
    if verdict.value is None:
        return None
    found = steps(record, f"accuracy.{metric}")
    return found[-1][1] if found else None


def stage_rows(record: RunRecord) -> list[StageRow]:
    """Every stage, and the figures of the model it made."""
    names = [f"accuracy.{primary_of(record)}", LATENCY, *MODEL_STAGES]
    return [
        StageRow(
            name=stage.name,
            status=stage.status,
            tone=STATUS_TONES.get(stage.status, "pending"),
            seconds=f"{number(stage.seconds, 3)} s" if stage.seconds else DASH,
            why=stage.why or str(stage.details.get("note") or ""),
            figures={name: figure(of_stage(record, stage, name)) for name in names},
            facts=_facts(stage),
        )
        for stage in record.stages
    ]


def _facts(stage: StageRecord) -> list[tuple[str, str]]:
    facts = {key: value for key, value in stage.details.items() if key not in SHOWN_ELSEWHERE}
    return [(words_of(key), plain(value)) for key, value in facts.items() if value not in ({}, [], "")]


def artifact_note(record: RunRecord, name: str) -> str:
    """What is to be known of an artifact: an engine that never ran is called that."""
    build = record.stage("build")
    never_ran = name == "engine" and build is not None and build.details.get("executed") is False
    notes = ["built, not executed" if never_ran else "", record.artifacts[name].note or ""]
    return "; ".join(note for note in notes if note)


def cards(record: RunRecord, key: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """(stage, figures) of every stage whose details hold `key`."""
    found = [(stage.name, stage.details[key]) for stage in record.stages if isinstance(stage.details.get(key), Mapping)]
    return [(name, [(words_of(str(k)), plain(v)) for k, v in card.items()]) for name, card in found]


def group_rows(record: RunRecord) -> list[GroupRow]:
    """Widths before and after, by branch in the order of appearance and the fusion last, then as planned."""
    stage = record.stage("prune")
    groups = stage.details.get("groups", []) if stage is not None else []
    rows = [
        GroupRow(
            id=str(group["id"]),
            label=_short_layer(str(group["id"])),
            branch=str(group["branch"]),
            width=int(group["width"]),
            kept=group["kept"] if isinstance(group["kept"], int) else len(group["kept"]),
        )
        for group in groups
    ]
    order = list(dict.fromkeys(row.branch for row in rows))
    return sorted(rows, key=lambda row: (row.branch == FUSION, order.index(row.branch)))


def _short_layer(group: str) -> str:
    first, *others = group.split("+")
    name = first.removesuffix(".weight")
    if len(name) > 30:
        name = f"{name[:12]}\u2026{name[-17:]}"
    return f"{name} +{len(others)}" if others else name


def branch_rows(record: RunRecord) -> list[BranchRow]:
    """What was removed from each modality (and from the fusion)."""
    stage = record.stage("prune")
    branches = stage.details.get("branches", {}) if stage is not None else {}
    groups = group_rows(record)
    return [
        BranchRow(
            name=str(name),
            macs_before=float(figures["macs_before"]),
            macs_after=float(figures["macs_after"]),
            params_before=float(figures["params_before"]),
            params_after=float(figures["params_after"]),
            channels_before=sum(row.width for row in groups if row.branch == name),
            channels_after=sum(row.kept for row in groups if row.branch == name),
        )
        for name, figures in branches.items()
    ]
