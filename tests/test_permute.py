"""Channel permutations for 2:4 (pipeline/graph/permute.py): the same function, and more that a mask keeps."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fusepress
from fusepress.pipeline.graph.apply import apply_plan, architecture_sha256, weights_bytes
from fusepress.pipeline.graph.check import sample_kept
from fusepress.pipeline.graph.groups import find_groups
from fusepress.pipeline.graph.masks import MaskHolder, masks_2to4, violations_2to4, weights_2to4
from fusepress.pipeline.graph.permute import (
    Permutation,
    best_order,
    inverse,
    kept_2to4,
    narrowed,
    permutable,
    permute_2to4,
    permute_tensors,
    tensors_of,
)
from fusepress.pipeline.graph.plan import Group, Member
from tests import graph_models as zoo

MODELS = ["Residual", "Concat", "Flatten", "Depthwise", "Decoder", "ConvNext", "Gated", "Attention", "Twice"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are tiny
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def inputs_of(name: str) -> dict[str, Tensor]:
    if name == "PillarNet":
        return zoo.pillar_inputs()
    return {"x": zoo.image(channels=12 if name == "Attention" else 3)}


def made(name: str) -> nn.Module:
    with torch.no_grad():
        return zoo.settled(getattr(zoo, name)())


def answers(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        out = model(**inputs)
    return list(out.values()) if isinstance(out, dict) else [out]


def magnitudes(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().abs() for name, weight in weights_2to4(model)[0].items()}


def permuted(model: nn.Module, inputs: dict[str, Tensor], groups: tuple[Group, ...]) -> Permutation:
    return permute_2to4(model, inputs, groups, magnitudes(model))


# --- the search -------------------------------------------------------------------------------------------------------


def kept(value: Tensor) -> float:
    return kept_2to4(value[:, : value.shape[1] // 4 * 4])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 9), columns=st.integers(4, 26))
def test_the_order_is_one_and_never_keeps_less(seed: int, rows: int, columns: int) -> None:
    value = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    order = best_order(value)
    assert sorted(order) == list(range(columns))
    assert order[columns // 4 * 4 :] == tuple(range(columns // 4 * 4, columns))
    assert kept(value[:, list(order)]) >= kept(value) - 1e-12
    assert [order[k] for k in inverse(order)] == list(range(columns))


def best_of_all(value: Tensor) -> float:
    """Brute force over the 35 ways to split eight columns into two stripes."""
    best = 0.0
    for first in itertools.combinations(range(8), 4):
        best = max(best, kept(value[:, [*first, *(set(range(8)) - set(first))]]))
    return best


def test_no_swap_is_left_that_gains_and_the_best_split_is_nearly_reached() -> None:
    gained, possible = 0.0, 0.0
    for seed in range(20):
        value = torch.rand(6, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3
        found = value[:, list(best_order(value))]
        for i, j in itertools.product(range(4), range(4, 8)):
            swapped = found.clone()
            swapped[:, [i, j]] = swapped[:, [j, i]]
            assert kept(swapped) <= kept(found) + 1e-9
        gained += kept(found) - kept(value)
        possible += best_of_all(value) - kept(value)
    assert gained > 0.9 * possible


def test_large_columns_that_stood_together_are_spread_out() -> None:
    value = torch.rand(5, 16, generator=torch.Generator().manual_seed(0)) * 0.1
    value[:, :8] += 1.0
    assert kept(value) < 0.6 * float(value[:, :8].sum())
    found = value[:, list(best_order(value))]
    assert kept(found) == pytest.approx(float(value[:, :8].sum()))


# --- the network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("kind", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_a_permuted_network_is_the_same_function(name: str, kind: torch.dtype, tolerance: float) -> None:
    model, inputs = made(name).to(kind), {k: v.to(kind) for k, v in inputs_of(name).items()}
    graph = find_groups(model, inputs, {}, blocks=False)
    groups, refused = permutable(model, inputs, graph.groups)
    assert groups
    assert not refused
    before, sha = answers(model, inputs), architecture_sha256(model)
    orders = {group.id: torch.randperm(group.width).tolist() for group in groups}
    permute_tensors(tensors_of(model), groups, orders)
    assert architecture_sha256(model) == sha
    for got, expected in zip(answers(model, inputs), before, strict=True):
        scale = float(expected.abs().max())
        torch.testing.assert_close(got, expected, rtol=0.0, atol=tolerance * max(1.0, scale))
    permute_tensors(tensors_of(model), groups, {group: inverse(order) for group, order in orders.items()})
    for got, expected in zip(answers(model, inputs), before, strict=True):
        assert torch.equal(got, expected)


def test_a_search_keeps_more_in_every_network_and_masks_follow_it() -> None:
    model, inputs = made("PillarNet"), inputs_of("PillarNet")
    before = answers(model, inputs)
    groups = find_groups(model, inputs, {}, blocks=False).groups
    values = magnitudes(model)
    found = permute_2to4(model, inputs, groups, values)
    assert found.orders
    assert all(torch.equal(values[name], model.get_parameter(name).abs()) for name in values)
    for name, value in values.items():
        assert found.kept_after[name] == pytest.approx(kept_2to4(value) / float(value.sum()), rel=1e-6)
    assert sum(found.kept_after.values()) > sum(found.kept_before.values()) + 0.005 * len(values)
    for got, expected in zip(answers(model, inputs), before, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    masks, _ = masks_2to4(model, values)
    MaskHolder(masks).apply(model)
    assert all(violations_2to4(model.get_parameter(name)) == 0 for name in masks)


def test_a_pruned_network_is_permuted_by_the_groups_of_the_dense_one_and_still_loads(tmp_path: Path) -> None:
    dense, inputs = made("PillarNet"), inputs_of("PillarNet")
    graph = find_groups(dense, inputs, {}, blocks=False)
    plan = graph.plan({group.id: sample_kept(group, 0.25) for group in graph.groups})
    model = apply_plan(copy.deepcopy(dense), plan)
    groups = narrowed(graph, plan, model)
    own = {group.id: group for group in find_groups(model, inputs, {}, blocks=False).groups}
    for group in groups:
        assert group.width == own[group.id].width
        found = {(m.param, m.dim, m.offset, m.stride) for m in group.members}
        assert found == {(m.param, m.dim, m.offset, m.stride) for m in own[group.id].members}
    before = answers(model, inputs)
    assert permuted(model, inputs, groups).orders
    (tmp_path / "plan.json").write_text(plan.to_json())
    (tmp_path / "weights.safetensors").write_bytes(weights_bytes(model))
    loaded = fusepress.load(made("PillarNet"), tmp_path / "plan.json", tmp_path / "weights.safetensors")
    for got, expected in zip(answers(loaded, inputs), before, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_removed_blocks_are_no_groups_any_more() -> None:
    model, inputs = made("Residual"), inputs_of("Residual")
    graph = find_groups(model, inputs, {})
    assert graph.removable
    plan = graph.plan({graph.removable[0]: []})
    smaller = apply_plan(copy.deepcopy(model), plan)
    groups = narrowed(graph, plan, smaller)
    assert [group.id for group in groups] == [g.id for g in graph.groups if g.id not in plan.removed_blocks]
    before = answers(smaller, inputs)
    permuted(smaller, inputs, groups)
    torch.testing.assert_close(answers(smaller, inputs), before, rtol=1e-5, atol=1e-6)


class Ramp(nn.Module):
    """Multiplies channel c by c, which is written in the code: no order but this one will do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = y * torch.arange(1.0, y.shape[1] + 1, dtype=y.dtype)[:, None, None]
        return self.out(torch.relu(self.b(y)))  # type: ignore[no-any-return]


def conv_group(first: str, then: str, width: int) -> Group:
    members = (
        Member(param=f"{first}.weight", dim=0),
        Member(param=f"{first}.bias", dim=0),
        Member(param=f"{then}.weight", dim=1, role="consumer"),
    )
    return Group(id=f"{first}.weight", branch="fusion", width=width, members=members, producers=(f"{first}.weight",))


def test_channels_whose_order_matters_stay_and_the_reason_is_given() -> None:
    model, inputs = Ramp().eval(), {"x": zoo.image()}
    groups = (conv_group("a", "b", 8), conv_group("b", "out", 8))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    able, refused = permutable(model, inputs, groups)
    assert [group.id for group in able] == ["b.weight"]
    assert refused[0].param == "a.weight"
    assert "another order of its channels changes the outputs" in refused[0].reason
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_channels_that_a_group_norm_averages_in_parts_stay() -> None:
    model, inputs = made("GroupNormed"), inputs_of("GroupNormed")
    graph = find_groups(model, inputs, {}, blocks=False)
    found = permuted(model, inputs, graph.groups)
    assert not found.orders
    assert "normalised in 4 parts" in found.to_dict()["refused"][0]["reason"]


class Shifted(nn.Module):
    """The second reader sees the channels behind two others: its stripes begin in the middle of the group's."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 2, 1)
        self.straight, self.shifted = nn.Conv2d(8, 4, 1), nn.Conv2d(12, 4, 1)
        self.more = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        behind = torch.cat([self.two(x), y, self.more(x)], 1)
        return self.straight(y) + self.shifted(behind)  # type: ignore[no-any-return]


@pytest.mark.parametrize("loud", ["straight", "shifted"])
def test_readers_that_lie_across_the_stripes_never_lose_more_than_the_others_gain(loud: str) -> None:
    model, inputs = Shifted().eval(), {"x": zoo.image()}
    with torch.no_grad():
        model.get_parameter(f"{loud}.weight").mul_(100.0)
    group = conv_group("a", "straight", 8)
    behind = Member(param="shifted.weight", dim=1, offset=2, role="consumer")
    group = replace(group, members=(*group.members, behind))
    names = ["straight.weight", "shifted.weight"]
    values = {name: model.get_parameter(name).detach().abs() for name in names}
    before, outputs = sum(kept_2to4(values[name]) for name in names), answers(model, inputs)
    permute_2to4(model, inputs, [group], values)
    assert sum(kept_2to4(model.get_parameter(name).abs()) for name in names) >= before
    torch.testing.assert_close(answers(model, inputs), outputs, rtol=1e-5, atol=1e-4)


def test_a_tied_weight_is_reordered_once() -> None:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    model = nn.Sequential(nn.Linear(4, 8), first, second)
    members = tuple(Member(param=f"{k}.weight", dim=1) for k in (1, 2))
    group = Group(id="g", branch="fusion", width=8, members=members, producers=())
    before = first.weight.detach().clone()
    permute_tensors(tensors_of(model), [group], {"g": [1, 0, *range(2, 8)]})
    assert torch.equal(first.weight, before[:, [1, 0, *range(2, 8)]])


def test_training_may_see_the_former_order_and_masks_move_with_the_weights() -> None:
    model, inputs = made("PillarNet"), inputs_of("PillarNet")
    former = {name: value.clone() for name, value in model.state_dict().items()}
    values = magnitudes(model)
    found = permute_2to4(model, inputs, find_groups(model, inputs, {}, blocks=False).groups, values)
    masks, _ = masks_2to4(model, values)
    reordered = {name: value.clone() for name, value in model.state_dict().items()}
    kept = {name: mask.clone() for name, mask in masks.items()}
    with found.undone(model, masks):
        assert all(torch.equal(former[name], value) for name, value in model.state_dict().items())
        assert any(not torch.equal(kept[name], mask) for name, mask in masks.items())
        MaskHolder(masks).apply(model)
    assert all(torch.equal(kept[name], mask) for name, mask in masks.items())
    for name, value in model.state_dict().items():
        expected = torch.where(kept[name], reordered[name], 0.0) if name in kept else reordered[name]
        assert torch.equal(value, expected)
