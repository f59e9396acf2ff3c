"""Options under budgets whose costs depend on each other: a convolution's cost is the product of its two widths.

The knapsack wants costs that add up. So each group's costs are taken at its neighbours' present widths, the knapsack
is solved exactly for these, the widths move, and so on to a fixed point. What it finds is only ever judged by the cost
that it really has: repaired where that is above a budget, and improved by single moves and exchanges of two groups
whose joint cost is counted in full. The exact, slow solution that this is held against is in `joint.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fusepress.pipeline.errors import StageError
from fusepress.pipeline.graph.cost import CostTable, Unit
from fusepress.pipeline.pruning.knapsack import solve

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

UNITS = 4000  # of the knapsack inside the iteration; what rounding up to units leaves is spent by the local search
RADII = (64, 64, 64, 8, 4, 2, 1)  # levels that a group may move in one iteration: narrower, so that it settles
WINDOW = 1200  # options whose pairs the local search looks at together; wider problems look at nearer options
KICKS = 24  # random restarts of the local search from the best point
KICKED = 4  # groups that a restart moves at most
VERIFIED = 32  # exchanges whose cost is only estimated are checked in batches of so many
TINY = 1e-12  # relative to the sum of the value ranges: less is no improvement


class Meter(Protocol):
    """The cost of the model as a function of every group's option ("level"), in whole units."""

    def total(self, levels: Ints) -> Ints:
        """Cost of each row of levels: (B, G) -> (B,)."""

    def curves(self, level: Ints) -> list[Ints]:
        """Cost of the model when each group alone takes each of its options: (G,) -> G vectors (K_g,)."""

    def cross(self, level: Ints, group_S: Ints, option_S: Ints) -> Ints | None:
        """What two moves cost together beyond their sum, (S, S); None where that is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairwise:
    """A cost that is a sum of terms of one group and of terms of two: any layer table on two widths (arXiv 2504.02168).

    Attributes:
        constant: what no option changes.
        own: cost of each option of a group by itself, G vectors (K_g,).
        joint: cost of the options of two groups together, (a, b) with a < b -> (K_a, K_b).
    """

    constant: int
    own: tuple[Ints, ...]
    joint: dict[tuple[int, int], Ints]

    def total(self, levels: Ints) -> Ints:
        """Cost of each row of levels: (B, G) -> (B,)."""
        cost = np.full(levels.shape[0], self.constant, dtype=np.int64)
        for g, own in enumerate(self.own):
            cost += own[levels[:, g]]
        for (a, b), joint in self.joint.items():
            cost += joint[levels[:, a], levels[:, b]]
        return cost

    def curves(self, level: Ints) -> list[Ints]:
        """Cost of the model when each group alone takes each of its options."""
        here = int(self.total(level[None])[0])
        curves = [here + own - own[k] for own, k in zip(self.own, level, strict=True)]
        for (a, b), joint in self.joint.items():
            i, j = level[a], level[b]
            curves[a] += joint[:, j] - joint[i, j]
            curves[b] += joint[i] - joint[i, j]
        return curves

    def cross(self, level: Ints, group_S: Ints, option_S: Ints) -> Ints | None:
        """What two moves cost together beyond their sum, (S, S); the options of a group stand together."""
        cross = np.zeros((group_S.size, group_S.size), dtype=np.int64)
        first = np.searchsorted(group_S, np.arange(len(self.own) + 1))
        for (a, b), joint in self.joint.items():
            rows, columns = slice(first[a], first[a + 1]), slice(first[b], first[b + 1])
            i, j, at, to = option_S[rows], option_S[columns], level[a], level[b]
            block = joint[np.ix_(i, j)] - joint[i, to][:, None] - joint[at, j][None] + joint[at, to]
            cross[rows, columns] = block
            cross[columns, rows] = block.T
        return cross


@dataclass(frozen=True, slots=True, kw_only=True)
class Opaque:
    """A cost that can only be asked for.

    Attributes:
        count: cost of each row of levels, (B, G) -> (B,).
        sizes: options of each group.
        alone: as `Meter.curves`, where there is a faster way than asking for every row.
    """

    count: Callable[[Ints], Ints]
    sizes: tuple[int, ...]
    alone: Callable[[Ints], list[Ints]] | None = None

    def total(self, levels: Ints) -> Ints:
        """Cost of each row of levels: (B, G) -> (B,)."""
        return self.count(levels)

    def curves(self, level: Ints) -> list[Ints]:
        """Cost of the model when each group alone takes each of its options."""
        if self.alone is not None:
            return self.alone(level)
        rows = np.repeat(level[None], sum(self.sizes), axis=0)
        group_S = np.repeat(np.arange(len(self.sizes)), self.sizes)
        rows[np.arange(group_S.size), group_S] = np.concatenate([np.arange(size) for size in self.sizes])
        return np.split(self.count(rows), np.cumsum(self.sizes)[:-1])

    def cross(self, level: Ints, group_S: Ints, option_S: Ints) -> Ints | None:
        """Not known."""
        return None


def table_meter(table: CostTable, unit: Unit, ladders: Sequence[Sequence[int]], branch: str | None = None) -> Meter:
    """The costs of a model at the widths of the ladders.

    Where every tensor has at most two dimensions that groups run through, its size is a sum of products of two widths
    (a concatenated input is a sum, so each producer and the output are a pair of their own), and the cost is exactly
    `Pairwise`. The terms are read off the table itself: each group alone, and each pair that meets in a tensor, with
    all others at zero. Tensors on three pruned dimensions make the cost `Opaque`.
    """
    count = len(ladders)
    sizes = tuple(len(ladder) for ladder in ladders)
    nothing = int(table.total(unit, np.zeros(count, dtype=np.int64), branch))
    rows = np.zeros((sum(sizes), count), dtype=np.int64)
    rows[np.arange(rows.shape[0]), np.repeat(np.arange(count), sizes)] = np.concatenate([*map(np.asarray, ladders)])
    own = np.split(table.total(unit, rows, branch) - nothing, np.cumsum(sizes)[:-1])
    ones = np.eye(count, dtype=np.int64)
    alone = table.total(unit, ones, branch) - nothing
    meets = np.abs(table.coef).sum(axis=1)
    joint: dict[tuple[int, int], Ints] = {}
    for a in range(count):
        after = np.flatnonzero((meets[:, [a]] * meets).any(axis=0)[a + 1 :]) + a + 1
        if not after.size:
            continue
        factors = table.total(unit, ones[a] + ones[after], branch) - nothing - alone[a] - alone[after]
        for b, factor in zip(after.tolist(), factors.tolist(), strict=True):
            if factor:
                joint[a, b] = factor * np.multiply.outer(np.asarray(ladders[a]), np.asarray(ladders[b]))
    meter = Pairwise(constant=nothing, own=tuple(own), joint=joint)
    grid = np.array([[0] * count, [size - 1 for size in sizes], [size // 2 for size in sizes]])
    exact = _counted(table, unit, ladders, branch)
    if (meter.total(grid) == exact(grid)).all():
        return meter
    return Opaque(count=exact, sizes=sizes)


def _counted(
    table: CostTable, unit: Unit, ladders: Sequence[Sequence[int]], branch: str | None
) -> Callable[[Ints], Ints]:
    return lambda levels: table.total(unit, widths_at(ladders, levels), branch)


def widths_at(ladders: Sequence[Sequence[int]], levels: Ints) -> Ints:
    """Widths at the levels: (..., G) -> (..., G)."""
    columns = [np.asarray(ladder, dtype=np.int64)[levels[..., g]] for g, ladder in enumerate(ladders)]
    widths: Ints = np.stack(columns, axis=-1)
    return widths


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Least summed value within every budget.

    Attributes:
        values: what each option loses, G vectors (K_g,).
        meters: the costs; the first is the model's, further ones of branches.
        capacities: the most that may be spent on each.
        charge: value that a unit of unspent budget (of the first meter) loses; see `spend_all`.
    """

    values: tuple[Floats, ...]
    meters: tuple[Meter, ...]
    capacities: tuple[int, ...]
    charge: float = 0.0

    @property
    def sizes(self) -> tuple[int, ...]:
        """Options of each group."""
        return tuple(v.size for v in self.values)

    @property
    def tolerance(self) -> float:
        """A smaller difference in value is rounding."""
        return TINY * float(sum(v.max() - v.min() for v in self.values))

    def value(self, level: Ints) -> float:
        """Summed value of the options."""
        return float(sum(v[k] for v, k in zip(self.values, level, strict=True)))

    def goal(self, level: Ints) -> float:
        """Summed value, and the charge for what is not spent."""
        if not self.charge:
            return self.value(level)
        return self.value(level) + self.charge * float(self.capacities[0] - self.meters[0].total(level[None])[0])

    def fits(self, levels: Ints) -> Bools:
        """Which rows are within every budget: (B, G) -> (B,)."""
        fits = np.ones(levels.shape[0], dtype=bool)
        for meter, capacity in zip(self.meters, self.capacities, strict=True):
            fits &= meter.total(levels) <= capacity
        return fits


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The best point found: level of each group, its summed value, and knapsacks solved on the way."""

    level: tuple[int, ...]
    value: float
    iterations: int


def minimise(problem: Problem, *, seed: int = 0) -> Outcome:
    """Least summed value within every budget: fixed points of the knapsack, then local search with restarts.

    The result is feasible by the meters' own count. It is a local optimum for every single move and every exchange of
    two groups (of costs that are only asked for: up to the estimate that such exchanges are chosen by), and no proof
    of more; its distance to the proven optimum is measured against `joint.solve_joint`.

    Raises:
        StageError: no options were found within the budgets.
    """
    search = _Search(problem)
    for start in (np.zeros(len(problem.sizes), dtype=np.int64), least(problem.meters[0], problem.sizes)):
        search.settle(start, RADII)
    if search.best is None:
        raise StageError("expected options within the budget; got none; raise the budget")
    draw = np.random.default_rng(seed)
    for _ in range(KICKS if len(problem.sizes) > 1 else 0):
        search.settle(_kicked(search.best, problem.sizes, draw), RADII[-1:])
    return Outcome(level=tuple(search.best.tolist()), value=problem.value(search.best), iterations=search.iterations)


def _kicked(level: Ints, sizes: Sequence[int], draw: np.random.Generator) -> Ints:
    """A few groups at random options."""
    kicked = level.copy()
    for g in draw.choice(len(sizes), size=min(len(sizes), int(draw.integers(2, KICKED + 1))), replace=False):
        kicked[g] = draw.integers(sizes[g])
    return kicked


class _Search:
    """The best feasible point so far."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.best: Ints | None = None
        self.goal = np.inf
        self.iterations = 0
        self.seen: set[bytes] = set()

    def settle(self, level: Ints, radii: Sequence[int]) -> None:
        """Iterate knapsacks at the costs of the present widths; improve and keep every point on the way."""
        self.offer(level)
        slack, prices = 0.0, np.zeros(len(self.problem.meters))
        for radius in radii:
            step = linearised(self.problem, level, radius, slack, prices)
            self.iterations += 1
            if step is None or (step == level).all():
                break
            level = step
            self.offer(level)
            spent = [int(meter.total(level[None])[0]) for meter in self.problem.meters]
            # Two neighbours that both shrink (or both grow) cost more than their sum tells: ask for less next time.
            slack = max(0.0, slack + 0.5 * (spent[0] - self.problem.capacities[0]))  # halved, so that it settles
            prices = _priced(self.problem, spent, prices)

    def offer(self, level: Ints) -> None:
        """Repair and improve a point; keep it if it is the best."""
        key = level.tobytes()
        if key in self.seen:
            return
        self.seen.add(key)
        repaired = repair(self.problem, level)
        if repaired is None:
            return
        improved = improve(self.problem, repaired)
        goal = self.problem.goal(improved)
        if self.best is None or goal < self.goal - self.problem.tolerance:
            self.best, self.goal = improved, goal


def _priced(problem: Problem, spent: Sequence[int], prices: Floats) -> Floats:
    """Prices of the further budgets: up where one is exceeded, down where it is not."""
    scale = sum(float(v.max() - v.min()) for v in problem.values)
    raised = prices * 0.7
    for m in range(1, len(prices)):
        if spent[m] > problem.capacities[m]:
            raised[m] = max(prices[m] * 2, scale / max(1, problem.capacities[m]))
    return raised


def linearised(
    problem: Problem, level: Ints, radius: int, slack: float = 0.0, prices: Floats | None = None
) -> Ints | None:
    """The knapsack's optimum at costs that add up: those of single moves from the present widths.

    Args:
        problem: values, costs and capacities.
        level: the present option of each group.
        radius: how many options a group may move.
        slack: how much less (below zero: more) of the first budget to spend than it allows.
        prices: value of a unit of each further budget.

    Returns:
        The options, or None where the estimate allows none.
    """
    meter, capacity = problem.meters[0], problem.capacities[0]
    here = int(meter.total(level[None])[0])
    near = [
        np.arange(max(0, k - radius), min(size, k + radius + 1)) for k, size in zip(level, problem.sizes, strict=True)
    ]
    curves = [c[n] - here for c, n in zip(meter.curves(level), near, strict=True)]
    values = [v[n] - problem.charge * c for v, n, c in zip(problem.values, near, curves, strict=True)]
    for m in range(1, len(problem.meters)):
        if prices is not None and prices[m]:
            further = problem.meters[m].curves(level)
            values = [v + prices[m] * c[n] for v, c, n in zip(values, further, near, strict=True)]
    least = [int(c.min()) for c in curves]
    room = capacity - here - sum(least) - slack
    if room < 0:
        return None
    unit = max(1.0, room / UNITS)
    costs = [np.ceil((c - low) / unit).astype(np.int64) for c, low in zip(curves, least, strict=True)]
    return np.array([n[k] for n, k in zip(near, solve(values, costs, int(room / unit)), strict=True)], dtype=np.int64)


def repair(problem: Problem, level: Ints) -> Ints | None:
    """Bring a point within every budget by single moves, the least loss per cost saved first; None where they fail."""
    level = level.copy()
    option_of = _options(problem.sizes)
    while True:
        excess = np.array([int(m.total(level[None])[0]) for m in problem.meters]) - np.array(problem.capacities)
        if (excess <= 0).all():
            return level
        saved = np.zeros(option_of[0].size)
        for meter, over, capacity in zip(problem.meters, excess, problem.capacities, strict=True):
            change = _changes(meter, level)
            # What goes beyond the budget is no use, and what newly breaks another one is no repair.
            saved += np.where(change > np.maximum(0, -over), -np.inf, np.minimum(-change, max(0, int(over)))) / max(
                1, capacity
            )
        gain = np.concatenate([v - v[k] for v, k in zip(problem.values, level, strict=True)])
        useful = np.flatnonzero(saved > 0)
        if not useful.size:
            return None
        best = useful[np.argmin(gain[useful] / saved[useful])]
        level[option_of[0][best]] = option_of[1][best]


def _options(sizes: Sequence[int]) -> tuple[Ints, Ints]:
    """Group and option of each of the S = sum(K_g) flattened options."""
    return np.repeat(np.arange(len(sizes)), sizes), np.concatenate([np.arange(size) for size in sizes])


def _changes(meter: Meter, level: Ints) -> Ints:
    """Change of the cost by every single move, (S,)."""
    changes: Ints = np.concatenate(meter.curves(level)) - int(meter.total(level[None])[0])
    return changes


def improve(problem: Problem, level: Ints) -> Ints:
    """Make the best move of one group, or exchange of two, that stays within every budget, until there is none."""
    level = level.copy()
    while (better := _best_move(problem, level)) is not None:
        level = better
    return level


def _best_move(problem: Problem, level: Ints) -> Ints | None:
    group_S, option_S, near_S = _near(problem.sizes, level)
    gain_S = np.concatenate([v - v[k] for v, k in zip(problem.values, level, strict=True)])[near_S]
    changes, crosses, rooms = [], [], []
    for meter, capacity in zip(problem.meters, problem.capacities, strict=True):
        changes.append(_changes(meter, level)[near_S])
        crosses.append(meter.cross(level, group_S, option_S))
        rooms.append(capacity - int(meter.total(level[None])[0]))
    gain_S = gain_S - problem.charge * changes[0]
    single = np.all([c <= room for c, room in zip(changes, rooms, strict=True)], axis=0) & (gain_S < -problem.tolerance)
    best = np.flatnonzero(single)[np.argsort(gain_S[single], kind="stable")[:1]]
    moves: list[tuple[tuple[int, ...], float]] = [((int(s),), float(gain_S[s])) for s in best]
    # Of an exchange that gains, one side gains; the other may be any move of another group.
    up = np.flatnonzero(gain_S < -problem.tolerance)
    both = gain_S[up, None] + gain_S[None]
    fits = group_S[up, None] != group_S[None]
    for m, (change, cross, room) in enumerate(zip(changes, crosses, rooms, strict=True)):
        cost = change[up, None] + change[None]
        if cross is not None:
            cost += cross[up]
            if m == 0 and problem.charge:
                both = both - problem.charge * cross[up]
        fits &= cost <= room
    fits &= both < -problem.tolerance
    rows, columns = np.nonzero(fits)
    gains = both[rows, columns]
    exact = all(cross is not None for cross in crosses)
    order = [int(np.argmin(gains))] if exact and gains.size else np.argsort(gains, kind="stable").tolist()
    moves += [((int(up[rows[k]]), int(columns[k])), float(gains[k])) for k in order[: VERIFIED * 8]]
    moves.sort(key=lambda move: move[1])
    return _first_fitting(problem, level, [move for move, _ in moves], group_S, option_S)


def _first_fitting(
    problem: Problem, level: Ints, moves: Sequence[tuple[int, ...]], group_S: Ints, option_S: Ints
) -> Ints | None:
    """The first of the moves that is within the budgets by exact count and is an improvement."""
    goal = problem.goal(level)
    for start in range(0, len(moves), VERIFIED):
        batch = moves[start : start + VERIFIED]
        rows = np.repeat(level[None], len(batch), axis=0)
        for row, move in zip(rows, batch, strict=True):
            for s in move:
                row[group_S[s]] = option_S[s]
        for k in np.flatnonzero(problem.fits(rows)):
            if problem.goal(rows[k]) < goal - problem.tolerance:
                fitting: Ints = rows[k].copy()
                return fitting
    return None


def _near(sizes: Sequence[int], level: Ints) -> tuple[Ints, Ints, Ints]:
    """Options near the present ones, at most about WINDOW: their group, option and place in the flattened order."""
    radius = max(sizes)
    while radius > 1 and sum(min(size, 2 * radius + 1) for size in sizes) > WINDOW:
        radius -= 1
    group_S, option_S = _options(sizes)
    near = np.flatnonzero(np.abs(option_S - level[group_S]) <= radius)
    return group_S[near], option_S[near], near


def spend_all(problem: Problem, *, seed: int = 0) -> Outcome:
    """As `minimise`, but no step towards a group's first option may be left that every budget would allow.

    Kept score is to fill the budget, also with channels of negative score: what was measured as harmful is seldom so
    once the neighbours have gone, and a budget says how large the model shall be. So unspent budget is charged: the
    least charge (of those at which some step changes its sign) under which the optimum leaves nothing larger than the
    cheapest steps, and what is left then goes to the steps of least loss per cost.
    """
    plain = minimise(problem, seed=seed)
    level = np.array(plain.level, dtype=np.int64)
    if not _steps_up(problem, level).size:
        return plain
    iterations = plain.iterations
    charges = _charges(problem)
    outcome, low, high = plain, -1, len(charges)
    while high - low > 1:
        middle = (low + high) // 2
        trial = minimise(replace(problem, charge=charges[middle]), seed=seed)
        iterations += trial.iterations
        if _steps_up(problem, np.array(trial.level)).size:
            low = middle
        else:
            outcome, high = trial, middle
    level = fill(problem, np.array(outcome.level, dtype=np.int64))
    return Outcome(level=tuple(level.tolist()), value=problem.value(level), iterations=iterations)


def _charges(problem: Problem) -> list[float]:
    """Loss per cost of the steps that lose by going up, at dense neighbours, ascending and each once."""
    curves = problem.meters[0].curves(np.zeros(len(problem.sizes), dtype=np.int64))
    rates = [(v[:-1] - v[1:]) / np.maximum(1, c[:-1] - c[1:]) for v, c in zip(problem.values, curves, strict=True)]
    rate = np.concatenate(rates)
    return [float(charge) for charge in np.unique(rate[rate > 0] * (1 + 1e-9))]


def _steps_up(problem: Problem, level: Ints) -> Ints:
    """Groups whose next option towards the first one is within every budget."""
    groups = np.flatnonzero(level > 0)
    rows = np.repeat(level[None], groups.size, axis=0)
    rows[np.arange(groups.size), groups] -= 1
    fitting: Ints = groups[problem.fits(rows)] if groups.size else groups
    return fitting


def fill(problem: Problem, level: Ints) -> Ints:
    """Steps towards the first options while any fits, the least loss (greatest gain) per cost first."""
    level = level.copy()
    while (groups := _steps_up(problem, level)).size:
        curves = problem.meters[0].curves(level)
        here = int(problem.meters[0].total(level[None])[0])

        def rate(g: int, curves: list[Ints] = curves, here: int = here) -> float:
            k = int(level[g])
            return float(problem.values[g][k - 1] - problem.values[g][k]) / max(1, int(curves[g][k - 1]) - here)

        level[min(groups.tolist(), key=lambda g: (rate(g), g))] -= 1
    return level


def least(meter: Meter, sizes: Sequence[int]) -> Ints:
    """Levels of (nearly) least cost: the last options, then single moves that still save, as latency may step."""
    level = np.array(sizes, dtype=np.int64) - 1
    group_S, option_S = _options(sizes)
    while (change := _changes(meter, level)).min() < 0:
        best = int(np.argmin(change))
        level[group_S[best]] = option_S[best]
    return level


__all__ = [
    "Meter",
    "Opaque",
    "Outcome",
    "Pairwise",
    "Problem",
    "fill",
    "improve",
    "least",
    "linearised",
    "minimise",
    "repair",
    "spend_all",
    "table_meter",
    "widths_at",
]
