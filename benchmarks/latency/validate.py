"""Fit the latency prediction on published TensorRT latencies, and show how wrong it is on what the fit has not seen.

Run: python benchmarks/latency/validate.py [--data FOLDER] [--out FOLDER] [--write]; data is published.csv and onnx/.
With --write the constants go to targets/profiles/latency.json, which predictions read.

Rows of quality A (trtexec, load generator, forward only) and B (timed by a framework) at batch 1 on the GPU are fitted,
where the network's graph and the device's profile are at hand. Rows of quality C (ambiguous) are never fitted, only
compared. Each error that is printed is of a row whose model family, or whose device, was not in the fit. Harnesses are
part of the comparison: an offset a source, and the cost of starting kernels without a CUDA graph; a held-out family
that alone had its source gets the typical offset of the others. The interval of a row comes from the errors of the
other groups' rows, each held out in the same way (`fit.interval_widths`), by the rule that predictions follow; the fits
behind these errors lacked their own group alone, so that they had the row's. Orin has constants of its own; all other
GPUs share a set. The form of the model was chosen on these rows, too, so that errors on rows of other publishers may be
larger.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import platform
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import onnx
import scipy
from scipy.stats import binomtest, spearmanr

from fusepress.targets.fit import (
    FitRow,
    Fitted,
    describe_set,
    devices_of_several_families,
    fit_rows,
    interval_widths,
    leave_out,
)
from fusepress.targets.network import Network, read_network
from fusepress.targets.predict import COVERAGE
from fusepress.targets.profile import PROFILE_FOLDER, Precision, load_profile
from fusepress.targets.work import Work, describe_work

ROOT = Path(__file__).resolve().parents[2]
COMMAND = "python benchmarks/latency/validate.py --write"
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
SIBLINGS = frozenset(["yolov5", "yolov8", "yolo11", "yolo12"])
ORIN = "8.7"
WORST = 8
# What is known about rows that are far off, by words that all occur in a row's description; "likely" where nobody has
# looked at the engine.
CAUSES: tuple[tuple[str, str], ...] = (
    ("efficientvit", "likely fewer kernels than counted: TensorRT compiles its linear attention into a few"),
    ("thor", "no document gives its L2: the model lets nothing stay in a cache that is there"),
    ("gb10 int8", "published INT8 is slower than FP16 there: what the builder chose is not known"),
    ("2060 int8", "likely INT8 kernels of Turing: the shared efficiency comes from newer GPUs"),
    ("yolov8-cls", "0.3 to 1 ms published: of this the harness is a large and unknown part"),
    ("yolo11n nano", "published twice, up to 8 % apart"),
    ("orin fp32", "TF32 is assumed in every layer; in which ones the builder took it is not known"),
    ("fp32", "likely no TF32 tensor cores, or layers in which the builder did not take them"),
    ("a100", "1 to 4 ms published: of this the harness is a considerable and unknown part"),
    ("", "not known"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """The rows of published.csv that can be compared."""

    fitted: list[FitRow] = field(default_factory=list)
    ambiguous: list[FitRow] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def family_of(graph: str) -> str:
    if "-cls" in graph:
        return "yolov8-cls"
    return next(family for family in FAMILIES if graph.startswith(family))


def source_of(raw: Mapping[str, str]) -> tuple[str, bool, Precision]:
    """Whose harness (rows of one share an offset), whether it replays a CUDA graph, and what INT8 leaves over.

    MLPerf's harness replays graphs, measures in C++ and builds INT8 beside FP16. mmdeploy builds INT8 beside FP16, too;
    Ultralytics and the trtexec rows allow INT8 alone, which leaves the rest in FP32.
    """
    source = raw["source"]
    if source.startswith("mlcommons"):
        return "", True, "fp16"
    if source.startswith("open-mmlab"):
        return "mmdeploy", False, "fp16"
    if "docs.ultralytics.com/guides" in source:
        return "ultralytics-guides", False, "fp32"
    if source.startswith("YOLOv10 paper"):
        return "yolov10-paper", False, "fp32"
    if "ultralytics" in source or source.startswith("Zvioling"):
        return "ultralytics-tables", False, "fp32"
    return source.split("/")[0], False, "fp32"


def unusable(raw: Mapping[str, str]) -> str | None:
    """Why a row cannot be compared."""
    if not raw["onnx"]:
        return "no graph at hand"
    if raw["device"] not in DEVICES:
        return "no profile of the device"
    if raw["engine"] != "GPU" or raw["batch"] != "1":
        return "not one image on the GPU"
    if raw["device"] == "A100" and "integrations/tensorrt" in raw["source"]:
        return "contradicted: a third of what the same publisher gives for the same network elsewhere"
    return None


def read_published(data: Path) -> Published:
    """Rows with a graph and a profile, apart by whether their quality allows fitting."""
    found = Published()
    networks: dict[str, Network] = {}
    works: dict[tuple[str, str, str], Work] = {}
    with (data / "published.csv").open(newline="") as file:
        for raw in csv.DictReader(file):
            why = unusable(raw)
            if why is not None:
                found.left_out[why] += 1
                continue
            name, profile = raw["onnx"], load_profile(DEVICES[raw["device"]])
            source, cuda_graph, remainder = source_of(raw)
            precision: Precision = raw["precision"].lower()  # type: ignore[assignment]  # checked by its readers
            if name not in networks:
                networks[name] = read_network(data / "onnx" / f"{name}.stripped.onnx")
            key = (name, precision, remainder)
            if key not in works:
                works[key] = describe_work(networks[name], precision, remainder)
            row = FitRow(
                network=name,
                family=family_of(name),
                profile=profile,
                mode="15W" if raw["power_mode"] == "15W" else profile.default_mode,
                precision=precision,
                remainder=remainder,
                ms=float(raw["latency_ms"]),
                source=source,
                cuda_graph=cuda_graph,
                graph=networks[name],
                work=works[key],
                quality=raw["quality"],
            )
            (found.ambiguous if raw["quality"] == "C" else found.fitted).append(row)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A row, and what a fit without its group predicted for it (with its harness)."""

    row: FitRow
    predicted_ms: float
    group: str

    @property
    def log_error(self) -> float:
        """Log of predicted over published."""
        return math.log(self.predicted_ms / self.row.ms)


def hold_out(rows: Sequence[FitRow], group_of: Any) -> list[Held]:
    """Every row predicted by a fit without its group."""
    errors = leave_out(rows, group_of)
    found = []
    for group, values in errors.items():
        members = [row for row in rows if group_of(row) == group]
        found += [
            Held(row=row, predicted_ms=row.ms * math.exp(value), group=str(group))
            for row, value in zip(members, values, strict=True)
        ]
    return found


def errors_of(held: Iterable[Held]) -> dict[str, Any]:
    """Mean absolute relative error, and the geometric mean of predicted over published."""
    logs = np.asarray([h.log_error for h in held])
    return {
        "n": len(logs),
        "mape": round(float(np.mean(np.abs(np.expm1(logs)))), 4),
        "bias": round(float(np.exp(np.mean(logs))), 4),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A held-out row, and the interval that the other groups' rows give it."""

    inside: bool
    known: bool  # its device was in the fit


def judge(held: Sequence[Held], key: Any, families: Sequence[Held], devices: Sequence[Held]) -> list[Judged]:
    """Whether rows lie in the interval of their kind: by the width of a known device where the fit had their device.

    The widening of extrapolating predictions is left out: with it more rows would lie inside.
    """
    several = devices_of_several_families(h.row for h in families)
    found = []
    for group in sorted({h.group for h in held}):
        rest = [[(h.row, h.log_error) for h in part if key(h.row) != group] for part in (families, devices)]
        widths = interval_widths(rest[0], rest[1], several)
        if widths is None:
            continue
        for h in held:
            if h.group == group:
                known = key is family_key and h.row.profile.name in widths.calibrated
                width = widths.known if known else widths.other
                found.append(Judged(inside=abs(h.log_error) <= width, known=known))
    return found


def family_key(row: FitRow) -> str:
    return row.family


def device_key(row: FitRow) -> str:
    return row.profile.name


def covered(families: Sequence[Held], devices: Sequence[Held]) -> dict[str, Any]:
    """Shares inside, by what was held out."""
    of_family, of_device = (
        judge(held, key, families, devices) for held, key in ((families, family_key), (devices, device_key))
    )
    both = [*of_family, *of_device]
    parts = {
        "families": of_family,
        "families, their device in the fit": [j for j in of_family if j.known],
        "families, and their device with them": [j for j in of_family if not j.known],
        "devices": of_device,
        "pooled": both,
    }
    return {name: coverage_of(sum(j.inside for j in part), len(part)) for name, part in parts.items() if part}


def coverage_of(inside: int, count: int) -> dict[str, Any]:
    interval = binomtest(inside, count).proportion_ci(0.95, method="exact")
    return {
        "inside": inside,
        "n": count,
        "share": round(inside / count, 4),
        "low": round(float(interval.low), 4),
        "high": round(float(interval.high), 4),
        "nominal": COVERAGE,
        "compatible": bool(interval.low <= COVERAGE <= interval.high),
    }


def by(held: Sequence[Held], key: Any) -> dict[str, Any]:
    groups: dict[str, list[Held]] = defaultdict(list)
    for h in held:
        groups[str(key(h))].append(h)
    return {name: errors_of(members) for name, members in sorted(groups.items())}


def ranks(held: Sequence[Held]) -> dict[str, Any]:
    """Rank correlation within each device, of held-out predictions."""
    devices: dict[str, list[Held]] = defaultdict(list)
    for h in held:
        devices[h.row.profile.name].append(h)
    return {
        name: {
            "n": len(members),
            "spearman": round(float(spearmanr([h.predicted_ms for h in members], [h.row.ms for h in members])[0]), 4),
        }
        for name, members in sorted(devices.items())
    }


def cause_of(row: FitRow) -> str:
    what = f"{row.family} {row.network} {row.profile.name} {row.precision}"
    return next(cause for key, cause in CAUSES if all(word in what for word in key.split()))


def worst(held: Sequence[Held]) -> list[dict[str, Any]]:
    """The rows furthest off, each family on a device once."""
    seen, found = set(), []
    for h in sorted(held, key=lambda h: -abs(h.log_error)):
        key = (h.row.family, h.row.profile.name)
        if key in seen:
            continue
        seen.add(key)
        found.append({**row_json(h), "cause": cause_of(h.row)})
    return found[:WORST]


def row_json(h: Held) -> dict[str, Any]:
    return {
        "network": h.row.network,
        "device": h.row.profile.name,
        "mode": h.row.mode,
        "precision": h.row.precision,
        "quality": h.row.quality,
        "source": h.row.source or "load generator",
        "published_ms": h.row.ms,
        "predicted_ms": round(h.predicted_ms, 4),
        "ratio": round(h.predicted_ms / h.row.ms, 3),
    }


def rows_json(part: Validated) -> list[dict[str, Any]]:
    """Every row, predicted without its family and without its device."""
    apart = {id(h.row): h.predicted_ms for h in part.devices}
    return [{**row_json(h), "device_held_out_ms": round(apart[id(h.row)], 4)} for h in part.families]


@dataclass(frozen=True, slots=True, kw_only=True)
class Validated:
    """One set of constants: what is stored of it, and what was seen of its errors."""

    stored: dict[str, Any]
    report: dict[str, Any]
    families: list[Held]
    devices: list[Held]


def validate(rows: Sequence[FitRow], ambiguous: Sequence[FitRow]) -> Validated:
    fitted = fit_rows(rows)
    families, devices = hold_out(rows, family_key), hold_out(rows, device_key)
    several = devices_of_several_families(rows)
    by_family, by_device = ([(h.row, h.log_error) for h in held] for held in (families, devices))
    widths = interval_widths(by_family, by_device, several)
    assert widths is not None
    unseen = [Held(row=row, predicted_ms=without(rows, row).predict(row), group=row.family) for row in ambiguous]
    alike = [h for h in families if h.row.family in SIBLINGS]
    unlike = [h for h in families if h.row.family not in SIBLINGS]
    report = {
        "n": len(rows),
        "n_by_quality": dict(sorted(Counter(row.quality for row in rows).items())),
        "leave_one_family_out": {
            "all": errors_of(families),
            "siblings": errors_of(alike),
            "unlike": errors_of(unlike) if unlike else None,
            "by_family": by(families, lambda h: h.row.family),
            "by_precision": by(families, lambda h: h.row.precision),
            "by_quality": by([*families, *unseen], lambda h: h.row.quality),
        },
        "leave_one_device_out": {"all": errors_of(devices), "by_device": by(devices, lambda h: h.row.profile.name)},
        "spearman_within_device": ranks(families),
        "coverage": covered(families, devices),
        "harness_offset_ms": {name: round(value, 3) for name, value in fitted.offset_ms.items()},
        "worst": worst([*families, *devices]),
    }
    return Validated(stored=describe_set(rows, fitted, widths), report=report, families=families, devices=devices)


def without(rows: Sequence[FitRow], row: FitRow) -> Fitted:
    """A fit without the family of a row that is only compared; kept, for several rows share it."""
    if row.family not in _KEPT:
        _KEPT[row.family] = fit_rows([other for other in rows if other.family != row.family])
    return _KEPT[row.family]


_KEPT: dict[str, Fitted] = {}


def plot(held: Sequence[Held], title: str, path: Path) -> None:
    """Predicted against published, both logarithmic."""
    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    plt.rcParams["svg.hashsalt"] = "fusepress"
    figure, axes = plt.subplots(figsize=(5.2, 5.0), layout="constrained")
    marks = dict(zip(sorted({h.row.family for h in held}), "osD^v<>Pp*", strict=False))
    colours = {"fp32": "#444444", "fp16": "#1f77b4", "int8": "#d62728"}
    for h in held:
        axes.plot(h.row.ms, h.predicted_ms, marks[h.row.family], color=colours[h.row.precision], ms=5, alpha=0.7)
    ends = [0.8 * min(h.row.ms for h in held), 1.25 * max(h.row.ms for h in held)]
    axes.plot(ends, ends, "-", color="#999999", lw=1)
    for factor in (0.75, 1.25):
        axes.plot(ends, [factor * end for end in ends], ":", color="#bbbbbb", lw=1)
    axes.set(xscale="log", yscale="log", xlabel="published, ms", ylabel="predicted without its group, ms", title=title)
    for name, mark in marks.items():
        axes.plot([], [], mark, color="#777777", label=name)
    for precision, colour in colours.items():
        axes.plot([], [], "-", color=colour, label=precision)
    axes.legend(fontsize=7, ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    plt.close(figure)


def pooled_coverage(sets: Mapping[str, Validated]) -> dict[str, Any]:
    """Of all rows, each with its family and with its device held out."""
    parts = [part.report["coverage"]["pooled"] for part in sets.values()]
    return coverage_of(sum(part["inside"] for part in parts), sum(part["n"] for part in parts))


def summary(sets: Mapping[str, Validated], left_out: Mapping[str, int]) -> str:
    """The report as Markdown."""
    lines = [
        "# Predicted latency against published latencies",
        "",
        f"Written by `{COMMAND}`. Every error is of rows that the fit did not see: their model family, or",
        "their device, was held out. Published by others; nothing here was measured by us.",
        "",
    ]
    pooled = pooled_coverage(sets)
    lines += [
        "Each row counts twice, with its family and with its device held out. A family takes the only rows of some",
        "devices with it: such a row is judged by the wider interval of a device that is not in the fit, as a user's",
        f"network is (without what extrapolating predictions add). Of all {pooled['n']} the 90 % interval",
        f"holds {pooled['share']:.1%} (exact 95 % interval, as if all were independent: {pooled['low']:.1%} to",
        f"{pooled['high']:.1%}); {_missed(sets)}.",
        "",
    ]
    for name, part in sets.items():
        lines += [*set_lines(name, part.report), ""]
    lines += ["## Rows that were not used", "", "| why | rows |", "|---|---|"]
    lines += [f"| {why} | {count} |" for why, count in sorted(left_out.items())]
    return "\n".join(lines) + "\n"


def _missed(sets: Mapping[str, Validated]) -> str:
    """Sets whose own interval does not keep what it promises, however the others make up for it."""
    short = [
        f"of the set {name} {found['share']:.1%}, which is not compatible with 90 %"
        for name, found in ((name, part.report["coverage"]["pooled"]) for name, part in sets.items())
        if not found["compatible"]
    ]
    return "; ".join(short) or "each set by itself is compatible with 90 %"


def set_lines(name: str, report: Mapping[str, Any]) -> list[str]:
    quality = ", ".join(f"{count} {letter}" for letter, count in report["n_by_quality"].items())
    lines = [f"## {name}: {report['n']} rows ({quality})", "", "| held out | n | mean error | predicted/published |"]
    lines += ["|---|---|---|---|"]
    family, device = report["leave_one_family_out"], report["leave_one_device_out"]
    parts: list[tuple[str, Any]] = [("families, all", family["all"]), ("sibling families (YOLO)", family["siblings"])]
    if family["unlike"]:
        parts.append(("unlike families", family["unlike"]))
    parts += [(f"family {key}", value) for key, value in family["by_family"].items()]
    parts += [(f"families, {key}", value) for key, value in family["by_precision"].items()]
    parts += [(f"families, quality {key}", value) for key, value in family["by_quality"].items()]
    parts += [("devices, all", device["all"])]
    parts += [(f"device {key}", value) for key, value in device["by_device"].items()]
    lines += [f"| {what} | {e['n']} | {e['mape']:.1%} | {e['bias']:.2f} |" for what, e in parts]
    lines += ["", "| 90 % interval | inside | share | exact 95 % interval of the share |", "|---|---|---|---|"]
    for what, c in report["coverage"].items():
        verdict = "" if c["compatible"] else ", not compatible with 90 %"
        lines.append(
            f"| {what} | {c['inside']} of {c['n']} | {c['share']:.1%} | {c['low']:.1%} to {c['high']:.1%}{verdict} |"
        )
    lines += ["", "| device | n | Spearman rank correlation |", "|---|---|---|"]
    lines += [f"| {key} | {r['n']} | {r['spearman']:.3f} |" for key, r in report["spearman_within_device"].items()]
    lines += ["", "Furthest off:", ""]
    for row in report["worst"]:
        lines.append(
            f"- {row['network']} {row['precision']} on {row['device']} ({row['mode']}): {row['predicted_ms']:.3g} ms "
            f"predicted, {row['published_ms']:.3g} published; {row['cause']}."
        )
    return lines


def headline(report: Mapping[str, Any], name: str) -> str:
    family, device = report["leave_one_family_out"]["all"], report["leave_one_device_out"]["all"]
    pooled = report["coverage"]["pooled"]
    return (
        f"{name}: n={report['n']}, family held out {family['mape']:.1%}, device held out {device['mape']:.1%}, "
        f"90 % interval holds {pooled['share']:.1%} ({pooled['low']:.1%} to {pooled['high']:.1%}) of {pooled['n']}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "latency")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "latency")
    parser.add_argument("--write", action="store_true", help="Write the constants that predictions read.")
    options = parser.parse_args(arguments)
    if not (options.data / "published.csv").exists():
        print(f"expected published.csv at {options.data}; got none; name its folder with --data")
        return 2
    published = read_published(options.data)
    sets = {}
    for name, is_orin in (("orin", True), ("general", False)):
        _KEPT.clear()
        rows, ambiguous = (
            [row for row in part if (row.profile.compute_capability == ORIN) == is_orin]
            for part in (published.fitted, published.ambiguous)
        )
        sets[name] = validate(rows, ambiguous)
        print(headline(sets[name].report, name))
        plot(sets[name].families, f"{name}: family held out", options.out / f"{name}-families.svg")
        plot(sets[name].devices, f"{name}: device held out", options.out / f"{name}-devices.svg")
    versions = {"python": platform.python_version()}
    versions |= {module.__name__: module.__version__ for module in (np, scipy, onnx, matplotlib)}
    result = {
        "what": "predicted against published TensorRT latencies; each row's family, or device, held out of the fit",
        "command": COMMAND,
        "versions": versions,
        "seed": None,
        "coverage": pooled_coverage(sets),
        "rows_not_used": dict(sorted(published.left_out.items())),
        "sets": {name: {**part.report, "fitted": part.stored, "rows": rows_json(part)} for name, part in sets.items()},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "validation.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "validation.md").write_text(summary(sets, published.left_out))
    if options.write:
        stored = {"schema": 1, "command": COMMAND, "sets": {name: part.stored for name, part in sets.items()}}
        (PROFILE_FOLDER / "latency.json").write_text(json.dumps(stored, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
