"""Drawings of the report: that what is drawn is what was recorded, and nothing else."""

from __future__ import annotations

import itertools
import math
import re
import struct
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusepress.pipeline.evidence import Kind, Measurement, RunRecord, Verdict
from fusepress.pipeline.report import pictures, robustness, view
from fusepress.pipeline.report.html import render
from fusepress.pipeline.report.sparsity import sparse_numbers
from fusepress.pipeline.report.timeline import Timeline, timeline
from fusepress.pipeline.report.waterfall import SAME, Step, waterfall
from tests.test_report import check_page, measured_record, picture, record_of, run_dir_of

# ---------------------------------------------------------------------------------------------------------- waterfall


def drawn(steps: list[Step], *, more_is_better: bool = True) -> str:
    return str(
        waterfall(
            steps,
            title="t",
            show=lambda value: f"{value:.2f}",
            show_change=lambda value: f"{value:+.2f}",
            show_tick=str,
            more_is_better=more_is_better,
        )
    )


def bars(drawing: str) -> list[tuple[str, float, float]]:
    """(class, left end, right end) of every bar."""
    found = re.findall(r'<rect class="c-(gain|loss)" x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', drawing)
    return [(kind, float(x), float(x) + float(width)) for kind, x, width in found]


def marks(drawing: str) -> list[float]:
    return [float(x) for x in re.findall(r'<circle class="c-mark" cx="([\d.]+)"', drawing)]


def steps_of(*values: float, kinds: tuple[Kind, ...] | None = None) -> list[Step]:
    told: list[Kind] = list(kinds or ["measured" for _ in values])
    return [Step(f"s{i}", value, None, None, kind) for i, (value, kind) in enumerate(zip(values, told, strict=True))]


@pytest.mark.parametrize("more", [True, False])
def test_a_bar_spans_what_the_stage_changed(more: bool) -> None:
    drawing = drawn(steps_of(0.8, 0.5, 0.7), more_is_better=more)
    first, second, third = marks(drawing)
    (loss, *fall), (gain, *rise) = bars(drawing)
    assert (loss, gain) == (("loss", "gain") if more else ("gain", "loss"))
    assert [*fall, *rise] == pytest.approx([second, first, second, third], abs=0.2)
    assert re.findall(r">([+-]\d\.\d\d)<", drawing) == ["-0.30", "+0.20"]


def test_figures_of_different_evidence_are_not_subtracted() -> None:
    drawing = drawn(steps_of(4.0, 3.0, 2.0, kinds=("predicted", "predicted", "measured")))
    assert len(bars(drawing)) == 1
    assert ">now measured<" in drawing
    assert ">-1.00<" in drawing
    assert drawing.count("-1.00") == 1


def test_a_change_below_what_is_printed_is_called_the_same() -> None:
    assert f">{SAME}<" in drawn(steps_of(0.5, 0.5000001))


@settings(max_examples=30, deadline=None)
@given(values=st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=6))
def test_bars_join_neighbours(values: list[float]) -> None:
    drawing = drawn(steps_of(*values))
    ET.fromstring(drawing)
    places = marks(drawing)
    assert len(places) == len(values)
    for (_, left, right), (before, after) in zip(bars(drawing), itertools.pairwise(places), strict=True):
        assert [left, right] == pytest.approx(sorted([before, after]), abs=0.2)


# --------------------------------------------------------------------------------------------------------- robustness


def with_failures(figures: Mapping[tuple[str, int], tuple[float, float]], record: RunRecord | None = None) -> RunRecord:
    """A record of these failures alone: (dense, compressed) of each."""
    record = record or record_of()
    verify = record.stages[-1]
    metric = view.primary_of(record)
    verify.measurements = [m for m in verify.measurements if not m.name.startswith("robustness.")]
    for (failure, severity), (dense, compressed) in figures.items():
        for name, value in (("dense.", dense), ("", compressed)):
            path = f"robustness.{failure}.{severity}.{name}{metric}"
            verify.measurements.append(Measurement(name=path, value=value, kind="simulated"))
    return record


def test_what_is_kept_is_a_share_of_the_dense_model_undisturbed() -> None:
    (row,) = robustness.failure_rows(with_failures({("camera_blank", 3): (0.3171, 0.15855)}))
    assert row.dense_kept == pytest.approx(0.5)  # the dense model has 0.6342
    assert row.compressed_kept == pytest.approx(0.25)


def test_where_less_is_better_an_error_twice_as_large_keeps_half() -> None:
    record = with_failures({("camera_blank", 3): (4.3, 8.6)}, measured_record())
    (row,) = robustness.failure_rows(record)
    assert [row.dense_kept, row.compressed_kept] == pytest.approx([0.5, 0.25])
    assert float(row.extra) == pytest.approx(8.6 - 2.21 - (4.3 - 2.15), abs=1e-4)


def test_a_metric_below_zero_keeps_nothing_and_one_of_a_worthless_model_says_nothing() -> None:
    record = with_failures({("camera_blank", 3): (-0.2, -0.4)})
    (row,) = robustness.failure_rows(record)
    assert (row.dense_kept, row.compressed_kept) == (0.0, 0.0)
    for stage in record.stages:
        for measurement in stage.measurements:
            if measurement.name == "accuracy.miou":
                measurement.value = 0.0
    (row,) = robustness.failure_rows(record)
    assert row.dense_kept is None
    assert robustness.drawings(record) == []


def test_the_gate_of_a_severity_is_found_by_its_name() -> None:
    record = with_failures({("camera_noise", 2): (0.5, 0.4), ("camera_noise", 3): (0.4, 0.3)})
    judged = [
        Verdict(gate="robustness.camera_noise@2", verdict="FAIL", value=0.09, why="w"),
        Verdict(gate="robustness.camera_noise@2.min", verdict="PASS", value=0.4, why="w"),
    ]
    record.stages[-1].verdicts = judged
    two, three = robustness.failure_rows(record)
    assert (two.verdict, two.floor) == (judged[0], judged[1])
    assert (three.verdict, three.floor) == (None, None)
    words = check_page(render(record, Path())).words
    assert "Extra drop under camera noise (severity 2)" in words
    assert "FAIL PASS floor" in words


def polygon(drawing: str, name: str) -> list[tuple[float, float]]:
    (points,) = re.findall(rf'<polygon class="{name}" points="([^"]*)"', drawing)
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in points.split())]


@given(shares=st.lists(st.tuples(st.floats(0, 1.3), st.floats(0, 1.3)), min_size=3, max_size=12))
@settings(max_examples=25, deadline=None)
def test_a_radar_draws_shares_as_distances_from_its_middle(shares: list[tuple[float, float]]) -> None:
    figures = {(f"f{index:02}", 3): (0.6342 * dense, 0.6342 * small) for index, (dense, small) in enumerate(shares)}
    drawing = str(robustness.radar(robustness.failure_rows(with_failures(figures)), 0.25))
    ET.fromstring(drawing)
    ring = polygon(drawing, "c-constant")
    middle = [sum(x for x, _ in ring) / len(ring), sum(y for _, y in ring) / len(ring)]
    unit = math.dist(middle, ring[0]) / 0.25
    for name, index in (("c-dense", 0), ("c-compressed", 1)):
        for point, pair in zip(polygon(drawing, name), shares, strict=True):
            assert math.dist(middle, point) == pytest.approx(unit * pair[index], abs=0.02 * unit + 0.3)


def test_two_failures_make_no_radar_and_every_severity_has_a_row() -> None:
    two = with_failures({("a", 1): (0.6, 0.5), ("a", 2): (0.5, 0.4), ("b", 1): (0.6, 0.6)})
    ((heading, drawing, _),) = robustness.drawings(two)
    assert heading == "Every failure and severity"
    assert re.findall(r">(\w \d)<", str(drawing)) == ["a 1", "a 2", "b 1"]
    three = with_failures({("a", 1): (0.6, 0.5), ("a", 2): (0.5, 0.4), ("b", 1): (0.6, 0.6), ("c", 2): (0.6, 0.6)})
    (_, radar, _), _ = robustness.drawings(three)
    assert re.findall(r">(\w \d)<", str(radar)) == ["a 2", "b 1", "c 2"]


def test_a_constant_answer_is_drawn_where_it_is_known() -> None:
    record = with_failures({("a", 1): (0.6, 0.5)})
    assert robustness.constant_kept(record) is None
    record.stages[-1].details["constant"] = {"miou": 0.6342 / 4}
    assert robustness.constant_kept(record) == pytest.approx(0.25)
    ((_, drawing, _),) = robustness.drawings(record)
    assert "a constant answer" in str(drawing)


# ----------------------------------------------------------------------------------------------------------- timeline

KERNELS: list[dict[str, Any]] = [
    {"name": "camera.stem/Conv", "op": "Conv", "precision": "int8", "ms": 1.0, "macs": 500, "bound": "compute"},
    {"name": "camera.head/Conv", "op": "Conv", "precision": "fp16", "ms": 0.5, "macs": 300, "bound": "memory"},
    {"name": "cameras/Conv", "op": "Conv", "precision": "fp16", "ms": 0.25, "macs": 200, "bound": "memory"},
    {"name": "x_QuantizeLinear", "op": "QuantizeLinear", "precision": "fp16", "ms": 0.25, "macs": 0, "bound": "launch"},
]
RECORD = record_of()
RECORD.task["branches"] = {"camera": ["camera"], "lidar": ["lidar"]}


def timeline_of(kernels: list[dict[str, Any]], kind: str = "predicted") -> Timeline:
    found = timeline(RECORD, {"kind": kind, "kernels": kernels})
    assert found is not None
    return found


def test_the_time_is_told_by_part_bound_and_precision() -> None:
    found = timeline_of(KERNELS)
    assert list(found.bounds) == ["compute", "memory", "launch"]
    assert list(found.precisions) == ["int8", "fp16"]
    told = {row.name: (row.kernels, row.time, row.share, row.bounds, row.precisions) for row in found.rows}
    none = view.DASH
    assert told == {
        "all": (4, "2.00 ms", "100 %", ["50 %", "38 %", "12 %"], ["50 %", "50 %"]),
        "camera": (2, "1.50 ms", "75 %", ["67 %", "33 %", none], ["67 %", "33 %"]),
        "fusion": (1, "0.250 ms", "12 %", [none, "100 %", none], [none, "100 %"]),  # cameras is no part of camera
        "conversions": (1, "0.250 ms", "12 %", [none, none, "100 %"], [none, "100 %"]),
    }
    assert "50 % of it is in kernels that wait for arithmetic" in found.sentence


def test_a_profile_of_a_cpu_claims_no_bound() -> None:
    kernels = [{"name": "a/Conv", "op": "Conv", "precision": "integer", "ms": 1.0}]
    found = timeline_of(kernels, "measured")
    assert found.bounds == {}
    assert "profiled by ONNX Runtime" in found.sentence
    assert "does not tell what bounds" in found.sentence
    assert "bound by" not in str(found.drawing)


@given(times=st.lists(st.floats(1e-5, 10), min_size=1, max_size=40), data=st.data())
@settings(max_examples=25, deadline=None)
def test_segments_fill_every_lane_in_order(times: list[float], data: st.DataObject) -> None:
    kinds = st.sampled_from(["int8", "fp16", "fp32"])
    kernels = [
        {"name": f"n{i}", "op": "Conv", "precision": data.draw(kinds), "ms": ms, "bound": "compute"}
        for i, ms in enumerate(times)
    ]
    drawing = str(timeline_of(kernels).drawing)
    ET.fromstring(drawing)
    found = re.findall(r'<rect class="c-seg c-seg-\d" x="([\d.]+)" y="([\d.]+)" width="([\d.e-]+)"', drawing)
    lanes: dict[str, list[tuple[float, float]]] = {}
    for x, y, width in found:
        lanes.setdefault(y, []).append((float(x), float(width)))
    assert len(lanes) == 3
    for segments in lanes.values():
        assert segments[0][0] == pytest.approx(84, abs=0.1)
        for (x, width), (after, _) in itertools.pairwise(segments):
            assert x + width == pytest.approx(after, abs=0.2)
        assert sum(segments[-1]) == pytest.approx(1060, abs=0.2)


def test_without_kernels_there_is_no_timeline() -> None:
    assert timeline(RECORD, {"kind": "predicted"}) is None
    assert timeline(RECORD, {"kind": "predicted", "kernels": []}) is None


# ----------------------------------------------------------------------------------------------------------- sparsity


def test_the_three_numbers_are_shown_and_what_nobody_said_is_unknown() -> None:
    record = record_of()
    assert sparse_numbers(record) is None
    record.stages[6].details["sparsity"] = {"valid": 7, "dense": 1, "not_eligible": 3, "layers": []}
    found = sparse_numbers(record)
    assert found is not None
    assert [number for number, _, _ in found.numbers] == ["7", "unknown", "unknown"]
    assert found.facts == [("because", "no engine was built here")]
    record.stages[8].details["sparsity"] = {
        "valid in the ONNX": 6,
        "eligible in the build log": 5,
        "picked by a tactic": 0,
        "because": "",
        "2:4": "not kept: slower",
    }
    found = sparse_numbers(record)
    assert found is not None
    assert [number for number, _, _ in found.numbers] == ["6", "5", "0"]
    assert found.facts == [("2:4", "not kept: slower")]
    words = check_page(render(record, Path())).words
    assert "picked by a tactic 0 layers that got one" in words
    assert "not eligible" not in words


# ----------------------------------------------------------------------------------------------------------- pictures


def test_pictures_that_would_make_the_page_too_large_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = record_of()
    record.stages[-1].details["pictures"] = [{"path": f"verify/{name}.png", "title": name} for name in ("a", "b", "c")]
    folder = run_dir_of(record, tmp_path)
    for name in ("a", "b", "c"):
        (folder / "verify" / f"{name}.png").write_bytes(picture())
    one = len(picture()) * 4 / 3
    monkeypatch.setattr(pictures, "MOST_BYTES", int(2.5 * one))
    found = pictures.pictures_of(record, folder)
    assert [shown.title for shown in found.samples] == ["a", "b"]
    assert found.left_out == ["verify/c.png of verify does not fit: the pictures of a report may take 2 MiB"]


@pytest.mark.parametrize(("width", "height", "wide"), [(800, 320, True), (384, 384, False), (320, 800, False)])
def test_a_wide_picture_takes_the_room_of_two(width: int, height: int, wide: bool) -> None:
    header = pictures.PNG + b"\0\0\0\rIHDR" + struct.pack(">II", width, height)
    assert pictures._is_wide(header) == wide
    assert not pictures._is_wide(header[:20])
