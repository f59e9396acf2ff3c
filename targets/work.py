"""A network in numbers: what each kernel computes and moves in a precision, as arrays, one entry a kernel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fusepress.targets.network import Kernel, Network
from fusepress.targets.profile import Precision

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]

PAD_COLUMNS: dict[Precision, int] = {"fp32": 4, "fp16": 8, "int8": 32, "fp8": 32}
PAD_DEPTH: dict[Precision, int] = {"fp32": 32, "fp16": 32, "int8": 64, "fp8": 64}  # a step along the depth, at least
STEM_CHANNELS = 4  # image-like inputs have kernels of their own that pad to 4
BYTES: dict[Precision, float] = {"fp32": 4.0, "fp16": 2.0, "int8": 1.0, "fp8": 1.0}
TRANSPARENT = frozenset(["Concat", "MaxPool", "AveragePool", "GlobalAveragePool", "Resize", "Split", "Slice", "Pad"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A network in numbers: one entry a kernel [K]; `tensor_*` one for each time that a kernel touches a tensor [E].

    Attributes:
        macs: multiply-accumulates without padding.
        rows, columns, depth, groups: the matrix products, columns and depth padded.
        matrix: whether tensor cores do it.
        smooth: whether it computes an activation with exponentials (SiLU, GELU) on what it writes.
        launches: kernels that the entry stands for: with a reformat before it or an activation behind it, two or three.
        weight_bytes: weights that it reads.
        weight_reuse_bytes: what is moved until it reads them again, in the next inference.
        tensor_bytes: activations read or written at this touch.
        tensor_reuse_bytes: what is moved between this touch and the one that it shares the data with (of a read the one
            before, of a write the one behind), the data itself included; infinite where there is none.
    """

    names: list[str]
    ops: list[str]
    precisions: list[Precision]
    macs: Array
    rows: Array
    columns: Array
    depth: Array
    groups: Array
    matrix: npt.NDArray[np.bool_]
    smooth: npt.NDArray[np.bool_]
    launches: Array
    weight_bytes: Array
    weight_reuse_bytes: Array
    tensor_bytes: Array
    tensor_reuse_bytes: Array
    tensor_kernel: Indices


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Which tensors the kernels touch, in running order [E]: the same for all widths of a network.

    Attributes:
        names: tensor of each touch.
        element_bytes: bytes of one of its elements there.
        kernel: kernel of each touch.
        partner: touch that it shares the data with, -1 where there is none.
        launches: kernels that each entry of the network stands for [K].
    """

    names: list[str]
    element_bytes: Array
    kernel: Indices
    partner: Indices
    launches: Array


def kernel_precisions(network: Network, precision: Precision | None, remainder: Precision = "fp16") -> list[Precision]:
    """Precision of each kernel: from the graph where it carries one, else from the argument.

    An untyped graph asked for in INT8 or FP8 has its convolutions and products with weights in it, the rest in the
    remainder: FP16, or FP32 where the builder was allowed INT8 alone.
    """
    low: Precision = "fp8" if precision == "fp8" else "int8"
    if network.typed:
        return [low if k.quantized else "fp16" if k.half else "fp32" for k in network.kernels]
    if precision in ("int8", "fp8"):
        return [low if _quantizable(kernel) else remainder for kernel in network.kernels]
    return [precision or "fp32"] * len(network.kernels)


def _quantizable(kernel: Kernel) -> bool:
    return kernel.kind in ("gemm", "depthwise") and kernel.weights > 0 and kernel.op != "ConvTranspose"


def tensor_widths(
    network: Network, precisions: Sequence[Precision], precision: Precision | None, remainder: Precision = "fp16"
) -> dict[str, float]:
    """Bytes of one element of every tensor between kernels."""
    widths = {}
    outputs = set(network.outputs)
    low = precision in ("int8", "fp8")
    float_bytes = BYTES[remainder if low else precision or "fp32"]
    for name, tensor in network.tensors.items():
        width = tensor.bits / 8
        if tensor.is_float and not network.typed:
            inner = name not in outputs and name not in network.inputs
            narrow = (
                low
                and inner
                and all(
                    precisions[reader] == precision or network.kernels[reader].op in TRANSPARENT
                    for reader in tensor.readers
                )
            )
            width = 4.0 if not inner else 1.0 if narrow else float_bytes
        widths[name] = width
    return widths


def describe_traffic(
    network: Network, precisions: Sequence[Precision], precision: Precision | None, remainder: Precision = "fp16"
) -> Traffic:
    """Which tensors the kernels touch, with the kernels that fusion does not remove.

    A matrix kernel that reads an image-like input has a reformat of its layout before it; in an untyped graph one that
    reads a tensor of another width, too. An activation with exponentials is a kernel of its own in FP32.
    """
    element = tensor_widths(network, precisions, precision, remainder)
    launches = np.ones(len(network.kernels))
    names: list[str] = []
    widths: list[float] = []
    kernels: list[int] = []
    partner: list[int] = []
    last: dict[str, int] = {}

    def touch(index: int, name: str, width: float, *, write: bool) -> None:
        before = last.get(name, -1)
        if before < 0 and name in network.parts:
            touched = sorted(last[part] for part in network.parts[name] if part in last)
            before = touched[len(touched) // 2] if touched else -1
        at = len(names)
        names.append(name)
        widths.append(width)
        kernels.append(index)
        partner.append(-1 if write else before)
        if not write and before >= 0 and partner[before] < 0:
            partner[before] = at
        last[name] = at

    for index, kernel in enumerate(network.kernels):
        own = BYTES[precisions[index]]
        computes = kernel.kind in ("gemm", "depthwise")
        for name in kernel.reads:
            width = element[name]
            touch(index, name, width, write=False)
            image = name in network.inputs and len(network.tensors[name].shape) >= 4
            border = not network.typed and width != own
            if computes and network.tensors[name].is_float and (border or image):
                launches[index] += 1
                touch(index, name, own, write=True)
                touch(index, name, own, write=False)
        for name in kernel.writes:
            touch(index, name, element[name], write=True)
        if kernel.smooth and precisions[index] == "fp32":
            launches[index] += 1
            for name in kernel.writes:
                touch(index, name, element[name], write=False)
                touch(index, name, element[name], write=True)
    return Traffic(
        names=names,
        element_bytes=_array(widths),
        kernel=np.asarray(kernels, dtype=np.intp),
        partner=np.asarray(partner, dtype=np.intp),
        launches=launches,
    )


def reuse_bytes(tensor_bytes: Array, weight_bytes: Array, traffic: Traffic) -> tuple[Array, Array]:
    """What is moved between a touch and its partner, and in the whole network: [..., E] and [..., K] to the same."""
    moved = tensor_bytes.copy()
    first = np.searchsorted(traffic.kernel, np.arange(weight_bytes.shape[-1]))
    busy = first < moved.shape[-1]
    np.add.at(moved.T, np.minimum(first, moved.shape[-1] - 1), (weight_bytes * busy).T)
    before = np.cumsum(moved, axis=-1) - moved
    between = np.abs(before - before[..., traffic.partner])
    between = np.where(traffic.partner >= 0, between, np.inf)
    whole = np.broadcast_to(moved.sum(axis=-1, keepdims=True), weight_bytes.shape)
    return between, whole


def describe_work(network: Network, precision: Precision | None, remainder: Precision = "fp16") -> Work:
    """Turn a network into arrays, once for any number of power modes."""
    precisions = kernel_precisions(network, precision, remainder)
    traffic = describe_traffic(network, precisions, precision, remainder)
    kernels = network.kernels
    depth, columns = [], []
    for kernel, kind in zip(kernels, precisions, strict=True):
        multiple = STEM_CHANNELS if kernel.channels_in <= STEM_CHANNELS else PAD_DEPTH[kind]
        channels = kernel.channels_in if kernel.kind == "depthwise" else _pad(kernel.channels_in, multiple)
        depth.append(channels * kernel.window)
        columns.append(kernel.columns if kernel.kind == "depthwise" else _pad(kernel.columns, PAD_COLUMNS[kind]))
    tensor_bytes = _array(network.tensors[name].elements for name in traffic.names) * traffic.element_bytes
    weight_bytes = _array(k.weights * BYTES[p] for k, p in zip(kernels, precisions, strict=True))
    between, whole = reuse_bytes(tensor_bytes, weight_bytes, traffic)
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
        smooth=np.asarray([k.smooth and p != "fp32" for k, p in zip(kernels, precisions, strict=True)], dtype=np.bool_),
        launches=traffic.launches,
        weight_bytes=weight_bytes,
        weight_reuse_bytes=whole,
        tensor_bytes=tensor_bytes,
        tensor_reuse_bytes=between,
        tensor_kernel=traffic.kernel,
    )


def join_works(works: Sequence[Work]) -> Work:
    """Several networks as one, to be priced in one call; their kernels follow one another."""
    starts = np.cumsum([0, *(len(work.names) for work in works[:-1])])
    return Work(
        names=[name for work in works for name in work.names],
        ops=[op for work in works for op in work.ops],
        precisions=[precision for work in works for precision in work.precisions],
        macs=np.concatenate([work.macs for work in works]),
        rows=np.concatenate([work.rows for work in works]),
        columns=np.concatenate([work.columns for work in works]),
        depth=np.concatenate([work.depth for work in works]),
        groups=np.concatenate([work.groups for work in works]),
        matrix=np.concatenate([work.matrix for work in works]),
        smooth=np.concatenate([work.smooth for work in works]),
        launches=np.concatenate([work.launches for work in works]),
        weight_bytes=np.concatenate([work.weight_bytes for work in works]),
        weight_reuse_bytes=np.concatenate([work.weight_reuse_bytes for work in works]),
        tensor_bytes=np.concatenate([work.tensor_bytes for work in works]),
        tensor_reuse_bytes=np.concatenate([work.tensor_reuse_bytes for work in works]),
        tensor_kernel=np.concatenate([work.tensor_kernel + start for work, start in zip(works, starts, strict=True)]),
    )


def _array(values: Iterable[float]) -> Array:
    return np.fromiter(values, dtype=np.float64)


def _pad(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
