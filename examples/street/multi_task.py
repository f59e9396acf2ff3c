"""The street's four tasks as one Fusepress task, its single-task experts, and the convolutional network that detects.

Every task has a score from 0 to 1: mean IoU for segmentation, NDS* for detection (`detection_metrics`), for depth the
share of the objects' pixels within a factor of 1.25 (the ground is flat: anybody knows its depth), and for way-points
1 - the mean displacement in metres. Their mean is the primary metric `score`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import detection
import detection_metrics
import numpy as np
import street_labels
import street_world as world
import torch
from detection import StreetDetection
from numpy.typing import NDArray
from safetensors.torch import save_file
from street_training import fit, load_backbone
from street_transformer import TASKS, StreetTransformer
from task import StreetTask
from torch import Tensor, nn

from fusepress import Batch
from fusepress.pipeline.task import LoadedTask, TaskSource

Outputs = Mapping[str, Tensor]
Targets = Mapping[str, Any]
Stats = dict[str, Any]
Way = Literal["max", "min"]

UNIT_M = 10.0  # of the network's depths (their logarithm) and way-points
DELTA = 1.25
# They bring the losses of a network that has begun to learn to about one each.
BOX_WEIGHT, DEPTH_WEIGHT, WAYPOINT_WEIGHT = 2.0, 4.0, 1.0
_STREET = StreetTask()


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one task adds to the losses, statistics and metrics.

    Attributes:
        outputs: the network's outputs that are its own, with what they mean to a teacher.
        metrics: metric -> which way is better.
        losses: named losses of (outputs, batch).
        stats: per-sample statistics of (outputs, targets).
        score: metrics of statistics.
        normalised: the task's score from 0 to 1, higher is better, of its metrics.
        last: module paths of its last layers, under its head.
    """

    outputs: dict[str, Literal["classes", "binary", "regression"]]
    metrics: dict[str, Way]
    losses: Callable[[Outputs, Batch], dict[str, Tensor]]
    stats: Callable[[Outputs, Targets], Stats]
    score: Callable[[Stats], dict[str, float]]
    normalised: Callable[[dict[str, float]], float]
    last: tuple[str, ...] = ("out",)


def detection_losses(outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
    """Focal loss of the heat maps and the distance of the boxes."""
    there = batch.targets["object_class"].to(outputs["heat"].device)
    truth = batch.targets["box"].to(outputs["heat"].device)
    return {
        "heat": detection.focal_loss(outputs["heat"], detection.heat_targets(there, truth)),
        "box": BOX_WEIGHT * detection.box_loss(outputs["box"], there, truth),
    }


def detection_stats(outputs: Outputs, targets: Targets) -> Stats:
    """The decoded boxes, matched."""
    confidence, category, box = (part.numpy() for part in detection.decode(outputs["heat"], outputs["box"]))
    there, truth = targets["object_class"].numpy(), targets["box"].numpy()
    classes = len(street_labels.DETECTED)
    return detection_metrics.as_stats(detection_metrics.match(confidence, category, box, there, truth, classes))


def detection_score(stats: Stats) -> dict[str, float]:
    """See `detection_metrics`."""
    return detection_metrics.score(detection_metrics.from_stats(stats), street_labels.DETECTED)


def depth_losses(outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
    """Mean absolute difference of the logarithms, over the pixels that have a depth."""
    said = outputs["depth"].float()
    truth = batch.targets["depth_m"].to(said.device)
    there = truth > 0
    wanted = (torch.where(there, truth, UNIT_M) / UNIT_M).log()
    return {"depth": DEPTH_WEIGHT * ((said - wanted).abs() * there).sum() / there.sum().clamp_min(1)}


def depth_stats(outputs: Outputs, targets: Targets) -> Stats:
    """Sums over the pixels of each sample: how many there are, on objects too, and the errors."""
    truth, on_object = targets["depth_m"].flatten(1).double(), targets["depth_object"].flatten(1)
    said = outputs["depth"].flatten(1).double().clamp(-5.0, 5.0).exp() * UNIT_M
    there = truth > 0
    safe = torch.where(there, truth, 1.0)
    error = (said - safe).abs()
    close = torch.maximum(said / safe, safe / said) < DELTA
    return {
        "pixels": there.sum(1),
        "close": (close & there).sum(1),
        "relative": (error / safe * there).sum(1),
        "squared_m2": (error.square() * there).sum(1),
        "object_pixels": on_object.sum(1),
        "object_close": (close & on_object).sum(1),
    }


def depth_score(stats: Stats) -> dict[str, float]:
    """Shares within a factor of 1.25, mean relative error, root mean square error; over the pixels of all samples."""
    total = {name: float(np.asarray(value, np.float64).sum()) for name, value in stats.items()}
    pixels, object_pixels = max(total["pixels"], 1.0), max(total["object_pixels"], 1.0)
    return {
        "depth_object_delta1": total["object_close"] / object_pixels,
        "depth_delta1": total["close"] / pixels,
        "depth_abs_rel": total["relative"] / pixels,
        "depth_rmse_m": (total["squared_m2"] / pixels) ** 0.5,
    }


def waypoint_losses(outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
    """Mean absolute difference in metres."""
    said = outputs["waypoints"].float()
    truth = batch.targets["waypoints_m"].to(said.device)
    return {"waypoints": WAYPOINT_WEIGHT * (said * UNIT_M - truth).abs().mean()}


def waypoint_stats(outputs: Outputs, targets: Targets) -> Stats:
    """Displacement of each way-point (N, 4)."""
    return {"displacement_m": (outputs["waypoints"].double() * UNIT_M - targets["waypoints_m"]).norm(dim=-1)}


def waypoint_score(stats: Stats) -> dict[str, float]:
    """Mean displacement over all way-points (ADE) and of the last one (FDE)."""
    displacement_m = np.asarray(stats["displacement_m"], np.float64)
    return {"waypoint_ade_m": float(displacement_m.mean()), "waypoint_fde_m": float(displacement_m[:, -1].mean())}


def _ways(higher: Iterable[str], lower: Iterable[str] = ()) -> dict[str, Way]:
    """Metrics that should be high, then those that should be low."""
    ways: dict[str, Way] = dict.fromkeys(higher, "max")
    ways.update(dict.fromkeys(lower, "min"))
    return ways


PARTS: dict[str, Part] = {
    "segmentation": Part(
        outputs={"segmentation": "classes"},
        metrics=_ways(StreetTask.metrics),
        losses=lambda outputs, batch: _STREET.losses(outputs["segmentation"], batch),
        stats=lambda outputs, targets: _STREET.sample_stats(
            outputs["segmentation"], Batch(inputs={}, targets=dict(targets))
        ),
        score=_STREET.score,
        normalised=lambda metrics: metrics["miou"],
    ),
    "detection": Part(
        outputs={"heat": "binary", "box": "regression"},
        metrics=_ways(["nds", "map", *(f"ap_{name}" for name in street_labels.DETECTED)], detection_metrics.ERRORS),
        losses=detection_losses,
        stats=detection_stats,
        score=detection_score,
        normalised=lambda metrics: metrics["nds"],
        last=("heat", "box"),
    ),
    "depth": Part(
        outputs={"depth": "regression"},
        metrics=_ways(["depth_object_delta1", "depth_delta1"], ["depth_abs_rel", "depth_rmse_m"]),
        losses=depth_losses,
        stats=depth_stats,
        score=depth_score,
        normalised=lambda metrics: metrics["depth_object_delta1"],
    ),
    "waypoints": Part(
        outputs={"waypoints": "regression"},
        metrics=_ways([], ["waypoint_ade_m", "waypoint_fde_m"]),
        losses=waypoint_losses,
        stats=waypoint_stats,
        score=waypoint_score,
        normalised=lambda metrics: max(0.0, 1.0 - metrics["waypoint_ade_m"]),
    ),
}


class StreetMultiTask(StreetTask):
    """All four tasks by one transformer.

    Args:
        tasks: which of them; None for the class's own.
        width: factor on every number of the network's channels.
        batch_size: samples a batch.

    Raises:
        ValueError: a task is unknown.
    """

    tasks: tuple[str, ...] = TASKS
    shared = ["camera.pyramid.smooth.0"]  # the last layer that every head reads, the depth's too
    dense_steps = 2000

    def __init__(self, tasks: tuple[str, ...] | None = None, width: float = 1.0, batch_size: int = 8) -> None:
        wanted = tasks or type(self).tasks
        if set(wanted) - set(TASKS):
            raise ValueError(f"expected tasks of {', '.join(TASKS)}; got {wanted!r}; correct the names")
        self.tasks = tuple(task for task in TASKS if task in wanted)
        self.width = width
        self.batch_size = batch_size
        parts = [PARTS[task] for task in self.tasks]
        self.metrics = {"score": "max"} | {name: way for part in parts for name, way in part.metrics.items()}
        self.distill_kinds = {name: kind for part in parts for name, kind in part.outputs.items()}
        self.branches = self._branches()
        self.keep = self._last_layers()

    def _branches(self) -> dict[str, list[str]]:
        """The modules that the network calls itself, stage by stage; what feeds the fusion last comes last."""
        pyramid = ["lidar.pyramid"] if self.tasks != ("depth",) else []
        return {
            "camera": ["camera.stem", "camera.stages", "camera.pyramid"],
            "lidar": ["lidar.pillars", "lidar.stages", *pyramid],
        }

    def _last_layers(self) -> list[str]:
        return [f"heads.{task}.{layer}" for task in self.tasks for layer in PARTS[task].last]

    def build_model(self) -> nn.Module:
        return StreetTransformer(self.tasks, self.width)

    def build_expert(self, name: str) -> nn.Module:
        """The network that is trained for one task alone."""
        return StreetTransformer((name,), self.width)

    def make(self, split: str, seed: int, indices: list[int], *, dead: float = 0.0) -> Batch:
        """The named samples with the labels of all tasks."""
        batch = super().make(split, seed, indices, dead=dead)
        scenes = world.draw_scenes(split, seed, indices)
        truth = street_labels.label(scenes, batch.targets["labels"].numpy())
        for name in ("object_class", "box", "depth_m", "depth_object", "waypoints_m"):
            batch.targets[name] = torch.from_numpy(getattr(truth, name))
        return batch

    def fingerprint(self, split: str) -> str:
        """The plain task's, the batch size and the rules of the labels."""
        text = json.dumps([super().fingerprint(split), self.batch_size, street_labels.source_sha256()])
        return hashlib.sha256(text.encode()).hexdigest()

    def losses(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:  # type: ignore[override]  # a dict comes in
        """The losses of every task."""
        return {name: loss for task in self.tasks for name, loss in PARTS[task].losses(outputs, batch).items()}

    def sample_stats(self, outputs: Outputs, batch: Batch) -> Stats:  # type: ignore[override]  # a dict comes in
        """The statistics of every task, named `task.statistic`."""
        return {
            f"{task}.{name}": value
            for task in self.tasks
            for name, value in PARTS[task].stats(outputs, batch.targets).items()
        }

    def score(self, stats: Stats) -> dict[str, float]:
        """The mean of the tasks' scores, and all their metrics."""
        metrics: dict[str, float] = {}
        scores = []
        for task in self.tasks:
            mine = {name.removeprefix(f"{task}."): v for name, v in stats.items() if name.startswith(f"{task}.")}
            found = PARTS[task].score(mine)
            scores.append(PARTS[task].normalised(found))
            metrics |= found
        return {"score": float(np.mean(scores))} | metrics

    def distill_masks(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Where a teacher's boxes and depths mean something: near the centres of boxes, and where there is a depth."""
        masks: dict[str, Tensor] = {}
        if "box" in outputs:
            heat = detection.heat_targets(batch.targets["object_class"], batch.targets["box"])
            masks["box"] = heat.amax(dim=1, keepdim=True)
        if "depth" in outputs:
            masks["depth"] = (batch.targets["depth_m"] > 0).float()
        return masks

    def train_dense(self, path: Path, progress: Callable[[float, str], None]) -> None:
        """Train the network from the labels alone and write it to `path` (safetensors)."""
        source = TaskSource(spec=f"multi_task.py:{type(self).__name__}", files=(Path(__file__).resolve(),))
        task = LoadedTask(
            user=self,
            source=source,
            branches=self.branches,
            metrics=cast("dict[str, Way]", self.metrics),
            keep=self.keep,
            single_output=False,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.build_model()
        self._begin(model)
        fit(
            task,
            model,
            steps=self.dense_steps,
            seed=0,
            progress=lambda now: progress(now.step / now.steps, f"dense training, step {now.step} of {now.steps}"),
        )
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)

    def _begin(self, model: nn.Module) -> None:
        """Weights from which the dense training starts, where they are not drawn."""

    def pictures(  # type: ignore[override]  # dicts come in
        self, batch: Batch, dense_outputs: Outputs, outputs: Outputs
    ) -> dict[str, NDArray[np.uint8]]:
        """The segmentation's pictures, where there is one."""
        if "segmentation" not in self.tasks:
            return {}
        return super().pictures(batch, dense_outputs["segmentation"], outputs["segmentation"])


class SegmentationExpert(StreetMultiTask):
    """Segmentation alone."""

    tasks = ("segmentation",)


class DetectionExpert(StreetMultiTask):
    """Detection alone."""

    tasks = ("detection",)


class DepthExpert(StreetMultiTask):
    """Depth alone."""

    tasks = ("depth",)


class WaypointExpert(StreetMultiTask):
    """Way-points alone."""

    tasks = ("waypoints",)


class StreetDetectTask(StreetMultiTask):
    """Segmentation and detection by the convolutional street network."""

    tasks = ("segmentation", "detection")
    shared = ["fuser.0"]
    dense_steps = 600

    def _branches(self) -> dict[str, list[str]]:
        return StreetTask.branches

    def _last_layers(self) -> list[str]:
        return ["head.out", "detection.heat", "detection.box"]

    def build_model(self) -> nn.Module:
        return StreetDetection(self.width)

    def _begin(self, model: nn.Module) -> None:
        if self.width == 1.0:
            load_backbone(model, Path(__file__).with_name("street.safetensors"))
