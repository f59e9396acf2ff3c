"""Statistics of latencies: intervals that respect that successive runs are alike, tails only where they are known.

Bounds come from a circular block bootstrap (1,000 resamples, fixed seed). Few blocks make percentiles too narrow, so
that they are taken at the level that Student's t gives for the number of blocks (Hesterberg 2015, "What Teachers Should
Know About the Bootstrap", section 5). A resample never looks above the largest run: the upper bound of a tail is also
at least the order statistic that a binomial count of independent runs gives, and absent where they are too few.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fusepress.pipeline.errors import MeasureError

Array = npt.NDArray[np.float64]

REPLICATES = 1000
CONFIDENCE = 0.95
STABLE_COV = 0.10
STABLE_DRIFT = 0.05
FEWEST_RUNS = 5
THROUGHPUT = "throughput_hz"  # name of a measurement
LONGEST_LAG = 4  # of a series, the part over which its correlation is looked for


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyMeasurement:
    """Latency of one callable, milliseconds, with 95 % intervals.

    Attributes:
        p90_high_ms, p99_high_ms, p999_high_ms: None where too few independent runs bound them (29, 299 and 2,995).
        n: timed runs; `n_independent` of them after discounting their correlation.
        cov: standard deviation over mean.
        stable: the warm-up settled, `cov` is at most 10 % and the halves' medians differ by at most 5 %.
        environment: what else the numbers depend on.
        samples_ms: every run in order.
    """

    mean_ms: float
    mean_low_ms: float
    mean_high_ms: float
    p50_ms: float
    p50_low_ms: float
    p50_high_ms: float
    p90_ms: float
    p90_low_ms: float
    p90_high_ms: float | None
    p99_ms: float
    p99_low_ms: float
    p99_high_ms: float | None
    p999_ms: float
    p999_low_ms: float
    p999_high_ms: float | None
    n: int
    n_independent: float
    cov: float
    drift: float
    stable: bool
    warmup_runs: int
    environment: Mapping[str, Any]
    samples_ms: tuple[float, ...]

    @property
    def throughput_hz(self) -> tuple[float, float, float]:
        """Runs a second when one follows the other, with the ends of its interval."""
        return 1e3 / self.mean_ms, 1e3 / self.mean_high_ms, 1e3 / self.mean_low_ms

    @property
    def why_unstable(self) -> str:
        """What makes these numbers doubtful, empty where nothing does."""
        if self.stable:
            return ""
        why = []
        if self.cov > STABLE_COV:
            why.append(f"coefficient of variation {100 * self.cov:.1f} %")
        if self.drift > STABLE_DRIFT:
            why.append(f"its halves differ by {100 * self.drift:.1f} %")
        return " and ".join(why) or "the warm-up did not settle"


@dataclass(frozen=True, slots=True, kw_only=True)
class Speedup:
    """How many times faster, from runs in turns, with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def differs(self) -> bool:
        """Whether the interval excludes that both are alike."""
        return self.low > 1 or self.high < 1


def summarize(
    samples_ms: npt.ArrayLike,
    *,
    warmup_runs: int = 0,
    settled: bool = True,
    environment: Mapping[str, Any] | None = None,
) -> LatencyMeasurement:
    """Statistics of recorded runs in their order.

    Raises:
        MeasureError: fewer than five runs, or a time that is not finite and positive.
    """
    samples = np.asarray(samples_ms, dtype=np.float64)
    if samples.ndim != 1 or samples.size < FEWEST_RUNS:
        raise MeasureError(f"expected at least {FEWEST_RUNS} runs; got {samples.size}; measure longer")
    if not np.all(np.isfinite(samples)) or np.any(samples < 0) or samples.mean() <= 0:
        raise MeasureError(f"expected finite, positive times; got {samples.min()} to {samples.max()} ms; measure again")
    correlation = correlation_time(samples)
    block = block_length(samples.size, correlation)
    levels = (0.5, 0.9, 0.99, 0.999)
    replicates = _bootstrap(samples, block, levels)
    ends = [_ends(column, samples.size / block) for column in replicates.T]
    values = np.quantile(samples, levels)
    uppers = [_tail_upper(samples, level, correlation, ends[1 + i][1]) for i, level in enumerate(levels)]
    half = samples.size // 2
    first, second = np.median(samples[:half]), np.median(samples[half:])
    drift = float(abs(second - first) / max(first, second, 1e-12))
    cov = float(samples.std(ddof=1) / samples.mean())
    return LatencyMeasurement(
        mean_ms=float(samples.mean()),
        mean_low_ms=ends[0][0],
        mean_high_ms=ends[0][1],
        p50_ms=float(values[0]),
        p50_low_ms=ends[1][0],
        p50_high_ms=ends[1][1],
        p90_ms=float(values[1]),
        p90_low_ms=ends[2][0],
        p90_high_ms=uppers[1],
        p99_ms=float(values[2]),
        p99_low_ms=ends[3][0],
        p99_high_ms=uppers[2],
        p999_ms=float(values[3]),
        p999_low_ms=ends[4][0],
        p999_high_ms=uppers[3],
        n=int(samples.size),
        n_independent=samples.size / correlation,
        cov=cov,
        drift=drift,
        stable=settled and cov <= STABLE_COV and drift <= STABLE_DRIFT,
        warmup_runs=warmup_runs,
        environment=dict(environment or {}),
        samples_ms=tuple(map(float, samples)),
    )


def speedup_of(base_ms: npt.ArrayLike, new_ms: npt.ArrayLike) -> Speedup:
    """Mean latency of the first over that of the second, from rounds [N] in which both were run.

    What a round has in common, such as load and clocks, cancels: blocks of rounds are resampled for both together, as
    long as the difference stays correlated.

    Raises:
        MeasureError: fewer than five rounds, or not the same number of both.
    """
    base, new = np.asarray(base_ms, dtype=np.float64), np.asarray(new_ms, dtype=np.float64)
    if base.ndim != 1 or base.shape != new.shape or base.size < FEWEST_RUNS:
        raise MeasureError(
            f"expected the same number of runs of both, at least {FEWEST_RUNS}; got {base.size} and {new.size}; "
            "measure them in turns"
        )
    value = float(base.mean() / new.mean())
    # where the ratio's estimate comes from, by round: the mean of these is zero
    residual = base / base.mean() - new / new.mean()
    block = block_length(base.size, correlation_time(residual))
    pair = np.stack([base, new])
    means = np.concatenate([pair[:, index].mean(axis=-1) for index in _resamples(base.size, block)], axis=1)
    low, high = _ends(means[0] / means[1], base.size / block)
    return Speedup(value=value, low=min(low, value), high=max(high, value))


def needed_runs(level: float) -> int:
    """Independent runs below which all may lie under a quantile with a probability of 5 %: 299 for p99."""
    return math.ceil(math.log(1 - CONFIDENCE) / math.log(level))


def correlation_time(samples: Array) -> float:
    """How many runs carry the information of one: 1 + 2 x the autocorrelations up to the first told from no noise."""
    centred = samples - samples.mean()
    n = len(samples)
    power = float(centred @ centred)
    if power <= 1e-24 * float(samples @ samples):  # constant but for rounding
        return 1.0
    spectrum = np.fft.rfft(centred, 2 * n)
    rho = np.fft.irfft(spectrum * spectrum.conj(), 2 * n)[1 : n // LONGEST_LAG + 1] / power
    noise = rho <= 2 / math.sqrt(n)
    last = int(np.argmax(noise)) if noise.any() else len(rho)
    return float(1 + 2 * rho[:last].sum())


def block_length(n: int, correlation: float) -> int:
    """Long enough to carry the correlation, short enough to leave many blocks."""
    wanted = max(n ** (1 / 3), 2 * correlation)
    return int(min(max(1, math.ceil(wanted)), max(1, n // 4)))


def _resamples(n: int, block: int) -> Iterator[npt.NDArray[np.intp]]:
    """Index arrays [replicates of the chunk, n] of circular block resamples, 1,000 in all."""
    random = np.random.default_rng(0)
    blocks = -(-n // block)
    chunk = max(1, min(REPLICATES, 2_000_000 // n))
    for first in range(0, REPLICATES, chunk):
        count = min(chunk, REPLICATES - first)
        starts = random.integers(0, n, size=(count, blocks, 1))
        yield ((starts + np.arange(block)) % n).reshape(count, -1)[:, :n]


def _bootstrap(samples: Array, block: int, levels: tuple[float, ...]) -> Array:
    """Replicates [1,000, 1 + levels] of the mean and of quantiles."""
    parts = []
    for index in _resamples(samples.size, block):
        drawn = samples[index]
        parts.append(np.column_stack([drawn.mean(axis=1), *np.quantile(drawn, levels, axis=1)]))
    return np.concatenate(parts)


def _ends(replicates: Array, blocks: float) -> tuple[float, float]:
    """Ends of the 95 % interval, at the level that the number of blocks allows."""
    from scipy.stats import norm, t

    count = max(blocks, 2.0)
    reach = float(t.ppf(0.5 + CONFIDENCE / 2, count - 1)) * math.sqrt(count / (count - 1))
    tail = float(norm.cdf(-reach))
    low, high = np.quantile(replicates, [tail, 1 - tail])
    return float(low), float(high)


def _tail_upper(samples: Array, level: float, correlation: float, by_bootstrap: float) -> float | None:
    """Upper 95 % bound of a quantile, None where so few independent runs give none.

    Slow runs come in clusters even where most runs look independent, so that the runs beyond the quantile count with
    their own correlation.
    """
    from scipy.stats import binom

    beyond = (samples > np.quantile(samples, level)).astype(np.float64)
    count = int(samples.size / max(correlation, correlation_time(beyond)))
    if count < needed_runs(level):
        return None
    # the smallest rank with P(at least that many runs below the quantile) <= 5 %
    rank = int(binom.ppf(CONFIDENCE, count, level)) + 1
    share = min(rank, count) / count
    by_order = float(np.quantile(samples, share, method="higher"))
    return max(by_order, by_bootstrap)
