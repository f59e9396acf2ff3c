"""torch -> ONNX: batch 1, static shapes, the task's names, and the same bytes every time.

What the exporter leaves behind is removed: stack traces with host paths, doc strings, metadata and the producer's
version. Nodes are named after the module they come from (`camera.stage1.0.conv/Conv`), so that a layer can be found
again in an engine's layer list or in a per-branch latency. Source of the exporter's limits: docs of torch.onnx,
onnx/docs/Changelog.md for the differences between operator sets.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusepress.pipeline.errors import ExportError
from fusepress.pipeline.store import atomic_write_bytes

if TYPE_CHECKING:
    from torch import Tensor, nn

MIN_OPSET, EXPORTER_OPSET, MAX_OPSET = 17, 18, 20
MAX_BYTES = 1_610_612_736  # 1.5 GiB: below protobuf's limit of 2 GiB, with room for Q/DQ nodes
IR_VERSION = {17: 8, 18: 8, 19: 9, 20: 9}  # onnx/docs/Versioning.md; older parsers warn about newer ones
# messages of libraries about themselves, that a user can do nothing about
_NOISE = re.compile(
    r"isinstance\(treespec, LeafSpec\)|torchvision is not installed|lower version than we have implementations"
    r"|version converter"
)
_NOISY_LOGGERS = frozenset({"torch", "onnxscript", "onnx_ir"})
_REDUCTIONS = frozenset(
    f"Reduce{kind}" for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
)
_DROPPED_WITH_DEFAULT: dict[tuple[str, str], tuple[Any, ...]] = {
    ("Resize", "antialias"): (0,),
    ("Resize", "keep_aspect_ratio_policy"): (b"stretch",),
    ("AveragePool", "dilations"): (1,),
    ("LpPool", "ceil_mode"): (0,),
    ("LpPool", "dilations"): (1,),
    ("Cast", "saturate"): (1,),
    ("CastLike", "saturate"): (1,),
    ("QuantizeLinear", "saturate"): (1,),
}
ADVICE = {
    "aten.nonzero": "mask by multiplication instead of selecting",
    "aten.unique": "make the indices unique outside the model",
    "aten._linalg_svd": "move the decomposition outside the model",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportInfo:
    """What an ONNX file holds.

    Attributes:
        path: the file.
        sha256: of its bytes.
        size_bytes: of the file.
        opset: version of the default operator set.
        inputs: name -> shape (batch 1).
        outputs: name -> shape (batch 1).
        ops: operator -> number of nodes.
        nodes: number of nodes.
        warnings: what torch or the model said while it was exported and is worth a look.
    """

    path: Path
    sha256: str
    size_bytes: int
    opset: int
    inputs: dict[str, tuple[int, ...]]
    outputs: dict[str, tuple[int, ...]]
    ops: dict[str, int]
    nodes: int
    warnings: tuple[str, ...] = ()


def export_onnx(
    model: nn.Module,
    example_inputs: Mapping[str, Tensor],
    output_names: Sequence[str],
    path: Path,
    *,
    opset: int = EXPORTER_OPSET,
) -> ExportInfo:
    """Export a model in evaluation mode with batch 1 and static shapes; the same model gives the same bytes.

    Args:
        model: takes the inputs by name and returns a tensor or a dict of tensors; its mode is left as it was.
        example_inputs: input name -> tensor, batch first; the first sample is taken.
        output_names: ONNX output names in order; for a dict they are its keys.
        path: file to write (aside, then renamed).
        opset: 17 to 20.

    Raises:
        ExportError: the model cannot be exported (names the operator and the module), its weights are not finite,
            the outputs are not those named, or the file would be larger than 1.5 GiB.
    """
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise ExportError(
            f"expected an opset from {MIN_OPSET} to {MAX_OPSET}; got {opset}; take the target profile's opset"
        )
    _check_weights(model)
    proto, remarks = _run_exporter(model, example_inputs, output_names, max(opset, EXPORTER_OPSET))
    _order_outputs(proto, output_names)
    _name_nodes(proto, {name for name, _ in model.named_modules()})
    if opset < EXPORTER_OPSET:
        lower_opset(proto, opset)
    return save_onnx(proto, path, remarks=remarks)


def _check_weights(model: nn.Module) -> None:
    import torch

    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ExportError(f"expected finite weights; got NaN or infinity at {name}; take an earlier checkpoint")


def _run_exporter(
    model: nn.Module, example_inputs: Mapping[str, Tensor], output_names: Sequence[str], opset: int
) -> tuple[Any, tuple[str, ...]]:
    import torch

    # a forward pass made under no_grad, so that gradients switched off in the caller's thread do not matter
    modes = [(module, module.training) for module in model.modules()]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    inputs = {name: value[:1].detach().to(device) for name, value in example_inputs.items()}
    try:
        model.eval()
        with torch.no_grad(), _library_noise() as remarks:
            names = _flatten_order(model, inputs, output_names)
            program = _trace(model, inputs)
            try:
                exported = torch.onnx.export(
                    program,
                    input_names=list(inputs),
                    output_names=names,
                    opset_version=opset,
                    dynamo=True,
                    external_data=False,
                    optimize=True,
                    verbose=False,
                )
            except torch.onnx.OnnxExporterError as error:
                raise _explain(error, program) from error
    finally:
        for module, training in modes:
            module.training = training
    assert exported is not None
    return exported.model_proto, tuple(remarks)


def _flatten_order(model: nn.Module, inputs: dict[str, Tensor], output_names: Sequence[str]) -> list[str]:
    """The names in the order in which torch flattens what the model returns."""
    import torch
    from torch.utils._pytree import tree_leaves

    outputs = model(**inputs)
    if isinstance(outputs, torch.Tensor):
        found = ["a single tensor"]
        if len(output_names) == 1:
            return list(output_names)
    elif isinstance(outputs, dict):
        found = [str(name) for name in outputs]
        if sorted(found) == sorted(output_names):
            return [str(name) for name in tree_leaves({name: name for name in outputs})]
    else:
        found = [type(outputs).__name__]
    raise ExportError(
        f"expected the model to return the outputs {list(output_names)}; got {', '.join(found)}; "
        "return a tensor or a dict of tensors with those names"
    )


def _trace(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    import torch

    try:
        with contextlib.redirect_stderr(io.StringIO()):  # on failure torch prints the graph so far
            return torch.export.export(model, (), kwargs=inputs, strict=False)
    except Exception as error:  # torch.export raises many kinds, from the user's own code too
        place, fault = _user_frame(str(error)), f"{type(error).__name__}: {_first_line(error)}"
        raise ExportError(
            f"expected control flow and shapes that do not depend on tensor values; got {fault} at {place}; "
            "write torch.where for an `if` on tensor values, and fixed sizes"
        ) from error


def _user_frame(text: str) -> str:
    frames = re.findall(r'File "([^"]+)", line (\d+), in (\w+)', text)
    return f"{Path(frames[-1][0]).name}:{frames[-1][1]} in {frames[-1][2]}" if frames else "the forward pass"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")[:300]


def _explain(error: BaseException, program: Any) -> ExportError:
    """Turn the exporter's chain of errors into one that names the operator and the module."""
    text, cause = "", error
    chain = [error]
    while (following := cause.__cause__) is not None and following not in chain:
        chain.append(following)
        cause = following
    text = "\n".join(str(part) for part in chain)
    operator = re.search(r"OpOverload\(op='([^']+)'", text)
    node_name = re.search(r"translating node %(\w+)", text)
    where = _module_of(program, node_name.group(1)) if node_name else "an unknown module"
    if operator is None:
        return ExportError(
            f"expected a model that torch can export to ONNX; got {type(error).__name__}: {_first_line(chain[-1])} at "
            f"{where}; rewrite that module with plain torch operators"
        )
    op = operator.group(1)
    advice = ADVICE.get(op, "rewrite it with operators that ONNX has, or move it outside the model")
    return ExportError(f"expected operators that ONNX has; got {op} at {where}; {advice}")


def _module_of(program: Any, node_name: str) -> str:
    # the exporter decomposes first and names the node that it then could not translate
    nodes = [*program.graph.nodes, *program.run_decompositions().graph.nodes]
    for node in (*(n for n in nodes if n.name == node_name), *(n for n in nodes if node_name in n.name)):
        if node.op == "call_function":
            stack = list((node.meta.get("nn_module_stack") or {}).values())
            path = re.sub(r"^L\['self'\]\.?", "", str(stack[-1][0])) if stack else ""
            frame = _user_frame(str(node.meta.get("stack_trace", "")))
            return f"module {path!r} ({frame})" if path else f"the model's own forward ({frame})"
    return f"node {node_name}"


@contextlib.contextmanager
def _library_noise() -> Iterator[list[str]]:
    """Keep what torch.onnx and onnxscript say about themselves off the user; collect what the model's code says."""
    remarks: list[str] = []
    names = [name for name in list(logging.root.manager.loggerDict) if name.split(".")[0] in _NOISY_LOGGERS]
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield remarks
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            texts = (f"{w.category.__name__}: {w.message}" for w in caught if not _NOISE.search(str(w.message)))
            remarks.extend(dict.fromkeys(texts))


def _order_outputs(proto: Any, names: Sequence[str]) -> None:
    by_name = {value.name: value for value in proto.graph.output}
    ordered = [by_name[name] for name in names]
    copies = [type(value).FromString(value.SerializeToString()) for value in ordered]
    del proto.graph.output[:]
    proto.graph.output.extend(copies)


def _name_nodes(proto: Any, modules: set[str]) -> None:
    """Name each node after the module it came from: `<module path>/<operator>`, numbered where there are several."""
    seen: Counter[str] = Counter()
    for node in proto.graph.node:
        base = f"{_module_path(node, modules)}/{node.op_type}".lstrip("/")
        seen[base] += 1
        node.name = base if seen[base] == 1 else f"{base}_{seen[base]}"


def _module_path(node: Any, modules: set[str]) -> str:
    for name in node.input:
        owner = name.rpartition(".")[0]
        if owner and owner in modules:  # a parameter keeps its name: exact even where a norm was folded into a conv
            return str(owner)
    for prop in node.metadata_props:
        if prop.key == "pkg.torch.onnx.name_scopes":
            scopes = [scope for scope in json.loads(prop.value.replace("'", '"')) if scope in modules]
            return str(scopes[-1]) if scopes else ""
    return ""


# --- operator sets ---------------------------------------------------------------------------------------------------


def lower_opset(proto: Any, opset: int) -> None:
    """Rewrite a model of operator set 18 to 20 in place for an older one (17 to 19), where its operators allow it.

    The converter of the onnx package leaves attributes behind that the older version does not know; here only what
    changed in between is rewritten, and the checker decides.

    Raises:
        ExportError: an operator did not exist then, or an attribute says something that could not be said.
    """
    from onnx import helper, numpy_helper

    _constants_to_initializers(proto.graph)
    constants = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    for node in proto.graph.node:
        if opset < EXPORTER_OPSET:
            _say_as_17(node, constants, proto, opset)
        for (op_type, name), default in _DROPPED_WITH_DEFAULT.items():
            if node.op_type == op_type:
                _drop_default(node, name, default, opset)
    del proto.opset_import[:]
    proto.opset_import.extend([helper.make_opsetid("", opset)])
    known = _operators_of(opset)
    for node in proto.graph.node:
        if node.domain in ("", "ai.onnx") and node.op_type not in known:
            raise _too_new(node, "it is newer", opset)


def _say_as_17(node: Any, constants: dict[str, Any], proto: Any, opset: int) -> None:
    """What operator set 18 says in another way than 17."""
    if node.op_type in _REDUCTIONS:
        _axes_to_attribute(node, constants, proto)
    elif node.op_type == "Split":
        _drop_num_outputs(node)
    elif node.op_type in ("Pad", "Resize"):
        _refuse_axes(node)
    elif node.op_type in ("ScatterND", "ScatterElements"):
        reduction = _attribute(node, "reduction")
        if reduction in (b"max", b"min"):
            raise _too_new(node, f"reduction={reduction.decode()}", opset)


def _operators_of(opset: int) -> set[str]:
    from onnx import defs

    return {s.name for s in defs.get_all_schemas_with_history() if s.domain == "" and s.since_version <= opset}


def _too_new(node: Any, what: str, opset: int) -> ExportError:
    return ExportError(
        f"expected operators of operator set {opset}; got {node.op_type} ({what}) at node {node.name}; "
        "rewrite that module, or take a target whose TensorRT reads a newer operator set"
    )


def _attribute(node: Any, name: str) -> Any:
    from onnx import helper

    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), None)


def _remove_attribute(node: Any, name: str) -> None:
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)


def _drop_default(node: Any, name: str, default: tuple[Any, ...], opset: int) -> None:
    value = _attribute(node, name)
    if value is None:
        return
    values = value if isinstance(value, list) else [value]
    if any(v != default[0] for v in values):
        raise _too_new(node, f"{name}={value}", opset)
    _remove_attribute(node, name)


def _axes_to_attribute(node: Any, constants: dict[str, Any], proto: Any) -> None:
    from onnx import helper

    empty_means_nothing = bool(_attribute(node, "noop_with_empty_axes"))
    _remove_attribute(node, "noop_with_empty_axes")
    if len(node.input) < 2 or not node.input[1]:
        if empty_means_nothing:
            node.op_type = "Identity"
            del node.attribute[:]
        return
    name = node.input[1]
    if name not in constants:
        raise _too_new(node, "axes that are computed", 17)
    del node.input[1]
    node.attribute.append(helper.make_attribute("axes", [int(a) for a in constants[name].reshape(-1)]))
    _drop_unused(proto, name)


def _drop_unused(proto: Any, name: str) -> None:
    if any(name in node.input for node in proto.graph.node):
        return
    kept = [t for t in proto.graph.initializer if t.name != name]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)


def _drop_num_outputs(node: Any) -> None:
    # without sizes the older Split divides evenly, which is what num_outputs asks where it divides; the shape
    # inference that follows notices where it does not
    _remove_attribute(node, "num_outputs")


def _refuse_axes(node: Any) -> None:
    if _attribute(node, "axes") or (node.op_type == "Pad" and len(node.input) > 3 and node.input[3]):
        raise _too_new(node, "axes", 17)


# --- canonical bytes -------------------------------------------------------------------------------------------------


def load_onnx(path: Path) -> Any:
    """Read an ONNX file.

    Raises:
        ExportError: it is missing, is not ONNX, or holds a tensor whose data do not fit its shape and type.
    """
    import onnx

    try:
        proto = onnx.load(path, load_external_data=False)
    except FileNotFoundError as error:
        raise ExportError(f"expected an ONNX file; got none at {path}; correct the path") from error
    except Exception as error:  # protobuf's DecodeError, or the operating system's
        raise ExportError(f"expected an ONNX file; got something else at {path}; export the model again") from error
    if not proto.graph.node:
        raise ExportError(f"expected an ONNX file with a graph; got an empty one at {path}; export the model again")
    damaged = next((tensor.name for tensor in proto.graph.initializer if not _readable(tensor)), None)
    if damaged is not None:
        raise ExportError(
            f"expected constants whose data fit their shapes and types; got other data for {damaged!r} at {path}; "
            "export the model again"
        )
    return proto


def _readable(tensor: Any) -> bool:
    """Whether a constant can be made an array; one whose data lie in another file is not looked at."""
    from onnx import TensorProto, numpy_helper

    if tensor.data_location == TensorProto.EXTERNAL:
        return True
    try:
        numpy_helper.to_array(tensor)
    except Exception:  # noqa: BLE001  # ValueError, TypeError, KeyError, ...: whatever says that it is no tensor
        return False
    return True


def save_onnx(proto: Any, path: Path, *, remarks: tuple[str, ...] = ()) -> ExportInfo:
    """Strip, order, check and write a model; equal graphs give equal bytes.

    Raises:
        ExportError: the checker or the strict shape inference refuses it, a shape is not static, or it is too large.
    """
    import onnx

    canonical(proto)
    _check_size(proto)
    try:
        onnx.checker.check_model(proto, full_check=True)
        proto = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            f"expected a valid ONNX model; got {_first_line(error)} at {path.name}; this is a fault of the export: "
            "rewrite the module that the message names, or report it with the model"
        ) from error
    canonical(proto)
    data = proto.SerializeToString(deterministic=True)
    atomic_write_bytes(path, data)
    return _info(proto, path, data, remarks)


def _check_size(proto: Any) -> None:
    size = proto.ByteSize()
    if size > MAX_BYTES:
        raise ExportError(
            f"expected a model of at most {MAX_BYTES / 2**30:.1f} GiB; got {size / 2**30:.2f} GiB at the ONNX export; "
            "prune more, or split the model"
        )


def describe_onnx(path: Path) -> ExportInfo:
    """What an ONNX file holds.

    Raises:
        ExportError: it is missing, is not ONNX, or has a shape that is not static.
    """
    return _info(load_onnx(path), path, path.read_bytes(), ())


def _info(proto: Any, path: Path, data: bytes, remarks: tuple[str, ...]) -> ExportInfo:
    ops = Counter(node.op_type for node in proto.graph.node)
    return ExportInfo(
        path=path,
        sha256=hashlib.sha256(data).hexdigest(),
        size_bytes=len(data),
        opset=opset_of(proto),
        inputs={value.name: static_shape(value) for value in graph_inputs(proto)},
        outputs={value.name: static_shape(value) for value in proto.graph.output},
        ops=dict(sorted(ops.items())),
        nodes=len(proto.graph.node),
        warnings=remarks,
    )


def opset_of(proto: Any) -> int:
    """Version of the default operator set."""
    return next(int(entry.version) for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))


def graph_inputs(proto: Any) -> list[Any]:
    """The inputs that are fed, without initialisers that old files list too."""
    constants = {t.name for t in proto.graph.initializer}
    return [value for value in proto.graph.input if value.name not in constants]


def static_shape(value: Any) -> tuple[int, ...]:
    """The shape of a graph input or output.

    Raises:
        ExportError: a dimension is dynamic.
    """
    dims = value.type.tensor_type.shape.dim
    if any(not dim.HasField("dim_value") for dim in dims):
        shown = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in dims]
        raise ExportError(f"expected static shapes; got {shown} at {value.name}; export with fixed sizes and batch 1")
    return tuple(int(dim.dim_value) for dim in dims)


def canonical(proto: Any) -> None:
    """Remove everything that does not change what the model computes, and put the rest in a fixed order, in place."""
    proto.producer_name, proto.producer_version, proto.domain, proto.model_version = "fusepress", "", "", 0
    proto.ir_version = IR_VERSION.get(opset_of(proto), 10)
    _strip(proto)
    for entry in sorted(proto.opset_import, key=lambda e: e.domain):
        if entry.domain == "ai.onnx":
            entry.domain = ""
    _constants_to_initializers(proto.graph)
    _canonical_graph(proto.graph)


def _canonical_graph(graph: Any) -> None:
    graph.name = "fusepress"
    _strip(graph)
    constants = {t.name for t in graph.initializer}
    inputs = [value for value in graph.input if value.name not in constants]
    _replace(graph.input, inputs)
    _replace(graph.initializer, sorted(graph.initializer, key=lambda t: t.name))
    _replace(graph.value_info, sorted(graph.value_info, key=lambda v: v.name))
    for item in (*graph.input, *graph.output, *graph.initializer, *graph.value_info, *graph.node):
        _strip(item)
    for node in graph.node:
        _replace(node.attribute, sorted(node.attribute, key=lambda a: a.name))
        for attribute in node.attribute:
            attribute.doc_string = ""
            if attribute.HasField("g"):
                _canonical_graph(attribute.g)


def _constants_to_initializers(graph: Any) -> None:
    """Constants in one place, whichever way a tool wrote them."""
    kept = []
    for node in graph.node:
        tensor = next((a.t for a in node.attribute if a.name == "value"), None) if node.op_type == "Constant" else None
        if tensor is None:
            kept.append(node)
        else:
            graph.initializer.add().CopyFrom(tensor)
            graph.initializer[-1].name = node.output[0]
    if len(kept) < len(graph.node):
        _replace(graph.node, kept)


def _strip(item: Any) -> None:
    item.doc_string = ""
    if hasattr(item, "metadata_props"):
        del item.metadata_props[:]


def _replace(field: Any, values: Sequence[Any]) -> None:
    copies = [type(value).FromString(value.SerializeToString(deterministic=True)) for value in values]
    del field[:]
    field.extend(copies)
