"""Unstructured masks and the spread of a total sparsity over modalities (pipeline/scoring/unstructured.py)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fusepress.pipeline.scoring.unstructured import (
    HIGHEST,
    Scope,
    Spread,
    equal_spread,
    search_spread,
    shared,
    spread_sparing,
    unstructured_masks,
)

BRANCH_OF = {"camera.a": "camera", "camera.b": "camera", "lidar.a": "lidar", "head": "fusion"}
COUNTS = {"camera": 400, "lidar": 100, "fusion": 60}


def scores() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"camera.a": (7, 9), "camera.b": (3, 5, 2), "lidar.a": (11, 3), "head": (5, 4)}
    return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}


def removed(masks: dict[str, Tensor], branch: str) -> int:
    return sum(int((~mask).sum()) for name, mask in masks.items() if BRANCH_OF[name] == branch)


@pytest.mark.parametrize("scope", ["layer", "branch"])
def test_every_branch_loses_exactly_its_fraction(scope: Scope) -> None:
    values = scores()
    spread = {"camera": 0.9, "lidar": 0.35, "fusion": 0.0}
    masks = unstructured_masks(values, BRANCH_OF, spread, scope)
    for branch, fraction in spread.items():
        size = sum(value.numel() for name, value in values.items() if BRANCH_OF[name] == branch)
        assert removed(masks, branch) == round(fraction * size)
    assert masks["head"].all()


def test_the_scope_says_what_is_ranked_together() -> None:
    values = scores()
    values["camera.b"] += 10.0
    spread = equal_spread(0.5, {"camera": 1, "lidar": 1, "fusion": 1})
    by_layer = unstructured_masks(values, BRANCH_OF, spread, "layer")
    by_branch = unstructured_masks(values, BRANCH_OF, spread, "branch")
    assert int((~by_layer["camera.b"]).sum()) == 15
    assert by_branch["camera.b"].all()  # all of its scores are above those of camera.a
    everything = unstructured_masks(values, BRANCH_OF, spread, "global")
    kept = torch.cat([values[name][mask] for name, mask in everything.items()])
    gone = torch.cat([values[name][~mask] for name, mask in everything.items()])
    assert gone.max() <= kept.min()
    assert gone.numel() == sum(removed(by_branch, branch) for branch in spread)


@pytest.mark.parametrize("scope", ["layer", "branch"])
def test_the_lowest_scores_go(scope: Scope) -> None:
    values = scores()
    masks = unstructured_masks(values, BRANCH_OF, {"lidar": 0.5}, scope)
    gone, kept = values["lidar.a"][~masks["lidar.a"]], values["lidar.a"][masks["lidar.a"]]
    assert gone.max() <= kept.min()


@given(total=st.integers(0, 500), sizes=st.lists(st.integers(0, 200), min_size=1, max_size=8))
def test_shares_are_whole_sum_up_and_fit(total: int, sizes: list[int]) -> None:
    total = min(total, sum(sizes))
    parts = shared(total, sizes)
    assert sum(parts) == total
    assert all(0 <= part <= size for part, size in zip(parts, sizes, strict=True))


def zeros(spread: Spread) -> float:
    return sum(COUNTS[branch] * fraction for branch, fraction in spread.items())


def test_sparing_a_branch_keeps_the_number_of_zeros_or_says_that_it_cannot() -> None:
    spread = spread_sparing(0.5, COUNTS, ["fusion"])
    assert spread is not None
    assert spread["fusion"] == 0.0
    assert zeros(spread) == pytest.approx(0.5 * 560)
    assert spread_sparing(0.5, COUNTS, ["camera"]) is None  # lidar and fusion together have too few


def test_the_search_finds_the_best_spread_at_equal_zeros() -> None:
    """Damage is quadratic with a known optimum on the simplex: the LiDAR stands three times as much."""
    optimum = {"camera": 0.45, "lidar": 0.8, "fusion": (0.5 * 560 - 0.45 * 400 - 80) / 60}

    def damage(spread: Spread) -> float:
        return sum(COUNTS[b] * (spread[b] - optimum[b]) ** 2 for b in COUNTS)

    found = search_spread(0.5, COUNTS, damage, higher=False)
    assert all(zeros(spread) == pytest.approx(0.5 * 560) for spread, _ in found.tried)
    assert all(0 <= value <= HIGHEST for spread, _ in found.tried for value in spread.values())
    assert found.value == min(value for _, value in found.tried)
    assert found.value < 0.1 * damage(equal_spread(0.5, COUNTS))
    assert len(found.tried) <= 40


@pytest.mark.parametrize("most", [1, 5, 12, 40])
def test_no_more_spreads_are_judged_than_allowed(most: int) -> None:
    """Five branches: 11 starts, and 20 moves a round."""
    counts = dict.fromkeys("abcde", 100)
    judged: list[Spread] = []

    def damage(spread: Spread) -> float:
        judged.append(spread)
        return sum((value - k / 5) ** 2 for k, value in enumerate(spread.values()))

    found = search_spread(0.4, counts, damage, higher=False, most=most)
    assert len(judged) == len(found.tried) == most
    assert found.value == min(value for _, value in found.tried)


def test_where_nothing_is_better_the_spread_stays_equal() -> None:
    assert search_spread(0.5, COUNTS, lambda _: 1.0).spread == equal_spread(0.5, COUNTS)
