"""Gates against a stored release: the reviewed file, and what is judged against it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusepress.pipeline.api import gate, update_baseline
from fusepress.pipeline.cli import run as fusepress
from fusepress.pipeline.errors import StoreError, UsageError
from fusepress.pipeline.evidence import Artifact, Kind, Measurement, RunRecord, StageRecord, Verdict, read_run
from fusepress.pipeline.gates import (
    Condition,
    Replicates,
    judge,
    load_baseline,
    make_baseline,
    save_baseline,
    save_replicates,
)
from fusepress.pipeline.recipe import GatesConfig, Recipe, ReleaseGate
from fusepress.pipeline.store import atomic_write_text, sha256_file
from fusepress.pipeline.text import print_verdicts

ONNX = "a" * 64


def replicates(dense: float = 0.7, released: float = 0.68, noise: float = 0.001, **changes: Any) -> Replicates:
    """Both models scatter together by 0.05; their difference by `noise`."""
    generator = np.random.default_rng(0)
    common = 0.05 * generator.normal(size=1000)
    drawn = np.stack([dense + common, released + common + noise * generator.normal(size=1000)], axis=1)
    clean = Condition(dense={"miou": dense}, compressed={"miou": released}, replicates={"miou": drawn})
    fields: dict[str, Any] = {"clean": clean, "samples": 400, "clusters": 100, "artifact_sha256": ONNX}
    return Replicates(**{**fields, **changes})


def record(latency_ms: float = 4.0, *, half: float = 0.02, kind: Kind = "measured", **changes: Any) -> RunRecord:
    latency = Measurement(
        name="latency.mean_ms",
        value=latency_ms,
        low=latency_ms - half,
        high=latency_ms + half,
        unit="ms",
        n=100,
        kind=kind,
        device="host-cpu",
        power_mode="default",
        precision="fp32",
        artifact_sha256=ONNX,
        batch=1,
    )
    fields: dict[str, Any] = {
        "schema": 1,
        "name": "v1",
        "fusepress": "0",
        "target": "host-cpu",
        "recipe_sha256": "0",
        "task_sha256": "1",
        "checkpoint_sha256": "2",
        "seed": 0,
        "target_profile": {"power_mode": "default", "precision": "fp32"},
        "task": {"name": "T", "metrics": {"miou": "max"}},
        "stages": [StageRecord(name="verify", status="done", measurements=[latency])],
        "artifacts": {"onnx": Artifact(path="m.onnx", sha256=ONNX)},
    }
    return RunRecord(**{**fields, **changes})


RELEASE = make_baseline(record(), replicates(), [], {"miou": "max"})


def judged(now: Replicates, run: RunRecord | None = None, **limits: Any) -> list[Verdict]:
    gates = GatesConfig(release=ReleaseGate(file="baseline.json", **(limits or {"max_drop": {"miou": 0.01}})))
    return judge(run or record(), now, gates, {"miou": "max"}, baseline=RELEASE)


@pytest.mark.parametrize(
    ("released", "expected"), [(0.68, "PASS"), (0.675, "PASS"), (0.67, "INCONCLUSIVE"), (0.65, "FAIL"), (0.7, "PASS")]
)
def test_on_the_same_dense_model_the_paired_drops_are_compared(released: float, expected: str) -> None:
    [verdict] = judged(replicates(released=released))
    assert (verdict.gate, verdict.verdict) == ("release.miou", expected)
    assert verdict.value == pytest.approx(0.68 - released)
    assert verdict.high is not None
    assert verdict.low is not None
    assert verdict.high - verdict.low < 0.01, "what both models have in common is out of it"
    assert "same dense model" in verdict.why


def test_the_two_half_widths_are_joined_in_quadrature() -> None:
    [verdict] = judged(replicates(released=0.675))
    then = RELEASE.metrics["miou"].drop
    half = then.high - then.value  # the scatter of both is the same, up to the same draws
    assert verdict.high == pytest.approx(0.005 + half * 2**0.5, rel=0.02)


def test_from_another_dense_model_the_metrics_are_compared_unpaired() -> None:
    [verdict] = judged(replicates(dense=0.71, released=0.675))
    assert verdict.verdict == "INCONCLUSIVE"
    assert "unpaired" in verdict.why
    assert "more samples" in verdict.why
    assert "in both releases would decide it" in verdict.why, "the stored half-width does not shrink by itself"
    assert verdict.value == pytest.approx(0.005)
    assert verdict.high is not None
    assert verdict.high > 0.1


@pytest.mark.parametrize(
    ("latency_ms", "expected"), [(4.0, "PASS"), (4.15, "PASS"), (4.2, "INCONCLUSIVE"), (4.4, "FAIL"), (3.0, "PASS")]
)
def test_the_rise_of_the_latency_is_relative(latency_ms: float, expected: str) -> None:
    [verdict] = judged(replicates(), record(latency_ms), max_slowdown=0.05)
    assert (verdict.gate, verdict.verdict) == ("release.latency.mean_ms", expected)
    assert verdict.value == pytest.approx(latency_ms / 4 - 1)


def test_a_prediction_is_not_compared_with_a_measurement() -> None:
    [verdict] = judged(replicates(), record(kind="predicted"), max_slowdown=0.05)
    assert verdict.verdict == "INCONCLUSIVE"
    assert "this one is predicted, the stored one measured" in verdict.why


@pytest.mark.parametrize(
    ("run", "limits", "why"),
    [
        (record(target="rtx-4090"), {"max_drop": {"miou": 0.1}}, "is for host-cpu / default, this run for rtx-4090"),
        (record(), {"max_drop": {"iou_cat": 0.1}}, "the task has no metric 'iou_cat'; it has miou"),
        (record(artifacts={}), {"max_slowdown": 0.1}, "there is no ONNX to release"),
    ],
)
def test_what_cannot_be_compared_fails_with_the_reason(run: RunRecord, limits: dict[str, Any], why: str) -> None:
    [verdict] = judged(replicates(), run, **limits)
    assert verdict.verdict == "FAIL"
    assert why in verdict.why


def test_without_the_file_the_gate_fails_and_says_how_to_write_it() -> None:
    gates = GatesConfig(release=ReleaseGate(file="baseline.json", max_drop={"miou": 0.1}, max_slowdown=0.1))
    verdicts = judge(record(), replicates(), gates, {"miou": "max"})
    assert [v.verdict for v in verdicts] == ["FAIL", "FAIL"]
    assert all("--update-baseline" in v.why for v in verdicts)


def test_below_20_clusters_the_release_is_not_judged() -> None:
    [verdict] = judged(replicates(clusters=6, samples=18))
    assert verdict.verdict == "INCONCLUSIVE"
    assert "only 6 clusters" in verdict.why


# ----------------------------------------------------------------------------------------------------------- the file


def test_a_stored_release_comes_back_and_tells_what_changed(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    assert len(save_baseline(path, RELEASE)) > 10
    assert load_baseline(path) == RELEASE
    assert save_baseline(path, RELEASE) == []
    changed = make_baseline(record(5.0), replicates(), [], {"miou": "max"})
    assert save_baseline(path, changed) == [
        "latency.latency.mean_ms.value: 4.0 -> 5.0",
        "latency.latency.mean_ms.low: 3.98 -> 4.98",
        "latency.latency.mean_ms.high: 4.02 -> 5.02",
    ]
    assert json.loads(path.read_text())["onnx_sha256"] == ONNX


@pytest.mark.parametrize("text", ["", "{}", '{"schema": 2}', "[1]"])
def test_a_damaged_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "baseline.json"
    path.write_text(text)
    with pytest.raises(StoreError, match="expected a stored release of schema 1"):
        load_baseline(path)


@pytest.mark.parametrize("change", [{"high": float("nan")}, {"low": float("-inf")}, {"low": 0.03, "high": 0.01}])
def test_figures_that_are_no_interval_are_refused(tmp_path: Path, change: dict[str, float]) -> None:
    """An interval of NaN would end in a traceback, one the wrong way round in a narrow one."""
    path = tmp_path / "baseline.json"
    stored = json.loads(RELEASE.to_json())
    stored["metrics"]["miou"]["drop"] |= change
    path.write_text(json.dumps(stored))
    with pytest.raises(StoreError, match="expected a stored release of schema 1"):
        load_baseline(path)


def test_a_run_that_did_not_pass_is_no_release() -> None:
    bad = Verdict(gate="accuracy.miou", verdict="FAIL", why="w")
    worse = Verdict(gate="release.miou", verdict="FAIL", why="w")
    with pytest.raises(UsageError, match=r"expected a run that passed its gates.*got accuracy\.miou"):
        make_baseline(record(), replicates(), [bad, worse], {"miou": "max"})
    assert make_baseline(record(), replicates(), [worse], {"miou": "max"}).release == "v1"


# ------------------------------------------------------------------------------------------------------ in a run folder


def _run_folder(folder: Path, now: Replicates, latency_ms: float = 4.0) -> Path:
    """A run folder as `compress` leaves it, as far as the gates read it."""
    save_replicates(folder / "verify/replicates.npz", now)
    stored = sha256_file(folder / "verify/replicates.npz")
    artifacts = {"onnx": ONNX, "replicates": stored, "dense_onnx": "c" * 64}
    named = {name: Artifact(path=f"verify/{name}.npz", sha256=sha) for name, sha in artifacts.items()}
    run = record(latency_ms, artifacts=named, name=folder.name)
    atomic_write_text(folder / "run.json", run.to_json())
    gates = {"accuracy": {"max_drop": 0.05}, "release": {"file": "../baseline.json", "max_drop": {"miou": 0.01}}}
    recipe = Recipe.model_validate({"task": "t.py:T", "checkpoint": "c", "gates": gates})
    atomic_write_text(folder / "recipe.json", json.dumps(recipe.model_dump(mode="json")))
    return folder


def test_the_command_stores_a_release_and_judges_the_next_run_against_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = _run_folder(tmp_path / "v1", replicates())
    assert fusepress(["gate", str(first)]) == 3  # there is no stored release yet
    assert not (tmp_path / "baseline.json").exists()
    assert fusepress(["gate", str(first), "--update-baseline"]) == 0
    assert "metrics.miou.released.value: none -> 0.68" in capsys.readouterr().err
    second = _run_folder(tmp_path / "v2", replicates(released=0.66))
    assert fusepress(["gate", str(second)]) == 3
    assert read_run(second).why.startswith("1 of 2 gates failed, 1 passed. release.miou")
    assert load_baseline(second / "baseline.json") == load_baseline(tmp_path / "baseline.json")
    assert fusepress(["gate", str(second), "-o", "gates.release.max_drop.miou=0.05"]) == 0


def test_the_verdict_that_is_let_pass_is_the_users(tmp_path: Path) -> None:
    folder = _run_folder(tmp_path / "v1", replicates(clusters=5, samples=15))
    override = ["-o", "gates.release=null"]
    assert fusepress(["gate", str(folder), *override]) == 4
    assert fusepress(["gate", str(folder), *override, "--fail-on", "fail"]) == 0
    assert gate(folder, overrides=["gates.release=null"]).record.verdict == "INCONCLUSIVE"


def test_a_release_needs_a_file_to_be_stored_in(tmp_path: Path) -> None:
    folder = _run_folder(tmp_path / "v1", replicates())
    recipe = json.loads((folder / "recipe.json").read_text())
    recipe["gates"]["release"] = None
    (folder / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(UsageError, match="name one with --baseline FILE"):
        update_baseline(folder)
    path, changes = update_baseline(folder, tmp_path / "other.json")
    assert path.exists()
    assert changes


def test_a_label_in_brackets_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Strata are the task's words; `[/night]` would end a style that was never begun."""
    print_verdicts([Verdict(gate="floors.miou@[/night]", verdict="PASS", why="w")])
    assert "floors.miou@[/night]" in capsys.readouterr().out
