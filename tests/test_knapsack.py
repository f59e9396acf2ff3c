"""The group knapsack: exact against enumeration and against a mixed-integer programme; the budget holds."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusepress.pipeline.errors import StageError
from fusepress.pipeline.graph.plan import GroupGraph
from fusepress.pipeline.pruning.allocate import allocate
from fusepress.pipeline.pruning.curves import Curve
from fusepress.pipeline.pruning.knapsack import milp, solve
from fusepress.pipeline.recipe import PruneConfig
from tests.allocation_toys import apart, chain, every_level, random_scores

Vectors = list[npt.NDArray[np.float64]]
Costs = list[npt.NDArray[np.int64]]


def draw_instance(seed: int, groups: int, options: int, *, whole: bool = True) -> tuple[Vectors, Costs, int]:
    """Values of any sign and order (whole numbers add up exactly), any costs, a capacity that allows something."""
    draw = np.random.default_rng(seed)
    sizes = draw.integers(1, options + 1, draw.integers(1, groups + 1))
    values = [draw.integers(-30, 100, n).astype(np.float64) if whole else draw.normal(size=n) for n in sizes]
    costs = [draw.integers(0, 12, n) for n in sizes]
    least, most = (sum(int(f(c)) for c in costs) for f in (np.min, np.max))
    return values, costs, int(draw.integers(least, most + 3))


def summed(vectors: Vectors | Costs, chosen: list[int]) -> float:
    return float(sum(v[k] for v, k in zip(vectors, chosen, strict=True)))


def test_equals_enumeration_on_hundreds_of_random_instances() -> None:
    for seed in range(400):
        values, costs, capacity = draw_instance(seed, 5, 6)
        levels = every_level([v.size for v in values])
        value = sum(v[levels[:, g]] for g, v in enumerate(values))
        fits = sum(c[levels[:, g]] for g, c in enumerate(costs)) <= capacity
        chosen = solve(values, costs, capacity)
        assert summed(costs, chosen) <= capacity
        assert summed(values, chosen) == value[fits].min()


def test_equals_the_mixed_integer_optimum_on_the_same_whole_costs() -> None:
    for seed in range(25):
        values, costs, capacity = draw_instance(seed, 12, 10, whole=False)
        chosen, reference = solve(values, costs, capacity), milp(values, costs, capacity)
        assert summed(costs, reference) <= capacity
        assert summed(values, chosen) == pytest.approx(summed(values, reference), abs=1e-9)


def test_more_options_than_a_byte_counts_are_tracked_back() -> None:
    draw = np.random.default_rng(0)
    values = [np.sort(draw.random(700)) for _ in range(3)]
    costs = [np.arange(700)[::-1].copy() for _ in range(3)]
    chosen = solve(values, costs, 300)
    assert min(chosen) > 255
    assert summed(costs, chosen) <= 300
    assert summed(values, chosen) == pytest.approx(summed(values, milp(values, costs, 300)), abs=1e-9)


def test_a_budget_for_everything_chooses_the_dense_options_at_no_loss() -> None:
    values = [np.array([0.0, 1.0, 2.0]), np.array([0.0, 0.5])]
    costs = [np.array([5, 3, 1]), np.array([7, 2])]
    for capacity in (12, 13, 10**9):
        assert solve(values, costs, capacity) == [0, 0]
    assert solve(values, costs, 11) == [0, 1]
    assert solve([], [], 0) == []


@pytest.mark.parametrize("method", [solve, milp])
def test_an_impossible_capacity_names_the_least_one_and_that_one_works(method: object) -> None:
    assert callable(method)
    values, costs = [np.zeros(2), np.zeros(2)], [np.array([9, 3]), np.array([4, 8])]
    with pytest.raises(StageError, match=r"expected a capacity of at least 7, what the cheapest .*; got 6; raise"):
        method(values, costs, 6)
    assert method(values, costs, 7) == [1, 0]


@pytest.mark.parametrize(
    ("values", "costs", "words"),
    [
        ([np.zeros(2)], [], "as many cost vectors as value vectors; got 0 for 1 groups"),
        ([np.zeros(2)], [np.zeros(3, int)], r"got \(2,\) and \(3,\) at group 0"),
        ([np.zeros(0)], [np.zeros(0, int)], "expected 1 to 65536 options"),
        ([np.array([np.nan])], [np.zeros(1, int)], "expected finite values; got NaN or infinity at group 0"),
        ([np.zeros(1)], [np.array([0.5])], "expected whole cost units; got float64 at group 0; round them up"),
        ([np.zeros(1)], [np.array([-1])], "expected costs >= 0; got -1 at group 0"),
    ],
)
def test_malformed_input_is_a_clear_error(values: Vectors, costs: Costs, words: str) -> None:
    with pytest.raises(StageError, match=words):
        solve(values, costs, 10)


def test_an_unfinished_reference_is_no_answer() -> None:
    draw = np.random.default_rng(0)
    costs = [draw.integers(1000, 10**6, 40) for _ in range(60)]
    with pytest.raises(StageError, match=r"expected a proven optimum within 1e-05 s; got .* for 60 groups; allow more"):
        milp([draw.random(40) for _ in range(60)], costs, 2 * 10**7, time_limit_s=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40))
def test_more_budget_never_loses_more(seed: int, more: int) -> None:
    values, costs, capacity = draw_instance(seed, 6, 6)
    assert summed(values, solve(values, costs, capacity + more)) <= summed(values, solve(values, costs, capacity))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 50))
def test_finer_units_never_lose_more_and_never_break_the_real_budget(seed: int, unit: int) -> None:
    values, _, _ = draw_instance(seed, 6, 6)
    draw = np.random.default_rng(seed)
    real = [draw.uniform(0, 1000, v.size) for v in values]
    budget = sum(float(c.min()) for c in real) + 4.0 * unit * len(values) + draw.uniform(0, 1000)
    least = np.inf
    for size in (4 * unit, 2 * unit, unit):  # each divides the one before: rounding up shrinks
        chosen = solve(values, [np.ceil(c / size).astype(np.int64) for c in real], int(budget / size))
        assert sum(c[k] for c, k in zip(real, chosen, strict=True)) <= budget
        assert summed(values, chosen) <= least
        least = summed(values, chosen)
    assert least >= summed(values, milp(values, [np.asarray(c) for c in real], budget))


def rd_prune(distortion: Vectors, weights: list[list[int]], budget: int) -> list[int]:
    """RD-Prune's programme (arXiv 2308.10438): one state a kept weight, layers one after the other.

    D[n][j]: least summed distortion of the first n layers with at most j weights kept.
    """
    best = [[0.0] * (budget + 1)]
    back: list[list[int]] = []
    for delta, kept in zip(distortion, weights, strict=True):
        row, arg = [np.inf] * (budget + 1), [-1] * (budget + 1)
        for j in range(budget + 1):
            for k, w in enumerate(kept):
                if w <= j and best[-1][j - w] + delta[k] < row[j]:
                    row[j], arg[j] = best[-1][j - w] + float(delta[k]), k
        best.append(row)
        back.append(arg)
    chosen, j = [], budget
    for arg, kept in zip(reversed(back), reversed(weights), strict=True):
        chosen.append(arg[j])
        j -= kept[chosen[-1]]
    return chosen[::-1]


def curves_of(graph: GroupGraph, ladders: dict[str, tuple[int, ...]], seed: int) -> dict[str, Curve]:
    """Distortions that are not monotone, and information terms large enough to change every choice."""
    draw = np.random.default_rng(seed)
    return {
        group.id: Curve(
            widths=ladders[group.id],
            distortion=np.concatenate([[0.0], draw.random(len(ladders[group.id]) - 1)]),
            fisher=draw.random((len(ladders[group.id]), 2)) + 0.5,
        )
        for group in graph.groups
    }


def test_without_the_information_term_the_allocation_is_rd_prunes() -> None:
    moved = 0
    for seed in range(30):
        draw = np.random.default_rng(seed)
        graph = chain([8 * int(n) for n in draw.integers(2, 6, 5)])
        rest = draw.integers(1, 6, 5).tolist()
        ladders = {g.id: tuple(range(g.width, 0, -4)) for g in graph.groups}
        curves = curves_of(graph, ladders, seed)
        keep = float(draw.uniform(0.3, 0.9))
        weights = [[w * each for w in ladders[g.id]] for g, each in zip(graph.groups, rest, strict=True)]
        expected = rd_prune(
            [curves[g.id].distortion for g in graph.groups], weights, int(keep * sum(map(max, weights)))
        )
        widths = {}
        for eta in (0.0, 1.0):
            config = PruneConfig.model_validate(
                {"params": keep, "allocation": "distortion", "distortion": {"eta": eta}, "floor": 0, "min_channels": 1}
            )
            scores = random_scores(graph, seed)
            widths[eta] = allocate(scores, graph, apart(graph, rest), config, align=4, distortion=curves).widths
        assert widths[0.0] == {g.id: ladders[g.id][k] for g, k in zip(graph.groups, expected, strict=True)}
        moved += widths[1.0] != widths[0.0]
    assert moved > 10  # the term does decide where it counts
