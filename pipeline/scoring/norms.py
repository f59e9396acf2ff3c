"""Criteria that need no data: random, magnitude, LAMP and group norm, for channels and for single weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from fusepress.pipeline.errors import StageError
from fusepress.pipeline.graph.plan import Group, Member
from fusepress.pipeline.recipe import ScoreConfig
from fusepress.pipeline.scoring.altermoma import Grouped
from fusepress.pipeline.scoring.channels import channel_rows
from fusepress.pipeline.scoring.common import (
    WeightResult,
    channel_result,
    generator_of,
    is_bias,
    weight_result,
    weights_of,
)
from fusepress.pipeline.scoring.gradients import Progress, silent
from fusepress.pipeline.scoring.result import ScoreResult
from fusepress.pipeline.task import LoadedTask

Reduction = Literal["sum", "mean"]


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
    scores = {g.id: torch.from_numpy(generator_of(seed, g.id).random(g.width)) for g in graph.groups}
    progress(1.0, "random")
    return channel_result(scores, graph.groups, {"method": "random", "passes": 0, "seed": seed})


def random_weights(
    model: nn.Module, task: LoadedTask, config: ScoreConfig, *, seed: int, progress: Progress = silent
) -> WeightResult:
    """Uniform noise for every single weight; depends on the seed and the parameter's name and shape only."""
    scores = {
        name: torch.from_numpy(generator_of(seed, name).random(tuple(value.shape))).to(value)
        for name, value in weights_of(model, task).items()
    }
    progress(1.0, "random")
    return weight_result(model, task, scores, {"method": "random", "passes": 0, "seed": seed})


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

    Norm scales make raw filter norms incomparable across layers, hence the division.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        scores = {g.id: torch.stack(_producer_norms(g, parameters)).mean(dim=0) for g in graph.groups}
    progress(1.0, "magnitude")
    return channel_result(scores, graph.groups, {"method": "magnitude", "passes": 0, "seed": seed})


def _producer_norms(group: Group, parameters: Mapping[str, nn.Parameter]) -> list[Tensor]:
    members = [m for m in group.by_role("producer") if m.param in group.producers and m.param in parameters]
    _some(members, list(group.producers), group)
    norms = [channel_rows(parameters[m.param], m, group.width).double().norm(dim=1) for m in members]
    return [norm / (norm.mean() if bool(norm.any()) else 1.0) for norm in norms]


def _some(members: list[Member], wanted: list[str], group: Group) -> None:
    if not members:
        raise StageError(
            f"expected producer weights to score; got none of {wanted} in the model at group {group.id}; find the "
            "groups of this very model"
        )


def magnitude_weights(
    model: nn.Module, task: LoadedTask, config: ScoreConfig, *, seed: int, progress: Progress = silent
) -> WeightResult:
    """|theta| of every single weight, on one scale for the whole model (Han et al. 2015)."""
    scores = {name: value.abs() for name, value in weights_of(model, task).items()}
    progress(1.0, "magnitude")
    return weight_result(model, task, scores, {"method": "magnitude", "passes": 0, "seed": seed})


def score_group_norm(
    model: nn.Module,
    task: LoadedTask,
    graph: Grouped,
    config: ScoreConfig,
    *,
    seed: int,
    progress: Progress = silent,
    reduction: Reduction = "mean",
) -> ScoreResult:
    """DepGraph's group norm (Fang et al., CVPR 2023), without its sparse training.

    A channel's score is the squared L2 norm of everything of it: its rows in the producers, its scale in the norms,
    and the columns with which every consumer reads it. Where it is read several times (concatenated views), every
    reading counts. Biases do not (as in torch-pruning's default), nor do buffers. Then divided by the group's mean.

    Args:
        model: the network; not changed.
        task: not used.
        graph: the coupled groups.
        config: not used.
        seed: goes to the log.
        progress: called when done.
        reduction: sum or mean over the group's members. The division by the group's mean cancels the difference; it
            is kept to make that testable.

    Raises:
        StageError: the groups do not fit the model.
    """
    scores = {}
    for group_id, norm in group_norms(model, graph, reduction).items():
        scores[group_id] = norm / (norm.mean() if bool(norm.any()) else 1.0)
    progress(1.0, "group_norm")
    log = {"method": "group_norm", "passes": 0, "seed": seed, "reduction": reduction}
    return channel_result(scores, graph.groups, log)


@torch.no_grad()
def group_norms(model: nn.Module, graph: Grouped, reduction: Reduction = "mean") -> dict[str, Tensor]:
    """Squared L2 norms of all members' slices of every channel; group id -> float64 (width,).

    Raises:
        StageError: the groups do not fit the model.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    norms = {}
    for group in graph.groups:
        members = [m for m in group.members if m.param in parameters and not is_bias(m.param)]
        _some([m for m in members if m.role == "producer"], list(group.producers), group)
        rows = [channel_rows(parameters[m.param], m, group.width).double().square().sum(dim=1) for m in members]
        stacked = torch.stack(rows)
        norms[group.id] = stacked.sum(dim=0) if reduction == "sum" else stacked.mean(dim=0)
    return norms


def group_norm_weights(
    model: nn.Module, task: LoadedTask, config: ScoreConfig, *, seed: int, progress: Progress = silent
) -> WeightResult:
    """theta^2 over the mean of its parameter: what the group norm is when a group is a single weight of a layer."""
    scores = {}
    for name, value in weights_of(model, task).items():
        square = value.square()
        scores[name] = square.div_(square.mean()) if bool(square.any()) else square
    progress(1.0, "group_norm")
    return weight_result(model, task, scores, {"method": "group_norm", "passes": 0, "seed": seed})


def score_lamp(
    model: nn.Module,
    task: LoadedTask,
    graph: Grouped,
    config: ScoreConfig,
    *,
    seed: int,
    progress: Progress = silent,
) -> ScoreResult:
    """LAMP's cumulative rule (Lee et al., ICLR 2021) on the group norms of a group's channels.

    The strongest channel of every group has score 1, so no group can vanish under one global threshold.
    """
    scores = {key: cumulative_shares(norm) for key, norm in group_norms(model, graph).items()}
    progress(1.0, "lamp")
    return channel_result(scores, graph.groups, {"method": "lamp", "passes": 0, "seed": seed})


def lamp_weights(
    model: nn.Module, task: LoadedTask, config: ScoreConfig, *, seed: int, progress: Progress = silent
) -> WeightResult:
    """LAMP of every single weight: theta_u^2 over the sum of theta_v^2 of the weights of its layer not below it.

    A layer is a parameter here; one global threshold on the scores is the paper's layer-wise magnitude pruning.
    """
    scores = {
        name: cumulative_shares(value.flatten().double().square()).reshape(value.shape).to(value.dtype)
        for name, value in weights_of(model, task).items()
    }
    progress(1.0, "lamp")
    return weight_result(model, task, scores, {"method": "lamp", "passes": 0, "seed": seed})


def cumulative_shares(squares: Tensor) -> Tensor:
    """s(u) = x_u / sum of x_v over all v at or after u in ascending order; equal ones count in their order.

    Args:
        squares: non-negative, (n,).

    Returns:
        (n,), the largest exactly 1 (all zeros stay zeros).
    """
    ordered, order = squares.sort(stable=True)
    above = ordered.flip(0).cumsum(0).flip(0)
    shares = torch.where(above > 0, ordered / above, 0.0)
    return torch.empty_like(squares).index_copy_(0, order, shares)
