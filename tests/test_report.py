"""Reports: the HTML page, junit.xml and summary.md, made of realistic run records."""

from __future__ import annotations

import html.parser
import io
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from junitparser import JUnitXml

from fusepress.pipeline.errors import StoreError, UsageError
from fusepress.pipeline.evidence import Artifact, Kind, Measurement, RunRecord, StageRecord
from fusepress.pipeline.gates import Condition, Replicates, judge, overall
from fusepress.pipeline.recipe import AccuracyGate, GatesConfig, LatencyGate, RobustnessGate
from fusepress.pipeline.report import charts, markdown, robustness, svg, view
from fusepress.pipeline.report.html import render, write_report
from fusepress.pipeline.report.junit import write_junit
from fusepress.pipeline.report.markdown import write_summary
from fusepress.pipeline.report.waterfall import Step, waterfall

ONNX = "3f7a1c" + "9" * 58
TARGET = "jetson-agx-orin-64gb"
STAGES = ("baseline", "score", "prune", "finetune", "sparsify", "qat", "export", "quantize", "build", "verify")
MIOU = {"baseline": 0.6342, "prune": 0.4120, "finetune": 0.6281, "export": 0.6281, "quantize": 0.6214, "verify": 0.6214}
MS = {"baseline": 7.9, "prune": 4.4, "finetune": 4.4, "export": 4.3, "quantize": 2.61, "verify": 2.61}
DEVICE: dict[str, Any] = {"device": TARGET, "power_mode": "MAXN", "runtime": "TensorRT 10.3"}
HOSTILE = "<script>alert('x')</script>\"&|`*"


def measurements_of(stage: str) -> list[Measurement]:
    if stage not in MIOU:
        return []
    onnx = stage in ("export", "quantize", "verify")
    precision = "int8" if stage in ("quantize", "verify") else "fp16"
    sha = ONNX if stage in ("quantize", "verify") else "e" * 64
    value, latency = MIOU[stage], MS[stage]
    common: dict[str, Any] = {"kind": "simulated", "runtime": "onnxruntime-cpu" if onnx else "torch", "split": "eval"}
    rows = [
        Measurement(name="accuracy.miou", value=value, low=value - 0.014, high=value + 0.013, n=400, **common),
        Measurement(name="accuracy.iou_pedestrian", value=value - 0.15, n=400, **common),
        Measurement(
            name="latency.mean_ms", value=latency, low=latency * 0.86, high=latency * 1.17, unit="ms",
            kind="predicted", precision=precision, artifact_sha256=sha, batch=1, **DEVICE,
        ),
    ]  # fmt: skip
    if stage in ("baseline", "prune", "finetune"):
        share = 1.0 if stage == "baseline" else 0.398
        rows.append(Measurement(name="macs", value=1.284e9 * share, unit="MAC", kind="measured"))
        rows.append(Measurement(name="params", value=1.93e6 * share * 0.9, unit="1", kind="measured"))
    if onnx or stage == "baseline":
        size = {"baseline": 7.4, "export": 2.7}.get(stage, 0.9)
        rows.append(Measurement(name="size.onnx_mib", value=size, unit="MiB", kind="measured"))
    if stage == "verify":
        for failure, severity, dense, compressed in (
            ("camera_blank", 3, 0.4410, 0.4205),
            ("lidar_half", 3, 0.5570, 0.5391),
            ("lidar_half", 1, 0.6110, 0.5990),
        ):
            name = f"robustness.{failure}.{severity}"
            rows.append(Measurement(name=f"{name}.miou", value=compressed, n=400, **common))
            rows.append(Measurement(name=f"{name}.dense.miou", value=dense, n=400, **common))
    return rows


def details_of(stage: str) -> dict[str, Any]:
    if stage == "prune":
        groups = []
        for branch, layers in (("camera", 9), ("lidar", 7), ("fusion", 5)):
            for layer in range(layers):
                width = 32 * 2 ** min(layer // 2, 3)
                kept = max(8, int(width * (0.3 + 0.08 * ((layer * 5) % 7))) // 8 * 8)
                others = f"+{branch}.stage{layer // 2}.{layer % 2}.shortcut.weight" if layer % 3 == 2 else ""
                name = f"{branch}.stage{layer // 2}.{layer % 2}.conv1.weight{others}"
                groups.append({"id": name, "branch": branch, "width": width, "kept": list(range(kept))})
        branches = {
            "camera": {"macs_before": 7.1e8, "macs_after": 2.2e8, "params_before": 9.2e5, "params_after": 2.9e5},
            "lidar": {"macs_before": 3.4e8, "macs_after": 1.8e8, "params_before": 6.1e5, "params_after": 3.1e5},
            "fusion": {"macs_before": 2.3e8, "macs_after": 1.1e8, "params_before": 4.0e5, "params_after": 1.9e5},
        }
        budget = {"unit": "macs", "fraction": 0.4, "achieved": 0.398, "gap": 0.002}
        return {"groups": groups, "branches": branches, "budget": budget}
    if stage == "score":
        return {"choice": {"chosen": "taylor", "tried": {"taylor": 0.41, "magnitude": 0.38}}}
    if stage == "finetune":
        return {"steps": 800, "final_loss": 0.4127, "distilled": True}
    if stage == "quantize":
        card = {"samples": 64, "seed": 0, "sha256": "ab12" * 16, "coverage": {"night": 14, "rain": 9, "clear": 41}}
        return {"calibration": card, "sparsity": {"layers_2to4": 17, "layers_dense": 6, "zeros": 0.437}}
    if stage == "verify":
        return {"pictures": [{"path": "verify/bev_0.png", "title": "Truth, dense and compressed of scene 12"}]}
    return {}


def replicates(drop: float) -> Replicates:
    generator = np.random.default_rng(0)

    def condition(dense: float, compressed: float) -> Condition:
        common = generator.normal(0, 0.012, 2000)
        pairs = np.stack([dense + common, compressed + common + generator.normal(0, 0.0045, 2000)], axis=1)
        pedestrian = pairs - 0.15
        return Condition(
            dense={"miou": dense, "iou_pedestrian": dense - 0.15},
            compressed={"miou": compressed, "iou_pedestrian": compressed - 0.15},
            replicates={"miou": pairs, "iou_pedestrian": pedestrian},
        )

    return Replicates(
        clean=condition(0.6342, 0.6342 - drop),
        failures={("camera_blank", 3): condition(0.441, 0.4205), ("lidar_half", 3): condition(0.557, 0.5391)},
        constant={"miou": 0.16, "iou_pedestrian": 0.0},
        samples=400,
        clusters=100,
        artifact_sha256=ONNX,
    )


GATES = GatesConfig(
    accuracy=AccuracyGate(max_drop=0.03),
    latency=LatencyGate(mean_ms=5.0),
    floors={"iou_pedestrian": 0.40},
    robustness={
        "camera_blank": RobustnessGate(max_extra_drop=0.03, min=0.30),
        "lidar_half": RobustnessGate(max_extra_drop=0.03),
    },
)


def record_of(gates: GatesConfig = GATES, drop: float = 0.0128, name: str = "street-orin") -> RunRecord:
    """A finished run, judged by the real gates."""
    stages = [
        StageRecord(
            name=stage,
            status="skipped" if stage == "qat" else "cached" if stage == "baseline" else "done",
            seconds=0.0 if stage in ("qat", "baseline") else 12.3,
            key=stage.encode().hex(),
            measurements=measurements_of(stage),
            details=details_of(stage),
            why="not in the recipe" if stage == "qat" else None,
        )
        for stage in STAGES
    ]
    record = RunRecord(
        name=name,
        fusepress="0.1.0",
        target=TARGET,
        recipe_sha256="1" * 64,
        task_sha256="2" * 64,
        checkpoint_sha256="3" * 64,
        seed=0,
        command="fusepress compress examples/street/recipe.yaml --target jetson-agx-orin-64gb",
        target_profile={
            "family": "jetson", "runtime": "TensorRT 10.3", "power_mode": "MAXN", "precision": "int8",
            "description": "Jetson AGX Orin 64 GB", "unconfirmed": [],
        },
        task={"name": "StreetTask", "metrics": {"miou": "max", "iou_pedestrian": "max"}},
        environment={"python": "3.11.9", "cores": 2, "tools": {"torch": "2.9.1", "onnx": "1.21"}},
        stages=stages,
        artifacts={
            "onnx": Artifact(path="quantize/model.onnx", sha256=ONNX),
            "build_kit": Artifact(path="build/kit", sha256="7" * 64, note="the device builds the engine with build.sh"),
            "checkpoint": Artifact(path="sparsify/sparse.safetensors", sha256="8" * 64),
        },
        released="build_kit",
    )  # fmt: skip
    verdicts = judge(record, replicates(drop), gates, {"miou": "max", "iou_pedestrian": "max"})
    record.stages[-1].verdicts = verdicts
    record.verdict, record.why = overall(verdicts)
    if record.verdict != "PASS":
        record.released = None
    return record


def broken_record() -> RunRecord:
    """A run that stopped in `quantize`."""
    record = record_of(name="street-broken")
    for stage in record.stages[7:]:
        stage.status, stage.seconds, stage.measurements, stage.details, stage.verdicts = "pending", 0.0, [], {}, []
    record.stages[7].status = "failed"
    record.stages[
        7
    ].why = (
        "expected an ONNX file that INT8 calibration can read; got NaN in 'head.out' at sample 17; check the checkpoint"
    )
    record.artifacts = {"onnx": Artifact(path="export/model.onnx", sha256="e" * 64)}
    record.verdict, record.why, record.released = None, "", None
    return record


def measured_record() -> RunRecord:
    """On this host: latencies measured, the dense model timed in turns, metrics of which less is better."""
    record = record_of(GatesConfig(latency=LatencyGate(mean_ms=40.0)), name="kitti-host")
    record.target, record.target_profile = "host-cpu", {"precision": "fp32"}
    record.task = {"name": "KittiDepth", "metrics": {"rmse": "min"}}
    rmse = {"baseline": 2.15, "prune": 3.4, "finetune": 2.21, "export": 2.21, "quantize": 2.21, "verify": 2.21}
    where: dict[str, Any] = {"kind": "measured", "device": "host-cpu", "precision": "fp32", "artifact_sha256": ONNX}
    for stage in record.stages:
        if stage.name not in rmse:
            continue
        value, latency = rmse[stage.name], MS[stage.name] * 10
        stage.measurements = [
            Measurement(name="accuracy.rmse", value=value, low=value - 0.1, high=value + 0.12, kind="measured"),
            Measurement(name="latency.mean_ms", value=latency, low=latency - 0.8, high=latency + 0.9, **where),
        ]
    record.stages[-1].measurements += [
        Measurement(name="latency.dense.mean_ms", value=78.2, low=77.0, high=79.4, **where),
        Measurement(
            name="latency.speedup", value=3.0, low=2.93, high=3.07, unit="x", kind="measured", device="host-cpu"
        ),
    ]
    verdicts = judge(record, None, GatesConfig(latency=LatencyGate(mean_ms=40.0, p99_ms=60.0)), {"rmse": "min"})
    record.stages[-1].verdicts = verdicts
    record.verdict, record.why = overall(verdicts)
    return record


SAMPLES: dict[str, Callable[[], RunRecord]] = {
    "pass": lambda: record_of(),
    "fail": lambda: record_of(
        GatesConfig(
            accuracy=AccuracyGate(max_drop=0.03),
            latency=LatencyGate(mean_ms=2.0, p99_ms=3.0),
            floors={"iou_pedestrian": 0.40},
            robustness={"camera_dark": RobustnessGate(max_extra_drop=0.03, min=0.3)},
        ),
        drop=0.058,
        name="street-tight",
    ),
    "inconclusive": lambda: record_of(
        GatesConfig(accuracy=AccuracyGate(max_drop=0.018), latency=LatencyGate(mean_ms=2.8)), name="street-close"
    ),
    "broken": broken_record,
    "measured": measured_record,
    "bare": lambda: record_of(GatesConfig(), name="street-ungated"),
}


def picture() -> bytes:
    from PIL import Image

    rows, columns = np.mgrid[0:60, 0:180]
    image = np.stack([rows * 4 % 256, columns % 256, (rows // 8 + columns // 8) % 2 * 160], axis=-1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def run_dir_of(record: RunRecord, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(record.to_json())
    (folder / "verify").mkdir(exist_ok=True)
    (folder / "verify" / "bev_0.png").write_bytes(picture())
    return folder


# ------------------------------------------------------------------------------------------------------ a valid page

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(html.parser.HTMLParser):
    """Collects what a valid, accessible, self-contained page must keep."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.faults: list[str] = []
        self.headings: list[int] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        self.faults += [f"<{tag}> is not closed" for tag in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if len(found) != len(attrs):
            self.faults.append(f"<{tag}> repeats an attribute")
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if found.get("id"):
            self.ids.append(str(found["id"]))
        if found.get("aria-labelledby"):
            self.references.append(str(found["aria-labelledby"]))
        self.faults += [f"<{tag} {key}> handles events" for key in found if key.startswith("on")]

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open[-1] != tag:
            self.faults.append(f"</{tag}> closes {self.open[-1:] or 'nothing'}")
        else:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def check_page(text: str) -> Page:
    page = Page(text)
    assert not page.faults
    assert text.startswith("<!doctype html>")
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<script|<link|<iframe", text, re.IGNORECASE)
    for attrs in page.all("img"):
        assert attrs.get("alt")
        assert str(attrs["src"]).startswith("data:image/")
    for attrs in page.all("a"):
        assert str(attrs["href"]).removeprefix("#") in page.ids
    for attrs in page.all("th"):
        assert attrs.get("scope") in ("col", "row")
    drawings = [attrs for attrs in page.all("svg") if attrs.get("aria-hidden") != "true"]
    assert all(attrs.get("aria-label") and attrs.get("role") == "img" for attrs in drawings)
    assert len(page.all("title")) == len(drawings) + 1, "every drawing has a title, and the page"
    assert page.headings.count(1) == 1
    assert page.headings[0] == 1
    steps = [after - before for before, after in zip(page.headings, page.headings[1:], strict=False)]
    assert max(steps, default=0) <= 1, "a heading level was skipped"
    assert len(set(page.ids)) == len(page.ids)
    assert set(page.references) <= set(page.ids)
    return page


@pytest.mark.parametrize("name", SAMPLES)
def test_the_page_is_valid_accessible_and_needs_no_network(name: str, tmp_path: Path) -> None:
    record = SAMPLES[name]()
    path = write_report(run_dir_of(record, tmp_path))
    assert path == tmp_path / "report.html"
    page = check_page(path.read_text())
    assert record.name in page.words
    assert record.target in page.words
    assert record.command in page.words
    for artifact in record.artifacts.values():
        assert artifact.sha256 in page.words
    for verdict in view.verdicts_of(record):
        assert verdict.gate in page.words
        assert " ".join(verdict.why.split()) in page.words


def test_the_verdict_and_why_come_first() -> None:
    words = check_page(render(SAMPLES["fail"](), Path())).words
    assert (
        words.index("Verdict: FAIL")
        < words.index("Drop of miou against the dense model: 0.0580")
        < words.index("Gates")
    )
    assert "5 of 6 gates failed, 1 inconclusive" in words
    assert "99th percentile of latency: missing, at most 3 ms" in words
    words = check_page(render(SAMPLES["inconclusive"](), Path())).words
    assert "2 of 2 gates inconclusive" in words
    assert "more samples (481 clusters) would decide it with 80% probability" in words


def test_a_passed_page_names_what_may_be_released() -> None:
    words = check_page(render(SAMPLES["pass"](), Path())).words
    assert "All 6 gates passed" in words
    assert "Releasable: build kit build/kit" in words


def test_a_failed_page_names_what_may_be_released_instead() -> None:
    record = SAMPLES["fail"]()
    record.artifacts["dense_onnx"] = Artifact(path="baseline/dense.onnx", sha256="d" * 64)
    record.released = "dense_onnx"
    assert "Releasable instead: dense onnx baseline/dense.onnx" in check_page(render(record, Path())).words
    assert "Releasable instead: **dense onnx**" in markdown.render(record)


def test_a_stopped_run_says_where_and_why_and_claims_no_gate() -> None:
    record = broken_record()
    words = check_page(render(record, Path())).words
    assert "STAGE FAILED" in words
    assert "quantize: expected an ONNX file that INT8 calibration can read" in words
    assert "Nothing is released by this run." in words
    assert "The gates were not reached." in words
    record.stages[7].status = "interrupted"
    assert "INTERRUPTED" in check_page(render(record, Path())).words
    record.stages[7].status = "pending"
    assert "NOT FINISHED" in check_page(render(record, Path())).words


def test_what_was_tried_and_chosen_is_on_the_page() -> None:
    words = check_page(render(SAMPLES["pass"](), Path())).words
    assert "Choices, Calibration, Sparsity" in words
    assert "What was tried (score)" in words
    assert "taylor 0.41, magnitude 0.38" in words


def test_no_gate_is_visible() -> None:
    words = check_page(render(SAMPLES["bare"](), Path())).words
    assert "No gate was set: nothing was judged" in words
    assert "no gate was set" in markdown.render(SAMPLES["bare"]()).lower()


def test_a_record_with_nothing_in_it_still_makes_a_page(tmp_path: Path) -> None:
    record = RunRecord(
        name="n", fusepress="0", target="t", recipe_sha256="", task_sha256="", checkpoint_sha256="", seed=0
    )
    run_dir_of(record, tmp_path)
    check_page(write_report(tmp_path).read_text())
    assert "NOT FINISHED" in write_summary(tmp_path).read_text()
    assert write_junit(tmp_path).exists()


@pytest.mark.parametrize("kind", ["measured", "simulated", "predicted"])
def test_a_number_is_printed_with_its_own_evidence_and_no_other(kind: Kind) -> None:
    record = record_of(GatesConfig(latency=LatencyGate(mean_ms=5.0)))
    for stage in record.stages:
        for measurement in stage.measurements:
            if measurement.name.startswith("latency."):
                measurement.kind = kind
    page = render(record, Path())
    cells = re.findall(r'<td class="num"><span class="figure">[^<]* ms</span>.*?</td>', page, re.DOTALL)
    assert len(cells) == 7  # six stages and the gate
    for cell in cells:
        assert re.findall(r'class="badge k-(\w+)"', cell) == [kind]
    drawing = page[page.index('aria-label="Latency on the target:') :]
    told = drawing[: drawing.index(">")]
    assert told.count(f"({kind})") == 6
    rows = [line for line in markdown.render(record).splitlines() if "mean latency" in line]
    assert rows
    assert all(line.rstrip(" |").endswith(kind) for line in rows)


def test_an_extrapolation_is_marked() -> None:
    record = SAMPLES["pass"]()
    record.stages[-1].measurements[2].extrapolating = True
    assert "predicted, extrapolating" in check_page(render(record, Path())).words
    assert "predicted, extrapolating" in markdown.render(record)


def hostile_record() -> RunRecord:
    record = record_of(name=HOSTILE)
    record.target, record.command = HOSTILE, f"fusepress {HOSTILE}"
    record.task["name"] = HOSTILE
    record.environment[HOSTILE] = HOSTILE
    record.target_profile["power_mode"] = HOSTILE
    record.artifacts[HOSTILE] = Artifact(path=HOSTILE, sha256=HOSTILE, note=HOSTILE)
    record.released = HOSTILE
    record.stages[-1].verdicts[0].why = record.stages[-1].verdicts[0].gate = HOSTILE
    record.stages[-1].details["pictures"][0]["title"] = HOSTILE
    prune = record.stages[2]
    prune.name, record.stages[3].name = "prune", HOSTILE
    prune.details["groups"][0] |= {"id": HOSTILE, "branch": HOSTILE}
    prune.details["branches"][HOSTILE] = prune.details["branches"]["camera"]
    prune.details[HOSTILE] = {HOSTILE: [HOSTILE]}
    prune.why = HOSTILE
    return record


def test_nothing_in_the_record_becomes_markup(tmp_path: Path) -> None:
    record = hostile_record()
    run_dir_of(record, tmp_path)
    text = write_report(tmp_path).read_text()
    assert "&lt;script&gt;" in text
    check_page(text)
    summary = write_summary(tmp_path).read_text()
    outside_code = re.sub(r"(?<![\\`])(`+)(?!`).*?(?<!`)\1(?!`)", "", summary, flags=re.DOTALL)
    assert "<script" not in outside_code
    JUnitXml.fromfile(str(write_junit(tmp_path)))


def test_the_same_record_gives_the_same_bytes_and_nothing_is_left_beside(tmp_path: Path) -> None:
    one, two = run_dir_of(record_of(), tmp_path / "one"), run_dir_of(record_of(), tmp_path / "elsewhere")
    for write in (write_report, write_junit, write_summary):
        assert write(one).read_bytes() == write(two).read_bytes()
        first = write(one).read_bytes()
        assert write(one).read_bytes() == first
    assert {path.name for path in one.iterdir()} == {"run.json", "verify", "report.html", "junit.xml", "summary.md"}
    assert str(tmp_path) not in write_report(one).read_text()


@pytest.mark.parametrize("write", [write_report, write_junit, write_summary])
def test_without_a_record_nothing_is_written(write: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected a run folder with run\.json"):
        write(tmp_path)
    (tmp_path / "run.json").write_text('{"schema": 1')
    with pytest.raises(StoreError, match="a file that does not fit"):
        write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


# ---------------------------------------------------------------------------------------------------------- pictures


def test_pictures_are_embedded_from_the_run_folder_or_the_stage_folder(tmp_path: Path) -> None:
    record = record_of()
    record.stages[-1].details["pictures"].append({"path": "bev_0.png", "title": "Named from the stage"})
    run_dir_of(record, tmp_path)
    (tmp_path / "score").mkdir()
    (tmp_path / "score" / "s.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"><script>1</script></svg>')
    record.stages[1].details["pictures"] = [{"path": "score/s.svg", "title": "Scores"}]
    page = check_page(render(record, tmp_path))
    assert {str(attrs["alt"]) for attrs in page.all("img")} == {
        "Truth, dense and compressed of scene 12",
        "Named from the stage",
        "Scores",
    }
    assert str(page.all("img")[-1]["src"]).startswith("data:image/svg+xml;base64,")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("../secret.png", "is not in the run folder"),
        ("verify/../../secret.png", "is not in the run folder"),
        ("/etc/hostname.png", "is not in the run folder"),
        ("verify/none.png", "is not in the run folder"),
        ("run.json", "is not a PNG, JPEG or SVG file"),
    ],
)
def test_a_picture_that_is_not_the_runs_own_is_left_out(path: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(picture())
    record = record_of()
    record.stages[-1].details["pictures"] = [{"path": path, "title": "x"}]
    page = check_page(render(record, run_dir_of(record, tmp_path / "run")))
    assert page.all("img") == []
    assert f"Left out: {path} of verify {reason}." in page.words


# ----------------------------------------------------------------------------------------------------------- colours


def luminance(colour: str) -> float:
    channels = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def contrast(one: str, two: str) -> float:
    light, dark = sorted((luminance(one), luminance(two)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_all_text_has_enough_contrast(scheme: int) -> None:
    """WCAG 2.2 AA: 4.5 to 1 for text, 3 to 1 for shapes that carry meaning."""
    sheet = (Path(charts.__file__).parent / "style.css").read_text()
    block = re.findall(r":root \{(.*?)\}", sheet, re.DOTALL)[scheme]
    colour = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
    for ground in ("bg", "card", "sunk"):
        for ink in ("ink", "muted", "accent", "fail"):
            assert contrast(colour[ink], colour[ground]) >= 4.5, (ink, ground)
    for tone in ("pass", "fail", "inconclusive", "anomalous", "pending"):
        assert contrast(colour[tone], colour[f"{tone}-bg"]) >= 4.5, tone
        assert contrast(colour["ink"], colour[f"{tone}-bg"]) >= 4.5, tone
        assert contrast(colour[tone], colour["card"]) >= 3, tone
    assert contrast(colour["accent"], colour["track"]) >= 3


# ------------------------------------------------------------------------------------------------------- the figures


def test_tiles_hold_the_release_against_the_dense_model() -> None:
    tiles = {tile.label: tile for tile in view.tiles(SAMPLES["pass"]())}
    assert tiles["miou"].change == f"{view.MINUS}0.0128"
    assert tiles["mean latency"].change == "3.03\u00d7 as fast"
    assert tiles["MACs"].change == "40 % kept"
    timed = {tile.label: tile for tile in view.tiles(measured_record())}["mean latency"]
    assert timed.before is not None
    assert timed.before.text == "78.2 ms"  # timed in turns, not the baseline's own 79.0
    assert timed.change == "3.00\u00d7 as fast (2.93 to 3.07)"


def test_a_measured_latency_is_never_divided_by_a_predicted_one() -> None:
    record = SAMPLES["pass"]()
    record.stages[-1].measurements[2].kind = "measured"
    tile = {tile.label: tile for tile in view.tiles(record)}["mean latency"]
    assert (tile.before, tile.change, tile.after.kind) == (None, "", "measured")


def test_the_dense_latency_timed_beside_counts_only_when_of_the_same_kind() -> None:
    record = measured_record()
    beside = next(m for m in record.stages[-1].measurements if m.name == "latency.dense.mean_ms")
    beside.kind = "predicted"
    tile = {tile.label: tile for tile in view.tiles(record)}["mean latency"]
    assert tile.before is not None
    assert (tile.before.text, tile.before.kind) == ("79.0 ms", "measured")


def test_a_stage_with_both_kinds_shows_the_measured_latency() -> None:
    record = SAMPLES["pass"]()
    verify = record.stages[-1]
    verify.measurements.insert(0, Measurement(name="latency.mean_ms", value=3.3, kind="measured", device=TARGET))
    found = view.of_stage(record, verify, "latency.mean_ms")
    assert found is not None
    assert (found.value, found.kind) == (3.3, "measured")


def test_a_latency_of_another_device_is_not_shown_as_the_targets() -> None:
    record = SAMPLES["pass"]()
    verify = record.stages[-1]
    verify.measurements.append(Measurement(name="latency.mean_ms", value=31.0, kind="measured", device="host-cpu"))
    found = view.of_stage(record, verify, "latency.mean_ms")
    assert found is not None
    assert (found.value, found.kind) == (2.61, "predicted")


def test_extra_drops_agree_with_the_gates() -> None:
    record = SAMPLES["pass"]()
    rows = {(row.failure, row.severity): row for row in robustness.failure_rows(record)}
    assert set(rows) == {("camera blank", 3), ("lidar half", 1), ("lidar half", 3)}
    for failure in ("camera_blank", "lidar_half"):
        row = rows[view.words_of(failure), 3]
        assert row.verdict is not None
        assert row.verdict.value is not None
        assert row.extra == f"+{row.verdict.value:.4f}"
    assert rows["lidar half", 1].verdict is None
    assert rows["lidar half", 1].extra == f"{view.MINUS}0.0008"


def test_what_was_removed_is_told_by_branch_and_layer() -> None:
    words = check_page(render(SAMPLES["pass"](), Path())).words
    assert "camera 710 M \u2192 220 M 31 %" in words
    assert "All 21 groups of coupled channels" in words
    rows = view.group_rows(SAMPLES["pass"]())
    assert [row.branch for row in rows] == ["camera"] * 9 + ["lidar"] * 7 + ["fusion"] * 5
    assert rows[2].label.endswith("conv1 +1")


def test_kept_may_be_a_count() -> None:
    record = SAMPLES["pass"]()
    before = view.group_rows(record)
    for group in record.stages[2].details["groups"]:
        group["kept"] = len(group["kept"])
    assert view.group_rows(record) == before


def test_many_layers_are_cut_in_the_chart_and_whole_in_the_table() -> None:
    record = SAMPLES["pass"]()
    record.stages[2].details["groups"] = [
        {"id": f"camera.layer{index}.weight", "branch": "camera", "width": 64, "kept": 32} for index in range(75)
    ]
    words = check_page(render(record, Path())).words
    assert "and 15 more layers in the table below" in words
    assert words.count("camera.layer74") == 1


@pytest.mark.parametrize(("executed", "said"), [(False, True), (True, False)])
def test_an_engine_that_never_ran_is_called_that(executed: bool, said: bool) -> None:
    record = SAMPLES["pass"]()
    record.artifacts["engine"] = Artifact(path="build/model.engine", sha256="f" * 64)
    record.stages[8].details = {"executed": executed, "note": "no GPU was here"}
    words = check_page(render(record, Path())).words
    assert ("engine built, not executed build/model.engine" in words) == said
    assert ("engine (built, not executed)" in markdown.render(record)) == said
    assert "build no GPU was here" in words


def test_details_of_any_size_stay_short() -> None:
    huge = {f"key_{index}": [{"deep": ["x" * 50] * 100}] * 100 for index in range(100)}
    assert len(view.plain(huge)) <= view.MOST_CHARACTERS
    assert view.plain({"a_b": [1, 2.5, None, True]}) == f"a b 1, 2.5, {view.DASH}, yes"
    assert view.plain(list(range(20))).endswith("7 and 12 more")


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("latency.mean_ms", 2.6, "2.60 ms"),
        ("latency.mean_ms", 123.4, "123 ms"),
        ("latency.mean_ms", 0.0, "0 ms"),
        ("accuracy.miou", -0.5, f"{view.MINUS}0.5000"),
        ("accuracy.rmse", 1234.5, "1234"),
        ("macs", 1.284e9, "1.28 G"),
        ("params", 950.0, "950"),
        ("size.onnx_mib", 0.9, "0.900 MiB"),
        ("parity.max_abs", 1e-7, f"1e{view.MINUS}07"),
    ],
)
def test_numbers_are_printed_as_they_are_read(name: str, value: float, text: str) -> None:
    assert view.quantity(name, value) == text


# ------------------------------------------------------------------------------------------------------------ charts


@settings(max_examples=80, deadline=None)
@given(low=st.floats(-1e6, 1e6), span=st.floats(1e-3, 1e6), wanted=st.integers(2, 8))
def test_ticks_are_round_few_and_inside(low: float, span: float, wanted: int) -> None:
    ticks = svg.nice_ticks(low, low + span, wanted)
    assert len(ticks) <= wanted + 2
    assert ticks == sorted(set(ticks))
    assert all(low - 1e-6 * span - 1e-9 <= tick <= low + span + 1e-6 * span + 1e-9 for tick in ticks)


def test_evidence_is_told_apart_by_shape() -> None:
    shapes = {kind: str(svg.marker(kind, 0, 0)) for kind in ("measured", "simulated", "predicted")}
    assert len({re.findall(r'<(\w+) class="([\w-]+)"', shape)[0] for shape in shapes.values()}) == 3


@pytest.mark.parametrize("at_most", [True, False])
def test_a_gate_chart_shades_the_allowed_side(at_most: bool) -> None:
    drawing = str(charts.gate_chart(value=2, low=1, high=3, limit=4, at_most=at_most, tone="pass", title="t"))
    start, width = map(float, re.findall(r'c-allowed" x="([\d.]+)" y="9" width="([\d.]+)"', drawing)[0])
    dot = float(re.findall(r'c-dot t-pass" cx="([\d.]+)"', drawing)[0])
    assert (start <= dot <= start + width) == at_most


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=6),
    limit=st.none() | st.floats(-1e6, 1e6),
    from_zero=st.booleans(),
)
def test_a_waterfall_stays_inside_its_frame(values: list[float], limit: float | None, from_zero: bool) -> None:
    steps = [Step(f"s{i}", value, value - 1, value + 1, "predicted") for i, value in enumerate(values)]
    drawing = str(
        waterfall(
            steps,
            title="t",
            show=str,
            show_change=str,
            show_tick=str,
            more_is_better=True,
            limit=limit,
            limit_label="limit",
            from_zero=from_zero,
        )
    )
    ET.fromstring(drawing)
    places = [float(x) for x in re.findall(r' (?:cx|x1|x2)="(-?[\d.]+)"', drawing)]
    assert places
    assert all(0 <= x <= 520 for x in places)


# ------------------------------------------------------------------------------------------------------------- JUnit


def cases_of(record: RunRecord, folder: Path) -> dict[str, Any]:
    xml = JUnitXml.fromfile(str(write_junit(run_dir_of(record, folder))))
    return {f"{suite.name}.{case.name}": case for suite in xml for case in suite}


def kinds_of(case: Any) -> list[str]:
    return [type(result).__name__ for result in case.result]


def test_each_gate_is_a_test_case(tmp_path: Path) -> None:
    cases = cases_of(SAMPLES["fail"](), tmp_path)
    assert kinds_of(cases["gates.accuracy.miou"]) == ["Failure"]
    assert kinds_of(cases["gates.floors.iou_pedestrian"]) == ["Error"]
    assert cases["gates.floors.iou_pedestrian"].result[0].type == "INCONCLUSIVE"
    assert "missing number" in cases["gates.latency.p99_ms"].result[0].message
    assert kinds_of(cases["stages.qat"]) == ["Skipped"]
    assert kinds_of(cases["stages.prune"]) == []
    root = ET.parse(tmp_path / "junit.xml").getroot()
    assert (root.get("failures"), root.get("errors"), root.get("skipped")) == ("5", "1", "1")
    assert root.get("tests") == "16"


def test_passed_gates_are_green(tmp_path: Path) -> None:
    cases = cases_of(SAMPLES["pass"](), tmp_path)
    assert [name for name in cases if name.startswith("gates.")] == [
        f"gates.{verdict.gate}" for verdict in view.verdicts_of(SAMPLES["pass"]())
    ]
    assert all(kinds_of(case) == [] for name, case in cases.items() if name.startswith("gates."))


def test_an_anomaly_is_an_error(tmp_path: Path) -> None:
    record = record_of(GatesConfig(accuracy=AccuracyGate(max_drop=0.03)), drop=-0.08)
    assert record.verdict == "ANOMALOUS"
    assert kinds_of(cases_of(record, tmp_path)["gates.accuracy.miou"]) == ["Error"]
    assert "ANOMALOUS" in check_page(render(record, tmp_path)).words


def test_a_run_without_judged_gates_is_not_green_by_absence(tmp_path: Path) -> None:
    bare = cases_of(SAMPLES["bare"](), tmp_path / "bare")["gates.gates"]
    assert kinds_of(bare) == ["Skipped"]
    assert bare.result[0].message == "no gate was set: nothing was judged"
    cases = cases_of(broken_record(), tmp_path / "broken")
    assert kinds_of(cases["stages.quantize"]) == ["Error"]
    assert kinds_of(cases["stages.verify"]) == ["Skipped"]
    assert kinds_of(cases["gates.gates"]) == ["Skipped"]


@settings(max_examples=30, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_makes_readable_files(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    record = record_of()
    record.stages[0].why = record.stages[-1].verdicts[0].why = text
    folder = run_dir_of(record, tmp_path_factory.mktemp("run"))
    ET.parse(write_junit(folder))
    check_page(write_report(folder).read_text())
    tables_hold(write_summary(folder).read_text())


# ---------------------------------------------------------------------------------------------------------- Markdown


def tables_hold(text: str) -> None:
    """Every row of a table has as many cells as its header."""
    cells = 0
    for line in text.splitlines():
        if not line.startswith("|"):
            cells = 0
            continue
        found = len(re.findall(r"(?<!\\)(?:\\\\)*\|", line))
        cells = cells or found
        assert found == cells, line


@pytest.mark.parametrize("name", SAMPLES)
def test_the_summary_tells_the_verdict_the_gates_and_the_artifacts(name: str, tmp_path: Path) -> None:
    record = SAMPLES[name]()
    text = write_summary(run_dir_of(record, tmp_path)).read_text()
    tables_hold(text)
    first = text.splitlines()[0]
    assert first.startswith("## ")
    assert (record.verdict or "STAGE FAILED") in first
    assert record.command in text
    for verdict in view.verdicts_of(record):
        assert f"`{verdict.gate}`" in text
    for artifact in record.artifacts.values():
        assert artifact.sha256[:16] in text


def test_a_hostile_summary_keeps_its_tables() -> None:
    tables_hold(markdown.render(hostile_record()))


def test_reports_import_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys, fusepress.pipeline.report.html, fusepress.pipeline.report.junit;"
        "import fusepress.pipeline.report.markdown;"
        "sys.exit(bool({'torch', 'matplotlib', 'onnx'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
