"""The score and prune stages under every way to choose criterion and widths, on the task of `fusepress init`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fusepress.pipeline.api import make_context, new_record, preflight
from fusepress.pipeline.cli import run
from fusepress.pipeline.console import Reporter
from fusepress.pipeline.evidence import RunRecord
from fusepress.pipeline.recipe import PruneConfig, load_recipe
from fusepress.pipeline.runner import run_stages
from fusepress.pipeline.stages import STAGES
from fusepress.pipeline.stages.allocation import without_tables
from fusepress.pipeline.stages.baseline import Baseline
from fusepress.pipeline.stages.prune import Prune
from fusepress.pipeline.stages.score import Score
from fusepress.pipeline.store import Store, content_key

RECIPE: dict[str, Any] = {
    "task": "task.py:MyTask",
    "checkpoint": "dense.safetensors",
    "target": "jetson-agx-orin-64gb",
    "score": {"method": "magnitude", "batches": 2, "reactivation_batches": 2},
    "prune": {"macs": 0.5, "align": 8},
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("allocation") / "mine"
    assert run(["init", str(folder)]) == 0
    text = (folder / "task.py").read_text()
    (folder / "task.py").write_text(text.replace("self.build_model(), 400", "self.build_model(), 60"))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return folder


def _prune(project: Path, name: str, *overrides: str) -> RunRecord:
    """Baseline, score and prune; the store is shared, so the baseline is made once."""
    loaded = load_recipe(project / "recipe.yaml", overrides)
    ctx = make_context(loaded, Reporter(quiet=True))
    folder = project / "runs" / name
    preflight(ctx, Store(folder.parent / ".store"))
    record = new_record(ctx, folder, "")
    run_stages(ctx, [stage for stage in STAGES if stage.name in ("baseline", "score", "prune")], record, folder)
    return record


def _details(record: RunRecord, stage: str) -> dict[str, Any]:
    found = record.stage(stage)
    assert found is not None
    return found.details


def test_auto_keeps_the_criterion_that_did_best_on_the_calib_split(project: Path) -> None:
    overrides = ["score.method=auto", "score.candidates=[random, magnitude]", "score.probe_steps=2"]
    record = _prune(project, "auto", *overrides)
    facts = _details(record, "score")["choice"]
    trials = facts["tried"]
    assert list(trials) == ["random", "magnitude"]
    assert len(set(trials.values())) == 2
    assert facts["chosen"] == max(trials, key=lambda name: trials[name])
    assert facts["split"] == "calib"
    same = _prune(project, "same", f"score.method={facts['chosen']}")
    assert _details(record, "prune")["groups"] == _details(same, "prune")["groups"]


@pytest.mark.parametrize("allocation", ["importance", "distortion"])
def test_the_knapsacks_keep_the_budget_and_say_what_they_minimised(project: Path, allocation: str) -> None:
    overrides = [f"prune.allocation={allocation}", "prune.distortion.samples=8", "prune.distortion.draws=2"]
    record = _prune(project, allocation, *overrides)
    details = _details(record, "prune")
    assert details["choice"]["allocation"] == allocation
    assert details["choice"]["objective"] > 0
    assert 0 <= details["budget"]["gap"] < 0.1
    assert ("eta" in details["choice"]) == (allocation == "distortion")


def test_a_budget_in_milliseconds_is_met_by_the_same_prediction(project: Path) -> None:
    baseline = _prune(project, "dense-latency").stage("baseline")
    assert baseline is not None
    dense_ms = next(m.value for m in baseline.measurements if m.name == "latency.mean_ms")
    record = _prune(
        project, "ms", "prune.macs=null", f"prune.latency_ms={0.97 * dense_ms}", "prune.allocation=importance"
    )
    prune = record.stage("prune")
    assert prune is not None
    assert prune.details["budget"]["unit"] == "latency_ms"
    reached_ms = next(m.value for m in prune.measurements if m.name == "latency.mean_ms")
    assert reached_ms <= 0.97 * dense_ms
    assert sum(group["kept"] for group in prune.details["groups"]) < sum(g["width"] for g in prune.details["groups"])


def _prune_key(project: Path, *overrides: str) -> str:
    ctx = make_context(load_recipe(project / "recipe.yaml", overrides), Reporter(quiet=True))
    return content_key(Prune().key_parts(ctx))


def test_widths_under_a_latency_belong_to_the_target_and_precision_and_others_do_not(project: Path) -> None:
    budget = ("prune.macs=null", "prune.latency_ms=0.2")
    keys = {
        _prune_key(project, *budget),
        _prune_key(project, *budget, "quantize.precision=int8"),
        _prune_key(project, *budget, "target=jetson-orin-nano-8gb-super"),
    }
    assert len(keys) == 3
    assert _prune_key(project) == _prune_key(project, "quantize.precision=int8")


def test_blocks_are_looked_for_where_the_recipe_asks(project: Path) -> None:
    def key(*overrides: str) -> str:
        return content_key(
            Baseline().key_parts(make_context(load_recipe(project / "recipe.yaml", overrides), Reporter(quiet=True)))
        )

    assert key("prune.blocks=true") != key()
    assert key("prune.allocation=distortion") == key()


def test_trials_depend_on_how_they_train_and_not_on_who_logs_it(project: Path) -> None:
    def key(*overrides: str) -> str:
        auto = ("score.method=auto", "score.candidates=[random, magnitude]", *overrides)
        return content_key(
            Score().key_parts(make_context(load_recipe(project / "recipe.yaml", auto), Reporter(quiet=True)))
        )

    assert key("finetune.lr=0.002") != key("finetune.lr=0.001")
    assert key("finetune.lr=0.001", "finetune.log=[tensorboard]") == key("finetune.lr=0.001")


def test_a_first_look_measures_no_distortion_table() -> None:
    assert without_tables(PruneConfig(macs=0.5, allocation="distortion")).allocation == "importance"
    assert without_tables(PruneConfig(macs=0.5, allocation="global")).allocation == "global"
