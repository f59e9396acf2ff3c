"""Passes over training batches: mean gradients and the optimiser steps of the reactivation.

Where several processes share a run, each holds its share of the batches (number i belongs to rank i mod world), and
what is returned is that of all, bit for bit as in one process: gradients are added up batch after batch in their
order. (Hessian products of single weights are so to rounding: one process adds up halves of batches, `curvature`.)
Optimiser steps follow one another, and so every rank makes all of them, on the whole batches.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from fusepress.pipeline.distributed import broadcast_, gather_objects, in_turn, rank, world
from fusepress.pipeline.errors import TaskError, TrainingError
from fusepress.pipeline.task import Batch, LoadedTask

Progress = Callable[[float, str], None]


def silent(_fraction: float, _text: str) -> None:
    """Progress that nobody watches."""


@dataclass(slots=True, kw_only=True)
class Passes:
    """Counts forward-backward passes (one a batch) and reports them.

    Attributes:
        total: how many there will be.
        progress: called with the fraction done and what is being done.
        done: how many there were.
    """

    total: int
    progress: Progress = silent
    done: int = field(default=0, init=False)

    def step(self, text: str) -> None:
        """One more pass is done."""
        self.done += 1
        self.progress(min(1.0, self.done / max(1, self.total)), text)


def scoring_batches(task: LoadedTask, seed: int, count: int, *, start: int = 0) -> list[Batch]:
    """`count` training batches from `start` on, held in memory: every gradient is taken on the very same data D.

    Several processes share them: each gets its part, which may be empty.

    Raises:
        TaskError: the training split is empty.
    """
    first, step = start + rank(), world()
    own = len(range(rank(), count, step))
    return list(itertools.islice(task.train_batches(seed, start=first // step, rank=first % step, world=step), own))


def totals_of(batches: Sequence[Batch]) -> tuple[int, int]:
    """Batches and samples of all processes that share them."""
    parts = gather_objects((len(batches), sum(batch.size for batch in batches)))
    return sum(count for count, _ in parts), sum(samples for _, samples in parts)


def batch_loss(model: nn.Module, task: LoadedTask, batch: Batch, where: str) -> Tensor:
    """The sum of the task's losses on one batch, with its graph.

    Raises:
        TrainingError: the loss is NaN or infinite.
        TaskError: the loss does not depend on the parameters.
    """
    total = _total_loss(model, task, batch, where)
    if not total.requires_grad:
        raise TaskError(
            f"expected losses() to depend on the model's parameters; got a constant {float(total)} at {where}; "
            "remove detach() or no_grad() from the model or the losses"
        )
    return total


@torch.no_grad()
def mean_loss(model: nn.Module, task: LoadedTask, batches: Sequence[Batch], where: str) -> float:
    """The mean loss over all samples of the batches (of all processes), without gradients.

    Raises:
        TrainingError: a loss is NaN or infinite.
    """
    _, samples = totals_of(batches)
    own = [float(_total_loss(model, task, batch, where)) * batch.size / samples for batch in batches]
    return math.fsum(itertools.chain(*gather_objects(own)))


def _total_loss(model: nn.Module, task: LoadedTask, batch: Batch, where: str) -> Tensor:
    moved = _on_device(batch, next((p.device for p in model.parameters()), torch.device("cpu")))
    losses = task.losses(task.as_dict(model(**moved.inputs)), moved)
    total: Tensor = reduce(add, losses.values()).sum()
    if not bool(torch.isfinite(total)):
        values = {name: float(value.detach().sum()) for name, value in losses.items()}
        raise TrainingError(
            f"expected a finite loss; got {values} at {where}; check the labels and the checkpoint, lower "
            "score.reactivation_lr if it was finite before the reactivation, or use score.method: magnitude"
        )
    return total


def mean_gradients(
    model: nn.Module, task: LoadedTask, batches: Sequence[Batch], passes: Passes, where: str, *, fresh: bool = True
) -> float:
    """Leave in every parameter's `grad` the gradient of the mean loss over all samples of the batches.

    The batches are those of all processes that share them. They weigh by their number of samples. `grad` stays None
    where a parameter does not reach the loss. If not `fresh`, the gradient is added to what `grad` holds.

    Returns:
        The mean loss.

    Raises:
        TrainingError: a loss or a gradient is NaN or infinite.
    """
    if fresh:
        model.zero_grad(set_to_none=True)
    count, samples = totals_of(batches)
    losses = []

    def backward(index: int) -> None:
        batch = batches[index]
        share = batch.size / samples
        loss = batch_loss(model, task, batch, f"batch {index * world() + rank()} ({where})")
        (loss * share).backward()
        losses.append(float(loss.detach()) * share)
        passes.step(where)

    accumulate_gradients(model, backward, len(batches), count)
    passes.done += count - len(batches)
    _check_finite_gradients(model, where)
    return math.fsum(itertools.chain(*gather_objects(losses)))


def accumulate_gradients(model: nn.Module, backward: Callable[[int], None], own: int, count: int) -> None:
    """Add to every parameter's `grad` the gradients of all batches, one after the other in their order.

    Args:
        model: whose parameters.
        backward: called with 0 to own - 1; goes back through that batch of this process.
        own: batches of this process.
        count: batches of all processes.
    """
    if world() == 1:
        for index in range(own):
            backward(index)
        return
    parameters = list(model.parameters())
    totals = [parameter.grad for parameter in parameters]

    def gradients(index: int) -> list[Tensor | None]:
        model.zero_grad(set_to_none=True)
        backward(index)
        return [parameter.grad for parameter in parameters]

    for found in in_turn(gradients, parameters, own, count):
        with torch.no_grad():
            totals = [
                total if gradient is None else gradient if total is None else total.add_(gradient)
                for total, gradient in zip(totals, found, strict=True)
            ]
    for parameter, total in zip(parameters, totals, strict=True):
        parameter.grad = total


def _check_finite_gradients(model: nn.Module, where: str) -> None:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
            raise _gradient_error(name, where)


def _gradient_error(name: str, where: str) -> TrainingError:
    return TrainingError(
        f"expected finite gradients; got NaN or infinity at {name} ({where}); guard divisions and square roots "
        "against zero features (x / (norm + eps)), or use score.method: magnitude"
    )


def reactivate(
    model: nn.Module,
    task: LoadedTask,
    parameters: Sequence[nn.Parameter],
    batches: Iterable[Batch],
    passes: Passes,
    *,
    optimizer: Literal["sgd", "adam"],
    lr: float,
    where: str,
    after_step: Callable[[], None] | None = None,
    at_once: bool = False,
) -> int:
    """Train the given parameters, one step a batch, with a fresh optimiser that nobody keeps.

    Every process makes all steps (see the module's text); all go on with the parameters of rank 0.

    Plain SGD is what the derivation of AlterMOMA uses (eq. 16): no momentum, no decay. `after_step` is called after
    every step (to hold masks, to note the way).

    With `at_once`, SGD takes its step on every parameter as soon as its gradient is complete, on the way back, and no
    two gradients have to live at a time; the values are the same. A model that also uses a parameter detached from the
    graph cannot be trained so.

    Returns:
        The number of steps.

    Raises:
        TrainingError: a loss, or a gradient before the first step, is NaN or infinite; `at_once` does not go.
    """
    if at_once and optimizer == "sgd":
        return _descend_at_once(model, task, parameters, batches, passes, lr=lr, where=where, after_step=after_step)
    stepper: Any = (torch.optim.SGD if optimizer == "sgd" else torch.optim.Adam)(parameters, lr=lr)
    steps = 0
    for index, batch in enumerate(batches):
        model.zero_grad(set_to_none=True)
        loss = batch_loss(model, task, batch, f"reactivation step {index} ({where})")
        loss.backward()
        if not steps:  # later ones may be the steps' own fault, and the next loss tells
            _check_finite_gradients(model, f"reactivation step 0 ({where})")
        stepper.step()
        if after_step is not None:
            after_step()
        steps += 1
        passes.step(where)
    broadcast_(parameters)  # processors of other kinds round in other ways
    return steps


def _descend_at_once(
    model: nn.Module,
    task: LoadedTask,
    parameters: Sequence[nn.Parameter],
    batches: Iterable[Batch],
    passes: Passes,
    *,
    lr: float,
    where: str,
    after_step: Callable[[], None] | None,
) -> int:
    names = {parameter: name for name, parameter in model.named_parameters()}
    steps = 0

    @torch.no_grad()
    def descend(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        if not steps and not bool(gradient.isfinite().all()):
            raise _gradient_error(names[cast("nn.Parameter", parameter)], f"reactivation step 0 ({where})")
        parameter.add_(gradient, alpha=-lr)

    hooks = [parameter.register_post_accumulate_grad_hook(descend) for parameter in parameters]
    try:
        for batch in batches:
            model.zero_grad(set_to_none=True)
            loss = batch_loss(model, task, batch, f"reactivation step {steps} ({where})")
            try:
                loss.backward()
            except RuntimeError as error:
                if "modified by an inplace operation" not in str(error):
                    raise
                raise TrainingError(
                    f"expected every use of a parameter to be in the graph; got one that is detached ({where}), which "
                    "a step on the way back would change; use score.reactivation_optimizer: adam, which steps after it"
                ) from error
            if after_step is not None:
                after_step()
            steps += 1
            passes.step(where)
    finally:
        for hook in hooks:
            hook.remove()
    broadcast_(parameters)
    return steps


def _on_device(batch: Batch, device: torch.device) -> Batch:
    return replace(batch, inputs=_moved(batch.inputs, device), targets=_moved(batch.targets, device))


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(_moved(item, device) for item in value)
    return value
