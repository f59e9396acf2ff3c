"""The street's transformer: its outputs, its coupled groups, its surgery, its ONNX file and its engines."""

from __future__ import annotations

import copy
import importlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fusepress.calib.quantize import quantize_int8
from fusepress.export.engine import build_rtx_engine
from fusepress.export.onnx import export_onnx, load_onnx
from fusepress.export.parity import check_parity, require_parity
from fusepress.export.runtime import OnnxSession
from fusepress.pipeline.graph.apply import apply_plan, gate_model
from fusepress.pipeline.graph.check import relative_gap, sample_kept
from fusepress.pipeline.graph.cost import CostModel, count_macs, count_params
from fusepress.pipeline.graph.groups import find_groups, run_flat
from fusepress.pipeline.graph.plan import Group, GroupGraph
from fusepress.pipeline.pruning.allocate import allocate
from fusepress.pipeline.recipe import PruneConfig
from fusepress.pipeline.task import Batch, load_task
from tests.graph_models import settled

STREET = Path(__file__).resolve().parent.parent / "examples" / "street"
load_task("multi_task.py:StreetMultiTask", base=STREET)  # imports its sibling modules
network: Any = importlib.import_module("street_transformer")
world: Any = importlib.import_module("street_world")
OUTPUTS = {
    "segmentation": (6, 48, 48),
    "heat": (3, 48, 48),
    "box": (7, 48, 48),
    "depth": (1, 16, 40),
    "waypoints": (4, 2),
}
OF_TASK = {
    "segmentation": ["segmentation"],
    "detection": ["heat", "box"],
    "depth": ["depth"],
    "waypoints": ["waypoints"],
}
WIDTH = 0.5  # one, two and three attention heads
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    frames = world.sense(world.draw_scenes("train", 0, [0, 1]))
    return {name: torch.from_numpy(getattr(frames, name)) for name in ("image", "points", "cells")}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return settled(network.StreetTransformer(width=WIDTH))


@pytest.fixture(scope="module")
def graph(model: nn.Module, inputs: dict[str, Tensor]) -> GroupGraph:
    branches = {"camera": ["camera"], "lidar": ["lidar"]}
    return find_groups(model, inputs, branches, blocks=False, watchdog_s=400)


def holding(graph: GroupGraph, param: str) -> Group:
    return next(group for group in graph.groups if param in group.producers)


def members(group: Group, param: str) -> set[tuple[int, int, int]]:
    return {(m.dim, m.offset, m.stride) for m in group.members if m.param == param}


# ------------------------------------------------------------------------------------------------------------ outputs


def test_every_task_has_its_outputs_in_order(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    with torch.no_grad():
        outputs = model(**inputs)
    assert {name: tuple(value.shape[1:]) for name, value in outputs.items()} == OUTPUTS
    assert list(outputs) == list(OUTPUTS)
    assert all(value.isfinite().all() for value in outputs.values())


@pytest.mark.parametrize("task", OF_TASK)
def test_an_expert_has_its_own_outputs_only_and_no_part_that_nothing_reads(
    task: str, inputs: dict[str, Tensor]
) -> None:
    expert = network.StreetTransformer((task,), WIDTH)
    outputs = expert(**inputs)
    assert list(outputs) == OF_TASK[task]
    sum(value.square().mean() for value in outputs.values()).backward()
    assert not [name for name, parameter in expert.named_parameters() if parameter.grad is None]


def test_both_sensors_reach_every_output(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Through attention alone for the depth, which is read off the image features."""
    exact, values = copy.deepcopy(model).double(), double(inputs)
    with torch.no_grad():
        whole = exact(**values)
        for blank in ("image", "points"):
            other = exact(**{**values, blank: 0 * values[blank]})
            for name, value in whole.items():
                assert (other[name] - value).std() > 1e-9 * value.std(), (blank, name)


def test_one_student_has_far_fewer_parameters_than_the_experts_in_parallel() -> None:
    student = count_params(network.StreetTransformer())
    experts = sum(count_params(network.StreetTransformer((task,))) for task in OF_TASK)
    assert student < 0.6 * experts


@pytest.mark.parametrize("tasks", [(), ("depth", "depth"), ("driving",)])
def test_unknown_or_repeated_tasks_are_refused(tasks: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="expected different tasks of segmentation, detection, depth, waypoints; got"):
        network.StreetTransformer(tasks)


# ------------------------------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize("scale", [0, 1, 2])
def test_image_lidar_and_token_channels_of_a_scale_are_one_group(graph: GroupGraph, scale: int) -> None:
    fusion, camera = f"fusions.{scale}", f"camera.stages.{scale}"
    group = holding(graph, f"{camera}.second.weight")
    lidar = "lidar.stages.0.0.weight" if scale == 0 else f"lidar.stages.{scale}.second.weight"
    assert {lidar, f"{fusion}.attention.out.linear.weight", f"{fusion}.mlp.down.linear.weight"} <= set(group.producers)
    assert group.branch == "fusion"
    assert members(group, f"{fusion}.position") == {(2, 0, 1)}
    for reader in ("attention.query", "attention.key", "attention.value", "mlp.up"):
        assert members(group, f"{fusion}.{reader}.linear.weight") == {(1, 0, 1)}
    assert members(group, f"camera.pyramid.laterals.{scale + 1}.0.weight") == {(1, 0, 1)}
    assert members(group, f"lidar.pyramid.laterals.{scale}.0.weight") == {(1, 0, 1)}


@pytest.mark.parametrize(("scale", "heads"), [(1, 2), (2, 3)])
def test_attention_heads_go_as_a_whole(graph: GroupGraph, scale: int, heads: int) -> None:
    attention = f"fusions.{scale}.attention"
    group = holding(graph, f"{attention}.value.linear.weight")
    assert (group.width, group.span) == (heads, network.HEAD_SIZE)
    assert set(group.producers) == {f"{attention}.{name}.linear.weight" for name in ("query", "key", "value")}
    assert members(group, f"{attention}.key.norm.running_var") == {(0, 0, network.HEAD_SIZE)}
    assert members(group, f"{attention}.out.linear.weight") == {(1, 0, network.HEAD_SIZE)}


def test_a_single_head_stays_and_the_reason_is_said(graph: GroupGraph) -> None:
    reasons = {frozen.module: frozen.reason for frozen in graph.frozen}
    assert "mixes its channels" in reasons["fusions.0.attention.query.linear"]


def test_mlps_heads_and_branches_can_be_pruned_and_only_outputs_and_single_heads_cannot(graph: GroupGraph) -> None:
    widths = graph.widths
    assert [widths[f"fusions.{scale}.mlp.up.linear.weight"] for scale in range(3)] == [32, 64, 96]
    assert {f"heads.{task}.conv.0.weight" for task in ("segmentation", "detection", "depth")} <= set(widths)
    assert {f"heads.waypoints.convs.{k}.0.weight" for k in range(3)} | {"heads.waypoints.hidden.weight"} <= set(widths)
    assert {group.branch for group in graph.groups} == {"camera", "lidar", "fusion"}
    single = {f"fusions.0.attention.{name}.linear" for name in ("query", "key", "value")}
    last = {f"heads.{name}" for name in ("segmentation.out", "detection.heat", "detection.box", "depth.out")}
    assert {frozen.module for frozen in graph.frozen} == single | last | {"heads.waypoints.out"}


# ------------------------------------------------------------------------------------------------------------ surgery


def double(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in values.items()}


def test_pruned_to_half_the_operations_it_equals_the_gated_network(
    model: nn.Module, graph: GroupGraph, inputs: dict[str, Tensor]
) -> None:
    rng = np.random.default_rng(0)
    scores = {group.id: rng.random(group.width) for group in graph.groups}
    dense = count_macs(model, inputs)
    found = allocate(scores, graph, CostModel(graph, model, inputs), PruneConfig(macs=0.5), align=8)
    assert any(found.widths[g.id] < g.width for g in graph.groups if g.span > 1)  # attention heads went too
    plan = graph.plan(found.kept)
    pruned = apply_plan(copy.deepcopy(model), plan)
    assert 0.4 < count_macs(pruned, inputs) / dense <= 0.5
    with torch.no_grad():
        gated, cut = gate_model(model, plan).double(), copy.deepcopy(pruned).double()
        gaps = [relative_gap(a, b) for a, b in zip(*(run_flat(m, double(inputs)) for m in (cut, gated)), strict=True)]
        whole = [
            relative_gap(a, b)
            for a, b in zip(
                run_flat(cut, double(inputs)), run_flat(copy.deepcopy(model).double(), double(inputs)), strict=True
            )
        ]
    assert max(gaps) < 1e-8
    assert min(whole) > 1e-3


def test_a_pruned_network_exports_with_plain_operators_and_folded_norms_and_computes_the_same(
    model: nn.Module, graph: GroupGraph, inputs: dict[str, Tensor], tmp_path: Path
) -> None:
    kept = {group.id: sample_kept(group, 0.5) for group in graph.groups}
    pruned, path = apply_plan(copy.deepcopy(model), graph.plan(kept)), tmp_path / "pruned.onnx"
    export_onnx(pruned, inputs, list(OUTPUTS), path)
    one = Batch(inputs={name: value[1:] for name, value in inputs.items()}, sample_ids=["b"], groups=["b"])
    with torch.no_grad():
        require_parity(check_parity(lambda x: pruned(**x), OnnxSession(path, 1), [one]), 1e-4)
    proto = load_onnx(path)
    kinds = {node.op_type for node in proto.graph.node}
    assert not {"BatchNormalization", "LayerNormalization", "Loop", "Scan", "GRU", "If", "NonZero"} & kinds
    assert [value.name for value in proto.graph.output] == list(OUTPUTS)
    assert any(node.name.startswith("fusions.2.attention.query.linear/") for node in proto.graph.node)


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed")
def test_int8_runs_and_tensorrt_rtx_builds_it(model: nn.Module, inputs: dict[str, Tensor], tmp_path: Path) -> None:
    source, target = tmp_path / "model.onnx", tmp_path / "int8.onnx"
    export_onnx(model, inputs, list(OUTPUTS), source)
    arrays = {name: value.numpy() for name, value in inputs.items()}
    info = quantize_int8(source, arrays, target, method="max")
    quantised = {layer.name for layer in info.layers if layer.precision == "int8"}
    assert any("fusions." in name for name in quantised)
    assert any("camera.stages." in name for name in quantised)
    engine = build_rtx_engine(target, tmp_path / "int8.engine", compute_capabilities=["8.9"])
    assert engine.path.stat().st_size > 0
