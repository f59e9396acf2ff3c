"""Labels of the street's tasks: objects, depth and way-points follow from the scenes."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fusepress.pipeline.task import Batch, LoadedTask, load_task

STREET = Path(__file__).resolve().parent.parent / "examples" / "street"
FRAMES = list(range(0, 48, 3))
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def task() -> LoadedTask:
    return load_task("multi_task.py:StreetMultiTask", base=STREET)


@pytest.fixture(scope="module")
def world(task: LoadedTask) -> Any:
    del task  # loading it imports its sibling modules
    return importlib.import_module("street_world")


@pytest.fixture(scope="module")
def labels(task: LoadedTask) -> Any:
    del task
    return importlib.import_module("street_labels")


@pytest.fixture(scope="module")
def scenes(world: Any) -> Any:
    return world.draw_scenes("eval", 0, FRAMES)


@pytest.fixture(scope="module")
def frames(world: Any, scenes: Any) -> Any:
    return world.sense(scenes, 1.0)  # with a depth channel


@pytest.fixture(scope="module")
def truth(labels: Any, scenes: Any, frames: Any) -> Any:
    return labels.label(scenes, frames.labels)


def test_labels_depend_on_split_seed_and_number_only(task: LoadedTask) -> None:
    batches = task.batches("train", 7)
    next(batches)
    second, again = next(batches), next(task.batches("train", 7, start=1))
    other = next(task.batches("train", 8, start=1))
    for name, value in second.targets.items():
        assert torch.equal(value, again.targets[name]), name
        assert not torch.equal(value, other.targets[name]), name


def test_a_dead_sensor_changes_no_label(task: LoadedTask) -> None:
    whole: Batch = task.user.make("train", 3, list(range(4)))
    dead: Batch = task.user.make("train", 3, list(range(4)), dead=0.5)
    assert not torch.equal(whole.inputs["image"], dead.inputs["image"])
    assert all(torch.equal(value, dead.targets[name]) for name, value in whole.targets.items())


# ------------------------------------------------------------------------------------------------------------ objects


def test_known_objects_are_those_that_a_sensor_saw_in_view_and_on_the_grid(
    labels: Any, world: Any, scenes: Any, frames: Any
) -> None:
    known = labels.known_objects(scenes, frames.labels)
    x, y = scenes.box[..., 0], scenes.box[..., 1]
    row, column = np.floor((x - world.BEV_X) / world.CELL), np.floor((y - world.BEV_Y) / world.CELL)
    middle_x = world.BEV_X + (row + 0.5) * world.CELL
    middle_y = world.BEV_Y + (column + 0.5) * world.CELL
    edge = world.BEV_SIZE - 1
    inside = (row >= 0) & (row <= edge) & (column >= 0) & (column <= edge)
    in_view = np.abs(middle_y) <= world.IMAGE_WIDTH / 2 / world.FOCAL * middle_x
    for scene, slot in np.ndindex(known.shape):
        pixels = (frames.camera_object[scene] == slot).sum()
        shots = (frames.sweep_object[scene] == slot).sum()
        seen = scenes.kind[scene, slot] != world.EMPTY and (pixels >= 6 or shots >= 2)
        assert known[scene, slot] == (seen and inside[scene, slot] and in_view[scene, slot])
    assert 50 < known.sum() < (scenes.kind != world.EMPTY).sum()


def test_boxes_are_the_scenes_boxes_standing_on_the_ground(labels: Any, world: Any, scenes: Any, truth: Any) -> None:
    kinds = {"car": world.CAR, "truck": world.TRUCK, "pedestrian": world.PEDESTRIAN}
    for number, name in enumerate(labels.DETECTED):
        mine = truth.object_class == number
        assert mine.any()
        assert (scenes.kind[mine] == kinds[name]).all()
    assert not (truth.object_class[scenes.kind == world.BUSH] >= 0).any()
    x, y, yaw, length, width, height = np.moveaxis(scenes.box, -1, 0)
    expected = np.stack([x, y, height / 2, length, width, height, yaw], axis=-1)
    np.testing.assert_array_equal(truth.box, expected)


# -------------------------------------------------------------------------------------------------------------- depth


def test_depth_is_what_a_perfect_depth_camera_measures(labels: Any, world: Any, frames: Any, truth: Any) -> None:
    measured = frames.image[:, 3:, 2::4, 2::4] * world.DEPTH_SCALE
    there = truth.depth_m > 0
    np.testing.assert_allclose(truth.depth_m[there], measured[there], rtol=1e-5)
    sky_or_far = (measured == 0) | (measured >= labels.MAX_DEPTH_M - 1e-3)
    np.testing.assert_array_equal(there, ~sky_or_far)
    np.testing.assert_array_equal(truth.depth_object, (frames.camera_object[:, None, 2::4, 2::4] >= 0) & there)


# --------------------------------------------------------------------------------------------------------- way-points


def street(world: Any, *, heading: float = 0.0, across: float = 0.0, boxes: tuple[Any, ...] = ()) -> Any:
    """One scene with lines 3.4 m apart around the street's axis and the given (kind, x, y, yaw, l, w)."""
    base = world.draw_scenes("eval", 0, [0])
    kind, box = np.full_like(base.kind, world.EMPTY), np.zeros_like(base.box)
    for slot, (what, x, y, yaw, length, width) in enumerate(boxes):
        kind[0, slot], box[0, slot] = what, (x, y, yaw, length, width, 1.5)
    lines = np.array([[-5.1, -1.7, 1.7, 5.1, np.inf]], np.float32)
    return replace(
        base,
        kind=kind,
        box=box,
        heading=np.array([heading], np.float32),
        across=np.array([across], np.float32),
        lines=lines,
    )


def everything(scene: Any) -> Any:
    return np.ones(scene.kind.shape, np.bool_) & (scene.kind >= 0)


def test_on_a_free_street_in_the_middle_of_its_lane_the_car_goes_straight_at_full_speed(
    labels: Any, world: Any
) -> None:
    scene = street(world)
    way = labels.plan(scene, everything(scene))
    expected = np.stack([labels.SPEED_M_S * labels.WAYPOINT_TIMES_S, np.zeros(4)], axis=-1)
    np.testing.assert_allclose(way[0], expected, atol=1e-5)


@pytest.mark.parametrize(("heading", "across"), [(0.0, 1.2), (0.2, 0.0), (-0.15, -0.9), (0.1, 4.0)])
def test_the_path_starts_where_the_car_points_and_ends_in_its_lane(
    labels: Any, world: Any, heading: float, across: float
) -> None:
    scene = street(world, heading=heading, across=across)
    lane = 3.4 if across > 1.7 else 0.0
    assert labels.lane_centre(scene)[0] == pytest.approx(lane)
    step = np.array([[1e-3]])
    start, after = labels.lateral_path(scene, 0 * step)[0, 0], labels.lateral_path(scene, step)[0, 0]
    assert start == pytest.approx(across)
    assert (after - start) / 1e-3 == pytest.approx(-np.tan(heading), abs=1e-2)
    far = labels.lateral_path(scene, np.array([[labels.MERGE_M, 50.0]]))[0]
    np.testing.assert_allclose(far, lane, atol=1e-6)
    last = labels.plan(scene, everything(scene))[0, -1]
    lateral = -np.sin(heading) * last[0] + np.cos(heading) * last[1] + across
    assert lateral == pytest.approx(lane, abs=1e-4)


def test_the_car_stops_before_what_it_would_touch_and_not_before_what_it_passes(labels: Any, world: Any) -> None:
    def stop(*box: Any) -> float:
        scene = street(world, boxes=(box,))
        return float(labels.stopping_distance(scene, everything(scene))[0])

    assert stop(world.CAR, 12.0, 0.0, 0.0, 4.0, 2.0) == pytest.approx(10.0 - labels.STANDOFF_M, abs=1e-4)
    assert stop(world.CAR, 12.0, 0.0, np.pi / 2, 4.0, 2.0) == pytest.approx(11.0 - labels.STANDOFF_M, abs=1e-4)
    assert stop(world.CAR, 12.0, 2.0, 0.0, 4.0, 2.0) < np.inf  # 1.0 m beside the middle: touched
    assert stop(world.CAR, 12.0, 2.2, 0.0, 4.0, 2.0) == np.inf
    assert stop(world.CAR, -12.0, 0.0, 0.0, 4.0, 2.0) == np.inf
    assert stop(world.CAR, 2.2, 0.0, 0.0, 4.0, 2.0) == pytest.approx(labels.CREEP_M)


def test_pedestrians_get_more_room_than_bushes(labels: Any, world: Any) -> None:
    for kind, limit in ((world.PEDESTRIAN, 1.0 + 1.0 + 0.5), (world.BUSH, 1.0 + 0.1 + 0.5)):
        for aside, stops in ((limit - 0.01, True), (limit + 0.01, False)):
            scene = street(world, boxes=((kind, 9.0, aside, 0.0, 1.0, 1.0),))
            assert np.isfinite(labels.stopping_distance(scene, everything(scene))[0]) == stops


def test_the_car_approaches_its_stop_and_never_passes_it(labels: Any, world: Any) -> None:
    scene = street(world, boxes=((world.CAR, 9.0, 0.0, 0.0, 4.0, 2.0),))
    way = 7.0 - labels.STANDOFF_M
    x = labels.plan(scene, everything(scene))[0, :, 0]
    np.testing.assert_allclose(x, way * (1 - np.exp(-labels.SPEED_M_S * labels.WAYPOINT_TIMES_S / way)), rtol=1e-5)
    assert (np.diff(x) > 0).all()
    assert x[-1] < way


def test_unknown_objects_stop_nobody(labels: Any, world: Any) -> None:
    scene = street(world, boxes=((world.CAR, 9.0, 0.0, 0.0, 4.0, 2.0),))
    unknown = np.zeros(scene.kind.shape, np.bool_)
    assert labels.stopping_distance(scene, unknown)[0] == np.inf


def test_way_points_need_what_only_the_camera_sees(labels: Any, world: Any, scenes: Any, truth: Any) -> None:
    """Swapping pedestrians and bushes, or moving the lines, changes nothing that the LiDAR gives, but the path."""
    shifted = replace(scenes, lines=scenes.lines + np.float32(0.7))
    for changed, least in ((world.with_kinds_swapped(scenes), 1), (shifted, 8)):
        seen, other = world.sense(scenes), world.sense(changed)
        assert np.array_equal(seen.points, other.points)
        moved = np.abs(labels.label(changed, other.labels).waypoints_m - truth.waypoints_m).max(axis=(1, 2))
        assert (moved > 0.1).sum() >= least


def test_way_points_are_finite_and_far_from_constant(truth: Any) -> None:
    assert np.isfinite(truth.waypoints_m).all()
    middle = np.median(truth.waypoints_m, axis=0)
    assert np.linalg.norm(truth.waypoints_m - middle, axis=-1).mean() > 1.0
