"""What tests of the stages that quantise share: a recipe of `sparsify_toy.py`, and runs of some of its stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fusepress.pipeline.api import make_context, new_record, preflight
from fusepress.pipeline.console import Reporter
from fusepress.pipeline.evidence import RunRecord, StageRecord
from fusepress.pipeline.recipe import load_recipe
from fusepress.pipeline.runner import run_stages
from fusepress.pipeline.stages import STAGES
from fusepress.pipeline.stages.base import Context
from fusepress.pipeline.store import Store

STORE = ".store"


def int8_recipe(task: str, **quantize: Any) -> dict[str, Any]:
    """A release in INT8, with ranges from 8 samples."""
    return {
        "task": task,
        "checkpoint": "dense.safetensors",
        "target": "jetson-agx-orin-64gb",
        "quantize": {"precision": "int8", "samples": 8, **quantize},
        "gates": {"accuracy": {"max_drop": 0.2}},
    }


def context_of(project: Path, *overrides: str) -> Context:
    """What the stages read."""
    return make_context(load_recipe(project / "recipe.yaml", list(overrides)), Reporter(quiet=True))


def run_some(project: Path, name: str, names: tuple[str, ...], *overrides: str) -> tuple[RunRecord, Path]:
    """The record and the folder of a run of some stages; all runs of a project share a store."""
    ctx = context_of(project, *overrides)
    folder = project / "runs" / name
    preflight(ctx, Store(folder.parent / STORE))
    record = new_record(ctx, folder, "")
    run_stages(ctx, [stage for stage in STAGES if stage.name in names], record, folder)
    return record, folder


def stage_of(record: RunRecord, name: str) -> StageRecord:
    """A stage that ran."""
    stage = record.stage(name)
    assert stage is not None
    return stage
