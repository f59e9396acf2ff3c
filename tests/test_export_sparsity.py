"""2:4 in the file: along the axis that TensorRT reads, and as polygraphy sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from fusepress.export.onnx import export_onnx
from fusepress.export.sparsity import (
    LayerSparsity,
    SparsityReport,
    Status,
    check_sparsity_2to4,
    lost_zeros,
    masked_layers_2to4,
    polygraphy_sparse_layers,
)
from fusepress.pipeline.errors import ExportError
from tests.export_toys import inputs, two_branch


def halve(weight: Tensor, axis: int) -> None:
    """In every four along `axis`, the first and the third become zero."""
    with torch.no_grad():
        moved = weight.movedim(axis, -1)
        moved[..., 0::4] = 0
        moved[..., 2::4] = 0


@pytest.fixture(scope="module")
def sparse_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = two_branch()
    for layer in (model.camera[5], model.fuse, model.pillar2, model.classify):
        assert isinstance(layer.weight, Tensor)
        halve(layer.weight, 1)
    assert isinstance(model.lidar[0].weight, Tensor)
    halve(model.lidar[0].weight, 0)  # the wrong axis: output channels
    path = tmp_path_factory.mktemp("sparse") / "model.onnx"
    export_onnx(model, inputs(1), ["seg", "cls"], path)
    return path


def test_each_layer_is_judged_with_a_reason(sparse_file: Path) -> None:
    layers = {layer.name: layer for layer in check_sparsity_2to4(sparse_file).layers}
    assert {name for name, layer in layers.items() if layer.status == "valid"} == {
        "camera.5/Conv",
        "fuse/Conv",
        "pillar2/MatMul",
        "classify/Gemm",
    }
    assert layers["lidar.0/Conv"].status == "dense"
    assert "groups of four have more than 2 non-zeros" in layers["lidar.0/Conv"].reason
    assert layers["lidar.0/Conv"].zeros == 0.5
    assert layers["camera.0/Conv"].reason == "3 input channels a group are not a multiple of 4"
    assert layers["camera.3/Conv"].reason == "1 input channels a group are not a multiple of 4"
    assert "transposed" in layers["lidar.2/ConvTranspose"].reason


def test_polygraphy_agrees(sparse_file: Path) -> None:
    report = check_sparsity_2to4(sparse_file)
    assert len(report.valid_weights) == 4
    assert polygraphy_sparse_layers(sparse_file) == report.valid_weights
    shown = report.to_dict()
    assert (shown["valid"], shown["not_eligible"]) == (4, 3)


def test_one_weight_too_many_makes_a_layer_dense(tmp_path: Path) -> None:
    layer = nn.Conv2d(8, 8, 3)
    halve(layer.weight, 1)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x)
            return out

    with torch.no_grad():
        layer.weight[3, 4, 1, 2] = 0.5
    export_onnx(Net(), {"x": torch.rand(1, 8, 4, 4)}, ["y"], tmp_path / "m.onnx")
    found = check_sparsity_2to4(tmp_path / "m.onnx").layers[0]
    assert (found.status, found.reason) == ("dense", "1 of 144 groups of four have more than 2 non-zeros")
    assert polygraphy_sparse_layers(tmp_path / "m.onnx") == set()


def _product(tmp_path: Path, nodes: list[Any], constants: dict[str, np.ndarray[Any, Any]]) -> Path:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT, [1, 8])],
        [value("y", TensorProto.FLOAT, [1, 8])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def _along(axis: int) -> np.ndarray[Any, Any]:
    weight = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    moved = np.moveaxis(weight, axis, -1)
    moved[..., 0::4] = 0
    moved[..., 3::4] = 0
    return weight


@pytest.mark.parametrize("sparse_axis", [0, 1])
@pytest.mark.parametrize(
    ("op", "flags", "reduction"),
    [("Gemm", {"transB": 1}, 1), ("Gemm", {}, 0), ("Gemm", {"transB": 0}, 0), ("MatMul", {}, 0)],
)
def test_the_axis_of_each_product(
    tmp_path: Path, op: str, flags: dict[str, int], reduction: int, sparse_axis: int
) -> None:
    node = helper.make_node(op, ["x", "w"], ["y"], name="n", **flags)
    path = _product(tmp_path, [node], {"w": _along(sparse_axis)})
    report = check_sparsity_2to4(path)
    assert report.layers[0].status == ("valid" if sparse_axis == reduction else "dense")
    assert polygraphy_sparse_layers(path) == report.valid_weights


def test_weights_are_seen_through_transpose_cast_and_identity(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["w"], ["w32"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["w32"], ["wt"], perm=[1, 0]),
        helper.make_node("Identity", ["wt"], ["wi"]),
        helper.make_node("MatMul", ["x", "wi"], ["y"], name="n"),
    ]
    report = check_sparsity_2to4(_product(tmp_path, nodes, {"w": _along(1).astype(np.float16)}))
    assert report.valid_weights == {"w"}


def test_int8_weights_are_seen_through_dequantize(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["wf"], name="dq"),
        helper.make_node("MatMul", ["x", "wf"], ["y"], name="n"),
    ]
    weights = np.clip(np.round(_along(0) * 40), -127, 127).astype(np.int8)
    path = _product(tmp_path, nodes, {"w": weights, "s": np.array(0.025, np.float32)})
    assert check_sparsity_2to4(path).valid_layers == ["n"]


def test_polygraphy_on_a_file_that_is_not_onnx(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_text("no")
    with pytest.raises(ExportError, match="expected polygraphy to inspect the file; got"):
        polygraphy_sparse_layers(tmp_path / "m.onnx")


# --- what became of the masks of a torch model ------------------------------------------------------------------------


def report_of(*layers: tuple[str, Status], zeros: float = 0.5) -> SparsityReport:
    made = [LayerSparsity(name=name, op="Conv", weight=name, status=status, zeros=zeros) for name, status in layers]
    return SparsityReport(layers=tuple(made))


def test_every_masked_weight_is_looked_for_under_its_modules_name(sparse_file: Path) -> None:
    report = check_sparsity_2to4(sparse_file)
    params = ["camera.5.weight", "fuse.weight", "pillar2.weight", "lidar.0.weight", "never.called.weight"]
    assert masked_layers_2to4(report, params) == {
        "camera.5.weight": "valid",
        "fuse.weight": "valid",
        "pillar2.weight": "valid",
        "lidar.0.weight": "dense",
        "never.called.weight": "absent",
    }


def test_a_layer_that_is_called_twice_must_be_sparse_both_times() -> None:
    twice = report_of(("a/Conv", "valid"), ("a/Conv_2", "dense"))
    assert masked_layers_2to4(twice, ["a.weight"]) == {"a.weight": "dense"}
    assert (
        masked_layers_2to4(report_of(("a/Conv", "valid"), ("a/Conv_2", "valid")), ["a.weight"])["a.weight"] == "valid"
    )


def test_an_attention_must_have_as_many_sparse_products_as_masked_projections() -> None:
    params = ["x.q_proj_weight", "x.k_proj_weight", "x.out_proj.weight"]
    last: tuple[str, Status] = ("x.out_proj/Gemm", "valid")
    found = report_of(("x/MatMul", "valid"), ("x/MatMul_2", "valid"), ("x/MatMul_3", "dense"), last)
    assert set(masked_layers_2to4(found, params).values()) == {"valid"}
    lacking = report_of(("x/MatMul", "valid"), ("x/MatMul_2", "dense"), last)
    assert masked_layers_2to4(lacking, params)["x.q_proj_weight"] == "dense"


def test_lost_zeros_are_named_with_what_is_left() -> None:
    found = report_of(("a/Conv", "dense"), ("b/Conv", "dense"), zeros=0.7)
    assert lost_zeros(found, {"a.weight": 0.7, "b.weight": 0.8, "absent.weight": 0.9}) == {"b.weight": 0.7}
