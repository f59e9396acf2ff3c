"""Why a file is not faster on this machine's CPU: measured with ONNX Runtime, node by node.

ONNX Runtime computes a layer in integers only where it finds DequantizeLinear in front of it and QuantizeLinear right
behind (its documentation on QDQ graphs); a Relu in between stops that unless quantising clips as it does, which takes
unsigned numbers. Where Q/DQ is placed for TensorRT, in front of layers only, layers run in floating point on a CPU and
the conversions come on top.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusepress.export.explain import LARGE_SHARE, LEAST_SHARE, Explanation, Finding, KernelTime
from fusepress.export.node_times import NodeTime, node_times
from fusepress.export.onnx import load_onnx
from fusepress.export.passes import made_up_batch
from fusepress.export.precision import precision_map
from fusepress.export.runtime import OnnxSession
from fusepress.export.unsigned import unsigned_candidates, unsigned_relus
from fusepress.export.wiring import QDQ
from fusepress.pipeline.store import sha256_file
from fusepress.targets.measure import measure_latency
from fusepress.targets.profile import Profile

QUANTISED = ("int8", "fp8")
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
SECONDS = 2.0  # for the latency, besides the profile
CONVERSION_ADVICE = "quantise the layers on both sides of it, or leave both in floating point (quantize.exclude)"
FLOATING_ADVICE = "leave it in floating point (quantize.exclude): without its conversions it is faster"
UNSIGNED_ADVICE = (
    "quantise what its Relu gives as unsigned numbers: compress does for host-cpu, and "
    "fusepress.export.unsigned.use_unsigned does to a file"
)
OTHER_ADVICE = "INT8 does not touch it: fewer channels or pixels here, or another operator"


def explain_on_host(
    path: Path, profile: Profile, *, threads: int | None = None, seconds: float = SECONDS
) -> Explanation:
    """Measure a file on this machine and name what costs time.

    Args:
        path: the ONNX file, input shapes fixed.
        profile: of the host.
        threads: as of `OnnxSession`.
        seconds: spent on the latency.

    Raises:
        ExportError: the file is missing, or ONNX Runtime cannot run it.
        MeasureError: it is too slow to be measured.
    """
    session = OnnxSession(path, threads, integer_kernels=True)
    measured = measure_latency(session.timed_callable(made_up_batch(session).inputs), max_seconds=seconds)
    nodes = node_times(path, threads=threads)
    total = sum(node.ms for node in nodes)
    proto = load_onnx(path)
    precisions = precision_map(path)
    found: list[Finding] = []
    if any(node.op_type in QDQ for node in proto.graph.node):
        found += _floating(nodes, precisions, unsigned_candidates(proto))
        found += _conversions(nodes)
    found += _others(nodes, total)
    kept = [finding for finding in found if finding.gain_ms >= LEAST_SHARE * total]
    small = [finding.kind for finding in found if finding.gain_ms < LEAST_SHARE * total]
    return Explanation(
        onnx_sha256=sha256_file(path),
        target=profile.name,
        power_mode=profile.default_mode,
        precision=_precision(proto, precisions),
        latency_ms=measured.mean_ms,
        low_ms=measured.mean_low_ms,
        high_ms=measured.mean_high_ms,
        extrapolating=False,
        findings=tuple(sorted(kept, key=lambda f: (-f.gain_ms, f.kind, f.where))),
        layers=len(nodes),
        measured_ms=total,
        small={kind: small.count(kind) for kind in sorted(set(small))},
        evidence="measured",
        notes=_integers(nodes, precisions, proto),
        kernels=tuple(KernelTime(name=node.name, op=node.op, precision=node.kind, ms=node.ms) for node in nodes),
    )


def _integers(nodes: Sequence[NodeTime], precisions: Mapping[str, str], proto: Any) -> tuple[str, ...]:
    """How many of the layers with Q/DQ integer kernels took, and what the file does for that."""
    low = {node.name for node in proto.graph.node if node.op_type in LAYERS and precisions[node.name] in QUANTISED}
    if not low:
        return ()
    ran = low.intersection(node.name for node in nodes if node.kind == "integer")
    found, relus = f"{len(ran)} of {len(low)} layers with Q/DQ ran in integers", len(unsigned_relus(proto))
    does = f"; behind {relus} Relus the file counts without a sign, so that integer kernels absorb them"
    return (found + (does if relus else ""),)


def _precision(proto: Any, precisions: Mapping[str, str]) -> str:
    """What the file is in: the grid of its Q/DQ, else FP16 where any node computes in it."""
    pairs = {precisions[node.name] for node in proto.graph.node if node.op_type in QDQ}
    return next((name for name in QUANTISED if name in pairs), "fp16" if "fp16" in precisions.values() else "fp32")


def _floating(nodes: Sequence[NodeTime], precisions: Mapping[str, str], unsigned: frozenset[str]) -> Iterator[Finding]:
    """Layers that the file has Q/DQ for, and that run in floating point."""
    for node in nodes:
        if node.kind == "floating" and precisions.get(node.name) in QUANTISED:
            yield Finding(
                kind="stayed floating",
                where=node.name,
                what=f"{node.op}: the file has Q/DQ for it, and ONNX Runtime has no integer kernel for where they are",
                advice=UNSIGNED_ADVICE if node.name in unsigned else FLOATING_ADVICE,
                gain_ms=node.ms,
                measured_ms=node.ms,
                source="engine",
            )


def _conversions(nodes: Sequence[NodeTime]) -> Iterator[Finding]:
    for node in nodes:
        if node.kind == "conversion":
            yield Finding(
                kind="reformat",
                where=node.name,
                what=f"{node.op} at run time, between kernels of different precisions",
                advice=CONVERSION_ADVICE,
                gain_ms=node.ms,
                measured_ms=node.ms,
                source="engine",
            )


def _others(nodes: Sequence[NodeTime], total: float) -> Iterator[Finding]:
    """Operators that are neither layers nor conversions and take much of the time."""
    for node in nodes:
        if node.kind == "other" and node.ms >= LARGE_SHARE * total:
            yield Finding(
                kind="operator",
                where=node.name,
                what=f"{node.op} takes {node.ms:.3g} of {total:.3g} ms in any precision of the layers",
                advice=OTHER_ADVICE,
                gain_ms=node.ms,
                measured_ms=node.ms,
                source="engine",
            )
