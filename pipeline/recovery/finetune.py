"""Fine-tuning that can be killed at any moment and ends with the same weights.

A step is a function of the saved state, the seed and its number: batches come from `task.train_batches(seed,
start=step)`, the learning rate from the step, random draws from saved generators. On a CPU the kernels are
deterministic too, so a run that was killed and started again ends bit-identical to one that was not (same thread
count). An accelerator's kernels may sum in another order.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fusepress.pipeline.corrupt import blank
from fusepress.pipeline.errors import FusepressError, TaskError, TrainingError
from fusepress.pipeline.recipe import FinetuneConfig
from fusepress.pipeline.recovery import rng
from fusepress.pipeline.recovery.batchnorm import reestimate_batchnorm, tracking_norms
from fusepress.pipeline.recovery.checkpoint import (
    TrainState,
    clear_checkpoints,
    load_checkpoint,
    save_checkpoint,
    tensors_sha256,
)
from fusepress.pipeline.recovery.distill import Distiller
from fusepress.pipeline.recovery.precision import Amp, Format
from fusepress.pipeline.task import Batch, LoadedTask

__all__ = [
    "FinetuneResult",
    "FitHooks",
    "TrainProgress",
    "clear_checkpoints",
    "finetune",
    "learning_rate",
    "reestimate_batchnorm",
]

VERSION = 1
HISTORY_POINTS = 200
_MODALITY_STREAM = 0x6D64  # keeps the draws of modality dropout apart from other uses of (seed, step)
logger = logging.getLogger(__name__)


class Masks(Protocol):
    """What fine-tuning needs of a mask holder (graph/masks.py)."""

    masks: dict[str, Tensor]

    def apply(self, model: nn.Module) -> None:
        """Zero the masked weights."""

    def apply_to_gradients(self, model: nn.Module) -> None:
        """Zero the gradients of masked weights."""

    def check(self, model: nn.Module) -> None:
        """Raise where a masked weight is not zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainProgress:
    """Where training is.

    Attributes:
        step: steps done.
        steps: steps in all.
        losses: named losses of the last step.
        lr: its learning rate.
        eta_s: seconds still to go at the present pace.
    """

    step: int
    steps: int
    losses: dict[str, float]
    lr: float
    eta_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneResult:
    """What training came to.

    Attributes:
        final_losses: named losses of the last step; empty where no step was made.
        history: at most about 200 points `{"step", "lr", "losses"}`, the last step among them.
        steps: optimiser steps made in all.
        resumed_from: the step of the checkpoint that this process went on from, or None.
    """

    final_losses: dict[str, float]
    history: list[dict[str, Any]]
    steps: int
    resumed_from: int | None


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
    with _placed(student, device, home), _lent(teacher if config.distill else None, device) as lent:
        with rng.scope(seed, device):
            distiller = _distiller(lent, task, config, seed, device)
            if task.offers("fit"):
                result = _fit_by_user(student, distiller, task, config, seed, workdir, masks, progress)
            else:
                amp = Amp(precision, device)
                trainer = _Trainer(student, distiller, task, config, seed, device, amp, masks)
                result = trainer.run(workdir, progress)
        if masks is not None:
            masks.check(student)
        _check_weights(student)
        student.eval()
    return result


def learning_rate(config: FinetuneConfig, step: int) -> float:
    """Rate of a step (counted from 0): linear warm-up to `lr`, then a cosine that would reach 0 after the last step."""
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, config.steps - warmup)))


class _Trainer:
    """The state of a run and one step of it."""

    def __init__(
        self,
        student: nn.Module,
        distiller: Distiller | None,
        task: LoadedTask,
        config: FinetuneConfig,
        seed: int,
        device: torch.device,
        amp: Amp,
        masks: Masks | None,
    ) -> None:
        self.student, self.distiller, self.task, self.config = student, distiller, task, config
        self.seed, self.device, self.amp, self.masks = seed, device, amp, masks
        self.identity = _identity(student, distiller, config, seed, amp.format, masks)
        self.trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
        self.optimizer = _adamw(self.trained, config)
        self.average = {name: p.detach().clone() for name, p in self.trained.items()} if config.ema else {}
        self.step = 0
        self.losses: dict[str, float] = {}
        self.history: list[dict[str, Any]] = []

    def run(self, workdir: Path, progress: Callable[[TrainProgress], None] | None) -> FinetuneResult:
        """All steps that are still to be made, then the averaged weights into the model."""
        steps = self.config.steps
        resumed_from = self._resume(workdir)
        first, began = self.step, time.monotonic()
        batches = self.task.train_batches(self.seed, start=self.step)
        self.student.train()
        while self.step < steps:
            lr = learning_rate(self.config, self.step)
            self.losses = self._train_step(rng.draw(batches, self.seed, self.step), lr)
            self.step += 1
            if self.step % max(1, steps // HISTORY_POINTS) == 0 or self.step == steps:
                self.history.append({"step": self.step, "lr": lr, "losses": self.losses})
            if self.step % self.config.checkpoint_every == 0 or self.step == steps:
                save_checkpoint(workdir, self._state(), self.identity)
            if progress is not None:
                pace = (time.monotonic() - began) / (self.step - first)
                eta = pace * (steps - self.step)
                progress(TrainProgress(step=self.step, steps=steps, losses=dict(self.losses), lr=lr, eta_s=eta))
        self._take_average()
        return FinetuneResult(
            final_losses=dict(self.losses), history=self.history, steps=self.step, resumed_from=resumed_from
        )

    def _train_step(self, batch: Batch, lr: float) -> dict[str, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        where = f"step {self.step + 1} of {self.config.steps} (learning rate {lr:.2e}, samples {_some(batch)})"
        self.optimizer.zero_grad(set_to_none=True)
        losses = self._losses(_on_device(batch, self.device))
        total = self._total(losses, where)
        self.amp.backward(total, self.optimizer)
        if self.masks is not None:
            self.masks.apply_to_gradients(self.student)
        self.amp.step(self.optimizer, self.student, self.config.clip, where)
        if self.masks is not None:
            self.masks.apply(self.student)
        self._update_average()
        return {name: float(loss.detach()) for name, loss in losses.items()}

    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        """The task's losses and, weighted, those of distillation."""
        batch, dead = self._drop_modality(batch)
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

    def _drop_modality(self, batch: Batch) -> tuple[Batch, list[str] | None]:
        """At times a batch with one modality dead.

        Returns:
            The batch; and None where nothing is dead, else the module paths whose outputs are to be zeroed (none
            where the inputs are blank already).
        """
        draw = np.random.default_rng([self.seed, self.step, _MODALITY_STREAM])
        if len(self.task.branches) < 2 or draw.random() >= self.config.modality_dropout:
            return batch, None
        modality = list(self.task.branches)[int(draw.integers(len(self.task.branches)))]
        blanked = blank(self.task, batch, modality)
        return (batch, self.task.branches[modality]) if blanked is None else (blanked, [])

    def _total(self, losses: Mapping[str, Tensor], where: str) -> Tensor:
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

    def _update_average(self) -> None:
        """Exponential average; its decay grows from 0.18, so that a short run does not keep its start."""
        decay = min(self.config.ema, (self.step + 2) / (self.step + 11))
        with torch.no_grad():
            for name, value in self.average.items():
                value.lerp_(self.trained[name], 1 - decay)

    def _take_average(self) -> None:
        with torch.no_grad():
            for name, value in self.average.items():
                self.trained[name].copy_(value)
        if self.masks is not None:
            self.masks.apply(self.student)

    def _state(self) -> TrainState:
        tensors = {f"model/{name}": value for name, value in _all_tensors(self.student).items()}
        tensors |= {f"average/{name}": value for name, value in self.average.items()}
        for name, parameter in self.trained.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"adamw/{key}/{name}"] = value
        drawn, info = rng.capture(self.device)
        tensors |= {f"rng/{name}": value for name, value in drawn.items()}
        rest = {"rng": info, "amp": self.amp.state(), "losses": self.losses, "history": self.history}
        return TrainState(step=self.step, tensors=tensors, info=rest)

    def _resume(self, workdir: Path) -> int | None:
        state = load_checkpoint(workdir, self.identity)
        if state is None:
            return None
        saved = state.tensors
        with torch.no_grad():
            for name, value in _all_tensors(self.student).items():
                value.copy_(saved[f"model/{name}"])
            for name, value in self.average.items():
                value.copy_(saved[f"average/{name}"])
            self._resume_moments(saved)
        drawn = {name.removeprefix("rng/"): value for name, value in saved.items() if name.startswith("rng/")}
        rng.restore(drawn, state.info["rng"], self.device)
        self.amp.load(state.info["amp"])
        self.step, self.losses, self.history = state.step, state.info["losses"], state.info["history"]
        return state.step

    def _resume_moments(self, saved: Mapping[str, Tensor]) -> None:
        """AdamW's moments lie like their parameter (channels last, too); its step counter stays where it was made."""
        for name, parameter in self.trained.items():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = saved.get(f"adamw/{key}/{name}")
                if value is None:  # a parameter that had no gradient yet
                    continue
                like = value.clone() if key == "step" else torch.empty_like(parameter).copy_(value)
                self.optimizer.state[parameter][key] = like


def _adamw(trained: Mapping[str, nn.Parameter], config: FinetuneConfig) -> torch.optim.AdamW:
    """AdamW without decay on what has one dimension or none: norms, biases, scales."""
    decayed = [p for p in trained.values() if p.dim() > 1]
    plain = [p for p in trained.values() if p.dim() <= 1]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr)


def _distiller(
    teacher: nn.Module | None, task: LoadedTask, config: FinetuneConfig, seed: int, device: torch.device
) -> Distiller | None:
    if teacher is None or config.distill_weight == 0:
        return None
    distiller = Distiller(teacher=teacher, task=task, temperature=config.temperature)
    distiller.measure_scales(seed, device)
    return distiller


def _identity(
    student: nn.Module,
    distiller: Distiller | None,
    config: FinetuneConfig,
    seed: int,
    precision: str,
    masks: Masks | None,
) -> str:
    """Hash of all that a run's result depends on, but for the data and the task's source."""
    parts = {
        "version": VERSION,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "config": config.model_dump(mode="json"),
        "seed": seed,
        "precision": precision,
        "student": tensors_sha256(_all_tensors(student)),
        "trainable": sorted(name for name, p in student.named_parameters() if p.requires_grad),
        "teacher": tensors_sha256(_all_tensors(distiller.teacher)) if distiller else None,
        "masks": tensors_sha256(masks.masks) if masks is not None else None,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those outside the state dict too: training may change any of them."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _on_device(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return batch
    moved = {name: value.to(device) for name, value in batch.inputs.items()}
    targets = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in batch.targets.items()}
    return replace(batch, inputs=moved, targets=targets)


def _some(batch: Batch) -> str:
    ids = [str(sample_id) for sample_id in batch.sample_ids]
    return ", ".join(ids[:4]) + (", ..." if len(ids) > 4 else "")


@contextlib.contextmanager
def _placed(model: nn.Module, device: torch.device, home: torch.device) -> Iterator[None]:
    model.to(device)
    try:
        yield
    finally:
        model.to(home)


@contextlib.contextmanager
def _lent(teacher: nn.Module | None, device: torch.device) -> Iterator[nn.Module | None]:
    """The teacher in evaluation mode on the training device; its modes and its device come back."""
    if teacher is None:
        yield None
        return
    home = next(iter(teacher.parameters())).device
    modes = {module: module.training for module in teacher.modules()}
    try:
        yield teacher.to(device).eval()
    finally:
        teacher.to(home)
        for module, training in modes.items():
            module.training = training


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


def _check_weights(model: nn.Module) -> None:
    for name, value in _all_tensors(model).items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise TrainingError(
                f"expected finite weights after training; got NaN or infinity in {name}; lower finetune.lr"
            )


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
    _weight: float = 1.0
    _distiller: Distiller | None = None
    _masks: Masks | None = None
    _listener: Callable[[TrainProgress], None] | None = None
    _began: float = field(default_factory=time.monotonic)

    def after_step(self) -> None:
        """To be called after every optimiser step: zeroes the masked weights again."""
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
        losses = self._distiller.losses(self._distiller.task.as_dict(outputs), wanted)
        return self._weight * torch.stack(list(losses.values())).sum()

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


def _fit_by_user(
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
    hooks = FitHooks(
        student=student,
        lr=config.lr,
        seed=seed,
        workdir=workdir,
        steps=config.steps,
        _weight=config.distill_weight,
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
