"""Ranges of activations, measured sample by sample: what each method makes of them, and how far resampling moves them.

A histogram over the magnitude's leading bits (exponent and five bits of the mantissa) has bins of at most 1/32 of their
value and needs no second pass to learn the largest one. Pooled over the samples, it answers any method. Of each sample
only the upper end is kept, as far down as any drawing of as many samples can push the percentile: all that resampling
reads, in a few bins.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fusepress.export.onnx import load_onnx
from fusepress.export.runtime import OnnxSession
from fusepress.pipeline.errors import QuantizeError

Array = np.ndarray[Any, Any]
Floats = npt.NDArray[np.float64]
OwnMethod = Literal["max", "percentile", "mse"]
OWN_METHODS: tuple[OwnMethod, ...] = ("max", "percentile", "mse")
PERCENTILE = 99.99
LEVELS = 127  # INT8, symmetric
MANTISSA_BITS = 5
LOWEST_EXPONENT, HIGHEST_EXPONENT = -24, 40  # of the bins; what is smaller or larger goes to the ends
BINS = (HIGHEST_EXPONENT - LOWEST_EXPONENT) << MANTISSA_BITS
_SHIFT = 23 - MANTISSA_BITS
_FIRST = (LOWEST_EXPONENT + 127) << MANTISSA_BITS
REPLICATES = 200
MOST_NAMED = 5


def bin_edges() -> Floats:
    """(BINS + 1,) edges of the histogram: 2^e (1 + m / 32)."""
    index = np.arange(BINS + 1)
    exponent = LOWEST_EXPONENT + (index >> MANTISSA_BITS)
    mantissa = (index & ((1 << MANTISSA_BITS) - 1)) / (1 << MANTISSA_BITS)
    return np.asarray(np.ldexp(1.0 + mantissa, exponent))


def magnitude_histogram(values: Array) -> npt.NDArray[np.int64]:
    """(BINS,) counts of |values|; zeros count in the first bin."""
    bits = np.ascontiguousarray(values, dtype=np.float32).reshape(-1).view(np.int32) & 0x7FFFFFFF
    return np.bincount(np.clip((bits >> _SHIFT) - _FIRST, 0, BINS - 1), minlength=BINS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """The upper end of one sample's histogram: bins in ascending order, and the counts in them."""

    bins: npt.NDArray[np.uint16]
    counts: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranges:
    """Magnitudes of T tensors on S calibration samples.

    Attributes:
        tensors: T names.
        amax: (T, S), the largest magnitude of each tensor in each sample.
        pooled: (T, BINS), counts of all samples over `bin_edges()`.
        tails: T lists of S upper ends.
        percentile: that resampling can say something about, in per cent.
    """

    tensors: tuple[str, ...]
    amax: Floats
    pooled: npt.NDArray[np.int64]
    tails: tuple[tuple[Tail, ...], ...]
    percentile: float = PERCENTILE

    def limits(self, method: OwnMethod, percentile: float = PERCENTILE) -> dict[str, float]:
        """Tensor -> the largest magnitude that is represented; what is larger saturates.

        Args:
            method: max (nothing saturates), percentile (that share does not), or mse (least squared error in INT8).
            percentile: of method percentile, in per cent.
        """
        amax_T = self.amax.max(axis=1)
        if method == "max":
            limit_T = amax_T
        else:
            found = [
                percentile_limit(counts_B, percentile) if method == "percentile" else mse_limit(counts_B, float(most))
                for counts_B, most in zip(self.pooled, amax_T, strict=True)
            ]
            limit_T = np.minimum(np.asarray(found), amax_T)
        return dict(zip(self.tensors, (float(limit) for limit in limit_T), strict=True))

    def resampling(self, seed: int) -> dict[str, Any]:
        """How far ranges move when the samples are drawn again, with replacement.

        Returns:
            For max and percentile: the median and the largest relative width of the 95 % interval over the tensors, and
            the tensors that move most. Wide ones say that more, or other, samples are needed.
        """
        samples = self.amax.shape[1]
        picks_RS = np.random.default_rng(seed).integers(0, samples, size=(REPLICATES, samples))
        amax_TR = self.amax[:, picks_RS].max(axis=2)
        weights_RS = np.stack([np.bincount(picks, minlength=samples) for picks in picks_RS])
        totals_T = self.pooled.sum(axis=1)
        percentile_TR = np.stack(
            [
                _drawn_percentiles(tails_S, weights_RS, int(total), self.percentile)
                for tails_S, total in zip(self.tails, totals_T, strict=True)
            ]
        )
        return {
            "samples": samples,
            "replicates": REPLICATES,
            "max": self._spread(amax_TR),
            f"percentile {self.percentile:g}": self._spread(np.minimum(percentile_TR, amax_TR)),
        }

    def _spread(self, drawn_TR: Floats) -> dict[str, Any]:
        low_T, middle_T, high_T = np.quantile(drawn_TR, [0.025, 0.5, 0.975], axis=1)
        width_T = (high_T - low_T) / np.where(middle_T > 0, middle_T, np.inf)
        order = np.argsort(-width_T, kind="stable")[:MOST_NAMED]
        return {
            "median_width": float(np.median(width_T)),
            "largest_width": float(width_T.max()),
            "widest": {self.tensors[t]: float(width_T[t]) for t in order if width_T[t] > 0},
        }


class RangeCollector:
    """Takes tensors in sample by sample; what it holds grows by a few bins a tensor and sample.

    Args:
        tensors: T names.
        samples: S, how many there will be.
        percentile: that resampling will be asked about, in per cent.
    """

    def __init__(self, tensors: Sequence[str], samples: int, percentile: float = PERCENTILE) -> None:
        self.tensors, self.percentile = tuple(tensors), percentile
        self._amax_TS = np.zeros((len(self.tensors), samples))
        self._pooled_TB = np.zeros((len(self.tensors), BINS), dtype=np.int64)
        self._tails: list[list[Tail]] = [[] for _ in self.tensors]

    def add(self, t: int, values: Array) -> float:
        """The next sample's values of tensor number t, as many in each sample; returns their largest magnitude."""
        sample, samples = len(self._tails[t]), self._amax_TS.shape[1]
        self._amax_TS[t, sample] = np.abs(values).max(initial=0.0)
        counts_B = magnitude_histogram(values)
        self._pooled_TB[t] += counts_B
        self._tails[t].append(upper_end(counts_B, samples * values.size, self.percentile))
        return float(self._amax_TS[t, sample])

    def ranges(self) -> Ranges:
        """What was taken in."""
        return Ranges(
            tensors=self.tensors,
            amax=self._amax_TS,
            pooled=self._pooled_TB,
            tails=tuple(tuple(tails) for tails in self._tails),
            percentile=self.percentile,
        )


def upper_end(counts_B: Array, total: int, percentile: float) -> Tail:
    """The bins of one sample that can decide a percentile of samples drawn with replacement.

    At the bin of the percentile at most (100 - percentile) % of all drawn values lie in higher bins, so no more of a
    drawn sample's. Bins below the one with which a sample alone has more than that in and above it are never reached.

    Args:
        counts_B: of the sample.
        total: values of all drawn samples together.
        percentile: in per cent.
    """
    used = np.flatnonzero(counts_B)
    above = np.cumsum(counts_B[used][::-1])[::-1]  # in and above each bin
    # the last one of which more lie in and above than may lie above the percentile, and all higher ones
    enough = np.flatnonzero(total - above < percentile / 100 * total)
    first = int(enough[-1]) if enough.size else 0
    return Tail(bins=used[first:].astype(np.uint16), counts=counts_B[used[first:]].astype(np.int64))


def _drawn_percentiles(tails_S: Sequence[Tail], weights_RS: Array, total: int, percentile: float) -> Floats:
    """(R,) upper edges of the percentile's bin, each of samples drawn so many times."""
    used = np.unique(np.concatenate([tail.bins for tail in tails_S]))
    if used.size == 0:
        return np.zeros(len(weights_RS))
    counts_SB = np.zeros((len(tails_S), used.size), dtype=np.int64)
    for s, tail in enumerate(tails_S):
        counts_SB[s, np.searchsorted(used, tail.bins)] = tail.counts
    drawn_RB = weights_RS @ counts_SB
    higher_RB = np.cumsum(drawn_RB[:, ::-1], axis=1)[:, ::-1] - drawn_RB
    index_R = (total - higher_RB < percentile / 100 * total).sum(axis=1)
    return np.asarray(bin_edges()[used[index_R].astype(np.int64) + 1])


def percentile_limit(counts_B: Array, percentile: float) -> float:
    """The smallest upper edge of a bin below which so many per cent of the magnitudes lie."""
    used = np.flatnonzero(counts_B)
    if used.size == 0:
        return 0.0
    below = np.cumsum(np.asarray(counts_B)[used])
    return float(bin_edges()[used[int((below < percentile / 100 * below[-1]).sum())] + 1])


def mse_limit(counts_B: Array, amax: float) -> float:
    """The limit of least expected squared error: rounding below it, saturating above.

    A magnitude m below the limit c is rounded to a multiple of d = c / 127: m^2 where it becomes 0, else d^2 / 12 on
    average; above the limit it loses (m - c)^2. Limits are tried at the bins' edges and at `amax`.

    Args:
        counts_B: of a magnitude histogram.
        amax: the largest magnitude.
    """
    edges = bin_edges()
    used = np.flatnonzero(np.asarray(counts_B))
    if used.size == 0 or amax <= 0:
        return amax
    counts, magnitude = np.asarray(counts_B, dtype=np.float64)[used], (edges[used] + edges[used + 1]) / 2
    magnitude = np.where(used == 0, 0.0, np.minimum(magnitude, amax))
    tried = np.append(edges[used + 1], amax)
    tried_C = tried[(tried <= amax) & (tried >= amax / LEVELS)]
    step_C1 = tried_C[:, None] / LEVELS
    rounding_CB = np.where(magnitude < step_C1 / 2, magnitude**2, step_C1**2 / 12)
    error_CB = np.where(magnitude > tried_C[:, None], (magnitude - tried_C[:, None]) ** 2, rounding_CB)
    error_CB[:, magnitude == 0] = 0.0  # zero is represented exactly
    return float(tried_C[int(np.argmin(error_CB @ counts))])


def measure_ranges(
    path: Path, tensors: Sequence[str], arrays: Mapping[str, Array], sample_ids: Sequence[str] = ()
) -> Ranges:
    """Run a float model on calibration samples, one by one, and look at some of its tensors.

    Args:
        path: float32 ONNX file, batch 1.
        tensors: names of inputs or activations.
        arrays: input name -> S samples.
        sample_ids: S names for messages; default: their numbers.

    Raises:
        QuantizeError: a tensor holds NaN or infinity.
    """
    proto, producers = _with_outputs(path, tensors)
    with tempfile.TemporaryDirectory(prefix="fusepress-") as folder:
        shown = Path(folder) / path.name
        shown.write_bytes(proto.SerializeToString())
        session = OnnxSession(shown)
    count = len(next(iter(arrays.values())))
    names = list(sample_ids) or [f"number {number}" for number in range(count)]
    collector = RangeCollector(tensors, count)
    for s in range(count):
        feed = {name: np.asarray(array)[s : s + 1] for name, array in arrays.items()}
        seen = {**feed, **session.run_numpy(feed)}
        for t, name in enumerate(tensors):
            if not np.isfinite(collector.add(t, seen[name])):
                raise QuantizeError(_not_finite(name, producers, names[s], path))
    return collector.ranges()


def _with_outputs(path: Path, tensors: Sequence[str]) -> tuple[Any, dict[str, str]]:
    """The model with more outputs, and which node makes which tensor."""
    import onnx

    proto = onnx.shape_inference.infer_shapes(load_onnx(path))
    producers = {output: node.name for node in proto.graph.node for output in node.output}
    known = {value.name: value for value in proto.graph.value_info}
    shown = {value.name for value in proto.graph.output}
    for name in tensors:
        if name in producers and name not in shown:
            unshaped = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            proto.graph.output.append(known.get(name, unshaped))  # behind an operator that onnx cannot infer
    return proto, producers


def _not_finite(tensor: str, producers: Mapping[str, str], sample: str, path: Path) -> str:
    where = f"node {producers[tensor]}" if tensor in producers else "an input"
    return (
        f"expected finite activations while calibrating; got NaN or infinity in {tensor!r} of {where} for the "
        f"calibration sample {sample} at {path}; check the checkpoint and that sample: no range fits it"
    )
