"""Which ONNX operators a target's TensorRT reads, known before anything is trained.

Lists are of what is refused; all other operators of the operator sets that the version reads are allowed. Sources:
docs/operators.md of onnx/onnx-tensorrt for 8.4 and 8.5 (read); TensorRT-RTX 1.7 was asked for every operator of ONNX
(run). For TensorRT 10 and later the list is that of TensorRT-RTX without DeformConv, which the documentation of 10.1
has: not confirmed on a device. TensorRT 8.6 reads a scatter with a reduction and drops the reduction without a word
(onnx/onnx-tensorrt issue 957), so that it counts as refused there too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from fusepress.pipeline.errors import TargetError
from fusepress.targets.profile import Profile

Basis = Literal["run", "read", "not confirmed"]

ADVICE = {
    "ScatterND": "scatter without a reduction: make the indices unique and use index_put without accumulate",
    "ScatterElements": "a max over scattered points: pad to a fixed number of points a pillar and take the max there",
    "Unique": "make the indices unique outside the model",
    "Det": "write the determinant out",
    "BitShift": "multiply or divide by powers of two",
    "DeformConv": "TensorRT-RTX has none; TensorRT has: take a target with TensorRT, or plain convolutions",
    "NonZero": "mask by multiplication instead of selecting",
    "Attention": "export with operator set 18 to 20, which writes attention as MatMul and Softmax",
    "GridSample": "only 4-D input is supported: sample slice by slice",
    "Loop": "unroll the loop",
    "If": "write torch.where for the condition",
    "QuantizeLinear": "quantise symmetrically: zero points must be 0",
    "DequantizeLinear": "quantise symmetrically: zero points must be 0",
}
DEFAULT_ADVICE = "rewrite the module with plain operators, or move it outside the model"

# fmt: off
_NEVER = frozenset([
    "Bernoulli", "BitShift", "Compress", "ConcatFromSequence", "ConvInteger", "DFT", "Det", "DynamicQuantizeLinear",
    "MatMulInteger", "MaxRoiPool", "MaxUnpool", "MelWeightMatrix", "Multinomial", "NegativeLogLikelihoodLoss",
    "Optional", "OptionalGetElement", "OptionalHasElement", "QLinearConv", "QLinearMatMul", "SequenceAt",
    "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength", "SequenceMap",
    "SoftmaxCrossEntropyLoss", "SplitToSequence", "StringNormalizer", "TfIdfVectorizer", "Unique",
])
_8_5 = _NEVER | {"BlackmanWindow", "HammingWindow", "HannWindow", "Hardmax", "IsInf", "LayerNormalization", "STFT"}
_8_4 = _8_5 | {
    "GridSample", "HardSwish", "MeanVarianceNormalization", "Mod", "NonZero", "OneHot", "RandomNormal",
    "RandomNormalLike", "Reciprocal", "RoiAlign", "Shrink", "Trilu",
}
_RTX = _NEVER | {
    "AffineGrid", "BitCast", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "CenterCropPad", "Col2Im",
    "CumProd", "DeformConv", "ImageDecoder", "RegexFullMatch", "StringConcat", "StringSplit", "SwiGLU",
}
# fmt: on
_SCATTERS = frozenset(["ScatterND", "ScatterElements"])
_QDQ = frozenset(["QuantizeLinear", "DequantizeLinear"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Importer:
    """What reads ONNX on a target.

    Attributes:
        name: with its version, for messages.
        refused: operators.
        opset: newest operator set that it reads.
        basis: whether the list was run, read in its documentation, or is not confirmed.
    """

    name: str
    refused: frozenset[str]
    opset: int
    basis: Basis


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorFault:
    """One node that a target's importer does not take.

    Attributes:
        mended_by: name of the pass in export/hygiene that rewrites it where it can; "" where there is none.
    """

    operator: str
    node: str
    why: str
    advice: str
    basis: Basis
    mended_by: str = ""

    @property
    def certain(self) -> bool:
        """Whether it was tried or is documented, so that the target cannot build the model."""
        return self.basis != "not confirmed"

    def line(self) -> str:
        """As text."""
        mended = f" (rewritten on export by {self.mended_by!r} where that is exact)" if self.mended_by else ""
        return f"{self.operator} at node {self.node}: {self.why} [{self.basis}]; {self.advice}{mended}"


def importer_of(profile: Profile, tensorrt: str | None = None) -> Importer | None:
    """What reads ONNX on a target; None where ONNX Runtime does, which has every operator.

    Args:
        profile: the target.
        tensorrt: version, in place of the profile's first.

    Raises:
        TargetError: the version is not one.
    """
    if profile.runtime == "onnxruntime":
        return None
    if profile.runtime == "tensorrt_rtx":
        return Importer(name="TensorRT-RTX 1.7", refused=_RTX, opset=27, basis="run")
    text = tensorrt or profile.software[0].tensorrt
    match = re.match(r"(\d+)\.(\d+)", text)
    if match is None:
        raise TargetError(f"expected a TensorRT version such as 10.3; got {text!r}; correct the target's profile")
    version = (int(match.group(1)), int(match.group(2)))
    name = f"TensorRT {text}"
    if version < (8, 5):
        return Importer(name=name, refused=_8_4, opset=13, basis="read")
    if version < (10, 0):
        return Importer(name=name, refused=_8_5, opset=17, basis="read" if version == (8, 5) else "not confirmed")
    opset = 20 if version < (10, 9) else 22 if version < (10, 13) else 24
    return Importer(name=name, refused=_RTX - {"DeformConv"}, opset=opset, basis="not confirmed")


def operator_faults(proto: Any, profile: Profile, tensorrt: str | None = None) -> list[OperatorFault]:
    """Every node of a model that the target's importer does not take, in the graph's order.

    Args:
        proto: the ONNX model; weights are not needed.
        profile: the target.
        tensorrt: version, in place of the profile's first.
    """
    importer = importer_of(profile, tensorrt)
    if importer is None:
        return []
    opset = next((int(e.version) for e in proto.opset_import if e.domain in ("", "ai.onnx")), 1)
    found = []
    if opset > importer.opset:
        found.append(
            OperatorFault(
                operator=f"operator set {opset}",
                node="the whole graph",
                why=f"{importer.name} reads at most {importer.opset}",
                advice=f"export with operator set {profile.opset}",
                basis=importer.basis,
            )
        )
    zeros = _zero_points(proto)
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in (*proto.graph.value_info, *proto.graph.input)}
    for node, inner in _nodes(proto.graph):
        for why, basis, mended_by in _faults_of(node, importer, zeros, ranks):
            found.append(
                OperatorFault(
                    operator=node.op_type,
                    node=node.name or next(iter(node.output), node.op_type),
                    why=why,
                    advice=_advice(node, importer),
                    basis=basis,
                    mended_by="" if inner else mended_by,
                )
            )
    return found


def _nodes(graph: Any, *, inner: bool = False) -> Iterator[tuple[Any, bool]]:
    """Every node, those of branches and loop bodies too, and whether it is in one: passes rewrite the main graph."""
    for node in graph.node:
        yield node, inner
        for attribute in node.attribute:
            for body in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
                yield from _nodes(body, inner=True)


def _advice(node: Any, importer: Importer) -> str:
    if node.op_type == "GridSample" and node.op_type in importer.refused:
        return "export with operator set 16, and let the pass 'grid_sample' write it as Gather and arithmetic"
    return ADVICE.get(node.op_type, DEFAULT_ADVICE)


def _faults_of(
    node: Any, importer: Importer, zeros: dict[str, bool], ranks: dict[str, int]
) -> Iterator[tuple[str, Basis, str]]:
    """(why, basis, pass that mends it) of one node."""
    if node.domain not in ("", "ai.onnx"):
        yield f"{importer.name} has no operators of the domain {node.domain!r} without a plugin", "not confirmed", ""
    elif node.op_type in importer.refused:
        yield f"{importer.name} does not read it", importer.basis, "grid_sample" if node.op_type == "GridSample" else ""
    elif node.op_type in _SCATTERS and _reduction(node) != "none":
        mended_by = "scatter" if node.op_type == "ScatterND" and _reduction(node) == "add" else ""
        basis: Basis = "run" if importer.basis == "run" else "read"
        yield f"{importer.name} has no scatter with a reduction ({_reduction(node)})", basis, mended_by
    elif node.op_type == "Attention":
        # read by the parser of TensorRT-RTX, which was then seen to lack a kernel; nobody can tell for which shapes
        yield f"{importer.name} has kernels for some shapes and types only", "not confirmed", "attention"
    elif node.op_type == "GridSample" and ranks.get(node.input[0], 4) != 4:
        yield f"{importer.name} samples 4-D tensors only", importer.basis, ""
    elif node.op_type in _QDQ and len(node.input) > 2 and not zeros.get(node.input[2], True):
        yield f"{importer.name} quantises symmetrically", "read", ""


def _reduction(node: Any) -> str:
    return next((a.s.decode() for a in node.attribute if a.name == "reduction"), "none")


def _zero_points(proto: Any) -> dict[str, bool]:
    """Constant -> whether it is all zero, of those that are zero points."""
    from onnx import numpy_helper

    wanted = {n.input[2] for n in proto.graph.node if n.op_type in _QDQ and len(n.input) > 2}
    constants = [t for t in proto.graph.initializer if t.name in wanted]
    return {t.name: not numpy_helper.to_array(t).astype(float).any() for t in constants}
