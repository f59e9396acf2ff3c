"""Functional Fisher information: closed forms, invariances, and equality with a computation by hooks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusepress.pipeline.errors import StageError
from fusepress.pipeline.graph.apply import apply_plan, gate_model
from fusepress.pipeline.graph.groups import find_groups
from fusepress.pipeline.graph.plan import GroupGraph
from fusepress.pipeline.pruning import distortion, fisher
from fusepress.pipeline.pruning.curves import DistortionTable
from fusepress.pipeline.pruning.distortion import distortion_table
from fusepress.pipeline.pruning.fisher import Moments, information, sensitivities
from fusepress.pipeline.recipe import DistortionConfig
from fusepress.pipeline.task import Batch, LoadedTask
from tests.scoring_toys import ConvToy, loaded, state_bytes
from tests.test_distortion import AWKWARD as AWKWARD_GROUPS
from tests.test_distortion import (
    Branching,
    Scores,
    awkward,
    best,
    every_width,
    graph_of,
    linear_data,
    linear_group,
    outputs_of,
    random_scores,
    samples_of,
)

ETA = DistortionConfig(samples=7, eta=1.0, draws=2, fisher_every=1)

# ---------------------------------------------------------------------------------------------- log-Sobolev bound


def entropy_and_information(f: Callable[[Tensor], Tensor], sigma: float, count: int) -> tuple[float, float]:
    """Ent(f) and the bound's right side under N(0, sigma^2), by midpoints of the normal quantiles."""
    level = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    x = (sigma * math.sqrt(2) * torch.erfinv(2 * level - 1)).view(-1, 1).requires_grad_()
    value = f(x.squeeze(1))
    bound = information(value, [x], [torch.full((1, 1), sigma, dtype=torch.float64)]) * (value.detach() + 1e-8)
    weighted = bound / value.detach()  # the integrand is 1/2 sigma^2 f'^2 / f
    v = value.detach()
    return float((v * v.log()).mean() - v.mean() * v.mean().log()), float(weighted.mean())


@pytest.mark.parametrize(("c", "sigma"), [(0.6, 1.0), (0.5, 0.8), (0.3, 2.0)])
def test_the_bound_is_tight_for_exponentials_with_its_closed_form(c: float, sigma: float) -> None:
    entropy, bound = entropy_and_information(lambda x: torch.exp(c * x), sigma, 400_000)
    closed = 0.5 * c**2 * sigma**2 * math.exp(c**2 * sigma**2 / 2)
    assert bound == pytest.approx(closed, rel=1e-3)
    assert entropy == pytest.approx(closed, rel=2e-3)


def test_the_bound_holds_and_needs_the_variance() -> None:
    entropy, bound = entropy_and_information(lambda x: 1 + 0.5 * torch.sin(x), 0.8, 100_000)
    assert entropy == pytest.approx(0.0464, abs=2e-4)
    assert bound == pytest.approx(0.0539, abs=2e-4)
    assert entropy < bound


# ------------------------------------------------------------------------------------------------------ sensitivity


def test_sensitivities_by_kind_of_output() -> None:
    torch.manual_seed(0)
    noisy = {"c": torch.randn(3, 4, 2, 2), "b": torch.randn(3, 5), "r": torch.randn(3)}
    clean = {name: torch.randn_like(value) for name, value in noisy.items()}
    got = sensitivities(noisy, clean, {"c": "classes", "b": "binary"}, {"r": 0.25})
    for k in range(3):
        p = clean["c"][k].softmax(0)
        classes = -(p * noisy["c"][k].log_softmax(0)).sum(0).mean()
        q = clean["b"][k].sigmoid()
        binary = -(q * F.logsigmoid(noisy["b"][k]) + (1 - q) * F.logsigmoid(-noisy["b"][k])).mean()
        other = 0.5 * (noisy["r"][k] - clean["r"][k]) ** 2 / 0.25 + 1
        assert float(got[k]) == pytest.approx(float(classes + binary + other), rel=1e-5)


def test_moments_do_not_depend_on_how_samples_are_dealt_out() -> None:
    rows = torch.randn(11, 5, generator=torch.Generator().manual_seed(0)) * 3 + 1
    for sizes in ([11], [4, 7], [1] * 11):
        moments = Moments()
        for part in rows.split(sizes):
            moments.add(part)
        torch.testing.assert_close(moments.deviation(), rows.double().std(dim=0, correction=0))
    constant = Moments()
    constant.add(torch.ones(4, 2))
    torch.testing.assert_close(constant.deviation(), torch.full((2,), 1e-3, dtype=torch.float64))


# ------------------------------------------------------------------------------------------- a table against hooks


def noise_of(seed: int, sample: int, draw: int, place: int, features: int, dtype: torch.dtype) -> Tensor:
    made = int(np.random.SeedSequence([seed, sample, draw, place]).generate_state(1)[0])
    return torch.randn(features, generator=torch.Generator().manual_seed(made), dtype=dtype)


def by_hooks(
    model: nn.Module,
    dense: nn.Module,
    task: LoadedTask,
    samples: int,
    draws: int,
    kinds: Mapping[str, str] | None = None,
) -> list[float]:
    """Information of each modality with whole passes, branches' outputs replaced by hooks; all samples in one batch."""
    inputs = samples_of(task, samples)
    modules = {m: paths[0] for m, paths in task.branches.items()}

    def features_of(network: nn.Module) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        hooks = [
            network.get_submodule(path).register_forward_hook(lambda _m, _i, out, m=m: found.update({m: out}))
            for m, path in modules.items()
        ]
        with torch.no_grad():
            network(**inputs)
        for hook in hooks:
            hook.remove()
        return found

    clean = outputs_of(model, task, inputs)
    variance = {n: float(v.double().var(correction=0)) for n, v in outputs_of(dense, task, inputs).items()}
    deviation = {
        m: v.reshape(samples, -1).double().var(dim=0, correction=0).clamp_min(1e-6).sqrt().to(v.dtype)
        for m, v in features_of(dense).items()
    }
    totals = dict.fromkeys(modules, 0.0)
    own = features_of(model)
    for draw in range(draws):
        leaves = {}
        for place, m in enumerate(modules):
            noise = torch.stack(
                [noise_of(0, k, draw, place, deviation[m].numel(), own[m].dtype) for k in range(samples)]
            )
            noisy = own[m].reshape(samples, -1) + deviation[m] * noise
            leaves[m] = noisy.reshape(own[m].shape).clone().requires_grad_()
        hooks = [
            model.get_submodule(path).register_forward_hook(lambda _m, _i, _o, leaf=leaves[m]: leaf)
            for m, path in modules.items()
        ]
        rates = sensitivities(task.as_dict(model(**inputs)), clean, kinds or {}, variance)
        grads = torch.autograd.grad(rates.sum(), list(leaves.values()), allow_unused=True)
        for hook in hooks:
            hook.remove()
        for m, g in zip(modules, grads, strict=True):
            if g is not None:
                energy = (deviation[m] * g.reshape(samples, -1)).square().sum(1)
                totals[m] += float((0.5 * energy / (rates.detach() + 1e-8)).mean()) / draws
    return list(totals.values())


def check_table(
    model: nn.Module, task: LoadedTask, graph: GroupGraph, scores: Scores, table: DistortionTable, widths: Sequence[int]
) -> None:
    assert table.modalities == tuple(task.branches)
    dense = copy.deepcopy(model).eval()
    expected = by_hooks(copy.deepcopy(dense), dense, task, 7, 2)
    for group in graph.groups:
        curve = table.curves[group.id]
        np.testing.assert_allclose(curve.fisher[0], expected, rtol=1e-5)
        for width in set(widths) & set(curve.widths[1:]):
            gated = gate_model(model, graph.plan({group.id: best(group, scores, width)})).eval()
            found = by_hooks(gated, dense, task, 7, 2)
            np.testing.assert_allclose(curve.fisher[curve.widths.index(width)], found, rtol=1e-4, atol=1e-12)


def test_a_tables_information_is_that_of_whole_passes_with_perturbed_branches() -> None:
    toy = ConvToy()
    graph = find_groups(toy.model, samples_of(toy.task, 2), toy.task.branches)
    scores = random_scores(graph)
    before = state_bytes(toy.model)
    ladders = {g.id: (g.width, 4, 2) for g in graph.groups}
    table = distortion_table(toy.model, toy.task, graph, scores, ladders, ETA, seed=0)
    check_table(toy.model, toy.task, graph, scores, table, (4, 2))
    assert state_bytes(toy.model) == before
    assert all(parameter.grad is None for parameter in toy.model.parameters())


def test_also_behind_writes_in_place_and_norms_over_channels() -> None:
    model, task = awkward(trainable=True)
    graph = graph_of(model, AWKWARD_GROUPS)
    scores = random_scores(graph)
    ladders = {g.id: (g.width, g.width - g.multiple, 2) for g in graph.groups}
    table = distortion_table(model, task, graph, scores, ladders, ETA, seed=0)
    check_table(model, task, graph, scores, table, (10, 2))


def test_classes_are_told_by_the_task() -> None:
    toy = ConvToy(modalities=("camera",))
    graph = graph_of(toy.model, toy.groups)
    scores = random_scores(graph)
    tables = []
    for kinds in ({}, {"map": "binary"}):
        toy.task.user.distill_kinds = kinds
        tables.append(distortion_table(toy.model, toy.task, graph, scores, {"fuse.weight": (5, 3)}, ETA, seed=0))
        expected = by_hooks(copy.deepcopy(toy.model), copy.deepcopy(toy.model), toy.task, 7, 2, kinds)
        np.testing.assert_allclose(tables[-1].curves["fuse.weight"].fisher[0], expected, rtol=1e-6)
    assert tables[0].modalities == ("camera",)
    assert tables[0].curves["fuse.weight"].fisher[0] != tables[1].curves["fuse.weight"].fisher[0]


# ------------------------------------------------------------------------------------------------------ properties


def test_no_figure_depends_on_the_size_of_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = ConvToy()
    graph = graph_of(toy.model, toy.groups)
    scores, ladders = random_scores(graph), {g.id: (g.width, 3) for g in graph.groups}
    inputs = samples_of(toy.task, 7)
    tables = []
    for sizes in ([7], [3, 4], [1, 2, 4]):
        parts = [
            dict(zip(inputs, part, strict=True))
            for part in zip(*(v.split(sizes) for v in inputs.values()), strict=True)
        ]
        data = [Batch(inputs=part, sample_ids=["s"] * size) for part, size in zip(parts, sizes, strict=True)]
        task = loaded(data, toy.task.branches)
        tables.append(distortion_table(toy.model, task, graph, scores, ladders, ETA, seed=0))
    for group in graph.groups:
        for other in tables[1:]:
            np.testing.assert_allclose(other.curves[group.id].fisher, tables[0].curves[group.id].fisher, rtol=1e-9)
            np.testing.assert_allclose(
                other.curves[group.id].distortion, tables[0].curves[group.id].distortion, rtol=1e-9
            )


class Deaf(nn.Module):
    """Runs both branches and ignores one of them, in one of two ways."""

    def __init__(self, *, times_zero: bool) -> None:
        super().__init__()
        self.camera, self.lidar, self.out = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)
        self.times_zero = times_zero

    def forward(self, x: Tensor) -> Tensor:
        seen, heard = self.camera(x), self.lidar(x)
        y: Tensor = self.out(torch.relu(seen + heard * 0 if self.times_zero else seen))
        return y


@pytest.mark.parametrize("times_zero", [False, True])
def test_a_modality_that_is_ignored_says_nothing(times_zero: bool) -> None:
    torch.manual_seed(0)
    model = Deaf(times_zero=times_zero)
    task = loaded(linear_data(), {"camera": ["camera"], "lidar": ["lidar"]})
    graph = graph_of(model, [linear_group("camera", 6, "out", branch="camera")])
    table = distortion_table(model, task, graph, random_scores(graph), every_width(graph), ETA, seed=0)
    curve = table.curves["camera.weight"]
    assert (curve.fisher[:, 0][:-1] > 0).all()
    assert (curve.fisher[:, 1] == 0).all()
    assert np.isfinite(curve.total(1.0)).all()


class TwoLinear(nn.Module):
    """Logits W_c camera + W_l lidar behind identity-like branches."""

    def __init__(self) -> None:
        super().__init__()
        self.camera, self.lidar = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.read_camera, self.read_lidar = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.read_camera(self.camera(x)) + self.read_lidar(self.lidar(x.flip(0)))
        return y


def test_information_grows_with_the_weights_that_read_a_modality() -> None:
    torch.manual_seed(0)
    found = []
    for scale in (0.5, 1.0, 2.0):
        model = TwoLinear()
        with torch.no_grad():
            for index, parameter in enumerate(model.parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
            model.read_camera.weight.mul_(scale)
        task = loaded(linear_data(), {"camera": ["camera"], "lidar": ["lidar"]})
        task.user.distill_kinds = {"output": "classes"}
        graph = graph_of(model, [linear_group("camera", 4, "read_camera", branch="camera")])
        config = DistortionConfig(samples=12, eta=1.0, draws=16, fisher_every=1)
        table = distortion_table(model, task, graph, random_scores(graph), {"camera.weight": (4, 2)}, config, seed=0)
        found.append(table.curves["camera.weight"].fisher[0, 0])
    assert found[0] < found[1] < found[2]


def test_the_information_is_that_of_the_first_samples_and_the_damage_that_of_all() -> None:
    """Also where the samples that count end inside a batch, as 5 of 3 + 4 do."""
    toy = ConvToy()
    graph = graph_of(toy.model, toy.groups)
    scores, ladders = random_scores(graph), {g.id: (g.width, 3) for g in graph.groups}
    inputs = samples_of(toy.task, 7)
    found = {}
    for sizes in ([7], [3, 4], [5, 2]):
        parts = [
            dict(zip(inputs, part, strict=True))
            for part in zip(*(v.split(sizes) for v in inputs.values()), strict=True)
        ]
        data = [Batch(inputs=part, sample_ids=["s"] * size) for part, size in zip(parts, sizes, strict=True)]
        task = loaded(data, toy.task.branches)
        for count in (5, 7, 64):
            config = ETA.model_copy(update={"fisher_samples": count})
            found[len(sizes), sizes[0], count] = distortion_table(
                toy.model, task, graph, scores, ladders, config, seed=0
            )
    for group in graph.groups:
        of = {key: table.curves[group.id] for key, table in found.items()}
        for key, curve in of.items():
            np.testing.assert_allclose(curve.distortion, of[1, 7, 7].distortion, rtol=1e-9)
            np.testing.assert_allclose(curve.fisher, of[1, 7, min(7, key[2])].fisher, rtol=1e-9)
        assert (np.abs(of[1, 7, 5].fisher / of[1, 7, 7].fisher - 1) > 1e-3).all()


def test_between_every_third_width_the_information_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = ConvToy()
    graph = graph_of(toy.model, toy.groups)
    scores, ladders = random_scores(graph), every_width(graph)
    calls: list[int] = []
    estimate = fisher.Fisher.estimate

    def counted(self: fisher.Fisher, *arguments: Any, **named: Any) -> Any:
        calls[-1] += 1
        return estimate(self, *arguments, **named)

    monkeypatch.setattr(fisher.Fisher, "estimate", counted)
    tables = []
    for every in (1, 3):
        calls.append(0)
        config = ETA.model_copy(update={"fisher_every": every})
        tables.append(distortion_table(toy.model, toy.task, graph, scores, ladders, config, seed=0))
    whole, third = tables
    at = {name: {0, *distortion._informed(widths, 3)} for name, widths in ladders.items()}
    options = sum(len(widths) - 1 for widths in ladders.values())
    assert calls[1] * (1 + options) == calls[0] * (1 + sum(len(places) - 1 for places in at.values()))
    for name, widths in ladders.items():
        true, got = whole.curves[name].fisher, third.curves[name].fisher
        places = sorted(at[name])
        np.testing.assert_allclose(got[places], true[places], rtol=1e-9)
        for k in set(range(len(widths))) - at[name]:
            a, b = max(p for p in places if p < k), min(p for p in places if p > k)
            share = (widths[a] - widths[k]) / (widths[a] - widths[b])
            np.testing.assert_allclose(got[k], (1 - share) * true[a] + share * true[b], rtol=1e-9)
        assert third.curves[name].distortion.tobytes() == whole.curves[name].distortion.tobytes()
    assert any(len(places) < len(ladders[name]) for name, places in at.items())


def test_both_sides_of_a_removed_block_are_measured() -> None:
    assert distortion._informed((64, 56, 48, 40, 32, 24, 16, 8), 3) == [1, 4, 7]
    assert distortion._informed((64, 56, 48, 40, 32, 0), 3) == [1, 4, 5]
    assert distortion._informed((64, 0), 3) == [1]
    assert distortion._informed((64,), 3) == []


def test_with_eta_zero_nothing_is_perturbed_and_the_distortion_is_the_same_to_the_last_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    toy = ConvToy()
    graph = graph_of(toy.model, toy.groups)
    scores, ladders = random_scores(graph), every_width(graph)
    both = distortion_table(toy.model, toy.task, graph, scores, ladders, ETA, seed=0)

    def never(*_arguments: object, **_named: object) -> None:
        raise AssertionError("the Fisher term was computed")

    monkeypatch.setattr(fisher.Fisher, "__init__", never)
    pure = distortion_table(toy.model, toy.task, graph, scores, ladders, ETA.model_copy(update={"eta": 0.0}), seed=0)
    for group in graph.groups:
        assert pure.values(group.id).tobytes() == both.curves[group.id].distortion.tobytes()
        assert pure.curves[group.id].fisher.shape == (len(ladders[group.id]), 0)
        assert both.values(group.id)[0] == 0.0
        assert (both.values(group.id)[1:] > both.curves[group.id].distortion[1:]).all()


def test_auto_weighs_both_terms_alike() -> None:
    toy = ConvToy()
    graph = graph_of(toy.model, toy.groups)
    config = ETA.model_copy(update={"eta": "auto"})
    table = distortion_table(toy.model, toy.task, graph, random_scores(graph), every_width(graph), config, seed=0)
    damage = np.concatenate([curve.distortion[1:] for curve in table.curves.values()])
    terms = np.concatenate([curve.regulariser("B")[1:] for curve in table.curves.values()])
    assert table.eta * np.median(terms) == pytest.approx(np.median(damage))


def test_a_stopped_measurement_goes_on_with_the_same_noise(tmp_path: Path) -> None:
    toy = ConvToy()
    graph = graph_of(toy.model, toy.groups)
    scores, ladders = random_scores(graph), {g.id: (g.width, 3) for g in graph.groups}
    whole = distortion_table(toy.model, toy.task, graph, scores, ladders, ETA, seed=0, out=tmp_path)
    file = tmp_path / distortion.FILE
    file.write_text("\n".join(file.read_text().splitlines()[:9]) + "\n")
    resumed = distortion_table(toy.model, toy.task, graph, scores, ladders, ETA, seed=0, out=tmp_path)
    for group in graph.groups:
        assert resumed.curves[group.id].fisher.tobytes() == whole.curves[group.id].fisher.tobytes()


# ---------------------------------------------------------------------------------------------------------- errors


def test_code_that_looks_at_values_cannot_be_perturbed() -> None:
    model = Branching("numpy")
    task = loaded(linear_data(), {"only": ["hidden"]})
    graph = graph_of(model, [linear_group("hidden", 6, "out")])
    with pytest.raises(StageError, match=r"expected a network whose forward pass is made of torch operations alone"):
        distortion_table(model, task, graph, random_scores(graph), every_width(graph), ETA, seed=0)


def test_a_network_that_gradients_cannot_pass_is_refused() -> None:
    model, task = awkward()  # it writes over what a layer has read
    graph = graph_of(model, AWKWARD_GROUPS)
    ladders = {group.id: (group.width, 2) for group in graph.groups}
    with pytest.raises(StageError, match=r"expected gradients of the outputs by the branches' outputs; got one of the"):
        distortion_table(model, task, graph, random_scores(graph), ladders, ETA, seed=0)


class Transposed(nn.Module):
    """A branch whose output has the samples last."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(4, 7), nn.Linear(7, 3)
        self.branch = Turn(self.hidden)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.branch(x).t())
        return y


class Turn(nn.Module):
    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        turned: Tensor = self.inner(x).t().contiguous()
        return turned


def test_a_branch_without_samples_in_front_is_refused() -> None:
    model = Transposed()
    task = loaded(linear_data(), {"only": ["branch"]})
    graph = graph_of(model, [linear_group("hidden", 7, "out")])
    with pytest.raises(StageError, match=r"expected the branch of 'only' to give tensors with the samples in front"):
        distortion_table(model, task, graph, random_scores(graph), every_width(graph), ETA, seed=0)


def test_real_surgery_has_the_same_information() -> None:
    toy = ConvToy()
    graph = find_groups(toy.model, samples_of(toy.task, 2), toy.task.branches)
    scores = random_scores(graph)
    table = distortion_table(toy.model, toy.task, graph, scores, {"camera.conv1.weight": (6, 3)}, ETA, seed=0)
    plan = graph.plan({"camera.conv1.weight": best(graph["camera.conv1.weight"], scores, 3)})
    pruned = apply_plan(copy.deepcopy(toy.model), plan).eval()
    expected = by_hooks(pruned, copy.deepcopy(toy.model), toy.task, 7, 2)
    np.testing.assert_allclose(table.curves["camera.conv1.weight"].fisher[1], expected, rtol=1e-6)
