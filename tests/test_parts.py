"""Budgets of branches and of the whole pipeline: `measure --parts` on this host, and gates on what it adds to a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fusepress.export.onnx import export_onnx
from fusepress.pipeline import api
from fusepress.pipeline.errors import TaskError, UsageError
from fusepress.pipeline.evidence import Artifact, Kind, Measurement, RunRecord, StageRecord
from fusepress.pipeline.gates.latency import judge_latency
from fusepress.pipeline.measuring import budget_verdicts
from fusepress.pipeline.recipe import LatencyGate
from fusepress.pipeline.stages.parts import outside_ms, pipeline_of, pipeline_row
from fusepress.pipeline.store import sha256_file
from fusepress.pipeline.text import measured_lines
from tests.export_toys import inputs, two_branch
from tests.recovery_runs import toy_project

BRANCHES = {"camera": ["camera"], "lidar": ["pillar", "pillar2", "lidar"]}


def record_of(model: Path) -> RunRecord:
    return RunRecord(
        name="run", fusepress="0", target="host-cpu", recipe_sha256="0", task_sha256="0", checkpoint_sha256="0", seed=0,
        target_profile={"family": "host", "power_mode": "host", "precision": "fp32"},
        task={
            "name": "Task", "metrics": {"miou": "max"}, "branches": BRANCHES,
            "outside": {"lidar.voxelise": {"host-cpu": 50.0}, "decode": {"host-cpu": 25.0, "rtx-4090": 1.0}},
        },
        stages=[StageRecord(name="verify", status="done")],
        artifacts={"onnx": Artifact(path="model.onnx", sha256=sha256_file(model))},
    )  # fmt: skip


def test_a_run_s_branches_are_measured_and_gated_with_what_lies_outside(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    export_onnx(two_branch(), inputs(1), ["seg", "cls"], run / "model.onnx", opset=17)
    recipe = {
        "task": "task.py:Task", "checkpoint": "x.safetensors", "target": "host-cpu",
        "gates": {"latency": {"parts": {"camera": 10_000.0, "e2e": 75.0}, "schedule": "serial"}},
    }  # fmt: skip
    (run / "recipe.json").write_text(json.dumps(recipe))
    (run / "run.json").write_text(record_of(run / "model.onnx").to_json())
    found = api.measure(run, parts="serial", seconds=0.5, budgets=["rest.mean_ms=10000"])
    rows = {m.name: m for m in found.measurements}
    sha = sha256_file(run / "model.onnx")
    parts = [rows[f"latency.{part}.mean_ms"] for part in ("camera", "lidar", "rest")]
    assert all(row.artifact_sha256 == sha for row in parts)
    whole = rows["latency.e2e.mean_ms"]
    assert whole.value == pytest.approx(sum(row.value for row in parts) + 75.0)
    assert whole.note is not None
    assert "declared, not measured: lidar.voxelise, decode" in whole.note
    assert found.record is not None
    verify = found.record.stage("verify")
    assert verify is not None
    assert {v.gate: v.verdict for v in verify.verdicts} == {
        "latency.camera.mean_ms": "PASS",
        "latency.e2e.mean_ms": "FAIL",  # 75 ms are declared, and the network takes some
    }
    table = measured_lines(found)
    assert any(line.startswith("lidar.voxelise") for line in table)


def row(part: str, value: float, kind: Kind = "measured") -> Measurement:
    return Measurement(
        name=f"latency.{part}.mean_ms", value=value, low=0.9 * value, high=1.1 * value, unit="ms", device="orin",
        power_mode="MAXN", precision="int8", artifact_sha256="a", kind=kind,
    )  # fmt: skip


def test_a_gate_counts_a_measured_part_before_a_predicted_one() -> None:
    record = RunRecord(
        name="run", fusepress="0", target="orin", recipe_sha256="0", task_sha256="0", checkpoint_sha256="0", seed=0,
        target_profile={"power_mode": "MAXN", "precision": "int8"},
        artifacts={"onnx": Artifact(path="model.onnx", sha256="a")},
        stages=[StageRecord(name="verify", measurements=[row("camera", 5.0), row("camera", 9.0, "predicted")])],
    )  # fmt: skip
    gate = LatencyGate(parts={"camera": 6.0, "lidar": 4.0})
    camera, lidar = (finding.verdict for finding in judge_latency(record, gate))
    assert (camera.gate, camera.verdict, camera.value) == ("latency.camera.mean_ms", "PASS", 5.0)
    assert lidar.verdict == "FAIL"
    assert "no latency.lidar.mean_ms of the released artifact" in lidar.why


def test_the_whole_is_of_the_parts_kind_and_says_what_was_declared() -> None:
    rows = [row("camera", 6.0, "predicted"), row("lidar", 4.0, "predicted"), row("rest", 2.0, "predicted")]
    found = pipeline_of(rows, ["camera", "lidar"], {"lidar.voxelise": 3.0}, "parallel")
    whole = pipeline_row(found, rows, ["lidar.voxelise"])
    assert (whole.name, whole.kind, whole.value) == ("latency.e2e.mean_ms", "predicted", 9.0)
    assert whole.low == pytest.approx(0.9 * 4 + 3 + 0.9 * 2)
    assert whole.high == pytest.approx(1.1 * 4 + 3 + 1.1 * 2)
    assert whole.note is not None
    assert "taken not to slow each other" in whole.note


def test_the_whole_is_as_doubtful_as_its_parts() -> None:
    rows = [row("camera", 6.0), row("lidar", 4.0), row("rest", 2.0)]
    gate = LatencyGate(parts={"camera": 10.0, "lidar": 10.0, "e2e": 20.0})
    for note, expected in (
        (None, ("PASS", "PASS", "PASS")),
        ("unstable: it moved", ("PASS", "INCONCLUSIVE", "INCONCLUSIVE")),
    ):
        rows[1] = rows[1].model_copy(update={"note": note})
        whole = pipeline_row(pipeline_of(rows, ["camera", "lidar"], {}, "serial"), rows, [])
        assert budget_verdicts([*rows, whole], {"e2e.mean_ms": 20.0})[0].verdict == expected[2]
        record = RunRecord(
            name="run", fusepress="0", target="orin", recipe_sha256="0", task_sha256="0", checkpoint_sha256="0", seed=0,
            target_profile={"power_mode": "MAXN", "precision": "int8"},
            artifacts={"onnx": Artifact(path="model.onnx", sha256="a")},
            stages=[StageRecord(name="verify", measurements=[*rows, whole])],
        )  # fmt: skip
        assert tuple(found.verdict.verdict for found in judge_latency(record, gate)) == expected


def test_an_outside_stage_without_a_latency_for_the_target_is_refused() -> None:
    assert outside_ms({"decode": {"orin": 2}}, "orin") == {"decode": 2.0}
    message = r"expected milliseconds of the outside stage 'decode' on orin; got rtx-4090; add them"
    with pytest.raises(TaskError, match=message):
        outside_ms({"decode": {"rtx-4090": 2.0}}, "orin")
    with pytest.raises(TaskError, match=r"outside stage 'decode' on orin; got 2.0; add them to the task's `outside`"):
        outside_ms({"decode": 2.0}, "orin")


def test_an_onnx_file_does_not_say_its_branches(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"")
    with pytest.raises(UsageError, match=r"expected a run folder with parts; got .*; an ONNX file does not say"):
        api.measure(path, parts="serial")


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    """A dense release of the toy for a Jetson, with a gate on its parts."""
    recipe = {
        "task": "sparsify_toy.py:Toy", "checkpoint": "dense.safetensors", "target": "jetson-agx-orin-64gb",
        "quantize": {"precision": "fp16"}, "verify": {"replicates": 200},
        "gates": {"latency": {"parts": {"camera": 9.0, "lidar": 9.0, "e2e": 50.0}, "schedule": "parallel"}},
    }  # fmt: skip
    project = toy_project(tmp_path_factory.mktemp("parts"), recipe, steps=1)
    source = project / "sparsify_toy.py"
    outside = (
        '    outside = {"lidar.voxelise": {"jetson-agx-orin-64gb": 2.0}, "decode": {"jetson-agx-orin-64gb": 1.0}}\n'
    )
    source.write_text(source.read_text().replace('    keep = ["head"]\n', '    keep = ["head"]\n' + outside))
    return api.compress(project / "recipe.yaml", run=project / "runs" / "toy").record


def test_a_release_s_parts_are_predicted_as_files_of_their_own(compressed: RunRecord) -> None:
    verify = compressed.stage("verify")
    assert verify is not None
    rows = {row.name: row for row in verify.measurements if row.name.startswith("latency.")}
    parts = {name: rows[f"latency.{name}.mean_ms"] for name in ("camera", "lidar", "rest", "e2e")}
    whole = rows["latency.mean_ms"]
    for row_of_part in parts.values():
        assert (row_of_part.kind, row_of_part.device) == ("predicted", "jetson-agx-orin-64gb")
        assert row_of_part.artifact_sha256 == whole.artifact_sha256  # parts of the released file
    # branches at the same time, the LiDAR's behind its voxels; then the rest and the decoder
    lidar = 2.0 + parts["lidar"].value
    assert lidar > parts["camera"].value
    assert parts["e2e"].value == pytest.approx(lidar + parts["rest"].value + 1.0)
    # cut apart, the network has the same kernels and a few reformats more
    alone = sum(parts[name].value for name in ("camera", "lidar", "rest"))
    assert 0.95 * whole.value <= alone <= 1.6 * whole.value
    assert {v.gate for v in verify.verdicts} == {f"latency.{name}.mean_ms" for name in ("camera", "lidar", "e2e")}
