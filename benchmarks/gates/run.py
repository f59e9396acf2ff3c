"""False PASS and false FAIL rates of the gates, and their power, on synthetic evaluations with a known truth.

python -m benchmarks.gates.run            # writes results/gates/{rates.json, rates.md, power.svg}

Finished rows are kept in a file of counts (`--cells`), so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy
from scipy import stats as distributions

from benchmarks.gates.trials import World, conditions, draws_of, replicates_of, simulate, tally, verdicts_of
from fusepress.pipeline.gates import overall
from fusepress.pipeline.recipe import AccuracyGate, GatesConfig, RobustnessGate
from fusepress.pipeline.store import atomic_write_text, sha256_file

OUT = Path(__file__).resolve().parents[1] / "results/gates"
LIMIT = 0.03
BOUND = 0.05
CELLS = Path("build/gates-cells.json")
CLUSTERS = (20, 30, 64, 150, 400)
DRIVES = (400, 900, 2500)  # the first is too short to be judged
POWER_CLUSTERS = (20, 40, 64, 90, 130, 300)
POWER_TRIALS = 500
STATED_CLUSTERS = 64  # street's evaluation: 256 frames of 64 streets
GATES_TOGETHER = 6
ACCURACY = GatesConfig(accuracy=AccuracyGate(max_drop=LIMIT))


def code_sha256() -> str:
    """Of all that shapes a count: the gates, the trials and what is asked of them."""
    files = [*sorted(Path(inspect.getfile(overall)).parent.glob("*.py")), Path(inspect.getfile(World)), Path(__file__)]
    return hashlib.sha256("".join(sha256_file(file) for file in files).encode()).hexdigest()


class Cells:
    """Counts of finished rows, by what shapes them, which is the code as well."""

    def __init__(self, path: Path, replicates: int, seed: int) -> None:
        self.path = path
        self.facts = [replicates, seed, np.__version__, scipy.__version__, code_sha256()]
        self.counts: dict[str, dict[str, int]] = json.loads(path.read_text()) if path.is_file() else {}

    def get(self, name: str, trials: int, make: Callable[[], Mapping[str, int]]) -> dict[str, int]:
        """The counts of a row, made now unless they are there."""
        key = json.dumps([name, trials, *self.facts])
        if key not in self.counts:
            self.counts[key] = dict(make())
            atomic_write_text(self.path, json.dumps(self.counts, indent=1) + "\n")
            print(name, self.counts[key], flush=True)
        return self.counts[key]


def rate(count: int, trials: int) -> dict[str, Any]:
    """A share with its exact (Clopper-Pearson) 95 % interval."""
    found = distributions.binomtest(count, trials).proportion_ci(0.95, method="exact")
    return {"count": count, "trials": trials, "rate": count / trials, "low": found.low, "high": found.high}


def at_the_limit(cells: Cells, trials: int, replicates: int, seed: int) -> list[dict[str, Any]]:
    """The true drop is the limit: PASS and FAIL are both errors, and nowhere are they likelier."""
    worlds = [World(clusters=k, drop=LIMIT, losses=losses) for losses in ("normal", "skewed") for k in CLUSTERS]
    worlds += [World(clusters=1, frames=n, drop=LIMIT) for n in DRIVES]
    rows = []
    for world in worlds:
        kind = "single drive, memory 0.9" if world.clusters == 1 else f"{world.losses} losses"
        name = f"{kind} {world.clusters} {world.frames}"
        make = partial(tally, world, ACCURACY, trials=trials, replicates=replicates, seed=seed)
        rows.append(_row(kind, world, cells.get(name, trials, make), trials))
    return rows


def _row(kind: str, world: World, counts: Mapping[str, int], trials: int) -> dict[str, Any]:
    return {
        "kind": kind,
        "clusters": world.clusters,
        "samples": world.clusters * world.frames,
        "false_pass": rate(counts.get("PASS", 0), trials),
        "false_fail": rate(counts.get("FAIL", 0), trials),
        "either": rate(counts.get("PASS", 0) + counts.get("FAIL", 0), trials),
    }


def extra_drop(cells: Cells, trials: int, replicates: int, seed: int) -> list[dict[str, Any]]:
    """The robustness gate, whose true extra drop is the limit: four scores, paired."""
    world = World(clusters=STATED_CLUSTERS, drop=LIMIT)
    counts = cells.get("extra drop", trials, partial(_extra_drop_counts, world, trials, replicates, seed))
    return [_row("extra drop under a failure", world, counts, trials)]


def _extra_drop_counts(world: World, trials: int, replicates: int, seed: int) -> Counter[str]:
    gates = GatesConfig(robustness={"failure": RobustnessGate(max_extra_drop=LIMIT)})
    draws, generator = draws_of(world, replicates, seed), np.random.default_rng([seed, 77])
    clean = conditions(simulate(replace(world, drop=0.01), trials, generator), draws)
    failed = conditions(simulate(replace(world, drop=0.01 + LIMIT), trials, generator), draws)
    pairs = zip(clean, failed, strict=True)
    return Counter(verdicts_of(replicates_of(world, c, failure=f), gates)[0].verdict for c, f in pairs)


def released(cells: Cells, trials: int, replicates: int, seed: int) -> list[dict[str, Any]]:
    """Six gates of one release (one on the clean samples, five under failures), dependent through the clean scores."""
    rows = []
    for name, beyond in (
        ("all six exactly at their limits", GATES_TOGETHER),
        ("one at its limit, five well within", 1),
    ):
        found = cells.get(name, trials, partial(_releases, beyond, trials, replicates, seed))
        rows.append({"truth": name} | {key: rate(count, trials) for key, count in found.items()})
    return rows


def _releases(at_limit: int, trials: int, replicates: int, seed: int) -> dict[str, int]:
    world = World(clusters=STATED_CLUSTERS, drop=LIMIT)
    names = [f"failure{i}" for i in range(GATES_TOGETHER - 1)]
    gates = GatesConfig(
        accuracy=AccuracyGate(max_drop=LIMIT),
        robustness={name: RobustnessGate(max_extra_drop=LIMIT) for name in names},
    )
    drops = [2 * LIMIT if i < at_limit - 1 else 0.0 for i in range(len(names))]
    draws, generator = draws_of(world, replicates, seed), np.random.default_rng([seed, at_limit])
    parts = [conditions(simulate(replace(world, drop=d), trials, generator), draws) for d in (LIMIT, *drops)]
    found = {"released": 0, "failed": 0, "failed_without_holm": 0}
    for clean, *failed in zip(*parts, strict=True):
        verdicts = verdicts_of(replicates_of(world, clean, **dict(zip(names, failed, strict=True))), gates)
        verdict = overall(verdicts)[0]
        found["released"] += verdict == "PASS"
        found["failed"] += verdict == "FAIL"
        alone = any(v.low is not None and v.limit is not None and v.low > v.limit for v in verdicts)
        found["failed_without_holm"] += alone
    return found


def power(cells: Cells, trials: int, replicates: int, seed: int) -> list[dict[str, Any]]:
    """How often a good release passes and a bad one is caught, by the number of clusters."""
    rows = []
    for clusters in POWER_CLUSTERS:
        row: dict[str, Any] = {"clusters": clusters, "samples": clusters * World(clusters=clusters, drop=0).frames}
        for share, says in ((0.0, "PASS"), (0.5, "PASS"), (2.0, "FAIL")):
            world = World(clusters=clusters, drop=share * LIMIT)
            make = partial(tally, world, ACCURACY, trials=trials, replicates=replicates, seed=seed)
            counts = cells.get(f"power {clusters} {share:g}", trials, make)
            wanted = counts.get(says, 0) + (counts.get("ANOMALOUS", 0) if says == "PASS" else 0)
            row[f"{says} at {share:g} x limit"] = rate(wanted, trials)
        rows.append(row)
    return rows


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _percent(found: Mapping[str, Any]) -> str:
    return f"{100 * found['rate']:.1f} % ({100 * found['low']:.1f} to {100 * found['high']:.1f})"


def markdown(result: Mapping[str, Any]) -> str:
    """The tables."""
    limits = [
        [
            r["kind"],
            f"{r['clusters']}",
            f"{r['samples']:,}",
            *(_percent(r[k]) for k in ("false_pass", "false_fail", "either")),
        ]
        for r in result["at_the_limit"]
    ]
    releases = [
        [r["truth"], *(_percent(r[k]) for k in ("released", "failed", "failed_without_holm"))]
        for r in result["releases"]
    ]
    keys = [key for key in result["power"][0] if key not in ("clusters", "samples")]
    powers = [[f"{r['clusters']}", f"{r['samples']:,}", *(_percent(r[key]) for key in keys)] for r in result["power"]]
    versions = result["versions"]
    return f"""# False alarms and power of the gates

`{result["command"]}`: {result["trials"]:,} synthetic evaluations a row, judged by the gates' own code;
{result["replicates"]:,} bootstrap replicates, limit {LIMIT}. In brackets exact (Clopper-Pearson) 95 % intervals. Numpy
{versions["numpy"]}, scipy {versions["scipy"]}. The worlds are described in `benchmarks/gates/trials.py`; nothing here
was measured on a trained network.

## The true drop is exactly the limit

PASS and FAIL are both errors here, and nowhere else are they likelier. Each is nominally 2.5 %, both together 5 %.

{_table(["Losses", "Clusters", "Samples", "False PASS", "False FAIL", "Either"], limits)}

## A release of {GATES_TOGETHER} gates, {STATED_CLUSTERS} clusters

{_table(["Truth", "Released", "FAIL", "FAIL without Holm's procedure"], releases)}

## Power

{result["power"][0][keys[0]]["trials"]:,} evaluations a cell. Normal losses, frames in clusters of 4, spread 0.05
between clusters and 0.05 between frames. PASS counts ANOMALOUS, for at no drop a part is better than dense beyond
noise.

{_table(["Clusters", "Samples", *keys], powers)}

![power](power.svg)
"""


def draw_power(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Rates against the number of clusters."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "gates"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4))
    for key, mark in zip([k for k in rows[0] if k not in ("clusters", "samples")], "os^", strict=True):
        x, rates = [r["clusters"] for r in rows], [r[key] for r in rows]
        errors = [[f["rate"] - f["low"] for f in rates], [f["high"] - f["rate"] for f in rates]]
        axes.errorbar(x, [f["rate"] for f in rates], yerr=errors, marker=mark, capsize=2, label=key)
    axes.axhline(0.95, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xscale="log", xlabel="clusters of 4 frames", ylabel="share of trials", ylim=(0, 1.02))
    axes.set_xticks(x, [str(value) for value in x])
    axes.minorticks_off()
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Run everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--replicates", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--cells", type=Path, default=CELLS)
    given = parser.parse_args()
    arguments = (given.trials, given.replicates, given.seed)
    cells = Cells(given.cells, given.replicates, given.seed)
    result = {
        "command": "python -m benchmarks.gates.run --trials {} --replicates {} --seed {}".format(*arguments),
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__},
        "trials": given.trials,
        "replicates": given.replicates,
        "seed": given.seed,
        "limit": LIMIT,
        "at_the_limit": at_the_limit(cells, *arguments) + extra_drop(cells, *arguments),
        "releases": released(cells, *arguments),
        "power": power(cells, POWER_TRIALS, given.replicates, given.seed),
    }
    given.out.mkdir(parents=True, exist_ok=True)
    atomic_write_text(given.out / "rates.json", json.dumps(result, indent=1) + "\n")
    atomic_write_text(given.out / "rates.md", markdown(result))
    draw_power(result["power"], given.out / "power.svg")


if __name__ == "__main__":
    main()
