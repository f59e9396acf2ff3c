"""Small models and tasks whose scores are known in closed form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusepress.pipeline.graph.plan import Group, Member
from fusepress.pipeline.task import Batch, LoadedTask, TaskSource

Losses = Callable[[Any, Batch], dict[str, Tensor]]


def squared_error(outputs: Any, batch: Batch) -> dict[str, Tensor]:
    return {"squared": 0.5 * (outputs - batch.targets["y"]).square().mean()}


class ToyUser:
    """A user's task over batches that are held in a list and come round again and again."""

    def __init__(self, data: Sequence[Batch], losses: Losses = squared_error) -> None:
        self.data = data
        self.losses = losses

    def batches(self, split: str, seed: int, *, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        index = start * world + rank
        while True:
            yield self.data[index % len(self.data)]
            index += world


def loaded(data: Sequence[Batch], branches: Mapping[str, Sequence[str]], losses: Losses = squared_error) -> LoadedTask:
    return LoadedTask(
        user=ToyUser(data, losses),
        source=TaskSource(spec="toys:ToyUser", files=(Path(__file__),)),
        branches={name: list(paths) for name, paths in branches.items()},
        metrics={"error": "min"},
        keep=[],
    )


class Weighted(nn.Module):
    """x -> x @ w: one branch of a linear model."""

    def __init__(self, *weights: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weights, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class LinearFusion(nn.Module):
    """y = camera @ a + lidar @ b, in double precision."""

    def __init__(self, camera: Sequence[float], lidar: Sequence[float]) -> None:
        super().__init__()
        self.camera = Weighted(*camera)
        self.lidar = Weighted(*lidar)

    def forward(self, camera: Tensor, lidar: Tensor) -> Tensor:
        out: Tensor = self.camera(camera) + self.lidar(lidar)
        return out


LINEAR = {"camera": ["camera"], "lidar": ["lidar"]}


class Backbone(nn.Module):
    """conv, norm, relu, then a residual block: the stream's channels are one coupled group."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        stream = torch.relu(self.stem_norm(self.stem(x)))
        inner = torch.relu(self.norm1(self.conv1(stream)))
        return torch.relu(stream + self.norm2(self.conv2(inner)))


class ConvFusion(nn.Module):
    """Any number of equal backbones, added, one fusion convolution with bias and no norm, a head."""

    def __init__(self, modalities: Sequence[str], width: int = 6) -> None:
        super().__init__()
        for name in modalities:
            self.add_module(name, Backbone(2, width))
        self.names = list(modalities)
        self.fuse = nn.Conv2d(width, 5, 3, padding=1)
        self.head = nn.Conv2d(5, 1, 1)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        features = [self.get_submodule(name)(inputs[name]) for name in self.names]
        out = self.head(torch.relu(self.fuse(torch.stack(features).sum(0))))
        return {"map": out}


def map_error(outputs: Any, batch: Batch) -> dict[str, Tensor]:
    error = outputs["map"] - batch.targets["y"]
    return {"squared": error.square().mean(), "absolute": 0.1 * error.abs().mean()}


@dataclass
class ConvToy:
    """A convolutional fusion model with its task and its groups, all parameters and statistics random."""

    modalities: Sequence[str] = ("camera", "lidar")
    seed: int = 0
    dtype: torch.dtype = torch.float64
    losses: Losses = map_error
    model: ConvFusion = field(init=False)
    task: LoadedTask = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.model = ConvFusion(self.modalities).to(self.dtype)
        with torch.no_grad():
            for module in self.model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    for tensor, low in ((module.weight, 0.5), (module.running_var, 0.5), (module.bias, -0.3)):
                        assert tensor is not None
                        tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + low)
        self.task = loaded(self._data(generator), {name: [name] for name in self.modalities}, self.losses)

    def _data(self, generator: torch.Generator) -> list[Batch]:
        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)

        return [
            Batch(
                inputs={name: draw(size, 2, 6, 6) for name in self.modalities},
                targets={"y": draw(size, 1, 6, 6)},
                sample_ids=[f"{index}-{k}" for k in range(size)],
                groups=["g"] * size,
            )
            for index, size in enumerate((3, 2, 4, 3, 2))
        ]

    @property
    def groups(self) -> tuple[Group, ...]:
        found: list[Group] = []
        for name in self.modalities:
            found += backbone_groups(name, 6)
        return (*found, conv_group("fuse", FUSION_BRANCH, 5, consumer="head.weight"))


FUSION_BRANCH = "fusion"


def norm_members(*modules: str) -> list[Member]:
    leaves = ("weight", "bias", "running_mean", "running_var")
    return [Member(param=f"{module}.{leaf}", dim=0, role="norm") for module in modules for leaf in leaves]


def conv_group(module: str, branch: str, width: int, *, consumer: str) -> Group:
    members = (
        Member(param=f"{module}.weight", dim=0),
        Member(param=f"{module}.bias", dim=0),
        Member(param=consumer, dim=1, role="consumer"),
    )
    producers = (f"{module}.weight",)
    return Group(id=producers[0], branch=branch, width=width, members=members, producers=producers)


def backbone_groups(name: str, width: int) -> list[Group]:
    stream = (f"{name}.conv2.weight", f"{name}.stem.weight")
    inner = (f"{name}.conv1.weight",)
    return [
        Group(
            id="+".join(stream),
            branch=name,
            width=width,
            producers=stream,
            members=(
                *(Member(param=param, dim=0) for param in stream),
                *norm_members(f"{name}.stem_norm", f"{name}.norm2"),
                Member(param=f"{name}.conv1.weight", dim=1, role="consumer"),
                Member(param="fuse.weight", dim=1, role="consumer"),
            ),
        ),
        Group(
            id=inner[0],
            branch=name,
            width=width,
            producers=inner,
            members=(
                Member(param=inner[0], dim=0),
                *norm_members(f"{name}.norm1"),
                Member(param=f"{name}.conv2.weight", dim=1, role="consumer"),
            ),
        ),
    ]


@dataclass
class ToyGraph:
    """Groups made by hand."""

    groups: Sequence[Group]


def state_bytes(model: nn.Module) -> dict[str, bytes]:
    """Parameters and buffers, bit for bit, persistent or not."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().contiguous().numpy().tobytes() for name, tensor in tensors}


class NoSecond(torch.autograd.Function):
    """Doubles, with a gradient that has no gradient."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return 2.0 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return 2.0 * grad
