"""The calibration card, and INT8 and FP8 by Q/DQ on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import numpy_helper

from fusepress.calib.dataset import CalibrationCard, calibration_arrays, choose_calibration
from fusepress.calib.quantize import Draft, QuantizeInfo, draft_int8, finish_int8, quantize_fp8, quantize_int8
from fusepress.export.engine import build_rtx_engine
from fusepress.export.onnx import export_onnx, load_onnx
from fusepress.export.parity import check_parity
from fusepress.export.precision import precision_map
from fusepress.export.runtime import OnnxSession
from fusepress.export.sparsity import check_sparsity_2to4, polygraphy_sparse_layers
from fusepress.pipeline.errors import QuantizeError, TaskError
from tests.export_toys import ToyTask, arrays, batch, inputs, loaded, two_branch

# --- the card --------------------------------------------------------------------------------------------------------


def test_the_card_is_fixed_spread_and_apart_from_eval() -> None:
    card = choose_calibration(loaded(ToyTask()), 6, seed=0)
    assert card == choose_calibration(loaded(ToyTask()), 6, seed=0)
    assert card.sample_ids != choose_calibration(loaded(ToyTask()), 6, seed=1).sample_ids
    assert card.available == 12
    assert [sum(name.startswith(f"calib/{part}/") for name in card.sample_ids) for part in range(3)] == [2, 2, 2]
    shown = card.summary()
    assert (shown["samples"], shown["available"], shown["sha256"], shown["shared_with_eval"]) == (6, 12, card.sha256, 0)
    assert shown["chosen_of_each"] == {f"drive{part}": "2 of 4" for part in range(3)}


def test_the_card_hash_follows_the_content() -> None:
    card = choose_calibration(loaded(ToyTask()), 6, seed=0)
    other = choose_calibration(loaded(ToyTask(calib_seed=7)), 6, seed=0)
    assert len(card.sample_ids) == len(other.sample_ids)
    assert card.sha256 != other.sha256


def test_asking_for_more_than_there_is_takes_all() -> None:
    assert len(choose_calibration(loaded(ToyTask()), 500, seed=0).sample_ids) == 12


def test_a_card_survives_json_and_a_changed_one_is_refused(tmp_path: Path) -> None:
    card = choose_calibration(loaded(ToyTask()), 3, seed=0)
    card.write(tmp_path / "card.json")
    text = (tmp_path / "card.json").read_text()
    assert CalibrationCard.from_json(text) == card
    raw = json.loads(text)
    raw["sample_ids"][0] = "calib/0/9"
    with pytest.raises(TaskError, match="expected a calibration card whose hash fits its list"):
        CalibrationCard.from_json(json.dumps(raw))
    with pytest.raises(TaskError, match="expected a calibration card; got"):
        CalibrationCard.from_json("{}")


def test_the_same_content_in_eval_is_refused_under_any_name() -> None:
    with pytest.raises(TaskError, match=r"got 'calib/\d/\d', whose content equals 'eval/\d/\d' of the eval split"):
        choose_calibration(loaded(ToyTask(calib_seed=3, eval_seed=3)), 6, seed=0)


def test_arrays_are_the_samples_of_the_card_in_its_order() -> None:
    task = loaded(ToyTask())
    card = choose_calibration(task, 5, seed=0)
    made = calibration_arrays(task, card)
    assert {name: value.shape for name, value in made.items()} == {
        "image": (5, 3, 24, 24),
        "points": (5, 20, 4),
        "index": (5, 20),
    }
    part, i = (int(text) for text in card.sample_ids[0].split("/")[1:])
    assert np.array_equal(made["image"][0], inputs(4, 20 + part)["image"][i].numpy())


def test_data_that_changed_since_the_card_is_refused() -> None:
    card = choose_calibration(loaded(ToyTask()), 5, seed=0)
    with pytest.raises(TaskError, match=r"the calibration sample 'calib/.*' as on the card; got other content"):
        calibration_arrays(loaded(ToyTask(calib_seed=7)), card)


# --- Q/DQ ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Float32, operator set 17, the fusing convolution 2:4."""
    model = two_branch()
    with torch.no_grad():
        model.fuse.weight[:, 0::4] = 0
        model.fuse.weight[:, 1::4] = 0
    path = tmp_path_factory.mktemp("int8") / "model.onnx"
    export_onnx(model, inputs(1), ["seg", "cls"], path, opset=17)
    return path


def samples() -> dict[str, Any]:
    """Twelve, of which the eighth has the brightest image."""
    data = arrays(12)
    data["image"][7] *= 1.5
    return data


@pytest.fixture(scope="module")
def draft(source: Path) -> Draft:
    return draft_int8(source, samples())


@pytest.fixture(scope="module")
def int8(draft: Draft) -> QuantizeInfo:
    return finish_int8(draft, samples(), draft.source.with_name("int8.onnx"))


def test_int8_is_within_eight_percent_of_the_outputs_scale(source: Path, int8: QuantizeInfo) -> None:
    for integer_kernels in (False, True):
        session = OnnxSession(int8.onnx.path, 1, integer_kernels=integer_kernels)
        parity = check_parity(OnnxSession(source, 1), session, [batch(4, seed=9)])
        assert 1e-4 < parity.max_rel < 0.08
        assert min(output.cosine for output in parity.outputs.values()) > 0.998


def test_every_sample_was_used_one_by_one(draft: Draft, int8: QuantizeInfo, tmp_path: Path) -> None:
    """The image's scale is that of the largest value of all samples, not of the first."""
    assert int8.samples == 12
    image = np.abs(samples()["image"])
    assert image.max() > 1.1 * np.delete(image, 7, axis=0).max()
    made = finish_int8(draft, samples(), tmp_path / "wide.onnx", remainder="fp32")
    proto = load_onnx(made.onnx.path)
    node = next(n for n in proto.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == "image")
    scale = next(t for t in proto.graph.initializer if t.name == node.input[1])
    assert float(numpy_helper.to_array(scale)) == pytest.approx(image.max() / 127, rel=1e-3)
    # with a float32 remainder the operator set of the source is kept
    assert (made.onnx.opset, made.notes) == (17, ())
    assert set(precision_map(made.onnx.path).values()) <= {"int8", "fp32", "int64"}


def test_layers_are_listed_with_the_reason(int8: QuantizeInfo) -> None:
    layers = {layer.name: layer for layer in int8.layers}
    assert len(layers) == 10
    for name in ("camera.0/Conv", "camera.3/Conv", "camera.5/Conv", "lidar.0/Conv", "fuse/Conv", "pillar2/MatMul"):
        assert (layers[name].precision, layers[name].reason) == ("int8", "")
    assert layers["lidar.2/ConvTranspose"].precision == "fp16"
    assert "TensorRT runs transposed convolutions in floating point" in layers["lidar.2/ConvTranspose"].reason
    assert "matrix-vector" in layers["classify/Gemm"].reason
    assert int8.onnx.opset == 19
    assert "operator set 19 instead of 17" in int8.notes[0]
    shown = int8.to_dict()
    assert shown["quantised_layers"] + shown["other_layers"] == 10


def test_inputs_and_outputs_stay_float32(int8: QuantizeInfo) -> None:
    proto = load_onnx(int8.onnx.path)
    assert [v.type.tensor_type.elem_type for v in (*proto.graph.input, *proto.graph.output)] == [1, 1, 7, 1, 1]


def test_the_same_inputs_give_the_same_bytes(source: Path, int8: QuantizeInfo, tmp_path: Path) -> None:
    """In one step as in two, by other processes."""
    again = quantize_int8(source, samples(), tmp_path / "again.onnx")
    assert again.onnx.sha256 == int8.onnx.sha256


def test_2to4_survives_int8_and_polygraphy_agrees(int8: QuantizeInfo) -> None:
    report = check_sparsity_2to4(int8.onnx.path)
    assert report.valid_layers == ["fuse/Conv"]
    assert polygraphy_sparse_layers(int8.onnx.path) == report.valid_weights


def test_the_engine_runs_in_int8_what_the_file_says(int8: QuantizeInfo, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    engine = build_rtx_engine(int8.onnx.path, tmp_path / "m.engine", compute_capabilities=["8.9"])
    by_node = {
        node: layer for layer in engine.layers for node in layer.nodes if layer.type in ("correlation", "deconv")
    }
    assert by_node["fuse/Conv"].precision == "int8"
    assert by_node["lidar.2/ConvTranspose"].precision == "fp16"


def test_fp8_with_an_excluded_module(source: Path, tmp_path: Path) -> None:
    made = quantize_fp8(source, arrays(4), tmp_path / "fp8.onnx", exclude=["fuse"])
    layers = {layer.name: layer for layer in made.layers}
    assert layers["lidar.0/Conv"].precision == "fp8"
    assert layers["fuse/Conv"].reason == "excluded by the recipe"
    parity = check_parity(OnnxSession(source, 1), OnnxSession(tmp_path / "fp8.onnx", 1), [batch(2, seed=9)])
    assert 1e-4 < parity.max_rel < 0.05


def test_wrong_arguments_are_refused_before_anything_runs(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.onnx"
    with pytest.raises(QuantizeError, match=r"expected names of nodes or modules of the model; got \['neck'\]"):
        quantize_int8(source, arrays(1), out, exclude=["neck"])
    data = arrays(2)
    data["points"] = data["points"][:, :7]
    with pytest.raises(QuantizeError, match=r"'points': \('N', 20, 4\).*got .*'points': \(2, 7, 4\)"):
        quantize_int8(source, data, out)
    data = arrays(2)
    data["index"] = data["index"][:1]
    with pytest.raises(QuantizeError, match="expected samples of the inputs"):
        quantize_int8(source, data, out)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_of_modelopt_is_told_with_the_end_of_its_log(source: Path, tmp_path: Path) -> None:
    data = arrays(2)
    data["index"] = data["index"] + 100_000  # out of the canvas: ONNX Runtime refuses it while calibrating
    with pytest.raises(
        QuantizeError, match=r"(?s)got exit status 1 at \S+:\n\S+InvalidArgument: .*ScatterND.*\nexclude"
    ):
        quantize_int8(source, data, tmp_path / "m.onnx")
