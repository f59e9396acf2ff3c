"""What one batch costs: the task's losses and those of distillation, at times with one modality dead."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fusepress.pipeline.corrupt import blank
from fusepress.pipeline.errors import TaskError, TrainingError
from fusepress.pipeline.recipe import FinetuneConfig
from fusepress.pipeline.recovery.batchnorm import tracking_norms
from fusepress.pipeline.recovery.distill import Distiller
from fusepress.pipeline.recovery.precision import Amp
from fusepress.pipeline.task import Batch, LoadedTask

_MODALITY_STREAM = 0x6D64  # keeps the draws of modality dropout apart from other uses of (seed, step)


class Objective:
    """The losses of a student on a batch."""

    def __init__(
        self,
        student: nn.Module,
        distiller: Distiller | None,
        task: LoadedTask,
        config: FinetuneConfig,
        seed: int,
        amp: Amp,
    ) -> None:
        self.student, self.distiller, self.task, self.config = student, distiller, task, config
        self.seed, self.amp = seed, amp

    def losses(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """The task's losses and, weighted, those of distillation.

        Args:
            batch: on the student's device.
            step: number of the batch in the run; it draws which modality is dead.
        """
        batch, dead = self._drop_modality(batch, step)
        with contextlib.ExitStack() as stack:
            if dead is not None:
                stack.enter_context(_norms_in_eval(self.student))
            for model in (self.student, self.distiller.teacher if self.distiller else None):
                if model is not None and dead:
                    stack.enter_context(_zeroed(model, dead))
            with self.amp.autocast():
                outputs = self.task.as_dict(self.student(**batch.inputs))
                wanted = self.distiller.outputs(batch.inputs) if self.distiller else {}
        outputs = {name: value.float() if value.is_floating_point() else value for name, value in outputs.items()}
        losses = dict(self.task.losses(outputs, batch))
        if self.distiller is not None:
            for name, loss in self.distiller.losses(outputs, wanted).items():
                losses[name] = self.config.distill_weight * loss
        return losses

    def _drop_modality(self, batch: Batch, step: int) -> tuple[Batch, list[str] | None]:
        """At times a batch with one modality dead.

        Returns:
            The batch; and None where nothing is dead, else the module paths whose outputs are to be zeroed (none
            where the inputs are blank already).
        """
        draw = np.random.default_rng([self.seed, step, _MODALITY_STREAM])
        if len(self.task.branches) < 2 or draw.random() >= self.config.modality_dropout:
            return batch, None
        modality = list(self.task.branches)[int(draw.integers(len(self.task.branches)))]
        blanked = blank(self.task, batch, modality)
        return (batch, self.task.branches[modality]) if blanked is None else (blanked, [])

    def total(self, losses: Mapping[str, Tensor], where: str) -> Tensor:
        """What is minimised: the sum of the losses.

        Args:
            losses: named scalars.
            where: the step, for the messages.

        Raises:
            TaskError: a loss is no scalar, or none depends on a parameter that is trained.
            TrainingError: a loss is not finite.
        """
        for name, loss in losses.items():
            if loss.numel() != 1:
                raise TaskError(
                    f"expected scalar losses; got {name!r} of shape {tuple(loss.shape)} at {self.task.name}.losses; "
                    "average it"
                )
            if not math.isfinite(float(loss.detach())):
                raise TrainingError(
                    f"expected finite losses; got {name} = {float(loss.detach())} at {where}; lower finetune.lr, or "
                    "check these samples' inputs and labels"
                )
        total = torch.stack([loss.float().reshape(()) for loss in losses.values()]).sum()
        if not total.requires_grad:
            raise TaskError(
                f"expected losses that depend on trainable parameters; got none at {self.task.name}.losses; compute "
                "them from the outputs without detach(), and leave some parameters trainable"
            )
        return total


@contextlib.contextmanager
def _norms_in_eval(model: nn.Module) -> Iterator[None]:
    """Batch norms use and keep their running statistics, as they will when the sensor really is dead."""
    norms = [norm for norm in tracking_norms(model) if norm.training]
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()


@contextlib.contextmanager
def _zeroed(model: nn.Module, paths: list[str]) -> Iterator[None]:
    """Modules whose outputs are zero: a dead branch, where the task does not say which inputs are its."""
    modules = dict(model.named_modules())
    hooks = [modules[path].register_forward_hook(lambda _m, _i, out: _zeros(out)) for path in paths]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _zeros(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.zeros_like(value)
    if isinstance(value, dict):
        return {key: _zeros(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_zeros(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
