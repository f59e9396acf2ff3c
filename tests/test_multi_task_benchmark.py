"""The table of the multi-task student, from records as train_multi.py and a run leave them."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXPERTS = {
    "segmentation": {"miou": 0.9},
    "detection": {"nds": 0.8},
    "depth": {"depth_object_delta1": 0.7},
    "waypoints": {"waypoint_ade_m": 0.4},
}
TOGETHER = {"miou": 0.8, "nds": 0.8, "depth_object_delta1": 0.75, "waypoint_ade_m": 0.2}


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """`benchmarks` is a folder of the checkout, not of the installed package."""
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(ROOT))
    yield importlib.import_module("benchmarks.multi_task")
    patch.undo()


def records() -> dict[str, dict[str, Any]]:
    shared = {"command": "python train_multi.py", "n": 96, "versions": {"torch": "2"}}
    found = {name: {"params": 100, "metrics": metrics, **shared} for name, metrics in EXPERTS.items()}
    return {**found, "distilled": {"params": 150, "metrics": TOGETHER, **shared}}


def test_a_student_stands_beside_all_experts_in_parallel(bench: ModuleType) -> None:
    rows = bench.seed_rows(records())
    assert rows["experts"]["params"] == 400
    assert rows["experts"]["mean"] == pytest.approx((0.9 + 0.8 + 0.7 + 0.6) / 4)
    assert rows["distilled"]["mean"] == pytest.approx((0.8 + 0.8 + 0.75 + 0.8) / 4)
    assert rows["distilled"]["fewer_params"] == pytest.approx(1 - 150 / 400)
    assert rows["distilled"]["lost_to_the_expert"] == pytest.approx(
        {"segmentation": 0.1, "detection": 0.0, "depth": -0.05, "waypoints": -0.2}
    )
    assert "student" not in rows


def test_a_displacement_of_more_than_a_metre_scores_nothing(bench: ModuleType) -> None:
    assert bench.score("waypoints", {"waypoint_ade_m": 1.5}) == 0.0
    assert bench.score("waypoints", {"waypoint_ade_m": 0.25}) == 0.75


def test_a_compressed_network_is_judged_stage_by_stage(bench: ModuleType) -> None:
    measured = [
        {"name": "accuracy.score", "value": 0.75},
        {"name": "accuracy.miou", "value": 0.8},
        {"name": "robustness.camera_blank.3.score", "value": 0.4},
        {"name": "macs", "value": None},
    ]
    stages = [{"name": "finetune", "measurements": measured}, {"name": "score", "measurements": []}]
    assert bench.compressed_row({"stages": stages}) == {
        "finetune": {"accuracy.score": 0.75, "robustness.camera_blank.3.score": 0.4}
    }


def test_seeds_that_are_not_complete_do_not_count(bench: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a folder seed-N with the records of segmentation"):
        bench.collected(tmp_path)
    for seed in (0, 1):
        folder = tmp_path / "runs" / f"seed-{seed}"
        folder.mkdir(parents=True)
        for name, record in records().items():
            if seed == 0 or name != "depth":
                (folder / f"{name}.json").write_text(json.dumps(record))
    control = tmp_path / "runs" / "seed-0" / "trained-on" / "run.json"
    control.parent.mkdir()
    stage = {"name": "finetune", "measurements": [{"name": "accuracy.score", "value": 0.75}]}
    control.write_text(json.dumps({"stages": [stage]}))
    bench.main(["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "table.json")])
    table = json.loads((tmp_path / "table.json").read_text())
    assert list(table["seeds"]) == ["0"]
    assert table["seeds"]["0"]["n"] == 96
    assert table["seeds"]["0"]["trained-on"] == {"finetune": {"accuracy.score": 0.75}}
    assert "compressed" not in table["seeds"]["0"]


def test_the_tasks_are_those_that_are_trained(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    street = ROOT / "examples" / "street"
    monkeypatch.syspath_prepend(str(street))
    found = importlib.util.spec_from_file_location("train_multi", street / "train_multi.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    assert module.SCORES == bench.SCORES
    assert tuple(module.EXPERTS) == bench.EXPERTS
    assert module.STUDENTS == bench.STUDENTS
