"""Fine-tuning that can be killed at any moment and ends with the same weights.

A step is a function of the saved state, the seed and its number: batches come from `task.train_batches(seed,
start=step)`, the learning rate from the step, random draws from saved generators. On a CPU the kernels are
deterministic too, so a run that was killed and started again ends bit-identical to one that was not (same thread
count and number of processes). What CUDA promises less: `rng.scope`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from fusepress.pipeline.distributed import broadcast_model_, on_main, rank
from fusepress.pipeline.errors import TaskError, TrainingError
from fusepress.pipeline.graph.plan import PrunePlan
from fusepress.pipeline.recipe import FinetuneConfig, TrainingFormat
from fusepress.pipeline.recovery import rng
from fusepress.pipeline.recovery.batchnorm import reestimate_batchnorm
from fusepress.pipeline.recovery.checkpoint import clear_checkpoints
from fusepress.pipeline.recovery.contract import FinetuneResult, Masks, TrainProgress
from fusepress.pipeline.recovery.distill import Distiller
from fusepress.pipeline.recovery.early_stop import EarlyStop
from fusepress.pipeline.recovery.features import teach_features
from fusepress.pipeline.recovery.loggers import logging_to
from fusepress.pipeline.recovery.optim import learning_rate
from fusepress.pipeline.recovery.placement import all_tensors, lent, on_device, placed, training_device
from fusepress.pipeline.recovery.precision import Amp
from fusepress.pipeline.recovery.sharding import ShardedMasks, spread
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
    precision: TrainingFormat | None = None,
    stop: EarlyStop | None = None,
    experts: Mapping[str, nn.Module] | None = None,
    plan: PrunePlan | None = None,
) -> FinetuneResult:
    """Train a model in place, with the dense model as teacher, by our loop or by the task's own `fit`.

    AdamW (no decay on norms and biases), linear warm-up and cosine to zero, gradient clipping, and an exponential
    average of the weights that becomes the result (buffers, such as batch norm statistics, are the last ones).

    Processes that share a run call it together: all start from the model of rank 0, each adds its own batches to every
    step, and all end with the same model. With frozen batch norms that is the step of one process that accumulates all
    of them. Rank 0 alone writes, reports and decides which checkpoint all go on from. The task's own `fit` is run by
    rank 0 alone.

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
        precision: in place of `config.precision`.
        stop: when the model is good enough (`config.early_stop`); looked at every `config.eval_every` steps.
        experts: by name; each teaches the outputs that it returns, in place of the dense model, which may be None
            where they teach all that is taught. They are not changed.
        plan: what the student kept of the dense model; only features (`config.distill_features`) need it.

    Raises:
        TrainingError: a loss, a gradient or a weight became NaN or infinite; or the task's `fit` failed.
        TaskError: the task's losses or outputs cannot be trained on.
        StoreError: a checkpoint cannot be written.
        UsageError: a package that `config.log` needs is not installed, or there is nobody to share the weights with.
        RankError: another process failed or was lost.
    """
    if masks is not None:
        masks.apply(student)
    if config.steps == 0:
        student.eval()
        return FinetuneResult(final_losses={}, history=[], steps=0, resumed_from=None)
    broadcast_model_(student)  # processors of other kinds round in other ways before training, too
    home = next(iter(student.parameters())).device
    device = device or training_device(home)
    with contextlib.ExitStack() as stack:
        sharded = config.shard == "fsdp2" and not task.offers("fit")
        stack.enter_context(placed(student, home if sharded else device, home))
        for model in (teacher, *(experts or {}).values()) if config.distill else ():
            stack.enter_context(lent(model, device))
        with rng.scope(seed, device, deterministic=config.deterministic), _told(progress, config, workdir) as tell:
            distiller = stack.enter_context(
                _distilled(student, teacher, experts or {}, plan, task, config, seed, device)
            )
            if task.offers("fit"):
                result = on_main(lambda: fit_by_user(student, distiller, task, config, seed, workdir, masks, tell))
                broadcast_model_(student)
            else:
                amp = Amp(precision or config.precision, device)
                with _spread(student, task, seed, amp) if sharded else contextlib.nullcontext(student) as model:
                    held = ShardedMasks(masks, model) if sharded and masks is not None else masks
                    result = Trainer(model, distiller, task, config, seed, amp, held, stop).run(workdir, tell)
        if masks is not None:
            masks.check(student)
        _check_weights(student)
        student.eval()
    return result


def _spread(student: nn.Module, task: LoadedTask, seed: int, amp: Amp) -> contextlib.AbstractContextManager[nn.Module]:
    if amp.format == "fp16":
        raise TrainingError(
            "expected bf16 or fp32 with finetune.shard: fsdp2, for the loss scale of fp16 needs whole gradients; got "
            "fp16; set finetune.precision"
        )
    home = next(iter(student.parameters())).device
    return spread(student, on_device(rng.draw(task.train_batches(seed), seed, 0), home).inputs, amp.device)


@contextlib.contextmanager
def _told(
    progress: Callable[[TrainProgress], None] | None, config: FinetuneConfig, workdir: Path
) -> Iterator[Callable[[TrainProgress], None] | None]:
    """The caller's listener and those of the recipe's loggers as one; rank 0 alone speaks."""
    if rank() > 0:
        yield None
        return
    if not config.log:
        yield progress
        return
    with logging_to(config.log, workdir) as log:

        def tell(now: TrainProgress) -> None:
            log(now)
            if progress is not None:
                progress(now)

        yield tell


@contextlib.contextmanager
def _distilled(
    student: nn.Module,
    teacher: nn.Module | None,
    experts: Mapping[str, nn.Module],
    plan: PrunePlan | None,
    task: LoadedTask,
    config: FinetuneConfig,
    seed: int,
    device: torch.device,
) -> Iterator[Distiller | None]:
    """What teaches the student, measured and with its taps on; None where the recipe wants nothing of it."""
    outputs, features = config.distill_weight > 0, config.distill_features > 0
    if not config.distill or (teacher is None and not experts) or not (outputs or features):
        yield None
        return
    taught = None
    if features:
        if teacher is None:
            raise TaskError(
                "expected the dense model as a teacher of features; got experts alone; set finetune.distill_features "
                "to 0, or give the dense model too"
            )
        batch = on_device(rng.draw(task.train_batches(seed), seed, 0), device)
        taught = teach_features(student, teacher, plan, batch.inputs, task.branches, config.distill_points)
    distiller = Distiller(
        teacher=teacher,
        task=task,
        temperature=config.temperature,
        experts=experts,
        weight=config.distill_weight,
        normalise=config.distill_normalise,
        features=taught,
        feature_weight=config.distill_features,
    )
    try:
        if outputs:
            distiller.measure_scales(seed, device)
        yield distiller
    finally:
        if taught is not None:
            taught.close()


def _check_weights(model: nn.Module) -> None:
    for name, value in all_tensors(model).items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise TrainingError(
                f"expected finite weights after training; got NaN or infinity in {name}; lower finetune.lr"
            )
