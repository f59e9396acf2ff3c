"""Cells of the tables (task, method, budget, seed), their order, their keys and the plain store that they live in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.pruning.methods import ALL, BY_NAME, MethodSpec
from fusepress.pipeline.store import atomic_write_text

ROOT = Path(__file__).resolve().parent.parent.parent
TASKS = {"street": ROOT / "examples/street/recipe.yaml", "kitti_depth": ROOT / "examples/kitti_depth/recipe.yaml"}
SYNTHETIC = ("street",)  # tasks that make their data
SUITES = ("core", "variants", "more", "unstructured", "kitti")
CORE_BUDGETS = (0.4, 0.25)
MORE_BUDGETS = (0.4, 0.25, 0.6, 0.15)
WEIGHT_BUDGETS = (0.1, 0.15, 0.2)  # kept fractions of the weights: 90, 85 and 80 % removed
SCHEMA = 1
SCORING_VERSION = 1  # raised by hand when scoring, allocation or training changes the results of every row
KITTI_METHODS = ("dense", "random", "magnitude", "taylor", "importance_taylor", "altermoma", "altermoma_b0")

Kind = Literal["structured", "unstructured"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """What all methods share.

    Attributes:
        steps: fine-tuning steps.
        lr: peak learning rate.
        precision: number format of the training arithmetic.
        batchnorm_batches: batches that the norms' statistics are estimated from after surgery.
        align: channel multiple.
        floor: smallest kept fraction of a group.
        min_channels: smallest kept width.
    """

    steps: int = 200
    lr: float = 2e-3
    precision: Literal["fp32", "bf16"] = "bf16"
    batchnorm_batches: int = 8
    align: int = 8
    floor: float = 0.1
    min_channels: int = 8

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One trained and evaluated network.

    Attributes:
        task: name, or the path of a recipe.
        method: name of the row.
        kind: channels (structured) or single weights.
        budget: kept fraction of the dense MACs, or of the weights.
        seed: of the scoring batches, the training batches and everything random.
    """

    task: str
    method: str
    kind: Kind
    budget: float
    seed: int

    @property
    def spec(self) -> MethodSpec:
        """Its row."""
        return BY_NAME[self.method]

    @property
    def name(self) -> str:
        """For people and file names."""
        task = Path(self.task).parent.name if self.task not in TASKS else self.task
        return f"{task}-{'m' if self.kind == 'structured' else 'w'}{self.budget * 100:g}-{self.method}-s{self.seed}"


def identity(cell: Cell, protocol: Protocol, context: dict[str, Any]) -> dict[str, Any]:
    """Everything that a cell's figures depend on.

    Args:
        cell: which.
        protocol: what all methods share.
        context: of the task: hashes of its checkpoint and data, and its scoring settings.
    """
    return {
        "schema": SCHEMA,
        "scoring_version": SCORING_VERSION,
        "method": cell.spec.identity(),
        "kind": cell.kind,
        "budget": cell.budget,
        "seed": cell.seed,
        "protocol": protocol.as_dict(),
        **context,
    }


def digest(value: Any) -> str:
    """Short content key of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def planned(suites: Sequence[str], seeds: Sequence[int], methods: Sequence[str] | None) -> list[Cell]:
    """Cells by priority: suite by suite, and the core table for all methods at one seed before the next seed."""
    cells: list[Cell] = []
    for suite in SUITES:
        if suite in suites:
            cells += [c for c in _suite(suite, seeds) if methods is None or c.method in methods]
    return list(dict.fromkeys(cells))


def _suite(suite: str, seeds: Sequence[int]) -> Iterator[Cell]:
    if suite in ("core", "variants"):
        yield from _structured("street", [s for s in ALL if s.suite == suite], CORE_BUDGETS, seeds)
    elif suite == "more":
        core = [s for s in ALL if s.suite == "core"]
        yield from _structured("street", [s for s in ALL if s.suite == "more"], MORE_BUDGETS[:2], seeds)
        yield from _structured("street", core, MORE_BUDGETS[2:], seeds)
    elif suite == "unstructured":
        specs = [s for s in ALL if s.suite == "unstructured"]
        for seed in seeds[:2]:
            for budget in WEIGHT_BUDGETS:
                for spec in specs:
                    yield Cell(task="street", method=spec.name, kind="unstructured", budget=budget, seed=seed)
    else:
        yield from _structured("kitti_depth", [BY_NAME[name] for name in KITTI_METHODS], (0.4,), seeds)


def _structured(
    task: str, specs: Sequence[MethodSpec], budgets: Sequence[float], seeds: Sequence[int]
) -> Iterator[Cell]:
    for number, seed in enumerate(seeds):
        for spec in specs:
            if spec.source == "dense" and (spec.train or number == 0):
                yield Cell(task=task, method=spec.name, kind="structured", budget=1.0, seed=seed)
        for budget in budgets:
            for spec in specs:
                if spec.source != "dense":
                    yield Cell(task=task, method=spec.name, kind="structured", budget=budget, seed=seed)


class Results:
    """One JSON file a cell, named by the cell and its content key; written in one rename.

    Args:
        folder: of the store.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, cell: Cell, key: str) -> Path:
        """Where a finished cell lies."""
        return self.folder / "cells" / f"{cell.name}-{key}.json"

    def done(self, cell: Cell, key: str) -> bool:
        """Whether this very cell is finished."""
        return self.path(cell, key).is_file()

    def write(self, cell: Cell, key: str, result: dict[str, Any]) -> None:
        """Keep a finished cell."""
        atomic_write_text(self.path(cell, key), json.dumps(result, indent=1) + "\n")

    def failures(self, cell: Cell, key: str) -> list[str]:
        """How its attempts ended, one text each; an attempt that left no text was killed."""
        path = self.folder / "failed" / f"{cell.name}-{key}.json"
        return list(json.loads(path.read_text())) if path.is_file() else []

    def set_failures(self, cell: Cell, key: str, texts: Sequence[str]) -> None:
        """Replace them; none removes the record."""
        path = self.folder / "failed" / f"{cell.name}-{key}.json"
        if texts:
            atomic_write_text(path, json.dumps(list(texts)) + "\n")
        else:
            path.unlink(missing_ok=True)

    def everything(self) -> list[dict[str, Any]]:
        """All finished cells, each with its file name."""
        paths = sorted((self.folder / "cells").glob("*.json"))
        return [{**json.loads(path.read_text()), "file": path.stem} for path in paths]
