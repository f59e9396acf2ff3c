"""Widths under a budget: never above it, aligned, maximal, floors and kept modules respected, deterministic."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusepress.pipeline.errors import RecipeError, StageError
from fusepress.pipeline.graph.cost import CostTable
from fusepress.pipeline.graph.plan import Group, GroupGraph, Member
from fusepress.pipeline.pruning.allocate import Allocation, allocate
from fusepress.pipeline.recipe import PruneConfig

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


def random_scores(graph: GroupGraph, seed: int = 0, low: float = 0.0) -> Scores:
    draw = np.random.default_rng(seed)
    return {g.id: (draw.random(g.width) * (1 - low) + low).astype(np.float32) for g in graph.groups}


def allowed(group: Group, config: PruneConfig, align: int) -> list[int]:
    """Widths that a group may take, written down anew."""
    step = math.lcm(align, group.multiple)
    least = max(config.min_channels, math.ceil(config.floor * group.width - 1e-9))
    return sorted({group.width} | {w for w in range(step, group.width, step) if w >= least})


@st.composite
def problems(draw: st.DrawFn) -> tuple[GroupGraph, CostTable, Scores, PruneConfig, int]:
    count = draw(st.integers(1, 5))
    widths = [8 * draw(st.integers(1, 8)) + draw(st.sampled_from([0, 0, 4])) for _ in range(count)]
    multiples = [draw(st.sampled_from([1, 1, 2, 4])) for _ in range(count)]
    branches = [draw(st.sampled_from(["camera", "lidar", "fusion"])) for _ in range(count)]
    graph = chain(widths, multiples, branches)
    cost = table(graph, [draw(st.integers(1, 50)) for _ in range(count + 1)])
    unit = draw(st.sampled_from(["macs", "params"]))
    shares = draw(st.dictionaries(st.sampled_from(sorted(set(branches))), st.floats(0.3, 1.0), max_size=2))
    config = PruneConfig.model_validate(
        {
            unit: draw(st.floats(0.05, 1.0)),
            "rank": draw(st.sampled_from(["score", "score_per_cost"])),
            "floor": draw(st.sampled_from([0.0, 0.1, 0.5])),
            "min_channels": draw(st.sampled_from([1, 8])),
            "branches": shares,
            "allocation": draw(st.sampled_from(["global", "importance"])),
        }
    )
    scores = random_scores(graph, draw(st.integers(0, 10**6)), low=draw(st.sampled_from([0.0, -1.0])))
    return graph, cost, scores, config, draw(st.sampled_from([1, 4, 8, 16]))


def within(cost: CostTable, config: PruneConfig, widths: dict[str, int]) -> bool:
    unit: Any = "macs" if config.macs is not None else "params"
    fraction = config.macs if config.macs is not None else config.params
    assert fraction is not None
    vector = cost.vector(widths)
    if int(cost.total(unit, vector)) > fraction * int(cost.total(unit, cost.dense)):
        return False
    return all(
        int(cost.total(unit, vector, branch)) <= share * int(cost.total(unit, cost.dense, branch))
        for branch, share in config.branches.items()
    )


@settings(max_examples=150, deadline=None)
@given(problems())
def test_within_every_budget_and_no_further_step_fits(
    problem: tuple[GroupGraph, CostTable, Scores, PruneConfig, int],
) -> None:
    graph, cost, scores, config, align = problem
    least = {group.id: allowed(group, config, align)[0] for group in graph.groups}
    if not within(cost, config, least):
        with pytest.raises(RecipeError, match=r"expected prune\.\S+ >= [01]\.\d{3}, the least"):
            allocate(scores, graph, cost, config, align=align)
        return
    result = allocate(scores, graph, cost, config, align=align)
    assert within(cost, config, result.widths)
    assert result.gap >= 0
    for group in graph.groups:
        ladder = allowed(group, config, align)
        width = result.widths[group.id]
        assert width in ladder
        if width < group.width:
            wider = result.widths | {group.id: ladder[ladder.index(width) + 1]}
            assert not within(cost, config, wider)
        check_kept(group, scores[group.id], result)
    assert allocate(scores, graph, cost, config, align=align) == result


def check_kept(group: Group, scores: npt.NDArray[np.float32], result: Allocation) -> None:
    """In every part the kept channels are the best, ties to the lower number; the plan accepts them."""
    kept = result.kept[group.id]
    assert len(kept) == result.widths[group.id]
    part = group.width // group.multiple
    for start in range(0, group.width, part):
        channels = range(start, start + part)
        ranked = sorted(channels, key=lambda c: (-scores[c], c))
        assert [c for c in kept if c in channels] == sorted(ranked[: len(kept) // group.multiple])
    GroupGraph(groups=(group,), frozen=(), arch_sha256="0").plan({group.id: kept})


def two() -> tuple[GroupGraph, CostTable]:
    graph = chain([32, 32], branches=["camera", "lidar"])
    return graph, table(graph, [1, 1, 1])


def test_ties_go_to_the_lower_channel() -> None:
    graph, cost = two()
    flat: Scores = {group.id: np.ones(32, dtype=np.float32) for group in graph.groups}
    result = allocate(flat, graph, cost, PruneConfig(params=0.6), align=8)
    assert all(kept == list(range(len(kept))) for kept in result.kept.values())


def test_the_group_with_the_lower_scores_goes_first() -> None:
    graph, cost = two()
    scores = {"m0.weight": np.full(32, 0.1, np.float32), "m1.weight": np.full(32, 1.0, np.float32)}
    widths = allocate(scores, graph, cost, PruneConfig(macs=0.5), align=8).widths
    assert widths["m0.weight"] < widths["m1.weight"] == 32
    scores = {"m0.weight": np.full(32, 1.0, np.float32), "m1.weight": np.full(32, 0.1, np.float32)}
    widths = allocate(scores, graph, cost, PruneConfig(macs=0.5), align=8).widths
    assert widths["m1.weight"] < widths["m0.weight"] == 32


def test_ranking_per_cost_takes_the_dear_channels_of_equal_score() -> None:
    graph = chain([32, 32, 32])
    cost = table(graph, [1000, 1000, 1, 1])  # a high resolution, then a low one
    scores = {group.id: np.full(32, s, np.float32) for group, s in zip(graph.groups, (0.5, 0.6, 0.4), strict=True)}
    dear = allocate(scores, graph, cost, PruneConfig(macs=0.5), align=8).widths
    assert dear["m2.weight"] == 32
    plain = allocate(scores, graph, cost, PruneConfig(macs=0.5, rank="score"), align=8).widths
    assert plain["m2.weight"] < 32


def test_floors_and_alignment() -> None:
    graph = chain([64, 64, 20, 8])
    cost = table(graph, [1, 1, 1, 1, 1])
    result = allocate(random_scores(graph), graph, cost, PruneConfig(params=0.4, floor=0.4, min_channels=8), align=16)
    assert result.widths["m0.weight"] in (32, 48, 64)
    assert result.widths["m1.weight"] in (32, 48, 64)
    assert result.widths["m2.weight"] in (16, 20)
    assert result.widths["m3.weight"] == 8
    assert any("m3.weight: stays at 8, no wider than one aligned step of 16" in note for note in result.notes)
    assert any("m2.weight: the dense width 20 is no multiple of 16" in note for note in result.notes)


def test_kept_modules_stay() -> None:
    graph, cost = two()
    result = allocate(random_scores(graph), graph, cost, PruneConfig(macs=0.6, keep=("m0",)), align=8)
    assert result.widths["m0.weight"] == 32 > result.widths["m1.weight"]
    assert "m0.weight: kept by prune.keep" in result.notes


def test_a_budget_of_one_branch_binds_that_branch() -> None:
    graph, cost = two()
    scores = {"m0.weight": np.full(32, 9.0, np.float32), "m1.weight": np.full(32, 0.1, np.float32)}
    free = allocate(scores, graph, cost, PruneConfig(macs=0.8), align=8)
    assert free.widths["m0.weight"] == 32
    bound = allocate(scores, graph, cost, PruneConfig(macs=0.8, branches={"camera": 0.5}), align=8)
    totals = cost.branch_totals(bound.widths)
    assert totals["camera"]["macs"] <= 0.5 * cost.branch_totals()["camera"]["macs"]
    with pytest.raises(RecipeError, match=r"prune\.branches to name branches of the model \(camera, lidar, fusion\); "):
        allocate(scores, graph, cost, PruneConfig(macs=0.8, branches={"radar": 0.5}), align=8)


def test_an_impossible_budget_names_the_least_one_and_that_one_works() -> None:
    graph, cost = two()
    scores = random_scores(graph)
    with pytest.raises(RecipeError, match=r"expected prune\.macs >= 0\.\d{3}, .*; got 0\.001; .*prune\.floor") as error:
        allocate(scores, graph, cost, PruneConfig(macs=0.001), align=8)
    least = float(str(error.value).split(">= ")[1].split(",")[0])
    assert allocate(scores, graph, cost, PruneConfig(macs=least), align=8).widths == {"m0.weight": 8, "m1.weight": 8}
    with pytest.raises(RecipeError, match="the least"):
        allocate(scores, graph, cost, PruneConfig(macs=least - 0.002), align=8)


def test_a_full_budget_removes_nothing() -> None:
    graph, cost = two()
    result = allocate(random_scores(graph), graph, cost, PruneConfig(macs=1.0), align=8)
    assert result.widths == graph.widths
    assert result.achieved == 1.0
    assert result.gap == 0.0


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ({}, r"expected scores of shape \(32,\); got none at m0\.weight"),
        ({"m0.weight": np.ones(3, np.float32)}, r"got shape \(3,\) at m0\.weight"),
        ({"m0.weight": np.full(32, np.nan, np.float32)}, "expected finite scores; got NaN or infinity at m0"),
    ],
)
def test_bad_scores_are_a_clear_error(scores: Scores, words: str) -> None:
    graph, cost = two()
    with pytest.raises(StageError, match=words):
        allocate(scores, graph, cost, PruneConfig(macs=0.5), align=8)
