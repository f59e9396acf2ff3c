"""ScatterND that adds, as `index_put(accumulate=True)` exports it: TensorRT has no scatter with a reduction.

Where the indices are constants that do not repeat, adding equals writing: data + scatter(zeros, indices, updates). Of
indices that come from an input nobody can know whether they repeat, and the node is left. An explicit reduction="none"
is dropped: importers older than operator set 16 do not know the attribute.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fusepress.export.hygiene.edit import Editor, attribute, constant_array, node_named
from fusepress.export.wiring import Wiring


def find(proto: Any) -> list[str]:
    """Scatters that can be written without a reduction."""
    return [node.name for node in proto.graph.node if _can(proto, node)]


def _can(proto: Any, node: Any) -> bool:
    if node.op_type not in ("ScatterND", "ScatterElements"):
        return False
    reduction = attribute(node, "reduction")
    if reduction == b"none":
        return True
    return reduction == b"add" and node.op_type == "ScatterND" and _unique(proto, node)


def _unique(proto: Any, node: Any) -> bool:
    indices = constant_array(proto, node.input[1])
    shape = Wiring(proto).shape(node.input[0])
    if indices is None or shape is None:
        return False
    rows = indices.reshape(-1, indices.shape[-1])
    rows = np.where(rows < 0, rows + np.asarray(shape[: rows.shape[1]]), rows)  # -1 is the last
    return len(np.unique(rows, axis=0)) == len(rows)


def apply(proto: Any) -> None:
    """Drop the reductions."""
    for name in find(proto):
        node = node_named(proto, name)
        if attribute(node, "reduction") == b"none":
            _drop(node)
        else:
            _write_and_add(proto, node)


def _drop(node: Any) -> None:
    kept = [a for a in node.attribute if a.name != "reduction"]
    del node.attribute[:]
    node.attribute.extend(kept)


def _write_and_add(proto: Any, node: Any) -> None:
    edit = Editor(proto, node.name)
    zero = edit.add("Sub", node.input[0], node.input[0], name="zeros")  # of the data's shape and type
    written = edit.add("ScatterND", zero, node.input[1], node.input[2], name="ScatterND")
    edit.add("Add", node.input[0], written, name="Add", output=node.output[0])
    edit.replace(node)
