"""Coupled channel groups and the prune plan as plain data: no torch, no tracer, no pickle.

A plan says which channels of which coupled group stay. Applying it (`apply.py`) is pure indexing, so a plan and a
weights file are all that a user's own class needs: `fusepress.load(model, "plan.json", "weights.safetensors")`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

from fusepress.pipeline.errors import CheckpointError, StageError

SCHEMA = 1
FUSION = "fusion"
Role = Literal["producer", "norm", "consumer"]
SwapKind = Literal["zeros", "pass", "constant", "filled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One tensor that a group's channels run through.

    Channel c of the group is indices `offset + c*stride` to `offset + (c+1)*stride - 1` of `param` along `dim`.

    Attributes:
        param: full name of a parameter or buffer.
        dim: dimension of it.
        offset: index where the group begins (concatenation shifts it).
        stride: indices a channel (H*W where features are flattened into a Linear).
        role: producer (makes the channel), norm (works on it alone: affine, buffers, depthwise), consumer (reads it).
    """

    param: str
    dim: int
    offset: int = 0
    stride: int = 1
    role: Role = "producer"

    def indices(self, channels: Sequence[int]) -> list[int]:
        """Indices along `dim` that belong to `channels` of the group."""
        return [self.offset + c * self.stride + k for c in channels for k in range(self.stride)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Channels that can only be removed together.

    Attributes:
        id: sorted producer parameter names joined by "+"; "[a:b]" follows where only a part of them is meant.
        branch: modality of its producers; "fusion" where they are of several or of none.
        width: dense number of channels.
        multiple: the kept count is a multiple of it, taken in equal numbers from so many equal parts (GroupNorm).
        members: every tensor it runs through.
        producers: weight parameters that make the channels.
    """

    id: str
    branch: str
    width: int
    multiple: int = 1
    members: tuple[Member, ...]
    producers: tuple[str, ...]

    def by_role(self, role: Role) -> tuple[Member, ...]:
        """Members of one role."""
        return tuple(member for member in self.members if member.role == role)

    @property
    def span(self) -> int:
        """How many channels of the layers one of the group's is, at least: the head size of an attention head, else 1.

        Every tensor that the group runs through loses a multiple of it with each of the group's channels.
        """
        taken: dict[tuple[str, int], int] = {}
        for member in self.members:
            taken[member.param, member.dim] = taken.get((member.param, member.dim), 0) + member.stride
        return max(1, math.gcd(*taken.values()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    """A module whose output channels cannot be removed, and why."""

    module: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Swap:
    """What stands in for one layer when a whole block goes (`standins.py`).

    Attributes:
        module: path of the layer.
        kind: "zeros" (zeros of the layer's output shape), "pass" (its input), "constant" (one number a channel, to be
            broadcast), "filled" (the same at the layer's full output shape).
        source: for a norm whose input was the constant of another layer: that layer. The norm's constant then is its
            evaluation-mode output, and the source's is zero.
    """

    module: str
    kind: SwapKind
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A group that may have width 0, because everything its readers make is only ever added to other signals.

    Attributes:
        id: the group.
        swaps: the layers that go with it, and what stands in for them.
        dead: other groups that nothing reads any more.
    """

    id: str
    swaps: tuple[Swap, ...]
    dead: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupGraph:
    """All coupled groups of a model.

    Attributes:
        groups: in order of their first producer in the model.
        frozen: modules that cannot be pruned and why, in model order.
        arch_sha256: the architecture that they belong to.
        notes: what the two finders (tracing and probing) say of each other.
        branches: modality -> module paths, as given.
        blocks: groups that may have width 0; all of them may have it at once.
    """

    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    arch_sha256: str
    notes: tuple[str, ...] = ()
    branches: dict[str, tuple[str, ...]] = field(default_factory=dict)
    blocks: tuple[Block, ...] = ()

    def __getitem__(self, group_id: str) -> Group:
        for group in self.groups:
            if group.id == group_id:
                return group
        raise KeyError(group_id)

    @property
    def widths(self) -> dict[str, int]:
        """Dense width of every group."""
        return {group.id: group.width for group in self.groups}

    @property
    def removable(self) -> tuple[str, ...]:
        """Ids of the groups that may have width 0."""
        return tuple(block.id for block in self.blocks)

    def plan(self, kept: Mapping[str, Sequence[int]]) -> PrunePlan:
        """A plan that keeps these channels; groups left out, or kept whole, are not in it.

        No kept channels at all remove the block of a removable group, and the groups that then are dead.

        Raises:
            StageError: an unknown group, no channels of a group that is not removable, or channels out of range,
                repeated, or not equally from the group's parts.
        """
        unknown = sorted(set(kept) - set(self.widths))
        if unknown:
            raise StageError(f"expected groups of this model; got {unknown[0]!r}; it has {len(self.groups)} groups")
        planned = []
        blocks = [block for block in self.blocks if block.id in kept and not len(kept[block.id])]
        removed = {group for block in blocks for group in (block.id, *block.dead)}
        for group in self.groups:
            if group.id in removed:
                planned.append(_removed_group(group))
                continue
            channels = sorted(kept.get(group.id, range(group.width)))
            _check_kept(group.id, channels, group.width, StageError)
            if len(channels) % group.multiple:
                raise StageError(
                    f"expected a multiple of {group.multiple} kept channels; got {len(channels)} at {group.id}"
                )
            part = group.width // group.multiple
            if len({sum(c // part == k for c in channels) for k in range(group.multiple)}) > 1:
                raise StageError(
                    f"expected equal numbers from each of the {group.multiple} parts; got {channels} at {group.id}"
                )
            if len(channels) < group.width:
                planned.append(
                    PlannedGroup(
                        id=group.id,
                        branch=group.branch,
                        width=group.width,
                        kept=tuple(channels),
                        members=group.members,
                    )
                )
        return PrunePlan(
            arch_sha256=self.arch_sha256,
            groups=tuple(planned),
            removed_blocks=tuple(group.id for group in self.groups if group.id in removed),
            swaps=_merged(blocks),
        )


def _removed_group(group: Group) -> PlannedGroup:
    part = group.width // group.multiple
    return PlannedGroup(
        id=group.id,
        branch=group.branch,
        width=group.width,
        kept=(),
        members=group.members,
        stand_in=tuple(range(0, group.width, part)),
    )


def _merged(blocks: Sequence[Block]) -> tuple[Swap, ...]:
    """The swaps of several blocks: a layer that is dead in one of them is dead, whatever it is to the others."""
    merged: dict[str, Swap] = {}
    for block in blocks:
        for swap in block.swaps:
            if swap.kind in ("zeros", "pass") or swap.module not in merged:
                merged[swap.module] = swap
    return tuple(merged[module] for module in sorted(merged))


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedGroup:
    """One group of a plan: which of its `width` channels stay (sorted).

    Attributes:
        kept: none where the group goes with a removed block.
        stand_in: the fewest channels that the user's code runs with. Where none are kept, they are the size of what
            flows, as zeros, through the operations between the layers that went.
    """

    id: str
    branch: str
    width: int
    kept: tuple[int, ...]
    members: tuple[Member, ...]
    stand_in: tuple[int, ...] = ()

    @property
    def removed(self) -> tuple[int, ...]:
        """Channels that go."""
        kept = set(self.kept)
        return tuple(c for c in range(self.width) if c not in kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunePlan:
    """What stays of a dense model (schema 1).

    Attributes:
        arch_sha256: the dense architecture that it applies to.
        groups: only groups that lose channels.
        removed_blocks: the groups without kept channels, whose layers are gone.
        swaps: what stands in for those layers.
    """

    arch_sha256: str
    groups: tuple[PlannedGroup, ...] = ()
    removed_blocks: tuple[str, ...] = ()
    swaps: tuple[Swap, ...] = ()
    schema: int = field(default=SCHEMA)

    def to_json(self) -> str:
        """The plan as JSON: sorted by nothing but the model's own order, so equal plans are equal bytes."""
        groups = [
            {
                "id": group.id,
                "branch": group.branch,
                "width": group.width,
                "kept": list(group.kept),
                "members": [
                    {"param": m.param, "dim": m.dim, "offset": m.offset, "stride": m.stride, "role": m.role}
                    for m in group.members
                ],
            }
            | ({"stand_in": list(group.stand_in)} if group.stand_in else {})
            for group in self.groups
        ]
        plan: dict[str, Any] = {"schema": self.schema, "arch_sha256": self.arch_sha256, "groups": groups}
        plan["removed_blocks"] = list(self.removed_blocks)
        if self.swaps:
            plan["swaps"] = [{"module": s.module, "kind": s.kind, "source": s.source} for s in self.swaps]
        return json.dumps(plan, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: str = "the plan") -> PrunePlan:
        """Read a plan and check it.

        Raises:
            CheckpointError: not JSON, another schema, a missing key, kept channels unsorted, repeated, out of range or
                none in a group that is no removed block, or removed blocks that do not fit the groups.
        """
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(
                f"expected a prune plan in JSON; got {error} at {where}; write the plan again"
            ) from error
        if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
            got = raw.get("schema") if isinstance(raw, dict) else type(raw).__name__
            raise CheckpointError(
                f"expected a prune plan of schema {SCHEMA}; got {got!r} at {where}; write it with this version"
            )
        blocks = tuple(_take(raw, "removed_blocks", list, where)) if "removed_blocks" in raw else ()
        groups = tuple(
            _read_group(group, f"{where}, groups[{i}]", blocks)
            for i, group in enumerate(_take(raw, "groups", list, where))
        )
        swaps = _take(raw, "swaps", list, where) if "swaps" in raw else []
        empty = [group.id for group in groups if not group.kept]  # no set: a damaged plan may name a block by anything
        for block in blocks:
            if block not in empty:
                raise CheckpointError(
                    f"expected the removed block {block!r} among the groups without kept channels; got it not there "
                    f"at {where}; the plan is damaged"
                )
        if bool(blocks) != bool(swaps):
            raise CheckpointError(
                f"expected `swaps` where blocks are removed, and only there; got {len(blocks)} removed blocks and "
                f"{len(swaps)} swaps at {where}; the plan is damaged"
            )
        return cls(
            arch_sha256=_take(raw, "arch_sha256", str, where),
            groups=groups,
            removed_blocks=blocks,
            swaps=tuple(_read_swap(swap, f"{where}, swaps[{i}]") for i, swap in enumerate(swaps)),
        )

    @classmethod
    def read(cls, path: Path) -> PrunePlan:
        """Read a plan file.

        Raises:
            CheckpointError: the file is missing, unreadable or damaged.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"expected a prune plan file; got {type(error).__name__} at {path}; correct the path"
            ) from error
        return cls.from_json(text, where=str(path))


def _read_group(raw: Any, where: str, blocks: Sequence[str]) -> PlannedGroup:
    width = _take(raw, "width", int, where)
    kept = _take(raw, "kept", list, where)
    group_id = _take(raw, "id", str, where)
    stand_in = []
    if kept or group_id not in blocks:
        _check_kept(f"{group_id} ({where})", kept, width, CheckpointError)
    else:
        stand_in = _take(raw, "stand_in", list, where)
        _check_kept(f"{group_id} ({where}.stand_in)", stand_in, width, CheckpointError)
    members = tuple(
        _read_member(member, f"{where}.members[{i}]") for i, member in enumerate(_take(raw, "members", list, where))
    )
    return PlannedGroup(
        id=group_id,
        branch=_take(raw, "branch", str, where),
        width=width,
        kept=tuple(kept),
        members=members,
        stand_in=tuple(stand_in),
    )


def _read_swap(raw: Any, where: str) -> Swap:
    kind = _take(raw, "kind", str, where)
    if kind not in get_args(SwapKind):
        raise CheckpointError(
            f"expected a kind of {', '.join(get_args(SwapKind))}; got {kind!r} at {where}; mend the plan"
        )
    return Swap(module=_take(raw, "module", str, where), kind=kind, source=_take(raw, "source", str, where))


def _read_member(raw: Any, where: str) -> Member:
    numbers = {key: _take(raw, key, int, where) for key in ("dim", "offset", "stride")}
    if numbers["dim"] < 0 or numbers["offset"] < 0 or numbers["stride"] < 1:
        raise CheckpointError(f"expected dim >= 0, offset >= 0, stride >= 1; got {numbers} at {where}; mend the plan")
    role = raw.get("role", "producer")
    if role not in get_args(Role):
        raise CheckpointError(f"expected a role of {', '.join(get_args(Role))}; got {role!r} at {where}; mend the plan")
    return Member(param=_take(raw, "param", str, where), role=role, **numbers)


def _take(raw: Any, key: str, kind: type[Any], where: str) -> Any:
    value = raw.get(key) if isinstance(raw, dict) else None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise CheckpointError(
            f"expected `{key}` ({kind.__name__}); got {type(value).__name__} at {where}; the plan is damaged"
        )
    return value


def _check_kept(where: str, kept: Sequence[Any], width: int, error: type[CheckpointError | StageError]) -> None:
    if not kept:
        raise error(f"expected at least one kept channel; got none at {where}; keep some channels")
    if any(not isinstance(c, int) or isinstance(c, bool) for c in kept):
        raise error(f"expected channel numbers; got something else at {where}; the plan is damaged")
    if any(b <= a for a, b in pairwise(kept)):
        raise error(f"expected kept channels sorted and unique; got them out of order at {where}; the plan is damaged")
    if kept[0] < 0 or kept[-1] >= width:
        bad = kept[0] if kept[0] < 0 else kept[-1]
        raise error(f"expected kept channels within 0..{width - 1}; got {bad} at {where}; the plan is damaged")
