"""Sparsity in three numbers, and the layers of the sparsify stage: what every mask kept, why the others are dense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fusepress.pipeline.evidence import RunRecord, StageRecord
from fusepress.pipeline.report.view import percent, plain

UNKNOWN = "unknown"
VALID, ELIGIBLE, PICKED = "valid in the ONNX", "eligible in the build log", "picked by a tactic"
NUMBERS = {
    VALID: "layers whose weights are 2:4 where sparse kernels read them",
    ELIGIBLE: "layers for which the builder considered a sparse kernel",
    PICKED: "layers that got one",
}


@dataclass(frozen=True, slots=True)
class SparseNumbers:
    """(number, label, what it counts) of the three, and what else was found."""

    numbers: list[tuple[str, str, str]]
    facts: list[tuple[str, str]]


def sparse_numbers(record: RunRecord) -> SparseNumbers | None:
    """The three numbers of a run with 2:4 masks; what nobody said is unknown, never none."""
    build = record.stage("build")
    told = dict((build.details.get("sparsity") or {}) if build is not None else {})
    if VALID not in told:
        found = next((valid for stage in reversed(record.stages) if (valid := _valid(stage)) is not None), None)
        if found is None:
            return None
        told = {VALID: found, "because": "no engine was built here"}
    numbers = [(plain(told.pop(label, UNKNOWN)), label, words) for label, words in NUMBERS.items()]
    return SparseNumbers(numbers, [(label, plain(value)) for label, value in told.items() if value])


def is_count(card: Any) -> bool:
    """Whether a stage's `sparsity` is a count of layers that `sparse_numbers` shows."""
    return isinstance(card, dict) and (VALID in card or "valid" in card)


def _valid(stage: StageRecord) -> int | None:
    """Layers of the ONNX with 2:4 weights, as `export` and `quantize` count them."""
    card = stage.details.get("sparsity")
    return int(card["valid"]) if isinstance(card, dict) and "valid" in card else None


@dataclass(frozen=True, slots=True)
class SparseRow:
    """One weight, ready to print.

    Attributes:
        density: kept fraction of its entries.
        kept: share of the sum of |w| that they are; "" where the layer is dense.
        permuting: share that the best 2:4 mask kept before and after channels were permuted; "" where they were not.
        error: change of the layer's outputs by SparseGPT, and by magnitude; "" where it was not chosen so.
        reason: why it is dense.
    """

    param: str
    branch: str
    shape: str
    density: str
    kept: str
    permuting: str
    error: str
    reason: str


def sparse_rows(record: RunRecord) -> list[SparseRow]:
    """The layers of `details["layers"]` of the sparsify stage, masked ones first, in the model's order."""
    stage = record.stage("sparsify")
    layers = stage.details.get("layers", []) if stage is not None else []
    return [_row(layer) for layer in sorted(layers, key=lambda layer: layer["status"] != "masked")]


def _row(layer: dict[str, Any]) -> SparseRow:
    def between(first: str, second: str) -> str:
        return f"{percent(layer[first])}, {percent(layer[second])}" if first in layer and second in layer else ""

    return SparseRow(
        param=str(layer["param"]),
        branch=str(layer["branch"]),
        shape=" x ".join(str(size) for size in layer["shape"]),
        density=percent(layer["density"]),
        kept=percent(layer["kept_magnitude"]) if "kept_magnitude" in layer else "",
        permuting=between("kept_before_permuting", "kept_after_permuting"),
        error=between("error", "error_magnitude"),
        reason=str(layer.get("reason", "")),
    )
