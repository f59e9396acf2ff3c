"""Q/DQ graphs: which layers they cover, and edits that leave a valid graph.

A pair is a QuantizeLinear and the DequantizeLinear behind it. A layer with weights is quantised where both its inputs
come out of a pair. Pairs in front of other nodes (a residual Add, a Resize between two layers) are there for a layer's
sake: they are spared with the layer whose output they carry.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from fusepress.pipeline.graph.placement import GRID_MAX, LEAST_STEP, Grid

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
MERGES = ("Concat", "Add", "Sum", "Max", "Min")  # TensorRT merges without rescaling where the scales are equal


class QdqGraph:
    """Lookups in a graph with Q/DQ; edits go to the same proto.

    Args:
        proto: the model, changed in place by the methods that say so.

    Attributes:
        producer: tensor -> the node that makes it.
        weights: initializers by name.
        scales: quantised tensor -> names of the scales of its pairs, of Q and of DQ.
    """

    def __init__(self, proto: Any) -> None:
        self.proto = proto
        self._index()

    @property
    def grid(self) -> Grid:
        """What its pairs round to."""
        from onnx import TensorProto

        pairs = [n for n in self.proto.graph.node if n.op_type == "QuantizeLinear" and len(n.input) > 2]
        kinds = {self.weights[n.input[2]].data_type for n in pairs}  # of the zero points
        return "fp8" if TensorProto.FLOAT8E4M3FN in kinds else "int8"

    def _index(self) -> None:
        self.producer = {output: node for node in self.proto.graph.node for output in node.output}
        self.weights = {tensor.name: tensor for tensor in self.proto.graph.initializer}
        back: dict[str, list[str]] = {}
        for node in self.proto.graph.node:
            if node.op_type == "DequantizeLinear":
                back.setdefault(node.input[0], []).append(str(node.input[1]))
        self.scales: dict[str, list[str]] = {}
        for node in self.proto.graph.node:
            if node.op_type == "QuantizeLinear":
                found = self.scales.setdefault(str(node.input[0]), [])
                found += [str(node.input[1]), *back.get(node.output[0], [])]

    def source(self, tensor: str) -> str | None:
        """What a pair takes in, given the tensor that comes out of it; None where no pair makes it."""
        node = self.producer.get(tensor)
        if node is None or node.op_type != "DequantizeLinear":
            return None
        before = self.producer.get(node.input[0])
        return str(before.input[0]) if before is not None and before.op_type == "QuantizeLinear" else None

    def layers(self) -> list[str]:
        """Names of the layers that compute on quantised numbers, in the graph's order."""
        return [node.name for node in self.proto.graph.node if self.quantised(node)]

    def activations(self) -> list[str]:
        """Tensors that a pair quantises, weights left out, in the graph's order."""
        found = [str(n.input[0]) for n in self.proto.graph.node if n.op_type == "QuantizeLinear"]
        return list(dict.fromkeys(name for name in found if name not in self.weights))

    def units(self) -> dict[str, list[str]]:
        """What can be spared alone: a layer, or a node that no layer feeds -> nodes that lose their pairs with it."""
        layers = set(self.layers())
        found: dict[str, list[str]] = {name: [name] for name in self.layers()}
        for node in self.proto.graph.node:
            if node.name in layers or not any(self.source(tensor) is not None for tensor in node.input):
                continue
            owner = next(
                (o for tensor in node.input if (o := self._layer_before(tensor, layers)) is not None), node.name
            )
            found.setdefault(owner, []).append(node.name)
        return found

    def spare(self, units: Collection[str]) -> None:
        """Take the pairs away that these units compute on, in place; nothing else changes.

        Args:
            units: keys of `units()`.
        """
        known = self.units()
        nodes = {name for unit in units for name in known[unit]}
        for node in self.proto.graph.node:
            if node.name in nodes:
                for index, tensor in enumerate(node.input):
                    source = self.source(tensor)
                    if source is not None:
                        node.input[index] = source
        self._sweep()

    def set_limits(self, limits: Mapping[str, float]) -> None:
        """Write the largest magnitude of quantised activations into their pairs' scales, in place.

        Where pairs of several tensors name one scale, the largest limit counts.
        """
        self.set_scales({tensor: limit / GRID_MAX[self.grid] for tensor, limit in limits.items()})

    def set_scales(self, scales: Mapping[str, float]) -> None:
        """Write the scales of quantised activations, in place; as `set_limits`."""
        by_name: dict[str, float] = {}
        for tensor, scale in scales.items():
            for name in self.scales.get(tensor, ()):
                by_name[name] = max(by_name.get(name, 0.0), scale)
        for name, scale in by_name.items():
            self._set_scale(name, scale)

    def fill_grid(self) -> None:
        """Scale weights such that their largest magnitude becomes the grid's, in place.

        Modelopt's FP8 leaves them, as activations, INT8's scale times 448 / 127: the largest becomes 36, not 448, and
        what is small comes close to where E4M3 has no more digits.
        """
        from onnx import numpy_helper

        for node in self.proto.graph.node:
            if node.op_type != "QuantizeLinear" or node.input[0] not in self.weights:
                continue
            weight, old = self.constant(node.input[0]), self.constant(node.input[1])
            axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
            others = tuple(d for d in range(weight.ndim) if old.size == 1 or d != axis % weight.ndim)
            scale = np.abs(weight).max(axis=others).reshape(old.shape).astype(old.dtype) / np.float32(
                GRID_MAX[self.grid]
            )
            scale = np.where(scale > 0, scale, np.float32(1.0)).astype(old.dtype)  # zeros stay zeros by any scale
            self.weights[node.input[1]].CopyFrom(numpy_helper.from_array(scale, node.input[1]))

    def scale_groups(self) -> list[list[str]]:
        """All quantised activations, those together that have one scale: by its name, or because a node merges them."""
        named: dict[str, list[str]] = {}
        for tensor in self.activations():
            named.setdefault(self.scales[tensor][0], []).append(tensor)
        return _joined([*(self.merged(node) for node in self.proto.graph.node), *named.values()])

    def scale(self, tensor: str) -> float:
        """The scale of a quantised activation."""
        return float(self.constant(self.scales[tensor][0]))

    def floor_scales(self) -> int:
        """Raise scales that FP16 would round to 0, as of a channel that its norm has switched off, in place.

        Returns:
            How many tensors had one; what they hold is quantised to 0.
        """
        from onnx import numpy_helper

        raised = 0
        nodes = [n for n in self.proto.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
        for name in dict.fromkeys(str(node.input[1]) for node in nodes):
            scale = self.constant(name)
            if (scale < LEAST_STEP).any():
                floored = np.maximum(scale, scale.dtype.type(LEAST_STEP))
                self.weights[name].CopyFrom(numpy_helper.from_array(floored, name))
                raised += 1
        return raised

    def share_scales(self) -> list[list[str]]:
        """Give the quantised inputs of each concatenation or addition (and its quantised result) one scale, in place.

        The largest one, so that nothing saturates. TensorRT then merges in INT8 without rescaling either side.

        Returns:
            The groups of tensors that share a scale; groups with a tensor, or the name of a scale, in common are one.
        """
        groups = [group for group in self.scale_groups() if len(group) > 1]
        for group in groups:
            largest = max(self.scale(tensor) for tensor in group)
            self.set_limits(dict.fromkeys(group, largest * GRID_MAX[self.grid]))
        return groups

    def merged(self, node: Any) -> list[str]:
        """Quantised tensors that a node merges; a residual that is added inside a layer's kernel is one alone."""
        if node.op_type not in MERGES:
            return []
        taken = [source for tensor in node.input if (source := self.source(tensor)) is not None]
        if len(set(taken)) < 2:
            return []
        result = [str(node.output[0])] if node.op_type == "Concat" and str(node.output[0]) in self.activations() else []
        return list(dict.fromkeys([*taken, *result]))

    def constant(self, name: str) -> Any:
        """The value of an initializer."""
        from onnx import numpy_helper

        return numpy_helper.to_array(self.weights[name])

    def _set_scale(self, name: str, scale: float) -> None:
        from onnx import numpy_helper

        old = self.constant(name)
        value = np.full_like(old, max(scale, LEAST_STEP))  # a tensor may be 0 on all samples
        self.weights[name].CopyFrom(numpy_helper.from_array(value, name))

    def quantised(self, node: Any) -> bool:
        """Whether a layer computes on quantised numbers."""
        return node.op_type in LAYERS and all(self.source(tensor) is not None for tensor in node.input[:2])

    def _layer_before(self, tensor: str, layers: Collection[str]) -> str | None:
        """The nearest layer whose output reaches a tensor through other nodes."""
        pending, seen = [tensor], set()
        while pending:
            node = self.producer.get(pending.pop(0))
            if node is None or node.name in seen:
                continue
            if node.name in layers:
                return str(node.name)
            seen.add(node.name)
            pending += [str(name) for name in node.input]
        return None

    def _sweep(self) -> None:
        """Remove pairs that nobody reads any more, and constants with them."""
        while True:
            read = _read(self.proto.graph)
            kept = [
                node
                for node in self.proto.graph.node
                if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or set(node.output) & read
            ]
            if len(kept) == len(self.proto.graph.node):
                break
            del self.proto.graph.node[:]
            self.proto.graph.node.extend(kept)
        constants = [tensor for tensor in self.proto.graph.initializer if tensor.name in read]
        del self.proto.graph.initializer[:]
        self.proto.graph.initializer.extend(constants)
        self._index()


def _read(graph: Any) -> set[str]:
    """Tensors that nodes read, those in the bodies of conditions and loops too, and the graph's outputs."""
    bodies = [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    own = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    return own.union(*(_read(body) for body in bodies))


def _joined(groups: Iterable[list[str]]) -> list[list[str]]:
    """Groups with a tensor in common as one; empty ones are left out."""
    joined: list[list[str]] = []
    for group in filter(None, groups):
        touching = [other for other in joined if set(other) & set(group)]
        joined = [other for other in joined if other not in touching]
        joined.append(list(dict.fromkeys([*(name for other in touching for name in other), *group])))
    return joined


def fold_batchnorm(proto: Any) -> list[str]:
    """Fold batch norms into the convolutions before them, in place: weights must be quantised as they are multiplied.

    Returns:
        Names of the norms that are gone. One whose convolution has other readers, or whose parameters are computed,
        stays.
    """
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    readers: dict[str, int] = {}
    for name in (*(i for n in proto.graph.node for i in n.input), *(v.name for v in proto.graph.output)):
        readers[name] = readers.get(name, 0) + 1
    convolutions = {node.output[0]: node for node in proto.graph.node if node.op_type == "Conv"}
    folded = []
    for node in list(proto.graph.node):
        conv = convolutions.get(node.input[0]) if node.op_type == "BatchNormalization" else None
        if conv is None or readers[node.input[0]] > 1 or not {*node.input[1:5], *conv.input[1:]} <= set(constants):
            continue
        gain, offset, mean, variance = (numpy_helper.to_array(constants[name]) for name in node.input[1:5])
        epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
        weight_OIhw = numpy_helper.to_array(constants[conv.input[1]])
        bias_O = numpy_helper.to_array(constants[conv.input[2]]) if len(conv.input) > 2 else np.zeros_like(mean)
        factor_O = gain / np.sqrt(variance + np.float32(epsilon))
        shape = (-1, *[1] * (weight_OIhw.ndim - 1))
        names = [f"{conv.input[1]}_folded_{node.name}", f"{conv.input[1]}_bias_{node.name}"]
        made = (weight_OIhw * factor_O.reshape(shape), offset + (bias_O - mean) * factor_O)
        proto.graph.initializer.extend(numpy_helper.from_array(a, n) for a, n in zip(made, names, strict=True))
        del conv.input[1:]
        conv.input.extend(names)
        conv.output[0] = node.output[0]
        proto.graph.node.remove(node)
        folded.append(str(node.name))
    read = _read(proto.graph)
    kept = [tensor for tensor in proto.graph.initializer if tensor.name in read]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    return folded


def broken_rules(proto: Any) -> list[str]:
    """What of the placement of Q/DQ a TensorRT engine would not run as written, in words; empty for a sound file."""
    graph = QdqGraph(proto)
    found: list[str] = []
    for node in proto.graph.node:
        taken = [source for tensor in node.input if (source := graph.source(tensor)) is not None]
        if node.op_type == "ConvTranspose" and taken:
            found.append(f"{node.name}: a transposed convolution runs in floating point whatever its Q/DQ says")
        before = graph.producer.get(node.input[0]) if node.op_type == "BatchNormalization" else None
        if before is not None and before.op_type == "Conv" and graph.quantised(before):
            found.append(f"{node.name}: a batch norm behind a convolution should be folded before it is quantised")
        if node.op_type == "Conv" and len(taken) == 2 and not _per_channel(graph, node):
            found.append(f"{node.name}: weights need a scale for each output channel")
        merged = graph.merged(node)
        if len({graph.scale(tensor) for tensor in merged}) > 1:
            found.append(f"{node.name}: merged tensors need one scale")
    return found


def _per_channel(graph: QdqGraph, node: Any) -> bool:
    dequantize = graph.producer[node.input[1]]
    axis = next((a.i for a in dequantize.attribute if a.name == "axis"), 1)
    source = graph.source(node.input[1])
    channels = graph.weights[source].dims[0] if source in graph.weights else -1
    return axis == 0 and graph.constant(dequantize.input[1]).reshape(-1).size == channels
