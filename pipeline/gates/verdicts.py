"""From an interval and a limit to a verdict, in words."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy import special

from fusepress.pipeline.evidence import GateVerdict, Verdict
from fusepress.pipeline.gates.bootstrap import unit_count
from fusepress.pipeline.gates.intervals import ALPHA, SLACK, Interval
from fusepress.pipeline.gates.replicates import Replicates

RELATION = {"PASS": "within", "FAIL": "beyond", "INCONCLUSIVE": "on both sides of"}
POWER = 0.8  # with which the samples asked for decide


@dataclass(frozen=True, slots=True)
class Finding:
    """A gate's verdict by itself.

    Attributes:
        verdict: what it says.
        p: one-sided p-value of "the true value is within the limit"; None where nothing was tested.
    """

    verdict: Verdict
    p: float | None = None


def decide(found: Interval, limit: float) -> GateVerdict:
    """At most `limit`: PASS if the whole interval is within, FAIL if the whole interval is beyond."""
    if found.high <= limit + SLACK:
        return "PASS"
    return "FAIL" if found.low > limit + SLACK else "INCONCLUSIVE"


def tell(gate: str, says: GateVerdict, limit: float, found: Interval, why: str, *, p: float | None = None) -> Finding:
    """A finding with the figures of its interval."""
    verdict = Verdict(gate=gate, verdict=says, limit=limit, value=found.value, low=found.low, high=found.high, why=why)
    return Finding(verdict, p)


def without_number(gate: str, limit: float, why: str) -> Finding:
    """A missing number fails its gate."""
    return Finding(Verdict(gate=gate, verdict="FAIL", limit=limit, why=f"missing number: {why}"))


def without_interval(gate: str, limit: float, value: float, what: str) -> Finding:
    """A number that cannot decide, for it has no interval."""
    if not math.isfinite(value):
        return without_number(
            gate, limit, f"{what} is not a number; give the evaluation samples in which it is defined"
        )
    why = (
        f"{what} {shown(value)} has no interval: too few samples, or undefined in too many of the draws, which may be "
        "its worst; evaluate on more samples"
    )
    return Finding(Verdict(gate=gate, verdict="INCONCLUSIVE", limit=limit, value=value, why=why))


def weighed(
    gate: str,
    limit: float,
    found: Interval,
    what: str,
    replicates: Replicates,
    *,
    word: str = "",
    basis: str = "",
    where: str = "",
) -> Finding:
    """A finding from the interval of a bootstrapped number.

    Args:
        gate: its name.
        limit: what the number may be at most; where `word` is "floor", at least.
        found: the number.
        what: it is, in words.
        replicates: behind it; too few units decide nothing.
        word: floor or ceiling, before the limit; none for a drop.
        basis: how it was compared, in brackets.
        where: more samples are needed, if not in this run alone.
    """
    upside, bound = (-found, -limit) if word == "floor" else (found, limit)  # a ceiling of the negated value
    end = f"the {word} {shown(limit)}" if word else shown(limit)
    told = f"{what} ({basis}) {spread(found)}" if basis else f"{what} {spread(found)}"
    if not replicates.trusted:
        why = f"{told} is not judged against {end}: {too_few_units(replicates)}"
        return tell(gate, "INCONCLUSIVE", limit, found, why)
    says = decide(upside, bound)
    why = f"{told} is {RELATION[says]} {end}"
    if says == "INCONCLUSIVE":
        why += more_samples(upside, bound, replicates, where=where)
    return tell(gate, says, limit, found, why + replicates.note, p=upside.p_within(bound))


def too_few_units(replicates: Replicates) -> str:
    """Why the bootstrap is not trusted, and how many more samples it takes at least."""
    samples, clusters, enough = replicates.samples, replicates.clusters, replicates.least_units
    if clusters == 1:
        least = samples
        while unit_count(least, 1) < enough:
            least += 1
        return (
            f"one cluster of {samples} samples gives {replicates.units} blocks, and below {enough} a bootstrap "
            f"is not trusted; evaluate on at least {least - samples:,} more samples, or name shorter scenes in `groups`"
        )
    more = enough - clusters
    return (
        f"there are only {clusters} clusters, and below {enough} a bootstrap is not trusted; evaluate on at "
        f"least {more} more clusters (about {math.ceil(more * samples / clusters):,} samples)"
    )


def more_samples(found: Interval, limit: float, replicates: Replicates, *, where: str = "") -> str:
    """How many more samples decide, were the estimate to stay; `where` they are needed, if not in this run alone."""
    more = more_needed(found, limit, replicates.samples)
    if more is None:
        return "; the value is at the limit, so no number of samples is likely to decide"
    clusters = ""
    if replicates.clusters > 1:
        clusters = f" ({math.ceil(more * replicates.clusters / replicates.samples):,} clusters)"
    return (
        f"; about {more:,} more samples{clusters}{where} would decide it with {POWER:.0%} probability (now "
        f"{replicates.samples:,})"
    )


def more_needed(found: Interval, limit: float, n: int) -> int | None:
    """How many more are needed to decide with 80 % probability, were the true value the estimate.

    The half-width goes with 1 / sqrt(n), and the estimate itself scatters: the distance to the limit must be
    1 + z(0.8) / z(0.975) half-widths.

    Args:
        found: the interval now.
        limit: what it is compared with.
        n: samples (or runs) behind it.

    Returns:
        None where the value is at the limit.
    """
    distance = abs(limit - found.value)
    half = found.high - found.value if found.value <= limit else found.value - found.low
    if half > 1000 * distance:
        return None
    margin = 1 + float(special.ndtri(POWER) / special.ndtri(1 - ALPHA))
    return max(1, math.ceil(n * (margin * half / distance) ** 2) - n)


def shown(value: float) -> str:
    """Four significant digits, never -0, and rounding noise as 0."""
    return f"{value:.4g}" if abs(value) >= 5e-7 else "0"


def spread(found: Interval, unit: str = "", *, percent: int = 95) -> str:
    """A value with its interval."""
    return f"{shown(found.value)}{unit} ({percent} % interval {shown(found.low)} to {shown(found.high)})"
