"""Options under budgets whose costs depend on each other: a convolution's cost is the product of its two widths.

The knapsack wants costs that add up. So each group's costs are taken at its neighbours' present widths, the knapsack
is solved exactly for these, the widths move, and so on to a fixed point. What it finds is only ever judged by the cost
that it really has: repaired where that is above a budget, and improved by single moves and exchanges of two groups
whose joint cost is counted in full. The exact, slow solution that this is held against is in `joint.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fusepress.pipeline.errors import StageError
from fusepress.pipeline.graph.cost import CostTable, Unit
from fusepress.pipeline.pruning.knapsack import solve

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

UNITS = 4000  # of the knapsack inside the iteration; what rounding leaves or lacks is mended by the local search
RADII = (64, 64, 64, 8, 4, 2, 1)  # levels that a group may move in one iteration: narrower, so that it settles
WINDOW = 600  # options whose pairs the local search looks at together; wider problems look at nearer options
SAMPLED = 64  # random widths at which the pairs must tell the table's cost, twice
DENSE = 2000  # options up to which their pairwise costs are kept as one full matrix (32 MB)
KICKS = 24  # random restarts of the local search from the best point
KICKED = 4  # groups that a restart moves at most
VERIFIED = 16  # exchanges whose cost is only estimated are checked in batches of so many
TINY = 1e-12  # relative to the sum of the value ranges: less is no improvement


class Meter(Protocol):
    """The cost of the model as a function of every group's option ("level"), in whole units.

    The options of all groups one after the other are numbered 0 to S - 1; S = sum(K_g).

    Attributes:
        exact: whether `changes` and `cross` together tell the cost of an exchange of two groups exactly.
    """

    exact: bool

    def total(self, levels: Ints) -> Ints:
        """Cost of each row of levels: (B, G) -> (B,)."""

    def changes(self, level: Ints) -> Ints:
        """Change of the cost when one group alone takes another option: (G,) -> (S,)."""

    def cross(self, level: Ints, rows_R: Ints, columns_C: Ints) -> Ints | None:
        """What two such moves of different groups cost beyond their sum, (R, C); None where that is not known."""


class Pairwise:
    """A cost that is a sum of terms of one group and of terms of two: any layer table on two widths (arXiv 2504.02168).

    Attributes:
        constant: what no option changes.
        own: cost of each option of a group by itself, G vectors (K_g,).
        joint: cost of the options of two groups together, (a, b) with a < b -> (K_a, K_b).
    """

    exact = True

    def __init__(self, *, constant: int, own: Sequence[Ints], joint: Mapping[tuple[int, int], Ints]) -> None:
        from scipy.sparse import coo_array

        self.constant = constant
        self.own = tuple(own)
        self.joint = dict(joint)
        self._layout = Layout([o.size for o in own])
        self._own_S = np.concatenate(self.own)
        pairs = list(self.joint.items())
        self._a = np.array([a for (a, _), _ in pairs], dtype=np.int64)
        self._b = np.array([b for (_, b), _ in pairs], dtype=np.int64)
        self._stride = np.array([table.shape[1] for _, table in pairs], dtype=np.int64)
        sizes = [table.size for _, table in pairs]
        self._start = np.cumsum([0, *sizes[:-1]], dtype=np.int64)[: len(pairs)]
        self._joint_T = np.concatenate([np.zeros(0, dtype=np.int64), *(table.ravel() for _, table in pairs)])
        first = self._layout.first
        row = [np.repeat(first[a] + np.arange(t.shape[0]), t.shape[1]) for (a, _), t in pairs]
        column = [np.tile(first[b] + np.arange(t.shape[1]), t.shape[0]) for (_, b), t in pairs]
        empty = np.zeros(0, dtype=np.int64)
        entries = (self._joint_T, (np.concatenate([empty, *row]), np.concatenate([empty, *column])))
        upper = coo_array(entries, shape=(self._own_S.size,) * 2, dtype=np.int64)
        both = (upper + upper.T).tocsr()
        self._both_SS = both.toarray() if self._own_S.size <= DENSE else both  # slicing sparse arrays is slow

    def total(self, levels: Ints) -> Ints:
        """Cost of each row of levels: (B, G) -> (B,)."""
        own = self._own_S[self._layout.first + levels].sum(axis=1)
        place = self._start + levels[:, self._a] * self._stride + levels[:, self._b]
        total: Ints = self.constant + own + self._joint_T[place].sum(axis=1)
        return total

    def changes(self, level: Ints) -> Ints:
        """Change of the cost when one group alone takes another option: (G,) -> (S,)."""
        here = self._layout.first + level
        chosen = np.zeros(self._own_S.size, dtype=np.int64)
        chosen[here] = 1
        cost_S = self._own_S + self._both_SS @ chosen
        changes: Ints = cost_S - cost_S[here][self._layout.group]
        return changes

    def cross(self, level: Ints, rows_R: Ints, columns_C: Ints) -> Ints | None:
        """What two such moves of different groups cost beyond their sum, (R, C)."""
        here = self._layout.first + level
        group_R, group_C = self._layout.group[rows_R], self._layout.group[columns_C]
        cross = self._cut(rows_R, columns_C)
        cross -= self._cut(rows_R, here)[:, group_C]
        cross -= self._cut(here, columns_C)[group_R]
        cross += self._cut(here, here)[np.ix_(group_R, group_C)]
        return cross

    def _cut(self, rows: Ints, columns: Ints) -> Ints:
        if isinstance(self._both_SS, np.ndarray):
            return self._both_SS[np.ix_(rows, columns)]
        cut: Ints = self._both_SS[rows][:, columns].toarray()
        return cut


class Layout:
    """Where the options of each group stand among all: `first` (G,), and of each of the S its `group` and `option`."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = tuple(sizes)
        self.first: Ints = np.cumsum([0, *sizes], dtype=np.int64)[:-1]
        self.group: Ints = np.repeat(np.arange(len(sizes)), sizes)
        self.option: Ints = np.arange(self.group.size) - self.first[self.group]


class Opaque:
    """A cost that can only be asked for.

    Attributes:
        count: cost of each row of levels, (B, G) -> (B,).
        guide: what is known of single groups and pairs, to choose exchanges by; costs are asked for before a move is
            made.
        trusted: single moves are chosen by the guide too, where asking for all of them is dear.
    """

    exact = False

    def __init__(
        self,
        count: Callable[[Ints], Ints],
        sizes: Sequence[int],
        guide: Pairwise | None = None,
        *,
        trusted: bool = False,
    ) -> None:
        self.count = count
        self.guide = guide
        self.trusted = trusted
        self._layout = Layout(sizes)

    def total(self, levels: Ints) -> Ints:
        """Cost of each row of levels: (B, G) -> (B,)."""
        return self.count(levels)

    def changes(self, level: Ints) -> Ints:
        """Change of the cost when one group alone takes another option: (G,) -> (S,)."""
        if self.guide is not None and self.trusted:
            return self.guide.changes(level)
        rows = np.repeat(level[None], self._layout.group.size, axis=0)
        rows[np.arange(rows.shape[0]), self._layout.group] = self._layout.option
        changes: Ints = self.count(rows) - self.count(level[None])[0]
        return changes

    def cross(self, level: Ints, rows_R: Ints, columns_C: Ints) -> Ints | None:
        """What two such moves of different groups cost beyond their sum by the guide, (R, C); None without one."""
        return None if self.guide is None else self.guide.cross(level, rows_R, columns_C)


def table_meter(table: CostTable, unit: Unit, ladders: Sequence[Sequence[int]], branch: str | None = None) -> Meter:
    """The costs of a model at the widths of the ladders.

    Where every tensor has at most two dimensions that groups run through, its size is a sum of products of two widths
    (a concatenated input is a sum, so each producer and the output are a pair of their own), and the cost is exactly
    `Pairwise`. Pruning three dimensions of a tensor, or removing one of the several groups inside a block, ties more
    than two groups: then the table itself is asked (`Opaque`), and the pairs only guide.
    """
    sizes = [len(ladder) for ladder in ladders]
    exact = _counted(table, unit, ladders, branch)
    meter = pairs_of(exact, ladders, _meetings(table), products=True)
    draw = np.random.default_rng(0)
    last = np.array(sizes) - 1
    sample = draw.integers(0, last + 1, size=(SAMPLED, len(sizes)))
    sample = np.concatenate([np.where(draw.random(sample.shape) < 0.5, last, sample), sample, last[None]])
    if (meter.total(sample) == exact(sample)).all():
        return meter
    return Opaque(exact, sizes, meter)


def pairs_of(
    count: Callable[[Ints], Ints], ladders: Sequence[Sequence[int]], meetings: Bools, *, products: bool
) -> Pairwise:
    """The terms of one and of two groups in a cost, read off by moving groups from the dense model.

    Args:
        count: cost of each row of levels, (B, G) -> (B,).
        ladders: widths of each group's options, dense first.
        meetings: which groups may have a term together, (G, G).
        products: such terms are proportional to both changes of width, so that one question tells them all (but for
            width 0). Otherwise every pair of options is asked for, and only two removed groups are taken to cost what
            they do each alone.
    """
    layout = Layout([len(ladder) for ladder in ladders])
    dense = int(count(np.zeros((1, len(ladders)), dtype=np.int64))[0])
    alone = np.zeros((layout.group.size, len(ladders)), dtype=np.int64)
    alone[np.arange(layout.group.size), layout.group] = layout.option
    own = np.split(count(alone) - dense, layout.first[1:])
    joint: dict[tuple[int, int], Ints] = {}
    for a, b in zip(*(side.tolist() for side in np.nonzero(np.triu(meetings, 1))), strict=True):
        pair = _pair(count, (a, b), ladders, own[a], own[b], dense, products=products)
        if pair.any():
            joint[a, b] = pair
    return Pairwise(constant=dense, own=own, joint=joint)


def _meetings(table: CostTable) -> Bools:
    """Groups whose widths multiply in some tensor, or one of which removes what the other runs through, (G, G)."""
    touched: Bools = (table.coef != 0).any(axis=1)
    if table.gone is not None and table.dead is not None:
        touched = touched | table.gone | (touched @ table.dead.T)
    meetings: Bools = (touched.T.astype(np.int64) @ touched.astype(np.int64)) > 0
    return meetings


def _pair(
    count: Callable[[Ints], Ints],
    pair: tuple[int, int],
    ladders: Sequence[Sequence[int]],
    *alone: Any,
    products: bool,
) -> Ints:
    """What two groups' options cost beyond the sum of each alone, from the dense model, (K_a, K_b)."""
    (a, b), (own_a, own_b, dense) = pair, alone
    width_a, width_b = np.asarray(ladders[a]), np.asarray(ladders[b])
    none_a, none_b = (width_a == 0)[:, None], (width_b == 0)[None]
    asked = none_a | none_b if products else ~(none_a & none_b)
    asked[1:2, 1:2] |= products  # for the factor
    asked[0] = asked[:, 0] = False  # one of them is dense: nothing beyond the sum
    i, j = np.nonzero(asked)
    rows = np.zeros((i.size, len(ladders)), dtype=np.int64)
    rows[:, a], rows[:, b] = i, j
    beyond = count(rows) - own_a[i] - own_b[j] - dense
    joint = np.zeros(asked.shape, dtype=np.int64)
    if products and asked[1:2, 1:2].any() and width_a[1] and width_b[1]:
        change = np.multiply.outer(width_a - width_a[0], width_b - width_b[0])
        at = int(np.flatnonzero((i == 1) & (j == 1))[0])
        joint = change * (int(beyond[at]) // int(change[1, 1]))
    joint[i, j] = beyond
    return joint


def _counted(
    table: CostTable, unit: Unit, ladders: Sequence[Sequence[int]], branch: str | None
) -> Callable[[Ints], Ints]:
    return lambda levels: table.total(unit, widths_at(ladders, levels), branch)


def widths_at(ladders: Sequence[Sequence[int]], levels: Ints) -> Ints:
    """Widths at the levels: (..., G) -> (..., G)."""
    columns = [np.asarray(ladder, dtype=np.int64)[levels[..., g]] for g, ladder in enumerate(ladders)]
    widths: Ints = np.stack(columns, axis=-1)
    return widths


class Problem:
    """Least summed value within every budget.

    Attributes:
        values: what each option loses, G vectors (K_g,).
        meters: the costs; the first is the model's, further ones of branches.
        capacities: the most that may be spent on each.
        charge: value that a unit of unspent budget (of the first meter) loses; see `spend_all`.
    """

    def __init__(
        self,
        values: Sequence[npt.NDArray[Any]],
        meters: Sequence[Meter],
        capacities: Sequence[int] | Ints,
        *,
        charge: float = 0.0,
    ) -> None:
        self.values = tuple(np.asarray(v, dtype=np.float64) for v in values)
        self.meters = tuple(meters)
        self.capacities = np.asarray(capacities, dtype=np.int64)
        self.charge = charge
        self.layout = Layout([v.size for v in self.values])
        self.value_S = np.concatenate(self.values)
        self.tolerance = TINY * sum(float(v.max() - v.min()) for v in self.values)

    def charged(self, charge: float) -> Problem:
        """The same problem with another charge."""
        return Problem(self.values, self.meters, self.capacities, charge=charge)

    def value(self, level: Ints) -> float:
        """Summed value of the options."""
        return float(self.value_S[self.layout.first + level].sum())

    def gains(self, level: Ints) -> Floats:
        """Change of the value by every single move, (S,)."""
        gains: Floats = self.value_S - self.value_S[self.layout.first + level][self.layout.group]
        return gains

    def spent(self, level: Ints) -> Ints:
        """Cost by every meter, (M,)."""
        return np.array([int(meter.total(level[None])[0]) for meter in self.meters], dtype=np.int64)

    def goal(self, level: Ints) -> float:
        """Summed value, and the charge for what is not spent."""
        unspent = int(self.capacities[0]) - int(self.meters[0].total(level[None])[0]) if self.charge else 0
        return self.value(level) + self.charge * unspent

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


def minimise(problem: Problem, *, kicks: int | None = None, seed: int = 0) -> Outcome:
    """Least summed value within every budget: fixed points of the knapsack, then local search with restarts.

    The result is feasible by the meters' own count. It is a local optimum for every single move and every exchange of
    two groups (of costs that are only asked for: up to the estimate that such exchanges are chosen by), and no proof
    of more; its distance to the proven optimum is measured against `joint.solve_joint`.

    Args:
        problem: values, costs and budgets.
        kicks: restarts from the best point with a few groups moved at random; by default two a group, at most KICKS.
        seed: of the restarts.

    Raises:
        StageError: no options were found within the budgets.
    """
    search = _Search(problem)
    if kicks is None:
        kicks = min(KICKS, 2 * problem.layout.first.size)
    guided = _guided(problem)
    if guided is not None:
        # What the pairs say is nearly right, and quick: search by them, and ask for the costs of what that finds.
        guess = _Search(guided)
        guess.search(kicks, seed)
        if guess.best is not None:
            search.offer(guess.best)
        kicks = 0
    search.search(kicks, seed)
    if search.best is None:
        raise StageError("expected options within every budget; got none; raise the budgets")
    return Outcome(level=tuple(search.best.tolist()), value=problem.value(search.best), iterations=search.iterations)


def _guided(problem: Problem) -> Problem | None:
    """The problem by what guides its trusted meters; None where none is."""
    guides = [m.guide if isinstance(m, Opaque) and m.trusted and m.guide else m for m in problem.meters]
    if all(guide is meter for guide, meter in zip(guides, problem.meters, strict=True)):
        return None
    return Problem(problem.values, guides, problem.capacities, charge=problem.charge)


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

    def search(self, kicks: int, seed: int) -> None:
        """From both ends of the ladders, then restarts from the best point."""
        layout = self.problem.layout
        for start in (np.zeros(layout.first.size, dtype=np.int64), least(self.problem.meters[0], layout)):
            self.settle(start, RADII)
        draw = np.random.default_rng(seed)
        for _ in range(kicks if self.best is not None else 0):
            assert self.best is not None
            self.settle(_kicked(self.best, layout.sizes, draw), RADII[-1:])

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
            over = self.problem.spent(level) - self.problem.capacities
            # Two neighbours that both shrink (or both grow) cost more than their sum tells: ask for less next time,
            # by half of what is missing, so that it settles.
            slack = max(0.0, slack + 0.5 * int(over[0]))
            prices = _priced(self.problem, over, prices)

    def offer(self, level: Ints) -> None:
        """Repair and improve a point; keep it if it is the best."""
        if level.tobytes() in self.seen:
            return
        self.seen.add(level.tobytes())
        repaired = repair(self.problem, level)
        if repaired is None:
            return
        improved = improve(self.problem, repaired)
        goal = self.problem.goal(improved)
        if self.best is None or goal < self.goal - self.problem.tolerance:
            self.best, self.goal = improved, goal


def _priced(problem: Problem, over: Ints, prices: Floats) -> Floats:
    """Prices of the further budgets: up where one is exceeded, down where it is not."""
    scale = sum(float(v.max() - v.min()) for v in problem.values)
    first = scale / np.maximum(1, problem.capacities)
    raised: Floats = np.where(over > 0, np.maximum(2 * prices, first), 0.7 * prices)
    raised[0] = 0.0  # the knapsack itself keeps the first
    return raised


def linearised(
    problem: Problem, level: Ints, radius: int, slack: float = 0.0, prices: Floats | None = None
) -> Ints | None:
    """The knapsack's optimum at costs that add up: those of single moves from the present widths.

    Args:
        problem: values, costs and capacities.
        level: the present option of each group.
        radius: how many options a group may move.
        slack: how much less of the first budget to spend than it allows.
        prices: value of a unit of each further budget.

    Returns:
        The options, or None where the estimate allows none.
    """
    layout = problem.layout
    cost_S = problem.meters[0].changes(level)
    value_S = problem.value_S - problem.charge * cost_S
    for price, meter in zip(prices if prices is not None else (), problem.meters, strict=False):
        if price:
            value_S = value_S + price * meter.changes(level)
    near = [
        slice(first + max(0, at - radius), first + min(size, at + radius + 1))
        for first, at, size in zip(layout.first.tolist(), level.tolist(), layout.sizes, strict=True)
    ]
    least_G = [int(cost_S[n].min()) for n in near]
    room = int(problem.capacities[0] - problem.meters[0].total(level[None])[0]) - sum(least_G) - slack
    if room < 0:
        return None
    unit = max(1.0, room / UNITS)
    # Rounded to the nearest unit: that errs both ways and hardly adds up, and the budget is checked by true costs.
    costs = [np.rint((cost_S[n] - low) / unit).astype(np.int64) for n, low in zip(near, least_G, strict=True)]
    chosen = solve([value_S[n] for n in near], costs, int(room / unit))
    return np.array([n.start + k for n, k in zip(near, chosen, strict=True)], dtype=np.int64) - layout.first


def repair(problem: Problem, level: Ints) -> Ints | None:
    """Bring a point within every budget by single moves, the least loss per cost saved first; None where they fail."""
    level = level.copy()
    layout = problem.layout
    while ((over := problem.spent(level) - problem.capacities) > 0).any():
        saved = np.zeros(layout.group.size)
        for meter, excess, capacity in zip(problem.meters, over.tolist(), problem.capacities.tolist(), strict=True):
            change = meter.changes(level)
            # What goes beyond the budget is no use, and what newly breaks another one is no repair.
            use = np.where(change > max(0, -excess), -np.inf, np.minimum(-change, max(0, excess)))
            saved += use / max(1, capacity)
        useful = np.flatnonzero(saved > 0)
        if not useful.size:
            return None
        best = useful[np.argmin(problem.gains(level)[useful] / saved[useful])]
        level[layout.group[best]] = layout.option[best]
    return level


def improve(problem: Problem, level: Ints) -> Ints:
    """Moves of one group while any improves, then the best exchange of two, until none is left within the budgets."""
    while (better := _best_move(problem, level)) is not None:
        level = better
    return level


def _best_move(problem: Problem, level: Ints) -> Ints | None:
    near_N = _near(problem.layout, level)
    rooms = problem.capacities - problem.spent(level)
    changes = [meter.changes(level)[near_N] for meter in problem.meters]
    gain_N = problem.gains(level)[near_N] - problem.charge * changes[0]
    gains = gain_N < -problem.tolerance
    single = np.all([change <= room for change, room in zip(changes, rooms, strict=True)], axis=0) & gains
    exact = all(meter.exact for meter in problem.meters)
    if single.any():
        order = np.flatnonzero(single)[np.argsort(gain_N[single], kind="stable")][: 1 if exact else VERIFIED]
        better = _first_fitting(problem, level, [(int(near_N[k]),) for k in order])
        if better is not None:
            return better
    # Of an exchange that gains, one side gains; the other may be any move of another group.
    up = np.flatnonzero(gains)
    group_N = problem.layout.group[near_N]
    both = gain_N[up, None] + gain_N[None]
    fits = group_N[up, None] != group_N[None]
    crosses = [meter.cross(level, near_N[up], near_N) for meter in problem.meters]
    for change, cross, room in zip(changes, crosses, rooms, strict=True):
        cost = change[up, None] + change[None]
        fits &= (cost if cross is None else cost + cross) <= room
    if problem.charge and crosses[0] is not None:
        both -= problem.charge * crosses[0]
    fits &= both < -problem.tolerance
    rows, columns = np.nonzero(fits)
    if not rows.size:
        return None
    sums = both[rows, columns]
    order = np.array([np.argmin(sums)]) if exact else np.argsort(sums, kind="stable")[: 4 * VERIFIED]
    return _first_fitting(problem, level, [(int(near_N[up[rows[k]]]), int(near_N[columns[k]])) for k in order])


def _first_fitting(problem: Problem, level: Ints, moves: Sequence[tuple[int, ...]]) -> Ints | None:
    """The first of the moves that is within the budgets by exact count and is an improvement."""
    goal = problem.goal(level)
    for start in range(0, len(moves), VERIFIED):
        batch = moves[start : start + VERIFIED]
        rows = np.repeat(level[None], len(batch), axis=0)
        for row, move in zip(rows, batch, strict=True):
            for s in move:
                row[problem.layout.group[s]] = problem.layout.option[s]
        for k in np.flatnonzero(problem.fits(rows)):
            if problem.goal(rows[k]) < goal - problem.tolerance:
                fitting: Ints = rows[k].copy()
                return fitting
    return None


def _near(layout: Layout, level: Ints) -> Ints:
    """Options near the present ones, at most about WINDOW."""
    radius = max(layout.sizes)
    while radius > 1 and sum(min(size, 2 * radius + 1) for size in layout.sizes) > WINDOW:
        radius -= 1
    return np.flatnonzero(np.abs(layout.option - level[layout.group]) <= radius)


def spend_all(problem: Problem, *, seed: int = 0) -> Outcome:
    """As `minimise`, but no step towards a group's first option may be left that every budget would allow.

    Kept score is to fill the budget, also with channels of negative score: what was measured as harmful is seldom so
    once the neighbours have gone, and a budget says how large the model shall be. So unspent budget is charged: the
    least charge (of those at which some step changes its sign) under which the optimum leaves no step that fits, and
    where none does that, what is left goes to the steps of least loss per cost.
    """
    outcome = minimise(problem, seed=seed)
    iterations = outcome.iterations
    if not _steps_up(problem, np.array(outcome.level)).size:
        return outcome
    charges = _charges(problem)
    low, high = -1, len(charges)
    while high - low > 1:
        middle = (low + high) // 2
        trial = minimise(problem.charged(charges[middle]), kicks=0)
        iterations += trial.iterations
        if _steps_up(problem, np.array(trial.level)).size:
            low = middle
        else:
            high = middle
    if charges:
        outcome = minimise(problem.charged(charges[min(high, len(charges) - 1)]), seed=seed)
        iterations += outcome.iterations
    level = fill(problem, np.array(outcome.level, dtype=np.int64))
    return Outcome(level=tuple(level.tolist()), value=problem.value(level), iterations=iterations)


def _charges(problem: Problem) -> list[float]:
    """Loss per cost of the steps that lose by going up, at dense neighbours, ascending and each once."""
    dense = np.zeros(problem.layout.first.size, dtype=np.int64)
    step = np.flatnonzero(problem.layout.option > 0)
    cost_S = problem.meters[0].changes(dense)
    rate = (problem.value_S[step - 1] - problem.value_S[step]) / np.maximum(1, cost_S[step - 1] - cost_S[step])
    # A little more than the rate itself, for there both sides of the step are worth the same.
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
        step = problem.layout.first[groups] + level[groups] - 1
        rate = problem.gains(level)[step] / np.maximum(1, problem.meters[0].changes(level)[step])
        level[groups[np.argmin(rate)]] -= 1
    return level


def least(meter: Meter, layout: Layout) -> Ints:
    """Levels of (nearly) least cost: the last options, then single moves that still save, as latency goes in stairs."""
    level = np.array(layout.sizes, dtype=np.int64) - 1
    while (change := meter.changes(level)).min() < 0:
        best = int(np.argmin(change))
        level[layout.group[best]] = layout.option[best]
    return level


__all__ = [
    "Layout",
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
    "pairs_of",
    "repair",
    "spend_all",
    "table_meter",
    "widths_at",
]
