"""How many channels of each group stay: aligned steps, never above the budget.

`global` is one ranking (`ranking.py`): channels leave in blocks of the target's channel multiple, the block first that
loses the least score per cost saved. Costs are taken anew after every block, for a layer's cost is the product of its
two widths. What the last block saved too much is then given back wherever an aligned step still fits. `importance`
keeps the most score that the budget buys (HALP's latency-saliency knapsack, arXiv 2110.10811), and `distortion` changes
the outputs least (RD-Prune, arXiv 2308.10438; MMPrune4U adds the modalities' information): both are knapsacks
(`knapsack.py`) iterated over the neighbours' widths (`budget.py`). The budget is a fraction of the MACs or parameters,
or a predicted latency (`spend.py`). No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fusepress.pipeline.errors import StageError
from fusepress.pipeline.graph.cost import CostTable
from fusepress.pipeline.graph.plan import Group, GroupGraph
from fusepress.pipeline.pruning.budget import Outcome, Problem, minimise, spend_all
from fusepress.pipeline.pruning.curves import Curve, resolve_eta
from fusepress.pipeline.pruning.ladders import ladder_widths
from fusepress.pipeline.pruning.ranking import Ladder, Ranking
from fusepress.pipeline.pruning.spend import LatencyLike, Limit, Spend, require, spend_and_limits
from fusepress.pipeline.recipe import PruneConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """What stays.

    Attributes:
        widths: kept channels a group.
        kept: sorted channel numbers a group: those with the highest scores, ties to the lower number.
        achieved: kept fraction of the dense cost.
        budget: the fraction that was asked for.
        gap: budget - achieved; of the allocations global and importance smaller than any aligned step that could be
            given back.
        notes: groups that could not follow the alignment, and why.
        unit: what the budget counts: macs, params or latency_ms.
        objective: what the allocation minimises, at these widths: the score that is lost (global, importance), or the
            summed distortion and information terms (distortion).
        iterations: knapsacks solved; 0 of the allocation global.
        removed_blocks: groups of width 0: whole residual blocks that go.
    """

    widths: dict[str, int]
    kept: dict[str, list[int]]
    achieved: float
    budget: float
    gap: float
    notes: tuple[str, ...]
    unit: str
    objective: float
    iterations: int = 0
    removed_blocks: tuple[str, ...] = ()


def allocate(
    scores: Mapping[str, npt.NDArray[Any]],
    graph: GroupGraph,
    cost: CostTable,
    config: PruneConfig,
    *,
    align: int,
    distortion: Mapping[str, Curve] | None = None,
    latency: LatencyLike | None = None,
    removable: Collection[str] | None = None,
) -> Allocation:
    """Choose the widths and channels that stay.

    Args:
        scores: one vector (width,) a group; higher = keep. They choose the channels inside a group in every mode.
        graph: the groups.
        cost: their costs.
        config: budget, allocation, ranking, floors, kept modules, budgets of branches.
        align: channel multiple of the target; widths are multiples of it where the dense width allows.
        distortion: one curve a group, for the allocation distortion.
        latency: the target's prediction, for a budget in milliseconds.
        removable: groups that may take width 0 where `config.blocks` is set, by default the graph's; not with the
            allocation global, whose ranking knows aligned steps only.

    Returns:
        Widths within every budget by their true cost. With the allocations global and importance one more aligned
        step of any group would break a budget; with distortion more is kept only where that is measured to help.

    Raises:
        RecipeError: a budget is below what floors, alignment and kept modules allow; the least fraction is named.
        StageError: scores, curves or the latency are missing, of the wrong length or not finite.
    """
    orders = {group.id: channel_order(group, scores) for group in graph.groups}
    notes: list[str] = []
    dead = {block.id: block.dead for block in graph.blocks}
    allowed: Collection[str] = dead if removable is None else removable
    if config.allocation == "global":
        allowed = ()
    ladders = [
        _ladder(group, orders[group.id], scores[group.id], ladder_widths(group, config, align, notes, allowed))
        for group in graph.groups
    ]
    spend, limits = spend_and_limits(cost, config, latency)
    solved = _solve(ladders, spend, limits, config, _losses(graph, ladders, config, distortion, dead))
    widths = {g.id: ladder.widths[k] for g, ladder, k in zip(graph.groups, ladders, solved.level, strict=True)}
    widths |= {gone: 0 for group, others in dead.items() if widths[group] == 0 for gone in others}
    assert not any(limit.exceeded(spend.total(cost.vector(widths), limit.branch)) for limit in limits)
    whole = limits[0]
    achieved = float(spend.total(cost.vector(widths))) / max(1, whole.dense)
    return Allocation(
        widths=widths,
        kept={group.id: kept_channels(group, orders[group.id], widths[group.id]) for group in graph.groups},
        achieved=achieved,
        budget=whole.fraction,
        gap=whole.fraction - achieved,
        notes=tuple(notes),
        unit=whole.key.removeprefix("prune."),
        objective=solved.value,
        iterations=solved.iterations,
        removed_blocks=tuple(group for group, width in widths.items() if width == 0),
    )


def _solve(
    ladders: list[Ladder],
    spend: Spend,
    limits: Sequence[Limit],
    config: PruneConfig,
    losses: tuple[npt.NDArray[np.float64], ...],
) -> Outcome:
    widths = [ladder.widths for ladder in ladders]
    require(limits, spend, widths)
    if config.allocation == "global":
        ranking = Ranking(ladders=ladders, spend=spend, per_cost=config.rank == "score_per_cost")
        for limit in reversed(limits):  # branches first: what they need counts for the whole
            ranking.cut(limit)
        ranking.give_back(limits)
        lost = sum(float(loss[k]) for loss, k in zip(losses, ranking.level, strict=True))
        return Outcome(level=tuple(ranking.level), value=lost, iterations=0)
    meters = [spend.meter(widths, limit.branch) for limit in limits]
    problem = Problem(losses, meters, [math.floor(limit.bound) for limit in limits])
    return spend_all(problem) if config.allocation == "importance" else minimise(problem)


def _losses(
    graph: GroupGraph,
    ladders: Sequence[Ladder],
    config: PruneConfig,
    distortion: Mapping[str, Curve] | None,
    dead: Mapping[str, Sequence[str]],
) -> tuple[npt.NDArray[np.float64], ...]:
    """What each width of each group loses, G vectors (K_g,).

    A block that goes also loses what the groups that go with it were worth (all of it, though they might have been
    narrowed anyway). Its distortion was measured without them and needs no addition.
    """
    if config.allocation != "distortion":
        worth = {group.id: ladder.worth[0] for group, ladder in zip(graph.groups, ladders, strict=True)}
        losses = [ladder.worth[0] - np.array(ladder.worth) for ladder in ladders]
        for group, ladder, loss in zip(graph.groups, ladders, losses, strict=True):
            if ladder.widths[-1] == 0:
                loss[-1] += sum(worth[other] for other in dead.get(group.id, ()))
        return tuple(losses)
    eta = resolve_eta(distortion or {}, config.distortion)
    losses = []
    for group, ladder in zip(graph.groups, ladders, strict=True):
        curve = (distortion or {}).get(group.id)
        if curve is None or tuple(curve.widths) != ladder.widths:
            got = "none" if curve is None else f"one over the widths {tuple(curve.widths)}"
            raise StageError(
                f"expected a distortion curve over the widths {ladder.widths}; got {got} at {group.id}; "
                "measure the distortion table with these ladders"
            )
        loss = np.asarray(curve.total(eta, config.distortion.reading), dtype=np.float64)
        if loss.shape != (len(ladder.widths),) or not np.isfinite(loss).all():
            raise StageError(
                f"expected {len(ladder.widths)} finite distortions; got shape {loss.shape}, "
                f"{int((~np.isfinite(loss)).sum())} of them not finite, at {group.id}; check the calibration samples"
            )
        losses.append(loss)
    return tuple(losses)


def channel_order(group: Group, scores: Mapping[str, npt.NDArray[Any]]) -> list[list[int]]:
    """Channels of each part of the group, best first; ties to the lower number.

    Raises:
        StageError: scores are missing, of the wrong length or not finite.
    """
    given = scores.get(group.id)
    if given is None or given.shape != (group.width,):
        got = "none" if given is None else f"shape {given.shape}"
        raise StageError(f"expected scores of shape ({group.width},); got {got} at {group.id}; score the model again")
    if not np.isfinite(given).all():
        raise StageError(f"expected finite scores; got NaN or infinity at {group.id}; check the scoring batches")
    part = group.width // group.multiple
    parts = [range(start, start + part) for start in range(0, group.width, part)]
    return [sorted(channels, key=lambda c: (-float(given[c]), c)) for channels in parts]


def kept_channels(group: Group, order: Sequence[Sequence[int]], width: int) -> list[int]:
    """The channels that stay at a width, ascending; as many of each part."""
    return sorted(c for part in order for c in part[: width // group.multiple])


def _ladder(group: Group, order: Sequence[Sequence[int]], scores: npt.NDArray[Any], widths: tuple[int, ...]) -> Ladder:
    worth = [float(sum(float(scores[c]) for c in kept_channels(group, order, width))) for width in widths]
    return Ladder(widths=widths, worth=tuple(worth))


__all__ = ["Allocation", "allocate", "channel_order", "kept_channels"]
