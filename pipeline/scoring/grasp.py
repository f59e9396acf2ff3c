"""GraSP (Wang et al., ICLR 2020): what removing a weight does to the gradient's norm.

The paper's score is s = -theta * (H g), and the highest s are removed: zeroing such a weight raises |g|^2 (by 2s to
first order), that is, the network learns faster without it. Here high means keep, so the score is +theta * (H g), its
sign kept. No temperature: the paper divides the logits of an untrained network by 200, a task's losses have no such
place in general. A channel's score is the sum over the weights of its gate, sign kept: what gating it does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fusepress.pipeline.distributed import gather_objects
from fusepress.pipeline.recipe import ScoreConfig
from fusepress.pipeline.scoring.altermoma import Grouped
from fusepress.pipeline.scoring.channels import ChannelScorer
from fusepress.pipeline.scoring.common import (
    WeightResult,
    channel_result,
    product_with_gradient,
    shares,
    weight_branches,
    weight_result,
)
from fusepress.pipeline.scoring.curvature import PRODUCT_PASSES, Curvature, hessian_product
from fusepress.pipeline.scoring.gradients import Passes, Progress, mean_gradients, scoring_batches, silent
from fusepress.pipeline.scoring.masking import untouched
from fusepress.pipeline.scoring.result import ScoreResult
from fusepress.pipeline.task import LoadedTask


def score_grasp(
    model: nn.Module,
    task: LoadedTask,
    graph: Grouped,
    config: ScoreConfig,
    *,
    seed: int,
    progress: Progress = silent,
    curvature: Curvature = "exact",
) -> ScoreResult:
    """GraSP with a gate for a channel; scores may be negative and are divided by the sum of their sizes.

    Counts 4n passes for n scoring batches: g, and H g at three a batch (two with curvature difference; why, says
    `curvature`). Holds two copies of the parameters: g, and a batch's part of H g, of which the channels' sums are
    taken at once (three with curvature difference: theta, g, H g), and what the kernels of a layer need meanwhile.
    """
    scorer = ChannelScorer(model, graph.groups, "gate")
    product = product_with_gradient(model)
    parts: list[dict[str, Tensor]] = []  # of this process's batches, in their order

    @torch.no_grad()
    def take() -> None:
        parts.append({key: scorer.signed(product, key).cpu() for key in scorer.branch_of})

    with untouched(model, seed=seed, keep_values=False):
        log = _gradient_flow(model, task, config, seed, progress, curvature, take)
        if log["curvature"] == "difference":
            parts.clear()
            take()
            every = [parts]
        else:
            every = gather_objects(parts)
    turns = [part for turn in itertools.zip_longest(*every) for part in turn if part is not None]
    scores = shares({key: torch.stack([part[key] for part in turns]).sum(dim=0) for key in scorer.branch_of})
    return channel_result(scores, graph.groups, log)


def grasp_weights(
    model: nn.Module,
    task: LoadedTask,
    config: ScoreConfig,
    *,
    seed: int,
    progress: Progress = silent,
    curvature: Curvature = "exact",
) -> WeightResult:
    """GraSP of single weights; see `score_grasp`. Holds g and H g over all batches."""
    names = weight_branches(model, task)
    with untouched(model, seed=seed, keep_values=False):
        log = _gradient_flow(model, task, config, seed, progress, curvature, None)
        product = product_with_gradient(model, once=True)
        with torch.no_grad():
            scores = shares({name: product(name) for name in names})
    return weight_result(model, task, scores, log)


def _gradient_flow(
    model: nn.Module,
    task: LoadedTask,
    config: ScoreConfig,
    seed: int,
    progress: Progress,
    curvature: Curvature,
    take: Callable[[], None] | None,
) -> dict[str, Any]:
    """Leave H g in every parameter's `grad`, or hand it over batch by batch; g and H on the same batches."""
    batches = scoring_batches(task, seed, config.batches)
    passes = Passes(total=(1 + PRODUCT_PASSES[curvature]) * config.batches, progress=progress)
    loss = mean_gradients(model, task, batches, passes, "gradient")
    vector: dict[nn.Parameter, Tensor] = {p: p.grad for p in model.parameters() if p.grad is not None}
    used = hessian_product(model, task, batches, vector, passes, "gradient flow", curvature=curvature, take=take)
    return {"method": "grasp", "passes": passes.done, "seed": seed, "loss": loss, "curvature": used}
