"""What distortion tables cost and what their approximation loses, on the street example.

Run: python benchmarks/pruning/distortion_cost.py [--samples N] [--scores NAME...] [--work FOLDER] [--out FILE]

The bound: (narrower widths of a group) x (MACs behind its consumers), summed over the groups, at the speed that the
plain forward pass of the dense network reaches in the same run, before and after. Seconds are those of the process
(one thread), which other work on the machine disturbs less than the clock on the wall. Full passes would take (widths)
x (one pass). The approximate table is judged by what its allocation is worth: the summed *exact* distortion of the
widths that it chooses, against the least that the exact table allows at the same budget. Additivity, the assumption
behind the tables, is checked at the allocation of 40 % of the MACs: the damage of all groups together.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusepress.pipeline.graph.apply import apply_plan, load_checkpoint
from fusepress.pipeline.graph.cost import CostModel
from fusepress.pipeline.graph.groups import find_groups
from fusepress.pipeline.graph.plan import GroupGraph
from fusepress.pipeline.pruning.allocate import allocate
from fusepress.pipeline.pruning.curves import DistortionTable
from fusepress.pipeline.pruning.distortion import distortion_table
from fusepress.pipeline.pruning.ladders import ladder_widths
from fusepress.pipeline.recipe import DistortionConfig, Method, PruneConfig, ScoreConfig
from fusepress.pipeline.scoring.criteria import score_channels
from fusepress.pipeline.task import LoadedTask, load_task

ROOT = Path(__file__).resolve().parent.parent.parent
STREET = ROOT / "examples" / "street"
BUDGETS = (0.6, 0.5, 0.4, 0.3, 0.25, 0.15)


def pass_seconds(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> float:
    """Process seconds of one plain pass: the median of three."""
    with torch.no_grad():
        model(**inputs)
        took = []
        for _ in range(3):
            started = time.process_time()
            model(**inputs)
            took.append(time.process_time() - started)
    return float(np.median(took))


def together(model: torch.nn.Module, task: LoadedTask, graph: GroupGraph, kept: Any, samples: int) -> float:
    """Damage of real surgery on all groups at once, in the table's unit."""
    dense, pruned = [], []
    small = apply_plan(
        copy.deepcopy(model), graph.plan({k: v for k, v in kept.items() if len(v) < graph[k].width})
    ).eval()
    done = 0
    with torch.no_grad():
        for batch in task.batches("calib", 0):
            dense.append(task.as_dict(model(**batch.inputs)))
            pruned.append(task.as_dict(small(**batch.inputs)))
            done += batch.size
            if done >= samples:
                break
    damage = []
    for name in dense[0]:
        y = torch.cat([one[name] for one in dense])[:samples].double()
        less = torch.cat([one[name] for one in pruned])[:samples].double()
        damage.append(float((y - less).square().mean() / y.var(correction=0)))
    return float(np.mean(damage))


def measured(
    inputs: Mapping[str, torch.Tensor], arguments: tuple[Any, ...], config: DistortionConfig, out: Path
) -> tuple[DistortionTable, dict[str, float]]:
    """A table and its process seconds, with the speed of the plain pass around it."""
    model, task, graph, scores, ladders = arguments
    before = pass_seconds(model, inputs)
    started = time.process_time()
    table = distortion_table(model, task, graph, scores, ladders, config, seed=0, out=out)
    seconds = time.process_time() - started
    after = pass_seconds(model, inputs)
    return table, {"seconds": seconds, "pass_before": before, "pass_after": after, "pass": (before + after) / 2}


def one_ranking(
    model: torch.nn.Module, task: LoadedTask, graph: GroupGraph, method: Method, samples: int, work: Path
) -> dict[str, Any]:
    """Both tables of the channels that one criterion ranks, what they cost, and what their allocations are worth."""
    inputs = next(task.batches("calib", 0)).inputs
    cost = CostModel(graph, model, inputs)
    config = ScoreConfig(method=method, batches=4)
    scores = score_channels(model, task, graph, config, seed=0, progress=_quiet).channel
    prune = PruneConfig(macs=0.4, allocation="distortion", distortion=DistortionConfig(samples=samples, eta=0))
    ladders = {group.id: ladder_widths(group, prune, 8, []) for group in graph.groups}
    arguments = (model, task, graph, scores, ladders)
    approximate = prune.distortion.model_copy(update={"mode": "approximate"})
    quick, quick_cost = measured(inputs, arguments, approximate, work / method / "quick")
    exact, exact_cost = measured(inputs, arguments, prune.distortion, work / method / "exact")
    widths = sum(len(ladder) - 1 for ladder in ladders.values())
    behind = sum((len(ladders[name]) - 1) * macs for name, macs in exact.macs.items())
    batches = samples / next(iter(inputs.values())).shape[0]
    bound = behind / cost.dense_macs * exact_cost["pass"] * batches
    full = widths * quick_cost["pass"] * batches
    choices, kept = worths(scores, graph, cost, prune, {"exact": exact, "approximate": quick})
    several = [k for k in exact.curves if len(ladders[k]) > 1]
    errors = np.concatenate([quick.curves[k].distortion[1:] / exact.curves[k].distortion[1:] - 1 for k in several])
    joint, alone = together(model, task, graph, kept, samples), choices["0.4"]["objective_exact"]
    return {
        "narrower_widths": widths,
        "exact": {
            **exact_cost,
            "bound_seconds": bound,
            "measured_over_bound": exact_cost["seconds"] / bound,
            "mean_share_of_macs_behind": behind / cost.dense_macs / widths,
            "facts": dict(exact.facts),
            "notes": list(exact.notes),
        },
        "approximate": {
            **quick_cost,
            "full_passes_seconds": full,
            "faster_than_full_passes": full / quick_cost["seconds"],
            "measured_samples": quick.samples,
            "median_absolute_error": float(np.median(np.abs(errors))),
            "p90_absolute_error": float(np.quantile(np.abs(errors), 0.9)),
            "facts": dict(quick.facts),
            "notes": list(quick.notes),
        },
        "allocations": choices,
        "largest_loss": max(choice["loss"] for choice in choices.values()),
        "additivity_at_40_percent_macs": {
            "sum_of_single": alone,
            "joint": joint,
            "relative_gap": abs(joint - alone) / joint,
        },
    }


def worths(
    scores: Mapping[str, Any],
    graph: GroupGraph,
    cost: CostModel,
    prune: PruneConfig,
    tables: Mapping[str, DistortionTable],
) -> tuple[dict[str, dict[str, float]], dict[str, list[int]]]:
    """What each table's allocation is worth by the exact one at every budget, and what is kept at 40 % by it."""
    choices, kept = {}, {}
    for budget in BUDGETS:
        config = prune.model_copy(update={"macs": budget})
        worth = {}
        for mode, table in tables.items():
            chosen = allocate(scores, graph, cost, config, align=8, distortion=table.curves)
            curves = tables["exact"].curves
            worth[mode] = sum(
                float(curves[name].distortion[curves[name].widths.index(width)])
                for name, width in chosen.widths.items()
            )
            if (mode, budget) == ("exact", 0.4):
                kept = chosen.kept
        choices[str(budget)] = {
            "objective_exact": worth["exact"],
            "objective_of_approximate": worth["approximate"],
            "loss": worth["approximate"] / worth["exact"] - 1,
        }
    return choices, kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--scores", nargs="+", default=["group_norm", "taylor", "magnitude"])
    parser.add_argument("--work", type=Path, default=Path("/tmp") / "distortion_cost")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/pruning/distortion_cost.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    task = load_task("task.py:StreetTask", base=STREET)
    model = task.build_model()
    load_checkpoint(model, STREET / "street.safetensors")
    model.eval()
    inputs = next(task.batches("calib", 0)).inputs
    graph = find_groups(model, inputs, task.branches, task.keep, blocks=False)
    result: dict[str, Any] = {
        "command": f"python benchmarks/pruning/distortion_cost.py --samples {args.samples} --scores "
        + " ".join(args.scores),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "threads": 1},
        "n": args.samples,
        "groups": len(graph.groups),
        "scores": {},
    }
    for method in args.scores:
        found = one_ranking(model, task, graph, method, args.samples, args.work)
        result["scores"][method] = found
        print(
            f"{method}: exact {found['exact']['measured_over_bound']:.2f} x its bound; approximate "
            f"{found['approximate']['faster_than_full_passes']:.1f} x faster than full passes, loses at most "
            f"{100 * found['largest_loss']:.2f} %",
            flush=True,
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(0 if all(one["exact"]["measured_over_bound"] <= 1.3 for one in result["scores"].values()) else 1)


def _quiet(_fraction: float, _text: str) -> None:
    """Nobody watches."""


if __name__ == "__main__":
    main()
