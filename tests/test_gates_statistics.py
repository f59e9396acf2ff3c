"""The statistics of the gates: BCa, blocks, jackknife, trust, several gates together, power."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as distributions

from fusepress.pipeline.evidence import Artifact, RunRecord, StageRecord, Verdict
from fusepress.pipeline.gates import (
    TRUSTED_UNITS,
    Condition,
    Finding,
    Interval,
    Replicates,
    bca_levels,
    block_length,
    bootstrap_replicates,
    compare,
    exit_code,
    interval,
    jackknife_values,
    judge,
    more_needed,
    together,
    unit_count,
)
from fusepress.pipeline.recipe import AccuracyGate, GatesConfig, RobustnessGate

Array = npt.NDArray[Any]


def ratio(stats: dict[str, Array]) -> dict[str, float]:
    """A metric that is not linear in the samples, as an intersection over union."""
    return {"iou": float(stats["common"].sum() / stats["either"].sum())}


def skewed(n: int, seed: int = 0) -> dict[str, Array]:
    generator = np.random.default_rng(seed)
    either = generator.lognormal(0, 1, n)
    return {"common": either * generator.beta(4, 1, n), "either": either}


ONNX = "a" * 64


def record() -> RunRecord:
    return RunRecord(
        schema=1,
        name="r",
        fusepress="0",
        target="t",
        recipe_sha256="0",
        task_sha256="1",
        checkpoint_sha256="2",
        seed=0,
        stages=[StageRecord(name="verify", status="done")],
        artifacts={"onnx": Artifact(path="m.onnx", sha256=ONNX)},
    )


# ---------------------------------------------------------------------------------------------------------------- BCa


@pytest.mark.parametrize("seed", range(3))
def test_bca_is_scipys_from_the_same_draws(seed: int) -> None:
    """At the plain level (scipy knows no expanded one), from our replicates and our jackknife."""
    n = 40
    stats, names = skewed(n, seed), [f"s{i}" for i in range(n)]
    drawn = bootstrap_replicates(stats, stats, ratio, names, replicates=999, seed=seed)["iou"][:, 0]
    left_out = jackknife_values(stats, stats, ratio, names)["iou"][:, 0]
    point = ratio(stats)["iou"]

    def of_rows(rows: Array, axis: int = -1) -> Any:
        return stats["common"][rows].sum(axis) / stats["either"][rows].sum(axis)

    class Stored:
        bootstrap_distribution = drawn

    theirs = distributions.bootstrap(
        (np.arange(n),), of_rows, n_resamples=0, bootstrap_result=Stored(), method="BCa", vectorized=True
    ).confidence_interval
    levels = bca_levels(point, drawn, left_out, 0.025)
    assert tuple(np.quantile(drawn, levels)) == pytest.approx((theirs.low, theirs.high), rel=1e-9)
    assert levels != (0.025, 0.975)


def test_bca_of_a_symmetric_statistic_is_the_percentile_interval() -> None:
    drawn = np.linspace(-1, 1, 2001)
    assert bca_levels(0.0, drawn, np.array([-1.0, 0.0, 1.0]), 0.025) == pytest.approx((0.025, 0.975))


@pytest.mark.parametrize("point", [-2.0, 2.0])
def test_bca_with_all_replicates_on_one_side_is_the_percentile_interval(point: float) -> None:
    assert bca_levels(point, np.linspace(-1, 1, 101), np.arange(5.0), 0.025) == (0.025, 0.975)


@settings(max_examples=60, deadline=None)
@given(
    drawn=st.lists(st.floats(-1, 1), min_size=5, max_size=60),
    left_out=st.lists(st.floats(-1, 1), min_size=0, max_size=30),
    point=st.floats(-1, 1),
    units=st.integers(2, 100),
)
def test_an_accelerated_interval_holds_its_point_and_mirrors(
    drawn: list[float], left_out: list[float], point: float, units: int
) -> None:
    values, jackknife = np.array(drawn), np.array(left_out)
    found, mirrored = interval(point, values, units, jackknife), interval(-point, -values, units, -jackknife)
    assert found is not None
    assert mirrored is not None
    assert found.low <= point <= found.high
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low), abs=1e-6)


def test_the_p_value_agrees_with_the_interval_and_with_students_t() -> None:
    found = Interval(1.0, 0.5, 2.0, df=24)
    assert found.p_within(0.5) == pytest.approx(0.025)
    assert found.p_within(1.0) == 1.0
    deviate = float(distributions.t.isf(0.025, 24)) * 1.5
    assert found.p_within(0.25) == pytest.approx(float(distributions.t.sf(deviate, 24)))
    assert Interval(1.0, 1.0, 1.0).p_within(0.9) == 0.0
    assert Interval(1.0, 1 - 1.959964, 3.0).p_within(1 - 1.959964) == pytest.approx(0.025)  # no df: the normal tail


# -------------------------------------------------------------------------------------------------- jackknife, blocks


def test_the_jackknife_leaves_whole_clusters_out() -> None:
    groups = ["a", "b", "a", "c", "c", "b"]
    stats = {"common": np.arange(1.0, 7.0), "either": np.full(6, 10.0)}
    found = jackknife_values(stats, stats, ratio, groups)["iou"]
    rest = [[1, 3, 4, 5], [0, 2, 3, 4], [0, 1, 2, 5]]
    expected = [stats["common"][rows].sum() / (10 * len(rows)) for rows in rest]
    np.testing.assert_allclose(found, np.stack([expected, expected], axis=1))


def test_above_200_units_are_left_out_in_groups_of_equal_acceleration() -> None:
    stats = skewed(1000)
    names = [f"s{i}" for i in range(1000)]
    found = jackknife_values(stats, stats, ratio, names)["iou"]
    assert found.shape == (200, 2)
    rows = np.arange(1000)
    np.testing.assert_allclose(
        found[3, 0], ratio({k: v[np.delete(rows, range(15, 20))] for k, v in stats.items()})["iou"]
    )


def test_a_single_cluster_is_left_out_block_by_block() -> None:
    stats = skewed(10)
    found = jackknife_values(stats, stats, ratio, ["drive"] * 10)["iou"]
    blocks = [range(4), range(4, 8), range(8, 10)]
    expected = [ratio({k: np.delete(v, list(b)) for k, v in stats.items()})["iou"] for b in blocks]
    np.testing.assert_allclose(found[:, 0], expected)


def test_one_unit_has_no_jackknife() -> None:
    assert jackknife_values(skewed(1), skewed(1), ratio, ["a"]) == {}


@pytest.mark.parametrize(
    ("samples", "length", "units"), [(1, 1, 1), (2, 2, 1), (18, 5, 4), (400, 20, 20), (401, 21, 20)]
)
def test_blocks_are_as_long_as_the_root_of_the_samples(samples: int, length: int, units: int) -> None:
    assert (block_length(samples), unit_count(samples, 1)) == (length, units)
    assert unit_count(samples, 7) == 7


def test_blocks_are_drawn_in_a_row_around_the_end() -> None:
    seen: list[Array] = []

    def spy(stats: dict[str, Array]) -> dict[str, float]:
        seen.append(stats["row"])
        return {"m": 0.0}

    n = 30
    stats = {"row": np.arange(n)}
    bootstrap_replicates(stats, stats, spy, ["drive"] * n, replicates=50, seed=0)
    draws = seen[1:]
    firsts = set()
    for rows in draws:
        assert len(rows) == n
        for start in range(0, n, 6):
            block = rows[start : start + 6]
            firsts.add(int(block[0]))
            np.testing.assert_array_equal(block, (block[0] + np.arange(6)) % n)
    assert len(firsts) == n, "every start must be possible"


def test_blocks_see_the_dependence_that_single_samples_hide() -> None:
    """An AR(1) series of 0.8: the mean's true standard error is 3 times that of independent samples."""
    generator = np.random.default_rng(0)
    n = 900
    series = np.empty((40, n))
    noise = generator.normal(size=(40, n))
    series[:, 0] = noise[:, 0]
    for i in range(1, n):
        series[:, i] = 0.8 * series[:, i - 1] + 0.6 * noise[:, i]
    errors = []
    for row in series:
        stats = {"common": row + 100, "either": np.ones(n)}
        drawn = bootstrap_replicates(stats, stats, ratio, ["d"] * n, replicates=200, seed=1)["iou"][:, 0]
        errors.append(np.std(drawn))
    # the mean's variance is (1 / n) * (1 + 0.8) / (1 - 0.8); a block of 30 loses 1 - 2 * 0.8 / (30 * 0.36) of it
    assert np.mean(errors) == pytest.approx(math.sqrt(9 / n), rel=0.15)


# ---------------------------------------------------------------------------------------------------------------- trust


def judged(samples: int, clusters: int, drop: float) -> Verdict:
    generator = np.random.default_rng(3)
    groups = [f"s{i * clusters // samples}" for i in range(samples)]
    hit = generator.random(samples)
    stats = {"common": hit, "either": np.ones(samples)}
    worse = {"common": hit - drop + generator.normal(0, 0.01, samples), "either": np.ones(samples)}
    condition = compare(stats, worse, ratio, groups, replicates=300, seed=0)
    replicates = Replicates(clean=condition, samples=samples, clusters=clusters, artifact_sha256=ONNX)
    [verdict] = judge(record(), replicates, GatesConfig(accuracy=AccuracyGate(max_drop=0.05)), {"iou": "max"})
    return verdict


@pytest.mark.parametrize(("drop", "expected"), [(0.0, "PASS"), (0.1, "FAIL"), (-0.1, "ANOMALOUS")])
def test_below_20_clusters_nothing_is_decided(drop: float, expected: str) -> None:
    assert judged(100, TRUSTED_UNITS, drop).verdict == expected
    few = judged(95, TRUSTED_UNITS - 1, drop)
    assert few.verdict == "INCONCLUSIVE"
    assert "there are only 19 clusters, and below 20 a bootstrap is not trusted" in few.why
    assert "at least 1 more clusters (about 5 samples)" in few.why


def test_a_single_drive_needs_enough_blocks() -> None:
    assert judged(871, 1, 0.01).verdict == "PASS"
    short = judged(18, 1, 0.0)
    assert short.verdict == "INCONCLUSIVE"
    assert "one cluster of 18 samples gives 4 blocks" in short.why
    least = next(n for n in itertools.count(18) if unit_count(n, 1) >= 30)
    assert least == 871
    assert f"at least {least - 18} more samples" in short.why


# ---------------------------------------------------------------------------------------------------------- together


def finding(says: str, p: float | None, gate: str = "g") -> Finding:
    return Finding(Verdict.model_validate({"gate": gate, "verdict": says, "why": "w"}), p)


def says(findings: Sequence[Finding]) -> list[str]:
    return [verdict.verdict for verdict in together(findings)]


def test_a_single_gate_is_judged_as_it_is() -> None:
    assert says([finding("FAIL", 0.025)]) == ["FAIL"]


def test_holm_steps_down() -> None:
    """Of three: 2.5 % / 3 = 0.0083, then 0.0125, then 0.025; after the first that does not stand, none does."""
    assert says([finding("FAIL", 0.02), finding("FAIL", 0.008), finding("FAIL", 0.012)]) == ["FAIL", "FAIL", "FAIL"]
    assert says([finding("FAIL", 0.02), finding("FAIL", 0.008), finding("FAIL", 0.013)]) == [
        "INCONCLUSIVE",
        "FAIL",
        "INCONCLUSIVE",
    ]
    assert says([finding("FAIL", 0.02), finding("PASS", 1.0)]) == ["INCONCLUSIVE", "PASS"]


def test_a_missing_number_fails_in_any_company_and_makes_none() -> None:
    assert says([finding("FAIL", None), finding("FAIL", 0.02)]) == ["FAIL", "FAIL"]


@settings(max_examples=100, deadline=None)
@given(ps=st.lists(st.floats(0, 0.05), min_size=1, max_size=6))
def test_holm_is_the_closed_test_of_bonferroni(ps: list[float]) -> None:
    """By definition: a gate fails when every set of gates that holds it is refused by Bonferroni."""
    fails = [p <= 0.025 for p in ps]
    findings = [finding("FAIL" if fail else "INCONCLUSIVE", p) for p, fail in zip(ps, fails, strict=True)]
    sets = [s for size in range(1, len(ps) + 1) for s in itertools.combinations(range(len(ps)), size)]
    expected = [
        "FAIL" if all(min(ps[j] for j in s) <= 0.025 / len(s) for s in sets if i in s) else "INCONCLUSIVE"
        for i in range(len(ps))
    ]
    near = any(abs(p * size - 0.025) < 1e-9 for p in ps for size in range(1, 7))
    assert near or says(findings) == expected


def test_a_doubtful_fail_among_many_gates_says_why() -> None:
    [doubted, _] = together([finding("FAIL", 0.02), finding("PASS", 1.0)])
    assert "by itself that would fail (p = 0.02), but of 2 gates judged together" in doubted.why


def test_false_fails_of_a_release_do_not_add_up() -> None:
    """Ten gates, each true value exactly on its limit: by themselves one in five releases would fail."""
    generator = np.random.default_rng(5)
    trials, alone, held = 2000, 0, 0
    for z in generator.normal(size=(trials, 10)):
        ps = [float(p) for p in distributions.norm.sf(z)]
        findings = [finding("FAIL" if p <= 0.025 else "INCONCLUSIVE", p) for p in ps]
        alone += any(f.verdict.verdict == "FAIL" for f in findings)
        held += "FAIL" in says(findings)
    assert alone / trials == pytest.approx(1 - 0.975**10, abs=0.03)
    upper = float(distributions.binomtest(held, trials).proportion_ci(0.99).low)
    assert upper <= 0.025


@pytest.mark.parametrize(
    ("verdict", "codes"),
    [("PASS", (0, 0, 0)), ("INCONCLUSIVE", (4, 0, 0)), ("ANOMALOUS", (4, 4, 0)), ("FAIL", (3, 3, 3))],
)
def test_what_is_let_pass_is_chosen(verdict: Any, codes: tuple[int, int, int]) -> None:
    assert (exit_code(verdict), exit_code(verdict, "anomalous"), exit_code(verdict, "fail")) == codes


# ------------------------------------------------------------------------------------------------------------- power


def test_the_samples_asked_for_decide_with_the_power_said() -> None:
    """A normal mean of known spread: at n + more, four of five repetitions end with the limit outside the interval."""
    n, distance, sd = 100, 0.1, 1.0
    half = 1.959964 * sd / math.sqrt(n)
    more = more_needed(Interval(0.0, -half, half), distance, n)
    assert more is not None
    error = sd / math.sqrt(n + more)
    decided = distributions.norm.cdf(distance / error - 1.959964)
    assert decided == pytest.approx(0.8, abs=0.005)
    assert more_needed(Interval(0.0, -1.0, 1.0), 1e-4, n) is None


# -------------------------------------------------------------------------------------------------------------- strata


def test_floors_of_strata_are_judged_on_their_own_samples() -> None:
    by_day = Replicates(clean=steady(0.8), samples=400, clusters=100)
    by_night = Replicates(clean=steady(0.5), samples=200, clusters=50)
    rain = Replicates(clean=steady(0.9), samples=8, clusters=2)
    strata = {"day": by_day, "night": by_night, "rain": rain}
    whole = Replicates(clean=steady(0.7), samples=608, clusters=152, strata=strata, artifact_sha256=ONNX)
    floors = {"iou": 0.6, "iou@night": 0.6, "iou@day": 0.6, "iou@fog": 0.1, "iou@*": 0.4}
    verdicts = judge(record(), whole, GatesConfig(floors=floors), {"iou": "max"})
    found = [(v.gate, v.verdict) for v in verdicts]
    assert found == [
        ("floors.iou", "PASS"),
        ("floors.iou@night", "FAIL"),
        ("floors.iou@day", "PASS"),
        ("floors.iou@fog", "FAIL"),
        ("floors.iou@day", "PASS"),
        ("floors.iou@night", "PASS"),
        ("floors.iou@rain", "INCONCLUSIVE"),
    ]
    assert "there are day, night, rain" in verdicts[3].why


def steady(value: float) -> Condition:
    drawn = value + 0.001 * np.random.default_rng(1).normal(size=(400, 2))
    return Condition(dense={"iou": value}, compressed={"iou": value}, replicates={"iou": drawn})


def test_an_extra_drop_uses_the_jackknife_of_both_conditions() -> None:
    stats, worse = skewed(60), skewed(60, 1)
    names = [f"s{i}" for i in range(60)]
    clean = compare(stats, stats, ratio, names, replicates=300, seed=0)
    failed = compare(stats, worse, ratio, names, replicates=300, seed=0)
    replicates = Replicates(clean=clean, failures={("f", 3): failed}, samples=60, clusters=60, artifact_sha256=ONNX)
    gates = GatesConfig(robustness={"f": RobustnessGate(max_extra_drop=0.5)})
    [verdict] = judge(record(), replicates, gates, {"iou": "max"})
    change = failed.replicates["iou"] - clean.replicates["iou"]
    left_out = failed.jackknife["iou"] - clean.jackknife["iou"]
    value = (failed.dense["iou"] - failed.compressed["iou"]) - (clean.dense["iou"] - clean.compressed["iou"])
    expected = interval(value, change[:, 0] - change[:, 1], 60, left_out[:, 0] - left_out[:, 1])
    assert expected is not None
    assert [verdict.low, verdict.high] == pytest.approx([expected.low, expected.high])
