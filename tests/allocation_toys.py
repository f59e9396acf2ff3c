"""Groups, costs, latencies and option costs small enough to be enumerated."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fusepress.pipeline.graph.cost import CostTable
from fusepress.pipeline.graph.plan import Group, GroupGraph, Member
from fusepress.pipeline.pruning.budget import Pairwise, Problem

Scores = dict[str, npt.NDArray[np.float32]]


def chain(widths: list[int], multiples: list[int] | None = None, branches: list[str] | None = None) -> GroupGraph:
    """Groups of a chain of layers: layer i makes group i and reads group i - 1; a last layer reads the last group."""
    multiples = multiples or [1] * len(widths)
    branches = branches or ["fusion"] * len(widths)
    groups = tuple(
        Group(
            id=f"m{i}.weight",
            branch=branches[i],
            width=width,
            multiple=multiples[i],
            members=(
                Member(param=f"m{i}.weight", dim=0),
                Member(param=f"m{i + 1}.weight", dim=1, role="consumer"),
            ),
            producers=(f"m{i}.weight",),
        )
        for i, width in enumerate(widths)
    )
    return GroupGraph(groups=groups, frozen=(), arch_sha256="0")


def table(graph: GroupGraph, positions: list[int]) -> CostTable:
    """Costs of the chain: weight i is (group i) x (group i - 1) x 9; first inputs and last outputs are fixed."""
    count = len(graph.groups)
    fixed = np.zeros((count + 1, 2), dtype=np.int64)
    coef = np.zeros((count + 1, 2, count), dtype=np.int64)
    fixed[0, 1], fixed[count, 0] = 3, 5
    for i in range(count):
        coef[i, 0, i] = coef[i + 1, 1, i] = 1
    return CostTable(
        ids=tuple(group.id for group in graph.groups),
        dense=np.array([group.width for group in graph.groups], dtype=np.int64),
        rest=np.full(count + 1, 9, dtype=np.int64),
        fixed=fixed,
        coef=coef,
        positions=np.array(positions, dtype=np.int64),
        branches=(*(group.branch for group in graph.groups), "fusion"),
        constant_macs=100,
    )


def apart(graph: GroupGraph, rest: Sequence[int]) -> CostTable:
    """Costs that add up: every group is the output of one tensor whose inputs are fixed."""
    count = len(graph.groups)
    return CostTable(
        ids=tuple(group.id for group in graph.groups),
        dense=np.array([group.width for group in graph.groups], dtype=np.int64),
        rest=np.array(rest, dtype=np.int64),
        fixed=np.zeros((count, 1), dtype=np.int64),
        coef=np.eye(count, dtype=np.int64)[:, None],
        positions=np.ones(count, dtype=np.int64),
        branches=("fusion",) * count,
    )


def random_scores(graph: GroupGraph, seed: int = 0, low: float = 0.0) -> Scores:
    """Scores between `low` and 1."""
    draw = np.random.default_rng(seed)
    return {g.id: (draw.random(g.width) * (1 - low) + low).astype(np.float32) for g in graph.groups}


class Stairs:
    """Latency of a chain whose channels are computed in tiles of 16: a step function of both widths of each layer."""

    def __init__(self, graph: GroupGraph, microseconds: Sequence[float]) -> None:
        self.ids = [group.id for group in graph.groups]
        self.microseconds = microseconds

    def latency_ms(self, widths: Mapping[str, int]) -> float:
        tiles = [1, *(math.ceil(widths[group] / 16) for group in self.ids), 1]
        layers = zip(self.microseconds, itertools.pairwise(tiles), strict=True)
        return 0.05 + sum(each * a * b for each, (a, b) in layers) / 1000


def two_width_problem(seed: int, groups: int, options: int, kind: str) -> Problem:
    """Random values and layer costs on two widths, half of the dense cost (or a little more or less) as the budget.

    Args:
        seed: of everything.
        groups: how many.
        options: the most options of a group.
        kind: smooth (losses convex in the width), rough (not even monotone), stairs (costs go in tiles of 16), block
            (some groups may be removed).
    """
    draw = np.random.default_rng(seed)
    ladders = [8 * np.arange(n, 0, -1) for n in draw.integers(2, options + 1, groups)]
    if kind == "block":
        ladders = [np.append(ladder, 0) if g % 3 == 0 else ladder for g, ladder in enumerate(ladders)]
    tiles = [np.ceil(ladder / 16).astype(np.int64) if kind == "stairs" else ladder for ladder in ladders]
    pairs = {(g, g + 1) for g in range(groups - 1)}
    pairs |= {(int(a), int(b)) for a, b in itertools.combinations(range(groups), 2) if draw.random() < 2 / groups}
    cost = Pairwise(
        constant=int(draw.integers(0, 1000)),
        own=[tile * int(draw.integers(0, 3000)) for tile in tiles],
        joint={(a, b): int(draw.integers(1, 300)) * np.multiply.outer(tiles[a], tiles[b]) for a, b in sorted(pairs)},
    )
    values = []
    for ladder in ladders:
        steps = draw.random() * draw.random(ladder.size - 1) ** 2
        lost = np.cumsum(steps if kind == "rough" else np.sort(steps))
        if kind == "rough":
            lost = np.abs(lost + 0.4 * lost.max() * draw.normal(size=lost.size))
        values.append(np.concatenate([[0.0], lost]))
    sizes = np.array([ladder.size for ladder in ladders])
    least, dense = (int(cost.total(level[None])[0]) for level in (sizes - 1, 0 * sizes))
    return Problem(values, [cost], [int(least + draw.uniform(0.1, 0.8) * (dense - least))])


def every_level(sizes: Sequence[int]) -> npt.NDArray[Any]:
    """All combinations of options, (prod(K_g), G)."""
    return np.stack(np.meshgrid(*map(np.arange, sizes), indexing="ij"), axis=-1).reshape(-1, len(sizes))


def enumerated(problem: Problem) -> float:
    """The least value of all combinations within the budgets."""
    levels = every_level(problem.layout.sizes)
    values = sum(v[levels[:, g]] for g, v in enumerate(problem.values))
    return float(np.min(np.where(problem.fits(levels), values, np.inf)))
