"""What the passes share: new nodes and constants with names of their own, and a graph kept in running order."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class Editor:
    """Builds the nodes that replace one node; every name starts with that node's."""

    def __init__(self, proto: Any, prefix: str) -> None:
        self.graph, self.prefix = proto.graph, prefix
        self.nodes: list[Any] = []

    def constant(self, name: str, value: Array) -> str:
        """A new initialiser."""
        from onnx import numpy_helper

        full = f"{self.prefix}/{name}"
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(value), full))
        return full

    def add(self, op: str, *inputs: str, name: str, output: str | None = None, **attributes: Any) -> str:
        """A new node; returns the name of its output."""
        from onnx import helper

        result = output or f"{self.prefix}/{name}_out"
        self.nodes.append(helper.make_node(op, list(inputs), [result], name=f"{self.prefix}/{name}", **attributes))
        return result

    def replace(self, node: Any) -> None:
        """Put the new nodes where `node` was."""
        position = next(index for index, other in enumerate(self.graph.node) if other.name == node.name)
        kept = [*self.graph.node[:position], *self.nodes, *self.graph.node[position + 1 :]]
        set_nodes(self.graph, kept)


def set_nodes(graph: Any, nodes: list[Any]) -> None:
    """Replace all nodes of a graph, whose shapes of tensors in between are then unknown."""
    copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    del graph.value_info[:]


def attribute(node: Any, name: str, default: Any = None) -> Any:
    """An attribute's value."""
    from onnx import helper

    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def constant_array(proto: Any, name: str) -> Array | None:
    """The value of an initialiser, None where the tensor is computed."""
    from onnx import numpy_helper

    found = next((t for t in proto.graph.initializer if t.name == name), None)
    return None if found is None else np.asarray(numpy_helper.to_array(found))


def node_named(proto: Any, name: str) -> Any:
    """A node by its name."""
    return next(node for node in proto.graph.node if node.name == name)
