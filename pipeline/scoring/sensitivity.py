"""First-order criteria: SNIP and Taylor, for channels (a gate after the norm) and for single weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fusepress.pipeline.distributed import alone, in_turn
from fusepress.pipeline.recipe import ScoreConfig
from fusepress.pipeline.scoring.altermoma import Grouped
from fusepress.pipeline.scoring.channels import ChannelScorer, WeightScorer
from fusepress.pipeline.scoring.common import (
    WeightResult,
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

    With one group this is AlterMOMA's DeCI; otherwise only the normalisation differs. Evaluation mode, n passes, one
    copy of the parameters (the gradient).
    """
    scorer = ChannelScorer(model, graph.groups, "gate")
    passes = Passes(total=config.batches, progress=progress)
    with untouched(model, seed=seed, keep_values=False):
        loss = mean_gradients(model, task, scoring_batches(task, seed, config.batches), passes, "snip")
        with torch.no_grad():
            scores = shares(scorer.scores(product_with_gradient(model), scorer.branch_of))
    log = {"method": "snip", "passes": passes.done, "seed": seed, "loss": loss}
    return channel_result(scores, graph.groups, log)


def snip_weights(
    model: nn.Module, task: LoadedTask, config: ScoreConfig, *, seed: int, progress: Progress = silent
) -> WeightResult:
    """SNIP: |theta * g| with g the mean gradient, as a share of the model's sum.

    Two copies of the parameters: gradients, which scores replace one by one, then scores and a sorted copy for the log.
    """
    scorer = WeightScorer(weight_branches(model, task))
    passes = Passes(total=config.batches, progress=progress)
    with untouched(model, seed=seed, keep_values=False):
        loss = mean_gradients(model, task, scoring_batches(task, seed, config.batches), passes, "snip")
        with torch.no_grad():
            scores = shares(scorer.scores(product_with_gradient(model, once=True), scorer.branch_of))
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

    A gate that is shared (residual streams) accumulates before it is squared. Evaluation mode, n passes, one copy
    of the parameters.
    """
    scorer = ChannelScorer(model, graph.groups, "gate")
    product = product_with_gradient(model)
    passes = Passes(total=config.batches, progress=progress)
    keys = [group.id for group in graph.groups]
    with untouched(model, seed=seed, keep_values=False):
        squares = _summed(model, task, config, seed, passes, keys, lambda key: scorer.signed(product, key).square_())
    scores = {key: value / config.batches for key, value in squares.items()}
    return channel_result(scores, graph.groups, {"method": "taylor", "passes": config.batches, "seed": seed})


def taylor_weights(
    model: nn.Module, task: LoadedTask, config: ScoreConfig, *, seed: int, progress: Progress = silent
) -> WeightResult:
    """First-order Taylor of every single weight: the mean of (theta * g)^2 over mini-batches.

    Two copies of the parameters: the sum, and gradients, which a batch's squares replace one by one.
    """
    names = weight_branches(model, task)
    product = product_with_gradient(model, once=True)
    passes = Passes(total=config.batches, progress=progress)
    with untouched(model, seed=seed, keep_values=False):
        scores = _summed(
            model, task, config, seed, passes, list(names), lambda name: product(name).square_().div_(config.batches)
        )
    return weight_result(model, task, scores, {"method": "taylor", "passes": config.batches, "seed": seed})


@torch.no_grad()
def _summed(
    model: nn.Module,
    task: LoadedTask,
    config: ScoreConfig,
    seed: int,
    passes: Passes,
    keys: Sequence[str],
    squared: Callable[[str], Tensor],
) -> dict[str, Tensor]:
    """What `squared` makes of the gradients of each batch, added up over the batches (of all processes), key by key."""
    batches = scoring_batches(task, seed, config.batches)

    def squares(index: int) -> list[Tensor]:
        with alone(), torch.enable_grad():  # what is averaged over all batches is the square
            mean_gradients(model, task, [batches[index]], passes, "taylor")
        return [squared(key) for key in keys]

    model.zero_grad(set_to_none=True)
    like = [squared(key) for key in keys]  # zeros
    for found in in_turn(squares, like, len(batches), config.batches):
        for total, square in zip(like, found, strict=True):
            assert square is not None
            total.add_(square)
        assert isinstance(found, list)
        found.clear()  # or they live through the next batch
    return dict(zip(keys, like, strict=True))
