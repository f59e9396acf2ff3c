"""Widths under the recipe's budget: what the prune stage and a trial of `score.method: auto` have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusepress.pipeline.distributed import on_main
from fusepress.pipeline.stages import common
from fusepress.pipeline.stages.base import Context

if TYPE_CHECKING:
    from torch import nn

    from fusepress.pipeline.graph.cost import CostModel
    from fusepress.pipeline.graph.plan import GroupGraph
    from fusepress.pipeline.pruning.allocate import Allocation
    from fusepress.pipeline.pruning.curves import DistortionTable
    from fusepress.pipeline.pruning.latency import LatencyCost
    from fusepress.pipeline.recipe import PruneConfig


def alignment(ctx: Context) -> int:
    """The channel multiple of this run: the recipe's, else the target's."""
    assert ctx.recipe.prune is not None
    return ctx.recipe.prune.align or ctx.profile.align(ctx.precision, sparsity=ctx.recipe.wants_2to4)


def target_of(ctx: Context) -> dict[str, Any] | None:
    """What of the target shapes the widths, for a key: nothing where the budget is not in milliseconds."""
    assert ctx.recipe.prune is not None
    return None if ctx.recipe.prune.latency_ms is None else {**ctx.target_identity(), "precision": ctx.precision}


def without_tables(config: PruneConfig) -> PruneConfig:
    """The section for a first look: importance in place of distortion, whose tables cost many passes."""
    return config.model_copy(update={"allocation": "importance"}) if config.allocation == "distortion" else config


def latency_cost(ctx: Context, model: nn.Module, graph: GroupGraph) -> LatencyCost | None:
    """Latency as a function of the widths, where the budget is in milliseconds; it takes a few exports to learn.

    Of several processes only rank 0 has it.

    Args:
        ctx: the run.
        model: the dense model; left as it is.
        graph: its coupled groups.
    """
    from fusepress.pipeline.pruning.latency import LatencyCost

    assert ctx.recipe.prune is not None
    if ctx.recipe.prune.latency_ms is None:
        return None
    inputs, names = common.example_inputs(ctx), common.output_names(ctx, model)
    learnt: list[LatencyCost] = []

    def learn() -> None:
        learnt.append(LatencyCost(model, graph, inputs, ctx.profile, ctx.power_mode, ctx.precision, output_names=names))

    on_main(learn)  # a measured latency differs from process to process
    return learnt[0] if learnt else None


def allocate_widths(
    ctx: Context,
    model: nn.Module,
    graph: GroupGraph,
    cost: CostModel,
    scores: Mapping[str, Any],
    *,
    latency: LatencyCost | None,
    config: PruneConfig | None = None,
    work: Path | None = None,
    progress: Callable[[float, str], None] | None = None,
) -> tuple[Allocation, dict[str, Any]]:
    """Choose widths and channels by the recipe's prune section.

    Args:
        ctx: the run.
        model: the dense model; left as it is.
        graph: its coupled groups.
        cost: their costs.
        scores: one vector a group, higher = keep.
        latency: what `latency_cost` gave.
        config: in place of the recipe's prune section.
        work: where distortion tables are kept as they are measured, so that a killed run goes on with them.
        progress: called with the fraction done and a text.

    Returns:
        The allocation, and facts about it for the report.

    Raises:
        RecipeError: the budget cannot be reached.
    """
    from fusepress.pipeline.pruning.allocate import allocate

    config = config or ctx.recipe.prune
    assert config is not None
    curves = None
    facts: dict[str, Any] = {"allocation": config.allocation}
    if config.allocation == "distortion":
        table = _distortion(ctx, model, graph, scores, config, work, progress)
        curves = table.curves
        config = config.model_copy(update={"distortion": config.distortion.model_copy(update={"eta": table.eta})})
        facts |= {"eta": table.eta, "samples": table.samples, **table.facts, "table_notes": list(table.notes)}
    allocation = on_main(
        lambda: allocate(
            scores,
            graph,
            cost,
            config,
            align=alignment(ctx),
            distortion=curves,
            latency=latency,
            removable=graph.removable,
        )
    )
    facts |= {"objective": allocation.objective, "iterations": allocation.iterations}
    return allocation, facts


def _distortion(
    ctx: Context,
    model: nn.Module,
    graph: GroupGraph,
    scores: Mapping[str, Any],
    config: PruneConfig,
    work: Path | None,
    progress: Callable[[float, str], None] | None,
) -> DistortionTable:
    from fusepress.pipeline.pruning.distortion import distortion_table, silent
    from fusepress.pipeline.pruning.ladders import ladder_widths

    ladders = {group.id: ladder_widths(group, config, alignment(ctx), [], graph.removable) for group in graph.groups}
    return distortion_table(
        model,
        ctx.task,
        graph,
        scores,
        ladders,
        config.distortion,
        seed=ctx.recipe.seed,
        out=work,
        progress=progress or silent,
    )
