"""Paired bootstrap of two models over clusters of samples, and the jackknife over the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fusepress.pipeline.errors import TaskError
from fusepress.pipeline.gates.intervals import Floats

Stats = Mapping[str, npt.NDArray[Any]]
Score = Callable[[dict[str, npt.NDArray[Any]]], Mapping[str, float]]
Rows = npt.NDArray[np.intp]

MOST_LEFT_OUT = 200  # jackknife values; more units are left out in groups, which estimates the same acceleration


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """Both models under one condition (clean, or a failure at a severity).

    Attributes:
        dense: metrics of the dense model over all samples.
        compressed: metrics of the compressed model over all samples.
        replicates: metric -> (R, 2), column 0 dense and column 1 compressed.
        jackknife: metric -> (G, 2), the same with each group of units left out; empty where it was not worked out.
    """

    dense: dict[str, float]
    compressed: dict[str, float]
    replicates: dict[str, Floats]
    jackknife: dict[str, Floats] = field(default_factory=dict)


def block_length(samples: int) -> int:
    """Consecutive samples that are drawn together where all are of one cluster: the square root of their number.

    Longer than the n ** (1/3) that is best for short-range dependence: nothing is known here of how long a drive
    remembers, and too long a block costs width where too short a one costs the truth.
    """
    return math.isqrt(samples - 1) + 1 if samples > 0 else 1


def unit_count(samples: int, clusters: int) -> int:
    """How many things are drawn from: clusters, or blocks of one cluster."""
    return clusters if clusters > 1 else -(-samples // block_length(samples))


def bootstrap_replicates(
    stats_dense: Stats,
    stats_compressed: Stats,
    score: Score,
    groups: Sequence[str],
    *,
    replicates: int,
    seed: int,
) -> dict[str, Floats]:
    """Score both models on the same resampled clusters.

    Args:
        stats_dense: per-sample statistics of the dense model, leading dimension N.
        stats_compressed: the same of the compressed model, same samples in the same order.
        score: the task's metrics from statistics.
        groups: N cluster names; with one distinct name, blocks of consecutive samples are drawn (circular block
            bootstrap, Politis and Romano 1992).
        replicates: R, number of draws.
        seed: of the draws.

    Returns:
        metric -> float64 (R, 2), column 0 dense and column 1 compressed; NaN where a metric is undefined in a draw.

    Raises:
        TaskError: the statistics do not fit each other or the groups, or `score` changes its metrics.
    """
    _check_stats(stats_dense, stats_compressed, len(groups))
    return _scored(stats_dense, stats_compressed, score, _draws(groups, replicates, seed))


def jackknife_values(
    stats_dense: Stats, stats_compressed: Stats, score: Score, groups: Sequence[str]
) -> dict[str, Floats]:
    """Score both models with each cluster (or block) left out; above 200 of them, with each of 200 groups of them.

    Args:
        stats_dense: as for `bootstrap_replicates`.
        stats_compressed: as there.
        score: as there.
        groups: as there.

    Returns:
        metric -> float64 (G, 2), column 0 dense and column 1 compressed; empty where there is one unit.
    """
    units = _units(groups)
    if len(units) < 2:
        return {}
    left_out = [np.concatenate([units[i] for i in part]) for part in _parts(len(units), MOST_LEFT_OUT)]
    everything = np.arange(len(groups))
    return _scored(stats_dense, stats_compressed, score, (np.delete(everything, rows) for rows in left_out))


def compare(
    stats_dense: Stats,
    stats_compressed: Stats,
    score: Score,
    groups: Sequence[str],
    *,
    replicates: int,
    seed: int,
) -> Condition:
    """`bootstrap_replicates` and `jackknife_values` with both models' metrics over all samples; arguments as there."""
    drawn = bootstrap_replicates(stats_dense, stats_compressed, score, groups, replicates=replicates, seed=seed)
    return Condition(
        dense={name: float(value) for name, value in score(dict(stats_dense)).items()},
        compressed={name: float(value) for name, value in score(dict(stats_compressed)).items()},
        replicates=drawn,
        jackknife=jackknife_values(stats_dense, stats_compressed, score, groups),
    )


def _scored(dense: Stats, compressed: Stats, score: Score, draws: Iterable[Rows]) -> dict[str, Floats]:
    names = list(score(dict(dense)))
    rows_of: list[list[list[float]]] = []
    for index, rows in enumerate(draws):
        pair = []
        for stats in (dense, compressed):
            metrics = score({name: array[rows] for name, array in stats.items()})
            if set(metrics) != set(names):
                raise TaskError(
                    f"expected score() to return the metrics {names} for any samples; got {sorted(metrics)} "
                    f"in bootstrap draw {index}; return NaN for a metric that is undefined"
                )
            pair.append([float(metrics[name]) for name in names])
        rows_of.append(pair)
    table_R2M = np.array(rows_of, dtype=np.float64).reshape(len(rows_of), 2, len(names))
    return {name: np.ascontiguousarray(table_R2M[:, :, i]) for i, name in enumerate(names)}


def _check_stats(dense: Stats, compressed: Stats, n: int) -> None:
    if set(dense) != set(compressed) or not dense:
        raise TaskError(
            f"expected the same statistics of both models; got {sorted(dense)} and {sorted(compressed)}; "
            "return the same keys from sample_stats() whatever the outputs"
        )
    for name in dense:
        for label, array in (("dense", dense[name]), ("compressed", compressed[name])):
            if array.ndim == 0 or array.shape[0] != n or n == 0:
                raise TaskError(
                    f"expected statistics with a leading dimension of {n} samples (at least 1); got shape "
                    f"{array.shape} at {name!r} of the {label} model; return one row a sample from sample_stats()"
                )


def _draws(groups: Sequence[str], replicates: int, seed: int) -> Iterator[Rows]:
    members = _clusters(groups)
    generator = np.random.default_rng(seed)
    if len(members) == 1:
        yield from _block_draws(len(groups), replicates, generator)
        return
    for _ in range(replicates):
        picks = generator.integers(0, len(members), size=len(members))
        yield np.concatenate([members[pick] for pick in picks])


def _block_draws(samples: int, replicates: int, generator: np.random.Generator) -> Iterator[Rows]:
    length = block_length(samples)
    inside = np.arange(length)
    for _ in range(replicates):
        starts = generator.integers(0, samples, size=unit_count(samples, 1))
        yield ((starts[:, None] + inside) % samples).reshape(-1)[:samples]


def _units(groups: Sequence[str]) -> list[Rows]:
    """Rows of each cluster, or of each of the consecutive blocks of a single one."""
    members = _clusters(groups)
    if len(members) > 1:
        return members
    length = block_length(len(groups))
    return [np.arange(start, min(start + length, len(groups))) for start in range(0, len(groups), length)]


def _parts(count: int, most: int) -> list[Rows]:
    """The numbers below `count` in at most `most` even, consecutive parts."""
    return [np.asarray(part) for part in np.array_split(np.arange(count), min(count, most))]


def _clusters(groups: Sequence[str]) -> list[Rows]:
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(groups):
        rows.setdefault(name, []).append(row)
    return [np.array(indices, dtype=np.intp) for indices in rows.values()]
