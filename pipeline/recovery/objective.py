"""What one batch costs: the task's losses and those of distillation, at times with one modality dead."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fusepress.pipeline.corrupt import blank
from fusepress.pipeline.distributed import world
from fusepress.pipeline.errors import TaskError, TrainingError
from fusepress.pipeline.recipe import FinetuneConfig
from fusepress.pipeline.recovery.batchnorm import tracking_norms
from fusepress.pipeline.recovery.distill import Distiller
from fusepress.pipeline.recovery.precision import Amp
from fusepress.pipeline.recovery.weighting import make_weighting
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
        self.compiled: Callable[..., Any] | None = None  # of the student
        self.weighting = make_weighting(student, task, config, seed)

    def losses(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """The task's losses and, weighted, those of distillation.

        Args:
            batch: on the student's device.
            step: number of the batch in the run (not of the optimiser's step); it draws which modality is dead.
        """
        batch, dead = self._drop_modality(batch, step)
        with contextlib.ExitStack() as stack:
            if dead is not None:
                stack.enter_context(_norms_in_eval(self.student))
            for model in (self.student, *(self.distiller.models if self.distiller else [])):
                if dead:
                    stack.enter_context(_zeroed(model, dead))
            with self.amp.autocast():
                outputs = self.task.as_dict(self._forward(dead)(**batch.inputs))
                wanted = self.distiller.outputs(batch.inputs) if self.distiller else {}
        outputs = {name: value.float() if value.is_floating_point() else value for name, value in outputs.items()}
        losses = dict(self.task.losses(outputs, batch))
        if self.distiller is not None:
            done = step / (self.config.steps * self.config.accumulate * world())
            losses |= self.distiller.weighted(outputs, wanted, batch, done=done)
        return losses

    def _forward(self, dead: list[str] | None) -> Callable[..., Any]:
        """The compiled student where there is one; a compiled graph does not see the hooks that zero a branch."""
        return self.student if self.compiled is None or dead else self.compiled

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

    def total(self, losses: Mapping[str, Tensor], where: str, share: float = 1.0) -> Tensor:
        """What is minimised: the sum of the losses, with the weights of the recipe or those learned so far.

        Args:
            losses: named scalars.
            where: the step, for the messages.
            share: of the batch in the step.

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
        total = self.weighting.total(losses, share, self.amp.scale)
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
    there = [modules[path] for path in paths if path in modules]  # an expert may lack a branch
    hooks = [module.register_forward_hook(lambda _m, _i, out: _zeros(out)) for module in there]
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
