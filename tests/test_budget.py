"""Costs on two widths: the fast search against enumeration and the proven optimum; no budget is ever exceeded."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusepress.pipeline.errors import StageError
from fusepress.pipeline.graph.cost import CostTable, Ints
from fusepress.pipeline.pruning.budget import (
    Layout,
    Opaque,
    Pairwise,
    Problem,
    improve,
    least,
    linearised,
    minimise,
    repair,
    spend_all,
    table_meter,
    widths_at,
)
from fusepress.pipeline.pruning.joint import solve_joint
from tests.allocation_toys import chain, enumerated, every_level, table, two_width_problem

KINDS = ("smooth", "rough", "stairs", "block")


def cost_of(problem: Problem) -> Pairwise:
    assert isinstance(problem.meters[0], Pairwise)
    return problem.meters[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_search_and_the_joint_programme_find_what_enumeration_finds(kind: str) -> None:
    for seed in range(12):
        problem = two_width_problem(seed, 4, 5, kind)
        best = enumerated(problem)
        found = minimise(problem)
        assert problem.fits(np.array([found.level])).all()
        assert found.value == pytest.approx(best, abs=1e-9)
        proven = solve_joint(problem.values, [cost_of(problem)], problem.capacities.tolist())
        assert proven.optimal
        assert proven.value == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_search_meets_the_proven_optimum_where_there_is_too_much_to_enumerate(kind: str) -> None:
    for seed in range(3):
        problem = two_width_problem(seed, 9, 8, kind)
        proven = solve_joint(problem.values, [cost_of(problem)], problem.capacities.tolist())
        assert proven.optimal
        assert minimise(problem).value == pytest.approx(proven.value, abs=1e-9)


def test_the_knapsack_alone_is_not_enough_and_never_trusted() -> None:
    """The control: costs that add up mislead, so what the knapsack says is repaired and improved."""
    broken = short = 0
    for seed in range(12):
        problem = two_width_problem(seed, 6, 8, "smooth")
        level = linearised(problem, np.zeros(6, dtype=np.int64), 64)
        if level is None:
            level = least(problem.meters[0], problem.layout)
        broken += not problem.fits(level[None]).all()
        repaired = repair(problem, level)
        assert repaired is not None
        assert problem.fits(repaired[None]).all()
        improved = improve(problem, repaired)
        assert problem.fits(improved[None]).all()
        assert problem.value(improved) <= problem.value(repaired)
        short += problem.value(improved) > minimise(problem).value + 1e-9
    assert broken + short > 0


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(KINDS), st.booleans(), st.floats(0.3, 1.0))
def test_no_budget_is_exceeded_and_nothing_single_is_left_to_gain(
    seed: int, kind: str, known: bool, share: float
) -> None:
    whole = two_width_problem(seed, 5, 6, kind)
    cost = cost_of(whole)
    part = Pairwise(constant=0, own=cost.own, joint={})  # of a branch, as it were
    sizes = whole.layout.sizes
    limit = max(int(share * part.total(np.zeros((1, 5), dtype=np.int64))[0]), int(part.total(np.array([sizes]) - 1)[0]))
    first = cost if known else Opaque(cost.total, sizes)
    problem = Problem(whole.values, [first, part], [int(whole.capacities[0]), limit])
    found = minimise(problem)
    level = np.array(found.level)
    assert cost.total(level[None])[0] <= whole.capacities[0]
    assert part.total(level[None])[0] <= limit
    assert found.value >= enumerated(problem) - 1e-9
    singles = np.repeat(level[None], problem.layout.group.size, axis=0)
    singles[np.arange(len(singles)), problem.layout.group] = problem.layout.option
    gains = problem.gains(level)
    assert not (problem.fits(singles) & (gains < -1e-9)).any()
    assert minimise(problem) == found


def test_a_second_budget_costs_little_beyond_the_proven_optimum() -> None:
    gaps = []
    for seed in range(10):
        whole = two_width_problem(seed, 6, 6, "smooth")
        part = Pairwise(constant=0, own=cost_of(whole).own, joint={})
        both = [cost_of(whole), part]
        capacities = [int(whole.capacities[0]), int(0.6 * part.total(np.zeros((1, 6), dtype=np.int64))[0])]
        proven = solve_joint(whole.values, both, capacities)
        gaps.append(minimise(Problem(whole.values, both, capacities)).value / proven.value - 1)
    assert min(gaps) > -1e-9
    assert max(gaps) < 0.01


def test_costs_that_can_only_be_asked_for_cost_little_quality() -> None:
    gaps = []
    for seed in range(10):
        problem = two_width_problem(seed, 5, 6, "stairs")
        asked = Problem(problem.values, [Opaque(cost_of(problem).total, problem.layout.sizes)], problem.capacities)
        gaps.append(minimise(asked).value - enumerated(problem))
    assert min(gaps) > -1e-9
    assert max(gaps) < 1e-9


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["macs", "params"]), st.sampled_from([None, "camera", "fusion"]))
def test_pairs_tell_the_tables_cost_exactly(seed: int, unit: str, branch: str | None) -> None:
    draw = np.random.default_rng(seed)
    count = int(draw.integers(1, 6))
    graph = chain(
        [8 * int(n) for n in draw.integers(1, 6, count)], branches=draw.choice(["camera", "fusion"], count).tolist()
    )
    cost = table(graph, draw.integers(1, 50, count + 1).tolist())
    ladders = [tuple(range(g.width, -1, -8 if draw.random() < 0.7 else -4)) for g in graph.groups]
    name = "macs" if unit == "macs" else "params"
    meter = table_meter(cost, name, ladders, branch)  # type: ignore[arg-type]
    assert isinstance(meter, Pairwise)
    levels = draw.integers(0, [len(x) for x in ladders], size=(40, count))
    assert (meter.total(levels) == cost.total(name, widths_at(ladders, levels), branch)).all()  # type: ignore[arg-type]
    check_moves(meter, levels[0], [len(x) for x in ladders])


def check_moves(meter: Pairwise, level: Ints, sizes: list[int]) -> None:
    """Changes and crosses say what the totals of the moved rows say."""
    layout = Layout(sizes)
    every = np.arange(layout.group.size)
    singles = np.repeat(level[None], every.size, axis=0)
    singles[every, layout.group] = layout.option
    here = meter.total(level[None])[0]
    changes = meter.changes(level)
    assert (changes == meter.total(singles) - here).all()
    cross = meter.cross(level, every, every)
    assert cross is not None
    for s in every:
        pairs = singles.copy()
        pairs[:, layout.group[s]] = layout.option[s]
        other = layout.group != layout.group[s]
        assert (meter.total(pairs) - here == changes + changes[s] + cross[s])[other].all()


def test_more_pairs_than_a_full_matrix_holds_are_counted_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    full = cost_of(two_width_problem(3, 5, 6, "smooth"))
    monkeypatch.setattr("fusepress.pipeline.pruning.budget.DENSE", 0)
    sparse = Pairwise(constant=full.constant, own=full.own, joint=full.joint)
    check_moves(sparse, np.array([0, 1, 0, 1, 1]), [own.size for own in full.own])


def test_a_tensor_pruned_along_three_dimensions_is_asked_for() -> None:
    cost = CostTable(
        ids=("a", "b", "c"),
        dense=np.array([16, 16, 16]),
        rest=np.array([1]),
        fixed=np.zeros((1, 3), dtype=np.int64),
        coef=np.eye(3, dtype=np.int64)[None],
        positions=np.array([1]),
        branches=("fusion",),
    )
    ladders = [(16, 8, 4)] * 3
    meter = table_meter(cost, "macs", ladders)
    assert not meter.exact
    values = [np.array([0.0, 1.0, 1.5]), np.array([0.0, 0.9, 2.0]), np.array([0.0, 1.1, 1.2])]
    problem = Problem(values, [meter], [900])
    found = minimise(problem)
    assert int(cost.total("macs", widths_at(ladders, np.array(found.level)))) <= 900
    assert found.value == pytest.approx(enumerated(problem), abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_kept_score_fills_the_budget_also_with_negative_scores(seed: int) -> None:
    whole = two_width_problem(seed, 5, 6, "smooth")
    draw = np.random.default_rng(seed)
    values = [np.concatenate([[0.0], np.cumsum(draw.normal(0.2, 1, v.size - 1))]) for v in whole.values]
    problem = Problem(values, whole.meters, whole.capacities)
    level = np.array(spend_all(problem).level)
    assert problem.fits(level[None]).all()
    ups = [level - np.eye(5, dtype=np.int64)[g] for g in range(5) if level[g]]
    assert not ups or not problem.fits(np.array(ups)).any()
    assert spend_all(whole).value == minimise(whole).value  # nothing to charge where every step up is a gain


def test_filling_costs_less_score_than_any_other_full_budget_on_average() -> None:
    """Against all maximal options, enumerated: how much more is lost than has to be."""
    gaps = []
    for seed in range(12):
        whole = two_width_problem(seed, 4, 5, "smooth")
        draw = np.random.default_rng(seed)
        values = [np.concatenate([[0.0], np.cumsum(draw.normal(0.1, 1, v.size - 1))]) for v in whole.values]
        problem = Problem(values, whole.meters, whole.capacities)
        levels = every_level(problem.layout.sizes)
        fits = problem.fits(levels)
        inside = {tuple(level) for level in levels[fits].tolist()}
        maximal = [
            level
            for level in levels[fits]
            if not any(level[g] and tuple((level - np.eye(4, dtype=int)[g]).tolist()) in inside for g in range(4))
        ]
        lost = [problem.value(level) for level in maximal]
        gaps.append((spend_all(problem).value - min(lost)) / (max(lost) - min(lost) + 1e-12))
    assert min(gaps) > -1e-9
    assert np.mean(gaps) < 0.1


def test_the_least_cost_is_found_down_stairs_that_go_up_again() -> None:
    own = np.array([10, 4, 6])  # the narrowest option is not the fastest
    meter = Pairwise(constant=0, own=[own, np.array([5, 5, 3])], joint={})
    assert least(meter, Layout([3, 3])).tolist() == [1, 2]


def test_an_impossible_budget_is_refused_by_both() -> None:
    problem = two_width_problem(0, 4, 4, "smooth")
    with pytest.raises(StageError, match="expected options within every budget; got none; raise the budgets"):
        minimise(Problem(problem.values, problem.meters, [0]))
    with pytest.raises(StageError, match=r"expected widths within the budget; got .*infeasible.* for 4 groups; raise"):
        solve_joint(problem.values, [cost_of(problem)], [0])


def test_a_known_point_bounds_the_programme_and_is_not_excluded() -> None:
    problem = two_width_problem(1, 6, 6, "smooth")
    found = minimise(problem).value
    proven = solve_joint(problem.values, [cost_of(problem)], problem.capacities.tolist(), at_most=found)
    assert proven.value == pytest.approx(found, abs=1e-9)
    assert proven.bound <= proven.value
