"""The KITTI depth-completion example: geometry on frames made here, the task on real frames where they are."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fusepress.calib.quantize import excluded_nodes, macs_share
from fusepress.export.onnx import export_onnx, load_onnx
from fusepress.pipeline.corrupt import corrupt
from fusepress.pipeline.errors import TaskError
from fusepress.pipeline.evaluate import evaluate, torch_predict
from fusepress.pipeline.recipe import load_recipe
from fusepress.pipeline.task import Batch, LoadedTask, check_task, load_task

HERE = Path(__file__).resolve().parent.parent
EXAMPLE = HERE / "examples" / "kitti_depth"
KITTI = Path(os.environ.get("FUSEPRESS_KITTI", HERE.parent / "shared" / "data" / "kitti"))
needs_kitti = pytest.mark.skipif(
    not (KITTI / "drive" / "image_2").is_dir(),
    reason=f"no KITTI frames at {KITTI}; set FUSEPRESS_KITTI to a folder with drive/image_2, drive/velodyne, ...",
)
SPLITS: tuple[Literal["train", "calib", "eval"], ...] = ("train", "calib", "eval")
# Focal length 100 pixels, centre at (160, 48). The LiDAR stands in the camera: its x is z there, its y is -x, its z -y.
P2 = "P2: 100 0 160 0  0 100 48 0  0 0 1 0"
R0 = "R0_rect: 1 0 0 0 1 0 0 0 1"
TR = "Tr_velo_to_cam: 0 -1 0 0  0 0 -1 0  1 0 0 0"


def load(data: Path | None) -> LoadedTask:
    return load_task("task.py:KittiDepthTask", base=EXAMPLE, data=data)


@pytest.fixture(scope="module")
def io() -> Any:
    load(None)  # imports its sibling modules
    return importlib.import_module("kitti_io")


def baselines() -> Any:
    specification = importlib.util.spec_from_file_location("kitti_baselines", EXAMPLE / "baselines.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def lidar_point(u: float, v: float, depth: float) -> list[float]:
    """The LiDAR point that the calibration above projects to pixel (u, v) at that depth."""
    return [depth, -(u - 160) / 100 * depth, -(v - 48) / 100 * depth, 0.5]


def write_drive(
    root: Path, frames: int, *, per_frame_calibration: bool = False, size: tuple[int, int] = (320, 96)
) -> Path:
    """A drive of smooth walls that come closer, with a picture as bright as the wall is near."""
    for folder in ("image_2", "velodyne"):
        (root / folder).mkdir(parents=True)
    if per_frame_calibration:
        (root / "calib").mkdir()
    else:
        (root / "calib.txt").write_text(f"{P2}\n{R0}\n{TR}\n")
    for index in range(frames):
        name = f"{index:06d}"
        columns, rows = np.meshgrid(np.arange(0, 320, 4), np.arange(32, 96, 3))
        depth = 8 + 0.1 * columns / (1 + 0.02 * index)
        points = [lidar_point(*p) for p in np.stack([columns, rows, depth], axis=-1).reshape(-1, 3).tolist()]
        np.array(points, dtype="<f4").tofile(root / "velodyne" / f"{name}.bin")
        ramp = np.broadcast_to(np.linspace(255, 40 + index, size[0]), (size[1], size[0]))
        Image.fromarray(np.repeat(ramp[..., None], 3, axis=2).astype(np.uint8)).save(root / "image_2" / f"{name}.png")
        if per_frame_calibration:
            (root / "calib" / f"{name}.txt").write_text(f"{P2}\n{R0}\n{TR}\n")
    return root


@pytest.fixture
def drive(tmp_path: Path) -> Path:
    return write_drive(tmp_path / "drive", 20)


# -- geometry ---------------------------------------------------------------------------------------------------------


def test_known_points_project_to_known_pixels(io: Any, drive: Path) -> None:
    calibration = io.read_calibration(drive / "calib.txt")
    wanted = np.array([[160, 48, 10.0], [10.25, 90.5, 3.0], [319, 0, 70.0]])
    points = np.array([lidar_point(*p) for p in wanted] + [[-5.0, 0.0, 0.0, 0.0]])  # the last lies behind the camera
    np.testing.assert_allclose(calibration.project(points), wanted, atol=1e-9)


def test_rectification_and_extrinsics_are_applied_in_their_order(io: Any, tmp_path: Path) -> None:
    # 90 degrees about the camera's z in R0, a shift of 1 m along the camera's x before it: x -> y after the turn.
    (tmp_path / "c.txt").write_text(f"{P2}\nR0_rect: 0 -1 0 1 0 0 0 0 1\n{TR.replace('0 -1 0 0', '0 -1 0 1')}\n")
    projected = io.read_calibration(tmp_path / "c.txt").project(np.array([[10.0, 0.0, 0.0]]))
    np.testing.assert_allclose(projected, [[160, 48 + 100 * 1 / 10, 10]], atol=1e-9)


def test_the_resized_view_moves_pixels_and_intrinsics_alike(io: Any, drive: Path) -> None:
    view = io.View.fit(1242, 375, 96, 320)
    calibration = io.read_calibration(drive / "calib.txt")
    points = np.array([lidar_point(400, 120, 20.0), lidar_point(80, 300, 6.0)])
    moved = view.pixels(calibration.project(points))
    resized = io.Calibration(
        projection=view.intrinsics(calibration.projection),
        rectification=calibration.rectification,
        lidar_to_camera=calibration.lidar_to_camera,
    )
    np.testing.assert_allclose(moved, resized.project(points), atol=1e-9)
    # The crop keeps the bottom: the outer lower right corner stays the corner.
    np.testing.assert_allclose(view.pixels(np.array([[1241.5, 374.5, 1.0]]))[0, :2], [319.5, 95.5], atol=1e-9)


def test_a_bright_square_in_the_picture_lands_where_its_points_land(io: Any) -> None:
    view = io.View.fit(1242, 375, 96, 320)
    picture = np.zeros((375, 1242, 3), dtype=np.uint8)
    picture[196:205, 696:705] = 255
    rows, columns = np.nonzero(view.image(Image.fromarray(picture))[..., 0] > 60)
    u, v = view.pixels(np.array([[700.0, 200.0, 5.0]]))[0, :2]
    assert abs(columns.mean() - u) < 0.5
    assert abs(rows.mean() - v) < 0.5


def test_the_nearest_point_hides_the_others_in_its_pixel(io: Any) -> None:
    pixels = np.array([[5.2, 3.1, 30.0], [4.9, 2.8, 7.0], [5.0, 3.0, 12.0], [6.0, 3.0, 90.0], [7.0, 3.0, 0.5]])
    depth = io.depth_map(pixels, 8, 10, near=1.0, far=80.0)
    assert depth[3, 5] == 7.0
    assert np.count_nonzero(depth) == 1  # the others are out of range


def test_the_halves_are_disjoint_and_together_complete(io: Any) -> None:
    generator = np.random.default_rng(0)
    depth = np.where(generator.random((30, 41)) < 0.3, generator.random((30, 41)) * 50 + 1, 0).astype(np.float32)
    given, held_out = io.split_halves(depth, np.random.default_rng(1))
    assert not np.any((given > 0) & (held_out > 0))
    np.testing.assert_array_equal(given + held_out, depth)
    assert abs(np.count_nonzero(given) - np.count_nonzero(held_out)) <= 1
    again, _ = io.split_halves(depth, np.random.default_rng(2))
    assert np.any(again != given)


def test_random_views_lie_inside_the_largest_one_and_keep_its_shape(io: Any) -> None:
    whole = io.View.fit(640, 200, 96, 320).box
    boxes = np.array([io.View.random(640, 200, 96, 320, np.random.default_rng(i)).box for i in range(50)])
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    np.testing.assert_allclose(widths / heights, 320 / 96)
    assert np.all(boxes[:, :2] >= np.array(whole[:2]) - 1e-9)
    assert np.all(boxes[:, 2:] <= np.array(whole[2:]) + 1e-9)
    assert widths.min() < 0.8 * 640 < widths.max()


# -- folders and damage -----------------------------------------------------------------------------------------------


def test_both_calibration_layouts_give_the_same_samples(drive: Path, tmp_path: Path) -> None:
    other = write_drive(tmp_path / "other" / "drive", 20, per_frame_calibration=True)
    one, two = (next(load(path).batches("eval", 0)) for path in (drive, other))
    assert one.sample_ids == two.sample_ids
    assert torch.equal(one.inputs["sparse_depth"], two.inputs["sparse_depth"])
    assert int((one.inputs["sparse_depth"] > 0).sum()) > 100


def test_key_names_of_the_other_benchmarks_are_read(io: Any, tmp_path: Path) -> None:
    tracking, odometry = tmp_path / "tracking.txt", tmp_path / "odometry.txt"
    tracking.write_text(f"{P2}\n{R0.replace('R0_rect', 'R_rect')}\n{TR.replace('velo_to_cam', 'velo_cam')}\n")
    odometry.write_text(f"{P2}\n{TR.replace('Tr_velo_to_cam', 'Tr')}\n")
    for path in (tracking, odometry):
        np.testing.assert_allclose(
            io.read_calibration(path).project(np.array([lidar_point(50, 60, 9)])), [[50, 60, 9]], atol=1e-6
        )


def test_several_drives_are_each_split_by_time(tmp_path: Path) -> None:
    write_drive(tmp_path / "data" / "a", 20)
    write_drive(tmp_path / "data" / "b", 30)
    task = load(tmp_path / "data").user
    ids = [frame.sample_id for frame, _ in task.frames("eval")]
    assert [i for i in ids if i.startswith("a/")] == [f"a/{n:06d}" for n in range(14, 20)]
    assert {i.split("/")[0] for i in ids} == {"a", "b"}
    groups = {g for batch in load(tmp_path / "data").batches("eval", 0) for g in batch.groups}
    assert all(g.startswith(("a/", "b/")) for g in groups)


def test_without_data_the_message_says_what_to_pass() -> None:
    task = load(None)
    assert task.build_model() is not None
    with pytest.raises(TaskError, match=r"expected a folder of KITTI frames; got none.*-o data="):
        next(task.batches("eval", 0))


def break_image(drive: Path) -> None:
    path = drive / "image_2" / "000015.png"
    path.write_bytes(path.read_bytes()[:200])


def break_cloud(drive: Path) -> None:
    path = drive / "velodyne" / "000015.bin"
    path.write_bytes(path.read_bytes()[:-5])


def break_numbers(drive: Path) -> None:
    path = drive / "velodyne" / "000015.bin"
    points = np.fromfile(path, dtype="<f4")
    points[4] = np.nan
    points.tofile(path)


def empty_cloud(drive: Path) -> None:
    (drive / "velodyne" / "000015.bin").write_bytes(b"")


def look_away(drive: Path) -> None:
    np.array([[-10.0, 0.0, 0.0, 0.0]], dtype="<f4").tofile(drive / "velodyne" / "000015.bin")


def lose_sweep(drive: Path) -> None:
    (drive / "velodyne" / "000015.bin").unlink()


def lose_calibration(drive: Path) -> None:
    (drive / "calib.txt").unlink()


def cut_calibration(drive: Path) -> None:
    (drive / "calib.txt").write_text(f"{P2}\n{R0}\n{TR[:-4]}\n")


def calibration_without_lidar(drive: Path) -> None:
    (drive / "calib.txt").write_text(f"{P2}\n{R0}\n")


def calibration_with_words(drive: Path) -> None:
    (drive / "calib.txt").write_text(f"{P2.replace('100', 'wide')}\n{R0}\n{TR}\n")


def keep_eight(drive: Path) -> None:
    for index in range(8, 20):
        (drive / "image_2" / f"{index:06d}.png").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_image, r"expected a readable camera image; got .* at .*000015\.png; restore"),
        (break_cloud, r"expected a sweep of 16-byte points .* got \d+ bytes at .*000015\.bin"),
        (break_numbers, r"expected finite coordinates; got 1 of \d+ points with NaN .*000015\.bin"),
        (empty_cloud, r"got 0 bytes at .*000015\.bin"),
        (look_away, r"expected LiDAR points inside the image.*got 0 of 0 .*000015\.bin; check that .*calib\.txt"),
        (lose_sweep, r"expected a LiDAR sweep for 000015\.png; got none"),
        (lose_calibration, r"expected a calibration .* got none at .*calib\.txt"),
        (cut_calibration, r"expected 12 finite numbers in Tr_velo_to_cam; got 10"),
        (calibration_without_lidar, r"got only \['P2', 'R0_rect'\] .* add the line `Tr_velo_to_cam"),
        (calibration_with_words, r"expected numbers in P2; got .*'wide'"),
        (keep_eight, r"expected at least 10 frames a drive.*got 8 in 'drive'"),
    ],
)
def test_a_damaged_folder_gives_one_clear_message(drive: Path, damage: Any, message: str) -> None:
    damage(drive)
    with pytest.raises(TaskError, match=message):
        list(load(drive).batches("eval", 0))


@pytest.mark.parametrize("missing", [True, False])
def test_a_folder_that_is_none_of_kittis_is_refused(tmp_path: Path, missing: bool) -> None:
    where = tmp_path / "nowhere" if missing else tmp_path
    with pytest.raises(TaskError, match=r"expected a KITTI folder with image_2/.*correct the recipe's `data`"):
        next(load(where).batches("train", 0))


# -- splits and batches -----------------------------------------------------------------------------------------------


def test_splits_are_in_time_order_with_gaps_that_nobody_reads(drive: Path) -> None:
    task = load(drive).user
    numbers = {split: [int(frame.name) for frame, _ in task.frames(split)] for split in SPLITS}
    assert numbers == {"train": list(range(10)), "calib": [11, 12], "eval": list(range(14, 20))}


def test_evaluation_is_the_same_every_time_in_windows_of_neighbours(drive: Path) -> None:
    task = load(drive)
    one, two = list(task.batches("eval", 0)), list(load(drive).batches("eval", 7))
    assert [b.size for b in one] == [3, 3]
    assert [g for b in one for g in b.groups] == ["drive/0000"] * 3 + ["drive/0001"] * 3
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.inputs["sparse_depth"], b.inputs["sparse_depth"])
        assert torch.equal(a.targets["depth"], b.targets["depth"])
    assert not bool(((one[0].inputs["sparse_depth"] > 0) & (one[0].targets["depth"] > 0)).any())
    assert [b.sample_ids for b in task.batches("eval", 0, rank=1, world=2)] == [one[1].sample_ids]
    assert [b.sample_ids for b in task.batches("eval", 0, start=1)] == [one[1].sample_ids]


def same(one: Batch, two: Batch) -> bool:
    return list(one.sample_ids) == list(two.sample_ids) and all(
        torch.equal(one.inputs[n], two.inputs[n]) for n in one.inputs
    )


def test_training_batches_follow_from_seed_and_place_alone(drive: Path) -> None:
    task = load(drive)
    stream = list(itertools.islice(task.batches("train", 3), 6))
    assert same(next(task.batches("train", 3, start=4)), stream[4])
    assert same(next(task.batches("train", 3, start=2, rank=1, world=2)), stream[5])
    assert not same(next(task.batches("train", 4)), stream[0])
    assert same(next(task.batches("train", 3, start=10**9)), next(load(drive).batches("train", 3, start=10**9)))
    # An epoch shows every frame once: 10 frames in the first ten places.
    seen = [i.split("#")[0] for batch in stream for i in batch.sample_ids][:10]
    assert len(set(seen)) == 10


def test_augmentation_mirrors_image_and_points_together(drive: Path) -> None:
    # On these frames the picture gets darker and the wall farther to the right: mirrored, both turn round.
    task = load(drive)
    directions = set()
    for batch in itertools.islice(task.batches("train", 0), 5):
        for image, sparse in zip(batch.inputs["image"], batch.inputs["sparse_depth"], strict=True):
            rows, columns = torch.nonzero(sparse[0], as_tuple=True)
            depth_rises = bool(torch.corrcoef(torch.stack([columns.float(), sparse[0, rows, columns]]))[0, 1] > 0)
            light_falls = bool(image[:, :, :40].mean() > image[:, :, -40:].mean())
            assert depth_rises == light_falls
            directions.add(depth_rises)
    assert directions == {True, False}


def test_the_fingerprint_changes_with_the_content_of_its_own_split_only(drive: Path) -> None:
    before = {split: load(drive).fingerprint(split) for split in SPLITS}
    assert len(set(before.values())) == 3
    moved = drive.parent / "elsewhere" / "drive"
    shutil.copytree(drive, moved)
    assert {split: load(moved).fingerprint(split) for split in SPLITS} == before
    path = drive / "velodyne" / "000016.bin"
    points = np.fromfile(path, dtype="<f4")
    points[0] += 1
    points.tofile(path)
    after = {split: load(drive).fingerprint(split) for split in SPLITS}
    assert after["eval"] != before["eval"]
    assert {s: after[s] for s in ("train", "calib")} == {s: before[s] for s in ("train", "calib")}


# -- metrics, failures, model ---------------------------------------------------------------------------------------


def test_metrics_agree_with_a_plain_computation_over_all_held_out_points(drive: Path) -> None:
    task = load(drive)
    generator = torch.Generator().manual_seed(0)
    predictions: list[torch.Tensor] = []

    def predict(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        predictions.append(torch.rand(inputs["sparse_depth"].shape, generator=generator) * 40)
        return {"depth": predictions[-1]}

    found = evaluate(task, predict).metrics
    labels = torch.cat([b.targets["depth"] for b in task.batches("eval", 0)]).double().numpy()
    guesses = torch.cat(predictions).double().numpy()
    y, p = labels[labels > 0], guesses[labels > 0]
    assert found["rmse"] == pytest.approx(np.sqrt(np.mean((y - p) ** 2)))
    assert found["mae"] == pytest.approx(np.mean(np.abs(y - p)))
    assert found["delta1"] == pytest.approx(np.mean(np.maximum(y / p, p / y) < 1.25))
    perfect = evaluate(task, lambda i: {"depth": torch.cat([b.targets["depth"] for b in task.batches("eval", 0)])[:3]})
    assert perfect.metrics["rmse"] > 0  # the labels of the first window are not those of the second


def test_failures_act_on_their_sensor_alone_and_the_same_for_everyone(drive: Path) -> None:
    task = load(drive)
    batch = next(task.batches("eval", 0))
    points = int((batch.inputs["sparse_depth"] > 0).sum())
    kept = {}
    for failure in task.user.failures:
        for severity in (1, 2, 3):
            one, two = (corrupt(task, batch, failure, severity) for _ in range(2))
            other = "sparse_depth" if failure.startswith("camera") else "image"
            own = "image" if failure.startswith("camera") else "sparse_depth"
            assert same(one, two)
            assert torch.equal(one.inputs[other], batch.inputs[other])
            assert not torch.equal(one.inputs[own], batch.inputs[own])
            assert torch.equal(one.targets["depth"], batch.targets["depth"])
            kept[failure, severity] = int((one.inputs["sparse_depth"] > 0).sum()) / points
    assert kept["lidar_half", 3] == pytest.approx(0.5, abs=0.06)
    assert kept["lidar_sparse", 1] > kept["lidar_sparse", 2] > kept["lidar_sparse", 3] > 0
    assert kept["lidar_blank", 1] == 0
    with pytest.raises(TaskError, match=r"expected a failure of .*lidar_half.*; got 'fog'"):
        task.user.corrupt(batch, "fog", 1)


def test_a_masked_lidar_branch_carries_nothing_to_the_fusion(drive: Path) -> None:
    task = load(drive)
    model = task.build_model()
    with torch.no_grad():
        for parameter in model.get_submodule("lidar").parameters():
            parameter.zero_()
        features, candidates = model.get_submodule("lidar").eval()(next(task.batches("eval", 0)).inputs["sparse_depth"])
    assert float(features.abs().max()) == 0
    assert float(candidates.abs().max()) == 0


def test_nearest_neighbour_copies_the_closest_known_pixel() -> None:
    filled = baselines().nearest_neighbour(np.array([[0, 5.0, 0, 0, 0, 0, 9.0]], dtype=np.float32))
    np.testing.assert_array_equal(filled, [[5, 5, 5, 5, 9, 9, 9]])
    assert not baselines().nearest_neighbour(np.zeros((2, 3), dtype=np.float32)).any()


def test_depth_candidates_are_the_nearest_and_farthest_known_point_nearby(io: Any) -> None:
    del io
    depth_model = importlib.import_module("depth_model")
    sparse = torch.zeros(1, 1, 32, 32)
    sparse[0, 0, 10, 10], sparse[0, 0, 11, 12] = 8.0, 40.0
    branch = depth_model.LidarBranch((16, 16, 16, 16), 16).eval()
    with torch.no_grad():
        guess, near, far = branch(sparse)[1][0] * depth_model.FAR_METRES
    assert (float(near[10, 11]), float(far[10, 11])) == pytest.approx((8, 40), rel=1e-5)
    assert 8 < float(guess[10, 11]) < 40
    assert float(near[10, 8]) == pytest.approx(8, rel=1e-5)
    assert float(far[10, 8]) == pytest.approx(8, rel=1e-5)
    assert float(near[30, 30]) == float(far[30, 30]) == 0  # no point within any window


def test_the_dense_training_is_reproducible_and_leaves_no_scrap(drive: Path, tmp_path: Path) -> None:
    files = [tmp_path / "one" / "a.safetensors", tmp_path / "b.safetensors"]
    seen: list[float] = []
    state = torch.random.get_rng_state()
    for file in files:
        task = load(drive).user
        task.dense_steps = 3
        task.train_dense(file, lambda fraction, _text: seen.append(fraction))
    assert files[0].read_bytes() == files[1].read_bytes()
    assert seen == pytest.approx([1 / 3, 2 / 3, 1] * 2)
    assert [p.name for p in files[0].parent.iterdir()] == ["a.safetensors"]
    assert torch.equal(torch.random.get_rng_state(), state)
    load(drive).build_model().load_state_dict(load_file(files[0]))


def test_pictures_are_large_and_show_where_the_models_differ(drive: Path) -> None:
    task = load(drive)
    batch = next(task.batches("eval", 0))
    dense = {"depth": torch.full((3, 1, 96, 320), 10.0)}
    changed = {"depth": dense["depth"].clone()}
    changed["depth"][:, :, :, 160:] += 4
    pictures = task.user.pictures(batch, dense, changed)
    assert len(pictures) == 6
    assert all(p.dtype == np.uint8 and p.shape[1:] == (960, 3) and p.shape[0] > 288 for p in pictures.values())
    difference = pictures["Difference, compressed against dense"][40:]
    assert int(difference[:, :480].max()) < int(difference[:, 480:].max())


def test_the_recipe_fits_the_schema_and_names_this_task() -> None:
    loaded = load_recipe(EXAMPLE / "recipe.yaml", ["data=somewhere"])
    task = load_task(loaded.recipe.task, base=loaded.base, data=Path("somewhere"))
    assert task.name == "KittiDepthTask"
    assert loaded.recipe.gates.accuracy is not None
    assert set(loaded.recipe.gates.robustness) <= set(task.user.failures)


def test_what_the_int8_recipe_excludes_is_in_the_network_and_costs_few_multiplications(tmp_path: Path) -> None:
    loaded = load_recipe(EXAMPLE / "int8.yaml", ["data=somewhere"])
    quantize = loaded.recipe.quantize
    assert quantize is not None
    model = load_task(loaded.recipe.task, base=loaded.base, data=Path("somewhere")).build_model().eval()
    inputs = {"image": torch.rand(1, 3, 96, 320), "sparse_depth": torch.rand(1, 1, 96, 320)}
    export_onnx(model, inputs, ["depth"], tmp_path / "m.onnx")
    proto = load_onnx(tmp_path / "m.onnx")
    excluded = excluded_nodes(proto, quantize.exclude, tmp_path / "m.onnx")
    assert {"choice/Conv", "correction/Conv", "lidar/Add"} <= excluded
    assert 0.01 < macs_share(proto, excluded) < 0.03


# -- real frames ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> LoadedTask:
    return load(KITTI / "drive")


@needs_kitti
def test_depth_edges_fall_on_image_edges_of_the_real_frames(real: LoadedTask) -> None:
    def agreement(shift: int) -> float:
        """Image gradient at depth jumps against elsewhere, with the picture moved by `shift` columns."""
        ratios = []
        for frame, _ in real.user.frames("eval")[::4]:
            image, given, held_out = real.user.sample(frame)
            depth = given + held_out
            grey = np.roll(image.mean(axis=2), shift, axis=1)
            gradient = np.abs(np.diff(grey, axis=1))
            both = (depth[:, 1:] > 0) & (depth[:, :-1] > 0)
            jump = both & (np.abs(np.diff(np.log(np.maximum(depth, 1)), axis=1)) > 0.3)
            ratios.append(gradient[jump].mean() / gradient[both & ~jump].mean())
        return float(np.mean(ratios))

    aligned = agreement(0)
    assert aligned > 1.3
    assert all(agreement(shift) < aligned for shift in (-16, -8, 8, 16))


@needs_kitti
def test_the_real_frames_pass_the_task_check(real: LoadedTask) -> None:
    model = real.build_model()
    assert check_task(real, model) == {"depth": (1, 1, 96, 320)}
    assert 200_000 < sum(p.numel() for p in model.parameters()) < 500_000
    assert {s: len(real.user.frames(s)) for s in SPLITS} == {"train": 30, "calib": 6, "eval": 18}


@needs_kitti
@pytest.mark.skipif(not (KITTI / "object_labelled" / "calib").is_dir(), reason="no KITTI object frames")
def test_a_real_frame_with_a_calibration_of_its_own_is_read(io: Any) -> None:
    (frames,) = io.find_drives(KITTI / "object_labelled").values()
    image, points = frames[0].read()
    assert image.size == (1224, 370)
    assert len(points) > 15_000
    assert 3 < np.median(points[:, 2]) < 40


@needs_kitti
def test_a_short_training_on_real_frames_beats_the_constant_predictor(real: LoadedTask, tmp_path: Path) -> None:
    task = load(KITTI / "drive")
    with torch.random.fork_rng():
        torch.manual_seed(0)  # where train_dense starts
        untrained = evaluate(real, torch_predict(real, task.build_model())).metrics["rmse"]
    task.user.dense_steps = 60
    task.user.train_dense(tmp_path / "short.safetensors", lambda _fraction, _text: None)
    rows = baselines().table(task, tmp_path / "short.safetensors")
    assert rows["network"]["rmse"] < 0.6 * rows["constant"]["rmse"]
    assert rows["network"]["rmse"] < rows["nearest neighbour"]["rmse"]
    assert rows["network"]["rmse"] < untrained
