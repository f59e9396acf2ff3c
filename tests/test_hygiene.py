"""Each pass is exact on ONNX Runtime, leaves nothing of its kind, and leaves alone what it cannot rewrite exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto

from fusepress.export.hygiene import PASSES, Rewrite, rewrite
from fusepress.export.onnx import load_onnx, opset_of
from fusepress.export.runtime import OnnxSession
from fusepress.pipeline.errors import ExportError
from fusepress.pipeline.task import Batch
from tests.onnx_graphs import Graph, values


def _rewrite(graph: Graph, tmp_path: Path, name: str) -> tuple[list[Rewrite], Any]:
    source, target = graph.save(tmp_path / "in.onnx"), tmp_path / "out.onnx"
    done = rewrite(source, target, [name])
    return done, load_onnx(target)


def _ops(proto: Any) -> list[str]:
    return [node.op_type for node in proto.graph.node]


def _outputs(path: Path, feeds: dict[str, Any]) -> list[Any]:
    return list(OnnxSession(path, 1).run_numpy(feeds).values())


# --- scatter ----------------------------------------------------------------------------------------------------------


def _scatter(indices: list[list[int]] | None, reduction: str = "add") -> Graph:
    graph = Graph(18)
    canvas, updates = graph.input("canvas", [1, 6, 4]), graph.input("updates", [1, 3, 4])
    where = (
        graph.input("where", [1, 3, 2], TensorProto.INT64)
        if indices is None
        else graph.constant("where", np.asarray([indices]))
    )
    graph.output(graph.add("ScatterND", canvas, where, updates, name="scatter", reduction=reduction))
    return graph


def test_a_scatter_that_adds_at_distinct_places_needs_no_reduction(tmp_path: Path) -> None:
    done, proto = _rewrite(_scatter([[0, 5], [0, 0], [0, 2]]), tmp_path, "scatter")
    assert [d.changed for d in done] == [("scatter",)]
    assert done[0].max_rel == 0
    assert not any(a.name == "reduction" for node in proto.graph.node for a in node.attribute)
    assert _ops(proto).count("ScatterND") == 1


@pytest.mark.parametrize(
    "indices", [None, [[0, 5], [0, 5], [0, 2]], [[0, 5], [0, -1], [0, 2]]], ids=["input", "repeats", "negative"]
)
def test_a_scatter_whose_places_may_repeat_is_left(tmp_path: Path, indices: list[list[int]] | None) -> None:
    graph = _scatter(indices)
    done, proto = _rewrite(graph, tmp_path, "scatter")
    assert done == []
    assert (tmp_path / "out.onnx").read_bytes() == (tmp_path / "in.onnx").read_bytes()
    assert _ops(proto) == ["ScatterND"]


def test_an_explicit_reduction_of_none_is_dropped(tmp_path: Path) -> None:
    done, proto = _rewrite(_scatter([[0, 5], [0, 5], [0, 2]], "none"), tmp_path, "scatter")
    assert len(done) == 1
    assert len(proto.graph.node[0].attribute) == 0


# --- GridSample -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("align", [0, 1])
@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_grid_sample_is_written_out_exactly(tmp_path: Path, mode: str, padding: str, align: int) -> None:
    graph = Graph(16)
    x, grid = graph.input("x", [1, 3, 5, 7]), graph.input("grid", [1, 6, 4, 2])
    graph.output(graph.add("GridSample", x, grid, name="sample", mode=mode, padding_mode=padding, align_corners=align))
    done, proto = _rewrite(graph, tmp_path, "grid_sample")
    assert done[0].changed == ("sample",)
    assert "GridSample" not in _ops(proto)
    feeds = values({"x": [1, 3, 5, 7], "grid": [1, 6, 4, 2]}, seed=7)
    feeds["grid"][0, 0] = [[-1, -1], [1, 1], [-1.4, 0.2], [3, -3]]  # corners, and outside
    before, after = _outputs(tmp_path / "in.onnx", feeds)[0], _outputs(tmp_path / "out.onnx", feeds)[0]
    np.testing.assert_allclose(after, before, atol=2e-6)


def test_grid_samples_that_cannot_be_written_out_are_left(tmp_path: Path) -> None:
    graph = Graph(16)
    x, grid = graph.input("x", [1, 3, 5, 7]), graph.input("grid", [1, 6, 4, 2])
    graph.output(graph.add("GridSample", x, grid, name="cubic", mode="bicubic"))
    assert _rewrite(graph, tmp_path, "grid_sample")[0] == []


# --- attention --------------------------------------------------------------------------------------------------------


def _attention(flat: bool, mask: str | None, **attributes: Any) -> Graph:
    graph = Graph(23)
    shape = [1, 5, 12] if flat else [1, 3, 5, 4]
    names = [graph.input(name, shape) for name in "qkv"]
    if mask == "added":
        names.append(graph.constant("mask", np.where(np.eye(5) > 0, -1.5, 0.25).astype(np.float32)))
    if mask == "boolean":
        names.append(graph.constant("mask", np.tri(5, dtype=bool)))
    heads = {"q_num_heads": 3, "kv_num_heads": 3} if flat else {}
    graph.output(graph.add("Attention", *names, name="attention", **heads, **attributes))
    return graph


@pytest.mark.parametrize(
    ("flat", "mask", "attributes"),
    [
        (False, None, {}),
        (True, None, {}),
        (False, None, {"is_causal": 1}),
        (False, "added", {"scale": 0.3}),
        (True, "boolean", {}),
    ],
    ids=["4-D", "3-D", "causal", "added-mask", "boolean-mask"],
)
def test_attention_becomes_products_and_a_softmax(
    tmp_path: Path, flat: bool, mask: str | None, attributes: dict[str, Any]
) -> None:
    done, proto = _rewrite(_attention(flat, mask, **attributes), tmp_path, "attention")
    assert done[0].changed == ("attention",)
    assert done[0].max_rel < 1e-5
    assert {"MatMul", "Softmax"} <= set(_ops(proto))
    assert "Attention" not in _ops(proto)
    assert opset_of(proto) == 20  # nothing else needs a newer one


def test_an_attention_with_a_soft_cap_is_left(tmp_path: Path) -> None:
    assert _rewrite(_attention(False, None, softcap=2.0), tmp_path, "attention")[0] == []


# --- integers ---------------------------------------------------------------------------------------------------------


def test_wide_slices_and_inputs_of_64_bits_are_narrowed(tmp_path: Path) -> None:
    graph = Graph(18)
    x, where = graph.input("x", [1, 9]), graph.input("where", [1, 2], TensorProto.INT64)
    bounds = [graph.constant(n, np.asarray([v])) for n, v in (("start", 2), ("end", 2**63 - 1), ("axis", 1))]
    cut = graph.add("Slice", x, *bounds, name="cut")
    graph.output(graph.add("GatherElements", cut, where, name="pick", axis=1))
    done, proto = _rewrite(graph, tmp_path, "integers")
    assert done[0].changed == ("cut", "where")
    assert proto.graph.input[1].type.tensor_type.elem_type == TensorProto.INT32
    assert "end" not in {t.name for t in proto.graph.initializer}
    feeds = values({"x": [1, 9]}) | {"where": np.asarray([[6, 1]])}
    before, after = _outputs(tmp_path / "in.onnx", feeds)[0], _outputs(tmp_path / "out.onnx", feeds)[0]
    np.testing.assert_array_equal(after, feeds["x"][:, [8, 3]])
    np.testing.assert_array_equal(after, before)


# --- Q/DQ -------------------------------------------------------------------------------------------------------------


def test_a_relu_changes_places_with_symmetric_qdq(tmp_path: Path) -> None:
    graph = Graph(18)
    conv = graph.conv(graph.input("x", [1, 4, 6, 6]), (4, 8), "conv")
    graph.output(graph.add("Relu", graph.quantized(conv, "q", scale=0.07), name="relu"))
    done, proto = _rewrite(graph, tmp_path, "qdq")
    assert done[0].changed == ("relu",)
    assert done[0].max_rel == 0
    assert _ops(proto) == ["Conv", "Relu", "QuantizeLinear", "DequantizeLinear"]


def test_a_relu_behind_asymmetric_qdq_or_read_twice_is_left(tmp_path: Path) -> None:
    graph = Graph(18)
    conv = graph.conv(graph.input("x", [1, 4, 6, 6]), (4, 8), "conv")
    shifted = graph.quantized(conv, "q", zero=np.asarray(7, np.int8))
    graph.output(graph.add("Relu", shifted, name="relu"))
    assert _rewrite(graph, tmp_path, "qdq")[0] == []
    graph = Graph(18)
    conv = graph.conv(graph.input("x", [1, 4, 6, 6]), (4, 8), "conv")
    back = graph.quantized(conv, "q")
    graph.output(graph.add("Relu", back, name="relu"))
    graph.output(graph.add("Neg", back, name="neg"))
    assert _rewrite(graph, tmp_path, "qdq")[0] == []


def test_equal_pairs_on_one_tensor_are_one_and_a_pair_behind_an_equal_one_is_none(tmp_path: Path) -> None:
    graph = Graph(18)
    x = graph.input("x", [1, 4, 6, 6])
    twice = graph.quantized(graph.quantized(x, "a"), "b")
    graph.output(graph.add("Neg", twice, name="first"))
    graph.output(graph.add("Abs", graph.quantized(x, "c"), name="second"))
    graph.output(graph.add("Exp", graph.quantized(x, "other", scale=0.2), name="third"))
    done, proto = _rewrite(graph, tmp_path, "qdq")
    assert len(done) == 1
    assert done[0].max_rel == 0
    assert _ops(proto).count("QuantizeLinear") == 2
    assert _ops(proto).count("DequantizeLinear") == 2


def test_two_equal_pairs_behind_a_pair_of_another_scale_keep_their_own(tmp_path: Path) -> None:
    graph = Graph(18)
    coarse = graph.quantized(graph.input("x", [1, 4, 6, 6]), "coarse", scale=0.5)
    graph.output(graph.add("Neg", graph.quantized(coarse, "a", scale=0.3), name="first"))
    graph.output(graph.add("Abs", graph.quantized(coarse, "b", scale=0.3), name="second"))
    graph.output(graph.add("Exp", coarse, name="third"))  # read twice, ONNX Runtime leaves the first pair as it is
    done, proto = _rewrite(graph, tmp_path, "qdq")
    assert done[0].max_rel == 0
    assert _ops(proto).count("QuantizeLinear") == 2


# --- the frame --------------------------------------------------------------------------------------------------------


class _Broken:
    """A pass that negates: what a wrong rewrite looks like."""

    @staticmethod
    def find(proto: Any) -> list[str]:
        return [node.name for node in proto.graph.node if node.op_type == "Relu"]

    @staticmethod
    def apply(proto: Any) -> None:
        for node in proto.graph.node:
            node.op_type = "Neg"


class _Idle(_Broken):
    """A pass that changes nothing of what it finds."""

    @staticmethod
    def apply(proto: Any) -> None:
        pass


def test_a_pass_that_is_wrong_or_leaves_something_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = Graph(18)
    graph.output(graph.add("Relu", graph.input("x", [1, 4]), name="relu"))
    monkeypatch.setattr("fusepress.export.hygiene.PASSES", dict(PASSES) | {"broken": _Broken, "idle": _Idle})
    with pytest.raises(ExportError, match=r"expected the model after the pass 'broken' to equal the reference"):
        _rewrite(graph, tmp_path, "broken")
    assert not (tmp_path / "out.onnx").exists()
    with pytest.raises(ExportError, match=r"the pass 'idle' to rewrite all it finds; got \['relu'\] left"):
        _rewrite(graph, tmp_path, "idle")
    with pytest.raises(ExportError, match=r"expected passes of .*; got \['polish'\]"):
        _rewrite(graph, tmp_path, "polish")


def test_given_batches_are_what_it_is_proven_on(tmp_path: Path) -> None:
    path = _scatter([[0, 5], [0, 0], [0, 2]]).save(tmp_path / "in.onnx")
    feeds = {name: torch.ones(1, size, 4) for name, size in (("canvas", 6), ("updates", 3))}
    batch = Batch(inputs=feeds, sample_ids=["mine"], groups=["a"])
    (done,) = rewrite(path, path, ["scatter"], [batch])
    assert done.max_rel == 0
    assert "Sub" in _ops(load_onnx(path))
