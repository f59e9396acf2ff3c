"""2:4 and unstructured sparsity on pruned models: criteria, permutation, recovery, spread; one command, resumable.

    python -m benchmarks.sparsity.run --suite recovery --seeds 0 1 2     # runs what is left
    python -m benchmarks.sparsity.run --suite recovery --list            # says what is left, and how long it will take

A finished cell is never run again; a killed one goes on from its last training checkpoint. Each seed's pruned and
fine-tuned start is made once, by the pipeline's own stages. Results lie in runs/sparsity/cells, one JSON a cell; tables
are made of them by `python -m benchmarks.sparsity.table`. A store takes cells of one version of each model's sources
only.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.sources import require_sources
from benchmarks.sparsity.cells import MODELS, ROOT, SUITES, Cell, Protocol, planned, sources
from fusepress.pipeline.store import atomic_write_text, sha256_file

if TYPE_CHECKING:
    from torch import nn

    from fusepress.pipeline.evaluate import Evaluation
    from fusepress.pipeline.stages.base import Context
    from fusepress.pipeline.stages.masking import Masked

STORE = ROOT / "runs" / "sparsity"
CACHE = Path(tempfile.gettempdir()) / "fusepress-batches"
START_STAGES = ("baseline", "score", "prune", "finetune")
FAILURES = {"camera_blank": 3, "lidar_half": 3}  # severity
ALIGN = 16


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=["recovery"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", help="only cells whose name contains this")
    parser.add_argument("--until", help="HH:MM; no cell is begun after it")
    parser.add_argument("--list", action="store_true", help="only say what is done and what is left")
    parser.add_argument("--store", type=Path, default=STORE)
    for item in fields(Protocol):
        kind = type(item.default)
        parser.add_argument(f"--{item.name.replace('_', '-')}", type=kind, default=item.default)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    options = arguments(words)
    bench = Bench(options.store, Protocol(**{item.name: getattr(options, item.name) for item in fields(Protocol)}))
    cells = [c for c in planned(options.suite, options.seeds) if options.only is None or options.only in c.name]
    if not options.list:
        for model in dict.fromkeys(cell.model for cell in cells):
            require_sources(options.store, model, sources(model))
        for cell in cells:
            if options.until is not None and time.strftime("%H:%M") >= options.until:
                print("stopping: the time is over", flush=True)
                break
            if bench.why_not(cell) is None and not bench.path(cell).is_file():
                bench.run(cell)
    return show(bench, cells)


def show(bench: Bench, cells: Sequence[Cell]) -> int:
    """Print what is done and what is left; 0 if nothing is left that could run."""
    unable = {cell.name: why for cell in cells if (why := bench.why_not(cell)) is not None}
    able = [cell for cell in cells if cell.name not in unable]
    done = [cell for cell in able if bench.path(cell).is_file()]
    left = [cell for cell in able if not bench.path(cell).is_file()]
    pace = statistics.median(bench.seconds(cell) for cell in done) if done else float("nan")
    print(f"{len(done)} cells done, {len(left)} left, {len(unable)} cannot run; median {pace:.0f} s a cell")
    for cell in left:
        print(f"  left: {cell.name}")
    for why in sorted(set(unable.values())):
        print(f"  cannot run: {sum(reason == why for reason in unable.values())} cells: {why}")
    return 1 if left else 0


class Bench:
    """The cells of one store.

    Args:
        store: folder of results, starts and checkpoints.
        protocol: what all cells share.
    """

    def __init__(self, store: Path, protocol: Protocol) -> None:
        self.store, self.protocol = store, protocol
        self._starts: dict[tuple[str, int], Context] = {}

    def why_not(self, cell: Cell) -> str | None:
        """Why a cell cannot run here, or None."""
        return (
            None if self._checkpoint(cell.model).is_file() else f"no dense checkpoint of {cell.model}: train it first"
        )

    def path(self, cell: Cell) -> Path:
        """Where a finished cell lies."""
        key = cell.key(self.protocol, sha256_file(self._checkpoint(cell.model)), sha256_file(MODELS[cell.model]))
        return self.store / "cells" / f"{cell.name}-{key}.json"

    def seconds(self, cell: Cell) -> float:
        """What a finished cell took."""
        return float(sum(json.loads(self.path(cell).read_text())["seconds"].values()))

    @staticmethod
    def _checkpoint(model: str) -> Path:
        from fusepress.pipeline.recipe import load_recipe

        loaded = load_recipe(MODELS[model])
        return loaded.resolve(loaded.recipe.checkpoint)

    # --- the start ----------------------------------------------------------------------------------------------------

    def _overrides(self, model: str, seed: int) -> list[str]:
        protocol = self.protocol
        shared = [f"seed={seed}", f"finetune.precision={protocol.precision}"]
        if model == "wide":  # the dense network itself: pruned, it would have no layer of 256 channels left
            return shared
        pruned = [f"prune.macs={protocol.macs}", f"prune.align={ALIGN}", f"finetune.steps={protocol.start_steps}"]
        return [*shared, *pruned]

    def start(self, model: str, seed: int) -> Context:
        """The model that a seed's cells start from, by the pipeline's own stages (kept in their store)."""
        from fusepress.pipeline.api import make_context, new_record, preflight
        from fusepress.pipeline.console import Reporter
        from fusepress.pipeline.recipe import load_recipe
        from fusepress.pipeline.runner import run_stages
        from fusepress.pipeline.stages import STAGES
        from fusepress.pipeline.store import Store

        if (model, seed) not in self._starts:
            ctx = make_context(load_recipe(MODELS[model], self._overrides(model, seed)), Reporter(quiet=True))
            self._cache_batches(ctx)
            folder = self.store / "starts" / f"{model}-s{seed}"
            preflight(ctx, Store(folder.parent / ".store"))
            record = new_record(ctx, folder, "python -m benchmarks.sparsity.run")
            run_stages(ctx, [stage for stage in STAGES if stage.name in START_STAGES], record, folder)
            self._starts[model, seed] = ctx
        return self._starts[model, seed]

    @staticmethod
    def _cache_batches(ctx: Context) -> None:
        """Training batches are made once for all cells."""
        from benchmarks.pruning.bench import CachedTask

        ctx.task.user = CachedTask(ctx.task.user, CACHE / ctx.task.fingerprint("train")[:16])

    # --- a cell -------------------------------------------------------------------------------------------------------

    def run(self, cell: Cell) -> None:
        """Run a cell and keep its result."""
        import torch

        from benchmarks.pruning.bench import Clock
        from fusepress.pipeline.recovery.batchnorm import reestimate_batchnorm
        from fusepress.pipeline.stages.base import tool_versions
        from fusepress.pipeline.stages.common import current_model
        from fusepress.pipeline.stages.prune import BATCHNORM_BATCHES

        clock = Clock()
        with clock("start"):
            start = self.start(cell.model, cell.seed)
        model = current_model(start)
        ctx = self._context(cell, start, model)
        if ctx is None:
            self._write(cell, {"impossible": "the other modalities have too few weights for so many zeros"})
            return
        found = None
        with clock("mask"):
            if cell.recover != "twin":
                found = self._mask(ctx, model)
                reestimate_batchnorm(model, ctx.task, BATCHNORM_BATCHES, cell.seed)
        with clock("evaluate_before"):
            before = self._evaluate(ctx, model)
        with clock("recover"):
            facts = self._recover(cell, ctx, model, found)
        with clock("evaluate"):
            after = self._evaluate(ctx, model)
            failing = {name: self._evaluate(ctx, model, name).metrics for name in FAILURES}
        self._write(
            cell,
            {
                "primary": ctx.task.primary,
                "before": before.metrics,
                "after": after.metrics,
                "failing": failing,
                "n": after.n,
                **self._pattern(model, found),
                **facts,
                "seconds": clock.seconds,
                "versions": tool_versions("torch", "numpy"),
                "commit": _commit(),
                "threads": torch.get_num_threads(),
            },
        )
        primary = ctx.task.primary
        print(
            f"{time.strftime('%H:%M:%S')} {cell.name}: {primary} {before.metrics[primary]:.4f} -> "
            f"{after.metrics[primary]:.4f}, {sum(clock.seconds.values()):.0f} s",
            flush=True,
        )

    def _context(self, cell: Cell, start: Context, model: nn.Module) -> Context | None:
        """The start with the cell's sparsify section; None where its spread is impossible."""
        from fusepress.pipeline.recipe import load_recipe

        spread = None
        if cell.spread.endswith(("_only", "_spared")):
            spread = named_spread(cell, start, model)
            if spread is None:
                return None
        loaded = load_recipe(
            MODELS[cell.model], [*self._overrides(cell.model, cell.seed), *cell.overrides(self.protocol, spread)]
        )
        return replace(start, loaded=loaded)

    @staticmethod
    def _mask(ctx: Context, model: nn.Module) -> Masked:
        from fusepress.pipeline.stages.masking import mask_model

        return mask_model(ctx, model)

    def _recover(self, cell: Cell, ctx: Context, model: nn.Module, found: Masked | None) -> dict[str, Any]:
        from fusepress.pipeline.stages.finetune import train
        from fusepress.pipeline.stages.sparsify import recover, training_section

        work = self.store / "work" / f"{self.path(cell).stem}"
        facts: dict[str, Any] = {}
        if found is None:
            details = train(ctx, model, training_section(ctx), work)
        else:
            details, facts = recover(ctx, model, found, work, mask_sum=cell.recover != "dense_lora")
        shutil.rmtree(work, ignore_errors=True)
        return {"final_losses": details.get("final_losses", {}), "ranks": details.get("ranks", {}), **facts}

    @staticmethod
    def _evaluate(ctx: Context, model: nn.Module, failure: str | None = None) -> Evaluation:
        from fusepress.pipeline.corrupt import corrupt
        from fusepress.pipeline.evaluate import evaluate, torch_predict

        def broken(batch: Any) -> Any:
            return corrupt(ctx.task, batch, failure, FAILURES[failure]) if failure is not None else batch

        return evaluate(ctx.task, torch_predict(ctx.task, model), "eval", corrupt=broken)

    @staticmethod
    def _pattern(model: nn.Module, found: Masked | None) -> dict[str, Any]:
        """What is left of the masks in the weights, and what they kept."""
        from fusepress.pipeline.graph.masks import violations_2to4
        from fusepress.pipeline.stages.masking import layer_table

        if found is None:
            return {}
        weights = {name: model.get_parameter(name).detach() for name in found.masks}
        two_four = {name: weight for name, weight in weights.items() if weight.shape[1] % 4 == 0}
        return {
            "zeros": sum(int((w == 0).sum()) for w in weights.values()) / sum(w.numel() for w in weights.values()),
            "masked_not_zero": sum(int(weights[n][~mask].count_nonzero()) for n, mask in found.masks.items()),
            "violations_2to4": sum(violations_2to4(weight) for weight in two_four.values()),
            "spread": found.spread,
            "spread_search": found.search.to_dict() if found.search is not None else None,
            "layers": layer_table(model, found),
        }

    def _write(self, cell: Cell, result: dict[str, Any]) -> None:
        facts = {"cell": asdict(cell), "name": cell.name, "protocol": asdict(self.protocol)}
        atomic_write_text(self.path(cell), json.dumps(facts | {"seconds": {}} | result, indent=1) + "\n")


def named_spread(cell: Cell, ctx: Context, model: nn.Module) -> dict[str, float] | None:
    """The fractions of camera_only, lidar_only and fusion_spared at the cell's number of zeros."""
    from fusepress.pipeline.graph.masks import weights_unstructured
    from fusepress.pipeline.scoring.masking import branch_of_parameters
    from fusepress.pipeline.scoring.unstructured import spread_sparing

    branch_of = branch_of_parameters(model, ctx.task.branches)
    counts = dict.fromkeys((*ctx.task.branches, "fusion"), 0)
    for name, weight in weights_unstructured(model)[0].items():
        counts[branch_of[name]] += weight.numel()
    branch, _, what = cell.spread.rpartition("_")
    spared = [branch] if what == "spared" else [other for other in counts if other != branch]
    return spread_sparing(cell.sparsity, counts, spared)


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
