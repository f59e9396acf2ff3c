"""The task's own trainer, under our masks and with our teacher."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusepress.pipeline.errors import FusepressError, TrainingError
from fusepress.pipeline.recipe import FinetuneConfig
from fusepress.pipeline.recovery.contract import HISTORY_POINTS, FinetuneResult, Masks, TrainProgress
from fusepress.pipeline.recovery.distill import Distiller
from fusepress.pipeline.task import Batch, LoadedTask

OF_OUR_LOOP = ("precision", "compile", "accumulate", "freeze_batchnorm", "early_stop", "loss_weights", "shard")
logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class FitHooks:
    """What the task's own `fit(model, steps, hooks)` is given.

    Attributes:
        student: the model that is trained.
        lr: the recipe's peak learning rate.
        seed: the recipe's seed.
        workdir: a folder for its own checkpoints; it survives a killed process.
        steps: optimiser steps asked for.
        history: what `progress` was told, thinned.
    """

    student: nn.Module
    lr: float
    seed: int
    workdir: Path
    steps: int
    history: list[dict[str, Any]] = field(default_factory=list)
    _steps_done: int = 0
    _distiller: Distiller | None = None
    _masks: Masks | None = None
    _listener: Callable[[TrainProgress], None] | None = None
    _began: float = field(default_factory=time.monotonic)

    def after_step(self) -> None:
        """To be called after every optimiser step: zeroes the masked weights again."""
        self._steps_done += 1
        if self._masks is not None:
            self._masks.apply(self.student)

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """The distillation loss (weighted), to be added to the task's own; a zero where nothing is distilled.

        Args:
            outputs: of the student, as it returned them.
            batch: that it was given, on the device of the student.
        """
        device = next(iter(self.student.parameters())).device
        if self._distiller is None:
            return torch.zeros((), device=device)
        wanted = self._distiller.outputs({name: value.to(device) for name, value in batch.inputs.items()})
        student = self._distiller.task.as_dict(outputs)
        losses = self._distiller.weighted(student, wanted, batch, done=self._steps_done / self.steps)
        return torch.stack(list(losses.values())).sum()

    def progress(self, step: int, losses: Mapping[str, float], lr: float | None = None) -> None:
        """To be called now and then with the number of steps done and the named losses.

        Raises:
            TrainingError: a loss is not finite.
        """
        numbers = {str(name): float(loss) for name, loss in losses.items()}
        for name, loss in numbers.items():
            if not math.isfinite(loss):
                raise TrainingError(
                    f"expected finite losses; got {name} = {loss} at step {step} of {self.steps} of the task's own "
                    "fit; lower its learning rate, or check the inputs and labels"
                )
        rate = self.lr if lr is None else float(lr)
        done = self.history[-1]["step"] if self.history else 0
        if step - done >= max(1, self.steps // HISTORY_POINTS) or step >= self.steps:
            self.history.append({"step": step, "lr": rate, "losses": numbers})
        if self._listener is not None:
            eta = (time.monotonic() - self._began) / max(1, step) * max(0, self.steps - step)
            self._listener(TrainProgress(step=step, steps=self.steps, losses=numbers, lr=rate, eta_s=eta))


def _not_followed(config: FinetuneConfig) -> list[str]:
    """The recipe's keys that ask something of the loop, which here is the task's."""
    plain = FinetuneConfig()
    return [name for name in OF_OUR_LOOP if getattr(config, name) != getattr(plain, name)]


def fit_by_user(
    student: nn.Module,
    distiller: Distiller | None,
    task: LoadedTask,
    config: FinetuneConfig,
    seed: int,
    workdir: Path,
    masks: Masks | None,
    progress: Callable[[TrainProgress], None] | None,
) -> FinetuneResult:
    """The task's own trainer, under our masks and with our teacher; it resumes by itself, if it can."""
    workdir.mkdir(parents=True, exist_ok=True)
    ignored = _not_followed(config)
    if ignored:
        logger.warning("the task's own fit trains: it is not told of finetune.%s", ", finetune.".join(ignored))
    hooks = FitHooks(
        student=student,
        lr=config.lr,
        seed=seed,
        workdir=workdir,
        steps=config.steps,
        _distiller=distiller,
        _masks=masks,
        _listener=progress,
    )
    student.train()
    try:
        task.user.fit(student, config.steps, hooks)
    except FusepressError:
        raise
    except Exception as error:
        raise TrainingError(
            f"expected {task.name}.fit(model, steps, hooks) to train; got {type(error).__name__}: {error}; mend the "
            "task's own trainer, or remove `fit` to use the built-in one"
        ) from error
    if masks is not None:
        masks.apply(student)
    last = hooks.history[-1]["losses"] if hooks.history else {}
    return FinetuneResult(final_losses=dict(last), history=hooks.history, steps=config.steps, resumed_from=None)
