"""A small two-branch task for the recovery tests, and a program that trains on it until it is killed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from fusepress.pipeline.task import Batch

EPOCH = 7
SIZE = 6


class Net(nn.Module):
    """Batch norm, layer norm, dropout and a buffer outside the state dict: all that a resume can lose."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.camera = nn.Sequential(nn.Conv2d(4, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.lidar = nn.Sequential(nn.Linear(4, width), nn.LayerNorm(width), nn.ReLU())
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(2 * width, 3)
        self.size = nn.Linear(2 * width, 1)
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, image: Tensor, points: Tensor) -> dict[str, Tensor]:
        if self.training:
            self.calls += 1
        both = torch.cat([self.camera(image).mean((2, 3)), self.lidar(points).mean(1)], 1)
        both = self.drop(both) * (1 + 0.001 * self.calls)
        return {"logits": self.head(both), "size": self.size(both)}


class Toy:
    """Three classes and a size, each visible to both sensors. An epoch has seven batches."""

    branches = {"camera": ["camera"], "lidar": ["lidar"]}
    metrics = {"accuracy": "max"}
    inputs_by_modality = {"camera": ["image"], "lidar": ["points"]}
    distill_kinds = {"logits": "classes"}

    epoch = EPOCH

    def build_model(self) -> nn.Module:
        return Net()

    def batches(self, split: str, seed: int, *, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        if split == "train":
            torch.empty((), dtype=torch.int64).random_()  # as a data loader does when it starts
        for number in range(start * world + rank, self.epoch, world):
            generator = torch.Generator().manual_seed(1000 * seed + number)
            label = torch.randint(0, 3, (SIZE,), generator=generator)
            image = torch.randn(SIZE, 4, 5, 5, generator=generator)
            points = torch.randn(SIZE, 9, 4, generator=generator)
            image[torch.arange(SIZE), label] += 2.0
            points[torch.arange(SIZE), :, label] += 2.0
            ids = [f"{split}-{seed}-{number}-{row}" for row in range(SIZE)]
            targets = {"label": label, "size": label[:, None].float()}
            yield Batch(inputs={"image": image, "points": points}, targets=targets, sample_ids=ids, groups=ids)

    def losses(self, outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        return {
            "class": F.cross_entropy(outputs["logits"], batch.targets["label"]),
            "size": F.mse_loss(outputs["size"], batch.targets["size"]),
        }

    def sample_stats(self, outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        return {"right": outputs["logits"].argmax(1) == batch.targets["label"]}

    def score(self, stats: dict[str, Any]) -> dict[str, float]:
        return {"accuracy": float(stats["right"].mean())}


class Uneven(Toy):
    """An epoch of eight batches, which two processes share alike, of different sizes."""

    epoch = 8

    def batches(self, split: str, seed: int, *, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        for batch in super().batches(split, seed, start=start, rank=rank, world=world):
            size = SIZE - int(batch.sample_ids[0].split("-")[2]) % 3
            yield Batch(
                inputs={name: value[:size] for name, value in batch.inputs.items()},
                targets={name: value[:size] for name, value in batch.targets.items()},
                sample_ids=list(batch.sample_ids)[:size],
                groups=list(batch.groups)[:size],
            )


def models() -> tuple[nn.Module, nn.Module]:
    """A student and a teacher, the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return Net(), Net()


def everything(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: value.detach().clone() for name, value in tensors.items()}


def main(workdir: str, kill_at: str, threads: str, config: str) -> None:
    """Train in `workdir`; die by SIGKILL after step `kill_at`, or write the weights there."""
    from fusepress.pipeline.recipe import FinetuneConfig
    from fusepress.pipeline.recovery.finetune import TrainProgress, finetune
    from fusepress.pipeline.task import load_task

    torch.set_num_threads(int(threads))
    task = load_task("recovery_toy.py:Toy", base=Path(__file__).parent)
    student, teacher = models()

    def progress(now: TrainProgress) -> None:
        if now.step == int(kill_at):
            os.kill(os.getpid(), signal.SIGKILL)

    folder = Path(workdir)
    section = FinetuneConfig.model_validate_json(config)
    finetune(student, teacher, task, section, seed=3, workdir=folder, progress=progress)
    save_file(everything(student), folder / "result.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
