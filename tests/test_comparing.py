"""Runs side by side: which of them no other one beats, what they differ in, and the page that shows it."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusepress.pipeline.cli import run as fusepress
from fusepress.pipeline.comparing import compare_runs
from fusepress.pipeline.errors import StoreError, UsageError
from fusepress.pipeline.evidence import Measurement, RunRecord, StageRecord, Verdict
from fusepress.pipeline.report.comparison import render
from tests.test_report import check_page


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
    return {row.name: row.beaten_by for row in compare_runs(rows).runs}


def test_a_run_is_beaten_by_one_that_is_no_worse_in_both(tmp_path: Path) -> None:
    rows = [
        write(tmp_path / "small", 0.70, 2.0),
        write(tmp_path / "large", 0.80, 4.0),
        write(tmp_path / "bad", 0.70, 4.0),
        write(tmp_path / "same", 0.80, 4.0),
        write(tmp_path / "unfinished", None, 1.0),
    ]
    assert beaten(rows) == {"small": (), "large": (), "bad": ("small", "large", "same"), "same": (), "unfinished": ()}
    assert [row.to_dict()["pareto"] for row in compare_runs(rows).runs] == [True, True, False, True, False]


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
    for row, (a, ms) in zip(compare_runs(rows).runs, figures, strict=True):
        dominated = any(b >= a and n <= ms and (b, n) != (a, ms) for b, n in figures)
        assert bool(row.beaten_by) == dominated


def test_the_command_prints_a_table_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [str(write(tmp_path / "a", 0.9, 1.0)), str(write(tmp_path / "b", 0.5, 9.0))]
    assert fusepress(["compare", *rows]) == 0
    said = capsys.readouterr().out
    assert "b is beaten by a" in said
    assert "camera_blank.3" in said
    assert "0.4 " in said
    assert fusepress(["compare", *rows, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["runs"]
    assert [row["pareto"] for row in told] == [True, False]
    assert told[0]["macs"] == 2e6
    assert told[0]["worst_failure"] == ["camera_blank.3", 0.4]


def test_one_run_is_not_compared(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected two or more runs to compare; got 1"):
        compare_runs([write(tmp_path / "a", 0.9, 1.0)])


def test_accuracies_of_different_tasks_are_not_compared(tmp_path: Path) -> None:
    mine = write(tmp_path / "a", 0.9, 1.0, task={"name": "Street", "metrics": {"m": "max"}})
    other = write(tmp_path / "b", 0.9, 1.0, task={"name": "Depth", "metrics": {"m": "max"}})
    with pytest.raises(UsageError, match=r"got Street judged by 'm' \(max\) at .*a, and Depth judged by 'm'.* at .*b;"):
        compare_runs([mine, other])
    with pytest.raises(UsageError, match=r"a task judged by 'm' \(max\) at .*, and a task judged by 'm' \(min\)"):
        compare_runs([write(tmp_path / "c", 0.9, 1.0), write(tmp_path / "d", 0.9, 1.0, way="min")])


def test_a_run_named_twice_is_refused_and_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    rows = [write(tmp_path / "x" / "run", 0.9, 1.0), write(tmp_path / "y" / "run", 0.8, 2.0)]
    assert beaten(rows) == {"x/run": (), "y/run": ("x/run",)}
    with pytest.raises(UsageError, match=r"expected each run once; got .*x/run twice"):
        compare_runs([rows[0], tmp_path / "y" / ".." / "x" / "run"])


def recipes(rows: list[Path], *texts: str | None) -> None:
    for row, text in zip(rows, texts, strict=True):
        if text is not None:
            (row / "recipe.json").write_text(text)


def test_differences_of_recipes_and_environments_are_told_key_by_key(tmp_path: Path) -> None:
    rows = [
        write(tmp_path / "a", 0.9, 1.0, environment={"cores": 2, "tools": {"torch": "2.9"}}),
        write(tmp_path / "b", 0.8, 2.0, environment={"cores": 2, "tools": {"torch": "2.8"}}, seed=1),
        write(tmp_path / "c", 0.8, 2.0, environment={"cores": 2, "tools": {"torch": "2.9"}}, task_sha256="f" * 64),
    ]
    recipes(rows, '{"prune": {"macs": 0.4, "floor": 0.1}}', '{"prune": {"macs": 0.5, "floor": 0.1}, "x": [1]}', None)
    found = compare_runs(rows)
    assert found.recipe == {"prune.macs": (0.4, 0.5, None), "x": (None, [1], None)}
    assert found.environment == {
        "seed": (0, 1, 0),
        "task_sha256": ("", "", "f" * 64),
        "environment.tools.torch": ("2.9", "2.8", "2.9"),
    }
    assert any(note.startswith("the task's code is not the same") for note in found.notes)
    assert "no recipe.json in c: recipes are compared without it" in found.notes
    page = check_page(render(found))
    assert f"task_sha256 {'f' * 12}" in page.words.replace("\u2013 ", "").replace("  ", " ")
    assert "environment.tools.torch 2.9 2.8 2.9" in page.words
    recipes(rows[:1], "{")
    with pytest.raises(StoreError, match=r"expected JSON; got a damaged file at .*recipe\.json"):
        compare_runs(rows)


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"value": 0.7}, "the dense models' accuracies differ"),
        ({"n": 12}, "different numbers of samples"),
        ({"kind": "measured"}, "some latencies are measured"),
    ],
)
def test_what_makes_figures_hard_to_compare_is_said(changes: dict[str, Any], note: str, tmp_path: Path) -> None:
    rows = [write(tmp_path / name, 0.9, 1.0) for name in "ab"]
    recipes(rows, "{}", "{}")
    for row, changed in zip(rows, ({}, changes), strict=True):
        record = RunRecord.model_validate_json((row / "run.json").read_text())
        dense = Measurement(name="accuracy.m", value=changed.get("value", 0.95), kind="simulated")
        record.stages.insert(0, StageRecord(name="baseline", status="done", measurements=[dense]))
        accuracy, latency = record.stages[-1].measurements[:2]
        accuracy.n, latency.kind = changed.get("n", 64), changed.get("kind", "predicted")
        (row / "run.json").write_text(record.to_json())
    (said,) = compare_runs(rows).notes
    assert note in said


def test_a_latency_of_another_device_is_not_the_targets(tmp_path: Path) -> None:
    rows = [write(tmp_path / name, 0.9, 2.0) for name in "ab"]
    record = RunRecord.model_validate_json((rows[0] / "run.json").read_text())
    for value, device, kind in ((1.0, "orin", "measured"), (1.5, "orin", "predicted"), (0.1, "host-cpu", "measured")):
        record.stages[-1].measurements.append(
            Measurement(name="latency.mean_ms", value=value, device=device, kind=kind)  # type: ignore[arg-type]
        )
    (rows[0] / "run.json").write_text(record.to_json())
    latency = compare_runs(rows).runs[0].latency
    assert latency is not None
    assert (latency.value, latency.kind) == (1.0, "measured")


# ------------------------------------------------------------------------------------------------------------ the page


def points(drawing: str, shape: str) -> list[tuple[float, float]]:
    (found,) = re.findall(rf'<{shape} points="([^"]*)"', drawing)
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in found.split())]


def drawings(page: str) -> list[str]:
    return re.findall(r'<svg class="chart".*?</svg>', page, re.DOTALL)


@pytest.mark.parametrize("way", ["max", "min"])
def test_the_front_is_a_staircase_through_the_runs_that_no_other_beats(way: str, tmp_path: Path) -> None:
    sign = 1 if way == "max" else -1
    rows = [
        write(tmp_path / "slow", 5 + sign * 3.0, 4.0, way=way),
        write(tmp_path / "fast", 5 + sign * 1.0, 1.0, way=way),
        write(tmp_path / "middle", 5 + sign * 2.0, 2.0, way=way),
        write(tmp_path / "beaten", 5 + sign * 1.5, 3.0, way=way),
    ]
    page = render(compare_runs(rows))
    check_page(page)
    (drawing,) = drawings(page)
    ET.fromstring(drawing)
    stairs = points(drawing, 'polyline class="c-front"')
    assert len(stairs) == 5  # three runs, and a corner between each two
    xs, ys = zip(*stairs, strict=True)
    assert list(xs) == sorted(xs)
    assert list(ys) == sorted(ys, reverse=way == "max"), "down the page is less"
    assert (xs[3] - xs[1]) == pytest.approx(2 * (xs[1] - xs[0]), abs=0.3)  # 1, 2 and 4 ms
    assert "On the front: 1, 2, 3. Beaten: 4." in check_page(page).words


def test_targets_have_drawings_of_their_own_and_runs_without_figures_are_named(tmp_path: Path) -> None:
    other = {"power_mode": "30W", "precision": "fp16"}
    gate = Verdict(gate="latency.mean_ms", verdict="FAIL", limit=0.5, value=1.0, why="w")
    verify = StageRecord(name="export", status="done", verdicts=[gate])
    rows = [
        write(tmp_path / "a", 0.9, 1.0),
        write(tmp_path / "b", 0.5, 9.0, target_profile=other, verdict="FAIL"),
        write(tmp_path / "<c>", None, 9.0, verdict=None, stages=[verify]),
    ]
    page = check_page(render(compare_runs(rows)))
    assert "Not drawn, for want of accuracy or latency of the release: 3 (<c>)." in page.words
    assert "not judged" in page.words
    assert "2 (FAIL)" in page.words
    assert "latency.mean_ms no gate no gate FAIL 1.00 ms, limit 0.500 ms" in page.words
    titles = [str(attrs["aria-label"]) for attrs in page.all("svg") if "aria-label" in attrs]
    assert [title.partition(":")[0] for title in titles] == [
        "Accuracy over latency on orin / MAXN",
        "Accuracy over latency on orin / 30W",
    ]


def test_the_command_writes_a_page_beside_the_text_and_the_same_runs_give_the_same_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [str(write(tmp_path / "a", 0.9, 1.0)), str(write(tmp_path / "b", 0.5, 9.0))]
    out = tmp_path / "compared.html"
    assert fusepress(["compare", *rows, "--html", str(out)]) == 0
    assert f"page         {out}" in capsys.readouterr().out
    first = out.read_bytes()
    assert fusepress(["compare", *rows, "--html", str(out), "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"task", "runs", "recipe", "environment", "notes"}
    assert out.read_bytes() == first
    assert fusepress(["compare", *rows, "--html", str(tmp_path)]) == 2
    assert "is a directory" in capsys.readouterr().err
