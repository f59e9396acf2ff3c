"""INT8 and FP8 by explicit Q/DQ, ranges measured on a fixed calibration list.

NVIDIA's modelopt places the Q/DQ the way TensorRT fuses it (residual adds, concatenations, per-channel weights); it
runs in a worker on the CPU. Batch norms are folded first. A file is made in two steps: a draft with all Q/DQ in a
float32 graph, from which every variant that leaves layers in floating point is cut, and the finished file with its
remainder in FP16. What stays in floating point is listed with the reason.
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
from fusepress.export.precision import MODELOPT, check_arrays, precision_map, require_known, save_arrays
from fusepress.export.runtime import OnnxSession
from fusepress.export.unsigned import unsigned_relus, use_unsigned
from fusepress.export.worker import answer, read_job, run_job
from fusepress.pipeline.errors import QuantizeError
from fusepress.pipeline.graph.placement import Grid
from fusepress.targets.network import read_network

Array = np.ndarray[Any, Any]
Method = Literal["max", "entropy", "percentile", "mse"]
# least squared error is worked out for INT8's even steps; in FP8 what is small has finer ones
METHODS: dict[Grid, tuple[OwnMethod, ...]] = {"int8": OWN_METHODS, "fp8": ("max", "percentile")}
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
        unsigned: Relus behind which numbers have no sign; none but for a CPU.
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
    unsigned: tuple[str, ...] = ()
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
            "unsigned_relus": len(self.unsigned),
            "notes": list(self.notes),
            "layers": [asdict(layer) for layer in self.layers],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """Q/DQ on all layers that can have it, in a float32 graph.

    Attributes:
        precision: int8 or fp8.
        source: the float32 file.
        float_proto: it, batch norms folded.
        proto: with Q/DQ; never changed, variants are copies.
        method: how its ranges were chosen.
        samples: calibration samples.
        ranges: what was measured on them, whatever the method.
        excluded: nodes that the caller excluded.
        folded: batch norms that were folded.
        unsigned: for a CPU: variants count without a sign behind Relus (export/unsigned.py).
    """

    source: Path
    float_proto: Any
    proto: Any
    method: str
    samples: int
    ranges: Ranges
    excluded: frozenset[str]
    folded: tuple[str, ...] = ()
    precision: Grid = "int8"
    unsigned: bool = False

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

    def with_scales(self, scales: Mapping[str, float], method: str) -> Draft:
        """The same Q/DQ with the scales of activations given, as training under them leaves them."""
        proto = _copy(self.proto)
        QdqGraph(proto).set_scales(scales)
        return replace(self, proto=proto, method=method)

    def variant(self, spared: Collection[str] = ()) -> Any:
        """A copy of the graph without the Q/DQ of these units, as the target takes it."""
        proto = _copy(self.proto)
        if spared:
            QdqGraph(proto).spare(spared)
        if self.unsigned:
            use_unsigned(proto)
        return proto

    def write(self, path: Path, spared: Collection[str] = ()) -> Path:
        """Write a variant with a float32 remainder, to be tried in ONNX Runtime."""
        path.write_bytes(self.variant(spared).SerializeToString())
        return path


def draft_qdq(
    onnx_in: Path,
    arrays: Mapping[str, Array],
    *,
    precision: Grid = "int8",
    method: Method = "max",
    exclude: Sequence[str] = (),
    sample_ids: Sequence[str] = (),
    unsigned: bool = False,
) -> Draft:
    """Place INT8 or FP8 (E4M3) Q/DQ and choose its ranges.

    Args:
        onnx_in: float32 model, batch 1.
        arrays: input name -> N calibration samples, each fed with batch 1.
        precision: of the layers.
        method: max (largest magnitude), percentile (99.99 %), and for INT8 mse (least squared error) or entropy
            (modelopt's own).
        exclude: names of nodes or module paths to leave in floating point.
        sample_ids: N names for messages.
        unsigned: for ONNX Runtime on a CPU: INT8 without a sign behind Relus, which TensorRT does not take.

    Raises:
        QuantizeError: a name does not exist, samples do not fit, activations are not finite, the precision has no such
            method, modelopt fails, or nothing was quantised.
    """
    if precision == "fp8" and method not in METHODS["fp8"]:
        raise QuantizeError(
            f"expected ranges by one of {', '.join(METHODS['fp8'])} in FP8; got {method}, which counts on INT8's even "
            f"steps, at {onnx_in}; change quantize.method"
        )
    source = load_onnx(onnx_in)
    excluded = excluded_nodes(source, exclude, onnx_in)
    folded = fold_batchnorm(source)
    own = method in OWN_METHODS
    samples = check_arrays(source, arrays)
    with tempfile.TemporaryDirectory(prefix="fusepress-") as name:
        folder = Path(name)
        # ranges of our own need modelopt for the places only; any sample will do for that
        seen = {key: np.asarray(array)[: 1 if own else samples] for key, array in arrays.items()}
        proto = _place(source, seen, folder, onnx_in, precision, "max" if own else "entropy", excluded)
        graph = QdqGraph(proto)
        if not graph.layers():
            layers = _coverage(source, precision_map(folder / "placed.onnx"), precision, excluded, ())
            raise _nothing(layers, precision, onnx_in)
        if precision == "fp8":
            graph.fill_grid()
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
        precision=precision,
        unsigned=unsigned,
    )
    return draft.with_method(cast("OwnMethod", method)) if own else draft


def finish_qdq(
    draft: Draft,
    arrays: Mapping[str, Array],
    onnx_out: Path,
    *,
    remainder: Remainder = "fp16",
    spared: Collection[str] = (),
) -> QuantizeInfo:
    """Write the file that is released; the same inputs give the same bytes.

    Args:
        draft: from `draft_qdq`.
        arrays: the calibration samples, for which the file's outputs must be finite.
        onnx_out: file to write.
        remainder: precision of what is not quantised. With fp16, and in FP8, the file has operator set 19 or newer,
            because older Q/DQ knows neither; else the operator set of the source is kept.
        spared: units to leave in floating point.

    Raises:
        QuantizeError: modelopt fails, no layer is left quantised, the result does not run, or unsigned numbers are to
            have an FP16 remainder, which no runtime takes.
    """
    if draft.unsigned and remainder == "fp16":
        raise QuantizeError(
            f"expected remainder fp32 with unsigned INT8, which only a CPU takes; got fp16 at {draft.source}; draft "
            "without `unsigned` for a GPU"
        )
    onnx_out.parent.mkdir(parents=True, exist_ok=True)
    proto = draft.variant(spared)
    with tempfile.TemporaryDirectory(prefix="fusepress-") as name:
        if remainder == "fp16":
            QdqGraph(proto).floor_scales()
            proto = _halve(proto, Path(name), draft.source)
    notes = _settle_opset(proto, opset_of(draft.float_proto), draft.precision, remainder)
    if draft.folded:
        notes += (f"{len(draft.folded)} batch norms folded into the convolutions before them",)
    # the rules are those of TensorRT's placement
    notes += _unsigned_note(proto) if draft.unsigned else tuple(broken_rules(proto))
    info = save_onnx(proto, onnx_out)
    layers = _coverage(draft.float_proto, precision_map(onnx_out), draft.precision, draft.excluded, spared)
    return _described(draft, arrays, info, layers, remainder, notes)


def draft_int8(onnx_in: Path, arrays: Mapping[str, Array], **options: Any) -> Draft:
    """`draft_qdq` in INT8."""
    return draft_qdq(onnx_in, arrays, precision="int8", **options)


finish_int8 = finish_qdq


def quantize_int8(
    onnx_in: Path,
    arrays: Mapping[str, Array],
    onnx_out: Path,
    *,
    method: Method = "max",
    remainder: Remainder = "fp16",
    exclude: Sequence[str] = (),
) -> QuantizeInfo:
    """Insert INT8 Q/DQ into a float32 model: `draft_qdq` and `finish_qdq` in one; the arguments are theirs.

    Raises:
        QuantizeError: as they do.
    """
    return finish_qdq(draft_qdq(onnx_in, arrays, method=method, exclude=exclude), arrays, onnx_out, remainder=remainder)


def quantize_fp8(
    onnx_in: Path,
    arrays: Mapping[str, Array],
    onnx_out: Path,
    *,
    method: Method = "max",
    remainder: Remainder = "fp16",
    exclude: Sequence[str] = (),
) -> QuantizeInfo:
    """Insert FP8 (E4M3) Q/DQ, for Ada and newer; as `quantize_int8`.

    Raises:
        QuantizeError: as `quantize_int8`.
    """
    draft = draft_qdq(onnx_in, arrays, precision="fp8", method=method, exclude=exclude)
    return finish_qdq(draft, arrays, onnx_out, remainder=remainder)


def _place(
    source: Any,
    arrays: Mapping[str, Array],
    folder: Path,
    origin: Path,
    precision: Grid,
    method: str,
    excluded: Collection[str],
) -> Any:
    """Modelopt's Q/DQ in a float32 graph, in a worker."""
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
        "exclude": [f"{re.escape(node)}$" for node in sorted({*excluded, *ruled_out})],
    }
    return _work(job, folder, f"quantise the model to {precision}", origin)


def _halve(proto: Any, folder: Path, origin: Path) -> Any:
    """Everything but Q/DQ in FP16, inputs and outputs in float32, in a worker."""
    (folder / "draft.onnx").write_bytes(proto.SerializeToString())
    job = {"step": "halve", "onnx": str(folder / "draft.onnx"), "out": str(folder / "half.onnx")}
    return _work(job, folder, "convert the rest of the model to FP16", origin)


def _work(job: dict[str, Any], folder: Path, what: str, origin: Path) -> Any:
    outcome, result = run_job(__name__, job, log=folder / "log.txt", timeout_s=TIMEOUT_S, warm=MODELOPT)
    if result is None:
        raise QuantizeError(
            f"expected modelopt to {what}; got {outcome.says(TIMEOUT_S)} at {origin}:\n"
            f"{outcome.tail}\nexclude the layer that it names, or release in fp16"
        )
    return load_onnx(Path(job["out"]))


def _described(
    draft: Draft,
    arrays: Mapping[str, Array],
    info: ExportInfo,
    layers: tuple[LayerCoverage, ...],
    remainder: str,
    notes: tuple[str, ...],
) -> QuantizeInfo:
    quantised = [layer.name for layer in layers if layer.precision == draft.precision]
    if not quantised:
        raise _nothing(layers, draft.precision, draft.source)
    _require_runs(info.path, arrays)
    return QuantizeInfo(
        onnx=info,
        precision=draft.precision,
        method=draft.method,
        remainder=remainder,
        samples=len(next(iter(arrays.values()))),
        layers=layers,
        macs_share=macs_share(draft.float_proto, quantised),
        quantize_nodes=info.ops.get("QuantizeLinear", 0),
        unsigned=tuple(unsigned_relus(load_onnx(info.path))) if draft.unsigned else (),
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


def _unsigned_note(proto: Any) -> tuple[str, ...]:
    count = len(unsigned_relus(proto))
    note = (
        f"for this CPU INT8 has no sign behind {count} Relus, in finer steps of the same range: ONNX Runtime drops "
        "them and computes the layers in front of them in integers"
    )
    return (note,) if count else ()


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
                "overflows FP16 in float32, or call finish_qdq with remainder='fp32'"
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
        high_precision_dtype="fp32",
        log_level="WARNING",
    )


def _halve_job(job: dict[str, Any]) -> None:
    import onnx
    from modelopt.onnx.autocast import convert_to_f16

    onnx.save(convert_to_f16(onnx.load(job["onnx"]), low_precision_type="fp16", keep_io_types=True), job["out"])


if __name__ == "__main__":
    _main()
