"""Every scoring method behind one signature: AlterMOMA and its controls."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fusepress.pipeline.errors import RecipeError, StageError
from fusepress.pipeline.graph.plan import Group
from fusepress.pipeline.recipe import ScoreConfig
from fusepress.pipeline.scoring.altermoma import Grouped, branch_statistics, score_altermoma
from fusepress.pipeline.scoring.channels import ChannelScorer, channel_rows
from fusepress.pipeline.scoring.gradients import Passes, Progress, mean_gradients, scoring_batches, silent
from fusepress.pipeline.scoring.masking import untouched
from fusepress.pipeline.scoring.result import ScoreResult
from fusepress.pipeline.task import LoadedTask

Method = Callable[..., ScoreResult]


def score_channels(
    model: nn.Module,
    task: LoadedTask,
    graph: Grouped,
    config: ScoreConfig,
    *,
    seed: int,
    progress: Progress = silent,
) -> ScoreResult:
    """Score the channels of every coupled group with the method that the recipe names.

    Args:
        model: the trained dense network; comes back bit-identical, even when an error is raised.
        task: its data, losses and branches.
        graph: its coupled groups.
        config: the recipe's score section.
        seed: of the training batches, and of the random method.
        progress: called with the fraction done and a text.

    Returns:
        One float32 vector a group (higher = keep) and a log.

    Raises:
        RecipeError: an unknown method.
        StageError: the groups do not fit the model, or a score is not finite.
        TrainingError: a loss or gradient is NaN or infinite.
    """
    method = METHODS.get(config.method)
    if method is None:
        raise RecipeError(f"expected score.method to be one of {sorted(METHODS)}; got {config.method!r}; correct it")
    result = method(model, task, graph, config, seed=seed, progress=progress)
    for group in graph.groups:
        vector = result.channel[group.id]
        if vector.shape != (group.width,) or not np.isfinite(vector).all():
            raise StageError(
                f"expected {group.width} finite scores; got shape {vector.shape} with "
                f"{int((~np.isfinite(vector)).sum())} NaN or infinite at group {group.id}; check the checkpoint for "
                "NaN weights"
            )
    return result


def score_magnitude(
    model: nn.Module,
    task: LoadedTask,
    graph: Grouped,
    config: ScoreConfig,
    *,
    seed: int,
    progress: Progress = silent,
) -> ScoreResult:
    """L2 norm of the weights that make a channel, divided by the layer's mean; the mean over a group's producers.

    Norm scales make raw filter norms incomparable across layers, hence the division. Needs no data.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    scores: dict[str, Tensor] = {}
    with torch.no_grad():
        for group in graph.groups:
            layers = _producer_norms(group, parameters)
            scores[group.id] = torch.stack(layers).mean(dim=0)
    progress(1.0, "magnitude")
    return _result(scores, graph.groups, {"method": "magnitude", "passes": 0, "seed": seed})


def _producer_norms(group: Group, parameters: dict[str, nn.Parameter]) -> list[Tensor]:
    members = [m for m in group.by_role("producer") if m.param in group.producers and m.param in parameters]
    if not members:
        raise StageError(
            f"expected producer weights to score; got none of {list(group.producers)} in the model at group "
            f"{group.id}; find the groups of this very model"
        )
    norms = [channel_rows(parameters[m.param], m, group.width).double().norm(dim=1) for m in members]
    return [norm / (norm.mean() if bool(norm.any()) else 1.0) for norm in norms]


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
    parameters = dict(model.named_parameters(remove_duplicate=False))
    passes = Passes(total=config.batches, progress=progress)
    scores: dict[str, Tensor] = {}
    with untouched(model, seed=seed):
        for batch in scoring_batches(task, seed, config.batches):
            mean_gradients(model, task, [batch], passes, "taylor")
            with torch.no_grad():
                for group in graph.groups:
                    square = scorer.signed(lambda name: _product(parameters[name]), group.id).square_()
                    scores[group.id] = scores[group.id].add_(square) if group.id in scores else square
    scores = {key: value / config.batches for key, value in scores.items()}
    return _result(scores, graph.groups, {"method": "taylor", "passes": passes.done, "seed": seed})


def _product(parameter: nn.Parameter) -> Tensor:
    theta = parameter.detach()
    return torch.zeros_like(theta) if parameter.grad is None else theta * parameter.grad


def score_random(
    model: nn.Module,
    task: LoadedTask,
    graph: Grouped,
    config: ScoreConfig,
    *,
    seed: int,
    progress: Progress = silent,
) -> ScoreResult:
    """Uniform noise: the floor that every method must beat. A group's numbers depend on the seed and its id only."""
    scores = {}
    for group in graph.groups:
        words = np.frombuffer(hashlib.sha256(group.id.encode()).digest(), dtype="<u4")
        generator = np.random.default_rng([seed, *(int(word) for word in words)])
        scores[group.id] = torch.from_numpy(generator.random(group.width))
    progress(1.0, "random")
    return _result(scores, graph.groups, {"method": "random", "passes": 0, "seed": seed})


def _result(scores: dict[str, Tensor], groups: Sequence[Group], log: dict[str, Any]) -> ScoreResult:
    log["branches"] = branch_statistics(scores, {group.id: group.branch for group in groups})
    channel = {key: value.cpu().numpy().astype(np.float32) for key, value in scores.items()}
    return ScoreResult(channel=channel, log=log)


METHODS: dict[str, Method] = {
    "altermoma": score_altermoma,
    "taylor": score_taylor,
    "magnitude": score_magnitude,
    "random": score_random,
}
