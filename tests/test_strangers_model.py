"""A model of another shape, in a stranger's hand: init, compress, and a model that loads into their own class."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import fusepress
from fusepress.pipeline.cli import run
from fusepress.pipeline.task import load_task

TASK = Path(__file__).parent / "strangers_task.py"
RECIPE = {
    "task": "task.py:StrangersTask",
    "checkpoint": "mine.safetensors",
    "target": "jetson-agx-orin-64gb",
    "score": {"method": "altermoma", "beta": 1.0, "batches": 2, "reactivation_batches": 4},
    "prune": {"macs": 0.5, "align": 8},
    "finetune": {"steps": 20, "lr": 2e-3},
    "quantize": {"precision": "int8", "samples": 16},
    "verify": {"replicates": 200},
    "gates": {"accuracy": {"max_drop": 0.2}, "robustness": {"cameras_blank": {"max_extra_drop": 0.3}}},
}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stranger")
    assert run(["init", str(folder / "mine")]) == 0
    (folder / "mine/task.py").write_text(TASK.read_text())
    (folder / "mine/recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    code = run(["compress", str(folder / "mine/recipe.yaml"), "--run", str(folder / "runs/mine"), "--json"])
    assert code in (0, 4)
    return folder / "runs/mine"


def test_the_stranger_wrote_less_than_100_lines_for_the_task_and_no_base_class() -> None:
    lines = [line for line in TASK.read_text().splitlines() if line.strip() and not line.strip().startswith("#")]
    assert len(lines) < 100
    assert "class StrangersTask:" in lines


def test_most_channels_of_every_branch_are_prunable_and_the_budget_is_met(run_folder: Path) -> None:
    record = json.loads((run_folder / "run.json").read_text())
    stages = {stage["name"]: stage for stage in record["stages"]}
    macs = {
        name: next(m["value"] for m in stages[name]["measurements"] if m["name"] == "macs")
        for name in ("baseline", "prune")
    }
    assert macs["prune"] <= 0.5 * macs["baseline"]
    groups = stages["prune"]["details"]["groups"]
    assert {group["branch"] for group in groups} >= {"cameras", "lidar", "fusion"}
    assert sum(group["kept"] for group in groups) < sum(group["width"] for group in groups)


def test_the_pruned_model_loads_into_the_strangers_own_class_and_equals_the_onnx(run_folder: Path) -> None:
    from fusepress.export.runtime import OnnxSession

    task = load_task("task.py:StrangersTask", base=run_folder.parent.parent / "mine")
    model = fusepress.load(
        task.build_model(), run_folder / "prune/plan.json", run_folder / "finetune/finetuned.safetensors"
    )
    batch = next(task.batches("eval", 0))
    with torch.no_grad():
        outputs = model.eval()(**batch.inputs)
    exported = OnnxSession(run_folder / "export/model.onnx")(batch.inputs)
    assert list(exported) == ["heat", "size"]
    for name, value in outputs.items():
        torch.testing.assert_close(exported[name], value, rtol=1e-3, atol=1e-4)
    dense = sum(v.numel() for v in task.build_model().state_dict().values())
    assert sum(v.numel() for v in load_file(run_folder / "finetune/finetuned.safetensors").values()) < dense


def test_failures_that_no_gate_names_are_reported_beside_the_accuracy(run_folder: Path) -> None:
    record = json.loads((run_folder / "run.json").read_text())
    verify = next(stage for stage in record["stages"] if stage["name"] == "verify")
    assert verify["details"]["failures"] == ["cameras_blank.3", "lidar_blank.3", "lidar_half.3"]
    judged = {verdict["gate"] for stage in record["stages"] for verdict in stage["verdicts"]}
    assert "robustness.cameras_blank" in judged
    assert not any(gate.startswith("robustness.lidar") for gate in judged)
    assert "lidar blank" in (run_folder / "report.html").read_text()


def test_the_kit_for_the_device_is_there_and_no_engine_is_claimed(run_folder: Path) -> None:
    record = json.loads((run_folder / "run.json").read_text())
    assert "engine" not in record["artifacts"]
    kit = run_folder / record["artifacts"]["build_kit"]["path"]
    assert "trtexec" in (kit / "build.sh").read_text()
