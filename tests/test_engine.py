"""Engines of TensorRT-RTX, built ahead of time and never claimed to have run; and refusals that say what to do."""

from __future__ import annotations

import importlib.util
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from fusepress.export import builder
from fusepress.export.builder import Phases
from fusepress.export.engine import (
    BuildOptions,
    DlaMemory,
    EngineInfo,
    ShapeRange,
    build_rtx_engine,
    build_tensorrt_engine,
    check_plan,
)
from fusepress.export.onnx import export_onnx
from fusepress.export.timing_cache import TimingCacheFile
from fusepress.pipeline.errors import BuildError, StoreError, TargetError
from tests.doubles import play_tensorrt
from tests.export_toys import inputs, two_branch
from tests.onnx_graphs import Graph

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
    # the builder may list the outputs in another order, as one of 76 builds did; everything else is the same
    assert Counter(again.path.read_bytes()) == Counter(engine.path.read_bytes())
    assert again.layers == engine.layers


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
def test_a_precision_that_the_gpu_has_no_hardware_for_is_told(tmp_path: Path) -> None:
    graph = Graph(19, half=True)
    x, scale = graph.input("x", [1, 16, 8, 8]), graph.constant("scale", np.asarray(0.1, np.float16))
    graph.constants.append(helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], [0.0]))
    weight = graph.constant("w", np.ones((16, 16, 3, 3), np.float16))
    pairs = []
    for name, tensor in (("x", x), ("w", weight)):
        low = graph.add("QuantizeLinear", tensor, scale, "zero", name=f"{name}/q")
        pairs.append(graph.add("DequantizeLinear", low, scale, "zero", name=f"{name}/dq"))
    graph.output(graph.add("Conv", *pairs, name="conv", pads=[1, 1, 1, 1]))
    path = graph.save(tmp_path / "m.onnx")
    info = build_rtx_engine(path, tmp_path / "m.engine", compute_capabilities=["8.9"])
    assert info.precisions() == {"fp8": 1}
    with pytest.raises(TargetError, match=r"got fp8_e4m3 at .*m\.onnx, .* no hardware for .*; take int8"):
        build_rtx_engine(path, tmp_path / "n.engine", compute_capabilities=["8.6"])
    assert not (tmp_path / "n.engine").exists()


@needs_rtx
def test_a_builder_that_is_too_slow_or_short_of_memory_is_told(model: Path, tmp_path: Path) -> None:
    def build(options: BuildOptions) -> None:
        build_rtx_engine(model, tmp_path / "m.engine", compute_capabilities=["8.9"], options=options)

    with pytest.raises(BuildError, match=r"(?s)got no answer within 0\.05 s of the builder"):
        build(BuildOptions(timeout_s=0.05))
    with pytest.raises(BuildError, match=r"do with 30 MiB of memory; got out of memory at .*; raise the limit"):
        build(BuildOptions(memory_limit=30 << 20))
    assert not (tmp_path / "m.engine").exists()


@needs_rtx
def test_a_full_disk_during_the_build_is_told(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.engine"
    out.with_name(f".{out.name}.{os.getpid()}").symlink_to("/dev/full")  # where the worker writes the plan
    with pytest.raises(StoreError, match=r"expected room for m\.engine; got a full disk at .*; free some space"):
        build_rtx_engine(model, out, compute_capabilities=["8.9"])
    assert {path.name for path in tmp_path.iterdir()} == {"m.log"}


@needs_rtx
def test_progress_rises_and_timings_are_kept_and_used_again(model: Path, engine: EngineInfo, tmp_path: Path) -> None:
    told: list[float] = []
    options = BuildOptions(timing_cache_folder=tmp_path / "timings", workspace_mib=64)
    states = []
    for name in ("a", "b"):
        info = build_rtx_engine(
            model,
            tmp_path / name,
            compute_capabilities=["8.9"],
            options=options,
            progress=lambda fraction, _phase: told.append(fraction),
        )
        assert info.timing_cache is not None
        states.append(info.timing_cache["state"])
    assert states == ["new", "reused"]
    assert told
    assert all(0 <= fraction <= 1 for fraction in told)
    assert info.to_dict()["timing_cache"]["state"] == "reused"
    assert "timing_cache" not in engine.to_dict()


def _dynamic(path: Path) -> Path:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"], name="Relu")],
        "g",
        [value("x", TensorProto.FLOAT, ["n", 8])],
        [value("y", TensorProto.FLOAT, ["n", 8])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    return path


@needs_rtx
def test_a_dynamic_input_is_built_for_its_range_of_shapes(tmp_path: Path) -> None:
    path = _dynamic(tmp_path / "dynamic.onnx")
    shapes = {"x": ShapeRange(least=(1, 8), typical=(4, 8), most=(16, 8))}
    info = build_rtx_engine(
        path, tmp_path / "m.engine", compute_capabilities=["8.9"], options=BuildOptions(shapes=shapes)
    )
    assert "MinShape: [1,8], OptShape: [4,8], MaxShape: [16,8]" in info.log_path.read_text()
    assert info.to_dict()["shapes"] == {"x": [[1, 8], [4, 8], [16, 8]]}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({}, r"expected a range of shapes for the dynamic input 'x' \['\?', 8\]; got none"),
        ({"x": ((1, 8), (4, 8), (2, 8))}, r"expected least <= typical <= largest shape of 'x'"),
        ({"x": ((1, 8), (4, 9), (4, 9))}, r"fixed sizes as they are; got \(1, 8\) / \(4, 9\)"),
        ({"x": ((1,), (4,), (4,))}, "expected least <= typical <= largest shape of 'x'"),
        ({"z": ((1, 8), (4, 8), (4, 8))}, r"expected shapes of the inputs \['x'\]; got \['z'\]"),
    ],
    ids=["none", "falling", "fixed-size", "rank", "name"],
)
def test_shapes_that_do_not_fit_are_refused_before_anything_is_built(
    tmp_path: Path, shapes: dict[str, Any], message: str
) -> None:
    ranges = {name: ShapeRange(least=a, typical=b, most=c) for name, (a, b, c) in shapes.items()}
    with pytest.raises(BuildError, match=message):
        build_rtx_engine(
            _dynamic(tmp_path / "dynamic.onnx"),
            tmp_path / "m.engine",
            compute_capabilities=["8.9"],
            options=BuildOptions(shapes=ranges),
        )
    assert not (tmp_path / "m.log").exists()


@needs_rtx
def test_an_accelerator_that_is_not_there_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="got: DLA core 0 was asked for and there are 0 here"):
        build_rtx_engine(model, tmp_path / "m.engine", compute_capabilities=["8.9"], options=BuildOptions(dla_core=0))


# --- TensorRT 8, 10 and 11: the branches, on a test double; nothing is built ------------------------------------------


@pytest.fixture(params=[10, 11])
def double(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """A module called tensorrt that is our test double, beside a GPU that is a file."""
    play_tensorrt(request.param, tmp_path, monkeypatch)
    return int(request.param)


def test_the_double_is_asked_for_what_the_options_say(double: int, model: Path, tmp_path: Path) -> None:
    options = BuildOptions(sparse=True, workspace_mib=3, timing_cache_folder=tmp_path / "timings", power_mode="MAXN")
    info = build_tensorrt_engine(model, tmp_path / "m.plan", options=options)
    plan = json.loads(info.path.read_bytes())
    assert plan["strongly_typed"]
    assert plan["flags"] == [2]
    assert plan["pools"] == {"0": 3 << 20}
    assert info.runtime_version.startswith(str(double))
    assert {layer.precision for layer in info.layers} == {"fp16"}
    assert info.layers_path == tmp_path / "m.layers.json"
    by_node = {node: layer for layer in info.layers for node in layer.nodes}
    assert by_node["fuse/Conv"].has_sparse_weights is True
    assert not info.executed
    assert "(Sparsity) Layers eligible" in info.log_path.read_text()


def test_a_timing_cache_that_was_changed_or_is_not_accepted_is_started_anew(
    double: int, model: Path, tmp_path: Path
) -> None:
    options = BuildOptions(timing_cache_folder=tmp_path / "timings")

    def build() -> dict[str, Any]:
        cache = build_tensorrt_engine(model, tmp_path / "m.plan", options=options).timing_cache
        assert cache is not None
        return dict(cache)

    assert build()["state"] == "new"
    path = next((tmp_path / "timings").glob("*.timing"))
    path.write_bytes(b"timings of another hand")
    assert build()["state"] == "damaged, so started anew"
    identity = json.loads(path.with_suffix(".json").read_text())["identity"]
    TimingCacheFile(folder=path.parent, identity=identity).write(b"of another device")
    assert build()["state"] == "not accepted by the builder, so started anew"
    assert build()["state"] == "reused"


@pytest.mark.parametrize(
    ("core", "memory", "message"),
    [
        (
            None,
            DlaMemory(sram_kib=512),
            r"expected dla_core with dla_memory; got none at .*\.onnx; name the",
        ),
        (0, DlaMemory(local_dram_mib=3), r"expected .* powers of two.*; got \{'DLA_LOCAL_DRAM': 3145728\} at .*\.onnx"),
        (0, DlaMemory(sram_kib=2), r"of 4096 bytes or more; got \{'DLA_MANAGED_SRAM': 2048\} at"),
        (0, DlaMemory(sram_kib=0), r"got \{'DLA_MANAGED_SRAM': 0\} at .*\.onnx; change BuildOptions\.dla_memory"),
    ],
)
def test_bounds_that_the_accelerator_cannot_have_are_refused_before_the_build(
    model: Path, tmp_path: Path, core: int | None, memory: DlaMemory, message: str
) -> None:
    options = BuildOptions(dla_core=core, dla_memory=memory)
    with pytest.raises(BuildError, match=message):
        build_rtx_engine(model, tmp_path / "m.engine", compute_capabilities=["8.9"], options=options)


def test_layers_that_the_accelerator_leaves_to_the_gpu_are_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play_tensorrt(10, tmp_path, monkeypatch)
    info = build_tensorrt_engine(model, tmp_path / "m.plan", options=BuildOptions(dla_core=1))
    assert "GridSample" in info.fallback
    assert not {"fuse/Conv", "Relu"} & set(info.fallback)
    assert json.loads(info.path.read_bytes())["device"] == [1, 1]
    assert info.to_dict()["fallback"] == list(info.fallback)
    assert "dla_memory_bytes" not in info.to_dict()
    bounded = BuildOptions(dla_core=1, dla_memory=DlaMemory(sram_kib=512, global_dram_mib=256))
    bound = build_tensorrt_engine(model, tmp_path / "b.plan", options=bounded)
    assert json.loads(bound.path.read_bytes())["pools"] == {"1": 512 << 10, "3": 256 << 20}
    assert bound.to_dict()["dla_memory_bytes"] == {"DLA_MANAGED_SRAM": 512 << 10, "DLA_GLOBAL_DRAM": 256 << 20}
    with pytest.raises(BuildError, match=r"these layers do not run on the DLA: .*GridSample"):
        build_tensorrt_engine(model, tmp_path / "n.plan", options=BuildOptions(dla_core=1, gpu_fallback=False))


def test_a_version_without_strong_typing_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play_tensorrt(8, tmp_path, monkeypatch)
    with pytest.raises(BuildError, match=r"version 8\.5\.2 has no strong typing"):
        build_tensorrt_engine(model, tmp_path / "m.plan")


# --- phases -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_nested_phases_rise_to_one_and_never_fall(steps: list[int]) -> None:
    phases, seen = Phases(), [0.0]

    def run(depth: int, parent: str | None) -> None:
        name = f"phase {depth}"
        phases.start(name, parent, steps[depth])
        for step in range(steps[depth]):
            if depth + 1 < len(steps):
                run(depth + 1, name)
            phases.step(name, step)
            seen.append(phases.fraction)
        phases.finish(name)

    run(0, None)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_a_phase_counts_as_part_of_a_step_of_its_parent() -> None:
    phases = Phases()
    phases.start("outer", None, 4)
    phases.step("outer", 0)
    phases.start("inner", "outer", 2)
    phases.step("inner", 0)
    assert phases.fraction == pytest.approx((1 + 1 / 2) / 4)


# --- plans ------------------------------------------------------------------------------------------------------------


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


# --- which GPU --------------------------------------------------------------------------------------------------------


def _machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, board: str = "") -> None:
    (tmp_path / "said").write_text(said)
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncat '{tmp_path}/said'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    (tmp_path / "model").write_text(board)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(builder, "_BOARD", tmp_path / "model")
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)


_TWO = "0, GPU-aa, NVIDIA A30, 8.0, 550.1\n1, GPU-bb, NVIDIA L4, 8.9, 550.1\n"


def test_equal_gpus_are_one_and_the_first_of_different_ones_is_not_guessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _machine(tmp_path, monkeypatch, "0, GPU-aa, NVIDIA L4, 8.9, 550.1\n1, GPU-bb, NVIDIA L4, 8.9, 550.1\n")
    assert builder.gpu() == {"name": "NVIDIA L4", "capability": ["8.9"], "driver": "550.1"}
    (tmp_path / "said").write_text(_TWO)
    assert builder.gpu() == {"name": "NVIDIA A30, NVIDIA L4", "capability": [], "driver": "unknown"}


@pytest.mark.parametrize(
    ("environment", "capability"),
    [
        ({"CUDA_VISIBLE_DEVICES": "GPU-bb"}, ["8.9"]),
        ({"CUDA_VISIBLE_DEVICES": "1"}, []),  # CUDA puts the fastest first, not the tool's
        ({"CUDA_VISIBLE_DEVICES": "1,0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, ["8.9"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, []),
    ],
)
def test_the_gpu_is_the_one_that_this_process_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], capability: list[str]
) -> None:
    _machine(tmp_path, monkeypatch, _TWO)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert builder.gpu()["capability"] == capability


@pytest.mark.parametrize("said", ["", "0, GPU-aa, Orin (nvgpu), [N/A], 540.4.0\n"], ids=["no tool", "JetPack 6"])
def test_a_jetson_is_known_by_its_board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    _machine(tmp_path, monkeypatch, said, board="NVIDIA Jetson AGX Orin Developer Kit\0")
    found = builder.gpu()
    assert (found["name"], found["capability"]) == ("NVIDIA Jetson AGX Orin Developer Kit", ["8.7"])
