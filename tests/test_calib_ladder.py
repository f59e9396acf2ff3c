"""From all INT8 down to none: the ladder on a network whose modalities have unlike ranges (calib/ladder.py)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fusepress.calib.ladder import Judge, Ladder, Standard, climb_down, kept_batches, worth_releasing
from fusepress.calib.quantize import Draft
from fusepress.calib.search import Found
from fusepress.calib.sensitivity import Sensitivity, branch_by_modules, measure_sensitivity, spare_costs
from fusepress.export.runtime import OnnxSession
from fusepress.pipeline.evaluate import Evaluation
from fusepress.pipeline.task import Batch, LoadedTask, TaskSource
from fusepress.targets.profile import load_profile
from tests.qdq_toys import drafted, feeds

SESSION = partial(OnnxSession, threads=1)
SAMPLES = 24


class Agreement:
    """How many pixels get the class that the float network gives them."""

    branches = {"camera": ["camera"], "lidar": ["lidar"]}

    def __init__(self, floating: Path) -> None:
        data = feeds(SAMPLES, seed=3)
        labels = SESSION(floating).run_numpy(data)["head"].argmax(axis=1)
        self.batch = Batch(
            inputs={name: torch.from_numpy(value) for name, value in data.items()},
            targets={"labels": torch.from_numpy(labels)},
            sample_ids=[f"s{i}" for i in range(SAMPLES)],
            groups=[f"s{i}" for i in range(SAMPLES)],
        )

    def batches(self, split: str, seed: int, **dealt: int) -> Iterator[Batch]:
        yield self.batch

    def sample_stats(self, outputs: dict[str, Tensor] | Tensor, batch: Batch) -> dict[str, Any]:
        head = outputs["head"] if isinstance(outputs, dict) else outputs
        return {"right": (head.argmax(dim=1) == batch.targets["labels"]).float().mean(dim=(1, 2)).numpy()}

    def score(self, stats: dict[str, Any]) -> dict[str, float]:
        return {"agreement": float(np.mean(stats["right"]))}


class Bench:
    """A draft, its task and its judge."""

    def __init__(self, folder: Path, lidar_gain: float) -> None:
        self.draft: Draft = drafted(folder, lidar_gain)
        user = Agreement(self.draft.source)
        source = TaskSource(spec="toys.py:Agreement", files=())
        task = LoadedTask(user=user, source=source, branches=user.branches, metrics={"agreement": "max"}, keep=[])
        self.judge = Judge(task=task, batches=[user.batch], seed=0)
        self.floating: Evaluation = self.judge.evaluate(SESSION(self.draft.source))

    def sensitivity(self) -> Sensitivity:
        costs, unit = spare_costs(self.draft, load_profile("host-cpu"), "fp32")
        return measure_sensitivity(
            self.draft,
            feeds(8),
            branch_of=branch_by_modules(Agreement.branches),
            costs=costs,
            cost_unit=unit,
            session=SESSION,
            most_runs=8 * SAMPLES,
        )

    def standard(self, max_drop: float) -> Standard:
        return self.judge.standard(self.floating, None, metric=None, gate_drop=None, max_drop=max_drop)

    def climb(self, max_drop: float) -> Ladder:
        return climb_down(self.draft, self.judge, self.standard(max_drop), SESSION, self.sensitivity)


@pytest.fixture(scope="module")
def unlike(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("unlike"), lidar_gain=300.0)


def test_modalities_with_unlike_ranges_collapse_and_the_ladder_saves_them(unlike: Bench) -> None:
    ladder = unlike.climb(max_drop=0.05)
    naive, last = ladder.found.trials[0], ladder.found.trials[-1]
    assert ladder.found.rung == "mixed"
    assert naive.drop is not None
    assert naive.drop > 0.2  # the shared scale leaves nothing of the camera
    chosen = next(trial for trial in ladder.found.trials if trial.spared == ladder.found.spared)
    assert chosen.high is not None
    assert chosen.high <= 0.05
    assert last.to_dict()["met"] in (True, False)
    assert "of 5 units in floating point: with all units in INT8 it drops by" in ladder.reason
    assert "agreement may drop by 0.05 (quantize.max_drop)" in ladder.reason
    assert ladder.to_dict()["rung"] == "mixed"


def test_the_decision_is_that_of_the_exhaustive_table(unlike: Bench) -> None:
    """All 32 sets of units, each judged in full, against the search's few."""
    standard = unlike.standard(0.05)
    rows = {row.name: row.cost for row in unlike.sensitivity().units}
    met = []
    for number in range(len(rows) + 1):
        for picked in itertools.combinations(rows, number):
            spared = frozenset(picked)
            path = unlike.draft.write(unlike.draft.source.with_name("trial.onnx"), spared)
            if unlike.judge.trial(spared, unlike.judge.evaluate(SESSION(path)), standard).met:
                met.append(spared)
    cheapest = min(met, key=lambda spared: sum(rows[name] for name in spared))
    ladder = unlike.climb(max_drop=0.05)
    assert ladder.found.spared == cheapest
    assert ladder.evaluations < 20


def test_with_like_ranges_all_layers_stay_in_int8(tmp_path: Path) -> None:
    bench = Bench(tmp_path, lidar_gain=1.0)
    ladder = bench.climb(max_drop=0.05)
    assert (ladder.found.rung, ladder.found.spared, ladder.evaluations) == ("int8", frozenset(), 1)
    assert ladder.reason.startswith("all 5 units in INT8: it drops by")


def test_the_last_rung_is_the_float_model(unlike: Bench) -> None:
    ladder = unlike.climb(max_drop=0.0)
    assert ladder.found.rung == "float"
    assert ladder.found.spared == set(unlike.draft.units())
    assert ladder.reason.startswith("nothing in INT8: with all units in INT8 it drops by")


def test_pairs_of_additions_alone_are_no_int8_to_release() -> None:
    units, layers = ["a/Conv", "b/Conv", "sum/Add"], ["a/Conv", "b/Conv"]
    for spared, rung in ((["a/Conv", "sum/Add"], "mixed"), (["b/Conv", "a/Conv"], "float"), ([], "int8")):
        found = Found(rung="mixed" if spared else "int8", spared=frozenset(spared), trials=())
        ended = worth_releasing(found, layers, units)
        assert (ended.rung, ended.spared) == (rung, frozenset(units if rung == "float" else spared))


def test_batches_are_kept_in_memory_only_where_they_are_small(unlike: Bench) -> None:
    task = unlike.judge.task
    size = sum(value.numel() * 4 for value in task.user.batch.inputs.values())
    assert kept_batches(task, size) == [task.user.batch]
    assert kept_batches(task, size - 1) is None
    again = Judge(task=task, batches=None, seed=0)
    assert again.evaluate(SESSION(unlike.draft.source)).metrics == unlike.floating.metrics
    assert (again.samples, again.evaluations) == (SAMPLES, 1)


def test_the_gate_is_the_standard_where_the_float_model_meets_it(unlike: Bench) -> None:
    def standard(dense: Evaluation | None, gate: float | None) -> Standard:
        return unlike.judge.standard(unlike.floating, dense, metric=None, gate_drop=gate, max_drop=None)

    worse = unlike.judge.evaluate(SESSION(unlike.draft.write(unlike.draft.source.with_name("naive.onnx"))))
    assert standard(None, 0.03).words == "the accuracy gate"
    assert standard(worse, 0.03).reference is worse
    # a float model far below the dense one cannot be mended by sparing layers
    lost = unlike.judge.standard(worse, unlike.floating, metric=None, gate_drop=0.03, max_drop=None)
    assert lost.reference is worse
    assert "misses the accuracy gate on the calib split by itself" in lost.words
    assert lost.max_drop == pytest.approx(0.005 * worse.metrics["agreement"])
    assert standard(None, None).max_drop == pytest.approx(0.005)
    assert "no accuracy gate" in standard(None, None).words
