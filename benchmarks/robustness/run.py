"""Street, dense and compressed, under every sensor failure and severity; one command, resumable.

    python -m benchmarks.robustness.run              # trains and evaluates what is left
    python -m benchmarks.robustness.run --list       # says what is left
    python -m benchmarks.robustness.run --report     # tables and plots of what is there

A cell (`cells.py`) is the street recipe with AlterMOMA at one beta and one remedy, run by the pipeline's own stages
(baseline, score, prune, finetune) in a store of their own: a finished cell is never run again, and a killed one goes
on from its last training checkpoint. `evaluate.py` then runs the dense and the fine-tuned network over the eval split
under every failure and keeps the statistics of every sample, which `report.py` has the gates judge.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.pruning.bench import CachedTask
from benchmarks.robustness.cells import DENSE, ROOT, STREET, Cell, HealthyTask, planned
from benchmarks.robustness.evaluate import (
    CONDITIONS,
    EVERY_CONDITION,
    GATE_BATCHES,
    LOOK_BATCHES,
    Samples,
    evaluate_under,
)
from benchmarks.sources import require_sources
from fusepress.pipeline.api import make_context, new_record, preflight
from fusepress.pipeline.console import Reporter
from fusepress.pipeline.evaluate import torch_predict
from fusepress.pipeline.evidence import RunRecord
from fusepress.pipeline.recipe import load_recipe
from fusepress.pipeline.runner import run_stages
from fusepress.pipeline.stages import STAGES as ALL
from fusepress.pipeline.stages.base import Context
from fusepress.pipeline.stages.common import constant_metrics, current_model, dense_model
from fusepress.pipeline.store import Store, atomic_write_text, sha256_file

STORE = ROOT / "runs" / "robustness"
RESULTS = ROOT / "benchmarks" / "results" / "robustness"
CACHE = Path(tempfile.gettempdir()) / "fusepress-batches"
CONSTANT = "constant.json"  # what a prediction that sees no input reaches
STAGES = ("baseline", "score", "prune", "finetune")


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--macs", type=float, default=0.4, help="kept fraction")
    parser.add_argument("--steps", type=int, default=100, help="of fine-tuning")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--until", help="HH:MM; no cell is begun after it")
    parser.add_argument("--list", action="store_true", help="only say what is done and what is left")
    parser.add_argument("--every", nargs="+", default=[], help="names of cells that meet every failure and severity")
    parser.add_argument("--report", action="store_true", help="only write tables and plots of what is there")
    parser.add_argument("--store", type=Path, default=STORE)
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    options = arguments(words)
    cells = list(planned(options.macs, options.steps, options.seeds))
    if not (options.list or options.report):
        require_sources(options.store, "street", [STREET])
        for cell in cells:
            if options.until is not None and time.strftime("%H:%M") >= options.until:
                print("stopping: the time is over", flush=True)
                break
            _work(options, cell)
    left = [cell.name for cell in cells if not _is_done(options, cell)]
    if options.report:
        from benchmarks.robustness.report import write_report

        command = shlex.join(["python", "-m", "benchmarks.robustness.run", *(sys.argv[1:] if words is None else words)])
        write_report(options.store, [cell for cell in cells if cell.name not in left], left, options.results, command)
    print(f"{len(cells) - len(left)} cells done, {len(left)} left" + "".join(f"\n  left: {name}" for name in left))
    return 1 if left else 0


def samples_of(store: Path, cell: Cell | None) -> Samples:
    """The statistics of a cell's network, or of the dense one."""
    name = f"{cell.name}-{cell.key}" if cell is not None else f"dense-{sha256_file(DENSE)[:16]}"
    return Samples(store / "samples" / name)


def figures_of(store: Path, cell: Cell) -> Path:
    """Where the figures of a cell's stages lie."""
    return store / "trained" / f"{cell.name}-{cell.key}.json"


def _wanted(options: argparse.Namespace, cell: Cell) -> list[tuple[list[tuple[str, int]], int]]:
    """Conditions and on how many batches."""
    looked_at = [(EVERY_CONDITION, LOOK_BATCHES)] if cell.name in options.every else []
    return [(CONDITIONS, GATE_BATCHES), *looked_at]


def _is_done(options: argparse.Namespace, cell: Cell) -> bool:
    networks = [samples_of(options.store, None), samples_of(options.store, cell)]
    evaluated = all(network.has(*wanted) for network in networks for wanted in _wanted(options, cell))
    return figures_of(options.store, cell).is_file() and evaluated and (options.store / CONSTANT).is_file()


def _work(options: argparse.Namespace, cell: Cell) -> None:
    if _is_done(options, cell):
        return
    began = time.monotonic()
    ctx = trained(options.store, cell)
    print(f"{time.strftime('%H:%M:%S')} {cell.name}: trained, {time.monotonic() - began:.0f} s", flush=True)
    dense = dense_model(ctx)
    for conditions, batches in _wanted(options, cell):
        evaluate_under(ctx, current_model(ctx), samples_of(options.store, cell), conditions, batches)
        evaluate_under(ctx, dense, samples_of(options.store, None), conditions, batches)
    if not (options.store / CONSTANT).is_file():
        found = constant_metrics(ctx, torch_predict(ctx.task, dense))
        atomic_write_text(options.store / CONSTANT, json.dumps(found, indent=1) + "\n")


def trained(store: Path, cell: Cell) -> Context:
    """The cell after its stages, run or read from the store; its figures are kept under `trained`."""
    ctx = make_context(load_recipe(STREET, cell.overrides()), Reporter(quiet=True))
    if cell.data == "healthy":
        ctx.task.user = HealthyTask(ctx.task.user)
    ctx.task.user = CachedTask(ctx.task.user, CACHE / ctx.task.fingerprint("train")[:16])
    folder = store / cell.name
    preflight(ctx, Store(folder.parent / ".store"))
    record = new_record(ctx, folder, "python -m benchmarks.robustness.run")
    run_stages(ctx, [stage for stage in ALL if stage.name in STAGES], record, folder)
    if not figures_of(store, cell).is_file():
        atomic_write_text(figures_of(store, cell), json.dumps(_figures(record), indent=1) + "\n")
    return ctx


def _figures(record: RunRecord) -> dict[str, dict[str, Any]]:
    """Stage -> measurement -> value, and the interval of what is predicted."""
    return {
        stage.name: {
            m.name: m.value if m.kind != "predicted" else {"value": m.value, "low": m.low, "high": m.high}
            for m in stage.measurements
        }
        for stage in record.stages
    }


if __name__ == "__main__":
    sys.exit(main())
