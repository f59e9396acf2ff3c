"""Unstructured masks at a fraction of the weights, and how a total sparsity is spread over the modalities.

Arithmetic on counts first: a spread gives every branch (modality, or "fusion") the fraction of its weights that goes,
and all spreads that are compared remove the same number of weights. The search is a pattern search (Hooke and Jeeves
1961) on that simplex: zeros move from one branch to another as long as the judge likes the model better.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from fusepress.pipeline.scoring.altermoma import weight_masks

Scope = Literal["layer", "branch", "global"]
Spread = dict[str, float]
HIGHEST = 0.98  # of one branch: above it a network has no signal path left to train
FIRST_STEP = 0.2  # of all zeros, that the search's first moves shift
LAST_STEP = 0.04


@dataclass(frozen=True, slots=True, kw_only=True)
class SpreadSearch:
    """What the search found.

    Attributes:
        spread: removed fraction of every branch.
        value: what the judge said of it.
        tried: every spread that was judged, in order, with its value.
    """

    spread: Spread
    value: float
    tried: tuple[tuple[Spread, float], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the report."""
        return {"spread": self.spread, "value": self.value, "tried": [[*item] for item in self.tried]}


def unstructured_masks(
    scores: Mapping[str, Tensor], branch_of: Mapping[str, str], spread: Mapping[str, float], scope: Scope
) -> dict[str, Tensor]:
    """Masks that remove the lowest scores, in every branch the number that the spread says.

    Args:
        scores: parameter name -> scores in its shape, higher = keep; scopes other than `layer` compare them across
            parameters.
        branch_of: parameter name -> branch.
        spread: branch -> removed fraction.
        scope: what is ranked together: each layer by itself, a branch, or all there is (then the spread only says how
            many weights go in all).

    Returns:
        Bool masks by parameter name (True = kept). Exactly round(fraction * weights) go in every branch (in all, with
        scope global), whatever the sizes of its layers.
    """
    pools: dict[str, list[str]] = {}
    for name in scores:
        pools.setdefault(branch_of[name], []).append(name)
    zeros = {branch: round(spread.get(branch, 0.0) * _size(scores, names)) for branch, names in pools.items()}
    if scope == "global":
        return _removed(dict(scores), sum(zeros.values()))
    masks: dict[str, Tensor] = {}
    for branch, names in pools.items():
        if scope == "branch":
            masks |= _removed({name: scores[name] for name in names}, zeros[branch])
            continue
        for name, count in zip(names, shared(zeros[branch], [scores[n].numel() for n in names]), strict=True):
            masks |= _removed({name: scores[name]}, count)
    return {name: masks[name] for name in scores}


def shared(total: int, sizes: Sequence[int]) -> list[int]:
    """`total` split in proportion to the sizes, in whole numbers that sum to it (rounded cumulatively)."""
    whole = sum(sizes) or 1
    ends = [0, *(round(total * part / whole) for part in itertools.accumulate(sizes))]
    return [after - before for before, after in itertools.pairwise(ends)]


def equal_spread(total: float, counts: Mapping[str, int]) -> Spread:
    """The same fraction of every branch."""
    return dict.fromkeys(counts, total)


def spread_sparing(total: float, counts: Mapping[str, int], spared: Sequence[str]) -> Spread | None:
    """Some branches dense and the others equally sparse, with as many zeros in all; None where that is too many."""
    rest = sum(count for branch, count in counts.items() if branch not in spared)
    fraction = total * sum(counts.values()) / rest if rest else 1.0
    if fraction > max(HIGHEST, total):
        return None
    return {branch: 0.0 if branch in spared else fraction for branch in counts}


def search_spread(
    total: float,
    counts: Mapping[str, int],
    judge: Callable[[Spread], float],
    *,
    higher: bool = True,
    most: int = 40,
    progress: Callable[[float, str], None] = lambda _fraction, _text: None,
) -> SpreadSearch:
    """The spread of a total sparsity that a judge likes best.

    It starts from the best of: equal, each branch spared, each branch alone sparse. Then zeros move between two
    branches, a fifth of all zeros at first, half as many whenever no move helps.

    Args:
        total: removed fraction of all weights.
        counts: weights of every branch.
        judge: what a spread is worth, e.g. the primary metric on the calib split.
        higher: whether more is better.
        most: judgements at most.
        progress: called with the fraction done and a text.

    Returns:
        The best one (the equal one where others only tie with it) and all that were tried.
    """
    sign = 1.0 if higher else -1.0
    tried: dict[tuple[float, ...], tuple[Spread, float]] = {}

    def worth(spread: Spread) -> float:
        key = tuple(round(value, 9) for value in spread.values())
        if key not in tried:
            if len(tried) >= most:
                return -math.inf
            progress(len(tried) / most, "trying " + ", ".join(f"{k} {100 * v:.0f} %" for k, v in spread.items()))
            tried[key] = (spread, judge(spread))
        return sign * tried[key][1]

    best = equal_spread(total, counts)
    for start in _starts(total, counts):
        if worth(start) > worth(best):
            best = start
    step = FIRST_STEP
    while step >= LAST_STEP and len(tried) < most:
        moves = [_moved(best, counts, step * total, giver, taker) for giver, taker in itertools.permutations(counts, 2)]
        better = max((move for move in moves if move is not None), key=worth, default=None)
        if better is not None and worth(better) > worth(best):
            best = better
        else:
            step /= 2
    value = sign * worth(best)
    return SpreadSearch(spread=best, value=value, tried=tuple(tried.values()))


def _starts(total: float, counts: Mapping[str, int]) -> list[Spread]:
    choices = [spread_sparing(total, counts, [branch]) for branch in counts]
    choices += [spread_sparing(total, counts, [other for other in counts if other != branch]) for branch in counts]
    return [equal_spread(total, counts), *(choice for choice in choices if choice is not None)]


def _moved(spread: Spread, counts: Mapping[str, int], share: float, giver: str, taker: str) -> Spread | None:
    """Zeros worth `share` of all weights moved from one branch to another; None where that cannot be."""
    zeros = share * sum(counts.values())
    if not counts[giver] or not counts[taker]:
        return None
    less, more = spread[giver] - zeros / counts[giver], spread[taker] + zeros / counts[taker]
    if less < 0 or more > HIGHEST:
        return None
    return {**spread, giver: less, taker: more}


def _size(scores: Mapping[str, Tensor], names: Sequence[str]) -> int:
    return sum(scores[name].numel() for name in names)


def _removed(scores: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    size = _size(scores, list(scores))
    return weight_masks(scores, count / size) if size else {}


__all__ = [
    "Scope",
    "Spread",
    "SpreadSearch",
    "equal_spread",
    "search_spread",
    "shared",
    "spread_sparing",
    "unstructured_masks",
]
