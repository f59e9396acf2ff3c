"""Measured latency: statistics on sequences with a known distribution, a clock that we turn, and real runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pytest

from fusepress.pipeline.errors import MeasureError, TaskError
from fusepress.targets.host import usable_cores, with_host
from fusepress.targets.measure import (
    host_description,
    host_profile_peak,
    measure_interleaved,
    measure_latency,
    measure_throughput,
    summarize,
)
from fusepress.targets.profile import load_profile


class Turned:
    """A clock that only runs when something that takes time is run."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now

    def runner(self, milliseconds: Iterable[float]) -> Callable[[], None]:
        times: Iterator[float] = iter(milliseconds)

        def run() -> None:
            self.now += int(next(times) * 1e6)

        return run


def correlated(random: np.random.Generator, n: int, rho: float) -> np.ndarray:
    noise = random.normal(size=n) * np.sqrt(1 - rho**2)
    values = np.empty(n)
    values[0] = random.normal()
    for index in range(1, n):
        values[index] = rho * values[index - 1] + noise[index]
    return 10 + values


def test_workers_finish_as_much_as_their_clock_allows() -> None:
    """Two that sleep for 20 ms finish about 100 a second together at most, and each run takes at least 20 ms."""
    found = measure_throughput([lambda: time.sleep(0.02)] * 2, max_seconds=1.0)
    value, low, high = found.per_second
    assert found.workers == 2
    assert 0 < low <= value <= high
    assert (
        value <= 126
    )  # six ends of two workers take at least two sleeps more; fewer a second where the machine is busy
    assert found.latency.mean_ms >= 20
    assert found.latency.n == found.gaps.n + 1


def test_throughput_of_one_worker_is_that_of_runs_one_after_the_other() -> None:
    clock = Turned()
    run = clock.runner([2.0, 4.0] * 2000)
    found = measure_throughput([run], max_seconds=3.0, clock=clock)
    assert found.latency.mean_ms == pytest.approx(3.0, rel=1e-3)
    assert found.per_second[0] == pytest.approx(1000 / 3, rel=1e-3)


def test_throughput_that_cannot_be_measured_is_refused() -> None:
    clock = Turned()
    with pytest.raises(MeasureError, match=r"expected at least one callable to measure; got none"):
        measure_throughput([])
    with pytest.raises(MeasureError, match=r"expected more than 5 inferences within 1 s; got 2; measure longer"):
        measure_throughput([clock.runner([600.0] * 50)], max_seconds=1.0, clock=clock)

    def fails() -> None:
        raise ValueError("no")

    with pytest.raises(MeasureError, match=r"expected 'worker 0' to run; got ValueError: no"):
        measure_throughput([fails], max_seconds=0.1)


def coverage(draw: Callable[[np.random.Generator], np.ndarray], truth: float, name: str, times: int = 120) -> float:
    hits = 0
    for seed in range(times):
        result = summarize(draw(np.random.default_rng(seed)))
        hits += getattr(result, f"{name}_low_ms") <= truth <= getattr(result, f"{name}_high_ms")
    return hits / times


def test_intervals_of_mean_and_median_hold_the_truth_on_independent_runs() -> None:
    # 120 intervals of 95 %: fewer than 0.87 has a probability below 0.0005
    assert coverage(lambda r: r.lognormal(1.0, 0.2, 200), float(np.exp(1.02)), "mean") >= 0.87
    assert coverage(lambda r: r.lognormal(1.0, 0.2, 200), float(np.exp(1.0)), "p50") >= 0.87


def test_blocks_widen_the_interval_where_runs_are_correlated() -> None:
    held = coverage(lambda r: correlated(r, 300, 0.8), 10.0, "mean")
    assert held >= 0.78  # too short for blocks to be exact
    sample = correlated(np.random.default_rng(1), 300, 0.8)
    result = summarize(sample)
    shuffled = summarize(np.random.default_rng(2).permutation(sample))
    assert result.mean_high_ms - result.mean_low_ms > 1.7 * (shuffled.mean_high_ms - shuffled.mean_low_ms)
    assert result.n_independent < 100 < shuffled.n_independent


def test_p99_has_no_upper_bound_below_299_independent_runs() -> None:
    random = np.random.default_rng(0)
    assert summarize(random.exponential(1.0, 298) + 1).p99_high_ms is None
    enough = summarize(random.exponential(1.0, 320) + 1)
    assert enough.n_independent >= 299
    assert enough.p99_high_ms is not None
    assert enough.p99_high_ms >= enough.p99_ms >= enough.p99_low_ms
    assert summarize(correlated(random, 600, 0.8)).p99_high_ms is None


def test_upper_bound_of_p99_holds_the_truth_in_95_of_100() -> None:
    truth = 1 - np.log(0.01)
    results = [summarize(np.random.default_rng(seed).exponential(1.0, 400) + 1) for seed in range(150)]
    bounds = [result.p99_high_ms for result in results if result.p99_high_ms is not None]
    assert len(bounds) >= 135  # by chance a few look correlated, and then no bound is given
    held = sum(bound >= truth for bound in bounds)
    assert held / len(bounds) >= 0.88  # 0.95 in the long run; below 0.88 has a probability under 0.002


def test_constant_runs_give_a_point() -> None:
    result = summarize([2.0] * 400)
    assert (result.mean_ms, result.mean_low_ms, result.mean_high_ms) == (2.0, 2.0, 2.0)
    assert (result.p50_ms, result.p99_high_ms, result.cov, result.drift) == (2.0, 2.0, 0.0, 0.0)
    assert result.stable


@pytest.mark.parametrize(
    ("samples", "stable"),
    [
        (np.full(100, 3.0) + np.random.default_rng(0).normal(0, 0.1, 100), True),
        (np.full(100, 3.0) + np.random.default_rng(0).normal(0, 0.6, 100), False),
        (np.linspace(3.0, 3.4, 100), False),
    ],
    ids=["quiet", "noisy", "drifting"],
)
def test_stable_means_little_scatter_and_no_drift(samples: np.ndarray, stable: bool) -> None:
    assert summarize(samples).stable is stable


def test_statistics_are_the_same_each_time() -> None:
    sample = np.random.default_rng(3).gamma(2.0, 1.0, 100)
    assert summarize(sample) == summarize(sample)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([1.0, 2.0], r"expected at least 5 runs; got 2; measure longer"),
        ([1.0, 2.0, float("nan"), 1.0, 1.0], r"expected finite, positive times; got nan"),
        ([1.0, -2.0, 1.0, 1.0, 1.0], r"expected finite, positive times; got -2\.0"),
    ],
)
def test_samples_that_cannot_be_times_are_refused(samples: list[float], message: str) -> None:
    with pytest.raises(MeasureError, match=message):
        summarize(samples)


def test_warm_up_is_not_recorded_and_ends_when_the_latency_settles() -> None:
    clock = Turned()
    warm = [20.0 * 0.8**i + 2.0 for i in range(40)]
    result = measure_latency(
        clock.runner([*warm, *[2.0] * 10_000]), min_runs=50, max_seconds=1.0, max_warmup_seconds=5.0, clock=clock
    )
    assert 24 <= result.warmup_runs <= 48
    assert result.p50_ms == pytest.approx(2.0)
    assert result.stable
    assert result.n == 500


def test_a_latency_that_never_settles_is_not_stable() -> None:
    clock = Turned()
    growing = (1.0 * 1.01**i for i in range(100_000))
    result = measure_latency(clock.runner(growing), max_seconds=1.0, clock=clock)
    assert not result.stable
    assert result.drift > 0.05


def test_slow_runs_stretch_the_time_but_not_beyond_five_times() -> None:
    clock = Turned()
    result = measure_latency(clock.runner([100.0] * 1000), min_runs=20, max_seconds=1.0, clock=clock)
    assert result.n == 20
    slower = measure_latency(clock.runner([500.0] * 1000), min_runs=50, max_seconds=1.0, clock=clock)
    assert slower.n == 10
    with pytest.raises(MeasureError, match=r"expected at least 5 runs within 5 s; got 3; raise max_seconds"):
        measure_latency(clock.runner([2000.0] * 1000), max_seconds=1.0, clock=clock)


def test_a_failing_callable_is_named_with_its_error() -> None:
    def broken() -> None:
        raise ValueError("wrong shape")

    with pytest.raises(
        MeasureError, match=r"expected 'engine' to run; got ValueError: wrong shape; run it once by hand"
    ):
        measure_interleaved({"engine": broken})

    def told() -> None:
        raise TaskError("our own words")

    with pytest.raises(TaskError, match="our own words"):
        measure_latency(told)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_runs": 2}, r"expected min_runs of at least 5; got 2"),
        ({"max_seconds": 0.0}, r"expected max_seconds above 0; got 0\.0"),
        ({"max_seconds": float("inf")}, r"expected max_seconds above 0; got inf"),
    ],
)
def test_limits_that_make_no_sense_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(MeasureError, match=message):
        measure_latency(lambda: None, **arguments)  # type: ignore[arg-type]  # the table mixes int and float
    with pytest.raises(MeasureError, match=r"expected at least one callable to measure"):
        measure_interleaved({})


def test_turns_rotate_and_shared_drift_cancels_in_the_speed_up() -> None:
    clock = Turned()
    random = np.random.default_rng(5)
    order: list[str] = []

    def run(name: str, milliseconds: float) -> Callable[[], None]:
        def once() -> None:
            order.append(name)
            load = 1 + 0.5 * np.sin(clock.now / 3e9)
            clock.now += int(milliseconds * 1e6 * load * random.lognormal(0, 0.02))

        return once

    result = measure_interleaved({"dense": run("dense", 8.0), "small": run("small", 4.0)}, max_seconds=6.0, clock=clock)
    speedup = result.speedup("dense", "small")
    assert speedup.low < 2.0 < speedup.high
    assert speedup.high - speedup.low < 0.1
    assert not result.runs["dense"].stable
    assert result.runs["dense"].n == result.runs["small"].n
    recorded = order[-4 * (result.runs["dense"].n // 2) :]
    assert recorded[:4] in (["dense", "small", "small", "dense"], ["small", "dense", "dense", "small"])
    back = result.speedup("small", "dense")
    assert back.value == pytest.approx(1 / speedup.value)
    with pytest.raises(MeasureError, match=r"expected a measured run, one of dense, small; got 'tiny'"):
        result.speedup("dense", "tiny")


def test_a_real_callable_is_measured_with_its_environment() -> None:
    left = np.random.default_rng(0).normal(size=(64, 64))
    result = measure_latency(lambda: left @ left, min_runs=50, max_seconds=0.05)
    assert result.n >= 50
    assert 0 < result.mean_low_ms <= result.mean_ms <= result.mean_high_ms
    assert {"cpu", "cores", "governor", "load_average", "load_average_after", "threads"} <= set(result.environment)


def test_the_host_says_what_it_is_but_not_its_name() -> None:
    import socket

    description = host_description()
    assert description["cores"] == usable_cores() >= 1
    assert socket.gethostname() not in str(description)
    peak = host_profile_peak()
    assert peak.fp32_gflops == pytest.approx(peak.cores * peak.mhz * peak.fp32_ops_per_clock / 1e3)
    profile = with_host(load_profile("host-cpu"), peak)
    assert profile.peak_tops("fp32") * 1e3 == pytest.approx(peak.fp32_gflops)
    assert profile.peak_tops("int8") == pytest.approx(2 * profile.peak_tops("fp32"))
