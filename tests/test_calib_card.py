"""Which samples the calibration card takes, and what it refuses (calib/dataset.py, calib/coverage.py)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as numpy_arrays

from fusepress.calib.coverage import choose, coverage, sample_features, standardise
from fusepress.calib.dataset import choose_calibration
from fusepress.pipeline.errors import TaskError
from fusepress.pipeline.task import Batch
from tests.export_toys import ToyTask, loaded

Floats = npt.NDArray[np.float64]


class Stratified(ToyTask):
    """Twelve frames, two of them at night; the points of some may be missing."""

    inputs_by_modality = {"camera": ["image"], "lidar": ["points", "index"]}

    def __init__(self, *, blank: int = 0, poison: bool = False) -> None:
        super().__init__()
        self.blank, self.poison = blank, poison

    def batches(self, split: str, seed: int, *, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        for number, batch in enumerate(super().batches(split, seed)):
            points, image = batch.inputs["points"].clone(), batch.inputs["image"].clone()
            for i in range(batch.size):
                if split == "calib" and 4 * number + i < self.blank:
                    points[i] = 0
            if self.poison and split == "calib":
                image[-1, 0, 0, 0] = torch.nan
            index = torch.where(points.abs().sum(-1) > 0, batch.inputs["index"], 0)
            yield batch.with_inputs(points=points, image=image, index=index)

    def strata(self, batch: Batch) -> list[str]:
        return ["night" if name in ("calib/0/1", "calib/2/3") else "day" for name in batch.sample_ids]


# --- choosing --------------------------------------------------------------------------------------------------------


def _radius(points_NF: Floats, chosen: tuple[int, ...] | list[int]) -> float:
    return float(np.linalg.norm(points_NF[:, None] - points_NF[list(chosen)][None], axis=2).min(axis=1).max())


@settings(max_examples=60, deadline=None)
@given(numpy_arrays(np.float64, (7, 2), elements=st.floats(-10, 10)), st.integers(1, 7), st.integers(0, 3))
def test_a_choice_covers_at_most_twice_as_badly_as_the_best_one(points_NF: Floats, count: int, seed: int) -> None:
    chosen = choose(points_NF, [""] * 7, count, seed)
    assert len(set(chosen)) == count
    best = min(_radius(points_NF, picked) for picked in itertools.combinations(range(7), count))
    assert _radius(points_NF, chosen) <= 2 * best + 1e-9


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12), st.integers(1, 12), st.integers(0, 5))
def test_strata_differ_by_at_most_one_until_one_runs_out(strata: list[str], count: int, seed: int) -> None:
    features_NF = np.random.default_rng(seed).normal(size=(len(strata), 2))
    chosen = [strata[i] for i in choose(features_NF, strata, count, seed)]
    assert len(chosen) == min(count, len(strata))
    taken = {label: chosen.count(label) for label in set(strata)}
    open_ones = [n for label, n in taken.items() if n < strata.count(label)]
    assert all(n >= max(taken.values()) - 1 for n in open_ones)


def test_an_outlier_is_not_missed_and_coverage_says_what_is() -> None:
    values = [0.0, 0.1, 0.2, 0.3, 9.0]
    features = [sample_features({"x": np.array([value, value + 1.0]), "i": np.array([3, 4])}) for value in values]
    assert list(features[0]) == ["x.mean", "x.std", "x.min", "x.max"]
    table_NF = standardise(np.array([list(row.values()) for row in features]))
    assert not table_NF[:, 1].any()  # the same standard deviation everywhere tells nothing
    for seed in range(5):
        assert 4 in choose(table_NF, [""] * 5, 2, seed)
    found = coverage(features, ["a", "a", "a", "b", "b"], [0, 3])
    assert found["strata"] == {"a": [3, 1], "b": [2, 1]}
    assert found["features"]["x.max"] == {
        "low": 1.0,
        "high": 10.0,
        "chosen_low": 1.0,
        "chosen_high": 1.3,
        "within": 0.8,
    }
    assert found["radius"] > 1.0
    assert coverage(features, [""] * 5, range(5))["radius"] == 0.0


# --- the card --------------------------------------------------------------------------------------------------------


def test_the_tasks_own_strata_come_before_its_groups() -> None:
    card = choose_calibration(loaded(Stratified()), 4, seed=0)
    assert card.stratified_by == "strata of the task"
    assert card.coverage["strata"] == {"day": [10, 2], "night": [2, 2]}
    assert {"calib/0/1", "calib/2/3"} <= set(card.sample_ids)
    shown = card.summary()
    assert shown["chosen_of_each"] == {"day": "2 of 10", "night": "2 of 2"}
    assert 0 < shown["least_covered_statistic"] <= 1
    assert choose_calibration(loaded(ToyTask()), 4, seed=0).stratified_by == "groups"


def test_samples_without_a_sensor_are_counted_and_refused_where_there_are_no_others() -> None:
    assert choose_calibration(loaded(Stratified(blank=2)), 12, seed=0).blank == {"lidar": 2}
    with pytest.raises(TaskError, match="expected calibration samples with every modality; got lidar blank in all 12"):
        choose_calibration(loaded(Stratified(blank=12)), 12, seed=0)


def test_unnamed_inputs_are_blank_where_they_are_zero() -> None:
    class OnesAndZeros(ToyTask):
        def batches(self, split: str, seed: int, **dealt: int) -> Iterator[Batch]:
            for batch in super().batches(split, seed):
                image, points = batch.inputs["image"], batch.inputs["points"]
                seen = torch.ones(batch.size, 4, dtype=torch.bool)
                yield batch.with_inputs(image=torch.zeros_like(image), points=torch.ones_like(points), seen=seen)

    with pytest.raises(TaskError, match="got image blank in all 5 of them"):
        choose_calibration(loaded(OnesAndZeros()), 5, seed=0)


@pytest.mark.parametrize("seed", range(3))
def test_a_sample_that_is_in_the_eval_split_is_refused_chosen_or_not(seed: int) -> None:
    """The search for layers is judged on the whole calib split, whichever samples the ranges are measured on."""

    class Leaking(ToyTask):
        def batches(self, split: str, seed: int, **dealt: int) -> Iterator[Batch]:
            leaked = next(super().batches("eval", seed)).inputs
            for number, batch in enumerate(super().batches(split, seed)):
                yield batch.with_inputs(**leaked) if split == "calib" and number == 2 else batch

    with pytest.raises(TaskError, match=r"got 'calib/2/.', whose content equals 'eval/0/.' of the eval split"):
        choose_calibration(loaded(Leaking()), 1, seed=seed)


def test_a_calib_split_without_samples_is_refused() -> None:
    class Empty(ToyTask):
        def batches(self, split: str, seed: int, **dealt: int) -> Iterator[Batch]:
            return iter(() if split == "calib" else super().batches(split, seed))

    with pytest.raises(TaskError, match=r"to yield every sample once; got no sample at toys\.py:ToyTask"):
        choose_calibration(loaded(Empty()), 5, seed=0)


def test_nan_in_an_input_is_named_with_its_sample() -> None:
    with pytest.raises(TaskError, match="got NaN or infinity in 'image' of the calib sample 'calib/0/3'"):
        choose_calibration(loaded(Stratified(poison=True)), 4, seed=0)


def test_a_sample_of_one_modality_is_not_paired() -> None:
    class Unpaired(ToyTask):
        def batches(self, split: str, seed: int, **dealt: int) -> Iterator[Batch]:
            for batch in super().batches(split, seed):
                lone = split == "calib" and batch.sample_ids[0] == "calib/1/0"
                kept: dict[str, Any] = {n: v for n, v in batch.inputs.items() if not lone or n != "points"}
                yield Batch(inputs=kept, sample_ids=batch.sample_ids, groups=batch.groups)

    with pytest.raises(TaskError, match=r"inputs of all modalities; got 'calib/1/0' without \['points'\]"):
        choose_calibration(loaded(Unpaired()), 4, seed=0)


def test_strata_of_another_number_are_refused() -> None:
    class Short(ToyTask):
        def strata(self, batch: Batch) -> list[str]:
            return ["day"]

    with pytest.raises(TaskError, match=r"expected strata\(batch\) to return 4 labels, one a sample; got 1"):
        choose_calibration(loaded(Short()), 4, seed=0)
