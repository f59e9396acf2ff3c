"""Detection metrics as nuScenes defines them (arXiv 1903.11027, section 3.1), from per-sample statistics.

A detection is a true positive of its class where a box of that class, not yet taken by a more confident detection,
has its centre within 0.5, 1, 2 or 4 m on the ground; it takes the nearest. Boxes are matched within a sample only, so
matching is done a sample at a time (`match`), and any selection of samples can be scored afterwards (`score`), which is
what a bootstrap over samples needs.

Average precision is the area under the interpolated precision over recall where both exceed 10 %, of what is possible
there; mAP is its mean over classes and distances. The true-positive errors, at 2 m, are those of translation (ATE,
metres), scale (ASE, 1 - IoU with centres and yaw made equal) and orientation (AOE, radians), each the mean over recall
from above 10 % to the highest that was reached of the errors' running mean, 1 where recall does not get there. This
world stands still and its objects have no attributes, so that the errors of velocity and attribute (AVE, AAE) do not
exist. NDS* is the nuScenes detection score over the three that do: (5 mAP + sum of max(0, 1 - error)) / 8. The boxes
have no front: yaw differences are taken modulo pi, as nuScenes does it for barriers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]

DISTANCES_M = (0.5, 1.0, 2.0, 4.0)
ERROR_DISTANCE_M = 2.0
ERRORS = ("ate_m", "ase", "aoe_rad")
MIN_RECALL, MIN_PRECISION = 0.1, 0.1
RECALLS = np.linspace(0.0, 1.0, 101)
MAP_WEIGHT = 5.0
_FIRST = round(100 * MIN_RECALL) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Matches:
    """What became of the detections of N samples, K each, most confident first.

    Attributes:
        confidence: (N, K); 0 marks an empty place.
        category: (N, K) class of each detection.
        hit: (N, K, distances) whether it is a true positive at each of `DISTANCES_M`.
        error: (N, K, errors) `ERRORS` of the true positives at 2 m, NaN elsewhere.
        truths: (N, classes) number of boxes there are.
    """

    confidence: Floats
    category: Ints
    hit: NDArray[np.bool_]
    error: Floats
    truths: Ints


def match(
    confidence: Floats, category: Ints, box: Floats, truth_category: Ints, truth_box: Floats, classes: int
) -> Matches:
    """Match detections to boxes, greedily by confidence.

    Args:
        confidence: (N, K) from high to low; 0 is no detection.
        category: (N, K).
        box: (N, K, 7) x, y, z, length, width, height in metres, yaw in radians.
        truth_category: (N, S); negative is no box.
        truth_box: (N, S, 7).
        classes: number of classes.

    Raises:
        ValueError: the detections of a sample are not sorted.
    """
    if (np.diff(confidence, axis=1) > 0).any():
        raise ValueError("expected detections from high to low confidence; got an unsorted sample; sort them first")
    n, k = confidence.shape
    distance = np.linalg.norm(box[:, :, None, :2] - truth_box[:, None, :, :2], axis=-1)
    same = (category[:, :, None] == truth_category[:, None]) & (confidence[:, :, None] > 0)
    distance = np.where(same, distance, np.inf)
    limits = np.array(DISTANCES_M)
    taken = np.zeros((n, len(limits), truth_category.shape[1]), np.bool_)
    hit = np.zeros((n, k, len(limits)), np.bool_)
    partner = np.zeros((n, k, len(limits)), np.int64)
    sample, limit = np.ogrid[:n, : len(limits)]
    for rank in range(k):  # each choice depends on the ones before
        free = np.where(taken, np.inf, distance[:, rank, None])
        nearest = free.argmin(axis=2)
        hit[:, rank] = np.take_along_axis(free, nearest[..., None], axis=2)[..., 0] < limits
        partner[:, rank] = nearest
        taken[sample, limit, nearest] |= hit[:, rank]
    at = DISTANCES_M.index(ERROR_DISTANCE_M)
    matched = np.take_along_axis(truth_box, partner[:, :, at, None], axis=1)
    right = hit[:, :, at]  # empty places have no size
    error = np.full((n, k, len(ERRORS)), np.nan)
    error[right] = box_errors(box[right], matched[right])
    truths = (truth_category[:, :, None] == np.arange(classes)).sum(axis=1)
    return Matches(confidence=confidence, category=category, hit=hit, error=error, truths=truths)


def box_errors(box: Floats, truth: Floats) -> Floats:
    """`ERRORS` (..., 3) between pairs of boxes (..., 7)."""
    translation = np.linalg.norm(box[..., :2] - truth[..., :2], axis=-1)
    common = np.minimum(box[..., 3:6], truth[..., 3:6]).prod(axis=-1)
    either = box[..., 3:6].prod(axis=-1) + truth[..., 3:6].prod(axis=-1) - common
    turn = np.mod(box[..., 6] - truth[..., 6], np.pi)
    return np.stack([translation, 1.0 - common / either, np.minimum(turn, np.pi - turn)], axis=-1)


def score(matches: Matches, names: tuple[str, ...]) -> dict[str, float]:
    """`nds`, `map`, the three mean errors, and the average precision of each named class (`ap_NAME`)."""
    confidence, category = matches.confidence.ravel(), matches.category.ravel()
    hit, error = matches.hit.reshape(-1, len(DISTANCES_M)), matches.error.reshape(-1, len(ERRORS))
    precision, errors = np.zeros((len(names), len(DISTANCES_M))), np.ones((len(names), len(ERRORS)))
    for number in range(len(names)):
        mine = np.flatnonzero((category == number) & (confidence > 0))
        mine = mine[np.argsort(-confidence[mine], kind="stable")]
        truths = int(matches.truths[:, number].sum())
        for limit in range(len(DISTANCES_M)):
            precision[number, limit] = average_precision(hit[mine, limit], truths)
        right = hit[mine, DISTANCES_M.index(ERROR_DISTANCE_M)]
        errors[number] = mean_errors(confidence[mine], right, error[mine], truths)
    means = errors.mean(axis=0)
    found = {"nds": 0.0, "map": float(precision.mean())}
    found["nds"] = float((MAP_WEIGHT * found["map"] + np.maximum(0.0, 1.0 - means).sum()) / (MAP_WEIGHT + len(ERRORS)))
    found |= {name: float(value) for name, value in zip(ERRORS, means, strict=True)}
    return found | {f"ap_{name}": float(row.mean()) for name, row in zip(names, precision, strict=True)}


def average_precision(hit: NDArray[np.bool_], truths: int) -> float:
    """Average precision of detections (D,) from high to low confidence; 0 where there is nothing to find."""
    if truths == 0 or not hit.any():
        return 0.0
    right = np.cumsum(hit)
    precision = np.interp(RECALLS, right / truths, right / np.arange(1, len(hit) + 1), right=0.0)
    useful = np.maximum(precision[_FIRST:] - MIN_PRECISION, 0.0)
    return float(useful.mean() / (1.0 - MIN_PRECISION))


def mean_errors(confidence: Floats, hit: NDArray[np.bool_], error: Floats, truths: int) -> Floats:
    """Mean over recall of the running mean errors (E,) of detections from high to low confidence.

    Args:
        confidence: (D,).
        hit: (D,) at 2 m.
        error: (D, E), read where `hit`.
        truths: number of boxes.
    """
    ones = np.ones(error.shape[1])
    if truths == 0 or not hit.any():
        return ones
    at_recall = np.interp(RECALLS, np.cumsum(hit) / truths, confidence, right=0.0)
    last = int(np.flatnonzero(at_recall).max(initial=0))
    if last < _FIRST:
        return ones
    count = np.arange(1, int(hit.sum()) + 1)
    running = np.cumsum(error[hit], axis=0) / count[:, None]
    # np.interp wants rising abscissae: from low to high confidence.
    columns = [np.interp(at_recall[::-1], confidence[hit][::-1], one[::-1])[::-1] for one in running.T]
    return np.array([column[_FIRST : last + 1].mean() for column in columns])


def as_stats(matches: Matches) -> dict[str, Any]:
    """Arrays with one row a sample, as a task's `sample_stats` returns them."""
    return {item.name: getattr(matches, item.name) for item in fields(Matches)}


def from_stats(stats: Mapping[str, Any]) -> Matches:
    """The inverse of `as_stats`."""
    return Matches(**{item.name: np.asarray(stats[item.name]) for item in fields(Matches)})
