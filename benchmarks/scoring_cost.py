"""What scoring costs on street: time against the forward-backward passes it counts, and peak memory in copies.

    python benchmarks/scoring_cost.py [--methods altermoma snip ...] [--batches 4] [--repeats 2]

Time: channel scores of every method, one thread, in processor seconds, which leave out what other processes take. The
reference is a plain forward-backward pass (zero_grad, loss, backward) of a second copy of the dense model on the same
training batches, run after every pass that the method counts, so that both see the same caches and clocks; its time is
taken out of the method's. Reported is (time of scoring) / (passes counted x mean time of the reference): everything
counts, the making of batches, snapshots, optimiser steps and aggregation too. SynFlow's pass is a single sample in
float64, and so is its reference. IMP takes two rounds. Methods without passes have their seconds only. AlterMOMA runs
twice: as recipes have it (beta auto, which is 0: no redundancy term) and with beta 1, both reactivations included.

Work: floating-point operations of convolutions and matrix products in the kernels that ran during scoring (counted by
torch.utils.flop_counter) over passes counted x those of the reference. It tells whether a method counts what it does:
a Hessian-vector product counts as three passes because that is its work (pipeline/scoring/curvature.py).

Memory: bytes of live storages that a dispatch mode saw being made during scoring (two batches, two inner steps; IMP in
two rounds, SynFlow in three) and that hold a tensor of the shape of some parameter, of a buffer of it, or of all
parameters in one vector; their peak over the bytes of the parameters. So activations do not count, and what the shapes
share by chance counts too much rather than too little. The model itself is not counted; the result is. What rounds
put aside in files is not in memory and not counted. Every method is looked at in three rounds too.

Writes benchmarks/results/scoring_cost.json, method by method; with --methods the others stay in it. With --copies only
memory is looked at, which does not depend on what else the machine does, and the times of before stay.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import platform
import statistics
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fusepress.pipeline.graph.apply import load_checkpoint
from fusepress.pipeline.graph.groups import find_groups
from fusepress.pipeline.graph.plan import GroupGraph
from fusepress.pipeline.recipe import ScoreConfig
from fusepress.pipeline.scoring.criteria import METHODS, score_channels, score_weights
from fusepress.pipeline.task import Batch, LoadedTask, cut_batch, load_task

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "scoring_cost.json"
LIMIT_TIME, LIMIT_COPIES = 1.15, 3.0
ROWS: dict[str, dict[str, Any]] = {method: {"method": method} for method in sorted(METHODS)}
ROWS["imp"]["rounds"] = 2
ROWS["altermoma_beta1"] = {"method": "altermoma", "beta": 1.0}


@dataclass(slots=True, kw_only=True)
class Reference:
    """A plain forward-backward pass, and the times it took."""

    model: nn.Module
    task: LoadedTask
    batches: list[Batch]
    seconds: list[float] = field(default_factory=list)

    def run(self) -> None:
        """One pass, on the batches in turn."""
        batch = self.batches[len(self.seconds) % len(self.batches)]
        start = time.process_time()
        self.model.zero_grad(set_to_none=True)
        losses = self.task.losses(self.task.as_dict(self.model(**batch.inputs)), batch)
        torch.stack(list(losses.values())).sum().backward()
        self.seconds.append(time.process_time() - start)


class Stopwatch:
    """Progress that takes the time of every pass, without the reference passes that it runs in between."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.pieces: list[float] = []
        self.start = time.process_time()

    def __call__(self, _fraction: float, _text: str) -> None:
        """A pass of the method is over: a reference pass follows, on nobody's account."""
        self.pieces.append(time.process_time() - self.start)
        self.reference.run()
        self.start = time.process_time()

    def stop(self) -> float:
        """Seconds of the method."""
        self.pieces.append(time.process_time() - self.start)
        return sum(self.pieces)


class LiveCopies(TorchDispatchMode):
    """The peak of the bytes of live tensors that look like parameters; what is mapped from a file takes no memory."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        tensors = [*model.parameters(), *model.buffers()]
        self.shapes = {tuple(t.shape) for t in tensors if t.numel() > 1}
        self.total = sum(p.numel() for p in model.parameters())
        self.own = {_storage(t) for t in tensors}
        self.live: dict[int, int] = {}
        self.now: int = 0
        self.peak: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and (tuple(value.shape) in self.shapes or value.numel() == self.total):
                self._note(value)
        return result

    def _note(self, value: Tensor) -> None:
        storage = value.untyped_storage()
        key = _storage(value)
        if key in self.own or key in self.live or storage.filename is not None:
            return
        self.live[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self.live.pop(key, 0)


def _storage(value: Tensor) -> int:
    return int(value.untyped_storage()._cdata)


def reference_of(name: str, model: nn.Module, task: LoadedTask, count: int, seed: int) -> Reference:
    """A plain pass of what the method's passes are made of."""
    twin = copy.deepcopy(model)
    batches = list(itertools.islice(task.train_batches(seed), count))
    if name == "synflow":
        twin = twin.double()
        batches = [_double(cut_batch(batches[0], 1))]
    return Reference(model=twin, task=task, batches=batches)


def time_of(
    name: str, model: nn.Module, task: LoadedTask, graph: GroupGraph, arguments: argparse.Namespace, seed: int
) -> dict[str, Any]:
    config = ScoreConfig.model_validate({**ROWS[name], "batches": arguments.batches})
    reference = reference_of(name, model, task, arguments.batches, seed)
    reference.run()  # the first pass is slower
    reference.seconds.clear()
    watch = Stopwatch(reference)
    result = score_channels(model, task, graph, config, seed=seed, progress=watch)
    seconds, passes = watch.stop(), result.log["passes"]
    row = {"seconds": seconds, "passes": passes, "passes_of_reference": len(reference.seconds)}
    if passes:
        row |= {
            "reference_mean_s": statistics.mean(reference.seconds),
            "reference_median_s": statistics.median(reference.seconds),
            "ratio": seconds / (passes * statistics.mean(reference.seconds)),
        }
    return row


def _double(batch: Batch) -> Batch:
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in batch.inputs.items()}
    return batch.with_inputs(**inputs)


def memory_config(name: str) -> ScoreConfig:
    rounds = {"rounds": 3} if name == "synflow" else {}
    return ScoreConfig.model_validate({**ROWS[name], "batches": 2, "reactivation_batches": 2, **rounds})


def work_of(name: str, model: nn.Module, task: LoadedTask, graph: GroupGraph) -> float | None:
    """Floating-point operations of the kernels over those of the passes counted."""
    reference = reference_of(name, model, task, 1, seed=0)
    with FlopCounterMode(display=False) as plain:
        reference.run()
    with FlopCounterMode(display=False) as flops:
        result = score_channels(model, task, graph, memory_config(name), seed=0)
    passes = result.log["passes"]
    return round(flops.get_total_flops() / (passes * plain.get_total_flops()), 3) if passes else None


def copies_of(name: str, model: nn.Module, task: LoadedTask, graph: GroupGraph) -> dict[str, float]:
    config = memory_config(name)
    in_rounds = config.model_copy(update={"rounds": 3})
    size = sum(p.numel() * p.element_size() for p in model.parameters())

    def peak(score: Callable[[], Any]) -> float:
        with LiveCopies(model) as seen:
            score()
        return float(round(seen.peak / size, 3))

    return {
        "channels": peak(lambda: score_channels(model, task, graph, config, seed=0)),
        "weights": peak(lambda: score_weights(model, task, config, seed=0)),
        "channels_in_rounds": peak(lambda: score_channels(model, task, graph, in_rounds, seed=0)),
        "weights_in_rounds": peak(lambda: score_weights(model, task, in_rounds, seed=0)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--copies", action="store_true", help="look at memory alone; the times of before stay")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task = load_task("task.py:StreetTask", base=ROOT / "examples/street")
    model = task.build_model()
    load_checkpoint(model, ROOT / "examples/street/street.safetensors")
    inputs = cut_batch(next(task.batches("calib", 0)), 1).inputs
    graph = find_groups(model, inputs, task.branches, task.keep)
    rows: dict[str, Any] = {}
    for method in arguments.methods:
        row = stored(arguments)[method] if arguments.copies else timed(method, model, task, graph, arguments)
        rows[method] = row | {"copies": copies_of(method, model, task, graph)}
        print(f"{method:16} {row['ratio']} {rows[method]['copies']}", flush=True)
        write(rows, arguments)
    beyond = [method for method, row in rows.items() if not within_limits(row)]
    print("beyond the limits: " + (", ".join(beyond) or "none"))
    return 1 if beyond else 0


def timed(
    method: str, model: nn.Module, task: LoadedTask, graph: GroupGraph, arguments: argparse.Namespace
) -> dict[str, Any]:
    runs = [time_of(method, model, task, graph, arguments, seed) for seed in range(arguments.repeats)]
    ratios = [run["ratio"] for run in runs if "ratio" in run]
    return {
        "ratio": statistics.median(ratios) if ratios else None,
        "work": work_of(method, model, task, graph),
        "clock": "processor",
        "command": " ".join(["python benchmarks/" + Path(sys.argv[0]).name, *sys.argv[1:]]),
        "seeds": list(range(arguments.repeats)),
        "n": arguments.repeats,
        "load_average": round(os.getloadavg()[1], 1),
        "runs": runs,
    }


def within_limits(row: dict[str, Any]) -> bool:
    return (row["ratio"] or 0.0) <= LIMIT_TIME and max(row["copies"].values()) <= LIMIT_COPIES


def stored(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the file holds, method by method, at the same number of batches."""
    if not arguments.results.exists():
        return {}
    before = json.loads(arguments.results.read_text())
    return dict(before["methods"]) if before["batches"] == arguments.batches else {}


def write(rows: dict[str, Any], arguments: argparse.Namespace) -> None:
    """The results so far, beside what the file holds of other methods at the same number of batches."""
    kept = stored(arguments)
    result = {
        "what": "ratio: time of scoring over (passes counted x that of a plain pass forward and back); work: "
        "floating-point operations of scoring over (passes counted x those of a plain pass); copies: peak extra copies "
        "of the parameters, the result included",
        "passes": "one batch forward and back; a batch of GraSP's Hessian-vector product counts as three, the work "
        "that torch.utils.flop_counter counts for it",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "threads": 1,
        "cores": os.cpu_count(),
        "batches": arguments.batches,
        "limits": {"ratio": LIMIT_TIME, "copies": LIMIT_COPIES},
        "methods": {**kept, **rows},
    }
    arguments.results.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
