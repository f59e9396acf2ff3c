"""The proven optimum where a layer's cost depends on both its widths: the reference that the fast solver is held to.

One mixed-integer programme over widths and whole blocks, as MDP (arXiv 2504.02168) poses it and unlike HALP's knapsack
(arXiv 2110.10811), which prices a layer at fixed inputs. A pair of groups that meet in a layer gets one variable
z[i, j] for each pair of their options, z summing to the options' own binaries along both sides: then z is the product
of the two at every integer point, and the relaxation is tighter than products linearised one by one. A layer that
reads a concatenation costs the sum over its producers, so it is one pair for each of them, exactly. Slow: for tests,
benchmarks and small models.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fusepress.pipeline.errors import StageError
from fusepress.pipeline.pruning.budget import Pairwise

Floats = npt.NDArray[np.float64]
BUDGET_SCALE = 1e5  # a budget row is scaled to this: the solver's tolerance of 1e-7 is then far below one unit of cost
VALUE_SCALE = 1e4  # of the summed values: the solver stops at an absolute gap of 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class JointOptimum:
    """What the programme found.

    Attributes:
        level: option of each group.
        value: their summed value.
        bound: no options within the budgets have a lower one.
        optimal: whether the value is proven least.
        seconds: time taken.
    """

    level: tuple[int, ...]
    value: float
    bound: float
    optimal: bool
    seconds: float


def solve_joint(
    values: Sequence[npt.NDArray[Any]],
    costs: Sequence[Pairwise],
    capacities: Sequence[int],
    *,
    time_limit_s: float = 60.0,
    at_most: float | None = None,
) -> JointOptimum:
    """Least summed value with every cost within its capacity, by HiGHS.

    Args:
        values: what each option loses, G vectors (K_g,).
        costs: one cost a budget, each a sum of terms of one group and of two.
        capacities: the most that may be spent on each.
        time_limit_s: when to stop proving; the best point so far and the bound are returned.
        at_most: value of a known feasible point, which spares the search all that is worse.

    Returns:
        The options, and how far they are proven.

    Raises:
        StageError: infeasible, or no point was found in time.
    """
    from scipy.optimize import Bounds, LinearConstraint
    from scipy.optimize import milp as highs

    started = time.perf_counter()
    values_ = [np.asarray(v, dtype=np.float64) for v in values]
    scale = max(float(sum(np.abs(v).max() for v in values_)), 1e-300) / VALUE_SCALE
    rows = _Rows(values_, costs)
    objective = np.zeros(rows.columns)
    objective[: rows.options] = np.concatenate(values_) / scale
    constraints = [LinearConstraint(rows.equalities(), rows.targets, rows.targets)]
    for cost, capacity in zip(costs, capacities, strict=True):
        room = capacity - cost.constant
        ratio = BUDGET_SCALE / max(1, abs(room))
        constraints.append(LinearConstraint(rows.costs(cost)[None] * ratio, -np.inf, room * ratio))
    if at_most is not None:
        constraints.append(LinearConstraint(objective[None], -np.inf, at_most / scale + 1e-5))
    result = highs(
        objective,
        integrality=(np.arange(rows.columns) < rows.options).astype(np.int64),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"time_limit": time_limit_s, "mip_rel_gap": 0.0},
    )
    if result.x is None:
        raise StageError(
            f"expected widths within the budget; got {result.message!r} for {len(values_)} groups; "
            "raise the budget, or allow more time"
        )
    level = rows.level(result.x)
    for cost, capacity in zip(costs, capacities, strict=True):
        spent = int(cost.total(level[None])[0])
        if spent > capacity:
            raise StageError(
                f"expected a cost of at most {capacity}; got {spent} from the mixed-integer programme; "
                "its tolerance is too coarse for these costs: count them in larger units"
            )
    value = float(sum(v[k] for v, k in zip(values_, level, strict=True)))
    bound = float(result.mip_dual_bound) * scale if result.mip_dual_bound is not None else -np.inf
    return JointOptimum(
        level=tuple(level.tolist()),
        value=value,
        bound=min(bound, value),
        optimal=result.status == 0,
        seconds=time.perf_counter() - started,
    )


class _Rows:
    """Columns of the programme: first every option's binary, then the pairs' z in blocks."""

    def __init__(self, values: Sequence[Floats], costs: Sequence[Pairwise]) -> None:
        self.sizes = [v.size for v in values]
        self.first = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)
        self.options = int(self.first[-1])
        self.block: dict[tuple[int, int], int] = {}
        self.columns = self.options
        for a, b in sorted({pair for cost in costs for pair in cost.joint}):
            self.block[a, b] = self.columns
            self.columns += self.sizes[a] * self.sizes[b]
        sides = sum(self.sizes[a] + self.sizes[b] for a, b in self.block)
        self.targets = np.concatenate([np.ones(len(values)), np.zeros(sides)])

    def equalities(self) -> Any:
        """One option a group; z sums to the binaries of either side: sparse (R, columns)."""
        from scipy.sparse import coo_array

        row: list[npt.NDArray[np.int64]] = [np.repeat(np.arange(len(self.sizes)), self.sizes)]
        column: list[npt.NDArray[np.int64]] = [np.arange(self.options)]
        value: list[Floats] = [np.ones(self.options)]
        at = len(self.sizes)
        for (a, b), start in self.block.items():
            z = start + np.arange(self.sizes[a] * self.sizes[b]).reshape(self.sizes[a], self.sizes[b])
            for g, along in ((a, z), (b, z.T)):
                lines = at + np.arange(self.sizes[g])
                row += [lines, np.repeat(lines, along.shape[1])]
                column += [self.first[g] + np.arange(self.sizes[g]), along.ravel()]
                value += [-np.ones(self.sizes[g]), np.ones(along.size)]
                at += self.sizes[g]
        entries = (np.concatenate(value), (np.concatenate(row), np.concatenate(column)))
        return coo_array(entries, shape=(at, self.columns)).tocsr()

    def costs(self, cost: Pairwise) -> Floats:
        """The cost of every column, (columns,)."""
        row = np.zeros(self.columns)
        row[: self.options] = np.concatenate(cost.own)
        for pair, joint in cost.joint.items():
            row[self.block[pair] : self.block[pair] + joint.size] = joint.ravel()
        return row

    def level(self, x: Floats) -> npt.NDArray[np.int64]:
        """The options that are set."""
        return np.array([np.argmax(x[a:b]) for a, b in zip(self.first[:-1], self.first[1:], strict=True)])


__all__ = ["JointOptimum", "solve_joint"]
