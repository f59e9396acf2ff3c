"""The Hessian times a vector, by double backward or, where an operator has none, by two gradients.

What a product counts as, in passes of one batch forward and back: a layer of weights costs its multiply-adds once
forward and twice back (by its input, by its weights), so three times in a pass. The exact product makes one pass for
the gradient and its graph, and goes back through it: twice forward (the tangent of the input with the weights, the
input with the tangent of the weights) and four times back (the tangents and the values, by input and by weights), which
is two passes more. Counted on the kernels that run, by torch.utils.flop_counter, that is 3.03 passes for the example of
a street (its first layers have no gradient by their input). Two gradients are two passes, as they say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

from fusepress.pipeline.distributed import gather_objects, rank, world
from fusepress.pipeline.scoring.gradients import Passes, accumulate_gradients, batch_loss, mean_gradients, totals_of
from fusepress.pipeline.task import Batch, LoadedTask

Curvature = Literal["exact", "difference"]
NO_SECOND = ("derivative for", "not implemented", "differentiate twice")  # what torch says of such operators
VIEWS = {"TBackward0", "TransposeBackward0", "PermuteBackward0", "ViewBackward0", "UnsqueezeBackward0"}
PRODUCT_PASSES: dict[Curvature, int] = {"exact": 3, "difference": 2}  # of every batch; see the module's text


def hessian_product(
    model: nn.Module,
    task: LoadedTask,
    batches: Sequence[Batch],
    vector: Mapping[nn.Parameter, Tensor],
    passes: Passes,
    where: str,
    *,
    curvature: Curvature = "exact",
    take: Callable[[], None] | None = None,
) -> Curvature:
    """Leave in every parameter's `grad` H v, H the Hessian of the mean loss over all samples of the batches.

    exact differentiates the gradient and holds v and the result. Where `take` takes the batches' parts of H v one by
    one, the result is that of a batch. difference is (g(theta + e v) - g(theta - e v)) / 2e, and holds theta beside v
    and the result; it feels kinks (ReLU) within e.

    Args:
        model: in evaluation mode, parameters taking gradients; its values come back bit-identical.
        task: its losses.
        batches: the data.
        vector: v; a parameter that it lacks counts as zero.
        passes: every batch counts as `PRODUCT_PASSES`, and a try that falls back as one more in all.
        where: for messages.
        curvature: exact falls back to difference where an operator has no second derivative.
        take: for exact: called after every batch of this process, whose part of H v is in `grad` then and is dropped
            afterwards. What it was given counts for nothing if difference is returned: then `grad` has it all.

    Returns:
        Which way it was.

    Raises:
        TrainingError: a loss or gradient is NaN or infinite.
    """
    if curvature == "exact":
        if _double_backward(model, task, batches, vector, passes, where, take):
            return "exact"
        curvature = "difference"
        passes.total += 1 + (PRODUCT_PASSES["difference"] - PRODUCT_PASSES["exact"]) * totals_of(batches)[0]
        passes.step(where)
    _difference(model, task, batches, vector, passes, where)
    return curvature


def _double_backward(
    model: nn.Module,
    task: LoadedTask,
    batches: Sequence[Batch],
    vector: Mapping[nn.Parameter, Tensor],
    passes: Passes,
    where: str,
    take: Callable[[], None] | None,
) -> bool:
    """Returns whether all operators have a second derivative, on every process that has a batch."""
    model.zero_grad(set_to_none=True)
    count, samples = totals_of(batches)
    chosen = [p for p in model.parameters() if p in vector and p.requires_grad]
    able = True

    def backward(index: int) -> None:
        nonlocal able
        if not able:
            return
        batch = batches[index]
        loss = batch_loss(model, task, batch, f"batch {index * world() + rank()} ({where})") * (batch.size / samples)
        try:
            _backward_through_gradient(loss, chosen, vector)
        except RuntimeError as error:  # torch has no narrower type for it
            if not any(text in str(error) for text in NO_SECOND):
                raise
            able = False
            return
        if take is not None:
            take()
            model.zero_grad(set_to_none=True)
        for _ in range(PRODUCT_PASSES["exact"]):
            passes.step(where)

    done = passes.done
    if take is None:
        accumulate_gradients(model, backward, len(batches), count)
    else:
        for index in range(len(batches)):
            backward(index)
    every = all(gather_objects(able))
    passes.done = done + (PRODUCT_PASSES["exact"] * count if every else 0)
    return every


def _backward_through_gradient(
    loss: Tensor, chosen: Sequence[nn.Parameter], vector: Mapping[nn.Parameter, Tensor]
) -> None:
    """Add the batch's part of H v to `grad`.

    Of the gradient only its graph is needed, so every parameter's part of it is dropped as soon as it is there.
    """
    starts: list[tuple[Any, Tensor]] = []

    def keep_graph(parameter: nn.Parameter, gradient: Tensor) -> Tensor:
        if gradient.requires_grad:
            starts.append((get_gradient_edge(gradient), vector[parameter]))
        return gradient.new_zeros(()).expand_as(gradient)

    handles = [parameter.register_hook(partial(keep_graph, parameter)) for parameter in chosen]
    try:
        torch.autograd.grad(loss, chosen, create_graph=True, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    if starts:  # a loss that is linear in everything has no curvature
        edges, vectors = zip(*starts, strict=True)
        _deliver_at_once([edge.node for edge in edges], set(chosen))
        torch.autograd.backward(edges, vectors)


def _deliver_at_once(roots: Sequence[Node], chosen: AbstractSet[Tensor]) -> None:
    """Have every part of a parameter's gradient added to `grad` as soon as a node makes it.

    Backward through a gradient reaches every parameter twice or more, first on the way up, from what made the gradient,
    then on the way down, from the forward pass; torch holds what came first until the last is there, which is a copy of
    all parameters between the ways. Sums are the same, but for their order.
    """
    seen, pending = set(roots), list(roots)
    while pending:
        node = pending.pop()
        places = {}
        for index, (successor, _) in enumerate(node.next_functions):
            if successor is None:
                continue
            way = _way_to_parameter(successor)
            if way is not None and way[-1].variable in chosen:
                places[index] = way
            elif successor not in seen:
                seen.add(successor)
                pending.append(successor)
        if places:
            node.register_hook(partial(_deliver, places))


def _way_to_parameter(node: Any) -> list[Any] | None:
    """The nodes from this one to a parameter where it is, or is a view of, a parameter."""
    way = [node]
    while not hasattr(way[-1], "variable"):
        if way[-1].name() not in VIEWS or len(way[-1].next_functions) != 1 or way[-1].next_functions[0][0] is None:
            return None
        way.append(way[-1].next_functions[0][0])
    return way


@torch.no_grad()
def _deliver(
    places: Mapping[int, Sequence[Any]], parts: tuple[Tensor | None, ...], _outputs: Any
) -> tuple[Tensor | None, ...]:
    for index, way in places.items():
        part, parameter = parts[index], way[-1].variable
        if part is None:
            continue
        for node in way[:-1]:
            part = node(part)
        parameter.grad = part.clone() if parameter.grad is None else parameter.grad.add_(part)
    return tuple(None if index in places else part for index, part in enumerate(parts))


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
