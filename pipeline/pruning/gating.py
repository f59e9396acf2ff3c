"""One coupled group at a narrower width, without surgery: its channels are gated off where they are read.

The input slices of the consumers are zero, and norms that average over channels average over the kept ones: the same
model as `graph.apply.gate_model` makes, which equals the pruned one.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fusepress.pipeline.graph.apply import masked_norm
from fusepress.pipeline.graph.plan import Group
from fusepress.pipeline.pruning.replay import Swap, Tape, Value

NORMS = {torch.ops.aten.native_layer_norm.default: 2, torch.ops.aten.native_group_norm.default: 1}  # weight's place


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """What a removal changes in the model's own tensors.

    Attributes:
        zeroed: (parameter, dimension, indices) that become zero.
        norms: module path -> channels that it averages without.
    """

    zeroed: tuple[tuple[str, int, tuple[int, ...]], ...]
    norms: Mapping[str, tuple[int, ...]]


def gate_of(model: nn.Module, group: Group, removed: Sequence[int]) -> Gate:
    """The gate that removes these channels of a group."""
    zeroed = tuple((m.param, m.dim, tuple(m.indices(removed))) for m in group.by_role("consumer"))
    norms: dict[str, set[int]] = defaultdict(set)
    if len(removed) < group.width:  # where nothing is left there is nothing to average, and nobody who reads it
        for member in group.by_role("norm"):
            path = member.param.rpartition(".")[0]
            if isinstance(model.get_submodule(path), (nn.LayerNorm, nn.GroupNorm)):
                norms[path].update(member.indices(removed))
    return Gate(zeroed=zeroed, norms={path: tuple(sorted(gone)) for path, gone in norms.items()})


def sources(tape: Tape, model: nn.Module, group: Group) -> tuple[Value, ...]:
    """Values of the tape that any removal from the group changes."""
    names = {member.param for member in group.by_role("consumer")}
    for member in group.by_role("norm"):
        if isinstance(model.get_submodule(member.param.rpartition(".")[0]), (nn.LayerNorm, nn.GroupNorm)):
            names.add(member.param)
    return tuple(sorted({(tape.names[name], 0) for name in names}))


def gated_values(tape: Tape, gate: Gate, values: Sequence[Value]) -> dict[Value, Tensor]:
    """Contents of a group's `sources` under a gate."""
    contents = {value: tape.held[value] for value in values}
    copied: set[Value] = set()
    for param, dim, indices in gate.zeroed:
        value = (tape.names[param], 0)
        if value not in copied:
            contents[value] = contents[value].clone()
            copied.add(value)
        ref = tape.origin[value]
        window = contents[value].as_strided(ref.size, ref.stride, ref.offset)
        window.index_fill_(dim, torch.tensor(indices, dtype=torch.long, device=window.device), 0)
    return contents


def swapped_norms(tape: Tape, model: nn.Module, gate: Gate) -> dict[int, Swap]:
    """Functions that stand for the norms over channels, by position on the tape."""
    swaps: dict[int, Swap] = {}
    for path, gone in gate.norms.items():
        module = model.get_submodule(path)
        assert isinstance(module, (nn.LayerNorm, nn.GroupNorm))
        memory = tape.names[f"{path}.weight"]
        forward = masked_norm(module, list(gone))
        for position, op in enumerate(tape.ops):
            place = NORMS.get(op.func)
            if place is not None and op.args[place] is not None and op.args[place].memory == memory:
                swaps[position] = _as_native(forward, op.func)
    return swaps


def _as_native(forward: Any, func: Any) -> Swap:
    def swap(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        _, mean, deviation = func(*args, **kwargs)  # statistics that only training reads, in the right shapes
        return forward(args[0]), mean, deviation

    return swap


@contextlib.contextmanager
def gated(model: nn.Module, gate: Gate) -> Iterator[None]:
    """The model itself under a gate; its tensors are bit for bit as before afterwards, whatever happens."""
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    saved = {param: tensors[param].detach().clone() for param, _, _ in gate.zeroed}
    modules = {path: model.get_submodule(path) for path in gate.norms}
    own = {path: module.__dict__.get("forward") for path, module in modules.items()}
    try:
        with torch.no_grad():
            for param, dim, indices in gate.zeroed:
                index = torch.tensor(indices, dtype=torch.long, device=tensors[param].device)
                tensors[param].index_fill_(dim, index, 0)
        for path, gone in gate.norms.items():
            modules[path].forward = masked_norm(modules[path], list(gone))  # type: ignore[arg-type]
        yield
    finally:
        with torch.no_grad():
            for param, content in saved.items():
                tensors[param].copy_(content)
        for path, module in modules.items():
            module.__dict__.pop("forward", None)
            if own[path] is not None:
                module.__dict__["forward"] = own[path]


__all__ = ["Gate", "gate_of", "gated", "gated_values", "sources", "swapped_norms"]
