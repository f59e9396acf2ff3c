"""The Attention operator (operator set 23) as MatMul and Softmax, which every importer reads.

softmax(scale Q K^T + mask) V, with scale 1 / sqrt(head size) unless given; causal masks allow key j for query i where
j <= i. 4-D [batch, heads, length, head size] and 3-D [batch, length, heads x head size] inputs; caches, grouped heads,
soft caps, windows and the optional outputs are left as they are. Source: onnx/docs/Operators.md, Attention.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fusepress.export.hygiene.edit import Editor, attribute, node_named
from fusepress.export.onnx import MAX_OPSET, opset_of
from fusepress.export.wiring import Wiring

_BOOL = 9
_MOST = -3.0e38  # float32's least is written into masks, as torch does
_PLAIN = frozenset(["is_causal", "scale", "q_num_heads", "kv_num_heads", "softmax_precision"])


def find(proto: Any) -> list[str]:
    """Attentions that can be written out."""
    if not any(node.op_type == "Attention" for node in proto.graph.node):
        return []
    wiring = Wiring(proto)
    return [node.name for node in proto.graph.node if node.op_type == "Attention" and _can(node, wiring)]


def _can(node: Any, wiring: Wiring) -> bool:
    shapes = [wiring.shape(name) for name in node.input[:3]]
    if any(shape is None or len(shape) not in (3, 4) for shape in shapes) or any(node.input[4:]):
        return False
    heads = _heads(node, wiring)
    values = {a.name: attribute(node, a.name) for a in node.attribute}
    # defaults that exporters write out
    extra = {k: v for k, v in values.items() if k not in _PLAIN and v not in (0, 0.0, -1)}
    return len(list(filter(None, node.output))) == 1 and heads[0] == heads[1] > 0 and not extra


def _heads(node: Any, wiring: Wiring) -> tuple[int, int]:
    shape_q, shape_k = wiring.shape(node.input[0]), wiring.shape(node.input[1])
    assert shape_q is not None
    assert shape_k is not None
    if len(shape_q) == 4:
        return shape_q[1], shape_k[1]
    return int(attribute(node, "q_num_heads", 0)), int(attribute(node, "kv_num_heads", 0))


def apply(proto: Any) -> None:
    """Write them out; where nothing else needs it, the operator set is lowered to 20."""
    for name in find(proto):
        wiring = Wiring(proto)
        _write(proto, node_named(proto, name), wiring)
    if opset_of(proto) > MAX_OPSET and not _newer(proto):
        entry = next(e for e in proto.opset_import if e.domain in ("", "ai.onnx"))
        entry.version = MAX_OPSET


def _newer(proto: Any) -> bool:
    """Whether an operator did not exist in operator set 20; the checker judges what existed in another form."""
    from onnx import defs

    known = {s.name for s in defs.get_all_schemas_with_history() if s.domain == "" and s.since_version <= MAX_OPSET}
    return any(node.op_type not in known for node in proto.graph.node)


def _write(proto: Any, node: Any, wiring: Wiring) -> None:
    edit, (heads, _) = Editor(proto, node.name), _heads(node, wiring)
    shape_q, shape_k = wiring.shape(node.input[0]), wiring.shape(node.input[1])
    assert shape_q is not None
    assert shape_k is not None
    flat = len(shape_q) == 3
    q, k, v = (_split(edit, n, heads, letter) if flat else n for n, letter in zip(node.input, "qkv", strict=False))
    size = shape_q[-1] // heads if flat else shape_q[-1]
    length_q, length_k = shape_q[-2], shape_k[-2]
    half = wiring.types.get(node.input[0]) == 10
    dtype = np.float16 if half else np.float32
    scale = attribute(node, "scale", 0.0) or 1 / math.sqrt(size)
    turned = edit.add("Transpose", k, name="Transpose", perm=[0, 1, 3, 2])
    scaled = edit.add("Mul", q, edit.constant("scale", np.asarray(scale, dtype)), name="Mul")
    score = edit.add("MatMul", scaled, turned, name="MatMul")
    if attribute(node, "is_causal", 0):
        causal = np.where(np.tri(length_q, length_k, dtype=bool), 0.0, -np.inf if half else _MOST)
        score = edit.add("Add", score, edit.constant("causal", causal.astype(dtype)), name="Add_causal")
    if len(node.input) > 3 and node.input[3]:
        score = edit.add("Add", score, _mask(edit, node.input[3], wiring, dtype), name="Add_mask")
    share = edit.add("Softmax", score, name="Softmax", axis=-1)
    if not flat:
        edit.add("MatMul", share, v, name="MatMul_v", output=node.output[0])
    else:
        mixed = edit.add("MatMul", share, v, name="MatMul_v")
        back = edit.add("Transpose", mixed, name="Transpose_back", perm=[0, 2, 1, 3])
        joined = edit.constant("joined", np.asarray([0, 0, -1]))
        edit.add("Reshape", back, joined, name="Reshape_back", output=node.output[0])
    edit.replace(node)


def _split(edit: Editor, name: str, heads: int, letter: str) -> str:
    """[batch, length, heads x size] to [batch, heads, length, size]."""
    shape = edit.constant(f"{letter}_shape", np.asarray([0, 0, heads, -1]))
    parts = edit.add("Reshape", name, shape, name=f"{letter}_Reshape")
    return edit.add("Transpose", parts, name=f"{letter}_Transpose", perm=[0, 2, 1, 3])


def _mask(edit: Editor, name: str, wiring: Wiring, dtype: Any) -> str:
    """What is added to the scores: the mask itself, or the least number where a mask of booleans is false."""
    if wiring.types.get(name) != _BOOL:
        return name
    least = _MOST if dtype is np.float32 else -np.inf
    numbers = [edit.constant(f"mask_{word}", np.asarray(value, dtype)) for word, value in (("on", 0), ("off", least))]
    return edit.add("Where", name, *numbers, name="mask_Where")
