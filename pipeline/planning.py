"""The dry run: what a recipe would do, before anything is spent."""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusepress.pipeline.errors import ExportError, RecipeError
from fusepress.pipeline.recipe import PruneConfig
from fusepress.pipeline.stages import STAGES
from fusepress.pipeline.stages.base import Context
from fusepress.pipeline.store import Store, content_key

if TYPE_CHECKING:
    from fusepress.pipeline.graph.plan import Group

EVERY_OPERATOR = "ONNX Runtime has every operator"
FLOOR = PruneConfig.model_fields["floor"].default
LEAST = PruneConfig.model_fields["min_channels"].default


def plan_run(ctx: Context, folder: Path) -> dict[str, Any]:
    """What `compress` would do: stages and their cache state, modalities, budget and cost.

    Raises:
        UsageError: the task or checkpoint is broken.
    """
    from fusepress.pipeline.api import preflight

    store = Store(folder.parent / ".store")
    preflight(ctx, store)
    result: dict[str, Any] = {
        "run": str(folder),
        "target": ctx.profile.name,
        "power_mode": ctx.power_mode,
        "precision": ctx.precision,
        "warnings": ctx.profile.warnings(ctx.precision, ctx.power_mode),
        "stages": _stages(ctx, store),
    }
    if not ctx.from_onnx:
        result |= _model_facts(ctx)
    elif ctx.checkpoint is not None:
        result["operators"] = _operators_of(ctx, ctx.checkpoint)
    return result


def _stages(ctx: Context, store: Store) -> list[dict[str, Any]]:
    """Follow the chain of keys as far as stored results reach."""
    rows: list[dict[str, Any]] = []
    known = True
    for stage in STAGES:
        reason = stage.skip(ctx)
        if reason is not None:
            rows.append({"name": stage.name, "state": "skipped", "why": reason})
            continue
        entry = store.get(content_key(stage.key_parts(ctx))) if known else None
        if entry is None:
            known = False
            rows.append({"name": stage.name, "state": "would run"})
            continue
        rows.append({"name": stage.name, "state": "cached"})
        for name, relative in entry.payload["artifacts"].items():
            ctx.add_artifact(name, entry.path / relative, entry.files.get(relative))
    return rows


def _model_facts(ctx: Context) -> dict[str, Any]:
    from fusepress.pipeline.graph.apply import load_checkpoint
    from fusepress.pipeline.graph.cost import CostModel
    from fusepress.pipeline.graph.groups import find_groups
    from fusepress.pipeline.stages import common

    model = ctx.task.build_model()
    if ctx.checkpoint is not None:
        load_checkpoint(model, ctx.checkpoint)
    model.eval()
    inputs = common.example_inputs(ctx)
    keep = [*ctx.task.keep, *(ctx.recipe.prune.keep if ctx.recipe.prune else ())]
    blocks = ctx.recipe.prune is not None and ctx.recipe.prune.blocks
    graph = find_groups(model, inputs, ctx.task.branches, keep, blocks=blocks)
    cost = CostModel(graph, model, inputs)
    smallest = {group.id: _smallest(group, ctx.recipe.prune) for group in graph.groups}
    least = cost.branch_totals(smallest)
    dense = cost.branch_totals()
    operators = _operators(ctx, model)  # before anything is pruned
    facts: dict[str, Any] = {
        "modalities": {
            branch: {
                "macs": total["macs"],
                "params": total["params"],
                "groups": sum(group.branch == branch for group in graph.groups),
                "prunable_macs": (total["macs"] - least[branch]["macs"]) / max(1.0, total["macs"]),
                "prunable_params": (total["params"] - least[branch]["params"]) / max(1.0, total["params"]),
            }
            for branch, total in dense.items()
        },
        "frozen": [{"module": frozen.module, "reason": frozen.reason} for frozen in graph.frozen],
        "graph_notes": list(graph.notes),
        "operators": operators,
    }
    if ctx.recipe.prune is not None:
        facts["budget"] = _budget(ctx, graph, cost, model)
    if ctx.recipe.finetune is not None:
        facts["finetune_seconds"] = _step_seconds(ctx, model) * ctx.recipe.finetune.steps
    return facts


def _operators(ctx: Context, model: Any) -> dict[str, Any]:
    """What the target's importer does not read of an export of the dense model, known before anything is trained."""
    from fusepress.pipeline.stages import common
    from fusepress.targets.operators import importer_of

    if importer_of(ctx.profile) is None:
        return {"checked": False, "why": EVERY_OPERATOR}
    with tempfile.TemporaryDirectory(prefix="fusepress-") as name:
        path = Path(name) / "dense.onnx"
        try:
            common.export_for_target(ctx, model, path)
        except ExportError as error:
            why = f"the model cannot be exported: {error}"
            return {"checked": False, "why": why, "refused": [], "buildable": False}
        return _operators_of(ctx, path)


def _operators_of(ctx: Context, path: Path) -> dict[str, Any]:
    from fusepress.export.hygiene import apply_passes, name_all
    from fusepress.export.onnx import load_onnx
    from fusepress.targets.operators import importer_of, operator_faults

    importer = importer_of(ctx.profile)
    if importer is None:
        return {"checked": False, "why": EVERY_OPERATOR}
    proto = load_onnx(path)
    name_all(proto)
    faults = operator_faults(proto, ctx.profile)
    if not ctx.from_onnx:  # a file that the recipe starts from is not rewritten
        apply_passes(proto, list(dict.fromkeys(fault.mended_by for fault in faults if fault.mended_by)))
    left = {(fault.operator, fault.node): fault for fault in operator_faults(proto, ctx.profile)}
    rows = [asdict(fault) | {"rewritten": (fault.operator, fault.node) not in left} for fault in faults]
    return {
        "checked": True,
        "importer": importer.name,
        "basis": importer.basis,
        "refused": rows,
        "buildable": not any(fault.certain for fault in left.values()),
    }


def _smallest(group: Group, config: PruneConfig | None) -> int:
    """The least width that the floors leave a group; without a prune section, those of its defaults."""
    floor, least = (config.floor, config.min_channels) if config is not None else (FLOOR, LEAST)
    wanted = max(math.ceil(least / group.span), math.ceil(floor * group.width))
    return min(group.width, math.ceil(wanted / group.multiple) * group.multiple)


def _budget(ctx: Context, graph: Any, cost: Any, model: Any) -> dict[str, Any]:
    """Whether the budget can be reached at all: allocated with magnitude scores, which cost nothing."""
    from fusepress.pipeline.graph.apply import apply_plan
    from fusepress.pipeline.recipe import ScoreConfig
    from fusepress.pipeline.scoring.criteria import score_channels
    from fusepress.pipeline.stages.allocation import alignment, allocate_widths, latency_cost, without_tables

    assert ctx.recipe.prune is not None
    config = without_tables(ctx.recipe.prune)  # what can be reached does not depend on them
    scores = score_channels(
        model, ctx.task, graph, ScoreConfig(method="magnitude"), seed=0, progress=lambda _fraction, _note: None
    )
    try:
        allocation, _ = allocate_widths(
            ctx, model, graph, cost, scores.channel, latency=latency_cost(ctx, model, graph), config=config
        )
    except RecipeError as error:
        return {"reachable": False, "why": str(error)}
    facts: dict[str, Any] = {
        "reachable": True,
        "unit": allocation.unit,
        "fraction": allocation.budget,
        "achieved": allocation.achieved,
        "align": alignment(ctx),
    }
    if not ctx.on_host:
        facts["latency_dense_ms"] = _predicted(ctx, model)
        apply_plan(model, graph.plan(allocation.kept))
        facts["latency_pruned_ms"] = _predicted(ctx, model)
        facts["latency_note"] = "predicted, with magnitude scores in place of the recipe's"
    return facts


def _predicted(ctx: Context, model: Any) -> dict[str, Any]:
    from fusepress.pipeline.graph.probe import probe_onnx
    from fusepress.pipeline.stages import common
    from fusepress.targets.predict import predict_latency

    onnx = probe_onnx(model, common.example_inputs(ctx), common.output_names(ctx, model))
    prediction = predict_latency(onnx, ctx.profile, ctx.precision, mode=ctx.power_mode)
    return {
        "value": prediction.latency_ms,
        "low": prediction.low_ms,
        "high": prediction.high_ms,
        "extrapolating": prediction.extrapolating,
    }


def _step_seconds(ctx: Context, model: Any) -> float:
    """Seconds of one training step of the model as it is now, measured once after one warm-up."""
    import torch

    batches = ctx.task.train_batches(ctx.recipe.seed)
    model.train()
    seconds = 0.0
    for _ in range(2):
        started = time.monotonic()
        batch = next(batches)
        losses = ctx.task.losses(ctx.task.as_dict(model(**batch.inputs)), batch)
        torch.stack(list(losses.values())).sum().backward()
        seconds = time.monotonic() - started
    model.zero_grad(set_to_none=True)
    return seconds
