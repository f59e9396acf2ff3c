"""The equality test: the pruned model equals the dense model gated where the removed channels are read."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fusepress.pipeline.graph.apply import apply_plan, architecture_sha256, gate_model
from fusepress.pipeline.graph.dependence import Forward, hash_seed
from fusepress.pipeline.graph.plan import Group, GroupGraph

# Shares of a group's channels that the test removes. Neighbours lose different numbers, and every group different ones
# in the two rounds: halves that the code cuts with chunk(2) would pass if they lost the same.
REMOVED = ((0.15, 0.4, 0.25), (0.4, 0.2, 0.3))


@dataclass(frozen=True, slots=True, kw_only=True)
class Checker:
    """Tests groups on a private copy of the model.

    Attributes:
        model: the copy, in evaluation mode.
        inputs: example inputs of the copy's type.
        forward: runs a model and flattens its outputs.
        tolerance: largest relative difference.
        tick: raises when the time is over.
    """

    model: nn.Module
    inputs: dict[str, Tensor]
    forward: Forward
    tolerance: float
    tick: Callable[[], None]

    def failures(self, groups: Sequence[Group]) -> dict[str, str]:
        """Why groups fail, by id; all are tested at once, and halved until the guilty ones are found."""
        if not groups:
            return {}
        why = self._test(groups)
        if why is None:
            return {}
        if len(groups) == 1:
            return {groups[0].id: why}
        half = len(groups) // 2
        left, right = groups[:half], groups[half:]
        found = self.failures(left) | self.failures(right)
        if not found:  # sound alone, unsound together: keep the first half
            found = {group.id: f"together with other groups, {why}" for group in right}
        return found

    def _test(self, groups: Sequence[Group]) -> str | None:
        overlap = _overlap(groups)
        if overlap is not None:
            return overlap
        return next((why for shares in REMOVED if (why := self._round(groups, shares)) is not None), None)

    def _round(self, groups: Sequence[Group], shares: Sequence[float]) -> str | None:
        self.tick()
        graph = GroupGraph(groups=tuple(groups), frozen=(), arch_sha256=architecture_sha256(self.model))
        plan = graph.plan({g.id: sample_kept(g, shares[k % len(shares)]) for k, g in enumerate(groups)})
        try:
            pruned = apply_plan(copy.deepcopy(self.model), plan)
            got = self.forward(pruned, self.inputs)
        except Exception as error:  # noqa: BLE001 - the user's forward may raise anything
            first = (str(error).strip().splitlines() or [""])[0][:120]
            return (
                f"the model fails without some of its channels ({type(error).__name__}: {first}); "
                "if a channel count is written in the code, take it from the tensor's shape"
            )
        expected = self.forward(gate_model(self.model, plan), self.inputs)
        gap = max((relative_gap(a, b) for a, b in zip(got, expected, strict=True)), default=0.0)
        if gap <= self.tolerance:
            return None
        return f"removing channels changes the other channels (relative {gap:.1e})"


def sample_kept(group: Group, share: float) -> list[int]:
    """Channels that a trial keeps: a random share goes, equally in every part, the same ones every time."""
    draw = random.Random(hash_seed(group.id))  # noqa: S311 - repeatable, not secret
    part = group.width // group.multiple
    gone = min(part - 1, max(1, round(part * share)))
    kept: list[int] = []
    for start in range(0, group.width, part):
        removed = set(draw.sample(range(part), gone)) if gone > 0 else set()
        kept += [start + c for c in range(part) if c not in removed]
    return kept


def _overlap(groups: Sequence[Group]) -> str | None:
    taken: set[tuple[str, int, int]] = set()
    for group in groups:
        for member in group.members:
            slots = {(member.param, member.dim, i) for i in member.indices(range(group.width))}
            if slots & taken:
                return f"two groups claim the same channels of {member.param}"
            taken |= slots
    return None


def relative_gap(got: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected magnitude; infinite where shapes or NaN differ."""
    if got.shape != expected.shape:
        return float("inf")
    if got.numel() == 0:
        return 0.0
    if not got.is_floating_point():
        return 0.0 if torch.equal(got, expected) else float("inf")
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(got)):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    difference = (got - expected).detach()[finite].abs().max()
    scale = expected.detach()[finite].abs().max().clamp_min(1e-30)
    return float(difference / scale)
