"""Distortion to second order from gradients alone: one pass and a few backward passes for all groups at once.

A gate on every channel where a consumer reads it, J the derivative of a sample's outputs (each head in units of its
deviation) by the gates of one group, u the 0/1 vector of what a width removes: to first order the outputs change by
-J u, and the damage is E |J u|^2, the Gauss-Newton form of it (the gradient of the damage itself is zero at the dense
network). J is never made: for random signs v over the outputs, v'J is one backward pass, and E over v of (v'J u)^2 is
|J u|^2 (Hutchinson). Where a sample has no more outputs than there are probes, v runs over the outputs one by one, and
the form is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusepress.pipeline.graph.plan import Group, Member
from fusepress.pipeline.pruning.curves import Floats
from fusepress.pipeline.pruning.replay import Diverged, Ref, Schedule, Swap, Tape, Value, replay, schedule

aten = torch.ops.aten
INPUT_OF = {aten.convolution.default: 0, aten.mm.default: 0, aten.addmm.default: 1}
WEIGHT_OF = {aten.convolution.default: 1, aten.mm.default: 1, aten.addmm.default: 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where gates stand on the tape.

    Attributes:
        readers: positions that read a consumer's weight, by its memory.
        unknown: groups with a consumer that is read by an operation whose channels we cannot tell.
    """

    readers: Mapping[int, tuple[int, ...]]
    unknown: frozenset[str]


def find_places(tape: Tape, groups: Sequence[Group]) -> Places:
    """The operations that read the groups' consumers."""
    readers: dict[int, list[int]] = {}
    strange: set[int] = set()
    wanted = {tape.names[m.param] for group in groups for m in group.by_role("consumer")}
    for position, op in enumerate(tape.ops):
        for memory in {memory for memory, _ in op.reads} & wanted:
            place = WEIGHT_OF.get(op.func)
            if place is not None and isinstance(op.args[place], Ref) and op.args[place].memory == memory:
                readers.setdefault(memory, []).append(position)
            else:
                strange.add(memory)
    unknown = {
        group.id
        for group in groups
        for m in group.by_role("consumer")
        if tape.names[m.param] in strange or tape.names[m.param] not in readers
    }
    return Places(readers={memory: tuple(found) for memory, found in readers.items()}, unknown=frozenset(unknown))


def gate_schedule(tape: Tape, places: Places) -> Schedule:
    """What must run with gradients: everything behind the first consumers."""
    given = [(memory, 0) for memory in places.readers]
    return schedule(tape, given, tuple(dict.fromkeys(value for _, value in tape.outputs.values())))


class Gauss:
    """Collects E |J u|^2 of every group and width, batch by batch.

    Args:
        groups: with the channels that each of their widths removes, widest first, the dense one left out.
        probes: sign vectors a sample.
        seed: of the signs.
    """

    def __init__(self, groups: Sequence[tuple[Group, Sequence[Sequence[int]]]], *, probes: int, seed: int) -> None:
        self.groups = groups
        self.probes = probes
        self.seed = seed
        self.exact = True
        self._parts: dict[str, list[Floats]] = {group.id: [] for group, _ in groups}

    def add(
        self, tape: Tape, plan: Schedule, places: Places, variance: Mapping[str, float], size: int, before: int
    ) -> None:
        """Take in a batch.

        Args:
            tape: its recorded pass, with what `plan` needs.
            plan: made by `gate_schedule`.
            places: where the gates stand.
            variance: of each output.
            size: samples of the batch.
            before: samples before it.

        Raises:
            Diverged: the pass cannot be repeated.
        """
        gates: dict[int, Tensor] = {}
        swaps: dict[int, Swap] = {
            position: _gated_reader(tape.ops[position].func, INPUT_OF[tape.ops[position].func], position, size, gates)
            for found in places.readers.values()
            for position in found
        }
        given = {(memory, 0): tape.held[memory, 0] for memory in places.readers}
        with torch.enable_grad():
            made = replay(tape, plan, given, swaps)
            scaled = _scaled_outputs(tape, made, variance, size)
        if not scaled.requires_grad:
            raise Diverged("no gradient goes from the outputs to the groups")
        order = list(gates)
        count = scaled.shape[1]
        exact = count <= self.probes
        self.exact = self.exact and exact
        for group, removed in self.groups:
            self._parts[group.id].append(np.zeros((len(removed), size)))
        for probe in range(count if exact else self.probes):
            signs = _unit(scaled, probe) if exact else _signs(scaled, self.seed, before, probe)
            found = torch.autograd.grad(scaled, [gates[p] for p in order], signs, retain_graph=True, allow_unused=True)
            slopes = dict(zip(order, found, strict=True))
            weight = 1.0 if exact else 1.0 / self.probes
            self._collect(tape, places, slopes, weight)

    def _collect(self, tape: Tape, places: Places, slopes: Mapping[int, Tensor | None], weight: float) -> None:
        for group, removed in self.groups:
            if group.id in places.unknown:
                continue
            slope = _group_slope(tape, places, group, slopes)
            if slope is None:
                continue
            chosen = torch.zeros(group.width, len(removed), dtype=slope.dtype, device=slope.device)
            for column, channels in enumerate(removed):
                chosen[list(channels), column] = 1
            self._parts[group.id][-1] += weight * (slope @ chosen).double().square().cpu().numpy().T

    def damage(self) -> dict[str, Floats]:
        """Estimated damage at every width but the dense one and of every sample, (K - 1, samples), by group."""
        return {name: np.concatenate(parts, axis=1) for name, parts in self._parts.items()}


def representative(damage: Mapping[str, Floats], count: int) -> list[int]:
    """Samples whose mean damage is that of all samples, for every group at once; chosen one by one.

    Args:
        damage: estimated damage by group, (K, samples); the first, middle and last width of each group count.
        count: how many.

    Returns:
        Their numbers, ascending.
    """
    rows = []
    for values in damage.values():
        for k in sorted({0, len(values) // 2, len(values) - 1}):
            mean = values[k].mean()
            if mean > 0:
                rows.append(np.minimum(values[k] / mean, 50.0))  # one outlier must not decide alone
    samples = next(iter(damage.values())).shape[1]
    if not rows:
        return [int(k) for k in np.linspace(0, samples - 1, count).round()]
    ratios = np.stack(rows)
    wanted, total = ratios.mean(axis=1), np.zeros(len(ratios))
    chosen: list[int] = []
    for k in range(1, count + 1):
        gaps = np.square((total[:, None] + ratios) / k - wanted[:, None]).sum(axis=0)
        gaps[chosen] = np.inf
        chosen.append(int(gaps.argmin()))
        total += ratios[:, chosen[-1]]
    return sorted(chosen)


def _gated_reader(func: Any, place: int, position: int, size: int, gates: dict[int, Tensor]) -> Swap:
    """An operation with its input channels multiplied by gates, (size, channels), that are one."""

    def swap(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x: Tensor = args[place]
        if x.shape[0] % size:
            raise Diverged("the input of a layer does not have the samples in front")
        gates[position] = torch.ones(size, x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
        rows = gates[position].repeat_interleave(x.shape[0] // size, dim=0)
        gated = x * rows.reshape(*rows.shape, *(1 for _ in x.shape[2:]))
        return func(*args[:place], gated, *args[place + 1 :], **kwargs)

    return swap


def _group_slope(tape: Tape, places: Places, group: Group, slopes: Mapping[int, Tensor | None]) -> Tensor | None:
    """V'J of each sample and channel, (B, width): the gates of all consumers of a channel are one."""
    parts = [
        _of_member(slope, member, group.width)
        for member in group.by_role("consumer")
        for position in places.readers[tape.names[member.param]]
        if (slope := slopes[position]) is not None
    ]
    return torch.stack(parts).sum(dim=0) if parts else None


def _of_member(slope: Tensor, member: Member, width: int) -> Tensor:
    part = slope.narrow(1, member.offset, width * member.stride)
    return part.reshape(len(slope), width, member.stride).sum(dim=2)


def _scaled_outputs(tape: Tape, made: Mapping[Value, Tensor], variance: Mapping[str, float], size: int) -> Tensor:
    """All outputs of a sample in one row, (B, outputs), such that squared changes add up to the damage."""
    heads = []
    for name, (ref, value) in tape.outputs.items():
        rows = made[value].as_strided(ref.size, ref.stride, ref.offset).reshape(size, -1)
        heads.append(rows / (rows.shape[1] * variance[name] * len(tape.outputs)) ** 0.5)
    return torch.cat(heads, dim=1)


def _unit(like: Tensor, column: int) -> Tensor:
    unit = torch.zeros_like(like)
    unit[:, column] = 1
    return unit


def _signs(like: Tensor, seed: int, before: int, probe: int) -> Tensor:
    """Random signs that depend on seed, sample and probe alone."""
    rows = []
    for row in range(len(like)):
        made = int(np.random.SeedSequence([seed, before + row, probe]).generate_state(1)[0])
        bits = torch.randint(0, 2, like.shape[1:], generator=torch.Generator().manual_seed(made), dtype=torch.int8)
        rows.append(bits * 2 - 1)
    return torch.stack(rows).to(like)


__all__ = ["Gauss", "Places", "find_places", "gate_schedule", "representative"]
