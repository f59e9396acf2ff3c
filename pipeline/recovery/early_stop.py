"""Stop training once the accuracy gate is safely met.

The gate itself is judged on the eval split, which training must not see, so the calib split stands in: the paired drop
of the metric against the dense model, with the bootstrap interval that the gate uses. Training stops at the first look
whose upper bound is within the gate's limit. A bound that is looked at often is met by luck more often than 5 % of the
time, and later stages lose accuracy of their own; the gate has the last word.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from fusepress.pipeline.errors import RecipeError
from fusepress.pipeline.evaluate import Evaluation, evaluate, torch_predict
from fusepress.pipeline.gates import Replicates, compare, drop_interval
from fusepress.pipeline.recovery.contract import Look
from fusepress.pipeline.task import LoadedTask

REPLICATES = 400


class EarlyStop:
    """When a model in training is good enough."""

    def __init__(
        self, task: LoadedTask, dense: Evaluation, *, max_drop: float, metric: str | None = None, seed: int = 0
    ) -> None:
        """Take the dense model as the standard.

        Args:
            task: whose calib split and metrics count.
            dense: the dense model on the calib split.
            max_drop: the gate's limit.
            metric: the gate's metric; default: the primary one.
            seed: of the bootstrap draws.

        Raises:
            RecipeError: the task has no such metric.
        """
        self.task, self.dense, self.max_drop, self.seed = task, dense, max_drop, seed
        self.metric = metric or task.primary
        if self.metric not in task.metrics:
            raise RecipeError(
                f"expected gates.accuracy.metric to be one of {list(task.metrics)}; got {self.metric!r}; correct it"
            )

    @property
    def identity(self) -> dict[str, Any]:
        """What a run that may stop early depends on, beside the data and the dense model."""
        return {"metric": self.metric, "max_drop": self.max_drop, "seed": self.seed, "dense": self.dense.metrics}

    def look(self, model: nn.Module, step: int) -> Look:
        """Judge a model as it is now; it is left in evaluation mode."""
        now = evaluate(self.task, torch_predict(self.task, model), "calib")
        condition = compare(
            self.dense.stats, now.stats, self.task.score, now.groups, replicates=REPLICATES, seed=self.seed
        )
        replicates = Replicates(clean=condition, samples=now.n, clusters=len(set(now.groups)))
        drop, found = drop_interval(replicates, self.metric, self.task.metrics[self.metric])
        high = None if found is None else found.high
        met = high is not None and high <= self.max_drop
        return Look(step=step, value=_defined(now.metrics[self.metric]), drop=_defined(drop), high=high, met=met)


def _defined(value: float) -> float | None:
    """None for what is not finite, for looks are kept as JSON."""
    return value if math.isfinite(value) else None
