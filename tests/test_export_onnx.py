"""torch -> ONNX: faithful, named after the task and its modules, and the same bytes every time."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import fusepress.export.onnx as module
from fusepress.export.onnx import describe_onnx, export_onnx, load_onnx, lower_opset, save_onnx
from fusepress.export.parity import check_parity, require_parity
from fusepress.export.runtime import OnnxSession
from fusepress.pipeline.errors import ExportError
from tests.export_toys import batch, inputs, two_branch

NAMES = ["seg", "cls"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx(two_branch(), inputs(3), NAMES, path, opset=18)
    return path


@pytest.mark.parametrize("opset", [17, 18, 20])
def test_every_opset_computes_what_torch_computes(tmp_path: Path, opset: int) -> None:
    model = two_branch()
    info = export_onnx(model, inputs(3), NAMES, tmp_path / "m.onnx", opset=opset)
    assert info.opset == opset
    assert info.inputs == {"image": (1, 3, 24, 24), "points": (1, 20, 4), "index": (1, 20)}
    assert info.outputs == {"seg": (1, 5, 16, 16), "cls": (1, 3)}
    with torch.no_grad():
        parity = check_parity(lambda x: model(**x), OnnxSession(tmp_path / "m.onnx", 1), [batch(3)])
    require_parity(parity, 1e-5)


def test_norms_are_folded_and_the_scatter_has_no_reduction(exported: Path) -> None:
    proto = load_onnx(exported)
    assert "BatchNormalization" not in {node.op_type for node in proto.graph.node}
    scatter = next(node for node in proto.graph.node if node.op_type == "ScatterND")
    assert all(a.s in (b"", b"none") for a in scatter.attribute if a.name == "reduction")


def test_nodes_are_named_after_their_modules(exported: Path) -> None:
    names = [node.name for node in load_onnx(exported).graph.node]
    assert len(set(names)) == len(names)
    assert {"camera.0/Conv", "camera.3/Conv", "pillar2/MatMul", "lidar.2/ConvTranspose", "classify/Gemm"} <= set(names)


def test_nothing_of_the_host_or_the_exporter_is_left(exported: Path) -> None:
    data = exported.read_bytes()
    for trace in (b"/home", b".py", b"site-packages", b"torch", b"pytorch", str(Path.cwd()).encode()):
        assert trace not in data
    assert [p.name for p in exported.parent.iterdir()] == ["model.onnx"]


def test_re_export_is_byte_identical_here_and_in_another_process(exported: Path, tmp_path: Path) -> None:
    want = hashlib.sha256(exported.read_bytes()).hexdigest()
    assert export_onnx(two_branch(), inputs(1), NAMES, tmp_path / "again.onnx", opset=18).sha256 == want
    code = (
        "import torch; torch.set_num_threads(1); from pathlib import Path; from tests.export_toys import *; "
        "from fusepress.export.onnx import export_onnx; "
        f"export_onnx(two_branch(), inputs(1), {NAMES}, Path({str(tmp_path / 'other.onnx')!r}), opset=18)"
    )
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": root}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)
    assert hashlib.sha256((tmp_path / "other.onnx").read_bytes()).hexdigest() == want


def test_the_order_of_the_outputs_is_the_one_asked_for(tmp_path: Path) -> None:
    info = export_onnx(two_branch(), inputs(1), ["cls", "seg"], tmp_path / "m.onnx")
    assert list(info.outputs) == ["cls", "seg"]
    assert info.outputs["cls"] == (1, 3)


def test_the_mode_of_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout(0.5)).train()
    model[0].eval()

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.body(x)
            return out

    info = export_onnx(Named(), {"x": torch.rand(1, 3, 2, 2)}, ["y"], tmp_path / "m.onnx")
    assert (model.training, model[0].training, model[1].training) == (True, False, True)
    assert info.ops == {"Conv": 1}  # exported as evaluated: no dropout


def test_a_warning_of_the_model_is_kept_and_not_raised(tmp_path: Path) -> None:
    class Warns(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            warnings.warn("the calibration is old", UserWarning, stacklevel=1)
            return torch.add(x, 1)

    info = export_onnx(Warns(), {"x": torch.rand(1, 4)}, ["y"], tmp_path / "m.onnx")
    assert info.warnings == ("UserWarning: the calibration is old",)


class _Singular(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        values: Tensor = torch.linalg.svdvals(x)
        return values


class _Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = _Singular()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x * 2)
        return out


class _Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else x * 2


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            _Outer(),
            r"operators that ONNX has; got aten\._linalg_svd at module 'inner' .*move the decomposition",
        ),
        (_Branches(), r"do not depend on tensor values; got .*test_export_onnx\.py:\d+ in forward; write torch\.where"),
    ],
)
def test_what_cannot_be_exported_is_named_with_its_place(
    tmp_path: Path, model: nn.Module, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ExportError, match=message):
        export_onnx(model, {"x": torch.rand(1, 4, 4)}, ["y"], tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_wrong_names_opsets_and_weights_are_refused(tmp_path: Path) -> None:
    model, path = two_branch(), tmp_path / "m.onnx"
    with pytest.raises(ExportError, match=r"expected the model to return the outputs \['boxes'\]; got seg, cls"):
        export_onnx(model, inputs(1), ["boxes"], path)
    with pytest.raises(ExportError, match=r"expected an opset from 17 to 20; got 23"):
        export_onnx(model, inputs(1), NAMES, path, opset=23)
    with torch.no_grad():
        model.fuse.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ExportError, match=r"expected finite weights; got NaN or infinity at fuse\.weight"):
        export_onnx(model, inputs(1), NAMES, path)
    assert not path.exists()


def test_a_model_that_is_too_large_is_refused(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 1000)
    with pytest.raises(ExportError, match=r"expected a model of at most 0\.0 GiB"):
        save_onnx(load_onnx(exported), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_not_onnx_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(ExportError, match=r"expected an ONNX file; got something else at .*text\.onnx"):
        describe_onnx(tmp_path / "text.onnx")
    with pytest.raises(ExportError, match="got none at"):
        describe_onnx(tmp_path / "none.onnx")


@pytest.mark.parametrize("change", [{"dims": [0, 3]}, {"dims": [5]}, {"raw_data": b""}, {"data_type": 0}])
def test_constants_whose_data_do_not_fit_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones((2, 3), np.float32), "w")
    for field, value in change.items():
        weight.ClearField(field)
        getattr(weight, field).extend(value) if field == "dims" else setattr(weight, field, value)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, n]) for name, n in (("x", 2), ("y", 3)))
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    path = tmp_path / "model.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    with pytest.raises(
        ExportError, match=r"expected constants whose data fit .*; got other data for 'w' at .*model\.onnx"
    ):
        load_onnx(path)


class _Resampling(nn.Module):
    """Operators whose attributes changed between the operator sets."""

    def forward(self, x: Tensor) -> Tensor:
        up = nn.functional.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        near = nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
        first, second = torch.split(nn.functional.pad(up + near, (1, 1, 2, 2)), [2, 2], 1)
        pooled = nn.functional.avg_pool2d(first * second, 2)
        return pooled.amax((2, 3)) + pooled.mean((2, 3)) - pooled.amin((2, 3))


def test_operator_set_17_of_operators_that_changed(tmp_path: Path) -> None:
    x = torch.rand(1, 4, 6, 6)
    model = _Resampling()
    info = export_onnx(model, {"x": x}, ["y"], tmp_path / "m.onnx", opset=17)
    assert info.opset == 17
    torch.testing.assert_close(OnnxSession(tmp_path / "m.onnx", 1)({"x": x})["y"], model(x), rtol=1e-5, atol=1e-6)


def test_operator_set_17_refuses_what_it_cannot_say() -> None:
    value = helper.make_tensor_value_info
    node = helper.make_node("ScatterND", ["x", "i", "x"], ["y"], name="vfe/ScatterND", reduction="max")
    index = helper.make_tensor("i", TensorProto.INT64, [4, 1], [0, 1, 2, 2])
    graph = helper.make_graph(
        [node], "g", [value("x", TensorProto.FLOAT, [4])], [value("y", TensorProto.FLOAT, [4])], [index]
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    onnx.checker.check_model(proto)
    with pytest.raises(ExportError, match=r"operator set 17; got ScatterND \(reduction=max\) at node vfe/ScatterND"):
        lower_opset(proto, 17)
