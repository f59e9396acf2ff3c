"""Operators that a target's importer does not read are named before anything is spent."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from fusepress.export.hygiene import PASSES
from fusepress.pipeline.cli import run
from fusepress.pipeline.console import Reporter
from fusepress.pipeline.errors import BuildError, ExportError, TargetError
from fusepress.pipeline.planning import _operators, _operators_of
from fusepress.pipeline.stages.build import _check_operators
from fusepress.pipeline.stages.export import require_buildable, rewritten_for_target
from fusepress.pipeline.task import LoadedTask, TaskSource
from fusepress.pipeline.text import plan_lines
from fusepress.targets.operators import _RTX, importer_of, operator_faults
from fusepress.targets.profile import list_profiles, load_profile
from tests.export_toys import ToyTask, inputs, two_branch
from tests.onnx_graphs import Graph

ADA, ORIN, HOST = (load_profile(name) for name in ("rtx-4090", "jetson-agx-orin-64gb", "host-cpu"))


def _scatter(reduction: str, *, constant: bool = False) -> Graph:
    graph = Graph(18)
    canvas, updates = graph.input("canvas", [1, 6, 4]), graph.input("updates", [1, 3, 4])
    where = (
        graph.constant("where", np.asarray([[[0, 1], [0, 2], [0, 3]]]))
        if constant
        else graph.input("where", [1, 3, 2], TensorProto.INT64)
    )
    graph.output(graph.add("ScatterND", canvas, where, updates, name="scatter", reduction=reduction))
    return graph


def test_a_clean_graph_has_no_faults_anywhere() -> None:
    graph = Graph(17)
    graph.output(graph.add("Relu", graph.conv(graph.input("x", [1, 4, 8, 8]), (4, 8), "conv"), name="relu"))
    for name in list_profiles():
        assert operator_faults(graph.proto(), load_profile(name)) == []


@pytest.mark.parametrize("profile", [ADA, ORIN], ids=["rtx", "orin"])
def test_refused_operators_are_named_with_advice_and_basis(profile: Any) -> None:
    graph = Graph(18)
    x = graph.input("x", [4, 4])
    graph.output(graph.add("Det", x, name="pose/Det"))
    graph.output(graph.add("Unique", x, name="voxels/Unique"), ["n"])
    faults = operator_faults(graph.proto(), profile)
    assert [(f.operator, f.node) for f in faults] == [("Det", "pose/Det"), ("Unique", "voxels/Unique")]
    assert faults[1].advice == "make the indices unique outside the model"
    assert {f.basis for f in faults} == {"run" if profile is ADA else "not confirmed"}
    assert operator_faults(graph.proto(), HOST) == []


@pytest.mark.parametrize(("reduction", "mended_by"), [("add", "scatter"), ("max", "")])
def test_a_scatter_with_a_reduction_is_refused(reduction: str, mended_by: str) -> None:
    (fault,) = operator_faults(_scatter(reduction).proto(), ADA)
    assert f"has no scatter with a reduction ({reduction})" in fault.why
    assert fault.mended_by == mended_by
    assert operator_faults(_scatter("none").proto(), ADA) == []


def test_versions_read_different_operators_and_operator_sets() -> None:
    graph = Graph(16)
    sampled = graph.add("GridSample", graph.input("x", [1, 3, 5, 7]), graph.input("g", [1, 6, 4, 2]), name="sample")
    graph.output(sampled)
    assert operator_faults(graph.proto(), ORIN, tensorrt="8.5.2") == []
    old = operator_faults(graph.proto(), ORIN, tensorrt="8.4.1")
    assert [f.operator for f in old] == ["operator set 16", "GridSample"]
    assert old[1].mended_by == "grid_sample"
    graph = Graph(19)
    graph.output(graph.add("Relu", graph.input("x", [1, 4]), name="relu"))
    (fault,) = operator_faults(graph.proto(), ORIN, tensorrt="8.5.2")
    assert fault.why == "TensorRT 8.5.2 reads at most 17"
    with pytest.raises(TargetError, match=r"expected a TensorRT version such as 10\.3; got 'new'"):
        importer_of(ORIN, "new")


def test_attention_five_dimensions_and_zero_points_are_refused() -> None:
    graph = Graph(23)
    heads = [1, 3, 5, 4]
    graph.output(graph.add("Attention", *(graph.input(n, heads) for n in "qkv"), name="attention"), heads)
    graph.output(graph.quantized(graph.input("x", [1, 4]), "q", zero=np.asarray(3, np.int8)), [1, 4])
    volume, grid = graph.input("volume", [1, 1, 2, 2, 2]), graph.input("grid", [1, 2, 2, 2, 3])
    graph.output(graph.add("GridSample", volume, grid, name="sample"), [1, 1, 2, 2, 2])
    faults = operator_faults(graph.proto(), ADA)
    assert [(f.operator, f.mended_by) for f in faults] == [
        ("Attention", "attention"),
        ("QuantizeLinear", ""),
        ("DequantizeLinear", ""),
        ("GridSample", ""),
    ]
    assert {"attention", "scatter", "grid_sample"} <= set(PASSES)  # what faults say they are mended by


def test_the_plan_of_an_onnx_file_names_all_its_faults(tmp_path: Path) -> None:
    graph = _scatter("max")
    graph.output(graph.add("Det", graph.input("m", [4, 4]), name="pose/Det"))
    found = _operators_of(_context(ADA), graph.save(tmp_path / "m.onnx"))
    assert [fault["node"] for fault in found["refused"]] == ["scatter", "pose/Det"]
    assert found["refused"][1]["advice"] == "write the determinant out"


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed")
def test_the_list_of_tensorrt_rtx_is_what_it_says() -> None:
    import tensorrt_rtx as trt
    from onnx import defs

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    known = {schema.name for schema in defs.get_all_schemas_with_history() if schema.domain == ""}
    assert {name for name in known if not parser.supports_operator(name)} == _RTX & known


# --- in the pipeline --------------------------------------------------------------------------------------------------


class _Determinant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = two_branch()

    def forward(self, image: Tensor, points: Tensor, index: Tensor) -> dict[str, Tensor]:
        out: dict[str, Tensor] = self.inner(image, points, index)
        return {"seg": out["seg"], "cls": out["cls"] + torch.linalg.det(points[:, :4, :4]).unsqueeze(1)}


def _context(profile: Any) -> Any:
    task = LoadedTask(
        user=ToyTask(), source=TaskSource(spec="t.py:T", files=()), branches={}, metrics={"m": "max"}, keep=[]
    )
    return SimpleNamespace(profile=profile, task=task, reporter=Reporter(quiet=True), from_onnx=False)


def test_the_plan_names_what_the_target_cannot_read() -> None:
    found = _operators(_context(ADA), _Determinant().eval())
    assert found["importer"] == "TensorRT-RTX 1.7"
    assert [fault["operator"] for fault in found["refused"]] == ["Det"]
    facts = {"run": "r", "target": "t", "power_mode": "m", "precision": "p", "stages": [], "operators": found}
    lines = plan_lines(facts)
    assert "operators TensorRT-RTX 1.7 does not take 1 node(s) of the dense model" in lines
    assert "write the determinant out" in lines[-2]
    assert "the target cannot build this model" in lines[-1]
    assert _operators(_context(HOST), nn.Identity()) == {"checked": False, "why": "ONNX Runtime has every operator"}


def test_the_export_stage_rewrites_what_it_can_and_says_what_is_left(tmp_path: Path) -> None:
    path = _scatter("add", constant=True).save(tmp_path / "m.onnx")
    done, left = rewritten_for_target(_context(ADA), path)
    assert done == ["scatter: scatter (largest difference 0)"]
    assert left == []
    graph = Graph(18)
    graph.output(graph.add("Det", graph.input("x", [4, 4]), name="pose/Det"))
    path = graph.save(tmp_path / "n.onnx")
    before = path.read_bytes()
    done, left = rewritten_for_target(_context(ORIN), path)
    assert done == []
    assert "TensorRT 10.3 does not read it [not confirmed]; write the determinant out" in left[0]
    assert path.read_bytes() == before


def test_the_export_stage_stops_at_what_no_engine_can_be_built_of(tmp_path: Path) -> None:
    path = _scatter("max").save(tmp_path / "n.onnx")
    message = (
        r"(?s)that rtx-4090 reads; got 1 that it refuses and no rewrite mends:.*reduction \(max\) \[run\]; scatter"
    )
    with pytest.raises(ExportError, match=message):
        rewritten_for_target(_context(ADA), path)
    with pytest.raises(ExportError, match=message):  # of the dense model already
        require_buildable(_context(ADA), path)
    path = _scatter("add", constant=True).save(tmp_path / "m.onnx")
    before = path.read_bytes()
    require_buildable(_context(ADA), path)
    assert path.read_bytes() == before


def test_a_kit_that_the_device_refuses_is_not_written(tmp_path: Path) -> None:
    context = _context(ORIN)
    context.artifacts = {"onnx": _scatter("max").save(tmp_path / "n.onnx")}
    with pytest.raises(
        BuildError, match=r"(?s)that jetson-agx-orin-64gb reads; got 1 that it refuses at n\.onnx:.*max"
    ):
        _check_operators(context)
    context.artifacts = {"onnx": _scatter("none").save(tmp_path / "m.onnx")}
    _check_operators(context)


@pytest.mark.parametrize(
    ("graph", "profile", "from_onnx", "rewritten", "buildable"),
    [
        (_scatter("add", constant=True), ADA, False, True, True),
        (
            _scatter("add", constant=True),
            ADA,
            True,
            False,
            False,
        ),  # nothing rewrites the file that a recipe starts from
        (_scatter("add"), ADA, False, False, False),  # the places may repeat
        (_scatter("max"), ORIN, False, False, False),
    ],
    ids=["rewritten", "from ONNX", "not exact", "no pass"],
)
def test_the_plan_says_whether_the_target_can_build_the_model(
    tmp_path: Path, graph: Graph, profile: Any, from_onnx: bool, rewritten: bool, buildable: bool
) -> None:
    context = _context(profile)
    context.from_onnx = from_onnx
    found = _operators_of(context, graph.save(tmp_path / "m.onnx"))
    assert [fault["rewritten"] for fault in found["refused"]] == [rewritten]
    assert found["buildable"] is buildable


def test_what_is_not_confirmed_does_not_stop_a_plan(tmp_path: Path) -> None:
    graph = Graph(18)
    graph.output(graph.add("Det", graph.input("x", [4, 4]), name="pose/Det"))
    found = _operators_of(_context(ORIN), graph.save(tmp_path / "m.onnx"))
    assert [fault["operator"] for fault in found["refused"]] == ["Det"]
    assert found["buildable"]


def test_a_plan_that_cannot_be_built_or_reached_has_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    facts: dict[str, Any] = {"run": "r", "target": "t", "power_mode": "m", "precision": "p", "stages": []}
    monkeypatch.setattr("fusepress.pipeline.api.plan", lambda *_, **__: facts)
    assert run(["plan", "recipe.yaml"]) == 0
    facts["operators"] = {"checked": False, "why": "the model cannot be exported: x", "refused": [], "buildable": False}
    assert run(["plan", "recipe.yaml"]) == 2
    facts["operators"] = {"checked": True, "importer": "i", "basis": "run", "refused": [], "buildable": True}
    assert run(["plan", "recipe.yaml"]) == 0


def test_branches_and_loops_are_looked_into() -> None:
    inner = Graph(18)
    inner.output(inner.add("Det", "x", name="inner/Det"), [])
    body = helper.make_graph(inner.nodes, "branch", [], inner.outputs)
    graph = Graph(18)
    graph.input("x", [4, 4])
    choice = graph.input("choice", [], TensorProto.BOOL)
    graph.output(graph.add("If", choice, name="if", then_branch=body, else_branch=body), [])
    assert [fault.node for fault in operator_faults(graph.proto(), ADA)] == ["inner/Det", "inner/Det"]


def test_the_toy_is_read_by_every_target() -> None:
    assert inputs(1)["index"].dtype == torch.int64  # as its export has it
    assert _operators(_context(ORIN), two_branch())["refused"] == []
