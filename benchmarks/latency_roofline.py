"""Fit and validate the latency roofline on published TensorRT latencies, leaving one model family out at a time.

Run: python benchmarks/latency_roofline.py [--data FOLDER] [--out FILE]; FOLDER holds published.csv and onnx/.

Only rows of quality A (trtexec, load generator, forward-only) and B (timed by a framework) at batch 1 on the GPU are
used, of networks whose graph is at hand. B rows contain an unknown harness cost (Python, copies): one non-negative
offset a source is fitted beside the constants, at most 0.7 ms, and is no part of a prediction. When a family is held
out, its rows get the offset of their source only if another family of that source was fitted, else none: its error
counts as ours. The weight of the priors (0.3) was chosen among 0.1, 0.3 and 0.6 for constants that make physical sense.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import scipy
from scipy.optimize import least_squares

from fusepress.targets.network import Network, read_network
from fusepress.targets.predict import Work, describe_work, kernel_times
from fusepress.targets.profile import Profile, load_profile
from fusepress.targets.roofline import SETS, Constants

ROOT = Path(__file__).resolve().parent.parent
# The published "RTX 3080 12GB" has other clocks and SMs than rtx-3080-10gb and is left out.
DEVICES = {
    "Jetson AGX Orin 64GB": "jetson-agx-orin-64gb",
    "Jetson AGX Orin": "jetson-agx-orin-64gb",
    "Jetson Orin Nano 8GB Super": "jetson-orin-nano-8gb-super",
    "Jetson AGX Thor (T5000)": "jetson-agx-thor-t5000",
    "NVIDIA T4": "t4",
    "A100": "a100-sxm-80gb",
    "V100 SXM2": "v100-sxm2",
    "RTX 2060 6GB": "rtx-2060",
    "RTX 3060 12GB": "rtx-3060-12gb",
    "DGX Spark (GB10)": "dgx-spark-gb10",
}
FAMILIES = ("yolov8", "yolo11", "yolo12", "yolov5", "resnext", "seresnet", "resnet", "efficientvit", "efficientnet")
PRIOR = Constants(
    compute_fp32=0.6,
    compute_fp16=0.6,
    compute_int8=0.5,
    compute_scalar=0.3,
    memory=0.75,
    memory_reuse=0.5,
    launch_cycles=5000,
    tile_overhead=64,
    overlap=2.0,
)
LOWEST = Constants(
    compute_fp32=0.2,
    compute_fp16=0.2,
    compute_int8=0.15,
    compute_scalar=0.02,
    memory=0.4,
    memory_reuse=0.1,
    launch_cycles=1500,
    tile_overhead=1,
    overlap=1.0,
)
HIGHEST = Constants(
    compute_fp32=0.95,
    compute_fp16=0.95,
    compute_int8=0.95,
    compute_scalar=0.8,
    memory=0.9,
    memory_reuse=1.0,
    launch_cycles=20000,
    tile_overhead=400,
    overlap=8.0,
)
NAMES = list(asdict(PRIOR))
PRIOR_WEIGHT = 0.3
MAX_OFFSET_MS = 0.7
COVERAGE = 0.95
Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One published latency of a network whose graph is at hand."""

    family: str
    network: str
    ops: frozenset[str]
    macs: int
    precision: str
    device: str
    profile: Profile
    mode: str | None
    ms: float
    quality: str
    harness: str | None
    work: Work

    def predict(self, constants: Constants) -> float:
        """Milliseconds without the harness."""
        return float(kernel_times(self.work, self.profile, self.profile.mode(self.mode), constants).total.sum())


def family_of(graph: str) -> str:
    if "-cls" in graph:
        return "yolov8-cls"
    return next(family for family in FAMILIES if graph.startswith(family))


def harness_of(row: dict[str, str], device: str) -> str | None:
    if row["quality"] == "A":
        return None
    return "ultralytics-guides" if "docs.ultralytics.com/guides" in row["source"] else f"{row['source'][:20]}|{device}"


def _contradicted(raw: dict[str, str]) -> bool:
    """Three A100 rows of yolov8n: a third of what the same publisher gives elsewhere, flagged as bad."""
    return raw["device"] == "A100" and "integrations/tensorrt" in raw["source"]


def read_rows(data: Path) -> list[Row]:
    """Rows A and B, batch 1, GPU, with a graph, on a device that has a profile."""
    rows: list[Row] = []
    networks: dict[str, Network] = {}
    works: dict[tuple[str, str], Work] = {}
    with (data / "published.csv").open(newline="") as file:
        for raw in csv.DictReader(file):
            usable = raw["onnx"] and raw["quality"] in ("A", "B") and raw["engine"] == "GPU" and raw["batch"] == "1"
            if not usable or raw["device"] not in DEVICES or _contradicted(raw):
                continue
            name, precision, device = raw["onnx"], raw["precision"].lower(), DEVICES[raw["device"]]
            if name not in networks:
                networks[name] = read_network(data / "onnx" / f"{name}.stripped.onnx")
            if (name, precision) not in works:
                works[name, precision] = describe_work(networks[name], precision)  # type: ignore[arg-type]  # from a file
            rows.append(
                Row(
                    family=family_of(name),
                    network=name,
                    ops=frozenset(kernel.op for kernel in networks[name].kernels),
                    macs=networks[name].macs,
                    precision=precision,
                    device=device,
                    profile=load_profile(device),
                    mode="15W" if raw["power_mode"] == "15W" else None,
                    ms=float(raw["latency_ms"]),
                    quality=raw["quality"],
                    harness=harness_of(raw, device),
                    work=works[name, precision],
                )
            )
    return rows


def fit(rows: Sequence[Row]) -> tuple[Constants, dict[str, float]]:
    """Constants and harness offsets: robust least squares of log ratios, each (family, device) with the same weight."""
    sources = sorted({row.harness for row in rows if row.harness})
    weight = Counter((row.family, row.device) for row in rows)
    start = np.log(list(asdict(PRIOR).values()))

    def unpack(z: Array) -> tuple[Constants, dict[str, float]]:
        values = dict(zip(NAMES, map(float, np.exp(z[: len(NAMES)])), strict=True))
        return Constants(**values), dict(zip(sources, map(float, z[len(NAMES) :]), strict=True))

    def residuals(z: Array) -> Array:
        constants, offsets = unpack(z)
        data = [2 * log_ratio(row, constants, offsets) / np.sqrt(weight[row.family, row.device]) for row in rows]
        return np.asarray([*data, *(PRIOR_WEIGHT * (z[: len(NAMES)] - start))])

    lowest = np.concatenate([np.log(list(asdict(LOWEST).values())), np.zeros(len(sources))])
    highest = np.concatenate([np.log(list(asdict(HIGHEST).values())), np.full(len(sources), MAX_OFFSET_MS)])
    found = least_squares(
        residuals,
        np.concatenate([start, np.full(len(sources), 0.2)]),
        bounds=(lowest, highest),
        loss="soft_l1",
        f_scale=0.3,
    )
    return unpack(found.x)


def log_ratio(row: Row, constants: Constants, offsets: dict[str, float]) -> float:
    predicted = row.predict(constants) + offsets.get(row.harness or "", 0.0)
    return float(np.log(predicted / row.ms))


def leave_out(rows: Sequence[Row], key: Callable[[Row], str]) -> dict[str, list[float]]:
    """Log ratios predicted / published of every held-out group."""
    held: dict[str, list[float]] = {}
    for group in sorted({key(row) for row in rows}):
        constants, offsets = fit([row for row in rows if key(row) != group])
        held[group] = [log_ratio(row, constants, offsets) for row in rows if key(row) == group]
    return held


def coverage(held: dict[str, list[float]], inflation: float) -> float:
    """Share of rows inside the 95 % interval that the other groups' errors give, widened in log scale."""
    inside = 0
    for group, values in held.items():
        others = np.concatenate([np.asarray(v) for g, v in held.items() if g != group])
        low, high = inflation * np.quantile(others, [0.025, 0.975])
        inside += int(np.sum((np.asarray(values) >= low) & (np.asarray(values) <= high)))
    return inside / sum(map(len, held.values()))


def summary(held: dict[str, list[float]]) -> dict[str, Any]:
    """Errors of held-out groups, and the factors of an interval that holds 95 % of a group it has not seen."""
    every = np.concatenate([np.asarray(values) for values in held.values()])
    inflation = next((k for k in np.arange(1.0, 3.01, 0.05) if coverage(held, k) >= COVERAGE), 3.0)
    low, high = np.exp(-inflation * np.quantile(every, [0.975, 0.025]))
    return {
        "n": len(every),
        "mape": round(float(np.mean(np.abs(np.expm1(every)))), 4),
        "predicted_over_published_q025": round(float(np.exp(np.quantile(every, 0.025))), 4),
        "predicted_over_published_q975": round(float(np.exp(np.quantile(every, 0.975))), 4),
        "coverage_of_quantiles_of_other_groups": round(coverage(held, 1.0), 4),
        "inflation": round(float(inflation), 2),
        "coverage_after_inflation": round(coverage(held, inflation), 4),
        "interval_factors": [round(float(low), 3), round(float(high), 3)],
        "groups": {
            group: {
                "n": len(values),
                "mape": round(float(np.mean(np.abs(np.expm1(values)))), 4),
                "bias": round(float(np.exp(np.mean(values))), 4),
            }
            for group, values in held.items()
        },
    }


def validate(rows: Sequence[Row]) -> dict[str, Any]:
    constants, offsets = fit(rows)
    sample = np.asarray([log_ratio(row, constants, offsets) for row in rows])
    ranges: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        ranges[str(row.profile.compute_capability)].append(row.macs / 1e9)
    predicted = [row.predict(constants) for row in rows]
    families = leave_out(rows, lambda row: row.family)
    devices = leave_out(rows, lambda row: row.device)
    return {
        "n": len(rows),
        "n_quality_a": sum(row.quality == "A" for row in rows),
        "constants": {name: float(f"{value:.4g}") for name, value in asdict(constants).items()},
        "harness_offset_ms": {name: round(value, 3) for name, value in offsets.items()},
        "in_sample_mape": round(float(np.mean(np.abs(np.expm1(sample)))), 4),
        "spearman": round(float(scipy.stats.spearmanr(predicted, [row.ms for row in rows]).statistic), 4),
        "leave_one_family_out": summary(families),
        "leave_one_device_out": summary(devices),
        "gmacs": {key: [round(min(v), 3), round(max(v), 3)] for key, v in sorted(ranges.items())},
        "precisions": {
            key: sorted({row.precision for row in rows if row.profile.compute_capability == key})
            for key in sorted(ranges)
        },
        "devices": sorted({row.device for row in rows}),
        "ops": sorted({op for row in rows for op in row.ops}),
    }


def split(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Orin has enough rows for constants of its own; all other devices share a set."""
    orin = [row for row in rows if row.profile.compute_capability == "8.7"]
    return {"orin": orin, "general": [row for row in rows if row.profile.compute_capability != "8.7"]}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "latency")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "latency_roofline.json")
    options = parser.parse_args(arguments)
    if not (options.data / "published.csv").exists():
        print(f"expected published.csv at {options.data}; got none; name its folder with --data")
        return 2
    rows = read_rows(options.data)
    sets = {name: validate(part) for name, part in split(rows).items()}
    result = {
        "what": "latency roofline against published TensorRT latencies (quality A and B), one group held out",
        "command": "python benchmarks/latency_roofline.py",
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "scipy": scipy.__version__,
            "onnx": onnx.__version__,
        },
        "seed": None,
        "sets": sets,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, part in sets.items():
        family, device = part["leave_one_family_out"], part["leave_one_device_out"]
        print(
            f"{name}: n={part['n']} in-sample {part['in_sample_mape']:.1%}, family held out {family['mape']:.1%} "
            f""
            f"(interval {family['interval_factors']}), device held out {device['mape']:.1%} "
            f"(interval {device['interval_factors']})"
        )
        shipped = asdict(SETS[name].constants)
        drift = max(abs(part["constants"][key] / shipped[key] - 1) for key in shipped)
        print(f"  shipped constants differ from this fit by at most {drift:.2%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
