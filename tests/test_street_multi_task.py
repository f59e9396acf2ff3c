"""The street's multi-task: statistics and scores, training of experts and students, recipes."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fusepress.pipeline.recipe import load_recipe
from fusepress.pipeline.recovery.distill import Distiller
from fusepress.pipeline.recovery.weighting import shared_parameters
from fusepress.pipeline.scoring.masking import masked, masking_equals_zeroing
from fusepress.pipeline.task import Batch, LoadedTask, check_task, load_task

STREET = Path(__file__).resolve().parent.parent / "examples" / "street"
TASKS = ("segmentation", "detection", "depth", "waypoints")
CLASSES = {
    "StreetMultiTask": TASKS,
    "SegmentationExpert": TASKS[:1],
    "DetectionExpert": TASKS[1:2],
    "DepthExpert": TASKS[2:3],
    "WaypointExpert": TASKS[3:],
    "StreetDetectTask": TASKS[:2],
}
pytestmark = pytest.mark.usefixtures("one_thread")


def load(name: str, *, width: float = 0.5, batch_size: int = 4) -> LoadedTask:
    task = load_task(f"multi_task.py:{name}", base=STREET)
    task.user.width, task.user.batch_size = width, batch_size
    return task


@pytest.fixture(scope="module")
def task() -> LoadedTask:
    return load("StreetMultiTask")


@pytest.fixture(scope="module")
def detection(task: LoadedTask) -> Any:
    del task  # loading it imports its sibling modules
    return importlib.import_module("detection")


@pytest.fixture(scope="module")
def batch(task: LoadedTask) -> Batch:
    made: Batch = task.user.make("eval", 0, list(range(0, 32, 4)))
    return made


@pytest.fixture(scope="module")
def perfect(batch: Batch, detection: Any) -> dict[str, Tensor]:
    """What a network that knows the truth would say."""
    targets = batch.targets
    known = torch.where(targets["labels"] == 255, 0, targets["labels"])
    heat = torch.logit(detection.heat_targets(targets["object_class"], targets["box"]).clamp(1e-6, 1 - 1e-6))
    box = torch.zeros(batch.size, 7, 48, 48)
    wanted = detection.box_targets(targets["box"])
    for row, slot in np.argwhere(targets["object_class"].numpy() >= 0):
        cell = ((targets["box"][row, slot, :2] - torch.tensor([2.0, -9.6])) / 0.4).floor().long()
        box[row, :, cell[0], cell[1]] = wanted[row, slot]
    depth = torch.where(targets["depth_m"] > 0, targets["depth_m"] / 10, 1.0).log()
    return {
        "segmentation": 30.0 * torch.nn.functional.one_hot(known, 6).permute(0, 3, 1, 2).float(),
        "heat": heat,
        "box": box,
        "depth": depth,
        "waypoints": targets["waypoints_m"] / 10,
    }


@pytest.mark.parametrize("name", CLASSES)
def test_each_task_passes_the_check(name: str) -> None:
    checked = load(name)
    assert checked.user.tasks == CLASSES[name]
    torch.manual_seed(0)
    shapes = check_task(checked, checked.build_model())
    assert list(shapes) == list(checked.user.distill_kinds)
    assert checked.primary == "score"
    assert checked.keep


@pytest.mark.parametrize("modality", ["camera", "lidar"])
@pytest.mark.parametrize("name", ["StreetMultiTask", "DepthExpert", "StreetDetectTask"])
def test_a_masked_branch_is_silent_and_the_same_as_without_its_parameters(
    name: str, modality: str, batch: Batch
) -> None:
    checked = load(name)
    torch.manual_seed(0)
    model = checked.build_model().eval()
    few = {key: value[:2] for key, value in batch.inputs.items()}
    own = checked.user.inputs_by_modality[modality]
    other = {**few, **{key: value.roll(1, 0) for key, value in few.items() if key in own}}
    with torch.no_grad(), masked(model, checked.branches[modality], modality):
        first, second = model(**few), model(**other)
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert masking_equals_zeroing(model, few, checked.branches, modality)


@pytest.mark.parametrize("name", ["StreetMultiTask", "StreetDetectTask"])
def test_every_loss_depends_on_the_shared_layer(name: str, batch: Batch) -> None:
    checked = load(name)
    model = checked.build_model()
    [shared] = shared_parameters(model, checked, 0)
    for loss_name, loss in checked.losses(model(**batch.inputs), batch).items():
        [gradient] = torch.autograd.grad(loss, shared, retain_graph=True)
        assert gradient.abs().max() > 0, loss_name


def test_tasks_keep_their_order_and_unknown_ones_are_refused(task: LoadedTask) -> None:
    kind = type(task.user)
    assert kind(("depth", "segmentation")).tasks == ("segmentation", "depth")
    with pytest.raises(ValueError, match=r"expected tasks of segmentation, .*; got \('driving',\)"):
        kind(("driving",))


def test_the_truth_scores_one_in_every_task(task: LoadedTask, batch: Batch, perfect: dict[str, Tensor]) -> None:
    metrics = task.score(task.sample_stats(perfect, batch))
    assert set(metrics) == set(task.metrics)
    best = {name: 1.0 if way == "max" else 0.0 for name, way in task.metrics.items()}
    for name, value in best.items():
        # two of a class in neighbouring cells are one peak: the average precision of people in a crowd is below 1
        assert metrics[name] == pytest.approx(
            value, abs=0.06 if name in ("nds", "map", "score") or "ap_" in name else 0.01
        )
    assert metrics["score"] == pytest.approx(
        (metrics["miou"] + metrics["nds"] + metrics["depth_object_delta1"] + 1 - metrics["waypoint_ade_m"]) / 4
    )


def test_losses_are_least_at_the_truth(task: LoadedTask, batch: Batch, perfect: dict[str, Tensor]) -> None:
    best = task.losses(perfect, batch)
    assert list(best) == ["entropy", "overlap", "heat", "box", "depth", "waypoints"]
    g = torch.Generator().manual_seed(0)
    other = {name: value + torch.randn(value.shape, generator=g) for name, value in perfect.items()}
    worse = task.losses({**other, "segmentation": -perfect["segmentation"]}, batch)
    assert all(worse[name] > best[name] + 0.05 for name in best)
    assert all(best[name] < 1e-3 for name in ("entropy", "overlap", "box", "depth", "waypoints"))


def test_depth_metrics_by_hand(task: LoadedTask, batch: Batch, perfect: dict[str, Tensor]) -> None:
    truth, on_object = batch.targets["depth_m"], batch.targets["depth_object"]
    further = torch.where(on_object, 1.3, 1.1)
    outputs = {**perfect, "depth": perfect["depth"] + further.log()}
    metrics = task.score(task.sample_stats(outputs, batch))
    there = truth > 0
    share = on_object.sum().item() / there.sum().item()
    assert metrics["depth_object_delta1"] == 0.0
    assert metrics["depth_delta1"] == pytest.approx(1 - share)
    assert metrics["depth_abs_rel"] == pytest.approx(0.3 * share + 0.1 * (1 - share), rel=1e-4)
    squared = ((further - 1) * truth)[there].square().mean().item()
    assert metrics["depth_rmse_m"] == pytest.approx(squared**0.5, rel=1e-4)


def test_displacements_by_hand(task: LoadedTask, batch: Batch, perfect: dict[str, Tensor]) -> None:
    off = torch.tensor([[0.03, 0.04], [0, 0], [0, 0], [0.06, 0.08]])  # half a metre, and one
    outputs = {**perfect, "waypoints": perfect["waypoints"] + off}
    metrics = task.score(task.sample_stats(outputs, batch))
    assert metrics["waypoint_ade_m"] == pytest.approx(1.5 / 4, rel=1e-4)
    assert metrics["waypoint_fde_m"] == pytest.approx(1.0, rel=1e-4)


def test_statistics_of_chosen_samples_score_like_these_samples(
    task: LoadedTask, batch: Batch, perfect: dict[str, Tensor]
) -> None:
    g = torch.Generator().manual_seed(1)
    outputs = {name: value + 0.3 * torch.randn(value.shape, generator=g) for name, value in perfect.items()}
    stats = task.sample_stats(outputs, batch)
    assert {value.shape[0] for value in stats.values()} == {batch.size}
    few = Batch(
        inputs={name: value[2:5] for name, value in batch.inputs.items()},
        targets={name: value[2:5] for name, value in batch.targets.items()},
    )
    alone = task.score(task.sample_stats({name: value[2:5] for name, value in outputs.items()}, few))
    assert task.score({name: value[2:5] for name, value in stats.items()}) == pytest.approx(alone)


def test_the_fingerprint_follows_the_rules_of_the_labels(task: LoadedTask, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = load_task("task.py:StreetTask", base=STREET).fingerprint("eval")
    before = task.fingerprint("eval")
    assert before != plain
    monkeypatch.setattr(importlib.import_module("street_labels"), "source_sha256", lambda: "changed")
    assert task.fingerprint("eval") != before


def test_the_task_hash_covers_what_shapes_labels_and_network(task: LoadedTask) -> None:
    names = {path.name for path in task.source.files}
    assert {
        "multi_task.py",
        "street_labels.py",
        "detection.py",
        "detection_metrics.py",
        "street_transformer.py",
    } <= names


def test_pictures_are_the_segmentations_or_none(task: LoadedTask, batch: Batch, perfect: dict[str, Tensor]) -> None:
    worse = {name: -value for name, value in perfect.items()}
    assert set(task.user.pictures(batch, perfect, worse)) >= {"camera", "lidar", "truth", "difference"}
    depth = {"depth": perfect["depth"]}
    assert load("DepthExpert").user.pictures(batch, depth, depth) == {}


# ----------------------------------------------------------------------------------------------------------- training


def test_the_detecting_network_begins_as_the_trained_segmentation_network(batch: Batch) -> None:
    training = importlib.import_module("street_training")
    model = load("StreetDetectTask", width=1.0).build_model()
    training.load_backbone(model, STREET / "street.safetensors")
    plain = load_task("task.py:StreetTask", base=STREET).build_model()
    plain.load_state_dict(load_file(STREET / "street.safetensors"))
    with torch.no_grad():
        few = {name: value[:2] for name, value in batch.inputs.items()}
        assert torch.equal(model.eval()(**few)["segmentation"], plain.eval()(**few))


def test_a_checkpoint_of_something_else_is_refused(task: LoadedTask) -> None:
    training = importlib.import_module("street_training")
    with pytest.raises(ValueError, match="expected a checkpoint of a part of StreetTransformer; got"):
        training.load_backbone(task.build_model(), STREET / "street.safetensors")


def test_the_experts_teach_a_student_each_its_own_outputs(task: LoadedTask, batch: Batch) -> None:
    """The student that says the same has nothing to learn; boxes and depths count where they mean something."""
    torch.manual_seed(0)
    experts = {name: task.user.build_expert(name).eval() for name in TASKS}
    distiller = Distiller(teacher=None, experts=experts, task=task, temperature=2.0)
    with torch.no_grad():
        taught = distiller.outputs(batch.inputs)
        assert torch.equal(taught["depth"], experts["depth"](**batch.inputs)["depth"])
    assert list(taught) == ["segmentation", "heat", "box", "depth", "waypoints"]
    same = distiller.losses({name: value.clone() for name, value in taught.items()}, taught, batch)
    assert all(loss.item() == pytest.approx(0.0, abs=1e-6) for loss in same.values())
    g = torch.Generator().manual_seed(0)
    noise = {name: value + torch.randn(value.shape, generator=g) for name, value in taught.items()}
    assert all(loss.item() > 1e-3 for loss in distiller.losses(noise, taught, batch).values())
    masks = task.user.distill_masks(taught, batch)
    nowhere = {name: (masks[name] == 0).float() * 9.0 for name in ("box", "depth")}
    assert nowhere["depth"].any()
    astray = distiller.losses({**taught, "depth": taught["depth"] + nowhere["depth"]}, taught, batch)
    assert astray["distill.depth"].item() == 0.0
    assert (masks["box"] == 1).sum() >= batch.size


@pytest.fixture
def training(task: LoadedTask, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, with fewer batches for the norms' statistics."""
    del task
    module = importlib.import_module("street_training")
    monkeypatch.setattr(module, "NORM_BATCHES", 2)
    return module


def test_a_student_is_trained_with_experts(task: LoadedTask, training: Any) -> None:
    torch.manual_seed(0)
    experts = {name: task.user.build_expert(name) for name in ("depth", "waypoints")}
    seen: list[dict[str, float]] = []
    training.fit(task, task.build_model(), steps=2, seed=1, experts=experts, progress=lambda n: seen.append(n.losses))
    assert {"distill.depth", "distill.waypoints", "heat", "depth"} <= set(seen[-1])


def test_the_detecting_network_is_trained_where_its_checkpoint_is_absent(
    tmp_path: Path, training: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    del training
    detect = load("StreetDetectTask", width=0.25)
    monkeypatch.setattr(type(detect.user), "dense_steps", 2)
    told: list[float] = []
    detect.user.train_dense(tmp_path / "dense.safetensors", lambda share, _text: told.append(share))
    weights = load_file(tmp_path / "dense.safetensors")
    assert set(weights) == set(detect.build_model().state_dict())
    assert told == [0.5, 1.0]


def test_fitting_lowers_the_loss_and_is_repeatable(tmp_path: Path, training: Any) -> None:
    depth = load("DepthExpert")
    seen: list[float] = []

    def once(folder: Path | None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = depth.build_model()
        training.fit(depth, model, steps=8, seed=1, workdir=folder, progress=lambda n: seen.append(n.losses["depth"]))
        state: dict[str, Tensor] = model.state_dict()
        return state

    first, second = once(tmp_path), once(None)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert np.mean(seen[6:8]) < 0.8 * np.mean(seen[:2])


@pytest.fixture(scope="module")
def trainer() -> Any:
    """The example's command."""
    load("StreetMultiTask")  # imports its sibling modules
    found = importlib.util.spec_from_file_location("train_multi", STREET / "train_multi.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


COMMAND = (
    "python examples/street/train_multi.py {} --steps {} --seed 0 --lr 0.002 --distill-weight 1 --threads 1 "
    "--precision bf16"
)


def test_a_result_of_the_same_command_is_kept_and_of_another_one_refused(tmp_path: Path, trainer: Any) -> None:
    folder = tmp_path / "seed-0"
    folder.mkdir()
    made = COMMAND.format("waypoints", 2000)
    (folder / "waypoints.json").write_text(json.dumps({"command": made}))
    trainer.main(["waypoints", "--steps", "2000", "--out", str(tmp_path)])
    expected = re.escape(f"expected a result of {COMMAND.format('waypoints', 3000)!r}; got one of {made!r} at ")
    with pytest.raises(ValueError, match=rf"{expected}.*waypoints\.json; remove it to make it again, or name another"):
        trainer.main(["depth", "waypoints", "--steps", "3000", "--out", str(tmp_path)])  # before depth is trained
    assert [path.name for path in folder.iterdir()] == ["waypoints.json"]


def test_a_student_whose_teachers_changed_since_is_refused(
    tmp_path: Path, trainer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "seed-0"
    folder.mkdir()
    for name in trainer.EXPERTS:
        (folder / f"{name}.safetensors").write_bytes(name.encode())
    record = {"command": COMMAND.format("distilled", 2000), "experts_sha256": trainer.experts_sha256(folder)}
    (folder / "distilled.json").write_text(json.dumps(record))
    again = ["distilled", "--steps", "2000", "--out", str(tmp_path)]
    trainer.main(again)
    (folder / "depth.safetensors").write_bytes(b"another")
    old, new = (hashlib.sha256(text).hexdigest() for text in (b"depth", b"another"))
    with pytest.raises(
        ValueError,
        match=rf"expected the depth expert that taught distilled, sha256 {old}; got {new} at .*; remove distilled.json",
    ):
        trainer.main(again)
    (folder / "distilled.json").write_text(json.dumps({"command": record["command"]}))
    trainer.main(again)
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == 1
    assert "it is unknown which weights of the experts taught distilled" in warned[0]


def test_a_student_records_its_teachers(tmp_path: Path, trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "seed-0"
    folder.mkdir()
    for name in trainer.EXPERTS:
        save_file(trainer.task_of(name).build_model().state_dict(), folder / f"{name}.safetensors")
    monkeypatch.setitem(sys.modules["task"].SAMPLES, "eval", 8)
    monkeypatch.setattr(sys.modules["street_training"], "NORM_BATCHES", 1)
    trainer.main(["distilled", "--steps", "1", "--out", str(tmp_path)])
    record = json.loads((folder / "distilled.json").read_text())
    assert record["experts_sha256"] == {
        name: hashlib.sha256((folder / f"{name}.safetensors").read_bytes()).hexdigest() for name in trainer.EXPERTS
    }


def test_students_are_compared_with_the_experts_in_parallel(trainer: Any) -> None:
    module = trainer
    metric = {"segmentation": "miou", "detection": "nds", "depth": "depth_object_delta1", "waypoints": "waypoint_ade_m"}
    values = dict(zip(TASKS, (0.8, 0.6, 0.9, 0.3), strict=True))
    records: dict[str, Any] = {
        name: {"params": 100, "metrics": {"score": 1 - value if name == "waypoints" else value, metric[name]: value}}
        for name, value in values.items()
    }
    records["student"] = {"params": 150, "metrics": {"score": 0.7} | {metric[name]: 0.5 for name in TASKS}}
    rows = module.compare(records)
    assert rows["experts"] == {"params": 400, "score": pytest.approx(0.75)} | {metric[n]: values[n] for n in TASKS}
    assert rows["student"]["fewer_params"] == pytest.approx(0.625)
    assert rows["student"]["score"] == 0.7
    assert "distilled" not in rows
    with pytest.raises(FileNotFoundError, match="expected the expert 'segmentation'; got no file"):
        module.experts_of(Path("nowhere"))
    with pytest.raises(SystemExit):
        module.main(["driving", "--out", "nowhere"])


# ------------------------------------------------------------------------------------------------------------ recipes


@pytest.mark.parametrize(("file", "name"), [("multi.yaml", "StreetMultiTask"), ("detect.yaml", "StreetDetectTask")])
def test_the_recipes_load_and_name_metrics_that_exist(file: str, name: str) -> None:
    recipe = load_recipe(STREET / file)
    named = load_task(recipe.recipe.task, base=recipe.base)
    assert named.name == name
    assert set(recipe.recipe.gates.floors) <= set(named.metrics)
    assert json.loads(recipe.recipe.model_dump_json())["prune"]["macs"] == 0.5
