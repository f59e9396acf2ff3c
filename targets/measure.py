"""Latency measured on this machine: warm-up until stationary, in turns, under arrivals, by several workers at once.

Whatever runs is a callable without arguments; what it runs on (ONNX Runtime, an engine) is the caller's business.
"""

from __future__ import annotations

import gc
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from fusepress.pipeline.errors import FusepressError, MeasureError
from fusepress.targets.host import HostPeak, host_description, host_profile_peak, usable_cores
from fusepress.targets.host_state import read_state, state_change
from fusepress.targets.latency import (
    FEWEST_RUNS,
    Array,
    LatencyMeasurement,
    Speedup,
    correlation_time,
    speedup_of,
    summarize,
)

__all__ = [
    "ArrivalMeasurement",
    "HostPeak",
    "InterleavedMeasurement",
    "LatencyMeasurement",
    "Speedup",
    "ThroughputMeasurement",
    "host_description",
    "host_profile_peak",
    "measure_arrivals",
    "measure_interleaved",
    "measure_latency",
    "measure_throughput",
    "speedup_of",
    "summarize",
    "usable_cores",
]

Run = Callable[[], object]
Clock = Callable[[], int]

WARMUP_BLOCK = 8
WARMUP_TOLERANCE = 0.03
OVERTIME = 5  # min_runs may stretch max_seconds by this
MAX_RUNS = 8000


@dataclass(frozen=True, slots=True, kw_only=True)
class InterleavedMeasurement:
    """Several callables measured in turns, so that drift and load hit all of them alike."""

    runs: Mapping[str, LatencyMeasurement]

    def speedup(self, base: str, new: str) -> Speedup:
        """Mean latency of `base` over that of `new`, with an interval in which what both met cancels.

        Raises:
            MeasureError: a name that was not measured.
        """
        for name in (base, new):
            if name not in self.runs:
                known = ", ".join(self.runs)
                raise MeasureError(f"expected a measured run, one of {known}; got {name!r}; use one of these")
        return speedup_of(self.runs[base].samples_ms, self.runs[new].samples_ms)


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
    description = host_description()
    with _quiet_garbage():
        warmups = {name: _warm_up(name, run, limit / len(runs), clock) for name, run in runs.items()}
        before = read_state()
        samples = _record(runs, min_runs, max_seconds, clock)
        after = read_state()
    # an inference's energy is the package's over all of them, so that it is told only where one callable is measured
    inferences = len(next(iter(samples.values()))) if len(runs) == 1 else 0
    environment = description | {"load_average_after": host_description()["load_average"]}
    environment |= state_change(before, after, runs=inferences)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivalMeasurement:
    """Latency when work arrives at a constant rate, from its arrival to its end: what waits for the one before counts.

    Attributes:
        rate_hz: arrivals a second.
        latency: with its intervals, as everywhere.
        deadline_ms: None where none was given.
        missed: part of the arrivals that ended after the deadline, with its 95 % interval (exact binomial over the
            independent ones).
        kept_up: the queue did not grow: work ended as fast as it came.
    """

    rate_hz: float
    latency: LatencyMeasurement
    deadline_ms: float | None
    missed: tuple[float, float, float] | None
    kept_up: bool


def measure_arrivals(
    run: Run,
    rate_hz: float,
    *,
    deadline_ms: float | None = None,
    max_seconds: float = 10.0,
    clock: Clock = time.perf_counter_ns,
    sleep: Callable[[float], None] = time.sleep,
) -> ArrivalMeasurement:
    """Measure under arrivals at a constant rate (MLPerf's ConstantStream), one after the other on one worker.

    Args:
        run: one inference.
        rate_hz: arrivals a second, such as a sensor's frame rate.
        deadline_ms: when an arrival's result is of no use any more.
        max_seconds: how long work arrives.
        clock: monotonic nanoseconds.
        sleep: waits for seconds.

    Raises:
        MeasureError: a rate or a deadline that is not positive, too few arrivals, or a callable that fails.
    """
    for name, value in (("rate_hz", rate_hz), ("deadline_ms", 1.0 if deadline_ms is None else deadline_ms)):
        if not (math.isfinite(value) and value > 0):
            raise MeasureError(f"expected {name} above 0; got {value}; raise it")
    count = int(rate_hz * max_seconds)
    if count < FEWEST_RUNS:
        raise MeasureError(
            f"expected at least {FEWEST_RUNS} arrivals; got {count} at {rate_hz:g} Hz within {max_seconds:g} s; "
            "measure longer"
        )
    with _quiet_garbage():
        warmup, settled = _warm_up("run", run, max_seconds / 4, clock)
        latencies = _serve(run, rate_hz, min(count, MAX_RUNS), clock, sleep)
    latency = summarize(latencies, warmup_runs=warmup, settled=settled, environment=host_description())
    late = None if deadline_ms is None else latencies > deadline_ms
    return ArrivalMeasurement(
        rate_hz=rate_hz,
        latency=latency,
        deadline_ms=deadline_ms,
        missed=None if late is None else _share(late.astype(np.float64), correlation_time(latencies)),
        kept_up=_kept_up(latencies, 1e3 / rate_hz),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputMeasurement:
    """Inferences of several workers at once, each beginning its next when one ends.

    Attributes:
        workers: how many.
        gaps: milliseconds between successive ends of inferences, of all workers together.
        latency: of one inference, while the other workers are at work.
    """

    workers: int
    gaps: LatencyMeasurement
    latency: LatencyMeasurement

    @property
    def per_second(self) -> tuple[float, float, float]:
        """Inferences a second of all workers together, with the ends of its 95 % interval."""
        return self.gaps.throughput_hz


def measure_throughput(
    runs: Sequence[Run], *, max_seconds: float = 10.0, clock: Clock = time.perf_counter_ns
) -> ThroughputMeasurement:
    """Measure how many inferences a second several workers finish together.

    Each callable has a thread of its own, so that it has to leave Python's lock while it works, as runtimes do.

    Args:
        runs: one callable a worker; two workers that share a session share its memory.
        max_seconds: how long, after a warm-up of each callable by itself.
        clock: monotonic nanoseconds.

    Raises:
        MeasureError: no callable, a bad limit, a callable that fails, or too few inferences.
    """
    names = [f"worker {index}" for index in range(len(runs))]
    _check_limits(dict(zip(names, runs, strict=True)), FEWEST_RUNS, max_seconds)
    with _quiet_garbage():
        warmups = [
            _warm_up(name, run, max_seconds / 4 / len(runs), clock) for name, run in zip(names, runs, strict=True)
        ]
        before = read_state()
        with ThreadPoolExecutor(len(runs)) as pool:
            until = clock() + int(max_seconds * 1e9)
            jobs = [pool.submit(_repeat, name, run, until, clock) for name, run in zip(names, runs, strict=True)]
            times = np.concatenate([job.result() for job in jobs])
        after = read_state()
    times = times[np.argsort(times[:, 1], kind="stable")]
    if len(times) <= FEWEST_RUNS:
        raise MeasureError(
            f"expected more than {FEWEST_RUNS} inferences within {max_seconds:g} s; got {len(times)}; measure longer"
        )
    settled = all(done for _, done in warmups)
    environment = host_description() | state_change(before, after)
    warmed = sum(count for count, _ in warmups)
    kept = times[-MAX_RUNS:]  # as many as the bootstrap can carry
    gaps, latencies = np.diff(kept[:, 1]), kept[:, 1] - kept[:, 0]
    return ThroughputMeasurement(
        workers=len(runs),
        gaps=summarize(gaps, warmup_runs=warmed, settled=settled, environment=environment),
        latency=summarize(latencies, warmup_runs=warmed, settled=settled, environment=environment),
    )


def _repeat(name: str, run: Run, until: int, clock: Clock) -> Array:
    """Begin and end of each inference in milliseconds [N, 2], until a moment has passed."""
    found = []
    while (begin := clock()) < until:
        milliseconds = _timed(name, run, clock)
        found.append((begin * 1e-6, begin * 1e-6 + milliseconds))
    return np.asarray(found, dtype=np.float64).reshape(-1, 2)


def _serve(run: Run, rate_hz: float, count: int, clock: Clock, sleep: Callable[[float], None]) -> Array:
    """Milliseconds from each arrival to its end [count]."""
    period_ns = 1e9 / rate_hz
    start = clock()
    latencies = np.empty(count)
    for index in range(count):
        arrival = start + index * period_ns
        wait = (arrival - clock()) * 1e-9
        if wait > 0:
            sleep(wait)
        while clock() < arrival:  # sleep may end early
            pass
        _timed("run", run, clock)
        latencies[index] = (clock() - arrival) * 1e-6
    return latencies


def _kept_up(latencies: Array, period_ms: float) -> bool:
    """Whether the last tenth waits no more than a period longer than the first tenth."""
    tenth = max(1, latencies.size // 10)
    return bool(np.median(latencies[-tenth:]) - np.median(latencies[:tenth]) <= period_ms)


def _share(late: Array, correlation: float) -> tuple[float, float, float]:
    """Part of ones and its exact binomial interval, over as many as are independent.

    Late ones may be few or none, which says nothing of how alike successive runs are: their latencies do.
    """
    from scipy.stats import beta

    share = float(late.mean())
    n = late.size / max(correlation, correlation_time(late), 1.0)
    hits = share * n
    low = float(beta.ppf(0.025, hits, n - hits + 1)) if hits > 0 else 0.0
    high = float(beta.ppf(0.975, hits + 1, n - hits)) if hits < n else 1.0
    return share, low, high
