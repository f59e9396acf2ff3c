"""The finetune stage: what its key holds, what it tells, and what it leaves in the run folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from fusepress.pipeline.api import compress, make_context
from fusepress.pipeline.console import Reporter
from fusepress.pipeline.errors import UsageError
from fusepress.pipeline.recipe import load_recipe
from fusepress.pipeline.recovery.contract import Look
from fusepress.pipeline.report.html import render
from fusepress.pipeline.stages import STAGES
from fusepress.pipeline.stages.base import Context, Stage
from fusepress.pipeline.stages.finetune import Finetune, early_stop_words
from fusepress.pipeline.stages.score import Score
from fusepress.pipeline.stages.sparsify import Sparsify
from fusepress.pipeline.store import content_key
from tests.recovery_runs import toy_project
from tests.test_report import check_page, record_of

RECIPE: dict[str, Any] = {
    "task": "sparsify_toy.py:Toy",
    "checkpoint": "dense.safetensors",
    "target": "jetson-agx-orin-64gb",
    "finetune": {"steps": 9, "lr": 1e-4, "eval_every": 3, "early_stop": True},
    "gates": {"accuracy": {"max_drop": 0.9}},
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_project(tmp_path_factory.mktemp("finetune"), RECIPE, steps=30)


def context(project: Path, *overrides: str) -> Context:
    ctx = make_context(load_recipe(project / "recipe.yaml", overrides), Reporter(quiet=True))
    ctx.add_artifact("dense_weights", project / "dense.safetensors")
    return ctx


def details(project: Path, folder: Path, *overrides: str) -> dict[str, Any]:
    """Run the stage into `folder/out`."""
    (folder / "out").mkdir(parents=True)
    return Finetune().run(context(project, *overrides), folder / "out", folder / "work").details


def test_a_gate_that_is_met_ends_the_training_and_the_report_says_so(project: Path, tmp_path: Path) -> None:
    found = details(project, tmp_path / "stopped")
    assert found["steps"] == 3
    assert found["early_stop"].startswith("stopped after step 3 of 9: the drop on the calib split")
    assert found["early_stop"].endswith("the gate allows 0.9")
    record = record_of()
    stage = record.stage("finetune")
    assert stage is not None
    stage.details = found
    words = check_page(render(record, tmp_path)).words
    assert "stopped after step 3 of 9" in words
    assert "Distillation losses" in words
    blind = details(project, tmp_path / "blind", "finetune.early_stop=false")
    assert blind["steps"] == 9
    assert "early_stop" not in blind


def test_loggers_are_not_in_the_key_and_the_gate_is_where_it_stops_the_run(project: Path) -> None:
    def key(*overrides: str) -> str:
        return content_key(Finetune().key_parts(context(project, *overrides)))

    assert key("finetune.log=[tensorboard]") == key()
    assert key("gates.accuracy.max_drop=0.8") != key()
    assert key("finetune.accumulate=2") != key()
    blind = "finetune.early_stop=false"
    assert key(blind, "gates.accuracy.max_drop=0.8") == key(blind) != key()


@pytest.mark.parametrize("stage", [Finetune(), Sparsify(), Score()], ids=lambda stage: stage.name)
def test_the_number_format_that_auto_means_is_in_the_key(
    project: Path, monkeypatch: pytest.MonkeyPatch, stage: Stage
) -> None:
    section = ("score.method=auto", "prune={macs: 0.7}", "sparsify={steps: 4}")

    def key(precision: str) -> str:
        return content_key(stage.key_parts(context(project, *section, f"finetune.precision={precision}")))

    assert key("auto") == key("fp32") != key("bf16")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: True)
    assert key("auto") == key("bf16")
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert key("auto") == key("fp16") != key("fp32")


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_the_seed_is_in_the_key_of_every_stage_that_draws_or_resamples(project: Path, stage: Stage) -> None:
    training = ("sparsify={steps: 4}", "qat={steps: 4}", "quantize={precision: int8}")
    section = ("score.method=magnitude", "prune={macs: 0.7}", *training)
    keys = {content_key(stage.key_parts(context(project, *section, f"seed={seed}"))) for seed in (0, 1)}
    assert len(keys) == (1 if stage.name == "build" else 2)  # an engine is made of the ONNX file alone


def test_the_files_of_a_logger_end_up_beside_the_weights(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    section = ("finetune.log=[tensorboard]", "finetune.steps=4", "finetune.accumulate=2")
    details(project, tmp_path / "main", *section)
    written = tmp_path / "main" / "out"
    assert sorted(path.name for path in written.iterdir()) == ["finetuned.safetensors", "tensorboard"]
    assert any(path.name.startswith("events.") for path in (written / "tensorboard").iterdir())
    monkeypatch.setattr("fusepress.pipeline.stages.finetune.is_main", lambda: False)
    details(project, tmp_path / "other", *section)
    assert not (tmp_path / "other" / "out" / "tensorboard").exists(), "rank 0 may still be writing them"


def test_what_the_training_needs_is_checked_before_anything_is_spent(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    recipe, folder, quiet = project / "recipe.yaml", tmp_path / "runs" / "run", Reporter(quiet=True)
    with pytest.raises(UsageError, match=r"pip install fusepress\[mlflow\]"):
        compress(recipe, run=folder, overrides=["finetune.log=[mlflow]"], reporter=quiet)
    alone = ["finetune.early_stop=false", "finetune.shard=fsdp2"]
    with pytest.raises(UsageError, match=r"two processes or more for finetune\.shard: fsdp2; got one"):
        compress(recipe, run=folder, overrides=alone, reporter=quiet)
    assert not folder.exists()


def test_an_early_stop_that_never_came_is_told_with_its_last_look() -> None:
    last = Look(step=40, value=0.6, drop=0.02, high=0.05, met=False)
    assert early_stop_words(last, 50, 0.03) == (
        "did not stop the run: the drop on the calib split, 0.02, is at most 0.05 (95 %); the gate allows 0.03"
    )
    unbounded = Look(step=40, value=0.6, drop=0.02, high=None, met=False)
    assert "0.02, has no bound;" in early_stop_words(unbounded, 50, 0.03)
    undefined = Look(step=40, value=None, drop=None, high=None, met=False)
    assert "the drop on the calib split, undefined, has no bound;" in early_stop_words(undefined, 50, 0.03)
