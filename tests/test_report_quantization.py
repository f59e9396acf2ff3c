"""The report's section on INT8 (pipeline/report/quantization.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fusepress.pipeline.evidence import RunRecord
from fusepress.pipeline.report.html import render
from fusepress.pipeline.report.quantization import quantization
from tests.test_report import record_of

UNITS: list[dict[str, Any]] = [
    {"name": "camera.a/Conv", "branch": "camera", "macs": 2_000_000, "cost": 0.004, "local": 1e-4, "alone": 1e-6,
     "spared": 0.0399},
    {"name": "fuser/Conv", "branch": "fusion", "macs": 6_000_000, "cost": 0.02, "local": 4e-4, "alone": 0.04,
     "spared": 1e-6},
    {"name": "points/Slice", "branch": "lidar", "macs": 0, "cost": 0.00002, "local": None, "alone": 0.0,
     "spared": None},
]  # fmt: skip
BRANCHES: list[dict[str, Any]] = [
    {"branch": "camera", "units": 1, "macs": 2_000_000, "alone": 1e-6, "spared": 0.0399},
    {"branch": "fusion", "units": 1, "macs": 6_000_000, "alone": 0.04, "spared": 1e-6},
    {"branch": "lidar", "units": 1, "macs": 0, "alone": 0.0, "spared": None},
]
SENSITIVITY = {"units": UNITS, "branches": BRANCHES, "everything": 0.04, "cost_unit": "ms", "samples": 8, "runs": 120}
LADDER: dict[str, Any] = {
    "rung": "mixed",
    "reason": "1 of 3 units in floating point: with all units in INT8 it drops by 0.2",
    "spared": ["fuser/Conv"],
    "standard": "the accuracy gate",
    "metric": "miou",
    "max_drop": 0.03,
    "evaluations": 11.4,
    "trials": [
        {"spared": [], "met": False, "value": 0.5, "drop": 0.2, "high": 0.22},
        {"spared": ["fuser/Conv"], "met": True, "value": 0.7, "drop": 0.001, "high": None},
    ],
}
COVERAGE: dict[str, Any] = {
    "method": "max",
    "macs_share": 0.25,
    "layers": [
        {"name": "camera.a/Conv", "op": "Conv", "precision": "int8", "reason": ""},
        {"name": "fuser/Conv", "op": "Conv", "precision": "fp16", "reason": "spared by the search: accuracy"},
    ],
}


def _record(**details: Any) -> RunRecord:
    record = record_of()
    stage = record.stage("quantize")
    assert stage is not None
    stage.details.update(details)
    return record


def test_the_section_tells_the_result_the_trials_and_every_layer() -> None:
    record = _record(ladder=LADDER, sensitivity=SENSITIVITY, coverage=COVERAGE)
    found = quantization(record)
    assert found is not None
    facts = dict(found.facts)
    assert facts["result"] == "partly in INT8"
    assert facts["MACs in INT8"] == "25 %"
    assert facts["allowed drop of miou"] == "0.03 (the accuracy gate)"
    assert facts["output error, all in INT8"] == "20 %"
    assert [(row.spared, row.verdict) for row in found.trials] == [
        ("none: all in INT8", "not met"),
        ("fuser/Conv", "met"),
    ]
    assert found.trials[0].drop == "0.2000 (at most 0.2200)"
    camera, fuser, points = found.units
    assert (camera.local, camera.alone, camera.spared, camera.kept) == ("1 %", "0.1 %", "20 %", "INT8")
    assert (fuser.cost, fuser.alone, fuser.kept) == ("0.0200 ms", "20 %", "FP16: spared by the search: accuracy")
    assert (points.local, points.spared, points.kept) == ("", "", "")
    assert [branch for branch, _, _ in found.drawings] == ["camera", "fusion", "lidar"]
    page = render(record, Path("nowhere"))
    assert "What INT8 costs, and where" in page
    assert "Sensitivity of all 3 layers" in page
    assert "c-track" in str(found.drawings[1][1])  # what stays in floating point is pale
    assert "c-fill" in str(found.drawings[0][1])
    assert "ladder" not in page.split("Notes of the stages")[-1]


def test_a_float_release_and_costs_in_macs_are_told() -> None:
    everything = LADDER | {"rung": "float", "spared": [row["name"] for row in UNITS]}
    units = [row | {"cost": float(row["macs"] or 6000)} for row in UNITS]
    found = quantization(_record(ladder=everything, sensitivity=SENSITIVITY | {"units": units, "cost_unit": "MAC"}))
    assert found is not None
    assert dict(found.facts)["result"] == "nothing in INT8"
    assert [row.kept for row in found.units] == ["floating point"] * 3
    assert found.units[0].cost == "2 M MAC"


def test_fp8_is_called_by_its_name_everywhere() -> None:
    layers = [layer | {"precision": "fp8", "reason": ""} for layer in COVERAGE["layers"]]
    ladder = LADDER | {"precision": "fp8", "rung": "fp8", "reason": "all 3 units in FP8", "spared": []}
    record = _record(ladder=ladder, sensitivity=SENSITIVITY, coverage=COVERAGE | {"precision": "fp8", "layers": layers})
    found = quantization(record)
    assert found is not None
    assert dict(found.facts)["result"] == "all in FP8"
    section = render(record, Path("nowhere")).split("h-quantized")[-1].split("</section>")[0]
    assert "What FP8 costs, and where" in section
    assert "INT8" not in section
    nothing = quantization(_record(ladder=ladder | {"rung": "float"}))
    assert nothing is not None
    assert dict(nothing.facts)["result"] == "nothing in FP8"


def test_without_int8_there_is_no_section() -> None:
    assert quantization(record_of()) is None
    assert "What INT8 costs" not in render(record_of(), Path("nowhere"))
