"""The Hessian times a vector, by double backward or, where an operator has none, by two gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from fusepress.pipeline.distributed import gather_objects, rank, world
from fusepress.pipeline.scoring.gradients import Passes, accumulate_gradients, batch_loss, mean_gradients, totals_of
from fusepress.pipeline.task import Batch, LoadedTask

Curvature = Literal["exact", "difference"]
NO_SECOND = ("derivative for", "not implemented", "differentiate twice")  # what torch says of such operators
PRODUCT_PASSES = 2  # forward-backward passes that one batch of a product counts as, either way


def hessian_product(
    model: nn.Module,
    task: LoadedTask,
    batches: Sequence[Batch],
    vector: Mapping[nn.Parameter, Tensor],
    passes: Passes,
    where: str,
    *,
    curvature: Curvature = "exact",
) -> Curvature:
    """Leave in every parameter's `grad` H v, H the Hessian of the mean loss over all samples of the batches.

    exact differentiates the gradient and holds, beside v and the result, a gradient with its graph. difference is
    (g(theta + e v) - g(theta - e v)) / 2e, and holds theta beside v and the result; it feels kinks (ReLU) within e.

    Args:
        model: in evaluation mode, parameters taking gradients; its values come back bit-identical.
        task: its losses.
        batches: the data.
        vector: v; a parameter that it lacks counts as zero.
        passes: every batch counts as two.
        where: for messages.
        curvature: exact falls back to difference where an operator has no second derivative.

    Returns:
        Which way it was.

    Raises:
        TrainingError: a loss or gradient is NaN or infinite.
    """
    if curvature == "exact":
        if _double_backward(model, task, batches, vector, where):
            for _ in range(PRODUCT_PASSES * totals_of(batches)[0]):
                passes.step(where)
            return "exact"
        curvature = "difference"
    _difference(model, task, batches, vector, passes, where)
    return curvature


def _double_backward(
    model: nn.Module, task: LoadedTask, batches: Sequence[Batch], vector: Mapping[nn.Parameter, Tensor], where: str
) -> bool:
    """Returns whether all operators have a second derivative, on every process that has a batch."""
    model.zero_grad(set_to_none=True)
    count, samples = totals_of(batches)
    chosen = [p for p in model.parameters() if p in vector and p.requires_grad]
    able = True

    def backward(index: int) -> None:
        nonlocal able
        batch = batches[index]
        loss = batch_loss(model, task, batch, f"batch {index * world() + rank()} ({where})") * (batch.size / samples)
        try:
            if able:
                _backward_through_gradient(loss, chosen, vector)
        except RuntimeError as error:  # torch has no narrower type for it
            if not any(text in str(error) for text in NO_SECOND):
                raise
            able = False

    accumulate_gradients(model, backward, len(batches), count)
    return all(gather_objects(able))


def _backward_through_gradient(
    loss: Tensor, chosen: Sequence[nn.Parameter], vector: Mapping[nn.Parameter, Tensor]
) -> None:
    gradients = torch.autograd.grad(loss, chosen, create_graph=True, allow_unused=True)
    terms = [
        (gradient * vector[parameter]).sum()
        for parameter, gradient in zip(chosen, gradients, strict=True)
        if gradient is not None and gradient.requires_grad
    ]
    if terms:  # a loss that is linear in everything has no curvature
        torch.stack(terms).sum().backward()


@torch.no_grad()
def _difference(
    model: nn.Module,
    task: LoadedTask,
    batches: Sequence[Batch],
    vector: Mapping[nn.Parameter, Tensor],
    passes: Passes,
    where: str,
) -> None:
    start = {p: p.detach().clone() for p in model.parameters() if p in vector}
    step = _step_size(start, vector)
    try:
        for sign in (-1.0, 1.0):
            for parameter, value in start.items():
                parameter.copy_(value).add_(vector[parameter], alpha=sign * step)
            with torch.enable_grad():
                mean_gradients(model, task, batches, passes, where, fresh=sign < 0)
            if sign < 0:
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter.grad.neg_()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(2.0 * step)
    finally:
        for parameter, value in start.items():
            parameter.copy_(value)


def _step_size(start: Mapping[nn.Parameter, Tensor], vector: Mapping[nn.Parameter, Tensor]) -> float:
    """Large enough to drown rounding in the gradients, small enough for the third derivative: eps^0.4 of theta."""
    length = float(torch.stack([vector[p].double().norm() for p in start]).norm())
    size = float(torch.stack([value.double().norm() for value in start.values()]).norm())
    resolution = max(torch.finfo(value.dtype).eps for value in start.values())
    return float(resolution**0.4) * (size or 1.0) / (length or 1.0)
