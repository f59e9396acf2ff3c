"""The few global constants of the latency prediction, how they came about, and how far they hold.

Fitted by `benchmarks/latency_roofline.py` on published TensorRT latencies at batch 1 (56 rows on two Orin devices, 83
on seven others); what came out, with the errors of held-out model families and devices, is in
`benchmarks/results/latency_roofline.json`. In short: a model family that the fit has not seen is predicted with a mean
error of 24 % in both sets, and the intervals below held 95 % of such rows. No device was measured by us.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """Efficiencies in (0, 1] of the nominal peaks, and what starting costs.

    Attributes:
        compute_fp32: of the FP32 or TF32 peak, matrix kernels.
        compute_fp16: of the dense FP16 peak.
        compute_int8: of the dense INT8 (or FP8) peak.
        compute_scalar: of the FP32 peak of the ordinary cores, depthwise kernels.
        memory: of the nominal DRAM bandwidth.
        memory_reuse: share of the bytes of a tensor held in L2 that still cost DRAM time.
        launch_cycles: GPU clocks between the end of one kernel and the useful start of the next.
        tile_overhead: filling the pipeline and writing the result, as depth of a matrix product.
        overlap: exponent p of (compute^p + memory^p)^(1/p): 1 is no overlap, infinity a perfect one.
    """

    compute_fp32: float
    compute_fp16: float
    compute_int8: float
    compute_scalar: float
    memory: float
    memory_reuse: float
    launch_cycles: float
    tile_overhead: float
    overlap: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstantSet:
    """Constants, what they were fitted on, and how wide the truth scatters about a prediction.

    Attributes:
        devices: profiles with rows in the fit.
        gmacs: smallest and largest network, in 10^9 multiply-accumulates, by compute capability.
        precisions: what the rows of a compute capability were built in.
        ops: operators that start a kernel in the fitted networks.
        known: the 95 % interval as factors of a prediction, for devices in the fit.
        sibling: the same for other devices.
    """

    constants: Constants
    devices: frozenset[str]
    gmacs: Mapping[str, tuple[float, float]]
    precisions: Mapping[str, frozenset[str]]
    ops: frozenset[str]
    known: tuple[float, float]
    sibling: tuple[float, float]


_ALL = frozenset(["fp32", "fp16", "int8"])
_COMMON_OPS = frozenset(
    ["Conv", "Gemm", "GlobalAveragePool", "MatMul", "MaxPool", "Mul", "Resize", "Sigmoid", "Slice", "Softmax"]
) | {"Split", "Transpose"}

SETS = {
    "orin": ConstantSet(
        constants=Constants(
            compute_fp32=0.5912,
            compute_fp16=0.5929,
            compute_int8=0.4915,
            compute_scalar=0.2953,
            memory=0.9,
            memory_reuse=0.5665,
            launch_cycles=3530,
            tile_overhead=307.5,
            overlap=2.779,
        ),
        devices=frozenset(["jetson-agx-orin-64gb", "jetson-orin-nano-8gb-super"]),
        gmacs={"8.7": (0.519, 97.636)},
        precisions={"8.7": _ALL},
        ops=_COMMON_OPS | {"Div", "LayerNormalization", "Pad"},
        known=(0.637, 1.908),
        # either of the two devices predicted from the other; two are too few to calibrate this better
        sibling=(0.450, 1.908),
    ),
    "general": ConstantSet(
        constants=Constants(
            compute_fp32=0.8496,
            compute_fp16=0.4512,
            compute_int8=0.3041,
            compute_scalar=0.3267,
            memory=0.9,
            memory_reuse=0.3631,
            launch_cycles=9328,
            tile_overhead=51.19,
            overlap=2.424,
        ),
        devices=frozenset(
            ["a100-sxm-80gb", "dgx-spark-gb10", "jetson-agx-thor-t5000", "rtx-2060", "rtx-3060-12gb", "t4", "v100-sxm2"]
        ),
        gmacs={
            "7.0": (0.386, 7.801),
            "7.5": (3.271, 128.902),
            "8.0": (0.203, 128.902),
            "8.6": (4.372, 4.372),
            "11.0": (3.271, 97.636),
            "12.1": (3.271, 97.636),
        },
        precisions={
            "7.0": frozenset(["fp16"]),
            "7.5": _ALL,
            "8.0": frozenset(["fp16"]),
            "8.6": _ALL,
            "11.0": _ALL,
            "12.1": _ALL,
        },
        ops=_COMMON_OPS | {"ReduceMean"},
        known=(0.278, 4.568),
        sibling=(0.278, 4.568),
    ),
}

# A CPU has no validated rows at all: priors, and an interval that says so.
HOST = ConstantSet(
    constants=Constants(
        compute_fp32=0.5,
        compute_fp16=0.5,
        compute_int8=0.4,
        compute_scalar=0.2,
        memory=0.5,
        memory_reuse=0.3,
        launch_cycles=15000,
        tile_overhead=0,
        overlap=1.5,
    ),
    devices=frozenset(),
    gmacs={},
    precisions={},
    ops=frozenset(),
    known=(0.25, 4.0),
    sibling=(0.25, 4.0),
)


def constants_for(compute_capability: str | None) -> ConstantSet:
    """The set for a compute capability; None is a CPU."""
    if compute_capability is None:
        return HOST
    return SETS["orin" if compute_capability == "8.7" else "general"]
