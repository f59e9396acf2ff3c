"""The knob that makes the street example's sensors redundant: what it adds, and that it changes nothing else."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fusepress.pipeline.task import LoadedTask, check_task, load_task

STREET = Path(__file__).resolve().parent.parent / "examples" / "street"


@pytest.fixture(scope="module")
def task() -> LoadedTask:
    return load_task("task.py:RedundantStreetTask", base=STREET)


@pytest.fixture(scope="module")
def world(task: LoadedTask) -> Any:
    del task  # loading it imports its sibling modules
    return importlib.import_module("street_world")


@pytest.fixture(scope="module")
def scenes(world: Any) -> Any:
    return world.draw_scenes("eval", 0, [0, 5, 9])


def test_the_knob_adds_channels_and_leaves_the_plain_sensors_bit_for_bit(world: Any, scenes: Any) -> None:
    plain, knob = world.sense(scenes), world.sense(scenes, 0.5)
    assert np.array_equal(plain.image, knob.image[:, :3])
    assert np.array_equal(plain.points, np.concatenate([knob.points[:, :8], knob.points[:, -1:]], axis=1))
    assert np.array_equal(plain.labels, knob.labels)
    assert np.array_equal(plain.cells, knob.cells)
    assert knob.image.shape[1] == 4
    assert knob.points.shape[1] == world.POINT_FEATURES + world.COLOURS


def test_at_one_the_camera_measures_depth_and_at_zero_nothing_but_noise(world: Any, scenes: Any) -> None:
    depth, noise = (world.sense(scenes, r).image[:, 3] for r in (1.0, 0.0))
    ground = world.sense(scenes).camera_object < 0
    slopes = world.camera_rays()[1]
    below = slopes < -0.2
    expected = (world.CAMERA_ORIGIN[2] / -slopes[below] / world.DEPTH_SCALE)[None, :, None]
    inside = ground[:, below]
    assert np.allclose(depth[:, below][inside], np.broadcast_to(expected, inside.shape)[inside], rtol=1e-5)
    assert abs(np.corrcoef(depth.ravel(), noise.ravel())[0, 1]) < 0.02
    assert noise.std() == pytest.approx(world.KNOB_NOISE, rel=0.02)


def test_at_one_laser_points_on_lane_markings_are_bright(world: Any, scenes: Any) -> None:
    frames = world.sense(scenes, 1.0)
    xyz, real = world.xyz_of(frames.points), frames.points[:, -1] > 0
    flat = xyz.reshape(len(xyz), -1, 3)
    on_paint = world.marking_at(scenes, flat[..., 0], flat[..., 1]).reshape(real.shape) & real & (xyz[..., 2] < 0.05)
    on_road = ~on_paint & real & (xyz[..., 2] < 0.05)
    red = frames.points[:, 8]
    assert on_paint.sum() > 50
    assert np.median(red[on_paint]) == pytest.approx(0.85, abs=0.01)
    assert np.median(red[on_road]) < 0.5


def test_padded_points_carry_no_colour(world: Any, scenes: Any) -> None:
    points = world.sense(scenes, 0.0).points
    padded = np.broadcast_to(points[:, -1:] == 0, points.shape)
    assert not points[padded].any()


@pytest.mark.parametrize("redundancy", [-0.1, 1.5])
def test_a_knob_outside_zero_to_one_is_refused(world: Any, scenes: Any, redundancy: float) -> None:
    with pytest.raises(ValueError, match=r"expected a redundancy from 0 to 1, or None; got .*; correct the knob"):
        world.sense(scenes, redundancy)


def test_the_task_passes_the_check_and_its_data_are_named_apart(task: LoadedTask) -> None:
    model = task.build_model()
    assert check_task(task, model)
    other = type(task.user)(redundancy=0.5)
    assert other.fingerprint("train") != task.fingerprint("train")


def test_a_dead_sensor_says_nothing(task: LoadedTask) -> None:
    batch = next(task.batches("eval", 0))
    dark = task.user.corrupt(batch, "camera_blank", 3)
    deaf = task.user.corrupt(batch, "lidar_blank", 3)
    assert not dark.inputs["image"].any()
    assert not deaf.inputs["points"].any()
    assert torch.equal(deaf.inputs["image"], batch.inputs["image"])
    with pytest.raises(ValueError, match=r"expected camera_blank, or lidar_blank with severity 3; got 'camera_dark'"):
        task.user.corrupt(batch, "camera_dark", 1)


def test_the_width_factor_scales_every_layer(task: LoadedTask) -> None:
    model = importlib.import_module("street_model")
    half, whole = (sum(p.numel() for p in model.StreetFusion(width=w).parameters()) for w in (0.5, 1.0))
    assert 3.5 < whole / half < 4.0
