"""Where a builder cannot join kernels: precision borders, and activations cut off from their convolution.

Both are looked for in the builder's own list of layers where there is one, and in the ONNX graph where there is none.
What a fused kernel takes in: TensorRT developer guide, "Types of fusions"; residual adds in INT8 want Q/DQ on both
operands (the guide's Q/DQ placement recommendations).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fusepress.export.inspector import EngineLayer
from fusepress.export.wiring import QDQ, Wiring

Kind = Literal["reformat", "broken fusion"]
ACTIVATIONS = frozenset(
    [
        "Relu",
        "LeakyRelu",
        "Clip",
        "Sigmoid",
        "HardSigmoid",
        "HardSwish",
        "Tanh",
        "Elu",
        "Selu",
        "Gelu",
        "Swish",
        "PRelu",
    ]
)
PRODUCTS = frozenset(["Conv", "ConvTranspose", "Gemm", "MatMul"])
LAYOUT = frozenset(["Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten"])
CONVERSIONS = QDQ | {"Cast"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Seam:
    """A kernel of its own that moves one tensor.

    Attributes:
        node: where it is (an ONNX node, or the engine's layer where no node is known).
        tensor: what it reads; "" where it is not known.
        what: one sentence.
        layer: the engine's layer; "" where only the graph was read.
        chosen: the graph lets the two fuse, and the builder did not.
        mended_by: name of the pass in export/hygiene that takes the cause out of the file; "" where there is none.
    """

    kind: Kind
    node: str
    tensor: str
    what: str
    layer: str = ""
    chosen: bool = False
    mended_by: str = ""


def graph_seams(wiring: Wiring) -> list[Seam]:
    """Seams that the graph itself makes, in its order."""
    return [seam for node in wiring.nodes for seam in _seams_at(node, wiring)]


def _seams_at(node: Any, wiring: Wiring) -> Iterator[Seam]:
    match node.op_type:
        case "QuantizeLinear" if node.input[0] not in wiring.fixed and not _fuses_behind(node.input[0], wiring):
            what = "is quantised by a kernel of its own: nothing before it computes on the tensor"
            yield Seam(kind="reformat", node=node.name, tensor=node.input[0], what=f"{node.input[0]} {what}")
        case "Cast" if _converts_inside(node, wiring):
            yield Seam(
                kind="reformat",
                node=node.name,
                tensor=node.input[0],
                what=f"{node.input[0]} changes its floating-point type between two layers",
            )
        case op if op in ACTIVATIONS:
            why = _cut_off(node, wiring)
            if why:
                mended_by = "qdq" if op == "Relu" and _behind_qdq(node, wiring) else ""
                yield Seam(kind="broken fusion", node=node.name, tensor=node.input[0], what=why, mended_by=mended_by)
        case "Add":
            why = _half_quantised(node, wiring)
            if why:
                yield Seam(kind="broken fusion", node=node.name, tensor=node.output[0], what=why)
        case "BatchNormalization":
            source = wiring.producer.get(node.input[0])
            if source is None or source.op_type not in PRODUCTS or wiring.reads_of(node.input[0]) > 1:
                what = "a normalisation that no convolution before it can take in"
                yield Seam(kind="broken fusion", node=node.name, tensor=node.input[0], what=what)


def _fuses_behind(tensor: str, wiring: Wiring) -> bool:
    """Whether a kernel that computes on the tensor can write it quantised; layout and concatenation pass it on."""
    node = wiring.producer.get(tensor)
    while node is not None and (node.op_type in LAYOUT or node.op_type in ("Concat", "Cast")):
        node = wiring.producer.get(node.input[0])
    if node is None:
        return False
    return node.op_type not in ("GridSample", "ScatterND", "ScatterElements", "Gather", "Slice", "Split", "Resize")


def _converts_inside(node: Any, wiring: Wiring) -> bool:
    source, result = node.input[0], node.output[0]
    if source in wiring.fixed or source in wiring.inputs or result in wiring.outputs:
        return False
    return wiring.is_float(source) and wiring.is_float(result) and wiring.types[source] != wiring.types[result]


def _behind_qdq(node: Any, wiring: Wiring) -> bool:
    source = wiring.producer.get(node.input[0])
    return source is not None and source.op_type == "DequantizeLinear"


def _cut_off(node: Any, wiring: Wiring) -> str:
    """Why an activation cannot join the product whose result it is applied to; "" where it can, or is not."""
    source = wiring.producer.get(node.input[0])
    if source is None:
        return ""
    product = wiring.behind_qdq(node.input[0])
    if source.op_type == "DequantizeLinear" and product is not None and product.op_type in PRODUCTS:
        return f"Q/DQ stand between {product.name} and its activation {node.name}"
    if source.op_type in LAYOUT:
        before = wiring.producer.get(source.input[0])
        if before is not None and before.op_type in PRODUCTS:
            return f"{source.op_type} stands between {before.name} and its activation {node.name}"
    gated = {reader.name for reader in wiring.readers.get(node.output[0], ()) if node.input[0] in reader.input}
    others = [reader for reader in wiring.readers.get(node.input[0], ()) if reader.name not in {node.name, *gated}]
    if source.op_type in PRODUCTS and (others or node.input[0] in wiring.outputs):
        read_by = others[0].name if others else "the caller"
        return f"{read_by} reads what {source.name} writes before its activation {node.name}"
    return ""


def _half_quantised(node: Any, wiring: Wiring) -> str:
    """An INT8 convolution whose residual comes in floating point: the addition is a kernel of its own."""
    sources = [wiring.producer.get(name) for name in node.input]
    products = [s for s in sources if s is not None and s.op_type in PRODUCTS and _quantised(s, wiring)]
    others = [s for s in sources if s is not None and s not in products]
    if len(products) != 1 or len(others) != 1 or others[0].op_type == "DequantizeLinear":
        return ""
    return f"{products[0].name} is INT8, and what {node.name} adds to it comes in floating point from {others[0].name}"


def _quantised(node: Any, wiring: Wiring) -> bool:
    sources = [wiring.producer.get(name) for name in node.input[:2]]
    return all(s is not None and s.op_type == "DequantizeLinear" for s in sources)


# --- from the builder's own list -------------------------------------------------------------------------------------


def engine_seams(layers: Sequence[EngineLayer], wiring: Wiring) -> list[Seam]:
    """Seams of an engine as it was built, in running order."""
    by_name = {node.name: node for node in wiring.nodes}
    computed = {
        name: layer for layer in layers if layer.computes for name in layer.nodes if _is(by_name, name, PRODUCTS)
    }
    found = [
        Seam(kind="reformat", node=node, tensor=tensor, layer=layer.name, what=_reformat_words(layer, tensor))
        for layer in layers
        if (place := _reformatted(layer, by_name, computed, wiring)) is not None
        for node, tensor in [place]
    ]
    holder = {name: layer for layer in layers for name in layer.nodes if _is(by_name, name, ACTIVATIONS)}
    for name, layer in holder.items():
        node = by_name[name]
        product = wiring.behind_qdq(node.input[0])
        if product is None or wiring.reads_of(product.output[0]) > 1:
            continue
        own = computed.get(product.name)
        if own is not None and own.name != layer.name and name not in own.nodes:
            why = _cut_off(node, wiring)
            what = f"the builder runs {name} apart from {product.name}" + (f": {why}" if why else "")
            found.append(
                Seam(
                    kind="broken fusion",
                    node=name,
                    tensor=product.output[0],
                    layer=layer.name,
                    what=what,
                    chosen=not why,
                    mended_by="qdq" if why and node.op_type == "Relu" and _behind_qdq(node, wiring) else "",
                )
            )
    return found


def _is(by_name: dict[str, Any], name: str, kinds: frozenset[str]) -> bool:
    return name in by_name and by_name[name].op_type in kinds


def _reformatted(
    layer: EngineLayer, by_name: dict[str, Any], computed: dict[str, EngineLayer], wiring: Wiring
) -> tuple[str, str] | None:
    """(node, tensor) where a layer only moves a tensor, else None."""
    if layer.reformats:
        # "Reformatting CopyNode for Input Tensor 0 to head/Conv + head/Relu"
        target = layer.name.rpartition(" to ")[2].partition(" + ")[0]
        node = by_name.get(target)
        return (target, node.input[0]) if node is not None else (layer.name, "")
    if layer.computes or not layer.nodes or not all(name in by_name for name in layer.nodes):
        return None
    # a layer lists the products that its scales belong to as well; those are computed elsewhere
    own = [by_name[name] for name in layer.nodes if name not in computed]
    conversions = [node for node in own if node.op_type in CONVERSIONS]
    if not conversions or len(conversions) < len(own):
        return None
    first = conversions[0]
    source = wiring.behind_qdq(first.input[0])
    if source is not None and source.name in layer.nodes:  # scales and bias of that product: it runs anyway
        return None
    return str(first.name), str(first.input[0])


def _reformat_words(layer: EngineLayer, tensor: str) -> str:
    change = " to ".join(dict.fromkeys([*layer.inputs[:1], *layer.outputs[:1]]))
    return f"a layer of its own moves {tensor or 'a tensor'}" + (f" ({change})" if change else "")
