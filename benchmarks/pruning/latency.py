"""Latency of the networks in the store: predicted on the target, and measured on this host's ONNX Runtime.

Latency depends on widths alone. The prediction follows from them (a few networks are exported to learn how); for a
measurement the dense network is cut to its first channels and exported, once for each row and budget (its first seed).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.pruning.cells import TASKS, digest
from fusepress.pipeline.store import atomic_write_text, sha256_file
from fusepress.targets.roofline import FITTED

if TYPE_CHECKING:
    from benchmarks.pruning.bench import Bench

HOST_SECONDS = 4.0
PRECISION = "fp16"  # of the prediction; the host runs float32
CONSTANTS = sha256_file(FITTED)[:16]  # predictions of another fit are made anew


def _path(store: Path, row: Mapping[str, Any]) -> Path:
    name = digest([row["cell"]["task"], row["identity"]["data"], row["widths"]])
    return store / "latency" / f"{row['cell']['task']}-{name}.json"


def known(store: Path, row: Mapping[str, Any]) -> dict[str, float] | None:
    """What is known of a cell's network: name of the figure -> milliseconds."""
    path = _path(store, row)
    if not path.is_file():
        return None
    found = json.loads(path.read_text())
    if found.pop("constants", None) != CONSTANTS:
        found.pop("predicted_ms", None)  # of another fit
    return {str(name): float(value) for name, value in found.items()}


def _keep(store: Path, row: Mapping[str, Any], found: Mapping[str, float]) -> None:
    atomic_write_text(_path(store, row), json.dumps({**found, "constants": CONSTANTS}) + "\n")


def fill(store: Path, rows: Sequence[Mapping[str, Any]], *, measure: bool, data: Path | None = None) -> None:
    """Predict (and measure) every network that is not known yet, and the dense one of each task.

    Args:
        store: of the results.
        rows: the finished cells.
        measure: on this host too.
        data: folder of kitti_depth.
    """
    for name in dict.fromkeys(row["cell"]["task"] for row in rows):
        if name in TASKS:
            _Exporter(store, name, data).fill([row for row in rows if row["cell"]["task"] == name], measure=measure)


class _Exporter:
    """One task, its target and its dense network."""

    def __init__(self, store: Path, task: str, data: Path | None) -> None:
        from benchmarks.pruning.bench import Bench
        from benchmarks.pruning.cells import Protocol, Results
        from fusepress.pipeline.pruning.latency import LatencyCost
        from fusepress.targets.profile import load_profile

        self.store = store
        self.bench: Bench = Bench(task, Protocol(), Results(store), cache=None, data=data)
        bench = self.bench
        self.cost = LatencyCost(
            bench.dense, bench.graph, bench.inputs, load_profile(bench.recipe.target), precision=PRECISION
        )

    def fill(self, rows: Sequence[Mapping[str, Any]], *, measure: bool) -> None:
        groups = set(self.bench.graph.widths)
        firsts: dict[tuple[str, float], Mapping[str, Any]] = {}
        for row in sorted(rows, key=lambda row: int(row["cell"]["seed"])):
            if set(row["widths"]) == groups and row["cell"]["kind"] == "structured":
                firsts.setdefault((row["cell"]["method"], row["cell"]["budget"]), row)
                self._predict(row)
        for row in firsts.values() if measure else ():
            self._measure(row)

    def _predict(self, row: Mapping[str, Any]) -> None:
        found = known(self.store, row) or {}
        if "predicted_ms" not in found:
            found["predicted_ms"] = self.cost.latency_ms(row["widths"])
            _keep(self.store, row, found)

    def _measure(self, row: Mapping[str, Any]) -> None:
        found = known(self.store, row) or {}
        if "host_ms" not in found:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "network.onnx"
                path.write_bytes(self._onnx(row["widths"]))
                found |= self._measured(path)
            _keep(self.store, row, found)

    def _onnx(self, widths: Mapping[str, int]) -> bytes:
        import copy

        from fusepress.pipeline.evaluate import torch_predict
        from fusepress.pipeline.graph.apply import apply_plan
        from fusepress.pipeline.graph.probe import probe_onnx

        bench = self.bench
        kept = {group.id: _first(group.width, group.multiple, widths[group.id]) for group in bench.graph.groups}
        model = apply_plan(copy.deepcopy(bench.dense), bench.graph.plan(kept))
        return probe_onnx(model, bench.inputs, list(torch_predict(bench.task, model)(dict(bench.inputs))))

    def _measured(self, path: Path) -> dict[str, float]:
        from fusepress.export.runtime import OnnxSession
        from fusepress.targets.measure import measure_latency

        run = OnnxSession(path, integer_kernels=True).timed_callable(self.bench.inputs)
        found = measure_latency(run, max_seconds=HOST_SECONDS)
        return {"host_ms": found.mean_ms, "host_low_ms": found.mean_low_ms, "host_high_ms": found.mean_high_ms}


def _first(width: int, parts: int, kept: int) -> list[int]:
    """The first channels of each part of a group."""
    size, take = width // parts, kept // parts
    return [part * size + channel for part in range(parts) for channel in range(take)]
