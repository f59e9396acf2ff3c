"""How often two latencies that are alike are called different, and how often a true difference of 3 % is found.

    python benchmarks/comparing_latencies.py [--trials 200] [--host-trials 40] [--host-seconds 1.5]

Two callables are run in turns and compared by `targets/latency.py::speedup_of`: different means that the 95 % interval
of the ratio of their means excludes 1. Both rates come with their exact binomial interval (Clopper and Pearson).

Simulated: series of as many rounds as the default 10 s allow at 5 ms a run, with load that both meet (an autoregressive
process of order one, its coefficient in the table), scatter of each run's own (5 %), and slow runs (1 % of them take
three times as long). Real: on this host, matrix products in turns, the slower one with 3 % more of them, on a budget of
`--host-seconds` for both: far less than the default, so that its power is a lower bound. What else the machine did is
written beside it.

Writes benchmarks/results/comparing_latencies.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import scipy.signal
from scipy.stats import binomtest

from fusepress.pipeline.store import atomic_write_text
from fusepress.targets.latency import speedup_of
from fusepress.targets.measure import measure_interleaved

RESULTS = Path(__file__).resolve().parent / "results" / "comparing_latencies.json"
DIFFERENCE = 1.03
DEFAULT_SECONDS, RUN_MS = 10.0, 5.0
ROUNDS = int(DEFAULT_SECONDS * 1e3 / (2 * RUN_MS))
OWN_SCATTER, SLOW_SHARE, SLOW_FACTOR = 0.05, 0.01, 3.0
LOADS = ((0.0, 0.0), (0.1, 0.5), (0.1, 0.9), (0.1, 0.99), (0.3, 0.9))  # scatter of the load, its coefficient
PRODUCTS = 200  # 3 % more are 206


def rate(hits: int, trials: int) -> dict[str, Any]:
    """A share with its exact 95 % interval."""
    bounds = binomtest(hits, trials).proportion_ci(method="exact")
    return {"hits": hits, "trials": trials, "rate": hits / trials, "low": bounds.low, "high": bounds.high}


def load_of(random: np.random.Generator, scatter: float, coefficient: float) -> np.ndarray:
    """Load of each round [ROUNDS], a factor around 1."""
    innovations = random.normal(size=ROUNDS) * np.sqrt(1 - coefficient**2)
    innovations[0] = random.normal()
    values = scipy.signal.lfilter([1.0], [1.0, -coefficient], innovations)
    return np.asarray(np.exp(scatter * values))


def series(random: np.random.Generator, load: np.ndarray) -> np.ndarray:
    """Times of one callable, milliseconds [ROUNDS]."""
    own = random.lognormal(0.0, OWN_SCATTER, ROUNDS)
    slow = np.where(random.random(ROUNDS) < SLOW_SHARE, SLOW_FACTOR, 1.0)
    return RUN_MS * load * own * slow


def simulated(trials: int, scatter: float, coefficient: float) -> dict[str, Any]:
    """Both rates on series of a known kind."""
    alike = found = 0
    for seed in range(trials):
        random = np.random.default_rng([seed, int(1000 * coefficient), int(1000 * scatter)])
        load = load_of(random, scatter, coefficient)
        one, other = series(random, load), series(random, load)
        alike += speedup_of(one, other).differs
        found += speedup_of(one * DIFFERENCE, other).low > 1
    return {
        "load_scatter": scatter,
        "load_coefficient": coefficient,
        "rounds": ROUNDS,
        "alike_called_different": rate(alike, trials),
        "three_percent_found": rate(found, trials),
    }


def products(count: int) -> Callable[[], object]:
    """A callable whose work is in proportion to `count`."""
    matrix = np.random.default_rng(0).normal(size=(48, 48)).astype(np.float32)

    def run() -> object:
        for _ in range(count):
            matrix @ matrix
        return None

    return run


def on_this_host(trials: int, seconds: float) -> dict[str, Any]:
    """Both rates on this machine, as it is."""
    alike = found = 0
    rounds, others = [], []
    same, more = products(PRODUCTS), products(round(PRODUCTS * DIFFERENCE))
    for _ in range(trials):
        measured = measure_interleaved({"one": same, "other": products(PRODUCTS)}, max_seconds=seconds)
        alike += measured.speedup("one", "other").differs
        rounds.append(measured.runs["one"].n)
        others.append(measured.runs["one"].environment.get("cores_busy_with_others"))
        slower = measure_interleaved({"one": more, "other": same}, max_seconds=seconds)
        found += slower.speedup("one", "other").low > 1
    return {
        "seconds": seconds,
        "rounds_median": float(np.median(rounds)),
        "cores_busy_with_others_median": float(np.median([value for value in others if value is not None])),
        "environment": {key: measured.runs["one"].environment[key] for key in ("cpu", "cores", "governor")},
        "alike_called_different": rate(alike, trials),
        "three_percent_found": rate(found, trials),
    }


def main() -> None:
    """Run both parts and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--host-trials", type=int, default=40)
    parser.add_argument("--host-seconds", type=float, default=1.5)
    options = parser.parse_args()
    result = {
        "command": "python benchmarks/comparing_latencies.py " + " ".join(sys.argv[1:]),
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__},
        "simulated": [simulated(options.trials, *load) for load in LOADS],
    }
    for row in result["simulated"]:
        print(json.dumps(row))
    if options.host_trials:
        result["host"] = on_this_host(options.host_trials, options.host_seconds)
        print(json.dumps(result["host"]))
    atomic_write_text(RESULTS, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
