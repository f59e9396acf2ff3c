"""What recovery wins back: plain fine-tuning against distillation, at equal steps; one command, resumable.

    python -m benchmarks.recovery.run --seeds 0 1 2            # runs what is left
    python -m benchmarks.recovery.run --seeds 0 1 2 --list     # says what is left
    python -m benchmarks.recovery.run --seeds 0 1 2 --table    # the table and its JSON, of what is there

A cell is the street recipe with one finetune section, run by the pipeline's own stages (baseline, score, prune,
finetune) in a store of their own: scores and plans are shared, a finished cell is never run again, and a killed one
goes on from its last training checkpoint. The seed decides scoring batches, training batches and everything random;
the dense checkpoint is the same for all. A store takes cells of one version of the task's sources only.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.sources import require_sources
from fusepress.pipeline.store import sha256_file

if TYPE_CHECKING:
    from fusepress.pipeline.stages.base import Context
    from fusepress.pipeline.task import Batch

ROOT = Path(__file__).resolve().parents[2]
STREET = ROOT / "examples" / "street" / "recipe.yaml"
STORE = ROOT / "runs" / "recovery"
RESULTS = ROOT / "benchmarks" / "results" / "recovery.json"
CACHE = Path(tempfile.gettempdir()) / "fusepress-batches"
VERSION = 1  # raised by hand when training or evaluation change the results of every cell
STAGES = ("baseline", "score", "prune", "finetune")
FAILURES = {"camera_blank": 3, "lidar_half": 3}  # severity
PLAIN = "plain"
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    PLAIN: {"distill": False},
    "plain, lr 4e-3": {"distill": False, "lr": 4e-3},
    "outputs": {"distill": True},
    "outputs x4": {"distill": True, "distill_weight": 4.0},
    "outputs x4, features": {"distill": True, "distill_weight": 4.0, "distill_features": 1.0},
    "outputs x4, features x4": {"distill": True, "distill_weight": 4.0, "distill_features": 4.0},
    "outputs x4, features x16": {"distill": True, "distill_weight": 4.0, "distill_features": 16.0},
    "reconstructed": {"distill": True, "distill_weight": 0.0, "reconstruct": 16},
    "reconstructed, outputs x4, features x4": {
        "distill": True,
        "distill_weight": 4.0,
        "distill_features": 4.0,
        "reconstruct": 16,
    },
    "reconstructed, outputs x4, features x4, lr 4e-3": {
        "distill": True,
        "distill_weight": 4.0,
        "distill_features": 4.0,
        "reconstruct": 16,
        "lr": 4e-3,
    },
    "reconstructed, outputs x4, features x4, lr 1e-3": {
        "distill": True,
        "distill_weight": 4.0,
        "distill_features": 4.0,
        "reconstruct": 16,
        "lr": 1e-3,
    },
    "outputs x16, features x16": {"distill": True, "distill_weight": 16.0, "distill_features": 16.0},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One fine-tuned network.

    Attributes:
        macs: kept fraction.
        variant: of `VARIANTS`.
        steps: of fine-tuning.
        seed: of everything random.
    """

    macs: float
    variant: str
    steps: int
    seed: int

    @property
    def name(self) -> str:
        """For people and folders."""
        variant = self.variant.replace(", ", "-").replace(" ", "-")
        return f"street-m{100 * self.macs:g}-{variant}-t{self.steps}-s{self.seed}"

    def overrides(self) -> list[str]:
        """The recipe's changes; the fine-tuning is in bf16, which costs half the time of fp32 on a CPU."""
        section = {"steps": self.steps, "lr": 2e-3, "precision": "bf16", **VARIANTS[self.variant]}
        return [f"seed={self.seed}", f"prune.macs={self.macs}", "prune.align=8", f"finetune={json.dumps(section)}"]


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.25, 0.4])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, nargs="+", default=[200])
    parser.add_argument("--until", help="HH:MM; no cell is begun after it")
    parser.add_argument("--list", action="store_true", help="only say what is done and what is left")
    parser.add_argument("--table", action="store_true", help="only print the table and write its JSON")
    parser.add_argument("--store", type=Path, default=STORE)
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    options = arguments(words)
    cells = list(planned(options))
    if not (options.list or options.table):
        require_sources(options.store, "street", [STREET])
        for cell in cells:
            if options.until is not None and time.strftime("%H:%M") >= options.until:
                print("stopping: the time is over", flush=True)
                break
            if not path_of(options.store, cell).is_file():
                run(options.store, cell)
    done = [json.loads(path_of(options.store, c).read_text()) for c in cells if path_of(options.store, c).is_file()]
    left = [cell.name for cell in cells if not path_of(options.store, cell).is_file()]
    if options.table:
        summary = summarise(done)
        options.results.parent.mkdir(parents=True, exist_ok=True)
        command = shlex.join(["python", "-m", "benchmarks.recovery.run", *(sys.argv[1:] if words is None else words)])
        found = {"command": command, "summary": summary, "cells": done, "left": left}
        options.results.write_text(json.dumps(found, indent=1) + "\n")
        print("\n".join(row_text(row) for row in summary))
    print(f"{len(done)} cells done, {len(left)} left" + "".join(f"\n  left: {name}" for name in left))
    return 1 if left else 0


def planned(options: argparse.Namespace) -> Iterator[Cell]:
    """Everything at one seed before the next seed."""
    for seed, macs, steps in itertools.product(options.seeds, options.budgets, options.steps):
        for variant in options.variants:
            yield Cell(macs=macs, variant=variant, steps=steps, seed=seed)


def path_of(store: Path, cell: Cell) -> Path:
    """Where a finished cell lies."""
    facts = [VERSION, cell.overrides(), sha256_file(STREET), sha256_file(STREET.with_name("street.safetensors"))]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    return store / "cells" / f"{cell.name}-{key}.json"


def run(store: Path, cell: Cell) -> None:
    """Run a cell by the pipeline's stages and keep its figures."""
    import torch

    from benchmarks.pruning.bench import CachedTask
    from fusepress.pipeline.api import make_context, new_record, preflight
    from fusepress.pipeline.console import Reporter
    from fusepress.pipeline.recipe import load_recipe
    from fusepress.pipeline.runner import run_stages
    from fusepress.pipeline.stages import STAGES as ALL
    from fusepress.pipeline.stages.base import tool_versions
    from fusepress.pipeline.store import Store, atomic_write_text

    began = time.monotonic()
    ctx = make_context(load_recipe(STREET, cell.overrides()), Reporter(quiet=True))
    ctx.task.user = CachedTask(ctx.task.user, CACHE / ctx.task.fingerprint("train")[:16])
    folder = store / cell.name
    preflight(ctx, Store(folder.parent / ".store"))
    record = new_record(ctx, folder, "python -m benchmarks.recovery.run")
    run_stages(ctx, [stage for stage in ALL if stage.name in STAGES], record, folder)
    primary = ctx.task.primary
    values = {
        stage.name: {m.name.removeprefix("accuracy."): m.value for m in stage.measurements if m.value is not None}
        for stage in record.stages
    }
    result = {
        "cell": asdict(cell),
        "finetune": ctx.recipe.finetune.model_dump(mode="json") if ctx.recipe.finetune is not None else None,
        "primary": primary,
        "dense": values["baseline"][primary],
        "pruned": values["prune"][primary],
        "finetuned": values["finetune"][primary],
        "macs": values["finetune"]["macs"] / values["baseline"]["macs"],
        "params": values["finetune"]["params"] / values["baseline"]["params"],
        "failing": failing(ctx),
        "n": max(m.n or 0 for m in record.stages[-1].measurements),
        "versions": tool_versions("torch", "numpy"),
        "threads": torch.get_num_threads(),
        "seconds": round(time.monotonic() - began, 1),
    }
    atomic_write_text(path_of(store, cell), json.dumps(result, indent=1) + "\n")
    print(
        f"{time.strftime('%H:%M:%S')} {cell.name}: {primary} {result['finetuned']:.4f}, {result['seconds']} s",
        flush=True,
    )


def failing(ctx: Context) -> dict[str, float]:
    """The primary metric of the fine-tuned network when a sensor fails."""
    from fusepress.pipeline.corrupt import corrupt
    from fusepress.pipeline.evaluate import evaluate, torch_predict
    from fusepress.pipeline.stages.common import current_model

    predict = torch_predict(ctx.task, current_model(ctx))

    def one(failure: str) -> float:
        def broken(batch: Batch) -> Batch:
            return corrupt(ctx.task, batch, failure, FAILURES[failure])

        return evaluate(ctx.task, predict, "eval", corrupt=broken).metrics[ctx.task.primary]

    return {name: one(name) for name in FAILURES}


def summarise(done: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a budget and variant: means over seeds, and the share of plain fine-tuning's drop that is won back."""
    by_row: dict[tuple[float, int, str], dict[int, dict[str, Any]]] = {}
    for one in done:
        cell = one["cell"]
        by_row.setdefault((cell["macs"], cell["steps"], cell["variant"]), {})[cell["seed"]] = one
    rows = []
    for (macs, steps, variant), seeds in sorted(by_row.items(), key=lambda item: (-item[0][0], item[0][1])):
        plain = by_row.get((macs, steps, plain_twin(variant)), {})
        common = sorted(seeds.keys() & plain.keys())
        drops = {seed: one["dense"] - one["finetuned"] for seed, one in seeds.items()}
        plain_drop = statistics.mean(plain[s]["dense"] - plain[s]["finetuned"] for s in common) if common else math.nan
        row: dict[str, Any] = {"macs": macs, "steps": steps, "variant": variant, "seeds": sorted(seeds)}
        row |= {key: statistics.mean(one[key] for one in seeds.values()) for key in ("dense", "pruned", "finetuned")}
        row |= {"drop": statistics.mean(drops.values()), "drop_of_each_seed": [drops[s] for s in sorted(drops)]}
        row |= {"failing": {k: statistics.mean(o["failing"][k] for o in seeds.values()) for k in done[0]["failing"]}}
        if variant != plain_twin(variant) and common:
            gains = [seeds[s]["finetuned"] - plain[s]["finetuned"] for s in common]
            row |= {"gain_over_plain": statistics.mean(gains), "interval": interval(gains)}
            row["share_of_the_drop_won_back"] = statistics.mean(gains) / plain_drop
        rows.append(row)
    return rows


def plain_twin(variant: str) -> str:
    """Plain fine-tuning at the variant's learning rate."""
    rate = variant.partition(", lr ")[2]
    return f"{PLAIN}, lr {rate}" if f"{PLAIN}, lr {rate}" in VARIANTS else PLAIN


def interval(values: Sequence[float]) -> list[float] | None:
    """Student's 95 % interval of a mean, from three values on."""
    if len(values) < 3:
        return None
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return [statistics.mean(values) - half, statistics.mean(values) + half]


def row_text(row: Mapping[str, Any]) -> str:
    """A line of the table."""
    text = f"{100 * row['macs']:g} % MACs, {row['steps']} steps, {row['variant']}: {row['finetuned']:.4f}"
    text += f" (dense {row['dense']:.4f}, drop {row['drop']:.4f}, n = {len(row['seeds'])} seeds)"
    if "gain_over_plain" in row:
        low_high = "" if row["interval"] is None else " ({:.4f} to {:.4f})".format(*row["interval"])
        share = 100 * row["share_of_the_drop_won_back"]
        text += f"; over plain {row['gain_over_plain']:+.4f}{low_high}, {share:.0f} % of its drop"
    return text + "; " + ", ".join(f"{name} {value:.4f}" for name, value in row["failing"].items())


if __name__ == "__main__":
    sys.exit(main())
