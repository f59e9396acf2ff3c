"""Several builds of one file, timed in turns: a builder times kernels, so that no two of its engines need be equal.

The spread is part of what a latency is worth: two builds of the same file on the same device may differ by more than
the interval of either. The fastest is kept and timed again by itself, for the best of several is better by chance too.
Not executed by us: tried on a test double.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fusepress.export.engine import EngineInfo
from fusepress.targets.measure import InterleavedMeasurement


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpread:
    """Builds of one file with the same options.

    Attributes:
        engines: in the order in which they were built.
        mean_ms: of each, from the same rounds.
        rounds: timed runs of each.
    """

    engines: tuple[EngineInfo, ...]
    mean_ms: tuple[float, ...]
    rounds: int

    @property
    def fastest(self) -> EngineInfo:
        """The one with the smallest mean; the first among equals."""
        return self.engines[self.mean_ms.index(min(self.mean_ms))]

    @property
    def relative(self) -> float:
        """How much longer the slowest takes, relative to the fastest."""
        return max(self.mean_ms) / min(self.mean_ms) - 1.0

    def to_dict(self) -> dict[str, Any]:
        """As the report shows it."""
        return {
            "builds": len(self.engines),
            "different engines": len({engine.sha256 for engine in self.engines}),
            "mean_ms of each": [round(value, 4) for value in self.mean_ms],
            "slowest over fastest": f"+{100 * self.relative:.1f} %",
            "timed runs of each": self.rounds,
        }


def time_builds(
    engines: Sequence[EngineInfo],
    callable_of: Callable[[EngineInfo], Callable[[], object]],
    measure: Callable[[Mapping[str, Callable[[], object]]], InterleavedMeasurement],
) -> EngineSpread:
    """Time engines in turns; engines of the same bytes are one, and timed once.

    Args:
        engines: builds of one file, at least one.
        callable_of: one inference of an engine.
        measure: times callables in turns.

    Raises:
        BuildError, MeasureError: an engine does not run.
    """
    different: dict[str, EngineInfo] = {}
    for engine in engines:
        different.setdefault(engine.sha256, engine)
    measured = measure({sha256: callable_of(engine) for sha256, engine in different.items()}).runs
    return EngineSpread(
        engines=tuple(engines),
        mean_ms=tuple(measured[engine.sha256].mean_ms for engine in engines),
        rounds=next(iter(measured.values())).n,
    )
