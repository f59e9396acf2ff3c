"""Which weights of a model go: the masks of the sparsify stage, what decided, and what stays dense for what reason."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fusepress.pipeline.distributed import broadcast_, broadcast_model_, broadcast_object, rank, world
from fusepress.pipeline.errors import StageError
from fusepress.pipeline.graph.plan import FUSION
from fusepress.pipeline.stages import common
from fusepress.pipeline.stages.base import Context
from fusepress.pipeline.stages.prune import BATCHNORM_BATCHES

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fusepress.pipeline.graph.masks import Skip
    from fusepress.pipeline.graph.permute import Permutation
    from fusepress.pipeline.graph.plan import Group
    from fusepress.pipeline.recipe import SparsifyConfig
    from fusepress.pipeline.scoring.sparsegpt import LayerResult
    from fusepress.pipeline.scoring.unstructured import Spread, SpreadSearch

Pattern = dict[str, float | None]  # parameter name -> removed fraction, or None for 2:4


@dataclass(slots=True, kw_only=True)
class Masked:
    """The masks of a model and how they came about.

    Attributes:
        masks: parameter name -> bool mask (True = kept).
        skipped: weights that stay dense, with the reason.
        branch_of: parameter name -> modality, or "fusion".
        magnitude: parameter name -> share of the sum of |w| that the mask keeps.
        permutation: of channels, where the recipe asks for it.
        spread: branch -> removed fraction (unstructured).
        search: for that spread, where it was searched.
        by_hessian: what SparseGPT said of each layer.
    """

    masks: dict[str, Tensor]
    skipped: list[Skip]
    branch_of: dict[str, str]
    magnitude: dict[str, float] = field(default_factory=dict)
    permutation: Permutation | None = None
    spread: Spread | None = None
    search: SpreadSearch | None = None
    by_hessian: list[LayerResult] = field(default_factory=list)


def mask_model(ctx: Context, model: nn.Module) -> Masked:
    """Choose masks as the recipe says and apply them, in place; with SparseGPT the kept weights change, too.

    Processes that share a run call it together, and all go on with what rank 0 found.

    Raises:
        StageError: scores or the inputs of a layer are not finite, or there is nothing to mask.
        TraceError: channels are to be permuted and their groups cannot be found.
        RankError: another process failed or was lost.
    """
    from fusepress.pipeline.graph.masks import MaskHolder
    from fusepress.pipeline.scoring.masking import branch_of_parameters

    config = _config(ctx)
    branch_of = branch_of_parameters(model, ctx.task.branches)
    found = _two_four(ctx, model, branch_of) if config.pattern == "2:4" else _unstructured(ctx, model, branch_of)
    found = _of_rank_0(model, found)
    if not found.masks:
        reasons = "; ".join(sorted({skip.reason for skip in found.skipped})[:3]) or "it has no weights"
        raise StageError(
            f"expected weights to mask in the pattern {config.pattern}; got none ({reasons}) at "
            f"{type(model).__name__}; mask other modalities, set prune.align to 8, or remove the sparsify section"
        )
    MaskHolder(found.masks).apply(model)
    return found


def _of_rank_0(model: nn.Module, found: Masked) -> Masked:
    """What rank 0 found, on every rank, and its weights in the model: ties may fall otherwise on other processors.

    The model already has its channels in the new order and the weights that SparseGPT gave it.
    """
    if world() == 1:
        return found
    import torch

    broadcast_model_(model)
    shapes = broadcast_object({name: tuple(mask.shape) for name, mask in found.masks.items()})
    masks = found.masks
    if rank() > 0:
        device = next(iter(model.parameters())).device
        masks = {name: torch.empty(shape, dtype=torch.bool, device=device) for name, shape in shapes.items()}
    broadcast_(masks.values())
    facts = broadcast_object(replace(found, masks={}))
    return replace(facts, masks=masks)


def _config(ctx: Context) -> SparsifyConfig:
    assert ctx.recipe.sparsify is not None
    return ctx.recipe.sparsify


def _two_four(ctx: Context, model: nn.Module, branch_of: Mapping[str, str]) -> Masked:
    from fusepress.pipeline.graph.masks import Skip, keep_values, top_2to4, weights_2to4
    from fusepress.pipeline.graph.permute import permute_2to4

    config = _config(ctx)
    eligible, skipped = weights_2to4(model)
    chosen = dict(eligible)
    if config.modalities is not None:
        chosen = {name: weight for name, weight in eligible.items() if branch_of[name] in config.modalities}
        reason = "{} stays dense: it is not among sparsify.modalities"
        skipped += [Skip(param=n, reason=reason.format(branch_of[n])) for n in eligible if n not in chosen]
    values = keep_values(chosen, _scores(ctx, model))
    permutation = None
    if config.permute:
        ctx.reporter.update(0.05, "permuting channels")
        permutation = permute_2to4(model, common.example_inputs(ctx), _groups(ctx, model), values)
    found = Masked(masks={}, skipped=skipped, branch_of=dict(branch_of), permutation=permutation)
    if config.choose == "sparsegpt":
        _by_hessian(ctx, model, dict.fromkeys(chosen), found)
    else:
        found.masks = {name: top_2to4(value) for name, value in values.items()}
        found.magnitude = _kept_magnitude(chosen, found.masks)
    return found


def _unstructured(ctx: Context, model: nn.Module, branch_of: Mapping[str, str]) -> Masked:
    from fusepress.pipeline.graph.masks import Skip, keep_values, weights_unstructured
    from fusepress.pipeline.scoring.unstructured import unstructured_masks

    config = _config(ctx)
    eligible, skipped = weights_unstructured(model)
    values = keep_values(eligible, _scores(ctx, model))
    spread, search = _spread(ctx, model, values, branch_of)
    found = Masked(masks={}, skipped=skipped, branch_of=dict(branch_of), spread=spread, search=search)
    if config.scope != "global":
        spared = [name for name in eligible if not spread[branch_of[name]]]
        found.skipped += [
            Skip(param=name, reason=f"{branch_of[name]} stays dense: its sparsity is 0") for name in spared
        ]
        values = {name: value for name, value in values.items() if name not in spared}
    if config.choose == "sparsegpt":
        _by_hessian(ctx, model, {name: spread[branch_of[name]] for name in values}, found)
    else:
        found.masks = unstructured_masks(values, branch_of, spread, config.scope)
        found.magnitude = _kept_magnitude(eligible, found.masks)
    return found


def _by_hessian(ctx: Context, model: nn.Module, wanted: Pattern, found: Masked) -> None:
    from fusepress.pipeline.scoring.sparsegpt import sparsify_by_sparsegpt

    parameters = dict(model.named_parameters())
    before = {name: parameters[name].detach().clone() for name in wanted}
    found.masks, found.by_hessian = sparsify_by_sparsegpt(
        model, _calibration(ctx), wanted, progress=lambda done, text: ctx.reporter.update(0.1 + 0.3 * done, text)
    )
    found.magnitude = _kept_magnitude(before, found.masks)


def _kept_magnitude(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, float]:
    shares = {}
    for name, mask in masks.items():
        value = weights[name].detach().abs().double()
        shares[name] = float(value[mask].sum() / value.sum().clamp_min(1e-300))
    return shares


def _scores(ctx: Context, model: nn.Module) -> dict[str, Tensor] | None:
    """Scores of single weights by the recipe's criterion, of the model as it is now; None for magnitude."""
    if _config(ctx).choose != "score":
        return None
    from fusepress.pipeline.scoring.criteria import score_weights

    scores, _ = score_weights(
        model,
        ctx.task,
        ctx.recipe.score,
        seed=ctx.recipe.seed,
        progress=lambda done, text: ctx.reporter.update(0.05 * done, text),
    )
    return scores


def _calibration(ctx: Context) -> list[dict[str, Tensor]]:
    """Inputs of the first samples of the calib split."""
    left = _config(ctx).samples
    batches = []
    for batch in ctx.task.batches("calib", 0):
        batches.append({name: value[:left] for name, value in batch.inputs.items()})
        left -= batch.size
        if left <= 0:
            break
    return batches


def _groups(ctx: Context, model: nn.Module) -> tuple[Group, ...]:
    """The coupled groups of the model as it is now: those of the dense one, narrowed, or found anew."""
    from fusepress.pipeline.graph.files import load_graph
    from fusepress.pipeline.graph.groups import find_groups
    from fusepress.pipeline.graph.permute import narrowed
    from fusepress.pipeline.graph.plan import PrunePlan

    if "groups" not in ctx.artifacts:
        return find_groups(model, common.example_inputs(ctx), ctx.task.branches, blocks=False).groups
    plan = PrunePlan.read(ctx.artifacts["plan"]) if "plan" in ctx.artifacts else None
    return narrowed(load_graph(ctx.artifacts["groups"]), plan, model)


# --- how a total is spread over the modalities ------------------------------------------------------------------------


def _spread(
    ctx: Context, model: nn.Module, values: Mapping[str, Tensor], branch_of: Mapping[str, str]
) -> tuple[Spread, SpreadSearch | None]:
    from fusepress.pipeline.scoring.unstructured import equal_spread, search_spread

    config = _config(ctx)
    counts = dict.fromkeys((*ctx.task.branches, FUSION), 0)
    for name, value in values.items():
        counts[branch_of[name]] += value.numel()
    if not isinstance(config.spread, str):
        return {branch: config.spread.get(branch, 0.0) for branch in counts}, None
    assert config.sparsity is not None
    if config.spread == "equal":
        return equal_spread(config.sparsity, counts), None
    if config.choose == "sparsegpt":
        note = f"the spread of zeros is judged {_judged_by(config)}"
        logging.getLogger(__name__).warning(note)
        ctx.reporter.line(f"      {note}")
    judge = _Judge(ctx, model, values, branch_of)
    search = search_spread(
        config.sparsity,
        counts,
        judge,
        higher=ctx.task.metrics[ctx.task.primary] == "max",
        progress=lambda done, text: ctx.reporter.update(0.05 + 0.3 * done, text),
    )
    return search.spread, search


def _judged_by(config: SparsifyConfig) -> str:
    """Whose masks a spread is judged with while it is searched, in words."""
    if config.choose == "sparsegpt":
        return "by masks of magnitude, for dozens of SparseGPT's would take too long; those of the result are its own"
    return f"by masks of {config.choose}, as those of the result are"


class _Judge:
    """What a spread is worth: the primary metric on the calib split, masked by it and with norms estimated again.

    The eval split is not touched, so the choice cannot flatter the figures that are reported. SparseGPT would need a
    Hessian of every layer for each spread: magnitude stands in for it, and the stage says so.
    """

    def __init__(
        self, ctx: Context, model: nn.Module, values: Mapping[str, Tensor], branch_of: Mapping[str, str]
    ) -> None:
        self.ctx, self.model, self.values, self.branch_of = ctx, model, values, branch_of

    def __call__(self, spread: Mapping[str, float]) -> float:
        """The metric."""
        from fusepress.pipeline.evaluate import evaluate, torch_predict
        from fusepress.pipeline.graph.masks import MaskHolder
        from fusepress.pipeline.recovery.batchnorm import reestimate_batchnorm
        from fusepress.pipeline.scoring.unstructured import unstructured_masks

        task, config = self.ctx.task, _config(self.ctx)
        trial = copy.deepcopy(self.model)
        MaskHolder(unstructured_masks(self.values, self.branch_of, spread, config.scope)).apply(trial)
        reestimate_batchnorm(trial, task, BATCHNORM_BATCHES, self.ctx.recipe.seed)
        return evaluate(task, torch_predict(task, trial), "calib").metrics[task.primary]


# --- for the report ---------------------------------------------------------------------------------------------------


def layer_table(model: nn.Module, found: Masked) -> list[dict[str, Any]]:
    """A row for every weight of two or more dimensions: its pattern and what was kept, or why it is dense."""
    reasons = {skip.param: skip.reason for skip in found.skipped}
    errors = {result.param: result for result in found.by_hessian}
    rows = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        mask = found.masks.get(name)
        if mask is None and name not in reasons:
            continue
        row: dict[str, Any] = {"param": name, "branch": found.branch_of.get(name, ""), "shape": list(parameter.shape)}
        if mask is None:
            rows.append({**row, "status": "dense", "reason": reasons[name], "density": 1.0})
            continue
        row |= {"status": "masked", "density": float(mask.float().mean()), "kept_magnitude": found.magnitude[name]}
        if found.permutation is not None:
            row["kept_before_permuting"] = found.permutation.kept_before[name]
            row["kept_after_permuting"] = found.permutation.kept_after[name]
        if name in errors:
            row |= {key: value for key, value in errors[name].to_dict().items() if key != "param" and value}
        rows.append(row)
    return rows


def sparsity_facts(rows: list[dict[str, Any]], found: Masked, config: SparsifyConfig) -> dict[str, Any]:
    """The stage in figures: layers, densities by modality, kept magnitude."""
    masked = [row for row in rows if row["status"] == "masked"]
    facts: dict[str, Any] = {
        "pattern": config.pattern,
        "chosen_by": config.choose,
        "masked_layers": len(masked),
        "dense_layers": len(rows) - len(masked),
        "density": _density(rows),
    }
    if masked:
        facts["kept_magnitude"] = sum(row["kept_magnitude"] for row in masked) / len(masked)
    if found.permutation is not None and masked:
        facts["permuted_groups"] = len(found.permutation.orders)
        for when in ("before", "after"):
            facts[f"kept_{when}_permuting"] = sum(row[f"kept_{when}_permuting"] for row in masked) / len(masked)
    if found.spread is not None:
        facts["spread"] = found.spread
    if found.search is not None:
        facts["spreads_tried"] = len(found.search.tried)
        facts["spreads_judged"] = _judged_by(config)
    return facts


def _density(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Kept fraction of the weights of each branch, dense layers included."""
    kept: dict[str, float] = {}
    whole: dict[str, int] = {}
    for row in rows:
        size = math.prod(row["shape"])
        kept[row["branch"]] = kept.get(row["branch"], 0.0) + size * row["density"]
        whole[row["branch"]] = whole.get(row["branch"], 0) + size
    return {branch: kept[branch] / whole[branch] for branch in kept if branch}


__all__ = ["Masked", "layer_table", "mask_model", "sparsity_facts"]
