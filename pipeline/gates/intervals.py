"""Intervals of a statistic from its bootstrap replicates and its jackknife."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special  # scipy.stats takes a second to import, and its scalar functions a hundred times as long

Floats = npt.NDArray[np.float64]

CONFIDENCE = 0.95
ALPHA = (1 - CONFIDENCE) / 2  # of each side
TRUSTED_UNITS = 20
TRUSTED_BLOCKS = 30  # of a single drive, which are not independent: with 20 of them, too many verdicts were wrong
MOST_UNDEFINED = 0.05  # share of draws in which a metric may be undefined; each of them counts as the worst
SLACK = 1e-9  # 0.66 - 0.63 is more than 0.03 in floating point


@dataclass(frozen=True, slots=True)
class Interval:
    """A point estimate with its 95 % interval.

    Attributes:
        value: the estimate.
        low: lower end.
        high: upper end.
        df: degrees of freedom of its tails: units - 1, infinite where they are not known.
    """

    value: float
    low: float
    high: float
    df: float = field(default=math.inf, compare=False)

    def __neg__(self) -> Interval:
        return Interval(-self.value, -self.high, -self.low, self.df)

    def p_within(self, limit: float) -> float:
        """One-sided p-value of "the true value is at most `limit`"; 2.5 % where the lower end is at the limit.

        The lower half-width is scaled by Student's t, so that the p-value does not end at 1 / replicates and agrees
        with the interval whichever kind it is.
        """
        distance, half = self.value - limit, self.value - self.low
        if distance <= SLACK:
            return 1.0
        if half <= 0:
            return 0.0
        return float(special.stdtr(self.df, -_reach(self.df) * distance / half))


def interval(
    point: float,
    drawn: npt.NDArray[np.floating[Any]],
    units: int,
    jackknife: npt.NDArray[np.floating[Any]] | None = None,
) -> Interval | None:
    """The 95 % interval of a statistic from its bootstrap replicates (which one, and why: see the package).

    An undefined draw (a class that was not drawn, or an output that is no number) may be anything: it counts as the
    highest value for the upper end and as the lowest for the lower end, so that no model passes by being undefined
    where it is worst.

    Args:
        point: the statistic over all samples.
        drawn: (R,) its replicates; NaN where undefined.
        units: number of clusters (or blocks) that were drawn from.
        jackknife: (G,) the statistic with each group of units left out; without, the interval has no acceleration.

    Returns:
        None where it is undefined: no point, one unit, or so many undefined draws that an end is among them.
    """
    every: Floats = np.asarray(drawn, dtype=np.float64)
    defined = np.isfinite(every)
    finite = every[defined]
    enough = len(drawn) > 0 and len(finite) >= (1 - MOST_UNDEFINED) * len(drawn)
    if not math.isfinite(point) or units < 2 or not enough:
        return None
    reach = _reach(units - 1) * math.sqrt(units / (units - 1))
    if units < TRUSTED_UNITS:
        half = reach * float(np.std(finite))
        return Interval(point, point - half, point + half, units - 1)
    tail = float(special.ndtr(-reach))
    levels = (tail, 1 - tail) if jackknife is None else bca_levels(point, finite, np.asarray(jackknife), tail)
    low, high = (_worst_quantile(every, defined, level, end) for level, end in zip(levels, (-1, 1), strict=True))
    if not (math.isfinite(low) and math.isfinite(high)):
        return None
    return Interval(point, min(low, point), max(high, point), units - 1)


def _worst_quantile(drawn: Floats, defined: npt.NDArray[np.bool_], level: float, end: int) -> float:
    """A quantile with what is undefined at the outer end; infinite where it falls there."""
    if defined.all():
        return float(np.quantile(drawn, level))
    ordered = np.sort(np.where(defined, drawn, end * np.inf))
    position = level * (len(ordered) - 1)
    below, share = ordered[math.floor(position)], position - math.floor(position)
    above = ordered[math.ceil(position)]
    # an infinite neighbour of any weight takes the end with it; inf - inf would be NaN
    return float(below + share * (above - below)) if math.isfinite(below) and math.isfinite(above) else end * math.inf


def bca_levels(point: float, drawn: Floats, jackknife: Floats, tail: float) -> tuple[float, float]:
    """The levels at which the replicates are read: bias-corrected and accelerated (Efron 1987, section 3).

    Args:
        point: the statistic over all samples.
        drawn: (R,) finite replicates.
        jackknife: (G,) leave-one-out values; those that are not finite are passed over.
        tail: nominal level of each side.

    Returns:
        Lower and upper level; (tail, 1 - tail) where the correction is undefined (all replicates on one side).
    """
    below = (np.mean(drawn < point) + np.mean(drawn <= point)) / 2  # ties count half
    bias = float(special.ndtri(below))
    acceleration = _acceleration(jackknife)
    levels = []
    for nominal in (tail, 1 - tail):
        shifted = bias + float(special.ndtri(nominal))
        scale = 1 - acceleration * shifted
        if not math.isfinite(bias) or scale <= 0:
            return tail, 1 - tail
        levels.append(float(special.ndtr(bias + shifted / scale)))
    return levels[0], levels[1]


def _reach(df: float) -> float:
    """Student's t quantile of the interval's upper end."""
    return float(special.stdtrit(df, 1 - ALPHA)) if math.isfinite(df) else float(special.ndtri(1 - ALPHA))


def _acceleration(jackknife: Floats) -> float:
    values = jackknife[np.isfinite(jackknife)]
    if len(values) < 2:
        return 0.0
    influence = values.mean() - values
    spread = float(np.sum(influence**2)) ** 1.5
    return float(np.sum(influence**3)) / (6 * spread) if spread > 0 else 0.0
