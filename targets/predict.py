"""Latency of an ONNX graph on a target, predicted from its fused kernels, with an interval and what it rests on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from fusepress.pipeline.errors import TargetError
from fusepress.targets.host import host_profile_peak, with_host
from fusepress.targets.kernels import DLA_OPS, Constants, Times, dla_times, kernel_times
from fusepress.targets.legality import check_legality
from fusepress.targets.network import Kernel, Network, read_network
from fusepress.targets.profile import Precision, Profile, load_profile
from fusepress.targets.roofline import ConstantSet, constants_of
from fusepress.targets.work import (
    BYTES,
    PAD_COLUMNS,
    PAD_DEPTH,
    STEM_CHANNELS,
    Array,
    Work,
    describe_work,
    kernel_precisions,
    tensor_widths,
)

Bound = Literal["compute", "memory", "launch"]
KernelClass = Literal["convolution", "depthwise", "product", "attention", "pointwise", "gather"]

# Fitted networks may be this much larger than the one predicted, or smaller. Downwards the margin is wide because the
# form of the model held at 0.2 GMACs on another device, and because the launch term widens the interval there.
SMALLER, LARGER = 4.0, 2.0
UNSEEN_SHARE = 0.25  # of the time that may be spent in operators that no fitted network has
MORE_SHARE: dict[KernelClass, float] = {"attention": 0.1, "product": 0.25, "depthwise": 0.25}
# in log scale: a device whose architecture has no rows, and anything else that lies outside of what was validated
UNSEEN_DEVICE_WIDTH, EXTRAPOLATED_WIDTH = 1.5, 1.5
COVERAGE = 0.9


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
    """A predicted mean latency at batch 1 in a CUDA graph, compute only, without host-device copies.

    Attributes:
        latency_ms: the estimate.
        low_ms, high_ms: 90 % interval, from the errors on model families and devices that were held out of the fit.
        stream_ms: the estimate where the host starts every kernel (trtexec of TensorRT 10 without --useCudaGraph).
        extrapolating: the device or the network lies outside what the prediction was validated on.
        reasons: why, in words; empty when not extrapolating.
        validated_on: devices whose published latencies the constants were compared with.
        layers: one entry a fused kernel, in running order; their sum is `latency_ms`. Only totals were validated.
    """

    latency_ms: float
    low_ms: float
    high_ms: float
    stream_ms: float
    extrapolating: bool
    reasons: tuple[str, ...]
    validated_on: tuple[str, ...]
    layers: tuple[LayerCost, ...]
    macs: int
    device: str
    power_mode: str
    precision: str

    @property
    def device_validated(self) -> bool:
        """Whether this very device is among those."""
        return self.device in self.validated_on


def predict_latency(
    source: str | Path | bytes,
    profile: Profile | str,
    precision: str | None = None,
    *,
    mode: str | None = None,
    sparse: bool = False,
    dla: bool = False,
) -> Prediction:
    """Predict the mean latency of an ONNX graph on a target.

    Args:
        source: ONNX file or its bytes, input shapes fixed; weights are not needed.
        profile: the target, or its name; for `host-cpu`, cores and clock are read from this machine.
        precision: what the graph will be built in. A graph that carries precision itself (FP16 tensors, Q/DQ) is taken
            at its word; an untyped one is read as FP32 when None.
        mode: power mode, the profile's default when None.
        sparse: weights are 2:4 sparse and the engine is built with sparse weights allowed.
        dla: on one deep-learning accelerator, in INT8, what it cannot run on the GPU.

    Raises:
        TargetError: not ONNX, dynamic input shapes, unknown power mode, or a precision, sparsity or accelerator that
            the target does not have.
    """
    target = load_profile(profile) if isinstance(profile, str) else profile
    return predict_network(read_network(source), target, precision, mode=mode, sparse=sparse, dla=dla)


def predict_network(
    network: Network,
    profile: Profile,
    precision: str | None = None,
    *,
    mode: str | None = None,
    sparse: bool = False,
    dla: bool = False,
) -> Prediction:
    """As `predict_latency`, of a network that was read before: for many targets or modes."""
    profile, asked, mode_name = resolve(profile, precision, mode)
    if sparse:
        check_legality(profile, asked or "fp32", sparsity=True)
    at = profile.mode(mode_name)
    work = describe_work(network, asked)
    for used in sorted(set(work.precisions)):
        check_legality(profile, used)
    if not len(work.names):
        raise TargetError("expected a graph that computes something; got constants only; export it again")
    fitted = constants_of(profile)
    times = kernel_times(work, profile, at, fitted.constants, sparse=sparse)
    if dla:
        times = _on_dla(work, times, profile, mode_name)
    latency_ms = float(times.total.sum())
    reasons = _extrapolation(network, work, times, profile, mode_name, fitted)
    reasons += _unvalidated(sparse=sparse, dla=dla)
    low_ms, high_ms = _interval(latency_ms, times, profile, fitted, extrapolating=bool(reasons))
    return Prediction(
        latency_ms=latency_ms,
        low_ms=low_ms,
        high_ms=high_ms,
        stream_ms=latency_ms + fitted.stream_ms * float(work.launches.sum()),
        extrapolating=bool(reasons),
        reasons=reasons,
        validated_on=tuple(sorted(fitted.devices)),
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


def kernel_class(kernel: Kernel) -> KernelClass:
    """What sort of work it is, for telling whether fitted networks have as much of it."""
    if kernel.kind == "gather":
        return "gather"
    if kernel.kind == "depthwise":
        return "depthwise"
    if kernel.op in ("Softmax", "Attention") or (kernel.op == "MatMul" and kernel.weights == 0):
        return "attention"
    if kernel.kind == "gemm":
        return "convolution" if kernel.op in ("Conv", "ConvTranspose") else "product"
    return "pointwise"


def class_shares(kernels: Sequence[Kernel], times: Times) -> dict[str, float]:
    """Share of the time that each class of kernels takes."""
    total = times.total
    shares: dict[str, float] = {}
    for kernel, share in zip(kernels, total / total.sum(), strict=True):
        name = kernel_class(kernel)
        shares[name] = shares.get(name, 0.0) + float(share)
    return shares


def _on_dla(work: Work, gpu: Times, profile: Profile, mode_name: str) -> Times:
    """What the accelerator takes in INT8 runs there, the rest stays on the GPU, one after the other."""
    mode = profile.mode(mode_name)
    if profile.dla is None or mode.dla_mhz == 0:
        raise TargetError(
            f"expected a target with a deep-learning accelerator; got {profile.name} in {mode_name}; "
            "predict for its GPU, or choose another target or power mode"
        )
    if not {p for p, is_matrix in zip(work.precisions, work.macs > 0, strict=True) if is_matrix} <= {"int8"}:
        raise TargetError(
            f"expected INT8 for the accelerator of {profile.name}, whose other rates are not known; "
            f"got {', '.join(sorted(set(work.precisions)))}; predict with precision int8"
        )
    there = dla_times(work, profile, mode)
    takes = np.asarray([op in DLA_OPS for op in work.ops])
    return replace(
        gpu,
        compute=np.where(takes, there.compute, gpu.compute),
        memory=np.where(takes, there.memory, gpu.memory),
        launch=np.where(takes, there.launch, gpu.launch),
    )


def _named(work: Work, precision: Precision | None) -> str:
    """The precision asked for; of a graph that carries its own, the lowest in it."""
    found = {p for p, is_matrix in zip(work.precisions, work.macs > 0, strict=True) if is_matrix} or {"fp32"}
    lowest = next(p for p in ("fp8", "int8", "fp16", "fp32") if p in found)
    return lowest if precision is None or precision not in found else precision


def _interval(
    latency_ms: float, times: Times, profile: Profile, fitted: ConstantSet, *, extrapolating: bool
) -> tuple[float, float]:
    """A factor from held-out errors, and never narrower than launches at half or twice their fitted cost."""
    width = math.log(fitted.factor(profile.name))
    if profile.compute_capability is not None and profile.compute_capability not in fitted.gmacs:
        width *= UNSEEN_DEVICE_WIDTH
    if extrapolating and profile.compute_capability is not None:
        width *= EXTRAPOLATED_WIDTH
    launches_ms = float(times.launch.sum())
    low = min(latency_ms * math.exp(-width), latency_ms - launches_ms / 2)
    return low, max(latency_ms * math.exp(width), latency_ms + launches_ms)


def _unvalidated(*, sparse: bool, dla: bool) -> tuple[str, ...]:
    what = {"a 2:4 sparse network": sparse, "a network on a deep-learning accelerator": dla}
    return tuple(f"no latency of {name} with a known graph is in the fit" for name, asked in what.items() if asked)


def _extrapolation(
    network: Network, work: Work, times: Times, profile: Profile, mode_name: str, fitted: ConstantSet
) -> tuple[str, ...]:
    capability = profile.compute_capability
    if capability is None:
        return ("no latency of a CPU is in the fit: measure on this machine instead",)
    reasons = []
    if capability not in fitted.gmacs:
        reasons.append(f"no published latency of SM {capability} is in the fit")
    else:
        reasons += _outside(network, work, capability, fitted)
    modes = fitted.devices.get(profile.name, frozenset([profile.default_mode]))
    if mode_name not in modes and capability in fitted.gmacs:
        reasons.append(f"no latency of {profile.name} in power mode {mode_name} is in the fit")
    reasons += _strange_time(network, work, times, fitted)
    if network.unknown_shapes:
        reasons.append(f"{network.unknown_shapes} tensors without a known shape were counted as empty")
    return tuple(reasons)


def _outside(network: Network, work: Work, capability: str, fitted: ConstantSet) -> list[str]:
    reasons = []
    least, most = fitted.gmacs[capability]
    gmacs = network.macs / 1e9
    if not least / SMALLER <= gmacs <= most * LARGER:
        reasons.append(f"{gmacs:.3g} GMACs; networks of {least:g} to {most:g} GMACs are in the fit for SM {capability}")
    unseen = sorted(set(work.precisions) - fitted.precisions[capability])
    if unseen:
        reasons.append(f"no latency in {', '.join(unseen)} is in the fit for SM {capability}")
    return reasons


def _strange_time(network: Network, work: Work, times: Times, fitted: ConstantSet) -> list[str]:
    """Operators, and kinds of work, that fitted networks have none or much less of."""
    reasons = []
    total = times.total
    strange = np.asarray([op not in fitted.ops for op in work.ops])
    share = float(total[strange].sum() / total.sum())
    if share > UNSEEN_SHARE:
        ops = ", ".join(sorted({op for op in work.ops if op not in fitted.ops}))
        reasons.append(f"{share:.0%} of the time in operators that no fitted network has ({ops})")
    shares = class_shares(network.kernels, times)
    for name, more in MORE_SHARE.items():
        most = fitted.shares.get(name, 0.0)
        if shares.get(name, 0.0) > most + more:
            reasons.append(f"{shares[name]:.0%} of the time in {name}; in fitted networks it is at most {most:.0%}")
    return reasons


def _layers(work: Work, times: Times) -> tuple[LayerCost, ...]:
    total = times.total
    body = total - times.launch
    moved = work.weight_bytes + np.bincount(work.tensor_kernel, work.tensor_bytes, minlength=len(work.names))
    bounds: list[Bound] = [
        "launch" if launch else "compute" if compute else "memory"
        for launch, compute in zip(body < times.launch, times.compute >= times.memory, strict=True)
    ]
    return tuple(
        LayerCost(name=name, op=op, precision=precision, macs=int(macs), bytes=float(size), ms=float(ms), bound=bound)
        for name, op, precision, macs, size, ms, bound in zip(
            work.names, work.ops, work.precisions, work.macs, moved, total, bounds, strict=True
        )
    )


__all__ = [
    "BYTES", "COVERAGE", "PAD_COLUMNS", "PAD_DEPTH", "STEM_CHANNELS", "Array", "Constants", "LayerCost", "Prediction",
    "Times", "Work", "class_shares", "describe_work", "kernel_class", "kernel_precisions", "kernel_times",
    "predict_latency", "predict_network", "resolve", "tensor_widths",
]  # fmt: skip
