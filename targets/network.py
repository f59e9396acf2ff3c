"""An ONNX graph as the list of kernels that an inference engine would run: shapes and types only, no weights.

Fusion follows what TensorRT does in the common cases: a convolution or matrix product takes the elementwise operations
behind it (bias, normalisation, activation, residual addition, quantisation) into its own kernel; a chain of elementwise
operations is one kernel; reshapes and constants cost nothing; dequantisation is part of the reader. A concatenation is
written in place by producers that nobody else reads, and copied to from the others: layer lists of TensorRT 10 engines
of YOLO networks show these copies ("... copy") beside "Conv + PWN(...)" for fused activations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fusepress.pipeline.errors import TargetError

Kind = Literal["gemm", "depthwise", "elementwise", "move", "gather"]

# fmt: off
FREE = frozenset([
    "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Dropout", "Concat", "Constant", "ConstantOfShape",
    "Shape", "Size", "Cast", "Range",
])
ELEMENTWISE = frozenset([
    "Abs", "Add", "And", "BatchNormalization", "BitShift", "Ceil", "Celu", "Clip", "Cos", "CumSum", "Div", "Elu",
    "Equal", "Erf", "Exp", "Expand", "Floor", "Gelu", "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish", "IsInf",
    "IsNaN", "LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Mean", "Min", "Mish", "Mod", "Mul", "Neg", "Not", "Or",
    "PRelu", "Pow", "QuantizeLinear", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus",
    "Softsign", "Sqrt", "Sub", "Sum", "Swish", "Tan", "Tanh", "ThresholdedRelu", "Where", "Xor",
])
GEMM = frozenset(["Conv", "ConvTranspose", "Gemm", "MatMul"])
GATHER = frozenset([
    "Gather", "GatherElements", "GatherND", "GridSample", "ScatterElements", "ScatterND", "TopK", "NonMaxSuppression",
    "RoiAlign", "NonZero",
])
# activations that need exponentials or divisions: they cost time in an epilogue, and TensorRT fuses them in FP16 and
# INT8 only. Layer lists of FP32 engines show them as kernels of their own.
SMOOTH = frozenset([
    "Celu", "Elu", "Erf", "Exp", "Gelu", "Log", "Mish", "Pow", "Reciprocal", "Selu", "Sigmoid", "Softplus", "Softsign",
    "Sqrt", "Swish", "Tanh",
])
# fmt: on
VIEWS = frozenset(["Slice", "Split", "Transpose"])
VIEW_CHAIN = frozenset(["Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"])
STRIPPED_BYTES = 1 << 16
# ONNX element types: float, float16, double, bfloat16, and the four 8-bit floats
FLOAT_TYPES = frozenset([1, 10, 11, 16, 17, 18, 19, 20])
HALF_TYPES = frozenset([10, 16])
BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16} | dict.fromkeys(
    range(17, 21), 8
)


@dataclass(slots=True, kw_only=True)
class Tensor:
    """A tensor between kernels: its element count, its shape and type in the graph and who reads it."""

    elements: int
    shape: tuple[int, ...] = ()
    bits: int
    is_float: bool
    readers: set[int] = field(default_factory=set)
    writer: int | None = None


@dataclass(slots=True, kw_only=True)
class Kernel:
    """One fused kernel.

    Attributes:
        op: operator of its first node.
        rows, columns, depth, groups: the matrix product [rows, depth] x [depth, columns], `groups` times.
        channels_in, window: depth = channels_in x window, since padding concerns channels only.
        macs: multiply-accumulates without padding.
        weights: number of constant weights that it reads.
        quantized: whether its operands come from DequantizeLinear.
        half: whether its operands are FP16 in the graph.
        smooth: whether a matrix kernel has an activation behind it that needs exponentials (SiLU, GELU).
    """

    name: str
    op: str
    kind: Kind
    outputs: int
    rows: int = 0
    columns: int = 0
    channels_in: int = 0
    window: int = 1
    groups: int = 1
    macs: int = 0
    weights: int = 0
    quantized: bool = False
    half: bool = False
    smooth: bool = False
    reads: list[str] = field(default_factory=list)
    writes: list[str] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class Network:
    """Kernels in running order, the tensors between them, and whether the graph itself carries precision.

    Attributes:
        parts: of every tensor that is a concatenation, the tensors that were written into it.
    """

    kernels: list[Kernel]
    tensors: dict[str, Tensor]
    inputs: list[str]
    outputs: list[str]
    typed: bool
    unknown_shapes: int
    parts: dict[str, list[str]] = field(default_factory=dict)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one inference, without padding."""
        return sum(kernel.macs for kernel in self.kernels)


def read_network(source: str | Path | bytes) -> Network:
    """Read an ONNX file or its bytes; weights may be missing.

    Raises:
        TargetError: it is not ONNX, or its input shapes are not fixed.
    """
    import onnx

    where = "the given bytes" if isinstance(source, bytes) else str(source)
    try:
        if isinstance(source, bytes):
            model = onnx.load_from_string(source)
        else:
            model = onnx.load(str(source), load_external_data=False)
    except FileNotFoundError as error:
        raise TargetError(f"expected an ONNX file; got none at {where}; give its path") from error
    except Exception as error:
        raise TargetError(f"expected an ONNX file; got something else at {where} ({error}); export it again") from error
    if not model.graph.node:
        raise TargetError(f"expected an ONNX graph with nodes; got an empty one at {where}; export it again")
    _check_inputs(model, where)
    _drop_weights(model)
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    return _Reader(inferred).network()


def _check_inputs(model: Any, where: str) -> None:
    initializers = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.input:
        if value.name in initializers:
            continue
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if not dim.HasField("dim_value") or dim.dim_value <= 0:
                got = dim.dim_param or "an unknown size"
                raise TargetError(
                    f"expected fixed input shapes; got {got!r} for axis {axis} of input {value.name!r} at {where}; "
                    "export with fixed shapes, batch 1"
                )


def _drop_weights(model: Any) -> None:
    """Empty large initialisers in place: shape inference copies the model, and only needs small integer ones."""
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) > STRIPPED_BYTES:
            tensor.raw_data = b""


class _Reader:
    """Walks the graph once, in topological order, which ONNX guarantees."""

    def __init__(self, model: Any) -> None:
        self.graph = model.graph
        self.kernels: list[Kernel] = []
        self.tensors: dict[str, Tensor] = {}
        self.shape: dict[str, tuple[int, ...]] = {}
        self.half: set[str] = set()
        self.alias: dict[str, str] = {}
        self.constant: dict[str, int] = {}
        self.dequantized: set[str] = set()
        self.owner: dict[str, int] = {}
        self.escapes: set[str] = set()
        self.readers: dict[str, list[Any]] = {value.name: [None] for value in self.graph.output}
        for node in self.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.parts: dict[str, list[str]] = {}
        self.typed = False
        self.unknown = 0
        for tensor in self.graph.initializer:
            self.constant[tensor.name] = math.prod(tensor.dims)
            self.shape[tensor.name] = tuple(tensor.dims)
        for value in (*self.graph.input, *self.graph.value_info, *self.graph.output):
            self._note(value)

    def _note(self, value: Any) -> None:
        kind = value.type.tensor_type
        dims = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim)
        if not kind.HasField("shape") or any(size < 0 for size in dims):
            return
        self.shape[value.name] = dims
        if kind.elem_type in HALF_TYPES:
            self.half.add(value.name)
        self.tensors[value.name] = Tensor(
            elements=math.prod(dims),
            shape=dims,
            bits=BITS.get(kind.elem_type, 32),
            is_float=kind.elem_type in FLOAT_TYPES,
        )

    def network(self) -> Network:
        inputs = [value.name for value in self.graph.input if value.name not in self.constant]
        for node in self.graph.node:
            self._visit(node)
        outputs = [self._root(value.name) for value in self.graph.output]
        self._connect({*outputs, *self.escapes})
        used = {name for kernel in self.kernels for name in (*kernel.reads, *kernel.writes)}
        return Network(
            kernels=self.kernels,
            tensors={name: self.tensors[name] for name in used},
            inputs=[name for name in inputs if name in used],
            outputs=outputs,
            typed=self.typed or bool(self.half),
            unknown_shapes=self.unknown,
            parts=self.parts,
        )

    def _connect(self, kept: set[str]) -> None:
        """Leave in each kernel only what it reads from others and what others, or the caller, read from it."""
        for index, kernel in enumerate(self.kernels):
            names = dict.fromkeys(kernel.reads)
            kernel.reads = [name for name in names if self.owner.get(name) != index and name in self.tensors]
            for name in kernel.reads:
                self.tensors[name].readers.add(index)
        for name, index in self.owner.items():
            if name in self.tensors and (name in kept or self.tensors[name].readers):
                self.kernels[index].writes.append(name)
                self.tensors[name].writer = index

    def _root(self, name: str) -> str:
        while name in self.alias:
            name = self.alias[name]
        return name

    def _visit(self, node: Any) -> None:
        names = [name for name in node.input if name]
        live = [name for name in names if name not in self.constant]
        if node.op_type in ("Shape", "Size") or not live:
            self._fold(node, names)
        elif node.op_type == "DequantizeLinear":
            self.typed = True
            self.dequantized.add(node.output[0])
            self.alias[node.output[0]] = live[0]
        elif node.op_type == "Concat":
            self._concatenate(node, live)
            self.dequantized.update(node.output if all(name in self.dequantized for name in live) else ())
        elif node.op_type in VIEWS and self._is_view(node):
            self._view(node, live[0])
        elif node.op_type in FREE:
            self.alias[node.output[0]] = live[0]
            self.dequantized.update(node.output if live[0] in self.dequantized else ())
        elif node.op_type in ELEMENTWISE:
            self._elementwise(node, live)
        else:
            self._start(node, live)

    def _is_view(self, node: Any) -> bool:
        """Whether all that read its outputs take them with strides: products, and arithmetic behind a slice."""
        takes = {"MatMul"} if node.op_type == "Transpose" else {"MatMul", *ELEMENTWISE}
        waiting, found = list(node.output), False
        while waiting:
            for reader in self.readers.get(waiting.pop(), ()):
                if reader is None or not (reader.op_type in takes or reader.op_type in VIEW_CHAIN):
                    return False
                found |= reader.op_type in takes
                waiting += reader.output if reader.op_type in VIEW_CHAIN else ()
        return found

    def _view(self, node: Any, name: str) -> None:
        """Readers read what they need of the tensor behind it."""
        root = self._root(name)
        if node.op_type == "Transpose":
            self.alias[node.output[0]] = root
            return
        self.escapes.add(root)
        for part in filter(None, node.output):
            self.parts[part] = [root]
            self.unknown += part not in self.tensors

    def _concatenate(self, node: Any, live: list[str]) -> None:
        """Readers read the whole. A part that is read elsewhere, too, or comes from outside, is copied into it."""
        written = self.parts.setdefault(node.output[0], [])
        for name in live:
            root = self._root(name)
            self.escapes.add(root)
            written.append(root)
            alone = len(self.readers[name]) == 1 and len(self.readers.get(root, ())) <= 1
            if (alone and root in self.owner) or root not in self.tensors:
                continue
            index = len(self.kernels)
            part = f"{root} in {node.output[0]} ({index})"
            tensor = self.tensors[root]
            self.tensors[part] = Tensor(
                elements=tensor.elements, shape=tensor.shape, bits=tensor.bits, is_float=tensor.is_float
            )
            self.owner[part] = index
            self.escapes.add(part)
            written[-1] = part
            self.kernels.append(
                Kernel(
                    name=f"{node.name or node.output[0]} copy of {root}",
                    op="Concat",
                    kind="move",
                    outputs=tensor.elements,
                    reads=[root],
                    half=name in self.half,
                )
            )

    def _fold(self, node: Any, names: list[str]) -> None:
        """Computed when the engine is built. A dequantised weight stays INT8."""
        size = self.constant.get(names[0], 0) if names else 0
        for name in node.output:
            self.constant[name] = size
        if node.op_type == "DequantizeLinear":
            self.typed = True
            self.dequantized.update(node.output)
        if (
            names
            and names[0] in self.shape
            and node.op_type in ("DequantizeLinear", "QuantizeLinear", "Cast", "Identity")
        ):
            self.shape.setdefault(node.output[0], self.shape[names[0]])

    def _elements(self, name: str) -> int:
        shape = self.shape.get(name)
        if shape is None:
            self.unknown += 1
            return 0
        return math.prod(shape)

    def _elementwise(self, node: Any, live: list[str]) -> None:
        self.typed = self.typed or node.op_type == "QuantizeLinear"
        elements = self._elements(node.output[0])
        owners = [self.owner[root] for root in map(self._root, live) if root in self.owner]
        if owners:
            kernel = self.kernels[max(owners)]
            if kernel.kind != "gather" and kernel.outputs >= elements:
                kernel.reads += map(self._root, live)
                kernel.smooth |= node.op_type in SMOOTH and kernel.kind in ("gemm", "depthwise")
                self._own(node, max(owners))
                return
        self._start(node, live)

    def _own(self, node: Any, index: int) -> None:
        for name in node.output:
            if name:
                self.owner[name] = index

    def _start(self, node: Any, live: list[str]) -> None:
        op = node.op_type
        kind: Kind = "gather" if op in GATHER else "elementwise" if op in ELEMENTWISE else "move"
        kernel = Kernel(
            name=node.name or f"{op}_{len(self.kernels)}",
            op=op,
            kind=kind,
            outputs=max((self._elements(name) for name in node.output if name), default=0),
            reads=[self._root(name) for name in live],
            half=live[0] in self.half,
        )
        if op in GEMM:
            self._matrix(node, live, kernel)
        self.kernels.append(kernel)
        self._own(node, len(self.kernels) - 1)

    def _matrix(self, node: Any, live: list[str], kernel: Kernel) -> None:
        operands = node.input[:2]
        shapes = [self.shape.get(name) for name in operands]
        out = self.shape.get(node.output[0])
        kernel.weights = sum(self.constant.get(name, 0) for name in node.input[1:])
        if out is None or shapes[0] is None or shapes[1] is None or any(not shape for shape in shapes):
            self.unknown += 1
            return
        kernel.kind = "gemm"
        kernel.quantized = all(name in self.dequantized for name in operands)
        if node.op_type in ("Conv", "ConvTranspose"):
            _convolution(node, kernel, shapes[0], shapes[1], out)
        else:
            _product(node, kernel, shapes[0], shapes[1], out, constant=operands[1] in self.constant)
        kernel.macs = kernel.groups * kernel.rows * kernel.columns * kernel.channels_in * kernel.window


def _attribute(node: Any, name: str, default: int) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), default)


def _convolution(node: Any, kernel: Kernel, x: tuple[int, ...], weight: tuple[int, ...], out: tuple[int, ...]) -> None:
    """Implicit GEMM: pixels x output channels, over input channels x window. A transposed one scatters its input."""
    groups = max(1, _attribute(node, "group", 1))
    forward = node.op_type == "Conv"
    window, spatial = math.prod(weight[2:]), math.prod((out if forward else x)[2:])
    kernel.groups = groups
    kernel.rows = x[0] * spatial
    if forward:
        kernel.channels_in, kernel.window, kernel.columns = weight[1], window, weight[0] // groups
    else:
        kernel.channels_in, kernel.window, kernel.columns = weight[0] // groups, 1, weight[1] * window
    if groups > 1 and min(kernel.channels_in, kernel.columns) < 8:
        kernel.kind = "depthwise"


def _product(
    node: Any, kernel: Kernel, a: tuple[int, ...], b: tuple[int, ...], out: tuple[int, ...], *, constant: bool
) -> None:
    depth = a[-2] if node.op_type == "Gemm" and _attribute(node, "transA", 0) else a[-1]
    kernel.channels_in = depth
    kernel.columns = out[-1] if len(b) > 1 else 1
    rows = math.prod(out) // max(1, kernel.columns)
    if constant or len(out) < 3:
        kernel.rows = rows
    else:
        kernel.groups = math.prod(out[:-2])
        kernel.rows = rows // max(1, kernel.groups)
