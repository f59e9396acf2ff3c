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
from fusepress.pipeline.graph.plan import Group, GroupGraph
from fusepress.pipeline.pruning.allocate import Allocation, allocate
from fusepress.pipeline.pruning.curves import Curve
from fusepress.pipeline.pruning.ladders import ladder_widths
from fusepress.pipeline.recipe import PruneConfig
from tests.allocation_toys import Scores, Stairs, chain, random_scores, table

ALLOCATIONS = ("global", "importance", "distortion")


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
    dear = allocate(scores, graph, cost, PruneConfig(macs=0.5, allocation="global"), align=8).widths
    assert dear["m2.weight"] == 32
    plain = allocate(scores, graph, cost, PruneConfig(macs=0.5, allocation="global", rank="score"), align=8).widths
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


def curves(
    graph: GroupGraph, config: PruneConfig, align: int, seed: int = 0, blocks: tuple[str, ...] = ()
) -> dict[str, Curve]:
    """Distortion that grows with what is removed, more in some groups than in others."""
    draw = np.random.default_rng(seed)
    made = {}
    for group in graph.groups:
        widths = ladder_widths(group, config, align, [], blocks)
        gone = 1 - np.array(widths) / group.width
        made[group.id] = Curve(widths=widths, distortion=draw.random() * gone**2, fisher=np.zeros((len(widths), 0)))
    return made


def in_mode(allocation: str, **budget: Any) -> PruneConfig:
    return PruneConfig.model_validate({"allocation": allocation, "distortion": {"eta": 0.0}, **budget})


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(ALLOCATIONS), st.floats(0.2, 1.1))
def test_a_latency_budget_is_never_exceeded(seed: int, allocation: str, share: float) -> None:
    draw = np.random.default_rng(seed)
    graph = chain([8 * int(n) for n in draw.integers(1, 9, 4)])
    latency = Stairs(graph, draw.integers(1, 40, 5).tolist())
    config = in_mode(allocation, latency_ms=share * latency.latency_ms(graph.widths))
    assert config.latency_ms is not None
    options: dict[str, Any] = {"align": 8, "latency": latency, "distortion": curves(graph, config, 8, seed)}
    least = {group.id: allowed(group, config, 8)[0] for group in graph.groups}
    if latency.latency_ms(least) > config.latency_ms:
        with pytest.raises(RecipeError, match=r"expected prune\.latency_ms >= \d+\.\d{3}, the least that floors"):
            allocate(random_scores(graph, seed), graph, table(graph, [1] * 5), config, **options)
        return
    result = allocate(random_scores(graph, seed), graph, table(graph, [1] * 5), config, **options)
    assert latency.latency_ms(result.widths) <= config.latency_ms
    assert result.unit == "latency_ms"
    assert result.achieved == pytest.approx(
        latency.latency_ms(result.widths) / latency.latency_ms(graph.widths), rel=1e-5
    )
    assert result.gap >= 0
    if allocation != "distortion":
        for group in graph.groups:
            ladder = allowed(group, config, 8)
            if (width := result.widths[group.id]) < group.width:
                wider = result.widths | {group.id: ladder[ladder.index(width) + 1]}
                assert latency.latency_ms(wider) > config.latency_ms


def test_the_least_latency_is_named_and_works() -> None:
    graph, cost = two()
    latency = Stairs(graph, [100, 100, 100])
    options: dict[str, Any] = {"align": 8, "latency": latency}
    with pytest.raises(RecipeError, match=r"expected prune\.latency_ms >= 0\.350, .*; got 0\.1; raise it") as error:
        allocate(random_scores(graph), graph, cost, in_mode("importance", latency_ms=0.1), **options)
    least = float(str(error.value).split(">= ")[1].split(",")[0])
    result = allocate(random_scores(graph), graph, cost, in_mode("importance", latency_ms=least), **options)
    assert latency.latency_ms(result.widths) <= least
    assert result.widths == {"m0.weight": 16, "m1.weight": 16}  # narrower within the tile would save nothing


def test_latency_needs_a_prediction() -> None:
    graph, cost = two()
    with pytest.raises(StageError, match=r"expected a latency prediction for prune\.latency_ms; got none"):
        allocate(random_scores(graph), graph, cost, in_mode("global", latency_ms=1.0), align=8)


@pytest.mark.parametrize("value", [float("nan"), -1.0])
def test_a_latency_that_is_none_is_an_error(value: float) -> None:
    class Broken(Stairs):
        def latency_ms(self, widths: Any) -> float:
            return value

    graph, cost = two()
    with pytest.raises(StageError, match="expected finite predicted latencies"):
        allocate(
            random_scores(graph),
            graph,
            cost,
            in_mode("global", latency_ms=1.0),
            align=8,
            latency=Broken(graph, [1] * 3),
        )


@pytest.mark.parametrize("unit", ["macs", "params"])
def test_importance_keeps_no_less_score_than_the_ranking(unit: str) -> None:
    better = 0
    for seed in range(15):
        draw = np.random.default_rng(seed)
        graph = chain([8 * int(n) for n in draw.integers(2, 9, 5)])
        cost = table(graph, draw.integers(1, 50, 6).tolist())
        scores = random_scores(graph, seed)
        kept = {}
        for allocation in ("global", "importance"):
            result = allocate(scores, graph, cost, in_mode(allocation, **{unit: 0.5}), align=8)
            kept[allocation] = sum(float(scores[g][c].sum()) for g, c in result.kept.items())
            lost = sum(float(s.sum()) for s in scores.values()) - kept[allocation]
            assert result.objective == pytest.approx(lost, abs=1e-4)
        assert kept["importance"] >= kept["global"] - 1e-6
        better += kept["importance"] > kept["global"] + 1e-6
    assert better >= 5


def test_distortion_decides_the_widths_and_scores_the_channels() -> None:
    graph, cost = two()
    scores = random_scores(graph)
    config = in_mode("distortion", macs=0.55)
    made = curves(graph, config, 8)
    made["m0.weight"] = Curve(
        widths=made["m0.weight"].widths, distortion=np.array([0.0, 5.0, 6.0, 7.0]), fisher=np.zeros((4, 0))
    )
    made["m1.weight"] = Curve(
        widths=made["m1.weight"].widths, distortion=np.array([0.0, 0.1, 0.2, 9.0]), fisher=np.zeros((4, 0))
    )
    result = allocate(scores, graph, cost, config, align=8, distortion=made)
    assert result.widths == {"m0.weight": 32, "m1.weight": 16}
    assert result.objective == pytest.approx(0.2)
    assert result.iterations > 0
    for group in graph.groups:
        check_kept(group, scores[group.id], result)


def test_distortion_keeps_no_channel_that_was_measured_to_harm() -> None:
    graph, cost = two()
    config = in_mode("distortion", macs=1.0)
    made = curves(graph, config, 8)
    assert allocate(random_scores(graph), graph, cost, config, align=8, distortion=made).widths == graph.widths
    made["m0.weight"] = Curve(
        widths=made["m0.weight"].widths, distortion=np.array([0.0, -0.5, 1.0, 2.0]), fisher=np.zeros((4, 0))
    )
    result = allocate(random_scores(graph), graph, cost, config, align=8, distortion=made)
    assert result.widths == {"m0.weight": 24, "m1.weight": 32}


@pytest.mark.parametrize(
    ("curve", "words"),
    [
        (None, r"curve over the widths \(32, 24, 16, 8\); got none at m0\.weight"),
        (
            Curve(widths=(32, 16), distortion=np.zeros(2), fisher=np.zeros((2, 0))),
            r"got one over the widths \(32, 16\)",
        ),
        (
            Curve(widths=(32, 24, 16, 8), distortion=np.array([0, 1, np.nan, 2]), fisher=np.zeros((4, 0))),
            r"expected 4 finite distortions; got shape \(4,\), 1 of them not finite, at m0\.weight",
        ),
    ],
)
def test_curves_that_do_not_fit_are_a_clear_error(curve: Curve | None, words: str) -> None:
    graph, cost = two()
    config = in_mode("distortion", macs=0.5)
    given_curves = {**curves(graph, config, 8)}
    if curve is None:
        del given_curves["m0.weight"]
    else:
        given_curves["m0.weight"] = curve
    with pytest.raises(StageError, match=words):
        allocate(random_scores(graph), graph, cost, config, align=8, distortion=given_curves)


@pytest.mark.parametrize("allocation", ["importance", "distortion"])
def test_whole_blocks_go_only_where_they_may(allocation: str) -> None:
    graph = chain([32, 32, 32])
    cost = table(graph, [1, 1, 1, 1])
    scores = random_scores(graph)
    scores["m1.weight"][:] = 1e-6
    block = ("m1.weight",)
    made = curves(graph, in_mode(allocation, macs=0.3, blocks=True), 8, blocks=block)
    made["m1.weight"] = Curve(
        widths=made["m1.weight"].widths, distortion=np.full(5, 1e-6) * np.arange(5), fisher=np.zeros((5, 0))
    )
    config = in_mode(allocation, macs=0.3, blocks=True)
    result = allocate(scores, graph, cost, config, align=8, distortion=made, removable=block)
    assert result.removed_blocks == block
    assert result.kept["m1.weight"] == []
    for blocks, removable in ((False, block), (True, ())):
        config = in_mode(allocation, macs=0.3, blocks=blocks)
        made = curves(graph, config, 8)
        result = allocate(scores, graph, cost, config, align=8, distortion=made, removable=removable)
        assert result.removed_blocks == ()
        assert min(result.widths.values()) > 0


def test_ladders_end_in_nothing_for_blocks_and_stay_whole_for_kept_modules() -> None:
    narrow, wide = chain([8, 40]).groups
    config = PruneConfig(macs=0.5, blocks=True, floor=0.3)
    ids = (narrow.id, wide.id)
    assert ladder_widths(wide, config, 8, [], ids) == (40, 32, 24, 16, 0)
    assert ladder_widths(narrow, config, 8, [], ids) == (8, 0)
    assert ladder_widths(narrow, config, 8, []) == (8,)
    notes: list[str] = []
    assert ladder_widths(wide, config.model_copy(update={"keep": ("m1",)}), 8, notes, ids) == (40,)
    assert notes == ["m1.weight: kept by prune.keep"]
