"""Milliseconds of fused kernels from what they compute and move: a roofline with tiles, waves, caches and launches.

Every constant is physical and dimensionless or in device units, so that one set serves all devices of an architecture.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fusepress.targets.profile import PowerMode, Precision, Profile, Rate
from fusepress.targets.work import BYTES, Array, Work

# rows x columns of the output tile that a block of threads computes, and how many such blocks fit an SM at once
TILES = ((128, 128, 1), (128, 64, 2), (64, 64, 3), (128, 32, 3), (64, 32, 4))
STEP_BYTES = 64.0  # of each operand's row that one step along the depth loads
L2_BYTES_PER_CLOCK_PER_SM = 64.0  # nominal, of Tensor Core GPUs
L2_EFFICIENCY = 0.6
# 2:4 sparsity at most so much faster on the tensor cores (published: 1.03 to 1.24 of whole networks, 1.5 and more of
# layers of many channels), half of it where log2 of the smaller of depth / 2 and columns is 8. No row validates it.
SPARSE_GAIN = 0.6
SPARSE_MIDDLE, SPARSE_SCALE = 8.0, 0.7
# Of the peak of a deep-learning accelerator; a prior: no graph of a published DLA latency is at hand
DLA_EFFICIENCY = 0.5
DLA_LAUNCH_MS = 0.02
DLA_OPS = frozenset(["Conv", "ConvTranspose", "MaxPool", "AveragePool", "GlobalAveragePool", "Resize", "Concat"])
DLA_OPS |= {"Add", "Mul", "Relu", "Sigmoid", "Sub", "Slice", "Split", "Softmax", "Clip", "Gemm"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """Efficiencies in (0, 1] of the nominal peaks, and what starting costs.

    Attributes:
        compute_fp32: of the FP32 or TF32 peak, matrix kernels.
        compute_fp16: of the dense FP16 peak.
        compute_int8: of the dense INT8 (or FP8) peak.
        compute_scalar: of the FP32 peak of the ordinary cores, depthwise kernels.
        memory: of the nominal DRAM bandwidth.
        cache_share: of L2 that data may fill and still be found there.
        launch_cycles: GPU clocks between the end of one kernel and the useful start of the next, in a CUDA graph.
        tile_cycles: GPU clocks to start an output tile of 128 x 128 and to write it; less for smaller ones.
        smooth_cycles: what an activation with exponentials adds to that.
        step_cycles: GPU clocks that a step along the depth takes when nothing hides its latency.
        overlap: exponent p of (compute^p + memory^p)^(1/p): 1 is no overlap, infinity a perfect one.
    """

    compute_fp32: float
    compute_fp16: float
    compute_int8: float
    compute_scalar: float
    memory: float
    cache_share: float
    launch_cycles: float
    tile_cycles: float
    smooth_cycles: float
    step_cycles: float
    overlap: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Milliseconds of each entry of a network [K], and what they are made of."""

    compute: Array
    memory: Array
    launch: Array
    overlap: float
    launch_ms: float

    @property
    def total(self) -> Array:
        """Compute and memory overlap; launches do not."""
        p = self.overlap
        return (self.compute**p + self.memory**p) ** (1 / p) + self.launch


def kernel_times(work: Work, profile: Profile, mode: PowerMode, constants: Constants, *, sparse: bool = False) -> Times:
    """Padded operations over peak, bytes over bandwidth, and a launch, for each kernel.

    Args:
        work: the network in numbers.
        profile: the target.
        mode: what it runs at.
        constants: of its architecture.
        sparse: whether weights are 2:4 sparse. The builder keeps the dense kernel where it is faster.
    """
    clock_khz = mode.gpu_mhz * 1e3
    rate = {p: _ops_per_clock(profile, p, constants) for p in set(work.precisions)}
    speed = np.asarray([rate[p] for p in work.precisions]) * (sparse_gain(work) if sparse else 1.0)
    scalar = profile.ops_per_clock_per_sm["fp32"].value * mode.sm_count * constants.compute_scalar
    clocks = np.where(work.matrix, _matrix_clocks(work, speed, mode.sm_count, constants), 2 * work.macs / scalar)
    launch_ms = constants.launch_cycles / clock_khz
    return Times(
        compute=clocks / clock_khz,
        memory=_memory_ms(work, profile, mode, constants),
        launch=launch_ms * work.launches,
        overlap=constants.overlap,
        launch_ms=launch_ms,
    )


def sparse_gain(work: Work) -> Array:
    """How much faster the tensor cores are with 2:4 weights [K]: little where channels are few."""
    size = np.log2(np.maximum(1.0, np.minimum(work.depth / 2, work.columns)))
    gain = 1 + SPARSE_GAIN / (1 + np.exp((SPARSE_MIDDLE - size) / SPARSE_SCALE))
    return np.where(work.matrix & (work.weight_bytes > 0), gain, 1.0)


def dla_times(work: Work, profile: Profile, mode: PowerMode) -> Times:
    """One deep-learning accelerator: padded operations over its INT8 peak, bytes over the shared bandwidth."""
    assert profile.dla is not None
    ops_per_ms = profile.dla.int8_ops_per_clock * mode.dla_mhz * 1e3 * DLA_EFFICIENCY
    moved = work.weight_bytes + np.bincount(work.tensor_kernel, work.tensor_bytes, minlength=len(work.names))
    padded = 2 * work.groups * work.rows * work.columns * work.depth
    return Times(
        compute=padded / ops_per_ms,
        memory=moved / (mode.dram_gbps * 1e6 * DLA_EFFICIENCY),
        launch=np.full(len(work.names), DLA_LAUNCH_MS / max(1, len(work.names))),
        overlap=2.0,
        launch_ms=DLA_LAUNCH_MS / max(1, len(work.names)),
    )


def _ops_per_clock(profile: Profile, precision: Precision, constants: Constants) -> float:
    """Of one SM."""
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
    return rates[kind].value * efficiency


def _matrix_clocks(work: Work, speed: Array, sm_count: int, constants: Constants) -> Array:
    """Output tiles are dealt to SMs; the fastest shape counts, as the builder times them.

    An SM with n tiles takes as long as its tensor cores need, or the loads of the operands from L2, or, where too few
    tiles are resident to hide it, the latency of the steps along the depth.
    """
    element = np.asarray([BYTES[p] for p in work.precisions])
    epilogue = constants.tile_cycles + constants.smooth_cycles * work.smooth
    best = np.full(len(work.names), np.inf)
    l2_bytes_per_clock = L2_BYTES_PER_CLOCK_PER_SM * L2_EFFICIENCY
    for tile_rows, tile_columns, resident in TILES:
        area = tile_rows * tile_columns
        tiles = work.groups * np.ceil(work.rows / tile_rows) * np.ceil(work.columns / tile_columns)
        waves = np.ceil(tiles / sm_count)
        products = waves * 2 * area * work.depth / speed
        loads = waves * (tile_rows + tile_columns) * work.depth * element / l2_bytes_per_clock
        steps = np.ceil(waves / resident) * work.depth * element / STEP_BYTES * constants.step_cycles
        written = waves * epilogue * area / 128**2
        best = np.minimum(best, np.maximum(np.maximum(products, loads), steps) + written)
    return np.where(work.macs > 0, best, 0.0)


def _memory_ms(work: Work, profile: Profile, mode: PowerMode, constants: Constants) -> Array:
    """What L2 still holds moves at its speed, the rest at that of DRAM."""
    held = 0.0 if profile.l2_mib is None else constants.cache_share * profile.l2_mib.value * 2**20
    missed = work.tensor_bytes * (1 - _hit(held, work.tensor_reuse_bytes))
    count = len(work.names)
    dram = work.weight_bytes * (1 - _hit(held, work.weight_reuse_bytes))
    dram = dram + np.bincount(work.tensor_kernel, missed, minlength=count)
    moved = work.weight_bytes + np.bincount(work.tensor_kernel, work.tensor_bytes, minlength=count)
    l2_bytes_per_ms = L2_BYTES_PER_CLOCK_PER_SM * L2_EFFICIENCY * mode.sm_count * mode.gpu_mhz * 1e3
    return dram / (mode.dram_gbps * 1e6 * constants.memory) + (moved - dram) / l2_bytes_per_ms


def _hit(held: float, reuse_bytes: Array) -> Array:
    """Share of data still in a cache of `held` bytes after `reuse_bytes` have passed, replaced at random."""
    return np.minimum(1.0, held / np.maximum(reuse_bytes, 1.0))
