"""Who makes and who reads each tensor of an ONNX graph, with shapes and types."""

from __future__ import annotations

import math
from typing import Any

FLOATS = frozenset([1, 10, 11, 16])  # ONNX element types: float, float16, double, bfloat16
QDQ = frozenset(["QuantizeLinear", "DequantizeLinear"])


class Wiring:
    """Lookups over a model's main graph.

    Attributes:
        producer: tensor -> the node that writes it.
        readers: tensor -> the nodes that read it, in order.
        constants: initialiser -> its tensor.
        fixed: tensors that do not depend on the inputs: initialisers, and what is computed from them alone.
        outputs, inputs: names of the graph's own.
    """

    def __init__(self, proto: Any) -> None:
        import onnx

        known = {v.name for v in proto.graph.value_info}
        complete = all(name in known for node in proto.graph.node for name in node.output[:1])
        typed = proto if complete else onnx.shape_inference.infer_shapes(proto, data_prop=True)
        self.nodes: list[Any] = list(proto.graph.node)
        self.constants: dict[str, Any] = {t.name: t for t in proto.graph.initializer}
        self.producer: dict[str, Any] = {name: node for node in self.nodes for name in node.output if name}
        self.readers: dict[str, list[Any]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                self.readers.setdefault(name, []).append(node)
        self.fixed = {*self.constants, ""}
        for node in self.nodes:  # in topological order, which ONNX guarantees
            if all(name in self.fixed for name in node.input):
                self.fixed.update(node.output)
        self.inputs = [v.name for v in proto.graph.input if v.name not in self.constants]
        self.outputs = [v.name for v in proto.graph.output]
        self.types: dict[str, int] = {t.name: t.data_type for t in proto.graph.initializer}
        self._shapes: dict[str, tuple[int, ...]] = {t.name: tuple(t.dims) for t in proto.graph.initializer}
        for value in (*typed.graph.value_info, *typed.graph.input, *typed.graph.output):
            kind = value.type.tensor_type
            self.types[value.name] = kind.elem_type
            dims = [d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim]
            if kind.HasField("shape") and all(size >= 0 for size in dims):
                self._shapes[value.name] = tuple(dims)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor, None where it is not known or not fixed."""
        return self._shapes.get(name)

    def elements(self, name: str) -> int:
        """Element count, 0 where the shape is not known."""
        shape = self._shapes.get(name)
        return 0 if shape is None else math.prod(shape)

    def is_float(self, name: str) -> bool:
        """Whether a tensor holds floating-point numbers."""
        return self.types.get(name, 0) in FLOATS

    def reads_of(self, name: str) -> int:
        """How many read a tensor: nodes, and the caller where it is an output."""
        return len(self.readers.get(name, ())) + (name in self.outputs)

    def behind_qdq(self, name: str) -> Any | None:
        """The node that made a tensor, looking through QuantizeLinear and DequantizeLinear."""
        node = self.producer.get(name)
        while node is not None and node.op_type in QDQ:
            node = self.producer.get(node.input[0])
        return node
