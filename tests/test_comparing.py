"""Runs side by side: which of them no other one beats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusepress.pipeline.cli import run as fusepress
from fusepress.pipeline.comparing import compare_runs
from fusepress.pipeline.errors import UsageError
from fusepress.pipeline.evidence import Measurement, RunRecord, StageRecord


def write(folder: Path, accuracy: float | None, latency_ms: float | None, *, way: str = "max", **changes: Any) -> Path:
    """A run folder with a release of these figures."""
    made = [
        Measurement(name="accuracy.m", value=accuracy, low=accuracy, high=accuracy, kind="simulated")
        if accuracy is not None
        else None,
        Measurement(name="latency.mean_ms", value=latency_ms, kind="predicted") if latency_ms is not None else None,
        Measurement(name="robustness.camera_blank.3.m", value=0.4, kind="simulated"),
        Measurement(name="robustness.lidar_half.3.m", value=0.6, kind="simulated"),
        Measurement(name="robustness.lidar_half.3.dense.m", value=0.1, kind="simulated"),
    ]
    before = [
        Measurement(name="accuracy.m", value=0.99, kind="simulated"),
        Measurement(name="macs", value=2e6, kind="measured"),
    ]
    fields: dict[str, Any] = {
        "schema": 1,
        "name": folder.name,
        "fusepress": "0",
        "target": "orin",
        "verdict": "PASS",
        "recipe_sha256": "",
        "task_sha256": "",
        "checkpoint_sha256": "",
        "seed": 0,
        "target_profile": {"power_mode": "MAXN", "precision": "fp16"},
        "task": {"metrics": {"m": way}},
        "stages": [
            StageRecord(name="prune", status="done", measurements=before),
            StageRecord(name="verify", status="done", measurements=[m for m in made if m is not None]),
        ],
    }
    folder.mkdir()
    (folder / "run.json").write_text(RunRecord(**{**fields, **changes}).to_json())
    return folder


def beaten(rows: list[Path]) -> dict[str, tuple[str, ...]]:
    return {row.name: row.beaten_by for row in compare_runs(rows)}


def test_a_run_is_beaten_by_one_that_is_no_worse_in_both(tmp_path: Path) -> None:
    rows = [
        write(tmp_path / "small", 0.70, 2.0),
        write(tmp_path / "large", 0.80, 4.0),
        write(tmp_path / "bad", 0.70, 4.0),
        write(tmp_path / "same", 0.80, 4.0),
        write(tmp_path / "unfinished", None, 1.0),
    ]
    assert beaten(rows) == {"small": (), "large": (), "bad": ("small", "large", "same"), "same": (), "unfinished": ()}
    assert [row.to_dict()["pareto"] for row in compare_runs(rows)] == [True, True, False, True, False]


def test_of_a_metric_of_which_less_is_better_less_wins(tmp_path: Path) -> None:
    rows = [write(tmp_path / "a", 2.0, 2.0, way="min"), write(tmp_path / "b", 3.0, 2.0, way="min")]
    assert beaten(rows) == {"a": (), "b": ("a",)}


def test_runs_for_other_targets_do_not_beat_each_other(tmp_path: Path) -> None:
    other = {"power_mode": "30W", "precision": "fp16"}
    rows = [write(tmp_path / "a", 0.9, 1.0), write(tmp_path / "b", 0.5, 9.0, target_profile=other)]
    assert beaten(rows) == {"a": (), "b": ()}


@settings(max_examples=30, deadline=None)
@given(figures=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 4)), min_size=2, max_size=7))
def test_the_front_is_what_nobody_dominates(
    figures: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = tmp_path_factory.mktemp("front")
    rows = [write(base / str(i), float(a), float(ms)) for i, (a, ms) in enumerate(figures)]
    for row, (a, ms) in zip(compare_runs(rows), figures, strict=True):
        dominated = any(b >= a and n <= ms and (b, n) != (a, ms) for b, n in figures)
        assert bool(row.beaten_by) == dominated


def test_the_command_prints_a_table_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [str(write(tmp_path / "a", 0.9, 1.0)), str(write(tmp_path / "b", 0.5, 9.0))]
    assert fusepress(["compare", *rows]) == 0
    said = capsys.readouterr().out
    assert "b is beaten by a" in said
    assert "camera_blank.3 0.4" in said
    assert fusepress(["compare", *rows, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["pareto"] for row in told] == [True, False]
    assert told[0]["macs"] == 2e6
    assert told[0]["worst_failure"] == ["camera_blank.3", 0.4]


def test_one_run_is_not_compared(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected two or more runs to compare; got 1"):
        compare_runs([write(tmp_path / "a", 0.9, 1.0)])
