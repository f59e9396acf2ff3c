"""The places where channels enter and leave a model's layers, and how linked places become coupled groups.

A port is one channel axis of one layer: what a convolution makes, what it reads, what a norm works on. The finders
(`dependence.py` by numbers, `trace.py` by torch-pruning) say which index of which port is the same channel; `assemble`
turns these links into groups of affine members.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from fusepress.pipeline.graph.plan import FUSION, Group, Member, Role

Kind = Literal["dense", "embedding", "depthwise", "grouped", "norm"]
Slot = tuple[str, int]  # port name, index

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
MAX_RUNS = 8  # more affine pieces than this is a shuffle, not a concatenation
MAX_MEMBERS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One tensor dimension of a port; every index of the port is `rows` rows of it."""

    param: str
    dim: int
    rows: int = 1


@dataclass(slots=True, kw_only=True)
class Port:
    """One channel axis of one layer.

    Attributes:
        name: "out:MODULE", "in:MODULE", "norm:MODULE" or "tensor:NAME:DIM".
        module: path of the layer.
        size: number of channels.
        axes: tensor dimensions that follow it.
        role: what the layer does with the channels.
        parts: equal parts that must stay equal (GroupNorm).
        frozen: why its channels cannot be removed.
    """

    name: str
    module: str
    size: int
    axes: tuple[Axis, ...]
    role: Role
    parts: int = 1
    frozen: str | None = None


def kind_of(module: nn.Module) -> Kind | None:
    """How channels pass through a standard layer; None for containers and everything that is not known."""
    weight = module._parameters.get("weight")
    if isinstance(module, BATCH_NORMS):
        return "norm"
    if isinstance(module, nn.LayerNorm):
        return "norm" if len(module.normalized_shape) == 1 else None
    if isinstance(module, nn.GroupNorm):
        return "norm"
    if weight is None:
        return None
    if isinstance(module, nn.PReLU):
        return "norm" if module.num_parameters > 1 else None
    if isinstance(module, CONVS + TRANSPOSED):
        if module.groups == 1:
            return "dense"
        return "depthwise" if module.groups == module.in_channels else "grouped"
    if isinstance(module, nn.Linear):
        return "dense"
    return "embedding" if isinstance(module, nn.Embedding) else None


def channel_dim(module: nn.Module, x: Tensor) -> int:
    """Which dimension of a layer's input or output holds the channels."""
    if isinstance(module, CONVS + TRANSPOSED):
        return x.ndim - 1 - len(module.kernel_size)
    if isinstance(module, (nn.Linear, nn.Embedding, nn.LayerNorm)):
        return x.ndim - 1
    return min(1, x.ndim - 1)


def layer_ports(name: str, module: nn.Module, kind: Kind) -> list[Port]:
    """Ports of one standard layer."""
    if kind == "norm":
        return [_norm_port(name, module)]
    weight = module._parameters["weight"]
    assert weight is not None
    w = f"{name}.weight"
    bias = [f"{name}.bias"] if module._parameters.get("bias") is not None else []
    transposed = isinstance(module, TRANSPOSED)
    if kind == "depthwise":
        fan = weight.shape[1] if transposed else weight.shape[0] // module.groups  # type: ignore[operator]
        axes = [Axis(param=w, dim=0, rows=1 if transposed else int(fan))]
        axes += [Axis(param=b, dim=0, rows=int(fan)) for b in bias]
        return [_port(f"norm:{name}", name, int(module.groups), axes, "norm")]  # type: ignore[arg-type]
    out_dim = 1 if transposed or kind == "embedding" else 0
    groups = int(getattr(module, "groups", 1))
    size = int(weight.shape[out_dim]) * (groups if transposed else 1)
    out_axes = [Axis(param=w, dim=out_dim), *(Axis(param=b, dim=0) for b in bias)]
    made = [_port(f"out:{name}", name, size, out_axes, "producer")]
    if kind != "embedding":
        read = int(weight.shape[1 - out_dim]) * (1 if transposed else groups)
        made.append(_port(f"in:{name}", name, read, [Axis(param=w, dim=1 - out_dim)], "consumer"))
    if kind == "grouped":
        for port in made:
            port.frozen = f"{name} is a grouped convolution ({groups} groups)"
    return made


def _norm_port(name: str, module: nn.Module) -> Port:
    tensors = {**module._parameters, **module._buffers}
    held = ("weight", "bias", "running_mean", "running_var")
    axes = [Axis(param=f"{name}.{key}", dim=0) for key in held if tensors.get(key) is not None]
    sizes = ("num_features", "num_channels", "num_parameters")
    size = next((int(getattr(module, key)) for key in sizes if hasattr(module, key)), 0)
    if isinstance(module, nn.LayerNorm):
        size = module.normalized_shape[0]
    port = _port(f"norm:{name}", name, size, axes, "norm")
    port.parts = module.num_groups if isinstance(module, nn.GroupNorm) else 1
    return port


def _port(name: str, module: str, size: int, axes: Iterable[Axis], role: Role) -> Port:
    return Port(name=name, module=module, size=size, axes=tuple(axes), role=role)


def tensor_ports(name: str, tensor: Tensor) -> list[Port]:
    """Ports of a parameter or buffer that no standard layer owns (a layer scale, a position embedding)."""
    module = name.rpartition(".")[0]
    return [
        _port(f"tensor:{name}:{dim}", module, int(size), [Axis(param=name, dim=dim)], "norm")
        for dim, size in enumerate(tensor.shape)
        if size > 1
    ]


@dataclass(slots=True)
class Links:
    """Which slots are the same channel (union-find), and which slots cannot be removed and why."""

    frozen: dict[Slot, str] = field(default_factory=dict)
    _parent: dict[Slot, Slot] = field(default_factory=dict)

    def root(self, slot: Slot) -> Slot:
        """Representative of a slot's component."""
        parent = self._parent.setdefault(slot, slot)
        while parent != slot:
            above = self._parent[parent]
            self._parent[slot] = above
            slot, parent = parent, above
        return slot

    def join(self, a: Slot, b: Slot) -> None:
        """Slots a and b are the same channel."""
        first, second = sorted((self.root(a), self.root(b)))
        self._parent[second] = first

    def freeze(self, slots: Iterable[Slot], reason: str) -> None:
        """The channels of these slots stay; the first reason is kept."""
        for slot in slots:
            self.root(slot)
            self.frozen.setdefault(slot, reason)

    def freeze_port(self, port: Port, reason: str) -> None:
        """All channels of a port stay."""
        self.freeze(((port.name, i) for i in range(port.size)), reason)

    def components(self) -> Iterator[list[Slot]]:
        """Sorted slots of every component, in sorted order."""
        found: dict[Slot, list[Slot]] = defaultdict(list)
        for slot in sorted(self._parent):
            found[self.root(slot)].append(slot)
        yield from found.values()


Atom = dict[str, list[int]]  # port name -> sorted indices of one removable channel


def assemble(
    ports: dict[str, Port], links: Links, branches: dict[str, list[str]]
) -> tuple[list[Group], dict[str, str]]:
    """Groups of the linked channels, and for each producer module why (some of) its channels are in none.

    Args:
        ports: every port by name, in model order.
        links: what the finder saw.
        branches: modality -> module paths.
    """
    order = {name: position for position, name in enumerate(ports)}
    buckets: dict[tuple[tuple[str, int], ...], list[Atom]] = defaultdict(list)
    reasons: dict[str, str] = {}
    for slots in links.components():
        made = [ports[name].module for name, _ in slots if name.startswith("out:")]
        if not made:
            continue
        why = next((links.frozen[slot] for slot in slots if slot in links.frozen), None)
        if why is not None:
            for module in made:
                reasons.setdefault(module, why)
            continue
        atom: Atom = defaultdict(list)
        for name, index in slots:
            atom[name].append(index)
        signature = tuple(sorted(((name, len(found)) for name, found in atom.items()), key=lambda s: order[s[0]]))
        buckets[signature].append(dict(atom))
    groups = []
    for signature, atoms in buckets.items():
        names = [name for name, _ in signature]
        built, why = _bucket_groups([ports[name] for name in names], atoms, branches)
        groups += built
        if why is not None:
            for name in names:
                if name.startswith("out:"):
                    reasons.setdefault(ports[name].module, why)
    groups.sort(key=lambda group: (min(order[f"out:{p.rpartition('.')[0]}"] for p in group.producers), _start(group)))
    return groups, reasons


def _start(group: Group) -> int:
    return min(member.offset for member in group.members if member.role == "producer")


def _bucket_groups(
    ports: list[Port], atoms: list[Atom], branches: dict[str, list[str]]
) -> tuple[list[Group], str | None]:
    first = next(port.name for port in ports if port.role == "producer")
    atoms = sorted(atoms, key=lambda atom: atom[first])
    runs = _affine_runs(atoms)
    if len(atoms) < 2:
        return [], "its channels depend on each other"
    if len(runs) > MAX_RUNS:
        return [], "its channels are shuffled on the way to their readers"
    groups = [_group(ports, run, branches) for run in runs if len(run) > 1]
    return [g for g in groups if g is not None], None if all(groups) else "its channels are spread over too many places"


def _affine_runs(atoms: list[Atom]) -> list[list[Atom]]:
    runs: list[list[Atom]] = [[atoms[0]]]
    step: list[int] | None = None
    for before, after in pairwise(atoms):
        advance = _advance(before, after)
        if advance is not None and (step is None or step == advance):
            runs[-1].append(after)
            step = advance
        else:
            runs.append([after])
            step = None
    return runs


def _pieces(indices: list[int]) -> list[tuple[int, int]]:
    """Contiguous pieces (start, length) of sorted indices."""
    pieces: list[tuple[int, int]] = []
    for index in indices:
        if pieces and index == pieces[-1][0] + pieces[-1][1]:
            pieces[-1] = (pieces[-1][0], pieces[-1][1] + 1)
        else:
            pieces.append((index, 1))
    return pieces


def _split(indices: list[int], step: int) -> list[tuple[int, int]]:
    """Pieces (start, length) that advance by their own length from channel to channel."""
    pieces = _pieces(indices)
    if all(length == step for _, length in pieces):
        return pieces
    return [(start + k, 1) for start, length in pieces for k in range(length)]


def _advance(before: Atom, after: Atom) -> list[int] | None:
    steps = []
    for name, old in before.items():
        new = after[name]
        moved = {b - a for a, b in zip(old, new, strict=True)}
        if len(moved) != 1:
            return None
        step = moved.pop()
        if step < 1 or any(length != step for _, length in _split(old, step)):
            return None
        steps.append(step)
    return steps


def _group(ports: list[Port], atoms: list[Atom], branches: dict[str, list[str]]) -> Group | None:
    members: list[Member] = []
    width = len(atoms)
    for port in ports:
        here, there = atoms[0][port.name], atoms[1][port.name]
        pieces = _split(here, there[0] - here[0])
        if len(pieces) > MAX_MEMBERS:
            return None
        members += [
            Member(param=axis.param, dim=axis.dim, offset=start * axis.rows, stride=length * axis.rows, role=port.role)
            for axis in port.axes
            for start, length in pieces
        ]
    makers = [port for port in ports if port.role == "producer"]
    producers = tuple(sorted({port.axes[0].param for port in makers}))
    parts = math.lcm(*(port.parts for port in ports))
    if width % parts or any(port.parts > 1 and len(atoms[0][port.name]) * width != port.size for port in ports):
        return None
    return Group(
        id="+".join(_producer_id(port, atoms) for port in sorted(makers, key=lambda port: port.axes[0].param)),
        branch=branch_of([port.module for port in makers], branches),
        width=width,
        multiple=parts,
        members=tuple(members),
        producers=producers,
    )


def _producer_id(port: Port, atoms: list[Atom]) -> str:
    used = sorted(index for atom in atoms for index in atom[port.name])
    name = port.axes[0].param
    return name if len(used) == port.size else f"{name}[{used[0]}:{used[-1] + 1}]"


def inside(module: str, path: str) -> bool:
    """Whether a module path lies at or under another."""
    return path == "" or module == path or module.startswith(f"{path}.")


def branch_of(modules: Iterable[str], branches: dict[str, list[str]]) -> str:
    """The modality whose module paths contain all of these modules, else fusion."""
    found = {
        next((branch for branch, paths in branches.items() if any(inside(module, path) for path in paths)), FUSION)
        for module in modules
    }
    return found.pop() if len(found) == 1 else FUSION
