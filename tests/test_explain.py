"""Every fault is put into a small graph by hand and found; a graph without faults has no findings."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto

from fusepress.export.explain import Explanation, Finding, explain_model
from fusepress.export.inspector import EngineLayer
from fusepress.pipeline.errors import TargetError
from fusepress.targets.profile import load_profile
from tests.onnx_graphs import Graph

ORIN = load_profile("jetson-agx-orin-64gb")
SIZE = 64


def _chain(graph: Graph, x: str, widths: list[int], name: str = "layer") -> str:
    """3x3 convolutions with a Relu behind each."""
    for index, channels in enumerate(itertools.pairwise(widths)):
        x = graph.add("Relu", graph.conv(x, channels, f"{name}{index}"), name=f"{name}{index}/Relu")
    return x


def _explain(
    graph: Graph, tmp_path: Path, precision: str = "fp16", layers: tuple[EngineLayer, ...] = ()
) -> Explanation:
    return explain_model(graph.save(tmp_path / "m.onnx"), ORIN, precision=precision, layers=layers)


def _of(explanation: Explanation, kind: str) -> list[Finding]:
    return [finding for finding in explanation.findings if finding.kind == kind]


def test_a_clean_graph_has_no_findings(tmp_path: Path) -> None:
    graph = Graph(half=True)
    graph.output(_chain(graph, graph.input("x", [1, 256, SIZE, SIZE]), [256] * 5))
    explanation = _explain(graph, tmp_path)
    assert explanation.findings == ()
    assert explanation.small == {}
    assert explanation.latency_ms > 0


def test_the_kernels_are_what_the_latency_is_made_of(tmp_path: Path) -> None:
    graph = Graph(half=True)
    graph.output(_chain(graph, graph.input("x", [1, 256, SIZE, SIZE]), [256] * 4))
    explanation = _explain(graph, tmp_path)
    assert sum(kernel.ms for kernel in explanation.kernels) == pytest.approx(explanation.latency_ms)
    layers = [kernel for kernel in explanation.kernels if kernel.op == "Conv"]
    assert [kernel.name for kernel in layers] == ["layer0", "layer1", "layer2"]
    assert {kernel.macs for kernel in layers} == {256 * 256 * 9 * SIZE * SIZE}
    assert {(kernel.precision, kernel.bound) for kernel in layers} == {("fp16", "compute")}
    assert explanation.to_dict()["kernels"][0]["ms"] > 0


def test_a_clean_int8_graph_has_no_findings(tmp_path: Path) -> None:
    graph = Graph(19, half=True)
    x = graph.conv(graph.input("x", [1, 4, SIZE, SIZE]), (4, 256), "stem")
    for index in range(3):
        x = graph.conv_int8(graph.quantized(x, f"q{index}"), (256, 256), f"layer{index}")
        x = graph.add("Relu", x, name=f"layer{index}/Relu")
    graph.output(x)
    found = _explain(graph, tmp_path, "int8").findings
    assert [finding.where for finding in found] == ["stem"]  # a stem in FP16 is a choice, and said
    assert found[0].kind == "stayed floating"


def test_channels_that_are_no_multiple_are_found_and_the_cut_is_priced(tmp_path: Path) -> None:
    graph = Graph(half=True)
    graph.output(_chain(graph, graph.input("x", [1, 256, SIZE, SIZE]), [256, 228, 256]))
    explanation = _explain(graph, tmp_path)
    (found,) = _of(explanation, "odd channels")
    assert found.where == "layer1"
    assert found.what == "228 channels in, 256 out: not multiples of 8; the gain is that of 224 in, 256 out"
    # 228 and 224 outputs are the same number of tiles
    assert explanation.small == {"odd channels": 1}


def test_a_layer_that_stayed_floating_is_priced_by_what_int8_would_take(tmp_path: Path) -> None:
    graph = Graph(19, half=True)
    x = graph.conv_int8(graph.quantized(graph.input("x", [1, 256, SIZE, SIZE]), "q"), (256, 256), "a")
    x = graph.add("Relu", x, name="a/Relu")
    x = graph.add("Relu", graph.conv(x, (256, 256), "left"), name="left/Relu")
    graph.output(x)
    (found,) = _of(_explain(graph, tmp_path, "int8"), "stayed floating")
    assert found.where == "left"
    assert "Conv runs in fp16 in a build in int8" in found.what
    assert found.gain_ms > 0


def test_the_builder_that_ran_a_quantised_layer_in_fp16_is_caught(tmp_path: Path) -> None:
    graph = Graph(19, half=True)
    x = graph.conv_int8(graph.quantized(graph.input("x", [1, 256, SIZE, SIZE]), "q"), (256, 256), "a")
    graph.output(graph.add("Relu", x, name="a/Relu"))
    layer = EngineLayer(name="a + a/Relu", type="CaskConvolution", precision="fp16", nodes=("a", "a/Relu"))
    explanation = explain_model(
        graph.save(tmp_path / "m.onnx"), ORIN, precision="int8", layers=(layer,), times_ms={"a + a/Relu": 0.25}
    )
    (found,) = _of(explanation, "stayed floating")
    assert (found.kind, found.source, found.measured_ms) == ("stayed floating", "engine", 0.25)
    assert found.what == "Conv in int8 in the file runs in fp16 in the engine"
    assert explanation.measured_ms == 0.25
    assert found.gain_ms > 0


def test_a_kernel_that_waits_for_memory_is_found(tmp_path: Path) -> None:
    graph = Graph(half=True)
    x = _chain(graph, graph.input("x", [1, 256, SIZE, SIZE]), [256, 256])
    up = graph.constant("scales", np.asarray([1, 1, 8, 8], "float32"))
    graph.output(graph.add("Resize", x, "", up, name="up", mode="nearest"))
    (found,) = _of(_explain(graph, tmp_path), "memory bound")
    assert found.where == "up"
    assert "waits for memory; the gain is that of int8" in found.what


def test_depthwise_convolutions_are_priced_by_their_arithmetic(tmp_path: Path) -> None:
    graph = Graph(half=True)
    x = graph.input("x", [1, 512, 128, 128])
    x = graph.add("Relu", graph.conv(x, (512, 512), "dw", size=7, group=512), name="dw/Relu")
    graph.output(_chain(graph, x, [512, 64], "pw"))
    (found,) = _of(_explain(graph, tmp_path), "depthwise")
    assert found.where == "dw"
    assert found.what.startswith("512 groups of 1 channel(s) run on the ordinary cores")


@pytest.mark.parametrize("fault", ["qdq between", "layout between", "read before", "norm alone", "half residual"])
def test_broken_fusions_are_found_where_they_were_put(tmp_path: Path, fault: str) -> None:
    graph = Graph(19, half=True)
    x = graph.input("x", [1, 256, SIZE, SIZE])
    conv = graph.conv(x, (256, 256), "conv")
    match fault:
        case "qdq between":
            graph.output(graph.add("Relu", graph.quantized(conv, "q"), name="relu"))
            want = "Q/DQ stand between conv and its activation relu"
        case "layout between":
            turned = graph.add("Transpose", conv, name="turn", perm=[0, 2, 3, 1])
            graph.output(graph.add("Relu", turned, name="relu"))
            want = "Transpose stands between conv and its activation relu"
        case "read before":
            relu = graph.add("Relu", conv, name="relu")
            graph.output(graph.add("Add", graph.conv(relu, (256, 256), "next"), conv, name="add"))
            want = "add reads what conv writes before its activation relu"
        case "norm alone":
            ones = [graph.constant(f"n{i}", np.ones(256, np.float16)) for i in range(4)]
            norm = graph.add("BatchNormalization", graph.add("Relu", conv, name="relu"), *ones, name="norm")
            graph.output(graph.conv(norm, (256, 256), "next"))
            want = "a normalisation that no convolution before it can take in"
        case _:
            relu = graph.add("Relu", conv, name="relu")
            second = graph.conv_int8(graph.quantized(relu, "q"), (256, 256), "second")
            graph.output(graph.add("Add", second, relu, name="add"))
            want = "second is INT8, and what add adds to it comes in floating point from relu"
    found = _of(_explain(graph, tmp_path), "broken fusion")
    assert [finding.what for finding in found] == [want]
    assert found[0].gain_ms > 0


def test_a_gated_activation_is_no_broken_fusion(tmp_path: Path) -> None:
    graph = Graph(half=True)
    conv = graph.conv(graph.input("x", [1, 256, SIZE, SIZE]), (256, 256), "conv")
    gate = graph.add("Sigmoid", conv, name="gate")
    graph.output(graph.add("Mul", gate, conv, name="silu"))
    assert _of(_explain(graph, tmp_path), "broken fusion") == []


def test_a_quantisation_that_nothing_computes_before_is_a_reformat(tmp_path: Path) -> None:
    graph = Graph(19, half=True)
    part = graph.constant("starts", np.asarray([0], "int64"))
    ends = graph.constant("ends", np.asarray([128], "int64"))
    axes = graph.constant("axes", np.asarray([1], "int64"))
    x = graph.conv(graph.input("x", [1, 256, SIZE, SIZE]), (256, 256), "first")
    cut = graph.add("Slice", graph.add("Relu", x, name="relu"), part, ends, axes, name="cut")
    graph.output(graph.conv_int8(graph.quantized(cut, "q"), (128, 256), "second"))
    (found,) = _of(_explain(graph, tmp_path, "int8"), "reformat")
    assert found.where == "q_QuantizeLinear"
    assert "cut_out is quantised by a kernel of its own" in found.what


def test_seams_of_an_engine_are_taken_from_its_own_list(tmp_path: Path) -> None:
    graph = Graph(19, half=True)
    x = graph.conv_int8(graph.quantized(graph.input("x", [1, 256, SIZE, SIZE]), "q"), (256, 256), "a")
    relu = graph.add("Relu", x, name="a/Relu")
    graph.output(graph.conv_int8(graph.quantized(relu, "r"), (256, 256), "b"))
    layers = (
        EngineLayer(name="k0", type="kgen", precision="int8", nodes=("q_QuantizeLinear", "a")),
        EngineLayer(name="a", type="correlation", precision="int8", nodes=("a", "q_DequantizeLinear")),
        EngineLayer(name="k1", type="kgen", precision="int8", nodes=("a/Relu", "a", "r_QuantizeLinear")),
        EngineLayer(name="Reformatting CopyNode for Input Tensor 0 to b", type="Reformat", precision="int8"),
        EngineLayer(name="b", type="correlation", precision="int8", nodes=("b",)),
    )
    explanation = _explain(graph, tmp_path, "int8", layers)
    assert {(f.kind, f.where) for f in explanation.findings if f.kind != "memory bound"} == {
        ("reformat", "k0"),
        ("reformat", "Reformatting CopyNode for Input Tensor 0 to b"),
        ("broken fusion", "k1"),
    }
    assert {f.source for f in explanation.findings if f.kind != "memory bound"} == {"engine"}
    (broken,) = _of(explanation, "broken fusion")
    assert broken.advice.startswith("the file lets them fuse and the builder did not")  # the Relu is right behind it
    assert explanation.layers == 5
    fused = (EngineLayer(name="a", type="correlation", precision="int8", nodes=("a", "a/Relu", "r_QuantizeLinear")),)
    assert _of(_explain(graph, tmp_path, "int8", fused), "broken fusion") == []


def test_what_scales_a_product_is_no_reformat_and_qdq_in_between_names_its_pass(tmp_path: Path) -> None:
    graph = Graph(19, half=True)
    x = graph.conv_int8(graph.quantized(graph.input("x", [1, 256, SIZE, SIZE]), "q"), (256, 256), "a")
    graph.output(graph.add("Cast", x, name="cast", to=TensorProto.FLOAT), kind=TensorProto.FLOAT)
    layers = (
        EngineLayer(name="a", type="correlation", precision="int8", nodes=("a", "q_DequantizeLinear")),
        EngineLayer(name="k", type="kgen", precision="fp32", nodes=("a", "cast")),
    )
    assert _of(_explain(graph, tmp_path, "int8", layers), "reformat") == []
    graph = Graph(19, half=True)
    x = graph.conv_int8(graph.quantized(graph.input("x", [1, 256, SIZE, SIZE]), "q"), (256, 256), "a")
    graph.output(graph.add("Relu", graph.quantized(x, "r"), name="a/Relu"))
    (found,) = _of(_explain(graph, tmp_path, "int8"), "broken fusion")
    assert "rewrite(path, path, ['qdq'])" in found.advice


def test_a_tail_of_small_kernels_is_found(tmp_path: Path) -> None:
    graph = Graph(half=True)
    x = _chain(graph, graph.input("x", [1, 64, SIZE, SIZE]), [64, 64])
    x = graph.add("MaxPool", x, name="pool", kernel_shape=[16, 16], strides=[16, 16])
    for index in range(6):
        x = graph.add("Relu", graph.conv(x, (64, 64), f"tail{index}", size=1), name=f"tail{index}/Relu")
    graph.output(x)
    (found,) = _of(_explain(graph, tmp_path), "launch bound")
    assert found.where.endswith("to tail5")
    assert "kernels in a row that take longer to start than to run" in found.what


def test_findings_come_by_gain_and_never_exceed_the_latency(tmp_path: Path) -> None:
    graph = Graph(half=True)
    x = _chain(graph, graph.input("x", [1, 250, SIZE, SIZE]), [250, 100, 255, 250])
    graph.output(graph.add("Relu", graph.conv(x, (250, 250), "dw", group=250), name="dw/Relu"))
    explanation = _explain(graph, tmp_path)
    gains = [finding.gain_ms for finding in explanation.findings]
    assert len(gains) >= 3
    assert gains == sorted(gains, reverse=True)
    assert all(0 < gain < explanation.latency_ms for gain in gains)
    assert explanation.to_dict()["kind"] == "predicted"


def test_a_model_with_dynamic_shapes_is_refused(tmp_path: Path) -> None:
    graph = Graph()
    graph.output(graph.add("Relu", graph.input("x", ["n", 8]), name="relu"), ["n", 8])
    with pytest.raises(TargetError, match="expected fixed input shapes; got 'n' for axis 0"):
        _explain(graph, tmp_path)
