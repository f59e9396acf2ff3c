"""Latency as a function of the widths equals the prediction for the network that is really pruned and exported."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from fusepress.pipeline.errors import StageError
from fusepress.pipeline.graph.apply import apply_plan
from fusepress.pipeline.graph.groups import find_groups
from fusepress.pipeline.graph.plan import GroupGraph
from fusepress.pipeline.graph.probe import probe_onnx
from fusepress.pipeline.pruning.latency import LatencyCost, _Axes, first_channels
from fusepress.targets.network import Network
from fusepress.targets.predict import predict_latency
from fusepress.targets.profile import load_profile

TARGET = "jetson-agx-orin-64gb"


class Fused(nn.Module):
    """Two encoders, one with a residual block, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.cam = nn.Sequential(nn.Conv2d(3, 40, 3, padding=1), nn.BatchNorm2d(40), nn.ReLU())
        self.inner = nn.Conv2d(40, 72, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(72)
        self.outer = nn.Conv2d(72, 40, 3, padding=1)
        self.lidar = nn.Sequential(nn.Conv2d(2, 24, 3, padding=1), nn.ReLU())
        self.fuse = nn.Conv2d(64, 56, 3, padding=1)
        self.head = nn.Conv2d(56, 2, 1)

    def forward(self, image: Tensor, scan: Tensor) -> Tensor:
        """[N, 3, H, W] and [N, 2, H, W] -> [N, 2, H, W]."""
        x = self.cam(image)
        x = torch.relu(x + self.outer(torch.relu(self.norm(self.inner(x)))))
        y = torch.cat([x, self.lidar(scan)], dim=1)
        out: Tensor = self.head(torch.relu(self.fuse(y)))
        return out


class Remembered(LatencyCost):
    """Exports each network once for all tests: they take most of the time."""

    known: ClassVar[dict[tuple[bytes, frozenset[str]], Network]] = {}

    def _export(self, widths: npt.NDArray[np.int64], blocks: frozenset[str]) -> Network:
        key = (widths.tobytes(), blocks)
        if key not in self.known:
            self.known[key] = super()._export(widths, blocks)
        return self.known[key]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Fused().eval()


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    return {"image": torch.randn(2, 3, 32, 32), "scan": torch.randn(2, 2, 32, 32)}


@pytest.fixture(scope="module")
def graph(model: nn.Module, inputs: dict[str, Tensor]) -> GroupGraph:
    return find_groups(model, inputs, {"camera": ["cam", "inner", "norm", "outer"], "lidar": ["lidar"]})


@pytest.fixture(scope="module")
def cost(model: nn.Module, graph: GroupGraph, inputs: dict[str, Tensor]) -> LatencyCost:
    return Remembered(model, graph, inputs, load_profile(TARGET), precision="fp16")


def plainly(model: nn.Module, graph: GroupGraph, inputs: dict[str, Tensor], widths: Mapping[str, int]) -> float:
    """Surgery, export, prediction."""
    plan = graph.plan({group: first_channels(graph[group], width) for group, width in widths.items()})
    pruned = apply_plan(copy.deepcopy(model), plan)
    return predict_latency(probe_onnx(pruned, inputs, ["output"]), load_profile(TARGET), "fp16").latency_ms


def test_equals_the_prediction_for_the_pruned_network(
    model: nn.Module, graph: GroupGraph, inputs: dict[str, Tensor], cost: LatencyCost
) -> None:
    generator = np.random.default_rng(7)
    settings = [{g.id: int(generator.integers(1, g.width + 1)) for g in graph.groups} for _ in range(2)]
    for widths in [dict.fromkeys(graph.widths, 1), *settings]:
        assert cost.latency_ms(widths) == plainly(model, graph, inputs, widths)


def test_many_settings_at_once_equal_one_by_one(graph: GroupGraph, cost: LatencyCost) -> None:
    generator = np.random.default_rng(1)
    settings = np.stack([generator.integers(1, group.width + 1, size=300) for group in graph.groups], axis=1)
    together = cost.latencies_ms(settings)
    apart = [cost.latency_ms(dict(zip(cost.ids, map(int, row), strict=True))) for row in settings]
    assert together.tolist() == apart
    assert cost.dense_ms == cost.latency_ms({})


def test_time_over_a_width_depends_on_the_neighbours(graph: GroupGraph, cost: LatencyCost) -> None:
    group = next(g for g in graph.groups if g.width == 56)
    times_ms = [cost.latency_ms({group.id: width}) for width in range(1, 57)]
    assert times_ms[-1] == cost.dense_ms
    assert len(set(times_ms)) > 1
    narrow = {g.id: 8 for g in graph.groups if g.id != group.id}
    assert cost.latency_ms(narrow | {group.id: 56}) < times_ms[-1]


def test_a_removed_block_costs_nothing(
    model: nn.Module, graph: GroupGraph, inputs: dict[str, Tensor], cost: LatencyCost
) -> None:
    block = next(g.id for g in graph.groups if g.width == 72)
    assert block in graph.removable
    widths = {block: 0, next(g.id for g in graph.groups if g.width == 56): 19}
    assert cost.latency_ms(widths) == plainly(model, graph, inputs, widths)
    assert cost.latency_ms({block: 0}) < cost.latency_ms({block: 1}) < cost.dense_ms


def test_several_settings_with_a_removed_block_equal_one_by_one(graph: GroupGraph, cost: LatencyCost) -> None:
    block = next(g.id for g in graph.groups if g.width == 72)
    settings = np.array([[0 if g.id == block else w for g in graph.groups] for w in (3, 9, 17)])
    settings = np.vstack([settings, [g.width for g in graph.groups]])
    apart = [cost.latency_ms(dict(zip(cost.ids, map(int, row), strict=True))) for row in settings]
    assert cost.latencies_ms(settings) == pytest.approx(apart, rel=1e-12)


def test_axes_that_look_alike_are_not_mistaken_for_one_another() -> None:
    widths = np.array([[8, 16, 4], [4, 8, 3], [6, 12, 1], [2, 4, 2]])
    axes = _Axes(widths, np.zeros(3), np.eye(3))
    fixed, along = axes.express(tuple(widths[:, 2] * 5))
    assert (fixed, along.tolist()) == (0.0, [0.0, 0.0, 5.0])
    with pytest.raises(StageError, match=r"expected one axis of the groups.*got 2 for lengths \[8, 4, 6, 2\] at 4"):
        axes.express(tuple(widths[:, 0]))  # the second group is twice as wide at every setting
    with pytest.raises(StageError, match=r"expected every tensor axis to follow the groups' widths"):
        axes.express((7, 1, 9, 2))
    told_apart = np.vstack([widths, [3, 5, 1]])
    assert _Axes(told_apart, np.zeros(3), np.eye(3)).express(tuple(told_apart[:, 0]))[1].tolist() == [1.0, 0.0, 0.0]


def test_one_more_network_settles_what_looks_alike(
    model: nn.Module, graph: GroupGraph, cost: LatencyCost, monkeypatch: pytest.MonkeyPatch
) -> None:
    halved = np.stack([cost._widths, cost._widths // 2, cost._widths // 4])  # every axis is every other one, scaled
    monkeypatch.setattr(cost, "_structures", {})
    monkeypatch.setattr(cost, "_draw", lambda blocks: halved)
    again = cost.latency_ms({g.id: 5 for g in graph.groups})
    monkeypatch.undo()
    assert again == cost.latency_ms({g.id: 5 for g in graph.groups})


def test_widths_that_cannot_be_are_refused(graph: GroupGraph, cost: LatencyCost) -> None:
    group = next(g.id for g in graph.groups if g.width == 56)
    with pytest.raises(StageError, match=r"expected a width of 1 to 56.*got 57 at"):
        cost.latency_ms({group: 57})
    with pytest.raises(StageError, match=r"got 0 at .*only removable blocks"):
        cost.latency_ms({group: 0})
    with pytest.raises(StageError, match=r"expected a group of this model; got 'nothing'"):
        cost.latency_ms({"nothing": 3})
    with pytest.raises(StageError, match=r"expected widths of \d+ groups"):
        cost.latencies_ms([[1, 2]])


def test_the_host_is_flagged_as_extrapolating(model: nn.Module, graph: GroupGraph, inputs: dict[str, Tensor]) -> None:
    host = Remembered(model, graph, inputs, load_profile("host-cpu"), precision="fp32")
    assert host.extrapolating
    assert "measure on this machine" in host.reasons[0]
