"""What the cells show: the gates' verdicts, the trade-off over beta, and every failure and severity."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gates.trials import RECORD
from benchmarks.robustness.cells import STREET, Cell
from benchmarks.robustness.evaluate import (
    BATCH,
    CLEAN,
    CONDITIONS,
    EVERY_CONDITION,
    GATE_BATCHES,
    LOOK_BATCHES,
    WORST,
    Samples,
)
from fusepress.pipeline.evidence import Verdict
from fusepress.pipeline.gates import Replicates, compare, judge, overall
from fusepress.pipeline.recipe import GatesConfig, load_recipe
from fusepress.pipeline.stages.base import tool_versions
from fusepress.pipeline.store import atomic_write_text
from fusepress.pipeline.task import LoadedTask, load_task

REPLICATES = 2000
OTHERS = [condition for condition in EVERY_CONDITION if condition not in CONDITIONS]
Networks = Mapping[str, Samples]


def write_report(store: Path, cells: Sequence[Cell], left: Sequence[str], results: Path, command: str) -> None:
    """Tables (JSON and Markdown) and plots of the finished cells."""
    from benchmarks.robustness.run import CONSTANT, figures_of, samples_of

    loaded = load_recipe(STREET)
    task = load_task(loaded.recipe.task, base=loaded.base)
    gates = loaded.recipe.gates.model_copy(update={"latency": None, "floors": {}})
    constant = json.loads((store / CONSTANT).read_text())
    dense = samples_of(store, None)
    rows = [
        _row(
            task, cell, json.loads(figures_of(store, cell).read_text()), dense, samples_of(store, cell), gates, constant
        )
        for cell in cells
    ]
    networks = {"dense": dense, **{cell.name: samples_of(store, cell) for cell in cells}}
    networks = {
        name: samples for name, samples in networks.items() if any(samples.has([one], LOOK_BATCHES) for one in OTHERS)
    }
    found = {
        "command": command,
        "versions": tool_versions("torch", "numpy", "scipy"),
        "samples": BATCH * GATE_BATCHES,
        "samples_of_every_failure": BATCH * LOOK_BATCHES,
        "gates": gates.model_dump(mode="json"),
        "constant": constant[task.primary],
        "dense": {_name(c): _metric(task, dense, c) for c in CONDITIONS},
        "cells": rows,
        "every_failure": {
            name: {
                _name(c): _metric(task, samples, c, LOOK_BATCHES)
                for c in EVERY_CONDITION
                if samples.has([c], LOOK_BATCHES)
            }
            for name, samples in networks.items()
        },
        "left": list(left),
    }
    results.mkdir(parents=True, exist_ok=True)
    atomic_write_text(results / "robustness.json", json.dumps(found, indent=1) + "\n")
    atomic_write_text(results / "robustness.md", _text(found))
    _plot(found, results / "beta.svg")


def _name(condition: tuple[str, int]) -> str:
    return "clean" if condition == CLEAN else "{}@{}".format(*condition)


def _metric(task: LoadedTask, samples: Samples, condition: tuple[str, int], batches: int = GATE_BATCHES) -> float:
    return task.score(samples.load(condition, batches)[0])[task.primary]


def _row(
    task: LoadedTask,
    cell: Cell,
    figures: Mapping[str, Mapping[str, Any]],
    dense: Samples,
    own: Samples,
    gates: GatesConfig,
    constant: Mapping[str, float],
) -> dict[str, Any]:
    verdicts = judge(RECORD, replicates_of(task.score, dense, own, cell.seed, constant), gates, task.metrics)
    return {
        "cell": {name: getattr(cell, name) for name in cell.__dataclass_fields__},
        "name": cell.name,
        "macs": figures["finetune"]["macs"] / figures["baseline"]["macs"],
        "latency_ms": figures["finetune"]["latency.mean_ms"],
        "latency_dense_ms": figures["baseline"]["latency.mean_ms"],
        "metrics": {_name(c): _metric(task, own, c) for c in CONDITIONS},
        "verdict": overall(verdicts)[0],
        "verdicts": [_verdict(one) for one in verdicts],
    }


def _verdict(one: Verdict) -> dict[str, Any]:
    return one.model_dump(mode="json", include={"gate", "verdict", "limit", "value", "low", "high", "why"})


def replicates_of(
    score: Callable[..., Mapping[str, float]], dense: Samples, own: Samples, seed: int, constant: Mapping[str, float]
) -> Replicates:
    """What `verify` stores of such a pair, from the same samples under every condition."""

    def condition(where: tuple[str, int]) -> Any:
        (before, groups), (after, same) = (network.load(where, GATE_BATCHES) for network in (dense, own))
        if groups != same:
            raise ValueError(f"expected the same samples of both networks; got others under {where}; evaluate again")
        return compare(before, after, score, groups, replicates=REPLICATES, seed=seed)

    groups = dense.load(CLEAN, GATE_BATCHES)[1]
    return Replicates(
        clean=condition(CLEAN),
        failures={where: condition(where) for where in CONDITIONS if where != CLEAN},
        constant=dict(constant),
        samples=len(groups),
        clusters=len(set(groups)),
        artifact_sha256=RECORD.artifacts["onnx"].sha256,
    )


def _text(found: Mapping[str, Any]) -> str:
    """The Markdown page."""
    columns = [_name(condition) for condition in CONDITIONS]
    header = ["Scored and trained on", "beta", "Remedy", "MACs", "Predicted ms", *columns, "Gates", "Failed"]
    dense = found["dense"]
    lines = [["dense", "", "", "100 %", _latency(found["cells"], "latency_dense_ms")]]
    lines[0] += [f"{dense[name]:.4f}" for name in columns] + ["", ""]
    for row in found["cells"]:
        cell = row["cell"]
        failed = [v["gate"].removeprefix("robustness.") for v in row["verdicts"] if v["verdict"] != "PASS"]
        lines.append(
            [
                cell["data"],
                f"{cell['beta']:g}",
                cell["remedy"],
                f"{100 * row['macs']:.1f} %",
                _latency([row], "latency_ms"),
                *(f"{row['metrics'][name]:.4f}" for name in columns),
                row["verdict"],
                ", ".join(failed),
            ]
        )
    parts = [
        "# Street under failed sensors",
        f"`{found['command']}`; {found['samples']} eval samples in streets of four frames, mIoU; versions "
        + ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        + f". A constant prediction has {found['constant']:.4f}. Latency: predicted for jetson-agx-orin-64gb, fp16. "
        "Gates: accuracy and robustness of `examples/street/recipe.yaml`, on the fine-tuned torch networks.",
        table(header, lines),
        "## Extra drops",
        table(
            ["Cell", "Gate", "Verdict", "Value", "95 % interval", "Limit"],
            [
                [
                    f"{r['cell']['data']}, beta {r['cell']['beta']:g}, {r['cell']['remedy']}",
                    f"`{v['gate']}`",
                    v["verdict"],
                    f"{v['value']:.4f}",
                    f"{v['low']:.4f} to {v['high']:.4f}",
                    f"{v['limit']:g}",
                ]
                for r in found["cells"]
                for v in r["verdicts"]
            ],
        ),
    ]
    if found["every_failure"]:
        names = list(found["every_failure"])
        rows = [
            [name, *(_figure(found["every_failure"][network].get(name)) for network in names)]
            for name in map(_name, EVERY_CONDITION)
        ]
        told = f"{found['samples_of_every_failure']} samples, too few to judge by; to look at."
        parts += ["## Every failure and severity", told, table(["Failure@severity", *names], rows)]
    if found["left"]:
        parts.append("Not run yet: " + ", ".join(found["left"]) + ".")
    return "\n\n".join(parts) + "\n"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _latency(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    if not rows:
        return ""
    found = rows[0][key]
    return f"{found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _plot(found: Mapping[str, Any], path: Path) -> None:
    """The metric with all sensors and with one dead, over beta: a panel for each kind of data, remedies as marks."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "fusepress"  # equal figures are equal bytes
    from matplotlib import pyplot

    kinds = list(dict.fromkeys(row["cell"]["data"] for row in found["cells"]))
    figure, panels = pyplot.subplots(
        1, len(kinds), figsize=(1.5 + 4.2 * len(kinds), 4.4), sharey=True, squeeze=False, layout="constrained"
    )
    colours = dict(zip(map(_name, CONDITIONS), ("#1b6ca8", "#c0392b", "#1e8449", "#b9770e"), strict=True))
    marks = {"dropout": "^", "more dropout": "v", "scores": "s", "both": "D"}
    for axes, kind in zip(panels[0], kinds, strict=True):
        rows = [row for row in found["cells"] if row["cell"]["data"] == kind]
        betas = sorted({row["cell"]["beta"] for row in rows})
        plain = sorted((r for r in rows if r["cell"]["remedy"] == "none"), key=lambda r: r["cell"]["beta"])
        for name, colour in colours.items():
            axes.axhline(found["dense"][name], color=colour, linewidth=0.8, linestyle="--")
            axes.plot(
                [betas.index(row["cell"]["beta"]) for row in plain],
                [row["metrics"][name] for row in plain],
                color=colour,
                marker="o",
                label=name,
            )
            for row in rows:
                if row["cell"]["remedy"] != "none":
                    mark, place = marks[row["cell"]["remedy"]], betas.index(row["cell"]["beta"]) + 0.12
                    axes.plot(place, row["metrics"][name], marker=mark, color=colour, markerfacecolor="none")
        ticks = [f"{beta:g}" + _tick(plain, beta) for beta in betas]
        axes.set_xticks(range(len(betas)), ticks)
        axes.set_xlim(-0.4, len(betas) - 0.5)
        axes.set_title(f"trained on {kind} frames" if kind == "healthy" else f"trained on frames with {kind}")
        axes.set_xlabel("beta, and predicted ms")
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("mIoU (dashed: dense)")
    panels[0][0].legend(fontsize=8)
    marks_told = "open marks: remedies (triangle dropout, upside down more of it, square scores, diamond both)"
    figure.suptitle(f"{marks_told}; failures at severity {WORST}", fontsize=9)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _tick(plain: Sequence[Mapping[str, Any]], beta: float) -> str:
    found = [row["latency_ms"]["value"] for row in plain if row["cell"]["beta"] == beta]
    return f"\n{found[0]:.3f} ms" if found else ""
