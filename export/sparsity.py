"""Is the 2:4 pattern in the ONNX file, along the axis that TensorRT reads?

TensorRT wants at most two non-zeros in every four consecutive values along the reduction: the input channels of a
convolution (per kernel position), the reduction dimension of a matrix product. Source: TensorRT developer guide,
"Structured sparsity". `polygraphy_sparse_layers` is a second, independent opinion on the same file.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fusepress.export.onnx import load_onnx
from fusepress.pipeline.errors import ExportError

Array = np.ndarray[Any, Any]
Status = Literal["valid", "dense", "not eligible"]
MaskedStatus = Literal["valid", "dense", "absent"]
SEEN_THROUGH = frozenset({"QuantizeLinear", "DequantizeLinear", "Cast", "Identity"})
POLYGRAPHY_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSparsity:
    """One layer with weights.

    Attributes:
        name: the node.
        op: its operator.
        weight: the initialiser that holds its weights ("" where they are computed).
        status: valid (2:4 throughout), dense, or not eligible.
        reason: why it is dense or not eligible.
        zeros: fraction of its weights that are zero.
    """

    name: str
    op: str
    weight: str
    status: Status
    reason: str = ""
    zeros: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SparsityReport:
    """All layers with weights of a file, in its order."""

    layers: tuple[LayerSparsity, ...]

    @property
    def valid_weights(self) -> set[str]:
        """Initialisers that are 2:4."""
        return {layer.weight for layer in self.layers if layer.status == "valid"}

    @property
    def valid_layers(self) -> list[str]:
        """Nodes whose weights are 2:4."""
        return [layer.name for layer in self.layers if layer.status == "valid"]

    def to_dict(self) -> dict[str, Any]:
        """Counts, and each layer with its reason, as plain JSON values."""
        counts = {s: sum(layer.status == s for layer in self.layers) for s in ("valid", "dense", "not eligible")}
        return {
            **{name.replace(" ", "_"): count for name, count in counts.items()},
            "layers": [
                {"name": e.name, "op": e.op, "weight": e.weight, "status": e.status, "reason": e.reason}
                | {"zeros": round(e.zeros, 4)}
                for e in self.layers
            ],
        }


def check_sparsity_2to4(path: Path) -> SparsityReport:
    """Judge every convolution and matrix product of a file, through Q/DQ, Cast, Identity and Transpose.

    Raises:
        ExportError: the file is missing or not ONNX.
    """
    from onnx import numpy_helper

    proto = load_onnx(path)
    constants = {t.name: t for t in proto.graph.initializer}
    for node in proto.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                constants[node.output[0]] = attribute.t
    producer = {output: node for node in proto.graph.node for output in node.output}

    def weight_of(tensor: str, axis: int) -> tuple[str, Array, int] | None:
        while tensor not in constants:
            node = producer.get(tensor)
            if node is None:
                return None
            if node.op_type == "Transpose":
                perm = next((list(a.ints) for a in node.attribute if a.name == "perm"), [])
                if not perm:
                    return None
                axis = perm[axis]
            elif node.op_type not in SEEN_THROUGH:
                return None
            tensor = node.input[0]
        return tensor, np.asarray(numpy_helper.to_array(constants[tensor])), axis

    layers = []
    for node in proto.graph.node:
        for position, axis in _weight_inputs(node):
            found = weight_of(node.input[position], axis)
            if found is not None:
                layers.append(_judge(node, *found))
                break
        else:
            if node.op_type in ("Conv", "ConvTranspose"):
                layers.append(_layer(node, "", "not eligible", "its weights are computed, not constant"))
    return SparsityReport(layers=tuple(layers))


def _weight_inputs(node: Any) -> list[tuple[int, int]]:
    """(input, axis of the reduction in it) that may hold weights."""
    flags = {a.name: a.i for a in node.attribute if a.name in ("transA", "transB")}
    match node.op_type:
        case "Conv" | "ConvTranspose":
            return [(1, 1)]
        case "Gemm":
            return [(1, 1 if flags.get("transB") else 0), (0, 0 if flags.get("transA") else 1)]
        case "MatMul":
            return [(1, 0), (0, 1)]
    return []


def _layer(node: Any, weight: str, status: Status, reason: str = "", zeros: float = 0.0) -> LayerSparsity:
    return LayerSparsity(name=node.name, op=node.op_type, weight=weight, status=status, reason=reason, zeros=zeros)


def _judge(node: Any, name: str, weight: Array, axis: int) -> LayerSparsity:
    zeros = float((weight == 0).mean()) if weight.size else 0.0
    if node.op_type == "ConvTranspose":
        return _layer(node, name, "not eligible", "TensorRT has no sparse transposed convolution", zeros)
    if weight.ndim < 2 or (node.op_type == "MatMul" and weight.ndim != 2):
        return _layer(node, name, "not eligible", f"weights of {weight.ndim} dimensions", zeros)
    size = weight.shape[axis]
    if size % 4:
        why = f"{size} input channels a group are not a multiple of 4"
        return _layer(node, name, "not eligible", why, zeros)
    groups = np.moveaxis(weight, axis, -1).reshape(-1, 4)
    bad = int((np.count_nonzero(groups, axis=1) > 2).sum())
    if bad:
        return _layer(node, name, "dense", f"{bad} of {len(groups)} groups of four have more than 2 non-zeros", zeros)
    return _layer(node, name, "valid", "", zeros)


def masked_layers_2to4(report: SparsityReport, params: Collection[str]) -> dict[str, MaskedStatus]:
    """What became of masked parameters in the file, by the module paths in the names of its nodes.

    Args:
        report: of the file.
        params: masked parameters of the torch model, e.g. "camera.stem.weight".

    Returns:
        Parameter -> valid (every layer made of its module is 2:4), dense (one is not), or absent (the file has no layer
        of the module: the exported forward pass does not use it).
    """
    by_module: dict[str, list[LayerSparsity]] = {}
    for layer in report.layers:
        by_module.setdefault(layer.name.rpartition("/")[0], []).append(layer)
    masks = Counter(param.rpartition(".")[0] for param in params)
    found: dict[str, MaskedStatus] = {}
    for param in params:
        module = param.rpartition(".")[0]
        layers = by_module.get(module, [])
        valid = sum(layer.status == "valid" for layer in layers)
        dense = sum(layer.status == "dense" for layer in layers)
        # the projections of an attention are one module; some of them may be dense for a reason
        whole = valid >= masks[module] and (not dense or masks[module] > 1)
        found[param] = "valid" if layers and whole else "dense" if layers else "absent"
    return found


def lost_zeros(report: SparsityReport, zeros: Mapping[str, float]) -> dict[str, float]:
    """Parameters whose zeros are not all in the file.

    Args:
        report: of the file.
        zeros: masked weight of a convolution or linear layer -> fraction of it that is zero in torch.

    Returns:
        Parameter -> fraction of zeros in the file, where that is smaller; those without a layer in it are absent.
    """
    by_module = {layer.name.rpartition("/")[0]: layer.zeros for layer in report.layers}
    found = {param: by_module.get(param.rpartition(".")[0]) for param in zeros}
    return {param: share for param, share in found.items() if share is not None and share < zeros[param] - 1e-6}


def polygraphy_sparse_layers(path: Path) -> set[str]:
    """The initialisers that `polygraphy inspect sparsity` finds 2:4 (its walk, its check).

    Raises:
        ExportError: polygraphy fails.
    """
    code = (
        "import sys, warnings; warnings.simplefilter('ignore'); import onnx; "
        "from polygraphy.logger import G_LOGGER; G_LOGGER.module_severity = G_LOGGER.CRITICAL; "
        "from polygraphy.tools.sparse import SparsityPruner; p = SparsityPruner(onnx.load(sys.argv[1])); p.check(); "
        "print('\\n'.join(sorted(p.sparse_tensors)))"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code, str(path)],
            capture_output=True,
            text=True,
            timeout=POLYGRAPHY_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ExportError(
            f"expected polygraphy to inspect the file within {POLYGRAPHY_TIMEOUT_S:g} s; got no answer at {path}; "
            "run `polygraphy inspect sparsity` on it by hand"
        ) from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ExportError(f"expected polygraphy to inspect the file; got {last} at {path}; check that it is ONNX")
    return {line for line in done.stdout.splitlines() if line}
