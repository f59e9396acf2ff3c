"""Distortion tables: equal to real surgery, cheap by replay, nothing left changed, and resumable."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from fusepress.pipeline.errors import StageError, TaskError
from fusepress.pipeline.graph.apply import apply_plan, architecture_sha256, gate_model
from fusepress.pipeline.graph.groups import find_groups
from fusepress.pipeline.graph.plan import Group, GroupGraph, Member, PlannedGroup, PrunePlan
from fusepress.pipeline.pruning import distortion
from fusepress.pipeline.pruning.curves import Curve, DistortionTable, resolve_eta
from fusepress.pipeline.pruning.distortion import distortion_table
from fusepress.pipeline.recipe import DistortionConfig
from fusepress.pipeline.task import Batch, LoadedTask
from tests.scoring_toys import ConvToy, loaded, state_bytes

RD = DistortionConfig(samples=7, eta=0)
Ladders = dict[str, tuple[int, ...]]
Scores = dict[str, npt.NDArray[Any]]


def graph_of(model: nn.Module, groups: Sequence[Group]) -> GroupGraph:
    return GroupGraph(groups=tuple(groups), frozen=(), arch_sha256=architecture_sha256(model))


def random_scores(graph: GroupGraph, seed: int = 0) -> Scores:
    draw = np.random.default_rng(seed)
    return {group.id: draw.random(group.width).astype(np.float32) for group in graph.groups}


def every_width(graph: GroupGraph) -> Ladders:
    return {g.id: tuple(range(g.width, -1, -g.multiple)) for g in graph.groups}


def best(group: Group, scores: Scores, width: int) -> list[int]:
    """The channels that stay, written down anew: the best of every part, ties to the lower number."""
    part = group.width // group.multiple
    kept: list[int] = []
    for start in range(0, group.width, part):
        order = sorted(range(start, start + part), key=lambda c: (-scores[group.id][c], c))
        kept += order[: width // group.multiple]
    return sorted(kept)


def plan_of(graph: GroupGraph, kept: Mapping[str, Sequence[int]]) -> PrunePlan:
    """A plan that may remove everything of a group, which GroupGraph.plan refuses."""
    groups = [
        PlannedGroup(id=g.id, branch=g.branch, width=g.width, kept=tuple(kept[g.id]), members=g.members)
        for g in graph.groups
        if g.id in kept
    ]
    return PrunePlan(arch_sha256=graph.arch_sha256, groups=tuple(groups))


def samples_of(task: LoadedTask, count: int) -> dict[str, Tensor]:
    found: list[dict[str, Tensor]] = []
    for batch in task.batches("calib", 0):
        found.append(batch.inputs)
        if sum(next(iter(one.values())).shape[0] for one in found) >= count:
            break
    return {name: torch.cat([one[name] for one in found])[:count] for name in found[0]}


@torch.no_grad()
def outputs_of(model: nn.Module, task: LoadedTask, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return task.as_dict(model.eval()(**inputs))


def damage(dense: Mapping[str, Tensor], pruned: Mapping[str, Tensor]) -> Tensor:
    """Per sample, written down anew."""
    heads = [
        (dense[name] - pruned[name]).double().square().flatten(1).mean(1) / dense[name].double().var(correction=0)
        for name in dense
    ]
    return torch.stack(heads).mean(0)


def check_against_full_passes(
    model: nn.Module, task: LoadedTask, graph: GroupGraph, table: DistortionTable, scores: Scores, samples: int
) -> None:
    inputs = samples_of(task, samples)
    dense = outputs_of(copy.deepcopy(model), task, inputs)
    for group in graph.groups:
        curve = table.curves[group.id]
        for width, value in zip(curve.widths, curve.distortion, strict=True):
            gated = gate_model(model, plan_of(graph, {group.id: best(group, scores, width)}))
            expected = float(damage(dense, outputs_of(gated, task, inputs)).mean())
            assert value == pytest.approx(expected, rel=1e-5, abs=1e-12), (group.id, width)


# ------------------------------------------------------------------------------------------------------- exactness


def test_every_entry_is_the_damage_of_the_gated_network_and_dense_costs_nothing() -> None:
    toy = ConvToy()
    graph = graph_of(toy.model, toy.groups)
    scores = random_scores(graph)
    table = distortion_table(toy.model, toy.task, graph, scores, every_width(graph), RD, seed=0)
    check_against_full_passes(toy.model, toy.task, graph, table, scores, 7)
    assert all(curve.distortion[0] == 0.0 for curve in table.curves.values())
    assert all((curve.distortion[1:] > 0).all() for curve in table.curves.values())
    assert (table.samples, table.notes) == (7, ())


def test_every_entry_is_the_damage_of_real_surgery() -> None:
    toy = ConvToy()
    graph = find_groups(toy.model, samples_of(toy.task, 2), toy.task.branches)
    assert len(graph.groups) == 4  # both streams are added, so that they are one group
    scores = random_scores(graph, 1)
    ladders = {g.id: (g.width, 4, 3, 1) for g in graph.groups}
    table = distortion_table(toy.model, toy.task, graph, scores, ladders, RD, seed=0)
    inputs = samples_of(toy.task, 7)
    dense = outputs_of(copy.deepcopy(toy.model), toy.task, inputs)
    for group in graph.groups:
        for width, value in zip(ladders[group.id][1:], table.curves[group.id].distortion[1:], strict=True):
            pruned = apply_plan(copy.deepcopy(toy.model), graph.plan({group.id: best(group, scores, width)}))
            expected = damage(dense, outputs_of(pruned, toy.task, inputs)).mean()
            assert value == pytest.approx(float(expected), rel=1e-9)


def test_width_zero_is_the_network_with_the_group_zeroed() -> None:
    toy = ConvToy()
    graph = graph_of(toy.model, toy.groups)
    ladders = {"camera.conv1.weight": (6, 0)}
    table = distortion_table(toy.model, toy.task, graph, random_scores(graph), ladders, RD, seed=0)
    zeroed = copy.deepcopy(toy.model)
    with torch.no_grad():
        zeroed.camera.conv2.weight.zero_()  # type: ignore[union-attr, operator]
    inputs = samples_of(toy.task, 7)
    expected = damage(outputs_of(toy.model, toy.task, inputs), outputs_of(zeroed, toy.task, inputs)).mean()
    assert table.curves["camera.conv1.weight"].distortion[1] == pytest.approx(float(expected), rel=1e-9)
    assert list(table.curves) == ["camera.conv1.weight"]


def test_worst_case_is_the_largest_sample() -> None:
    toy = ConvToy()
    graph = graph_of(toy.model, toy.groups)
    scores = random_scores(graph)
    group = graph["fuse.weight"]
    config = RD.model_copy(update={"worst_case": True})
    table = distortion_table(toy.model, toy.task, graph, scores, {group.id: (5, 2)}, config, seed=0)
    inputs = samples_of(toy.task, 7)
    gated = gate_model(toy.model, graph.plan({group.id: best(group, scores, 2)}))
    each = damage(outputs_of(toy.model, toy.task, inputs), outputs_of(gated, toy.task, inputs))
    assert table.curves[group.id].distortion[1] == pytest.approx(float(each.max()), rel=1e-9)
    assert float(each.max()) > 1.05 * float(each.mean())


class TwoHeads(nn.Module):
    """One hidden layer, two outputs of very different scale, and an index that is no damage."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(4, 6)
        self.small = nn.Linear(6, 3)
        self.large = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.hidden(x)
        return {"small": 1e-3 * self.small(h), "large": 1e3 * self.large(h), "best": self.small(h).argmax(1)}


def linear_group(name: str, width: int, *consumers: str, branch: str = "fusion") -> Group:
    producers = (f"{name}.weight",)
    members = (
        Member(param=f"{name}.weight", dim=0),
        Member(param=f"{name}.bias", dim=0),
        *(Member(param=f"{consumer}.weight", dim=1, role="consumer") for consumer in consumers),
    )
    return Group(id=producers[0], branch=branch, width=width, members=members, producers=producers)


def linear_data(features: int = 4, sizes: Sequence[int] = (5, 3, 4)) -> list[Batch]:
    draw = torch.Generator().manual_seed(3)
    return [
        Batch(inputs={"x": torch.randn(size, features, generator=draw)}, sample_ids=[f"{k}-{i}" for i in range(size)])
        for k, size in enumerate(sizes)
    ]


def test_heads_are_measured_in_their_own_variance() -> None:
    torch.manual_seed(0)
    model = TwoHeads()
    task = loaded(linear_data(), {"only": ["hidden"]})
    graph = graph_of(model, [linear_group("hidden", 6, "small", "large")])
    scores = {"hidden.weight": np.arange(6, dtype=np.float32)}
    table = distortion_table(
        model, task, graph, scores, {"hidden.weight": (6, 3)}, DistortionConfig(samples=12, eta=0), seed=0
    )
    pruned = apply_plan(copy.deepcopy(model), graph.plan({"hidden.weight": [3, 4, 5]}))
    inputs = samples_of(task, 12)
    dense, less = outputs_of(model, task, inputs), outputs_of(pruned, task, inputs)
    heads = {n: (dense[n] - less[n]).square().mean() / dense[n].var(correction=0) for n in ("small", "large")}
    expected = (heads["small"] + heads["large"]) / 2
    assert table.curves["hidden.weight"].distortion[1] == pytest.approx(float(expected), rel=1e-4)


class Apart(nn.Module):
    """Two linear branches that write to different outputs: what they lose cannot interfere."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)
        self.left_out, self.right_out = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left_out(self.left(x)), self.right_out(self.right(x))], dim=1)


def test_damage_adds_up_exactly_where_outputs_are_orthogonal() -> None:
    torch.manual_seed(1)
    model = Apart().double()
    data = [Batch(inputs={"x": batch.inputs["x"].double()}, sample_ids=batch.sample_ids) for batch in linear_data()]
    task = loaded(data, {"only": ["left"]})
    groups = [linear_group("left", 4, "left_out"), linear_group("right", 4, "right_out")]
    graph = graph_of(model, groups)
    scores = random_scores(graph)
    ladders = {group.id: (4, 2) for group in groups}
    config = DistortionConfig(samples=12, eta=0)
    table = distortion_table(model, task, graph, scores, ladders, config, seed=0)
    joint = apply_plan(copy.deepcopy(model), graph.plan({g.id: best(g, scores, 2) for g in groups}))
    inputs = samples_of(task, 12)
    expected = damage(outputs_of(model, task, inputs), outputs_of(joint, task, inputs)).mean()
    assert sum(c.distortion[1] for c in table.curves.values()) == pytest.approx(float(expected), rel=1e-12)


# ---------------------------------------------------------------------------------------------------------- replay


class Awkward(nn.Module):
    """What makes replays hard: writes in place, views, a scatter, norms over channels, attention, shared weights."""

    def __init__(self, *, trainable: bool = False) -> None:
        super().__init__()
        self.trainable = trainable
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.inner = nn.Conv2d(8, 12, 3, padding=1)
        self.back = nn.Conv2d(12, 8, 1)
        self.points = nn.Linear(3, 8)
        self.layer = nn.LayerNorm(8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.out = nn.Linear(6, 3)

    def forward(self, image: Tensor, points: Tensor) -> Tensor:
        x = nn.functional.silu(self.norm(self.stem(image)))
        y = self.inner(x)
        y.relu_()
        shortcut = x.clone() if self.trainable else x
        shortcut += self.back(y)  # writes what the consumer above has read
        canvas = torch.zeros(image.shape[0], 8, 4, 4)
        features = self.layer(torch.relu(self.points(points)))
        canvas[:, :, 1:3, 2] = features.transpose(1, 2)  # a write through a view
        x = shortcut + canvas
        x[:, :2].mul_(0.5)
        x = self.up(x).flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        logits: Tensor = self.out(x).mean(1)
        return logits


def coupled(width: int, producers: Sequence[str], norms: Sequence[str], consumers: Sequence[tuple[str, int]]) -> Group:
    return Group(
        id="+".join(sorted(producers)),
        branch="fusion",
        width=width,
        multiple=2,
        producers=tuple(producers),
        members=(
            *(Member(param=param, dim=0) for param in producers),
            *(Member(param=f"{norm}.{leaf}", dim=0, role="norm") for norm in norms for leaf in ("weight", "bias")),
            *(Member(param=param, dim=dim, role="consumer") for param, dim in consumers),
        ),
    )


AWKWARD = (
    coupled(12, ["inner.weight"], [], [("back.weight", 1)]),
    coupled(
        8,
        ["stem.weight", "back.weight", "points.weight"],
        ["norm", "layer"],
        [("inner.weight", 1), ("up.weight", 0)],
    ),
    coupled(6, ["up.bias"], [], [("attention.in_proj_weight", 1), ("out.weight", 1)]),
)


def awkward(*, trainable: bool = False) -> tuple[Awkward, LoadedTask]:
    torch.manual_seed(2)
    model = Awkward(trainable=trainable).eval()
    draw = torch.Generator().manual_seed(5)
    data = [
        Batch(
            inputs={
                "image": torch.randn(size, 2, 4, 4, generator=draw),
                "points": torch.randn(size, 2, 3, generator=draw),
            },
            sample_ids=[f"{k}-{i}" for i in range(size)],
        )
        for k, size in enumerate((4, 3))
    ]
    return model, loaded(data, {"camera": ["stem"], "lidar": ["points"]})


def test_replays_of_an_awkward_network_equal_full_passes() -> None:
    model, task = awkward()
    graph = graph_of(model, AWKWARD)
    scores = random_scores(graph)
    ladders = {g.id: tuple(range(g.width, 0, -g.multiple)) for g in graph.groups}
    before = state_bytes(model)
    table = distortion_table(model, task, graph, scores, ladders, RD, seed=0)
    assert table.notes == ()
    assert state_bytes(model) == before
    check_against_full_passes(model, task, graph, table, scores, 7)


def test_a_replay_gives_the_bits_of_a_full_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = ConvToy(dtype=torch.float32)
    graph = graph_of(toy.model, toy.groups)
    scores = random_scores(graph)
    replayed = distortion_table(toy.model, toy.task, graph, scores, every_width(graph), RD, seed=0)
    monkeypatch.setattr(distortion.Bench, "_trial", lambda *_: "a test")
    full = distortion_table(toy.model, toy.task, graph, scores, every_width(graph), RD, seed=0)
    assert len(full.notes) == len(graph.groups)
    for group in graph.groups:
        assert replayed.curves[group.id].distortion.tobytes() == full.curves[group.id].distortion.tobytes()


def test_only_what_lies_behind_a_group_is_run_again() -> None:
    toy = ConvToy()
    graph = graph_of(toy.model, toy.groups)
    table = distortion_table(toy.model, toy.task, graph, random_scores(graph), every_width(graph), RD, seed=0)
    conv = 6 * 6 * 36 * 9  # positions x 6 channels in and out x 3x3
    behind_stream = 6 * 6 * (6 * 5 * 9 + 5)
    assert table.macs["fuse.weight"] == 6 * 6 * 5
    assert table.macs["camera.conv1.weight"] == conv + behind_stream
    assert table.macs["camera.conv2.weight+camera.stem.weight"] == 2 * conv + behind_stream
    assert table.macs["lidar.conv1.weight"] == table.macs["camera.conv1.weight"]


class Branching(nn.Module):
    """Python looks at values: by a number, or behind torch's back."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(4, 6), nn.Linear(6, 3)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.hidden(x))
        y: Tensor = self.out(h)
        if self.way == "number":
            y = y * (2.0 if float(y.mean()) > 0.1 else 1.0)
        elif self.way == "shape":
            y = y + y[y > 0.2].sum()
        elif self.way == "numpy":
            y = torch.from_numpy(y.detach().numpy().copy()) * 2
        return y


@pytest.mark.parametrize("way", ["number", "shape", "numpy"])
def test_code_that_looks_at_values_is_run_in_full(way: str) -> None:
    torch.manual_seed(4)
    model = Branching(way)
    task = loaded(linear_data(), {"only": ["hidden"]})
    graph = graph_of(model, [linear_group("hidden", 6, "out")])
    scores = random_scores(graph)
    table = distortion_table(model, task, graph, scores, every_width(graph), DistortionConfig(samples=5, eta=0), seed=0)
    assert any("full passes" in note for note in table.notes)
    check_against_full_passes(model, task, graph, table, scores, 5)


# ---------------------------------------------------------------------------------------------------- side effects


class Fragile(nn.Module):
    """Counts its passes in a buffer, and fails at one of them."""

    def __init__(self, fails_at: int = 10**9) -> None:
        super().__init__()
        self.hidden, self.norm, self.out = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))
        self.fails_at = fails_at

    def forward(self, x: Tensor) -> Tensor:
        self.passes: Tensor
        self.passes += 1
        hidden = self.norm(self.hidden(x))
        if int(self.passes) == self.fails_at:
            raise ValueError("broken sensor")
        y: Tensor = self.out(hidden)
        return y


def fragile_groups() -> list[Group]:
    group = linear_group("hidden", 6, "out")
    norms = tuple(Member(param=f"norm.{leaf}", dim=0, role="norm") for leaf in ("weight", "bias"))
    return [
        Group(
            id=group.id,
            branch=group.branch,
            width=6,
            members=(*group.members[:2], *norms, group.members[2]),
            producers=group.producers,
        )
    ]


@pytest.mark.parametrize("fails_at", [10**9, 1, 2, 3])
def test_the_model_is_bit_for_bit_as_before_also_after_an_error(fails_at: int) -> None:
    torch.manual_seed(6)
    model = Fragile(fails_at).train()
    model.out.eval()
    before, modes = state_bytes(model), [module.training for module in model.modules()]
    grads = torch.is_grad_enabled()
    task = loaded(linear_data(), {"only": ["hidden"]})
    graph = graph_of(model, fragile_groups())
    arguments = (task, graph, random_scores(graph), every_width(graph), DistortionConfig(samples=12, eta=0))
    if fails_at < 10:
        with pytest.raises(ValueError, match="broken sensor"):
            distortion_table(model, *arguments, seed=0)
    else:
        distortion_table(model, *arguments, seed=0)
    assert state_bytes(model) == before
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled() == grads
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


# ---------------------------------------------------------------------------------------------------------- resume


class Stopped(Exception):
    pass


def test_a_stopped_measurement_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = ConvToy()
    graph = graph_of(toy.model, toy.groups)
    scores, ladders = random_scores(graph), every_width(graph)
    whole = distortion_table(toy.model, toy.task, graph, scores, ladders, RD, seed=0)
    calls: list[float] = []

    def stop(fraction: float, _text: str) -> None:
        calls.append(fraction)
        if len(calls) == 7:
            raise Stopped

    with pytest.raises(Stopped):
        distortion_table(toy.model, toy.task, graph, scores, ladders, RD, seed=0, out=tmp_path, progress=stop)
    file = tmp_path / distortion.FILE
    done = file.read_text().splitlines()
    assert len(done) == 1 + 2 + 7  # its head, two dense passes, seven groups
    file.write_text(file.read_text() + '{"batch": 1, "group": "torn')
    measured: list[str] = []
    squares = distortion.Bench._line

    def watched(self: distortion.Bench, tape: Any, one: distortion.Options, *rest: Any) -> Any:
        measured.append(one.group.id)
        return squares(self, tape, one, *rest)

    monkeypatch.setattr(distortion.Bench, "_line", watched)
    resumed = distortion_table(toy.model, toy.task, graph, scores, ladders, RD, seed=0, out=tmp_path)
    batches = 3  # of 3, 2 and 4 samples, the last one cut to 2
    assert len(measured) == batches * len(graph.groups) - 7
    for group in graph.groups:
        assert resumed.curves[group.id].distortion.tobytes() == whole.curves[group.id].distortion.tobytes()
    measured.clear()
    distortion_table(toy.model, toy.task, graph, scores, ladders, RD, seed=0, out=tmp_path)
    assert measured == []
    assert all(json.loads(line) for line in file.read_text().splitlines())


@pytest.mark.parametrize("what", ["scores", "weights", "ladders", "config", "seed"])
def test_another_question_is_measured_anew(tmp_path: Path, what: str) -> None:
    toy = ConvToy()
    graph = graph_of(toy.model, toy.groups)
    scores, ladders, config, seed = random_scores(graph), {"fuse.weight": (5, 3)}, RD, 0
    first = distortion_table(toy.model, toy.task, graph, scores, ladders, config, seed=seed, out=tmp_path)
    if what == "scores":
        scores = {name: -value for name, value in scores.items()}
    elif what == "weights":
        with torch.no_grad():
            toy.model.head.weight.mul_(torch.linspace(0.1, 2, 5, dtype=torch.float64).view(1, 5, 1, 1))
    elif what == "ladders":
        ladders = {"fuse.weight": (5, 2)}
    elif what == "config":
        config = RD.model_copy(update={"samples": 4})
    else:
        seed = 1
    head = (tmp_path / distortion.FILE).read_text().splitlines()[0]
    second = distortion_table(toy.model, toy.task, graph, scores, ladders, config, seed=seed, out=tmp_path)
    assert (tmp_path / distortion.FILE).read_text().splitlines()[0] != head
    if what != "seed":  # these batches are the same for every seed
        assert second.curves["fuse.weight"].distortion[1] != first.curves["fuse.weight"].distortion[1]


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("widths", [(), (5,), (6, 6), (6, 4, 5), (6, -1)])
def test_wrong_ladders_are_refused(widths: tuple[int, ...]) -> None:
    toy = ConvToy()
    graph = graph_of(toy.model, toy.groups)
    ladders = {"camera.conv1.weight": widths}
    with pytest.raises(StageError, match=r"expected widths from 6 downwards, multiples of 1; got .* at camera\.conv1"):
        distortion_table(toy.model, toy.task, graph, random_scores(graph), ladders, RD, seed=0)


def test_unknown_groups_and_missing_scores_are_refused() -> None:
    toy = ConvToy()
    graph = graph_of(toy.model, toy.groups)
    with pytest.raises(StageError, match="expected ladders of this model's groups; got 'nobody'"):
        distortion_table(toy.model, toy.task, graph, random_scores(graph), {"nobody": (2, 1)}, RD, seed=0)
    with pytest.raises(StageError, match=r"expected scores of shape \(5,\); got none at fuse.weight"):
        distortion_table(toy.model, toy.task, graph, {}, {"fuse.weight": (5, 1)}, RD, seed=0)


def test_no_calibration_samples_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = ConvToy()
    graph = graph_of(toy.model, toy.groups)
    monkeypatch.setattr(toy.task.user, "batches", lambda *_a, **_k: iter(()))
    with pytest.raises(TaskError, match="expected calibration samples to measure distortion on; got none"):
        distortion_table(toy.model, toy.task, graph, random_scores(graph), {"fuse.weight": (5, 1)}, RD, seed=0)


def test_fewer_samples_than_wanted_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = ConvToy()
    graph = graph_of(toy.model, toy.groups)
    monkeypatch.setattr(toy.task.user, "batches", lambda *_a, **_k: iter(toy.task.user.data[:1]))
    table = distortion_table(toy.model, toy.task, graph, random_scores(graph), {"fuse.weight": (5, 1)}, RD, seed=0)
    assert (table.samples, table.notes) == (3, ("the calibration split has 3 samples, not 7",))


def test_outputs_without_samples_in_front_are_refused() -> None:
    model = Branching("none")
    task = loaded(linear_data(), {"only": ["hidden"]})
    graph = graph_of(model, [linear_group("hidden", 6, "out")])
    model.out.register_forward_hook(lambda _m, _i, out: out.sum(0))
    with pytest.raises(TaskError, match="expected floating-point outputs with 2 samples in front; got"):
        distortion_table(model, task, graph, random_scores(graph), every_width(graph), RD, seed=0)


def test_damage_that_is_no_number_is_refused() -> None:
    model = Branching("none")
    with torch.no_grad():
        model.out.bias.fill_(float("inf"))
    task = loaded(linear_data(), {"only": ["hidden"]})
    graph = graph_of(model, [linear_group("hidden", 6, "out")])
    with pytest.raises(StageError, match=r"expected finite damage; got NaN or infinity at hidden\.weight"):
        distortion_table(model, task, graph, random_scores(graph), every_width(graph), RD, seed=0)


# ---------------------------------------------------------------------------------------------------------- curves


def test_without_a_weight_a_curve_is_its_distortion_to_the_last_bit() -> None:
    curve = Curve(widths=(4, 2), distortion=np.array([0.0, 0.1]), fisher=np.zeros((2, 0)))
    assert curve.total(0) is curve.distortion
    with pytest.raises(StageError, match=r"expected Fisher information in the distortion table; got .* eta 0"):
        curve.total(0.5)


def test_both_readings_of_the_information_term() -> None:
    curve = Curve(widths=(4, 2), distortion=np.array([0.0, 0.1]), fisher=np.array([[2.0, 4.0], [1.0, 5.0]]))
    np.testing.assert_allclose(curve.total(10, "A"), [60.0, 60.1])
    np.testing.assert_allclose(curve.total(10, "B"), [0.0, 0.1 + 10 * (0.5 + 0.25)])
    silent = Curve(widths=(4, 2), distortion=np.zeros(2), fisher=np.zeros((2, 1)))
    assert (silent.total(1.0) == 0).all()


def test_auto_makes_the_medians_of_both_terms_equal() -> None:
    curves = {
        "a": Curve(widths=(4, 2), distortion=np.array([0.0, 0.3]), fisher=np.array([[1.0], [1.5]])),
        "b": Curve(widths=(4, 2), distortion=np.array([0.0, 0.1]), fisher=np.array([[2.0], [3.0]])),
        "c": Curve(widths=(4, 2), distortion=np.array([0.0, 0.2]), fisher=np.array([[2.0], [2.2]])),
    }
    assert resolve_eta(curves, DistortionConfig(eta="auto")) == pytest.approx(0.2 / 0.5)
    assert resolve_eta(curves, DistortionConfig(eta=0.7)) == 0.7
    assert resolve_eta({}, DistortionConfig(eta="auto")) == 0.0


# ----------------------------------------------------------------------------------------------------- approximate


def test_the_approximate_table_is_the_exact_one_of_its_samples() -> None:
    toy = ConvToy()
    graph = find_groups(toy.model, samples_of(toy.task, 2), toy.task.branches)
    scores, ladders = random_scores(graph), every_width(graph)
    quick = DistortionConfig(samples=28, eta=0, mode="approximate")
    found = distortion_table(toy.model, toy.task, graph, scores, ladders, quick, seed=0)
    chosen = np.linspace(0, 27, distortion.FEWEST).round().astype(int)
    few = {name: value[chosen] for name, value in samples_of(toy.task, 28).items()}
    alone = loaded([Batch(inputs=few)], toy.task.branches)
    exact = DistortionConfig(samples=distortion.FEWEST, eta=0)
    expected = distortion_table(toy.model, alone, graph, scores, ladders, exact, seed=0)
    for group in graph.groups:
        np.testing.assert_allclose(
            found.curves[group.id].distortion, expected.curves[group.id].distortion, rtol=1e-9, atol=1e-15
        )


def test_the_approximate_mode_measures_all_widths_on_the_chosen_samples() -> None:
    toy = ConvToy()
    graph = find_groups(toy.model, samples_of(toy.task, 2), toy.task.branches)
    scores = random_scores(graph)
    before = state_bytes(toy.model)
    config = DistortionConfig(samples=28, eta=0.5, draws=1, mode="approximate")
    table = distortion_table(toy.model, toy.task, graph, scores, every_width(graph), config, seed=0)
    assert state_bytes(toy.model) == before
    assert table.samples == distortion.FEWEST
    assert table.notes == ("approximate: 8 of 28 samples stand for all",)
    full = distortion_table(
        toy.model, toy.task, graph, scores, every_width(graph), DistortionConfig(samples=28, eta=0), seed=0
    )
    for group in graph.groups:
        ratio = table.curves[group.id].distortion[1:] / full.curves[group.id].distortion[1:]
        assert (abs(np.log(ratio)) < np.log(1.6)).all(), (group.id, ratio)
        assert table.curves[group.id].fisher.shape == (group.width + 1, 2)
