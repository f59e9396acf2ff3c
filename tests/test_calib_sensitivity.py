"""Errors of single layers and modalities (calib/sensitivity.py)."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest

from fusepress.calib.ladder import choose_method
from fusepress.calib.quantize import Draft
from fusepress.calib.sensitivity import (
    Sensitivity,
    branch_by_modules,
    local_errors,
    measure_sensitivity,
    relative_error,
    spare_costs,
)
from fusepress.export.runtime import OnnxSession
from fusepress.targets.profile import load_profile
from tests.qdq_toys import drafted, feeds

SESSION = partial(OnnxSession, threads=1)
BRANCHES = {"camera": ["camera"], "lidar": ["lidar"]}


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Draft:
    return drafted(tmp_path_factory.mktemp("draft"))


def measure(draft: Draft, most_runs: int = 10_000, samples: int = 8) -> Sensitivity:
    costs, unit = spare_costs(draft, load_profile("host-cpu"), "fp32")
    return measure_sensitivity(
        draft,
        feeds(samples),
        branch_of=branch_by_modules(BRANCHES),
        costs=costs,
        cost_unit=unit,
        session=SESSION,
        most_runs=most_runs,
    )


@pytest.fixture(scope="module")
def measured(draft: Draft) -> Sensitivity:
    return measure(draft)


def test_the_relative_error_is_noise_over_spread_averaged_over_float_outputs() -> None:
    expected = {"a": np.array([0.0, 2.0]), "b": np.array([1.0, 1.0]), "i": np.array([1, 2])}
    got = {"a": np.array([0.5, 2.0]), "b": np.array([1.0, 2.0]), "i": np.array([5, 5])}
    # a: 0.25 over 2; b has no spread, so its size counts: 1 over 2
    assert relative_error(got, expected) == pytest.approx((0.125 + 0.5) / 2)
    assert relative_error(expected, expected) == 0.0


def test_a_layers_own_error_is_that_of_its_output_where_it_alone_is_quantised(draft: Draft, tmp_path: Path) -> None:
    found = local_errors(draft, feeds(8))
    assert list(found) == ["camera.a/Conv", "camera.b/Conv", "lidar.a/Conv", "fuser/Conv", "head/Conv"]
    for layer, error in found.items():
        outputs = []
        for spared in (set(draft.units()) - {layer}, set(draft.units())):
            proto = onnx.shape_inference.infer_shapes(draft.variant(spared))
            tensor = layer.removesuffix("/Conv")
            if tensor != "head":
                proto.graph.output.append(next(v for v in proto.graph.value_info if v.name == tensor))
            (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
            outputs.append(SESSION(tmp_path / "m.onnx").run_numpy(feeds(8))[tensor])
        quantised, floating = outputs
        assert error == pytest.approx(float(((quantised - floating) ** 2).sum() / (floating**2).sum()), rel=1e-3)
        assert 1e-7 < error < 1e-2


def test_alone_and_spared_are_the_errors_of_those_variants(draft: Draft, measured: Sensitivity, tmp_path: Path) -> None:
    def outputs(spared: set[str]) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
        return SESSION(draft.write(tmp_path / "m.onnx", spared)).run_numpy(feeds(8))

    every = set(draft.units())
    expected = outputs(every)
    assert measured.everything == pytest.approx(relative_error(outputs(set()), expected))
    for unit in measured.units:
        assert unit.alone == pytest.approx(relative_error(outputs(every - {unit.name}), expected))
        assert unit.spared == pytest.approx(relative_error(outputs({unit.name}), expected))
    camera = {unit.name for unit in measured.units if unit.branch == "camera"}
    assert camera == {"camera.a/Conv", "camera.b/Conv"}
    row = next(row for row in measured.branches if row.branch == "camera")
    assert row.alone == pytest.approx(relative_error(outputs(every - camera), expected))
    assert [row.branch for row in measured.branches] == ["camera", "lidar", "fusion"]
    assert sum(row.macs for row in measured.branches) == sum(unit.macs for unit in measured.units)


def test_what_it_took_is_counted_and_kept_below_the_budget(draft: Draft, measured: Sensitivity) -> None:
    # 5 units and 3 branches both ways, float and all INT8, and both sides of every layer
    assert (measured.samples, measured.runs) == (8, 8 * (2 * 8 + 2 + 2))
    less = measure(draft, most_runs=50)
    assert less.samples == 50 // 20
    assert less.runs <= 50
    least = measure(draft, most_runs=12)
    assert least.samples == 1
    assert all(unit.spared is None for unit in least.units)
    assert least.runs <= 12
    assert least.ranking()  # by what is known


def test_the_layer_that_two_ranges_meet_in_comes_first(tmp_path: Path) -> None:
    """LiDAR features 300 times the camera's: one scale for both leaves nothing of the camera's."""
    unlike = measure(drafted(tmp_path, lidar_gain=300.0))
    like = measure(drafted(tmp_path))
    assert unlike.everything > 30 * like.everything
    worst = max(unlike.units, key=lambda unit: unit.alone).name
    assert worst in ("fuser/Conv", "camera.b/Conv")  # both carry the shared scale
    assert unlike.ranking()[0] in ("fuser/Conv", "camera.b/Conv")


def test_costs_are_milliseconds_where_a_target_predicts_them_and_macs_elsewhere(draft: Draft) -> None:
    costs, unit = spare_costs(draft, load_profile("jetson-agx-orin-64gb"), "fp16")
    assert unit == "ms"
    assert all(cost >= 0 for cost in costs.values())
    assert set(draft.units()) <= set(costs)
    for profile, remainder in (("host-cpu", "fp32"), ("jetson-agx-orin-64gb", "fp8")):  # no CPU is in the fit; no FP8
        costs, unit = spare_costs(draft, load_profile(profile), remainder)
        assert unit == "MAC"
        assert costs["fuser/Conv"] == 8 * 16 * 9 * 36


def test_a_node_belongs_to_one_modality_or_to_the_fusion() -> None:
    branch_of = branch_by_modules({"camera": ["img.backbone", "depth"], "lidar": ["pts"]})
    found = [branch_of(n) for n in ("img.backbone.0/Conv", "img.backbone2/Conv", "depth/Conv", "pts/Add", "Concat")]
    assert found == ["camera", "fusion", "camera", "lidar", "fusion"]


def test_the_method_is_the_one_that_changes_the_outputs_least(draft: Draft) -> None:
    chosen, errors = choose_method(draft, feeds(8), SESSION)
    assert set(errors) == {"max", "percentile", "mse"}
    assert errors[chosen.method] == min(errors.values())
