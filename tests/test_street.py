"""The street example: its world, its task, its trained network."""

from __future__ import annotations

import importlib
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fusepress.pipeline.evaluate import evaluate, torch_predict
from fusepress.pipeline.recipe import load_recipe
from fusepress.pipeline.task import Batch, LoadedTask, check_task, load_task

SPLITS: tuple[Literal["calib", "eval"], ...] = ("calib", "eval")
STREET = Path(__file__).resolve().parent.parent / "examples" / "street"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def task() -> LoadedTask:
    return load_task("task.py:StreetTask", base=STREET)


@pytest.fixture(scope="module")
def world(task: LoadedTask) -> Any:
    del task  # loading it imports its sibling modules
    return importlib.import_module("street_world")


@pytest.fixture(scope="module")
def batch(task: LoadedTask) -> Batch:
    return next(task.batches("eval", 0))


@pytest.fixture(scope="module")
def first_64(task: LoadedTask) -> list[Batch]:
    return list(itertools.islice(task.batches("eval", 0), 4))


@pytest.fixture(scope="module")
def dense(task: LoadedTask) -> torch.nn.Module:
    model = task.build_model()
    model.load_state_dict(load_file(STREET / "street.safetensors"))
    return model.eval()


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((STREET / "metrics.json").read_text())
    return loaded


def daylight(world: Any, split: str = "eval", count: int = 8) -> Any:
    """Scenes with clear, noiseless light, so that colours can be compared."""
    scenes = world.draw_scenes(split, 0, list(range(0, count * world.FRAMES_PER_STREET, world.FRAMES_PER_STREET)))
    n = len(scenes.keys)
    return replace(
        scenes,
        ambient=np.full(n, 0.8, np.float32),
        fog=np.zeros(n, np.float32),
        image_noise=np.zeros(n, np.float32),
        tint=np.ones((n, 3), np.float32),
        dropout=np.zeros(n, np.float32),
    )


def equal(one: Batch, other: Batch) -> bool:
    same = all(torch.equal(one.inputs[name], other.inputs[name]) for name in one.inputs)
    return same and torch.equal(one.targets["labels"], other.targets["labels"]) and one.sample_ids == other.sample_ids


# ---------------------------------------------------------------------------------------------------- world and data


@pytest.mark.parametrize("split", ["train", "calib", "eval"])
def test_a_batch_depends_on_split_seed_and_number_only(task: LoadedTask, split: Any) -> None:
    third = list(itertools.islice(task.batches(split, 7), 3))[2]
    assert equal(third, next(task.batches(split, 7, start=2)))


def test_skipping_ahead_costs_nothing_and_ranks_share_without_overlap(task: LoadedTask) -> None:
    far = next(task.batches("train", 0, start=10**8))
    assert far.sample_ids[0] == f"train-{16 * 10**8:05d}"
    ids = [set(next(task.batches("train", 0, start=5, rank=rank, world=2)).sample_ids) for rank in (0, 1)]
    assert ids[0].isdisjoint(ids[1])


def test_training_streams_differ_by_seed_and_the_eval_split_does_not(task: LoadedTask) -> None:
    assert not equal(next(task.batches("train", 0)), next(task.batches("train", 1)))
    assert equal(next(task.batches("eval", 0)), next(task.batches("eval", 1)))


def test_eval_and_calib_are_finite_clustered_by_street_and_apart(task: LoadedTask) -> None:
    last = next(task.batches("calib", 0, start=7))
    assert next(task.batches("calib", 0, start=8), None) is None
    assert next(task.batches("eval", 0, start=16), None) is None
    final = next(task.batches("eval", 0, start=15))
    assert (last.sample_ids[-1], final.sample_ids[-1]) == ("calib-00127", "eval-00255")
    assert set(last.sample_ids).isdisjoint(final.sample_ids)
    assert all(final.groups.count(name) == 4 for name in final.groups)


def test_frames_of_one_street_show_the_same_street_from_further_along(world: Any) -> None:
    scenes = world.draw_scenes("eval", 0, [0, 1, 2, 3, 4])
    assert np.array_equal(scenes.lines[0], scenes.lines[3])
    assert not np.array_equal(scenes.lines[0], scenes.lines[4])
    assert (np.diff(scenes.along[:4]) > 0.5).all()


def test_objects_do_not_overlap(world: Any) -> None:
    scenes = world.draw_scenes("train", 3, list(range(32)))
    frames = world.sense(scenes)
    centres = world.bev_centres()
    covered = np.zeros((32, len(centres)), int)
    for slot in range(scenes.kind.shape[1]):
        box = scenes.box[:, slot]
        c, s = np.cos(box[:, 2])[:, None], np.sin(box[:, 2])[:, None]
        dx, dy = centres[:, 0] - box[:, :1], centres[:, 1] - box[:, 1:2]
        inside = (abs(c * dx + s * dy) < box[:, 3:4] / 2) & (abs(c * dy - s * dx) < box[:, 4:5] / 2)
        covered += inside & (scenes.kind[:, slot, None] >= 0)
    assert covered.max() == 1
    assert frames.labels.max() == world.IGNORE


def test_a_box_that_the_lidar_hits_is_the_box_that_the_camera_sees_there(world: Any) -> None:
    frames = world.sense(daylight(world))
    scene, shot = np.nonzero(frames.sweep_object >= 0)
    points = frames.sweep[scene, shot]
    pixel = np.floor(world.project(points)).astype(int)
    inside = (pixel[:, 0] >= 0) & (pixel[:, 0] < world.IMAGE_WIDTH) & (pixel[:, 1] >= 0)
    inside &= (pixel[:, 1] < world.IMAGE_HEIGHT) & (points[:, 0] > 0.5)
    seen = frames.camera_object[scene[inside], pixel[inside, 1], pixel[inside, 0]]
    hit = frames.sweep_object[scene, shot][inside]
    assert inside.sum() > 1000
    assert (seen == hit).mean() > 0.85  # the rest: range noise, edges, and parallax between the two sensors


def test_ray_cast_depth_agrees_with_a_brute_force_march(world: Any) -> None:
    scenes = daylight(world, count=1)
    frames = world.sense(scenes)
    returned = np.flatnonzero(np.isfinite(frames.sweep[0, :, 0]))[::37]
    origin = np.asarray(world.LIDAR_ORIGIN)
    for shot in returned:
        end = frames.sweep[0, shot]
        path = origin + (end - origin) * np.linspace(0.0, 1.03, 4000)[:, None]
        first = np.flatnonzero((path[:, 2] <= 0) | _inside_any(scenes, path))[0]
        distance = np.linalg.norm(end - origin)
        assert abs(first / 4000 * 1.03 - 1.0) * distance < 0.2  # range noise has a deviation of 0.03 m


def _inside_any(scenes: Any, path: Any) -> Any:
    box = scenes.box[0][scenes.kind[0] >= 0]
    c, s = np.cos(box[:, 2]), np.sin(box[:, 2])
    dx, dy = path[:, :1] - box[:, 0], path[:, 1:2] - box[:, 1]
    inside = (abs(c * dx + s * dy) < box[:, 3] / 2) & (abs(c * dy - s * dx) < box[:, 4] / 2)
    return (inside & (path[:, 2:] < box[:, 5])).any(axis=1)


def test_repainting_one_object_changes_its_pixels_and_nothing_that_the_lidar_gives(world: Any) -> None:
    scenes = daylight(world)
    before = world.sense(scenes)
    slot = int(np.bincount(before.camera_object[before.camera_object >= 0]).argmax())
    look = scenes.look.copy()
    look[:, slot] = (look[:, slot] + 0.5) % 1.0
    after = world.sense(replace(scenes, look=look))
    changed = (before.image != after.image).any(axis=1)
    assert changed.any()
    assert (before.camera_object[changed] == slot).all()
    assert np.array_equal(before.points, after.points)
    assert np.array_equal(before.labels, after.labels)


def test_pedestrians_and_bushes_differ_for_the_camera_only(world: Any) -> None:
    scenes = world.draw_scenes("eval", 0, list(range(16)))
    before, after = world.sense(scenes), world.sense(world.with_kinds_swapped(scenes))
    assert np.array_equal(before.points, after.points)
    assert np.array_equal(before.cells, after.cells)
    assert np.array_equal(before.labels == world.PEDESTRIAN, after.labels == world.BUSH)
    assert (before.labels == world.PEDESTRIAN).any()
    changed = (before.image != after.image).any(axis=1)
    kinds = scenes.kind[np.nonzero(changed)[0], before.camera_object[changed]]
    assert changed.any()
    assert set(kinds) == {world.PEDESTRIAN, world.BUSH}


def test_lane_markings_differ_for_the_camera_only(world: Any) -> None:
    scenes = daylight(world)
    bare = replace(scenes, markings=np.zeros(len(scenes.keys), np.bool_))
    before, after = world.sense(scenes), world.sense(bare)
    assert np.array_equal(before.points, after.points)
    assert not (after.labels == world.LANE).any()
    changed = (before.image != after.image).any(axis=1)
    assert changed.any()
    assert (before.camera_object[changed] == -1).all()


def test_a_cell_labelled_lane_is_bright_in_the_camera(world: Any) -> None:
    frames = world.sense(daylight(world))
    ground = np.concatenate([world.bev_centres(), np.zeros((2304, 1), np.float32)], axis=1)
    pixel = np.floor(world.project(ground)).astype(int)
    usable = (ground[:, 0] > 2.6) & (ground[:, 0] < 9.0) & (pixel[:, 0] >= 0) & (pixel[:, 0] < world.IMAGE_WIDTH)
    values = frames.image[:, :, pixel[usable, 1], pixel[usable, 0]].mean(axis=1)
    labels = frames.labels.reshape(len(values), -1)[:, usable]
    assert values[labels == world.LANE].mean() > 1.6 * values[labels == world.FREE].mean()


def test_pillars_hold_the_points_of_their_cell_and_no_cell_twice(world: Any) -> None:
    frames = world.sense(world.draw_scenes("train", 1, list(range(8))))
    real = frames.points[:, -1] > 0
    xyz = world.xyz_of(frames.points)
    row = np.floor((xyz[..., 0] - world.BEV_X) / world.CELL + 1e-4).astype(int)
    column = np.floor((xyz[..., 1] - world.BEV_Y) / world.CELL + 1e-4).astype(int)
    wanted = np.broadcast_to(frames.cells[..., None], real.shape)
    assert (row * world.BEV_SIZE + column == wanted)[real].mean() > 0.999  # rounding at cell borders
    for cells in frames.cells:
        used = cells[cells < world.DUMMY_CELL]
        assert len(set(used)) == len(used) > 100
    padded = frames.cells == world.DUMMY_CELL
    assert padded.any()
    assert not frames.points.transpose(0, 2, 1, 3)[padded].any()


def test_light_and_weather_vary(task: LoadedTask, world: Any) -> None:
    scenes = world.draw_scenes("train", 0, list(range(200)))
    assert (scenes.ambient < 0.2).mean() == pytest.approx(0.2, abs=0.1)
    assert (scenes.fog > 0).mean() == pytest.approx(0.35, abs=0.1)
    assert task.offers("corrupt")


# ------------------------------------------------------------------------------------------------------------- task


def test_the_task_passes_the_check(task: LoadedTask) -> None:
    assert check_task(task, task.build_model()) == {"output": (1, 6, 48, 48)}


def test_the_task_hash_covers_its_sibling_modules(task: LoadedTask) -> None:
    assert {"task.py", "street_world.py", "street_model.py"} <= {path.name for path in task.source.files}


def test_the_fingerprint_needs_no_data_and_changes_with_the_split(
    task: LoadedTask, world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world, "sense", lambda scenes: pytest.fail("the fingerprint generated data"))
    prints = {split: task.user.fingerprint(split) for split in ("train", "calib", "eval")}
    assert len(set(prints.values())) == 3
    monkeypatch.setattr(world, "VERSION", world.VERSION + 1)
    assert task.user.fingerprint("eval") != prints["eval"]


def test_dead_sensors_appear_in_training_only(task: LoadedTask, world: Any) -> None:
    train = list(itertools.islice(task.batches("train", 0), 8))
    images, cells = (torch.cat([b.inputs[name] for b in train]) for name in ("image", "cells"))
    dark = (images.flatten(1).amax(1) == 0).float().mean().item()
    deaf = (cells == world.DUMMY_CELL).all(1).float().mean().item()
    assert dark == pytest.approx(0.12, abs=0.07)
    assert deaf == pytest.approx(0.12, abs=0.07)
    for split in SPLITS:
        for one in itertools.islice(task.batches(split, 0), 3):
            assert (one.inputs["image"].flatten(1).amax(1) > 0).all()
            assert (one.inputs["cells"] < world.DUMMY_CELL).any(1).all()


def test_statistics_count_cells_and_ignore_the_unknown(task: LoadedTask, world: Any, batch: Batch) -> None:
    guess = torch.randn(batch.size, 6, 48, 48, generator=torch.Generator().manual_seed(0))
    stats = task.sample_stats({"output": guess}, batch)
    labels, answer = batch.targets["labels"][3].numpy(), guess[3].argmax(0).numpy()
    for number in range(6):
        both = sum(1 for a, b in zip(answer.flat, labels.flat, strict=True) if a == b == number)
        either = sum(1 for a, b in zip(answer.flat, labels.flat, strict=True) if b != 255 and number in (a, b))
        assert (stats["intersection"][3, number], stats["union"][3, number]) == (both, either)
    known = torch.where(batch.targets["labels"] == world.IGNORE, 0, batch.targets["labels"])
    perfect = torch.nn.functional.one_hot(known, 6).permute(0, 3, 1, 2).float()
    scores = task.score(task.sample_stats({"output": perfect}, batch))
    assert list(scores) == list(task.metrics)
    assert set(scores.values()) == {1.0}


def test_the_loss_falls_towards_the_truth_and_ignores_the_unknown(task: LoadedTask, world: Any, batch: Batch) -> None:
    labels = batch.targets["labels"]
    known = labels != world.IGNORE
    truth = torch.nn.functional.one_hot(torch.where(known, labels, 0), 6).permute(0, 3, 1, 2).float()
    assert sum(loss.item() for loss in task.losses({"output": 20 * truth}, batch).values()) < 1e-3
    assert sum(loss.item() for loss in task.losses({"output": -20 * truth}, batch).values()) > 5
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1)) * ~known.unsqueeze(1)
    for name, loss in task.losses({"output": truth + 9 * noise}, batch).items():
        assert loss.item() == pytest.approx(task.losses({"output": truth}, batch)[name].item(), rel=1e-5)


FAILURES = ("camera_blank", "camera_dark", "camera_noise", "lidar_blank", "lidar_half", "lidar_sparse")


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_worsens_with_severity_and_spares_the_other_sensor(
    task: LoadedTask, batch: Batch, failure: str
) -> None:
    hurt = [task.user.corrupt(batch, failure, severity) for severity in (1, 2, 3)]
    again = task.user.corrupt(batch, failure, 2)
    assert equal(hurt[1], again)
    spared = "lidar" if failure.startswith("camera") else "camera"
    for one in hurt:
        assert {k: (v.shape, v.dtype) for k, v in one.inputs.items()} == {
            k: (v.shape, v.dtype) for k, v in batch.inputs.items()
        }
        assert all(torch.equal(one.inputs[name], batch.inputs[name]) for name in task.user.inputs_by_modality[spared])
    if spared == "lidar":
        harm = [(one.inputs["image"] - batch.inputs["image"]).abs().mean().item() for one in hurt]
    else:
        harm = [-one.inputs["points"][:, -1].sum().item() for one in hurt]
        assert -batch.inputs["points"][:, -1].sum().item() < harm[0]
    assert harm == sorted(harm)
    assert len(set(harm)) == 3


def test_a_blank_sensor_gives_nothing_at_severity_three(task: LoadedTask, world: Any, batch: Batch) -> None:
    assert not task.user.corrupt(batch, "camera_blank", 3).inputs["image"].any()
    blank = task.user.corrupt(batch, "lidar_blank", 3).inputs
    assert not blank["points"].any()
    assert (blank["cells"] == world.DUMMY_CELL).all()


def test_lidar_half_removes_every_second_beam(task: LoadedTask, world: Any, batch: Batch) -> None:
    points = task.user.corrupt(batch, "lidar_half", 3).inputs["points"].numpy()
    left = world.beam_of(world.xyz_of(points))[points[:, -1] > 0]
    assert set(left % 2) == {1}
    share = points[:, -1].sum() / batch.inputs["points"][:, -1].sum().item()
    assert 0.4 < share < 0.6


def test_beams_are_recovered_from_the_points(world: Any) -> None:
    frames = world.sense(world.draw_scenes("eval", 0, [0, 9]))
    beams = np.arange(len(world.BEAM_SLOPES)).repeat(len(world.AZIMUTHS))
    for sweep in frames.sweep:
        returned = np.isfinite(sweep[:, 0])
        assert np.array_equal(world.beam_of(sweep[returned]), beams[returned])


@pytest.mark.parametrize(("failure", "severity"), [("camera_melted", 1), ("lidar_half", 4)])
def test_an_unknown_failure_is_refused(task: LoadedTask, batch: Batch, failure: str, severity: int) -> None:
    with pytest.raises(ValueError, match=r"expected a failure of camera_blank.*got"):
        task.user.corrupt(batch, failure, severity)


def test_pictures_are_pictures(task: LoadedTask, batch: Batch, dense: torch.nn.Module) -> None:
    outputs = torch_predict(task, dense)(batch.inputs)["output"]
    pictures = task.user.pictures(batch, outputs, -outputs)
    assert list(pictures) == ["camera", "lidar", "truth", "dense", "compressed", "difference"]
    for picture in pictures.values():
        assert picture.dtype == np.uint8
        assert picture.shape[2] == 3
        assert min(picture.shape[:2]) >= 300
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) >= 3
    assert not np.array_equal(pictures["dense"], pictures["compressed"])


def test_the_recipe_is_valid_and_names_this_checkpoint() -> None:
    recipe = load_recipe(STREET / "recipe.yaml")
    assert recipe.resolve(recipe.recipe.checkpoint) == STREET / "street.safetensors"
    assert load_task(recipe.recipe.task, base=recipe.base).name == "StreetTask"


# ---------------------------------------------------------------------------------------------------- trained network


def test_the_checkpoint_is_small_and_finite(task: LoadedTask) -> None:
    path = STREET / "street.safetensors"
    assert path.stat().st_size <= 8_000_000
    weights = load_file(path)
    assert set(weights) == set(task.build_model().state_dict())
    assert all(value.isfinite().all() for value in weights.values())


def test_the_recorded_metrics_are_those_of_the_checkpoint(
    task: LoadedTask, dense: torch.nn.Module, record: dict[str, Any], first_64: list[Batch]
) -> None:
    found = evaluate(task, torch_predict(task, dense), batches=first_64).metrics
    assert record["n"] == 256
    for name, value in record["first_64"]["fusion"].items():
        assert found[name] == pytest.approx(value, abs=0.004), name
        assert found[name] == pytest.approx(record["metrics"]["fusion"][name], abs=0.1), name


def test_fusion_wins_clearly_and_survives_a_dead_sensor(record: dict[str, Any]) -> None:
    miou = {name: values["miou"] for name, values in record["metrics"].items()}
    assert miou["fusion"] > max(miou["camera_only"], miou["lidar_only"]) + 0.05
    assert miou["fusion_without_lidar"] >= 0.8 * miou["camera_only"]
    assert miou["fusion_without_camera"] >= 0.8 * miou["lidar_only"]


@pytest.mark.parametrize(("dead", "alone"), [("lidar", "camera_only"), ("camera", "lidar_only")])
def test_the_network_survives_a_dead_sensor_when_measured_again(
    task: LoadedTask, dense: torch.nn.Module, record: dict[str, Any], first_64: list[Batch], dead: str, alone: str
) -> None:
    def blank(batch: Batch) -> Batch:
        corrupted: Batch = task.user.corrupt(batch, f"{dead}_blank", 3)
        return corrupted

    def zeroed(batch: Batch) -> Batch:
        names = task.user.inputs_by_modality[dead]
        return batch.with_inputs(**{name: torch.zeros_like(batch.inputs[name]) for name in names})

    predict = torch_predict(task, dense)
    found = evaluate(task, predict, batches=first_64, corrupt=blank).metrics
    assert found["miou"] == pytest.approx(record["first_64"][f"fusion_without_{dead}"]["miou"], abs=0.004)
    assert found["miou"] >= 0.8 * record["first_64"][alone]["miou"]
    whole = evaluate(task, predict, batches=first_64).metrics
    assert whole["miou"] > record["first_64"][alone]["miou"] + 0.05
    plain = evaluate(task, predict, batches=first_64[:1], corrupt=zeroed)
    assert plain.metrics == evaluate(task, predict, batches=first_64[:1], corrupt=blank).metrics
