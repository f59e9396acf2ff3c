"""INT8 and FP8 by explicit Q/DQ, ranges measured on a fixed calibration list.

NVIDIA's modelopt places the Q/DQ the way TensorRT fuses it (residual adds, concatenations, per-channel weights); it
runs in a worker on the CPU. Batch norms are folded first. INT8 is made in two steps: a draft with all Q/DQ in a float32
graph, from which every variant that leaves layers in floating point is cut, and the finished file with its remainder in
FP16. What stays in floating point is listed with the reason.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from fusepress.calib.qdq import LAYERS, QdqGraph, broken_rules, fold_batchnorm
from fusepress.calib.ranges import OWN_METHODS, OwnMethod, Ranges, measure_ranges
from fusepress.export.onnx import EXPORTER_OPSET, ExportInfo, load_onnx, lower_opset, opset_of, save_onnx
from fusepress.export.precision import check_arrays, precision_map, require_known, save_arrays
from fusepress.export.runtime import OnnxSession
from fusepress.export.worker import answer, read_job, run_job
from fusepress.pipeline.errors import QuantizeError
from fusepress.targets.network import read_network

Array = np.ndarray[Any, Any]
Method = Literal["max", "entropy", "percentile", "mse"]
Remainder = Literal["fp16", "fp32"]
TIMEOUT_S = 3600.0
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
        macs_share: share of the multiply-accumulates that quantised layers do.
        quantize_nodes: QuantizeLinear nodes in the file.
        notes: what a reader should know.
    """

    onnx: ExportInfo
    precision: str
    method: str
    remainder: str
    samples: int
    layers: tuple[LayerCoverage, ...]
    macs_share: float
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
            "macs_share": self.macs_share,
            "quantize_nodes": self.quantize_nodes,
            "notes": list(self.notes),
            "layers": [asdict(layer) for layer in self.layers],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """INT8 Q/DQ on all layers that can have it, in a float32 graph.

    Attributes:
        source: the float32 file.
        float_proto: it, batch norms folded.
        proto: with Q/DQ; never changed, variants are copies.
        method: how its ranges were chosen.
        samples: calibration samples.
        ranges: what was measured on them, whatever the method.
        excluded: nodes that the caller excluded.
        folded: batch norms that were folded.
    """

    source: Path
    float_proto: Any
    proto: Any
    method: Method
    samples: int
    ranges: Ranges
    excluded: frozenset[str]
    folded: tuple[str, ...] = ()

    def units(self) -> dict[str, list[str]]:
        """What can be left in floating point by itself (`QdqGraph.units`)."""
        return QdqGraph(self.proto).units()

    def layers(self) -> list[str]:
        """Layers with weights among them."""
        return QdqGraph(self.proto).layers()

    def with_method(self, method: OwnMethod) -> Draft:
        """The same Q/DQ with other ranges from the same measurement."""
        proto = _copy(self.proto)
        graph = QdqGraph(proto)
        graph.set_limits(self.ranges.limits(method))
        graph.share_scales()
        return replace(self, proto=proto, method=method)

    def variant(self, spared: Collection[str] = ()) -> Any:
        """A copy of the graph without the Q/DQ of these units."""
        proto = _copy(self.proto)
        if spared:
            QdqGraph(proto).spare(spared)
        return proto

    def write(self, path: Path, spared: Collection[str] = ()) -> Path:
        """Write a variant with a float32 remainder, to be tried in ONNX Runtime."""
        path.write_bytes(self.variant(spared).SerializeToString())
        return path


def draft_int8(
    onnx_in: Path,
    arrays: Mapping[str, Array],
    *,
    method: Method = "max",
    exclude: Sequence[str] = (),
    sample_ids: Sequence[str] = (),
) -> Draft:
    """Place INT8 Q/DQ and choose its ranges.

    Args:
        onnx_in: float32 model, batch 1.
        arrays: input name -> N calibration samples, each fed with batch 1.
        method: max (largest magnitude), percentile (99.99 %), mse (least squared error), or entropy (modelopt's own).
        exclude: names of nodes or module paths to leave in floating point.
        sample_ids: N names for messages.

    Raises:
        QuantizeError: a name does not exist, samples do not fit, activations are not finite, modelopt fails, or nothing
            was quantised.
    """
    source = load_onnx(onnx_in)
    excluded = excluded_nodes(source, exclude, onnx_in)
    folded = fold_batchnorm(source)
    own = method in OWN_METHODS
    samples = check_arrays(source, arrays)
    with tempfile.TemporaryDirectory(prefix="fusepress-") as name:
        folder = Path(name)
        # ranges of our own need modelopt for the places only; any sample will do for that
        seen = {key: np.asarray(array)[: 1 if own else samples] for key, array in arrays.items()}
        proto = _place(source, seen, folder, onnx_in, "int8", "max" if own else "entropy", "fp32", excluded)
        graph = QdqGraph(proto)
        if not graph.layers():
            raise _nothing(
                _coverage(source, precision_map(folder / "placed.onnx"), "int8", excluded, ()), "int8", onnx_in
            )
        floating = folder / "float.onnx"
        bare = _copy(proto)
        QdqGraph(bare).spare(graph.units())
        floating.write_bytes(bare.SerializeToString())
        ranges = measure_ranges(floating, graph.activations(), arrays, sample_ids)
    graph.share_scales()
    draft = Draft(
        source=onnx_in,
        float_proto=source,
        proto=proto,
        method=method,
        samples=samples,
        ranges=ranges,
        excluded=frozenset(excluded),
        folded=tuple(folded),
    )
    return draft.with_method(cast("OwnMethod", method)) if own else draft


def finish_int8(
    draft: Draft,
    arrays: Mapping[str, Array],
    onnx_out: Path,
    *,
    remainder: Remainder = "fp16",
    spared: Collection[str] = (),
) -> QuantizeInfo:
    """Write the file that is released; the same inputs give the same bytes.

    Args:
        draft: from `draft_int8`.
        arrays: the calibration samples, for which the file's outputs must be finite.
        onnx_out: file to write.
        remainder: precision of what is not INT8. With fp16 the file has operator set 19 or newer, because older Q/DQ
            knows no FP16; with fp32 the operator set of the source is kept.
        spared: units to leave in floating point.

    Raises:
        QuantizeError: modelopt fails, no layer is left in INT8, or the result does not run.
    """
    onnx_out.parent.mkdir(parents=True, exist_ok=True)
    proto = draft.variant(spared)
    with tempfile.TemporaryDirectory(prefix="fusepress-") as name:
        if remainder == "fp16":
            QdqGraph(proto).floor_scales()
            proto = _halve(proto, Path(name), draft.source)
    notes = _settle_opset(proto, opset_of(draft.float_proto), "int8", remainder)
    if draft.folded:
        notes += (f"{len(draft.folded)} batch norms folded into the convolutions before them",)
    notes += tuple(broken_rules(proto))
    info = save_onnx(proto, onnx_out)
    layers = _coverage(draft.float_proto, precision_map(onnx_out), "int8", draft.excluded, spared)
    return _described("int8", draft.float_proto, draft.source, arrays, info, layers, draft.method, remainder, notes)


def quantize_int8(
    onnx_in: Path,
    arrays: Mapping[str, Array],
    onnx_out: Path,
    *,
    method: Method = "max",
    remainder: Remainder = "fp16",
    exclude: Sequence[str] = (),
) -> QuantizeInfo:
    """Insert INT8 Q/DQ into a float32 model: `draft_int8` and `finish_int8` in one; the arguments are theirs.

    Raises:
        QuantizeError: as they do.
    """
    return finish_int8(
        draft_int8(onnx_in, arrays, method=method, exclude=exclude), arrays, onnx_out, remainder=remainder
    )


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
    source = load_onnx(onnx_in)
    excluded = excluded_nodes(source, exclude, onnx_in)
    fold_batchnorm(source)
    onnx_out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fusepress-") as name:
        proto = _place(source, arrays, Path(name), onnx_in, "fp8", "max", remainder, excluded)
    notes = _settle_opset(proto, opset_of(source), "fp8", remainder)
    info = save_onnx(proto, onnx_out)
    layers = _coverage(source, precision_map(onnx_out), "fp8", excluded, ())
    return _described("fp8", source, onnx_in, arrays, info, layers, "max", remainder, notes)


def _place(
    source: Any,
    arrays: Mapping[str, Array],
    folder: Path,
    origin: Path,
    precision: str,
    method: str,
    remainder: str,
    excluded: Collection[str],
) -> Any:
    """Modelopt's Q/DQ, in a worker."""
    ruled_out = {n.name for n in source.graph.node if n.op_type in RULED_OUT}
    save_arrays(folder / "data.npz", source, arrays)
    # modelopt writes its intermediate files beside its input
    (folder / "in.onnx").write_bytes(source.SerializeToString())
    job = {
        "step": "place",
        "onnx": str(folder / "in.onnx"),
        "out": str(folder / "placed.onnx"),
        "data": str(folder / "data.npz"),
        "mode": precision,
        "method": method,
        "remainder": remainder,
        "exclude": [f"{re.escape(node)}$" for node in sorted({*excluded, *ruled_out})],
    }
    return _work(job, folder, f"quantise the model to {precision}", origin)


def _halve(proto: Any, folder: Path, origin: Path) -> Any:
    """Everything but Q/DQ in FP16, inputs and outputs in float32, in a worker."""
    (folder / "draft.onnx").write_bytes(proto.SerializeToString())
    job = {"step": "halve", "onnx": str(folder / "draft.onnx"), "out": str(folder / "half.onnx")}
    return _work(job, folder, "convert the rest of the model to FP16", origin)


def _work(job: dict[str, Any], folder: Path, what: str, origin: Path) -> Any:
    outcome, result = run_job(__name__, job, log=folder / "log.txt", timeout_s=TIMEOUT_S)
    if result is None:
        raise QuantizeError(
            f"expected modelopt to {what}; got {outcome.says(TIMEOUT_S)} at {origin}:\n"
            f"{outcome.tail}\nexclude the layer that it names, or release in fp16"
        )
    return load_onnx(Path(job["out"]))


def _described(
    precision: str,
    source: Any,
    origin: Path,
    arrays: Mapping[str, Array],
    info: ExportInfo,
    layers: tuple[LayerCoverage, ...],
    method: str,
    remainder: str,
    notes: tuple[str, ...],
) -> QuantizeInfo:
    if not any(layer.precision == precision for layer in layers):
        raise _nothing(layers, precision, origin)
    _require_runs(info.path, arrays)
    return QuantizeInfo(
        onnx=info,
        precision=precision,
        method=method,
        remainder=remainder,
        samples=len(next(iter(arrays.values()))),
        layers=layers,
        macs_share=macs_share(source, [layer.name for layer in layers if layer.precision == precision]),
        quantize_nodes=info.ops.get("QuantizeLinear", 0),
        notes=notes,
    )


def _nothing(layers: Sequence[LayerCoverage], precision: str, origin: Path) -> QuantizeError:
    return QuantizeError(
        f"expected at least one layer in {precision}; got none at {origin}: "
        f"{'; '.join(f'{e.name}: {e.reason}' for e in layers[:4])}; exclude less, or release in fp16"
    )


def layer_macs(proto: Any) -> dict[str, int]:
    """Multiply-accumulates of one inference by the name of the layer's node."""
    return {kernel.name: kernel.macs for kernel in read_network(proto.SerializeToString()).kernels if kernel.macs}


def macs_share(proto: Any, layers: Collection[str]) -> float:
    """Share of a float model's multiply-accumulates that these layers do."""
    macs = layer_macs(proto)
    return sum(macs.get(name, 0) for name in layers) / max(1, sum(macs.values()))


def _copy(proto: Any) -> Any:
    made = type(proto)()
    made.CopyFrom(proto)
    return made


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


def _coverage(
    source: Any, found: Mapping[str, str], precision: str, excluded: Collection[str], spared: Collection[str]
) -> tuple[LayerCoverage, ...]:
    constants = {t.name for t in source.graph.initializer}
    layers = []
    for node in source.graph.node:
        if node.op_type not in LAYERS or not set(node.input[:2]) & constants:
            continue
        got = found.get(node.name, "fused away")
        reason = "" if got == precision else _reason(node, excluded, spared, precision)
        layers.append(LayerCoverage(name=node.name, op=node.op_type, precision=got, reason=reason))
    return tuple(layers)


def _reason(node: Any, excluded: Collection[str], spared: Collection[str], precision: str) -> str:
    if node.name in excluded:
        return "excluded by the recipe"
    if node.name in spared:
        return "spared by the search: accuracy"
    if node.op_type in RULED_OUT:
        return RULED_OUT[node.op_type]
    if node.op_type in ("Gemm", "MatMul"):
        return f"modelopt leaves matrix-vector and small matrix products out: no gain in {precision}"
    return f"modelopt leaves this convolution out: too few channels or a kernel without {precision} support"


def _require_runs(path: Path, arrays: Mapping[str, Array]) -> None:
    for name, value in OnnxSession(path).run_numpy(arrays).items():
        bad = ~np.isfinite(value.reshape(value.shape[0], -1)).all(axis=1)
        if bad.any():
            raise QuantizeError(
                f"expected finite outputs; got NaN or infinity in {name!r} for {int(bad.sum())} of {bad.size} "
                f"calibration samples at {path.name}; release with `quantize.precision: fp16`, which leaves what "
                "overflows FP16 in float32, or call finish_int8 with remainder='fp32'"
            )


def _main() -> None:
    """In the worker: modelopt, which prints, patches ONNX Runtime's quantiser and iterates over sets."""
    job = read_job()
    {"place": _place_job, "halve": _halve_job}[job["step"]](job)
    answer(job, {"ok": True})


def _place_job(job: dict[str, Any]) -> None:
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


def _halve_job(job: dict[str, Any]) -> None:
    import onnx
    from modelopt.onnx.autocast import convert_to_f16

    onnx.save(convert_to_f16(onnx.load(job["onnx"]), low_precision_type="fp16", keep_io_types=True), job["out"])


if __name__ == "__main__":
    _main()
