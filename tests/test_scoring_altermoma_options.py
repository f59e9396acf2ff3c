"""AlterMOMA's options and controls, the measured redundancy and the beta that follows from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from fusepress.pipeline.errors import TaskError, UsageError
from fusepress.pipeline.graph.cost import CostModel
from fusepress.pipeline.graph.groups import find_groups
from fusepress.pipeline.recipe import ScoreConfig
from fusepress.pipeline.scoring import redundancy
from fusepress.pipeline.scoring.altermoma import (
    Alternation,
    channel_macs,
    cost_shares,
    score_altermoma,
    weight_scores,
)
from fusepress.pipeline.scoring.channels import WeightScorer
from fusepress.pipeline.scoring.gradients import Passes
from fusepress.pipeline.scoring.masking import branch_of_parameters, masked, shuffled_output, untouched
from fusepress.pipeline.scoring.redundancy import beta_of, measure_redundancy, resolve_beta
from fusepress.pipeline.task import Batch, LoadedTask
from tests.scoring_toys import LINEAR, ConvToy, LinearFusion, ToyGraph, loaded, map_error, state_bytes

FAST = ScoreConfig(method="altermoma", beta=1.0, batches=2, reactivation_batches=3, reactivation_lr=0.02)
Control = Literal["masked", "unmasked", "noise", "permuted"]
CONTROLS: tuple[Control, ...] = ("masked", "unmasked", "noise", "permuted")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def options(**changes: Any) -> ScoreConfig:
    return FAST.model_copy(update=changes)


def channels(toy: ConvToy, config: ScoreConfig, cost: Mapping[str, float] | None = None) -> Any:
    return score_altermoma(toy.model, toy.task, ToyGraph(toy.groups), config, seed=0, cost=cost)


def raw_redundancy(model: nn.Module, task: LoadedTask, config: ScoreConfig, modality: str) -> tuple[Any, Any]:
    scorer = WeightScorer(branch_of_parameters(model, task.branches))
    with untouched(model) as snapshot:
        run = Alternation(
            model=model, task=task, scorer=scorer, config=config, seed=0, passes=Passes(total=1), snapshot=snapshot
        )
        return run.redundancy(modality)


# normalise


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (1.0, 0.5), (0.25, 2.0)])
@pytest.mark.parametrize("modalities", [("camera", "lidar"), ("camera", "lidar", "radar")])
def test_by_parameter_every_key_adds_up_to_alpha_minus_beta(
    alpha: float, beta: float, modalities: tuple[str, ...]
) -> None:
    toy = ConvToy(modalities)
    config = options(alpha=alpha, beta=beta, normalise="parameter")
    weights = weight_scores(toy.model, toy.task, config, seed=0)[0]
    vectors = {key: torch.from_numpy(value).double() for key, value in channels(toy, config).channel.items()}
    for scores, tolerance in ((weights, 1e-12), (vectors, 1e-6)):
        for value in scores.values():
            assert float(value.sum()) == pytest.approx(alpha - beta, abs=tolerance)


def test_by_cost_every_branch_adds_up_to_its_share_of_the_operations() -> None:
    toy = ConvToy()
    cost = {group.id: 1.0 + 3.0 * index for index, group in enumerate(toy.groups)}
    shares = cost_shares(toy.groups, cost)
    assert sum(shares.values()) == pytest.approx(1.0)
    camera = sum(g.width * cost[g.id] for g in toy.groups if g.branch == "camera")
    assert shares["camera"] == pytest.approx(camera / sum(g.width * cost[g.id] for g in toy.groups))
    result = channels(toy, options(beta=0.25, normalise="cost"), cost)
    by_branch = channels(toy, options(beta=0.25))
    for branch, facts in result.log["branches"].items():
        assert facts["sum"] == pytest.approx(0.75 * shares[branch], abs=1e-12)
    for group in toy.groups:
        expected = by_branch.channel[group.id] * shares[group.branch]
        torch.testing.assert_close(torch.from_numpy(result.channel[group.id]), torch.from_numpy(expected))


def test_costs_that_are_not_given_are_counted_on_the_graph() -> None:
    toy = ConvToy(dtype=torch.float32)
    inputs = next(toy.task.train_batches(0)).inputs
    graph = find_groups(toy.model, inputs, toy.task.branches)
    cost = channel_macs(toy.model, toy.task, graph)
    table = CostModel(graph, toy.model, {name: value[:1] for name, value in inputs.items()})
    group = graph.groups[0]
    assert cost[group.id] == table.macs() - table.macs({group.id: group.width - 1})
    config = options(normalise="cost")
    counted = score_altermoma(toy.model, toy.task, graph, config, seed=0)
    given = score_altermoma(toy.model, toy.task, graph, config, seed=0, cost=cost)
    assert all((counted.channel[key] == given.channel[key]).all() for key in cost)


def test_costs_that_cannot_be_known_are_asked_for() -> None:
    toy = ConvToy()
    with pytest.raises(UsageError, match=r"expected a GroupGraph to count costs on .*; got ToyGraph; pass cost="):
        channels(toy, options(normalise="cost"))
    with pytest.raises(UsageError, match=r"expected the cost of a channel for every group.*; got 1 of 5 at cost"):
        channels(toy, options(normalise="cost"), {toy.groups[0].id: 1.0})
    with pytest.raises(UsageError, match=r"expected score.normalise: branch or parameter .*; got 'cost'"):
        weight_scores(toy.model, toy.task, options(normalise="cost"), seed=0)


# controls


@pytest.mark.parametrize("control", CONTROLS)
def test_every_control_keeps_the_laws_of_the_method(control: Control) -> None:
    toy = ConvToy(("camera", "lidar", "radar"))
    before = state_bytes(toy.model)
    config = options(reactivation=control, beta=0.5)
    scores, log = weight_scores(toy.model, toy.task, config, seed=0)
    other, _ = weight_scores(toy.model, toy.task, config, seed=0, order=["radar", "lidar", "camera"])
    assert state_bytes(toy.model) == before
    assert all(facts["sum"] == pytest.approx(0.5, abs=1e-12) for facts in log["branches"].values())
    assert all(torch.allclose(scores[name], other[name], rtol=0, atol=1e-15) for name in scores)
    assert log["reactivation"] == control
    assert all(stage["moved"] > 0 for stage in log["stages"])


def test_without_steps_no_control_finds_anything() -> None:
    toy = ConvToy()
    for control in CONTROLS:
        config = options(reactivation=control, reactivation_batches=0)
        found, log = raw_redundancy(toy.model, toy.task, config, "lidar")
        assert not any(value.any() for value in found.values())
        assert log["moved"] == 0


def one_to_one(n: int = 8) -> tuple[LinearFusion, LoadedTask, Tensor, Tensor, Tensor]:
    """y = a x + b z with one weight each: everything is a closed form."""
    generator = torch.Generator().manual_seed(3)
    x, z, y = (torch.randn(n, 1, generator=generator, dtype=torch.float64) for _ in range(3))
    batch = Batch(
        inputs={"camera": x, "lidar": z},
        targets={"y": y[:, 0]},
        sample_ids=[str(k) for k in range(n)],
        groups=["g"] * n,
    )
    return LinearFusion([0.7], [-0.4]), loaded([batch], LINEAR), x[:, 0], z[:, 0], y[:, 0]


def test_unmasked_training_follows_the_unmasked_gradient() -> None:
    model, task, x, z, y = one_to_one()
    steps, rate, a, b = 5, 0.05, 0.7, -0.4
    h = (x * x).mean()
    first = a * h + b * (x * z).mean() - (x * y).mean()
    found, log = raw_redundancy(
        model, task, options(reactivation="unmasked", reactivation_batches=steps, reactivation_lr=rate), "lidar"
    )
    expected = abs(a * first * (1 - (1 - rate * h) ** steps))
    assert float(found["camera.weight"]) == pytest.approx(float(expected), rel=1e-12)
    assert log["loss_before"] == pytest.approx(float(0.5 * (a * x + b * z - y).square().mean()), rel=1e-12)


def test_permuted_training_sees_the_other_samples_features() -> None:
    model, task, x, z, y = one_to_one()
    steps, rate, a, b = 5, 0.05, 0.7, -0.4
    moved = z.roll(4)
    h = (x * x).mean()
    first = a * h + b * (x * moved).mean() - (x * y).mean()
    found, log = raw_redundancy(
        model, task, options(reactivation="permuted", reactivation_batches=steps, reactivation_lr=rate), "lidar"
    )
    assert float(found["camera.weight"]) == pytest.approx(
        float(abs(a * first * (1 - (1 - rate * h) ** steps))), rel=1e-12
    )
    assert log["loss_before"] == pytest.approx(float(0.5 * (a * x + b * moved - y).square().mean()), rel=1e-12)


def test_noise_goes_as_far_as_masked_training_in_another_direction() -> None:
    model, task, *_ = one_to_one()
    config = options(reactivation_batches=5, reactivation_lr=0.05)
    trained, log = raw_redundancy(model, task, config, "lidar")
    noise, noise_log = raw_redundancy(model, task, options(reactivation="noise", **config_steps(config)), "lidar")
    assert noise_log["moved"] == pytest.approx(log["moved"], rel=1e-12)
    # with a single weight there are two directions: the change of a gradient h * step is the same size in both
    assert float(noise["camera.weight"]) == pytest.approx(float(trained["camera.weight"]), rel=1e-12)
    toy = ConvToy()
    one, one_log = raw_redundancy(toy.model, toy.task, FAST, "lidar")
    other, other_log = raw_redundancy(toy.model, toy.task, options(reactivation="noise"), "lidar")
    assert other_log["moved"] == pytest.approx(one_log["moved"], rel=1e-9)
    assert other_log["loss_after"] > one_log["loss_after"]
    name = "camera.conv1.weight"
    assert float(torch.corrcoef(torch.stack([one[name].flatten(), other[name].flatten()]))[0, 1]) < 0.9


def config_steps(config: ScoreConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ("reactivation_batches", "reactivation_lr")}


@pytest.mark.parametrize("control", ["unmasked", "permuted"])
def test_controls_train_the_same_parameters_as_the_method(control: Control) -> None:
    class Watching:
        moved: frozenset[str] = frozenset()

        def __call__(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
            names = {n.partition(".")[0] for n, p in toy.model.named_parameters() if not torch.equal(p, start[n])}
            self.moved |= names
            return map_error(outputs, batch)

    watching = Watching()
    toy = ConvToy(losses=watching)
    start = {name: p.detach().clone() for name, p in toy.model.named_parameters()}
    raw_redundancy(toy.model, toy.task, options(reactivation=control), "lidar")
    assert watching.moved == {"camera", "fuse", "head"}


def test_shuffling_gives_every_sample_the_features_of_another() -> None:
    toy = ConvToy()
    inputs = next(toy.task.train_batches(0)).inputs
    plain = toy.model.get_submodule("lidar")(inputs["lidar"])
    with masked(toy.model, ["lidar"], "lidar", shuffled_output):
        assert torch.equal(toy.model.get_submodule("lidar")(inputs["lidar"]), plain.roll(1, 0))
    ids = torch.arange(4)
    nested = shuffled_output({"a": [torch.arange(4.0)], "index": ids})
    assert nested["a"][0].tolist() == [2.0, 3.0, 0.0, 1.0]
    assert nested["index"] is ids

    class Sparse:
        features = torch.zeros(3, 2)

        def replace_feature(self, features: Tensor) -> Tensor:
            return features

    with pytest.raises(TaskError, match=r"expected the branch to return dense tensors .*; got Sparse, whose rows"):
        shuffled_output(Sparse())


# redundancy and beta: auto


def two_sensors(overlap: float) -> tuple[LinearFusion, LoadedTask]:
    """y = z + u; the camera sees u and `overlap` of z, the LiDAR z: at the optimum, split evenly where it can be."""
    generator = torch.Generator().manual_seed(5)
    data = []
    for index in range(40):
        z, u, own = (torch.randn(32, generator=generator, dtype=torch.float64) for _ in range(3))
        seen = overlap * z + (1 - overlap**2) ** 0.5 * own
        data.append(
            Batch(
                inputs={"camera": torch.stack([seen, u], dim=1), "lidar": z[:, None]},
                targets={"y": z + u},
                sample_ids=[f"{index}-{k}" for k in range(32)],
                groups=["g"] * 32,
            )
        )
    return LinearFusion([0.3, 1.0] if overlap == 1 else [0.0, 1.0], [0.7 if overlap == 1 else 1.0]), loaded(
        data, LINEAR
    )


def test_what_the_other_sensor_knows_too_is_won_back_and_nothing_else() -> None:
    config = ScoreConfig(beta=1.0, batches=4)
    found, covered = {}, {}
    for overlap in (0.0, 0.7, 1.0):
        model, task = two_sensors(overlap)
        before = state_bytes(model)
        log = measure_redundancy(model, task, config, seed=0, steps=30, lr=0.05)
        assert state_bytes(model) == before
        found[overlap] = log["modalities"]["lidar"]["won_back"]
        covered[overlap] = log["modalities"]["lidar"]["covered"]
        assert log["loss_blind"] == pytest.approx(1.0, abs=0.15)  # half the variance of z + u
        assert log["loss_dense"] == pytest.approx(0.0, abs=1e-9)
    assert found[0.0] == pytest.approx(0.0, abs=0.05)
    assert found[0.7] == pytest.approx(0.49, abs=0.1)  # the variance of z that the camera explains
    assert found[1.0] > 0.95
    # the LiDAR's part is half of what both tell; the camera covers the other half and what it shares
    assert [covered[overlap] for overlap in (0.0, 0.7, 1.0)] == pytest.approx([0.5, 0.745, 1.0], abs=0.08)


def test_redundancy_is_measured_on_data_that_the_training_does_not_see() -> None:
    class Watching:
        ids: list[tuple[str, bool]] = []

        def __call__(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
            trained = not torch.equal(toy.model.get_parameter("fuse.weight"), start)
            self.ids.append((batch.sample_ids[0], trained))
            return map_error(outputs, batch)

    watching = Watching()
    toy = ConvToy(losses=watching)
    start = toy.model.get_parameter("fuse.weight").detach().clone()
    before = state_bytes(toy.model)
    log = measure_redundancy(toy.model, toy.task, ScoreConfig(beta=1.0, batches=2), seed=0, steps=3)
    held = [("0-0", False), ("1-0", False)]
    stage = [*held, ("2-0", False), ("3-0", True), ("4-0", True), ("0-0", True), ("1-0", True)]
    assert watching.ids == [*held, *held, *stage, *stage]  # dense, blind, and each modality
    assert state_bytes(toy.model) == before
    assert log["passes"] == 6
    assert set(log["modalities"]) == {"camera", "lidar"}
    assert log["optimizer"] == "adam"


def test_a_modality_that_nothing_hangs_on_is_wholly_redundant() -> None:
    _, task = two_sensors(1.0)
    log = measure_redundancy(LinearFusion([0.9, 0.8], [0.0]), task, ScoreConfig(beta=1.0, batches=2), seed=0, steps=2)
    assert log["modalities"]["lidar"]["won_back"] == 1.0


def test_beta_follows_the_rule_between_its_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redundancy, "BETA_RULE", ((0.2, 0.0), (0.6, 1.0)))
    assert [beta_of(x)[0] for x in (0.0, 0.2, 0.3, 0.6, 1.0)] == pytest.approx([0.0, 0.0, 0.25, 1.0, 1.0])
    assert "gives beta 0.25" in beta_of(0.3)[1]


def test_beta_auto_is_the_rule_at_the_measured_redundancy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redundancy, "BETA_RULE", ((0.0, 0.0), (1.0, 0.8)))
    toy = ConvToy()
    config = options(beta="auto")
    beta, log = resolve_beta(toy.model, toy.task, config, seed=0)
    assert beta == pytest.approx(0.8 * log["measured"]["redundancy"])
    automatic = channels(toy, config)
    fixed = channels(toy, options(beta=beta))
    assert all((automatic.channel[key] == fixed.channel[key]).all() for key in fixed.channel)
    assert automatic.log["auto_beta"] == log
    assert automatic.log["beta"] == beta
    assert weight_scores(toy.model, toy.task, config, seed=0)[1]["beta"] == beta


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_a_rule_that_does_not_ask_for_redundancy_measures_none(monkeypatch: pytest.MonkeyPatch, beta: float) -> None:
    monkeypatch.setattr(redundancy, "BETA_RULE", ((0.0, beta), (1.0, beta)))
    toy = ConvToy()
    found, log = resolve_beta(toy.model, toy.task, FAST, seed=0)
    assert found == beta
    assert f"gives {beta:g} at every redundancy, so none was measured" in log["why"]
    assert ("never paid" in log["why"]) == (beta == 0)
    assert "measured" not in log


def test_beta_auto_of_a_single_modality_is_zero_without_measuring() -> None:
    toy = ConvToy(("camera",))
    beta, log = resolve_beta(toy.model, toy.task, FAST, seed=0)
    assert beta == 0.0
    assert log == {"beta": 0.0, "why": "one modality: nothing can be redundant beside another"}
