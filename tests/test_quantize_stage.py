"""The quantize stage in INT8: card, ranges, ladder, sensitivity and what it releases (pipeline/stages/quantize.py)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from onnx import TensorProto

from fusepress.calib.dataset import CalibrationCard, calibration_arrays, choose_calibration
from fusepress.calib.qdq import broken_rules
from fusepress.calib.quantize import draft_qdq, finish_qdq
from fusepress.export.node_times import node_times
from fusepress.export.onnx import load_onnx, save_onnx
from fusepress.export.precision import precision_map
from fusepress.export.unsigned import unsigned_relus, use_unsigned
from fusepress.pipeline.errors import QuantizeError, RecipeError
from fusepress.pipeline.evidence import SPEEDUP_OVER_FP32, RunRecord
from fusepress.pipeline.gates import judge
from fusepress.pipeline.recipe import load_recipe
from fusepress.pipeline.report.html import render
from fusepress.pipeline.report.quantization import quantization
from fusepress.pipeline.stages.quantize import Quantize, not_faster
from fusepress.pipeline.store import sha256_file
from fusepress.targets.latency import Speedup
from tests.quantize_runs import context_of, int8_recipe, run_some, stage_of
from tests.recovery_runs import toy_project

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
    folder = toy_project(tmp_path_factory.mktemp("quantize"), int8_recipe("fidelity.py:Fidelity"), steps=40)
    (folder / "fidelity.py").write_text(FIDELITY)
    return folder


QUANTIZE = ("baseline", "export", "quantize")


def ran(project: Path, name: str, *overrides: str, names: tuple[str, ...] = QUANTIZE) -> tuple[RunRecord, Path]:
    return run_some(project, name, names, *overrides)


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


# --- on this host -----------------------------------------------------------------------------------------------------

HOST = ("target=host-cpu", "quantize.method=max", "quantize.sensitivity=false")


def unsigned_zeros(path: Path) -> list[str]:
    return [t.name for t in load_onnx(path).graph.initializer if t.data_type == TensorProto.UINT8]


def test_a_cpu_gets_the_form_that_its_integer_kernels_take_and_is_told_what_it_brings(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusepress.pipeline.stages.quantize.HOST_MEASURE_SECONDS", 0.5)
    record, run = ran(project, "host", *HOST)
    stage, section = stage_of(record, "quantize"), quantization(record)
    released = run / "quantize/model.onnx"
    details = stage.details
    assert details["coverage"]["unsigned_relus"] == len(unsigned_relus(load_onnx(released))) > 3
    assert f"INT8 has no sign behind {details['coverage']['unsigned_relus']} Relus" in details["note"]
    assert "merged tensors" not in details["note"]  # that is TensorRT's rule
    quantised = {layer["name"] for layer in details["coverage"]["layers"] if layer["precision"] == "int8"}
    integer = {node.name for node in node_times(released, threads=1, runs=1) if node.kind == "integer"}
    assert {"camera.0.0/Conv", "camera.1.0/Conv", "lidar.0.0/Conv"} <= integer & quantised
    # judged by the runtime that is the target, with the kernels that it has
    accuracy = [m for m in stage.measurements if m.name.startswith("accuracy.")]
    assert {(m.runtime, m.precision) for m in accuracy} == {("onnxruntime-cpu", "int8")}
    (faster,) = [m for m in stage.measurements if m.name == SPEEDUP_OVER_FP32]
    assert (faster.kind, faster.device, faster.unit) == ("measured", "host-cpu", "x")
    assert faster.artifact_sha256 == record.artifacts["onnx"].sha256
    assert faster.low is not None
    assert faster.high is not None
    assert faster.low <= faster.value <= faster.high
    assert faster.note == not_faster(Speedup(value=faster.value, low=faster.low, high=faster.high), "int8")
    assert section is not None
    facts = dict(section.facts)
    assert facts["Relus that integer kernels absorb"] == str(details["coverage"]["unsigned_relus"])
    assert facts["against the same network in FP32"].endswith(", measured in turns)")
    assert facts.get("so") == faster.note


def test_every_trial_of_the_search_is_in_the_form_that_is_released(project: Path) -> None:
    """The released bytes are those of the unsigned variant, which differs from the signed one by one pass alone."""
    _, run = ran(project, "host", *HOST)
    ctx = context_of(project, *HOST)
    card = choose_calibration(ctx.task, 8, ctx.recipe.seed)
    arrays = calibration_arrays(ctx.task, card)
    draft = draft_qdq(run / "export/model.onnx", arrays, method="max", unsigned=True)
    draft.write(run / "trial.onnx")
    trial, released = load_onnx(run / "trial.onnx"), load_onnx(run / "quantize/model.onnx")
    assert unsigned_relus(trial) == unsigned_relus(released)
    finish_qdq(draft, arrays, run / "again.onnx", remainder="fp32")
    assert (run / "again.onnx").read_bytes() == (run / "quantize/model.onnx").read_bytes()
    finish_qdq(replace(draft, unsigned=False), arrays, run / "signed.onnx", remainder="fp32")
    signed = load_onnx(run / "signed.onnx")
    assert not unsigned_zeros(run / "signed.onnx")
    assert use_unsigned(signed) == unsigned_relus(released)
    save_onnx(signed, run / "signed.onnx")
    assert (run / "signed.onnx").read_bytes() == (run / "again.onnx").read_bytes()
    with pytest.raises(QuantizeError, match=r"expected remainder fp32 with unsigned INT8.*; got fp16 at .*model\.onnx"):
        finish_qdq(draft, arrays, run / "half.onnx")


def test_other_targets_get_the_bytes_that_signed_numbers_have(project: Path) -> None:
    off = ("quantize.method=max", "quantize.search=false", "quantize.sensitivity=false")
    record, run = ran(project, "signed", *off)
    ctx = context_of(project, *off)
    arrays = calibration_arrays(ctx.task, choose_calibration(ctx.task, 8, ctx.recipe.seed))
    finish_qdq(draft_qdq(run / "export/model.onnx", arrays, method="max"), arrays, run / "again.onnx")
    assert sha256_file(run / "again.onnx") == record.artifacts["onnx"].sha256
    assert not unsigned_zeros(run / "again.onnx")
    assert stage_of(record, "quantize").details["coverage"]["unsigned_relus"] == 0
    assert SPEEDUP_OVER_FP32 not in {m.name for m in stage_of(record, "quantize").measurements}


def test_what_is_not_faster_is_told_with_what_to_do() -> None:
    assert not_faster(Speedup(value=1.2, low=1.1, high=1.3), "int8") is None
    slower = not_faster(Speedup(value=0.9, low=0.88, high=0.91), "int8")
    assert slower is not None
    assert slower.startswith("INT8 is slower: 0.90 times as fast as FP32 on this machine (95 % interval 0.88 to 0.91)")
    assert "release in fp32 (-o quantize.precision=fp32)" in slower
    unknown = not_faster(Speedup(value=1.02, low=0.97, high=1.07), "fp16")
    assert unknown is not None
    assert unknown.startswith("FP16 is not measurably faster: 1.02 times")


# --- keys and mistakes ------------------------------------------------------------------------------------------------


def test_only_a_search_depends_on_the_gate_and_only_weighed_layers_on_the_target(project: Path) -> None:
    def key(*overrides: str) -> str:
        return json.dumps(Quantize().key_parts(context_of(project, *overrides)).config, sort_keys=True)

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
