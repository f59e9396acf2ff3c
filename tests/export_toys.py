"""A small two-branch network with every awkward operator, and a task around it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusepress.pipeline.task import Batch, LoadedTask, TaskSource

CELLS, POINTS = 16, 20


class TwoBranch(nn.Module):
    """Camera (depthwise, grid_sample), LiDAR (Linear on 3-D, scatter, transposed conv), concat, residual, two heads."""

    grid: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.camera = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1, groups=32),
            nn.ReLU(),
            nn.Conv2d(32, 32, 1),
        )
        self.pillar = nn.Linear(4, 32)
        self.pillar2 = nn.Linear(32, 32)
        self.lidar = nn.Sequential(
            nn.Conv2d(32, 32, 3, padding=1, stride=2), nn.ReLU(), nn.ConvTranspose2d(32, 32, 2, 2)
        )
        self.fuse = nn.Conv2d(64, 32, 3, padding=1)
        self.head = nn.Conv2d(32, 5, 1)
        self.classify = nn.Linear(32, 3)
        self.register_buffer("grid", torch.rand(1, CELLS, CELLS, 2) * 2 - 1)

    def forward(self, image: Tensor, points: Tensor, index: Tensor) -> dict[str, Tensor]:
        n = image.shape[0]
        camera = F.grid_sample(self.camera(image), self.grid.expand(n, -1, -1, -1), align_corners=False)
        features = F.relu(self.pillar2(F.relu(self.pillar(points))))
        canvas = features.new_zeros(n, CELLS * CELLS + 1, 32)
        batch = torch.arange(n)[:, None].expand_as(index)
        canvas = canvas.index_put((batch, index), features)[:, : CELLS * CELLS]
        lidar = F.relu(self.lidar(canvas.transpose(1, 2).reshape(n, 32, CELLS, CELLS)))
        fused = F.relu(self.fuse(torch.cat([camera, lidar], 1))) + lidar
        return {"seg": self.head(fused), "cls": self.classify(fused.mean((2, 3)))}


def two_branch() -> TwoBranch:
    """The network with statistics that are not those of a fresh norm."""
    torch.manual_seed(0)
    model = TwoBranch()
    norm = model.camera[1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    return model.eval()


def inputs(count: int, seed: int = 1) -> dict[str, Tensor]:
    """`count` samples; every point of a sample in its own cell."""
    generator = torch.Generator().manual_seed(seed)
    cells = [torch.randperm(CELLS * CELLS, generator=generator)[:POINTS] for _ in range(count)]
    return {
        "image": torch.rand(count, 3, 24, 24, generator=generator),
        "points": torch.rand(count, POINTS, 4, generator=generator),
        "index": torch.stack(cells),
    }


def batch(count: int, seed: int = 1) -> Batch:
    """The same as a batch with ids."""
    return Batch(inputs=inputs(count, seed), sample_ids=[f"s{i}" for i in range(count)], groups=["a"] * count)


def arrays(count: int, seed: int = 1) -> dict[str, np.ndarray[Any, Any]]:
    """The same as numpy."""
    return {name: value.numpy() for name, value in inputs(count, seed).items()}


class ToyTask:
    """Only what calibration looks at: splits with ids, groups and inputs."""

    def __init__(self, calib_seed: int = 2, eval_seed: int = 3) -> None:
        self.seeds = {"calib": calib_seed, "eval": eval_seed}

    def batches(self, split: str, seed: int, *, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        for part in range(start, 3):
            names = [f"{split}/{part}/{i}" for i in range(4)]
            made = inputs(4, 10 * self.seeds[split] + part)
            yield Batch(inputs=made, sample_ids=names, groups=[f"drive{part}"] * 4)


def loaded(user: ToyTask) -> LoadedTask:
    """The toy as the stages see it."""
    source = TaskSource(spec="toys.py:ToyTask", files=())
    return LoadedTask(user=user, source=source, branches={}, metrics={"miou": "max"}, keep=[])
