"""Scores that count what carries the model while a sensor is dead (`score.robustness`).

With S_0 a criterion's scores on the training batches, S_m the same criterion's on the same batches with modality m
blank, and rho the recipe's share:

    S = (1 - rho) N(S_0) + rho / M * sum over the M modalities of N(S_m),    N(v) = v / sum |v|

N sums over all keys (channels or weights) of the model, so that a condition with a large loss does not outvote the
others; within a condition the criterion's own balance between branches stays. With rho 0 nothing is divided: the
scores are the criterion's own. A channel that matters only when the camera is dead has no share of N(S_0) and is the
first that pruning removes; here it keeps rho / M of what it is worth then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fusepress.pipeline.corrupt import blank
from fusepress.pipeline.errors import TaskError
from fusepress.pipeline.recipe import ScoreConfig
from fusepress.pipeline.scoring.altermoma import Grouped, branch_statistics
from fusepress.pipeline.scoring.common import (
    ChannelMethod,
    WeightMethod,
    WeightResult,
    channel_result,
    shares,
    weight_branches,
)
from fusepress.pipeline.scoring.gradients import Progress, silent
from fusepress.pipeline.scoring.parking import parked
from fusepress.pipeline.scoring.result import ScoreResult
from fusepress.pipeline.task import Batch, LoadedTask, Split

Scored = tuple[Mapping[str, Tensor], dict[str, Any]]  # key -> scores, log


@dataclass(slots=True, kw_only=True)
class Blinded(LoadedTask):
    """A task whose training batches have one modality blank.

    Attributes:
        dead: the modality.
    """

    dead: str

    def batches(self, split: Split, seed: int, *, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """The task's, blanked.

        Raises:
            TaskError: the task does not say which inputs are the modality's.
        """
        for batch in LoadedTask.batches(self, split, seed, start=start, rank=rank, world=world):
            found = blank(self, batch, self.dead)
            if found is None:
                raise TaskError(
                    f"expected {self.name}.inputs_by_modality to name the inputs of {self.dead!r} for "
                    f"score.robustness; got nothing; add for example inputs_by_modality = "
                    f'{{"{self.dead}": {[next(iter(batch.inputs))]}}}'
                )
            yield found


def blinded(task: LoadedTask, modality: str) -> Blinded:
    """The task with one modality dead in all its batches."""
    return Blinded(**{field.name: getattr(task, field.name) for field in fields(LoadedTask)}, dead=modality)


def channels_under_failures(method: ChannelMethod) -> ChannelMethod:
    """A criterion of channels with the term of the module's formula; takes and gives what the criterion does."""

    def score(
        model: nn.Module,
        task: LoadedTask,
        graph: Grouped,
        config: ScoreConfig,
        *,
        seed: int,
        progress: Progress = silent,
    ) -> ScoreResult:
        def one(condition: LoadedTask, told: Progress) -> Scored:
            found = method(model, condition, graph, config, seed=seed, progress=told)
            return {key: torch.from_numpy(value) for key, value in found.channel.items()}, found.log

        scores, log = _mixed(one, task, config.robustness, progress)
        return channel_result(scores, graph.groups, log)

    return score


def weights_under_failures(method: WeightMethod) -> WeightMethod:
    """A criterion of single weights with the term of the module's formula; the sum so far lies in temporary files."""

    def score(
        model: nn.Module, task: LoadedTask, config: ScoreConfig, *, seed: int, progress: Progress = silent
    ) -> WeightResult:
        def one(condition: LoadedTask, told: Progress) -> Scored:
            return method(model, condition, config, seed=seed, progress=told)

        mixed, log = _mixed(one, task, config.robustness, progress, copy=parked)
        own = dict(model.named_parameters())
        scores = {key: torch.empty_like(value, device=own[key].device).copy_(value) for key, value in mixed.items()}
        return scores, {**log, "branches": branch_statistics(scores, weight_branches(model, task))}

    return score


def _mixed(
    one: Callable[[LoadedTask, Progress], Scored],
    task: LoadedTask,
    robustness: float,
    progress: Progress,
    *,
    copy: Callable[[Tensor], Tensor] = Tensor.clone,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The formula: the criterion as it is, then with each modality dead; the log is that of the first.

    `copy` makes the place where the scores are summed up.
    """
    modalities = sorted(task.branches)
    count = 1 + len(modalities)

    def told(number: int, fraction: float, text: str) -> None:
        progress((number + fraction) / count, text if number == 0 else f"{modalities[number - 1]} dead: {text}")

    found, log = one(task, partial(told, 0))
    scores = {key: copy(value).mul_(1.0 - robustness) for key, value in _shared(found).items()}
    del found  # or it lives through the next
    losses = {}
    for number, modality in enumerate(modalities, 1):
        found, dead_log = one(blinded(task, modality), partial(told, number))
        for key, value in _shared(found).items():
            scores[key].add_(value.to(scores[key].device), alpha=robustness / len(modalities))
        del found
        losses[modality] = dead_log.get("loss")
        log["passes"] = log.get("passes", 0) + dead_log.get("passes", 0)
    return scores, {**log, "robustness": {"share": robustness, "loss_with_dead": losses}}


def _shared(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Shares of copies, for a criterion may hand out views of the parameters."""
    return shares({key: value.clone() for key, value in scores.items()})
