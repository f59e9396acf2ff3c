"""What quantising cost and where: the ladder, every layer's sensitivity, the ranges of the calibration card.

Read from the details of `quantize`: `ladder` (`calib.ladder.Ladder.to_dict`), `sensitivity`
(`calib.sensitivity.Sensitivity.to_dict`) and `coverage` (`calib.quantize.QuantizeInfo.to_dict`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from fusepress.pipeline.evidence import SPEEDUP_OVER_FP32, RunRecord, StageRecord
from fusepress.pipeline.report import charts, view

MOST_BARS = 60  # per modality; the table has them all
MOST_NAMED = 4
RUNGS = {"int8": "all in {}", "fp8": "all in {}", "mixed": "partly in {}", "float": "nothing in {}"}


@dataclass(frozen=True, slots=True)
class TrialRow:
    """One set of layers that was tried in floating point."""

    spared: str
    value: str
    drop: str
    verdict: str
    tone: view.Tone


@dataclass(frozen=True, slots=True)
class UnitRow:
    """One layer or one modality.

    Attributes:
        kept: what it computes in, and why not in the precision asked for.
        local: error of its own output, in per cent of its size, as the others below of the network's outputs' spread.
        alone: with it alone quantised.
        spared: with it alone not quantised.
    """

    name: str
    branch: str
    macs: str
    cost: str
    local: str
    alone: str
    spared: str
    kept: str


@dataclass(frozen=True, slots=True)
class Quantization:
    """The section, ready to print; lists are empty where nothing was measured.

    Attributes:
        precision: INT8 or FP8.
    """

    precision: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    reason: str = ""
    metric: str = ""
    trials: list[TrialRow] = field(default_factory=list)
    branches: list[UnitRow] = field(default_factory=list)
    units: list[UnitRow] = field(default_factory=list)
    drawings: list[tuple[str, Markup, int]] = field(default_factory=list)


def quantization(record: RunRecord) -> Quantization | None:
    """The section of a run whose `quantize` stage says anything of it."""
    stage = record.stage("quantize")
    if stage is None:
        return None
    ladder, told = stage.details.get("ladder") or {}, stage.details.get("sensitivity") or {}
    if not ladder and not told:
        return None
    coverage = stage.details.get("coverage") or {}
    kept = {layer["name"]: _kept(layer) for layer in coverage.get("layers", [])}
    # where nothing is quantised there is no coverage; units that are no layers are told by the ladder alone
    kept |= {name: kept.get(name, "floating point") for name in ladder.get("spared", [])}
    unit = "ms" if told.get("cost_unit") == "ms" else "MAC"
    precision = str(coverage.get("precision") or ladder.get("precision") or "int8").upper()
    return Quantization(
        precision=precision,
        facts=[*_facts(ladder, told, coverage, precision), *_on_this_machine(stage, coverage)],
        reason=str(ladder.get("reason", "")),
        metric=str(ladder.get("metric", "")),
        trials=[_trial(trial, precision) for trial in ladder.get("trials", [])],
        branches=[_unit({"name": row["branch"], **row}, unit, {}) for row in told.get("branches", [])],
        units=[_unit(row, unit, kept) for row in told.get("units", [])],
        drawings=_drawings(told, set(ladder.get("spared", [])), precision),
    )


def _facts(
    ladder: dict[str, Any], told: dict[str, Any], coverage: dict[str, Any], precision: str
) -> list[tuple[str, str]]:
    facts = []
    if ladder:
        facts.append(("result", RUNGS[ladder["rung"]].format(precision)))
    if "macs_share" in coverage:
        facts.append((f"MACs in {precision}", view.percent(coverage["macs_share"])))
        facts.append(("ranges by", str(coverage["method"])))
    if ladder:
        facts.append(
            (f"allowed drop of {ladder['metric']}", f"{view.number(ladder['max_drop'])} ({ladder['standard']})")
        )
        facts.append(("passes over the calib split", view.number(ladder["evaluations"], 3)))
    if told:
        facts.append((f"output error, all in {precision}", _error(told["everything"])))
        facts.append(("samples of the errors", view.number(told["samples"])))
    return facts


def _on_this_machine(stage: StageRecord, coverage: dict[str, Any]) -> list[tuple[str, str]]:
    """Where the target is a CPU: what was done for its kernels, and what it brought."""
    facts = []
    if coverage.get("unsigned_relus"):
        facts.append(("Relus that integer kernels absorb", view.number(coverage["unsigned_relus"])))
    faster = next((m for m in stage.measurements if m.name == SPEEDUP_OVER_FP32), None)
    if faster is not None and faster.low is not None and faster.high is not None:
        value, low, high = (view.quantity(faster.name, v) for v in (faster.value, faster.low, faster.high))
        facts.append(("against the same network in FP32", f"{value} ({low} to {high}, measured in turns)"))
        facts += [("so", faster.note)] if faster.note else []
    return facts


def _trial(trial: dict[str, Any], precision: str) -> TrialRow:
    spared, more = trial["spared"], max(0, len(trial["spared"]) - MOST_NAMED)
    names = ", ".join(spared[:MOST_NAMED]) + (f" and {more} more" if more else "")
    drop = view.DASH if trial["drop"] is None else view.quantity("accuracy.", trial["drop"])
    if trial["high"] is not None:
        drop += f" (at most {view.quantity('accuracy.', trial['high'])})"
    return TrialRow(
        spared=names or f"none: all in {precision}",
        value=view.DASH if trial["value"] is None else view.quantity("accuracy.", trial["value"]),
        drop=drop,
        verdict="met" if trial["met"] else "not met",
        tone="pass" if trial["met"] else "fail",
    )


def _unit(row: dict[str, Any], cost_unit: str, kept: dict[str, str]) -> UnitRow:
    cost = row.get("cost")
    shown = "" if cost is None else f"{view.three(cost)} ms" if cost_unit == "ms" else f"{view.count(cost)} MAC"
    return UnitRow(
        name=str(row["name"]),
        branch=str(row["branch"]),
        macs=view.count(row["macs"]),
        cost=shown,
        local=_error(row.get("local")),
        alone=_error(row["alone"]),
        spared=_error(row.get("spared")),
        kept=kept.get(str(row["name"]), ""),
    )


def _kept(layer: dict[str, Any]) -> str:
    precision = str(layer["precision"]).upper()
    return f"{precision}: {layer['reason']}" if layer.get("reason") else precision


def _error(squared: float | None) -> str:
    """The root of a relative squared error, as people read errors."""
    return "" if squared is None else f"{view.number(100 * squared**0.5, 3)} %"


def _drawings(told: dict[str, Any], spared: set[str], precision: str) -> list[tuple[str, Markup, int]]:
    """(modality, drawing, layers left out of it); all on one scale."""
    units = told.get("units", [])
    sizes = [row["alone"] ** 0.5 for row in units if row["alone"] > 0]
    if not sizes:
        return []
    made = []
    for branch in dict.fromkeys(row["branch"] for row in units):
        mine = [row for row in units if row["branch"] == branch]
        bars = [(_short(row["name"]), 100 * row["alone"] ** 0.5, row["name"] in spared) for row in mine[:MOST_BARS]]
        drawing = charts.log_bar_chart(
            bars,
            title=f"Output error with one layer of {branch} in {precision}, as in the table below",
            show=lambda value: f"{view.number(value, 2)} %",
            least=100 * min(sizes) / 2,
            most=100 * max(sizes),
        )
        made.append((str(branch), drawing, len(mine) - len(bars)))
    return made


def _short(name: str) -> str:
    module = name.rpartition("/")[0] or name
    return module if len(module) <= 30 else f"{module[:12]}\u2026{module[-17:]}"
