"""Every pruning method on the same checkpoint, at the same MACs, with the same fine-tuning; one command, resumable.

    python -m benchmarks.pruning.run --suite core --workers 2      # runs what is left
    python -m benchmarks.pruning.run --suite core --list           # says what is left, and how long it will take

A finished cell is never run again; a killed one goes on from its last training checkpoint. Several commands may run at
once: a cell is claimed by a lock that the system drops when its process dies. Results lie in runs/pruning; tables and
plots are made of them by `python -m benchmarks.pruning.table`.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from benchmarks.pruning.cells import ROOT, SUITES, Cell, Protocol, Results, planned
from benchmarks.pruning.methods import ALL

STORE = ROOT / "runs" / "pruning"
CACHE = Path(tempfile.gettempdir()) / "fusepress-batches"
KILLED = "killed, or its process crashed"
MOST_ATTEMPTS, MOST_KILLED = 2, 6  # of one cell: those that raised an error, and all (a kill is nobody's fault)
# glibc gives large blocks back to the system and asks for them again in every step; these settings spare that
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "4000000000"}


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", nargs="+", choices=(*SUITES, "all"), default=["core"])
    parser.add_argument("--methods", nargs="+", choices=[spec.name for spec in ALL])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--budgets", type=float, nargs="+", help="only these")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--until", help="HH:MM; no cell is begun after it")
    parser.add_argument("--list", action="store_true", help="only say what is done and what is left")
    parser.add_argument("--retry", action="store_true", help="try cells again that failed")
    parser.add_argument("--store", type=Path, default=STORE)
    parser.add_argument("--cache", type=Path, default=CACHE, help="where training batches are kept")
    parser.add_argument("--data", type=Path, help="data folder of kitti_depth")
    parser.add_argument("--recipe", type=Path, help="another task instead of street: the recipe of it")
    parser.add_argument("--steps", type=int, default=Protocol().steps)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default=Protocol().precision)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def wanted(options: argparse.Namespace) -> list[Cell]:
    """The cells that the options name, by priority."""
    suites = SUITES if "all" in options.suite else options.suite
    cells = planned(suites, options.seeds, options.methods)
    if options.budgets:
        cells = [cell for cell in cells if cell.budget in options.budgets]
    if options.recipe is None:
        return cells
    others = [
        Cell(task=str(options.recipe), method=c.method, kind=c.kind, budget=c.budget, seed=c.seed)
        for c in cells
        if c.task == "street"
    ]
    return list(dict.fromkeys(others))


def main(words: Sequence[str] | None = None) -> int:
    options = arguments(words)
    if options.worker:
        return Worker(options).work()
    if options.list:
        return show(options)
    command = [sys.executable, "-m", "benchmarks.pruning.run", *(sys.argv[1:] if words is None else words), "--worker"]
    running = [subprocess.Popen(command, env={**os.environ, **ENVIRONMENT}) for _ in range(options.workers)]
    while running:
        time.sleep(0.2)
        still = []
        for process in running:
            code = process.poll()
            if code is None:
                still.append(process)
            elif code < 0:  # killed by a signal: its cell counts an attempt, the others go on
                print(f"a worker ended by signal {-code}; starting another", flush=True)
                still.append(subprocess.Popen(command, env={**os.environ, **ENVIRONMENT}))
        running = still
    return show(options)


class Worker:
    """Takes one cell after the other until none is left."""

    def __init__(self, options: argparse.Namespace) -> None:
        from benchmarks.pruning.bench import Bench, Skipped

        self.options, self.skipped = options, Skipped
        self.results = Results(options.store)
        self.protocol = Protocol(steps=options.steps, precision=options.precision)
        self._make, self._benches = Bench, dict[str, Bench | str]()
        self.retried: set[str] = set()

    def bench(self, task: str) -> object:
        """The task's bench, or why there is none."""
        if task not in self._benches:
            try:
                self._benches[task] = self._make(
                    task, self.protocol, self.results, cache=self.options.cache, data=self.options.data
                )
            except self.skipped as reason:
                self._benches[task] = str(reason)
        return self._benches[task]

    def work(self) -> int:
        """Cells by priority; those of other workers are passed over."""
        for cell in wanted(self.options):
            if self._over():
                print("stopping: the time is over or the store has a file `stop`", flush=True)
                return 0
            self._one(cell)
        return 0

    def _over(self) -> bool:
        late = self.options.until is not None and time.strftime("%H:%M") >= self.options.until
        return late or (self.results.folder / "stop").exists()

    def _one(self, cell: Cell) -> None:
        from fusepress.pipeline.errors import StoreError
        from fusepress.pipeline.store import folder_lock

        bench = self.bench(cell.task)
        if not isinstance(bench, self._make):
            print(f"skipped {cell.name}: {bench}", flush=True)
            return
        key = bench.key(cell)
        reason = bench.missing(cell)
        if reason is not None or self.results.done(cell, key):
            return
        try:
            with folder_lock(self.results.folder / "claims" / f"{cell.name}-{key}"):
                if not self.results.done(cell, key):
                    self._attempt(bench, cell, key)
        except StoreError as error:
            if "expected to be alone" not in str(error):
                raise

    def _attempt(self, bench: object, cell: Cell, key: str) -> None:
        """Run a cell; what goes wrong is kept, and does not stop the others."""
        assert isinstance(bench, self._make)
        before = self.results.failures(cell, key)
        if self.options.retry and key not in self.retried:
            self.retried.add(key)
            before = []
        if given_up(before):
            return
        self.results.set_failures(cell, key, [*before, KILLED])
        began = time.monotonic()
        try:
            result = bench.run(cell)
        except Exception as error:  # noqa: BLE001 - one bad cell must not cost the rest of the night
            traceback.print_exc()
            self.results.set_failures(cell, key, [*before, f"{type(error).__name__}: {error}"])
            return
        self.results.set_failures(cell, key, [])
        primary = result["primary"]
        print(
            f"{time.strftime('%H:%M:%S')} {cell.name}: {primary} {result['before'][primary]:.4f} -> "
            f"{result['after'][primary]:.4f} at {result['achieved']['macs']:.4f} of the MACs, "
            f"{time.monotonic() - began:.0f} s",
            flush=True,
        )


def given_up(attempts: Sequence[str]) -> bool:
    """Whether a cell has failed too often to be tried again."""
    return sum(text != KILLED for text in attempts) >= MOST_ATTEMPTS or len(attempts) >= MOST_KILLED


def show(options: argparse.Namespace) -> int:
    """Print what is done, what is left and what failed; 0 if nothing is left that could run."""
    worker = Worker(options)
    left: list[str] = []
    spent: list[float] = []
    unable: dict[str, str] = {}
    failed: dict[str, str] = {}
    done = 0
    for cell in wanted(options):
        bench = worker.bench(cell.task)
        if not isinstance(bench, worker._make):
            unable[cell.name] = str(bench)
            continue
        key = bench.key(cell)
        if worker.results.done(cell, key):
            done += 1
            spent.append(sum(json.loads(worker.results.path(cell, key).read_text())["seconds"].values()))
        elif reason := bench.missing(cell):
            unable[cell.name] = reason
        elif given_up(tries := worker.results.failures(cell, key)):
            failed[cell.name] = tries[-1]
        else:
            left.append(cell.name)
    pace = statistics.median(spent) if spent else float("nan")
    print(f"{done} cells done, {len(left)} left, {len(unable)} cannot run, {len(failed)} failed")
    print(f"median {pace:.0f} s a cell: {pace * len(left) / 60 / options.workers:.0f} minutes with {options.workers}")
    for reason, count in collections.Counter(unable.values()).items():
        print(f"  cannot run: {count} cells: {reason}")
    for name, reason in failed.items():
        print(f"  failed: {name}: {reason}")
    if options.list:
        for name in left:
            print(f"  left: {name}")
    return 1 if left or failed else 0


if __name__ == "__main__":
    sys.exit(main())
