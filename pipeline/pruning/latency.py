"""Predicted latency on the target as a function of the groups' widths, without an export for every choice.

A few networks of other widths are exported once. Every size that a kernel has (columns, input channels, rows, tensor
axes) is then written as the dense cost table writes parameter axes: a fixed part plus coefficients times the widths. A
layer's latency so depends on both its widths, on padding and on tiles (HALP, arXiv 2110.10811, section 3.2, looks the
same up in a table that it measures layer by layer; MDP, arXiv 2504.02168, joins the blocks to it).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fusepress.pipeline.errors import StageError
from fusepress.pipeline.graph.cost import CostTable
from fusepress.pipeline.graph.plan import Group, GroupGraph
from fusepress.targets.kernels import kernel_times
from fusepress.targets.network import Kernel, Network, read_network
from fusepress.targets.predict import Prediction, predict_network, resolve
from fusepress.targets.profile import Precision, Profile
from fusepress.targets.roofline import constants_of
from fusepress.targets.work import (
    BYTES,
    PAD_COLUMNS,
    PAD_DEPTH,
    STEM_CHANNELS,
    Traffic,
    Work,
    describe_traffic,
    kernel_precisions,
    reuse_bytes,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
SETTINGS = 3  # pruned networks exported beside the dense one
MORE_SETTINGS = 4  # exported beside them one by one, while two different axes explain what was seen
TRIES = 1000
CHUNK = 256  # width settings evaluated at once, so that arrays stay in the cache
GROUPED_LEAST = 8  # channels below which `read_network` takes a grouped convolution for a depthwise one
SIZES = ("rows", "columns", "channels_in", "window", "groups", "weights")


@dataclass(slots=True, kw_only=True)
class _Sizes:
    """N sizes over G widths: product over axes of fixed + coef @ widths; (N, D) and (N, D, G), absent axes are 1."""

    fixed: Array
    coef: Array

    def at(self, widths: Ints) -> Array:
        """(B, G) -> (B, N), whole numbers."""
        n, d, g = self.coef.shape
        along = np.rint(widths @ self.coef.reshape(n * d, g).T).reshape(-1, n, d) + self.fixed
        sizes: Array = along.prod(axis=-1)
        return sizes


@dataclass(slots=True, kw_only=True)
class _Structure:
    """The kernels of one fusion structure, their sizes and traffic as functions of the widths."""

    network: Network
    precisions: list[Precision]
    sizes: dict[str, _Sizes]
    product: npt.NDArray[np.bool_]
    traffic: Traffic
    elements: _Sizes


class _Ambiguous(StageError):
    """Several axes explain the same lengths."""


@dataclass(slots=True)
class _Axes:
    """Writes observed axis lengths as functions of the widths; the parameters' axes are the candidates."""

    widths: Ints
    fixed: Array
    coef: Array
    _known: dict[tuple[int, ...], tuple[float, Array]] = field(default_factory=dict)

    def express(self, seen: tuple[int, ...]) -> tuple[float, Array]:
        """(fixed, coef) of an axis that was `seen` as long as this at every width setting.

        Raises:
            StageError: no parameter axis, nor the sum of two, is proportional to it, or different ones are.
        """
        if seen not in self._known:
            self._known[seen] = self._find(np.asarray(seen, dtype=np.float64))
        return self._known[seen]

    def _find(self, seen: Array) -> tuple[float, Array]:
        if np.all(seen == seen[0]):
            return float(seen[0]), np.zeros(self.coef.shape[1])
        lengths = self.widths @ self.coef.T + self.fixed  # (settings, candidates)
        factor = seen[0] / lengths[0]
        exact = np.flatnonzero(np.all(np.abs(lengths * factor - seen[:, None]) < 1e-6, axis=0))
        if len(exact):
            return self._only(seen, self.fixed[exact] * factor[exact], self.coef[exact] * factor[exact, None])
        fixed, coef = [], []
        for first in range(lengths.shape[1]):
            rest = seen[:, None] - lengths[:, first : first + 1]
            left = rest[0] / lengths[0]
            hit = np.flatnonzero(np.all(np.abs(lengths * left - rest) < 1e-6, axis=0) & (left > 0))
            fixed.append(self.fixed[first] + self.fixed[hit] * left[hit])
            coef.append(self.coef[first] + self.coef[hit] * left[hit, None])
        if any(len(found) for found in fixed):
            return self._only(seen, np.concatenate(fixed), np.concatenate(coef))
        raise StageError(
            f"expected every tensor axis to follow the groups' widths; got lengths {seen.astype(int).tolist()} at "
            f"{len(seen)} width settings that no parameter axes explain; budget macs or params for this model instead"
        )

    @staticmethod
    def _only(seen: Array, fixed: Array, coef: Array) -> tuple[float, Array]:
        """The one explanation among those found, (K,) and (K, G): the same axis may be found in several ways."""
        different = np.unique(np.round(np.column_stack([fixed, coef]), 6), axis=0)
        if len(different) > 1:
            raise _Ambiguous(
                f"expected one axis of the groups to explain a tensor's; got {len(different)} for lengths "
                f"{seen.astype(int).tolist()} at {len(seen)} width settings; budget macs or params for this "
                "model instead"
            )
        return float(fixed[0]), coef[0]


class LatencyCost:
    """Latency of the pruned model, predicted for the target at batch 1, as a function of the groups' widths.

    Attributes:
        dense: the prediction for the dense model, with its interval.
        ids: the G groups, in the order of `latencies_ms`'s columns.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: GroupGraph,
        example_inputs: Mapping[str, Tensor],
        profile: Profile,
        power_mode: str | None = None,
        precision: str | None = None,
        *,
        output_names: Sequence[str] | None = None,
    ) -> None:
        """Export the dense model and a few narrower ones, and learn how kernels depend on the widths.

        Args:
            model: the dense model; it is left as it was.
            graph: its groups.
            example_inputs: inputs by name; the first sample is used.
            profile: the target; for `host-cpu` cores and clock are read from this machine.
            power_mode: the profile's default when None.
            precision: what the model will be built in.
            output_names: names of the model's outputs; counted off when None.

        Raises:
            StageError: the kernels or a size of them do not follow the widths.
            ExportError: the model cannot be exported.
            TargetError: unknown power mode or precision.
        """
        from fusepress.pipeline.graph.cost import CostModel

        self.graph = graph
        self.ids = tuple(group.id for group in graph.groups)
        self._column = {name: column for column, name in enumerate(self.ids)}
        self._widths = np.array([group.width for group in graph.groups], dtype=np.int64)
        self._least = np.array([group.multiple for group in graph.groups], dtype=np.int64)
        self._gone = {block.id: [self._column[g] for g in (block.id, *block.dead)] for block in graph.blocks}
        self._model, self._inputs = copy.deepcopy(model), dict(example_inputs)
        self._outputs = tuple(output_names or _output_names(model, example_inputs))
        self.profile, self._precision, mode = resolve(profile, precision, power_mode)
        self._mode = self.profile.mode(mode)
        self._constants = constants_of(self.profile).constants
        self._candidates = _candidates(CostModel(graph, model, dict(example_inputs)), len(self.ids))
        self._structures: dict[frozenset[str], _Structure] = {}
        dense = self._structure(frozenset()).network
        self.dense: Prediction = predict_network(dense, profile, precision, mode=power_mode)

    @property
    def dense_ms(self) -> float:
        """Predicted latency of the dense model in milliseconds."""
        return self.dense.latency_ms

    @property
    def extrapolating(self) -> bool:
        """Whether the dense prediction lies outside what the prediction was validated on."""
        return self.dense.extrapolating

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it does."""
        return self.dense.reasons

    def latency_ms(self, widths: Mapping[str, int]) -> float:
        """Milliseconds at these widths; groups that are left out are dense.

        A set of removed blocks that is met for the first time is exported: what `latencies_ms` adds up, is read here.
        """
        setting = self._vector(widths)[None]
        self._check(setting)
        blocks = frozenset(block for block, rows in self._removed(setting).items() if rows[0])
        return float(self._times(self._structure(blocks), self._stood(setting, blocks))[0])

    def latencies_ms(self, widths: npt.ArrayLike) -> Array:
        """Milliseconds at B settings of the G widths, in the order of `ids`: (B, G) -> (B,).

        A block is exported without (`SETTINGS` + 1 times) when it is first removed. Several blocks that are removed
        together save what each saves alone: a set for each combination would cost an export too many, and blocks share
        no kernels unless they follow one another (`latency_ms` exports the set itself).

        Raises:
            StageError: a width that its group cannot take.
        """
        settings = np.atleast_2d(np.asarray(widths, dtype=np.int64))
        self._check(settings)
        removed = self._removed(settings)
        present = settings.copy()
        for block, rows in removed.items():
            gone = self._gone[block]
            present[np.flatnonzero(rows)[:, None], gone] = self._least[gone]
        whole = self._chunked(frozenset(), present)
        result = whole.copy()
        for block, rows in removed.items():
            if rows.any():
                result[rows] += self._chunked(frozenset([block]), present[rows]) - whole[rows]
        return result

    def _chunked(self, blocks: frozenset[str], settings: Ints) -> Array:
        structure = self._structure(blocks)
        parts = [self._times(structure, settings[at : at + CHUNK]) for at in range(0, len(settings), CHUNK)]
        return np.concatenate([np.empty(0), *parts])

    def _removed(self, settings: Ints) -> dict[str, npt.NDArray[np.bool_]]:
        """Where each block has width 0 and does not go with another one anyway: block -> (B,)."""
        zero = {block: settings[:, self._column[block]] == 0 for block in self._gone}
        removed = {block: rows.copy() for block, rows in zero.items()}
        for block, columns in self._gone.items():
            for other in columns[1:]:
                if self.ids[other] in removed:
                    removed[self.ids[other]] &= ~zero[block]
        return removed

    def _vector(self, widths: Mapping[str, int]) -> Ints:
        vector = self._widths.copy()
        for name, width in widths.items():
            vector[self._index(name)] = width
        return vector

    def _index(self, group_id: str) -> int:
        if group_id not in self._column:
            raise StageError(
                f"expected a group of this model; got {group_id!r}; it has {len(self.ids)} groups; name one of them"
            )
        return self._column[group_id]

    def _check(self, settings: Ints) -> None:
        if settings.ndim != 2 or settings.shape[1] != len(self.ids):
            raise StageError(
                f"expected widths of {len(self.ids)} groups; got shape {settings.shape}; give one a column"
            )
        free = np.zeros(settings.shape, dtype=bool)
        for block, columns in self._gone.items():
            free[:, columns] |= settings[:, [self._column[block]]] == 0  # what is dead with the block has any width
        bad = ((settings < 1) | (settings > self._widths) | (settings % self._least != 0)) & ~free
        if bad.any():
            row, column = np.argwhere(bad)[0]
            raise StageError(
                f"expected a width of 1 to {self._widths[column]} in steps of {self._least[column]}; "
                f"got {settings[row, column]} at {self.ids[column]}; only removable blocks may be 0"
            )

    def _stood(self, settings: Ints, blocks: Iterable[str]) -> Ints:
        """Settings with stand-in widths for groups that are gone, which no kernel of that structure reads."""
        stood = settings.copy()
        for block in blocks:
            stood[:, self._gone[block]] = self._least[self._gone[block]]
        return stood

    def _structure(self, blocks: frozenset[str]) -> _Structure:
        if blocks not in self._structures:
            settings = self._draw(blocks)
            networks = [self._export(row, blocks) for row in settings]
            while blocks not in self._structures:
                try:
                    axes = _Axes(settings, *self._candidates)
                    self._structures[blocks] = _learn(networks, axes, self._precision)
                except _Ambiguous:
                    if len(settings) > SETTINGS + MORE_SETTINGS:
                        raise
                    settings = np.vstack([settings, self._another(len(settings), blocks)])
                    networks.append(self._export(settings[-1], blocks))
        return self._structures[blocks]

    def _another(self, seed: int, blocks: frozenset[str]) -> Ints:
        """One more setting, from all widths that there are: (1, G)."""
        steps = np.random.default_rng(seed).integers(1, self._widths // self._least + 1)
        return self._stood((self._least * steps)[None], blocks)

    def _draw(self, blocks: frozenset[str]) -> Ints:
        """The dense widths and `SETTINGS` others at which no two different parameter axes look alike."""
        generator = np.random.default_rng(0)
        fixed, coef = self._candidates
        stood: Ints = self._widths[None]
        best, alike = stood, 2**31
        for _ in range(TRIES):
            steps = self._widths // self._least
            drawn = self._least * generator.integers(
                (steps + 1) // 2, np.maximum(steps, 2), size=(SETTINGS, len(steps))
            )
            drawn = np.minimum(drawn, self._widths)
            settings = self._stood(np.vstack([self._widths[None], drawn]), blocks)
            lengths = settings @ coef.T + fixed
            moving = lengths[:, np.any(lengths != lengths[0], axis=0)]
            looks = np.unique(np.round(moving / moving[:1], 9), axis=1).shape[1]
            if moving.shape[1] - looks < alike:
                best, alike = settings, moving.shape[1] - looks
            if alike == 0:
                break
        return best

    def _export(self, widths: Ints, blocks: frozenset[str]) -> Network:
        from fusepress.pipeline.graph.apply import apply_plan
        from fusepress.pipeline.graph.probe import probe_onnx

        dead = {self.ids[k] for block in blocks for k in self._gone[block]}
        kept: dict[str, Sequence[int]] = {
            group.id: first_channels(group, int(width))
            for group, width in zip(self.graph.groups, widths, strict=True)
            if group.id not in dead
        }
        kept |= dict.fromkeys(blocks, ())
        model = apply_plan(copy.deepcopy(self._model), self.graph.plan(kept))
        return read_network(probe_onnx(model, self._inputs, self._outputs))

    def _times(self, structure: _Structure, widths: Ints) -> Array:
        """The roofline of `predict_network` over all kernels of all settings at once: (B, G) -> (B,)."""
        work = _work(structure, widths)
        times = kernel_times(work, self.profile, self._mode, self._constants)
        total: Array = times.total.reshape(len(widths), -1).sum(axis=1)
        return total


def first_channels(group: Group, width: int) -> list[int]:
    """The first channels of each of a group's equal parts, `width` altogether."""
    part, share = group.width // group.multiple, width // group.multiple
    return [k * part + c for k in range(group.multiple) for c in range(share)]


def _output_names(model: nn.Module, example_inputs: Mapping[str, Tensor]) -> list[str]:
    import torch

    training = {name: module.training for name, module in model.named_modules()}
    try:
        model.eval()
        with torch.no_grad():
            outputs = model(**{name: value[:1] for name, value in example_inputs.items()})
    finally:
        for name, module in model.named_modules():
            module.training = training[name]
    if isinstance(outputs, Mapping):
        return [str(name) for name in outputs]
    return [f"output_{k}" for k in range(len(outputs))] if isinstance(outputs, (tuple, list)) else ["output"]


def _candidates(table: CostTable, groups: int) -> tuple[Array, Array]:
    """Different parameter axes, and every group alone: fixed (C,) and coef (C, G)."""
    coef = np.vstack([np.eye(groups, dtype=np.int64), table.coef.reshape(-1, groups)])
    fixed = np.concatenate([np.zeros(groups, dtype=np.int64), table.fixed.reshape(-1)])
    moving = coef.any(axis=1)
    rows = np.unique(np.column_stack([fixed, coef])[moving], axis=0).astype(np.float64)
    divisor = np.gcd.reduce(rows.astype(np.int64), axis=1)[:, None]
    rows = np.unique(rows / divisor, axis=0)  # C and C*H*W are the same axis, up to a factor
    return rows[:, 0], rows[:, 1:]


def _learn(networks: list[Network], axes: _Axes, precision: Precision | None) -> _Structure:
    dense = networks[0]
    for other in networks[1:]:
        if [_kind(kernel) for kernel in other.kernels] != [_kind(kernel) for kernel in dense.kernels]:
            raise StageError(
                f"expected the same kernels at other widths; got {len(other.kernels)} instead of "
                f"{len(dense.kernels)}, or other ones, at {dense.kernels[0].name}; budget macs or params instead"
            )
    columns = list(zip(*(network.kernels for network in networks), strict=True))
    product = np.array([_is_product(kernel) for kernel in dense.kernels], dtype=bool)
    sizes = {
        name: _stacked([[axes.express(tuple(_size(k, name) for k in seen))] for seen in columns], len(axes.coef[0]))
        for name in SIZES
    }
    precisions = kernel_precisions(dense, precision)
    traffic = describe_traffic(dense, precisions, precision)
    shapes = []
    for names in zip(*(describe_traffic(net, precisions, precision).names for net in networks), strict=True):
        lengths = zip(*(net.tensors[name].shape for net, name in zip(networks, names, strict=True)), strict=True)
        shapes.append([axes.express(tuple(length)) for length in lengths])
    return _Structure(
        network=dense,
        precisions=precisions,
        sizes=sizes,
        product=product,
        traffic=traffic,
        elements=_stacked(shapes, len(axes.coef[0])),
    )


def _kind(kernel: Kernel) -> tuple[str, bool, int, int]:
    return kernel.op, kernel.kind in ("gemm", "depthwise"), len(kernel.reads), len(kernel.writes)


def _is_product(kernel: Kernel) -> bool:
    return kernel.weights >= _product(kernel) > 0


def _product(kernel: Kernel) -> int:
    return kernel.groups * kernel.columns * kernel.channels_in * kernel.window


def _size(kernel: Kernel, name: str) -> int:
    """One size of a kernel; of the weights only the bias, for the rest is the product of the other sizes."""
    if name == "weights" and _is_product(kernel):
        return kernel.weights - _product(kernel)
    return int(getattr(kernel, name))


def _stacked(shapes: list[list[tuple[float, Array]]], groups: int) -> _Sizes:
    deepest = max([1, *(len(shape) for shape in shapes)])
    fixed, coef = np.ones((len(shapes), deepest)), np.zeros((len(shapes), deepest, groups))
    for row, shape in enumerate(shapes):
        for axis, (constant, along) in enumerate(shape):
            fixed[row, axis], coef[row, axis] = constant, along
    return _Sizes(fixed=fixed, coef=coef)


def _work(structure: _Structure, widths: Ints) -> Work:
    """What `describe_work` says of B networks with K kernels each, as one of B * K kernels."""
    kernels, count = structure.network.kernels, len(widths)
    size = {name: sizes.at(widths) for name, sizes in structure.sizes.items()}
    columns, channels, groups, window = (size[name] for name in ("columns", "channels_in", "groups", "window"))
    matrix = np.broadcast_to(np.array([k.kind in ("gemm", "depthwise") for k in kernels]), columns.shape)
    convolution = np.array([kernel.op in ("Conv", "ConvTranspose") for kernel in kernels])
    depthwise = matrix & convolution & (groups > 1) & (np.minimum(channels, columns) < GROUPED_LEAST)
    pad_columns = np.array([PAD_COLUMNS[p] for p in structure.precisions], dtype=np.float64)
    pad_depth = np.array([PAD_DEPTH[p] for p in structure.precisions], dtype=np.float64)
    multiple = np.where(channels <= STEM_CHANNELS, STEM_CHANNELS, pad_depth)
    weights = size["weights"] + structure.product * (groups * columns * channels * window)
    bytes_of = np.array([BYTES[p] for p in structure.precisions])
    step = np.arange(count)[:, None] * len(kernels)
    weight_bytes = weights * bytes_of
    tensor_bytes = structure.elements.at(widths) * structure.traffic.element_bytes
    between, whole = reuse_bytes(tensor_bytes, weight_bytes, structure.traffic)
    smooth = np.array([k.smooth and p != "fp32" for k, p in zip(kernels, structure.precisions, strict=True)])
    return Work(
        names=[kernel.name for kernel in kernels] * count,
        ops=[kernel.op for kernel in kernels] * count,
        precisions=structure.precisions * count,
        macs=(groups * size["rows"] * columns * channels * window).ravel(),
        rows=size["rows"].ravel(),
        columns=np.where(depthwise, columns, np.ceil(columns / pad_columns) * pad_columns).ravel(),
        depth=(np.where(depthwise, channels, np.ceil(channels / multiple) * multiple) * window).ravel(),
        groups=groups.ravel(),
        matrix=(matrix & ~depthwise).ravel(),
        smooth=np.tile(smooth, count),
        launches=np.tile(structure.traffic.launches, count),
        weight_bytes=weight_bytes.ravel(),
        weight_reuse_bytes=whole.ravel(),
        tensor_bytes=tensor_bytes.ravel(),
        tensor_reuse_bytes=between.ravel(),
        tensor_kernel=(structure.traffic.kernel[None] + step).ravel(),
    )


__all__ = ["LatencyCost", "first_channels"]
