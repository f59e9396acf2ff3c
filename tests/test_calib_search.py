"""The search for layers to leave in floating point (calib/search.py)."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusepress.calib.search import Found, Trial, search


def additive(errors: dict[str, float], limit: float) -> tuple[list[frozenset[str]], object]:
    """A judge for which every unit left in INT8 adds its own error, and what it was asked."""
    asked: list[frozenset[str]] = []

    def judge(spared: frozenset[str]) -> Trial:
        asked.append(spared)
        return Trial(spared=spared, met=sum(e for name, e in errors.items() if name not in spared) <= limit)

    return asked, judge


def cheapest(errors: dict[str, float], costs: dict[str, float], limit: float) -> frozenset[str]:
    subsets = (frozenset(s) for n in range(len(errors) + 1) for s in itertools.combinations(errors, n))
    met = [s for s in subsets if sum(e for name, e in errors.items() if name not in s) <= limit]
    return min(met, key=lambda s: (sum(costs[name] for name in s), len(s)))


def ranked(errors: dict[str, float], costs: dict[str, float]) -> list[str]:
    return sorted(errors, key=lambda name: -errors[name] / costs[name])


SMALL = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 40).map(float), min_size=1, max_size=8)


@settings(max_examples=200, deadline=None)
@given(SMALL, st.integers(0, 160).map(float), st.randoms(use_true_random=False))
def test_the_result_meets_the_standard_and_no_unit_of_it_could_be_given_back(
    errors: dict[str, float], limit: float, random: object
) -> None:
    order = sorted(errors, key=lambda name: random.random())  # type: ignore[attr-defined]
    _, judge = additive(errors, limit)
    found = search(order, judge, most_trials=1000)  # type: ignore[arg-type]
    left = sum(e for name, e in errors.items() if name not in found.spared)
    assert left <= limit
    for name in found.spared:
        assert left + errors[name] > limit
    assert found.rung == ("int8" if not found.spared else "float" if len(found.spared) == len(errors) else "mixed")


@settings(max_examples=200, deadline=None)
@given(SMALL, st.integers(0, 160).map(float), st.integers(1, 6))
def test_with_few_trials_the_result_still_meets_the_standard(errors: dict[str, float], limit: float, most: int) -> None:
    asked, judge = additive(errors, limit)
    found = search(sorted(errors), judge, most_trials=most)  # type: ignore[arg-type]
    assert len(asked) <= most
    assert sum(e for name, e in errors.items() if name not in found.spared) <= limit
    # what was not tried is not claimed, but for the float model
    assert found.spared in asked or found.rung == "float"


@pytest.mark.parametrize("culprits", [("c",), ("b", "g"), ("a", "d", "h")])
def test_the_decision_is_that_of_the_exhaustive_table(culprits: tuple[str, ...]) -> None:
    """Eight units with unlike costs, of which a few are to blame: all 256 sets against the search."""
    errors = {name: 30.0 + i if name in culprits else 0.5 for i, name in enumerate("abcdefgh")}
    costs = {name: 1.0 + i % 3 for i, name in enumerate(errors)}
    asked, judge = additive(errors, limit=6.0)
    found = search(ranked(errors, costs), judge)  # type: ignore[arg-type]
    assert found.spared == cheapest(errors, costs, 6.0) == frozenset(culprits)
    assert len(asked) <= 10


def test_sixty_units_take_ten_trials() -> None:
    errors = {f"u{i}": 0.01 for i in range(60)} | {"u7": 3.0, "u31": 2.0, "u55": 4.0, "u2": 5.0, "u19": 2.5}
    asked, judge = additive(errors, limit=1.0)
    found = search(ranked(errors, dict.fromkeys(errors, 1.0)), judge)  # type: ignore[arg-type]
    assert found.spared == {"u2", "u7", "u19", "u31", "u55"}
    assert len(asked) <= 10
    assert len(set(asked)) == len(asked)  # nothing is judged twice


def test_where_nothing_helps_the_float_model_is_the_end() -> None:
    def judge(spared: frozenset[str]) -> Trial:
        return Trial(spared=spared, met=False, drop=math.pi)

    found = search(["a", "b", "c"], judge)
    assert found == Found(rung="float", spared=frozenset("abc"), trials=found.trials)
    assert found.trials[0].to_dict() == {"spared": [], "met": False, "value": None, "drop": math.pi, "high": None}
