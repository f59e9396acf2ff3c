"""From products theta*g of single weights to one number a channel of a coupled group.

Three aggregations. Write p = theta*g for the product of a weight with a gradient (or with a difference of gradients):

* `gate`: |derivative of the loss by a multiplicative gate on the channel|. After a norm with affine parameters it is
  `gamma*g_gamma + beta*g_beta`; without a norm it is the producer's `sum(w*g) + b*g_b`. Where a channel is made in
  several places that are added (residual streams, FPN), they share the gate and their derivatives add.
* `abs`: the sum of |p| over the producers' and norms' weights of the channel.
* `literal`: |sum of p| over the producers' weights: the reading of the paper that takes a channel as one vector. It is
  identically zero in front of a BatchNorm in training mode (the loss does not feel the filter's scale); gradients are
  therefore taken in evaluation mode.

What consumers read a channel with is never scored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from fusepress.pipeline.errors import StageError
from fusepress.pipeline.graph.plan import Group, Member

Aggregation = Literal["gate", "abs", "literal"]
Product = Callable[[str], Tensor]  # parameter name -> theta*g, of the parameter's shape


class Scorer(Protocol):
    """Turns products theta*g into non-negative scores by key (a parameter or a group)."""

    @property
    def asks_once(self) -> bool:
        """Whether the scores of all keys take the product of every parameter once, and not more often."""

    @property
    def branch_of(self) -> Mapping[str, str]:
        """Key -> branch, in a fixed order."""

    def scores(self, product: Product, keys: Iterable[str]) -> dict[str, Tensor]:
        """Scores of the given keys."""


@dataclass(frozen=True, slots=True)
class WeightScorer:
    """|theta*g| of every single weight.

    Attributes:
        branch_of: parameter name -> branch.
    """

    branch_of: Mapping[str, str]
    asks_once: ClassVar[bool] = True

    def scores(self, product: Product, keys: Iterable[str]) -> dict[str, Tensor]:
        """Absolute products, each of its parameter's shape."""
        return {key: product(key).abs_() for key in keys}


class ChannelScorer:
    """One number a channel of every coupled group; vectors of shape (width,), float64.

    Args:
        model: the network that the groups belong to.
        groups: its coupled groups.
        aggregation: see the module's text.

    Raises:
        StageError: a group has members that the model lacks, or nothing that can be scored.
    """

    asks_once: ClassVar[bool] = False  # groups may share a parameter

    def __init__(self, model: nn.Module, groups: Sequence[Group], aggregation: Aggregation) -> None:
        self.branch_of: dict[str, str] = {group.id: group.branch for group in groups}
        self._aggregation = aggregation
        self._groups = {group.id: group for group in groups}
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        order = {name: index for index, name in enumerate(names)}
        self._scored: dict[str, list[Member]] = {}
        for group in groups:
            members = sorted((m for m in group.members if m.param in order), key=lambda m: (order[m.param], m.offset))
            chosen = self._chosen(model, group, members)
            if not chosen:
                raise StageError(
                    f"expected producer weights to score; got none of {[m.param for m in group.members]} in the model "
                    f"at group {group.id}; find the groups of this very model"
                )
            self._scored[group.id] = chosen

    @property
    def parameters(self) -> frozenset[str]:
        """Names of all parameters whose products count."""
        return frozenset(member.param for members in self._scored.values() for member in members)

    def _chosen(self, model: nn.Module, group: Group, members: Sequence[Member]) -> list[Member]:
        if self._aggregation == "gate":
            return gate_members(model, members)
        roles = ("producer",) if self._aggregation == "literal" else ("producer", "norm")
        return [member for member in members if member.role in roles]

    def scores(self, product: Product, keys: Iterable[str]) -> dict[str, Tensor]:
        """Non-negative channel scores of the given groups."""
        absolute = self._aggregation == "abs"
        return {key: self._sum(key, product, absolute=absolute).abs_() for key in keys}

    def signed(self, product: Product, key: str) -> Tensor:
        """The plain sum over the scored members of a group, with its sign (the gate's derivative)."""
        return self._sum(key, product, absolute=False)

    def _sum(self, key: str, product: Product, *, absolute: bool) -> Tensor:
        group = self._groups[key]
        parts = []
        for member in self._scored[key]:
            rows = channel_rows(product(member.param), member, group.width)
            parts.append((rows.abs() if absolute else rows).sum(dim=1, dtype=torch.float64))
        return torch.stack(parts).sum(dim=0)


def channel_rows(tensor: Tensor, member: Member, width: int) -> Tensor:
    """The part of a parameter that belongs to a group, one row a channel.

    Args:
        tensor: the parameter, or anything of its shape.
        member: where the group's channels lie in it.
        width: channels of the group.

    Returns:
        Shape (width, weights a channel).

    Raises:
        StageError: the group does not fit into the parameter.
    """
    length = width * member.stride
    if tensor.ndim <= member.dim or tensor.shape[member.dim] < member.offset + length:
        raise StageError(
            f"expected {member.param} to hold channels {member.offset} to {member.offset + length - 1} along dimension "
            f"{member.dim}; got shape {tuple(tensor.shape)}; find the groups of this very model"
        )
    part = tensor.narrow(member.dim, member.offset, length).movedim(member.dim, 0)
    return part.reshape(width, -1)


def gate_members(model: nn.Module, members: Sequence[Member]) -> list[Member]:
    """The members whose products add up to the derivative of a gate on the group's channel.

    Members are walked in the model's registration order. A norm closes the producer before it. A depthwise
    convolution after a norm is in series with it, so the gate behind it takes the place of the gate before it;
    norms side by side (a residual stream, readers of a pre-activation stream) all count. Producers count where no norm
    follows them. PReLU slopes are no gate.

    Roles do not tell everything: a channel that is multiplied (squeeze-excitation) counts as if it were added, and a
    norm on a stream whose addends have norms too counts beside them. Both can overstate a group.

    Args:
        model: the network.
        members: producers and norms of one group that are parameters (others are ignored), in registration order.
    """
    segments: list[tuple[str | None, list[str]]] = []  # (producer module, gates behind it)
    for module in dict.fromkeys(_module_of(m.param) for m in members if m.role != "consumer"):
        own = [m for m in members if _module_of(m.param) == module and m.role != "consumer"]
        if any(m.role == "producer" for m in own):
            segments.append((module, []))
        elif not isinstance(model.get_submodule(module), nn.PReLU):
            if not segments:
                segments.append((None, []))  # norms that are registered before any producer
            _add_gate(model, segments[-1][1], module)
    producers = [module for module, _ in segments if module is not None]
    gates = [gate for _, behind in segments for gate in behind]
    counted = set(gates)
    # with enough gates, an empty segment only means that the norms are registered after their producers
    if len(gates) < len(producers):
        counted |= {module for module, behind in segments if module is not None and not behind}
    return [m for m in members if m.role != "consumer" and _module_of(m.param) in counted]


def _add_gate(model: nn.Module, gates: list[str], module: str) -> None:
    """Append a norm or depthwise module; what is in series with it before gives way."""
    if gates and (_is_depthwise(model, module) or _is_depthwise(model, gates[-1])):
        gates.pop()
    gates.append(module)


def _is_depthwise(model: nn.Module, module: str) -> bool:
    weight = getattr(model.get_submodule(module), "weight", None)
    return isinstance(weight, Tensor) and weight.ndim > 1


def _module_of(param: str) -> str:
    return param.rpartition(".")[0]
