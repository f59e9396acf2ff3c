"""INT8 against FP32 on this host's ONNX Runtime, timed in turns, with what each node took.

    python -m benchmarks.quantize.latency --data PATH/TO/KITTI/DRIVE [--networks street] [--seconds 60]

Three files of each network, run by ONNX Runtime's integer kernels: the exported one in FP32; INT8 where the ladder
ends, with a float32 remainder, its Q/DQ in front of layers as TensorRT fuses it; and that file with unsigned numbers
behind Relus (fusepress.export.unsigned). Means of the same rounds with 95 % intervals of a block bootstrap, once by the
wall clock and once by the processor time of this process, which other work on the machine stretches less; medians of a
profile by node say which layers ran in integers, which in floating point, and what conversions are left at run time.
The metric is of the same integer kernels on the whole eval split. Writes benchmarks/results/quantize/latency.json and
.md.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.quantize.files import Bench, Json, benches, markdown, parser, write_result

if TYPE_CHECKING:
    from fusepress.export.node_times import NodeTime

MOST_NODES = 8


def instruction_sets() -> list[str]:
    """The vector instructions that this CPU says it has."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    flags = re.search(r"^flags\s*:\s*(.*)$", text, re.MULTILINE)
    return [flag for flag in (flags[1].split() if flags else []) if flag.startswith(("avx", "amx", "vnni"))]


def summed(nodes: Sequence[NodeTime]) -> Json:
    """Kind -> [nodes, ms], operator -> [nodes, ms], and the nodes that take longest."""
    kinds: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    operators: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for node in nodes:
        for row in (kinds[node.kind], operators[node.op]):
            row[0] += 1
            row[1] = round(row[1] + node.ms, 4)
    slowest = sorted(nodes, key=lambda node: -node.ms)[:MOST_NODES]
    return {
        "kinds": {kind: kinds[kind] for kind in ("integer", "floating", "conversion", "other")},
        "operators": dict(sorted(operators.items(), key=lambda item: -item[1][1])),
        "slowest": [asdict(node) for node in slowest],
    }


def unsigned(bench: Bench) -> Path:
    """The INT8 file with unsigned numbers behind Relus."""
    from fusepress.export.onnx import load_onnx, save_onnx
    from fusepress.export.unsigned import use_unsigned

    def make(path: Path) -> None:
        proto = load_onnx(bench.released("fp32"))
        use_unsigned(proto)
        save_onnx(proto, path)

    return bench.file("int8-unsigned.onnx", make)


def metric_of(bench: Bench, path: Path) -> Json:
    """The metric of a file with integer kernels."""
    from fusepress.export.runtime import OnnxSession
    from fusepress.pipeline.evaluate import evaluate

    session = OnnxSession(path, bench.threads, integer_kernels=True)
    return evaluate(bench.network.task, lambda inputs: session(inputs), "eval").metrics


def in_turns(bench: Bench, files: Mapping[str, Path], seconds: float, clock: Callable[[], int]) -> Any:
    """The files of a network, timed in turns by a clock."""
    from fusepress.export.runtime import OnnxSession
    from fusepress.pipeline.task import first_batch
    from fusepress.targets.measure import measure_interleaved

    inputs = first_batch(bench.network.task, "calib", size=1).inputs
    sessions = {name: OnnxSession(path, bench.threads, integer_kernels=True) for name, path in files.items()}
    timed = {name: session.timed_callable(inputs) for name, session in sessions.items()}
    return measure_interleaved(timed, max_seconds=seconds, clock=clock)


def files_of(bench: Bench) -> dict[str, Path]:
    """What is compared."""
    return {"fp32": bench.source, "int8": bench.released("fp32"), "int8 unsigned": unsigned(bench)}


def processor_time(bench: Bench, seconds: float) -> Json:
    """Mean milliseconds of this process's processor time by file, and the speed-up."""
    measured = in_turns(bench, files_of(bench), seconds, time.process_time_ns)
    return {
        name: {"mean_ms": row.mean_ms, "low_ms": row.mean_low_ms, "high_ms": row.mean_high_ms, "n": row.n}
        | {"speedup": list(astuple(measured.speedup("fp32", name)))}
        for name, row in measured.runs.items()
    }


def run(bench: Bench, seconds: float) -> Json:
    """One network: its files in turns, then each by node."""
    from fusepress.export.node_times import node_times
    from fusepress.pipeline.task import first_batch

    inputs = first_batch(bench.network.task, "calib", size=1).inputs
    files = files_of(bench)
    measured = in_turns(bench, files, seconds, time.perf_counter_ns)
    metric, rows = bench.network.task.primary, {}
    for name, row in measured.runs.items():
        faster = measured.speedup("fp32", name)
        rows[name] = {
            "mean_ms": row.mean_ms,
            "low_ms": row.mean_low_ms,
            "high_ms": row.mean_high_ms,
            "p50_ms": row.p50_ms,
            "n": row.n,
            "stable": row.stable,
            "speedup": [faster.value, faster.low, faster.high],
            "nodes": summed(node_times(files[name], inputs, threads=bench.threads)),
            metric: bench.cell(f"metric-{name.replace(' ', '-')}", partial(metric_of, bench, files[name]))[metric],
        }
    ladder = bench.ladder()
    return {
        "metric": metric,
        "units": ladder["units"],
        "units_in_int8": ladder["units"] - len(ladder["spared"]),
        "seconds": seconds,
        "instruction_sets": instruction_sets(),
        "environment": dict(measured.runs["fp32"].environment),
        "files": rows,
    }


def table(networks: dict[str, Json]) -> list[str]:
    """As Markdown."""
    rows = []
    for name, found in networks.items():
        for file, row in found["files"].items():
            value, low, high = row["speedup"]
            kinds = [row["nodes"]["kinds"][kind] for kind in ("integer", "floating", "conversion", "other")]
            mean = f"{row['mean_ms']:.1f} ({row['low_ms']:.1f} to {row['high_ms']:.1f})"
            speedup = f"{value:.2f} ({low:.2f} to {high:.2f})"
            own = found["processor_time"][file]
            value, low, high = own["speedup"]
            cpu = f"{own['mean_ms']:.1f} ({own['low_ms']:.1f} to {own['high_ms']:.1f})"
            by_cpu = f"{value:.2f} ({low:.2f} to {high:.2f})"
            parts = [str(count) for count, _ in kinds]
            counts = f"{row['n']}, {own['n']}"
            rows.append([name, file, mean, speedup, cpu, by_cpu, counts, *parts, f"{row[found['metric']]:.4f}"])
    timed = ("Mean, ms (95 %) ", "Speed-up ", "Processor time, ms ", "Speed-up by it ", "n ")
    nodes = ("Integer layers ", "Float layers ", "Conversions ", "Other nodes ")
    return markdown(("Network", "File", *timed, *nodes, "Metric "), rows)


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--seconds", type=float, default=60.0)
    arguments = options.parse_args()
    from fusepress.pipeline.stages.base import tool_versions

    networks = {}
    for bench in benches(arguments):
        cpu = bench.cell("processor-time", partial(processor_time, bench, arguments.seconds / 4))
        row = bench.cell("latency", partial(run, bench, arguments.seconds))
        networks[bench.network.name] = row | {"processor_time": cpu}
    result = {
        "command": "python -m benchmarks.quantize.latency --data DRIVE --networks " + " ".join(networks),
        "tools": tool_versions("onnx", "onnxruntime-gpu", "numpy"),
        "kind": "measured on this host, batch 1, files timed in turns",
        "threads": arguments.threads,
        "networks": networks,
    }
    isa = " ".join(dict.fromkeys(name for found in networks.values() for name in found["instruction_sets"]))
    note = f"`{result['command']}`; {arguments.threads} thread(s); {isa}"
    write_result("latency", result, [note, "", *table(networks)])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
