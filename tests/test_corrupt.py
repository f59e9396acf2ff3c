"""Default sensor failures and the task's own (pipeline/corrupt.py)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusepress.pipeline.corrupt import blank, corrupt, failures_of, watched
from fusepress.pipeline.errors import RecipeError, TaskError
from fusepress.pipeline.recipe import Recipe, RobustnessGate
from fusepress.pipeline.stages.verify import _tried_here, check_failures
from fusepress.pipeline.task import Batch, LoadedTask, TaskSource


class Plain:
    """Knows its inputs by modality and nothing else."""

    def __init__(self) -> None:
        self.inputs_by_modality: Any = {"camera": ["image"], "lidar": ["points", "index"]}


def load(user: object) -> LoadedTask:
    return LoadedTask(
        user=user,
        source=TaskSource(spec="test.py:Plain", files=(Path(__file__),)),
        branches={"camera": ["camera"], "lidar": ["lidar"]},
        metrics={"accuracy": "max"},
        keep=[],
    )


def make_batch(ids: tuple[str, ...] = ("a", "b")) -> Batch:
    rows = []
    for sample_id in ids:
        generator = torch.Generator().manual_seed(ord(sample_id))
        rows.append((torch.rand(3, 6, 5, generator=generator), torch.randn(8, 4, generator=generator)))
    return Batch(
        inputs={
            "image": torch.stack([image for image, _ in rows]),
            "points": torch.stack([points for _, points in rows]),
            "index": torch.arange(1, 9).repeat(len(ids), 1),
        },
        targets={"label": torch.ones(len(ids))},
        sample_ids=ids,
        groups=ids,
    )


def test_the_defaults_are_listed_by_modality_and_darkness_is_for_cameras() -> None:
    assert failures_of(load(Plain())) == [
        *("camera_blank", "camera_noise", "camera_half", "camera_dark", "camera_bright"),
        *("camera_lost", "camera_stale", "camera_narrow", "camera_rotate", "camera_shift"),
        *("lidar_blank", "lidar_noise", "lidar_half"),
        *("lidar_lost", "lidar_stale", "lidar_narrow", "lidar_sparse", "lidar_rotate", "lidar_shift"),
    ]
    assert failures_of(load(object())) == []


def test_blank_zeroes_all_inputs_of_one_modality_and_no_other() -> None:
    batch = make_batch()
    for dead, alive in (("lidar", ["image"]), ("camera", ["points", "index"])):
        seen = corrupt(load(Plain()), batch, f"{dead}_blank", 1)
        for name, value in seen.inputs.items():
            assert value.dtype == batch.inputs[name].dtype
            assert torch.equal(value, batch.inputs[name] if name in alive else torch.zeros_like(value))
        assert seen.targets is batch.targets
        assert seen.sample_ids == batch.sample_ids
    assert float(batch.inputs["image"].sum()) > 0, "the batch given must not change"


@pytest.mark.parametrize(("severity", "kept"), [(1, [0, 1, 2, 4, 5]), (2, [0, 1, 3, 4]), (3, [0, 2, 4])])
def test_half_drops_every_nth_row_or_point(severity: int, kept: list[int]) -> None:
    batch = make_batch()
    image = corrupt(load(Plain()), batch, "camera_half", severity).inputs["image"]
    dropped = [row for row in range(6) if row not in kept]
    assert torch.equal(image[:, :, kept], batch.inputs["image"][:, :, kept])
    assert int(image[:, :, dropped].count_nonzero()) == 0
    seen = corrupt(load(Plain()), batch, "lidar_half", severity)
    alive = seen.inputs["index"][0] != 0
    assert torch.equal(alive, seen.inputs["index"][1] != 0), "a [B, N] input loses entries, not samples"
    assert torch.equal((seen.inputs["points"] != 0).all(-1)[0], alive)


def test_darkness_dims_the_camera() -> None:
    batch = make_batch()
    seen = [corrupt(load(Plain()), batch, "camera_dark", severity).inputs["image"] for severity in (1, 2, 3)]
    assert torch.equal(seen[0], batch.inputs["image"] * 0.5)
    assert seen[0].mean() > seen[1].mean() > seen[2].mean() > 0


def test_noise_is_of_the_stated_size_and_leaves_integers_alone() -> None:
    points = torch.randn(1, 5000, 4, generator=torch.Generator().manual_seed(0)) * 7
    batch = Batch(inputs={"points": points, "index": torch.ones(1, 3, dtype=torch.int64)}, sample_ids=("a",))
    for severity, size in ((1, 0.1), (2, 0.25), (3, 0.5)):
        seen = corrupt(load(Plain()), batch, "lidar_noise", severity).inputs
        noise = seen["points"] - points
        assert float(noise.std()) == pytest.approx(size * float(points.std()), rel=0.02)
        assert abs(float(noise.mean())) < 0.1
        assert torch.equal(seen["index"], batch.inputs["index"])


def test_noise_belongs_to_the_sample_not_to_the_batch_or_the_moment() -> None:
    task = load(Plain())
    together = corrupt(task, make_batch(("a", "b")), "camera_noise", 2).inputs["image"]
    torch.manual_seed(99)
    swapped = corrupt(task, make_batch(("b", "a")), "camera_noise", 2).inputs["image"]
    alone = corrupt(task, make_batch(("b",)), "camera_noise", 2).inputs["image"]
    assert torch.equal(together, swapped.flip(0))
    assert torch.equal(together[1:], alone)
    difference = together - make_batch().inputs["image"]
    assert not torch.equal(difference[0], difference[1])


class Own(Plain):
    failures = ("fog", "camera_blank")

    def corrupt(self, batch: Batch, failure: str, severity: int) -> Batch:
        assert failure in self.failures, "a task that lists its failures is asked for those only"
        return batch.with_inputs(image=torch.full_like(batch.inputs["image"], float(severity)))


def test_the_task_answers_first_and_the_defaults_fill_in() -> None:
    task, batch = load(Own()), make_batch()
    assert failures_of(task)[:2] == ["fog", "camera_blank"]
    assert failures_of(task).count("camera_blank") == 1
    assert float(corrupt(task, batch, "fog", 2).inputs["image"].mean()) == 2.0
    assert float(corrupt(task, batch, "camera_blank", 3).inputs["image"].mean()) == 3.0
    assert float(corrupt(task, batch, "lidar_blank", 3).inputs["points"].abs().sum()) == 0.0
    dead = blank(task, batch, "camera")
    assert dead is not None
    assert float(dead.inputs["image"].mean()) == 3.0


@pytest.mark.parametrize("decline", ["none", "raise"])
def test_a_task_may_decline_a_failure(decline: str) -> None:
    class Declines(Plain):
        def corrupt(self, batch: Batch, failure: str, severity: int) -> Batch | None:
            if decline == "raise":
                raise NotImplementedError
            return None

    task = load(Declines())
    assert float(corrupt(task, make_batch(), "camera_blank", 3).inputs["image"].sum()) == 0.0
    with pytest.raises(RecipeError, match=r"got 'fog'; add it to Declines\.corrupt"):
        corrupt(task, make_batch(), "fog", 3)


def test_every_modality_is_watched_dead_and_half_of_what_is_no_camera() -> None:
    assert watched(load(Plain())) == ["camera_blank", "lidar_blank", "lidar_half"]


def test_nothing_is_watched_where_no_inputs_are_named_or_one_modality_is_all() -> None:
    assert watched(load(object())) == []
    alone = Plain()
    alone.inputs_by_modality = {"camera": ["image"]}
    assert watched(replace(load(alone), branches={"camera": ["camera"]})) == []


def test_a_watched_failure_that_cannot_act_is_left_out_with_the_reason_and_a_gates_own_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Task(Plain):
        def batches(self, split: str, seed: int, **share: int) -> list[Batch]:
            batch = make_batch()
            return [replace(batch, inputs={"image": batch.inputs["image"], "speed": torch.ones(2)})]

    user = Task()
    user.inputs_by_modality = {"camera": ["image"], "lidar": ["speed"]}
    gates = SimpleNamespace(robustness={"camera_blank@2": RobustnessGate(max_extra_drop=0.1)})
    context: Any = SimpleNamespace(task=load(user), recipe=SimpleNamespace(gates=gates))
    assert _tried_here(context) == [("camera_blank", 2), ("lidar_blank", 3)]
    assert "robustness to lidar_half is not looked at: expected an input that lidar_half can act on" in caplog.text
    gates.robustness |= {name: RobustnessGate(max_extra_drop=0.1) for name in ("lidar_blank", "lidar_half")}
    assert _tried_here(context) == [("camera_blank", 2), ("lidar_blank", 3), ("lidar_half", 3)]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"prune": {"macs": 0.5}, "score": {"robustness": 0.5}},
            r"several modalities for score\.robustness; got \['camera'\]",
        ),
        (
            {"finetune": {"modality_dropout": 0.2}},
            r"several modalities for finetune\.modality_dropout; got \['camera'\]",
        ),
        ({"score": {"robustness": 0.5}}, None),  # nothing is scored
    ],
)
def test_a_single_modality_can_neither_be_dropped_nor_scored_without(
    config: dict[str, Any], message: str | None
) -> None:
    task = replace(load(Plain()), branches={"camera": ["camera"]})
    context: Any = SimpleNamespace(task=task, recipe=Recipe(task="a.py:A", checkpoint="c", **config))
    if message is None:
        check_failures(context)
        return
    with pytest.raises(RecipeError, match=message):
        check_failures(context)


def test_scores_under_dead_sensors_need_to_know_what_a_dead_one_gives() -> None:
    class Task(Plain):
        def batches(self, split: str, seed: int, **share: int) -> list[Batch]:
            return [make_batch()]

    recipe = Recipe(task="a.py:A", checkpoint="c", prune={"macs": 0.5}, score={"robustness": 0.5})  # type: ignore[arg-type]
    user = Task()
    context: Any = SimpleNamespace(task=load(user), recipe=recipe)
    check_failures(context)
    user.inputs_by_modality = {"lidar": ["points"]}
    with pytest.raises(
        TaskError, match=r"the inputs of \['camera'\] for score\.robustness; got nothing; add for example"
    ):
        check_failures(context)


def test_an_unknown_failure_names_the_known_ones() -> None:
    with pytest.raises(RecipeError, match=r"'camera_blank', .*'lidar_half'.*got 'lidar_halff'; did you mean"):
        corrupt(load(Plain()), make_batch(), "lidar_halff", 3)
    with pytest.raises(RecipeError, match="got 'lidar_dark'"):
        corrupt(load(Plain()), make_batch(), "lidar_dark", 3)
    with pytest.raises(RecipeError, match="expected a severity of 1, 2 or 3; got 4"):
        corrupt(load(Plain()), make_batch(), "lidar_half", 4)


def test_without_inputs_by_modality_the_user_is_told_to_add_them() -> None:
    class Bare:
        pass

    with pytest.raises(TaskError, match=r"expected Bare.inputs_by_modality to name the inputs of 'camera'.*add for"):
        corrupt(load(Bare()), make_batch(), "camera_blank", 3)
    assert blank(load(Bare()), make_batch(), "camera") is None


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"radar": ["image"]}, r"modalities \['camera', 'lidar'\].*got \['radar'\]"),
        ({"camera": "image"}, "map each modality to a list of input names"),
        ({"camera": ["img"]}, r"expected the inputs \['image', .*got \['img'\]"),
    ],
)
def test_wrong_inputs_by_modality_are_refused(declared: object, message: str) -> None:
    user = Plain()
    user.inputs_by_modality = declared
    with pytest.raises(TaskError, match=message):
        corrupt(load(user), make_batch(), "camera_blank", 3)


def test_a_failure_that_can_act_on_no_input_is_refused() -> None:
    user = Plain()
    user.inputs_by_modality = {"lidar": ["index"]}
    with pytest.raises(TaskError, match=r"an input that lidar_noise can act on; got \['index'\]"):
        corrupt(load(user), make_batch(), "lidar_noise", 3)


@pytest.mark.parametrize("fault", ["shape", "none-batch", "crash"])
def test_a_faulty_corrupt_of_the_task_is_reported(fault: str) -> None:
    class Faulty(Plain):
        def corrupt(self, batch: Batch, failure: str, severity: int) -> Any:
            if fault == "crash":
                raise KeyError("rain")
            return batch.with_inputs(image=batch.inputs["image"][:1]) if fault == "shape" else {"image": 1}

    message = "got KeyError: 'rain' at the failure 'fog', severity 3" if fault == "crash" else "to return a Batch with"
    with pytest.raises(TaskError, match=message):
        corrupt(load(Faulty()), make_batch(), "fog", 3)


def test_a_batch_without_names_goes_blank_but_draws_no_noise() -> None:
    batch = replace(make_batch(), sample_ids=())
    assert not corrupt(load(Plain()), batch, "lidar_blank").inputs["points"].any()
    with pytest.raises(
        TaskError, match=r"expected 2 sample_ids, which failures are drawn by; got 0; name every sample"
    ):
        corrupt(load(Plain()), batch, "lidar_noise")
