"""The report's answer to "why is it not faster": the findings that `fusepress explain` left in the run folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusepress.pipeline.evidence import RunRecord
from fusepress.pipeline.report.view import percent, three

EXPLAIN_JSON = "explain.json"
MOST_FINDINGS = 20


@dataclass(frozen=True, slots=True)
class FindingRow:
    """One finding, ready to print; `measured` is "" where no profile of the device names the layer."""

    kind: str
    where: str
    what: str
    advice: str
    gain: str
    share: str
    measured: str


@dataclass(frozen=True, slots=True)
class ExplainView:
    """The findings worth the most, what they rest on, and what their gains are called."""

    rows: list[FindingRow]
    more: int
    basis: str
    small: str
    heading: str

    @property
    def has_measured(self) -> bool:
        """Whether a profile of the device names a layer."""
        return any(row.measured for row in self.rows)


def read_explanation(record: RunRecord, run_dir: Path) -> Mapping[str, Any] | None:
    """What was found on the released file, or None where nothing was sought, or on another file."""
    path = run_dir / EXPLAIN_JSON
    onnx = record.artifacts.get("onnx")
    if onnx is None or not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return None
    if not isinstance(found, Mapping) or found.get("onnx_sha256") != onnx.sha256:
        return None
    return found


def view_of(found: Mapping[str, Any]) -> ExplainView:
    """An explanation (its `to_dict`) as text."""
    latency_ms = float(found["latency_ms"])
    rows = [_row(entry, latency_ms) for entry in found["findings"]]
    small = ", ".join(f"{count} {kind}" for kind, count in found.get("small", {}).items())
    here = found.get("kind") == "measured"
    return ExplainView(
        rows=rows[:MOST_FINDINGS],
        more=max(0, len(rows) - MOST_FINDINGS),
        basis=" ".join([_measured_basis(found) if here else _predicted_basis(found), *_notes(found)]),
        small=small,
        heading="Gain: what it takes, so the most to win (measured)"
        if here
        else "Gain: what mending it wins (predicted)",
    )


def _notes(found: Mapping[str, Any]) -> list[str]:
    return [f"{note[:1].upper()}{note[1:]}." for note in found.get("notes", ())]


def _measured_basis(found: Mapping[str, Any]) -> str:
    interval = f"95 % interval {three(found['low_ms'])} to {three(found['high_ms'])}"
    return (
        f"Measured on the machine that explained it: {three(found['latency_ms'])} ms ({interval}), and "
        f"{three(found['measured_ms'])} ms added up over the {found['layers']} nodes that ONNX Runtime ran, by its own "
        "profile. A gain is what the node takes, so the most that mending it can win."
    )


def _predicted_basis(found: Mapping[str, Any]) -> str:
    latency_ms = float(found["latency_ms"])
    interval = f"90 % interval {three(found['low_ms'])} to {three(found['high_ms'])}"
    flag = ", extrapolating" if found["extrapolating"] else ""
    read = f"the builder's list of {found['layers']} layers" if found["layers"] else "the ONNX graph alone"
    basis = f"Gains are predicted, against {three(latency_ms)} ms predicted ({interval}{flag}), from {read}."
    if found.get("assumed"):
        basis += (
            f" The file has neither Q/DQ nor FP16 of its own: {found['precision']} is assumed throughout, and a "
            "strongly typed build of it (TensorRT 10 and later, TensorRT-RTX) would run in FP32: quantise it first."
        )
    if found.get("measured_ms") is not None:
        basis += f" The profile of the device adds up to {three(found['measured_ms'])} ms."
    return basis


def _row(entry: Mapping[str, Any], latency_ms: float) -> FindingRow:
    measured = entry.get("measured_ms")
    return FindingRow(
        kind=str(entry["kind"]),
        where=str(entry["where"]),
        what=str(entry["what"]),
        advice=str(entry["advice"]),
        gain=f"{three(entry['gain_ms'])} ms",
        share=percent(entry["gain_ms"] / latency_ms),
        measured="" if measured is None else f"{three(measured)} ms",
    )
