"""What sharing a run saves: seconds of each kind of shared work on street, in one process and in N, in the same run.

    python -m benchmarks.distributed [--processes 2] [--kinds score distortion evaluation finetune] [--repeats 2]

The kinds: AlterMOMA's scores (its reactivation steps are made by every process), a distortion table at every fourth
width, the evaluation of the dense model, and fine-tuning (N processes make steps / N steps, on the same number of
samples as one). Processes have `--threads` each (1), so that N of them use N cores; each kind is timed by rank 0
between two barriers, starts and imports apart. One and N processes alternate, `--repeats` times, and the least time
counts. Prints a table; nothing is written, for the figures are those of the machine at that time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from fusepress.pipeline import distributed

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("score", "distortion", "evaluation", "finetune")
BATCHES, REACTIVATION, SAMPLES, STEPS, EVERY_WIDTH = 8, 2, 32, 16, 4

Seconds = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker is not None:
        work(given.kinds, given.worker)
        return
    found: dict[int, list[Seconds]] = {1: [], given.processes: []}
    for _ in range(given.repeats):
        for processes in found:
            found[processes].append(launch(processes, given.kinds, given.threads))
    print(f"{'':<12} {'1 process':>12} {f'{given.processes} processes':>14} {'speed-up':>9}")
    for kind in given.kinds:
        one, many = (min(seconds[kind] for seconds in found[count]) for count in (1, given.processes))
        print(f"{kind:<12} {one:>10.1f} s {many:>12.1f} s {one / many:>8.2f}x")
    print(f"load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


def launch(processes: int, kinds: list[str], threads: int) -> Seconds:
    """One start of the processes; seconds by kind."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "seconds.json"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "--"]
        prefix = launcher if processes > 1 else ["-m"]
        command = [sys.executable, *prefix, "benchmarks.distributed", "--worker", str(out), "--kinds", *kinds]
        subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, check=True)
        seconds: Seconds = json.loads(out.read_text())
        return seconds


def work(kinds: list[str], out: Path) -> None:
    """One process: every kind in turn; rank 0 writes the seconds."""
    with distributed.session():
        seconds: Seconds = {}
        calls = prepare()
        for kind in kinds:
            distributed.barrier()
            started = time.perf_counter()
            calls[kind]()
            distributed.barrier()
            seconds[kind] = time.perf_counter() - started
        if distributed.is_main():
            out.write_text(json.dumps(seconds))


def prepare() -> dict[str, Callable[[], object]]:
    """The street model and its task, and what is timed."""
    import numpy as np

    from fusepress.pipeline.evaluate import evaluate, torch_predict
    from fusepress.pipeline.graph.apply import load_checkpoint
    from fusepress.pipeline.graph.groups import find_groups
    from fusepress.pipeline.pruning.distortion import distortion_table
    from fusepress.pipeline.recipe import DistortionConfig, FinetuneConfig, ScoreConfig
    from fusepress.pipeline.recovery.finetune import finetune
    from fusepress.pipeline.scoring.criteria import score_channels
    from fusepress.pipeline.task import cut_batch, load_task

    task = load_task("task.py:StreetTask", base=ROOT / "examples/street")
    model = task.build_model()
    load_checkpoint(model, ROOT / "examples/street/street.safetensors")
    model.eval()
    inputs = cut_batch(next(task.batches("calib", 0)), 1).inputs
    graph = find_groups(model, inputs, task.branches, task.keep)
    score = ScoreConfig(method="altermoma", beta=1.0, batches=BATCHES, reactivation_batches=REACTIVATION)
    equal = {group.id: np.arange(group.width, dtype=np.float32) for group in graph.groups}
    ladders = {g.id: tuple(range(g.width, 0, -EVERY_WIDTH * g.multiple)) for g in graph.groups}

    def train() -> None:
        config = FinetuneConfig(steps=STEPS // distributed.world(), distill=False)
        with tempfile.TemporaryDirectory() as folder:
            finetune(model, None, task, config, seed=0, workdir=Path(folder))

    return {
        "score": lambda: score_channels(model, task, graph, score, seed=0),
        "distortion": lambda: distortion_table(
            model, task, graph, equal, ladders, DistortionConfig(samples=SAMPLES, eta=0), seed=0
        ),
        "evaluation": lambda: evaluate(task, torch_predict(task, model), "eval"),
        "finetune": train,
    }


if __name__ == "__main__":
    main()
