"""The benchmark of the gates, small: its shortcut is the gates' own bootstrap, and its rates are as promised."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scipy import stats as distributions

from fusepress.pipeline.gates import compare

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks/results/gates/rates.json"


@pytest.fixture(scope="module")
def run() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        yield importlib.import_module("benchmarks.gates.run")


@pytest.fixture(scope="module")
def trials(run: ModuleType) -> ModuleType:
    return importlib.import_module("benchmarks.gates.trials")


@pytest.mark.parametrize("facts", [{"clusters": 25}, {"clusters": 1, "frames": 50}])
def test_the_shortcut_is_the_gates_own_bootstrap(trials: ModuleType, facts: dict[str, Any]) -> None:
    world, metric = trials.World(drop=0.02, **facts), trials.METRIC
    sums = trials.simulate(world, 2, np.random.default_rng(1))
    shortcut = list(trials.conditions(sums, trials.draws_of(world, 40, seed=3)))[1]
    units = sums.either.shape[1]
    groups = ["d"] * units if world.clusters == 1 else [f"s{i}" for i in range(units)]

    def score(stats: dict[str, Any]) -> dict[str, float]:
        return {metric: float(stats["right"].sum() / stats["either"].sum())}

    dense, compressed = ({"right": p[1], "either": sums.either[1]} for p in (sums.dense, sums.compressed))
    direct = compare(dense, compressed, score, groups, replicates=40, seed=3)
    np.testing.assert_allclose(shortcut.replicates[metric], direct.replicates[metric], rtol=1e-12)
    np.testing.assert_allclose(shortcut.jackknife[metric], direct.jackknife[metric], rtol=1e-12)
    assert shortcut.dense == pytest.approx(direct.dense)
    assert shortcut.compressed == pytest.approx(direct.compressed)


@pytest.mark.parametrize(
    "facts", [{"clusters": 200, "losses": "skewed"}, {"clusters": 200}, {"clusters": 1, "frames": 4000}]
)
def test_the_worlds_true_drop_is_what_they_say(trials: ModuleType, facts: dict[str, Any]) -> None:
    sums = trials.simulate(trials.World(drop=0.04, **facts), 40, np.random.default_rng(2))
    drops = (sums.dense - sums.compressed).sum(axis=1) / sums.either.sum(axis=1)
    error = drops.std() / np.sqrt(len(drops))
    assert abs(drops.mean() - 0.04) < 4 * error
    assert error < 0.002


def test_wrong_verdicts_are_as_rare_as_promised_and_a_true_drop_is_caught(run: ModuleType, trials: ModuleType) -> None:
    def counts(drop: float) -> Counter[str]:
        world = trials.World(clusters=100, drop=drop)
        found: Counter[str] = trials.tally(world, run.ACCURACY, trials=300, replicates=400, seed=1)
        return found

    at_limit, twice, none = counts(run.LIMIT), counts(2 * run.LIMIT), counts(0.0)
    for wrong in ("PASS", "FAIL"):
        low = distributions.binomtest(at_limit[wrong], 300).proportion_ci(0.999, method="exact").low
        assert low <= run.BOUND, at_limit
    assert at_limit["PASS"] + at_limit["FAIL"] >= 3, "an interval that never errs is too wide"
    assert twice["FAIL"] >= 0.93 * 300
    assert none["PASS"] + none["ANOMALOUS"] >= 0.93 * 300
    assert twice["PASS"] == none["FAIL"] == 0


def test_a_count_of_other_code_is_made_again(run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def cells(name: str) -> dict[str, int]:
        def make() -> dict[str, int]:
            made.append(name)
            return {"PASS": 1}

        found: dict[str, int] = run.Cells(tmp_path / "cells.json", 10, 0).get("row", 5, make)
        return found

    assert cells("first") == cells("again") == {"PASS": 1}
    monkeypatch.setattr(run, "code_sha256", lambda: "another")
    cells("of other code")
    assert made == ["first", "of other code"]


def test_the_committed_result_holds_what_it_claims(run: ModuleType) -> None:
    result = json.loads(RESULT.read_text())
    assert result["trials"] >= 2000
    for row in result["at_the_limit"] + result["releases"]:
        for value in row.values():
            if isinstance(value, dict):
                exact = distributions.binomtest(value["count"], value["trials"]).proportion_ci(0.95, method="exact")
                assert (value["low"], value["high"]) == pytest.approx((exact.low, exact.high))
    assert run.markdown(result) == RESULT.with_suffix(".md").read_text()
