"""`score.method: auto`: every candidate criterion on a short trial, and the one that did best.

A trial is what the next stages would do, cut short: score, allocate, remove the channels, estimate the norms again,
train a few steps, and measure the task's primary metric on the calib split. (Where the recipe allocates by distortion,
the trials allocate by importance: a table for each candidate would cost more than all the rest.) The eval split is not
touched, so the choice cannot flatter the figures that are reported.
"""

from __future__ import annotations

import copy
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusepress.pipeline.distributed import broadcast_object
from fusepress.pipeline.stages.allocation import allocate_widths, latency_cost, without_tables
from fusepress.pipeline.stages.base import Context

if TYPE_CHECKING:
    from torch import nn

    from fusepress.pipeline.graph.cost import CostModel
    from fusepress.pipeline.graph.plan import GroupGraph
    from fusepress.pipeline.pruning.latency import LatencyCost
    from fusepress.pipeline.recipe import Method
    from fusepress.pipeline.scoring.result import ScoreResult

BATCHNORM_BATCHES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """How one criterion did.

    Attributes:
        method: the criterion.
        value: the task's primary metric on the calib split after the trial's training.
        achieved: kept fraction of the budget's unit.
        seconds: what the trial took.
    """

    method: str
    value: float
    achieved: float
    seconds: float


def choose_method(
    ctx: Context, model: nn.Module, graph: GroupGraph, cost: CostModel
) -> tuple[ScoreResult, dict[str, Any]]:
    """Try every candidate and keep the best.

    Args:
        ctx: the run; its recipe has a prune section.
        model: the dense model; left as it is.
        graph: its coupled groups.
        cost: their costs.

    Returns:
        The scores of the winner, and facts for the report: `chosen`, `metric`, `split`, and what was `tried`.
    """
    results: dict[str, ScoreResult] = {}
    trials: list[Trial] = []
    candidates = ctx.recipe.score.candidates
    latency = latency_cost(ctx, model, graph)
    for number, method in enumerate(candidates):
        ctx.reporter.update(number / len(candidates), f"trying {method}")
        results[method], trial = _try(ctx, model, graph, cost, latency, method)
        trials.append(trial)
    sign = 1.0 if ctx.task.metrics[ctx.task.primary] == "max" else -1.0
    best = broadcast_object(max(trials, key=lambda trial: sign * trial.value))
    return results[best.method], {
        "chosen": best.method,
        "metric": ctx.task.primary,
        "split": "calib",
        "probe_steps": ctx.recipe.score.probe_steps,
        "tried": {trial.method: trial.value for trial in trials},
        "achieved": {trial.method: trial.achieved for trial in trials},
        "seconds": {trial.method: trial.seconds for trial in trials},
    }


def _try(
    ctx: Context, model: nn.Module, graph: GroupGraph, cost: CostModel, latency: LatencyCost | None, method: Method
) -> tuple[ScoreResult, Trial]:
    from fusepress.pipeline.evaluate import evaluate, torch_predict
    from fusepress.pipeline.graph.apply import apply_plan
    from fusepress.pipeline.recovery.batchnorm import reestimate_batchnorm
    from fusepress.pipeline.scoring.criteria import score_channels

    assert ctx.recipe.prune is not None
    started = time.monotonic()
    config = ctx.recipe.score.model_copy(update={"method": method})
    result = score_channels(model, ctx.task, graph, config, seed=ctx.recipe.seed)
    allocation, _ = allocate_widths(
        ctx, model, graph, cost, result.channel, latency=latency, config=without_tables(ctx.recipe.prune)
    )
    smaller = apply_plan(copy.deepcopy(model), graph.plan(allocation.kept))
    reestimate_batchnorm(smaller, ctx.task, BATCHNORM_BATCHES, ctx.recipe.seed)
    _train(ctx, smaller)
    evaluation = evaluate(ctx.task, torch_predict(ctx.task, smaller), "calib")
    return result, Trial(
        method=method,
        value=evaluation.metrics[ctx.task.primary],
        achieved=allocation.achieved,
        seconds=time.monotonic() - started,
    )


def _train(ctx: Context, model: nn.Module) -> None:
    """A few steps as fine-tuning would do them, without the teacher, which every candidate would share."""
    from fusepress.pipeline.recipe import FinetuneConfig
    from fusepress.pipeline.recovery.finetune import finetune

    wanted = ctx.recipe.finetune or FinetuneConfig()
    short = {"steps": ctx.recipe.score.probe_steps, "distill": False, "ema": 0.0, "early_stop": False, "log": ()}
    config = wanted.model_copy(update=short)
    with tempfile.TemporaryDirectory() as folder:
        finetune(model, None, ctx.task, config, seed=ctx.recipe.seed, workdir=Path(folder))
