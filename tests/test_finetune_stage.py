"""The finetune stage: what its key holds, what it tells, and what it leaves in the run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fusepress.pipeline.api import make_context, new_record, preflight
from fusepress.pipeline.console import Reporter
from fusepress.pipeline.evidence import StageRecord
from fusepress.pipeline.graph.apply import weights_bytes
from fusepress.pipeline.recipe import FinetuneConfig, load_recipe
from fusepress.pipeline.recovery.contract import Look
from fusepress.pipeline.recovery.finetune import finetune
from fusepress.pipeline.report.html import render
from fusepress.pipeline.runner import run_stages
from fusepress.pipeline.stages import STAGES
from fusepress.pipeline.stages.finetune import early_stop_words
from fusepress.pipeline.store import Store
from fusepress.pipeline.task import load_task
from tests.test_report import check_page

TESTS = Path(__file__).parent
RECIPE: dict[str, Any] = {
    "task": "sparsify_toy.py:Toy",
    "checkpoint": "dense.safetensors",
    "target": "jetson-agx-orin-64gb",
    "finetune": {"steps": 9, "lr": 1e-4, "eval_every": 3, "early_stop": True},
    "gates": {"accuracy": {"max_drop": 0.9}},
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    (folder / "sparsify_toy.py").write_text((TESTS / "sparsify_toy.py").read_text())
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    task = load_task("sparsify_toy.py:Toy", base=folder)
    model = task.build_model()
    finetune(model, None, task, FinetuneConfig(steps=30, lr=5e-3), seed=0, workdir=folder / "work")
    (folder / "dense.safetensors").write_bytes(weights_bytes(model))
    return folder


def trained(project: Path, *overrides: str) -> tuple[StageRecord, Path, str]:
    """The stage's record, its folder and the page; all share a store."""
    ctx = make_context(load_recipe(project / "recipe.yaml", overrides), Reporter(quiet=True))
    folder = project / "runs" / "run"
    preflight(ctx, Store(folder.parent / ".store"))
    record = new_record(ctx, folder, "")
    run_stages(ctx, [stage for stage in STAGES if stage.name in ("baseline", "finetune")], record, folder)
    found = record.stage("finetune")
    assert found is not None
    return found, folder / "finetune", render(record, folder)


def test_a_gate_that_is_met_ends_the_training_and_the_report_says_so(project: Path) -> None:
    stage, _, page = trained(project)
    assert stage.details["steps"] == 3
    assert stage.details["early_stop"].startswith("stopped after step 3 of 9: the drop on the calib split")
    assert stage.details["early_stop"].endswith("the gate allows 0.9")
    assert "stopped after step 3 of 9" in check_page(page).words
    assert "Distillation losses" in check_page(page).words
    stage, _, _ = trained(project, "finetune.early_stop=false")
    assert stage.details["steps"] == 9
    assert "early_stop" not in stage.details


def test_loggers_are_not_in_the_key_and_the_gate_is_where_it_stops_the_run(project: Path) -> None:
    pytest.importorskip("tensorboard")
    first, _, _ = trained(project)
    logged, _, _ = trained(project, "finetune.log=[tensorboard]")
    assert logged.key == first.key
    moved, _, _ = trained(project, "gates.accuracy.max_drop=0.8")
    assert moved.key != first.key
    plain, _, _ = trained(project, "finetune.early_stop=false")
    other, _, _ = trained(project, "finetune.early_stop=false", "gates.accuracy.max_drop=0.8")
    assert plain.key == other.key


def test_the_files_of_a_logger_end_up_beside_the_weights(project: Path) -> None:
    pytest.importorskip("tensorboard")
    stage, folder, _ = trained(project, "finetune.log=[tensorboard]", "finetune.steps=4", "finetune.accumulate=2")
    assert stage.status == "done"
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["tensorboard"]
    assert any(path.name.startswith("events.") for path in (folder / "tensorboard").iterdir())


def test_an_early_stop_that_never_came_is_told_with_its_last_look() -> None:
    last = Look(step=40, value=0.6, drop=0.02, high=0.05, met=False)
    assert early_stop_words(last, 50, 0.03) == (
        "did not stop the run: the drop on the calib split, 0.02, is at most 0.05 (95 %); the gate allows 0.03"
    )
    unbounded = Look(step=40, value=0.6, drop=0.02, high=None, met=False)
    assert "0.02, has no bound;" in early_stop_words(unbounded, 50, 0.03)
