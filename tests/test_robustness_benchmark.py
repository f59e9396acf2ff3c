"""The robustness benchmark: its cells, its data, and what it makes of stored samples."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fusepress.pipeline.corrupt import failures_of
from fusepress.pipeline.recipe import load_recipe
from fusepress.pipeline.task import Batch, load_task

ROOT = Path(__file__).resolve().parents[1]
STREET = ROOT / "examples" / "street" / "recipe.yaml"
CLEAN = ("", 0)


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """The modules of the benchmark."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        names = ("cells", "evaluate", "report", "run")
        yield SimpleNamespace(**{name: importlib.import_module(f"benchmarks.robustness.{name}") for name in names})


@pytest.fixture(scope="module")
def cells(bench: Any) -> list[Any]:
    return list(bench.cells.planned(0.4, 100, [0, 1]))


def test_every_cell_is_a_recipe_of_its_own(cells: list[Any]) -> None:
    assert len({cell.name for cell in cells}) == len({cell.key for cell in cells}) == len(cells)
    for cell in cells:
        recipe = load_recipe(STREET, cell.overrides()).recipe
        assert recipe.finetune is not None
        assert recipe.prune is not None
        assert (recipe.score.beta, recipe.prune.macs, recipe.seed) == (cell.beta, cell.macs, cell.seed)
        assert (recipe.finetune.modality_dropout > 0) == (cell.remedy in ("dropout", "more dropout", "both"))
        assert (recipe.score.robustness > 0) == (cell.remedy in ("scores", "both"))


def test_every_condition_is_a_failure_of_the_street_and_the_gated_ones_are_the_recipes(bench: Any) -> None:
    gated, every = bench.evaluate.CONDITIONS, bench.evaluate.EVERY_CONDITION
    loaded = load_recipe(STREET)
    task = load_task(loaded.recipe.task, base=loaded.base)
    assert {failure for failure, _ in every[1:]} <= set(failures_of(task))
    assert {failure for failure, _ in gated[1:]} == set(loaded.recipe.gates.robustness)
    assert set(gated) <= set(every)


def test_the_healthy_frames_are_the_streets_with_both_sensors_alive(bench: Any) -> None:
    loaded = load_recipe(STREET)
    user = load_task(loaded.recipe.task, base=loaded.base).user
    user.batch_size = 4
    street = next(user.batches("train", 0, start=1))
    healthy = next(bench.cells.HealthyTask(user).batches("train", 0, start=1))
    assert healthy.sample_ids == street.sample_ids
    dead = [not image.any() or not points.any() for image, points in zip(*street_inputs(street), strict=True)]
    assert any(dead)
    for row, was_dead in enumerate(dead):
        same = all(torch.equal(healthy.inputs[name][row], street.inputs[name][row]) for name in street.inputs)
        assert same != was_dead
    assert all(bool(image.any()) and bool(points.any()) for image, points in zip(*street_inputs(healthy), strict=True))
    task = bench.cells.HealthyTask(user)
    assert task.fingerprint("eval") == user.fingerprint("eval")
    assert task.fingerprint("train") != user.fingerprint("train")


def street_inputs(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    return batch.inputs["image"], batch.inputs["points"]


@pytest.fixture
def store(tmp_path: Path, bench: Any, cells: list[Any]) -> Path:
    """One cell that is as good as the dense network until the LiDAR dies."""
    cell, run = cells[0], bench.run
    generator = np.random.default_rng(0)
    for network, lost in ((None, 0.0), (cell, 0.25)):
        for condition in bench.evaluate.EVERY_CONDITION:
            batches = run.GATE_BATCHES if condition in run.CONDITIONS else run.LOOK_BATCHES
            right = 0.9 if condition == CLEAN else 0.7 - (lost if condition == ("lidar_blank", 3) else 0.0)
            count = 16 * batches
            either = np.full((count, 6), 100.0)
            common = np.round(100 * right + generator.normal(0, 2, (count, 6)))
            found: Any = SimpleNamespace(
                stats={"intersection": common, "union": either},
                sample_ids=[str(i) for i in range(count)],
                groups=[str(i // 4) for i in range(count)],
            )
            run.samples_of(tmp_path, network).keep(condition, batches, found)
    (tmp_path / run.CONSTANT).write_text(json.dumps({"miou": 0.2}))
    figures = {"macs": 4.0, "latency.mean_ms": {"value": 0.4, "low": 0.3, "high": 0.5}}
    run.figures_of(tmp_path, cell).parent.mkdir()
    run.figures_of(tmp_path, cell).write_text(json.dumps({"baseline": {**figures, "macs": 10.0}, "finetune": figures}))
    return tmp_path


def test_the_report_says_which_gate_caught_it(store: Path, tmp_path: Path, bench: Any, cells: list[Any]) -> None:
    bench.report.write_report(store, [cells[0]], ["another"], tmp_path / "results", "python -m it")
    found = json.loads((tmp_path / "results" / "robustness.json").read_text())
    [row] = found["cells"]
    says = {one["gate"]: one["verdict"] for one in row["verdicts"]}
    assert says["robustness.lidar_blank"] == "FAIL"
    assert {gate for gate, verdict in says.items() if verdict != "PASS"} == {
        "robustness.lidar_blank",
        "robustness.lidar_blank.min",
    }
    extra = next(one for one in row["verdicts"] if one["gate"] == "robustness.lidar_blank")
    assert extra["value"] == pytest.approx(0.25, abs=0.01)
    assert row["macs"] == pytest.approx(0.4)
    assert found["every_failure"]["dense"].keys() == found["every_failure"][cells[0].name].keys()
    text = (tmp_path / "results" / "robustness.md").read_text()
    assert "| healthy | 0 | none | 40.0 % | 0.400 (0.300 to 0.500) |" in text
    assert "Not run yet: another." in text
    svg = (tmp_path / "results" / "beta.svg").read_bytes()
    bench.report.write_report(store, [cells[0]], [], tmp_path / "again", "python -m it")
    assert (tmp_path / "again" / "beta.svg").read_bytes() == svg


def test_fewer_batches_are_the_first_of_more(store: Path, bench: Any) -> None:
    samples, few_batches, batches = bench.run.samples_of(store, None), bench.run.LOOK_BATCHES, bench.run.GATE_BATCHES
    whole, groups = samples.load(CLEAN, batches)
    few, their_groups = samples.load(CLEAN, few_batches)
    assert np.array_equal(whole["union"][: len(few["union"])], few["union"])
    assert their_groups == groups[: 16 * few_batches]
    assert not samples.has([("camera_dark", 1)], batches)
    with pytest.raises(FileNotFoundError, match="camera_dark"):
        samples.load(("camera_dark", 1), batches)


def test_cells_are_told_apart_by_all_that_shapes_them(bench: Any) -> None:
    one = bench.cells.Cell(data="healthy", beta=0.0, remedy="none", macs=0.4, steps=100, seed=0)
    other = bench.cells.Cell(data="dead sensors", beta=0.0, remedy="none", macs=0.4, steps=100, seed=0)
    assert one.overrides() == other.overrides()
    assert one.key != other.key
