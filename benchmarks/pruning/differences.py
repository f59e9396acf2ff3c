"""Differences between rows, with intervals that know what is shared: seeds, and the streets of the eval split."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import stats as distributions

Floats = npt.NDArray[np.float64]
Verdict = Literal["win", "lose", "tie", "undecided"]
TIE_HALF_WIDTH = 0.01
REPLICATES = 2000
LEVEL = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A mean difference over seeds, positive = the first row is better.

    Attributes:
        mean: over the seeds that both rows have.
        seeds: those seeds.
        t_interval: paired Student's t over seeds: noise of scoring and training, the eval split taken as it is.
        bootstrap: seeds and streets drawn again, independently (all seeds share the streets): the split's noise too.
        verdict: of the first row against the second, by the interval that covers both.
    """

    mean: float
    seeds: tuple[int, ...]
    t_interval: tuple[float, float] | None
    bootstrap: tuple[float, float] | None
    verdict: Verdict


def mean_iou_draws(stats: Mapping[str, npt.NDArray[Any]], groups: Sequence[str], weights: Floats) -> Floats:
    """Mean intersection over union on redrawn clusters.

    Args:
        stats: `intersection` and `union`, each (N, classes).
        groups: cluster of each of the N samples.
        weights: how often each cluster was drawn, (R, clusters), clusters in sorted order.

    Returns:
        (R,)
    """
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    sums = []
    for name in ("intersection", "union"):
        total = np.zeros((len(names), stats[name].shape[1]))
        np.add.at(total, index, stats[name].astype(np.float64))
        sums.append(weights @ total)
    iou: Floats = (sums[0] / np.maximum(sums[1], 1.0)).mean(axis=1)
    return iou


def street_draws(clusters: int, replicates: int = REPLICATES, seed: int = 0) -> Floats:
    """How often each cluster is drawn, (R, clusters); the same for every cell, which pairs them."""
    generator = np.random.default_rng([seed, clusters])
    draws: Floats = generator.multinomial(clusters, np.full(clusters, 1 / clusters), size=replicates).astype(float)
    return draws


def load_draws(path: Path) -> Floats | None:
    """Replicates of a finished cell's metric; None where its statistics are of another kind."""
    if not path.is_file():
        return None
    with np.load(path) as file:
        stats = {name.removeprefix("stats/"): file[name] for name in file.files if name.startswith("stats/")}
        groups = [str(group) for group in file["groups"]]
    if set(stats) != {"intersection", "union"}:
        return None
    return mean_iou_draws(stats, groups, street_draws(len(set(groups))))


def compare(
    first: Mapping[int, float],
    second: Mapping[int, float],
    draws_first: Mapping[int, Floats | None],
    draws_second: Mapping[int, Floats | None],
) -> Difference | None:
    """First minus second over the seeds that both have.

    Args:
        first: seed -> metric, larger = better.
        second: the same of the other row.
        draws_first: seed -> replicates (R,) on redrawn streets.
        draws_second: the same streets, the other row.
    """
    seeds = tuple(sorted(set(first) & set(second)))
    if not seeds:
        return None
    values = np.array([first[seed] - second[seed] for seed in seeds])
    paired = _t_interval(values)
    draws = [(draws_first.get(seed), draws_second.get(seed)) for seed in seeds]
    redrawn = None
    if len(seeds) > 1 and all(a is not None and b is not None for a, b in draws):
        redrawn = _crossed(np.array([a - b for a, b in draws if a is not None and b is not None]))
    return Difference(
        mean=float(values.mean()),
        seeds=seeds,
        t_interval=paired,
        bootstrap=redrawn,
        verdict=judge([interval for interval in (paired, redrawn) if interval is not None]),
    )


def _t_interval(values: Floats) -> tuple[float, float] | None:
    if len(values) < 2:
        return None
    half = float(distributions.t.ppf(0.5 + LEVEL / 2, len(values) - 1)) * float(values.std(ddof=1))
    half /= math.sqrt(len(values))
    return float(values.mean()) - half, float(values.mean()) + half


def _crossed(differences: Floats) -> tuple[float, float]:
    """Percentiles over redrawn seeds of (seeds, R) differences on redrawn streets."""
    seeds, replicates = differences.shape
    chosen = np.random.default_rng([1, seeds, replicates]).integers(seeds, size=(seeds, replicates))
    means = np.take_along_axis(differences, chosen, axis=0).mean(axis=0)
    low, high = np.quantile(means, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return float(low), float(high)


def judge(intervals: Sequence[tuple[float, float]]) -> Verdict:
    """Of the first row, by the interval that covers all given ones.

    A tie has to be shown: the interval covers 0 and is at most 0.01 to each side of its middle. One that covers 0 and
    is wider says nothing.
    """
    if not intervals:
        return "undecided"
    low, high = min(low for low, _ in intervals), max(high for _, high in intervals)
    if low > 0:
        return "win"
    if high < 0:
        return "lose"
    return "tie" if (high - low) / 2 <= TIE_HALF_WIDTH else "undecided"
