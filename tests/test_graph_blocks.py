"""Whole residual blocks: which groups may have width 0, and that the model really does without them."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fusepress
from fusepress.export.onnx import export_onnx
from fusepress.export.runtime import OnnxSession
from fusepress.pipeline.errors import CheckpointError, StageError
from fusepress.pipeline.graph.apply import apply_plan, architecture_sha256, gate_model, weights_bytes
from fusepress.pipeline.graph.check import sample_kept
from fusepress.pipeline.graph.cost import CostModel, count_macs, count_params
from fusepress.pipeline.graph.files import load_graph, save_graph
from fusepress.pipeline.graph.groups import find_groups
from fusepress.pipeline.graph.masks import MaskHolder, masks_2to4
from fusepress.pipeline.graph.plan import Block, GroupGraph, PrunePlan, Swap
from fusepress.pipeline.graph.standins import Geometry, Zeros
from fusepress.pipeline.recovery.batchnorm import reestimate_batchnorm
from fusepress.pipeline.task import Batch, LoadedTask, TaskSource
from tests import graph_models as zoo

ROOT = Path(__file__).resolve().parent.parent
IMAGE = {"x": zoo.image()}
SENSORS = {"image": zoo.image(), "scan": zoo.image(channels=2, seed=3)}
Case = tuple[Callable[[], nn.Module], dict[str, Tensor], tuple[str, ...]]
MODELS: dict[str, Case] = {
    "basic": (zoo.Residual, IMAGE, ("a.0.weight",)),
    "projection": (zoo.Projected, IMAGE, ("one.conv1.weight", "two.conv1.weight")),
    "bottleneck": (zoo.Bottleneck, IMAGE, ("first.1.0.weight", "second.1.0.weight")),
    "pre_activation": (zoo.PreActivation, IMAGE, ("conv1.weight",)),
    "transformer_like": (zoo.ConvNext, IMAGE, ("blocks.0.up.weight", "blocks.1.up.weight")),
    "pyramid_that_adds": (lambda: zoo.Pyramid(add=True), IMAGE, ("coarse.0.weight",)),
    "parallel": (zoo.Parallel, IMAGE, ("left.0.0.weight",)),
    "squeeze_and_excite": (zoo.Depthwise, IMAGE, ("se.down.weight",)),
}
NEVER: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
    "chain": (zoo.Chain, IMAGE),
    "concat": (zoo.Concat, IMAGE),
    "pyramid_that_concatenates": (lambda: zoo.Pyramid(add=False), IMAGE),
    "only_path_of_a_modality": (zoo.AddedSensors, SENSORS),
    "pillars": (zoo.PillarNet, zoo.pillar_inputs()),
    "called_twice": (zoo.Twice, IMAGE),
}
_GRAPHS: dict[str, tuple[nn.Module, GroupGraph]] = {}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are tiny
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def found(name: str) -> tuple[nn.Module, GroupGraph, dict[str, Tensor]]:
    """A model with settled norms, its graph (found once), and its inputs."""
    make, inputs, _ = MODELS[name]
    if name not in _GRAPHS:
        torch.manual_seed(0)
        model = zoo.settled(make())
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith("gamma"):  # layer scales start at zero, where a missing block would not show
                    parameter.fill_(0.5)
        _GRAPHS[name] = model, find_groups(model, inputs, {})
    model, graph = _GRAPHS[name]
    return copy.deepcopy(model), graph, inputs


def without(name: str, *blocks: str) -> tuple[nn.Module, PrunePlan, dict[str, Tensor]]:
    model, graph, inputs = found(name)
    return model, graph.plan(dict.fromkeys(blocks or graph.removable, ())), inputs


@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_found(name: str) -> None:
    assert found(name)[1].removable == MODELS[name][2]


@pytest.mark.parametrize("name", NEVER)
def test_what_is_not_added_to_a_signal_that_goes_on_stays(name: str) -> None:
    make, inputs = NEVER[name]
    graph = find_groups(zoo.settled(make()), inputs, {})
    assert graph.groups
    assert graph.removable == ()


@pytest.mark.parametrize("name", MODELS)
def test_surgery_equals_the_gated_model(name: str) -> None:
    model, graph, inputs = found(name)
    dense = model(**inputs)
    for share, block in product((0.0, 0.4), (*((b,) for b in graph.removable), graph.removable)):
        kept = {g.id: sample_kept(g, share) for g in graph.groups if share} | {b: [] for b in block}
        plan = graph.plan(kept)
        want = gate_model(model, plan)(**inputs)
        got = apply_plan(copy.deepcopy(model), plan)(**inputs)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(want, dense, atol=1e-3)  # the block did something
        assert (got[0] - got[1]).abs().max() > 1e-3  # and the input still matters


@pytest.mark.parametrize("name", MODELS)
def test_costs_without_blocks_equal_a_recount(name: str) -> None:
    model, graph, inputs = found(name)
    cost = CostModel(graph, model, inputs)
    for share, block in product((0.0, 0.4), (*((b,) for b in graph.removable), graph.removable)):
        kept = {g.id: sample_kept(g, share) for g in graph.groups if share} | {b: [] for b in block}
        small = apply_plan(copy.deepcopy(model), graph.plan(kept))
        widths = {group: len(channels) for group, channels in kept.items()}
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            small(**{key: value[:1] for key, value in inputs.items()})
        assert cost.macs(widths) == count_macs(small, inputs) == counter.get_total_flops() // 2
        assert cost.params(widths) == count_params(small)
        assert cost.macs(widths) < cost.macs({**widths, **dict.fromkeys(block, 1)})


def test_costs_of_many_widths_at_once_are_those_of_each() -> None:
    model, graph, inputs = found("bottleneck")
    cost = CostModel(graph, model, inputs)
    rows = [cost.vector(w) for w in ({}, {"first.1.0.weight": 0}, {"first.1.0.weight": 0, "second.1.0.weight": 0})]
    together = cost.total("macs", torch.stack([torch.from_numpy(row) for row in rows]).numpy())
    assert together.tolist() == [int(cost.total("macs", row)) for row in rows]
    assert together[0] > together[1] > together[2]


def test_what_feeds_only_the_block_goes_with_it() -> None:
    model, plan, inputs = without("bottleneck", "first.1.0.weight")
    assert plan.removed_blocks == ("first.0.0.weight", "first.1.0.weight")
    apply_plan(model, plan)
    left = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    assert left == {"stem.0", "short", "second.0.0", "second.1.0", "second.2", "head"}
    cost = CostModel(found("bottleneck")[1], found("bottleneck")[0], inputs)
    assert cost.macs({"first.1.0.weight": 0, "first.0.0.weight": 3}) == cost.macs({"first.1.0.weight": 0})


def test_the_norm_behind_is_a_constant_that_training_can_move() -> None:
    model, plan, inputs = without("projection")
    expected = {}
    for name in ("one", "two"):
        norm = model.get_submodule(f"{name}.bn2")
        with torch.no_grad():
            expected[name] = norm(torch.zeros(1, 16, 2, 2))[0, :, 0, 0]
    apply_plan(model, plan)
    for name, value in expected.items():
        torch.testing.assert_close(model.get_parameter(f"{name}.bn2.bias"), value, rtol=1e-5, atol=1e-6)
    before = model.eval()(**inputs)
    model.train()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        model(**inputs).square().mean().backward()
        optimiser.step()
    assert all(p.grad is not None and bool(torch.isfinite(p).all()) for p in model.parameters())
    assert not torch.allclose(model.get_parameter("one.bn2.bias"), expected["one"], atol=1e-4)
    assert not torch.equal(model.eval()(**inputs), before)


def test_constants_broadcast_where_the_code_allows_it() -> None:
    kinds = {name: {s.kind for b in found(name)[1].blocks for s in b.swaps if s.kind in ("constant", "filled")}
             for name in ("basic", "projection", "pyramid_that_adds")}  # fmt: skip
    assert kinds == {"basic": {"constant"}, "projection": {"filled"}, "pyramid_that_adds": {"filled"}}


class Pictures:
    """Random pictures, for what reads training batches."""

    def batches(self, split: str, seed: int, *, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        for number in range(start, 4):
            ids = [f"{split}/{number}/{k}" for k in range(4)]
            yield Batch(inputs={"x": 3 + 2 * zoo.image(4, seed=number)}, sample_ids=ids, groups=ids)


@pytest.mark.parametrize("name", ["bottleneck", "pyramid_that_adds"])
def test_norms_are_estimated_anew_and_masks_chosen_without_the_block(name: str) -> None:
    model, plan, inputs = without(name)
    apply_plan(model, plan)
    before = {key: value.clone() for key, value in model.named_parameters()}
    source = TaskSource(spec="pictures.py:Pictures", files=())
    task = LoadedTask(user=Pictures(), source=source, branches={}, metrics={}, keep=[])
    left = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert reestimate_batchnorm(model, task, 4, seed=0) == len(left) > 0
    for norm in left:
        assert norm.running_var is not None
        assert float(norm.running_var.min()) > 1e-4  # none of them saw a constant
    assert all(torch.equal(value, before[key]) for key, value in model.named_parameters())
    masks = masks_2to4(model)[0]
    assert masks
    MaskHolder(masks).apply(model)
    MaskHolder(masks).check(model)
    assert bool(torch.isfinite(model(**inputs)).all())


@pytest.mark.parametrize(("name", "opset"), [("basic", 18), ("projection", 17), ("bottleneck", 18)])
def test_the_exported_graph_has_no_trace_of_the_block(tmp_path: Path, name: str, opset: int) -> None:
    model, plan, inputs = without(name)
    apply_plan(model, plan)
    info = export_onnx(model, inputs, ["y"], tmp_path / "m.onnx", opset=opset)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert info.ops["Conv"] == len(convolutions)
    assert not {"BatchNormalization", "Expand", "ConstantOfShape", "Shape"} & set(info.ops)
    got = OnnxSession(tmp_path / "m.onnx", 1)(inputs)["y"]
    with torch.no_grad():
        torch.testing.assert_close(got, model(**inputs), rtol=1e-4, atol=1e-5)
    inside = {"basic": "/a.", "projection": "conv1", "bottleneck": "second.1"}[name]
    assert not any(inside in node.name for node in onnx.load(tmp_path / "m.onnx").graph.node)


def test_load_builds_the_same_model_from_files(tmp_path: Path) -> None:
    for name in ("projection", "transformer_like"):
        model, plan, inputs = without(name)
        apply_plan(model, plan)
        (tmp_path / "plan.json").write_text(plan.to_json())
        (tmp_path / "w.safetensors").write_bytes(weights_bytes(model))
        again = fusepress.load(MODELS[name][0](), tmp_path / "plan.json", tmp_path / "w.safetensors")
        assert torch.equal(again(**inputs), model.eval()(**inputs))
        assert torch.equal(copy.deepcopy(again)(**inputs), model(**inputs))
        assert PrunePlan.from_json(plan.to_json()) == plan


def test_the_graph_file_keeps_blocks_and_old_files_have_none(tmp_path: Path) -> None:
    graph = found("bottleneck")[1]
    save_graph(graph, tmp_path / "g.json")
    assert load_graph(tmp_path / "g.json") == graph
    raw = json.loads((tmp_path / "g.json").read_text())
    del raw["blocks"]
    (tmp_path / "g.json").write_text(json.dumps(raw))
    assert load_graph(tmp_path / "g.json") == replace(graph, blocks=())


def test_plans_of_before_blocks_are_read() -> None:
    plan = found("basic")[1].plan({"a.0.weight": [1, 2]})
    raw = json.loads(plan.to_json())
    assert "swaps" not in raw
    del raw["removed_blocks"]
    assert PrunePlan.from_json(json.dumps(raw)) == plan


def test_only_a_removable_group_may_be_empty() -> None:
    with pytest.raises(StageError, match=r"expected at least one kept channel; got none at stem\.0\.weight"):
        found("projection")[1].plan({"stem.0.weight": []})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda raw: raw.pop("swaps"),
            "expected `swaps` where blocks are removed, .* got 1 removed blocks and 0 swaps",
        ),
        (lambda raw: raw.update(removed_blocks=[]), "expected at least one kept channel; got none at a.0.weight"),
        (lambda raw: raw.update(removed_blocks=["a.0.weight", "z"]), "expected the removed block 'z' among the groups"),
        (lambda raw: raw.update(removed_blocks="a"), "expected `removed_blocks` \\(list\\); got str"),
        (lambda raw: raw["swaps"][0].update(kind="?"), "expected a kind of zeros, pass, constant, filled; got '\\?'"),
        (lambda raw: raw["swaps"][0].pop("module"), "expected `module` \\(str\\); got NoneType"),
        (lambda raw: raw["groups"][0].pop("stand_in"), "expected `stand_in` \\(list\\)"),
        (lambda raw: raw["groups"][0].update(stand_in=[24]), "expected kept channels within 0..23; got 24"),
    ],
)
def test_a_damaged_plan_is_a_clear_error(change: Callable[[dict[str, object]], object], words: str) -> None:
    raw = json.loads(without("basic")[1].to_json())
    change(raw)
    with pytest.raises(CheckpointError, match=words):
        PrunePlan.from_json(json.dumps(raw))


@pytest.mark.parametrize(
    ("swap", "words"),
    [
        (Swap(module="no", kind="zeros"), "expected a layer 'no' of a removed block in the model; got none"),
        (Swap(module="bn", kind="zeros"), "expected a layer that 'zeros' can stand in for; got BatchNorm2d at bn"),
        (Swap(module="b", kind="constant", source="a.0"), "got Conv2d behind 'a.0' at b; the plan is damaged"),
        (Swap(module="bn", kind="constant", source="head"), "got BatchNorm2d behind 'head' at bn"),
    ],
)
def test_a_plan_with_a_wrong_swap_changes_nothing(swap: Swap, words: str) -> None:
    model, plan, _ = without("basic")
    before = architecture_sha256(model)
    with pytest.raises(CheckpointError, match=words):
        apply_plan(model, replace(plan, swaps=(*plan.swaps, swap)))
    assert architecture_sha256(model) == before


LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Conv2d(3, 5, (3, 5), stride=(2, 3), padding=(1, 0), dilation=(2, 1)), (2, 3, 17, 23)),
    (nn.Conv2d(3, 5, 3, padding="same", dilation=2), (2, 3, 9, 8)),
    (nn.Conv2d(3, 5, 4, padding="valid"), (3, 9, 8)),
    (nn.Conv1d(3, 5, 3, stride=2), (2, 3, 11)),
    (nn.Conv3d(3, 5, 3, padding=1, stride=2), (1, 3, 5, 6, 7)),
    (nn.ConvTranspose2d(3, 5, 3, stride=2, padding=1, output_padding=1, dilation=2), (2, 3, 6, 7)),
    (nn.Linear(3, 5), (2, 4, 3)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_zeros_have_the_shape_that_the_layer_makes(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    want = layer(x)
    got = Zeros(layer)(x)
    assert got.shape == want.shape
    assert not bool(got.any())
    assert want.shape[Geometry(layer).axis] == 5


def test_zeros_of_an_embedding_and_of_a_wished_size() -> None:
    ids = torch.zeros(2, 7, dtype=torch.long)
    assert Zeros(nn.Embedding(4, 5))(ids).shape == (2, 7, 5)
    assert Zeros(nn.Embedding(4, 5))(ids).dtype == torch.float32
    up = nn.ConvTranspose2d(3, 5, 3, stride=2)
    assert Zeros(up)(torch.ones(1, 3, 4, 4), output_size=[10, 10]).shape == (1, 5, 10, 10)


def test_a_layer_that_is_dead_in_one_block_is_dead_in_all() -> None:
    _, graph, _ = found("basic")
    inner = Block(id="a.0.weight", swaps=(Swap(module="b", kind="constant"),))
    outer = Block(id="stem.0.weight+b.weight", swaps=(Swap(module="b", kind="zeros"),))
    ids = [group.id for group in graph.groups]
    outer = replace(outer, id=next(i for i in ids if i != "a.0.weight"))
    both = replace(graph, blocks=(inner, outer)).plan({inner.id: (), outer.id: ()})
    assert both.swaps == (Swap(module="b", kind="zeros"),)


def test_street_may_lose_every_residual_block_and_its_coarsest_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "street"))
    from street_model import StreetFusion

    torch.manual_seed(0)
    model = zoo.settled(StreetFusion(width=0.25))
    g = torch.Generator().manual_seed(1)
    inputs = {
        "image": torch.rand(2, 3, 64, 160, generator=g),
        "points": torch.rand(2, 9, 40, 8, generator=g),
        "cells": torch.stack([torch.randperm(48 * 48, generator=g)[:40] for _ in range(2)]),
    }
    branches = {"camera": ["camera"], "lidar": ["lidar"]}
    graph = find_groups(model, inputs, branches)
    assert find_groups(model, inputs, branches, blocks=False) == replace(graph, blocks=())
    camera = [f"camera.{part}.first.0.weight" for part in ("stage1.0", "stage1.1", "stage2.0", "stage2.1", "stage3")]
    assert graph.removable == (
        *camera,
        "camera.stage3.second.weight+camera.stage3.shortcut.0.weight",
        "camera.down.0.0.weight+camera.down.1.second.weight",
        "camera.down.1.first.0.weight",
        "lidar.stage2.1.first.0.weight",
        "lidar.stage3.0.0.weight+lidar.stage3.1.second.weight",
        "lidar.stage3.1.first.0.weight",
    )
    plan = graph.plan(dict.fromkeys(graph.removable, ()))
    small = apply_plan(copy.deepcopy(model), plan)
    torch.testing.assert_close(small(**inputs), gate_model(model, plan)(**inputs), rtol=1e-4, atol=1e-5)
    widths = dict.fromkeys(graph.removable, 0)
    assert CostModel(graph, model, inputs).macs(widths) == count_macs(small, inputs)
    sys.modules.pop("street_model", None)


def test_a_product_with_what_would_be_zero_is_no_block() -> None:
    class Scaled(nn.Module):
        """Multiplies by what the block makes: without it nothing of the input is left."""

        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.gate = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 8, 1, bias=False))
            self.head = nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.stem(x)) * self.gate(x))  # type: ignore[no-any-return]

    model = Scaled()
    graph = find_groups(model, IMAGE, {})
    assert "gate.0.weight" in graph.widths
    assert graph.removable == ()
