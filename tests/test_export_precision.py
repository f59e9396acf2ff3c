"""FP16 with float32 inputs and outputs: close to float32, safe from overflow, the same bytes every time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fusepress.export.onnx import export_onnx, load_onnx
from fusepress.export.parity import check_parity, require_parity
from fusepress.export.precision import Fp16Info, convert_fp16, precision_map
from fusepress.export.runtime import OnnxSession
from fusepress.pipeline.errors import QuantizeError
from tests.export_toys import arrays, batch, inputs, two_branch


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fp16") / "model.onnx"
    export_onnx(two_branch(), inputs(1), ["seg", "cls"], path, opset=17)
    return path


@pytest.fixture(scope="module")
def converted(source: Path) -> Fp16Info:
    return convert_fp16(source, source.with_name("fp16.onnx"))


def test_fp16_is_close_to_torch_and_keeps_names_types_and_opset(converted: Fp16Info) -> None:
    model = two_branch()
    with torch.no_grad():
        parity = check_parity(lambda x: model(**x), OnnxSession(converted.onnx.path, 1), [batch(3)])
    require_parity(parity, 3e-3)
    assert parity.max_rel > 1e-6  # it is not float32 still
    assert converted.onnx.opset == 17
    proto = load_onnx(converted.onnx.path)
    assert [v.type.tensor_type.elem_type for v in (*proto.graph.input, *proto.graph.output)] == [1, 1, 7, 1, 1]


def test_every_layer_with_weights_computes_in_fp16(converted: Fp16Info) -> None:
    layers = {"camera.0/Conv", "pillar2/MatMul", "lidar.2/ConvTranspose", "fuse/Conv", "classify/Gemm", "GridSample"}
    assert layers <= set(converted.fp16_nodes)
    assert not converted.ranges_checked


def test_what_overflows_or_is_named_stays_in_float32_and_the_bytes_repeat(source: Path, tmp_path: Path) -> None:
    data = arrays(2)
    data["points"] = data["points"] * 1e5  # far beyond 65504
    options = {"arrays": data, "keep_fp32_ops": ["GridSample"], "keep_fp32_nodes": ["head/Conv"]}
    first = convert_fp16(source, tmp_path / "a.onnx", **options)  # type: ignore[arg-type]
    second = convert_fp16(source, tmp_path / "b.onnx", **options)  # type: ignore[arg-type]
    assert first.onnx.sha256 == second.onnx.sha256
    assert {"pillar/MatMul", "pillar2/MatMul", "ScatterND", "GridSample", "head/Conv"} <= set(first.fp32_nodes)
    assert "camera.3/Conv" in first.fp16_nodes
    assert first.ranges_checked


def test_an_overflow_that_is_not_kept_apart_is_refused(source: Path, tmp_path: Path) -> None:
    data = arrays(2)
    data["points"] = data["points"] * 1e6
    with pytest.raises(QuantizeError, match=r"finite outputs in FP16; got NaN or infinity in '\w+' for 2 of 2"):
        convert_fp16(source, tmp_path / "m.onnx", arrays=data, data_max=1e30)


def test_wrong_names_and_samples_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match=r"expected names of operators of the model; got \['Softplus'\]"):
        convert_fp16(source, tmp_path / "m.onnx", keep_fp32_ops=["Softplus"])
    with pytest.raises(QuantizeError, match=r"expected names of nodes of the model; got \['nope'\]"):
        convert_fp16(source, tmp_path / "m.onnx", keep_fp32_nodes=["nope"])
    with pytest.raises(QuantizeError, match=r"expected samples of the inputs .*; got \{'image': \(1, 3, 24, 24\)\}"):
        convert_fp16(source, tmp_path / "m.onnx", arrays={"image": arrays(1)["image"]})
    assert list(tmp_path.iterdir()) == []


def test_the_precision_map_of_a_float32_file(source: Path) -> None:
    found = precision_map(source)
    assert found["fuse/Conv"] == "fp32"
    assert found["Unsqueeze"] == "int64"
