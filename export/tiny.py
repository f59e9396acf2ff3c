"""A tiny camera-LiDAR network as ONNX, with every construct whose fate on a device is asked for: written by hand.

A 2:4 convolution, a transposed one, a scatter of points, a grid sampling, an attention as MatMul and Softmax, a
residual addition, a concatenation. It computes nothing of use; weights are noise from a fixed seed.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

Array = np.ndarray[Any, Any]
Kind = Literal["fp32", "fp16", "int8"]
KINDS: tuple[Kind, ...] = ("fp32", "fp16", "int8")
CHANNELS, SIDE, POINTS = 64, 32, 128
OPSET = 17  # read by TensorRT 8.5 and later


def tiny_model(kind: Kind) -> Any:
    """The network; batch 1, fixed shapes.

    Args:
        kind: fp32; fp16 with inputs and outputs in it; int8 with symmetric Q/DQ around the convolutions, the rest fp32.

    Returns:
        An ONNX model.
    """
    return _Writer(kind).model()


class _Writer:
    def __init__(self, kind: Kind) -> None:
        from onnx import TensorProto

        self.int8 = kind == "int8"
        self.dtype = np.float16 if kind == "fp16" else np.float32
        self.float = TensorProto.FLOAT16 if kind == "fp16" else TensorProto.FLOAT
        self.random = np.random.default_rng(0)
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def model(self) -> Any:
        from onnx import TensorProto, helper

        value = helper.make_tensor_value_info
        inputs = [
            value("image", self.float, [1, 3, SIDE, SIDE]),
            value("points", self.float, [1, POINTS, CHANNELS]),
            value("index", TensorProto.INT64, [1, POINTS]),
        ]
        camera = self._relu(self._conv("image", 3, "camera/stem"), "camera/stem/Relu")
        camera = self._relu(self._conv(camera, CHANNELS, "camera/sparse", sparse=True), "camera/sparse/Relu")
        grid = self.random.uniform(-1, 1, (1, SIDE, SIDE, 2)).astype(self.dtype)
        camera = self._add("GridSample", camera, self._constant("grid", grid), name="camera/GridSample")
        fused = self._add("Concat", camera, self._lidar(), name="fuse/Concat", axis=1)
        fused = self._relu(self._conv(fused, 2 * CHANNELS, "fuse", sparse=True), "fuse/Relu")
        mixed = self._add("Add", self._conv(fused, CHANNELS, "residual"), fused, name="residual/Add")
        half = self._add("MaxPool", mixed, name="pool", kernel_shape=[4, 4], strides=[4, 4])
        outputs = [self._upsample(mixed), self._attention(half)]
        shapes = [[1, CHANNELS, 2 * SIDE, 2 * SIDE], [1, SIDE * SIDE // 16, CHANNELS]]
        graph = helper.make_graph(
            self.nodes,
            "tiny",
            inputs,
            [value(name, self.float, shape) for name, shape in zip(outputs, shapes, strict=True)],
            self.constants,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)

    def _constant(self, name: str, array: Array) -> str:
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def _add(self, op: str, *inputs: str, name: str, **attributes: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(op, list(inputs), [f"{name}_out"], name=name, **attributes))
        return f"{name}_out"

    def _relu(self, x: str, name: str) -> str:
        return self._add("Relu", x, name=name)

    def _quantised(self, x: str, name: str, scale: float) -> str:
        if not self.int8:
            return x
        scales = self._constant(f"{name}_scale", np.asarray(scale, np.float32))
        zeros = self._constant(f"{name}_zero", np.zeros((), np.int8))
        low = self._add("QuantizeLinear", x, scales, zeros, name=f"{name}_QuantizeLinear")
        return self._add("DequantizeLinear", low, scales, zeros, name=f"{name}_DequantizeLinear")

    def _conv(self, x: str, into: int, name: str, *, sparse: bool = False) -> str:
        weight = self.random.standard_normal((CHANNELS, into, 3, 3)) / (3 * into**0.5)
        if sparse:
            weight[:, 0::4] = weight[:, 3::4] = 0
        source = self._constant(f"{name}.weight", weight.astype(self.dtype))
        scale = float(np.abs(weight).max()) / 127
        operands = self._quantised(x, f"{name}/x", 0.05), self._quantised(source, f"{name}/w", scale)
        return self._add("Conv", *operands, name=f"{name}/Conv", pads=[1, 1, 1, 1])

    def _lidar(self) -> str:
        canvas = self._constant("canvas", np.zeros((SIDE * SIDE, CHANNELS), self.dtype))
        places = self._constant("lidar/places", np.asarray([POINTS, 1]))
        features = self._constant("lidar/features", np.asarray([POINTS, CHANNELS]))
        where = self._add("Reshape", "index", places, name="lidar/Reshape_index")
        what = self._add("Reshape", "points", features, name="lidar/Reshape_points")
        written = self._add("ScatterND", canvas, where, what, name="lidar/ScatterND")
        turned = self._add("Transpose", written, name="lidar/Transpose", perm=[1, 0])
        shape = self._constant("lidar/shape", np.asarray([1, CHANNELS, SIDE, SIDE]))
        return self._add("Reshape", turned, shape, name="lidar/Reshape")

    def _upsample(self, x: str) -> str:
        weight = self.random.standard_normal((CHANNELS, CHANNELS, 2, 2)) / CHANNELS**0.5
        source = self._constant("up.weight", weight.astype(self.dtype))
        return self._add("ConvTranspose", x, source, name="up/ConvTranspose", strides=[2, 2])

    def _attention(self, x: str) -> str:
        shape = self._constant("tokens/shape", np.asarray([1, CHANNELS, -1]))
        keys = self._add("Reshape", x, shape, name="tokens/Reshape")
        tokens = self._add("Transpose", keys, name="tokens/Transpose", perm=[0, 2, 1])
        share = self._add("Softmax", self._add("MatMul", tokens, keys, name="scores"), name="share", axis=-1)
        return self._add("MatMul", share, tokens, name="mixed")
