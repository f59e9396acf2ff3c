"""Reading and editing Q/DQ graphs, and the rules that quantised files keep (calib/qdq.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fusepress.calib.qdq import QdqGraph, broken_rules, fold_batchnorm
from fusepress.export.onnx import lower_opset
from fusepress.export.runtime import OnnxSession
from tests.qdq_toys import SIZE, Graph, feeds, fusion


def run(proto: Any, folder: Path, data: dict[str, Any] | None = None) -> dict[str, Any]:
    onnx.checker.check_model(proto, full_check=True)
    path = folder / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    return OnnxSession(path, 1).run_numpy(feeds(2) if data is None else data)


def test_units_are_layers_with_the_pairs_that_carry_their_outputs() -> None:
    graph = QdqGraph(fusion())
    assert graph.layers() == ["camera.a/Conv", "camera.b/Conv", "lidar.a/Conv", "fuser/Conv", "head/Conv"]
    assert graph.activations() == ["image", "points", "camera_a", "camera_sum", "lidar_a", "both", "fused"]
    assert graph.units() == {
        "camera.a/Conv": ["camera.a/Conv"],
        "camera.b/Conv": ["camera.b/Conv", "camera_sum/Add", "both/Concat"],
        "lidar.a/Conv": ["lidar.a/Conv"],
        "fuser/Conv": ["fuser/Conv"],
        "head/Conv": ["head/Conv"],
    }


def test_a_spared_layer_computes_in_floating_point_and_the_others_as_before(tmp_path: Path) -> None:
    proto = fusion()
    QdqGraph(proto).spare(["camera.b/Conv"])
    assert QdqGraph(proto).layers() == ["camera.a/Conv", "lidar.a/Conv", "fuser/Conv", "head/Conv"]
    nodes = {node.name: node for node in proto.graph.node}
    assert list(nodes["camera.b/Conv"].input) == ["camera_a", "camera.b.weight"]
    assert list(nodes["camera_sum/Add"].input) == ["camera.b", "camera_a"]
    assert list(nodes["both/Concat"].input) == ["camera_sum", "lidar_a"]
    # what nobody reads any more is gone, scales included
    assert not any("camera.b.weight_" in name or "_res" in name for name in QdqGraph(proto).producer)
    assert not {t.name for t in proto.graph.initializer} & {"camera.b.weight_scale", "camera_a_res_scale"}
    whole = run(fusion(), tmp_path)["head"]
    assert not np.allclose(run(proto, tmp_path)["head"], whole, atol=1e-7)


def test_with_all_units_spared_the_float_model_is_left(tmp_path: Path) -> None:
    """The same network computed without any Q/DQ in it, in numpy-free terms: bypassing must be exact."""
    proto = fusion()
    graph = QdqGraph(proto)
    graph.spare(graph.units())
    assert not {"QuantizeLinear", "DequantizeLinear"} & {node.op_type for node in proto.graph.node}
    g = Graph()
    camera = g.node("Relu", [g.conv("image", "camera.a", 3, 8, quantised=False)], "camera_a")
    summed = g.node("Add", [g.conv(camera, "camera.b", 8, 8, quantised=False), camera], "camera_sum")
    lidar = g.node("Relu", [g.conv("points", "lidar.a", 2, 8, quantised=False)], "lidar_a")
    both = g.node("Concat", [summed, lidar], "both", axis=1)
    g.conv(g.node("Relu", [g.conv(both, "fuser", 16, 8, quantised=False)], "fused"), "head", 8, 4, quantised=False)
    expected = g.model({"image": 3, "points": 2}, {"head": 4})
    np.testing.assert_array_equal(run(proto, tmp_path)["head"], run(expected, tmp_path)["head"])


def test_merged_tensors_of_two_modalities_get_the_largest_scale() -> None:
    proto = fusion()
    assert broken_rules(proto) == ["both/Concat: merged tensors need one scale"]
    graph = QdqGraph(proto)
    assert graph.share_scales() == [["camera_sum", "lidar_a", "both"]]
    assert [graph.scale(name) for name in ("camera_sum", "lidar_a", "both")] == pytest.approx([0.05] * 3)
    assert graph.scale("camera_a") == pytest.approx(0.02)  # a residual inside a kernel is not merged
    assert broken_rules(proto) == []
    assert graph.share_scales() == [["camera_sum", "lidar_a", "both"]]


def test_merges_that_meet_in_the_name_of_a_scale_get_one() -> None:
    g = Graph()
    pairs = {name: g.pair(name, scale) for name, scale in {"a": 0.01, "b": 0.01, "c": 0.02, "d": 0.03}.items()}
    for node in g.nodes:
        node.input[1] = "a_scale" if node.input[1] == "b_scale" else node.input[1]
    outputs = [g.node("Concat", [pairs[one], pairs[two]], one + two, axis=1) for one, two in ("ac", "bd")]
    proto = g.model(dict.fromkeys("abcd", 2), dict.fromkeys(outputs, 4))
    graph = QdqGraph(proto)
    assert [sorted(group) for group in graph.share_scales()] == [["a", "b", "c", "d"]]
    assert [graph.scale(name) for name in "abcd"] == pytest.approx([0.03] * 4)
    assert broken_rules(proto) == []


def test_limits_reach_every_pair_of_a_tensor() -> None:
    proto = fusion()
    QdqGraph(proto).set_limits({"camera_a": 6.35})
    scales = {t.name: float(numpy_helper.to_array(t)) for t in proto.graph.initializer if t.name.startswith("camera_a")
              and t.name.endswith("scale")}  # fmt: skip
    assert scales == pytest.approx({"camera_a_scale": 0.05, "camera_a_res_scale": 0.05})


def test_of_tensors_that_name_one_scale_the_largest_limit_counts() -> None:
    g = Graph()
    step, zero = g.constant("step", np.float32(1.0)), g.constant("zero", np.int8(0))
    for name in ("a", "b"):
        g.node("QuantizeLinear", [name, step, zero], f"{name}_q")
        g.node("DequantizeLinear", [f"{name}_q", step, zero], f"{name}_dq")
    g.node("Add", ["a_dq", "b_dq"], "y")
    for limits in ({"a": 12.7, "b": 1.27}, {"b": 1.27, "a": 12.7}):
        graph = QdqGraph(g.model({"a": 3, "b": 3}, {"y": 3}))
        graph.set_limits(limits)
        assert graph.scale("a") == graph.scale("b") == pytest.approx(0.1)


def test_constants_that_only_the_body_of_a_condition_reads_stay() -> None:
    proto = fusion()
    body = helper.make_graph(
        [helper.make_node("Identity", ["outer"], ["inner"], name="inner/Identity")],
        "body",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, [1])],
    )
    proto.graph.initializer.extend(
        [numpy_helper.from_array(np.array([True]), "flag"), numpy_helper.from_array(np.ones(1, np.float32), "outer")]
    )
    proto.graph.node.append(helper.make_node("If", ["flag"], ["picked"], name="If", then_branch=body, else_branch=body))
    graph = QdqGraph(proto)
    graph.spare(graph.units())
    assert {"flag", "outer"} <= {tensor.name for tensor in proto.graph.initializer}
    fold_batchnorm(proto)
    assert {"flag", "outer"} <= {tensor.name for tensor in proto.graph.initializer}


def test_scales_that_fp16_takes_for_zero_are_raised(tmp_path: Path) -> None:
    """A channel that its folded norm switched off has weights of 1e-12: their scale must not become 0."""
    proto = fusion()
    for tensor in proto.graph.initializer:
        if tensor.name.startswith("head.weight"):
            value = numpy_helper.to_array(tensor).copy()
            if value.dtype == np.float32:
                value[0] *= 1e-12
                tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    assert QdqGraph(proto).floor_scales() == 1
    scales = [numpy_helper.to_array(t) for t in proto.graph.initializer if t.name.endswith("_scale")]
    assert all((scale.astype(np.float16) > 0).all() for scale in scales)
    assert QdqGraph(proto).floor_scales() == 0
    head = run(proto, tmp_path)["head"]
    assert not head[:, 0].any()
    assert head[:, 1:].any()


def test_rules_name_what_an_engine_would_not_run_as_written() -> None:
    g = Graph()
    weight = g.constant("up.weight", np.ones((3, 4, 2, 2), np.float32))
    g.node("ConvTranspose", [g.pair("x", 0.1), g.pair(weight, 0.01)], "up", strides=[2, 2])
    g.node("Conv", ["x2_dq", g.pair(g.constant("w", np.ones((4, 3, 1, 1), np.float32)), 0.01)], "one_scale")
    g.pair("x2", 0.1)
    g.nodes = g.nodes[-2:] + g.nodes[:-2]
    norm = [g.constant(name, np.ones(4, np.float32)) for name in ("gain", "offset", "mean", "variance")]
    g.node("BatchNormalization", ["one_scale", *norm], "y")
    found = broken_rules(g.model({"x": 3, "x2": 3}, {"y": 4}))
    assert [text.split(":")[0] for text in found] == ["up/ConvTranspose", "one_scale/Conv", "y/BatchNormalization"]
    assert "floating point" in found[0]
    assert "each output channel" in found[1]
    assert "folded" in found[2]


@pytest.mark.parametrize("biased", [True, False])
def test_a_batch_norm_is_folded_without_changing_the_outputs(biased: bool, tmp_path: Path) -> None:
    g = Graph()
    g.conv("image", "conv", 3, 8, quantised=False)
    if biased:
        g.nodes[-1].input.append(g.constant("bias", g.random.normal(size=8).astype(np.float32)))
    gain, offset, mean, variance = (
        g.constant(name, g.random.uniform(0.5, 2.0, 8).astype(np.float32))
        for name in ("gain", "offset", "mean", "variance")
    )
    g.node("BatchNormalization", ["conv", gain, offset, mean, variance], "head", epsilon=1e-3)
    proto = g.model({"image": 3}, {"head": 8})
    data = {"image": feeds(2)["image"]}
    before = run(proto, tmp_path, data)["head"]
    assert fold_batchnorm(proto) == ["head/BatchNormalization"]
    assert [node.op_type for node in proto.graph.node] == ["Conv"]
    assert len(proto.graph.initializer) == 2
    np.testing.assert_allclose(run(proto, tmp_path, data)["head"], before, rtol=1e-5, atol=1e-5)


def test_a_batch_norm_stays_where_others_read_the_convolution() -> None:
    g = Graph()
    g.conv("image", "conv", 3, 8, quantised=False)
    names = [g.constant(name, np.ones(8, np.float32)) for name in ("gain", "offset", "mean", "variance")]
    g.node("BatchNormalization", ["conv", *names], "normed")
    g.node("Add", ["normed", "conv"], "head")
    proto = g.model({"image": 3}, {"head": 8})
    assert fold_batchnorm(proto) == []
    assert len(proto.graph.node) == 3


def test_lowering_to_operator_set_18_leaves_alone_what_18_says_like_19() -> None:
    """Only operator set 17 has the axes of a reduction as an attribute."""
    value = helper.make_tensor_value_info
    node = helper.make_node("ReduceMax", ["x", "axes"], ["y"], name="pool", keepdims=0)
    graph = helper.make_graph(
        [node],
        "g",
        [value("x", TensorProto.FLOAT, [2, SIZE])],
        [value("y", TensorProto.FLOAT, [2])],
        [numpy_helper.from_array(np.array([1]), "axes")],
    )
    for opset, axes in ((18, ["x", "axes"]), (17, ["x"])):
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)])
        lower_opset(proto, opset)
        assert list(proto.graph.node[0].input) == axes
        assert proto.opset_import[0].version == opset
