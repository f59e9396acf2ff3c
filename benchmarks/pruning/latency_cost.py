"""Latency from group widths: exactness and speed against pruning and exporting, and budgets in milliseconds.

    OMP_NUM_THREADS=1 python -m benchmarks.pruning.latency_cost [--work FOLDER] [--results FILE]

Street for jetson-agx-orin-64gb in FP16. Plain is surgery, an export and the prediction. Ten settings: all groups at one
channel, at eight, dense and a tenth in turns, and seven drawn from all widths. Then one and two residual blocks
removed; then `prune.latency_ms` of 85 % of the dense prediction with Taylor scores, without and with removable blocks.
Seconds are those of the process (one thread), which other work on the machine disturbs less than the clock on the wall.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.pruning.latency_follows_macs import ROOT, Street
from fusepress.pipeline.graph.apply import apply_plan
from fusepress.pipeline.graph.probe import probe_onnx
from fusepress.pipeline.pruning.allocate import allocate
from fusepress.pipeline.pruning.latency import LatencyCost, first_channels
from fusepress.pipeline.recipe import PruneConfig
from fusepress.targets.predict import predict_latency
from fusepress.targets.profile import load_profile

RESULTS = ROOT / "benchmarks" / "results" / "pruning" / "latency_cost.json"
TARGET, PRECISION, SHARE, ALIGN = "jetson-agx-orin-64gb", "fp16", 0.85, 8
DRAWN, MANY = 7, 4000
BLOCKS = ("camera.stage1.1.first.0.weight", "lidar.stage3.1.first.0.weight")


class Plain:
    """The plain way, and the processor seconds that it takes."""

    def __init__(self, street: Street) -> None:
        self.street = street
        self.seconds: list[float] = []

    def __call__(self, widths: Mapping[str, int]) -> float:
        """Milliseconds of the network that is really pruned and exported."""
        graph = self.street.graph
        gone = {other for block in graph.blocks if widths[block.id] == 0 for other in block.dead}
        kept = {g: first_channels(graph[g], w) if w else [] for g, w in widths.items() if g not in gone}
        started = time.process_time()
        model = apply_plan(copy.deepcopy(self.street.model), graph.plan(kept))
        found = predict_latency(probe_onnx(model, self.street.inputs, ["output"]), load_profile(TARGET), PRECISION)
        self.seconds.append(time.process_time() - started)
        return found.latency_ms


def settings(street: Street) -> list[dict[str, int]]:
    """Three extreme ones, and some drawn from all widths."""
    groups, draw = street.graph.groups, np.random.default_rng(11)
    found = [
        {g.id: g.multiple for g in groups},
        {g.id: min(8 * g.multiple, g.width) for g in groups},
        {g.id: g.width if k % 2 else max(g.multiple, g.width // 10) for k, g in enumerate(groups)},
    ]
    drawn = range(DRAWN)
    return found + [
        {g.id: int(draw.integers(1, g.width // g.multiple + 1)) * g.multiple for g in groups} for _ in drawn
    ]


def exactness(cost: LatencyCost, plain: Plain, chosen: list[dict[str, int]]) -> dict[str, Any]:
    """Worst relative error, and of the sums over removed blocks where there are any."""
    rows = []
    for widths in chosen:
        truth = plain(widths)
        together = float(cost.latencies_ms([[widths[name] for name in cost.ids]])[0])
        rows.append((truth, cost.latency_ms(widths), together))
    truth, one, many = np.array(rows).T
    return {
        "n": len(rows),
        "plain_ms": truth.tolist(),
        "worst_relative_error": float(np.abs(one / truth - 1).max()),
        "worst_relative_error_batched": float(np.abs(many / truth - 1).max()),
    }


def speed(cost: LatencyCost) -> dict[str, float]:
    """Processor seconds for a thousand settings at once; best of three."""
    draw = np.random.default_rng(1)
    many = np.stack([draw.integers(1, g.width + 1, size=MANY) for g in cost.graph.groups], axis=1)
    taken = []
    for _ in range(3):
        started = time.process_time()
        cost.latencies_ms(many)
        taken.append(time.process_time() - started)
    return {"seconds_per_1000": min(taken) / MANY * 1000, "n": MANY}


def bought(street: Street, cost: LatencyCost, *, blocks: bool) -> dict[str, Any]:
    """An allocation under the budget, end to end."""
    budget = SHARE * cost.dense_ms
    config = PruneConfig(latency_ms=budget, allocation="importance", blocks=blocks)
    known = len(cost._structures)
    started, wall = time.process_time(), time.perf_counter()
    found = allocate(street.scores("taylor"), street.graph, street.cost, config, align=ALIGN, latency=cost)
    return {
        "seconds": time.process_time() - started,
        "wall_seconds": time.perf_counter() - wall,
        "sets_of_blocks_exported": len(cost._structures) - known,
        "budget_ms": budget,
        "achieved_ms": found.achieved * cost.dense_ms,
        "exported_ms": cost.latency_ms(found.widths),
        "lost_score": found.objective,
        "removed_blocks": list(found.removed_blocks),
        "widths": list(found.widths.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "latency")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    street = Street(arguments.work)
    result: dict[str, Any] = {
        "command": "OMP_NUM_THREADS=1 python -m benchmarks.pruning.latency_cost",
        "target": TARGET,
        "precision": PRECISION,
        "seed": 11,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }

    def note(**found: Any) -> None:
        """Keep what is known so far: the rest takes minutes."""
        result.update(found)
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        arguments.results.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(found), flush=True)

    started = time.process_time()
    cost = LatencyCost(
        street.model, street.graph, street.inputs, load_profile(TARGET), precision=PRECISION, output_names=["output"]
    )
    note(build_seconds=time.process_time() - started, dense_ms=cost.dense_ms)
    note(speed=speed(cost))
    note(allocation=bought(street, cost, blocks=False))
    plain = Plain(street)
    chosen = settings(street)
    note(widths=exactness(cost, plain, chosen))
    seconds = float(np.median(plain.seconds))
    note(plain_seconds=seconds, times_faster=seconds * 1000 / result["speed"]["seconds_per_1000"])
    removed = [chosen[2] | dict.fromkeys(BLOCKS[:1], 0), chosen[3] | dict.fromkeys(BLOCKS, 0)]
    note(removed_blocks=exactness(cost, plain, removed))
    note(allocation_with_blocks=bought(street, cost, blocks=True))


if __name__ == "__main__":
    main()
