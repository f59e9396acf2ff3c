"""Widths under the recipe's budget: what the prune stage and a trial of `score.method: auto` have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fusepress.pipeline.stages.base import Context

if TYPE_CHECKING:
    from torch import nn

    from fusepress.pipeline.graph.cost import CostModel
    from fusepress.pipeline.graph.plan import GroupGraph
    from fusepress.pipeline.pruning.allocate import Allocation


def alignment(ctx: Context) -> int:
    """The channel multiple of this run: the recipe's, else the target's."""
    assert ctx.recipe.prune is not None
    return ctx.recipe.prune.align or ctx.profile.align(ctx.precision, sparsity=ctx.recipe.sparsify is not None)


def allocate_widths(
    ctx: Context, model: nn.Module, graph: GroupGraph, cost: CostModel, scores: Mapping[str, Any]
) -> Allocation:
    """Choose widths and channels by the recipe's prune section.

    Args:
        ctx: the run.
        model: the dense model; left as it is.
        graph: its coupled groups.
        cost: their costs.
        scores: one vector a group, higher = keep.

    Raises:
        RecipeError: the budget cannot be reached.
    """
    from fusepress.pipeline.pruning.allocate import allocate

    assert ctx.recipe.prune is not None
    return allocate(scores, graph, cost, ctx.recipe.prune, align=alignment(ctx))
