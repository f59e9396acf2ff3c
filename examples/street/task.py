"""The street example as a Fusepress task: bird's-eye-view segmentation from one camera and one LiDAR."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import street_world as world
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from street_model import StreetFusion
from street_pictures import draw
from torch import Tensor, nn

from fusepress import Batch

BATCH = 16
SAMPLES = {"calib": 128, "eval": 256}
# Share of the training frames in which a sensor is dead: training on them is what keeps the fusion alive then.
DEAD = 0.12
CLASS_WEIGHTS = (1.0, 2.0, 1.5, 1.5, 3.0, 3.0)
FAILURES: tuple[str, ...] = ("camera_blank", "camera_dark", "camera_noise", "lidar_blank", "lidar_half", "lidar_sparse")


class StreetTask:
    """Which of six classes covers each 0.4 m cell of the ground ahead of the car."""

    branches = {"camera": ["camera"], "lidar": ["lidar"]}
    metrics = {"miou": "max", **{f"iou_{name}": "max" for name in world.CLASSES}}
    keep = ["head.out"]
    distill_kinds = {"output": "classes"}
    inputs_by_modality = {"camera": ["image"], "lidar": ["points", "cells"]}
    failures = FAILURES
    batch_size, dead_share, samples = BATCH, DEAD, SAMPLES
    redundancy: float | None = None  # plain sensors

    def build_model(self) -> nn.Module:
        return StreetFusion()

    def batches(self, split: str, seed: int, *, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Batches of `batch_size`. `train` never ends; skipping to `start` costs nothing."""
        for number in itertools.count(start):
            first = (number * world + rank) * self.batch_size
            indices = list(range(first, min(first + self.batch_size, SAMPLES.get(split, first + self.batch_size))))
            if not indices:
                return
            yield self.make(split, seed, indices, dead=DEAD if split == "train" else 0.0)

    def make(self, split: str, seed: int, indices: list[int], *, dead: float = 0.0) -> Batch:
        """The named samples; in a share `dead` of them the camera is off, in as many the LiDAR is."""
        frames = world.sense(world.draw_scenes(split, seed, indices), self.redundancy)
        for row, index in enumerate(indices):
            luck = _luck(seed, index)
            if luck < dead:
                frames.image[row] = 0.0
            elif luck > 1.0 - dead:
                frames.points[row], frames.cells[row] = 0.0, world.DUMMY_CELL
        names = [f"{split}-{index:05d}" for index in indices]
        streets = [f"{split}-street-{index // world.FRAMES_PER_STREET:04d}" for index in indices]
        return Batch(
            inputs={
                "image": torch.from_numpy(frames.image),
                "points": torch.from_numpy(frames.points),
                "cells": torch.from_numpy(frames.cells),
            },
            targets={"labels": torch.from_numpy(frames.labels)},
            sample_ids=names,
            groups=names if split == "train" else streets,
        )

    def fingerprint(self, split: str) -> str:
        """Identifies a split's data without generating it: the world's source and constants define it."""
        facts = {"split": split, "n": SAMPLES.get(split), "batch": BATCH, "dead": DEAD if split == "train" else 0.0}
        text = json.dumps([facts, world.describe(), world.source_sha256()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def losses(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Weighted cross-entropy, and a soft overlap loss, which is what the metric looks at."""
        labels = batch.targets["labels"].to(outputs.device)
        logits = outputs.float()
        weight = torch.tensor(CLASS_WEIGHTS, device=logits.device)
        entropy = F.cross_entropy(logits, labels, weight=weight, ignore_index=world.IGNORE)
        known = labels != world.IGNORE
        truth = F.one_hot(torch.where(known, labels, 0), len(world.CLASSES)).permute(0, 3, 1, 2) * known.unsqueeze(1)
        chance = logits.softmax(dim=1) * known.unsqueeze(1)
        common = (chance * truth).sum(dim=(0, 2, 3))
        either = (chance + truth).sum(dim=(0, 2, 3)) - common
        return {"entropy": entropy, "overlap": (1.0 - (common + 1.0) / (either + 1.0)).mean()}

    def sample_stats(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Cells in common and in either, per sample and class."""
        labels = batch.targets["labels"]
        known = labels != world.IGNORE
        guess = outputs.argmax(dim=1)
        common, either = [], []
        for number in range(len(world.CLASSES)):
            is_guess, is_truth = (guess == number) & known, labels == number
            common.append((is_guess & is_truth).sum(dim=(1, 2)))
            either.append((is_guess | is_truth).sum(dim=(1, 2)))
        return {"intersection": torch.stack(common, dim=1), "union": torch.stack(either, dim=1)}

    def score(self, stats: dict[str, Any]) -> dict[str, float]:
        """Intersection over union of each class over all samples, and their mean."""
        common = np.asarray(stats["intersection"], np.float64).sum(axis=0)
        either = np.asarray(stats["union"], np.float64).sum(axis=0)
        iou = common / np.maximum(either, 1.0)
        return {"miou": float(iou.mean())} | {
            f"iou_{name}": float(value) for name, value in zip(world.CLASSES, iou, strict=True)
        }

    def corrupt(self, batch: Batch, failure: str, severity: int) -> Batch:
        """A sensor failure of severity 1, 2 or 3.

        camera_blank, lidar_blank: one, two or all thirds of the view are dead. camera_dark: a half, a quarter, a
        tenth of the light. camera_noise: standard deviation 0.08, 0.16, 0.3. lidar_half: every fourth, third, second
        beam is lost. lidar_sparse: 30, 60, 85 % of the points are lost.

        Raises:
            ValueError: for a failure or severity that does not exist.
        """
        if failure not in FAILURES or severity not in (1, 2, 3):
            raise ValueError(
                f"expected a failure of {', '.join(FAILURES)} with a severity of 1 to 3; got {failure!r} with "
                f"{severity!r}; correct the recipe's robustness gates"
            )
        if failure.startswith("camera"):
            return batch.with_inputs(image=_hurt_image(batch, failure, severity))
        points, cells = _hurt_points(batch, failure, severity)
        return batch.with_inputs(points=points, cells=cells)

    def pictures(self, batch: Batch, dense_outputs: Tensor, outputs: Tensor) -> dict[str, NDArray[np.uint8]]:
        """What the first sample looks like to each sensor, the truth, both models' answers and where they differ."""
        return draw(
            batch.inputs["image"][0].numpy(),
            world.xyz_of(batch.inputs["points"][:1].numpy())[0],
            batch.inputs["points"][0, -1].numpy() > 0,
            batch.targets["labels"][0].numpy(),
            dense_outputs[0].argmax(dim=0).numpy(),
            outputs[0].argmax(dim=0).numpy(),
        )


class RedundantStreetTask(StreetTask):
    """The same street with sensors that know more or less of what the other one knows, and a narrower network.

    At redundancy 1 the camera measures depth and the LiDAR surface colours; at 0 those channels are noise.

    Args:
        redundancy: from 0 to 1.
        width: factor on every number of channels of the network.
        batch_size: samples a batch.
    """

    failures = ("camera_blank", "lidar_blank")

    def __init__(self, redundancy: float = 1.0, width: float = 0.5, batch_size: int = 8) -> None:
        self.redundancy = redundancy
        self.width = width
        self.batch_size = batch_size

    def build_model(self) -> nn.Module:
        features = world.POINT_FEATURES + world.COLOURS
        return StreetFusion(width=self.width, image_channels=4, point_features=features)

    def fingerprint(self, split: str) -> str:
        """The plain task's, the knob and the batch size."""
        text = json.dumps([super().fingerprint(split), self.redundancy, self.batch_size])
        return hashlib.sha256(text.encode()).hexdigest()

    def corrupt(self, batch: Batch, failure: str, severity: int) -> Batch:
        """camera_blank and lidar_blank: the whole sensor is dead at severity 3, the camera's third or two below it.

        Raises:
            ValueError: for a failure or severity that does not exist.
        """
        if failure == "camera_blank":
            return super().corrupt(batch, failure, severity)
        if failure != "lidar_blank" or severity != 3:
            raise ValueError(
                f"expected camera_blank, or lidar_blank with severity 3; got {failure!r} with {severity!r}; the other "
                "failures are the plain StreetTask's"
            )
        cells = torch.full_like(batch.inputs["cells"], world.DUMMY_CELL)
        return batch.with_inputs(points=torch.zeros_like(batch.inputs["points"]), cells=cells)


def _luck(seed: int, index: int) -> float:
    digest = hashlib.sha256(f"dead sensor {seed} {index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _generator(batch: Batch, failure: str) -> torch.Generator:
    """Random numbers that depend on the samples alone, so that every model meets the same failure."""
    digest = hashlib.sha256("\n".join([failure, *batch.sample_ids]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _hurt_image(batch: Batch, failure: str, severity: int) -> Tensor:
    image = batch.inputs["image"].clone()
    if failure == "camera_blank":
        image[..., : round(image.shape[-1] * severity / 3)] = 0.0
        return image
    if failure == "camera_dark":
        return image * (0.5, 0.25, 0.1)[severity - 1]
    noise = torch.randn(image.shape, generator=_generator(batch, failure))
    return (image + (0.08, 0.16, 0.3)[severity - 1] * noise).clamp(0.0, 1.0)


def _hurt_points(batch: Batch, failure: str, severity: int) -> tuple[Tensor, Tensor]:
    """Points that survive, in their pillars, with the pillars' means computed anew; empty pillars become padding."""
    points, cells = batch.inputs["points"].numpy(), batch.inputs["cells"].numpy()
    xyz = world.xyz_of(points)
    alive = points[:, -1] > 0
    if failure == "lidar_blank":
        # Thirds of the sensor's view from the left, as for the camera; -inf keeps nothing.
        limit = (world.AZIMUTHS[0] / 3, -world.AZIMUTHS[0] / 3, -np.inf)[severity - 1]
        alive &= np.arctan2(xyz[..., 1], xyz[..., 0] - world.LIDAR_ORIGIN[0]) < limit
    elif failure == "lidar_half":
        alive &= world.beam_of(xyz) % (4, 3, 2)[severity - 1] != 0
    else:
        luck = torch.rand(alive.shape, generator=_generator(batch, failure)).numpy()
        alive &= luck >= (0.3, 0.6, 0.85)[severity - 1]
    left = np.where(alive.any(axis=2), cells, np.int32(world.DUMMY_CELL)).astype(np.int32)
    features = world.pillar_features(xyz, alive.astype(np.float32), left)
    return torch.from_numpy(features), torch.from_numpy(left)
