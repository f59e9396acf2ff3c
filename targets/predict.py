"""Latency of an ONNX graph on a target, predicted by a roofline over its fused kernels, with an interval."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from fusepress.pipeline.errors import TargetError
from fusepress.targets.host import host_profile_peak, with_host
from fusepress.targets.legality import check_legality
from fusepress.targets.network import Kernel, Network, read_network
from fusepress.targets.profile import PowerMode, Precision, Profile, Rate
from fusepress.targets.roofline import Constants, ConstantSet, constants_for

Bound = Literal["compute", "memory", "launch"]
Array = npt.NDArray[np.float64]

# rows x columns of the output tile that one SM computes, and its speed relative to the largest: smaller tiles reuse
# operands less. Priors, not fitted.
TILES = ((128, 128, 1.0), (128, 64, 0.9), (64, 64, 0.75), (64, 32, 0.55))
L2_SHARE = 0.6  # share of L2 that a tensor may fill and still be found there by its reader
PAD_COLUMNS: dict[Precision, int] = {"fp32": 4, "fp16": 8, "int8": 32, "fp8": 32}
PAD_DEPTH: dict[Precision, int] = {"fp32": 4, "fp16": 8, "int8": 32, "fp8": 32}
STEM_CHANNELS = 4  # image-like inputs have kernels of their own that pad to 4
BYTES: dict[Precision, float] = {"fp32": 4.0, "fp16": 2.0, "int8": 1.0, "fp8": 1.0}
# Fitted networks may be this much larger than the one predicted, or smaller. Downwards the margin is wide because the
# form of the model held at 0.2 GMACs on another device, and because the launch term widens the interval there.
SMALLER, LARGER = 4.0, 2.0
UNSEEN_SHARE = 0.25  # of the time that may be spent in operators that no fitted network has
UNSEEN_DEVICE_WIDTH = 1.5  # in log scale, for a device whose architecture has no rows
TRANSPARENT = frozenset(["MaxPool", "AveragePool", "GlobalAveragePool", "Resize", "Split", "Slice", "Pad"])


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCost:
    """What one fused kernel costs.

    Attributes:
        macs: multiply-accumulates without padding.
        bytes: weights and activations that it moves.
        bound: what its time is made of mostly.
    """

    name: str
    op: str
    precision: Precision
    macs: int
    bytes: float
    ms: float
    bound: Bound


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A predicted mean latency at batch 1, compute only, without host-device copies.

    Attributes:
        latency_ms: the estimate.
        low_ms, high_ms: 95 % interval, from the errors on model families that were held out of the fit.
        extrapolating: the device or the network lies outside what the prediction was validated on.
        reasons: why, in words; empty when not extrapolating.
        layers: one entry a fused kernel, in running order; their sum is `latency_ms`. Only totals were validated.
    """

    latency_ms: float
    low_ms: float
    high_ms: float
    extrapolating: bool
    reasons: tuple[str, ...]
    layers: tuple[LayerCost, ...]
    macs: int
    device: str
    power_mode: str
    precision: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A network in numbers: one entry a kernel [K]; `tensor_*` one for each tensor that a kernel touches."""

    names: list[str]
    ops: list[str]
    precisions: list[Precision]
    macs: Array
    rows: Array
    columns: Array
    depth: Array
    groups: Array
    matrix: npt.NDArray[np.bool_]
    weight_bytes: Array
    tensor_bytes: Array
    tensor_kernel: npt.NDArray[np.intp]


def kernel_precisions(network: Network, precision: Precision | None) -> list[Precision]:
    """Precision of each kernel: from the graph where it carries one, else from the argument.

    An untyped graph asked for in INT8 or FP8 has its convolutions and products with weights in it, the rest in FP16.
    """
    low: Precision = "fp8" if precision == "fp8" else "int8"
    if network.typed:
        return [low if k.quantized else "fp16" if k.half else "fp32" for k in network.kernels]
    if precision in ("int8", "fp8"):
        return [low if _quantizable(kernel) else "fp16" for kernel in network.kernels]
    return [precision or "fp32"] * len(network.kernels)


def _quantizable(kernel: Kernel) -> bool:
    return kernel.kind in ("gemm", "depthwise") and kernel.weights > 0 and kernel.op != "ConvTranspose"


def tensor_widths(network: Network, precisions: list[Precision], precision: Precision | None) -> dict[str, float]:
    """Bytes of one element of every tensor between kernels."""
    widths = {}
    outputs = set(network.outputs)
    for name, tensor in network.tensors.items():
        width = tensor.bits / 8
        if tensor.is_float and not network.typed:
            low = precision in ("int8", "fp8") and name not in outputs and name not in network.inputs
            narrow = low and all(
                precisions[reader] == precision or network.kernels[reader].op in TRANSPARENT
                for reader in tensor.readers
            )
            width = 1.0 if narrow else BYTES["fp16" if precision != "fp32" and precision else "fp32"]
        widths[name] = width
    return widths


def describe_work(network: Network, precision: Precision | None) -> Work:
    """Turn a network into arrays, once for any number of power modes."""
    precisions = kernel_precisions(network, precision)
    element = tensor_widths(network, precisions, precision)
    sizes = {name: network.tensors[name].elements * width for name, width in element.items()}
    kernels = network.kernels
    depth, columns = [], []
    for kernel, kind in zip(kernels, precisions, strict=True):
        multiple = STEM_CHANNELS if kernel.channels_in <= STEM_CHANNELS else PAD_DEPTH[kind]
        channels = kernel.channels_in if kernel.kind == "depthwise" else _pad(kernel.channels_in, multiple)
        depth.append(channels * kernel.window)
        columns.append(kernel.columns if kernel.kind == "depthwise" else _pad(kernel.columns, PAD_COLUMNS[kind]))
    traffic = [[sizes[name] for name in (*kernel.reads, *kernel.writes)] for kernel in kernels]
    return Work(
        names=[kernel.name for kernel in kernels],
        ops=[kernel.op for kernel in kernels],
        precisions=precisions,
        macs=_array(kernel.macs for kernel in kernels),
        rows=_array(kernel.rows for kernel in kernels),
        columns=_array(columns),
        depth=_array(depth),
        groups=_array(kernel.groups for kernel in kernels),
        matrix=np.asarray([kernel.kind == "gemm" for kernel in kernels], dtype=np.bool_),
        weight_bytes=_array(k.weights * BYTES[p] for k, p in zip(kernels, precisions, strict=True)),
        tensor_bytes=_array(size for sizes_of_kernel in traffic for size in sizes_of_kernel),
        tensor_kernel=np.repeat(np.arange(len(kernels)), [len(sizes_of_kernel) for sizes_of_kernel in traffic]),
    )


def _array(values: Iterable[float]) -> Array:
    return np.fromiter(values, dtype=np.float64)


def _pad(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def predict_latency(
    source: str | Path | bytes, profile: Profile, precision: str | None = None, *, mode: str | None = None
) -> Prediction:
    """Predict the mean latency of an ONNX graph on a target.

    Args:
        source: ONNX file or its bytes, input shapes fixed; weights are not needed.
        profile: the target; for `host-cpu`, cores and clock are read from this machine.
        precision: what the graph will be built in. A graph that carries precision itself (FP16 tensors, Q/DQ) is taken
            at its word; an untyped one is read as FP32 when None.
        mode: power mode, the profile's default when None.

    Raises:
        TargetError: not ONNX, dynamic input shapes, unknown power mode, or a precision the target does not have.
    """
    return predict_network(read_network(source), profile, precision, mode=mode)


def predict_network(
    network: Network, profile: Profile, precision: str | None = None, *, mode: str | None = None
) -> Prediction:
    """As `predict_latency`, of a network that was read before: for many targets or modes."""
    profile, asked, mode_name = resolve(profile, precision, mode)
    at = profile.mode(mode_name)
    work = describe_work(network, asked)
    for used in sorted(set(work.precisions)):
        check_legality(profile, used)
    fitted = constants_for(profile.compute_capability)
    times = kernel_times(work, profile, at, fitted.constants)
    if not len(work.names):
        raise TargetError("expected a graph that computes something; got constants only; export it again")
    latency_ms = float(times.total.sum())
    reasons = _extrapolation(network, work, times, profile, fitted)
    low_ms, high_ms = _interval(latency_ms, times, profile, fitted)
    return Prediction(
        latency_ms=latency_ms,
        low_ms=low_ms,
        high_ms=high_ms,
        extrapolating=bool(reasons),
        reasons=reasons,
        layers=_layers(work, times),
        macs=network.macs,
        device=profile.name,
        power_mode=mode_name,
        precision=_named(work, asked),
    )


def resolve(profile: Profile, precision: str | None, mode: str | None) -> tuple[Profile, Precision | None, str]:
    """The profile (the host's with what this machine reports), the checked precision and the power mode's name.

    Raises:
        TargetError: unknown power mode, or a precision the target does not have.
    """
    asked = None if precision is None else check_legality(profile, precision)
    mode_name = profile.default_mode if mode is None else mode
    profile.mode(mode_name)
    if profile.family == "host":
        profile = with_host(profile, host_profile_peak())
    return profile, asked, mode_name


def _named(work: Work, precision: Precision | None) -> str:
    """The precision asked for; of a graph that carries its own, the lowest in it."""
    found = {p for p, is_matrix in zip(work.precisions, work.macs > 0, strict=True) if is_matrix} or {"fp32"}
    lowest = next(p for p in ("fp8", "int8", "fp16", "fp32") if p in found)
    return lowest if precision is None or precision not in found else precision


def _interval(latency_ms: float, times: Times, profile: Profile, fitted: ConstantSet) -> tuple[float, float]:
    """Factors from held-out errors, and never narrower than launches at half or twice their fitted cost."""
    low, high = fitted.known if profile.name in fitted.devices else fitted.sibling
    if profile.compute_capability is not None and profile.compute_capability not in fitted.gmacs:
        low, high = low**UNSEEN_DEVICE_WIDTH, high**UNSEEN_DEVICE_WIDTH
    launches_ms = times.launch_ms * len(times.compute)
    return min(latency_ms * low, latency_ms - launches_ms / 2), max(latency_ms * high, latency_ms + launches_ms)


def _extrapolation(
    network: Network, work: Work, times: Times, profile: Profile, fitted: ConstantSet
) -> tuple[str, ...]:
    capability = profile.compute_capability
    reasons = []
    if capability is None:
        return ("no latency of a CPU is in the fit: measure on this machine instead",)
    if capability not in fitted.gmacs:
        reasons.append(f"no published latency of SM {capability} is in the fit")
    else:
        least, most = fitted.gmacs[capability]
        gmacs = network.macs / 1e9
        if not least / SMALLER <= gmacs <= most * LARGER:
            reasons.append(
                f"{gmacs:.3g} GMACs; networks of {least:g} to {most:g} GMACs are in the fit for SM {capability}"
            )
        unseen = sorted(set(work.precisions) - fitted.precisions[capability])
        if unseen:
            reasons.append(f"no latency in {', '.join(unseen)} is in the fit for SM {capability}")
    strange = np.asarray([op not in fitted.ops for op in work.ops])
    total = times.total
    share = float(total[strange].sum() / total.sum())
    if share > UNSEEN_SHARE:
        ops = ", ".join(sorted({op for op in work.ops if op not in fitted.ops}))
        reasons.append(f"{share:.0%} of the time in operators that no fitted network has ({ops})")
    if network.unknown_shapes:
        reasons.append(f"{network.unknown_shapes} tensors without a known shape were counted as empty")
    return tuple(reasons)


def _layers(work: Work, times: Times) -> tuple[LayerCost, ...]:
    total = times.total
    body = total - times.launch_ms
    moved = work.weight_bytes + np.bincount(work.tensor_kernel, work.tensor_bytes, minlength=len(work.names))
    bounds: list[Bound] = [
        "launch" if launch else "compute" if compute else "memory"
        for launch, compute in zip(body < times.launch_ms, times.compute >= times.memory, strict=True)
    ]
    return tuple(
        LayerCost(name=name, op=op, precision=precision, macs=int(macs), bytes=float(size), ms=float(ms), bound=bound)
        for name, op, precision, macs, size, ms, bound in zip(
            work.names, work.ops, work.precisions, work.macs, moved, total, bounds, strict=True
        )
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Milliseconds of each kernel, and what they are made of."""

    compute: Array
    memory: Array
    launch_ms: float
    overlap: float

    @property
    def total(self) -> Array:
        """Compute and memory overlap; the launch does not."""
        p = self.overlap
        return (self.compute**p + self.memory**p) ** (1 / p) + self.launch_ms


def kernel_times(work: Work, profile: Profile, mode: PowerMode, constants: Constants) -> Times:
    """The roofline: padded operations over peak, effective bytes over bandwidth, and a launch, for each kernel."""
    clock_khz = mode.gpu_mhz * 1e3
    rate = {p: _ops_per_ms_and_sm(profile, mode, p, constants) for p in set(work.precisions)}
    speed = np.asarray([rate[p] for p in work.precisions])
    scalar = profile.ops_per_clock_per_sm["fp32"].value * clock_khz * mode.sm_count * constants.compute_scalar
    matrix = _matrix_ms(work, speed, mode.sm_count, constants.tile_overhead)
    compute = np.where(work.matrix, matrix, 2 * work.macs / scalar)
    return Times(
        compute=compute,
        memory=_effective_bytes(work, profile, constants) / (mode.dram_gbps * 1e6 * constants.memory),
        launch_ms=constants.launch_cycles / clock_khz,
        overlap=constants.overlap,
    )


def _ops_per_ms_and_sm(profile: Profile, mode: PowerMode, precision: Precision, constants: Constants) -> float:
    rates = profile.ops_per_clock_per_sm
    kind: Rate = precision
    efficiency = {
        "fp32": constants.compute_fp32,
        "fp16": constants.compute_fp16,
        "int8": constants.compute_int8,
        "fp8": constants.compute_int8,
    }[precision]
    if precision == "fp32" and "tf32" in rates and rates["tf32"].value > rates["fp32"].value:
        kind = "tf32"
    return rates[kind].value * mode.gpu_mhz * 1e3 * efficiency


def _matrix_ms(work: Work, speed: Array, sm_count: int, overhead: float) -> Array:
    """Output tiles are dealt to SMs in waves; when there are fewer tiles than SMs, the depth is split."""
    best = np.full(len(work.names), np.inf)
    for tile_rows, tile_columns, relative in TILES:
        tiles = work.groups * np.ceil(work.rows / tile_rows) * np.ceil(work.columns / tile_columns)
        waves = np.where(tiles < sm_count, 1.0, np.ceil(tiles / sm_count))
        share = np.minimum(1.0, tiles / sm_count)
        depth = waves * (work.depth * share + overhead)
        tile_ms = 2 * tile_rows * tile_columns * depth / (speed * relative)
        best = np.minimum(best, tile_ms)
    return np.where(work.macs > 0, best, 0.0)


def _effective_bytes(work: Work, profile: Profile, constants: Constants) -> Array:
    """Bytes that cost DRAM time: weights in full, activations less what L2 holds until they are read."""
    held = 0.0 if profile.l2_mib is None else L2_SHARE * profile.l2_mib.value * 2**20
    cached = np.minimum(work.tensor_bytes, held)
    effective = work.tensor_bytes - (1 - constants.memory_reuse) * cached
    return work.weight_bytes + np.bincount(work.tensor_kernel, effective, minlength=len(work.names))
