"""Plots of the tables: the metric against MACs, predicted latency and measured host latency."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Section = tuple[str, str, str, float, list[dict[str, Any]]]
AXES = {
    "macs": "multiply-accumulates kept, %",
    "predicted_ms": "predicted latency on the target, ms (fp16)",
    "host_ms": "measured latency on this host, ms (ONNX Runtime, fp32)",
}
MARKS = "osD^v<>PX*hp"


def draw(sections: Sequence[Section], out: Path) -> list[Path]:
    """One SVG an axis that has figures, of the structured street tables."""
    made = []
    for axis, label in AXES.items():
        points = _points(sections, axis)
        if points:
            made.append(_plot(points, _dense(sections), label, out / f"miou_{axis}.svg"))
    return made


def _points(sections: Sequence[Section], axis: str) -> dict[str, list[tuple[float, float, float]]]:
    """Row -> (x, mean, sd) at each budget."""
    points: dict[str, list[tuple[float, float, float]]] = {}
    for _, task, kind, _, rows in sections:
        if (task, kind) != ("street", "structured"):
            continue
        for row in rows:
            x = 100 * row["macs"] if axis == "macs" else row["latency"].get(axis)
            if row["macs"] == 1.0:
                continue
            point = None if x is None else (x, row["after"], row["after_sd"] or 0.0)
            if point is not None and point not in points.setdefault(row["label"], []):
                points[row["label"]].append(point)
    return points


def _dense(sections: Sequence[Section]) -> float | None:
    """What the dense network reaches, as it is."""
    rows = [row for _, task, _, _, rows in sections if task == "street" for row in rows]
    return next((float(row["after"]) for row in rows if row["method"] == "dense"), None)


def _plot(points: dict[str, list[tuple[float, float, float]]], dense: float | None, label: str, path: Path) -> Path:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "fusepress"  # equal figures are equal bytes
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9.0, 5.2), layout="constrained")
    for number, (name, found) in enumerate(points.items()):
        found = sorted(found)
        axes.errorbar(
            [x for x, _, _ in found],
            [mean for _, mean, _ in found],
            [sd for _, _, sd in found],
            marker=MARKS[number % len(MARKS)],
            markersize=5,
            linewidth=1,
            capsize=2,
            linestyle="none" if len(found) < 2 else "-",
            color=pyplot.get_cmap("tab20")(number % 20),
            label=name,
        )
    if dense is not None:
        axes.axhline(dense, color="black", linewidth=0.8, linestyle="--", label="dense, as trained")
    axes.set_xlabel(label)
    axes.set_ylabel("mIoU after fine-tuning, mean and sd over seeds")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path
