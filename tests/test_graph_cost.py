"""Costs at any widths equal a recount of the model that is really pruned."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fusepress.pipeline.graph.apply import apply_plan
from fusepress.pipeline.graph.check import sample_kept
from fusepress.pipeline.graph.cost import CostModel, Segment, count_macs, count_params
from fusepress.pipeline.graph.groups import find_groups
from fusepress.pipeline.graph.plan import GroupGraph
from tests import graph_models as zoo

BRANCHES = {"camera": ["camera", "eye", "second"], "lidar": ["lidar", "range"]}
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
    "residual": (zoo.Residual, {"x": zoo.image()}),
    "concat": (zoo.Concat, {"x": zoo.image()}),
    "flatten": (zoo.Flatten, {"x": zoo.image()}),
    "depthwise": (zoo.Depthwise, {"x": zoo.image()}),
    "decoder": (zoo.Decoder, {"x": zoo.image()}),
    "convnext": (zoo.ConvNext, {"x": zoo.image()}),
    "pillars": (zoo.PillarNet, zoo.pillar_inputs()),
    "shared": (lambda: zoo.Stranger(shared=True), zoo.stranger_inputs()),
    "twice": (zoo.Twice, {"x": zoo.image()}),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are tiny
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def flops_half(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(**{name: value[:1] for name, value in inputs.items()})
    return int(counter.get_total_flops()) // 2


@pytest.mark.parametrize("name", MODELS)
def test_costs_equal_a_recount_of_the_pruned_model(name: str) -> None:
    make, inputs = MODELS[name]
    model = make()
    graph = find_groups(model, inputs, BRANCHES)
    cost = CostModel(graph, model, inputs)
    assert cost.constant_macs == 0
    assert cost.dense_macs == count_macs(model, inputs) == flops_half(model, inputs)
    assert cost.dense_params == count_params(model) == sum(p.numel() for p in model.parameters())
    for share in (0.25, 0.5, 0.75):
        kept = {group.id: sample_kept(group, share) for group in graph.groups}
        widths = {group: len(channels) for group, channels in kept.items()}
        small = apply_plan(copy.deepcopy(model), graph.plan(kept))
        assert cost.macs(widths) == count_macs(small, inputs) == flops_half(small, inputs)
        assert cost.params(widths) == count_params(small)


def test_counts_by_hand() -> None:
    model = zoo.Concat()
    cost = CostModel(GroupGraph(groups=(), frozen=(), arch_sha256=""), model, {"x": zoo.image()})
    positions = 8 * 8
    assert cost.dense_macs == positions * (3 * 8 * 9 + 3 * 16 * 9 + 24 * 16 * 9 + 16 * 4)
    assert (
        cost.dense_params == (3 * 8 * 9 + 8) + (3 * 16 * 9 + 16) + (24 * 16 * 9 + 16) + 2 * (8 + 16 + 16) + 16 * 4 + 4
    )


def test_attention_without_weights_is_a_constant() -> None:
    model = zoo.Attention()
    inputs = {"x": zoo.image(channels=12)}
    cost = CostModel(find_groups(model, inputs, {}), model, inputs)
    tokens = 64
    assert cost.constant_macs == 2 * tokens * tokens * 8
    assert cost.dense_macs == flops_half(model, inputs)
    assert cost.macs({"v.weight": 4}) == cost.dense_macs - tokens * (12 * 4 + 4 * 3)
    assert cost.branch_totals()["fusion"]["macs"] == cost.dense_macs


def test_many_widths_at_once_and_branches_add_up() -> None:
    make, inputs = MODELS["shared"]
    model = make()
    graph = find_groups(model, inputs, BRANCHES)
    cost = CostModel(graph, model, inputs)
    draw = np.random.default_rng(0)
    widths = draw.integers(1, cost.dense + 1, size=(5, len(graph.groups)))
    many = cost.total("macs", widths)
    assert many.tolist() == [cost.macs(dict(zip(cost.ids, map(int, row), strict=True))) for row in widths]
    for unit in ("macs", "params"):
        totals = cost.branch_totals()
        assert set(totals) == {"camera", "lidar", "fusion"}
        assert sum(total[unit] for total in totals.values()) == (
            cost.dense_macs if unit == "macs" else cost.dense_params
        )
    first = graph.groups[0]
    here = {group.id: group.width - 2 for group in graph.groups}
    less = here | {first.id: here[first.id] - 4}
    assert cost.step_cost("macs", first.id, here, 4) == cost.macs(here) - cost.macs(less) > 0
    with pytest.raises(KeyError):
        cost.macs({"no such group": 3})


def test_the_layer_table_names_the_groups_along_both_sides() -> None:
    make, inputs = MODELS["shared"]
    model = make()
    cost = CostModel(find_groups(model, inputs, BRANCHES), model, inputs)
    layers = {layer.module: layer for layer in cost.layers}
    fuse = layers["fuse.0"]
    assert fuse.kind == "Conv2d"
    assert fuse.out_shape == (1, 24, 8, 8)
    assert fuse.outputs == (Segment(group="fuse.0.weight", offset=0, count=24),)
    assert [(s.group, s.offset, s.count) for s in fuse.inputs] == [
        ("eye.2.0.weight", 0, 16),
        ("eye.2.0.weight", 16, 16),
        ("range.2.0.weight", 32, 16),
    ]
    assert layers["eye.0.0"].macs == 2 * 64 * 3 * 16 * 9  # two cameras through the same weights
    assert layers["eye.0.0"].branch == "camera"
    assert sum(layer.macs for layer in cost.layers) == cost.dense_macs
    assert sum(layer.params for layer in cost.layers) == cost.dense_params


def test_tied_weights_count_in_every_layer_but_once_as_parameters() -> None:
    model = zoo.Stubborn()
    inputs = {"x": zoo.image()}
    cost = CostModel(find_groups(model, inputs, {}), model, inputs)
    assert cost.dense_macs == count_macs(model, inputs) == flops_half(model, inputs)
    assert cost.dense_params == count_params(model)


def test_counting_leaves_the_model_as_it_was() -> None:
    model = zoo.Residual()
    model.stem.eval()
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    count_macs(model, {"x": zoo.image()})
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
