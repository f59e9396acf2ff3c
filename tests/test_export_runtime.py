"""The ONNX session, the comparison of two models, and the clean-up that is guarded by it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnxslim
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor

from fusepress.export.onnx import export_onnx, load_onnx
from fusepress.export.parity import check_parity, require_parity
from fusepress.export.passes import slim
from fusepress.export.runtime import OnnxSession
from fusepress.pipeline.errors import ExportError
from fusepress.pipeline.task import Batch
from tests.export_toys import batch, inputs, two_branch


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx(two_branch(), inputs(1), ["seg", "cls"], file)
    return file


@pytest.fixture(scope="module")
def session(path: Path) -> OnnxSession:
    return OnnxSession(path, 1)


def test_a_batch_is_its_samples_one_by_one(session: OnnxSession) -> None:
    x = inputs(3)
    together = session(x)
    assert together["seg"].shape == (3, 5, 16, 16)
    for i in range(3):
        alone = session({name: value[i : i + 1] for name, value in x.items()})
        assert torch.equal(alone["cls"][0], together["cls"][i])


def test_inputs_that_the_graph_does_not_know_are_left_out(session: OnnxSession) -> None:
    assert torch.equal(session({**inputs(1), "radar": torch.rand(1, 3)})["cls"], session(inputs(1))["cls"])


def test_the_timed_callable_runs_the_first_sample(session: OnnxSession) -> None:
    result: Any = session.timed_callable(inputs(3))()
    assert np.array_equal(result[1], session(inputs(3))["cls"][:1].numpy())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": None}, r"expected the inputs .*; got \['image', 'index'\], without \['points'\]"),
        ({"points": torch.rand(1, 7, 4)}, r"expected input 'points' of shape \(N, 20, 4\); got \(1, 7, 4\)"),
        ({"index": torch.rand(1, 20)}, r"expected input 'index' of type int64; got float32"),
        ({"image": torch.rand(2, 3, 24, 24)}, r"expected one batch size; got"),
        ({"index": torch.full((1, 20), 9999)}, r"expected ONNX Runtime to run the model; got .*check index inputs"),
    ],
)
def test_wrong_inputs_are_named(session: OnnxSession, change: dict[str, Tensor | None], message: str) -> None:
    feeds = {name: value for name, value in {**inputs(1), **change}.items() if value is not None}
    with pytest.raises(ExportError, match=message):
        session(feeds)


def test_a_file_that_is_missing_or_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="expected an ONNX file; got none"):
        OnnxSession(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(ExportError, match="CPU provider can run"):
        OnnxSession(tmp_path / "text.onnx")


def _predict(values: dict[str, Tensor]) -> Any:
    return lambda _: values


def _two() -> Batch:
    return Batch(inputs={"x": torch.zeros(2, 1)}, sample_ids=["a", "b"])


def test_parity_measures_what_it_says() -> None:
    reference = {"y": torch.tensor([[1.0, -4.0], [2.0, 0.0]])}
    candidate = {"y": torch.tensor([[1.0, -4.0], [2.0, 0.5]])}
    found = check_parity(_predict(reference), _predict(candidate), [_two()])
    output = found.outputs["y"]
    assert (output.max_abs, output.scale, output.max_rel, output.worst_sample) == (0.5, 4.0, 0.125, "b")
    assert output.cosine == pytest.approx(21 / math.sqrt(21 * 21.25))
    assert found.samples == 2
    assert {m.name: m.value for m in found.measurements()} == {"parity.max_abs": 0.5, "parity.max_rel": 0.125}
    require_parity(found, 0.125)
    with pytest.raises(ExportError, match=r"within 0\.1 of each output's scale; got 0\.125 .*'y', sample 'b'"):
        require_parity(found, 0.1)


def test_a_nan_on_one_side_is_an_infinite_difference_and_on_both_is_none() -> None:
    reference = {"y": torch.tensor([[1.0], [math.nan]])}
    candidate = {"y": torch.tensor([[math.nan], [math.nan]])}
    found = check_parity(_predict(reference), _predict(candidate), [_two()])
    assert found.max_abs == math.inf
    assert found.outputs["y"].worst_sample == "a"
    with pytest.raises(ExportError, match="got inf"):
        require_parity(found, 1.0)
    assert check_parity(_predict(reference), _predict(reference), [_two()]).max_abs == 0


def test_other_names_shapes_or_no_batch_are_refused() -> None:
    one = {"y": torch.zeros(2, 1)}
    with pytest.raises(ExportError, match=r"expected the outputs \['y'\]; got \['z'\]"):
        check_parity(_predict(one), _predict({"z": torch.zeros(2, 1)}), [_two()])
    with pytest.raises(ExportError, match=r"output 'y' of shape \(2, 1\); got \(2, 2\)"):
        check_parity(_predict(one), _predict({"y": torch.zeros(2, 2)}), [_two()])
    with pytest.raises(ExportError, match="at least one batch"):
        check_parity(_predict(one), _predict(one), [])


def test_slim_keeps_the_function_the_bytes_and_the_canvas_out_of_the_file(path: Path, tmp_path: Path) -> None:
    first = slim(path, tmp_path / "a.onnx", [batch(2)])
    second = slim(path, tmp_path / "b.onnx")
    assert first.sha256 == second.sha256
    assert first.ops["ConstantOfShape"] == 1
    assert first.size_bytes < path.stat().st_size + 2000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "b.onnx"]
    slimmed = OnnxSession(tmp_path / "a.onnx", 1)
    require_parity(check_parity(OnnxSession(path, 1), slimmed, [batch(2, seed=5)]), 1e-6)


def test_slim_that_changes_the_function_is_caught(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(proto: Any, **_: Any) -> Any:
        tensor = next(t for t in proto.graph.initializer if t.name == "fuse.weight")
        changed = numpy_helper.to_array(tensor) * np.float32(1.001)
        tensor.CopyFrom(numpy_helper.from_array(changed, "fuse.weight"))
        return proto

    monkeypatch.setattr(onnxslim, "slim", spoil)
    with pytest.raises(ExportError, match="expected the simplified model to equal the reference"):
        slim(path, tmp_path / "m.onnx", [batch(1)])
    assert list(tmp_path.iterdir()) == []
    assert load_onnx(path).graph.node
