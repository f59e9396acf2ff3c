"""One option a group, least summed value, summed cost within a capacity: the group knapsack, solved exactly.

The dynamic programme runs over integer cost units (RD-Prune, arXiv 2308.10438, counts single weights; coarser units
make it small whatever the model's size) and fills its table with whole-row array operations. The mixed-integer
programme of the same problem is the reference that it is held against.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fusepress.pipeline.errors import StageError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def solve(values: Sequence[npt.NDArray[Any]], costs: Sequence[npt.NDArray[Any]], capacity: int) -> list[int]:
    """Choose one option a group so that the summed values are least and the summed costs are within the capacity.

    Exact for any values (negative, not monotone) and any number of options. T[0, b] = 0 for every b, so T[i, b] is the
    least value of the first i groups at a cost of *at most* b:

        T[i, b] = min over k with c[i, k] <= b of T[i - 1, b - c[i, k]] + v[i, k]

    Time groups x options x units; memory one byte (two beyond 256 options) a group and unit.

    Args:
        values: one vector (K_i,) a group; options may differ in number.
        costs: the options' costs in whole units >= 0, (K_i,) a group.
        capacity: the most units that may be spent.

    Returns:
        The option of each group; ties are broken by a fixed order.

    Raises:
        StageError: even the cheapest options cost more (the least capacity is named), or the input is malformed.
    """
    values_, costs_ = _checked(values, costs, capacity)
    if not values_:
        return []
    # More than everything costs together is never spent.
    last = min(capacity, sum(int(c.max()) for c in costs_))
    choices: list[npt.NDArray[Any]] = []
    least: Floats = np.zeros(last + 1)
    for value_K, cost_K in zip(values_, costs_, strict=True):
        least, choice = _add_group(least, value_K, cost_K)
        choices.append(choice)
    chosen: list[int] = []
    spent = last
    for choice, cost_K in zip(reversed(choices), reversed(costs_), strict=True):
        chosen.append(int(choice[spent]))
        spent -= int(cost_K[chosen[-1]])
    return chosen[::-1]


def _add_group(before: Floats, value_K: Floats, cost_K: Ints) -> tuple[Floats, npt.NDArray[Any]]:
    """One row of the table and the options that made it; unreachable cells are infinite."""
    units = before.size
    least = np.full(units, np.inf)
    choice = np.zeros(units, dtype=np.uint8 if value_K.size <= 256 else np.uint16)
    trial, better = np.empty(units), np.empty(units, dtype=bool)
    for k in _useful(value_K, cost_K):
        cost = int(cost_K[k])
        if cost >= units:
            continue
        size = units - cost
        np.add(before[:size], value_K[k], out=trial[:size])
        np.less(trial[:size], least[cost:], out=better[:size])
        np.copyto(least[cost:], trial[:size], where=better[:size])
        np.copyto(choice[cost:], choice.dtype.type(k), where=better[:size])
    return least, choice


def _useful(value_K: Floats, cost_K: Ints) -> list[int]:
    """Options that no other beats or equals in both value and cost, in their own order."""
    kept: list[int] = []
    lowest = np.inf
    for k in np.lexsort((np.arange(value_K.size), value_K, cost_K)).tolist():
        if value_K[k] < lowest:
            lowest = float(value_K[k])
            kept.append(k)
    return sorted(kept)


def milp(
    values: Sequence[npt.NDArray[Any]],
    costs: Sequence[npt.NDArray[Any]],
    capacity: float,
    *,
    time_limit_s: float = 60.0,
) -> list[int]:
    """The same problem as a mixed-integer programme (HiGHS): the reference; its costs need not be whole.

    Args:
        values: one vector (K_i,) a group.
        costs: the options' costs >= 0, (K_i,) a group.
        capacity: the most that may be spent.
        time_limit_s: when to give up.

    Returns:
        The option of each group.

    Raises:
        StageError: infeasible, malformed, or no proven optimum within the time.
    """
    from scipy.optimize import Bounds, LinearConstraint
    from scipy.optimize import milp as highs
    from scipy.sparse import csr_array

    values_, costs_ = _checked(values, costs, capacity, whole=False)
    if not values_:
        return []
    group_S = np.repeat(np.arange(len(values_)), [v.size for v in values_])
    value_S, cost_S = np.concatenate(values_), np.concatenate(costs_)
    # The solver stops at an absolute gap of 1e-6, so the values are made large.
    scale = (float(sum(np.abs(v).max() for v in values_)) or 1.0) / 1e4
    one = csr_array((np.ones(group_S.size), (group_S, np.arange(group_S.size))))
    result = highs(
        value_S / scale,
        integrality=np.ones(group_S.size),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one, 1, 1), LinearConstraint(cost_S[None], -np.inf, capacity)],
        options={"time_limit": time_limit_s, "mip_rel_gap": 0.0},
    )
    if result.status != 0 or result.x is None:
        raise StageError(
            f"expected a proven optimum within {time_limit_s:g} s; got {result.message!r} for {len(values_)} groups; "
            "allow more time"
        )
    return [int(np.argmax(result.x[group_S == g])) for g in range(len(values_))]


def _checked(
    values: Sequence[npt.NDArray[Any]], costs: Sequence[npt.NDArray[Any]], capacity: float, *, whole: bool = True
) -> tuple[list[Floats], list[Any]]:
    """The input as float64 values and costs (int64 where they must be whole)."""
    if len(values) != len(costs):
        raise StageError(f"expected as many cost vectors as value vectors; got {len(costs)} for {len(values)} groups")
    values_ = [np.asarray(v, dtype=np.float64) for v in values]
    costs_ = [np.asarray(c) for c in costs]
    for g, (value_K, cost_K) in enumerate(zip(values_, costs_, strict=True)):
        if value_K.ndim != 1 or value_K.size == 0 or value_K.shape != cost_K.shape or value_K.size > 65536:
            raise StageError(
                f"expected 1 to 65536 options with a value and a cost each; got {value_K.shape} and {cost_K.shape} "
                f"at group {g}; give one number an option"
            )
        if not np.isfinite(value_K).all():
            raise StageError(f"expected finite values; got NaN or infinity at group {g}; measure them again")
        if whole and not np.issubdtype(cost_K.dtype, np.integer):
            raise StageError(f"expected whole cost units; got {cost_K.dtype} at group {g}; round them up to units")
        if (cost_K < 0).any() or not np.isfinite(cost_K).all():
            raise StageError(f"expected costs >= 0; got {cost_K.min()} at group {g}; count from the cheapest option")
    cheapest = sum(c.min() for c in costs_)
    if cheapest > capacity:
        raise StageError(
            f"expected a capacity of at least {cheapest}, what the cheapest options cost together; got {capacity}; "
            "raise the budget"
        )
    return values_, [c.astype(np.int64) if whole else c.astype(np.float64) for c in costs_]


__all__ = ["milp", "solve"]
