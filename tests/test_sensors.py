"""Default sensor failures by layout: exact on tensors and geometry, nothing at severity 0, more at a higher one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusepress.pipeline import sensors
from fusepress.pipeline.corrupt import KINDS, check_failure, corrupt, failing, failures_of, input_layouts
from fusepress.pipeline.errors import RecipeError, TaskError
from fusepress.pipeline.sensors import Layout, parse_layout, rotate, rotate_points, shift
from fusepress.pipeline.task import Batch, LoadedTask, TaskSource

FRAMES, PER_GROUP, PER_BATCH = 12, 4, 5
GRID = {"layout": "bev", "cell_m": 0.2, "sensor": [8.0, 4.0]}
POINTS = Layout(kind="points")


def make_inputs(generator: torch.Generator, size: int) -> dict[str, Tensor]:
    """Every layout: two images, a stack of three views, points with a ring, a range map and a grid."""
    points = torch.randn(size, 40, 5, generator=generator) * 10
    points[..., 4] = torch.arange(40) % 12
    points[:, 35:] = 0  # padding
    return {
        "front": 0.05 + 0.9 * torch.rand(size, 3, 12, 50, generator=generator),
        "rear": 0.05 + 0.9 * torch.rand(size, 3, 12, 50, generator=generator),
        "around": 0.05 + 0.9 * torch.rand(size, 3, 3, 6, 50, generator=generator),
        "points": points,
        "sweep": 1 + torch.rand(size, 2, 12, 90, generator=generator),
        "grid": 1 + torch.rand(size, 4, 9, 9, generator=generator),
    }


class User:
    """A drive in groups of four frames, dealt out in batches of five."""

    inputs_by_modality = {
        "camera": ["front", "rear"],
        "surround": ["around"],
        "lidar": ["points"],
        "ranges": ["sweep"],
        "radar": ["grid"],
    }
    input_layouts: Any = {
        "around": "images",
        "points": {"layout": "points", "ring": 4},
        "sweep": "range",
        "grid": GRID,
    }

    def batches(self, split: str, seed: int, *, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        whole = frames(range(FRAMES))
        for first in range(0, FRAMES, PER_BATCH):
            rows = range(first, min(first + PER_BATCH, FRAMES))
            yield Batch(
                inputs={name: value[list(rows)] for name, value in whole.inputs.items()},
                sample_ids=[whole.sample_ids[row] for row in rows],
                groups=[whole.groups[row] for row in rows],
            )


def frames(numbers: Any) -> Batch:
    parts = [make_inputs(torch.Generator().manual_seed(number), 1) for number in numbers]
    return Batch(
        inputs={name: torch.cat([part[name] for part in parts]) for name in parts[0]},
        sample_ids=[f"frame-{number}" for number in numbers],
        groups=[f"drive-{number // PER_GROUP}" for number in numbers],
    )


def load(user: object | None = None) -> LoadedTask:
    user = user or User()
    modalities = getattr(user, "inputs_by_modality", {})
    return LoadedTask(
        user=user,
        source=TaskSource(spec="test.py:User", files=(Path(__file__),)),
        branches={name: [name] for name in modalities},
        metrics={"accuracy": "max"},
        keep=[],
    )


@pytest.fixture(scope="module")
def batch() -> Batch:
    return frames(range(4, 4 + PER_BATCH))


REFUSED = {"surround_sparse", "lidar_lost", "ranges_lost", "radar_lost", "ranges_shift"}  # by what they are
EVERY = [name for name in failures_of(load()) if name not in REFUSED]


def test_every_kind_of_failure_is_tried_here_on_every_sensor_that_has_it() -> None:
    assert len(EVERY) == 2 * 10 + 3 * 9 - 4
    assert {name.partition("_")[2] for name in EVERY} == set(KINDS)


@pytest.mark.parametrize("failure", EVERY)
def test_severity_0_is_the_batch_bit_for_bit_and_harm_grows_with_the_severity(batch: Batch, failure: str) -> None:
    task = load()
    seen = [corrupt(task, batch, failure, severity) for severity in (0, 1, 2, 3)]
    names = task.user.inputs_by_modality[failure.partition("_")[0]]
    for name, value in batch.inputs.items():
        assert torch.equal(seen[0].inputs[name], value)
        assert all(torch.equal(one.inputs[name], value) for one in seen if name not in names)
        assert all((one.inputs[name].shape, one.inputs[name].dtype) == (value.shape, value.dtype) for one in seen)
    harm = [sum(float((one.inputs[n] - batch.inputs[n]).abs().sum()) for n in names) for one in seen]
    assert harm[0] == 0 < harm[1]
    if not failure.endswith(("stale", "rotate", "shift")):  # random images differ as much one frame ago as three
        assert harm == sorted(harm)


@pytest.mark.parametrize("failure", EVERY)
def test_a_sample_fails_the_same_way_in_any_batch(batch: Batch, failure: str) -> None:
    task = load()
    together = corrupt(task, batch, failure, 2).inputs
    torch.manual_seed(5)
    for row in (3, 0):
        alone = corrupt(task, frames([4 + row]), failure, 2).inputs
        assert all(torch.equal(alone[name][0], together[name][row]) for name in alone)


# -------------------------------------------------------------------------------------------------------- geometry

angles = st.floats(-180, 180, allow_nan=False)


@settings(max_examples=50, deadline=None)
@given(degrees=angles, seed=st.integers(0, 1000))
def test_a_rotation_keeps_lengths_and_its_inverse_undoes_it(degrees: float, seed: int) -> None:
    points = torch.randn(2, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    points[:, 5:] = 0
    turned = rotate_points(points, degrees)
    assert torch.allclose(turned[..., :2].norm(dim=-1), points[..., :2].norm(dim=-1), atol=1e-12)
    assert torch.equal(turned[..., 2:], points[..., 2:]), "height and features stay"
    assert int(turned[:, 5:].count_nonzero()) == 0, "padding stays"
    assert torch.allclose(rotate_points(turned, -degrees), points, atol=1e-12)


def test_a_quarter_turn_takes_what_is_ahead_to_the_left() -> None:
    ahead = torch.tensor([[[2.0, 0.0, 1.0]]], dtype=torch.float64)
    assert torch.allclose(rotate_points(ahead, 90), torch.tensor([[[0.0, 2.0, 1.0]]], dtype=torch.float64), atol=1e-12)


def occupancy(points: Tensor, layout: Layout) -> Tensor:
    """[1, 1, 9, 9]: ones where a point is, by the layout's own words."""
    assert layout.sensor is not None
    assert layout.cell_m is not None
    sign = 1 if layout.forward == "down" else -1
    grid = torch.zeros(1, 1, 9, 9)
    for x, y in (points[0, :, :2] / layout.cell_m).round().long().tolist():
        grid[0, 0, int(layout.sensor[0]) + sign * x, int(layout.sensor[1]) + sign * y] = 1
    return grid


@pytest.mark.parametrize("forward", ["up", "down"])
def test_a_grid_turns_and_moves_as_its_points_do(forward: Any) -> None:
    layout = Layout(kind="bev", cell_m=0.4, sensor=(4.0, 4.0), forward=forward)
    points = torch.tensor([[[1.2, 0.4, 0.0], [0.4, -0.8, 0.0], [0.0, 0.0, 0.5]]])
    before = occupancy(points, layout)
    turned = rotate(before, 90, layout)
    assert torch.allclose(turned, occupancy(rotate_points(points, 90), layout), atol=1e-5)
    moved = shift(before, 3, layout)  # 0.4 m: one cell
    assert torch.allclose(moved, occupancy(shift(points, 3, POINTS), layout), atol=1e-5)
    assert float(shift(points, 3, POINTS)[0, 0, 1]) == pytest.approx(0.8)


def test_a_quarter_turn_of_an_image_is_exact() -> None:
    image = torch.rand(2, 3, 7, 7)
    assert torch.allclose(rotate(image, 90, Layout(kind="image")), image.rot90(1, (2, 3)), atol=1e-5)
    views = torch.rand(2, 4, 3, 7, 7)
    each = torch.stack([rotate(views[:, v], 2.0, Layout(kind="image")) for v in range(4)], 1)
    assert torch.equal(rotate(views, 2.0, Layout(kind="images")), each)
    whole = (image * 255).to(torch.uint8)
    assert torch.equal(rotate(whole, 90, Layout(kind="image")), whole.rot90(1, (2, 3)))


def test_a_range_map_turns_by_whole_columns_and_wraps_only_where_it_goes_all_around() -> None:
    sweep = torch.rand(1, 1, 2, 90) + 1
    full = rotate(sweep, 4.0, Layout(kind="range"))
    assert torch.equal(full, sweep.roll(1, -1)), "4 degrees of 360 are one column of 90"
    ahead = rotate(sweep, 4.0, Layout(kind="range", fov_deg=120.0))
    assert torch.equal(ahead[..., 3:], sweep[..., :-3])
    assert int(ahead[..., :3].count_nonzero()) == 0


def test_a_shifted_image_loses_columns_of_one_side(batch: Batch) -> None:
    seen = corrupt(load(), batch, "camera_shift", 3).inputs["front"]
    assert torch.equal(seen[..., 2:], batch.inputs["front"][..., :-2]), "4 % of 50 columns"
    assert int(seen[..., :2].count_nonzero()) == 0


def test_a_shift_moves_points_sideways_and_leaves_padding() -> None:
    points = frames([0]).inputs["points"]
    moved = shift(points, 2, POINTS)
    assert torch.allclose(moved[:, :35, 1], points[:, :35, 1] + 0.2)
    assert torch.equal(moved[..., [0, 2, 3, 4]], points[..., [0, 2, 3, 4]])
    assert int(moved[:, 35:].count_nonzero()) == 0


# -------------------------------------------------------------------------------------------- beams, returns, views


@pytest.mark.parametrize(("severity", "lost"), [(1, {3, 7, 11}), (2, {2, 5, 8, 11}), (3, {1, 3, 5, 7, 9, 11})])
def test_beams_are_lost_by_their_number(batch: Batch, severity: int, lost: set[int]) -> None:
    seen = corrupt(load(), batch, "lidar_half", severity).inputs["points"][:, :35]
    rings = batch.inputs["points"][:, :35, 4]
    gone = (seen == 0).all(-1)
    assert torch.equal(gone, torch.isin(rings, torch.tensor(sorted(lost)).float()))
    rows = corrupt(load(), batch, "ranges_half", severity).inputs["sweep"]
    assert {row for row in range(12) if not rows[:, :, row].any()} == lost
    assert sum(bool(rows[:, :, row].all()) for row in range(12)) == 12 - len(lost)


@pytest.mark.parametrize("failure", ["lidar_sparse", "ranges_sparse", "radar_sparse"])
def test_lost_returns_stay_lost_at_a_higher_severity_and_their_share_is_the_stated_one(failure: str) -> None:
    batch, task = frames(range(60)), load()
    [name] = task.user.inputs_by_modality[failure.partition("_")[0]]
    there = (batch.inputs[name] != 0).any(-1 if name == "points" else 1)
    before = there
    for severity, share in ((1, 0.3), (2, 0.6), (3, 0.85)):
        kept = (corrupt(task, batch, failure, severity).inputs[name] != 0).any(-1 if name == "points" else 1)
        assert not bool((kept & ~before).any())
        count = int(there.sum())
        assert abs(1 - int(kept.sum()) / count - share) < 5 * (share * (1 - share) / count) ** 0.5
        before = kept


def test_a_narrow_view_keeps_the_points_near_straight_ahead(batch: Batch) -> None:
    points = batch.inputs["points"][:, :35]
    azimuth = torch.atan2(points[..., 1], points[..., 0]).abs()
    for severity, share in ((1, 0.75), (2, 0.5), (3, 0.25)):
        kept = corrupt(load(), batch, "lidar_narrow", severity).inputs["points"][:, :35].any(-1)
        assert torch.equal(kept, azimuth <= share * azimuth.amax(1, keepdim=True))
    image = corrupt(load(), batch, "camera_narrow", 2).inputs["front"]
    assert torch.equal(image[..., 12:37], batch.inputs["front"][..., 12:37]), "half of 50 columns, in the middle"
    assert int(image[..., :12].count_nonzero()) + int(image[..., 37:].count_nonzero()) == 0


def test_a_narrow_grid_keeps_the_cells_that_its_points_would(batch: Batch) -> None:
    layout = parse_layout(GRID, "here")
    kept = sensors.narrow(batch.inputs["grid"], 3, layout)[0].any(0)
    rows, columns = np.mgrid[0:9, 0:9]
    azimuth = np.abs(np.arctan2(4.0 - columns, 8.0 - rows))  # rows fall with x, columns with y
    assert np.array_equal(kept.numpy(), azimuth <= np.float32(0.25 * azimuth.max()))
    assert kept[0, 4], "far ahead"
    assert not kept[8, 0], "beside the car"


@pytest.mark.parametrize(
    ("failure", "names", "views"), [("camera_lost", ["front", "rear"], 1), ("surround_lost", ["around"], 3)]
)
def test_one_of_several_cameras_is_lost_and_at_least_one_stays(
    batch: Batch, failure: str, names: list[str], views: int
) -> None:
    task, lost_before = load(), torch.zeros(PER_BATCH, len(names) * views, dtype=torch.bool)
    for severity in (1, 2, 3):
        seen = corrupt(task, batch, failure, severity).inputs
        alive = torch.cat([seen[name].reshape(PER_BATCH, views, -1).any(-1) for name in names], 1)
        assert (~alive).sum(1).tolist() == [min(severity, len(names) * views - 1)] * PER_BATCH
        assert not bool((lost_before & alive).any()), "what is lost stays lost"
        lost_before = ~alive
    several = corrupt(task, frames(range(40)), failure, 1).inputs
    assert 0 < int(several[names[0]].reshape(40, views, -1).any(-1)[:, 0].sum()) < 40, "not always the same one"


# --------------------------------------------------------------------------------------------------- light and time


def test_exposure_of_a_normalised_image_is_that_of_the_image_itself() -> None:
    image = torch.rand(2, 3, 4, 5)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25])

    def normal(value: Tensor) -> Tensor:
        return (value - mean.reshape(3, 1, 1)) / std.reshape(3, 1, 1)

    plain = Layout(kind="image", black=0.0, white=1.0)
    black, white = (tuple(normal(torch.full((3, 1, 1), level)).flatten().tolist()) for level in (0.0, 1.0))
    declared = Layout(kind="image", black=black, white=white)
    for gain in (0.25, 2.5):
        lit = sensors.expose(image, gain, plain)
        assert torch.allclose(lit, (image * gain).clamp(max=1.0), atol=1e-6)
        assert torch.allclose(sensors.expose(normal(image), gain, declared), normal(lit), atol=1e-5)


def test_without_a_declared_white_light_saturates_at_the_samples_own_brightest() -> None:
    image = torch.rand(2, 3, 4, 5)
    lit = sensors.expose(image, 2.5, Layout(kind="image"))
    assert torch.equal(lit, torch.minimum(image * 2.5, image.flatten(1).amax(1).reshape(2, 1, 1, 1)))
    with pytest.raises(TaskError, match=r"expected an image from 0 upwards; got values down to -1; declare black"):
        sensors.expose(-torch.ones(1, 3, 2, 2), 2.5, Layout(kind="image"))
    with pytest.raises(TaskError, match=r"black and white of 3 channels, or one of all; got 2"):
        sensors.expose(image, 0.5, Layout(kind="image", black=(0.0, 0.1)))


@pytest.mark.parametrize("severity", [1, 2, 3])
def test_a_stale_frame_is_an_older_one_of_the_same_drive(severity: int) -> None:
    task, whole = load(), frames(range(FRAMES))
    broken = failing(task, "lidar_stale", severity)
    found = [broken(batch) for batch in task.batches("eval", 0)]
    stale = torch.cat([batch.inputs["points"] for batch in found])
    older = [max(number - severity, number - number % PER_GROUP) for number in range(FRAMES)]
    assert torch.equal(stale, whole.inputs["points"][older])
    assert torch.equal(torch.cat([batch.inputs["front"] for batch in found]), whole.inputs["front"])
    again = failing(task, "lidar_stale", severity)
    for number in (9, 2, 11):  # forwards and backwards, across batches
        seen = again(frames([number])).inputs["points"]
        assert torch.equal(seen, whole.inputs["points"][[older[number]]])


def test_a_sample_that_is_not_in_the_split_has_no_older_frame() -> None:
    with pytest.raises(TaskError, match=r"samples of batches\('eval', 0\).*got 'frame-99', which is none"):
        corrupt(load(), frames([99]), "lidar_stale", 1)


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("failure", "layouts", "message"),
    [
        ("lidar_rotate", {}, r"User\.input_layouts to say what \['points'\] are for lidar_rotate; got nothing; write"),
        ("lidar_rotate", {"points": None}, "an input that lidar_rotate can act on"),
        ("lidar_lost", User.input_layouts, r"several sensors of one modality.*got one, \['points'\]"),
        ("ranges_shift", User.input_layouts, "points or a grid to shift; got a range map"),
        ("radar_shift", {"grid": "bev"}, 'the size of a grid\'s cells.*add "cell_m"'),
        ("radar_rotate", {"grid": "bev"}, 'row and column of the sensor.*add "sensor"'),
        (
            "lidar_half",
            {"points": {"layout": "points", "ring": 9}},
            "a feature of 5 that numbers the beams; got ring 9",
        ),
        (
            "lidar_rotate",
            {"points": "cloud"},
            r"a layout of image, images.*got 'cloud' at User\.input_layouts\['points'\]",
        ),
        ("lidar_rotate", {"points": {"layout": "points", "fov": 3}}, r"options.*\['ring'\]; got \['fov'\]"),
        ("lidar_rotate", ["points"], r"to map input names to layouts; got \['points'\]"),
    ],
)
def test_what_cannot_be_applied_says_so(failure: str, layouts: Any, message: str) -> None:
    user = User()
    user.input_layouts = layouts
    with pytest.raises(TaskError, match=message):
        check_failure(load(user), failure, 3)


def test_sparse_returns_are_no_failure_of_a_camera() -> None:
    with pytest.raises(RecipeError, match="got 'surround_sparse'"):
        check_failure(load(), "surround_sparse", 3)


def test_a_layout_of_none_lets_the_other_inputs_fail() -> None:
    user = User()
    user.inputs_by_modality = {"lidar": ["points", "grid"]}
    user.input_layouts = {"points": "points", "grid": None}
    batch = frames([0])
    seen = corrupt(load(user), batch, "lidar_rotate", 3).inputs
    assert torch.equal(seen["points"], rotate_points(batch.inputs["points"], 4.0))
    assert torch.equal(seen["grid"], batch.inputs["grid"])
    assert input_layouts(load(user))["grid"] is None


def test_a_failure_that_changes_nothing_is_refused_before_anything_runs() -> None:
    class Numb(User):
        failures = ("camera_blank",)

        def corrupt(self, batch: Batch, failure: str, severity: int) -> Batch:
            return batch

    with pytest.raises(TaskError, match=r"camera_blank at severity 2 to change an input.*mend Numb\.corrupt"):
        check_failure(load(Numb()), "camera_blank", 2)
    check_failure(load(), "camera_blank", 2)
    assert corrupt(load(Numb()), frames([0]), "camera_blank", 0).inputs.keys() == User.input_layouts.keys() | {
        "front",
        "rear",
    }


@pytest.mark.parametrize("failure", ["camera_noise", "camera_lost", "lidar_sparse", "lidar_stale"])
def test_what_is_drawn_by_sample_needs_every_samples_name(batch: Batch, failure: str) -> None:
    with pytest.raises(TaskError, match="expected 5 sample_ids, which failures are drawn by; got 0; name every sample"):
        corrupt(load(), replace(batch, sample_ids=()), failure, 1)
    assert not corrupt(load(), replace(batch, sample_ids=()), "camera_blank", 1).inputs["front"].any()


def test_nothing_is_stale_where_no_two_frames_belong_together() -> None:
    class Shuffled(User):
        def batches(self, split: str, seed: int, **share: int) -> Iterator[Batch]:
            yield from (replace(batch, groups=list(batch.sample_ids)) for batch in User().batches(split, seed))

    with pytest.raises(
        TaskError, match=r"neighbouring frames of one group .* for camera_stale; got none in the first 12"
    ):
        check_failure(load(Shuffled()), "camera_stale", 1)
    check_failure(load(), "camera_stale", 1)
