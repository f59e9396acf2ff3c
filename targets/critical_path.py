"""The latency of a whole pipeline from its parts: branches, the rest of the network, and stages outside of it.

Branches run one after the other, or at the same time on streams or accelerators of their own; then the longest counts.
What a part may win is what the pipeline wins if that part took no time: it says which one is worth compressing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Literal

from fusepress.pipeline.errors import TaskError

Schedule = Literal["serial", "parallel"]
REST = "rest"
PARALLEL_NOTE = "branches are taken not to slow each other, as on accelerators of their own"


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Milliseconds with their 95 % interval; a declared one has no width."""

    value_ms: float
    low_ms: float
    high_ms: float

    def __add__(self, other: Span) -> Span:
        """One after the other: the ends add up, which holds however the two depend on each other."""
        return Span(
            value_ms=self.value_ms + other.value_ms,
            low_ms=self.low_ms + other.low_ms,
            high_ms=self.high_ms + other.high_ms,
        )


NOTHING = Span(value_ms=0.0, low_ms=0.0, high_ms=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelinePart:
    """A part in the whole.

    Attributes:
        name: a branch, `rest`, or a stage outside the network.
        span: its own latency.
        critical: it lies on the longest way.
        slack_ms: by how much it may grow before it does.
        gain_ms: what the pipeline wins if it took no time.
    """

    name: str
    span: Span
    critical: bool
    slack_ms: float
    gain_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineLatency:
    """The whole, and its parts, the most worthwhile first."""

    schedule: Schedule
    whole: Span
    parts: tuple[PipelinePart, ...]


def pipeline_latency(
    branches: Mapping[str, Span],
    rest: Span,
    outside: Mapping[str, float] | None = None,
    *,
    schedule: Schedule = "serial",
) -> PipelineLatency:
    """Put parts together.

    Args:
        branches: latency of each branch's engine.
        rest: of what follows them: fusion and heads.
        outside: declared milliseconds of stages outside the network; `lidar.voxelise` comes before the branch lidar,
            a name without a branch follows the heads.
        schedule: whether branches run one after the other or at the same time.

    Raises:
        TaskError: a branch named `rest`, a stage named as a part of the network, a stage before a branch that there is
            none of, or a latency that is negative or no number.
    """
    if REST in branches:
        raise TaskError(
            f"expected branches of other names than {REST!r}, which is what follows them; rename the branch"
        )
    before, after = _outside(outside or {}, branches)
    spans = {**branches, REST: rest, **{name: span for stages in before.values() for name, span in stages.items()}}
    spans |= after

    def whole(without: str | None = None) -> Span:
        def of(name: str) -> Span:
            return NOTHING if name == without else spans[name]

        chains = [_sum(of(name) for name in (*before[branch], branch)) for branch in branches]
        front = _sum(chains) if schedule == "serial" else _longest(chains)
        return _sum([front, of(REST), *(of(name) for name in after)])

    total = whole()
    parts = []
    for name, span in spans.items():
        slack = _slack(name, branches, before, spans) if schedule == "parallel" else 0.0
        gain = total.value_ms - whole(without=name).value_ms
        parts.append(PipelinePart(name=name, span=span, critical=slack == 0.0, slack_ms=slack, gain_ms=gain))
    parts.sort(key=lambda part: (-part.gain_ms, part.name))
    return PipelineLatency(schedule=schedule, whole=total, parts=tuple(parts))


def _outside(
    outside: Mapping[str, float], branches: Mapping[str, Span]
) -> tuple[dict[str, dict[str, Span]], dict[str, Span]]:
    before: dict[str, dict[str, Span]] = {branch: {} for branch in branches}
    after = {}
    taken = {*branches, REST}
    for name, ms in outside.items():
        if not (ms >= 0 and math.isfinite(ms)):
            raise TaskError(
                f"expected a latency of at least 0 ms; got {ms} at outside stage {name!r}; correct the task"
            )
        if name in taken:
            raise TaskError(
                f"expected an outside stage with a name of its own; got {name!r}, which is a part of the network; "
                f"write {name}.SOMETHING where it comes before a branch, or rename it"
            )
        span = Span(value_ms=ms, low_ms=ms, high_ms=ms)
        branch, dot, _ = name.partition(".")
        if not dot:
            after[name] = span
        elif branch in before:
            before[branch][name] = span
        else:
            raise TaskError(
                f"expected an outside stage of a branch, one of {', '.join(branches)}; got {name!r}; correct the "
                "task's `outside`, or write no dot where it follows the heads"
            )
    return before, after


def _sum(spans: Iterable[Span]) -> Span:
    return reduce(add, spans, NOTHING)


def _longest(chains: list[Span]) -> Span:
    return Span(
        value_ms=max((c.value_ms for c in chains), default=0.0),
        low_ms=max((c.low_ms for c in chains), default=0.0),
        high_ms=max((c.high_ms for c in chains), default=0.0),
    )


def _slack(
    name: str, branches: Mapping[str, Span], before: Mapping[str, Mapping[str, Span]], spans: Mapping[str, Span]
) -> float:
    lengths = {b: spans[b].value_ms + sum(s.value_ms for s in before[b].values()) for b in branches}
    own = next((b for b in branches if name == b or name in before[b]), None)
    return 0.0 if own is None else max(lengths.values()) - lengths[own]
