"""Tables and plots of the study: `python -m benchmarks.altermoma.report`, from runs/altermoma/runs.jsonl.

Writes benchmarks/results/altermoma.json and docs/altermoma-*.svg. Differences are paired by world (and seed); intervals
are Student's t at 95 %.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr
from scipy.stats import t as student

from benchmarks.altermoma import mechanism, runs, worlds
from benchmarks.altermoma.worlds import ROOT
from fusepress.pipeline.scoring.result import load_scores

RESULTS = ROOT / "benchmarks" / "results" / "altermoma.json"
DOCS = ROOT / "docs"
BASE = "beta 0"
BETAS = {BASE: 0.0, "masked, strong, beta 0.25": 0.25, "masked, strong, beta 0.5": 0.5, "masked, strong": 1.0}
FIT_SEED = 0  # worlds of this seed fit the rule; the others judge it
Row = dict[str, Any]


def gain(row: Row, other: Row) -> float:
    """How much better a run is than another, in the task's primary metric (the KITTI task's is an error)."""
    (name, value), *_ = row["finetuned"].items()
    difference = float(value - other["finetuned"][name])
    return -difference if row["redundancy_knob"] is None else difference


def paired(rows: Sequence[Row], label: str, against: str, chosen: Callable[[Row], bool]) -> dict[str, Any] | None:
    """Mean paired gain of one label over another, with its 95 % interval."""
    index = {(row["world"], row["spec"]["seed"], row["label"]): row for row in rows if chosen(row)}
    gains = [gain(row, index[w, s, against]) for (w, s, name), row in index.items()
             if name == label and (w, s, against) in index]  # fmt: skip
    if len(gains) < 2:
        return None if not gains else {"n": 1, "mean": gains[0]}
    mean, spread = float(np.mean(gains)), float(np.std(gains, ddof=1))
    half = float(student.ppf(0.975, len(gains) - 1)) * spread / math.sqrt(len(gains))
    return {"n": len(gains), "mean": mean, "low": mean - half, "high": mean + half}


def usual(row: Row) -> bool:
    return bool(row["spec"]["seed"] == 0 and row["spec"]["macs"] == runs.MACS)


def on_street(row: Row) -> bool:
    """The KITTI task's metric has another unit, and other budgets are no fair pair."""
    return bool(row["redundancy_knob"] is not None and row["spec"]["macs"] == runs.MACS)


def kitti_table(rows: Sequence[Row]) -> dict[str, dict[str, list[float]]]:
    """Budget -> label -> RMSE after and before fine-tuning, by seed."""
    table: dict[str, dict[str, list[float]]] = {}
    for row in sorted(rows, key=lambda row: row["spec"]["seed"]):
        if row["redundancy_knob"] is None:
            own = table.setdefault(f"{row['spec']['macs']:g}", {}).setdefault(row["label"], [])
            own += [round(row["finetuned"]["rmse"], 4), round(row["pruned"]["rmse"], 4)]
    return table


def tables(rows: Sequence[Row]) -> dict[str, Any]:
    """Every label against beta 0 and against Taylor on the street worlds, the twins among them."""
    labels = list(dict.fromkeys(row["label"] for row in rows))
    return {
        label: {other: paired(rows, label, other, on_street) for other in (BASE, "taylor", "noise", "unmasked")}
        for label in labels
    }


def beta_sweep(rows: Sequence[Row]) -> dict[str, dict[float, float]]:
    """World -> beta -> gain over beta 0."""
    worlds_seen = dict.fromkeys(row["world"] for row in rows)
    sweep: dict[str, dict[float, float]] = {}
    for world in worlds_seen:
        own = {row["label"]: row for row in rows if row["world"] == world and usual(row)}
        if BASE in own:
            sweep[world] = {beta: gain(own[label], own[BASE]) for label, beta in BETAS.items() if label in own}
    return sweep


def fitted_rule(sweep: Mapping[str, Mapping[float, float]], redundancy: Mapping[str, float]) -> dict[str, Any]:
    """The step rule (beta 0 below a threshold, b from it on) with the best mean gain on the given worlds.

    Ties go to the smaller beta and the higher threshold: to less masking.
    """
    names = [name for name in sweep if name in redundancy]
    thresholds = sorted({redundancy[name] for name in names}, reverse=True)
    betas = sorted(set.intersection(*(set(sweep[name]) for name in names)))
    best: dict[str, Any] = {"beta": 0.0, "from": 1.0, "gain": 0.0}
    for beta, threshold in itertools.product(betas, thresholds):
        value = float(np.mean([sweep[n][beta] if redundancy[n] >= threshold else 0.0 for n in names]))
        if value > best["gain"] + 1e-12:
            best = {"beta": beta, "from": threshold, "gain": value}
    return best | {"worlds": names, "betas": betas}


def judged_rule(rule: Mapping[str, Any], sweep: Mapping[str, Mapping[float, float]], redundancy: Mapping[str, float]
                ) -> dict[str, Any]:  # fmt: skip
    """What the rule gains over beta 0, and over beta 1, on worlds that it was not fitted on."""
    result = {}
    for name, by_beta in sweep.items():
        beta = rule["beta"] if redundancy.get(name, 0.0) >= rule["from"] else 0.0
        if name not in rule["worlds"] and beta in by_beta:
            best = max(by_beta, key=lambda b: (by_beta[b], -b))
            result[name] = {"beta": beta, "over_beta_0": by_beta[beta], "best_beta": best, "best_gain": by_beta[best]}
            if 1.0 in by_beta:
                result[name]["over_beta_1"] = by_beta[beta] - by_beta[1.0]
    return result


def overlap(world: str) -> dict[str, dict[str, float]]:
    """How much of the first term the second one repeats, by reactivation.

    Returns:
        Reactivation and steps -> Spearman of the groups' mean scores, Spearman of channels within a group (mean), and
        the share of the tenth of channels with the highest first term whose score at beta = 1 is negative.
    """
    first: dict[str, Any] = {}
    second: dict[str, dict[str, Any]] = {}
    every = [load_scores(path) for path in sorted((worlds.RUNS / "terms").glob(f"{world}-*"))]
    wanted = ("altermoma", "gate", "branch", 500)
    every = [s for s in every if tuple(s.log.get(k) for k in ("method", "aggregate", "normalise", "seed")) == wanted]
    # where a branch ends earlier than the task says, the fusion has more channels
    fewest = min((s.log["branches"]["fusion"]["count"] for s in every), default=0)
    for found in every:
        log = found.log
        if log["branches"]["fusion"]["count"] != fewest:
            continue
        if log["beta"] == 0:
            first = first or found.channel
        else:
            moved = "".join(f"{stage['moved']:.1g} " for stage in log["stages"]).strip()
            name = f"{log['reactivation']}, {log['stages'][0]['steps']} steps, moved {moved}"
            second.setdefault(name, {key: -value for key, value in found.channel.items()})
    result = {}
    for name, terms in second.items():
        keys = [key for key in first if key in terms]
        flat = [np.concatenate([term[key] for key in keys]) for term in (first, terms)]
        top = flat[0] >= np.quantile(flat[0], 0.9)
        within = [spearmanr(first[key], terms[key])[0] for key in keys]
        means = [[term[key].mean() for key in keys] for term in (first, terms)]
        result[name] = {
            "between_groups": round(float(spearmanr(*means)[0]), 3),
            "within_groups": round(float(np.mean(within)), 3),
            "top_tenth_negative": round(float(np.mean((flat[0] - flat[1])[top] < 0)), 3),
        }
    return result


def main() -> None:
    stored = list(runs.stored().values())
    rows = [
        row for row in stored if "finetuned" in row and row["key"].startswith("[") and f", {runs.STEPS}, " in row["key"]
    ]
    measured = {row["world"]: row for row in stored if "redundancy" in row and "label" not in row}
    facts = [row for row in stored if "mechanism" in row]
    sweep = beta_sweep(rows)
    covered = {name: row["redundancy"]["covered"] for name, row in measured.items()}
    won = {name: row["redundancy"]["redundancy"] for name, row in measured.items()}
    fit = {
        name: values for name, values in sweep.items() if name.startswith("street") and name.endswith(f"s{FIT_SEED}")
    }
    rule = fitted_rule(fit, won)
    result = {
        "command": "python -m benchmarks.altermoma.study && python -m benchmarks.altermoma.report",
        "setting": setting(),
        "worlds": {
            name: {
                "won_back": won[name],
                "covered": covered[name],
                "modalities": row["redundancy"]["modalities"],
                "loss_dense": row["redundancy"]["loss_dense"],
                "loss_blind": row["redundancy"]["loss_blind"],
                "dense": row["dense_facts"]["metrics"],
                **{k: v for k, v in row["dense_facts"].items() if k.endswith(("_alone", "_blank"))},
            }
            for name, row in measured.items()
        },
        "paired": tables(rows),
        "beta_sweep": sweep,
        "kitti_rmse_finetuned_and_pruned_by_seed": kitti_table(rows),
        "rule": rule,
        "rule_on_other_worlds": judged_rule(rule, sweep, won),
        "overlap": {name: overlap(name) for name in measured},
        "mechanism": {row["world"]: row["mechanism"] for row in facts},
        "runs": [compact(row) for row in rows],
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    draw_curve(rows, won, covered, rule["worlds"], DOCS / "altermoma-curve.svg")
    draw_runs(rows, DOCS / "altermoma-runs.svg")
    if facts:
        draw_mechanism(facts, DOCS / "altermoma-mechanism.svg")
    show(result)


def setting() -> dict[str, Any]:
    """What all runs have in common."""
    from fusepress.pipeline.stages.base import tool_versions

    return {
        "tools": tool_versions("torch", "numpy", "scipy"),
        "threads": 1,
        "network": "StreetFusion(width=0.5, image_channels=4, point_features=12), batch 8",
        "dense": f"{worlds.ALONE_STEPS} steps each backbone alone, {worlds.JOINT_STEPS} together, bf16",
        "pruned": f"to {runs.MACS:g} of the MACs, rank score_per_cost, align {runs.ALIGN}",
        "finetuned": f"{runs.STEPS} steps, lr {runs.LR:g}, no distillation, bf16",
        "evaluated": f"{worlds.EVAL_SAMPLES} samples of the eval split, bf16",
        "mechanism": f"{mechanism.SCORING_BATCHES} scoring batches, {mechanism.REMOVAL_BATCHES} held batches, float32",
    }


def compact(row: Row) -> Row:
    names = ("world", "label", "dense", "pruned", "finetuned", "macs_kept", "kept_by_branch", "seconds_scoring")
    kept = {name: row[name] for name in names}
    kept |= {"seed": row["spec"]["seed"], "macs": row["spec"]["macs"]}
    kept["stages"] = [
        {k: s[k] for k in ("masked", "loss_before", "loss_after", "steps", "moved")} for s in row["stages"]
    ]
    for name in ("dense", "pruned", "finetuned"):
        kept[name] = dict(itertools.islice(row[name].items(), 1))
    return kept


def show(result: Mapping[str, Any]) -> None:
    for name, facts in result["worlds"].items():
        print(f"{name}: won back {facts['won_back']:.3f}, covered {facts['covered']:.3f}, dense {facts['dense']}")
    for label, others in result["paired"].items():
        print(label, {other: _rounded(found) for other, found in others.items()})
    print("overlap", json.dumps(result["overlap"]))
    print("sweep", json.dumps({w: {b: round(g, 4) for b, g in s.items()} for w, s in result["beta_sweep"].items()}))
    print("rule", result["rule"], result["rule_on_other_worlds"])


def _rounded(found: Mapping[str, float] | None) -> dict[str, float] | None:
    return None if found is None else {name: round(value, 4) for name, value in found.items()}


# ------------------------------------------------------------------------------------------------------------- plots


def _figure(width: float, height: float) -> Any:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams.update({"svg.hashsalt": "fusepress", "svg.fonttype": "none", "font.size": 8.0})
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


COLOURS = {BASE: "#7a7a7a", "masked, strong": "#1b6ca8", "masked, strong, beta 0.25": "#e3a857", "taylor": "#4a8c5c"}


def draw_curve(
    rows: Sequence[Row], won: Mapping[str, float], covered: Mapping[str, float], fitted: Sequence[str], path: Path
) -> None:
    """AlterMOMA's gain over its beta = 0 self and over Taylor against measured redundancy."""
    figure = _figure(8.0, 5.2)
    axes = figure.subplots(2, 2, sharey="row")
    for column, (name, values) in enumerate((("won back", won), ("covered", covered))):
        for line, against in enumerate((BASE, "taylor")):
            axis = axes[line][column]
            for label, marker in (("masked, strong", "o"), ("masked, strong, beta 0.25", "s")):
                _points(axis, rows, values, label, against, marker, fitted)
            axis.axhline(0.0, color="black", linewidth=0.8)
            axis.set_xlim(0.0, 1.0)
            axis.set_xlabel(f"measured redundancy: {name}")
            axis.spines[["top", "right"]].set_visible(False)
        axes[0][0].set_ylabel("mIoU gain over beta = 0")
        axes[1][0].set_ylabel("mIoU gain over Taylor")
    axes[0][0].legend(frameon=False)
    _save(figure, path)


def _points(
    axis: Any,
    rows: Sequence[Row],
    x: Mapping[str, float],
    label: str,
    against: str,
    marker: str,
    fitted: Sequence[str],
) -> None:
    """One dot a street world (KITTI's metric has another unit); hollow where the rule was not fitted."""
    index = {
        (row["world"], row["spec"]["seed"], row["label"]): row for row in rows if row["redundancy_knob"] is not None
    }
    for (world, seed, name), row in index.items():
        if name == label and (world, seed, against) in index and world in x:
            y = gain(row, index[world, seed, against])
            hollow = COLOURS[label] if world in fitted else "none"
            shown = {"masked, strong": "beta 1", "masked, strong, beta 0.25": "beta 0.25"}[label]
            known = axis.get_legend_handles_labels()[1]
            axis.plot(x[world], y, marker, color=COLOURS[label], markerfacecolor=hollow, markersize=5,
                      linestyle="none", label=None if shown in known else shown)  # fmt: skip


def draw_runs(rows: Sequence[Row], path: Path) -> None:
    """Every label's gain over beta 0, one dot a world."""
    index = {(row["world"], row["spec"]["seed"], row["label"]): row for row in rows if on_street(row)}
    labels = [name for name in dict.fromkeys(row["label"] for row in rows) if name != BASE]
    gains = {
        label: [
            (row["redundancy_knob"], gain(row, index[w, s, BASE]))
            for (w, s, name), row in index.items()
            if name == label and (w, s, BASE) in index
        ]
        for label in labels
    }
    labels = sorted(
        (name for name in labels if gains[name]), key=lambda name: float(np.mean([g for _, g in gains[name]]))
    )
    figure = _figure(7.0, 0.8 + 0.22 * len(labels))
    axis = figure.subplots()
    for y, label in enumerate(labels):
        values = [g for _, g in gains[label]]
        dots = axis.scatter(
            values, [y] * len(values), c=[r for r, _ in gains[label]], cmap="cividis", vmin=0, vmax=1, s=18
        )
        axis.plot([float(np.mean(values))] * 2, [y - 0.35, y + 0.35], color="black", linewidth=1.4)
    axis.set_yticks(range(len(labels)), [f"{label} (n={len(gains[label])})" for label in labels])
    axis.axvline(0.0, color="black", linewidth=0.8)
    axis.set_xlabel("mIoU after fine-tuning, minus AlterMOMA with beta = 0 (dots: worlds; tick: mean)")
    axis.spines[["top", "right"]].set_visible(False)
    figure.colorbar(dots, ax=axis, label="knob (1: sensors see alike)", fraction=0.04)
    _save(figure, path)


SHOWN = ("deci", "weak", "strong", "noise", "unmasked", "permuted", "curvature", "grasp_masked", "grasp",
         "removed", "removed_masked", "removed_awake", "woken", "redundant")  # fmt: skip


def draw_mechanism(facts: Sequence[Row], path: Path) -> None:
    """Mean rank correlation of every two quantities, over stages and worlds."""
    tables = [stage["some_channels"] for row in facts for stage in row["mechanism"].values()]
    mean = np.mean([[[t[a][b] for b in SHOWN] for a in SHOWN] for t in tables], axis=0)
    figure = _figure(7.4, 6.0)
    axis = figure.subplots()
    image = axis.imshow(mean, cmap="RdBu_r", vmin=-1, vmax=1)
    for i, j in itertools.product(range(len(SHOWN)), repeat=2):
        axis.text(j, i, f"{mean[i, j]:.2f}", ha="center", va="center", fontsize=6,
                  color="white" if abs(mean[i, j]) > 0.6 else "black")  # fmt: skip
    names = [name.replace("_", " ") for name in SHOWN]
    axis.set_xticks(range(len(SHOWN)), names, rotation=60, ha="right")
    axis.set_yticks(range(len(SHOWN)), names)
    figure.colorbar(image, ax=axis, label="Spearman, mean over groups, stages and worlds", fraction=0.046)
    _save(figure, path)


if __name__ == "__main__":
    main()
