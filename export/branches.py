"""The branches of a fusion network as ONNX files of their own, and what follows them as another.

They are cut where tensors leave a branch, so that each can be built, timed and placed on its own. A branch that takes
tensors from outside itself, as where modalities are fused between its stages, cannot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
from onnx.utils import Extractor

from fusepress.export.onnx import load_onnx, save_onnx
from fusepress.pipeline.errors import ExportError
from fusepress.targets.critical_path import REST

PLAIN = frozenset({"Cast", "QuantizeLinear", "DequantizeLinear", "Identity", "Constant"})


def split_branches(path: Path, branches: Mapping[str, Sequence[str]], folder: Path) -> dict[str, Path]:
    """Cut an ONNX file into its branches and the rest.

    Args:
        path: the whole; its nodes are named after modules, `camera.stem.0/Conv`.
        branches: modality -> module path(s) of its backbone.
        folder: where the parts are written.

    Returns:
        Branch -> its file, and `rest` -> fusion and heads.

    Raises:
        ExportError: a branch has no nodes of its name, or takes tensors from outside itself.
    """
    model = onnx.shape_inference.infer_shapes(load_onnx(path))
    owner = {index: _branch_of(node.name, branches) for index, node in enumerate(model.graph.node)}
    producer = {out: index for index, node in enumerate(model.graph.node) for out in node.output if out}
    _own_nameless(model.graph, owner)
    _check_apart(model.graph, owner, producer, branches, path)
    crossing = _crossing(model, owner, producer)
    extractor = Extractor(model)
    parts: dict[str, Path] = {}
    inputs = {value.name for value in model.graph.input}
    for branch in branches:
        ends = [name for name, owner_of in crossing.items() if owner_of == branch]
        needed = _needed_inputs(model.graph, producer, ends, inputs, set())
        parts[branch] = _save(extractor.extract_model(needed, ends), folder / f"part-{len(parts)}.onnx")
    outputs = [value.name for value in model.graph.output if value.name not in crossing]
    needed = _needed_inputs(model.graph, producer, outputs, inputs, set(crossing))
    parts[REST] = _save(extractor.extract_model(needed, outputs), folder / f"part-{len(parts)}.onnx")
    return parts


def _save(model: onnx.ModelProto, path: Path) -> Path:
    save_onnx(model, path)
    return path


def _branch_of(name: str, branches: Mapping[str, Sequence[str]]) -> str | None:
    module = name.split("/", 1)[0]
    for branch, paths in branches.items():
        if any(module == path or module.startswith(path + ".") for path in paths):
            return branch
    return None


def _own_nameless(graph: onnx.GraphProto, owner: dict[int, str | None]) -> None:
    """Quantisation and casts that a tool put between nodes belong to the branch that alone reads them."""
    readers: dict[str, set[str | None]] = {}
    for index in reversed(range(len(graph.node))):
        node = graph.node[index]
        if owner[index] is None:
            users = set().union(*(readers.get(out, set()) for out in node.output))
            if len(users) == 1:
                owner[index] = users.pop()
        for name in node.input:
            readers.setdefault(name, set()).add(owner[index])


def _check_apart(
    graph: onnx.GraphProto,
    owner: Mapping[int, str | None],
    producer: Mapping[str, int],
    branches: Mapping[str, Sequence[str]],
    path: Path,
) -> None:
    for branch in branches:
        own = [index for index, of in owner.items() if of == branch]
        if not own:
            raise ExportError(
                f"expected nodes of the branch {branch!r}; got none at {path}; are its nodes named after modules, as "
                "`fusepress compress` exports them?"
            )
        for index in own:
            for name in graph.node[index].input:
                source = producer.get(name)
                if source is not None and owner[source] != branch and _has_activation(graph, producer, source):
                    raise ExportError(
                        f"expected the branch {branch!r} to be computed from its own inputs; got the tensor {name!r} "
                        f"of {graph.node[source].name!r} at {path}; branches that exchange tensors midway cannot be "
                        "timed apart"
                    )


def _has_activation(graph: onnx.GraphProto, producer: Mapping[str, int], start: int) -> bool:
    """Whether a node computes something from the graph's inputs, more than a cast or a quantisation of one."""
    inputs = {value.name for value in graph.input}
    stack, seen = [start], set()
    while stack:
        index = stack.pop()
        if index not in seen:
            seen.add(index)
            stack += [producer[name] for name in graph.node[index].input if name in producer]
    reads = any(inputs & set(graph.node[index].input) for index in seen)
    return reads and any(graph.node[index].op_type not in PLAIN for index in seen)


def _crossing(
    model: onnx.ModelProto, owner: Mapping[int, str | None], producer: Mapping[str, int]
) -> dict[str, str | None]:
    """Tensors that leave a branch, with it; outputs of the whole among them."""
    found: dict[str, str | None] = {}
    for index, node in enumerate(model.graph.node):
        for name in node.input:
            source = producer.get(name)
            if source is not None and owner[source] is not None and owner[source] != owner[index]:
                found[name] = owner[source]
    for value in model.graph.output:
        source = producer.get(value.name)
        if source is not None and owner[source] is not None:
            found[value.name] = owner[source]
    return found


def _needed_inputs(
    graph: onnx.GraphProto, producer: Mapping[str, int], ends: Sequence[str], inputs: set[str], cut: set[str]
) -> list[str]:
    """Inputs of the graph, and tensors to cut at, that the ends depend on."""
    needed: dict[str, None] = {}
    stack, seen = list(ends), set()
    while stack:
        name = stack.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in cut or name in inputs:
            needed[name] = None
        elif name in producer:
            stack += [each for each in graph.node[producer[name]].input if each]
    return sorted(needed)
