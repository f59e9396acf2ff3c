"""INT8 against FP32 in ONNX Runtime: accuracy by the method that chooses the ranges, on every reference network.

    python -m benchmarks.quantize.methods --data PATH/TO/KITTI/DRIVE [--networks street multi] [--methods max mse]

Each trained network is exported, calibrated on at most `--samples` of its calib split and judged on its whole eval
split, with Q/DQ computed as written. `max`, `percentile`, `mse` and `entropy` have all layers in INT8 and a float32
remainder; `modelopt` is what modelopt makes of the file when it is asked for nothing, FP16 remainder included; `ladder`
is the release: ranges by `auto`, what the recipe excludes left out, layers spared until the calib split says that at
most half a per cent is lost (or what the recipe allows), FP16 remainder; `qat` is short training under that of `max`,
with learned ranges (qat.py). `street_unlike` computes what street computes, with an outlier channel and modalities of
unlike ranges (networks.py). Differences are paired, with the 95 % interval of the bootstrap over the task's groups.

Finished cells are kept in the store and never made again; rows of an earlier result by the same tools, weights and
calibration samples stay where this run made none. Writes benchmarks/results/quantize/methods.json and .md.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.quantize.files import (
    SEED,
    TOOLS,
    Bench,
    Json,
    benches,
    earlier_networks,
    markdown,
    parser,
    with_earlier,
    write_result,
)
from benchmarks.quantize.networks import GAIN
from benchmarks.quantize.qat import LR, STEPS, train_quantised

METHODS = ("max", "percentile", "mse", "entropy", "modelopt", "qat", "ladder")
REPLICATES = 1000
LIMIT = 0.005  # relative
SHARE = 0.9  # of the MACs


def against_float(task: Any, floating: Any, found: Any) -> Json:
    """Accuracy, and what is lost, positive is worse, with the interval."""
    from fusepress.pipeline.gates import Replicates, compare, drop_interval

    condition = compare(floating.stats, found.stats, task.score, found.groups, replicates=REPLICATES, seed=SEED)
    replicates = Replicates(clean=condition, samples=found.n, clusters=len(set(found.groups)))
    drop, interval = drop_interval(replicates, task.primary, task.metrics[task.primary])
    value = floating.metrics[task.primary]
    return {
        "value": found.metrics[task.primary],
        "fp32": value,
        "drop": drop,
        "drop_low": None if interval is None else interval.low,
        "drop_high": None if interval is None else interval.high,
        "relative_drop": drop / value,
        "n": found.n,
        "groups": len(set(found.groups)),
    }


def made(bench: Bench, method: str) -> Path:
    """The INT8 file of a method."""
    from benchmarks.quantize.defaults import quantize_by_defaults
    from fusepress.calib.quantize import draft_int8

    def write(path: Path) -> None:
        if method == "modelopt":
            quantize_by_defaults(bench.source, bench.arrays, path)
        elif method == "qat":
            train_quantised(bench, path)
        elif method == "entropy":
            draft_int8(bench.source, bench.arrays, method="entropy", sample_ids=bench.card.sample_ids).write(path)
        else:
            bench.draft.with_method(method).write(path)  # type: ignore[arg-type]

    if method == "ladder":
        return bench.released("fp16")
    return bench.file(f"{method}.onnx", write)


def run(bench: Bench, method: str) -> Json:
    """One cell."""
    from fusepress.calib.quantize import layer_macs
    from fusepress.calib.sensitivity import relative_error
    from fusepress.export.onnx import load_onnx
    from fusepress.export.precision import precision_map

    begin = time.monotonic()
    path = made(bench, method)
    seconds = time.monotonic() - begin
    macs, precisions = layer_macs(load_onnx(bench.source)), precision_map(path)
    in_int8 = sum(count for name, count in macs.items() if precisions.get(name) == "int8")
    few = {name: array[:8] for name, array in bench.arrays.items()}
    error = relative_error(bench.session(path).run_numpy(few), bench.session(bench.source).run_numpy(few))
    row = {
        "method": method,
        "macs_share_int8": in_int8 / sum(macs.values()),
        "output_error": error,
        **against_float(bench.network.task, bench.floating, bench.judged(path)),
        "seconds_to_make": round(seconds, 1),
    }
    if method == "qat":
        row |= {"steps": STEPS, "lr": LR}
    if method == "ladder":
        told = bench.ladder()
        row |= {key: told[key] for key in ("rung", "ranges_by", "units", "evaluations", "reason", "excluded")}
        row["spared"] = len(told["spared"])
    return row


def cell_of(method: str) -> str:
    """The cell of a method; `ladder` is that of the search."""
    return "released" if method == "ladder" else method


def table(networks: dict[str, Json]) -> list[str]:
    """As Markdown."""
    rows = []
    for name, found in networks.items():
        for row in found["rows"]:
            method = row["method"]
            if method == "ladder":
                method = f"ladder: {row['ranges_by']}, {row['spared']} of {row['units']} units spared"
                method += f", `{'`, `'.join(row['excluded'])}` excluded" if row["excluded"] else ""
            if method == "qat":
                method = f"qat: max, then {row['steps']} steps"
            met = "yes" if row["relative_drop"] <= LIMIT and row["macs_share_int8"] >= SHARE else "no"
            interval = "" if row["drop_low"] is None else f" ({row['drop_low']:+.4f} to {row['drop_high']:+.4f})"
            figures = [f"{row['macs_share_int8']:.1%}", f"{row['fp32']:.4f}", f"{row['value']:.4f}"]
            lost = [f"{row['drop']:+.4f}{interval}", f"{row['relative_drop']:+.2%}"]
            rows.append([f"{name} ({found['metric']}, n = {row['n']})", method, *figures, *lost, met])
    judged = ("FP32 ", "INT8 ", "Lost (95 %) ", "Lost, relative ", "At most 0.5 %, at least 90 % of MACs")
    return markdown(("Network", "Ranges", "MACs in INT8 ", *judged), rows)


def merged(now: Json, earlier: Json | None) -> Json:
    """A network's rows of now, and the earlier ones of methods that were not run again, in the order of `METHODS`."""
    alike = ("metric", "calibration_samples", "calibration_card_sha256")
    rows = {row["method"]: row for row in now["rows"]}
    if earlier is not None and all(now[key] == earlier[key] for key in alike):
        reference = {row["fp32"] for row in rows.values()}
        told = {key: earlier[key] for key in ("sources",) if key in earlier}
        same = [told | row for row in earlier["rows"] if reference <= {row["fp32"]}]  # other weights have another one
        rows = {row["method"]: row for row in same} | rows
    return {**now, "rows": sorted(rows.values(), key=lambda row: METHODS.index(row["method"]))}


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    options.add_argument("--table", action="store_true", help="of the cells that are finished; makes none")
    arguments = options.parse_args()
    from fusepress.pipeline.stages.base import tool_versions

    tools = tool_versions(*TOOLS)
    before = earlier_networks("methods", tools)
    networks: dict[str, Json] = {}
    for bench in benches(arguments):
        rows = [
            bench.cell(cell_of(method), partial(run, bench, method))
            for method in arguments.methods
            if not arguments.table or bench.has(cell_of(method))
        ]
        task = bench.network.task
        now = {
            "metric": task.primary,
            "better": task.metrics[task.primary],
            "calibration_samples": len(bench.card.sample_ids),
            "calibration_card_sha256": bench.card.sha256,
            "rows": rows,
        }
        networks[bench.network.name] = merged(now, before.get(bench.network.name))
    result = {
        "command": "python -m benchmarks.quantize.methods --data DRIVE",
        "tools": tools,
        "kind": "simulated: Q/DQ computed as written on ONNX Runtime CPU",
        "threads": arguments.threads,
        "seed": SEED,
        "replicates": REPLICATES,
        "gain_of_unlike_channels": GAIN,
        "output_error_is": "relative squared error of the outputs on 8 calibration samples",
        "networks": networks,
    }
    result = with_earlier("methods", result)
    told = f"`{result['command']}`; versions and intervals in methods.json"
    write_result("methods", result, [told, "", *table(result["networks"])])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
