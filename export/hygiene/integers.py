"""64-bit integers that importers narrow to 32 bits: bounds of slices beyond them, and inputs.

Exporters write "to the end" as 2^63 - 1; 2^31 - 1 says the same of any dimension that fits into memory. Inputs of
indices become int32, with a Cast behind them: versions before 10 bind them as int32 anyway.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fusepress.export.hygiene.edit import constant_array, set_nodes

INT32_MAX, INT32_MIN = 2**31 - 1, -(2**31) + 1
_INT32, _INT64 = 6, 7


def find(proto: Any) -> list[str]:
    """Slices with bounds beyond 32 bits, and inputs of 64-bit integers."""
    constants = {t.name for t in proto.graph.initializer}
    inputs = [v.name for v in proto.graph.input if v.type.tensor_type.elem_type == _INT64 and v.name not in constants]
    return [node.name for node in proto.graph.node if _wide_bounds(proto, node)] + inputs


def _wide_bounds(proto: Any, node: Any) -> list[str]:
    if node.op_type != "Slice":
        return []
    values = {name: constant_array(proto, name) for name in node.input[1:3]}
    return [n for n, v in values.items() if v is not None and bool(((v > INT32_MAX) | (v < INT32_MIN)).any())]


def apply(proto: Any) -> None:
    """Narrow them."""
    for index, node in enumerate(proto.graph.node):
        for name in _wide_bounds(proto, node):
            _narrow(proto, node, name, index)
    _narrow_inputs(proto)


def _narrow(proto: Any, node: Any, name: str, index: int) -> None:
    """A constant of the node's own: another node may read the wide one for something else."""
    from onnx import numpy_helper

    value = constant_array(proto, name)
    assert value is not None
    narrow = f"{name}/narrow_{index}"
    clipped = np.clip(value, INT32_MIN, INT32_MAX)
    proto.graph.initializer.append(numpy_helper.from_array(clipped, narrow))
    renamed = [narrow if given == name else given for given in node.input]
    del node.input[:]
    node.input.extend(renamed)
    if not any(name in other.input for other in proto.graph.node):
        kept = [t for t in proto.graph.initializer if t.name != name]
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(kept)


def _narrow_inputs(proto: Any) -> None:
    from onnx import helper

    constants = {t.name for t in proto.graph.initializer}
    casts = []
    for value in proto.graph.input:
        if value.type.tensor_type.elem_type != _INT64 or value.name in constants:
            continue
        value.type.tensor_type.elem_type = _INT32
        wide = f"{value.name}/int64"
        for node in proto.graph.node:
            renamed = [wide if given == value.name else given for given in node.input]
            del node.input[:]
            node.input.extend(renamed)
        casts.append(helper.make_node("Cast", [value.name], [wide], name=f"{value.name}/Cast", to=_INT64))
    if casts:
        set_nodes(proto.graph, [*casts, *proto.graph.node])
