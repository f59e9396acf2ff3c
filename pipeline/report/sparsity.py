"""The layer table of the sparsify stage: what every mask kept, and why the other layers are dense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fusepress.pipeline.evidence import RunRecord
from fusepress.pipeline.report.view import percent


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
