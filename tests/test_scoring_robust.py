"""Scores under dead sensors: the formula in closed form, against brute force, and what it keeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from fusepress.pipeline.errors import TaskError
from fusepress.pipeline.recipe import DATA_FREE, ScoreConfig
from fusepress.pipeline.scoring.criteria import METHODS, score_channels, score_weights
from fusepress.pipeline.scoring.result import scores_to_bytes
from fusepress.pipeline.scoring.robust import blinded
from fusepress.pipeline.task import Batch, LoadedTask
from tests.scoring_toys import LINEAR, ConvToy, LinearFusion, ToyGraph, loaded, map_error, state_bytes

ROUGH: dict[str, Any] = {"batches": 2, "reactivation_batches": 2, "reactivation_lr": 0.02}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def naming_inputs(task: LoadedTask) -> LoadedTask:
    task.user.inputs_by_modality = {name: [name] for name in task.branches}
    return task


def with_dead(task: LoadedTask, modality: str) -> LoadedTask:
    """The same task over a list in which one modality was zeroed by hand."""
    data = [b.with_inputs(**{modality: torch.zeros_like(b.inputs[modality])}) for b in task.user.data]
    return loaded(data, task.branches, task.user.losses)


def share_of(scores: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    total = sum(float(np.abs(value.astype(np.float64)).sum()) for value in scores.values())
    return {key: value.astype(np.float64) / total for key, value in scores.items()}


@pytest.mark.parametrize(
    ("method", "robustness"), [("taylor", 0.5), ("snip", 1.0), ("grasp", 0.3), ("altermoma", 0.5), ("prospr", 0.4)]
)
def test_the_scores_are_the_stated_mixture_of_the_criterions_own(method: Any, robustness: float) -> None:
    toy = ConvToy()
    task = naming_inputs(toy.task)
    graph = ToyGraph(toy.groups)
    config = ScoreConfig(method=method, beta=0.5, robustness=robustness, **ROUGH)
    plain = config.model_copy(update={"robustness": 0.0})
    before = state_bytes(toy.model)
    found = score_channels(toy.model, task, graph, config, seed=3)
    assert state_bytes(toy.model) == before
    tasks = [toy.task, *(with_dead(toy.task, modality) for modality in toy.modalities)]
    own = [share_of(score_channels(toy.model, one, graph, plain, seed=3).channel) for one in tasks]
    for key, value in found.channel.items():
        wanted = (1 - robustness) * own[0][key] + robustness / 2 * (own[1][key] + own[2][key])
        assert value == pytest.approx(wanted, rel=2e-5, abs=1e-8)
    assert found.log["robustness"]["share"] == robustness
    assert set(found.log["robustness"]["loss_with_dead"]) == {"camera", "lidar"}


def spare_wheel() -> tuple[LinearFusion, LoadedTask]:
    """y = camera a + lidar b: where the second LiDAR feature is lit, the camera alone explains everything."""
    model = LinearFusion((1.0,), (1.0, 1.0))
    rows = [(1.0, (1.0, 0.0), 1.9), (3.0, (0.0, 1.0), 4.0)]
    data = [
        Batch(
            inputs={
                "camera": torch.tensor([[c]], dtype=torch.float64),
                "lidar": torch.tensor([l_], dtype=torch.float64),
            },
            targets={"y": torch.tensor([y], dtype=torch.float64)},
            sample_ids=[str(c)],
        )
        for c, l_, y in rows
    ]
    return model, naming_inputs(loaded(data, LINEAR))


def test_a_weight_that_carries_only_a_blind_car_is_worth_what_the_formula_says() -> None:
    model, task = spare_wheel()
    config = ScoreConfig(method="taylor", batches=2)
    clean, _ = score_weights(model, task, config, seed=0)
    assert float(clean["lidar.weight"][1]) == 0.0, "the criterion alone would remove it first"
    scores, log = score_weights(model, task, config.model_copy(update={"robustness": 0.5}), seed=0)
    # residuals: clean 0.1 and 0; camera dead -0.9 and -3; LiDAR dead -0.9 and -1
    assert float(scores["camera.weight"][0]) == pytest.approx(0.25 + 0.25 * 1.0)
    assert float(scores["lidar.weight"][0]) == pytest.approx(0.25 + 0.25 * 0.81 / 9.81)
    assert float(scores["lidar.weight"][1]) == pytest.approx(0.25 * 9.0 / 9.81)
    assert float(scores["lidar.weight"][0]) > float(scores["lidar.weight"][1]) * 0.9
    assert log["branches"]["lidar"]["sum"] == pytest.approx(0.5)


def test_the_scale_of_the_loss_and_the_order_of_the_modalities_do_not_matter() -> None:
    config = ScoreConfig(method="taylor", robustness=0.6, batches=2)
    toy = ConvToy()
    task = naming_inputs(toy.task)
    found = score_channels(toy.model, task, ToyGraph(toy.groups), config, seed=1).channel
    assert sum(float(value.sum()) for value in found.values()) == pytest.approx(1.0, abs=1e-5)
    loud = naming_inputs(
        loaded(
            task.user.data,
            dict(reversed(task.branches.items())),
            lambda outputs, batch: {name: 8.0 * loss for name, loss in map_error(outputs, batch).items()},
        )
    )
    other = score_channels(toy.model, loud, ToyGraph(toy.groups), config, seed=1).channel
    assert all(other[key] == pytest.approx(value, rel=1e-5) for key, value in found.items())


def test_rounds_score_what_is_left_under_dead_sensors_too() -> None:
    toy = ConvToy()
    task, graph = naming_inputs(toy.task), ToyGraph(toy.groups)
    config = ScoreConfig(method="snip", robustness=0.5, batches=1, rounds=2)
    found = score_channels(toy.model, task, graph, config, seed=1)
    again = score_channels(toy.model, task, graph, config, seed=1)
    assert scores_to_bytes(found) == scores_to_bytes(again)
    blind = score_channels(toy.model, task, graph, config.model_copy(update={"robustness": 0.0}), seed=1)
    assert any(not np.array_equal(found.channel[key], blind.channel[key]) for key in found.channel)


def test_progress_runs_once_from_nothing_to_all() -> None:
    toy = ConvToy()
    told: list[tuple[float, str]] = []
    config = ScoreConfig(method="taylor", robustness=0.5, batches=2)
    task = naming_inputs(toy.task)
    score_channels(toy.model, task, ToyGraph(toy.groups), config, seed=0, progress=lambda f, t: told.append((f, t)))
    fractions = [fraction for fraction, _ in told]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert any(text.startswith("lidar dead: ") for _, text in told)


def test_a_task_that_names_no_inputs_is_told_to() -> None:
    toy = ConvToy()
    config = ScoreConfig(method="taylor", robustness=0.5, batches=1)
    with pytest.raises(
        TaskError, match=r"ToyUser\.inputs_by_modality to name the inputs of 'camera'.*got nothing; add"
    ):
        score_channels(toy.model, toy.task, ToyGraph(toy.groups), config, seed=0)


@pytest.mark.parametrize("method", sorted(DATA_FREE))
def test_a_criterion_of_the_weights_alone_cannot_see_a_dead_sensor(method: Any) -> None:
    with pytest.raises(ValidationError, match=f"a method that reads data with `robustness`; got {method}"):
        ScoreConfig(method=method, robustness=0.1)
    toy = ConvToy()
    plain = ScoreConfig(method=method, batches=1)
    tried = plain.model_copy(update={"robustness": 0.5})  # as `auto` tries it
    one, other = (
        scores_to_bytes(score_channels(toy.model, toy.task, ToyGraph(toy.groups), config, seed=0))
        for config in (plain, tried)
    )
    assert one == other


def test_every_other_criterion_changes_with_the_data() -> None:
    toy = ConvToy()
    for method in sorted(METHODS.keys() - DATA_FREE):
        config = ScoreConfig(method=method, beta=0.0, rounds=2 if method == "imp" else 1, **ROUGH)  # type: ignore[arg-type]
        alive, dead = (
            score_channels(toy.model, task, ToyGraph(toy.groups), config, seed=0).channel
            for task in (toy.task, with_dead(toy.task, "camera"))
        )
        assert any(not np.array_equal(alive[key], dead[key]) for key in alive), method


def test_only_the_named_modality_is_dead_and_only_in_the_batches_that_are_read() -> None:
    toy = ConvToy()
    task = naming_inputs(toy.task)
    one = next(blinded(task, "lidar").train_batches(0))
    whole = next(task.train_batches(0))
    assert int(one.inputs["lidar"].count_nonzero()) == 0
    assert torch.equal(one.inputs["camera"], whole.inputs["camera"])
    assert int(whole.inputs["lidar"].count_nonzero()) > 0
    second = next(blinded(task, "lidar").train_batches(0, start=1))
    assert torch.equal(second.inputs["camera"], replace(task.user.data[1]).inputs["camera"])
