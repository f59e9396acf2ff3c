"""FP16 by NVIDIA's autocast, inputs and outputs kept in float32; and which node computes in which precision.

The ONNX file carries the precision (Casts), so that TensorRT 10 with strong typing and TensorRT 11 build the same.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fusepress.export.onnx import ExportInfo, graph_inputs, load_onnx, save_onnx
from fusepress.export.runtime import OnnxSession
from fusepress.export.worker import answer, read_job, run_job
from fusepress.pipeline.errors import QuantizeError

Array = np.ndarray[Any, Any]
DATA_MAX = 512.0  # FP16's last place is worth 0.5 at 512: nodes with larger values stay in float32
TIMEOUT_S = 1800.0
MODELOPT = ("modelopt.onnx.quantization", "modelopt.onnx.autocast")  # seconds of imports
_NAMES = {
    "FLOAT": "fp32",
    "FLOAT16": "fp16",
    "BFLOAT16": "bf16",
    "DOUBLE": "fp64",
    "FLOAT8E4M3FN": "fp8",
    "INT8": "int8",
    "UINT8": "int8",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp16Info:
    """What became of a model.

    Attributes:
        onnx: the file written.
        fp16_nodes: nodes that compute in FP16.
        fp32_nodes: nodes that stayed in float32.
        ranges_checked: activations were measured on data; without data only weights were looked at.
    """

    onnx: ExportInfo
    fp16_nodes: tuple[str, ...]
    fp32_nodes: tuple[str, ...]
    ranges_checked: bool


def convert_fp16(
    onnx_in: Path,
    onnx_out: Path,
    *,
    arrays: Mapping[str, Array] | None = None,
    keep_fp32_ops: Sequence[str] = (),
    keep_fp32_nodes: Sequence[str] = (),
    data_max: float = DATA_MAX,
) -> Fp16Info:
    """Convert a float32 model to FP16 with float32 inputs and outputs; the same input gives the same bytes.

    Args:
        onnx_in: float32 model, batch 1.
        onnx_out: file to write.
        arrays: input name -> N samples. Nodes whose values exceed `data_max` on them stay in float32, and the result
            is run on them. None: only weights outside FP16's range keep their node in float32.
        keep_fp32_ops: operators that stay in float32.
        keep_fp32_nodes: names of nodes that stay in float32.
        data_max: largest absolute value that a node in FP16 may meet.

    Raises:
        QuantizeError: a name does not exist, the conversion fails, or the result overflows on `arrays`.
    """
    proto = load_onnx(onnx_in)
    known_nodes, known_ops = {n.name for n in proto.graph.node}, {n.op_type for n in proto.graph.node}
    require_known(keep_fp32_nodes, known_nodes, "nodes", onnx_in)
    require_known(keep_fp32_ops, known_ops, "operators", onnx_in)
    onnx_out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fusepress-") as name:
        folder = Path(name)
        if arrays is not None:
            save_arrays(folder / "data.npz", proto, arrays)
        job = {
            "onnx": str(Path(onnx_in).resolve()),
            "out": str(folder / "fp16.onnx"),
            "data": str(folder / "data.npz") if arrays is not None else None,
            "data_max": data_max if arrays is not None else None,
            "ops": list(keep_fp32_ops),
            "nodes": [f"^{re.escape(node)}$" for node in keep_fp32_nodes],
        }
        log = folder / "log.txt"
        outcome, result = run_job(__name__, job, log=log, timeout_s=TIMEOUT_S, warm=MODELOPT)
        if result is None:
            raise QuantizeError(
                f"expected autocast to convert the model to FP16; got {outcome.says(TIMEOUT_S)} at {onnx_in}:\n"
                f"{outcome.tail}\nkeep the operator that it names in float32, or release in fp32"
            )
        info = save_onnx(load_onnx(folder / "fp16.onnx"), onnx_out)
    if arrays is not None:
        _require_finite(onnx_out, arrays)
    precisions = precision_map(onnx_out)
    return Fp16Info(
        onnx=info,
        fp16_nodes=tuple(n for n, p in precisions.items() if p == "fp16"),
        fp32_nodes=tuple(n for n, p in precisions.items() if p == "fp32"),
        ranges_checked=arrays is not None,
    )


def require_known(names: Sequence[str], known: set[str], kind: str, path: Path) -> None:
    """Refuse names that the graph does not have.

    Raises:
        QuantizeError: lists them and a few that exist.
    """
    unknown = [name for name in names if name not in known]
    if unknown:
        raise QuantizeError(
            f"expected names of {kind} of the model; got {unknown} at {path}; it has for example {sorted(known)[:8]}"
        )


def save_arrays(path: Path, proto: Any, arrays: Mapping[str, Array]) -> None:
    """Write sample arrays for a worker, those that the graph takes.

    Raises:
        QuantizeError: as `check_arrays`.
    """
    check_arrays(proto, arrays)
    np.savez(path, allow_pickle=False, **{v.name: np.asarray(arrays[v.name]) for v in graph_inputs(proto)})


def check_arrays(proto: Any, arrays: Mapping[str, Array]) -> int:
    """Compare sample arrays with the inputs of a graph; others than those that it takes do not matter.

    Returns:
        The number of samples N.

    Raises:
        QuantizeError: an input is missing, has another shape, or the numbers of samples differ.
    """
    wanted = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph_inputs(proto)}
    shapes = {name: np.asarray(arrays[name]).shape for name in wanted if name in arrays}
    sizes = {shape[0] for shape in shapes.values()}
    fits = all(list(shape[1:]) == wanted[name][1:] for name, shape in shapes.items())
    if set(shapes) != set(wanted) or not fits or len(sizes) != 1 or 0 in sizes:
        raise QuantizeError(
            f"expected samples of the inputs { ({n: ('N', *s[1:]) for n, s in wanted.items()}) }; got {shapes}; "
            "take them from calibration_arrays(task, card)"
        )
    return int(next(iter(sizes)))


def _require_finite(path: Path, arrays: Mapping[str, Array]) -> None:
    for name, value in OnnxSession(path).run_numpy(arrays).items():
        bad = ~np.isfinite(value.reshape(value.shape[0], -1)).all(axis=1)
        if bad.any():
            raise QuantizeError(
                f"expected finite outputs in FP16; got NaN or infinity in {name!r} for {int(bad.sum())} of "
                f"{bad.size} samples at {path.name}; name the overflowing nodes in keep_fp32_nodes, or lower data_max"
            )


def precision_map(path: Path) -> dict[str, str]:
    """The precision that each node computes in: fp32, fp16, int8, fp8, or the name of another type (int64, bool).

    A layer with weights counts as int8 (fp8) where both its data and its weights come out of a DequantizeLinear.

    Raises:
        ExportError: the file is missing or not ONNX.
    """
    import onnx

    proto = onnx.shape_inference.infer_shapes(load_onnx(path))
    types = {t.name: t.data_type for t in proto.graph.initializer}
    values = [*proto.graph.input, *proto.graph.output, *proto.graph.value_info]
    types |= {v.name: v.type.tensor_type.elem_type for v in values}
    producer = {output: node for node in proto.graph.node for output in node.output}
    return {node.name: _precision(node, producer, types) for node in proto.graph.node}


def _precision(node: Any, producer: Mapping[str, Any], types: Mapping[str, int]) -> str:
    import onnx

    def named(tensor: str) -> str:
        name = str(onnx.TensorProto.DataType.Name(types.get(tensor, 0)))
        return _NAMES.get(name, name.lower())

    if node.op_type == "QuantizeLinear":
        return named(node.output[0])
    if node.op_type == "DequantizeLinear":
        return named(node.input[0])
    sources = [producer.get(tensor) for tensor in node.input[:2]]
    if len(sources) == 2 and all(s is not None and s.op_type == "DequantizeLinear" for s in sources):
        first = sources[0]
        assert first is not None
        return named(first.input[0])
    floats = [named(t) for t in (*node.output, *node.input) if named(t) in set(_NAMES.values())]
    return floats[0] if floats else named(node.output[0])


def _main() -> None:
    """In the worker: autocast, which prints, warns and iterates over sets."""
    job = read_job()
    import onnx
    from modelopt.onnx.autocast import convert_to_mixed_precision

    proto = convert_to_mixed_precision(
        onnx_path=job["onnx"],
        low_precision_type="fp16",
        nodes_to_exclude=job["nodes"],
        op_types_to_exclude=job["ops"],
        data_max=job["data_max"] if job["data_max"] is not None else np.inf,
        keep_io_types=True,
        calibration_data=job["data"],
        providers=["cpu"],
    )
    onnx.save(proto, job["out"])
    answer(job, {"ok": True})


if __name__ == "__main__":
    _main()
