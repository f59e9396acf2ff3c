"""Reading and editing Q/DQ graphs (calib/qdq.py), and the rules that quantised files keep."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from fusepress.export.onnx import lower_opset


def test_lowering_to_operator_set_18_leaves_alone_what_18_says_like_19() -> None:
    """Only operator set 17 has the axes of a reduction as an attribute."""
    value = helper.make_tensor_value_info
    node = helper.make_node("ReduceMax", ["x", "axes"], ["y"], name="pool", keepdims=0)
    graph = helper.make_graph(
        [node],
        "g",
        [value("x", TensorProto.FLOAT, [2, 3])],
        [value("y", TensorProto.FLOAT, [2])],
        [numpy_helper.from_array(np.array([1]), "axes")],
    )
    for opset, axes in ((18, ["x", "axes"]), (17, ["x"])):
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)])
        lower_opset(proto, opset)
        assert list(proto.graph.node[0].input) == axes
        assert proto.opset_import[0].version == opset
