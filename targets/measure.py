"""Latency measured on this machine: warm-up until stationary, intervals that respect correlation, the environment.

Whatever runs is a callable without arguments; what it runs on (ONNX Runtime, an engine) is the caller's business.
"""

from __future__ import annotations

import gc
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fusepress.pipeline.errors import FusepressError, MeasureError
from fusepress.targets.host import HostPeak, host_description, host_profile_peak, usable_cores

__all__ = [
    "HostPeak",
    "InterleavedMeasurement",
    "LatencyMeasurement",
    "Speedup",
    "host_description",
    "host_profile_peak",
    "measure_interleaved",
    "measure_latency",
    "summarize",
    "usable_cores",
]

Array = npt.NDArray[np.float64]
Run = Callable[[], object]
Clock = Callable[[], int]

REPLICATES = 1000
WARMUP_BLOCK = 8
WARMUP_TOLERANCE = 0.03
STABLE_COV = 0.10
STABLE_DRIFT = 0.05
FEWEST_RUNS = 5
OVERTIME = 5  # min_runs may stretch max_seconds by this
MAX_RUNS = 5000
P99_SAMPLES = 299  # 0.99^299 < 5 %: fewer independent runs may all lie below the 99th percentile


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyMeasurement:
    """Latency of one callable, milliseconds, with 95 % intervals.

    Attributes:
        p99_high_ms: None where too few independent runs bound it (fewer than 299).
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
    p99_ms: float
    p99_low_ms: float
    p99_high_ms: float | None
    n: int
    n_independent: float
    cov: float
    drift: float
    stable: bool
    warmup_runs: int
    environment: Mapping[str, Any]
    samples_ms: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Speedup:
    """How many times faster, from means over the same rounds, with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class InterleavedMeasurement:
    """Several callables measured in turns, so that drift and load hit all of them alike."""

    runs: Mapping[str, LatencyMeasurement]

    def speedup(self, base: str, new: str) -> Speedup:
        """Mean latency of `base` over that of `new`; blocks of rounds are resampled for both together.

        Raises:
            MeasureError: a name that was not measured.
        """
        for name in (base, new):
            if name not in self.runs:
                known = ", ".join(self.runs)
                raise MeasureError(f"expected a measured run, one of {known}; got {name!r}; use one of these")
        pair = np.stack([self.runs[base].samples_ms, self.runs[new].samples_ms])
        block = max(_block_length(row) for row in pair)
        means = np.concatenate([pair[:, index].mean(axis=-1) for index in _resamples(pair.shape[1], block)], axis=1)
        low, high = np.quantile(means[0] / means[1], [0.025, 0.975])
        value = float(pair[0].mean() / pair[1].mean())
        return Speedup(value=value, low=float(low), high=float(high))


def measure_latency(
    run: Run,
    *,
    min_runs: int = 50,
    max_seconds: float = 10.0,
    max_warmup_seconds: float | None = None,
    clock: Clock = time.perf_counter_ns,
) -> LatencyMeasurement:
    """Measure the latency of a callable.

    Runs it unrecorded until the medians of successive blocks agree, then records it for `max_seconds`, or longer (at
    most five times that) until there are `min_runs`.

    Args:
        run: one inference; its result is dropped.
        min_runs: recorded runs to have.
        max_seconds: how long to record.
        max_warmup_seconds: when to stop waiting for a stationary latency; a quarter of `max_seconds` when None.
        clock: monotonic nanoseconds.

    Raises:
        MeasureError: the callable fails, or is too slow for five runs in five times `max_seconds`.
    """
    result = measure_interleaved(
        {"run": run}, min_runs=min_runs, max_seconds=max_seconds, max_warmup_seconds=max_warmup_seconds, clock=clock
    )
    return result.runs["run"]


def measure_interleaved(
    runs: Mapping[str, Run],
    *,
    min_runs: int = 50,
    max_seconds: float = 10.0,
    max_warmup_seconds: float | None = None,
    clock: Clock = time.perf_counter_ns,
) -> InterleavedMeasurement:
    """Measure several callables in turns; the order rotates from round to round.

    `max_seconds` is for all of them together; every callable is run equally often.

    Raises:
        MeasureError: nothing to run, a bad limit, a callable that fails or is too slow.
    """
    _check_limits(runs, min_runs, max_seconds)
    limit = max_seconds / 4 if max_warmup_seconds is None else max_warmup_seconds
    before = host_description()
    with _quiet_garbage():
        warmups = {name: _warm_up(name, run, limit / len(runs), clock) for name, run in runs.items()}
        samples = _record(runs, min_runs, max_seconds, clock)
    environment = before | {"load_average_after": host_description()["load_average"]}
    measured = {
        name: summarize(samples[name], warmup_runs=warmups[name][0], settled=warmups[name][1], environment=environment)
        for name in runs
    }
    return InterleavedMeasurement(runs=measured)


def _check_limits(runs: Mapping[str, Run], min_runs: int, max_seconds: float) -> None:
    if not runs:
        raise MeasureError("expected at least one callable to measure; got none; name what to run")
    if min_runs < FEWEST_RUNS:
        raise MeasureError(f"expected min_runs of at least {FEWEST_RUNS}; got {min_runs}; raise it")
    if not (math.isfinite(max_seconds) and max_seconds > 0):
        raise MeasureError(f"expected max_seconds above 0; got {max_seconds}; raise it")


@contextmanager
def _quiet_garbage() -> Iterator[None]:
    """No garbage collection inside a timed run."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _timed(name: str, run: Run, clock: Clock) -> float:
    start = clock()
    try:
        run()
    except FusepressError:
        raise
    except Exception as error:  # whatever the runtime raises
        raise MeasureError(
            f"expected {name!r} to run; got {type(error).__name__}: {error}; run it once by hand and correct its inputs"
        ) from error
    return (clock() - start) * 1e-6


def _warm_up(name: str, run: Run, limit_seconds: float, clock: Clock) -> tuple[int, bool]:
    """Run until two successive blocks have medians within 3 %; the count, and whether that happened."""
    start, count = clock(), 0
    recent: deque[float] = deque(maxlen=2 * WARMUP_BLOCK)
    while True:
        recent.append(_timed(name, run, clock))
        count += 1
        if len(recent) == recent.maxlen and count % WARMUP_BLOCK == 0:
            values = np.asarray(recent)
            old, new = np.median(values[:WARMUP_BLOCK]), np.median(values[WARMUP_BLOCK:])
            if abs(new - old) <= WARMUP_TOLERANCE * max(old, new):
                return count, True
        if (clock() - start) * 1e-9 >= limit_seconds:
            return count, False


def _record(runs: Mapping[str, Run], min_runs: int, max_seconds: float, clock: Clock) -> dict[str, Array]:
    names = list(runs)
    samples: dict[str, list[float]] = {name: [] for name in names}
    start, rounds = clock(), 0
    while rounds < MAX_RUNS:
        for turn in range(len(names)):
            name = names[(rounds + turn) % len(names)]
            samples[name].append(_timed(name, runs[name], clock))
        rounds += 1
        seconds = (clock() - start) * 1e-9
        if seconds >= max_seconds and (rounds >= min_runs or seconds >= OVERTIME * max_seconds):
            break
    if rounds < FEWEST_RUNS:
        raise MeasureError(
            f"expected at least {FEWEST_RUNS} runs within {OVERTIME * max_seconds:g} s; got {rounds}; raise max_seconds"
        )
    return {name: np.asarray(values) for name, values in samples.items()}


def summarize(
    samples_ms: npt.ArrayLike,
    *,
    warmup_runs: int = 0,
    settled: bool = True,
    environment: Mapping[str, Any] | None = None,
) -> LatencyMeasurement:
    """Statistics of recorded runs in their order.

    Intervals are quantiles of a circular block bootstrap (1,000 resamples, fixed seed), with blocks as long as runs
    stay correlated. A bootstrap never looks above the largest run, so the upper bound of p99 is also at least the order
    statistic that a binomial count of independent runs gives, and absent below 299 of them.

    Raises:
        MeasureError: fewer than five runs, or a time that is not finite and positive.
    """
    samples = np.asarray(samples_ms, dtype=np.float64)
    if samples.ndim != 1 or samples.size < FEWEST_RUNS:
        raise MeasureError(f"expected at least {FEWEST_RUNS} runs; got {samples.size}; measure longer")
    if not np.all(np.isfinite(samples)) or np.any(samples < 0) or samples.mean() <= 0:
        raise MeasureError(f"expected finite, positive times; got {samples.min()} to {samples.max()} ms; measure again")
    independent = samples.size / _correlation_time(samples)
    means, medians, tails = _bootstrap(samples)
    half = samples.size // 2
    first, second = np.median(samples[:half]), np.median(samples[half:])
    drift = float(abs(second - first) / max(first, second, 1e-12))
    cov = float(samples.std(ddof=1) / samples.mean())
    return LatencyMeasurement(
        mean_ms=float(samples.mean()),
        mean_low_ms=float(np.quantile(means, 0.025)),
        mean_high_ms=float(np.quantile(means, 0.975)),
        p50_ms=float(np.median(samples)),
        p50_low_ms=float(np.quantile(medians, 0.025)),
        p50_high_ms=float(np.quantile(medians, 0.975)),
        p99_ms=float(np.quantile(samples, 0.99)),
        p99_low_ms=float(np.quantile(tails, 0.025)),
        p99_high_ms=_p99_upper(samples, tails, independent),
        n=int(samples.size),
        n_independent=float(independent),
        cov=cov,
        drift=drift,
        stable=settled and cov <= STABLE_COV and drift <= STABLE_DRIFT,
        warmup_runs=warmup_runs,
        environment=dict(environment or {}),
        samples_ms=tuple(map(float, samples)),
    )


def _correlation_time(samples: Array) -> float:
    """How many runs carry the information of one: 1 + 2 x the autocorrelations up to the first that is not positive."""
    centred = samples - samples.mean()
    power = float(centred @ centred)
    if power <= 0:
        return 1.0
    total = 1.0
    for lag in range(1, min(len(samples) // 4, 200) + 1):
        rho = float(centred[:-lag] @ centred[lag:]) / power
        if rho <= 2 / math.sqrt(len(samples)):  # not told from noise
            break
        total += 2 * rho
    return total


def _block_length(samples: Array) -> int:
    """Long enough to carry the correlation, short enough to leave many blocks."""
    n = len(samples)
    wanted = max(n ** (1 / 3), 2 * _correlation_time(samples))
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


def _bootstrap(samples: Array) -> tuple[Array, Array, Array]:
    """Replicates of mean, median and 99th percentile."""
    parts: list[tuple[Array, Array, Array]] = []
    for index in _resamples(samples.size, _block_length(samples)):
        drawn = samples[index]
        middle, tail = np.quantile(drawn, [0.5, 0.99], axis=1)
        parts.append((drawn.mean(axis=1), middle, tail))
    means, medians, tails = (np.concatenate(column) for column in zip(*parts, strict=True))
    return means, medians, tails


def _p99_upper(samples: Array, tails: Array, independent: float) -> float | None:
    """Upper 95 % bound of the 99th percentile, None where so few independent runs give none."""
    from scipy.stats import binom

    if independent < P99_SAMPLES:
        return None
    count = int(independent)
    # the smallest rank with P(at least that many runs below the percentile) <= 5 %
    rank = int(binom.ppf(0.95, count, 0.99)) + 1
    share = min(rank, count) / count
    by_order = float(np.quantile(samples, share, method="higher"))
    return max(by_order, float(np.quantile(tails, 0.975)))
