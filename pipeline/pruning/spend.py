"""What a budget counts: multiply-accumulates, parameters or predicted latency, all in whole units."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fusepress.pipeline.errors import RecipeError, StageError
from fusepress.pipeline.graph.cost import CostTable, Ints, Unit
from fusepress.pipeline.pruning.budget import Layout, Meter, Opaque, least, pairs_of, table_meter, widths_at
from fusepress.pipeline.recipe import PruneConfig

NANOSECONDS = 1e6  # in a millisecond: latency is counted in whole ones


class LatencyLike(Protocol):
    """Predicted latency of the model as a function of the groups' widths."""

    def latency_ms(self, widths: Mapping[str, int]) -> float:
        """Milliseconds at these widths. `latencies_ms` ((B, G) -> (B,)) is asked instead where there is one."""


class Spend(Protocol):
    """The cost of the model, or of one branch of it, in whole units."""

    def total(self, widths: Ints, branch: str | None = None) -> Ints:
        """Cost at these widths: (G,) -> (), or (B, G) -> (B,)."""

    def meter(self, ladders: Sequence[Sequence[int]], branch: str | None = None) -> Meter:
        """The same cost as a function of levels of the ladders."""

    def lowest(self, ladders: Sequence[Sequence[int]], branch: str | None = None) -> int:
        """The least that the ladders allow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableSpend:
    """Multiply-accumulates or parameters."""

    table: CostTable
    unit: Unit

    def total(self, widths: Ints, branch: str | None = None) -> Ints:
        """Cost at these widths: (G,) -> (), or (B, G) -> (B,)."""
        return self.table.total(self.unit, widths, branch)

    def meter(self, ladders: Sequence[Sequence[int]], branch: str | None = None) -> Meter:
        """The same cost as a function of levels of the ladders."""
        return table_meter(self.table, self.unit, ladders, branch)

    def lowest(self, ladders: Sequence[Sequence[int]], branch: str | None = None) -> int:
        """The least that the ladders allow: the smallest widths."""
        return int(self.total(np.array([ladder[-1] for ladder in ladders], dtype=np.int64), branch))


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencySpend:
    """Predicted latency in nanoseconds, rounded up.

    Attributes:
        latency: predicts it.
        ids: the groups, in the order of the widths.
        budget_ms: what is allowed; a latency above it is never rounded to it.
    """

    latency: LatencyLike
    ids: tuple[str, ...]
    budget_ms: float
    _known: dict[bytes, int] = field(default_factory=dict)

    def total(self, widths: Ints, branch: str | None = None) -> Ints:
        """Latency at these widths: (G,) -> (), or (B, G) -> (B,)."""
        assert branch is None
        rows = np.ascontiguousarray(widths, dtype=np.int64).reshape(-1, len(self.ids))
        keys = [row.tobytes() for row in rows]
        new = {key: at for at, key in enumerate(keys) if key not in self._known}
        if new:
            self._known.update(zip(new, self._counted(self._ms(rows[list(new.values())])).tolist(), strict=True))
        counted = np.array([self._known[key] for key in keys], dtype=np.int64)
        return counted.reshape(np.shape(widths)[:-1])

    def meter(self, ladders: Sequence[Sequence[int]], branch: str | None = None) -> Meter:
        """The same cost as a function of levels of the ladders.

        A kernel's latency depends on the few groups that it reads and makes. All single groups and all pairs that
        meet are asked for once, and guide the search; what they leave out (kernels on three groups, two blocks
        removed at once, rounding) it finds when it asks for the latency of what it chose.
        """
        assert branch is None
        return self._meter(ladders)

    def lowest(self, ladders: Sequence[Sequence[int]], branch: str | None = None) -> int:
        """The least that the ladders allow, as far as single moves find it: latency goes in stairs."""
        meter = self._meter(ladders)
        layout = Layout([len(x) for x in ladders])
        rows = np.stack([least(meter, layout), np.array(layout.sizes) - 1])
        return int(meter.total(rows).min())

    def _meter(self, ladders: Sequence[Sequence[int]]) -> Opaque:
        def count(levels: Ints) -> Ints:
            return self.total(widths_at(ladders, levels))

        guide = pairs_of(count, ladders, _meetings(count, ladders), products=False)
        return Opaque(count, [len(x) for x in ladders], guide, trusted=True)

    def _ms(self, rows: Ints) -> npt.NDArray[np.float64]:
        many = getattr(self.latency, "latencies_ms", None)
        if many is not None:
            return np.asarray(many(rows), dtype=np.float64)
        named = (dict(zip(self.ids, row, strict=True)) for row in rows.tolist())
        return np.array([self.latency.latency_ms(widths) for widths in named], dtype=np.float64)

    def _counted(self, ms: npt.NDArray[np.float64]) -> Ints:
        if not (np.isfinite(ms) & (ms >= 0)).all():
            raise StageError("expected finite predicted latencies; got NaN or infinity; predict the target again")
        above = math.ceil(self.budget_ms * NANOSECONDS) + 1
        counted: Ints = np.ceil(ms * NANOSECONDS).astype(np.int64)
        return np.where(ms > self.budget_ms, np.maximum(counted, above), counted)


def _meetings(count: Callable[[Ints], Ints], ladders: Sequence[Sequence[int]]) -> npt.NDArray[np.bool_]:
    """Groups that cost something else together than each alone, at their narrowest widths above zero, (G, G)."""
    groups = len(ladders)
    narrow = np.diag([max(k for k, width in enumerate(ladder) if width) for ladder in ladders]).astype(np.int64)
    first, second = np.triu_indices(groups, 1)
    alone, dense = count(narrow), count(np.zeros((1, groups), dtype=np.int64))[0]
    together = count(narrow[first] + narrow[second])
    meetings = np.zeros((groups, groups), dtype=bool)
    # Rounding each of the four to whole nanoseconds may leave up to two.
    meetings[first, second] = np.abs(together - alone[first] - alone[second] + dense) > 2
    return meetings


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """An upper bound on the cost of the model (branch None) or of one branch.

    Attributes:
        key: where the recipe sets it.
        branch: whose cost it bounds.
        given: the recipe's number.
        bound: the same in units of the spend.
        dense: the dense model's cost.
    """

    key: str
    branch: str | None
    given: float
    bound: float
    dense: int

    @property
    def fraction(self) -> float:
        """What is allowed of the dense cost."""
        return self.bound / max(1, self.dense) if self.key == "prune.latency_ms" else self.given

    def exceeded(self, cost: Ints) -> npt.NDArray[np.bool_]:
        """Whether costs are above the bound."""
        over: npt.NDArray[np.bool_] = cost > self.bound
        return over

    def refusal(self, lowest: int) -> RecipeError:
        """The error that names the least value that the recipe could have here."""
        scale = NANOSECONDS if self.key == "prune.latency_ms" else max(1, self.dense)
        return RecipeError(
            f"expected {self.key} >= {math.ceil(lowest / scale * 1000) / 1000:.3f}, the least that floors, alignment "
            f"and kept modules leave; got {self.given:g}; raise it, or lower prune.floor, prune.min_channels or "
            "prune.align"
        )


def spend_and_limits(
    table: CostTable, config: PruneConfig, latency: LatencyLike | None
) -> tuple[Spend, tuple[Limit, ...]]:
    """What the recipe's budget counts, and its bounds, the model's first.

    Raises:
        RecipeError: a budget of an unknown branch.
        StageError: a budget in milliseconds without a prediction.
    """
    if config.latency_ms is not None:
        return _latency(table, config.latency_ms, latency)
    unit: Unit = "macs" if config.macs is not None else "params"
    fraction = config.macs if config.macs is not None else config.params
    assert fraction is not None
    dense = int(table.total(unit, table.dense))
    limits = [Limit(key=f"prune.{unit}", branch=None, given=fraction, bound=fraction * dense, dense=dense)]
    known = list(table.branch_totals())
    for branch, share in config.branches.items():
        if branch not in known:
            raise RecipeError(
                f"expected prune.branches to name branches of the model ({', '.join(known)}); "
                f"got {branch!r}; correct it"
            )
        whole = int(table.total(unit, table.dense, branch))
        key = f"prune.branches.{branch}"
        limits.append(Limit(key=key, branch=branch, given=share, bound=share * whole, dense=whole))
    return TableSpend(table=table, unit=unit), tuple(limits)


def _latency(table: CostTable, budget_ms: float, latency: LatencyLike | None) -> tuple[Spend, tuple[Limit, ...]]:
    if latency is None:
        raise StageError(
            "expected a latency prediction for prune.latency_ms; got none at allocate; give `latency`, or a budget "
            "in prune.macs"
        )
    spend = LatencySpend(latency=latency, ids=table.ids, budget_ms=budget_ms)
    bound = float(math.ceil(budget_ms * NANOSECONDS))
    dense = int(spend.total(table.dense))
    return spend, (Limit(key="prune.latency_ms", branch=None, given=budget_ms, bound=bound, dense=dense),)


def require(limits: Sequence[Limit], spend: Spend, ladders: Sequence[Sequence[int]]) -> None:
    """Refuse budgets that even the smallest widths break.

    Raises:
        RecipeError: the least budget is named.
    """
    for limit in limits:
        lowest = spend.lowest(ladders, limit.branch)
        if limit.exceeded(np.array(lowest)):
            raise limit.refusal(lowest)


__all__ = ["LatencyLike", "LatencySpend", "Limit", "Spend", "TableSpend", "require", "spend_and_limits"]
