"""What a model costs as a function of its group widths: exact, vectorised, and without running it again.

Every layer's multiply-accumulates are positions x elements of its weight, and every tensor's size along a dimension is
linear in the widths of the groups that run through it. So one pass of the dense model fixes the costs at all widths.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from fusepress.pipeline.graph.plan import FUSION, GroupGraph, Member

if TYPE_CHECKING:
    from torch import Tensor, nn

Unit = Literal["macs", "params"]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A stretch of a layer's channels that one group drives: `count` indices from `offset` at the dense width."""

    group: str
    offset: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One row of the layer table.

    Attributes:
        module: its path.
        kind: class name.
        branch: modality, else fusion.
        macs: dense multiply-accumulates for one sample.
        params: dense parameters.
        out_shape: shape of its (last) output for one sample.
        outputs: groups along its output channels.
        inputs: groups along its input channels.
    """

    module: str
    kind: str
    branch: str
    macs: int
    params: int
    out_shape: tuple[int, ...]
    outputs: tuple[Segment, ...]
    inputs: tuple[Segment, ...]


@dataclass(slots=True, kw_only=True)
class CostTable:
    """Sizes of P tensors over G group widths: size = rest * prod_k(fixed[:, k] + coef[:, k] @ widths).

    Attributes:
        ids: the G groups.
        dense: their dense widths, (G,).
        rest: product of the dimensions that no group runs through, (P,).
        fixed: part of each touched dimension that no group drives, (P, K); dimensions that are not there are 1.
        coef: indices that one channel of a group takes, (P, K, G).
        positions: how often each element of a tensor is multiplied for one sample; 0 for norms and biases, (P,).
        branches: modality of each tensor, P names.
        constant_macs: what is multiplied without weights (attention, matmul), at its dense size.
        gone: tensors that are not there where a group has width 0, for its block is removed, (P, G); None is never.
        dead: groups (second) that are removed with a block (first), (G, G).
        least: channels that stand in for a removed group in tensors which stay, (G,).
    """

    ids: tuple[str, ...]
    dense: Ints
    rest: Ints
    fixed: Ints
    coef: Ints
    positions: Ints
    branches: tuple[str, ...]
    constant_macs: int = 0
    gone: npt.NDArray[np.bool_] | None = None
    dead: npt.NDArray[np.bool_] | None = None
    least: Ints | None = None
    _column: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._column = {group: column for column, group in enumerate(self.ids)}

    def sizes(self, widths: Ints) -> Ints:
        """Elements of every tensor: (G,) -> (P,), or (B, G) -> (B, P)."""
        there = self._there(widths)
        if there is not None:
            widths, whole = there
            return self._sizes(widths) * whole
        return self._sizes(widths)

    def _there(self, widths: Ints) -> tuple[Ints, Ints] | None:
        """Widths with stand-ins for removed groups, and 1 for every tensor that is there; None without removed ones."""
        if self.gone is None or self.dead is None or self.least is None or np.all(widths):
            return None
        removed = (np.asarray(widths) == 0) & self.gone.any(axis=0)
        if not removed.any():
            return None
        hidden = removed | (removed @ self.dead)
        stood: Ints = np.where(hidden, self.least, widths)
        whole: Ints = 1 - (removed @ self.gone.T).astype(np.int64)
        return stood, whole

    def _sizes(self, widths: Ints) -> Ints:
        p, k, g = self.coef.shape
        # in float64, which counts exactly to 2**53, for it is much faster than integer products
        grown = np.asarray(widths, dtype=np.float64) @ self.coef.reshape(p * k, g).T.astype(np.float64)
        along = self.fixed + grown.astype(np.int64).reshape(*np.shape(widths)[:-1], p, k)
        sizes: Ints = self.rest * along.prod(axis=-1)
        return sizes

    def total(self, unit: Unit, widths: Ints, branch: str | None = None) -> Ints:
        """Cost of the model (or of one branch of it): (G,) -> (), or (B, G) -> (B,)."""
        weight = self.positions if unit == "macs" else np.ones_like(self.positions)
        if branch is not None:
            weight = weight * np.array([name == branch for name in self.branches])
        constant = self.constant_macs if unit == "macs" and branch in (None, FUSION) else 0
        total: Ints = self.sizes(widths) @ weight + constant
        return total

    def vector(self, widths: Mapping[str, int] | None) -> Ints:
        """Widths by group as (G,); groups that are left out are dense.

        Raises:
            KeyError: a group that the table does not have.
        """
        vector = self.dense.copy()
        for group, width in (widths or {}).items():
            vector[self._column[group]] = width
        return vector

    def macs(self, widths: Mapping[str, int] | None = None) -> int:
        """Multiply-accumulates for one sample at these widths."""
        return int(self.total("macs", self.vector(widths)))

    def params(self, widths: Mapping[str, int] | None = None) -> int:
        """Parameters at these widths."""
        return int(self.total("params", self.vector(widths)))

    @property
    def dense_macs(self) -> int:
        """Multiply-accumulates of the dense model for one sample."""
        return self.macs()

    @property
    def dense_params(self) -> int:
        """Parameters of the dense model."""
        return self.params()

    def step_cost(self, unit: Unit, group: str, widths: Mapping[str, int], step: int) -> int:
        """What the next `step` channels of a group cost at these widths."""
        here = self.vector(widths)
        less = here.copy()
        less[self._column[group]] -= step
        return int(self.total(unit, here) - self.total(unit, less))

    def branch_totals(self, widths: Mapping[str, int] | None = None) -> dict[str, dict[str, int]]:
        """`macs` and `params` of every branch; "fusion" is everything else (and what has no weights)."""
        vector = self.vector(widths)
        names = [*dict.fromkeys([*(b for b in self.branches if b != FUSION), FUSION])]
        return {
            name: {
                "macs": int(self.total("macs", vector, name)),
                "params": int(self.total("params", vector, name)),
            }
            for name in names
        }


class CostModel(CostTable):
    """The cost table of a real model, with its layers.

    Attributes:
        layers: one row a layer with parameters, in model order.
    """

    layers: tuple[Layer, ...]

    def __init__(self, graph: GroupGraph, model: nn.Module, example_inputs: Mapping[str, Tensor]) -> None:
        """Count one pass of the dense model.

        Args:
            graph: groups of this model.
            model: the dense model; it is left as it was.
            example_inputs: inputs by name, batch first; the first sample is used.
        """
        from fusepress.pipeline.graph.ports import branch_of

        calls, constant = _count(model, example_inputs)
        rows: dict[tuple[str, int], list[tuple[int, Member]]] = {}
        for column, group in enumerate(graph.groups):
            for member in group.members:
                rows.setdefault((member.param, member.dim), []).append((column, member))
        parameters = dict(model.named_parameters())
        columns = len(graph.groups)
        axes = max([1, *(sum((name, d) in rows for d in range(p.ndim)) for name, p in parameters.items())])
        fixed = np.ones((len(parameters), axes), dtype=np.int64)
        coef = np.zeros((len(parameters), axes, columns), dtype=np.int64)
        rest = np.ones(len(parameters), dtype=np.int64)
        positions = np.zeros(len(parameters), dtype=np.int64)
        counted: dict[int, int] = {}
        for name, call in calls.items():
            weight = model.get_submodule(name)._parameters.get("weight")
            counted[id(weight)] = counted.get(id(weight), 0) + call.positions  # tied weights work in several layers
        for row, (name, parameter) in enumerate(parameters.items()):
            axis = 0
            for dim, size in enumerate(parameter.shape):
                if (name, dim) not in rows:
                    rest[row] *= size
                    continue
                fixed[row, axis] = size
                for column, member in rows[name, dim]:
                    coef[row, axis, column] += member.stride
                    fixed[row, axis] -= member.stride * graph.groups[column].width
                axis += 1
            positions[row] = counted.get(id(parameter), 0)
        gone, dead, least = _block_tables(graph, list(parameters))
        branches = {branch: list(paths) for branch, paths in graph.branches.items()}
        super().__init__(
            ids=tuple(group.id for group in graph.groups),
            dense=np.array([group.width for group in graph.groups], dtype=np.int64),
            rest=rest,
            fixed=fixed,
            coef=coef,
            positions=positions,
            branches=tuple(branch_of([name.rpartition(".")[0]], branches) for name in parameters),
            constant_macs=constant,
            gone=gone,
            dead=dead,
            least=least,
        )
        self.layers = tuple(_layers(model, graph, calls, branches))


def _block_tables(
    graph: GroupGraph, parameters: list[str]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_], Ints] | tuple[None, None, None]:
    """`gone`, `dead` and `least` of a cost table."""
    if not graph.blocks:
        return None, None, None
    column = {group.id: k for k, group in enumerate(graph.groups)}
    gone = np.zeros((len(parameters), len(column)), dtype=bool)
    dead = np.zeros((len(column), len(column)), dtype=bool)
    for block in graph.blocks:
        folded = {swap.source for swap in block.swaps}
        swaps = {swap.module: swap for swap in block.swaps}
        dead[column[block.id], [column[group] for group in block.dead]] = True
        for row, name in enumerate(parameters):
            module, _, key = name.rpartition(".")
            if module in swaps:
                constant = swaps[module].kind in ("constant", "filled") and module not in folded
                gone[row, column[block.id]] = not (constant and key == "bias")
    return gone, dead, np.array([group.multiple for group in graph.groups], dtype=np.int64)


@dataclass(slots=True)
class _Calls:
    positions: int = 0
    out_shape: tuple[int, ...] = ()


def _layers(
    model: nn.Module, graph: GroupGraph, calls: Mapping[str, _Calls], branches: dict[str, list[str]]
) -> Iterable[Layer]:
    from fusepress.pipeline.graph.ports import branch_of

    for name, module in model.named_modules():
        own = {key: p for key, p in module._parameters.items() if p is not None}
        if not own:
            continue
        call = calls.get(name, _Calls())
        weight = own.get("weight")
        made: list[Segment] = []
        read: list[Segment] = []
        for group in graph.groups:
            for member in group.members:
                if member.param == f"{name}.weight".lstrip("."):
                    segment = Segment(group=group.id, offset=member.offset, count=group.width * member.stride)
                    (read if member.role == "consumer" else made).append(segment)
        yield Layer(
            module=name,
            kind=type(module).__name__,
            branch=branch_of([name], branches),
            macs=call.positions * weight.numel() if weight is not None else 0,
            params=sum(p.numel() for p in own.values()),
            out_shape=call.out_shape,
            outputs=tuple(made),
            inputs=tuple(read),
        )


def _count(model: nn.Module, example_inputs: Mapping[str, Tensor]) -> tuple[dict[str, _Calls], int]:
    """Positions of every layer over one sample, and the multiply-accumulates that no layer accounts for."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from fusepress.pipeline.graph.ports import TRANSPOSED, kind_of

    calls: dict[str, _Calls] = {}
    hooks = []

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
            call = calls.setdefault(name, _Calls())
            call.out_shape = tuple(output.shape)
            kind = kind_of(module)
            if kind in ("norm", "embedding", None):
                return
            if isinstance(module, TRANSPOSED):
                call.positions += (inputs[0] if inputs else named["input"]).numel() // module.in_channels
            else:
                call.positions += output.numel() // int(module.get_parameter("weight").shape[0])

        return hook

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    inputs = {name: value[:1].detach().clone().to(device) for name, value in example_inputs.items()}
    training = {name: module.training for name, module in model.named_modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        for name, module in model.named_modules():
            if kind_of(module) is not None:
                hooks.append(module.register_forward_hook(hook_for(name), with_kwargs=True))
        with torch.no_grad(), torch.random.fork_rng(), FlopCounterMode(display=False) as counter:
            model(**inputs)
    finally:
        for handle in hooks:
            handle.remove()
        torch.backends.mha.set_fastpath_enabled(fast)
        for name, module in model.named_modules():
            module.training = training[name]
    sizes = {name: p.numel() for name, p in model.named_parameters(remove_duplicate=False)}
    layered = sum(call.positions * sizes.get(f"{name}.weight".lstrip("."), 0) for name, call in calls.items())
    return calls, max(0, int(counter.get_total_flops()) // 2 - layered)


def count_macs(model: nn.Module, example_inputs: Mapping[str, Tensor]) -> int:
    """Multiply-accumulates of a model as it is, for one sample: layers, and operations without weights."""
    calls, constant = _count(model, example_inputs)
    sizes = {name: p.numel() for name, p in model.named_parameters(remove_duplicate=False)}
    return constant + sum(c.positions * sizes.get(f"{name}.weight".lstrip("."), 0) for name, c in calls.items())


def count_params(model: nn.Module) -> int:
    """Parameters of a model as it is (shared ones once, buffers not)."""
    return sum(parameter.numel() for parameter in model.parameters())
