"""Tables of the finished cells: `python -m benchmarks.sparsity.table [--store runs/sparsity] [--results FOLDER]`.

Prints Markdown; with --results it goes into sparsity.md there, and every cell's figures into sparsity.json.

Rows are means over seeds; the difference to the twin (the same model without masks, trained as long) is paired by seed,
with its 95 % interval (Student's t) from three seeds on. Cells of different protocols (steps, rates, ...) are never
mixed: each protocol has a table of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.sparsity.run import STORE

HEADINGS = (
    *("Model", "Pattern", "Criterion", "Permuted", "Recovery", "Seeds", "Before", "After", "Against its twin"),
    *("Zeros", "Broken groups", "Trained", "Camera blank", "LiDAR half"),
)
KEPT = (
    *("cell", "protocol", "primary", "before", "after", "failing", "n", "zeros", "masked_not_zero", "violations_2to4"),
    *("spread", "sparselora", "final_losses", "seconds", "versions", "threads"),
)
COMMAND = [
    "python -m benchmarks.sparsity.run --suite recovery wide --seeds 0 1 2",
    "python -m benchmarks.sparsity.table --results benchmarks/results",
]
HEAD = """# 2:4 sparsity and how it is recovered

Made by `python -m benchmarks.sparsity.table` from the cells that `python -m benchmarks.sparsity.run` finished; all
figures are in `sparsity.json`. Before and after are the primary metric without and with recovery, n = {n} samples. The
twin is the same model without masks, trained as long; differences are paired by seed, with a 95 % interval of Student's
t from three seeds on. Broken groups are groups of four with more than two weights that are not zero, over all seeds.
Street is pruned to a fraction of its MACs (`macs`) and fine-tuned before; wide is not pruned and has 3x3 convolutions
of 256 channels. The last two columns are the metric when a sensor fails, at severity 3.

"""
Row = tuple[str, ...]  # model, pattern and spread, criterion, permuted, recovery


def load(store: Path) -> list[dict[str, Any]]:
    """Finished cells of a store that could run."""
    found = [json.loads(path.read_text()) for path in sorted((store / "cells").glob("*.json"))]
    return [cell for cell in found if "after" in cell]


def by_protocol(cells: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Cells that may be compared, by the protocol that they share, in words."""
    found: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        found.setdefault(", ".join(f"{name} {value}" for name, value in cell["protocol"].items()), []).append(cell)
    return found


def row_of(cell: dict[str, Any]) -> Row:
    """What a cell has in common with those of other seeds."""
    facts = cell["cell"]
    if facts["recover"] == "twin":
        return (facts["model"], "dense", "", "", "twin")
    pattern = "2:4" if facts["pattern"] == "2:4" else f"{100 * facts['sparsity']:g} % {facts['spread']}"
    return (facts["model"], pattern, facts["choose"], "yes" if facts["permute"] else "", facts["recover"])


def difference(values: dict[int, float], others: dict[int, float]) -> str:
    """Mean of the paired differences over common seeds, with an interval from three on."""
    gaps = [values[seed] - others[seed] for seed in sorted(values.keys() & others.keys())]
    if not gaps:
        return ""
    mean = statistics.mean(gaps)
    if len(gaps) < 3:
        return f"{mean:+.4f}"
    from scipy.stats import t

    half = float(t.ppf(0.975, len(gaps) - 1)) * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return f"{mean:+.4f} ({mean - half:+.4f} to {mean + half:+.4f})"


def table(cells: Sequence[dict[str, Any]]) -> str:
    """All cells, which share a protocol, as one Markdown table.

    Raises:
        ValueError: a cell is there twice.
    """
    by_row: dict[Row, dict[int, dict[str, Any]]] = {}
    for cell in cells:
        seeds = by_row.setdefault(row_of(cell), {})
        if cell["cell"]["seed"] in seeds:
            raise ValueError(
                f"expected one result of each cell; got two of {cell['name']} (the recipe or the checkpoint changed "
                "between them); remove the older one from the store's cells"
            )
        seeds[cell["cell"]["seed"]] = cell
    twins = {row[0]: _after(found) for row, found in by_row.items() if row[-1] == "twin"}
    lines = [f"| {' | '.join(HEADINGS)} |", "| --- | --- | --- | --- | --- " + "| ---: " * (len(HEADINGS) - 5) + "|"]
    for row, found in sorted(by_row.items()):
        first = next(iter(found.values()))
        lora = first.get("sparselora")
        figures = [
            str(len(found)),
            _mean([cell["before"][cell["primary"]] for cell in found.values()]),
            _mean(list(_after(found).values())),
            difference(_after(found), twins.get(row[0], {})) if row[-1] != "twin" else "",
            f"{100 * first['zeros']:.1f} %" if "zeros" in first else "",
            str(sum(cell["violations_2to4"] for cell in found.values())) if row[1] == "2:4" else "",
            f"{100 * lora['fraction']:.1f} %" if lora else "",
            *(_mean([cell["failing"][name][cell["primary"]] for cell in found.values()]) for name in first["failing"]),
        ]
        lines.append(f"| {' | '.join([*row, *figures])} |")
    return "\n".join(lines)


def _after(found: dict[int, dict[str, Any]]) -> dict[int, float]:
    return {seed: cell["after"][cell["primary"]] for seed, cell in found.items()}


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.4f}"


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=STORE)
    parser.add_argument("--results", type=Path, help="folder of sparsity.md and sparsity.json")
    options = parser.parse_args(words)
    found = by_protocol(load(options.store))
    text = "\n".join(f"{protocol}\n\n{table(cells)}\n" for protocol, cells in found.items())
    print(text)
    if options.results is not None:
        cells = [cell for group in found.values() for cell in group]
        options.results.mkdir(parents=True, exist_ok=True)
        (options.results / "sparsity.md").write_text(
            HEAD.format(n=", ".join(map(str, sorted({c["n"] for c in cells})))) + text
        )
        record = {"command": COMMAND, "cells": [{key: cell[key] for key in KEPT if key in cell} for cell in cells]}
        (options.results / "sparsity.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
