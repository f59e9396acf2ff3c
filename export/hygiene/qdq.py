"""Q/DQ where builders fuse them: behind activations, and once for each tensor.

Relu and symmetric quantisation commute: with zero point 0, quantising is monotone and keeps 0, so that
max(0, dq(q(x))) = dq(q(max(0, x))). A product followed by Q, DQ and Relu becomes product, Relu, Q and DQ, which is one
kernel. Two Q/DQ pairs with the same scale on one tensor are one; a pair right behind an equal pair changes nothing.
"""

from __future__ import annotations

from typing import Any

from fusepress.export.fusion import PRODUCTS
from fusepress.export.hygiene.edit import Array, attribute, constant_array, set_nodes
from fusepress.export.wiring import QDQ, Wiring


def find(proto: Any) -> list[str]:
    """Relus behind the Q/DQ of a product, and nodes of needless pairs."""
    if not any(node.op_type == "QuantizeLinear" for node in proto.graph.node):
        return []
    wiring = Wiring(proto)
    behind = [node.name for node in wiring.nodes if _swappable(proto, node, wiring) is not None]
    return behind + [node.name for node in _repeated(proto, wiring)]


def apply(proto: Any) -> None:
    """Move and merge them."""
    wiring = Wiring(proto)
    for relu in wiring.nodes:
        pair = _swappable(proto, relu, wiring)
        if pair is not None:
            _swap(proto, relu, *pair)
    while repeated := _repeated(proto, Wiring(proto)):
        _drop(proto, repeated[0])


def _scales(proto: Any, node: Any) -> tuple[Any, ...] | None:
    """What a Q or DQ computes with, comparable; None where it is not constant."""
    values: list[Array | None] = [constant_array(proto, name) for name in node.input[1:]]
    if any(value is None for value in values):
        return None
    axis = attribute(node, "axis", 1) if values and values[0] is not None and values[0].ndim else None
    return (axis, *((v.tobytes(), v.shape, str(v.dtype)) for v in values if v is not None))


def _symmetric(proto: Any, node: Any) -> bool:
    zero = constant_array(proto, node.input[2]) if len(node.input) > 2 else None
    return zero is not None and str(zero.dtype) == "int8" and not zero.any()


def _swappable(proto: Any, relu: Any, wiring: Wiring) -> tuple[Any, Any] | None:
    """(Q, DQ) between a product and its Relu that may change places with it."""
    if relu.op_type != "Relu":
        return None
    back = wiring.producer.get(relu.input[0])
    if back is None or back.op_type != "DequantizeLinear" or wiring.reads_of(back.output[0]) != 1:
        return None
    forth = wiring.producer.get(back.input[0])
    if forth is None or forth.op_type != "QuantizeLinear" or wiring.reads_of(forth.output[0]) != 1:
        return None
    product = wiring.producer.get(forth.input[0])
    plain = product is not None and product.op_type in PRODUCTS and wiring.reads_of(forth.input[0]) == 1
    same = _scales(proto, forth) is not None and _scales(proto, forth) == _scales(proto, back)
    return (forth, back) if plain and same and _symmetric(proto, forth) else None


def _swap(proto: Any, relu: Any, forth: Any, back: Any) -> None:
    """Product, Q, DQ, Relu become product, Relu, Q, DQ; names of nodes and of the result stay."""
    result, middle = relu.output[0], back.output[0]
    relu.input[0], relu.output[0] = forth.input[0], middle
    forth.input[0], back.output[0] = middle, result
    chain = {forth.name, back.name, relu.name}
    ordered: list[Any] = []
    for node in proto.graph.node:
        if node.name not in chain:
            ordered.append(node)
        elif node.name == relu.name:
            ordered += [relu, forth, back]
    set_nodes(proto.graph, ordered)


def _repeated(proto: Any, wiring: Wiring) -> list[Any]:
    """Q or DQ nodes that compute what another one before them has, or undo what an equal one has just done."""
    seen: dict[tuple[Any, ...], str] = {}
    found = []
    for node in wiring.nodes:
        if node.op_type not in QDQ or node.output[0] in wiring.outputs:
            continue
        scales = _scales(proto, node)
        key = (node.op_type, node.input[0], scales)
        if scales is not None and (key in seen or _undone(proto, node, wiring) is not None):
            found.append(node)
        else:
            seen[key] = node.output[0]
    return found


def _undone(proto: Any, node: Any, wiring: Wiring) -> Any | None:
    """The DequantizeLinear of equal scales that a QuantizeLinear undoes, where that one reads no constant."""
    before = wiring.producer.get(node.input[0])
    if node.op_type != "QuantizeLinear" or before is None or before.op_type != "DequantizeLinear":
        return None
    same = _scales(proto, node) is not None and _scales(proto, before) == _scales(proto, node)
    return before if same and before.input[0] not in wiring.constants else None


def _drop(proto: Any, node: Any) -> None:
    """Let the readers of a repeated node read the equal one's result."""
    wiring = Wiring(proto)
    before = _undone(proto, node, wiring)
    if before is not None:
        equal = str(before.input[0])
    else:
        scales = _scales(proto, node)
        twin = next(
            other
            for other in wiring.nodes
            if (other.op_type, other.input[0]) == (node.op_type, node.input[0]) and _scales(proto, other) == scales
        )
        equal = str(twin.output[0])
    gone = node.output[0]
    for reader in proto.graph.node:
        renamed = [equal if name == gone else name for name in reader.input]
        del reader.input[:]
        reader.input.extend(renamed)
    set_nodes(proto.graph, [other for other in proto.graph.node if other.name != node.name])
    _drop_unread(proto)


def _drop_unread(proto: Any) -> None:
    """A DequantizeLinear that nobody reads any more, and then its QuantizeLinear."""
    while True:
        wiring = Wiring(proto)
        dead = [n.name for n in wiring.nodes if n.op_type in QDQ and wiring.reads_of(n.output[0]) == 0]
        if not dead:
            return
        set_nodes(proto.graph, [n for n in proto.graph.node if n.name not in dead])
