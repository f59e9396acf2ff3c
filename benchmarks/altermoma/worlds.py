"""Worlds of the study: street worlds between complementary and redundant sensors, and a dense network for each."""

from __future__ import annotations

import importlib
import json
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fusepress.pipeline.evaluate import evaluate
from fusepress.pipeline.recipe import FinetuneConfig
from fusepress.pipeline.recovery.finetune import finetune
from fusepress.pipeline.task import Batch, LoadedTask, load_task

ROOT = Path(__file__).resolve().parent.parent.parent
STREET = ROOT / "examples" / "street"
KITTI = ROOT / "examples" / "kitti_depth"
RUNS = ROOT / "runs" / "altermoma"
ALONE_STEPS, JOINT_STEPS, KITTI_STEPS = 150, 450, 300
DENSE_LR = 2e-3
EVAL_SAMPLES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A task and the seed of its dense network.

    Attributes:
        redundancy: the street world's knob; None names the KITTI depth task.
        seed: of the network's first weights and of its training stream.
        dead: share of training frames in which the camera is dead (and as many without LiDAR).
        twins: two LiDAR branches see the very same points, and nothing sees the image: full redundancy.
    """

    redundancy: float | None
    seed: int
    dead: float = 0.12
    twins: bool = False

    @property
    def name(self) -> str:
        """For files and tables."""
        if self.redundancy is None:
            return f"kitti-s{self.seed}"
        if self.twins:
            return f"twins-s{self.seed}"
        return f"street-r{self.redundancy:g}-s{self.seed}" + ("" if self.dead == 0.12 else f"-d{self.dead:g}")


class Twins(nn.Module):
    """Two branches of one kind, with the same input and weights of their own, fused like camera and LiDAR."""

    def __init__(self, width: float, features: int) -> None:
        super().__init__()
        model = importlib.import_module("street_model")
        out, fused = model.scaled(32, width), model.scaled(64, width)
        self.first = model.LidarBackbone(out, width=width, features=features)
        self.second = model.LidarBackbone(out, width=width, features=features)
        self.fuser = model.conv_bn_relu(2 * out, fused)
        self.head = model.Head(fused, model.scaled(48, width))

    def forward(self, image: Tensor, points: Tensor, cells: Tensor) -> Tensor:
        """Logits; the image is not looked at."""
        logits: Tensor = self.head(self.fuser(torch.cat([self.first(points, cells), self.second(points, cells)], 1)))
        return logits


class Alone(nn.Module):
    """One backbone of a fusion network with a head of its own; takes all inputs."""

    def __init__(self, whole: nn.Module, modality: str) -> None:
        super().__init__()
        model = importlib.import_module("street_model")
        backbone = whole.get_submodule(modality)
        self.camera = modality == "camera"
        self.backbone = backbone
        width = whole.get_parameter("fuser.0.weight").shape
        self.neck = model.conv_bn_relu(width[1] // 2, width[0])
        self.head = model.Head(width[0], whole.get_parameter("head.conv.0.weight").shape[0])

    def forward(self, image: Tensor, points: Tensor, cells: Tensor) -> Tensor:
        """Logits."""
        features = self.backbone(image) if self.camera else self.backbone(points, cells)
        logits: Tensor = self.head(self.neck(features))
        return logits


def load_world(world: World, data: Path | None = None) -> LoadedTask:
    """The world's task; its batches stay in memory, for one world's runs see the same ones again and again."""
    if world.redundancy is None:
        kitti = load_task("task.py:KittiDepthTask", base=KITTI, data=data)
        kitti.user.dense_steps = KITTI_STEPS
        return kitti
    task = load_task("task.py:RedundantStreetTask", base=STREET)
    task.user.redundancy = world.redundancy
    plain, kept = task.user.make, {}

    def make(split: str, seed: int, indices: list[int], *, dead: float = 0.0) -> Batch:
        key = (split, seed, indices[0], indices[-1])
        if key not in kept:
            kept[key] = plain(split, seed, indices, dead=world.dead if dead else 0.0)
        batch: Batch = kept[key]
        return batch

    task.user.make = make
    task.user.forget = kept.clear
    if not world.twins:
        return task
    features = importlib.import_module("street_world").POINT_FEATURES + importlib.import_module("street_world").COLOURS
    task.user.build_model = lambda: Twins(task.user.width, features)
    return replace(task, branches={"first": ["first"], "second": ["second"]})


def train_config(steps: int, lr: float) -> FinetuneConfig:
    """Training without a teacher; no checkpoints on the way, a run takes seconds."""
    return FinetuneConfig(steps=steps, lr=lr, distill=False, ema=0.99, checkpoint_every=10**6)


def train(model: nn.Module, task: LoadedTask, steps: int, lr: float, seed: int) -> None:
    """Train in place, in bf16 where this saves time."""
    with tempfile.TemporaryDirectory() as folder:
        finetune(model, None, task, train_config(steps, lr), seed=seed, workdir=Path(folder), precision="bf16")


def judge(model: nn.Module, task: LoadedTask, blank: str | None = None) -> dict[str, float]:
    """The task's metrics on the eval split, in bf16 on the street, with one sensor dead if named."""
    model.eval()
    street = hasattr(task.user, "redundancy")

    def predict(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=street):
            return {name: value.float() for name, value in task.as_dict(model(**inputs)).items()}

    hurt = (lambda batch: task.user.corrupt(batch, f"{blank}_blank", 3)) if blank else None
    return evaluate(task, predict, "eval", corrupt=hurt).metrics


def dense_network(world: World, task: LoadedTask) -> tuple[nn.Module, dict[str, Any]]:
    """The world's dense network, trained once: each backbone alone first, as the paper's are, then both together."""
    folder = RUNS / "dense"
    weights, facts = folder / f"{world.name}.safetensors", folder / f"{world.name}.json"
    torch.manual_seed(world.seed)
    model = task.build_model().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if facts.is_file():
        model.load_state_dict(load_file(weights))
        found: dict[str, Any] = json.loads(facts.read_text())
        return model.eval(), found
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    record: dict[str, Any] = {"world": asdict(world), "name": world.name}
    if world.redundancy is None:
        task.user.train_dense(weights, lambda _fraction, _text: None)
        model.load_state_dict(load_file(weights))
    else:
        for number, modality in enumerate(task.branches):
            alone = Alone(model, modality).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            train(alone, task, ALONE_STEPS, DENSE_LR, 1000 * (world.seed + 1) + number)
            record[f"{modality}_alone"] = judge(alone, task)
            task.user.forget()
        train(model, task, JOINT_STEPS, DENSE_LR, 1000 * (world.seed + 1) + 2)
        task.user.forget()
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, weights)
    record["metrics"] = judge(model, task)
    for modality in () if world.twins else task.branches:
        record[f"{modality}_blank"] = judge(model, task, modality)
    record["seconds"] = round(time.monotonic() - began, 1)
    facts.write_text(json.dumps(record))
    return model.eval(), record
