"""What ONNX Runtime runs on this machine's CPU, why that is not faster, and unsigned INT8 behind Relu."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from fusepress.export.explain_host import FLOATING_ADVICE, UNSIGNED_ADVICE, explain_on_host
from fusepress.export.node_times import NodeTime, node_times, read_node_times
from fusepress.export.runtime import OnnxSession
from fusepress.export.unsigned import unsigned_candidates, unsigned_relus, use_unsigned
from fusepress.pipeline.cli import run
from fusepress.pipeline.errors import ExportError
from fusepress.pipeline.report.explain import view_of
from fusepress.targets.profile import load_profile
from tests.onnx_graphs import Graph, values

HOST = load_profile("host-cpu")
SHAPE = [1, 16, 24, 24]


def _chain(*, relu: bool = True) -> Graph:
    """Three convolutions with Q/DQ in front of each, as TensorRT takes them; a Relu behind the first two."""
    graph = Graph()
    x = graph.input("x", SHAPE)
    for name in ("a", "b", "c"):
        x = graph.conv_int8(graph.quantized(x, f"{name}.in", scale=0.1), (16, 16), name)
        if relu and name != "c":
            x = graph.add("Relu", x, name=f"{name}/Relu")
    graph.output(x)
    return graph


def _kinds(path: Path) -> dict[str, str]:
    return {node.name: node.kind for node in node_times(path, threads=1, runs=3) if node.name in ("a", "b", "c")}


def test_layers_behind_signed_relus_run_in_floating_point_and_unsigned_ones_in_integers(tmp_path: Path) -> None:
    proto = _chain().proto()
    onnx.save(proto, tmp_path / "signed.onnx")
    assert _kinds(tmp_path / "signed.onnx") == {"a": "floating", "b": "floating", "c": "floating"}
    assert unsigned_candidates(proto) == {"a", "b"}
    assert unsigned_relus(proto) == []
    assert use_unsigned(proto) == unsigned_relus(proto) == ["a/Relu", "b/Relu"]
    assert unsigned_candidates(proto) == frozenset()
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, tmp_path / "unsigned.onnx")
    # nothing quantises what the last one gives, so that it stays
    assert _kinds(tmp_path / "unsigned.onnx") == {"a": "integer", "b": "integer", "c": "floating"}
    found = explain_on_host(tmp_path / "unsigned.onnx", HOST, threads=1, seconds=0.1)
    does = "behind 2 Relus the file counts without a sign, so that integer kernels absorb them"
    assert found.notes == (f"2 of 3 layers with Q/DQ ran in integers; {does}",)
    assert view_of(found.to_dict()).basis.endswith(f". 2 of 3 layers with Q/DQ ran in integers; {does}.")


@settings(deadline=None)
@given(st.lists(st.floats(-40, 40, width=32), min_size=8, max_size=8), st.floats(0.015625, 1.0, width=32))
def test_unsigned_numbers_round_to_finer_steps_of_the_same_range(row: list[float], scale: float) -> None:
    graph = Graph(19)  # the evaluator has no older DequantizeLinear
    x = graph.add("Relu", graph.input("x", [1, 8]), name="relu")
    graph.output(graph.quantized(x, "q", scale=scale))
    proto = graph.proto()
    feed = {"x": np.asarray([row], np.float32)}
    signed = ReferenceEvaluator(proto).run(None, feed)[0]
    assert use_unsigned(proto) == ["relu"]
    got = ReferenceEvaluator(proto).run(None, feed)[0]
    wanted = np.clip(row, 0.0, np.float32(scale) * 127)
    half_a_step = 0.5 * scale * 127 / 255
    assert np.all(np.abs(got[0] - wanted) <= half_a_step * (1 + 1e-4) + 1e-6)
    assert np.all(np.abs(got - signed) <= 0.75 * scale * (1 + 1e-4) + 1e-6)


@pytest.mark.parametrize("fault", ["output", "other reader", "unsigned already", "other scale"])
def test_relus_that_others_read_too_are_left(fault: str) -> None:
    graph = Graph()
    relu = graph.add("Relu", graph.input("x", SHAPE), name="relu")
    zero = np.zeros((), np.uint8) if fault == "unsigned already" else None
    back = graph.quantized(relu, "q", zero=zero)
    if fault == "output":
        graph.output(relu)
    if fault == "other reader":
        back = graph.add("Add", back, relu, name="add")
    if fault == "other scale":
        node = graph.nodes[-1]
        node.input[1] = graph.constant("another", np.asarray(0.3, np.float32))
    graph.output(back)
    proto = graph.proto()
    before = proto.SerializeToString()
    assert use_unsigned(proto) == []
    assert unsigned_relus(proto) == (["relu"] if fault == "unsigned already" else [])
    assert proto.SerializeToString() == before


def test_what_stays_in_floating_point_is_measured_and_told_what_mends_it(tmp_path: Path) -> None:
    found = explain_on_host(_chain().save(tmp_path / "m.onnx"), HOST, threads=1, seconds=0.2)
    assert sum(kernel.ms for kernel in found.kernels) == pytest.approx(found.measured_ms)
    assert all(kernel.bound == "" for kernel in found.kernels)  # a profile does not tell
    assert (found.target, found.precision, found.evidence) == ("host-cpu", "int8", "measured")
    assert found.to_dict()["kind"] == "measured"
    assert found.low_ms <= found.latency_ms <= found.high_ms
    assert found.notes == ("0 of 3 layers with Q/DQ ran in integers",)
    floating = {f.where: f for f in found.findings if f.kind == "stayed floating"}
    assert set(floating) == {"a", "b", "c"}
    assert (floating["a"].advice, floating["c"].advice) == (UNSIGNED_ADVICE, FLOATING_ADVICE)
    assert any(f.kind == "reformat" and f.what.startswith("QuantizeLinear at run time") for f in found.findings)
    assert all(f.gain_ms == f.measured_ms for f in found.findings)
    assert found.measured_ms is not None
    assert sum(f.gain_ms for f in found.findings) <= found.measured_ms + 1e-9
    for word in ("TensorRT", "CUDA", "matrix cores", "trtexec"):
        assert word not in json.dumps(found.to_dict())


def test_a_float_file_has_no_layers_to_blame_but_its_large_operators(tmp_path: Path) -> None:
    graph = Graph()
    graph.output(graph.add("Exp", graph.conv(graph.input("x", SHAPE), (16, 16), "a", size=1), name="exp"))
    found = explain_on_host(graph.save(tmp_path / "m.onnx"), HOST, threads=1, seconds=0.2)
    assert (found.precision, found.notes) == ("fp32", ())
    assert {f.kind for f in found.findings} == {"operator"}  # ONNX Runtime's own copies to its layout may be among them
    assert "exp" in {f.where for f in found.findings}
    gains = [f.gain_ms for f in found.findings]
    assert gains == sorted(gains, reverse=True)


def test_a_file_is_in_the_precision_that_it_has(tmp_path: Path) -> None:
    half, low = Graph(half=True), Graph(19)
    half.output(half.conv(half.input("x", SHAPE), (16, 16), "a", size=1))
    assert explain_on_host(half.save(tmp_path / "half.onnx"), HOST, threads=1, seconds=0.1).precision == "fp16"
    zero = np.zeros((), onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.FLOAT8E4M3FN))
    x = low.quantized(low.input("x", SHAPE), "in", zero=zero)
    weight = low.constant("weight", np.ones((16, 16, 1, 1), np.float32))
    low.output(low.add("Conv", x, low.quantized(weight, "w", zero=zero), name="a"))
    found = explain_on_host(low.save(tmp_path / "fp8.onnx"), HOST, threads=1, seconds=0.1)
    assert found.precision == "fp8"
    kinds = [f.kind for f in found.findings]
    assert kinds.count("stayed floating") + found.small.get("stayed floating", 0) == 1  # it may be too quick to be told


def test_the_command_profiles_here_and_refuses_lists_of_engines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _chain(relu=False).save(tmp_path / "m.onnx")
    assert run(["explain", str(path), "--target", "host-cpu"]) == 0
    said = capsys.readouterr().out
    assert "Measured on the machine that explained it" in said
    assert "predicted" not in said
    (tmp_path / "p.json").write_text("[]")
    assert run(["explain", str(path), "--target", "host-cpu", "--profile", str(tmp_path / "p.json")]) == 2
    assert "expected no --layers or --profile for host-cpu, which has no engine" in capsys.readouterr().err


def _event(name: str, op: str, us: int, cat: str = "Node") -> dict[str, Any]:
    return {"cat": cat, "name": name, "dur": us, "args": {"op_name": op}}


def test_a_profile_is_read_as_medians_by_node() -> None:
    events = [_event("c_token_7_kernel_time", "QLinearConv", us) for us in (9000, 100, 300, 200)]
    events += [_event("q_kernel_time", "QuantizeLinear", 50)] * 4 + [_event("session", "", 9, cat="Session")]
    events += [_event("c_fence_before", "QLinearConv", 77)]
    rows = read_node_times(json.dumps(events), skip=1)
    assert rows == (
        NodeTime(name="c", op="QLinearConv", ms=0.2),
        NodeTime(name="q", op="QuantizeLinear", ms=0.05),
    )
    assert [row.kind for row in rows] == ["integer", "conversion"]
    kinds = {"FusedConv": "floating", "GridSample": "other", "MatMulIntegerToFloat": "integer", "QGemm": "integer"}
    assert {op: NodeTime(name="n", op=op, ms=1).kind for op in kinds} == kinds


def test_given_inputs_are_fed(tmp_path: Path) -> None:
    path = _chain().save(tmp_path / "m.onnx")
    import torch

    inputs = {name: torch.from_numpy(value) for name, value in values({"x": SHAPE}).items()}
    assert len(node_times(path, inputs, threads=1, runs=1)) > 3
    with pytest.raises(ExportError, match="expected the inputs"):
        node_times(path, {"y": inputs["x"]}, threads=1, runs=1)
    assert not list(OnnxSession(path, 1).path.parent.glob("profile*"))
