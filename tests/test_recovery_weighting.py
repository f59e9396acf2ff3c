"""Weights of losses: fixed, by uncertainty, by gradient norms (pipeline/recovery/weighting.py)."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusepress.pipeline.errors import TaskError
from fusepress.pipeline.recipe import FinetuneConfig
from fusepress.pipeline.recovery.objective import Objective
from fusepress.pipeline.recovery.precision import Amp
from fusepress.pipeline.recovery.weighting import (
    Fixed,
    GradNorm,
    Uncertainty,
    Weighting,
    make_weighting,
    shared_parameters,
)
from fusepress.pipeline.task import LoadedTask, load_task

WHERE = "Toy.losses"


@pytest.fixture
def task() -> LoadedTask:
    return load_task("recovery_toy.py:Toy", base=Path(__file__).parent)


def student_of(task: LoadedTask) -> Any:
    return sys.modules[type(task.user).__module__].models()[0]


def constants(**values: float) -> dict[str, Tensor]:
    return {name: torch.tensor(value) for name, value in values.items()}


# --- fixed --------------------------------------------------------------------------------------------------------


def test_fixed_without_factors_is_the_plain_sum_to_the_bit() -> None:
    losses = {f"l{k}": torch.rand(()) for k in range(7)}
    plain = torch.stack([loss.float().reshape(()) for loss in losses.values()]).sum()
    assert torch.equal(Fixed({}, WHERE).total(losses), plain)


def test_fixed_factors_weigh_task_and_distillation() -> None:
    weighting = Fixed({"boxes": 0.5, "distill.boxes": 0.0}, WHERE)
    losses = {"seg": 1.0, "boxes": 4.0, "distill.boxes": 100.0}
    assert float(weighting.total(constants(**losses))) == 3.0
    weighting.update()
    assert weighting.weights == {}
    assert weighting.state() == {}


def test_a_factor_of_no_loss_is_refused() -> None:
    with pytest.raises(TaskError, match=r"loss_weights to name losses, \['seg'\]; got 'sag'; .* from Toy\.losses"):
        Fixed({"sag": 1.0}, WHERE).total(constants(seg=1.0))


# --- uncertainty --------------------------------------------------------------------------------------------------


def test_uncertainty_rests_where_its_closed_form_is_least() -> None:
    weighting = Uncertainty(WHERE)
    losses = constants(seg=0.2, boxes=5.0, depth=2.0)
    assert float(weighting.total(losses)) == pytest.approx(7.2), "all weights start at one"
    weighting.update()
    for _ in range(1000):
        weighting.total(losses)
        weighting.update()
    # d/ds (exp(-s) L + s) = 0 at s = log L
    assert weighting.weights == {name: pytest.approx(1 / float(loss), rel=1e-3) for name, loss in losses.items()}
    assert float(weighting.total(losses)) == pytest.approx(3.0, rel=1e-3)


def test_the_slope_of_uncertainty_is_that_of_its_loss() -> None:
    weighting = Uncertainty(WHERE)
    losses = constants(seg=0.2, boxes=5.0)
    s = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([s], lr=0.025)
    for _ in range(30):
        weighting.total(losses)
        weighting.update()
        adam.zero_grad()
        (torch.exp(-s) * torch.stack(list(losses.values())) + s).sum().backward()
        adam.step()
    assert list(weighting.weights.values()) == pytest.approx(torch.exp(-s).tolist(), rel=1e-6)


# --- gradnorm -----------------------------------------------------------------------------------------------------


def two_quadratics(steepness: tuple[float, float], theta: nn.Parameter) -> dict[str, Tensor]:
    """Two tasks that each want another place of the same parameters."""
    wanted = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    return {f"task{k}": 0.5 * steepness[k] * (theta - wanted[k]).square().sum() for k in range(2)}


def test_gradnorm_rests_where_the_norms_of_the_gradients_are_equal() -> None:
    theta = nn.Parameter(torch.zeros(2))
    weighting = GradNorm([theta], alpha=1.5, every=1, where=WHERE)
    for _ in range(300):
        weighting.total(two_quadratics((1.0, 8.0), theta))
        weighting.update()
    # the parameters stand still, so both losses are at the same share of their first value: w_i g_i are equal,
    # g = (1 * 3, 8 * 2), and the weights sum to two
    norms = (3.0, 16.0)
    expected = [2 * (1 / g) / sum(1 / h for h in norms) for g in norms]
    assert list(weighting.weights.values()) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_gradnorm_favours_the_loss_that_lags_behind_as_the_paper_says(alpha: float) -> None:
    theta = nn.Parameter(torch.zeros(2))
    weighting = GradNorm([theta], alpha=alpha, every=1, where=WHERE)
    weighting.total(two_quadratics((1.0, 1.0), theta))
    weighting.update()
    with torch.no_grad():
        theta.copy_(torch.tensor([2.0, 0.0]))
    for _ in range(400):
        weighting.total(two_quadratics((1.0, 1.0), theta))
        weighting.update()
    progress = [0.5 / 4.5, 4.0 / 2.0]
    norm = [w * g for w, g in zip(weighting.weights.values(), (1.0, math.sqrt(8)), strict=True)]
    goal = [sum(norm) / 2 * (2 * p / sum(progress)) ** alpha for p in progress]
    gaps = [abs(x - y) / y for x, y in zip(norm, goal, strict=True)]
    assert min(gaps) < 0.05
    assert max(gaps) < 0.05 or alpha == 0.5, "the goals sum to the norms only for alpha 0 and 1"


def test_training_under_gradnorm_ends_with_balanced_norms() -> None:
    theta = nn.Parameter(torch.zeros(2))
    weighting = GradNorm([theta], alpha=0.0, every=1, where=WHERE)
    sgd = torch.optim.SGD([theta], lr=0.002)
    for _ in range(300):
        sgd.zero_grad()
        weighting.total(two_quadratics((1.0, 40.0), theta)).backward()
        sgd.step()
        weighting.update()
    norms = [float(torch.autograd.grad(loss, theta)[0].norm()) for loss in two_quadratics((1.0, 40.0), theta).values()]
    weights = list(weighting.weights.values())
    assert sum(weights) == pytest.approx(2)
    assert weights[0] * norms[0] == pytest.approx(weights[1] * norms[1], rel=0.1)
    assert norms[1] > 3 * norms[0], "without weights one task would rule"


def test_gradnorm_looks_every_so_many_steps_and_leaves_the_gradient_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    theta = nn.Parameter(torch.zeros(2))
    weighting = GradNorm([theta], alpha=1.0, every=4, where=WHERE)
    changes: list[bool] = []
    for _ in range(9):
        before = weighting.weights
        theta.grad = None
        weighting.total(two_quadratics((1.0, 8.0), theta)).backward()
        weights = before or {"task0": 1.0, "task1": 1.0}
        plain = two_quadratics((1.0, 8.0), theta)
        expected = torch.autograd.grad(sum(weights[n] * x for n, x in plain.items()), theta)[0]  # type: ignore[arg-type]
        assert theta.grad is not None
        torch.testing.assert_close(theta.grad, expected)
        weighting.update()
        changes.append(weighting.weights != weights)
    assert changes == [step % 4 == 0 for step in range(9)]


def test_accumulated_batches_count_by_their_share() -> None:
    theta = nn.Parameter(torch.zeros(2))
    whole, parts = (GradNorm([theta], alpha=1.0, every=1, where=WHERE) for _ in range(2))
    for step in range(5):
        losses = [two_quadratics((1.0 + step, 8.0), theta), two_quadratics((5.0, 2.0), theta)]
        whole.total({name: 0.75 * losses[0][name] + 0.25 * losses[1][name] for name in losses[0]})
        for share, part in zip((0.75, 0.25), losses, strict=True):
            parts.total(part, share)
        whole.update()
        parts.update()
    assert list(parts.weights.values()) == pytest.approx(list(whole.weights.values()), rel=1e-6)
    assert list(parts.weights.values()) != [1.0, 1.0]


def test_ranks_learn_from_the_mean_of_all_of_them() -> None:
    theta = nn.Parameter(torch.zeros(2))
    mine, theirs = two_quadratics((1.0, 8.0), theta), two_quadratics((3.0, 2.0), theta)
    both = GradNorm([theta], alpha=1.0, every=1, where=WHERE)
    both.total({name: 0.5 * (mine[name] + theirs[name]) for name in mine})
    both.update()
    slopes = [torch.autograd.grad(loss, theta, retain_graph=True)[0].double() for loss in theirs.values()]
    other = iter([*slopes, torch.stack([loss.detach().double() for loss in theirs.values()])])
    rank = GradNorm([theta], alpha=1.0, every=1, where=WHERE)
    rank.total(mine, 0.5)
    rank.update(lambda value: value + 0.5 * next(other))
    assert rank.weights == pytest.approx(both.weights)


def test_small_gradients_do_not_vanish_in_float16() -> None:
    """A loss over many outputs has gradients below the smallest float16 of each of them."""
    torch.manual_seed(0)
    x, shared = torch.randn(64, 32), nn.Linear(32, 32)
    heads = {"many": nn.Linear(32, 4096), "one": nn.Linear(32, 1)}

    def weights(half: bool, scale: float) -> dict[str, float]:
        weighting = GradNorm([shared.get_parameter("weight")], alpha=0.0, every=1, where=WHERE)
        for _ in range(5):
            with torch.autocast("cpu", torch.float16, enabled=half):
                outputs = {name: head(torch.relu(shared(x))) for name, head in heads.items()}
            losses = {name: 1e-3 * value.float().square().mean() for name, value in outputs.items()}
            weighting.total(losses, 1.0, scale)
            weighting.update()
        return weighting.weights

    exact = weights(half=False, scale=1.0)
    assert weights(half=False, scale=2.0**16) == pytest.approx(exact)
    assert weights(half=True, scale=2.0**16) == pytest.approx(exact, rel=1e-3)
    assert abs(weights(half=True, scale=1.0)["many"] - exact["many"]) > 0.02  # what the scale is for


@pytest.mark.parametrize(("kind", "scale"), [("fp32", 1.0), ("bf16", 1.0), ("fp16", 2.0**16)])
def test_training_measures_in_the_scale_of_its_own_backward_pass(
    task: LoadedTask, monkeypatch: pytest.MonkeyPatch, kind: Any, scale: float
) -> None:
    objective = Objective(student_of(task), None, task, FinetuneConfig(), 0, Amp(kind, torch.device("cpu")))
    seen: list[tuple[float, ...]] = []
    total = objective.weighting.total

    def noted(losses: dict[str, Tensor], *more: float) -> Tensor:
        seen.append(more)
        return total(losses, *more)

    monkeypatch.setattr(objective.weighting, "total", noted)
    objective.total({"class": torch.ones((), requires_grad=True)}, "step 1", 0.5)
    assert seen == [(0.5, scale)]


def test_an_overflow_is_no_step_of_the_weights() -> None:
    theta = nn.Parameter(torch.zeros(2))
    weighting = GradNorm([theta], alpha=1.0, every=1, where=WHERE)
    losses = two_quadratics((1.0, 8.0), theta)
    weighting.total({**losses, "task1": losses["task1"] * 1e38 * 1e3})
    weighting.update()
    assert weighting.weights == {"task0": 1.0, "task1": 1.0}


# --- both ---------------------------------------------------------------------------------------------------------


def learned(theta: nn.Parameter) -> list[Weighting]:
    return [Uncertainty(WHERE), GradNorm([theta], alpha=1.0, every=3, where=WHERE)]


def advance(weighting: Weighting, theta: nn.Parameter, steps: range) -> None:
    for step in steps:
        weighting.total(two_quadratics((1.0 + step % 3, 8.0 / (1 + step)), theta))
        weighting.update()


@pytest.mark.parametrize("which", [0, 1], ids=["uncertainty", "gradnorm"])
@pytest.mark.parametrize("at", [0, 1, 5, 12])
def test_what_was_saved_goes_on_with_the_same_bits(which: int, at: int) -> None:
    theta = nn.Parameter(torch.ones(2))
    straight, first, second = (learned(theta)[which] for _ in range(3))
    advance(straight, theta, range(20))
    advance(first, theta, range(at))
    second.load({name: value.clone() for name, value in first.state().items()})
    advance(second, theta, range(at, 20))
    assert second.weights == straight.weights
    assert straight.weights != {"task0": 1.0, "task1": 1.0}
    mine, theirs = second.state(), straight.state()
    assert set(mine) == set(theirs)
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


@pytest.mark.parametrize("which", [0, 1], ids=["uncertainty", "gradnorm"])
def test_distillation_keeps_its_own_weight(which: int) -> None:
    theta = nn.Parameter(torch.ones(2))
    weighting = learned(theta)[which]
    for _ in range(10):
        weighting.total({**two_quadratics((1.0, 8.0), theta), "distill.seg": torch.tensor(7.0)})
        weighting.update()
    assert set(weighting.weights) == {"task0", "task1"}
    losses = {**two_quadratics((0.0, 0.0), theta), "distill.seg": torch.tensor(7.0)}
    assert float(weighting.total(losses).detach()) == 7.0


@pytest.mark.parametrize("which", [0, 1], ids=["uncertainty", "gradnorm"])
def test_losses_that_cannot_be_balanced_are_refused(which: int) -> None:
    theta = nn.Parameter(torch.ones(2))
    weighting = learned(theta)[which]
    losses = two_quadratics((1.0, 8.0), theta)
    weighting.total(losses)
    with pytest.raises(TaskError, match=r"same losses in every batch, \['task0', 'task1'\], .* got \['task0'\] at Toy"):
        weighting.total({"task0": losses["task0"]})
    with pytest.raises(TaskError, match=r"losses of at least 0, to balance them; got task1 = -\d.* at Toy\.losses"):
        weighting.total({**losses, "task1": -losses["task1"]})


def test_gradnorm_refuses_a_loss_that_shares_nothing_and_one_that_starts_at_zero() -> None:
    theta, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    weighting = GradNorm([theta], alpha=1.0, every=1, where=WHERE)
    with pytest.raises(TaskError, match=r"depend on the shared parameters; got 'b' at Toy\.losses.* task's `shared`"):
        weighting.total({"a": theta.sum(), "b": other.sum()})
    fresh = GradNorm([theta], alpha=1.0, every=1, where=WHERE)
    fresh.total({"a": theta.sum(), "b": 0 * theta.sum()})
    with pytest.raises(TaskError, match=r"above 0 in the first batch; got \{'a': 2.0, 'b': 0.0\} at Toy\.losses"):
        fresh.update()


# --- which parameters are shared ----------------------------------------------------------------------------------


def test_a_task_may_name_what_its_losses_share(task: LoadedTask, monkeypatch: pytest.MonkeyPatch) -> None:
    student = student_of(task)
    monkeypatch.setattr(type(task.user), "shared", ["camera.0", "lidar.0.bias"], raising=False)
    found = shared_parameters(student, task, 0)
    assert [id(p) for p in found] == [id(student.camera[0].weight), id(student.lidar[0].bias)]
    monkeypatch.setattr(type(task.user), "shared", "lidar", raising=False)
    assert [id(p) for p in shared_parameters(student, task, 0)] == [id(student.lidar[0].weight)]
    student.lidar.requires_grad_(False)
    with pytest.raises(
        TaskError, match=r"Toy\.shared to name trained parameters.*; got 'lidar'; .* \['camera', 'lidar'"
    ):
        shared_parameters(student, task, 0)


def test_by_default_it_is_the_fusers_last_weight_or_the_task_is_asked(task: LoadedTask) -> None:
    student = student_of(task)
    with pytest.raises(TaskError, match=r"between the branches and the heads.*; got None; name .* Toy\.shared"):
        make_weighting(student, task, FinetuneConfig(loss_weights="gradnorm"), 0)
    student.drop = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16), nn.ReLU())
    before = torch.get_rng_state()
    found = shared_parameters(student, task, 0)
    assert torch.equal(before, torch.get_rng_state())
    assert [id(p) for p in found] == [id(student.drop[2].weight)]


def test_the_recipe_chooses_the_weighting(task: LoadedTask) -> None:
    student = student_of(task)
    assert isinstance(make_weighting(student, task, FinetuneConfig(), 0), Fixed)
    assert isinstance(make_weighting(student, task, FinetuneConfig(loss_weights="uncertainty"), 0), Uncertainty)
    factors = make_weighting(student, task, FinetuneConfig(loss_weights={"class": 2.0}), 0)
    assert float(factors.total({"class": torch.tensor(3.0), "size": torch.tensor(1.0)})) == 7.0
