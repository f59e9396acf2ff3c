"""ProsPr (Alizadeh et al., ICLR 2022): how the loss after N steps of training depends on a mask at their start.

theta_0 = m * theta, theta_(i+1) = theta_i - a * grad L(theta_i; D_i), score |dL(theta_N; D_N)/dm| at m = 1. `full`
follows the derivative back through all steps: l_N = grad L(theta_N), l_i = l_(i+1) - a * H_i l_(i+1), score
|theta * l_0|. `first_order` (default) leaves the Hessians out: |theta * grad L(theta_N)|, theta the values before.

Steps are plain SGD on the first N training batches, N = `config.reactivation_batches` (the paper's example has 3, with
momentum), D_N is the `config.batches` batches that follow. With N = 0 this is SNIP. The scores are shares of their sum.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fusepress.pipeline.distributed import alone
from fusepress.pipeline.recipe import ScoreConfig
from fusepress.pipeline.scoring.altermoma import Grouped
from fusepress.pipeline.scoring.channels import ChannelScorer, Scorer, WeightScorer
from fusepress.pipeline.scoring.common import (
    WeightResult,
    channel_result,
    product_with_gradient,
    shares,
    trainable_of,
    weight_branches,
    weight_result,
)
from fusepress.pipeline.scoring.curvature import PRODUCT_PASSES, hessian_product
from fusepress.pipeline.scoring.gradients import (
    Passes,
    Progress,
    mean_gradients,
    reactivate,
    scoring_batches,
    silent,
)
from fusepress.pipeline.scoring.masking import untouched
from fusepress.pipeline.scoring.result import ScoreResult
from fusepress.pipeline.task import Batch, LoadedTask

Order = Literal["first_order", "full"]


def score_prospr(
    model: nn.Module,
    task: LoadedTask,
    graph: Grouped,
    config: ScoreConfig,
    *,
    seed: int,
    progress: Progress = silent,
    order: Order = "first_order",
    lr: float | None = None,
) -> ScoreResult:
    """ProsPr with a mask a channel, placed as the gate after the norm.

    Counts N + n passes and holds two copies of the parameters (theta, the gradient); `full` counts 3N more and holds
    N + 4 copies (the way of all steps, theta, l, H l and parts of it in flight) and N batches.

    Args:
        model: the trained dense network; comes back bit-identical.
        task: its data and losses.
        graph: the coupled groups.
        config: batches (n), reactivation_batches (N), reactivation_lr.
        seed: of the training batches.
        progress: called with the fraction done and a text.
        order: whether the derivative goes back through the steps.
        lr: of the steps; default: config.reactivation_lr.

    Raises:
        TrainingError: a loss or gradient is NaN or infinite.
    """
    scorer = ChannelScorer(model, graph.groups, "gate")
    scores, log = _prospective(model, task, scorer, config, seed, progress, order, lr)
    return channel_result(scores, graph.groups, log)


def prospr_weights(
    model: nn.Module,
    task: LoadedTask,
    config: ScoreConfig,
    *,
    seed: int,
    progress: Progress = silent,
    order: Order = "first_order",
    lr: float | None = None,
) -> WeightResult:
    """ProsPr of single weights; see `score_prospr`."""
    scorer = WeightScorer(weight_branches(model, task))
    scores, log = _prospective(model, task, scorer, config, seed, progress, order, lr)
    return weight_result(model, task, scores, log)


def _prospective(
    model: nn.Module,
    task: LoadedTask,
    scorer: Scorer,
    config: ScoreConfig,
    seed: int,
    progress: Progress,
    order: Order,
    lr: float | None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    steps = config.reactivation_batches
    rate = config.reactivation_lr if lr is None else lr
    back = PRODUCT_PASSES["exact"] * steps if order == "full" else 0
    passes = Passes(total=steps + config.batches + back, progress=progress)
    with untouched(model, seed=seed) as snapshot:
        way = _train(model, task, trainable_of(snapshot), steps, rate, seed, passes, keep=order == "full")
        data = scoring_batches(task, seed, config.batches, start=steps)
        loss = mean_gradients(model, task, data, passes, "after the steps")
        if order == "full":
            with alone():  # every process has the whole way
                _go_back(model, task, way, rate, passes)
        with torch.no_grad():
            snapshot.restore_values()
            product = product_with_gradient(model, once=scorer.asks_once)
            scores = shares(scorer.scores(product, scorer.branch_of))
    log = {"method": "prospr", "passes": passes.done, "seed": seed, "loss": loss}
    return scores, log | {"steps": steps, "lr": rate, "order": order}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """One inner step: the batch, and the values of the trained parameters before it."""

    batch: Batch
    before: dict[nn.Parameter, Tensor]


def _train(
    model: nn.Module,
    task: LoadedTask,
    chosen: Sequence[nn.Parameter],
    steps: int,
    lr: float,
    seed: int,
    passes: Passes,
    *,
    keep: bool,
) -> list[_Step]:
    """The inner steps; the way they took if it is to be kept."""
    way: list[_Step] = []

    def noting() -> Iterator[Batch]:
        for batch in itertools.islice(task.train_batches(seed), steps):
            if keep:
                way.append(_Step(batch=batch, before={p: p.detach().clone() for p in chosen}))
            yield batch

    reactivate(model, task, chosen, noting(), passes, optimizer="sgd", lr=lr, where="inner step")
    return way


def _go_back(model: nn.Module, task: LoadedTask, way: Sequence[_Step], lr: float, passes: Passes) -> None:
    """From dL/dtheta_N in every `grad` to dL/dtheta_0, step by step; frozen parameters get their part too."""
    for step in reversed(way):
        later = {p: p.grad for p in model.parameters() if p.grad is not None}
        with torch.no_grad():
            for parameter, value in step.before.items():
                parameter.copy_(value)
        vector = {p: later[p] for p in step.before if p in later}
        hessian_product(model, task, [step.batch], vector, passes, "back through a step")
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(-lr)
                if parameter in later:
                    parameter.grad = (
                        later[parameter] if parameter.grad is None else parameter.grad.add_(later[parameter])
                    )
