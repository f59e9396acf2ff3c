"""Gates: bootstrap, intervals, the stored file, and every verdict rule."""

from __future__ import annotations

import math
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fusepress.pipeline.errors import StoreError, TaskError
from fusepress.pipeline.evidence import Artifact, Kind, Measurement, RunRecord, StageRecord, Verdict
from fusepress.pipeline.gates import (
    NO_GATE,
    Condition,
    Direction,
    Interval,
    Replicates,
    bootstrap_replicates,
    compare,
    exit_code,
    interval,
    judge,
    load_replicates,
    metric_intervals,
    overall,
    save_replicates,
)
from fusepress.pipeline.recipe import AccuracyGate, GatesConfig, LatencyGate, RobustnessGate

Array = npt.NDArray[Any]
ONNX, ENGINE, OTHER = "a" * 64, "b" * 64, "c" * 64
MIOU: dict[str, Direction] = {"miou": "max"}
RMSE: dict[str, Direction] = {"rmse": "min"}


def mean_score(stats: dict[str, Array]) -> dict[str, float]:
    return {"miou": float(stats["hit"].mean())}


def names_of(clusters: int, size: int) -> list[str]:
    return [f"scene{index // size}" for index in range(clusters * size)]


# ---------------------------------------------------------------------------------------------------------- bootstrap


def test_both_models_are_scored_on_the_same_draw() -> None:
    hit = np.random.default_rng(0).random(60)
    drawn = bootstrap_replicates({"hit": hit}, {"hit": hit - 0.25}, mean_score, names_of(20, 3), replicates=50, seed=1)[
        "miou"
    ]
    assert drawn.shape == (50, 2)
    assert np.ptp(drawn[:, 0]) > 0.01, "the draws must differ"
    np.testing.assert_allclose(drawn[:, 0] - drawn[:, 1], 0.25, atol=1e-12)


def test_whole_clusters_are_drawn() -> None:
    seen: list[Array] = []

    def spy(stats: dict[str, Array]) -> dict[str, float]:
        seen.append(stats["scene"])
        return {"miou": 0.0}

    scene = np.repeat(np.arange(5), [1, 2, 3, 4, 5])
    stats = {"scene": scene}
    bootstrap_replicates(stats, stats, spy, [f"s{i}" for i in scene], replicates=40, seed=0)
    draws = [array for array in seen if len(array) != 15 or not np.array_equal(array, scene)]
    assert draws
    for array in draws:
        values, counts = np.unique(array, return_counts=True)
        assert all(count % (value + 1) == 0 for value, count in zip(values, counts, strict=True))
        assert sum(count // (value + 1) for value, count in zip(values, counts, strict=True)) == 5


def test_a_single_cluster_draws_blocks_in_a_row_and_the_verdict_says_so() -> None:
    samples = 900  # 30 blocks of 30
    hit = np.random.default_rng(2).random(samples)
    condition = compare({"hit": hit}, {"hit": hit}, mean_score, ["drive"] * samples, replicates=200, seed=0)
    replicates = Replicates(clean=condition, samples=samples, clusters=1, artifact_sha256=ONNX)
    assert replicates.units == 30
    [verdict] = judge(run(), replicates, GatesConfig(accuracy=AccuracyGate(max_drop=0.1)), MIOU)
    assert verdict.verdict == "PASS"
    assert "one cluster, so blocks of 30 in a row were drawn" in verdict.why


def test_spread_matches_the_clustered_standard_error() -> None:
    generator = np.random.default_rng(3)
    level = np.repeat(generator.normal(size=100), 4)  # perfectly correlated within a cluster
    stats = {"hit": level}
    drawn = bootstrap_replicates(stats, stats, mean_score, names_of(100, 4), replicates=600, seed=0)["miou"][:, 0]
    assert np.std(drawn) == pytest.approx(np.std(level) / math.sqrt(100), rel=0.12)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), sizes=st.lists(st.integers(1, 4), min_size=1, max_size=6), shift=st.floats(-5, 5))
def test_replicates_do_not_change_with_the_names_of_clusters_or_the_seed_repeated(
    seed: int, sizes: list[int], shift: float
) -> None:
    scene = np.repeat(np.arange(len(sizes)), sizes)
    hit = np.random.default_rng(seed).random(len(scene))
    dense, compressed = {"hit": hit}, {"hit": hit[::-1].copy()}
    first = bootstrap_replicates(dense, compressed, mean_score, [f"s{i}" for i in scene], replicates=20, seed=seed)
    again = bootstrap_replicates(dense, compressed, mean_score, [f"z{99 - i}" for i in scene], replicates=20, seed=seed)
    np.testing.assert_array_equal(first["miou"], again["miou"])
    moved = bootstrap_replicates(
        {"hit": hit + shift}, {"hit": hit[::-1] + shift}, mean_score, list(map(str, scene)), replicates=20, seed=seed
    )
    np.testing.assert_allclose(moved["miou"], first["miou"] + shift, atol=1e-9)
    swapped = bootstrap_replicates(compressed, dense, mean_score, list(map(str, scene)), replicates=20, seed=seed)
    np.testing.assert_array_equal(swapped["miou"], first["miou"][:, ::-1])


def test_another_seed_gives_other_draws() -> None:
    stats = {"hit": np.random.default_rng(0).random(30)}
    one, two = (
        bootstrap_replicates(stats, stats, mean_score, names_of(10, 3), replicates=20, seed=seed)["miou"]
        for seed in (0, 1)
    )
    assert not np.array_equal(one, two)


@pytest.mark.parametrize(
    ("dense", "compressed", "match"),
    [
        ({"hit": np.ones(3)}, {"miss": np.ones(3)}, "the same statistics of both models"),
        ({"hit": np.ones(3)}, {"hit": np.ones(2)}, r"leading dimension of 3 .* \(2,\) at 'hit' of the compressed"),
        ({"hit": np.float64(1.0)}, {"hit": np.ones(3)}, "of the dense model"),
        ({}, {}, "the same statistics"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(dense: Any, compressed: Any, match: str) -> None:
    with pytest.raises(TaskError, match=match):
        bootstrap_replicates(dense, compressed, mean_score, ["a", "b", "c"], replicates=5, seed=0)


def test_a_score_that_changes_its_metrics_is_refused() -> None:
    def moody(stats: dict[str, Array]) -> dict[str, float]:
        return {f"iou_{int(value)}": 1.0 for value in np.unique(stats["hit"])}

    stats = {"hit": np.arange(6.0)}
    with pytest.raises(TaskError, match="return NaN for a metric that is undefined"):
        bootstrap_replicates(stats, stats, moody, list("abcdef"), replicates=20, seed=0)


# ----------------------------------------------------------------------------------------------------------- interval


@settings(max_examples=60, deadline=None)
@given(
    drawn=st.lists(st.floats(-1, 1), min_size=5, max_size=60),
    point=st.floats(-1, 1),
    units=st.integers(2, 200),
    shift=st.floats(-2, 2),
)
def test_an_interval_holds_its_point_mirrors_and_moves(
    drawn: list[float], point: float, units: int, shift: float
) -> None:
    array = np.array(drawn)
    found = interval(point, array, units)
    assert found is not None
    assert found.low <= found.value <= found.high
    mirrored = interval(-point, -array, units)
    assert mirrored is not None
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low), abs=1e-12)
    moved = interval(point + shift, array + shift, units)
    assert moved is not None
    assert (moved.low, moved.high) == pytest.approx((found.low + shift, found.high + shift), abs=1e-9)


def test_many_clusters_give_the_plain_percentiles() -> None:
    drawn = np.random.default_rng(0).normal(size=4001)
    found = interval(0.0, drawn, 100_000)
    assert found is not None
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=2e-3)


def test_the_interval_is_as_wide_as_its_source_says() -> None:
    """Five clusters: t(0.975, 4) = 2.776445 times the standard error times sqrt(5 / 4)."""
    drawn = np.random.default_rng(0).normal(size=20_001)
    few, many = interval(0.0, drawn, 5), interval(0.0, drawn, 20)
    assert few is not None
    assert many is not None
    assert few.high == pytest.approx(2.776445 * float(np.std(drawn)) * math.sqrt(5 / 4), rel=1e-6)
    # t(0.975, 19) = 2.093024, times sqrt(20 / 19) = 2.147397, of which the normal tail is 0.015881
    assert (many.low, many.high) == pytest.approx(tuple(np.quantile(drawn, [0.015881, 1 - 0.015881])), abs=1e-4)


def test_fewer_clusters_give_a_wider_interval() -> None:
    drawn = np.random.default_rng(0).normal(size=4001)
    widths = [found.high - found.low for k in (2, 5, 9, 10, 30, 1000) if (found := interval(0.0, drawn, k))]
    assert len(widths) == 6
    assert widths == sorted(widths, reverse=True)


@pytest.mark.parametrize(
    ("point", "drawn", "units"),
    [
        (math.nan, np.ones(100), 10),
        (1.0, np.ones(100), 1),
        (1.0, np.array([]), 10),
        (1.0, np.r_[np.full(6, np.nan), np.ones(94)], 10),
    ],
)
def test_an_undefined_interval_is_none(point: float, drawn: Array, units: int) -> None:
    assert interval(point, drawn, units) is None


def test_a_class_missing_from_few_draws_does_not_matter() -> None:
    assert interval(1.0, np.r_[np.full(5, np.nan), np.ones(95)], 10) == Interval(1.0, 1.0, 1.0)


# ---------------------------------------------------------------------------------------------------- the stored file


def stored() -> Replicates:
    drawn = np.random.default_rng(0).random((50, 2))
    left_out = {"miou": drawn[:20] / 3}
    clean = Condition(dense={"miou": 0.6}, compressed={"miou": 0.5}, replicates={"miou": drawn}, jackknife=left_out)
    night = Replicates(clean=clean, samples=8, clusters=2)
    blank = Condition(dense={"miou": 0.4}, compressed={"miou": 0.3}, replicates={"miou": drawn / 2})
    return Replicates(
        clean=clean,
        failures={("camera_blank", 3): blank, ("camera_blank", 1): clean},
        strata={"night/wet": night},
        constant={"miou": 0.1},
        samples=80,
        clusters=20,
        artifact_sha256=ONNX,
    )


def test_replicates_come_back_as_they_were_and_their_bytes_are_stable(tmp_path: Path) -> None:
    one, two = tmp_path / "one.npz", tmp_path / "deep" / "two.npz"
    save_replicates(one, stored())
    save_replicates(two, load_replicates(one))
    assert one.read_bytes() == two.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"one.npz", "deep"}
    back = load_replicates(two)
    assert (back.samples, back.clusters, back.artifact_sha256) == (80, 20, ONNX)
    assert back.constant == {"miou": 0.1}
    assert set(back.failures) == {("camera_blank", 3), ("camera_blank", 1)}
    np.testing.assert_array_equal(
        back.failures["camera_blank", 3].replicates["miou"], stored().clean.replicates["miou"] / 2
    )
    assert back.clean.compressed == {"miou": 0.5}
    assert set(back.strata) == {"night/wet"}
    assert (back.strata["night/wet"].samples, back.strata["night/wet"].clusters) == (8, 2)
    for condition in (back.clean, back.strata["night/wet"].clean):
        np.testing.assert_array_equal(condition.jackknife["miou"], stored().clean.replicates["miou"][:20] / 3)
    assert back.failures["camera_blank", 3].jackknife == {}
    with np.load(one, allow_pickle=False) as archive:
        assert archive["dense/miou"].shape == (50,)
        assert archive["robustness/camera_blank/3/compressed/miou"].shape == (50,)


def test_a_missing_damaged_or_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "replicates.npz"
    with pytest.raises(StoreError, match=r"got no file at .*replicates\.npz"):
        load_replicates(path)
    save_replicates(path, stored())
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"PK\x03\x04 nonsense"):
        path.write_bytes(damaged)
        with pytest.raises(StoreError, match="got a file that does not fit"):
            load_replicates(path)
    np.savez_compressed(path, **{"meta/schema": np.array(1)})  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="compressed members, which could unpack to any size"):
        load_replicates(path)
    np.savez(path, other=np.ones(3))
    with pytest.raises(StoreError, match="does not fit"):
        load_replicates(path)
    np.savez(path, **{"meta/schema": np.array(9)})  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="schema 9, not 1"):
        load_replicates(path)


def test_a_pickle_in_the_file_is_never_read(tmp_path: Path) -> None:
    path = tmp_path / "replicates.npz"
    np.savez(path, **{"meta/schema": np.array([{"evil": 1}], dtype=object)})  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="does not fit"):
        load_replicates(path)


def test_members_that_lie_over_each_other_are_refused(tmp_path: Path) -> None:
    """A small file could name the same bytes any number of times."""
    path = tmp_path / "replicates.npz"
    save_replicates(path, stored())
    with zipfile.ZipFile(path, "a") as archive:
        archive.filelist.extend(max(archive.filelist, key=lambda member: member.file_size) for _ in range(30))
        archive._didModify = True  # type: ignore[attr-defined]
    with pytest.raises(StoreError, match="members that lie over each other"):
        load_replicates(path)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("meta/clusters", 0, "0 clusters of 80 samples"),
        ("meta/clusters", 81, "81 clusters of 80 samples"),
        ("meta/samples", -(10**15), "20 clusters of -"),
        ("meta/schema", np.inf, "infinity"),
        ("dense/miou", np.ones((50, 2)), "no list of numbers"),
        ("strata/day/meta/samples", 3, "does not fit"),
        ("dense/other", np.ones(50), "does not fit"),
    ],
)
def test_replicates_that_do_not_hold_together_are_refused(name: str, value: Any, told: str, tmp_path: Path) -> None:
    path = tmp_path / "replicates.npz"
    save_replicates(path, stored())
    with np.load(path) as archive:
        arrays = dict(archive)
    arrays[name] = np.array(value)
    if name == "dense/miou":
        arrays["compressed/miou"] = np.array(value)
    np.savez(path, **arrays)
    with pytest.raises(StoreError, match=told):
        load_replicates(path)


def test_a_failure_name_with_a_slash_is_refused(tmp_path: Path) -> None:
    bad = Replicates(clean=stored().clean, failures={("a/b", 1): stored().clean}, samples=1, clusters=1)
    with pytest.raises(StoreError, match="without '/'"):
        save_replicates(tmp_path / "replicates.npz", bad)


def test_the_stored_zip_carries_no_time(tmp_path: Path) -> None:
    save_replicates(tmp_path / "r.npz", stored())
    with zipfile.ZipFile(tmp_path / "r.npz") as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


# ---------------------------------------------------------------------------------------------------- accuracy, floors


def run(*latencies: Measurement, artifacts: dict[str, str] | None = None, **changes: Any) -> RunRecord:
    fields: dict[str, Any] = {
        "name": "r",
        "fusepress": "0.1.0",
        "target": "jetson-agx-orin-64gb",
        "recipe_sha256": "0" * 64,
        "task_sha256": "1" * 64,
        "checkpoint_sha256": "2" * 64,
        "seed": 0,
        "target_profile": {"power_mode": "MAXN", "precision": "int8"},
        "stages": [StageRecord(name="verify", status="done", measurements=list(latencies))],
        "artifacts": {
            key: Artifact(path=key, sha256=sha256)
            for key, sha256 in ({"onnx": ONNX, "engine": ENGINE} if artifacts is None else artifacts).items()
        },
    }
    return RunRecord(**{**fields, **changes})


def spread(point: float, half: float) -> Array:
    """Replicates whose percentile interval at many clusters is about point +- half."""
    return point + half / 1.96 * np.random.default_rng(5).normal(size=4000)


def pair(dense: float, compressed: float, half: float, metric: str = "miou", *, common: float = 0.02) -> Condition:
    """A condition whose paired difference has the half-width `half`; `common` moves both models together."""
    shared = common * np.random.default_rng(6).normal(size=4000)
    columns = np.stack([dense + shared, spread(compressed, half) + shared], axis=1)
    return Condition(dense={metric: dense}, compressed={metric: compressed}, replicates={metric: columns})


def replicates_of(condition: Condition, **changes: Any) -> Replicates:
    fields: dict[str, Any] = {"clean": condition, "samples": 1000, "clusters": 500, "artifact_sha256": ONNX}
    return Replicates(**{**fields, **changes})


ACCURACY = GatesConfig(accuracy=AccuracyGate(max_drop=0.03))


@pytest.mark.parametrize(
    ("drop", "half", "expected"),
    [
        (0.010, 0.015, "PASS"),
        (0.025, 0.015, "INCONCLUSIVE"),
        (0.035, 0.015, "INCONCLUSIVE"),
        (0.050, 0.015, "FAIL"),
        (0.030, 0.0, "PASS"),  # exactly at the limit, whatever floating point says
        (0.0, 0.0, "PASS"),
        (-0.01, 0.02, "PASS"),  # better, within noise
        (-0.05, 0.02, "ANOMALOUS"),
        (0.0, 0.05, "INCONCLUSIVE"),
    ],
)
@pytest.mark.parametrize("direction", ["max", "min"])
def test_accuracy_rule(drop: float, half: float, expected: str, direction: Direction) -> None:
    sign = 1 if direction == "max" else -1
    [verdict] = judge(run(), replicates_of(pair(0.66, 0.66 - sign * drop, half)), ACCURACY, {"miou": direction})
    assert verdict.gate == "accuracy.miou"
    assert verdict.verdict == expected
    assert verdict.limit == 0.03
    assert verdict.value == pytest.approx(drop, abs=1e-12)
    assert verdict.low is not None
    assert verdict.high is not None
    assert verdict.low <= drop + 1e-12
    assert verdict.high >= drop - 1e-12
    assert ("more samples" in verdict.why) == (expected == "INCONCLUSIVE")


def test_the_accuracy_gate_can_name_another_metric() -> None:
    condition = pair(2.0, 2.5, 0.1, "rmse")
    gates = GatesConfig(accuracy=AccuracyGate(max_drop=0.2, metric="rmse"))
    [verdict] = judge(run(), replicates_of(condition), gates, {"miou": "max", "rmse": "min"})
    assert (verdict.gate, verdict.verdict) == ("accuracy.rmse", "FAIL")


def test_samples_needed_follow_the_square_root_law() -> None:
    """Half-width 0.02 at n = 1000 with 0.01 to go needs 1000 * (2 * (1 + 0.8416 / 1.96)) ** 2 = 8171 samples."""
    [verdict] = judge(run(), replicates_of(pair(0.6, 0.58, 0.02)), ACCURACY, MIOU)
    assert verdict.verdict == "INCONCLUSIVE"
    more = int(verdict.why.split("about ")[1].split(" more samples")[0].replace(",", ""))
    assert more == pytest.approx(7171, rel=0.1)
    assert f"({math.ceil(more / 2):,} clusters)" in verdict.why
    [stuck] = judge(run(), replicates_of(pair(0.6, 0.57, 0.02)), ACCURACY, MIOU)
    assert "no number of samples" in stuck.why


@pytest.mark.parametrize(
    ("record", "replicates", "direction", "why"),
    [
        (run(), None, MIOU, "no bootstrap replicates were stored"),
        (run(artifacts={}), replicates_of(pair(0.6, 0.6, 0.01)), MIOU, "there is no ONNX to release"),
        (run(), replicates_of(pair(0.6, 0.6, 0.01), artifact_sha256=OTHER), MIOU, "of another ONNX"),
        (run(), replicates_of(pair(0.6, 0.6, 0.01)), RMSE, "no bootstrap replicates of 'rmse'"),
        (run(), replicates_of(pair(math.nan, 0.6, 0.01)), MIOU, "not a number"),
        (run(), None, {}, "the task has no metric ''"),
    ],
)
def test_a_missing_number_fails_its_gate(
    record: RunRecord, replicates: Replicates | None, direction: dict[str, Direction], why: str
) -> None:
    [verdict] = judge(record, replicates, ACCURACY, direction)
    assert verdict.verdict == "FAIL"
    assert verdict.value is None
    assert verdict.why.startswith("missing number: ")
    assert why in verdict.why


def test_a_metric_undefined_in_many_draws_is_inconclusive() -> None:
    condition = pair(0.6, 0.6, 0.01)
    condition.replicates["miou"][:400] = np.nan
    [verdict] = judge(run(), replicates_of(condition), ACCURACY, MIOU)
    assert verdict.verdict == "INCONCLUSIVE"
    assert "no interval" in verdict.why


@pytest.mark.parametrize("direction", ["max", "min"])
@pytest.mark.parametrize(("undefined", "expected"), [(0, "PASS"), (40, "PASS"), (160, "INCONCLUSIVE")])
def test_undefined_draws_count_as_the_worst(undefined: int, expected: str, direction: Direction) -> None:
    """Of 4000 draws: where 2.5 % or more of the compressed model's are NaN, the upper end of its drop is among them."""
    condition = pair(0.6, 0.6, 0.01)
    columns = condition.replicates["miou"]
    sign = 1 if direction == "max" else -1
    worst = np.argsort(sign * (columns[:, 1] - columns[:, 0]))[:undefined]
    columns[worst, 1] = np.nan
    [verdict] = judge(run(), replicates_of(condition), ACCURACY, {"miou": direction})
    assert verdict.verdict == expected
    floor = GatesConfig(floors={"miou": 0.5 if direction == "max" else 0.7})
    assert judge(run(), replicates_of(condition), floor, {"miou": direction})[0].verdict == expected
    assert ("may be its worst" in verdict.why) == (expected == "INCONCLUSIVE")


@settings(max_examples=60, deadline=None)
@given(
    drawn=st.lists(st.floats(-1, 1), min_size=40, max_size=80),
    place=st.sets(st.integers(0, 39), max_size=2),
    filler=st.floats(-50, 50),
    units=st.integers(20, 300),
)
def test_an_undefined_draw_narrows_no_interval(drawn: list[float], place: set[int], filler: float, units: int) -> None:
    """Whatever the undefined draws really are, the interval with them undefined holds the one with them known."""
    known, unknown = np.array(drawn), np.array(drawn)
    known[list(place)], unknown[list(place)] = filler, np.nan
    found, truth = interval(0.0, unknown, units), interval(0.0, known, units)
    assert truth is not None
    if found is not None:
        assert found.low <= truth.low + 1e-12
        assert found.high >= truth.high - 1e-12


def test_replicates_without_a_hash_count_for_no_onnx() -> None:
    replicates = replicates_of(pair(0.6, 0.6, 0.01), artifact_sha256=None)
    [verdict] = judge(run(), replicates, ACCURACY, MIOU)
    assert verdict.verdict == "FAIL"
    assert "missing number: the bootstrap replicates do not say of which ONNX they are" in verdict.why


@pytest.mark.parametrize(
    ("value", "limit", "direction", "expected"),
    [
        (0.50, 0.40, "max", "PASS"),
        (0.42, 0.40, "max", "INCONCLUSIVE"),
        (0.30, 0.40, "max", "FAIL"),
        (0.30, 0.40, "min", "PASS"),
        (0.38, 0.40, "min", "INCONCLUSIVE"),
        (0.50, 0.40, "min", "FAIL"),
    ],
)
def test_floor_rule(value: float, limit: float, direction: Direction, expected: str) -> None:
    condition = pair(0.7, value, 0.05, common=0.0)
    gates = GatesConfig(floors={"miou": limit})
    [verdict] = judge(run(), replicates_of(condition), gates, {"miou": direction})
    assert (verdict.gate, verdict.verdict) == ("floors.miou", expected)
    assert verdict.value == value
    assert ("floor" if direction == "max" else "ceiling") in verdict.why
    assert verdict.low is not None
    assert verdict.high is not None
    assert verdict.low < value < verdict.high


def test_a_floor_of_an_unknown_metric_fails_and_names_the_known_ones() -> None:
    [verdict] = judge(run(), replicates_of(pair(0.6, 0.6, 0.0)), GatesConfig(floors={"iou_cat": 0.4}), MIOU)
    assert verdict.verdict == "FAIL"
    assert "it has miou" in verdict.why


@settings(max_examples=40, deadline=None)
@given(drop=st.floats(-0.2, 0.2), half=st.floats(0, 0.1), limit=st.floats(0, 0.2), step=st.floats(0.001, 0.2))
def test_a_looser_budget_never_makes_a_verdict_worse(drop: float, half: float, limit: float, step: float) -> None:
    rank = {"FAIL": 0, "INCONCLUSIVE": 1, "ANOMALOUS": 2, "PASS": 2}
    replicates = replicates_of(pair(0.6, 0.6 - drop, half))
    tight, loose = (
        judge(run(), replicates, GatesConfig(accuracy=AccuracyGate(max_drop=budget)), MIOU)[0]
        for budget in (limit, limit + step)
    )
    assert rank[loose.verdict] >= rank[tight.verdict]
    assert tight.value is not None
    assert tight.verdict != "PASS" or tight.value <= limit + 1e-9
    assert tight.verdict != "FAIL" or tight.value > limit


# --------------------------------------------------------------------------------------------------------- robustness


def robust(
    dense: float, compressed: float, *, gate: RobustnessGate, half: float = 0.005, constant: float | None = 0.1
) -> list[Verdict]:
    replicates = replicates_of(
        pair(0.60, 0.58, 0.0),
        failures={("camera_blank", gate.severity): pair(dense, compressed, half)},
        constant={} if constant is None else {"miou": constant},
    )
    return judge(run(), replicates, GatesConfig(robustness={"camera_blank": gate}), MIOU)


@pytest.mark.parametrize(
    ("compressed", "expected"),
    # dense loses 0.20; the compressed model loses 0.58 - x
    [(0.39, "PASS"), (0.37, "PASS"), (0.35, "INCONCLUSIVE"), (0.30, "FAIL"), (0.50, "PASS")],
)
def test_extra_drop_is_what_the_compressed_model_loses_beyond_the_dense_one(compressed: float, expected: str) -> None:
    [verdict] = robust(0.40, compressed, gate=RobustnessGate(max_extra_drop=0.03))
    assert (verdict.gate, verdict.verdict) == ("robustness.camera_blank", expected)
    assert verdict.value == pytest.approx((0.58 - compressed) - 0.20, abs=1e-12)


def test_extra_drop_of_a_metric_of_which_less_is_better() -> None:
    replicates = replicates_of(
        pair(2.0, 2.1, 0.0, "rmse"), failures={("lidar_half", 3): pair(3.0, 3.6, 0.01, "rmse")}, constant={"rmse": 6.8}
    )
    gates = GatesConfig(robustness={"lidar_half": RobustnessGate(max_extra_drop=0.3, min=4.0)})
    extra, ceiling = judge(run(), replicates, gates, RMSE)
    assert extra.value == pytest.approx(0.5)
    assert extra.verdict == "FAIL"
    assert ceiling.verdict == "PASS"


def test_the_extra_drop_is_paired_over_all_four_scores() -> None:
    """Noise common to clean and failure, and to both models, must cancel."""
    clean, failed = pair(0.60, 0.58, 0.0, common=0.3), pair(0.40, 0.37, 0.0, common=0.3)
    replicates = replicates_of(clean, failures={("camera_blank", 3): failed}, constant={"miou": -9.0})
    gates = GatesConfig(robustness={"camera_blank": RobustnessGate(max_extra_drop=0.03)})
    [verdict] = judge(run(), replicates, gates, MIOU)
    assert verdict.verdict == "PASS"
    assert verdict.high == pytest.approx(verdict.value, abs=1e-9)


def test_an_absolute_floor_under_a_failure_is_a_verdict_of_its_own() -> None:
    extra, floor = robust(0.40, 0.37, gate=RobustnessGate(max_extra_drop=0.03, min=0.5))
    assert extra.verdict == "PASS"
    assert (floor.gate, floor.verdict, floor.limit) == ("robustness.camera_blank.min", "FAIL", 0.5)


def test_one_failure_is_judged_at_several_severities_by_the_name() -> None:
    replicates = replicates_of(
        pair(0.60, 0.58, 0.0),
        failures={("camera_noise", 1): pair(0.50, 0.47, 0.005), ("camera_noise", 3): pair(0.40, 0.20, 0.005)},
        constant={"miou": 0.1},
    )
    gates = GatesConfig.model_validate(
        {
            "robustness": {
                "camera_noise@1": {"max_extra_drop": 0.03, "min": 0.4},
                "camera_noise": {"max_extra_drop": 0.03},
            }
        }
    )
    mild, floor, worst = judge(run(), replicates, gates, MIOU)
    assert (mild.gate, mild.verdict) == ("robustness.camera_noise@1", "PASS")
    assert mild.value == pytest.approx((0.58 - 0.47) - (0.60 - 0.50))
    assert "under camera_noise (severity 1)" in mild.why
    assert (floor.gate, floor.verdict) == ("robustness.camera_noise@1.min", "PASS")
    assert (worst.gate, worst.verdict) == ("robustness.camera_noise", "FAIL")


def test_a_severity_that_was_not_tried_fails_and_says_which_were() -> None:
    replicates = replicates_of(pair(0.6, 0.6, 0.0), failures={("camera_noise", 3): pair(0.5, 0.5, 0.0)})
    gates = GatesConfig(robustness={"camera_noise@2": RobustnessGate(max_extra_drop=0.1)})
    [verdict] = judge(run(), replicates, gates, MIOU)
    assert verdict.verdict == "FAIL"
    assert "camera_noise at severity 2 was not tried; tried: camera_noise (severity 3)" in verdict.why


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ({"camera_noise@4": {}}, "expected a severity of 1, 2 or 3 behind the @; got 'camera_noise@4'"),
        ({"camera_noise@": {}}, "expected a severity of 1, 2 or 3 behind the @"),
        ({"camera_noise@2": {"severity": 1}}, "expected one severity; got 2 in 'camera_noise@2' and severity: 1"),
        ({"camera_noise@3": {}, "camera_noise": {}}, "every failure and severity once; got camera_noise@3 in 2 gates"),
    ],
)
def test_a_severity_is_given_once(gates: dict[str, dict[str, Any]], message: str) -> None:
    given = {name: {"max_extra_drop": 0.1, **gate} for name, gate in gates.items()}
    with pytest.raises(ValidationError, match=message):
        GatesConfig.model_validate({"robustness": given})


@pytest.mark.parametrize(("dense", "blind"), [(0.10, True), (0.08, True), (0.13, True), (0.30, False)])
def test_a_dense_model_no_better_than_a_constant_says_nothing(dense: float, blind: bool) -> None:
    """0.13 +- 0.04 is above the constant's 0.10 as a point, but not beyond noise."""
    [verdict] = robust(dense, dense - 0.02, gate=RobustnessGate(max_extra_drop=0.03))
    assert ("constant predictor" in verdict.why) == blind
    assert verdict.verdict == ("INCONCLUSIVE" if blind else "PASS")


def test_without_a_constant_predictor_the_verdict_says_so() -> None:
    [verdict] = robust(0.05, 0.04, gate=RobustnessGate(max_extra_drop=0.03), constant=None)
    assert verdict.verdict == "PASS"
    assert "no" in verdict.why
    assert "constant predictor" in verdict.why


def test_a_failure_that_was_not_tried_fails_both_its_gates() -> None:
    gates = GatesConfig(robustness={"camera_blank": RobustnessGate(max_extra_drop=0.03, min=0.3, severity=2)})
    replicates = replicates_of(pair(0.6, 0.6, 0.0), failures={("camera_blank", 3): pair(0.4, 0.4, 0.0)})
    verdicts = judge(run(), replicates, gates, MIOU)
    assert [v.verdict for v in verdicts] == ["FAIL", "FAIL"]
    assert "camera_blank (severity 3)" in verdicts[0].why


def test_replicates_of_different_draws_are_not_paired() -> None:
    short = pair(0.4, 0.4, 0.0)
    short.replicates["miou"] = short.replicates["miou"][:100]
    replicates = replicates_of(pair(0.6, 0.6, 0.0), failures={("lidar_half", 3): short})
    gates = GatesConfig(robustness={"lidar_half": RobustnessGate(max_extra_drop=0.03)})
    [verdict] = judge(run(), replicates, gates, MIOU)
    assert verdict.verdict == "FAIL"
    assert "not paired" in verdict.why


# ------------------------------------------------------------------------------------------------------------ latency


def latency(
    value: float = 4.0, half: float | None = 0.5, kind: Kind = "measured", name: str = "latency.mean_ms", **changes: Any
) -> Measurement:
    fields: dict[str, Any] = {
        "name": name,
        "value": value,
        "unit": "ms",
        "low": None if half is None else value - half,
        "high": None if half is None else value + half,
        "n": 200,
        "kind": kind,
        "device": "jetson-agx-orin-64gb",
        "power_mode": "MAXN",
        "precision": "int8",
        "artifact_sha256": ONNX,
        "batch": 1,
    }
    return Measurement(**{**fields, **changes})


def judged(
    *latencies: Measurement,
    evidence: Sequence[Literal["measured", "predicted"]] = ("measured", "predicted"),
    **record: Any,
) -> Verdict:
    gates = GatesConfig(latency=LatencyGate(mean_ms=5.0, evidence=tuple(evidence)))
    [verdict] = judge(run(*latencies, **record), None, gates, {})
    return verdict


@pytest.mark.parametrize("kind", ["measured", "predicted"])
@pytest.mark.parametrize(
    ("value", "expected"), [(4.0, "PASS"), (4.5, "PASS"), (4.8, "INCONCLUSIVE"), (5.3, "INCONCLUSIVE"), (6.0, "FAIL")]
)
def test_latency_rule(value: float, expected: str, kind: Kind) -> None:
    verdict = judged(latency(value, kind=kind))
    assert (verdict.gate, verdict.verdict, verdict.value) == ("latency.mean_ms", expected, value)
    assert kind in verdict.why
    assert ("more runs" in verdict.why) == (expected == "INCONCLUSIVE" and kind == "measured")
    assert ("measure on the device" in verdict.why) == (expected == "INCONCLUSIVE" and kind == "predicted")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"device": "rtx-4090"}, "1 of rtx-4090 / MAXN / int8"),
        ({"device": None}, "of an unnamed device"),
        ({"power_mode": "30W"}, "of jetson-agx-orin-64gb / 30W / int8"),
        ({"power_mode": None}, "of jetson-agx-orin-64gb / int8"),
        ({"precision": "fp16"}, "/ MAXN / fp16"),
        ({"artifact_sha256": OTHER}, "of another artifact"),
        ({"artifact_sha256": None}, "of another artifact"),
        ({"kind": "simulated"}, "simulated, which does not count here"),
        ({"batch": 8}, "of batch 8"),
        ({"name": "latency.p50_ms"}, "none was recorded"),
        ({"name": "latency.camera.mean_ms"}, "none was recorded"),
    ],
)
def test_a_latency_of_something_else_is_missing(changes: dict[str, Any], why: str) -> None:
    verdict = judged(latency(**changes))
    assert verdict.verdict == "FAIL"
    assert verdict.value is None
    assert "missing number" in verdict.why
    assert why in verdict.why


def test_the_engine_of_this_run_counts_as_the_released_artifact() -> None:
    assert judged(latency(artifact_sha256=ENGINE)).verdict == "PASS"
    assert judged(latency(artifact_sha256=ENGINE), artifacts={"onnx": ONNX}).verdict == "FAIL"


def test_without_an_artifact_no_latency_counts() -> None:
    verdict = judged(latency(artifact_sha256=None), artifacts={})
    assert verdict.verdict == "FAIL"
    assert "no ONNX" in verdict.why


def test_measured_is_preferred_over_predicted_and_the_later_over_the_earlier() -> None:
    assert judged(latency(9.0), latency(4.0), latency(9.0, kind="predicted")).value == 4.0
    assert judged(latency(9.0, kind="predicted")).verdict == "FAIL"


def test_only_admitted_evidence_counts() -> None:
    assert judged(latency(kind="predicted"), evidence=["measured"]).verdict == "FAIL"
    assert judged(latency(9.0), latency(4.0, kind="predicted"), evidence=["predicted"]).value == 4.0


def test_an_extrapolating_prediction_is_inconclusive_whatever_it_says() -> None:
    for value in (0.1, 99.0):
        verdict = judged(latency(value, half=0.01, kind="predicted", extrapolating=True))
        assert verdict.verdict == "INCONCLUSIVE"
        assert "extrapolates" in verdict.why


def test_a_latency_without_an_interval_is_inconclusive() -> None:
    assert judged(latency(half=None)).verdict == "INCONCLUSIVE"


def test_p99_needs_measured_evidence() -> None:
    gates = GatesConfig(latency=LatencyGate(mean_ms=5.0, p99_ms=6.0))
    mean, tail = judge(
        run(latency(kind="predicted"), latency(kind="predicted", name="latency.p99_ms")), None, gates, {}
    )
    assert (mean.verdict, tail.verdict, tail.gate) == ("PASS", "FAIL", "latency.p99_ms")
    _, tail = judge(run(latency(), latency(5.2, name="latency.p99_ms")), None, gates, {})
    assert tail.verdict == "PASS"
    gates = GatesConfig(latency=LatencyGate(mean_ms=5.0, p99_ms=6.0, evidence=("predicted",)))
    _, tail = judge(run(latency(), latency(5.2, name="latency.p99_ms")), None, gates, {})
    assert "needs measured evidence" in tail.why


def test_a_target_without_power_modes_wants_none() -> None:
    profile = {"precision": "int8"}
    assert judged(latency(power_mode=None), target_profile=profile).verdict == "PASS"
    assert judged(latency(power_mode="MAXN"), target_profile=profile).verdict == "FAIL"


def test_what_was_released_in_another_precision_is_judged_in_that_and_says_so() -> None:
    quantize = StageRecord(name="quantize", status="done", details={"precision": "fp16"})
    verify = StageRecord(name="verify", status="done", measurements=[latency(precision="fp16")])
    verdict = judged(latency(), stages=[quantize, verify])
    assert verdict.verdict == "PASS"
    assert verdict.why.endswith("judged in fp16: int8 was asked for and not released, see quantize for the reason")
    stale = StageRecord(name="verify", status="done", measurements=[latency(precision="int8")])
    assert judged(latency(), stages=[quantize, stale]).verdict == "FAIL"  # a figure of INT8 is of another file
    assert "asked" not in judged(latency()).why


# ------------------------------------------------------------------------------------------------------------ overall


def verdict_of(kind: str, gate: str = "g") -> Verdict:
    return Verdict.model_validate({"gate": gate, "verdict": kind, "why": f"because {kind}"})


@pytest.mark.parametrize(
    ("kinds", "expected", "code"),
    [
        (["PASS", "PASS"], "PASS", 0),
        (["PASS", "INCONCLUSIVE"], "INCONCLUSIVE", 4),
        (["INCONCLUSIVE", "ANOMALOUS", "PASS"], "ANOMALOUS", 4),
        (["ANOMALOUS", "FAIL", "INCONCLUSIVE"], "FAIL", 3),
    ],
)
def test_the_worst_verdict_wins(kinds: list[str], expected: Any, code: int) -> None:
    verdict, why = overall([verdict_of(kind) for kind in kinds])
    assert verdict == expected
    assert exit_code(verdict) == code
    assert (f"because {expected}" in why) == (expected != "PASS")


def test_no_gate_is_a_pass_that_says_so() -> None:
    assert judge(run(), None, GatesConfig(), MIOU) == []
    assert overall([]) == ("PASS", NO_GATE)


def test_every_gate_of_the_recipe_gets_its_verdict_in_order() -> None:
    gates = GatesConfig(
        accuracy=AccuracyGate(max_drop=0.03),
        latency=LatencyGate(mean_ms=5.0, p99_ms=6.0),
        floors={"miou": 0.4},
        robustness={"camera_blank": RobustnessGate(max_extra_drop=0.03, min=0.3)},
    )
    assert [v.gate for v in judge(run(), None, gates, MIOU)] == [
        "accuracy.miou",
        "latency.mean_ms",
        "latency.p99_ms",
        "floors.miou",
        "robustness.camera_blank",
        "robustness.camera_blank.min",
    ]


def test_metric_intervals_are_of_the_model_asked_for() -> None:
    replicates = replicates_of(pair(0.6, 0.5, 0.02, common=0.0))
    assert metric_intervals(replicates, compressed=False)["miou"] == Interval(0.6, 0.6, 0.6)
    found = metric_intervals(replicates)["miou"]
    assert found.value == 0.5
    assert found.high - found.low == pytest.approx(0.04, rel=0.1)


def test_gates_import_no_torch() -> None:
    code = "import sys, fusepress.pipeline.gates; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
