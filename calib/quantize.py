"""INT8 and FP8 by explicit Q/DQ, ranges measured on a fixed calibration list.

NVIDIA's modelopt places the Q/DQ the way TensorRT fuses it (residual adds, concatenations, per-channel weights); it
runs in a worker on the CPU. What it leaves in floating point is listed with the reason.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fusepress.export.onnx import EXPORTER_OPSET, ExportInfo, load_onnx, lower_opset, opset_of, save_onnx
from fusepress.export.precision import precision_map, require_known, save_arrays
from fusepress.export.runtime import OnnxSession
from fusepress.export.worker import answer, read_job, run_job
from fusepress.pipeline.errors import QuantizeError

Array = np.ndarray[Any, Any]
Method = Literal["max", "entropy"]
Remainder = Literal["fp16", "fp32"]
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
TIMEOUT_S = 3600.0
QDQ_FP16_OPSET = 19  # the first whose Q/DQ takes FP16
# TensorRT ran it in floating point whatever its Q/DQ said, with an extra kernel for the weights
RULED_OUT = {"ConvTranspose": "TensorRT runs transposed convolutions in floating point"}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCoverage:
    """One layer with weights: in which precision it computes, and why not the asked one."""

    name: str
    op: str
    precision: str
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeInfo:
    """What became of a model.

    Attributes:
        onnx: the file written.
        precision: int8 or fp8.
        method: how ranges were chosen.
        remainder: precision of everything else.
        samples: calibration samples.
        layers: every layer with weights.
        quantize_nodes: QuantizeLinear nodes in the file.
        notes: what a reader should know.
    """

    onnx: ExportInfo
    precision: str
    method: str
    remainder: str
    samples: int
    layers: tuple[LayerCoverage, ...]
    quantize_nodes: int
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        covered = sum(layer.precision == self.precision for layer in self.layers)
        return {
            "precision": self.precision,
            "method": self.method,
            "remainder": self.remainder,
            "samples": self.samples,
            "opset": self.onnx.opset,
            "quantised_layers": covered,
            "other_layers": len(self.layers) - covered,
            "quantize_nodes": self.quantize_nodes,
            "notes": list(self.notes),
            "layers": [asdict(layer) for layer in self.layers],
        }


def quantize_int8(
    onnx_in: Path,
    arrays: Mapping[str, Array],
    onnx_out: Path,
    *,
    method: Method = "entropy",
    remainder: Remainder = "fp16",
    exclude: Sequence[str] = (),
) -> QuantizeInfo:
    """Insert INT8 Q/DQ into a float32 model; the same inputs give the same bytes.

    Args:
        onnx_in: float32 model, batch 1.
        arrays: input name -> N calibration samples, each fed with batch 1.
        onnx_out: file to write.
        method: max (largest value) or entropy (least information lost).
        remainder: precision of what is not INT8. With fp16 the file has operator set 19 or newer, because older Q/DQ
            knows no FP16; with fp32 the operator set of `onnx_in` is kept.
        exclude: names of nodes or module paths to leave in floating point.

    Raises:
        QuantizeError: a name does not exist, samples do not fit, modelopt fails, nothing was quantised, or the
            result does not run.
    """
    return _quantize("int8", onnx_in, arrays, onnx_out, method=method, remainder=remainder, exclude=exclude)


def quantize_fp8(
    onnx_in: Path,
    arrays: Mapping[str, Array],
    onnx_out: Path,
    *,
    remainder: Remainder = "fp16",
    exclude: Sequence[str] = (),
) -> QuantizeInfo:
    """Insert FP8 (E4M3) Q/DQ, for Ada and newer; as `quantize_int8`, ranges by the largest value.

    Raises:
        QuantizeError: as `quantize_int8`.
    """
    return _quantize("fp8", onnx_in, arrays, onnx_out, method="max", remainder=remainder, exclude=exclude)


def _quantize(
    precision: Literal["int8", "fp8"],
    onnx_in: Path,
    arrays: Mapping[str, Array],
    onnx_out: Path,
    *,
    method: Method,
    remainder: Remainder,
    exclude: Sequence[str],
) -> QuantizeInfo:
    source = load_onnx(onnx_in)
    excluded = excluded_nodes(source, exclude, onnx_in)
    ruled_out = {n.name for n in source.graph.node if n.op_type in RULED_OUT}
    onnx_out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fusepress-") as name:
        folder = Path(name)
        samples = save_arrays(folder / "data.npz", source, arrays)
        # modelopt writes its intermediate files beside its input
        (folder / "in.onnx").write_bytes(source.SerializeToString())
        job = {
            "onnx": str(folder / "in.onnx"),
            "out": str(folder / "out.onnx"),
            "data": str(folder / "data.npz"),
            "mode": precision,
            "method": method,
            "remainder": remainder,
            "exclude": [f"{re.escape(node)}$" for node in sorted(excluded | ruled_out)],
        }
        outcome, result = run_job(__name__, job, log=folder / "log.txt", timeout_s=TIMEOUT_S)
        if result is None:
            raise QuantizeError(
                f"expected modelopt to quantise the model to {precision}; got {outcome.says(TIMEOUT_S)} at {onnx_in}:\n"
                f"{outcome.tail}\nexclude the layer that it names, or release in fp16"
            )
        proto = load_onnx(folder / "out.onnx")
        notes = _settle_opset(proto, opset_of(source), precision, remainder)
        info = save_onnx(proto, onnx_out)
    layers = _coverage(source, onnx_out, precision, excluded)
    if not any(layer.precision == precision for layer in layers):
        raise QuantizeError(
            f"expected at least one layer in {precision}; got none at {onnx_in}: "
            f"{'; '.join(f'{e.name}: {e.reason}' for e in layers[:4])}; exclude less, or release in fp16"
        )
    _require_runs(onnx_out, arrays)
    return QuantizeInfo(
        onnx=info,
        precision=precision,
        method=method,
        remainder=remainder,
        samples=samples,
        layers=layers,
        quantize_nodes=info.ops.get("QuantizeLinear", 0),
        notes=notes,
    )


def excluded_nodes(proto: Any, exclude: Sequence[str], path: Path) -> set[str]:
    """The nodes that a list of node names and module paths stands for.

    Raises:
        QuantizeError: a name fits no node.
    """
    names = [node.name for node in proto.graph.node]
    known = set(names)
    for name in names:
        parts = name.rpartition("/")[0].split(".")
        known |= {".".join(parts[: i + 1]) for i in range(len(parts))}
    require_known(exclude, known - {""}, "nodes or modules", path)
    return {
        name for name in names for wanted in exclude if name == wanted or name.startswith((f"{wanted}/", f"{wanted}."))
    }


def _settle_opset(proto: Any, wanted: int, precision: str, remainder: str) -> tuple[str, ...]:
    """Back to the source's operator set where Q/DQ of that version can say it."""
    found = opset_of(proto)
    if found <= wanted:
        return ()
    if precision == "int8" and remainder == "fp32":
        lower_opset(proto, wanted)
        return ()
    why = "FP8 types" if precision == "fp8" else "Q/DQ in FP16"
    note = f"operator set {found} instead of {wanted}, because older ones have no {why}"
    if wanted < EXPORTER_OPSET:
        note += f"; the target's importer wants {wanted} for an operator of this model: check on the device"
    return (note,)


def _coverage(source: Any, path: Path, precision: str, excluded: set[str]) -> tuple[LayerCoverage, ...]:
    found = precision_map(path)
    constants = {t.name for t in source.graph.initializer}
    layers = []
    for node in source.graph.node:
        if node.op_type not in LAYERS or not set(node.input[:2]) & constants:
            continue
        got = found.get(node.name, "fused away")
        reason = "" if got == precision else _reason(node, excluded, precision)
        layers.append(LayerCoverage(name=node.name, op=node.op_type, precision=got, reason=reason))
    return tuple(layers)


def _reason(node: Any, excluded: set[str], precision: str) -> str:
    if node.name in excluded:
        return "excluded by the recipe"
    if node.op_type in RULED_OUT:
        return RULED_OUT[node.op_type]
    if node.op_type in ("Gemm", "MatMul"):
        return f"modelopt leaves matrix-vector and small matrix products out: no gain in {precision}"
    return f"modelopt leaves this convolution out: too few channels or a kernel without {precision} support"


def _require_runs(path: Path, arrays: Mapping[str, Array]) -> None:
    for name, value in OnnxSession(path).run_numpy({n: np.asarray(a)[:1] for n, a in arrays.items()}).items():
        if not np.isfinite(value).all():
            raise QuantizeError(
                f"expected finite outputs; got NaN or infinity in {name!r} for the first calibration sample at "
                f"{path.name}; release with remainder fp32, or exclude the overflowing layer"
            )


def _main() -> None:
    """In the worker: modelopt, which prints, patches ONNX Runtime's quantiser and iterates over sets."""
    job = read_job()
    with np.load(job["data"], allow_pickle=False) as stored:
        data = {name: stored[name] for name in stored.files}
    from modelopt.onnx.quantization import quantize

    quantize(
        job["onnx"],
        quantize_mode=job["mode"],
        calibration_data=data,
        calibration_method=job["method"],
        calibration_eps=["cpu"],
        nodes_to_exclude=job["exclude"],
        output_path=job["out"],
        high_precision_dtype=job["remainder"],
        log_level="WARNING",
    )
    answer(job, {"ok": True})


if __name__ == "__main__":
    _main()
