"""Why an engine is not faster: what costs time in it, and what the prediction says it would cost if it were mended.

Every gain is predicted by the roofline of targets/predict.py: the model as it is against the model with this one fault
mended, all else equal. The prediction assumes that precision borders and activations fuse; where they do not, the cost
of the kernel in between is predicted and added. Where a profile of the device names the layer, its measured time is
given beside. Gains of several findings on one layer do not add up.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fusepress.export.fusion import Seam, engine_seams, graph_seams
from fusepress.export.inspector import EngineLayer
from fusepress.export.onnx import load_onnx
from fusepress.export.wiring import Wiring
from fusepress.pipeline.errors import BuildError
from fusepress.pipeline.store import sha256_file
from fusepress.targets.network import Kernel, Network, Tensor, read_network
from fusepress.targets.predict import (
    STEM_CHANNELS,
    Prediction,
    Times,
    Work,
    describe_work,
    kernel_precisions,
    kernel_times,
    predict_network,
    resolve,
)
from fusepress.targets.profile import Precision, Profile
from fusepress.targets.roofline import constants_of

FindingKind = Literal[
    "reformat",
    "stayed floating",
    "odd channels",
    "memory bound",
    "depthwise",
    "broken fusion",
    "launch bound",
    "operator",
]
LEAST_SHARE = 0.002  # of the latency that a mended fault must win, else it is not worth a line
LARGE_SHARE = 0.05  # of the latency that memory-bound kernels and launch-bound tails must take
FEWEST_LAUNCHES = 4
NARROWER: dict[Precision, Precision] = {"fp32": "fp16", "fp16": "int8"}
ADVICE: dict[FindingKind, str] = {  # for engines; explain_host.py has a CPU's
    "reformat": "give the layers on both sides one precision, or move the border to where a kernel computes",
    "stayed floating": "quantise it if the accuracy gate allows",
    "odd channels": "prune to multiples, with prune.align or a target whose alignment the plan follows",
    "memory bound": "fewer channels or pixels here, a narrower precision, or a fusion with its neighbours",
    "depthwise": "a smaller window or fewer channels; matrix cores, and so INT8, do not help it",
    "broken fusion": "put the activation right behind its convolution, with Q/DQ only in front of both",
    "launch bound": "fewer and larger operations, removal of blocks, or a CUDA graph where none is used",
}
TRANSPOSED = "TensorRT runs transposed convolutions in floating point: use Resize and a convolution"
UNFUSED = (
    "the file lets them fuse and the builder did not: nothing to mend in the graph; try this layer in floating point "
    "(quantize.exclude), or another version of the builder"
)
REWRITE_BY = "rewrite the file: fusepress.export.hygiene.rewrite(path, path, [{name!r}])"
BUILDER_CHOSE = "the file has Q/DQ for it and the builder chose otherwise: check its operands' scales and alignment"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that costs time.

    Attributes:
        kind: of fault.
        where: the ONNX node or the engine's layer.
        what: what was found.
        advice: what to do.
        gain_ms: predicted, were it mended; on this machine's CPU the time that it takes, which is the most to win.
        measured_ms: of the engine's layer, from a profile; None where there is none.
        source: whether the builder's list of layers or only the graph says so.
    """

    kind: FindingKind
    where: str
    what: str
    advice: str
    gain_ms: float
    measured_ms: float | None = None
    source: Literal["engine", "graph"] = "graph"


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelTime:
    """One kernel of the model, in running order.

    Attributes:
        name: of the ONNX node, or the first of those that it fuses.
        precision: that it computes in; on this machine's CPU integer, floating, conversion or other.
        macs: multiply-accumulates; 0 where they are not counted.
        bound: what its time is made of mostly (compute, memory or launch); "" where nobody knows.
    """

    name: str
    op: str
    precision: str
    ms: float
    macs: int = 0
    bound: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """All findings on a model for a target, largest predicted gain first.

    Attributes:
        onnx_sha256: the file that was looked at.
        latency_ms, low_ms, high_ms, extrapolating: the latency that the gains refer to.
        measured_ms: sum of the profile's layers; None where there is none.
        layers: how many layers the builder listed; 0 where only the graph was read.
        small: kind -> how many more there are with a gain below 0.2 % each.
        evidence: of the latency and the gains: the roofline, or a profile taken on this machine.
        assumed: the file carries no precision of its own (neither Q/DQ nor FP16), and that of the build was assumed.
        notes: what else a reader should know of the file and how it ran.
        kernels: what the latency is spent in.
    """

    onnx_sha256: str
    target: str
    power_mode: str
    precision: str
    latency_ms: float
    low_ms: float
    high_ms: float
    extrapolating: bool
    findings: tuple[Finding, ...]
    layers: int = 0
    measured_ms: float | None = None
    small: Mapping[str, int] = field(default_factory=dict)
    assumed: bool = False
    evidence: Literal["predicted", "measured"] = "predicted"
    notes: tuple[str, ...] = ()
    kernels: tuple[KernelTime, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {"schema": 1, "kind": self.evidence, **asdict(self)}


def explain_model(
    onnx_path: Path,
    profile: Profile,
    *,
    precision: str | None = None,
    mode: str | None = None,
    layers: Sequence[EngineLayer] = (),
    times_ms: Mapping[str, float] | None = None,
) -> Explanation:
    """Look for what makes a model slow on a target.

    Args:
        onnx_path: the model, input shapes fixed.
        profile: the target.
        precision: what the graph is built in; one that carries precision itself is taken at its word.
        mode: power mode, the profile's default when None.
        layers: the builder's list (`read_layers`).
        times_ms: engine layer -> mean time (`parse_profile`).

    Raises:
        TargetError: not ONNX, dynamic input shapes, or a precision or mode that the target does not have.
        ExportError: the file is missing.
        BuildError: the layers are those of another model.
    """
    wiring = Wiring(load_onnx(onnx_path))
    _check_layers(layers, wiring, onnx_path)
    prices = _Prices(read_network(onnx_path), profile, precision, mode)
    seams = engine_seams(layers, wiring) if layers else graph_seams(wiring)
    found = [
        *_seam_findings(seams, wiring, prices),
        *_floating(prices, layers),
        *_odd_channels(prices),
        *_memory_bound(prices),
        *_depthwise(prices),
        *_launch_bound(prices),
    ]
    base, times = prices.base, times_ms or {}
    least = LEAST_SHARE * base.latency_ms
    kept = [_timed(f, layers, times) for f in found if f.gain_ms >= least]
    return Explanation(
        onnx_sha256=sha256_file(onnx_path),
        target=base.device,
        power_mode=base.power_mode,
        precision=base.precision,
        latency_ms=base.latency_ms,
        low_ms=base.low_ms,
        high_ms=base.high_ms,
        extrapolating=base.extrapolating,
        findings=tuple(sorted(kept, key=lambda f: (-f.gain_ms, f.kind, f.where))),
        layers=len(layers),
        measured_ms=sum(times.values()) if times else None,
        small=dict(sorted(Counter(f.kind for f in found if f.gain_ms < least).items())),
        assumed=not prices.network.typed and base.precision != "fp32",
        kernels=tuple(
            KernelTime(name=at.name, op=at.op, precision=at.precision, ms=at.ms, macs=at.macs, bound=at.bound)
            for at in base.layers
        ),
    )


def _check_layers(layers: Sequence[EngineLayer], wiring: Wiring, path: Path) -> None:
    """A list of another model finds nothing, which would read as if nothing were wrong."""
    named = {name for layer in layers for name in layer.nodes}
    if named and named.isdisjoint(node.name for node in wiring.nodes):
        raise BuildError(
            f"expected layers of {path.name}; got {len(layers)}, of which none names a node of it ({min(named)!r} is "
            "one that they name); give the list of the engine that was built of this file"
        )


class _Prices:
    """The prediction of a network, and of the same network with one thing changed."""

    def __init__(self, network: Network, profile: Profile, precision: str | None, mode: str | None) -> None:
        self.network, self.profile, self.mode = network, profile, mode
        self.base: Prediction = predict_network(network, profile, precision, mode=mode)
        # the host's profile gets what this machine reports
        self.resolved, self.asked, self.mode_name = resolve(profile, precision, mode)
        self.precisions = kernel_precisions(network, self.asked)
        self.work = describe_work(network, self.asked)

    def gain_ms(self, change: Callable[[Network], None]) -> float:
        """Predicted milliseconds won by a change of the network."""
        changed = copy.deepcopy(self.network)
        change(changed)
        mended: Prediction = predict_network(changed, self.profile, self.asked, mode=self.mode)
        return self.base.latency_ms - mended.latency_ms

    def gain_of_work_ms(self, work: Work) -> float:
        """Predicted milliseconds won where only the work of kernels changes."""
        return self.base.latency_ms - float(self._times(work).total.sum())

    def copy_ms(self, elements: int, bits: int) -> float:
        """Predicted cost of one more kernel that reads and writes a tensor."""

        def add(network: Network) -> None:
            for name in ("copied from", "copied to"):
                network.tensors[name] = Tensor(elements=elements, bits=bits, is_float=True)
            copied = Kernel(name="copy", op="Mul", kind="elementwise", outputs=elements)
            copied.reads, copied.writes, copied.half = ["copied from"], ["copied to"], bits == 16
            network.kernels.append(copied)

        return -self.gain_ms(add)

    @property
    def launch_ms(self) -> float:
        """Predicted cost of starting a kernel."""
        return self._times(self.work).launch_ms

    def _times(self, work: Work) -> Times:
        at = self.resolved.mode(self.mode_name)
        return kernel_times(work, self.resolved, at, constants_of(self.resolved).constants)


def _seam_findings(seams: Sequence[Seam], wiring: Wiring, prices: _Prices) -> Iterator[Finding]:
    for seam in seams:
        bits = {10: 16, 16: 16, 3: 8}.get(wiring.types.get(seam.tensor, 1), 32)
        if not prices.network.typed and prices.asked not in (None, "fp32"):
            bits = 16
        yield Finding(
            kind=seam.kind,
            where=seam.layer or seam.node,
            what=seam.what,
            advice=_seam_advice(seam),
            gain_ms=prices.copy_ms(wiring.elements(seam.tensor), bits),
            source="engine" if seam.layer else "graph",
        )


def _seam_advice(seam: Seam) -> str:
    if seam.mended_by:
        return REWRITE_BY.format(name=seam.mended_by)
    return UNFUSED if seam.chosen else ADVICE[seam.kind]


def _floating(prices: _Prices, layers: Sequence[EngineLayer]) -> Iterator[Finding]:
    """Layers with weights above the precision of the build: by the file, and by the builder's list."""
    target = prices.base.precision
    if target not in ("int8", "fp8", "fp16") or not prices.network.typed:
        return
    ran = {node: layer.precision for layer in layers if layer.computes for node in layer.nodes}
    for index, kernel in enumerate(prices.network.kernels):
        if kernel.weights == 0 or kernel.kind not in ("gemm", "depthwise"):
            continue
        says, did = prices.precisions[index], ran.get(kernel.name, prices.precisions[index])
        if says == target != did and did in ("fp32", "fp16"):
            yield Finding(
                kind="stayed floating",
                where=kernel.name,
                what=f"{kernel.op} in {target} in the file runs in {did} in the engine",
                advice=BUILDER_CHOSE,
                gain_ms=-prices.gain_ms(lambda network, i=index, p=did: _set_precision(network, i, p)),  # type: ignore[misc]
                source="engine",
            )
        elif says != target and not (target == "fp16" and says in ("int8", "fp8")):
            yield Finding(
                kind="stayed floating",
                where=kernel.name,
                what=f"{kernel.op} runs in {says} in a build in {target}",
                advice=TRANSPOSED if kernel.op == "ConvTranspose" else ADVICE["stayed floating"],
                gain_ms=prices.gain_ms(lambda network, i=index: _set_precision(network, i, target)),  # type: ignore[misc]
            )


def _set_precision(network: Network, index: int, precision: str) -> None:
    """One kernel in another precision, with what it reads."""
    kernel = network.kernels[index]
    kernel.quantized, kernel.half = precision in ("int8", "fp8"), precision == "fp16"
    bits = {"fp32": 32, "fp16": 16}.get(precision, 8)
    for name in kernel.reads:
        network.tensors[name].bits = bits
    network.typed = True


def _odd_channels(prices: _Prices) -> Iterator[Finding]:
    """Widths between two multiples: the padding is computed and thrown away."""
    for index, kernel in enumerate(prices.network.kernels):
        multiple = prices.resolved.channel_multiple.get(prices.precisions[index], 1)
        if kernel.kind != "gemm" or kernel.weights == 0 or multiple == 1:
            continue
        # outputs of the network have the width that the task asks for
        fixed = any(name in prices.network.outputs for name in kernel.writes)
        columns = kernel.columns if fixed or kernel.op == "ConvTranspose" else _floor(kernel.columns, multiple)
        depth = kernel.channels_in if kernel.channels_in <= STEM_CHANNELS else _floor(kernel.channels_in, multiple)
        if (columns, depth) == (kernel.columns, kernel.channels_in):
            continue

        def cut(network: Network, i: int = index, columns: int = columns, depth: int = depth) -> None:
            network.kernels[i].columns, network.kernels[i].channels_in = columns, depth

        widths = f"{kernel.channels_in} channels in, {kernel.columns} out"
        yield Finding(
            kind="odd channels",
            where=kernel.name,
            what=f"{widths}: not multiples of {multiple}; the gain is that of {depth} in, {columns} out",
            advice=ADVICE["odd channels"],
            gain_ms=prices.gain_ms(cut),
        )


def _floor(width: int, multiple: int) -> int:
    return width if width < multiple else width // multiple * multiple


def _memory_bound(prices: _Prices) -> Iterator[Finding]:
    for index, layer in enumerate(prices.base.layers):
        narrower = NARROWER.get(layer.precision)
        if layer.bound != "memory" or layer.ms < LARGE_SHARE * prices.base.latency_ms or narrower is None:
            continue
        if narrower not in prices.resolved.precisions:
            continue
        mine = prices.work.tensor_kernel == index
        tensors, weights = prices.work.tensor_bytes.copy(), prices.work.weight_bytes.copy()
        tensors[mine] /= 2
        weights[index] /= 2
        yield Finding(
            kind="memory bound",
            where=layer.name,
            what=f"{layer.op} moves {layer.bytes / 2**20:.3g} MiB for {layer.macs / 1e6:.3g} million MACs and waits "
            f"for memory; the gain is that of {narrower}",
            advice=ADVICE["memory bound"],
            gain_ms=prices.gain_of_work_ms(replace(prices.work, tensor_bytes=tensors, weight_bytes=weights)),
        )


def _depthwise(prices: _Prices) -> Iterator[Finding]:
    for index, kernel in enumerate(prices.network.kernels):
        if kernel.kind != "depthwise":
            continue
        macs = prices.work.macs.copy()
        macs[index] = 0
        yield Finding(
            kind="depthwise",
            where=kernel.name,
            what=f"{kernel.groups} groups of {kernel.channels_in} channel(s) run on the ordinary cores; the gain is "
            "that of moving the data alone, an upper bound",
            advice=ADVICE["depthwise"],
            gain_ms=prices.gain_of_work_ms(replace(prices.work, macs=macs)),
        )


def _launch_bound(prices: _Prices) -> Iterator[Finding]:
    """Runs of small kernels whose start takes longer than they do."""
    layers, start = prices.base.layers, 0
    while start < len(layers):
        end = start
        while end < len(layers) and layers[end].bound == "launch":
            end += 1
        run = layers[start:end]
        if len(run) >= FEWEST_LAUNCHES and sum(e.ms for e in run) >= LARGE_SHARE * prices.base.latency_ms:
            yield Finding(
                kind="launch bound",
                where=f"{run[0].name} to {run[-1].name}",
                what=f"{len(run)} kernels in a row that take longer to start than to run; the gain is that of half as "
                "many",
                advice=ADVICE["launch bound"],
                gain_ms=len(run) // 2 * prices.launch_ms,
            )
        start = end + 1


def _timed(finding: Finding, layers: Sequence[EngineLayer], times_ms: Mapping[str, float]) -> Finding:
    """With the measured time of the engine's layer, where a profile names it."""
    name = finding.where
    if name not in times_ms:
        name = next((e.name for e in layers if name in e.nodes and e.computes), name)
    return replace(finding, measured_ms=times_ms.get(name))
