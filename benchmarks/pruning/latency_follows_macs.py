"""Does latency follow the MACs on host ONNX Runtime? Street at 40 % of the dense MACs, float32, one thread.

    OMP_NUM_THREADS=1 python -m benchmarks.pruning.latency_follows_macs [--rounds 30] [--work FOLDER] [--results FILE]

follow = (dense latency / pruned latency) / (dense MACs / pruned MACs); the claim is at least 0.9. The networks are
exported and slimmed as the export stage does. Dense and pruned networks run in turns, in blocks of a few runs, every
second round in the reverse order. With one thread ONNX Runtime works in the thread that calls it, whose processor time
is taken: other work on the machine takes wall time of a shared processor, hardly processor time (both are kept).
`follow` is the median over rounds of the ratios of the blocks' medians, with a bootstrap interval over rounds;
`follow_of_minima` takes every network's fastest run.

The breakdown is ONNX Runtime's profile of the same sessions: microseconds of each kind of operator, the rate of the
convolutions, and what follow would be if that kind alone made the latency.
Scores and exports are kept in --work, for exporting costs more than measuring.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import platform
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import nn

from fusepress.export.onnx import export_onnx
from fusepress.export.passes import slim
from fusepress.export.runtime import OnnxSession
from fusepress.pipeline.evaluate import torch_predict
from fusepress.pipeline.graph.apply import apply_plan, load_checkpoint
from fusepress.pipeline.graph.cost import CostModel
from fusepress.pipeline.graph.groups import find_groups
from fusepress.pipeline.pruning.allocate import Allocation, allocate
from fusepress.pipeline.recipe import PruneConfig, ScoreConfig
from fusepress.pipeline.scoring.criteria import score_channels
from fusepress.pipeline.scoring.result import load_scores, save_scores
from fusepress.pipeline.store import sha256_file
from fusepress.pipeline.task import first_batch, load_task
from fusepress.targets.profile import load_profile

ROOT = Path(__file__).resolve().parents[2]
STREET = ROOT / "examples" / "street"
RESULTS = ROOT / "benchmarks" / "results" / "pruning" / "latency_follows_macs.json"
ROWS = (
    ("importance", "taylor", 16, 0.4),
    ("importance", "taylor", 16, 0.44),  # loses no more score than multiples of 8 at 40 %: is it as slow?
    ("importance", "taylor", 8, 0.4),
    ("importance", "taylor", 1, 0.4),
    ("global", "magnitude", 16, 0.4),
    ("global", "magnitude", 8, 0.4),
    ("global", "random", 16, 0.4),
    ("global", "random", 8, 0.4),
)
MACS, CLAIM, RUNS, WARM, PROFILED = 0.4, 0.9, 6, 5, 40
Array = npt.NDArray[np.float64]


class Street:
    """The example, its groups and costs, and what has been scored and exported."""

    def __init__(self, work: Path) -> None:
        self.work = work
        work.mkdir(parents=True, exist_ok=True)
        self.task = load_task("task.py:StreetTask", base=STREET)
        self.model = self.task.build_model().eval()
        load_checkpoint(self.model, STREET / "street.safetensors")
        self.inputs = {k: v.clone() for k, v in first_batch(self.task, "calib", size=1).inputs.items()}
        self.graph = find_groups(self.model, self.inputs, self.task.branches, self.task.keep)
        self.cost = CostModel(self.graph, self.model, self.inputs)
        self.checkpoint = sha256_file(STREET / "street.safetensors")

    def scores(self, method: Any) -> Mapping[str, npt.NDArray[Any]]:
        """Of four batches, seed 0."""
        path = self.work / f"{method}-s0-{self.checkpoint[:8]}.safetensors"
        if not path.is_file():
            config = ScoreConfig(method=method, batches=4)
            found = score_channels(self.model, self.task, self.graph, config, seed=0, progress=lambda *_: None)
            save_scores(found, path)
        return load_scores(path).channel

    def allocation(self, kind: Any, method: str, align: int, macs: float) -> Allocation:
        """Widths within the budget."""
        return allocate(
            self.scores(method), self.graph, self.cost, PruneConfig(macs=macs, allocation=kind), align=align
        )

    def onnx(self, allocation: Allocation | None) -> Path:
        """The exported network: the dense one, or one with these widths."""
        kept = {} if allocation is None else allocation.kept
        key = hashlib.sha256(json.dumps([self.checkpoint, torch.__version__, sorted(kept.items())]).encode())
        path = self.work / f"{key.hexdigest()[:16]}.onnx"
        if not path.is_file():
            model: nn.Module = copy.deepcopy(self.model)
            if allocation is not None:
                model = apply_plan(model, self.graph.plan(allocation.kept))
            names = list(torch_predict(self.task, model)(self.inputs))
            with tempfile.TemporaryDirectory() as folder:
                raw = Path(folder) / "raw.onnx"
                export_onnx(model, self.inputs, names, raw, opset=load_profile("host-cpu").opset)
                slim(raw, path, [first_batch(self.task, "calib", size=1)])
        return path


def timed(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Array]:
    """Milliseconds of processor and wall time of every run: name -> (2, rounds, RUNS)."""
    for run in runs.values():
        for _ in range(WARM):
            run()
    taken: dict[str, list[list[tuple[int, int]]]] = {name: [] for name in runs}
    for turn in range(rounds):
        for name in list(runs)[:: 1 if turn % 2 == 0 else -1]:
            block = []
            for _ in range(RUNS):
                wall, processor = time.perf_counter_ns(), time.thread_time_ns()
                runs[name]()
                block.append((time.thread_time_ns() - processor, time.perf_counter_ns() - wall))
            taken[name].append(block)
    return {name: np.moveaxis(np.array(blocks) * 1e-6, -1, 0) for name, blocks in taken.items()}


def latency(times: Array) -> dict[str, float]:
    """Medians and minima of (2, rounds, RUNS), milliseconds."""
    return {
        "median_ms": float(np.median(times[0])),
        "min_ms": float(times[0].min()),
        "wall_median_ms": float(np.median(times[1])),
        "wall_min_ms": float(times[1].min()),
        "n": int(times[0].size),
    }


def followed(dense: Array, pruned: Array, kept: float) -> dict[str, Any]:
    """The claim's figure, in processor time: of medians with its 95 % interval, and of minima."""
    ratios = np.median(dense[0], axis=1) / np.median(pruned[0], axis=1) * kept
    draw = np.random.default_rng(0).integers(0, len(ratios), size=(2000, len(ratios)))
    low, high = np.quantile(np.median(ratios[draw], axis=1), [0.025, 0.975])
    return {
        "follow": float(np.median(ratios)),
        "follow_95": [float(low), float(high)],
        "follow_of_minima": float(dense[0].min() / pruned[0].min() * kept),
        "follow_of_wall_minima": float(dense[1].min() / pruned[1].min() * kept),
    }


def profiled(path: Path, inputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Microseconds by operator (lower decile of each node's runs), and MACs of the convolutions, from the profile."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_profiling, options.log_severity_level = True, 4
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        wrapped = OnnxSession(path, 1)
        feed = {name: inputs[name].numpy().astype(wrapped.dtype(name)) for name in wrapped.inputs}
        for _ in range(PROFILED):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
    taken: dict[str, list[float]] = defaultdict(list)
    shown: dict[str, dict[str, Any]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            taken[event["name"]].append(event["dur"])
            shown[event["name"]] = event["args"]
    kinds: dict[str, float] = defaultdict(float)
    convolutions = {}
    for name, durations in taken.items():
        micros = float(np.quantile(durations, 0.1))
        kinds[shown[name]["op_name"]] += micros
        if shown[name]["op_name"] == "Conv":
            convolutions[name.removesuffix("_kernel_time")] = _convolution(shown[name], micros)
    return {"micros": dict(kinds), "convolutions": convolutions}


def _convolution(shown: Mapping[str, Any], micros: float) -> dict[str, Any]:
    """A convolution's shapes and rate. MACs as executed: a channel block that is padded counts whole."""
    image, weight = (list(next(iter(entry.values()))) for entry in shown["input_type_shape"][:2])
    result = list(next(iter(shown["output_type_shape"][0].values())))
    macs = int(np.prod(result) * np.prod(weight[1:]))
    return {"input": image, "weight": weight, "macs": macs, "micros": micros, "gmacs_per_second": macs / micros / 1e3}


def breakdown(dense: dict[str, Any], pruned: dict[str, Any], kept: float) -> dict[str, Any]:
    """Which kinds of operators follow: shares of the time, and the follow of each alone."""
    whole, part = sum(dense["micros"].values()), sum(pruned["micros"].values())
    rows = {}
    for kind in sorted(dense["micros"], key=lambda k: -dense["micros"][k]):
        before, after = dense["micros"][kind], pruned["micros"].get(kind, 0.0)
        rows[kind] = {
            "dense_us": round(before, 1),
            "pruned_us": round(after, 1),
            "dense_share": round(before / whole, 4),
            "pruned_share": round(after / part, 4),
            "follow_alone": round(before / after * kept, 3) if after else None,
        }
    rates = {
        name: sum(c["macs"] for c in each["convolutions"].values())
        / sum(c["micros"] for c in each["convolutions"].values())
        / 1e3
        for name, each in (("dense", dense), ("pruned", pruned))
    }
    slow = [
        {"layer": layer, **c, "dense_gmacs_per_second": dense["convolutions"][layer]["gmacs_per_second"]}
        for layer, c in pruned["convolutions"].items()
        if layer in dense["convolutions"]
    ]
    slow.sort(key=lambda c: c["micros"] * (c["gmacs_per_second"] / c["dense_gmacs_per_second"] - 1))
    return {"operators": rows, "convolution_gmacs_per_second": rates, "convolutions_that_lose_most": slow[:5]}


def measured(street: Street, rounds: int) -> dict[str, Any]:
    """All rows."""
    allocations = {f"{kind} {method} {align} {macs}": (kind, method, align, macs) for kind, method, align, macs in ROWS}
    found = {name: street.allocation(*row) for name, row in allocations.items()}
    paths = {"dense": street.onnx(None)} | {name: street.onnx(allocation) for name, allocation in found.items()}
    runs = {name: OnnxSession(path, 1).timed_callable(street.inputs) for name, path in paths.items()}
    load = [os.getloadavg()[0]]
    times = timed(runs, rounds)
    load.append(os.getloadavg()[0])
    profile = {name: profiled(path, street.inputs) for name, path in paths.items()}
    rows = []
    for name, allocation in found.items():
        kept = allocation.achieved
        rows.append(
            {
                "allocation": allocations[name][0],
                "scores": allocations[name][1],
                "align": allocations[name][2],
                "budget": allocations[name][3],
                "kept_macs": kept,
                "lost_score": allocation.objective,
                "widths": list(allocation.widths.values()),
                **latency(times[name]),
                **followed(times["dense"], times[name], kept),
                "breakdown": breakdown(profile["dense"], profile[name], kept),
            }
        )
    return {"load_average": load, "dense": latency(times["dense"]), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "latency")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "command": "OMP_NUM_THREADS=1 python -m benchmarks.pruning.latency_follows_macs",
        "claim": f"follow >= {CLAIM} at {MACS:.0%} of the dense MACs",
        "seed": 0,
        "rounds": arguments.rounds,
        "runs_a_block": RUNS,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "onnxruntime": onnxruntime.__version__,
            "numpy": np.__version__,
        },
        "processor": _processor(),
        **measured(Street(arguments.work), arguments.rounds),
    }
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    arguments.results.write_text(json.dumps(result, indent=1) + "\n")
    print(f"dense {result['dense']['median_ms']:.2f} ms (least {result['dense']['min_ms']:.2f})")
    for row in result["rows"]:
        print(
            f"{row['allocation']:10s} {row['scores']:9s} align {row['align']:2d}, {row['budget']:.0%}: "
            f"{row['median_ms']:.2f} ms, follow "
            f"{row['follow']:.3f} [{row['follow_95'][0]:.3f}, {row['follow_95'][1]:.3f}], of minima "
            f"{row['follow_of_minima']:.3f}"
        )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    flags = next((line for line in lines if line.startswith("flags")), "")
    return f"{name}, {'AVX-512' if 'avx512f' in flags else 'AVX2' if 'avx2' in flags else 'no AVX2'}"


if __name__ == "__main__":
    main()
