"""Channel aggregation, the other criteria, the score file and the picture."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fusepress.pipeline.errors import RecipeError, StageError, StoreError
from fusepress.pipeline.graph.groups import find_groups
from fusepress.pipeline.graph.plan import Group, Member
from fusepress.pipeline.recipe import ScoreConfig
from fusepress.pipeline.scoring.altermoma import weight_masks
from fusepress.pipeline.scoring.channels import Aggregation, ChannelScorer, channel_rows, gate_members
from fusepress.pipeline.scoring.criteria import METHODS, WEIGHT_METHODS, score_channels, score_weights
from fusepress.pipeline.scoring.picture import score_picture
from fusepress.pipeline.scoring.result import ScoreResult, load_scores, save_scores, scores_to_bytes
from fusepress.pipeline.task import Batch
from tests.scoring_toys import ConvToy, ToyGraph, backbone_groups, map_error, norm_members, state_bytes

FAST = ScoreConfig(method="altermoma", beta=1.0, batches=2, reactivation_batches=2, reactivation_lr=0.02)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def product_of(model: nn.Module) -> Callable[[str], Tensor]:
    parameters = dict(model.named_parameters())

    def product(name: str) -> Tensor:
        gradient = parameters[name].grad
        return torch.zeros_like(parameters[name]) if gradient is None else (parameters[name] * gradient).detach()

    return product


def backward(toy: ConvToy, batch: Batch | None = None) -> None:
    batch = toy.task.user.data[0] if batch is None else batch
    toy.model.zero_grad(set_to_none=True)
    sum(map_error(toy.model(**batch.inputs), batch).values(), torch.zeros(()).double()).backward()


def explicit_gate(toy: ConvToy, modules: list[str], width: int, batch: Batch) -> Tensor:
    """The derivative of the loss by a gate that really multiplies the modules' outputs, by autograd."""
    gate = torch.ones(1, width, 1, 1, dtype=torch.float64, requires_grad=True)
    handles = [
        toy.model.get_submodule(name).register_forward_hook(lambda _m, _i, output: output * gate) for name in modules
    ]
    loss = sum(map_error(toy.model(**batch.inputs), batch).values(), torch.zeros(()).double())
    (gradient,) = torch.autograd.grad(loss, gate)
    for handle in handles:
        handle.remove()
    return gradient.flatten()


GATED = {
    "camera.conv2.weight+camera.stem.weight": ["camera.stem_norm", "camera.norm2"],  # a residual stream shares its gate
    "camera.conv1.weight": ["camera.norm1"],
    "fuse.weight": ["fuse"],  # no norm: the gate is on the convolution's output, bias included
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("key", GATED)
def test_gate_scores_are_the_derivative_of_a_real_gate(key: str, training: bool) -> None:
    toy = ConvToy()
    toy.model.train(training)
    for module in toy.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0  # two forward passes, the same statistics
    group = next(group for group in toy.groups if group.id == key)
    backward(toy)
    found = ChannelScorer(toy.model, toy.groups, "gate").signed(product_of(toy.model), key)
    expected = explicit_gate(toy, GATED[key], group.width, toy.task.user.data[0])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)
    assert bool((found.abs() > 1e-9).any())


def test_groups_that_are_found_are_scored_as_one_gate_across_both_branches() -> None:
    toy = ConvToy()
    batch = toy.task.user.data[0]
    graph = find_groups(toy.model, batch.inputs, toy.task.branches, ["head"])
    shared = next(group for group in graph.groups if len(group.producers) == 4)  # the branches' features are added
    assert shared.branch == "fusion"
    toy.model.eval()
    backward(toy)
    found = ChannelScorer(toy.model, graph.groups, "gate").signed(product_of(toy.model), shared.id)
    norms = [f"{branch}.{norm}" for branch in toy.modalities for norm in ("stem_norm", "norm2")]
    torch.testing.assert_close(found, explicit_gate(toy, norms, shared.width, batch), rtol=1e-9, atol=1e-13)
    result = score_channels(toy.model, toy.task, graph, FAST, seed=0)
    assert {key: len(vector) for key, vector in result.channel.items()} == graph.widths
    sums = {name: branch["sum"] for name, branch in result.log["branches"].items()}
    assert sums == pytest.approx({"camera": 0.0, "lidar": 0.0, "fusion": 0.0}, abs=1e-12)


def test_the_literal_score_vanishes_before_a_batchnorm_in_training_mode_only() -> None:
    toy = ConvToy()
    key = "camera.conv1.weight"

    def scores(aggregation: Aggregation) -> Tensor:
        scorer = ChannelScorer(toy.model, toy.groups, aggregation)
        return scorer.scores(product_of(toy.model), [key])[key]

    for module in toy.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-12  # with eps the loss feels the filter's scale a little
    toy.model.train()
    backward(toy)
    assert float(scores("literal").max()) < 1e-9 * float(scores("abs").max())
    assert float(scores("gate").max()) > 1e-3 * float(scores("abs").max())
    toy.model.eval()
    backward(toy)
    assert float(scores("literal").min()) > 1e-4 * float(scores("abs").max())


def test_scoring_a_model_in_training_mode_does_not_fall_into_that_trap() -> None:
    toy = ConvToy()
    toy.model.train()
    config = FAST.model_copy(update={"aggregate": "literal", "beta": 0.0})
    found = score_channels(toy.model, toy.task, ToyGraph(toy.groups), config, seed=0).channel["camera.conv1.weight"]
    assert float(found.min()) > 1e-5  # these are shares of the branch


def test_abs_sums_absolute_products_of_producers_and_norms_but_not_of_consumers() -> None:
    toy = ConvToy()
    toy.model.eval()
    backward(toy)
    product = product_of(toy.model)
    key = "camera.conv2.weight+camera.stem.weight"
    found = ChannelScorer(toy.model, toy.groups, "abs").scores(product, [key])[key]
    names = ("stem.weight", "conv2.weight", "stem_norm.weight", "stem_norm.bias", "norm2.weight", "norm2.bias")
    expected = torch.stack([product(f"camera.{name}").abs().reshape(6, -1).sum(1) for name in names]).sum(0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    asked: list[str] = []

    def noting(name: str) -> Tensor:
        asked.append(name)
        return product(name)

    aggregations: tuple[Aggregation, ...] = ("gate", "abs", "literal")
    for aggregation in aggregations:
        ChannelScorer(toy.model, toy.groups, aggregation).scores(noting, [key])
    assert {"camera.stem.weight", "camera.norm2.weight"} <= set(asked)
    assert not {"camera.conv1.weight", "fuse.weight"} & set(asked)  # these read the stream


class Inverted(nn.Module):
    """Expand, norm, depthwise, norm, project; and a pre-activation reader with a slope."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(2, 4, 1, bias=False)
        self.norm_a = nn.BatchNorm2d(4)
        self.act = nn.PReLU(4)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        self.norm_b = nn.BatchNorm2d(4)
        self.project = nn.Conv2d(4, 2, 1)


def test_a_gate_in_series_counts_once_where_the_channel_is_read() -> None:
    model = Inverted()
    members = [
        Member(param="expand.weight", dim=0),
        *[m for m in norm_members("norm_a", "norm_b") if "running" not in m.param],
        Member(param="act.weight", dim=0, role="norm"),
        Member(param="depthwise.weight", dim=0, role="norm"),
        Member(param="project.weight", dim=1, role="consumer"),
    ]
    order = {name: index for index, (name, _) in enumerate(model.named_parameters())}
    members.sort(key=lambda m: order[m.param])
    assert [m.param for m in gate_members(model, members)] == ["norm_b.weight", "norm_b.bias"]
    without = [m for m in members if not m.param.startswith("norm_b")]
    assert [m.param for m in gate_members(model, without)] == ["depthwise.weight"]
    bare = [m for m in members if m.role != "norm" or m.param == "act.weight"]
    assert [m.param for m in gate_members(model, bare)] == ["expand.weight"]


def test_producers_without_a_norm_count_beside_those_with_one() -> None:
    model = nn.ModuleDict({"lateral": nn.Conv2d(2, 4, 1), "top": nn.Conv2d(2, 4, 1), "norm": nn.BatchNorm2d(4)})
    members = [
        *(Member(param=f"{name}.{leaf}", dim=0) for name in ("lateral", "top") for leaf in ("weight", "bias")),
        *[m for m in norm_members("norm") if "running" not in m.param],
    ]
    found = {m.param for m in gate_members(model, members)}
    assert found == {"lateral.weight", "lateral.bias", "norm.weight", "norm.bias"}


def test_norms_registered_after_both_producers_are_not_doubled() -> None:
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(2, 4, 1),
            "shortcut": nn.Conv2d(2, 4, 1),
            "norm_a": nn.BatchNorm2d(4),
            "norm_b": nn.BatchNorm2d(4),
        }
    )
    members = [Member(param="conv.weight", dim=0), Member(param="shortcut.weight", dim=0)]
    members += [m for m in norm_members("norm_a", "norm_b") if "running" not in m.param]
    assert {m.param.partition(".")[0] for m in gate_members(model, members)} == {"norm_a", "norm_b"}


def test_rows_of_a_group_that_lies_inside_a_parameter() -> None:
    tensor = torch.arange(2 * 12).reshape(2, 12)
    rows = channel_rows(tensor, Member(param="w", dim=1, offset=4, stride=2), 3)
    assert rows.tolist() == [[4, 16, 5, 17], [6, 18, 7, 19], [8, 20, 9, 21]]


def test_groups_of_another_model_are_refused() -> None:
    toy = ConvToy()
    wide = Group(
        id="x", branch="camera", width=7, members=(Member(param="camera.stem.weight", dim=0),), producers=("x",)
    )
    with pytest.raises(StageError, match=r"camera\.stem\.weight to hold channels 0 to 6 along dimension 0.*this very"):
        score_channels(toy.model, toy.task, ToyGraph([wide]), FAST, seed=0)
    absent = Group(id="y", branch="camera", width=7, members=(Member(param="no.weight", dim=0),), producers=("y",))
    for method in ("altermoma", "taylor", "magnitude"):
        config = FAST.model_copy(update={"method": method})
        with pytest.raises(StageError, match=r"expected producer weights to score; got none of .* at group y"):
            score_channels(toy.model, toy.task, ToyGraph([absent]), config, seed=0)


# every method


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_keeps_the_contract(method: str) -> None:
    toy = ConvToy(dtype=torch.float32)
    toy.model.train()
    before = state_bytes(toy.model)
    config = FAST.model_copy(update={"method": method})
    seen: list[float] = []
    first = score_channels(
        toy.model, toy.task, ToyGraph(toy.groups), config, seed=1, progress=lambda done, _: seen.append(done)
    )
    assert state_bytes(toy.model) == before
    assert all(module.training for module in toy.model.modules())
    assert seen[-1] == 1.0
    assert list(first.channel) == [group.id for group in toy.groups]
    for group in toy.groups:
        vector = first.channel[group.id]
        assert vector.dtype == np.float32
        assert vector.shape == (group.width,)
        assert len(set(vector.tolist())) > 1
    assert first.log["method"] == method
    assert set(first.log["branches"]) == {"camera", "lidar", "fusion"}
    second = score_channels(toy.model, toy.task, ToyGraph(toy.groups), config, seed=1)
    assert scores_to_bytes(first) == scores_to_bytes(second)


@pytest.mark.parametrize("method", sorted(WEIGHT_METHODS))
def test_every_method_scores_single_weights_too(method: str) -> None:
    toy = ConvToy(dtype=torch.float32)
    toy.model.train()
    before = state_bytes(toy.model)
    config = FAST.model_copy(update={"method": method})
    seen: list[float] = []
    scores, log = score_weights(toy.model, toy.task, config, seed=1, progress=lambda done, _: seen.append(done))
    assert state_bytes(toy.model) == before
    assert all(module.training for module in toy.model.modules())
    assert all(p.requires_grad and p.grad is None for p in toy.model.parameters())
    assert seen[-1] == 1.0
    assert {n: v.shape for n, v in scores.items()} == {n: p.shape for n, p in toy.model.named_parameters()}
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in scores.values())
    assert log["method"] == method
    assert set(log["branches"]) == {"camera", "lidar", "fusion"}
    again, _ = score_weights(toy.model, toy.task, config, seed=1)
    assert all(torch.equal(scores[name], again[name]) for name in scores)
    kept = weight_masks(scores, 0.8)
    total = sum(value.numel() for value in scores.values())
    assert sum(int(mask.sum()) for mask in kept.values()) == total - round(0.8 * total)


def test_both_registries_name_the_same_methods() -> None:
    assert set(METHODS) == set(WEIGHT_METHODS)


@pytest.mark.parametrize("aggregate", ["gate", "abs", "literal"])
def test_a_dead_channel_scores_lowest_of_its_group(aggregate: str) -> None:
    toy = ConvToy()
    with torch.no_grad():
        toy.model.get_parameter("fuse.weight")[:, 2] = 0.0  # nobody reads channel 2 of the camera's and LiDAR's stream
        toy.model.get_parameter("camera.conv1.weight")[:, 2] = 0.0
    config = FAST.model_copy(update={"aggregate": aggregate, "beta": 0.0})
    found = score_channels(toy.model, toy.task, ToyGraph(toy.groups), config, seed=0)
    assert found.channel["camera.conv2.weight+camera.stem.weight"][2] == 0.0
    assert (np.delete(found.channel["camera.conv2.weight+camera.stem.weight"], 2) > 0).all()


def test_an_unknown_method_is_refused() -> None:
    toy = ConvToy()
    config = ScoreConfig.model_construct(method="guess")
    listed = re.escape(f"score.method to be one of {sorted(METHODS)}; got 'guess'")
    with pytest.raises(RecipeError, match=listed):
        score_channels(toy.model, toy.task, ToyGraph(toy.groups), config, seed=0)
    with pytest.raises(RecipeError, match=listed):
        score_weights(toy.model, toy.task, config, seed=0)


def test_auto_must_be_resolved_first() -> None:
    toy = ConvToy()
    config = ScoreConfig(method="auto")
    with pytest.raises(RecipeError, match=r"score\.method that is resolved.*got 'auto'.*choose a method first"):
        score_channels(toy.model, toy.task, ToyGraph(toy.groups), config, seed=0)
    with pytest.raises(RecipeError, match=r"score\.method that is resolved"):
        score_weights(toy.model, toy.task, config, seed=0)


def test_taylor_squares_the_gate_of_every_mini_batch_and_averages() -> None:
    toy = ConvToy()
    config = FAST.model_copy(update={"method": "taylor"})
    found = score_channels(toy.model, toy.task, ToyGraph(toy.groups), config, seed=0)
    toy.model.eval()
    for key, modules in GATED.items():
        width = len(found.channel[key])
        squares = [explicit_gate(toy, modules, width, batch).square() for batch in toy.task.user.data[:2]]
        expected = torch.stack(squares).mean(0)
        np.testing.assert_allclose(found.channel[key], expected.numpy(), rtol=1e-5, atol=1e-12)
    assert found.log["passes"] == 2


def test_taylor_gives_zero_to_a_channel_that_is_multiplied_by_zero() -> None:
    toy = ConvToy()
    with torch.no_grad():
        toy.model.get_parameter("camera.conv2.weight")[:, 3] = 0.0
    config = FAST.model_copy(update={"method": "taylor"})
    found = score_channels(toy.model, toy.task, ToyGraph(toy.groups), config, seed=0).channel["camera.conv1.weight"]
    assert found[3] == 0.0
    assert (np.delete(found, 3) > 0).all()


def test_magnitude_is_the_norm_over_the_layers_mean() -> None:
    toy = ConvToy()
    config = FAST.model_copy(update={"method": "magnitude"})
    found = score_channels(toy.model, toy.task, ToyGraph(toy.groups), config, seed=0)

    def relative(name: str) -> Tensor:
        norms = toy.model.get_parameter(name).detach().flatten(1).square().sum(1).sqrt()
        return norms / norms.mean()

    np.testing.assert_allclose(found.channel["fuse.weight"], relative("fuse.weight").numpy(), rtol=1e-6)
    both = (relative("camera.stem.weight") + relative("camera.conv2.weight")) / 2
    np.testing.assert_allclose(found.channel["camera.conv2.weight+camera.stem.weight"], both.numpy(), rtol=1e-6)
    with torch.no_grad():
        toy.model.get_parameter("camera.conv1.weight").mul_(100.0)
    again = score_channels(toy.model, toy.task, ToyGraph(toy.groups), config, seed=0)
    np.testing.assert_allclose(again.channel["camera.conv1.weight"], found.channel["camera.conv1.weight"], rtol=1e-6)


def test_magnitude_of_a_layer_of_zeros_is_zero() -> None:
    toy = ConvToy()
    with torch.no_grad():
        toy.model.get_parameter("fuse.weight").zero_()
    config = FAST.model_copy(update={"method": "magnitude"})
    found = score_channels(toy.model, toy.task, ToyGraph(toy.groups), config, seed=0)
    assert not found.channel["fuse.weight"].any()


def test_random_depends_on_the_seed_and_the_group_only() -> None:
    toy = ConvToy()
    config = FAST.model_copy(update={"method": "random"})
    first = score_channels(toy.model, toy.task, ToyGraph(toy.groups), config, seed=0).channel
    turned = score_channels(toy.model, toy.task, ToyGraph(toy.groups[::-1]), config, seed=0).channel
    other = score_channels(toy.model, toy.task, ToyGraph(toy.groups), config, seed=1).channel
    for key, vector in first.items():
        assert vector.tobytes() == turned[key].tobytes()
        assert vector.tobytes() != other[key].tobytes()
    assert len({vector.tobytes() for vector in first.values()}) == len(first)


def test_weights_that_are_not_finite_are_refused_by_methods_without_data() -> None:
    toy = ConvToy()
    with torch.no_grad():
        toy.model.get_parameter("fuse.weight")[0, 0, 0, 0] = math.nan
    config = FAST.model_copy(update={"method": "magnitude"})
    with pytest.raises(StageError, match=r"5 finite scores; got shape \(5,\) with 5 NaN or infinite at group fuse"):
        score_channels(toy.model, toy.task, ToyGraph(toy.groups), config, seed=0)


# the score file


def _result() -> ScoreResult:
    generator = np.random.default_rng(0)
    groups = [*backbone_groups("camera", 6), *backbone_groups("lidar", 6)]
    return ScoreResult(
        channel={group.id: generator.random(group.width).astype(np.float32) for group in groups},
        log={"method": "random", "notes": ["a note"], "stages": [{"loss_before": 0.1}], "branches": {}},
    )


def test_scores_come_back_from_their_file(tmp_path: Path) -> None:
    result = _result()
    save_scores(result, tmp_path / "scores.safetensors")
    found = load_scores(tmp_path / "scores.safetensors")
    assert found.log == result.log
    assert set(found.channel) == set(result.channel)
    for key, vector in result.channel.items():
        assert found.channel[key].dtype == np.float32
        np.testing.assert_array_equal(found.channel[key], vector)


def test_the_same_scores_give_the_same_bytes_in_any_order() -> None:
    result = _result()
    turned = ScoreResult(channel=dict(reversed(result.channel.items())), log=dict(reversed(result.log.items())))
    assert scores_to_bytes(result) == scores_to_bytes(turned)


def test_damaged_score_files_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    path = tmp_path / "scores.safetensors"
    with pytest.raises(StoreError, match=r"expected a score file.*run the score stage again"):
        load_scores(path)
    path.write_bytes(scores_to_bytes(_result())[:-10])
    with pytest.raises(StoreError, match=r"expected a score file \(safetensors\); got SafetensorError"):
        load_scores(path)
    save_file({"a": np.zeros(3, dtype=np.float32)}, path)
    with pytest.raises(StoreError, match=r"got no log in the metadata at .*scores\.safetensors"):
        load_scores(path)
    save_scores(ScoreResult(channel={"a": np.array([np.nan], dtype=np.float32)}), path)
    with pytest.raises(StoreError, match=r"got 'a', which is no finite float32 vector"):
        load_scores(path)


# the picture


def _texts(svg: str) -> list[str]:
    root = ElementTree.fromstring(svg)
    return [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]


def test_the_picture_tells_what_goes_per_modality_and_layer() -> None:
    result = _result()
    groups = [*backbone_groups("camera", 6), *backbone_groups("lidar", 6)]
    kept = {groups[0].id: [0, 1, 2, 3], groups[1].id: [5], groups[2].id: list(range(6))}
    texts = [text.strip() for text in _texts(score_picture(result.channel, groups, kept))]
    assert "camera: 5 of 12 channels" in texts
    assert "lidar: 12 of 12 channels" in texts
    assert "camera.conv1" in texts
    assert "lidar.conv2 (+1)" in texts
    assert [text for text in texts if text.endswith("of 6")] == ["4 of 6", "1 of 6", "6 of 6", "6 of 6"]
    before = [text.strip() for text in _texts(score_picture(result.channel, groups, None))]
    assert "camera: 12 of 12 channels" in before
    assert not any("removed" in text for text in before)


def test_the_picture_is_the_same_every_time_and_carries_no_date() -> None:
    result = _result()
    groups = [*backbone_groups("camera", 6), *backbone_groups("lidar", 6)]
    first, second = (score_picture(result.channel, groups, None) for _ in range(2))
    assert first == second
    assert "date" not in first.lower()
    assert "matplotlib v" not in first.lower()


def test_the_picture_of_no_groups_is_still_a_picture() -> None:
    assert ElementTree.fromstring(score_picture({}, [], None)).tag.endswith("svg")


def test_the_ranks_in_the_picture_follow_the_scores() -> None:
    groups = backbone_groups("camera", 6)
    low, high = np.zeros(6, dtype=np.float32), np.ones(6, dtype=np.float32)
    one = score_picture({groups[0].id: low, groups[1].id: high}, groups, None)
    other: Any = score_picture({groups[0].id: high, groups[1].id: low}, groups, None)
    assert one != other
