"""How far two models are apart, output by output, on the same batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fusepress.pipeline.errors import ExportError
from fusepress.pipeline.evidence import Measurement

if TYPE_CHECKING:
    from torch import Tensor

    from fusepress.pipeline.task import Batch

Predict = Callable[[dict[str, "Tensor"]], dict[str, "Tensor"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputParity:
    """Difference of one output.

    Attributes:
        max_abs: largest absolute difference; infinite where only one of the two is finite.
        scale: largest absolute value of the reference.
        max_rel: max_abs / scale (max_abs itself where the reference is all zero).
        cosine: of the two outputs as vectors over all samples.
        worst_sample: id of the sample with the largest difference.
    """

    max_abs: float
    scale: float
    max_rel: float
    cosine: float
    worst_sample: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """Differences by output, over `samples` samples."""

    outputs: dict[str, OutputParity]
    samples: int

    @property
    def max_abs(self) -> float:
        """Largest absolute difference of any output."""
        return max(output.max_abs for output in self.outputs.values())

    @property
    def max_rel(self) -> float:
        """Largest difference of any output, relative to that output's scale."""
        return max(output.max_rel for output in self.outputs.values())

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {"samples": self.samples, "outputs": {name: asdict(output) for name, output in self.outputs.items()}}

    def measurements(self) -> list[Measurement]:
        """The worst differences, for the run record; an infinite one has no number and is refused before."""
        values = {"parity.max_abs": self.max_abs, "parity.max_rel": self.max_rel}
        return [
            Measurement(name=name, value=value, unit="1", kind="simulated", runtime="onnxruntime-cpu", n=self.samples)
            for name, value in values.items()
        ]


@dataclass(slots=True)
class _Sums:
    max_abs: float = -1.0
    scale: float = 0.0
    dot: float = 0.0
    reference: float = 0.0
    candidate: float = 0.0
    worst: str = ""


def check_parity(reference: Predict, candidate: Predict, batches: Iterable[Batch]) -> Parity:
    """Compare two models on batches.

    Args:
        reference: the model that is right.
        candidate: the model in question.
        batches: what both are fed.

    Raises:
        ExportError: there is no batch, or the outputs differ in name or shape.
    """
    sums: dict[str, _Sums] = {}
    samples = 0
    for batch in batches:
        expected, got = reference(batch.inputs), candidate(batch.inputs)
        if list(expected) != list(got):
            raise ExportError(
                f"expected the outputs {list(expected)}; got {list(got)} from the candidate; "
                "name the outputs as the model does, in its order"
            )
        ids = list(batch.sample_ids) or [f"sample {samples + i}" for i in range(batch.size)]
        for name, value in expected.items():
            _add(sums.setdefault(name, _Sums()), name, value, got[name], ids)
        samples += batch.size
    if not sums:
        raise ExportError("expected at least one batch to compare on; got none; check the task's splits")
    return Parity(outputs={name: _finish(entry) for name, entry in sums.items()}, samples=samples)


def _add(entry: _Sums, name: str, expected: Tensor, got: Tensor, ids: list[str]) -> None:
    if expected.shape != got.shape:
        raise ExportError(
            f"expected output {name!r} of shape {tuple(expected.shape)}; got {tuple(got.shape)} from the candidate; "
            "export with the shapes of the task's batches"
        )
    a = expected.detach().cpu().double().flatten(1) if expected.dim() > 1 else expected.detach().cpu().double()[:, None]
    b = got.detach().cpu().double().reshape(a.shape)
    both_finite = a.isfinite() & b.isfinite()
    same = (a == b) | (a.isnan() & b.isnan())
    difference = (a - b).abs().where(both_finite, a.new_tensor(math.inf)).masked_fill(same, 0.0)
    by_sample = difference.amax(1)
    worst = int(by_sample.argmax())
    if float(by_sample[worst]) > entry.max_abs:
        entry.max_abs, entry.worst = float(by_sample[worst]), ids[worst]
    a, b = a.where(both_finite, a.new_zeros(())), b.where(both_finite, b.new_zeros(()))
    entry.scale = max(entry.scale, float(a.abs().max()))
    entry.dot += float((a * b).sum())
    entry.reference += float((a * a).sum())
    entry.candidate += float((b * b).sum())


def _finish(entry: _Sums) -> OutputParity:
    norm = math.sqrt(entry.reference * entry.candidate)
    both_zero = 1.0 if entry.reference == entry.candidate else 0.0
    return OutputParity(
        max_abs=entry.max_abs,
        scale=entry.scale,
        max_rel=entry.max_abs / entry.scale if entry.scale > 0 else entry.max_abs,
        cosine=entry.dot / norm if norm > 0 else both_zero,
        worst_sample=entry.worst,
    )


def require_parity(parity: Parity, max_rel: float, *, what: str = "the exported model") -> None:
    """Refuse a difference above the tolerance.

    Args:
        parity: what was found.
        max_rel: largest allowed difference of any output, relative to the output's scale.
        what: the candidate, for the message.

    Raises:
        ExportError: names the worst output and its worst sample.
    """
    name, worst = max(parity.outputs.items(), key=lambda item: item[1].max_rel)
    if worst.max_rel <= max_rel:
        return
    raise ExportError(
        f"expected {what} to equal the reference within {max_rel:g} of each output's scale; got {worst.max_rel:.3g} "
        f"(absolute {worst.max_abs:.3g}) at output {name!r}, sample {worst.worst_sample!r}; look for operators that "
        "differ there, or for undefined behaviour such as duplicate scatter indices"
    )
