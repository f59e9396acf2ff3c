"""Which samples to calibrate on: evenly over strata, and spread over what the inputs look like.

Features of a sample are the mean, the standard deviation and both ends of each of its inputs. Samples are chosen by
farthest-first traversal (Gonzalez 1985), which is never further than twice the best possible set of that size from any
sample: what it leaves out resembles something that it took. Ranges depend on extremes, which a random draw misses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
STATISTICS = ("mean", "std", "min", "max")


def sample_features(arrays: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, float]:
    """Statistics of one sample's inputs, by `<input>.<statistic>`; indices are left out, for their size means nothing.

    Args:
        arrays: input name -> the sample's array, of any shape.
    """
    found: dict[str, float] = {}
    for name, array in sorted(arrays.items()):
        if not np.issubdtype(array.dtype, np.floating) or array.size == 0:
            continue
        values = array.astype(np.float64, copy=False)
        figures = (values.mean(), values.std(), values.min(), values.max())
        found |= {f"{name}.{what}": float(figure) for what, figure in zip(STATISTICS, figures, strict=True)}
    return found


def standardise(features_NF: Floats) -> Floats:
    """Features in units of their standard deviation over the samples; constant ones become 0."""
    spread_F = features_NF.std(axis=0)
    constant_F = spread_F <= 1e-12 * np.maximum(1.0, np.abs(features_NF).max(axis=0, initial=0.0))
    return np.asarray((features_NF - features_NF.mean(axis=0)) / np.where(constant_F, np.inf, spread_F))


def choose(features_NF: Floats, strata: Sequence[str], count: int, seed: int) -> list[int]:
    """Choose samples evenly over strata and, within that, each as far as can be from those chosen before.

    Args:
        features_NF: features of N samples, in units that can be compared.
        strata: the stratum of each.
        count: how many, at most N.
        seed: of the first one, and of the order among equals.

    Returns:
        Indices, sorted.
    """
    n = len(strata)
    order = np.random.default_rng(seed).permutation(n)
    points_NF, labels = features_NF[order], [strata[i] for i in order]
    number = {label: index for index, label in enumerate(sorted(set(labels)))}
    stratum_N = np.array([number[label] for label in labels])
    taken_S = np.zeros(len(number), dtype=np.int64)
    open_N = np.ones(n, dtype=np.bool_)
    distance_N = np.full(n, np.inf)
    chosen: list[int] = []
    for _ in range(min(count, n)):
        least = taken_S[np.unique(stratum_N[open_N])].min()
        eligible_N = open_N & (taken_S[stratum_N] == least)
        pick = int(np.argmax(np.where(eligible_N, distance_N, -1.0)))
        chosen.append(pick)
        open_N[pick] = False
        taken_S[stratum_N[pick]] += 1
        distance_N = np.minimum(distance_N, np.linalg.norm(points_NF - points_NF[pick], axis=1))
    return sorted(int(order[i]) for i in chosen)


def coverage(features: Sequence[Mapping[str, float]], strata: Sequence[str], chosen: Sequence[int]) -> dict[str, Any]:
    """How well the chosen samples stand for all of them.

    Args:
        features: of all N samples, by name.
        strata: of all N samples.
        chosen: indices among them.

    Returns:
        `strata`: stratum -> [available, chosen]; `features`: name -> ends over all samples and over the chosen ones,
        and the share of all samples between the chosen ends; `radius` and `spread`: the largest distance of any sample
        to its nearest chosen one and to the centre of all, in standard deviations.
    """
    names = list(features[0])
    table_NF = np.array([[row[name] for name in names] for row in features], dtype=np.float64).reshape(
        len(features), -1
    )
    picked_KF = table_NF[list(chosen)]
    low_F, high_F = picked_KF.min(axis=0), picked_KF.max(axis=0)
    within_F = ((table_NF >= low_F) & (table_NF <= high_F)).mean(axis=0)
    scaled_NF = standardise(table_NF)
    gap_N = np.full(len(features), np.inf)
    for index in chosen:
        gap_N = np.minimum(gap_N, np.linalg.norm(scaled_NF - scaled_NF[index], axis=1))
    there, taken = Counter(strata), Counter(strata[i] for i in chosen)
    return {
        "strata": {label: [there[label], taken[label]] for label in sorted(there)},
        "features": {
            name: {
                "low": float(table_NF[:, f].min()),
                "high": float(table_NF[:, f].max()),
                "chosen_low": float(low_F[f]),
                "chosen_high": float(high_F[f]),
                "within": float(within_F[f]),
            }
            for f, name in enumerate(names)
        },
        "radius": float(gap_N.max()),
        "spread": float(np.linalg.norm(scaled_NF, axis=1).max()),
    }
