"""Fine-tuning that can be killed at any moment and ends with the same weights.

A step is a function of the saved state, the seed and its number: batches come from `task.train_batches(seed,
start=step)`, the learning rate from the step, random draws from saved generators. On a CPU the kernels are
deterministic too, so a run that was killed and started again ends bit-identical to one that was not (same thread
count). An accelerator's kernels may sum in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from fusepress.pipeline.errors import TrainingError
from fusepress.pipeline.recipe import FinetuneConfig
from fusepress.pipeline.recovery import rng
from fusepress.pipeline.recovery.batchnorm import reestimate_batchnorm
from fusepress.pipeline.recovery.checkpoint import clear_checkpoints
from fusepress.pipeline.recovery.contract import FinetuneResult, Masks, TrainProgress
from fusepress.pipeline.recovery.distill import Distiller
from fusepress.pipeline.recovery.optim import learning_rate
from fusepress.pipeline.recovery.placement import all_tensors, lent, placed
from fusepress.pipeline.recovery.precision import Amp, Format
from fusepress.pipeline.recovery.trainer import Trainer
from fusepress.pipeline.recovery.userfit import FitHooks, fit_by_user
from fusepress.pipeline.task import LoadedTask

__all__ = [
    "FinetuneResult",
    "FitHooks",
    "TrainProgress",
    "clear_checkpoints",
    "finetune",
    "learning_rate",
    "reestimate_batchnorm",
]


def finetune(
    student: nn.Module,
    teacher: nn.Module | None,
    task: LoadedTask,
    config: FinetuneConfig,
    *,
    seed: int,
    workdir: Path,
    masks: Masks | None = None,
    progress: Callable[[TrainProgress], None] | None = None,
    device: torch.device | None = None,
    precision: Format = "auto",
) -> FinetuneResult:
    """Train a model in place, with the dense model as teacher, by our loop or by the task's own `fit`.

    AdamW (no decay on norms and biases), linear warm-up and cosine to zero, gradient clipping, and an exponential
    average of the weights that becomes the result (buffers, such as batch norm statistics, are the last ones).

    Args:
        student: trained in place; on return in evaluation mode and on the device it was on.
        teacher: the dense model, or None; used where `config.distill` is set. It is not changed.
        task: its `train` split and its losses.
        config: the recipe's section.
        seed: of batches, dropout and modality dropout.
        workdir: for checkpoints; a checkpoint there of this very run (same start weights, teacher, masks, section,
            seed, thread count) is resumed from. The caller's key answers for the data and the task's source.
        masks: sparsity that holds through training.
        progress: called after every step.
        device: where to train; default: the accelerator if there is one.
        precision: default: autocast to bf16 (else fp16) on an accelerator, fp32 on a CPU.

    Raises:
        TrainingError: a loss, a gradient or a weight became NaN or infinite; or the task's `fit` failed.
        TaskError: the task's losses or outputs cannot be trained on.
        StoreError: a checkpoint cannot be written.
    """
    if masks is not None:
        masks.apply(student)
    if config.steps == 0:
        student.eval()
        return FinetuneResult(final_losses={}, history=[], steps=0, resumed_from=None)
    home = next(iter(student.parameters())).device
    device = device or torch.device("cuda" if torch.cuda.is_available() else home)
    with placed(student, device, home), lent(teacher if config.distill else None, device) as guide:
        with rng.scope(seed, device):
            distiller = _distiller(guide, task, config, seed, device)
            if task.offers("fit"):
                result = fit_by_user(student, distiller, task, config, seed, workdir, masks, progress)
            else:
                amp = Amp(precision, device)
                trainer = Trainer(student, distiller, task, config, seed, device, amp, masks)
                result = trainer.run(workdir, progress)
        if masks is not None:
            masks.check(student)
        _check_weights(student)
        student.eval()
    return result


def _distiller(
    teacher: nn.Module | None, task: LoadedTask, config: FinetuneConfig, seed: int, device: torch.device
) -> Distiller | None:
    if teacher is None or config.distill_weight == 0:
        return None
    distiller = Distiller(teacher=teacher, task=task, temperature=config.temperature)
    distiller.measure_scales(seed, device)
    return distiller


def _check_weights(model: nn.Module) -> None:
    for name, value in all_tensors(model).items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise TrainingError(
                f"expected finite weights after training; got NaN or infinity in {name}; lower finetune.lr"
            )
