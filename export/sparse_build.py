"""2:4 sparsity told in three numbers, and the trial that decides whether an engine with sparse kernels is kept.

Valid: layers of the ONNX file whose weights are 2:4 along the axis that sparse kernels read. Eligible: layers for which
the builder considered a sparse kernel. Picked: layers that got one. TensorRT says the last two in its build log
(developer guide, "Structured sparsity") and shows the kernels in the inspector's JSON; TensorRT-RTX says neither. What
is not said is unknown, never none. A sparse kernel is only chosen where it was timed faster, and an engine with sparse
kernels need not be faster as a whole: so it is built both ways and kept only when measured faster at equal accuracy.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fusepress.export.engine import EngineInfo
from fusepress.export.inspector import UNKNOWN, EngineLayer
from fusepress.export.sparsity import SparsityReport
from fusepress.targets.measure import Speedup

Decision = Literal["kept", "not kept", "unproven"]
METRIC_TOLERANCE = 1e-3  # relative; both engines compute the same weights, in another order
_ELIGIBLE = re.compile(r"\(Sparsity\)[^\n]*eligible[^\n:]*:[ \t]*(?P<names>[^\n]*)", re.IGNORECASE)
_PICKED = re.compile(r"\(Sparsity\)[^\n]*picked[^\n]*sparse[^\n:]*:[ \t]*(?P<names>[^\n]*)", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseCounts:
    """The three numbers; None is unknown.

    Attributes:
        valid: layers of the file with 2:4 weights.
        eligible, picked: layers of the engine that the builder listed so.
        notes: where a number comes from, or why there is none.
    """

    valid: int
    eligible: int | None
    picked: int | None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As the report shows it."""
        return {
            "valid in the ONNX": self.valid,
            "eligible in the build log": UNKNOWN if self.eligible is None else self.eligible,
            "picked by a tactic": UNKNOWN if self.picked is None else self.picked,
            "because": "; ".join(self.notes),
        }


def count_sparse(report: SparsityReport, log: str | None, layers: Sequence[EngineLayer] = ()) -> SparseCounts:
    """Count from what there is.

    Args:
        report: of the ONNX file.
        log: of a build with sparse kernels allowed; None where nothing was built.
        layers: the engine's, with the names of their kernels where the builder tells them.
    """
    valid = len(report.valid_layers)
    if log is None:
        return SparseCounts(valid=valid, eligible=None, picked=None, notes=("no engine was built here",))
    eligible, picked = _listed(_ELIGIBLE, log), _listed(_PICKED, log)
    notes = []
    if eligible is None:
        notes.append("the build log does not say which layers are eligible")
    if picked is None:
        picked = _sparse_tactics(layers)
        notes.append(
            "the log does not say which layers were picked, nor do the names of the kernels"
            if picked is None
            else "picked by the names of the kernels"
        )
    elif (tactics := _sparse_tactics(layers)) is not None and tactics != picked:
        notes.append(f"the log says {picked} picked, the names of the kernels {tactics}")
    return SparseCounts(valid=valid, eligible=eligible, picked=picked, notes=tuple(notes))


def _listed(pattern: re.Pattern[str], log: str) -> int | None:
    """Names in the log's list; an empty list is a zero that was said."""
    found = [match["names"] for match in pattern.finditer(log)]
    return sum(1 for name in found[-1].split(",") if name.strip()) if found else None


def _sparse_tactics(layers: Sequence[EngineLayer]) -> int | None:
    """Kernels called sparse; None where the builder did not look at the weights of any layer, or hides some kernels."""
    told = [layer for layer in layers if layer.has_sparse_weights is not None]
    if not told or any(not layer.tactic for layer in told):
        return None
    return sum("sparse" in layer.tactic.lower() for layer in told)


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseVerdict:
    """Whether the engine with sparse kernels is the release, and why."""

    decision: Decision
    why: str
    speedup: Speedup | None = None

    def to_dict(self) -> dict[str, Any]:
        """As the report shows it."""
        shown: dict[str, Any] = {"2:4": f"{self.decision}: {self.why}"}
        if self.speedup is not None:
            shown["speed-up of sparse kernels"] = [self.speedup.value, self.speedup.low, self.speedup.high]
        return shown


def unproven(why: str) -> SparseVerdict:
    """Nothing was measured."""
    return SparseVerdict(decision="unproven", why=why)


def judge_bytes(plain: EngineInfo, sparse: EngineInfo) -> SparseVerdict | None:
    """What two builds of one file say without being run: the same bytes cannot differ in speed."""
    if plain.sha256 != sparse.sha256:
        return None
    return unproven(f"{plain.runtime} builds the same bytes with and without sparse kernels allowed; none was run")


def judge_sparse(speedup: Speedup, *, plain_metric: float, sparse_metric: float, direction: str) -> SparseVerdict:
    """The trial's outcome.

    Args:
        speedup: latency without sparse kernels over that with them, timed in turns.
        plain_metric: the task's primary metric, computed with the engine without sparse kernels.
        sparse_metric: the same with them.
        direction: "max" or "min", of the metric.
    """
    drop = plain_metric - sparse_metric if direction == "max" else sparse_metric - plain_metric
    interval = f"{speedup.value:.3f} times as fast, 95 % interval {speedup.low:.3f} to {speedup.high:.3f}"
    if drop > METRIC_TOLERANCE * max(1.0, abs(plain_metric)):
        why = f"the metric is {sparse_metric:.5g} with sparse kernels and {plain_metric:.5g} without"
        return SparseVerdict(decision="not kept", why=why, speedup=speedup)
    if speedup.low <= 1.0:
        return SparseVerdict(decision="not kept", why=f"not faster: {interval}", speedup=speedup)
    return SparseVerdict(decision="kept", why=f"measured {interval}, at equal accuracy", speedup=speedup)
