"""`fusepress explain` on a run folder and on an ONNX file, and what the report makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fusepress.pipeline.cli import run
from fusepress.pipeline.errors import BuildError
from fusepress.pipeline.evidence import RUN_JSON, Artifact
from fusepress.pipeline.explaining import explain_run
from fusepress.pipeline.report.explain import EXPLAIN_JSON, read_explanation, view_of
from fusepress.pipeline.report.html import render
from fusepress.pipeline.store import sha256_file
from tests.onnx_graphs import Graph
from tests.test_report import record_of

LAYERS = {
    "Layers": [
        {
            "Name": "a + a/Relu",
            "LayerType": "CaskConvolution",
            "Inputs": [{"Name": "x", "Format/Datatype": "Row major linear FP16 format"}],
            "Outputs": [{"Name": "y", "Format/Datatype": "Row major linear FP16 format"}],
            "Metadata": "[ONNX Layer: a][ONNX Layer: a/Relu]",
        }
    ],
    "Bindings": ["x"],
}
PROFILE = '[ { "count" : 200 }, { "name" : "a + a/Relu", "timeMs" : 50, "averageMs" : 0.25, "medianMs" : 0.2 } ]'


@pytest.fixture
def onnx_file(tmp_path: Path) -> Path:
    """An INT8 convolution that the builder runs in FP16, and another that the file itself leaves there."""
    graph = Graph(19, half=True)
    x = graph.conv_int8(graph.quantized(graph.input("x", [1, 256, 32, 32]), "q"), (256, 256), "a")
    x = graph.add("Relu", x, name="a/Relu")
    graph.output(graph.add("Relu", graph.conv(x, (256, 256), "left"), name="left/Relu"))
    return graph.save(tmp_path / "model.onnx")


@pytest.fixture
def run_folder(onnx_file: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "quantize").mkdir(parents=True)
    (folder / "build").mkdir()
    onnx_file.rename(folder / "quantize/model.onnx")
    record = record_of()
    record.artifacts["onnx"] = Artifact(path="quantize/model.onnx", sha256=sha256_file(folder / "quantize/model.onnx"))
    record.target_profile = {"power_mode": "MAXN", "precision": "int8"}
    (folder / RUN_JSON).write_text(record.to_json())
    return folder


def test_a_run_is_explained_and_the_report_shows_it(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_folder / "build/model.layers.json").write_text(json.dumps(LAYERS))
    (run_folder / "profile.json").write_text(PROFILE)
    assert run(["explain", str(run_folder), "--profile", str(run_folder / "profile.json")]) == 0
    said = capsys.readouterr().out
    assert "stayed floating: a, layer measured 0.250 ms" in said
    assert "Conv in int8 in the file runs in fp16 in the engine" in said
    assert "predicted" in said
    page = (run_folder / "report.html").read_text()
    assert "Why it is not faster" in page
    assert "from the builder's list of 1 layers" in page.replace("&#39;", "'")
    assert "Gain: what mending it wins (predicted)" in page
    found = json.loads((run_folder / EXPLAIN_JSON).read_text())
    assert found["kind"] == "predicted"
    assert [f["gain_ms"] for f in found["findings"]] == sorted((f["gain_ms"] for f in found["findings"]), reverse=True)


def test_findings_on_another_file_are_not_shown(run_folder: Path) -> None:
    explain_run(run_folder)
    record = record_of()
    assert read_explanation(record, run_folder) is None  # its ONNX has another hash
    assert "Why it is not faster" not in render(record, run_folder)
    record.artifacts["onnx"] = Artifact(path="m.onnx", sha256=sha256_file(run_folder / "quantize/model.onnx"))
    assert read_explanation(record, run_folder) is not None
    (run_folder / EXPLAIN_JSON).write_text("{")
    assert read_explanation(record, run_folder) is None


def test_many_findings_are_cut_and_small_ones_are_counted() -> None:
    finding = {"kind": "reformat", "where": "a", "what": "w", "advice": "d", "gain_ms": 0.1, "measured_ms": None}
    view = view_of(
        {
            "latency_ms": 2.0,
            "low_ms": 1.0,
            "high_ms": 4.0,
            "extrapolating": True,
            "layers": 0,
            "findings": [finding] * 22,
            "small": {"depthwise": 3},
        }
    )
    assert (len(view.rows), view.more, view.small) == (20, 2, "3 depthwise")
    assert view.rows[0].share == "5.0 %"
    assert view.basis == (
        "Gains are predicted, against 2.00 ms predicted (90 % interval 1.00 to 4.00, extrapolating), "
        "from the ONNX graph alone."
    )


def test_an_onnx_file_is_explained_for_a_target(onnx_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", str(onnx_file), "--target", "rtx-4090", "--precision", "int8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "left" in {finding["where"] for finding in found["findings"]}
    assert not (onnx_file.parent / EXPLAIN_JSON).exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{onnx}"], 2, "expected --target for the ONNX file"),
        (["{onnx}", "--target", "rtx-4090", "--layers", "none.json"], 5, "expected a list of layers; got no file"),
        (["{onnx}", "--target", "rtx-4090", "--profile", "none.json"], 2, "expected the profile of trtexec"),
        (["nowhere"], 2, "expected a run folder with run.json; got none at nowhere"),
    ],
    ids=["target", "layers", "profile", "run"],
)
def test_a_users_mistake_is_told(
    onnx_file: Path, arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["explain", *[part.format(onnx=onnx_file) for part in arguments]]) == code
    assert message in capsys.readouterr().err


def test_a_target_that_does_not_ship_is_asked_for(run_folder: Path) -> None:
    record = record_of()
    record.target = "mine"
    record.artifacts["onnx"] = Artifact(path="quantize/model.onnx", sha256="0" * 64)
    (run_folder / RUN_JSON).write_text(record.to_json())
    assert run(["explain", str(run_folder)]) == 2
    assert run(["explain", str(run_folder), "--target", "rtx-4090"]) == 0


def test_layers_of_another_model_are_refused_and_a_log_without_layers_is_passed_over(run_folder: Path) -> None:
    (run_folder / "build/model.log").write_text("[INFO] built\n")
    assert explain_run(run_folder).layers == 0
    other = json.dumps(LAYERS).replace("ONNX Layer: a", "ONNX Layer: z")
    (run_folder / "other.json").write_text(other)
    with pytest.raises(BuildError, match=r"expected layers of model\.onnx; got 1, of which none names a node of it"):
        explain_run(run_folder, layers=run_folder / "other.json")


def test_a_file_without_precision_of_its_own_is_said_to_be_one(
    tmp_path: Path, onnx_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph = Graph(17)
    graph.output(graph.conv(graph.input("x", [1, 64, 16, 16]), (64, 64), "a"))
    plain = graph.save(tmp_path / "plain.onnx")
    said = []
    for path, precision in ((plain, "int8"), (plain, "fp32"), (onnx_file, "int8")):
        assert run(["explain", str(path), "--target", "rtx-4090", "--precision", precision]) == 0
        said.append("int8 is assumed throughout" in capsys.readouterr().out)
    assert said == [True, False, False]
