"""Small graphs with Q/DQ, made by hand: two branches, a residual, a concatenation, two heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from fusepress.calib.qdq import QdqGraph
from fusepress.calib.quantize import Draft
from fusepress.calib.ranges import measure_ranges

SIZE = 6


class Graph:
    """Collects nodes and constants of a float or a Q/DQ graph."""

    def __init__(self, seed: int = 0) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.random = np.random.default_rng(seed)

    def constant(self, name: str, value: Any) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=f"{output}/{op}", **attributes))
        return output

    def pair(self, tensor: str, scale: Any, axis: int | None = None, tag: str = "") -> str:
        """Quantise a tensor and back."""
        base = f"{tensor}{tag}"
        step = self.constant(f"{base}_scale", np.asarray(scale, np.float32))
        zero = self.constant(f"{base}_zero", np.zeros_like(np.asarray(scale), dtype=np.int8))
        attributes = {} if axis is None else {"axis": axis}
        self.node("QuantizeLinear", [tensor, step, zero], f"{base}_q", **attributes)
        return self.node("DequantizeLinear", [f"{base}_q", step, zero], f"{base}_dq", **attributes)

    def conv(
        self, tensor: str, output: str, inputs: int, outputs: int, *, quantised: bool = True, gains: Any = 1.0
    ) -> str:
        """A 3x3 convolution; `gains` broadcasts to its weights (O, I, 1, 1)."""
        weight = self.random.normal(size=(outputs, inputs, 3, 3)) / np.sqrt(9 * inputs)
        weight = (weight * np.asarray(gains)).astype(np.float32)
        name = self.constant(f"{output}.weight", weight)
        if quantised:
            name = self.pair(name, np.abs(weight).reshape(outputs, -1).max(axis=1) / 127, axis=0)
        return self.node("Conv", [tensor, name], output, pads=[1, 1, 1, 1])

    def model(self, inputs: dict[str, int], outputs: dict[str, int], opset: int = 18) -> Any:
        def values(named: dict[str, int]) -> list[Any]:
            return [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, channels, SIZE, SIZE])
                for name, channels in named.items()
            ]

        graph = helper.make_graph(self.nodes, "g", values(inputs), values(outputs), self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def fusion(lidar_gain: float = 1.0) -> Any:
    """camera: conv, conv, residual; lidar: conv; both concatenated, quantised and convolved.

    Args:
        lidar_gain: LiDAR features are so many times larger, and their fusing weights smaller: the same network.
    """
    g = Graph()
    image, points = g.pair("image", 0.03), g.pair("points", 0.03)
    camera = g.node("Relu", [g.conv(image, "camera.a", 3, 8)], "camera_a")
    inner = g.conv(g.pair(camera, 0.02), "camera.b", 8, 8)
    summed = g.node("Add", [inner, g.pair(camera, 0.02, tag="_res")], "camera_sum")
    lidar = g.node("Relu", [g.conv(points, "lidar.a", 2, 8, gains=lidar_gain)], "lidar_a")
    both = g.node("Concat", [g.pair(summed, 0.04), g.pair(lidar, 0.01)], "both", axis=1)
    gains_1I11 = np.repeat([1.0, 1.0 / lidar_gain], 8).reshape(1, 16, 1, 1)
    fused = g.node("Relu", [g.conv(g.pair(both, 0.05), "fuser", 16, 8, gains=gains_1I11)], "fused")
    g.conv(g.pair(fused, 0.02), "head", 8, 4)
    return g.model({"image": 3, "points": 2}, {"head": 4})


def drafted(folder: Path, lidar_gain: float = 1.0, samples: int = 8) -> Draft:
    """The network with Q/DQ everywhere, ranges measured on `feeds(samples)`, by max."""
    proto, floating = fusion(lidar_gain), fusion(lidar_gain)
    QdqGraph(floating).spare(QdqGraph(floating).units())
    path = folder / "float.onnx"
    path.write_bytes(floating.SerializeToString())
    ranges = measure_ranges(path, QdqGraph(proto).activations(), feeds(samples))
    draft = Draft(
        source=path,
        float_proto=floating,
        proto=proto,
        method="max",
        samples=samples,
        ranges=ranges,
        excluded=frozenset(),
    )
    return draft.with_method("max")


def feeds(count: int, seed: int = 1) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return {
        "image": random.normal(size=(count, 3, SIZE, SIZE)).astype(np.float32),
        "points": random.normal(size=(count, 2, SIZE, SIZE)).astype(np.float32),
    }
