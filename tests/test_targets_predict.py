"""Predicted latency: how graphs become kernels, laws that any roofline keeps, and what its validation says."""

from __future__ import annotations

import importlib
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from fusepress.pipeline.cli import cli
from fusepress.pipeline.errors import TargetError
from fusepress.targets.kernels import kernel_times, sparse_gain
from fusepress.targets.network import Network, read_network
from fusepress.targets.predict import Prediction, predict_latency, predict_network
from fusepress.targets.profile import Profile, list_profiles, load_profile
from fusepress.targets.roofline import FITTED, constants_of, fitted_sets
from fusepress.targets.work import describe_traffic, describe_work, kernel_precisions

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data" / "latency"
RESULT = ROOT / "benchmarks" / "results" / "latency" / "validation.json"
ORIN = load_profile("jetson-agx-orin-64gb")
GPUS = [name for name in list_profiles() if name != "host-cpu"]


class Builder:
    """Writes small ONNX graphs."""

    def __init__(self, *shape: int, dtype: int = TensorProto.FLOAT) -> None:
        self.dtype = dtype
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.inputs = [helper.make_tensor_value_info("x", dtype, list(shape))]

    def constant(self, name: str, *shape: int, dtype: Any = None) -> str:
        kind = dtype or (np.float16 if self.dtype == TensorProto.FLOAT16 else np.float32)
        self.weights.append(numpy_helper.from_array(np.ones(shape, dtype=kind), name))
        return name

    def add(self, op: str, *names: str, outputs: int = 1, **attributes: Any) -> str:
        out = f"t{len(self.nodes)}"
        outs = [out] if outputs == 1 else [f"{out}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, list(names), outs, name=f"{op}_{len(self.nodes)}", **attributes))
        return outs[0]

    def conv(self, x: str, cin: int, cout: int, kernel: int = 3, *, group: int = 1, stride: int = 1) -> str:
        weight = self.constant(f"w{len(self.weights)}", cout, cin // group, kernel, kernel)
        pad = kernel // 2
        return self.add("Conv", x, weight, group=group, strides=[stride] * 2, pads=[pad] * 4, kernel_shape=[kernel] * 2)

    def quantized(self, x: str) -> str:
        self.weights.append(numpy_helper.from_array(np.float32(0.1), scale := f"s{len(self.weights)}"))
        self.weights.append(numpy_helper.from_array(np.int8(0), zero := f"z{len(self.weights)}"))
        return self.add("DequantizeLinear", self.add("QuantizeLinear", x, scale, zero), scale, zero)

    def model(self, *outputs: str) -> bytes:
        outs = [helper.make_empty_tensor_value_info(name) for name in outputs]
        graph = helper.make_graph(self.nodes, "g", self.inputs, outs, self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
        return bytes(onnx.shape_inference.infer_shapes(model).SerializeToString())

    def network(self, *outputs: str) -> Network:
        return read_network(self.model(*outputs))


def chain(widths: list[int], size: int = 32, kernel: int = 3, depth: int = 1) -> bytes:
    b = Builder(1, widths[0], size, size)
    x = "x"
    for _ in range(depth):
        for cin, cout in itertools.pairwise(widths):
            x = b.add("Relu", b.conv(x, cin, cout, kernel))
    return b.model(x)


def pooled(size: int) -> bytes:
    b = Builder(1, 8, size, size)
    return b.model(b.add("MaxPool", "x", kernel_shape=[2, 2], strides=[2, 2]))


def fast(profile: Profile, **changes: float) -> Profile:
    name = profile.default_mode
    return profile.model_copy(update={"power_modes": {name: profile.mode().model_copy(update=changes)}})


# how graphs become kernels


def test_convolution_takes_normalisation_activation_and_residual_into_one_kernel() -> None:
    b = Builder(1, 16, 8, 8)
    skip = b.add("Relu", b.conv("x", 16, 16))
    norm = [b.constant(f"bn{i}", 16) for i in range(4)]
    y = b.add("BatchNormalization", b.conv(skip, 16, 16), *norm)
    y = b.add("Relu", b.add("Add", y, skip))
    network = b.network(y)
    assert [kernel.op for kernel in network.kernels] == ["Conv", "Conv"]
    assert network.macs == 2 * 16 * 16 * 9 * 64
    assert len(network.kernels[1].reads) == 1  # the skip is also its input, read once
    assert [len(kernel.writes) for kernel in network.kernels] == [1, 1]


def test_silu_reads_its_input_from_the_same_kernel() -> None:
    b = Builder(1, 8, 8, 8)
    y = b.conv("x", 8, 8)
    network = b.network(b.add("Mul", y, b.add("Sigmoid", y)))
    assert len(network.kernels) == 1
    assert network.kernels[0].reads == ["x"]


def test_a_gate_of_one_pixel_does_not_swallow_the_large_product_behind_it() -> None:
    b = Builder(1, 16, 32, 32)
    y = b.conv("x", 16, 16)
    gate = b.add("Sigmoid", b.conv(b.add("GlobalAveragePool", y), 16, 16, 1))
    network = b.network(b.add("Mul", y, gate))
    assert [kernel.op for kernel in network.kernels] == ["Conv", "GlobalAveragePool", "Conv", "Mul"]
    assert network.kernels[3].kind == "elementwise"


def test_concatenation_is_free_and_read_as_a_whole() -> None:
    b = Builder(1, 8, 8, 8)
    both = b.add("Concat", b.conv("x", 8, 8), b.conv("x", 8, 24), axis=1)
    network = b.network(b.conv(both, 32, 8, 1))
    assert [kernel.op for kernel in network.kernels] == ["Conv"] * 3
    assert network.tensors[network.kernels[2].reads[0]].elements == 32 * 64
    assert all(len(kernel.writes) == 1 for kernel in network.kernels)


@pytest.mark.parametrize(
    ("build", "macs", "kind"),
    [
        (lambda b: b.conv("x", 16, 32, 3, stride=2), 32 * 16 * 9 * 16, "gemm"),
        (lambda b: b.conv("x", 16, 16, 3, group=16), 16 * 9 * 64, "depthwise"),
        (lambda b: b.conv("x", 16, 32, 1, group=2), 32 * 8 * 64, "gemm"),
        (
            lambda b: b.add("ConvTranspose", "x", b.constant("w", 16, 8, 2, 2), strides=[2, 2], kernel_shape=[2, 2]),
            64 * 16 * 8 * 4,
            "gemm",
        ),
        (lambda b: b.add("MatMul", "x", b.constant("w", 8, 24)), 16 * 8 * 8 * 24, "gemm"),
        (lambda b: b.add("MatMul", "x", b.add("Transpose", "x", perm=[0, 1, 3, 2])), 16 * 8 * 8 * 8, "gemm"),
        (
            lambda b: b.add("Gemm", b.add("Flatten", "x"), b.constant("w", 10, 1024), transB=1),
            10 * 1024,
            "gemm",
        ),
    ],
    ids=["strided", "depthwise", "grouped", "transposed", "matmul", "attention", "gemm"],
)
def test_multiply_accumulates_follow_from_shapes(build: Callable[[Builder], str], macs: int, kind: str) -> None:
    b = Builder(1, 16, 8, 8)
    network = b.network(build(b))
    assert network.macs == macs
    assert next(kernel.kind for kernel in network.kernels if kernel.macs) == kind


def test_constants_and_shape_arithmetic_cost_nothing() -> None:
    b = Builder(1, 8, 4, 4)
    scaled = b.add("Mul", b.constant("a", 8, 8, 1, 1), b.constant("c", 1))
    y = b.add("Conv", "x", scaled, kernel_shape=[1, 1])
    network = b.network(b.add("Reshape", y, b.add("Shape", y)))
    assert [kernel.op for kernel in network.kernels] == ["Conv"]


def test_precision_is_read_from_a_quantised_graph() -> None:
    b = Builder(1, 32, 16, 16)
    x = b.quantized("x")
    y = b.add("Conv", x, b.quantized(b.constant("w", 32, 32, 3, 3)), kernel_shape=[3, 3], pads=[1] * 4)
    y = b.conv(b.add("Relu", y), 32, 32)
    prediction = predict_network(b.network(y), ORIN)
    assert {layer.op: layer.precision for layer in prediction.layers if layer.op == "QuantizeLinear"} == {
        "QuantizeLinear": "fp32"
    }
    assert [layer.precision for layer in prediction.layers if layer.op == "Conv"] == ["int8", "fp32"]
    assert prediction.precision == "int8"
    first = next(layer for layer in prediction.layers if layer.op == "Conv")
    assert first.bytes == 32 * 256 + 32 * 32 * 9 + 4 * 32 * 256  # INT8 in, INT8 weights, FP32 out


def test_precision_is_read_from_a_half_precision_graph() -> None:
    b = Builder(1, 16, 8, 8, dtype=TensorProto.FLOAT16)
    prediction = predict_network(b.network(b.conv("x", 16, 16)), ORIN, "int8")
    assert [layer.precision for layer in prediction.layers] == ["fp16"]
    assert prediction.precision == "fp16"


def test_an_untyped_graph_is_read_as_it_was_asked_for() -> None:
    network = read_network(chain([16, 16]))
    for asked in ("fp32", "fp16", "int8"):
        assert predict_network(network, ORIN, asked).precision == asked
    assert predict_network(network, ORIN).precision == "fp32"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"not a model", r"expected an ONNX file; got something else at the given bytes"),
        (Path("nowhere.onnx"), r"expected an ONNX file; got none at nowhere\.onnx; give its path"),
        (b"", r"expected an ONNX graph with nodes; got an empty one"),
    ],
)
def test_what_is_not_a_network_is_refused(source: bytes | Path, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        predict_latency(source, ORIN)


def test_dynamic_inputs_and_constant_graphs_are_refused() -> None:
    model = onnx.load_from_string(chain([8, 8]))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    with pytest.raises(TargetError, match=r"fixed input shapes; got 'batch' for axis 0 of input 'x' .*batch 1"):
        predict_latency(model.SerializeToString(), ORIN)
    b = Builder(1, 8)
    with pytest.raises(TargetError, match=r"expected a graph that computes something; got constants only"):
        predict_latency(b.model(b.add("Mul", b.constant("a", 4), b.constant("c", 4))), ORIN)


def test_illegal_precision_and_unknown_mode_are_refused() -> None:
    with pytest.raises(TargetError, match=r"got FP8 at quantize\.precision"):
        predict_latency(chain([8, 8]), ORIN, "fp8")
    with pytest.raises(TargetError, match=r"got '99W'"):
        predict_latency(chain([8, 8]), ORIN, mode="99W")


def test_a_file_without_its_weights_predicts_the_same(tmp_path: Path) -> None:
    whole = chain([64, 128, 128])
    model = onnx.load_from_string(whole)
    for tensor in model.graph.initializer:
        tensor.raw_data = b""
    (tmp_path / "stripped.onnx").write_bytes(model.SerializeToString())
    assert predict_latency(tmp_path / "stripped.onnx", ORIN, "fp16") == predict_latency(whole, ORIN, "fp16")


# laws

width = st.integers(1, 160)
gpu = st.sampled_from(GPUS)
fixed = settings(max_examples=40, deadline=None, database=None, derandomize=True)


@fixed
@given(cin=width, cout=width, more_in=st.integers(0, 200), more_out=st.integers(0, 200), name=gpu)
def test_more_channels_are_never_faster(cin: int, cout: int, more_in: int, more_out: int, name: str) -> None:
    profile = load_profile(name)
    precision = profile.precisions[-1]
    small = predict_latency(chain([cin, cout]), profile, precision)
    large = predict_latency(chain([cin + more_in, cout + more_out]), profile, precision)
    assert large.latency_ms >= small.latency_ms * (1 - 1e-12)
    assert large.macs >= small.macs


@fixed
@given(
    widths=st.lists(st.integers(2, 256), min_size=2, max_size=5), name=gpu, precision=st.sampled_from(["fp32", "fp16"])
)
def test_halving_all_channels_is_never_slower(widths: list[int], name: str, precision: str) -> None:
    profile = load_profile(name)
    full = predict_latency(chain(widths), profile, precision)
    half = predict_latency(chain([math.ceil(w / 2) for w in widths]), profile, precision)
    assert half.latency_ms <= full.latency_ms * (1 + 1e-12)


@fixed
@given(widths=st.lists(width, min_size=2, max_size=4), size=st.sampled_from([7, 16, 56, 160]), name=gpu)
def test_half_precision_is_never_slower_than_single(widths: list[int], size: int, name: str) -> None:
    network = read_network(chain(widths, size))
    profile = load_profile(name)
    half, single = (predict_network(network, profile, precision) for precision in ("fp16", "fp32"))
    assert half.latency_ms <= single.latency_ms * (1 + 1e-12)


@fixed
@given(widths=st.lists(width, min_size=2, max_size=4), factor=st.floats(1.0, 4.0), name=gpu)
def test_faster_clocks_and_memory_are_never_slower(widths: list[int], factor: float, name: str) -> None:
    network = read_network(chain(widths, 48))
    profile = load_profile(name)
    now = predict_network(network, profile, "fp16").latency_ms
    mode = profile.mode()
    for changes in ({"gpu_mhz": mode.gpu_mhz * factor}, {"dram_gbps": mode.dram_gbps * factor}):
        assert predict_network(network, fast(profile, **changes), "fp16").latency_ms <= now * (1 + 1e-12)


@fixed
@given(cin=st.integers(5, 200), cout=st.integers(5, 200))
def test_int8_computes_whole_steps_of_64_channels_and_vectors_of_32(cin: int, cout: int) -> None:
    padded = [-(-cin // 64) * 64, -(-cout // 32) * 32]
    works = [describe_work(read_network(chain(widths)), "int8") for widths in ([cin, cout], padded)]
    constants = constants_of(ORIN).constants
    given_widths, whole = (kernel_times(work, ORIN, ORIN.mode(), constants).compute for work in works)
    assert given_widths.tolist() == whole.tolist()


@fixed
@given(widths=st.lists(width, min_size=2, max_size=5), name=st.sampled_from(list_profiles()))
def test_layers_add_up_and_the_interval_holds_the_estimate(widths: list[int], name: str) -> None:
    prediction = predict_latency(chain(widths), load_profile(name), "fp32")
    assert sum(layer.ms for layer in prediction.layers) == pytest.approx(prediction.latency_ms)
    assert sum(layer.macs for layer in prediction.layers) == prediction.macs
    assert 0 < prediction.low_ms < prediction.latency_ms < prediction.high_ms
    assert prediction.extrapolating == bool(prediction.reasons)


def test_a_slower_power_mode_is_slower() -> None:
    network = read_network(chain([64, 64, 64], 80))
    at = [predict_network(network, ORIN, "fp16", mode=mode) for mode in ("MAXN", "50W", "30W", "15W")]
    assert [p.power_mode for p in at] == ["MAXN", "50W", "30W", "15W"]
    assert sorted(p.latency_ms for p in at) == [p.latency_ms for p in at]


@pytest.mark.parametrize(
    ("model", "bound"),
    [
        (chain([512, 512], 64), "compute"),
        (pooled(512), "memory"),
        (chain([8, 8], 8, 1), "launch"),
    ],
    ids=["wide", "thin", "tiny"],
)
def test_layers_say_what_bounds_them(model: bytes, bound: str) -> None:
    (layer,) = predict_latency(model, ORIN, "fp16").layers
    assert layer.bound == bound


def test_int8_beats_half_precision_where_it_should_but_by_less_than_two() -> None:
    network = read_network(chain([256, 256, 256], 80))
    half, low = (predict_network(network, ORIN, precision).latency_ms for precision in ("fp16", "int8"))
    assert 1.2 < half / low < 2.0


# what it was validated on


def sized(gmacs: float) -> Network:
    size = round(math.sqrt(gmacs * 1e9 / (64 * 64 * 9 * 4)))
    return read_network(chain([64, 64], size, depth=4))


@pytest.mark.parametrize(("gmacs", "inside"), [(0.05, False), (0.25, True), (1.0, True), (60.0, True), (400.0, False)])
def test_orin_is_inside_the_range_of_published_networks_only(gmacs: float, inside: bool) -> None:
    prediction = predict_network(sized(gmacs), ORIN, "fp16")
    assert prediction.extrapolating is not inside
    assert inside or "are in the fit for SM 8.7" in prediction.reasons[0]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("rtx-4090", "no published latency of SM 8.9"),
        ("drive-agx-thor", "no published latency of SM 10.1"),
        ("host-cpu", "measure on this machine"),
    ],
)
def test_a_device_without_published_rows_extrapolates(name: str, why: str) -> None:
    prediction = predict_network(sized(1.0), load_profile(name), "fp16")
    assert prediction.extrapolating
    assert why in prediction.reasons[0]


def test_intervals_widen_from_known_device_to_sibling_to_unseen_architecture() -> None:
    def spread(p: Prediction) -> float:
        return p.high_ms / p.low_ms

    network = sized(5.0)
    known, sibling, unseen = (
        spread(predict_network(network, load_profile(name), "fp16"))
        for name in ("jetson-agx-orin-64gb", "drive-agx-orin", "rtx-4090")
    )
    assert known < sibling < unseen


def test_where_launches_are_all_the_interval_spans_half_to_twice_a_launch() -> None:
    b = Builder(1, 8, 8, 8)
    y = "x"
    for _ in range(20):
        y = b.add("MaxPool", y, kernel_shape=[3, 3], pads=[1] * 4)
    prediction = predict_network(b.network(y), ORIN, "fp16")
    launches_ms = 20 * constants_of(ORIN).constants.launch_cycles / (ORIN.mode().gpu_mhz * 1e3)
    assert launches_ms > 0.95 * prediction.latency_ms
    assert prediction.high_ms >= (prediction.latency_ms + launches_ms) * (1 - 1e-9)
    assert prediction.low_ms <= (prediction.latency_ms - launches_ms / 2) * (1 + 1e-9)


def test_time_in_operators_that_no_fitted_network_has_extrapolates() -> None:
    b = Builder(1, 64, 160, 160)
    y = b.conv("x", 64, 64)
    grid = b.constant("grid", 1, 160, 160, 2)
    for _ in range(6):
        y = b.add("GridSample", y, grid)
    prediction = predict_network(b.network(y), ORIN, "fp16")
    assert prediction.extrapolating
    assert "operators that no fitted network has (GridSample)" in prediction.reasons[-1]


# what kernels are made of


def test_a_concatenation_copies_what_is_read_elsewhere_too() -> None:
    b = Builder(1, 8, 8, 8)
    x = b.conv("x", 8, 8)
    y = b.conv(x, 8, 24)
    network = b.network(b.conv(b.add("Concat", x, y, axis=1), 32, 8, 1))
    assert [kernel.op for kernel in network.kernels] == ["Conv", "Conv", "Concat", "Conv"]
    copied = network.kernels[2]
    assert [network.tensors[name].elements for name in (*copied.reads, *copied.writes)] == [8 * 64, 8 * 64]


def test_transposes_and_slices_of_operands_of_products_are_no_kernels() -> None:
    b = Builder(1, 4, 16, 96)
    b.weights += [numpy_helper.from_array(np.array([v]), n) for n, v in (("a", 0), ("m", 32), ("e", 64), ("ax", 3))]
    q, k = b.add("Slice", "x", "a", "m", "ax"), b.add("Slice", "x", "m", "e", "ax")
    scores = b.add("MatMul", q, b.add("Transpose", k, perm=[0, 1, 3, 2]))
    network = b.network(b.add("Softmax", scores))
    assert [kernel.op for kernel in network.kernels] == ["MatMul", "Softmax"]
    assert (network.kernels[0].rows, network.kernels[0].columns, network.kernels[0].channels_in) == (16, 16, 32)


@pytest.mark.parametrize(("op", "smooth"), [("Relu", False), ("Sigmoid", True), ("HardSigmoid", False)])
def test_activations_with_exponentials_cost_time_in_half_and_a_kernel_in_single_precision(
    op: str, smooth: bool
) -> None:
    b = Builder(1, 64, 80, 80)
    y = b.conv("x", 64, 64)
    network = b.network(b.add("Mul", y, b.add(op, y)))
    (kernel,) = network.kernels
    assert kernel.smooth is smooth
    half, single = (describe_work(network, p) for p in ("fp16", "fp32"))
    assert half.smooth.tolist() == [smooth]
    assert single.smooth.tolist() == [False]
    assert single.launches[0] - half.launches[0] == smooth
    assert len(single.tensor_bytes) - len(half.tensor_bytes) == 2 * smooth


def test_a_network_input_is_reformatted_before_the_first_convolution() -> None:
    network = read_network(chain([8, 8], 16))
    for precision in ("fp32", "fp16", "int8"):
        work = describe_work(network, precision)
        assert work.launches.tolist() == [2]


def test_precision_borders_of_an_untyped_graph_cost_a_reformat() -> None:
    b = Builder(1, 32, 8, 8)
    x = b.conv("x", 32, 32)
    y = b.conv(x, 32, 32)
    network = b.network(b.add("GridSample", x, b.constant("grid", 1, 8, 8, 2)), y)
    precisions = kernel_precisions(network, "int8")
    assert precisions == ["int8", "int8", "fp16"]
    # the first result is read in FP16, too, and so kept in FP16: the second convolution quantises it
    assert describe_traffic(network, precisions, "int8").launches.tolist() == [2, 2, 1]


def test_traffic_between_a_write_and_its_reader_decides_what_the_cache_still_holds() -> None:
    network = read_network(chain([16, 32, 8], 8, kernel=1))
    work = describe_work(network, "fp16")
    image, half, first, second = 4 * 16 * 64, 2 * 16 * 64, 2 * 32 * 64, 2 * 16 * 32
    # x is read, written as FP16, read, then the result is written; the second kernel reads it and writes FP32
    assert work.tensor_bytes.tolist() == [image, half, half, first, first, 4 * 8 * 64]
    between = work.tensor_reuse_bytes.tolist()
    assert between[0] == between[5] == math.inf
    assert between[1] == between[2] == half
    assert between[3] == between[4] == first
    assert work.weight_reuse_bytes.tolist() == [work.tensor_bytes.sum() + work.weight_bytes.sum()] * 2
    assert work.weight_bytes[0] == second


def test_one_tile_on_one_sm_costs_what_its_formula_says() -> None:
    """64 x 32 outputs of depth 64 in FP16: products, or steps along the depth, and writing the tile."""
    b = Builder(64, 64)
    network = b.network(b.add("Gemm", "x", b.constant("w", 64, 32)))
    work = describe_work(network, "fp16")
    constants, mode = constants_of(ORIN).constants, ORIN.mode()
    times = kernel_times(work, ORIN, mode, constants)
    products = 2 * 64 * 32 * 64 / (2048 * constants.compute_fp16)
    loads = (64 + 32) * 64 * 2 / (64 * 0.6)
    steps = 64 * 2 / 64 * constants.step_cycles
    clocks = max(products, loads, steps) + constants.tile_cycles * 64 * 32 / 128**2
    assert times.compute[0] == pytest.approx(clocks / (mode.gpu_mhz * 1e3), rel=1e-12)


# sparsity, accelerators, host-driven launches


def test_sparse_weights_help_wide_layers_only_and_extrapolate() -> None:
    network = read_network(chain([512, 512, 16], 40))
    gain = sparse_gain(describe_work(network, "fp16"))
    assert 1.4 < gain[0] < 1.6
    assert 1.0 < gain[1] < 1.1
    dense, sparse = (predict_network(network, ORIN, "fp16", sparse=flag) for flag in (False, True))
    assert sparse.latency_ms < dense.latency_ms
    assert sparse.extrapolating
    assert any("2:4 sparse" in reason for reason in sparse.reasons)
    with pytest.raises(TargetError, match="expected a target with 2:4 sparsity"):
        predict_network(network, load_profile("t4"), "fp16", sparse=True)


def test_the_accelerator_takes_int8_only_and_extrapolates() -> None:
    network = read_network(chain([64, 64, 64], 160))
    prediction = predict_network(network, ORIN, "int8", dla=True)
    assert prediction.extrapolating
    assert any("deep-learning accelerator" in reason for reason in prediction.reasons)
    assert prediction.latency_ms > predict_network(network, ORIN, "int8").latency_ms
    with pytest.raises(TargetError, match=r"expected INT8 for the accelerator of .*; got fp16; predict with"):
        predict_network(network, ORIN, "fp16", dla=True)
    with pytest.raises(TargetError, match="expected a target with a deep-learning accelerator; got rtx-4090"):
        predict_network(network, load_profile("rtx-4090"), "int8", dla=True)


def test_starting_kernels_from_the_host_costs_the_same_for_each() -> None:
    costs = []
    for depth in (2, 4):
        prediction = predict_network(read_network(chain([32, 32], 16, depth=depth)), ORIN, "fp16")
        costs.append(prediction.stream_ms - prediction.latency_ms)
    assert costs[1] - costs[0] == pytest.approx(2 * constants_of(ORIN).stream_ms)


def test_other_power_modes_and_more_attention_extrapolate() -> None:
    network = sized(1.0)
    assert not predict_network(network, ORIN, "fp16").extrapolating
    assert predict_network(network, ORIN, "fp16", mode="30W").reasons == (
        "no latency of jetson-agx-orin-64gb in power mode 30W is in the fit",
    )
    b = Builder(1, 8, 1024, 64)
    y = "x"
    for _ in range(4):
        y = b.add("MatMul", b.add("Softmax", b.add("MatMul", y, b.add("Transpose", y, perm=[0, 1, 3, 2]))), y)
    prediction = predict_network(b.network(y), ORIN, "fp16")
    assert any("of the time in attention" in reason for reason in prediction.reasons)


def test_a_thousand_layers_are_priced_as_arrays() -> None:
    """No loop over kernels in what a search repeats: one call prices all of them."""
    work = describe_work(read_network(chain([16, 16], 8, depth=1000)), "fp16")
    times = kernel_times(work, ORIN, ORIN.mode(), constants_of(ORIN).constants)
    assert times.total.shape == (1000,)
    assert len(set(times.total[1:-1])) == 1


def test_layers_asked_for_by_themselves_cost_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    speed = importlib.import_module("benchmarks.latency.speed")
    work = describe_work(read_network(speed.chain([16, 40, 24, 200, 64])), "fp16")
    assert len(work.names) == 4
    np.testing.assert_allclose(speed.one_by_one(work), speed.at_once(work), rtol=1e-12)


def test_the_command_prints_what_the_library_returns(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(chain([64, 128, 64], 80))
    options = [str(model), "--target", ORIN.name, "--precision", "int8", "--mode", "30W"]
    result = CliRunner().invoke(cli, ["targets", "predict", *options, "--json"])
    assert result.exit_code == 0, result.output
    found, expected = json.loads(result.output), predict_latency(model, ORIN.name, "int8", mode="30W")
    assert [found[key] for key in ("latency_ms", "low_ms", "high_ms", "stream_ms", "extrapolating")] == [
        expected.latency_ms, expected.low_ms, expected.high_ms, expected.stream_ms, True,
    ]  # fmt: skip
    assert sum(layer["ms"] for layer in found["layers"]) == pytest.approx(found["latency_ms"])
    text = CliRunner().invoke(cli, ["targets", "predict", *options]).output
    assert "90 % interval" in text
    assert "extrapolating: no latency of jetson-agx-orin-64gb in power mode 30W is in the fit" in text
    assert "Conv" in text


# what the committed validation says


def test_shipped_constants_are_those_of_the_committed_validation() -> None:
    shipped, result = json.loads(FITTED.read_text()), json.loads(RESULT.read_text())
    assert shipped["command"] == result["command"]
    assert shipped["sets"] == {name: part["fitted"] for name, part in result["sets"].items()}


def test_profiles_name_the_devices_that_were_validated() -> None:
    validated = {name for fitted in fitted_sets().values() for name in fitted.devices}
    assert {name for name in list_profiles() if load_profile(name).latency_validated} == validated
    assert predict_network(sized(1.0), ORIN, "fp16").device_validated
    assert not predict_network(sized(1.0), load_profile("drive-agx-orin"), "fp16").device_validated


def test_orin_meets_what_is_asked_of_the_prediction() -> None:
    """Errors of held-out families and devices, as the committed validation has them."""
    orin = json.loads(RESULT.read_text())["sets"]["orin"]
    assert all(error["mape"] <= 0.12 for error in orin["leave_one_device_out"]["by_device"].values())
    assert orin["leave_one_family_out"]["siblings"]["mape"] <= 0.25
    assert all(rank["spearman"] >= 0.97 for rank in orin["spearman_within_device"].values())
    assert orin["coverage"]["pooled"]["compatible"]


def test_both_sets_keep_what_their_intervals_promise() -> None:
    result = json.loads(RESULT.read_text())
    assert result["coverage"]["compatible"]
    for part in result["sets"].values():
        pooled = part["coverage"]["pooled"]
        assert pooled["n"] == 2 * part["n"]  # each row with its family and with its device held out
        assert pooled["low"] <= 0.9 <= pooled["high"]


def test_a_device_of_one_family_has_the_wide_interval() -> None:
    """A family held out took its only rows along: no error says how a new network does there."""
    general = fitted_sets()["general"]
    assert general.calibrated < set(general.devices)
    assert general.factor("t4") == general.known < general.sibling == general.factor("jetson-agx-thor-t5000")


def test_committed_errors_follow_from_the_committed_rows() -> None:
    for part in json.loads(RESULT.read_text())["sets"].values():
        rows = part["rows"]
        assert len(rows) == part["n"]
        assert {row["quality"] for row in rows} <= {"A", "B"}
        family = np.asarray([row["predicted_ms"] / row["published_ms"] for row in rows])
        device = np.asarray([row["device_held_out_ms"] / row["published_ms"] for row in rows])
        assert np.abs(family - 1).mean() == pytest.approx(part["leave_one_family_out"]["all"]["mape"], abs=1e-3)
        assert np.abs(device - 1).mean() == pytest.approx(part["leave_one_device_out"]["all"]["mape"], abs=1e-3)


def test_the_committed_table_is_that_of_the_committed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))  # `benchmarks` is a folder of the checkout, not of the installed package
    validate = importlib.import_module("benchmarks.latency.validate")
    result = json.loads(RESULT.read_text())
    sets = {name: SimpleNamespace(report=part) for name, part in result["sets"].items()}
    text = validate.summary(sets, result["rows_not_used"])
    assert RESULT.with_suffix(".md").read_text() == text
    assert "each set by itself is compatible with 90 %" in text
    # a set whose interval does not hold what it promises is named
    short = json.loads(json.dumps(result["sets"]["general"]))
    short["coverage"]["pooled"] = validate.coverage_of(139, 166)
    sets["general"] = SimpleNamespace(report=short)
    assert "of the set general 83.7%, which is not compatible with 90 %" in validate.summary(sets, {})


@pytest.mark.skipif(not DATA.exists(), reason="the published latencies are not beside the repository")
@pytest.mark.parametrize(
    ("graph", "gmacs"),
    [("resnet50_224", 4.09), ("yolov8n_640", 4.37), ("yolo11n_640", 3.25), ("efficientnet_b0_224", 0.39)],
)
def test_multiply_accumulates_of_known_networks_are_right(graph: str, gmacs: float) -> None:
    network = read_network(DATA / "onnx" / f"{graph}.stripped.onnx")
    assert network.macs / 1e9 == pytest.approx(gmacs, rel=0.02)
    assert network.unknown_shapes == 0
