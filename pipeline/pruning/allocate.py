"""How many channels of each group stay: one global ranking, aligned steps, never above the budget, and maximal.

Channels leave in blocks of the target's channel multiple, the block first that loses the least score per cost saved.
Costs are taken anew after every block, for a layer's cost is the product of its two widths. What the last block saved
too much is then given back wherever an aligned step still fits. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fusepress.pipeline.errors import RecipeError, StageError
from fusepress.pipeline.graph.cost import CostTable, Ints, Unit
from fusepress.pipeline.graph.plan import Group, GroupGraph
from fusepress.pipeline.recipe import PruneConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """What stays.

    Attributes:
        widths: kept channels a group.
        kept: sorted channel numbers a group: those with the highest scores, ties to the lower number.
        achieved: kept fraction of the dense cost.
        budget: the fraction that was asked for.
        gap: budget - achieved; smaller than any aligned step that could be given back.
        notes: groups that could not follow the alignment, and why.
    """

    widths: dict[str, int]
    kept: dict[str, list[int]]
    achieved: float
    budget: float
    gap: float
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ladder:
    """The widths that a group may take, from dense downwards, and the summed score that each keeps."""

    widths: tuple[int, ...]
    worth: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Limit:
    """An upper bound on the cost of the model (branch None) or of one branch."""

    key: str
    branch: str | None
    fraction: float
    dense: int

    def exceeded(self, cost: Ints) -> npt.NDArray[np.bool_]:
        over: npt.NDArray[np.bool_] = cost > self.fraction * self.dense
        return over


def allocate(
    scores: Mapping[str, npt.NDArray[Any]], graph: GroupGraph, cost: CostTable, config: PruneConfig, *, align: int
) -> Allocation:
    """Choose the widths and channels that stay.

    Args:
        scores: one vector (width,) a group; higher = keep.
        graph: the groups.
        cost: their costs.
        config: budget, ranking, floors, kept modules, budgets of branches.
        align: channel multiple of the target; widths are multiples of it where the dense width allows.

    Returns:
        Widths within every budget, such that one more aligned step of any group would break one.

    Raises:
        RecipeError: a budget is below what floors, alignment and kept modules allow; the least fraction is named.
        StageError: scores are missing, of the wrong length or not finite.
    """
    unit: Unit = "macs" if config.macs is not None else "params"
    orders = {group.id: _order(group, scores) for group in graph.groups}
    notes: list[str] = []
    ladders = [_ladder(group, orders[group.id], scores[group.id], config, align, notes) for group in graph.groups]
    limits = _limits(cost, config, unit)
    search = _Search(ladders=ladders, cost=cost, unit=unit, per_cost=config.rank == "score_per_cost")
    for limit in limits:
        search.require(limit)
    for limit in reversed(limits):  # branches first: what they need counts for the whole
        search.cut(limit)
    search.give_back(limits)
    widths = {group.id: int(width) for group, width in zip(graph.groups, search.widths(), strict=True)}
    whole = limits[0]
    achieved = float(cost.total(unit, search.widths())) / max(1, whole.dense)
    return Allocation(
        widths=widths,
        kept={group.id: _kept(group, orders[group.id], widths[group.id]) for group in graph.groups},
        achieved=achieved,
        budget=whole.fraction,
        gap=whole.fraction - achieved,
        notes=tuple(notes),
    )


def _order(group: Group, scores: Mapping[str, npt.NDArray[Any]]) -> list[list[int]]:
    """Channels of each part of the group, best first."""
    given = scores.get(group.id)
    if given is None or given.shape != (group.width,):
        got = "none" if given is None else f"shape {given.shape}"
        raise StageError(f"expected scores of shape ({group.width},); got {got} at {group.id}; score the model again")
    if not np.isfinite(given).all():
        raise StageError(f"expected finite scores; got NaN or infinity at {group.id}; check the scoring batches")
    part = group.width // group.multiple
    parts = [range(start, start + part) for start in range(0, group.width, part)]
    return [sorted(channels, key=lambda c: (-float(given[c]), c)) for channels in parts]


def _kept(group: Group, order: Sequence[Sequence[int]], width: int) -> list[int]:
    return sorted(c for part in order for c in part[: width // group.multiple])


def _ladder(
    group: Group,
    order: Sequence[Sequence[int]],
    scores: npt.NDArray[Any],
    config: PruneConfig,
    align: int,
    notes: list[str],
) -> _Ladder:
    step = math.lcm(align, group.multiple)
    lowest = max(1, config.min_channels, math.ceil(config.floor * group.width - 1e-9))
    widths = [group.width]
    if any(_inside(producer, path) for producer in group.producers for path in config.keep):
        notes.append(f"{group.id}: kept by prune.keep")
    elif group.width <= step:
        notes.append(f"{group.id}: stays at {group.width}, no wider than one aligned step of {step}")
    else:
        widths += [w for w in range(group.width // step * step, 0, -step) if lowest <= w < group.width]
        if group.width % step:
            notes.append(f"{group.id}: the dense width {group.width} is no multiple of {step}; narrower ones are")
    worth = [float(sum(float(scores[c]) for c in _kept(group, order, width))) for width in widths]
    return _Ladder(widths=tuple(widths), worth=tuple(worth))


def _inside(param: str, path: str) -> bool:
    return param == path or param.startswith(f"{path}.")


def _limits(cost: CostTable, config: PruneConfig, unit: Unit) -> list[_Limit]:
    fraction = config.macs if config.macs is not None else config.params
    assert fraction is not None
    limits = [_Limit(key=f"prune.{unit}", branch=None, fraction=fraction, dense=int(cost.total(unit, cost.dense)))]
    known = list(cost.branch_totals())
    for branch, share in config.branches.items():
        if branch not in known:
            raise RecipeError(
                f"expected prune.branches to name branches of the model ({', '.join(known)}); "
                f"got {branch!r}; correct it"
            )
        dense = int(cost.total(unit, cost.dense, branch))
        limits.append(_Limit(key=f"prune.branches.{branch}", branch=branch, fraction=share, dense=dense))
    return limits


class _Search:
    """Where every group stands on its ladder."""

    def __init__(self, *, ladders: list[_Ladder], cost: CostTable, unit: Unit, per_cost: bool) -> None:
        self.ladders = ladders
        self.cost = cost
        self.unit: Unit = unit
        self.per_cost = per_cost
        self.level = [0] * len(ladders)

    def widths(self, level: Sequence[int] | None = None) -> Ints:
        chosen = self.level if level is None else level
        return np.array([ladder.widths[at] for ladder, at in zip(self.ladders, chosen, strict=True)], dtype=np.int64)

    def require(self, limit: _Limit) -> None:
        """Refuse a budget that even the smallest widths break."""
        least = int(self.cost.total(self.unit, self.widths([len(x.widths) - 1 for x in self.ladders]), limit.branch))
        if limit.exceeded(np.array(least)):
            fraction = math.ceil(least / max(1, limit.dense) * 1000) / 1000
            raise RecipeError(
                f"expected {limit.key} >= {fraction:.3f}, the least that floors, alignment and kept modules leave; "
                f"got {limit.fraction:g}; raise it, or lower prune.floor, prune.min_channels or prune.align"
            )

    def cut(self, limit: _Limit) -> None:
        """Remove blocks, the cheapest loss first, until the limit holds."""
        while limit.exceeded(here := self.cost.total(self.unit, self.widths(), limit.branch)):
            groups = [g for g, ladder in enumerate(self.ladders) if self.level[g] + 1 < len(ladder.widths)]
            trial = self._moved(groups, 1)
            saved = here - self.cost.total(self.unit, trial, limit.branch)
            useful = [k for k in range(len(groups)) if saved[k] > 0]
            best = min(useful, key=lambda k: (self._loss(groups[k], self.level[groups[k]], int(saved[k])), groups[k]))
            self.level[groups[best]] += 1

    def give_back(self, limits: Sequence[_Limit]) -> None:
        """Restore blocks, the best first, until none fits any more."""
        while groups := [g for g in range(len(self.ladders)) if self.level[g] > 0]:
            trial = self._moved(groups, -1)
            broken = np.zeros(len(groups), dtype=bool)
            for limit in limits:
                broken |= limit.exceeded(self.cost.total(self.unit, trial, limit.branch))
            fits = [k for k in range(len(groups)) if not broken[k]]
            if not fits:
                return
            spent = self.cost.total(self.unit, trial) - self.cost.total(self.unit, self.widths())
            best = max(
                fits, key=lambda k: (self._loss(groups[k], self.level[groups[k]] - 1, int(spent[k])), -groups[k])
            )
            self.level[groups[best]] -= 1

    def _moved(self, groups: Sequence[int], by: int) -> Ints:
        """Widths (len(groups), G) with each of the groups in turn moved by one level."""
        trial = np.repeat(self.widths()[None], len(groups), axis=0)
        for row, g in enumerate(groups):
            trial[row, g] = self.ladders[g].widths[self.level[g] + by]
        return trial

    def _loss(self, g: int, level: int, saved: int) -> float:
        """Score lost between a level and the next one down, per cost or per channel.

        The ratio ranks negative scores rightly too: it is the Lagrangian order when the budget is to be filled.
        """
        ladder = self.ladders[g]
        lost = ladder.worth[level] - ladder.worth[level + 1]
        return lost / max(1, saved) if self.per_cost else lost / (ladder.widths[level] - ladder.widths[level + 1])


__all__ = ["Allocation", "allocate"]
