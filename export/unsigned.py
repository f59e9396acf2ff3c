"""Unsigned INT8 behind Relu, for kernels that only compute in integers where quantising clips as the Relu does.

Behind a Relu, the 128 negative numbers of symmetric INT8 stand for nothing. Unsigned numbers with zero point 0 over the
same range have steps of 127/255 of the size, and quantising to them clips below 0 itself, so that ONNX Runtime drops
the Relu and fuses Q, DQ and the layer between them into one integer kernel. TensorRT takes symmetric INT8 only: this is
for files that a CPU runs. On x86 without VNNI, sums of two products of full-range numbers may saturate in its kernels:
judge the file on the machine that runs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from fusepress.export.hygiene.edit import constant_array
from fusepress.export.wiring import Wiring

SIGNED_LEVELS, UNSIGNED_LEVELS = 127, 255


def unsigned_candidates(proto: Any) -> frozenset[str]:
    """Nodes whose Relu `use_unsigned` would let an integer kernel absorb."""
    wiring = Wiring(proto)
    return frozenset(
        wiring.producer[relu.input[0]].name for relu, _ in _pairs(proto, wiring) if relu.input[0] in wiring.producer
    )


def unsigned_relus(proto: Any) -> list[str]:
    """Names of the Relus behind which a file counts without a sign, from 0."""
    wiring = Wiring(proto)
    return [node.name for node in wiring.nodes if node.op_type == "Relu" and _counts_from_zero(proto, node, wiring)]


def _counts_from_zero(proto: Any, relu: Any, wiring: Wiring) -> bool:
    zeros = [
        constant_array(proto, node.input[2])
        for node in wiring.readers.get(relu.output[0], [])
        if node.op_type == "QuantizeLinear" and len(node.input) > 2
    ]
    return bool(zeros) and all(zero is not None and zero.dtype == np.uint8 and not zero.any() for zero in zeros)


def use_unsigned(proto: Any) -> list[str]:
    """Let Q/DQ behind Relus count without a sign, in place; the rest of the graph stays as it is.

    A Relu qualifies where only QuantizeLinear nodes with one zero point of signed 0 read it. What is computed changes
    by at most three quarters of a step of the signed numbers: half a step by their rounding, a quarter by that to the
    finer steps of the same range.

    Returns:
        Names of the Relus.
    """
    from onnx import numpy_helper

    wiring = Wiring(proto)
    done: dict[str, None] = {}
    for relu, chain in list(_pairs(proto, wiring)):
        for quantize in chain:
            scale = constant_array(proto, quantize.input[1])
            assert scale is not None
            names = f"{quantize.name}/unsigned_scale", f"{quantize.name}/unsigned_zero"
            finer = (scale.astype(np.float64) * SIGNED_LEVELS / UNSIGNED_LEVELS).astype(scale.dtype)
            for name, value in zip(names, (finer, np.zeros(scale.shape, np.uint8)), strict=True):
                proto.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
            for node in (quantize, *wiring.readers[quantize.output[0]]):
                node.input[1], node.input[2] = names
        done[relu.name] = None
    if done:
        del proto.graph.value_info[:]  # types of quantised tensors changed
        _drop_unread_constants(proto)
    return list(done)


def _pairs(proto: Any, wiring: Wiring) -> Iterator[tuple[Any, list[Any]]]:
    """(Relu, the QuantizeLinear nodes that read it), where all can become unsigned."""
    for relu in wiring.nodes:
        if relu.op_type != "Relu" or relu.output[0] in wiring.outputs:
            continue
        chain = wiring.readers.get(relu.output[0], [])
        if chain and all(_signed_pair(proto, node, wiring) for node in chain):
            yield relu, chain


def _signed_pair(proto: Any, node: Any, wiring: Wiring) -> bool:
    """A QuantizeLinear to signed numbers around 0 by one constant scale, read only by DequantizeLinear of the same."""
    if node.op_type != "QuantizeLinear" or len(node.input) < 3 or node.output[0] in wiring.outputs:
        return False
    scale, zero = (constant_array(proto, name) for name in node.input[1:3])
    if scale is None or zero is None or scale.size != 1 or zero.dtype != np.int8 or zero.any():
        return False
    readers = wiring.readers.get(node.output[0], [])
    return bool(readers) and all(
        back.op_type == "DequantizeLinear" and list(back.input[1:]) == list(node.input[1:]) for back in readers
    )


def _drop_unread_constants(proto: Any) -> None:
    read = {name for node in proto.graph.node for name in node.input}
    kept = [tensor for tensor in proto.graph.initializer if tensor.name in read]
    copies = [type(tensor).FromString(tensor.SerializeToString()) for tensor in kept]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(copies)
