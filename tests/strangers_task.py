"""A stranger's model: two cameras and a LiDAR range image, nothing of ours but `Batch`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from fusepress import Batch

GRID = 24


class GatedUnit(nn.Module):
    """A custom block: a depthwise-separable convolution gated by its own squeeze."""

    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(before, before, 3, stride, 1, groups=before, bias=False)
        self.pointwise = nn.Conv2d(before, after, 1, bias=False)
        self.norm = nn.BatchNorm2d(after)
        self.gate = nn.Conv2d(after, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardswish(self.norm(self.pointwise(self.depthwise(x))))
        return y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))


def backbone(channels: int) -> nn.Sequential:
    stem = nn.Sequential(nn.Conv2d(channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
    return nn.Sequential(stem, GatedUnit(16, 32), GatedUnit(32, 32))


class TwoCamerasAndRange(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.front, self.rear, self.range = backbone(3), backbone(3), backbone(2)
        self.join = nn.Sequential(nn.Conv2d(96, 48, 1, bias=False), nn.BatchNorm2d(48), nn.ReLU())
        self.heat, self.size = nn.Conv2d(48, 2, 1), nn.Conv2d(48, 1, 1)

    def scatter(self, features: Tensor, cell: Tensor) -> Tensor:
        """Range-view features to the ground grid, one cell a column: an own scatter without accumulation."""
        rows = features.max(dim=2).values.transpose(1, 2)
        canvas = rows.new_zeros(rows.shape[0], GRID * GRID, rows.shape[2])
        index = cell[:, :, None].expand(-1, -1, rows.shape[2])
        return canvas.scatter(1, index, rows).transpose(1, 2).reshape(rows.shape[0], -1, GRID, GRID)

    def forward(self, front: Tensor, rear: Tensor, scan: Tensor, cell: Tensor) -> dict[str, Tensor]:
        seen = [self.front(front), self.rear(rear), self.scatter(self.range(scan), cell)]
        joined = self.join(torch.cat(seen, dim=1))
        return {"heat": self.heat(joined), "size": self.size(joined)}


class StrangersTask:
    branches = {"cameras": ["front", "rear"], "lidar": ["range"]}
    metrics = {"accuracy": "max", "size_error": "min"}
    keep = ["heat", "size"]
    inputs_by_modality = {"cameras": ["front", "rear"], "lidar": ["scan"]}
    distill_kinds = {"heat": "classes", "size": "regression"}

    def build_model(self) -> nn.Module:
        return TwoCamerasAndRange()

    def batches(self, split: str, seed: int, *, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        for index in range(start, 10**6 if split == "train" else 4):
            g = torch.Generator().manual_seed(hash_of(f"{split} {seed} {index}"))
            label = (F.avg_pool2d(torch.randn(8, 1, GRID, GRID, generator=g), 5, 1, 2) > 0.05).long()[:, 0]
            noisy = [label[:, None] + 0.7 * torch.randn(8, 3, GRID, GRID, generator=g) for _ in range(2)]
            cell = torch.stack([torch.randperm(GRID * GRID, generator=g)[:64] for _ in range(8)])
            column = label.flatten(1).gather(1, cell).float()[:, None, None].expand(8, 2, 4, 64)
            scan = column + 0.3 * torch.randn(8, 2, 4, 64, generator=g)
            inputs = {"front": noisy[0], "rear": noisy[1], "scan": scan, "cell": cell}
            ids = [f"{split}{seed}.{index}.{k}" for k in range(8)]
            yield Batch(inputs=inputs, targets={"label": label}, sample_ids=ids, groups=ids)

    def losses(self, outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        label = batch.targets["label"]
        return {"heat": F.cross_entropy(outputs["heat"], label), "size": F.l1_loss(outputs["size"][:, 0], 2.0 * label)}

    def sample_stats(self, outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        label = batch.targets["label"]
        right = (outputs["heat"].argmax(1) == label).float().mean((1, 2))
        return {"right": right, "error": (outputs["size"][:, 0] - 2.0 * label).abs().mean((1, 2))}

    def score(self, stats: dict[str, Any]) -> dict[str, float]:
        return {"accuracy": stats["right"].mean(), "size_error": stats["error"].mean()}

    def train_dense(self, path: Path, progress: Callable[[float, str], None]) -> None:
        torch.manual_seed(0)
        model = self.build_model()
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for step, batch in zip(range(60), self.batches("train", 0), strict=False):
            optimizer.zero_grad()
            torch.stack(list(self.losses(model(**batch.inputs), batch).values())).sum().backward()
            optimizer.step()
            progress(step / 60, "")
        save_file(model.state_dict(), path)


def hash_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
