"""The peers of AlterMOMA against closed forms, brute force and each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusepress.pipeline.graph.plan import Group
from fusepress.pipeline.recipe import ScoreConfig
from fusepress.pipeline.scoring.altermoma import weight_masks
from fusepress.pipeline.scoring.criteria import score_channels, score_weights
from fusepress.pipeline.scoring.norms import cumulative_shares, score_group_norm
from tests.scoring_toys import ConvToy, ToyGraph, loaded

FAST = ScoreConfig(batches=2, reactivation_batches=2, reactivation_lr=0.02)


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
