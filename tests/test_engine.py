"""Engines of TensorRT-RTX, built ahead of time and never claimed to have run; and refusals that say what to do."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from fusepress.export.engine import EngineInfo, build_rtx_engine, build_tensorrt_engine, check_plan, parse_layers
from fusepress.export.onnx import export_onnx
from fusepress.pipeline.errors import BuildError, TargetError
from tests.export_toys import inputs, two_branch

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed (x86-64 only)"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "model.onnx"
    export_onnx(two_branch(), inputs(1), ["seg", "cls"], path)
    return path


@pytest.fixture(scope="module")
def engine(model: Path) -> EngineInfo:
    return build_rtx_engine(model, model.with_name("model.engine"), compute_capabilities=["8.9"])


@needs_rtx
def test_an_engine_is_built_and_not_executed(engine: EngineInfo) -> None:
    assert engine.size == engine.path.stat().st_size
    assert not engine.executed
    assert engine.runtime == "tensorrt_rtx"
    assert engine.compute_capabilities == ("8.9",)
    assert "Layers:" in engine.log_path.read_text()
    check_plan(engine.path, sha256=engine.sha256, size=engine.size)
    shown = engine.to_dict()
    assert shown["executed"] is False
    assert "sparse" not in str(shown)


@needs_rtx
def test_layers_carry_their_onnx_nodes_and_precision(engine: EngineInfo) -> None:
    by_node = {node: layer for layer in engine.layers for node in layer.nodes}
    assert by_node["fuse/Conv"].precision == "fp32"
    assert {"camera.0/Conv", "lidar.0/Conv", "head/Conv", "ScatterND", "GridSample"} <= set(by_node)
    assert set(engine.precisions()) == {"fp32"}


@needs_rtx
def test_the_same_model_gives_the_same_plan(engine: EngineInfo, model: Path, tmp_path: Path) -> None:
    again = build_rtx_engine(model, tmp_path / "again.engine", compute_capabilities=["sm_89"])
    assert again.sha256 == engine.sha256


@needs_rtx
def test_a_gpu_that_it_does_not_build_for_points_to_the_build_kit(model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        TargetError, match=r"expected a GPU of compute capability 7\.5, .*; got 8\.7; .*use the build kit"
    ):
        build_rtx_engine(model, tmp_path / "m.engine", compute_capabilities=["8.7"])
    assert not (tmp_path / "m.engine").exists()


@pytest.mark.parametrize("text", ["ada", "8", ""])
def test_what_is_no_compute_capability_is_refused(model: Path, tmp_path: Path, text: str) -> None:
    with pytest.raises(TargetError, match=r"expected a compute capability such as 8\.9; got"):
        build_rtx_engine(model, tmp_path / "m.engine", compute_capabilities=[text])


def _refused(tmp_path: Path) -> Path:
    """A scatter with a reduction and two operators that TensorRT-RTX does not have."""
    value = helper.make_tensor_value_info
    float_ = TensorProto.FLOAT
    nodes = [
        helper.make_node("ScatterElements", ["x", "i", "x"], ["s"], name="vfe/ScatterElements", reduction="max"),
        helper.make_node("Unique", ["x"], ["u"], name="voxels/Unique"),
        helper.make_node("Det", ["m"], ["d"], name="pose/Det"),
    ]
    outputs: list[Any] = [value("s", float_, [4]), value("u", float_, ["k"]), value("d", float_, [])]
    constants = [
        helper.make_tensor("i", TensorProto.INT64, [4], [0, 1, 1, 2]),
        helper.make_tensor("m", float_, [2, 2], [1, 2, 3, 4]),
    ]
    graph = helper.make_graph(nodes, "g", [value("x", float_, [4])], outputs, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


@needs_rtx
def test_every_refused_operator_is_listed_with_advice(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="expected operators that the parser knows; got 3 ") as caught:
        build_rtx_engine(_refused(tmp_path), tmp_path / "m.engine", compute_capabilities=["8.6"])
    text = str(caught.value)
    assert (
        "ScatterElements at node vfe/ScatterElements: Unsupported reduction type; a max over scattered points" in text
    )
    assert "Unique at node voxels/Unique: not supported; make the indices unique outside the model" in text
    assert "Det at node pose/Det" in text
    assert not (tmp_path / "m.engine").exists()


@needs_rtx
def test_a_builder_that_is_too_slow_or_short_of_memory_is_told(model: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"(?s)got no answer within 0\.05 s of the builder"):
        build_rtx_engine(model, tmp_path / "m.engine", compute_capabilities=["8.9"], timeout_s=0.05)
    with pytest.raises(BuildError, match=r"(?s)expected an engine; got .* of the builder at .*; see .*m\.log"):
        build_rtx_engine(model, tmp_path / "m.engine", compute_capabilities=["8.9"], memory_limit=30 << 20)
    assert not (tmp_path / "m.engine").exists()


def test_a_plan_with_other_bytes_is_refused(tmp_path: Path) -> None:
    plan = tmp_path / "m.engine"
    with pytest.raises(BuildError, match="expected a plan of 4 bytes with sha256 00; got no file"):
        check_plan(plan, sha256="00", size=4)
    plan.write_bytes(b"1234")
    with pytest.raises(BuildError, match="got other bytes of that length"):
        check_plan(plan, sha256="00", size=4)
    with pytest.raises(BuildError, match="got 4 bytes at"):
        check_plan(plan, sha256="00", size=5)


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed")
def test_tensorrt_that_is_not_there_was_not_tried(model: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"got neither tried nor built: the Python package tensorrt is not installed"):
        build_tensorrt_engine(model, tmp_path / "m.engine")


def test_layers_are_read_from_the_dump() -> None:
    tensor = "{ Name: t, Dimensions: [1,20,4], Strides: [80,4,1], Datatype: %s, Format: (Linear) Row major }"
    line = (
        f"Name: fuse/Conv_myl0_6, LayerType: correlation, Inputs: [ {tensor % 'Int8'}], "
        f"Constants: [ {tensor % 'Int8'}, {tensor % 'Float'}], Outputs: [ {tensor % 'Half'}], "
        "TacticName: stub, StreamId: 0, Metadata: [ONNX Layer: fuse/Conv][ONNX Layer: q]"
    )
    move = f"Name: m, LayerType: kgen, Inputs: [], Constants: [], Outputs: [ {tensor % 'Half'}], TacticName: t, "
    layers = parse_layers(f"[VERBOSE] Layers:\n{line}\n{move}\n[INFO] done\n")
    assert [(e.name, e.type, e.precision, e.nodes) for e in layers] == [
        ("fuse/Conv_myl0_6", "correlation", "int8", ("fuse/Conv", "q")),
        ("m", "kgen", "fp16", ()),
    ]
