"""Ranges of activations, measured sample by sample: what each method makes of them, and how far resampling moves them.

A histogram over the magnitude's leading bits (exponent and five bits of the mantissa) has bins of at most 1/32 of their
value and needs no second pass to learn the largest one. Kept per sample, it answers any method and any resampling.
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
class Ranges:
    """Magnitudes of T tensors on S calibration samples.

    Attributes:
        tensors: T names.
        amax: (T, S), the largest magnitude of each tensor in each sample.
        histogram: (T, S, BINS), counts over `bin_edges()`.
    """

    tensors: tuple[str, ...]
    amax: Floats
    histogram: npt.NDArray[np.uint32]

    def limits(self, method: OwnMethod, percentile: float = PERCENTILE) -> dict[str, float]:
        """Tensor -> the largest magnitude that INT8 represents; what is larger saturates.

        Args:
            method: max (nothing saturates), percentile (that share does not), or mse (least squared error).
            percentile: of method percentile, in per cent.
        """
        amax_T = self.amax.max(axis=1)
        if method == "max":
            limit_T = amax_T
        else:
            pooled_TB = self.histogram.sum(axis=1, dtype=np.int64)
            found = [
                percentile_limit(counts_B, percentile) if method == "percentile" else mse_limit(counts_B, float(most))
                for counts_B, most in zip(pooled_TB, amax_T, strict=True)
            ]
            limit_T = np.minimum(np.asarray(found), amax_T)
        return dict(zip(self.tensors, (float(limit) for limit in limit_T), strict=True))

    def resampling(self, seed: int, percentile: float = PERCENTILE) -> dict[str, Any]:
        """How far ranges move when the samples are drawn again, with replacement.

        Returns:
            For max and percentile: the median and the largest relative width of the 95 % interval over the tensors, and
            the tensors that move most. Wide ones say that more, or other, samples are needed.
        """
        samples = self.amax.shape[1]
        picks_RS = np.random.default_rng(seed).integers(0, samples, size=(REPLICATES, samples))
        amax_TR = self.amax[:, picks_RS].max(axis=2)
        weights_RS = np.stack([np.bincount(picks, minlength=samples) for picks in picks_RS])
        percentile_TR = np.stack([_percentiles(h_SB, weights_RS, percentile) for h_SB in self.histogram])
        return {
            "samples": samples,
            "replicates": REPLICATES,
            "max": self._spread(amax_TR),
            f"percentile {percentile:g}": self._spread(np.minimum(percentile_TR, amax_TR)),
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


def _percentiles(histogram_SB: Array, weights_RS: Array, percentile: float) -> Floats:
    used = np.flatnonzero(histogram_SB.any(axis=0))
    if used.size == 0:
        return np.zeros(len(weights_RS))
    drawn_RB = weights_RS @ histogram_SB[:, used].astype(np.int64)
    below_RB = np.cumsum(drawn_RB, axis=1)
    wanted_R = percentile / 100 * below_RB[:, -1]
    index_R = (below_RB < wanted_R[:, None]).sum(axis=1)
    return np.asarray(bin_edges()[used[index_R] + 1])


def percentile_limit(counts_B: Array, percentile: float) -> float:
    """The smallest upper edge of a bin below which so many per cent of the magnitudes lie."""
    return float(_percentiles(np.asarray(counts_B)[None], np.ones((1, 1), dtype=np.int64), percentile)[0])


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
    amax_TS = np.zeros((len(tensors), count))
    histogram_TSB = np.zeros((len(tensors), count, BINS), dtype=np.uint32)
    for s in range(count):
        feed = {name: np.asarray(array)[s : s + 1] for name, array in arrays.items()}
        seen = {**feed, **session.run_numpy(feed)}
        for t, name in enumerate(tensors):
            values = seen[name]
            amax_TS[t, s] = np.abs(values).max(initial=0.0)
            if not np.isfinite(amax_TS[t, s]):
                raise QuantizeError(_not_finite(name, producers, names[s], path))
            histogram_TSB[t, s] = magnitude_histogram(values)
    return Ranges(tensors=tuple(tensors), amax=amax_TS, histogram=histogram_TSB)


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
