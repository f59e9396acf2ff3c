"""A network over the eval split under failures: the statistics of every sample, one file a condition."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusepress.pipeline.gates import Stats

if TYPE_CHECKING:
    from torch import nn

    from fusepress.pipeline.evaluate import Evaluation
    from fusepress.pipeline.stages.base import Context

VERSION = 1  # raised by hand when the evaluation changes the figures of every cell
BATCH = 16  # samples
GATE_BATCHES = 16  # the whole eval split: 256 samples in 64 streets of four frames
LOOK_BATCHES = 2  # 32 samples, to look at every failure and severity
CLEAN = ("", 0)
GATED = ("camera_blank", "lidar_blank", "lidar_half")  # by the street recipe
OTHERS = (
    *("camera_dark", "camera_noise", "lidar_sparse"),  # the task's own
    *("camera_bright", "camera_narrow", "camera_rotate", "camera_shift", "camera_stale", "lidar_stale"),
)
WORST = 3
CONDITIONS = [CLEAN, *((failure, WORST) for failure in GATED)]
EVERY_CONDITION = [CLEAN, *((failure, severity) for failure in (*GATED, *OTHERS) for severity in (1, 2, 3))]

Conditions = list[tuple[str, int]]


class Samples:
    """Statistics of one network's samples, by condition.

    Args:
        folder: of the network; a file for every condition.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, conditions: Iterable[tuple[str, int]], batches: int) -> bool:
        """Whether all of them were evaluated on so many batches."""
        return all(self._file(condition, batches) is not None for condition in conditions)

    def keep(self, condition: tuple[str, int], batches: int, found: Evaluation) -> None:
        """Keep a condition's statistics, in one rename."""
        path = self._path(condition, batches)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}.part.npz")
        arrays: dict[str, Any] = {f"stats/{name}": value for name, value in found.stats.items()}
        np.savez_compressed(aside, sample_ids=np.array(found.sample_ids), groups=np.array(found.groups), **arrays)
        aside.replace(path)

    def load(self, condition: tuple[str, int], batches: int) -> tuple[Stats, list[str]]:
        """Statistics and groups of so many batches.

        Raises:
            FileNotFoundError: they were not evaluated.
        """
        file = self._file(condition, batches)
        if file is None:
            raise FileNotFoundError(self._path(condition, batches))
        rows = slice(batches * BATCH)
        with np.load(file) as archive:
            names = [name for name in archive.files if name.startswith("stats/")]
            stats = {name.removeprefix("stats/"): archive[name][rows] for name in names}
            return stats, [str(group) for group in archive["groups"][rows]]

    def _path(self, condition: tuple[str, int], batches: int) -> Path:
        failure, severity = condition
        return self.folder / f"{failure or 'clean'}.{severity}-v{VERSION}-n{batches}.npz"

    def _file(self, condition: tuple[str, int], batches: int) -> Path | None:
        """The evaluation on so many batches, or on more, which begins with the same ones."""
        paths = (
            self._path(condition, more) for more in sorted({batches, LOOK_BATCHES, GATE_BATCHES}) if more >= batches
        )
        return next((path for path in paths if path.is_file()), None)


def evaluate_under(ctx: Context, model: nn.Module, samples: Samples, conditions: Conditions, batches: int) -> None:
    """Evaluate a network under the conditions that are not there yet."""
    from fusepress.pipeline.corrupt import failing
    from fusepress.pipeline.evaluate import evaluate, torch_predict

    predict = torch_predict(ctx.task, model)
    for failure, severity in conditions:
        if samples.has([(failure, severity)], batches):
            continue
        broken = failing(ctx.task, failure, severity) if failure else None
        found = evaluate(ctx.task, predict, "eval", corrupt=broken, limit=batches)
        samples.keep((failure, severity), batches, found)
        value = found.metrics[ctx.task.primary]
        print(f"{time.strftime('%H:%M:%S')}   {failure or 'clean'}@{severity}: {value:.4f}", flush=True)
