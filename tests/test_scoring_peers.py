"""The peers of AlterMOMA against closed forms, brute force and each other."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fusepress.pipeline.errors import StageError
from fusepress.pipeline.graph.cost import CostModel
from fusepress.pipeline.graph.groups import find_groups
from fusepress.pipeline.graph.plan import Group
from fusepress.pipeline.pruning.allocate import allocate
from fusepress.pipeline.recipe import PruneConfig, ScoreConfig
from fusepress.pipeline.scoring.altermoma import Grouped, weight_masks
from fusepress.pipeline.scoring.criteria import METHODS, score_channels, score_weights
from fusepress.pipeline.scoring.curvature import Curvature, hessian_product
from fusepress.pipeline.scoring.gradients import Passes, mean_gradients, scoring_batches
from fusepress.pipeline.scoring.grasp import grasp_weights, score_grasp
from fusepress.pipeline.scoring.iterative import Put, Rounds, score_in_rounds
from fusepress.pipeline.scoring.masking import untouched
from fusepress.pipeline.scoring.norms import cumulative_shares, score_group_norm
from fusepress.pipeline.scoring.prospr import Order, prospr_weights, score_prospr
from fusepress.pipeline.scoring.result import ScoreResult
from fusepress.pipeline.scoring.sensitivity import score_snip
from fusepress.pipeline.scoring.synflow import Flow
from fusepress.pipeline.task import Batch, LoadedTask
from tests.scoring_toys import ConvToy, NoSecond, ToyGraph, loaded, map_error, state_bytes

FAST = ScoreConfig(method="altermoma", beta=1.0, batches=2, reactivation_batches=2, reactivation_lr=0.02)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def with_method(method: str, **changes: object) -> ScoreConfig:
    return FAST.model_copy(update={"method": method, **changes})


def vectors(toy: ConvToy, config: ScoreConfig, groups: Sequence[Group] | None = None) -> dict[str, np.ndarray]:
    graph = ToyGraph(toy.groups if groups is None else groups)
    return score_channels(toy.model, toy.task, graph, config, seed=0).channel


# LAMP


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=25))
def test_lamp_is_its_double_loop(values: list[int]) -> None:
    squares = [float(value) for value in values]
    found = cumulative_shares(torch.tensor(squares, dtype=torch.float64)).tolist()
    for u, square in enumerate(squares):
        above = [x for v, x in enumerate(squares) if (x, v) >= (square, u)]
        assert found[u] == pytest.approx(square / sum(above) if square else 0.0, rel=1e-12)
    assert max(found) == (1.0 if any(values) else 0.0)


def test_lamp_ranks_by_magnitude_in_a_layer_and_no_layer_can_vanish() -> None:
    toy = ConvToy(dtype=torch.float32)
    scores, _ = score_weights(toy.model, toy.task, with_method("lamp"), seed=0)
    for name, parameter in toy.model.named_parameters():
        flat, magnitude = scores[name].flatten(), parameter.detach().abs().flatten()
        assert float(flat.max()) == 1.0
        assert bool((flat[magnitude.argsort()].diff() >= 0).all())
    kept = weight_masks(scores, 0.95)
    assert all(bool(mask.any()) for mask in kept.values())


def test_lamp_of_channels_is_the_rule_on_group_norms() -> None:
    toy = ConvToy()
    found = vectors(toy, with_method("lamp"))
    for key, norm in brute_force_norms(toy).items():
        above = [sum(x for x in norm if x >= value) for value in norm]
        np.testing.assert_allclose(found[key], norm / np.array(above), rtol=1e-6)
        assert found[key].max() == 1.0


# group norm


def brute_force_norms(toy: ConvToy) -> dict[str, np.ndarray]:
    """Every member, every channel, every index, one at a time."""
    parameters = dict(toy.model.named_parameters())
    norms = {}
    for group in toy.groups:
        norm = np.zeros(group.width)
        for member in group.members:
            if member.param in parameters and not member.param.endswith("bias"):
                tensor = parameters[member.param].detach().numpy()
                for channel in range(group.width):
                    for index in member.indices([channel]):
                        norm[channel] += np.square(np.take(tensor, index, axis=member.dim)).sum()
        norms[group.id] = norm
    return norms


def test_group_norm_is_its_loop_over_members_over_the_mean() -> None:
    toy = ConvToy()
    found = vectors(toy, with_method("group_norm"))
    for key, norm in brute_force_norms(toy).items():
        np.testing.assert_allclose(found[key], norm / norm.mean(), rtol=1e-6)
    summed = score_group_norm(
        toy.model, toy.task, ToyGraph(toy.groups), with_method("group_norm"), seed=0, reduction="sum"
    )
    for key, vector in summed.channel.items():
        np.testing.assert_allclose(vector, found[key], rtol=1e-6)  # the division by the mean cancels the reduction


def test_group_norm_feels_consumers_and_scales_but_no_biases_and_no_buffers() -> None:
    toy = ConvToy()
    before = vectors(toy, with_method("group_norm"))["camera.conv1.weight"]
    state = toy.model.state_dict()
    state["camera.norm1.bias"][1] += 9.0
    state["camera.norm1.running_var"][1] += 9.0
    assert vectors(toy, with_method("group_norm"))["camera.conv1.weight"].tobytes() == before.tobytes()
    state["camera.norm1.weight"][1] += 9.0
    scaled = vectors(toy, with_method("group_norm"))["camera.conv1.weight"]
    assert scaled.argmax() == 1
    state["camera.conv2.weight"][:, 2] += 9.0
    assert vectors(toy, with_method("group_norm"))["camera.conv1.weight"].argmax() == 2


def test_group_norm_of_weights_is_the_square_over_its_layers_mean() -> None:
    toy = ConvToy()
    scores, _ = score_weights(toy.model, toy.task, with_method("group_norm"), seed=0)
    for name, parameter in toy.model.named_parameters():
        square = parameter.detach().square()
        torch.testing.assert_close(scores[name], square / square.mean())


# SNIP and Taylor


def one_branch(toy: ConvToy) -> ConvToy:
    """The same model with everything in one branch, so that AlterMOMA normalises over the whole model."""
    toy.task = loaded(toy.task.user.data, {"all": [""]}, toy.losses)
    return toy


def test_snip_is_altermoma_without_beta_where_there_is_one_branch() -> None:
    toy = one_branch(ConvToy())
    snip, _ = score_weights(toy.model, toy.task, with_method("snip"), seed=0)
    deci, _ = score_weights(toy.model, toy.task, with_method("altermoma", beta=0.0), seed=0)
    for name, value in snip.items():
        torch.testing.assert_close(value, deci[name], rtol=1e-12, atol=0)
    for ratio in (0.5, 0.9):
        ours, theirs = weight_masks(snip, ratio), weight_masks(deci, ratio)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    groups = [dataclasses.replace(group, branch="all") for group in toy.groups]
    found = vectors(toy, with_method("snip"), groups)
    expected = vectors(toy, with_method("altermoma", beta=0.0), groups)
    for key, vector in found.items():
        np.testing.assert_allclose(vector, expected[key], rtol=1e-6)
    assert sum(float(vector.sum()) for vector in found.values()) == pytest.approx(1.0)


def test_snip_with_several_branches_ranks_each_branch_as_altermoma_without_beta() -> None:
    toy = ConvToy()
    snip, _ = score_weights(toy.model, toy.task, with_method("snip"), seed=0)
    deci, _ = score_weights(toy.model, toy.task, with_method("altermoma", beta=0.0), seed=0)
    for branch in ("camera.", "lidar."):
        names = [name for name in snip if name.startswith(branch)]
        ours, theirs = (torch.cat([s[name].flatten() for name in names]) for s in (snip, deci))
        assert torch.equal(ours.argsort(), theirs.argsort())


def test_taylor_of_weights_is_the_mean_square_over_mini_batches() -> None:
    toy = ConvToy()
    scores, log = score_weights(toy.model, toy.task, with_method("taylor"), seed=0)
    toy.model.eval()
    expected: dict[str, Tensor] = {}
    for batch in toy.task.user.data[:2]:
        toy.model.zero_grad(set_to_none=True)
        torch.stack(list(toy.losses(toy.model(**batch.inputs), batch).values())).sum().backward()
        for name, p in toy.model.named_parameters():
            assert p.grad is not None
            square = (p.detach() * p.grad).square() / 2
            expected[name] = expected[name] + square if name in expected else square
    for name, value in expected.items():
        torch.testing.assert_close(scores[name], value, rtol=1e-10, atol=1e-18)
    assert log["passes"] == 2


# magnitude


def test_magnitude_of_weights_is_their_absolute_value() -> None:
    toy = ConvToy()
    scores, _ = score_weights(toy.model, toy.task, with_method("magnitude"), seed=0)
    for name, parameter in toy.model.named_parameters():
        assert torch.equal(scores[name], parameter.detach().abs())


# GraSP


class Quadratic(nn.Module):
    """Returns its parameter; the loss makes it half of theta^T A theta."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(values, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight + 0.0 * x.sum()


def quadratic(matrix: Tensor, *values: float) -> tuple[Quadratic, LoadedTask]:
    def losses(theta: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {"quadratic": 0.5 * theta @ matrix @ theta}

    data = [Batch(inputs={"x": torch.zeros(2, 1, dtype=torch.float64)}) for _ in range(2)]
    return Quadratic(*values), loaded(data, {"all": [""]}, lambda outputs, batch: losses(first_tensor(outputs), batch))


def first_tensor(outputs: object) -> Tensor:
    value = next(iter(outputs.values())) if isinstance(outputs, dict) else outputs
    assert isinstance(value, Tensor)
    return value


MATRIX = torch.tensor([[3.0, 0.5, 0.1], [0.5, 1.0, -0.4], [0.1, -0.4, 2.0]], dtype=torch.float64)


@pytest.mark.parametrize("curvature", ["exact", "difference"])
def test_grasp_on_a_quadratic_is_theta_times_a_a_theta(curvature: Curvature) -> None:
    model, task = quadratic(MATRIX, 1.0, -2.0, 0.7)
    theta = model.weight.detach().clone()
    before = state_bytes(model)
    scores, log = grasp_weights(model, task, with_method("grasp"), seed=0, curvature=curvature)
    papers = -theta * (MATRIX @ MATRIX @ theta)  # the highest of these are removed, the highest of ours are kept
    torch.testing.assert_close(scores["weight"], -papers / papers.abs().sum(), rtol=1e-7, atol=1e-9)
    assert bool((scores["weight"] > 0).any())
    assert log["curvature"] == curvature
    assert log["passes"] == (8 if curvature == "exact" else 6)  # n + n * 3, n + n * 2
    assert state_bytes(model) == before


def test_grasp_is_how_the_gradients_norm_changes() -> None:
    model, task = quadratic(MATRIX, 1.0, -2.0, 0.7)
    theta, small = model.weight.detach().clone(), 1e-6
    scores, _ = grasp_weights(model, task, with_method("grasp"), seed=0)
    change = []
    for index in range(3):
        moved = theta.clone()
        moved[index] *= 1 - small  # a little of a removal
        change.append(float((MATRIX @ moved).square().sum() - (MATRIX @ theta).square().sum()) / small)
    expected = torch.tensor(change, dtype=torch.float64).neg()
    torch.testing.assert_close(scores["weight"], expected / expected.abs().sum(), rtol=1e-4, atol=1e-6)


def test_grasp_of_channels_is_the_curvature_of_a_real_gate() -> None:
    toy = ConvToy()
    exact = score_grasp(toy.model, toy.task, ToyGraph(toy.groups), with_method("grasp"), seed=0)
    close = score_grasp(toy.model, toy.task, ToyGraph(toy.groups), with_method("grasp"), seed=0, curvature="difference")
    assert exact.log["curvature"] == "exact"
    assert any((vector < 0).any() for vector in exact.channel.values())
    for key, vector in exact.channel.items():
        np.testing.assert_allclose(close.channel[key], vector, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_a_hessian_product_taken_batch_by_batch_adds_up_to_the_whole(dtype: torch.dtype, rtol: float) -> None:
    toy = ConvToy(dtype=dtype)
    taken: list[list[Tensor]] = []
    with untouched(toy.model):
        data = scoring_batches(toy.task, 0, 3)
        mean_gradients(toy.model, toy.task, data, Passes(total=1), "test")
        vector = {p: p.grad for p in toy.model.parameters() if p.grad is not None}

        def product(take: Callable[[], None] | None) -> None:
            assert hessian_product(toy.model, toy.task, data, vector, Passes(total=1), "test", take=take) == "exact"

        product(None)
        whole = [p.grad for p in vector if p.grad is not None]
        product(lambda: taken.append([p.grad for p in vector if p.grad is not None]))
        assert not any(p.grad is not None for p in vector)
    assert len(taken) == len(data)
    for value, *parts in zip(whole, *taken, strict=True):
        torch.testing.assert_close(
            torch.stack(parts).sum(dim=0), value, rtol=rtol, atol=rtol * float(value.abs().max())
        )


class Doubling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = NoSecond.apply(self.weight).square() + 0.0 * x.sum()  # type: ignore[no-untyped-call]
        return out


def test_grasp_falls_back_to_differences_where_an_operator_has_no_second_derivative() -> None:
    model = Doubling()
    data = [Batch(inputs={"x": torch.zeros(1, 1, dtype=torch.float64)})]
    task = loaded(data, {"all": [""]}, lambda outputs, _: {"sum": first_tensor(outputs).sum()})
    scores, log = grasp_weights(model, task, with_method("grasp", batches=1), seed=0)
    assert log["curvature"] == "difference"
    expected = model.weight.detach() * 8.0 * (8.0 * model.weight.detach())  # L = 4 w^2, g = 8 w, H = 8
    torch.testing.assert_close(scores["weight"], expected / expected.abs().sum(), rtol=1e-7, atol=1e-9)


# ProsPr


def test_prospr_without_steps_is_snip_exactly() -> None:
    toy = ConvToy()
    config = with_method("prospr", reactivation_batches=0)
    for order in ("first_order", "full"):
        scores, log = prospr_weights(toy.model, toy.task, config, seed=0, order=order)
        snip, _ = score_weights(toy.model, toy.task, with_method("snip"), seed=0)
        assert all(torch.equal(scores[name], snip[name]) for name in snip)
        assert log["passes"] == 2
        found = score_prospr(toy.model, toy.task, ToyGraph(toy.groups), config, seed=0, order=order).channel
        expected = vectors(toy, with_method("snip"))
        assert all(found[key].tobytes() == expected[key].tobytes() for key in expected)


@pytest.mark.parametrize("order", ["first_order", "full"])
def test_prospr_at_rate_zero_is_snip_on_the_last_batch(order: Order) -> None:
    toy = ConvToy()
    config = with_method("prospr", reactivation_batches=3, batches=1)
    scores, log = prospr_weights(toy.model, toy.task, config, seed=0, order=order, lr=0.0)
    assert log["passes"] == (4 if order == "first_order" else 4 + 3 * 3)
    toy.task.user.data = toy.task.user.data[3:]
    snip, _ = score_weights(toy.model, toy.task, with_method("snip", batches=1), seed=0)
    assert all(torch.equal(scores[name], snip[name]) for name in snip)


def test_prospr_in_full_is_the_derivative_through_the_unrolled_steps() -> None:
    toy = ConvToy()
    toy.model.eval()
    rate, steps, data = 0.02, 3, toy.task.user.data
    theta = {name: p.detach().clone() for name, p in toy.model.named_parameters()}
    mask = {name: torch.ones_like(value, requires_grad=True) for name, value in theta.items()}

    def loss(now: dict[str, Tensor], batch: Batch) -> Tensor:
        outputs = torch.func.functional_call(toy.model, now, args=(), kwargs=batch.inputs)
        return torch.stack(list(toy.losses(outputs, batch).values())).sum()

    now = {name: mask[name] * value for name, value in theta.items()}
    for batch in data[:steps]:
        slopes = torch.autograd.grad(loss(now, batch), list(now.values()), create_graph=True)
        now = {name: value - rate * slope for (name, value), slope in zip(now.items(), slopes, strict=True)}
    by_mask = torch.autograd.grad(loss(now, data[steps]), list(mask.values()))
    expected = {name: slope.abs() for name, slope in zip(mask, by_mask, strict=True)}
    total = torch.stack([value.sum() for value in expected.values()]).sum()
    config = with_method("prospr", reactivation_batches=steps, reactivation_lr=rate, batches=1)
    before = state_bytes(toy.model)
    full, _ = prospr_weights(toy.model, toy.task, config, seed=0, order="full")
    assert state_bytes(toy.model) == before
    for name, value in full.items():
        torch.testing.assert_close(value, expected[name] / total, rtol=1e-8, atol=1e-14)
    first, _ = prospr_weights(toy.model, toy.task, config, seed=0)
    assert any(not torch.allclose(first[name], full[name], rtol=1e-3) for name in full)


def test_prospr_goes_round_frozen_parameters() -> None:
    toy = ConvToy()
    for name, parameter in toy.model.named_parameters():
        parameter.requires_grad_(name.startswith("fuse"))
    config = with_method("prospr", reactivation_batches=2)
    scores, _ = prospr_weights(toy.model, toy.task, config, seed=0, order="full")
    assert all(bool(value.any()) for value in scores.values())  # scored all the same
    assert {n for n, p in toy.model.named_parameters() if p.requires_grad} == {"fuse.weight", "fuse.bias"}


# SynFlow


class Plain(nn.Module):
    """Convolution, norm, pooling, linear layers with biases: one path."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.pool = nn.MaxPool2d(2)
        self.second = nn.Conv2d(4, 3, 3, padding=1)
        self.layer_norm = nn.LayerNorm(12)
        self.middle = nn.Linear(12, 5)
        self.last = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        flat = self.second(self.pool(torch.relu(self.norm(self.conv(x))))).flatten(1)
        out: Tensor = self.last(torch.relu(self.middle(self.layer_norm(flat))))
        return out


def plain() -> tuple[Plain, LoadedTask]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Plain()
        with torch.no_grad():
            for norm in (model.norm, model.layer_norm):
                norm.weight.uniform_(-1.0, 1.0)
                norm.bias.uniform_(-1.0, 1.0)
            assert model.norm.running_var is not None
            model.norm.running_var.uniform_(0.5, 2.0)
        data = [Batch(inputs={"x": torch.randn(2, 2, 4, 4)}, targets={"y": torch.randn(2, 2)})]
    return model, loaded(data, {"all": [""]})


def test_synflow_passes_the_same_flow_through_every_layer() -> None:
    model, task = plain()
    before = state_bytes(model)
    flow = Flow(model=model, task=task, seed=0, passes=Passes(total=1))
    sums: dict[str, float] = {}
    with flow.ready():
        flow.measure(lambda name, value, slope: sums.__setitem__(name, float((value * slope).sum())))
    assert state_bytes(model) == before
    assert model.training
    weights = {name: value for name, value in sums.items() if not name.endswith("bias")}
    assert set(weights) == {f"{n}.weight" for n in ("conv", "norm", "second", "layer_norm", "middle", "last")}
    assert list(weights.values()) == pytest.approx([1.0] * 6, rel=1e-12)
    assert {value for name, value in sums.items() if name.endswith("bias")} == {0.0}
    assert flow.totals[0] == pytest.approx(brute_force_flow(model), rel=1e-12)


def brute_force_flow(model: Plain) -> float:
    """The same network, built again by hand with absolute weights and without anything that is added."""
    with torch.no_grad():
        x = torch.ones(1, 2, 4, 4, dtype=torch.float64)
        x = nn.functional.conv2d(x, model.conv.weight.double().abs(), padding=1)
        assert model.norm.running_var is not None
        scale = model.norm.weight.double().abs() / (model.norm.running_var.double() + model.norm.eps).sqrt()
        x = nn.functional.max_pool2d(x * scale.view(1, -1, 1, 1), 2)
        x = nn.functional.conv2d(x, model.second.weight.double().abs(), padding=1).flatten(1)
        x = (x * model.layer_norm.weight.double().abs()) @ model.middle.weight.double().abs().T
        return float((x @ model.last.weight.double().abs().T).sum())


def test_synflow_is_the_same_whether_values_are_held_or_made_for_every_use() -> None:
    model, task = plain()
    found: list[dict[str, Tensor]] = []
    for hold in (False, True):
        flow = Flow(model=model, task=task, seed=0, passes=Passes(total=1), hold=hold)
        notes: dict[str, Tensor] = {}
        with flow.ready():
            flow.measure(lambda name, value, slope, notes=notes: notes.update({name: value * slope}))  # type: ignore[misc]
        found.append(notes)
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-12, atol=0.0)


def test_synflow_of_channels_conserves_the_flow_too() -> None:
    toy = ConvToy(dtype=torch.float32)
    one = score_channels(toy.model, toy.task, ToyGraph(toy.groups), with_method("synflow", rounds=2), seed=0)
    flow = Flow(model=toy.model, task=toy.task, seed=0, passes=Passes(total=1))
    products: dict[str, Tensor] = {}
    with flow.ready():
        flow.measure(lambda name, value, slope: products.__setitem__(name, value * slope))
    shared = {name: float(products[name].sum()) for name in ("fuse.weight", "head.weight")}
    assert list(shared.values()) == pytest.approx([1.0, 1.0], rel=1e-12)
    # both branches feed the fusion, and a stream's gates are its two norms: together they carry all of it
    stream = [products[f"{b}.{n}.weight"].sum() for b in toy.modalities for n in ("stem_norm", "norm2")]
    inner = [products[f"{b}.norm1.weight"].sum() for b in toy.modalities]
    assert float(sum(inner, torch.zeros(()))) < 1.0  # the residual path goes past it
    assert float(sum(stream, torch.zeros(()))) > 1.0  # what enters the stream first is counted at both of its norms
    assert one.log["passes"] == 2
    assert one.log["flow"][0] > one.log["flow"][1] > 0


def test_synflow_needs_no_data_but_shapes() -> None:
    toy = ConvToy(dtype=torch.float32)
    config = with_method("synflow", rounds=4)
    first, log = score_weights(toy.model, toy.task, config, seed=0)
    toy.task.user.data = [b.with_inputs(**{n: 5 * v - 1 for n, v in b.inputs.items()}) for b in toy.task.user.data]
    second, _ = score_weights(toy.model, toy.task, config, seed=3)
    assert all(torch.equal(first[name], second[name]) for name in first)
    total = sum(value.numel() for value in first.values())
    assert log["scored"] == [total, *(round(total * 0.1 ** (r / 3)) for r in (1, 2, 3))]


def test_synflow_takes_a_hundred_rounds_unless_told() -> None:
    model, task = plain()
    _, log = score_weights(model, task, with_method("synflow"), seed=0)
    assert log["passes"] == len(log["scored"]) == 100


class Casting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x.float())
        return out


def test_synflow_says_when_a_model_cannot_run_in_float64() -> None:
    task = loaded([Batch(inputs={"x": torch.ones(1, 2)}, targets={"y": torch.ones(1, 2)})], {"all": [""]})
    with pytest.raises(
        StageError, match=r"expected the model to run in float64 for SynFlow; got .*use x\.to\(y\.dtype"
    ):
        score_weights(Casting(), task, with_method("synflow"), seed=0)


# rounds


def test_rounds_change_nothing_where_scores_do_not_change() -> None:
    toy = ConvToy(dtype=torch.float32)
    one, many = (vectors(toy, with_method("random", rounds=rounds)) for rounds in (1, 4))
    assert all(one[key].tobytes() == many[key].tobytes() for key in one)
    for method in ("random", "magnitude"):
        plain_scores, _ = score_weights(toy.model, toy.task, with_method(method), seed=0)
        in_rounds, log = score_weights(toy.model, toy.task, with_method(method, rounds=5), seed=0)
        assert all(torch.equal(plain_scores[name], in_rounds[name]) for name in plain_scores)
        assert len(log["rounds"]) == 5


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(2, 40),
    st.integers(0, 1000),
    st.sampled_from([0.0, -3.0]),
    st.sampled_from([1.0, 1e-6, 1e6]),
)
def test_whoever_goes_earlier_ranks_lower(rounds: int, units: int, seed: int, low: float, scale: float) -> None:
    generator = np.random.default_rng(seed)
    drawn = [torch.from_numpy((generator.random(units) + low) * scale ** (r % 2)) for r in range(rounds)]
    least = units // 5
    parts = {"a": (least, min(least, 2)), "b": (units - least, 1)}
    plan = Rounds(least=parts, rounds=rounds, left=0.3, like=drawn[0])
    history: list[Tensor] = []

    def score(number: int, put: Put) -> None:
        put("a", drawn[number][:least])
        put("b", drawn[number][least:])

    found, counts = plan.run(score, lambda alive, _: history.append(torch.cat([alive["a"], alive["b"]])))
    result = torch.cat([found["a"], found["b"]])
    assert len(history) == rounds - 1
    previous = torch.ones(units, dtype=torch.bool)
    single = result.float()
    for number, alive in enumerate(history):
        assert not bool((alive & ~previous).any())  # nested
        went = previous & ~alive
        if bool(went.any()) and bool(alive.any()):
            assert float(single[went].max()) < float(single[alive].min())
        survivors = drawn[number]
        if bool(went.any()):
            shift = result[went] - survivors[went]
            torch.testing.assert_close(shift, shift[:1].expand_as(shift), rtol=1e-6, atol=1e-6 * scale)
        assert int(alive[:least].sum()) >= min(least, 2)
        assert int(alive[least:].sum()) >= 1
        assert counts[number + 1] == int(alive.sum())
        previous = alive
    if low == 0.0:
        assert bool((result >= 0).all())


def test_rounds_score_the_gated_model_and_put_it_back() -> None:
    toy = ConvToy(dtype=torch.float32)
    toy.model.get_parameter("fuse.bias").requires_grad_(False)
    before = state_bytes(toy.model)
    seen: list[dict[str, Tensor]] = []
    frozen: list[bool] = []

    def method(model: nn.Module, task: LoadedTask, graph: Grouped, config: ScoreConfig, **keywords: Any) -> ScoreResult:
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        frozen.append(not model.get_parameter("fuse.bias").requires_grad)
        return score_snip(model, task, graph, config, **keywords)

    config = with_method("snip", rounds=3)
    result = score_in_rounds(method, toy.model, toy.task, ToyGraph(toy.groups), config, seed=0)
    assert state_bytes(toy.model) == before
    assert all(frozen)
    assert not toy.model.get_parameter("fuse.bias").requires_grad
    assert result.log["passes"] == 6
    assert [entry["scored"] for entry in result.log["rounds"]] == [29, 21, 14]
    gone = (seen[2]["camera.norm1.weight"] == 0) & (seen[0]["camera.norm1.weight"] != 0)
    assert bool(gone.any())
    assert not seen[2]["camera.conv1.weight"][gone].any()
    assert not seen[2]["camera.norm1.bias"][gone].any()
    assert not seen[2]["camera.conv2.weight"][:, gone].any()
    kept = result.channel["camera.conv1.weight"]
    assert kept[gone.numpy()].max() < kept[~gone.numpy()].min()


# IMP


def test_imp_in_one_round_is_one_shot_magnitude() -> None:
    toy = ConvToy(dtype=torch.float32)
    scores, log = score_weights(toy.model, toy.task, with_method("imp"), seed=0)
    flat = torch.cat([value.flatten() for value in scores.values()])
    theta = torch.cat([p.detach().abs().flatten() for p in toy.model.parameters()])
    for count in (7, 100, 500):
        assert set(flat.topk(count).indices.tolist()) == set(theta.topk(count).indices.tolist())
    assert log["passes"] == 0
    imp, magnitude = vectors(toy, with_method("imp")), vectors(toy, with_method("magnitude"))
    assert all(imp[key].tobytes() == magnitude[key].tobytes() for key in imp)


def test_imp_trains_between_rounds_under_nested_masks() -> None:
    toy = ConvToy(dtype=torch.float32)
    before = state_bytes(toy.model)
    config = with_method("imp", rounds=4, reactivation_batches=3, reactivation_lr=0.05)
    zeros: list[int] = []

    def counting(outputs: Any, batch: Batch) -> dict[str, Tensor]:
        zeros.append(sum(int((p == 0).sum()) for p in toy.model.parameters()))
        return map_error(outputs, batch)

    toy.task.user.losses = counting
    scores, log = score_weights(toy.model, toy.task, config, seed=0)
    assert state_bytes(toy.model) == before
    assert log["passes"] == 3 * 3
    counts = [entry["scored"] for entry in log["rounds"]]
    total = sum(p.numel() for p in toy.model.parameters())
    assert counts == [total, *(round(total * 0.1 ** (r / 3)) for r in (1, 2, 3))]
    one_shot, _ = score_weights(toy.model, toy.task, with_method("magnitude"), seed=0)
    trained = [name for name in scores if not torch.equal(scores[name], one_shot[name])]
    assert len(trained) > 5
    first_gone = weight_masks(one_shot, 1 - counts[1] / total)
    ours = weight_masks(scores, 1 - counts[1] / total)
    assert all(torch.equal(ours[name], first_gone[name]) for name in ours)  # the first round is that of the dense model
    assert zeros == [total - count for count in counts[1:] for _ in range(3)]  # held through every step
    channels = score_channels(toy.model, toy.task, ToyGraph(toy.groups), config, seed=0)
    assert state_bytes(toy.model) == before
    assert channels.log["passes"] == 9
    assert channels.log["method"] == "imp"


# all of them


SCALED = ("altermoma", "grasp", "snip", "taylor", "prospr")


@pytest.mark.parametrize("method", SCALED)
def test_the_scale_of_the_loss_does_not_change_the_ranking(method: str) -> None:
    toy = ConvToy()
    config = with_method(method, reactivation_batches=2)
    first = vectors(toy, config)
    losses = toy.losses
    toy.task = loaded(
        toy.task.user.data,
        toy.task.branches,
        lambda outputs, batch: {name: 64.0 * value for name, value in losses(outputs, batch).items()},
    )
    # a step must stay the same step
    second = vectors(toy, config.model_copy(update={"reactivation_lr": config.reactivation_lr / 64.0}))
    for key, vector in first.items():
        assert np.array_equal(vector.argsort(), second[key].argsort())
        if method != "taylor":
            np.testing.assert_allclose(second[key], vector, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("rounds", [1, 3])
def test_every_ranking_can_be_allocated(method: str, rounds: int) -> None:
    toy = ConvToy(dtype=torch.float32)
    batch = toy.task.user.data[0]
    graph = find_groups(toy.model, batch.inputs, toy.task.branches, ["head"])
    config = with_method(method, rounds=rounds)
    result = score_channels(toy.model, toy.task, graph, config, seed=0)
    cost = CostModel(graph, toy.model, batch.inputs)
    plan = allocate(result.channel, graph, cost, PruneConfig(macs=0.6, min_channels=1), align=1)
    assert 0.3 < plan.achieved <= 0.6
    assert all(len(plan.kept[key]) == width for key, width in plan.widths.items())
    for group in graph.groups:
        kept, vector = plan.kept[group.id], result.channel[group.id]
        left = np.setdiff1d(np.arange(group.width), kept)
        if group.multiple == 1 and len(left):
            assert vector[kept].min() >= vector[left].max()


@pytest.mark.parametrize("method", ["snip", "taylor", "grasp", "prospr", "imp"])
def test_data_methods_follow_the_seed_of_the_batches(method: str) -> None:
    toy = ConvToy()

    class Seeded:
        data, losses = toy.task.user.data, staticmethod(toy.losses)

        def batches(self, split: str, seed: int, *, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
            return iter(itertools.islice(itertools.cycle(self.data), start + seed, start + seed + 50))

    toy.task = dataclasses.replace(toy.task, user=Seeded())
    config = with_method(method, rounds=2)
    graph = ToyGraph(toy.groups)
    runs = [score_channels(toy.model, toy.task, graph, config, seed=seed).channel for seed in (0, 0, 1)]
    assert all(runs[0][key].tobytes() == runs[1][key].tobytes() for key in runs[0])
    assert any(runs[0][key].tobytes() != runs[2][key].tobytes() for key in runs[0])
