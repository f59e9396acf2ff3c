"""The AlterMOMA study's own instruments: its correlations, pairs and the rule that it fits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fusepress.pipeline.recipe import ScoreConfig
from fusepress.pipeline.scoring.masking import masked, untouched
from tests.scoring_toys import ConvToy, state_bytes

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    """`benchmarks` is a folder of the checkout, not of the installed package."""
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(ROOT))
    yield
    patch.undo()


def row(world: str, label: str, value: float, seed: int = 0) -> dict[str, Any]:
    spec = {"seed": seed}
    return {"world": world, "label": label, "finetuned": {"miou": value}, "redundancy_knob": 1.0, "spec": spec}


def test_correlations_are_those_of_ranks_averaged_over_groups() -> None:
    from benchmarks.altermoma.mechanism import spearman_matrix

    one = {"a": np.array([1.0, 2.0, 3.0, 4.0]), "b": np.array([1.0, 2.0, 3.0, 4.0])}
    other = {"a": np.array([1.0, 10.0, 11.0, 90.0]), "b": np.array([4.0, 3.0, 2.0, 1.0])}
    assert spearman_matrix({"one": one, "other": other})["one"]["other"] == pytest.approx(0.0)
    assert spearman_matrix({"one": one, "same": one})["one"]["same"] == pytest.approx(1.0)


@pytest.fixture
def stage() -> Any:
    from benchmarks.altermoma.mechanism import Stage

    toy = ConvToy()
    chosen = {group.id: np.arange(group.width) for group in toy.groups}
    with untouched(toy.model) as snapshot:
        yield Stage(toy.model, toy.task, list(toy.groups), snapshot, chosen)


def test_small_steps_find_curvature_to_first_order(stage: Any) -> None:
    from benchmarks.altermoma.mechanism import spearman_matrix

    keys = [group.id for group in stage.groups if group.branch != "lidar"]
    tiny = ScoreConfig(beta=1.0, batches=8, reactivation_batches=16, reactivation_lr=1e-6)
    found, log = stage._reactivation("lidar", keys, tiny)
    curvature = stage._curvature(keys, "lidar", on_data=False, step=0.01)
    share = {key: found[key] / curvature[key] for key in keys}
    # ReRI = lr * steps * |theta * H v|, v the mean gradient over the steps; `curvature` weighs batches by their size
    samples = np.concatenate(list(share.values()))
    assert samples == pytest.approx(np.full(len(samples), 16e-6), rel=0.4)
    assert np.median(samples) == pytest.approx(16e-6, rel=0.05)
    assert spearman_matrix({"found": found, "curvature": curvature})["found"]["curvature"] > 0.99
    assert log["steps"] == 16


def test_a_removed_channel_is_gone_and_comes_back(stage: Any) -> None:
    before = state_bytes(stage.model)
    group = stage.groups[-1]
    rises = stage._rises([group])[group.id]
    assert state_bytes(stage.model) == before
    whole = stage._loss()
    with torch.no_grad():
        kept = stage.model.fuse.weight[2].clone(), stage.model.fuse.bias[2].clone()
        stage.model.fuse.weight[2], stage.model.fuse.bias[2] = 0.0, 0.0  # no norm behind: the channel is zero
        gone = stage._loss()
        stage.model.fuse.weight[2], stage.model.fuse.bias[2] = kept
    assert rises[2] == pytest.approx(gone - whole, rel=1e-9)
    with masked(stage.model, ["lidar"], "lidar"):
        assert stage._rises([stage.groups[3]])[stage.groups[3].id] == pytest.approx(np.zeros(6), abs=1e-12)


def test_gains_are_paired_by_world_and_seed() -> None:
    from benchmarks.altermoma.report import paired

    rows = [row("w", "a", 0.5), row("w", "b", 0.4), row("v", "a", 0.7), row("v", "b", 0.4), row("u", "a", 0.1)]
    found = paired(rows, "a", "b", lambda _: True)
    assert found is not None
    assert (found["n"], found["mean"]) == (2, pytest.approx(0.2))
    assert found["high"] - found["mean"] == pytest.approx(12.706 * 0.1, rel=1e-3)  # t with one degree of freedom
    assert paired(rows, "a", "c", lambda _: True) is None


def test_the_rule_masks_only_where_it_paid() -> None:
    from benchmarks.altermoma.report import fitted_rule, judged_rule

    sweep = {"dull": {0.0: 0.0, 1.0: -0.1}, "twin": {0.0: 0.0, 1.0: 0.05}, "other": {0.0: 0.0, 1.0: 0.02}}
    redundancy = {"dull": 0.2, "twin": 0.8, "other": 0.7}
    rule = fitted_rule({name: sweep[name] for name in ("dull", "twin")}, redundancy)
    assert (rule["beta"], rule["from"]) == (1.0, 0.8)
    assert rule["gain"] == pytest.approx(0.025)
    judged = judged_rule(rule, sweep, redundancy)
    assert list(judged) == ["other"]
    assert judged["other"]["beta"] == 0.0
    never = fitted_rule({"dull": sweep["dull"], "twin": {0.0: 0.0, 1.0: -0.01}}, redundancy)
    assert (never["beta"], never["gain"]) == (0.0, 0.0)


def test_runs_are_named_by_everything_that_shapes_them() -> None:
    from benchmarks.altermoma.runs import Spec
    from benchmarks.altermoma.worlds import World

    world = World(redundancy=0.5, seed=1)
    specs = [
        Spec(label="a", score={"method": "taylor"}),
        Spec(label="a", score={"method": "snip"}),
        Spec(label="a", score={"method": "taylor"}, seed=1),
        Spec(label="a", score={"method": "taylor"}, rank="score"),
        Spec(label="a", score={"method": "taylor"}, sign=-1.0),
    ]
    assert len({spec.key(world) for spec in specs}) == len(specs)
    assert specs[0].key(world) != specs[0].key(World(redundancy=0.5, seed=1, dead=0.0))
