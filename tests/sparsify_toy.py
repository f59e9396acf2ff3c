"""A tiny two-sensor task for the sparsify stage: everything that a mask meets, in fractions of a second."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusepress.pipeline.task import Batch

SAMPLES = 16
SIZE = 8


def conv_bn(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class Net(nn.Module):
    """Two convolutional branches, a concatenation, a point-wise MLP and a head that decodes by transposition."""

    def __init__(self) -> None:
        super().__init__()
        self.camera = nn.Sequential(conv_bn(3, 16), conv_bn(16, 24), conv_bn(24, 16))
        self.lidar = nn.Sequential(conv_bn(2, 16), conv_bn(16, 16))
        self.fuser = conv_bn(32, 32)
        self.mlp = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 16))
        self.up = nn.ConvTranspose2d(16, 16, 2, stride=2)
        self.head = nn.Conv2d(16, 3, 1)

    def forward(self, image: Tensor, scan: Tensor) -> Tensor:
        fused = self.fuser(torch.cat([self.camera(image), self.lidar(scan)], 1))
        mixed = self.mlp(fused.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(F.relu(self.up(mixed)))  # type: ignore[no-any-return]


class Toy:
    """Three classes of cells; each sensor sees a noisy version."""

    branches = {"camera": ["camera"], "lidar": ["lidar"]}
    metrics = {"accuracy": "max"}
    inputs_by_modality = {"camera": ["image"], "lidar": ["scan"]}
    distill_kinds = {"output": "classes"}
    keep = ["head"]

    def build_model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Net()

    def fingerprint(self, split: str) -> str:
        return f"toy {split}"

    def batches(self, split: str, seed: int, *, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        for number in range(start, 10**6 if split == "train" else SAMPLES // 8):
            first = {"train": 0, "calib": 10**7, "eval": 2 * 10**7}[split]
            generator = torch.Generator().manual_seed(first + 1000 * seed + number)
            noise = torch.randn(8, 1, 2 * SIZE, 2 * SIZE, generator=generator)
            label = (F.avg_pool2d(noise, 5, 1, 2)[:, 0] * 6).round().long().clamp(-1, 1) + 1
            small = F.avg_pool2d(label[:, None].float(), 2)
            image = small + 0.3 * torch.randn(8, 3, SIZE, SIZE, generator=generator)
            scan = small + 0.3 * torch.randn(8, 2, SIZE, SIZE, generator=generator)
            ids = [f"{split}-{seed}-{number}-{row}" for row in range(8)]
            yield Batch(inputs={"image": image, "scan": scan}, targets={"label": label}, sample_ids=ids, groups=ids)

    def losses(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {"class": F.cross_entropy(outputs, batch.targets["label"])}

    def sample_stats(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {"right": (outputs.argmax(1) == batch.targets["label"]).float().mean((1, 2))}

    def score(self, stats: dict[str, Any]) -> dict[str, float]:
        return {"accuracy": float(stats["right"].mean())}
