"""Which units to leave in floating point: the cheapest set found that meets a standard, in few trials.

Units come ranked by the error that sparing them removes for what it costs. The shortest prefix of the ranking that
meets the standard is found by galloping and bisection; then units of it are given back to INT8 in groups, halving the
groups that are needed. Both steps rely on sparing more never doing harm, which holds up to noise; whatever comes out
was itself tried. Without a limit on trials, no single unit of the result could be given back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Rung = Literal["int8", "mixed", "float"]
MOST_TRIALS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A set of spared units and how it did.

    Attributes:
        spared: units left in floating point.
        met: whether the standard is met.
        value: the metric.
        drop: below the reference, positive is worse.
        high: upper end of the drop's 95 % interval; None where it is undefined, and then the drop itself counts.
    """

    spared: frozenset[str]
    met: bool
    value: float | None = None
    drop: float | None = None
    high: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "spared": sorted(self.spared),
            "met": self.met,
            "value": self.value,
            "drop": self.drop,
            "high": self.high,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a search ended with.

    Attributes:
        rung: int8 (all units, in FP8 where that is searched), mixed (fewer), or float (none, the reference itself).
        spared: units left in floating point.
        trials: all that were judged, in order.
    """

    rung: Rung
    spared: frozenset[str]
    trials: tuple[Trial, ...]


def search(
    ranking: Sequence[str], judge: Callable[[frozenset[str]], Trial], *, most_trials: int = MOST_TRIALS
) -> Found:
    """Find a cheap set of units to spare.

    Args:
        ranking: all units, the most worthwhile to spare first.
        judge: tries a set.
        most_trials: sets to judge at most, the empty one (all INT8) included.

    Returns:
        The set; all units, which nothing needs to judge, where no other that was tried meets the standard.
    """
    trials: list[Trial] = []

    def met(spared: frozenset[str]) -> bool | None:
        """None: no trial is left."""
        before = next((trial.met for trial in trials if trial.spared == spared), None)
        if before is not None:
            return before
        if len(trials) >= most_trials:
            return None
        trials.append(judge(spared))
        return trials[-1].met

    if met(frozenset()):
        return Found(rung="int8", spared=frozenset(), trials=tuple(trials))
    length, sure = _shortest_prefix(len(ranking), lambda k: met(frozenset(ranking[:k])))
    spared = frozenset(ranking[:length])
    # the least worthwhile first; where the prefix is known to be the shortest, its last unit is needed
    rest = list(reversed(ranking[: length - 1 if sure else length]))
    spared = _give_back(spared, rest, met)
    rung: Rung = "float" if len(spared) == len(ranking) else "mixed"
    return Found(rung=rung, spared=spared, trials=tuple(trials))


def _shortest_prefix(count: int, met: Callable[[int], bool | None]) -> tuple[int, bool]:
    """Smallest k in 1..count that meets the standard (count does, 0 does not), and whether k - 1 is known to fail."""
    low, high, step = 0, count, 1
    while low + step < high:  # gallop: few units are to blame as a rule
        answer = met(low + step)
        if answer is None:
            return high, False
        if answer:
            high = low + step
            break
        low, step = low + step, 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        answer = met(middle)
        if answer is None:
            return high, False
        low, high = (low, middle) if answer else (middle, high)
    return high, True


def _give_back(
    spared: frozenset[str], group: Sequence[str], met: Callable[[frozenset[str]], bool | None]
) -> frozenset[str]:
    """Quantise a group again if the standard stays met, else its halves one after the other."""
    if not group:
        return spared
    answer = met(spared - set(group))
    if answer:
        return spared - set(group)
    if answer is None or len(group) == 1:
        return spared
    half = len(group) // 2
    return _give_back(_give_back(spared, group[:half], met), group[half:], met)
