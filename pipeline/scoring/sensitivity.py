"""First-order criteria: SNIP and Taylor, for channels (a gate after the norm) and for single weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusepress.pipeline.distributed import alone
from fusepress.pipeline.recipe import ScoreConfig
from fusepress.pipeline.scoring.altermoma import Grouped
from fusepress.pipeline.scoring.channels import ChannelScorer, WeightScorer
from fusepress.pipeline.scoring.common import (
    WeightResult,
    add_over_ranks,
    channel_result,
    product_with_gradient,
    shares,
    weight_branches,
    weight_result,
)
from fusepress.pipeline.scoring.gradients import Passes, Progress, mean_gradients, scoring_batches, silent
from fusepress.pipeline.scoring.masking import untouched
from fusepress.pipeline.scoring.result import ScoreResult
from fusepress.pipeline.task import LoadedTask


def score_snip(
    model: nn.Module,
    task: LoadedTask,
    graph: Grouped,
    config: ScoreConfig,
    *,
    seed: int,
    progress: Progress = silent,
) -> ScoreResult:
    """SNIP (Lee et al., ICLR 2019) with a gate for a channel: |derivative of the mean loss|, as a share of their sum.

    With one group this is AlterMOMA's DeCI; otherwise only the normalisation differs. Evaluation mode, n passes, two
    copies of the parameters.
    """
    scorer = ChannelScorer(model, graph.groups, "gate")
    passes = Passes(total=config.batches, progress=progress)
    with untouched(model, seed=seed):
        loss = mean_gradients(model, task, scoring_batches(task, seed, config.batches), passes, "snip")
        with torch.no_grad():
            scores = shares(scorer.scores(product_with_gradient(model), scorer.branch_of))
    log = {"method": "snip", "passes": passes.done, "seed": seed, "loss": loss}
    return channel_result(scores, graph.groups, log)


def snip_weights(
    model: nn.Module, task: LoadedTask, config: ScoreConfig, *, seed: int, progress: Progress = silent
) -> WeightResult:
    """SNIP: |theta * g| with g the mean gradient, as a share of the model's sum; three copies of the parameters."""
    scorer = WeightScorer(weight_branches(model, task))
    passes = Passes(total=config.batches, progress=progress)
    with untouched(model, seed=seed):
        loss = mean_gradients(model, task, scoring_batches(task, seed, config.batches), passes, "snip")
        with torch.no_grad():
            scores = shares(scorer.scores(product_with_gradient(model), scorer.branch_of))
    return weight_result(model, task, scores, {"method": "snip", "passes": passes.done, "seed": seed, "loss": loss})


def score_taylor(
    model: nn.Module,
    task: LoadedTask,
    graph: Grouped,
    config: ScoreConfig,
    *,
    seed: int,
    progress: Progress = silent,
) -> ScoreResult:
    """First-order Taylor (Molchanov 2019): the squared derivative of a gate after the norm, averaged over mini-batches.

    A gate that is shared (residual streams) accumulates before it is squared. Evaluation mode, n passes.
    """
    scorer = ChannelScorer(model, graph.groups, "gate")
    product = product_with_gradient(model)
    passes = Passes(total=config.batches, progress=progress)
    scores: dict[str, Tensor] = {}
    with untouched(model, seed=seed):
        for batch in scoring_batches(task, seed, config.batches):
            with alone():  # what is averaged over all batches is the square
                mean_gradients(model, task, [batch], passes, "taylor")
            with torch.no_grad():
                for group in graph.groups:
                    square = scorer.signed(product, group.id).square_()
                    scores[group.id] = scores[group.id].add_(square) if group.id in scores else square
        model.zero_grad(set_to_none=True)
        add_over_ranks(scores, lambda key: scorer.signed(product, key), [group.id for group in graph.groups])
    scores = {key: value / config.batches for key, value in scores.items()}
    return channel_result(scores, graph.groups, {"method": "taylor", "passes": config.batches, "seed": seed})


def taylor_weights(
    model: nn.Module, task: LoadedTask, config: ScoreConfig, *, seed: int, progress: Progress = silent
) -> WeightResult:
    """First-order Taylor of every single weight: the mean of (theta * g)^2 over mini-batches; three copies of them."""
    names = weight_branches(model, task)
    product = product_with_gradient(model)
    passes = Passes(total=config.batches, progress=progress)
    scores: dict[str, Tensor] = {}
    with untouched(model, seed=seed):
        for batch in scoring_batches(task, seed, config.batches):
            with alone():
                mean_gradients(model, task, [batch], passes, "taylor")
            with torch.no_grad():
                for name in names:
                    square = product(name).square_().div_(config.batches)
                    scores[name] = scores[name].add_(square) if name in scores else square
        model.zero_grad(set_to_none=True)
        add_over_ranks(scores, product, list(names))
    return weight_result(model, task, scores, {"method": "taylor", "passes": config.batches, "seed": seed})
