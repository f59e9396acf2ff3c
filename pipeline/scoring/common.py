"""What every scoring method needs beside AlterMOMA: the weights that are scored, products, shares, results."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fusepress.pipeline.graph.plan import Group
from fusepress.pipeline.scoring.altermoma import branch_statistics
from fusepress.pipeline.scoring.channels import Product
from fusepress.pipeline.scoring.masking import Snapshot, branch_of_parameters
from fusepress.pipeline.scoring.result import ScoreResult
from fusepress.pipeline.task import LoadedTask

WeightResult = tuple[dict[str, Tensor], dict[str, Any]]
ChannelMethod = Callable[..., ScoreResult]  # (model, task, graph, config, *, seed, progress)
WeightMethod = Callable[..., WeightResult]  # (model, task, config, *, seed, progress)


def weight_branches(model: nn.Module, task: LoadedTask) -> dict[str, str]:
    """The parameters that weight scores cover: every floating-point one, tied ones once; name -> branch.

    Raises:
        TaskError: the task's branches do not fit the model.
    """
    floating = {name for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    return {name: branch for name, branch in branch_of_parameters(model, task.branches).items() if name in floating}


def weights_of(model: nn.Module, task: LoadedTask) -> dict[str, Tensor]:
    """The values of those parameters, detached; name -> tensor (no copies)."""
    parameters = dict(model.named_parameters())
    return {name: parameters[name].detach() for name in weight_branches(model, task)}


def weight_result(
    model: nn.Module, task: LoadedTask, scores: Mapping[str, Tensor], log: Mapping[str, Any]
) -> WeightResult:
    """Weight scores with the statistics of every branch in the log."""
    kept = dict(scores)
    return kept, {**log, "branches": branch_statistics(kept, weight_branches(model, task))}


def channel_result(scores: Mapping[str, Tensor], groups: Sequence[Group], log: Mapping[str, Any]) -> ScoreResult:
    """Channel scores as they are kept, with the statistics of every branch in the log."""
    full = {**log, "branches": branch_statistics(scores, {group.id: group.branch for group in groups})}
    channel = {key: value.detach().cpu().numpy().astype(np.float32) for key, value in scores.items()}
    return ScoreResult(channel=channel, log=full)


def product_with_gradient(model: nn.Module, *, once: bool = False) -> Product:
    """Theta * g with the gradients that the parameters hold when it is asked for; zeros where there is none.

    Args:
        model: whose.
        once: drop every gradient with its product, where nobody asks twice: products then take the gradients' place
            instead of making one more copy of the parameters.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))

    def product(name: str) -> Tensor:
        theta, gradient = parameters[name].detach(), parameters[name].grad
        if once:
            parameters[name].grad = None
        return torch.zeros_like(theta) if gradient is None else theta * gradient

    return product


def shares(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Divide scores by the sum of their absolute values over the whole model, in place; all zero stays zero.

    The sum takes the scale of the loss out: a loss that is multiplied by a constant gives the same shares.
    """
    total = math.fsum(float(value.abs().sum(dtype=torch.float64)) for value in scores.values())
    return {key: value.div_(total or 1.0) for key, value in scores.items()}


def first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter -> its first name, which differ where parameters are tied."""
    first = {parameter: name for name, parameter in model.named_parameters()}
    return {name: first[parameter] for name, parameter in model.named_parameters(remove_duplicate=False)}


def is_bias(name: str) -> bool:
    """Whether a parameter is added rather than multiplied, by the name that torch's own modules give (`...bias`)."""
    return name.rpartition(".")[2].endswith("bias")


def trainable_of(snapshot: Snapshot) -> list[nn.Parameter]:
    """What inner training may change: what the user froze stays frozen, unless everything is."""
    chosen = snapshot.trainable or set(snapshot.initial)
    return [p for p in snapshot.initial if p in chosen and p.is_floating_point()]


def generator_of(seed: int, name: str) -> np.random.Generator:
    """Random numbers that depend on a seed and a name only."""
    words = np.frombuffer(hashlib.sha256(name.encode()).digest(), dtype="<u4")
    return np.random.default_rng([seed, *(int(word) for word in words)])
