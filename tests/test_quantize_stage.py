"""The quantize stage in INT8: card, ranges, ladder, sensitivity and what it releases (pipeline/stages/quantize.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fusepress.calib.dataset import CalibrationCard
from fusepress.calib.qdq import broken_rules
from fusepress.export.onnx import load_onnx
from fusepress.export.precision import precision_map
from fusepress.pipeline.api import make_context, new_record, preflight
from fusepress.pipeline.console import Reporter
from fusepress.pipeline.errors import RecipeError
from fusepress.pipeline.evidence import RunRecord, StageRecord
from fusepress.pipeline.gates import judge
from fusepress.pipeline.recipe import load_recipe
from fusepress.pipeline.report.html import render
from fusepress.pipeline.runner import run_stages
from fusepress.pipeline.stages import STAGES
from fusepress.pipeline.stages.quantize import Quantize
from fusepress.pipeline.store import Store
from tests.recovery_runs import toy_project

RECIPE: dict[str, Any] = {
    "task": "fidelity.py:Fidelity",
    "checkpoint": "dense.safetensors",
    "target": "jetson-agx-orin-64gb",
    "quantize": {"precision": "int8", "samples": 8},
    "gates": {"accuracy": {"max_drop": 0.2}},
}


# judged by how close the outputs stay to those of the float network, which no INT8 meets to the last digit
FIDELITY = """
from pathlib import Path

from safetensors.torch import load_file
from sparsify_toy import Toy


class Fidelity(Toy):
    metrics = {"fidelity": "max"}

    def __init__(self):
        self.float = self.build_model().eval()
        self.float.load_state_dict(load_file(Path(__file__).with_name("dense.safetensors")))

    def sample_stats(self, outputs, batch):
        error = outputs - self.float(**batch.inputs).detach()
        return {"error": error.square().mean((1, 2, 3))}

    def score(self, stats):
        return {"fidelity": 1.0 - float(stats["error"].mean())}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = toy_project(tmp_path_factory.mktemp("quantize"), RECIPE, steps=40)
    (folder / "fidelity.py").write_text(FIDELITY)
    return folder


QUANTIZE = ("baseline", "export", "quantize")


def ran(project: Path, name: str, *overrides: str, names: tuple[str, ...] = QUANTIZE) -> tuple[RunRecord, Path]:
    """The record and the folder of a run of some stages."""
    ctx = make_context(load_recipe(project / "recipe.yaml", list(overrides)), Reporter(quiet=True))
    folder = project / "runs" / name
    preflight(ctx, Store(folder.parent / ".store"))
    record = new_record(ctx, folder, "")
    run_stages(ctx, [stage for stage in STAGES if stage.name in names], record, folder)
    return record, folder


def stage_of(record: RunRecord, name: str) -> StageRecord:
    stage = record.stage(name)
    assert stage is not None
    return stage


def test_all_layers_in_int8_with_card_ranges_and_sensitivity(project: Path) -> None:
    record, run = ran(project, "int8")
    details, folder, page = stage_of(record, "quantize").details, run / "quantize", render(record, run)
    card = CalibrationCard.from_json((folder / "calibration.json").read_text())
    assert len(card.sample_ids) == 8
    assert set(card.ranges) == {"samples", "replicates", "max", "percentile 99.99"}
    assert details["calibration"]["median_range_moves_by"].keys() == {"max", "percentile 99.99"}
    assert details["choice"]["ranges_by"] in ("max", "percentile", "mse")
    ladder = details["ladder"]
    assert (ladder["rung"], ladder["standard"], ladder["max_drop"]) == ("int8", "the accuracy gate", 0.2)
    assert {row["branch"] for row in details["sensitivity"]["branches"]} == {"camera", "lidar", "fusion"}
    units = {row["name"]: row for row in details["sensitivity"]["units"]}
    assert units["camera.0.0/Conv"]["branch"] == "camera"
    assert all(row["cost"] > 0 for row in units.values())
    assert details["coverage"]["macs_share"] > 0.7
    assert broken_rules(load_onnx(folder / "model.onnx")) == []
    assert set(precision_map(folder / "model.onnx").values()) <= {"int8", "fp16", "fp32", "int64"}
    assert details["precision"] == "int8"
    assert "What INT8 costs, and where" in page


def test_a_limit_that_no_int8_meets_releases_fp16_and_says_why(project: Path) -> None:
    limits = ("quantize.max_drop=0", "quantize.method=max", "gates.accuracy=null", "gates.latency.mean_ms=1e6")
    names = (*QUANTIZE, "verify", "build")
    record, run = ran(project, "float", "verify.replicates=200", *limits, names=names)
    stage, folder, page = stage_of(record, "quantize"), run / "quantize", render(record, run)
    details = stage.details
    assert details["ladder"]["rung"] == "float"
    assert details["ladder"]["standard"] == "quantize.max_drop"
    assert "choice" not in details
    assert details["precision"] == "fp16"
    assert {m.precision for m in stage.measurements if m.name.startswith("accuracy")} == {"fp16"}
    assert "int8" not in precision_map(folder / "model.onnx").values()
    assert details["note"].startswith("nothing in INT8: with all units in INT8 it drops by")
    assert "nothing in INT8" in page
    assert 2 < len(details["ladder"]["trials"]) <= 10
    assert details["ladder"]["evaluations"] < 18  # and two for the references
    # what comes after it is about the file that there is
    own = [m for m in stage_of(record, "verify").measurements if m.artifact_sha256 == record.artifacts["onnx"].sha256]
    assert {m.name for m in own} >= {"accuracy.fidelity", "latency.mean_ms"}
    assert {m.precision for m in own} == {"fp16"}
    assert "model in fp16" in (run / "build/kit/README.md").read_text()
    (verdict,) = judge(record, None, load_recipe(run.parent.parent / "recipe.yaml", list(limits)).recipe.gates, {})
    assert verdict.gate == "latency.mean_ms"
    assert "judged in fp16: int8 was asked for" in verdict.why
    assert "fp16 (int8 was asked for)" in page


def test_only_a_search_depends_on_the_gate_and_only_weighed_layers_on_the_target(project: Path) -> None:
    def key(*overrides: str) -> str:
        ctx = make_context(load_recipe(project / "recipe.yaml", list(overrides)), Reporter(quiet=True))
        return json.dumps(Quantize().key_parts(ctx).config, sort_keys=True)

    gate = "gates.accuracy.max_drop=0.1"
    assert key() != key(gate)
    assert key("quantize.max_drop=0.01") == key("quantize.max_drop=0.01", gate)
    other = "target=jetson-orin-nx-16gb"
    for off in ("quantize.search=false", "quantize.precision=fp16"):
        assert key(off) == key(off, gate)
    assert key("quantize.precision=fp16") == key("quantize.precision=fp16", other)
    # the table of sensitivity tells what a layer costs on the target
    unsearched = "quantize.search=false"
    assert key(unsearched) != key(unsearched, other)
    unweighed = (unsearched, "quantize.sensitivity=false")
    assert key(*unweighed) == key(*unweighed, other)
    assert key("quantize.precision=fp16") == key("quantize.precision=fp16", "quantize.method=mse")


def test_a_limit_without_a_search_is_refused(project: Path) -> None:
    with pytest.raises(RecipeError, match="expected `search: true` with `max_drop`"):
        load_recipe(project / "recipe.yaml", ["quantize.max_drop=0.01", "quantize.search=false"])
    with pytest.raises(RecipeError, match=r"`quantize.method`: .*'mse'.*got 'kl'"):
        load_recipe(project / "recipe.yaml", ["quantize.method=kl"])
