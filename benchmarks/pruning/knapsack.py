"""The allocation's solvers: speed, exactness, what rounding costs, and the gap to the proven optimum on two widths.

    OMP_NUM_THREADS=1 python -m benchmarks.pruning.knapsack [--limit 30] [--results FILE]

Speed: 200 groups x 32 options x 20,000 units, processor seconds of one thread (the machine may be shared: the wall
time stands beside them), best of five, beside a plain numpy programme (one table of all options a
group) on the same instance, and beside nested Python loops on a smaller one. Losses grow and costs fall along a group's
options, so that no option is dominated and dropped. Exactness: the mixed-integer optimum (HiGHS) on the same whole
costs. Discretisation gap: loss with costs rounded up to units over the mixed-integer optimum with the real costs.

Two widths: layers cost the product of two groups' widths. The fast search is held to the joint mixed-integer programme
(as MDP, arXiv 2504.02168, poses it) on random instances and on street at budgets of its MACs; HALP's way (arXiv
2110.10811), one knapsack at the dense neighbours' widths, repaired, is the control.
Writes benchmarks/results/pruning/knapsack.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fusepress.pipeline.pruning.budget import Pairwise, Problem, linearised, minimise, repair, table_meter
from fusepress.pipeline.pruning.joint import solve_joint
from fusepress.pipeline.pruning.knapsack import milp, solve

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "pruning" / "knapsack.json"
Vectors = list[npt.NDArray[Any]]


def instance(seed: int, groups: int, options: int, units: int) -> tuple[Vectors, Vectors, float]:
    """Losses that grow and real costs that fall along the options; about half of the dense cost as the budget."""
    draw = np.random.default_rng(seed)
    values = [np.concatenate([[0.0], np.cumsum(draw.random() * draw.random(options - 1))]) for _ in range(groups)]
    costs = [np.cumsum(draw.random() * draw.uniform(0.2, 1, options))[::-1].copy() for _ in range(groups)]
    budget = 0.5 * sum(float(c[0]) for c in costs)
    return values, [c * units / budget for c in costs], float(units)


def whole(costs: Vectors, unit: float = 1.0) -> Vectors:
    return [np.ceil(c / unit).astype(np.int64) for c in costs]


def naive(values: Vectors, costs: Vectors, capacity: int) -> float:
    """The same recurrence, all options of a group at once: what one writes first in numpy."""
    least = np.zeros(capacity + 1)
    units = np.arange(capacity + 1)
    for value, cost in zip(values, costs, strict=True):
        source = units[None] - cost[:, None]
        trial = np.where(source >= 0, least[np.maximum(source, 0)] + value[:, None], np.inf)
        trial.argmin(axis=0)  # the choice has to be remembered
        least = trial.min(axis=0)
    return float(least[-1])


def looped(values: Vectors, costs: Vectors, capacity: int) -> float:
    """The same in plain Python."""
    least = [0.0] * (capacity + 1)
    for value, cost in zip(values, costs, strict=True):
        options = list(zip(value.tolist(), cost.tolist(), strict=True))
        least = [min((least[b - c] + v for v, c in options if c <= b), default=float("inf")) for b in range(len(least))]
    return least[-1]


def timed(work: Callable[[], Any], times: int = 1) -> tuple[float, Any]:
    """Least processor seconds of this process (one thread), and the result."""
    seconds = []
    for _ in range(times):
        started = time.process_time()
        result = work()
        seconds.append(time.process_time() - started)
    return min(seconds), result


def summed(vectors: Vectors, chosen: list[int]) -> float:
    return float(sum(v[k] for v, k in zip(vectors, chosen, strict=True)))


def speed() -> dict[str, Any]:
    values, real, budget = instance(0, 200, 32, 20_000)
    costs, capacity = whole(real), int(budget)
    started = time.perf_counter()
    seconds, chosen = timed(lambda: solve(values, costs, capacity), 5)
    wall = (time.perf_counter() - started) / 5
    slow, value = timed(lambda: naive(values, costs, capacity))
    assert abs(value - summed(values, chosen)) < 1e-9 * value
    small, small_real, small_budget = instance(0, 20, 16, 2_000)
    small_costs = whole(small_real)
    quick, chosen = timed(lambda: solve(small, small_costs, int(small_budget)), 5)
    loops, value = timed(lambda: looped(small, small_costs, int(small_budget)))
    assert abs(value - summed(small, chosen)) < 1e-9 * value
    return {
        "groups_options_units": [200, 32, 20_000],
        "seconds": seconds,
        "mean_wall_seconds": wall,
        "plain_numpy_seconds": slow,
        "plain_numpy_ratio": slow / seconds,
        "python_groups_options_units": [20, 16, 2_000],
        "python_seconds": loops,
        "python_ratio": loops / quick,
    }


def exactness() -> dict[str, Any]:
    """Difference to the mixed-integer optimum on the same whole costs, relative to the loss."""
    rows = []
    for seed, groups, options, units in [(0, 200, 32, 20_000), *((s, 60, 16, 4_000) for s in range(1, 10))]:
        values, real, budget = instance(seed, groups, options, units)
        if seed % 2:  # not monotone either
            values = [np.abs(v + 0.3 * v.max() * np.random.default_rng(seed).normal(size=v.size)) for v in values]
        costs = whole(real)
        started = time.process_time()
        reference = summed(values, milp(values, costs, int(budget), time_limit_s=120))
        seconds = time.process_time() - started
        ours = summed(values, solve(values, costs, int(budget)))
        rows.append({"groups": groups, "relative_difference": (ours - reference) / reference, "milp_seconds": seconds})
    return {"n": len(rows), "largest": max(abs(row["relative_difference"]) for row in rows), "instances": rows}


def discretisation() -> list[dict[str, Any]]:
    """Loss with costs in units over the mixed-integer optimum with real costs, five instances of 27 and of 200.

    Last the search that the allocation uses, which counts real costs: its gap after a knapsack of `budget.UNITS` units.
    """
    rows: list[dict[str, Any]] = []
    for groups, options in ((27, 16), (200, 32)):
        problems = [instance(seed, groups, options, 1_000) for seed in range(5)]
        best = [summed(v, milp(v, c, b, time_limit_s=120)) for v, c, b in problems]
        for units in (500, 1_000, 2_000, 4_000, 20_000):
            gaps = []
            for (values, costs, budget), least in zip(problems, best, strict=True):
                chosen = solve(values, whole(costs, budget / units), units)
                assert sum(c[k] for c, k in zip(costs, chosen, strict=True)) <= budget
                gaps.append(summed(values, chosen) / least - 1)
            rows.append({"groups": groups, "units": units, "mean_gap": float(np.mean(gaps)), "largest_gap": max(gaps)})
        fine = [
            Problem(v, [Pairwise(constant=0, own=whole(c, 1e-6), joint={})], [int(b * 1e6)]) for v, c, b in problems
        ]
        gaps = [minimise(p, kicks=0).value / least - 1 for p, least in zip(fine, best, strict=True)]
        row = {"groups": groups, "units": "searched", "mean_gap": float(np.mean(gaps)), "largest_gap": max(gaps)}
        rows.append(row)
    return rows


def random_problem(seed: int, groups: int, options: int, kind: str) -> Problem:
    """Random layers between neighbours and a few others; a budget 15 to 50 % of the way from the least to dense.

    smooth: losses convex in the width; rough: not even monotone; stairs: costs in tiles of 16 channels; block: every
    fourth group may be removed.
    """
    draw = np.random.default_rng(seed)
    ladders = [8 * np.arange(n, 0, -1) for n in draw.integers(options // 2, options + 1, groups)]
    if kind == "block":
        ladders = [np.append(ladder, 0) if g % 4 == 0 else ladder for g, ladder in enumerate(ladders)]
    tiles = [-(-ladder // 16) if kind == "stairs" else ladder for ladder in ladders]
    pairs = {(g, g + 1) for g in range(groups - 1)}
    pairs |= {(a, b) for a in range(groups) for b in range(a + 2, groups) if draw.random() < 1.5 / groups}
    joint = {(a, b): int(draw.integers(1, 300)) * np.multiply.outer(tiles[a], tiles[b]) for a, b in sorted(pairs)}
    cost = Pairwise(constant=0, own=[t * int(draw.integers(0, 3000)) for t in tiles], joint=joint)
    values = []
    for ladder in ladders:
        steps = draw.random() * draw.random(ladder.size - 1) ** 2
        lost = np.cumsum(steps if kind == "rough" else np.sort(steps))
        if kind == "rough":
            lost = np.abs(lost + 0.4 * lost.max() * draw.normal(size=lost.size))
        values.append(np.concatenate([[0.0], lost]))
    sizes = np.array([ladder.size for ladder in ladders])
    least, dense = (int(cost.total(level[None])[0]) for level in (sizes - 1, 0 * sizes))
    return Problem(values, [cost], [int(least + draw.uniform(0.15, 0.5) * (dense - least))])


def compared(problem: Problem, limit: float) -> dict[str, Any]:
    """Fast search and control against the joint programme: gaps are relative to its bound."""
    cost = problem.meters[0]
    assert isinstance(cost, Pairwise)
    seconds, found = timed(lambda: minimise(problem))
    no_kicks, plain = timed(lambda: minimise(problem, kicks=0))
    assert problem.fits(np.array([found.level])).all()
    joint_seconds, proven = timed(
        lambda: solve_joint(problem.values, [cost], problem.capacities.tolist(), time_limit_s=limit)
    )
    dense = np.zeros(len(problem.values), dtype=np.int64)
    first = linearised(problem, dense, 10**6)
    # Where even the estimate at dense neighbours allows nothing, the control starts from the narrowest widths.
    control = repair(problem, first if first is not None else np.array(problem.layout.sizes) - 1)
    assert control is not None
    base = max(proven.bound, 1e-12)
    return {
        "gap": found.value / base - 1,
        "gap_without_restarts": plain.value / base - 1,
        "gap_of_one_knapsack": problem.value(control) / base - 1,
        "proven": proven.optimal,
        "seconds": seconds,
        "seconds_without_restarts": no_kicks,
        "joint_seconds": joint_seconds,
    }


def report(rows: list[dict[str, Any]], **names: Any) -> dict[str, Any]:
    gaps = ("gap", "gap_without_restarts", "gap_of_one_knapsack")
    row: dict[str, Any] = {**names, "n": len(rows), "proven": sum(bool(r["proven"]) for r in rows)}
    row |= {f"mean_{key}": float(np.mean([r[key] for r in rows])) for key in gaps}
    row |= {f"largest_{key}": max(r[key] for r in rows) for key in gaps}
    row["optimal_found"] = sum(r["gap"] < 1e-7 for r in rows)
    row |= {key: float(np.median([r[key] for r in rows])) for key in ("seconds", "joint_seconds")}
    print(json.dumps(row), flush=True)
    return row


def two_widths(limit: float) -> Iterator[dict[str, Any]]:
    for groups, options, seeds in ((8, 8, 10), (16, 12, 5), (40, 16, 1)):
        for kind in ("smooth", "rough", "stairs", "block"):
            rows = [compared(random_problem(seed, groups, options, kind), limit) for seed in range(seeds)]
            yield report(rows, groups=groups, options=options, kind=kind)


def street(limit: float) -> Iterator[dict[str, Any]]:
    """The example network: magnitude scores of its checkpoint, and three sets of random losses, at budgets of MACs."""
    from fusepress.pipeline.graph.apply import load_checkpoint
    from fusepress.pipeline.graph.cost import CostModel
    from fusepress.pipeline.graph.groups import find_groups
    from fusepress.pipeline.pruning.ladders import ladder_widths
    from fusepress.pipeline.recipe import PruneConfig, ScoreConfig
    from fusepress.pipeline.scoring.criteria import score_channels
    from fusepress.pipeline.task import first_batch, load_task

    task = load_task("task.py:StreetTask", base=ROOT / "examples" / "street")
    model = task.build_model().eval()
    load_checkpoint(model, ROOT / "examples" / "street" / "street.safetensors")
    inputs = first_batch(task, "calib", size=2).inputs
    graph = find_groups(model, inputs, task.branches, task.keep)
    cost = CostModel(graph, model, inputs)
    scores = score_channels(model, task, graph, ScoreConfig(method="magnitude"), seed=0).channel
    sets = [[np.sort(scores[g.id].astype(np.float64))[::-1] for g in graph.groups]]
    for seed in range(3):
        draw = np.random.default_rng(seed)
        sets.append([np.sort(draw.random() * draw.random(g.width) ** 3)[::-1] for g in graph.groups])
    for align in (16, 8):
        ladders = [ladder_widths(g, PruneConfig(macs=0.4), align, []) for g in graph.groups]
        meter = table_meter(cost, "macs", ladders)
        for keep in (0.6, 0.4, 0.25):
            rows = []
            for chosen in sets:
                values = [np.array([s[w:].sum() for w in ladder]) for s, ladder in zip(chosen, ladders, strict=True)]
                rows.append(compared(Problem(values, [meter], [int(keep * cost.dense_macs)]), limit))
            yield report(rows, groups=len(ladders), align=align, macs=keep, magnitude_gap=rows[0]["gap"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=30.0, help="seconds a joint programme may take")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    import scipy

    result: dict[str, Any] = {
        "command": "OMP_NUM_THREADS=1 python -m benchmarks.pruning.knapsack",
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__},
        "cpu": platform.processor() or platform.machine(),
        "joint_limit_s": arguments.limit,
    }
    for name, part in (("speed", speed), ("exactness", exactness), ("discretisation", discretisation)):
        result[name] = part()
        print(name, json.dumps(result[name]), flush=True)
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    for name, parts in (("street", street), ("two_widths", two_widths)):
        result[name] = []
        for row in parts(arguments.limit):
            result[name].append(row)
            arguments.results.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
