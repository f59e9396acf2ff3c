"""The pruning benchmark: it resumes, repeats no finished cell, and its table calls nothing a tie that is not one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats as distributions

from fusepress.pipeline.graph.apply import weights_bytes
from fusepress.pipeline.scaffold import write_scaffold
from fusepress.pipeline.task import load_task

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    """`benchmarks` is a folder of the checkout, not of the installed package."""
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(ROOT))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The driver's options for the scaffold's task with random weights, two steps a cell."""
    folder = tmp_path_factory.mktemp("mine")
    write_scaffold(folder)
    torch.manual_seed(0)
    model = load_task("task.py:MyTask", base=folder).build_model()
    (folder / "dense.safetensors").write_bytes(weights_bytes(model))
    return [
        *("--recipe", str(folder / "recipe.yaml"), "--store", str(folder / "store"), "--cache", str(folder / "cache")),
        *("--steps", "2", "--precision", "fp32", "--seeds", "0", "--budgets", "0.4"),
    ]


def _work(options: list[str], *methods: str, suite: str = "core") -> Any:
    from benchmarks.pruning.run import Worker, arguments

    worker = Worker(arguments([*options, "--suite", suite, "--methods", *methods, "--worker"]))
    assert worker.work() == 0
    return worker


def _cells(options: list[str]) -> dict[str, dict[str, Any]]:
    folder = Path(options[3]) / "cells"
    return {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def test_finished_cells_are_within_the_budget_and_never_run_again(
    options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.pruning.bench import Bench

    _work(options, "magnitude", "tp_group_norm")
    first = _cells(options)
    assert {cell["cell"]["method"] for cell in first.values()} == {"magnitude", "tp_group_norm"}
    for cell in first.values():
        assert 0.1 < cell["achieved"]["macs"] <= 0.4
        assert cell["achieved"]["gap"] == pytest.approx(0.4 - cell["achieved"]["macs"])
        assert all(width % 8 == 0 for width in cell["widths"].values())
        assert cell["final_losses"]
        assert "finetune" in cell["seconds"]

    def refuse(_self: Bench, cell: Any) -> None:
        raise AssertionError(f"{cell.name} was finished")

    monkeypatch.setattr(Bench, "run", refuse)
    worker = _work(options, "magnitude", "tp_group_norm")
    assert _cells(options) == first
    assert not list((Path(options[3]) / "failed").glob("*.json"))
    assert not list((Path(options[3]) / "work").glob("*"))
    assert worker.results.everything()[0]["file"] + ".json" in first


def test_a_cell_that_fails_is_kept_as_failed_and_the_next_one_runs(
    options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusepress.pipeline.scoring import criteria

    real = criteria.score_channels
    tries = []

    def broken(model: Any, task: Any, graph: Any, config: Any, **named: Any) -> Any:
        tries.append(config.method)
        if config.method == "random":
            raise RuntimeError("no gradients today")
        return real(model, task, graph, config, **named)

    monkeypatch.setattr(criteria, "score_channels", broken)
    before = len(_cells(options))
    for _ in range(3):
        _work(options, "taylor", "random")
    assert len(_cells(options)) == before + 1
    assert tries == ["random", "taylor", "random"]  # two attempts, then no more; what is done is done
    (failed,) = (Path(options[3]) / "failed").glob("*.json")
    assert json.loads(failed.read_text()) == ["RuntimeError: no gradients today"] * 2


def test_a_killed_attempt_is_forgiven_and_an_endless_one_is_not() -> None:
    from benchmarks.pruning.run import KILLED, given_up

    assert not given_up([KILLED] * 3 + ["RuntimeError: once"])
    assert given_up([KILLED, "RuntimeError: once", "RuntimeError: twice"])
    assert given_up([KILLED] * 6)


def test_another_seed_or_setting_is_another_cell() -> None:
    from benchmarks.pruning.cells import Cell, Protocol, digest, identity

    def key(protocol: Protocol, checkpoint: str = "a", **changes: Any) -> str:
        cell: dict[str, Any] = {"task": "street", "method": "taylor", "kind": "structured", "budget": 0.4, "seed": 0}
        cell |= changes
        return digest(identity(Cell(**cell), protocol, {"checkpoint": checkpoint}))

    keys = [
        key(Protocol()),
        key(Protocol(), seed=1),
        key(Protocol(), budget=0.25),
        key(Protocol(), method="snip"),
        key(Protocol(steps=100)),
        key(Protocol(), checkpoint="b"),
    ]
    assert len(set(keys)) == len(keys)
    assert key(Protocol()) == keys[0]


def test_the_core_table_is_whole_at_one_seed_before_the_next_begins() -> None:
    from benchmarks.pruning.cells import planned

    cells = planned(["core", "more"], [0, 1], None)
    core = [cell for cell in cells if cell.spec.suite == "core" and cell.budget in (0.4, 0.25)]
    assert cells[1 : len(core) + 1] == core  # the dense network comes first
    assert [cell.seed for cell in core] == sorted(cell.seed for cell in core)
    assert len(set(cells)) == len(cells)


@pytest.mark.parametrize(
    ("intervals", "verdict"),
    [
        ([(0.001, 0.3)], "win"),
        ([(-0.3, -0.001)], "lose"),
        ([(-0.009, 0.008)], "tie"),
        ([(-0.012, 0.009)], "undecided"),
        ([(-0.002, 0.003), (-0.03, 0.001)], "undecided"),
        ([(0.001, 0.004), (-0.002, 0.005)], "tie"),
        ([], "undecided"),
    ],
)
def test_only_a_narrow_interval_around_zero_is_a_tie(intervals: list[tuple[float, float]], verdict: str) -> None:
    from benchmarks.pruning.differences import judge

    assert judge(intervals) == verdict


def test_a_difference_is_paired_over_seeds_and_over_streets() -> None:
    from benchmarks.pruning.differences import compare, mean_iou_draws, street_draws

    generator = np.random.default_rng(0)
    groups = [f"street-{n // 4}" for n in range(80)]
    weights = street_draws(20)
    union = generator.integers(50, 100, size=(80, 3))
    first, second = dict[int, float](), dict[int, float]()
    draws_first, draws_second = dict[int, Any](), dict[int, Any]()
    street = generator.integers(0, 40, size=20).repeat(4)[:, None]  # what all find hard cancels in the difference
    for seed in range(5):
        hard = street + generator.integers(0, 5, size=(80, 3))
        for values, draws, loss in ((first, draws_first, 0), (second, draws_second, 2 + seed % 2)):
            stats = {"intersection": np.maximum(union - hard - loss, 0), "union": union}
            values[seed] = float(mean_iou_draws(stats, groups, np.ones((1, 20)))[0])
            assert values[seed] == pytest.approx(np.mean(stats["intersection"].sum(0) / union.sum(0)))
            draws[seed] = mean_iou_draws(stats, groups, weights)
    found = compare(first, second, draws_first, draws_second)
    assert found is not None
    assert found.bootstrap is not None
    wanted = distributions.ttest_rel([*first.values()], [*second.values()]).confidence_interval(0.95)
    assert found.t_interval == pytest.approx((wanted.low, wanted.high))
    assert found.verdict == "win"
    assert found.bootstrap[0] <= found.mean <= found.bootstrap[1]
    unpaired = np.quantile(draws_first[0], [0.025, 0.975])
    assert found.bootstrap[1] - found.bootstrap[0] < 0.2 * (unpaired[1] - unpaired[0])
    assert compare(first, first, draws_first, draws_first).verdict == "tie"  # type: ignore[union-attr]
    alone = compare({0: first[0]}, {0: second[0]}, draws_first, draws_second)
    assert alone is not None
    assert alone.verdict == "undecided"  # one seed says nothing
