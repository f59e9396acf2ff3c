"""Ranges of activations, their methods and how resampling moves them (calib/ranges.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as numpy_arrays
from onnx import helper

from fusepress.calib.ranges import (
    BINS,
    REPLICATES,
    RangeCollector,
    Ranges,
    bin_edges,
    magnitude_histogram,
    measure_ranges,
    mse_limit,
    percentile_limit,
)
from fusepress.pipeline.errors import QuantizeError
from tests.qdq_toys import SIZE, Graph, feeds

Floats = npt.NDArray[np.float64]


@settings(max_examples=50, deadline=None)
@given(numpy_arrays(np.float32, st.integers(1, 50), elements=st.floats(-1e6, 1e6, width=32)))
def test_every_magnitude_lies_in_its_bin(values: npt.NDArray[np.float32]) -> None:
    edges = bin_edges()
    assert (np.diff(edges) > 0).all()
    assert (np.diff(edges) <= edges[:-1] / 32 * (1 + 1e-12)).all()
    counts = magnitude_histogram(values)
    clipped = np.clip(np.abs(values.astype(np.float64)), edges[0], None)
    expected, _ = np.histogram(clipped, bins=edges)
    np.testing.assert_array_equal(counts, expected)


@settings(max_examples=50, deadline=None)
@given(
    numpy_arrays(np.float32, st.integers(1, 60), elements=st.floats(2**-10, 2**10, width=32)),
    st.sampled_from([50.0, 90.0, 99.0, 100.0]),
)
def test_a_percentile_is_that_of_the_values_up_to_a_bin(values: npt.NDArray[np.float32], percentile: float) -> None:
    exact = float(np.quantile(values, percentile / 100, method="inverted_cdf"))
    found = percentile_limit(magnitude_histogram(values), percentile)
    assert exact <= found * (1 + 1e-6)
    assert found <= exact * (1 + 1 / 32) * (1 + 1e-6)


def _int8_error(values: Floats, limit: float) -> float:
    step = limit / 127
    return float(((np.clip(np.round(values / step), -127, 127) * step - values) ** 2).mean())


def test_the_mse_limit_is_close_to_the_best_of_a_brute_force_search() -> None:
    random = np.random.default_rng(0)
    cases = [
        np.abs(random.normal(size=20_000)),
        np.abs(random.standard_t(3, size=20_000)),
        np.concatenate([np.zeros(15_000), np.abs(random.normal(size=5_000)), [40.0]]),
        np.full(500, 2.0),
    ]
    for values in cases:
        amax = float(values.max())
        best = min(_int8_error(values, limit) for limit in np.linspace(amax / 127, amax, 400))
        found = mse_limit(magnitude_histogram(values.astype(np.float32)), amax)
        assert 0 < found <= amax
        assert _int8_error(values, found) <= 1.15 * best + 1e-12  # its noise model is d^2 / 12, its bins are 1/32 wide
    # among many values one outlier saturates for the sake of the rest; among few it does not
    many = np.append(random.normal(size=400_000), 12.0).astype(np.float32)
    assert mse_limit(magnitude_histogram(many), 12.0) < 8
    assert mse_limit(magnitude_histogram(many[-500:]), 12.0) == 12.0


def _ranges(samples: list[list[float]]) -> Ranges:
    arrays = [np.asarray(values, np.float32) for values in samples]
    collector = RangeCollector(["t"], len(arrays))
    for values in arrays:
        collector.add(0, values)
    return collector.ranges()


def test_limits_pool_all_samples() -> None:
    ranges = _ranges([[0.5] * 9999, [1.0, -8.0]])
    assert ranges.limits("max") == {"t": 8.0}
    assert ranges.limits("percentile")["t"] == pytest.approx(1.0, rel=1 / 16)
    assert ranges.limits("percentile", 100.0) == {"t": 8.0}
    assert ranges.limits("mse")["t"] <= 8.0


def test_resampling_moves_what_one_sample_decides() -> None:
    steady = _ranges([[1.0, 2.0]] * 8).resampling(seed=0)
    assert steady["max"] == {"median_width": 0.0, "largest_width": 0.0, "widest": {}}
    assert steady["percentile 99.99"]["largest_width"] == 0.0
    lone = _ranges([[1.0]] * 7 + [[10.0]]).resampling(seed=0)["max"]
    # the sample with 10 is in 1 - (7/8)^8 = 66 % of the draws, so the interval reaches from 1 to 10
    assert lone["widest"] == {"t": pytest.approx(0.9)}


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 12),
    st.integers(1, 400),
    st.sampled_from([40.0, 90.0, 99.0, 99.99, 100.0]),
)
def test_resampling_by_the_upper_ends_is_that_of_whole_samples(
    seed: int, samples: int, size: int, percentile: float
) -> None:
    """Against the percentile of all values that were drawn, and that with a fraction of the bins."""
    random = np.random.default_rng(seed)
    values = (random.standard_t(2, size=(samples, size)) * 2.0 ** random.integers(-6, 6, size=(samples, 1))).astype(
        "f4"
    )
    collector = RangeCollector(["t"], samples, percentile)
    for row in values:
        collector.add(0, row)
    found = collector.ranges()
    picks = np.random.default_rng(seed).integers(0, samples, size=(REPLICATES, samples))
    drawn = [percentile_limit(magnitude_histogram(values[picked]), percentile) for picked in picks]
    exact = np.minimum(drawn, np.abs(values)[picks].max(axis=(1, 2)))
    low, middle, high = np.quantile(exact, [0.025, 0.5, 0.975])
    told = found.resampling(seed)[f"percentile {percentile:g}"]
    assert told["largest_width"] == pytest.approx((high - low) / middle if middle > 0 else 0.0, abs=1e-12)


def test_a_sample_costs_a_few_bins() -> None:
    random = np.random.default_rng(0)
    collector = RangeCollector(["t"], 64)
    for _ in range(64):
        collector.add(0, random.normal(size=4096))
    (tails,) = collector.ranges().tails
    assert max(tail.bins.size for tail in tails) < 24
    assert sum(tail.counts.sum() for tail in tails) < 0.01 * 64 * 4096 + 64


def _model(folder: Path, op: str) -> Path:
    g = Graph()
    g.node(op, [g.node("Relu", ["image"], "hidden")], "head")
    path = folder / "model.onnx"
    path.write_bytes(g.model({"image": 3}, {"head": 3}).SerializeToString())
    return path


def test_inputs_activations_and_outputs_are_measured_sample_by_sample(tmp_path: Path) -> None:
    data: dict[str, Any] = {"image": feeds(3)["image"]}
    ranges = measure_ranges(_model(tmp_path, "Neg"), ["image", "hidden", "head"], data)
    relu = np.maximum(data["image"], 0)
    expected = [np.abs(x).reshape(3, -1).max(axis=1) for x in (data["image"], relu, -relu)]
    np.testing.assert_array_equal(ranges.amax, np.array(expected, np.float32))
    assert ranges.pooled.shape == (3, BINS)
    assert (ranges.pooled.sum(axis=1) == data["image"].size).all()
    assert [len(tails) for tails in ranges.tails] == [3, 3, 3]


def test_tensors_behind_operators_without_shape_inference_are_measured(tmp_path: Path) -> None:
    g = Graph()
    g.node("Relu", [g.node("Gelu", ["image"], "hidden", domain="com.microsoft")], "head")
    proto = g.model({"image": 3}, {"head": 3})
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    ranges = measure_ranges(
        tmp_path / "model.onnx", ["hidden"], {"image": np.full((1, 3, SIZE, SIZE), -1.0, np.float32)}
    )
    assert ranges.amax[0, 0] == pytest.approx(0.1587, abs=1e-4)  # the normal distribution's tail beyond 1


def test_activations_that_are_not_finite_are_named_with_node_and_sample(tmp_path: Path) -> None:
    data = {"image": np.abs(feeds(2)["image"])}
    data["image"][1, 0, 0, 0] = -1.0  # becomes 0, whose logarithm is -inf
    with pytest.raises(
        QuantizeError, match=r"got NaN or infinity in 'head' of node head/Log for the calibration sample street-2 at"
    ):
        measure_ranges(_model(tmp_path, "Log"), ["hidden", "head"], data, ["street-1", "street-2"])
