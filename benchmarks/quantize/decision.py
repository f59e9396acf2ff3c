"""What the search for layers to spare costs, and whether it decides as the exhaustive table of layers does.

    python -m benchmarks.quantize.decision --networks street_unlike [--store runs/quantize]

The table runs the whole calib split with every unit alone in INT8 and with every unit alone in floating point, ranks
units by the metric that sparing them wins for what it costs, and searches with as many trials as it likes. The ladder
ranks by output errors on a few samples and has a budget. Both are held to the same standard, on the same ranges. An
evaluation is one run of the calib split, or of its first `--judged-batches`; each is kept in the store, so that a run
that was stopped goes on. Networks of an earlier result by the same tools stay in it. Writes
benchmarks/results/quantize/decision.json and .md.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.quantize.files import Bench, Json, benches, markdown, parser, with_earlier, write_result

if TYPE_CHECKING:
    from fusepress.calib.search import Trial


def stored_trial(bench: Bench, spared: frozenset[str]) -> Trial:
    """How a set of units in floating point does on the calib split: from the store, else judged now."""
    from fusepress.calib.search import Trial

    def judged() -> Json:
        with tempfile.TemporaryDirectory(prefix="fusepress-") as folder:
            session = bench.session(bench.chosen.write(Path(folder) / "trial.onnx", spared))
            evaluation = bench.judge.evaluate(lambda inputs: session(inputs))
        trial = bench.judge.trial(spared, evaluation, bench.standard)
        return asdict(trial) | {"spared": sorted(spared)}

    name = hashlib.sha256(json.dumps(sorted(spared)).encode()).hexdigest()[:16]
    found = bench.cell(f"trial{bench.part}-{name}", judged)
    return Trial(spared=spared, **{key: found[key] for key in ("met", "value", "drop", "high")})


def exhaustive(bench: Bench) -> Json:
    """The table, and the decision that follows from it."""
    from fusepress.calib.search import search

    units = list(bench.chosen.units())
    known: dict[frozenset[str], Trial] = {}

    def tried(spared: frozenset[str]) -> Trial:
        if spared not in known:
            known[spared] = stored_trial(bench, spared)
        return known[spared]

    def lost(spared: frozenset[str]) -> float:
        drop = tried(spared).drop
        return float("inf") if drop is None else drop

    everything, naive = frozenset(units), lost(frozenset())
    alone = {unit: lost(everything - {unit}) for unit in units}
    spared = {unit: lost(frozenset([unit])) for unit in units}
    costs = {row.name: row.cost for row in bench.sensitivity.units}
    won = {unit: max(alone[unit], naive - spared[unit]) for unit in units}
    ranking = sorted(units, key=lambda unit: -won[unit] / costs[unit])
    found = search(ranking, tried, most_trials=10 * len(units))
    return {
        "judged_samples": bench.standard.reference.n,
        "cost_unit": bench.sensitivity.cost_unit,
        "evaluations": len(known),
        "rung": found.rung,
        "spared": sorted(found.spared),
        "units": [{"name": u, "cost": costs[u], "lost_alone": alone[u], "lost_spared": spared[u]} for u in units],
        "all_int8_loses": naive,
    }


def run(bench: Bench) -> Json:
    """Both decisions."""
    ladder, table = bench.ladder(), bench.cell(f"exhaustive{bench.part}", partial(exhaustive, bench))
    costs = {row["name"]: row["cost"] for row in table["units"]}
    return {
        "units": len(costs),
        "judged_samples": table["judged_samples"],
        "standard": ladder["standard"],
        "max_drop": ladder["max_drop"],
        "all_int8_loses": table["all_int8_loses"],
        "same": sorted(ladder["spared"]) == table["spared"],
        "cost_unit": table["cost_unit"],
        "ladder": {
            "evaluations": ladder["evaluations"],
            "spared": ladder["spared"],
            "cost": sum(costs[name] for name in ladder["spared"]),
        },
        "exhaustive": {
            "evaluations": table["evaluations"],
            "spared": table["spared"],
            "cost": sum(costs[name] for name in table["spared"]),
        },
        "table": table["units"],
    }


def lines_of(networks: dict[str, Json]) -> list[str]:
    """As Markdown."""
    rows = []
    for name, row in networks.items():
        spared = [", ".join(f"`{unit}`" for unit in row[by]["spared"]) or "none" for by in ("exhaustive", "ladder")]
        lost = [f"{row['all_int8_loses']:+.4f}", f"{row['max_drop']:.4f}"]
        counts = [str(row["exhaustive"]["evaluations"]), f"{row['ladder']['evaluations']:.1f}"]
        rows.append([f"{name} (n = {row['judged_samples']})", str(row["units"]), *lost, *counts, *spared])
    evaluations = ("Evaluations, table ", "Evaluations, ladder ")
    spared_by = ("Spared by the table", "Spared by the ladder")
    return markdown(("Network", "Units ", "All INT8 loses ", "May lose ", *evaluations, *spared_by), rows)


def main() -> int:
    options = parser(__doc__)
    options.add_argument(
        "--judged-batches", type=int, default=None, help="of the calib split; the whole of it if absent"
    )
    options.add_argument("--whole", action="store_true", help="without what the recipes exclude")
    arguments = options.parse_args()
    from fusepress.pipeline.stages.base import tool_versions

    networks = {}
    for bench in benches(arguments, arguments.judged_batches):
        seen = replace(bench, network=replace(bench.network, exclude=())) if arguments.whole else bench
        networks[bench.network.name] = run(seen)
    flags = ["--whole"] if arguments.whole else []
    flags += [] if arguments.judged_batches is None else [f"--judged-batches {arguments.judged_batches}"]
    for name, row in networks.items():
        row["command"] = " ".join(["python -m benchmarks.quantize.decision --data DRIVE --networks", name, *flags])
    result: Json = {
        "tools": tool_versions("nvidia-modelopt", "onnx", "onnxruntime-gpu", "numpy"),
        "kind": "simulated: Q/DQ computed as written on ONNX Runtime CPU; accuracy on the calib split",
        "networks": networks,
    }
    result = with_earlier("decision", result)
    commands = [f"`{row['command']}`  " for row in result["networks"].values()]
    write_result("decision", result, [*commands, "", *lines_of(result["networks"])])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
