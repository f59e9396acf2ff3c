"""Small ONNX graphs written by hand, node by node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]
Shape = Sequence[int | str]


class Graph:
    """Collects nodes and constants; every method that adds a node returns the name of its output."""

    def __init__(self, opset: int = 18, *, half: bool = False) -> None:
        self.opset = opset
        self.kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
        self.dtype = np.float16 if half else np.float32
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.random = np.random.default_rng(0)

    def input(self, name: str, shape: Shape, kind: int | None = None) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind or self.kind, list(shape)))
        return name

    def output(self, name: str, shape: Shape | None = None, kind: int | None = None) -> str:
        self.outputs.append(helper.make_tensor_value_info(name, kind or self.kind, shape))
        return name

    def constant(self, name: str, value: Array) -> str:
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def add(self, op: str, *inputs: str, name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, list(inputs), [f"{name}_out"], name=name, **attributes))
        return f"{name}_out"

    def conv(self, x: str, channels: tuple[int, int], name: str, *, size: int = 3, group: int = 1) -> str:
        into, out = channels
        weight = self.random.standard_normal((out, into // group, size, size)).astype(self.dtype)
        source = self.constant(f"{name}.weight", weight)
        return self.add("Conv", x, source, name=name, pads=[size // 2] * 4, group=group)

    def quantized(self, x: str, name: str, *, scale: float = 0.1, zero: Array | None = None) -> str:
        """x through Q/DQ."""
        scales = self.constant(f"{name}_scale", np.asarray(scale, self.dtype))
        zeros = self.constant(f"{name}_zero", np.zeros((), np.int8) if zero is None else zero)
        quantised = self.add("QuantizeLinear", x, scales, zeros, name=f"{name}_QuantizeLinear")
        return self.add("DequantizeLinear", quantised, scales, zeros, name=f"{name}_DequantizeLinear")

    def conv_int8(self, x: str, channels: tuple[int, int], name: str) -> str:
        """A convolution of what comes out of Q/DQ, with its weights through Q/DQ."""
        into, out = channels
        weight = self.random.standard_normal((out, into, 3, 3)).astype(self.dtype)
        source = self.quantized(self.constant(f"{name}.weight", weight), f"{name}.weight")
        return self.add("Conv", x, source, name=name, pads=[1, 1, 1, 1])

    def proto(self) -> Any:
        graph = helper.make_graph(self.nodes, "graph", self.inputs, self.outputs, self.constants)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=9)
        made = onnx.shape_inference.infer_shapes(made)  # fills in the shapes of outputs
        onnx.checker.check_model(made)
        del made.graph.value_info[:]
        return made

    def save(self, path: Path) -> Path:
        onnx.save(self.proto(), path)
        return path


def values(shapes: Mapping[str, Sequence[int]], seed: int = 0) -> dict[str, Array]:
    """Normal noise by name."""
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
