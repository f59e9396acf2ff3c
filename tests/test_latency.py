"""Statistics of latencies: bounds that hold at their rate, tails only where enough runs bound them, equal or not."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from fusepress.pipeline.errors import MeasureError
from fusepress.targets.host_state import HostState, read_state, state_change
from fusepress.targets.latency import correlation_time, needed_runs, speedup_of, summarize
from fusepress.targets.measure import measure_arrivals
from tests.test_targets_measure import Turned, correlated


def autoregressive(random: np.random.Generator, n: int, rho: float) -> np.ndarray:
    noise = random.normal(size=n) * math.sqrt(1 - rho**2)
    values = np.empty(n)
    values[0] = random.normal()
    for index in range(1, n):
        values[index] = rho * values[index - 1] + noise[index]
    return values


@pytest.mark.parametrize(("level", "runs"), [(0.9, 29), (0.99, 299), (0.999, 2995)])
def test_a_tail_needs_so_many_runs_that_one_of_them_lies_beyond_it(level: float, runs: int) -> None:
    assert needed_runs(level) == runs
    assert level**runs <= 0.05 < level ** (runs - 1)


def test_upper_bounds_appear_when_their_runs_are_there() -> None:
    random = np.random.default_rng(0)
    for n, known in ((28, ()), (35, ("p90",)), (320, ("p90", "p99")), (3100, ("p90", "p99", "p999"))):
        found = summarize(random.permutation(np.linspace(1.0, 2.0, n)))
        bounds = {name: getattr(found, f"{name}_high_ms") for name in ("p90", "p99", "p999")}
        assert tuple(name for name, bound in bounds.items() if bound is not None) == known
        for name in known:
            assert getattr(found, f"{name}_low_ms") <= getattr(found, f"{name}_ms") <= bounds[name]


def test_slow_runs_in_clusters_count_as_few() -> None:
    random = np.random.default_rng(1)
    values = random.normal(10.0, 0.1, 2000)
    values[700:725] += 30.0  # 25 slow runs: the 1 % beyond p99 all at one time
    found = summarize(values)
    scattered = summarize(random.permutation(values))
    assert found.p99_high_ms is None
    assert scattered.p99_high_ms is not None


@given(st.lists(st.floats(0.01, 100), min_size=5, max_size=60), st.floats(0.01, 50))
@settings(max_examples=25, deadline=None)
def test_bounds_enclose_their_estimates_and_scale_with_the_unit(values: list[float], factor: float) -> None:
    one, other = summarize(values), summarize(np.asarray(values) * factor)
    assert one.mean_low_ms <= one.mean_ms * (1 + 1e-9)
    assert one.mean_ms <= one.mean_high_ms * (1 + 1e-9)
    np.testing.assert_allclose(other.mean_high_ms, one.mean_high_ms * factor, rtol=1e-6)
    np.testing.assert_allclose(other.p99_ms, one.p99_ms * factor, rtol=1e-6)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_correlation_time_is_that_of_the_process(rho: float) -> None:
    found = np.mean([correlation_time(autoregressive(np.random.default_rng(seed), 4000, rho)) for seed in range(10)])
    assert found == pytest.approx((1 + rho) / (1 - rho), rel=0.2)  # 1 + 2 rho / (1 - rho)


def test_a_series_of_steps_has_few_independent_runs() -> None:
    steps = np.repeat([1.0, 1.02, 0.99, 1.01], 500) + np.random.default_rng(0).normal(0, 0.002, 2000)
    assert summarize(steps).n_independent < 20


def test_alike_is_called_different_as_often_as_promised_and_a_true_difference_is_found() -> None:
    trials, found, detected = 150, 0, 0
    for seed in range(trials):
        random = np.random.default_rng(seed)
        load = 1 + 0.1 * autoregressive(random, 400, 0.9)  # hits both of a round
        base = 5.0 * load + 0.3 * autoregressive(random, 400, 0.3)
        new = 5.0 * load + 0.3 * autoregressive(random, 400, 0.3)
        found += speedup_of(base, new).differs
        detected += speedup_of(base * 1.03, new).differs
    assert binomtest(found, trials, 0.05).pvalue > 0.002
    assert detected >= 0.8 * trials


def test_a_speed_up_needs_rounds_of_both() -> None:
    with pytest.raises(MeasureError, match=r"expected the same number of runs of both, at least 5; got 6 and 5"):
        speedup_of([1.0] * 6, [1.0] * 5)
    point = speedup_of([2.0] * 8, [1.0] * 8)
    assert (point.value, point.low, point.high, point.differs) == (2.0, 2.0, 2.0, True)


def test_throughput_is_the_inverse_of_the_mean() -> None:
    found = summarize(correlated(np.random.default_rng(3), 300, 0.2))
    value, low, high = found.throughput_hz
    assert (value, low, high) == (1e3 / found.mean_ms, 1e3 / found.mean_high_ms, 1e3 / found.mean_low_ms)


class Worker(Turned):
    """A clock that waiting and work both turn."""

    def sleep(self, seconds: float) -> None:
        self.now += round(seconds * 1e9)


def test_arrivals_count_the_wait_for_the_one_before() -> None:
    clock = Worker()
    # 10 ms apart; every tenth takes 25 ms, so that the two behind it wait 15 and 8 ms
    work = [25.0 if index % 10 == 0 else 3.0 for index in range(100_000)]
    warm = clock.runner([3.0] * 1000)
    run = clock.runner(work)
    calls = {"n": 0}

    def once() -> None:
        calls["n"] += 1
        (warm if calls["n"] <= 16 else run)()

    found = measure_arrivals(once, 100.0, deadline_ms=12.0, max_seconds=2.0, clock=clock, sleep=clock.sleep)
    assert found.latency.warmup_runs == 16
    np.testing.assert_allclose(found.latency.samples_ms[:5], [25.0, 18.0, 11.0, 4.0, 3.0], atol=1e-3)
    assert found.missed is not None
    value, low, high = found.missed
    assert value == 0.2
    assert low < 0.2 < high
    assert found.kept_up


def test_no_late_arrival_says_less_where_successive_runs_are_alike() -> None:
    def upper(times: np.ndarray) -> float:
        clock = Worker()
        run = clock.runner([5.0] * 16 + list(times))
        found = measure_arrivals(run, 100.0, deadline_ms=9.9, max_seconds=4.0, clock=clock, sleep=clock.sleep)
        assert found.missed is not None
        assert found.missed[:2] == (0.0, 0.0)
        return found.missed[2]

    random = np.random.default_rng(0)
    # none of 400: 1 - 0.025^(1/400)
    assert upper(random.uniform(4.0, 6.0, 400)) == pytest.approx(0.00918, abs=2e-5)
    assert upper(5.0 + np.clip(autoregressive(random, 400, 0.95), -3.0, 3.0)) > 0.05


def test_work_that_comes_faster_than_it_ends_is_told() -> None:
    clock = Worker()
    found = measure_arrivals(clock.runner([11.0] * 9999), 100.0, max_seconds=3.0, clock=clock, sleep=clock.sleep)
    assert not found.kept_up
    assert found.missed is None
    assert found.latency.samples_ms[-1] == pytest.approx(11.0 + 299)  # a millisecond more with each


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rate_hz": 0.0}, r"expected rate_hz above 0; got 0\.0"),
        ({"rate_hz": 10.0, "deadline_ms": -1.0}, r"expected deadline_ms above 0; got -1\.0"),
        ({"rate_hz": 1.0, "max_seconds": 2.0}, r"expected at least 5 arrivals; got 2 at 1 Hz within 2 s"),
    ],
)
def test_arrivals_that_make_no_sense_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(MeasureError, match=message):
        measure_arrivals(lambda: None, **arguments)  # type: ignore[arg-type]  # numbers alone


def test_the_state_of_this_machine_is_told_as_far_as_it_tells() -> None:
    before = HostState(
        seconds=10.0, own_s=1.0, busy_s=100.0, mhz=2000.0, hottest_c=50.0, throttles=3, energy_uj=(900, 999)
    )
    after = HostState(
        seconds=20.0, own_s=9.0, busy_s=113.0, mhz=1500.0, hottest_c=80.0, throttles=5, energy_uj=(400, 999)
    )
    found = state_change(before, after, runs=5)
    assert found["cores_busy_with_others"] == 0.5  # 13 s of work, 8 of them ours, in 10 s
    assert found["mhz_before_after"] == [2000.0, 1500.0]
    assert (found["hottest_c"], found["throttle_events"]) == (80.0, 2)
    assert found["package_energy_mj"] == 0.1  # 500 uJ over the end of the counter, 5 runs
    silent = HostState(seconds=1.0, own_s=0.0)
    assert set(state_change(silent, silent)) <= {"peak_memory_mib"}
    assert read_state().own_s > 0
