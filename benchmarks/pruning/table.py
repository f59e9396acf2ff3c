"""Tables and plots of the finished cells.

    python -m benchmarks.pruning.table [--reference importance_taylor] [--latency] [--measure-host]

Reads runs/pruning, writes core.json, core.md and plots into benchmarks/results/pruning. Figures are of finished cells
only, and what is missing is said. Nothing is trained here; `--latency` predicts the latency of every network on the
target of the task's recipe, `--measure-host` measures it on ONNX Runtime (on an idle machine, please).
"""

from __future__ import annotations

import argparse
import collections
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.pruning.cells import (
    CORE_BUDGETS,
    ROOT,
    SCORING_VERSION,
    SUITES,
    TASKS,
    Cell,
    Protocol,
    Results,
    planned,
)
from benchmarks.pruning.differences import REPLICATES, TIE_HALF_WIDTH, Difference, Floats, compare, load_draws
from benchmarks.pruning.methods import ALL, BY_NAME

OUT = ROOT / "benchmarks" / "results" / "pruning"
REFERENCE = "importance_taylor"
Row = dict[str, Any]


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=ROOT / "runs" / "pruning")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--reference", default=REFERENCE, help="the row that the others are compared with")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--latency", action="store_true", help="predict the latency of every network")
    parser.add_argument("--measure-host", action="store_true", help="measure it on this host's ONNX Runtime")
    parser.add_argument("--data", type=Path, help="data folder of kitti_depth, for its latencies")
    return parser.parse_args(words)


class Table:
    """Finished cells of one store, as rows of (task, kind, budget, method).

    Args:
        store: folder of the store.
        protocol: cells of other settings are left out.
    """

    def __init__(self, store: Path, protocol: Protocol | None = None) -> None:
        self.store = store
        wanted = (protocol or Protocol()).as_dict()
        self.cells = [cell for cell in Results(store).everything() if _current(cell["identity"], cell, wanted)]
        data = collections.Counter((c["cell"]["task"], c["identity"]["data"]) for c in self.cells)
        tasks = [task for task, _ in data]
        if len(set(tasks)) < len(tasks):
            raise SystemExit(f"expected one version of each task's data; got {dict(data)}; move the old cells away")
        self._draws: dict[str, Floats | None] = {}

    def select(self, task: str, kind: str, budget: float, method: str) -> dict[int, Row]:
        """Seed -> finished cell; a dense network stands beside every budget."""
        budget = 1.0 if BY_NAME[method].source == "dense" else budget
        found = {}
        for row in self.cells:
            cell = row["cell"]
            if (cell["task"], cell["kind"], cell["budget"], cell["method"]) == (task, kind, budget, method):
                found[cell["seed"]] = row
        return found

    def draws(self, row: Row) -> Floats | None:
        """Replicates of the metric on redrawn streets, larger = better."""
        if row["file"] not in self._draws:
            self._draws[row["file"]] = load_draws(self.store / "cells" / f"{row['file']}.npz")
        return self._draws[row["file"]]

    def difference(self, first: dict[int, Row], second: dict[int, Row]) -> Difference | None:
        """First row minus second, positive = better."""
        return compare(
            {seed: better(row) for seed, row in first.items()},
            {seed: better(row) for seed, row in second.items()},
            {seed: self.draws(row) for seed, row in first.items()},
            {seed: self.draws(row) for seed, row in second.items()},
        )


def _current(identity: Row, cell: Row, protocol: dict[str, Any]) -> bool:
    spec = BY_NAME.get(cell["cell"]["method"])
    same = identity["scoring_version"] == SCORING_VERSION and identity["protocol"] == protocol
    return spec is not None and same and identity["method"] == json.loads(json.dumps(spec.identity()))


def better(row: Row, when: str = "after") -> float:
    """The primary metric, larger = better."""
    value = float(row[when][row["primary"]])
    return value if row["better"] == "max" else -value


def _figure(row: Row, when: str = "after") -> float:
    return float(row[when][row["primary"]])


def summary(table: Table, task: str, kind: str, budget: float, reference: str, methods: Iterable[str]) -> list[Row]:
    """One dictionary a row that has finished cells."""
    chosen = table.select(task, kind, budget, reference)
    rows = []
    for method in methods:
        found = table.select(task, kind, budget, method)
        if not found:
            continue
        values = [_figure(row) for row in found.values()]
        macs = [row["achieved"]["macs"] for row in found.values()]
        # the dense network as it is stands beside every seed
        against = dict.fromkeys(chosen, next(iter(found.values()))) if not BY_NAME[method].train else found
        difference = table.difference(chosen, against) if method != reference else None
        rows.append(
            {
                "method": method,
                "label": BY_NAME[method].label,
                "seeds": sorted(found),
                "macs": statistics.mean(macs),
                "macs_range": [min(macs), max(macs)],
                "params": statistics.mean(row["achieved"]["params"] for row in found.values()),
                "weights": statistics.mean(row["achieved"].get("weights", 1.0) for row in found.values()),
                "before": statistics.mean(_figure(row, "before") for row in found.values()),
                "after": statistics.mean(values),
                "after_sd": statistics.stdev(values) if len(values) > 1 else None,
                "reference_minus_this": asdict(difference) if difference is not None else None,
                "score_seconds": statistics.mean(r["log"].get("score", {}).get("seconds", 0.0) for r in found.values()),
                "passes": next(iter(found.values()))["log"].get("score", {}).get("passes"),
                "latency": _latencies(table.store, found.values()),
            }
        )
    return rows


def _latencies(store: Path, rows: Iterable[Row]) -> dict[str, float]:
    from benchmarks.pruning.latency import known

    found = [entry for row in rows if (entry := known(store, row)) is not None]
    names = {name for entry in found for name in entry}
    return {name: statistics.mean(entry[name] for entry in found if name in entry) for name in sorted(names)}


def markdown(title: str, rows: Sequence[Row], reference: str, kind: str) -> list[str]:
    """A table of one task, kind and budget."""
    kept = "MACs kept, %" if kind == "structured" else "weights kept, %"
    against = f"{BY_NAME[reference].label} minus this"
    columns = ["Method", "Seeds", kept, "predicted ms", "before training", "after", "sd", against]
    columns += ["paired t, 95 %", "seeds and streets, 95 %", "default"]
    lines = [f"## {title}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        share = row["macs"] if kind == "structured" else row["weights"]
        lines.append(
            f"| {row['label']} | {len(row['seeds'])} | {100 * share:.2f} | "
            f"{_number(row['latency'].get('predicted_ms'))} | {row['before']:.4f} | {row['after']:.4f} | "
            f"{_number(row['after_sd'])} | {_difference(row['reference_minus_this'])} |"
        )
    return [*lines, ""]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _difference(found: Row | None) -> str:
    if found is None:
        return "| | |"
    spans = [
        "" if span is None else f"{span[0]:+.4f} to {span[1]:+.4f}"
        for span in (found["t_interval"], found["bootstrap"])
    ]
    words = {"win": "wins", "lose": "loses", "tie": "tie", "undecided": "undecided"}
    return f"{found['mean']:+.4f} | {spans[0]} | {spans[1]} | {words[found['verdict']]}"


def sections(table: Table, reference: str) -> list[tuple[str, str, str, float, list[Row]]]:
    """Title, task, kind, budget and rows of every table that has a finished cell."""
    keys = sorted({(c["cell"]["task"], c["cell"]["kind"], c["cell"]["budget"]) for c in table.cells})
    order = [k for k in keys if k[2] in CORE_BUDGETS and k[0] == "street" and k[1] == "structured"][::-1]
    order += [k for k in keys if k not in order and not (k[1] == "structured" and k[2] == 1.0)]
    found = []
    for task, kind, budget in order:
        chosen = reference if kind == "structured" else "u_altermoma"
        rows = summary(table, task, kind, budget, chosen, [spec.name for spec in ALL])
        what = f"{budget * 100:g} % of the dense MACs" if kind == "structured" else f"{budget * 100:g} % of the weights"
        found.append((f"{task}, {kind}, at most {what}", task, kind, budget, rows))
    return found


HEAD = """# Pruning methods side by side

Made by `{command}` from cells that `python -m benchmarks.pruning.run` ran; every figure with its widths is in
`core.json`. One dense checkpoint ({checkpoint}); every method has the same budget, the same {steps} fine-tuning steps
(AdamW, peak rate {lr:g}, batches of 16, {precision}, no distillation, one thread) on the same batches, its norms
estimated again from the same {batchnorm} batches, and n = {n} evaluation samples in {clusters} streets. The seed
decides scoring batches, training batches and everything random; the dense checkpoint is the same for all.

Two 95 % intervals stand beside each difference: Student's t over the paired seeds, and {replicates} draws of seeds and
streets. The verdict is the reference's ({reference}) and goes by the interval that covers both. A tie has to be shown:
it covers 0 and is at most {tie:g} to each side; wider ones are undecided. Intervals are not corrected for the number of
comparisons.
"""


def write(table: Table, options: argparse.Namespace) -> dict[str, Any]:
    """core.json, core.md and the plots; returns what core.json holds."""
    from benchmarks.pruning.plots import draw

    made = sections(table, options.reference)
    first = next(c for c in table.cells if c["cell"]["task"] == "street")
    missing = unfinished(table, options.seeds)
    protocol = first["identity"]["protocol"]
    flags = ["--latency"] * options.latency + ["--measure-host"] * options.measure_host
    flags += ["--data DRIVE"] * (options.data is not None)
    command = " ".join(["python -m benchmarks.pruning.table --reference", options.reference, *flags])
    lines = [
        HEAD.format(
            command=command,
            checkpoint=f"examples/street, sha256 {first['identity']['checkpoint']}",
            steps=protocol["steps"],
            lr=protocol["lr"],
            precision=protocol["precision"],
            batchnorm=protocol["batchnorm_batches"],
            n=first["n"],
            clusters=first["clusters"],
            replicates=REPLICATES,
            reference=BY_NAME[options.reference].label,
            tie=TIE_HALF_WIDTH,
        )
    ]
    for title, task, kind, _, rows in made:
        lines += markdown(title, rows, options.reference if kind == "structured" else "u_altermoma", kind)
        if task != first["cell"]["task"]:
            lines += [_note(next(cell for cell in table.cells if cell["cell"]["task"] == task)), ""]
    lines += ["## Not run", "", *([f"* {line}" for line in missing] or ["Nothing is missing."]), ""]
    options.out.mkdir(parents=True, exist_ok=True)
    record = {
        "command": [
            "python -m benchmarks.pruning.run --suite core variants --workers N",
            command,
        ],
        "versions": first["versions"],
        "commits": sorted({cell["commit"] for cell in table.cells}),
        "threads": sorted({cell["threads"] for cell in table.cells}),
        "protocol": protocol,
        "scoring": first["identity"]["scoring"],
        "n": first["n"],
        "clusters": first["clusters"],
        "reference": options.reference,
        "tables": [
            {"title": title, "task": task, "kind": kind, "budget": budget, "rows": rows}
            for title, task, kind, budget, rows in made
        ],
        "cells": [_short(cell) for cell in table.cells],
        "not_run": missing,
    }
    (options.out / "core.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.out / "core.md").write_text("\n".join(lines))
    draw(made, options.out)
    return record


def _note(cell: Row) -> str:
    """What is different in the table of another task."""
    way = "more" if cell["better"] == "max" else "less"
    return (
        f"{cell['primary']}, {way} is better; a positive difference is in favour of the reference. n = {cell['n']} "
        f"evaluation samples in {cell['clusters']} clusters: a check on real data, not a ranking."
    )


def _short(cell: Row) -> Row:
    """A cell without what the head of the file says already."""
    keep = ("achieved", "widths", "before", "after", "seconds", "commit", "versions", "final_losses")
    return {**cell["cell"], "method_is": cell["identity"]["method"], **{name: cell[name] for name in keep}}


def unfinished(table: Table, seeds: Sequence[int]) -> list[str]:
    """What the suites name and the store does not hold, one line for each suite, budget and set of seeds."""
    have = {Cell(**cell["cell"]) for cell in table.cells}
    lines = []
    for suite in SUITES:
        cells = planned([suite], seeds, None)
        gone: dict[tuple[str, float], list[int]] = {}
        for cell in cells:
            if cell not in have:
                gone.setdefault((cell.method, cell.budget), []).append(cell.seed)
        if sum(len(absent) for absent in gone.values()) == len(cells):
            lines.append(f"{suite}: all {len(cells)} cells{_why_not(cells[0].task)}")
            continue
        alike: dict[tuple[float, str], list[str]] = {}
        for (method, budget), absent in gone.items():
            alike.setdefault((budget, ", ".join(map(str, absent))), []).append(BY_NAME[method].label)
        lines += [f"{suite} at {100 * b:g} %, seeds {absent}: {'; '.join(rows)}" for (b, absent), rows in alike.items()]
    return lines


def _why_not(task: str) -> str:
    """What a task lacks here, if that is why it did not run."""
    from fusepress.pipeline.recipe import load_recipe

    loaded = load_recipe(TASKS[task])
    there = loaded.resolve(loaded.recipe.checkpoint).is_file()
    return "" if there else f" ({task} has no dense checkpoint in the repository: it is trained from frames first)"


def main(words: Sequence[str] | None = None) -> int:
    options = arguments(words)
    table = Table(options.store)
    if not any(cell["cell"]["task"] in TASKS for cell in table.cells):
        print("no finished cell; run `python -m benchmarks.pruning.run` first")
        return 1
    if options.latency or options.measure_host:
        from benchmarks.pruning.latency import fill

        fill(options.store, table.cells, measure=options.measure_host, data=options.data)
    record = write(table, options)
    print(f"{len(record['cells'])} cells; {len(record['not_run'])} rows of the plan are not or not wholly run")
    return 0


if __name__ == "__main__":
    sys.exit(main())
