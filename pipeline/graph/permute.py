"""Channel permutations that let a 2:4 mask keep more (Pool and Yu, NeurIPS 2021).

A mask keeps two of every four consecutive input channels, so it matters which channels are neighbours. The channels of
a coupled group may stand in any order, as long as every tensor that they run through is reordered alike: the network
computes the same function, and the order is part of its weights. Nothing else changes: no shape, no plan, no name.

The search swaps single channels between stripes (runs of four), always those pairs that gain most, all pairs at once.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fusepress.pipeline.graph.check import relative_gap
from fusepress.pipeline.graph.dependence import hash_seed
from fusepress.pipeline.graph.groups import working_copy
from fusepress.pipeline.graph.masks import GROUP, Skip, top_2to4
from fusepress.pipeline.graph.plan import Group, GroupGraph, Member, PrunePlan

Orders = Mapping[str, Sequence[int]]  # group id -> which old channel stands at each place
LEAST_GAIN = 1e-9  # of all that a mask could keep: swaps below it are rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class Permutation:
    """What was reordered and what it brought.

    Attributes:
        orders: group id -> which former channel stands at each place; groups left as they were are absent.
        kept_before: parameter -> fraction of its values that the best 2:4 mask kept before.
        kept_after: the same after.
        refused: groups that cannot be reordered, with the reason.
        groups: those that can.
    """

    orders: dict[str, tuple[int, ...]] = field(default_factory=dict)
    kept_before: dict[str, float] = field(default_factory=dict)
    kept_after: dict[str, float] = field(default_factory=dict)
    refused: tuple[Skip, ...] = ()
    groups: tuple[Group, ...] = ()

    @contextmanager
    def undone(self, model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[None]:
        """The model and its masks with their channels in the former order; afterwards reordered again.

        Training then sees the channels where the plan, and with it a teacher's features, have them.

        Args:
            model: the reordered model.
            masks: of its parameters; changed in place with it.
        """
        back = {name: inverse(order) for name, order in self.orders.items()}
        for tensors in (tensors_of(model), masks):
            permute_tensors(tensors, self.groups, back)
        try:
            yield
        finally:
            for tensors in (tensors_of(model), masks):
                permute_tensors(tensors, self.groups, self.orders)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "orders": {name: list(order) for name, order in self.orders.items()},
            "refused": [{"group": skip.param, "reason": skip.reason} for skip in self.refused],
        }


def permute_2to4(
    model: nn.Module, example_inputs: dict[str, Tensor], groups: Sequence[Group], values: dict[str, Tensor]
) -> Permutation:
    """Reorder the channels of coupled groups so that 2:4 masks keep more; the model computes the same as before.

    Args:
        model: changed in place.
        example_inputs: inputs by name, batch first, on which the equality is tested.
        groups: coupled groups of this very model (see `narrowed` for a pruned one).
        values: what a mask should keep (|w| or scores, higher = keep) of every weight that will carry the pattern, in
            its shape; reordered in place with the model, so that masks can be chosen from it.

    Returns:
        The orders, and the kept fraction of every weight before and after: what the readers of a group keep in all
        never falls.

    Raises:
        TraceError: the model cannot be copied or run.
    """
    able, refused = permutable(model, example_inputs, groups)
    before = {name: kept_2to4(value) for name, value in values.items()}
    after = dict(before)
    orders: dict[str, tuple[int, ...]] = {}
    for group in able:
        order = _order_for(group, values)
        if order is None:
            continue
        permute_tensors(values, [group], {group.id: order})
        now = {member.param: kept_2to4(values[member.param]) for member in _readers(group, values)}
        if sum(now.values()) > sum(after[name] for name in now):
            orders[group.id] = order
            after |= now
        else:  # what one reader gained, another whose stripes lie differently lost
            permute_tensors(values, [group], {group.id: inverse(order)})
    permute_tensors(tensors_of(model), able, orders)
    whole = {name: float(value.sum(dtype=torch.float64)) or 1.0 for name, value in values.items()}
    return Permutation(
        orders=orders,
        kept_before={name: before[name] / whole[name] for name in values},
        kept_after={name: after[name] / whole[name] for name in values},
        refused=tuple(refused),
        groups=tuple(able),
    )


def narrowed(graph: GroupGraph, plan: PrunePlan | None, model: nn.Module) -> tuple[Group, ...]:
    """The groups of a dense model as they are after a plan was applied.

    Args:
        graph: of the dense model.
        plan: what was removed; None for nothing.
        model: the pruned model.

    Returns:
        Groups with their present widths and offsets. Removed blocks, and members that went with them, are absent.
    """
    kept = {group.id: group.kept for group in plan.groups} if plan is not None else {}
    gone: dict[tuple[str, int], list[int]] = defaultdict(list)
    for planned in plan.groups if plan is not None else ():
        for member in planned.members:
            gone[member.param, member.dim] += member.indices(planned.removed)
    for indices in gone.values():
        indices.sort()
    tensors = tensors_of(model)
    found = []
    for group in graph.groups:
        width = len(kept.get(group.id, range(group.width)))
        if not width:
            continue
        moved = (
            replace(member, offset=member.offset - bisect_left(gone[member.param, member.dim], member.offset))
            for member in group.members
        )
        fitting = tuple(member for member in moved if _fits(member, width, tensors.get(member.param)))
        found.append(replace(group, width=width, members=fitting))
    return tuple(found)


def _fits(member: Member, width: int, tensor: Tensor | None) -> bool:
    if tensor is None or member.dim >= tensor.ndim:
        return False
    return member.offset + width * member.stride <= tensor.shape[member.dim]


def permutable(
    model: nn.Module, example_inputs: dict[str, Tensor], groups: Sequence[Group]
) -> tuple[list[Group], list[Skip]]:
    """The groups whose channels may stand in any order, by trial on a copy of the model, and the others with why not.

    Raises:
        TraceError: the model cannot be copied or run.
    """
    refused = [
        Skip(param=group.id, reason=f"its channels are normalised in {group.multiple} parts, which an order would mix")
        for group in groups
        if group.multiple > 1
    ]
    tried = [group for group in groups if group.multiple == 1 and group.width > 1]
    with working_copy(model, example_inputs) as (private, inputs, forward, tolerance):
        tensors = tensors_of(private)
        expected = [out.clone() for out in forward(private, inputs)]

        def gap(some: Sequence[Group]) -> float:
            with _shuffled(tensors, some):
                found = forward(private, inputs)
            return max((relative_gap(a, b) for a, b in zip(found, expected, strict=True)), default=0.0)

        def failures(some: Sequence[Group]) -> dict[str, float]:
            """Groups that change the outputs; all are tried at once, and halved until the guilty ones are found."""
            found = gap(some) if some else 0.0
            if found <= tolerance:
                return {}
            if len(some) == 1:
                return {some[0].id: found}
            half = len(some) // 2
            guilty = failures(some[:half]) | failures(some[half:])
            return guilty or {group.id: found for group in some}

        bad = failures(tried)
    refused += [
        Skip(param=name, reason=f"another order of its channels changes the outputs (relative {size:.1e})")
        for name, size in bad.items()
    ]
    return [group for group in tried if group.id not in bad], refused


@contextmanager
def _shuffled(tensors: Mapping[str, Tensor], groups: Sequence[Group]) -> Iterator[None]:
    """All groups in a random order, the same one every time; afterwards as they were, bit for bit."""
    orders = {}
    for group in groups:
        order = list(range(group.width))
        random.Random(hash_seed(group.id)).shuffle(order)  # noqa: S311 - repeatable, not secret
        orders[group.id] = order
    permute_tensors(tensors, groups, orders)
    try:
        yield
    finally:
        permute_tensors(tensors, groups, {name: inverse(order) for name, order in orders.items()})


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by every name that they have."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def permute_tensors(tensors: Mapping[str, Tensor], groups: Sequence[Group], orders: Orders) -> None:
    """Put channels into another order, in place, in every tensor that they run through.

    Args:
        tensors: parameters and buffers (or scores of them) by name; members that are not among them are passed over.
        groups: whose channels are meant.
        orders: group id -> which old channel stands at each place.
    """
    done = set()
    with torch.no_grad():
        for group in groups:
            order = orders.get(group.id)
            if order is None:
                continue
            for member in group.members:
                tensor = tensors.get(member.param)
                if tensor is None or (id(tensor), member.dim, member.offset) in done:  # a tied one has two names
                    continue
                done.add((id(tensor), member.dim, member.offset))
                index = torch.arange(tensor.shape[member.dim])
                index[member.indices(range(group.width))] = torch.tensor(member.indices(order))
                tensor.copy_(tensor.index_select(member.dim, index.to(tensor.device)))


def inverse(order: Sequence[int]) -> tuple[int, ...]:
    """The order that undoes an order."""
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def best_order(value_RC: Tensor) -> tuple[int, ...]:
    """An order of the columns in which the two best of every four keep more, by greedy swaps from the present order.

    With T1 >= T2 the best two of a stripe without its column i, the stripe keeps sum_r T1 + max(T2, x_j) when column j
    stands there instead of i. The sum over max(a, b) = (a + b + |a - b|) / 2 is a matrix of L1 distances, so that the
    gain of all swaps is known at once; swaps of different stripes do not interfere and are made together.

    Args:
        value_RC: what there is to keep, R rows and C columns; a rest of C over four stays where it is.

    Returns:
        Which column stands at each place; nothing is lost against the present order.
    """
    x = value_RC[:, : value_RC.shape[1] // GROUP * GROUP].to(torch.float64).clone()
    order = list(range(value_RC.shape[1]))
    stripes = x.shape[1] // GROUP
    if stripes < 2 or not len(x):
        return tuple(order)
    least = LEAST_GAIN * float(x.abs().sum())
    while swaps := _best_swaps(x, least):
        for i, j in swaps:
            x[:, [i, j]] = x[:, [j, i]]
            order[i], order[j] = order[j], order[i]
    return tuple(order)


def _best_swaps(x_RC: Tensor, least: float) -> list[tuple[int, int]]:
    """Pairs of columns of different stripes whose swap gains more than `least`, each stripe in one of them at most."""
    rows, columns = x_RC.shape
    stripes = columns // GROUP
    ranked = x_RC.view(rows, stripes, GROUP).sort(dim=2, descending=True, stable=True)
    rank = ranked.indices.argsort(dim=2)
    first, second, third = (ranked.values[..., k : k + 1] for k in range(3))
    best = torch.where(rank == 0, second, first).flatten(1)  # of the other three columns of the stripe
    next_best = torch.where(rank <= 1, third, second).flatten(1)
    kept_S = (first + second).sum((0, 2))
    distance = torch.cdist(next_best.T.contiguous(), x_RC.T.contiguous(), p=1.0)
    taking = (next_best.sum(0)[:, None] + x_RC.sum(0)[None] + distance) / 2 + best.sum(0)[:, None]
    change = taking - kept_S.repeat_interleave(GROUP)[:, None]
    gain = (change + change.T).view(stripes, GROUP, stripes, GROUP).permute(0, 2, 1, 3).flatten(2)
    most, where = gain.max(dim=2)
    most[torch.ones_like(most, dtype=torch.bool).tril()] = 0.0  # each pair once, and none within a stripe
    swaps, taken = [], set[int]()
    candidates = (most.flatten() > least).nonzero().flatten()
    for flat in candidates[most.flatten()[candidates].argsort(descending=True, stable=True)].tolist():
        a, b = divmod(flat, stripes)
        if not taken & {a, b}:
            taken |= {a, b}
            i, j = divmod(int(where[a, b]), GROUP)
            swaps.append((a * GROUP + i, b * GROUP + j))
    return swaps


def _order_for(group: Group, values: Mapping[str, Tensor]) -> tuple[int, ...] | None:
    """A better order for all weights that read the group, or None."""
    rows = [
        values[m.param].movedim(1, -1).flatten(0, -2)[:, m.offset : m.offset + group.width]
        for m in _readers(group, values)
        if m.stride == 1 and m.offset % GROUP == 0  # else its stripes are not stripes of the group
    ]
    if not rows:
        return None
    order = best_order(torch.cat(rows))
    return order if order != tuple(range(group.width)) else None


def _readers(group: Group, values: Mapping[str, Tensor]) -> list[Member]:
    """The weights that will carry the pattern along this group's channels."""
    return [member for member in group.members if member.dim == 1 and member.param in values]


def kept_2to4(value: Tensor) -> float:
    """Sum over the entries that the best 2:4 mask keeps."""
    return float(value.detach().double()[top_2to4(value)].sum())


__all__ = [
    "Permutation",
    "best_order",
    "inverse",
    "kept_2to4",
    "narrowed",
    "permutable",
    "permute_2to4",
    "permute_tensors",
    "tensors_of",
]
