"""Every scoring method behind one signature, for channels and for single weights: AlterMOMA and its peers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from fusepress.pipeline.errors import RecipeError, StageError
from fusepress.pipeline.recipe import DATA_FREE, ScoreConfig
from fusepress.pipeline.scoring.altermoma import Grouped, score_altermoma, weight_scores
from fusepress.pipeline.scoring.common import ChannelMethod, WeightMethod, WeightResult
from fusepress.pipeline.scoring.gradients import Progress, silent
from fusepress.pipeline.scoring.grasp import grasp_weights, score_grasp
from fusepress.pipeline.scoring.iterative import imp_weights, score_imp, score_in_rounds, weights_in_rounds
from fusepress.pipeline.scoring.norms import (
    group_norm_weights,
    lamp_weights,
    magnitude_weights,
    random_weights,
    score_group_norm,
    score_lamp,
    score_magnitude,
    score_random,
)
from fusepress.pipeline.scoring.prospr import prospr_weights, score_prospr
from fusepress.pipeline.scoring.result import ScoreResult
from fusepress.pipeline.scoring.robust import channels_under_failures, weights_under_failures
from fusepress.pipeline.scoring.sensitivity import score_snip, score_taylor, snip_weights, taylor_weights
from fusepress.pipeline.scoring.synflow import score_synflow, synflow_weights
from fusepress.pipeline.task import LoadedTask

METHODS: dict[str, ChannelMethod] = {
    "altermoma": score_altermoma,
    "grasp": score_grasp,
    "group_norm": score_group_norm,
    "imp": score_imp,
    "lamp": score_lamp,
    "magnitude": score_magnitude,
    "prospr": score_prospr,
    "random": score_random,
    "snip": score_snip,
    "synflow": score_synflow,
    "taylor": score_taylor,
}
WEIGHT_METHODS: dict[str, WeightMethod] = {
    "altermoma": weight_scores,
    "grasp": grasp_weights,
    "group_norm": group_norm_weights,
    "imp": imp_weights,
    "lamp": lamp_weights,
    "magnitude": magnitude_weights,
    "prospr": prospr_weights,
    "random": random_weights,
    "snip": snip_weights,
    "synflow": synflow_weights,
    "taylor": taylor_weights,
}
OWN_ROUNDS = frozenset({"imp", "synflow"})  # these are rounds by themselves


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
        RecipeError: an unknown method, or auto.
        StageError: the groups do not fit the model, or a score is not finite.
        TrainingError: a loss or gradient is NaN or infinite.
    """
    method = _chosen(METHODS, config)
    if _sees_failures(config):
        method = channels_under_failures(method)
    result: ScoreResult
    if config.rounds > 1 and config.method not in OWN_ROUNDS:
        result = score_in_rounds(method, model, task, graph, config, seed=seed, progress=progress)
    else:
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


def score_weights(
    model: nn.Module, task: LoadedTask, config: ScoreConfig, *, seed: int, progress: Progress = silent
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Score every single weight (unstructured) with the method that the recipe names.

    Args:
        model: the trained dense network; comes back bit-identical, even when an error is raised.
        task: its data, losses and branches.
        config: the recipe's score section.
        seed: of the training batches, and of the random method.
        progress: called with the fraction done and a text.

    Returns:
        Parameter name -> scores of its shape (higher = keep) for every floating-point parameter, and a log.

    Raises:
        RecipeError: an unknown method, or auto.
        StageError: a score is not finite.
        TrainingError: a loss or gradient is NaN or infinite.
    """
    method = _chosen(WEIGHT_METHODS, config)
    if _sees_failures(config):
        method = weights_under_failures(method)
    result: WeightResult
    if config.rounds > 1 and config.method not in OWN_ROUNDS:
        result = weights_in_rounds(method, model, task, config, seed=seed, progress=progress)
    else:
        result = method(model, task, config, seed=seed, progress=progress)
    for name, value in result[0].items():
        if not bool(value.isfinite().all()):
            raise StageError(
                f"expected finite scores; got {int((~value.isfinite()).sum())} NaN or infinite at {name}; check the "
                "checkpoint for NaN weights"
            )
    return result


def _sees_failures(config: ScoreConfig) -> bool:
    """Whether scores change when a sensor is dead; those of the weights alone do not (`auto` may try such a one)."""
    return config.robustness > 0 and config.method not in DATA_FREE


def _chosen(methods: Mapping[str, Callable[..., Any]], config: ScoreConfig) -> Callable[..., Any]:
    if config.method == "auto":
        raise RecipeError(
            f"expected a score.method that is resolved, one of {sorted(methods)}; got 'auto' at the scoring itself; "
            "let the score stage choose a method first, or name one"
        )
    method = methods.get(config.method)
    if method is None:
        raise RecipeError(f"expected score.method to be one of {sorted(methods)}; got {config.method!r}; correct it")
    return method
