"""prune: from scores and a budget to a plan, and from the plan to a smaller model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fusepress.pipeline.evidence import Measurement
from fusepress.pipeline.stages import common
from fusepress.pipeline.stages.allocation import alignment, allocate_widths, latency_cost, target_of
from fusepress.pipeline.stages.base import Context, StageOutput, key_parts
from fusepress.pipeline.store import KeyParts, atomic_write_text

BATCHNORM_BATCHES = 8  # removed channels shift what the norms see; without this every later figure mixes two effects


class Prune:
    """Allocates widths, writes the PrunePlan and applies it."""

    name = "prune"
    version = 2
    every_rank = True

    def skip(self, ctx: Context) -> str | None:
        """Optional."""
        return None if ctx.recipe.prune is not None else "not in the recipe"

    def key_parts(self, ctx: Context) -> KeyParts:
        """The pruning section, the scores, the channel multiple and the seed."""
        assert ctx.recipe.prune is not None
        return key_parts(
            ctx,
            self,
            config={
                **ctx.recipe.prune.model_dump(mode="json"),
                "align": alignment(ctx),
                "target": target_of(ctx),
                "seed": ctx.recipe.seed,  # of the batches of distortion tables and of the norms' new statistics
            },
            inputs=("dense_weights", "groups", "scores"),
            splits=("train", "calib", "eval"),
            tools=("torch", "numpy"),
            trains=True,
        )

    def run(self, ctx: Context, out: Path, work: Path) -> StageOutput:
        """Write plan.json and the pruned weights."""
        from fusepress.pipeline.graph.apply import apply_plan
        from fusepress.pipeline.graph.cost import CostModel
        from fusepress.pipeline.graph.files import load_graph
        from fusepress.pipeline.recovery.batchnorm import reestimate_batchnorm
        from fusepress.pipeline.scoring.picture import score_picture
        from fusepress.pipeline.scoring.result import load_scores

        assert ctx.recipe.prune is not None
        graph = load_graph(ctx.artifacts["groups"])
        scores = load_scores(ctx.artifacts["scores"]).channel
        model = common.dense_model(ctx)
        inputs = common.example_inputs(ctx)
        cost = CostModel(graph, model, inputs)
        allocation, choice = allocate_widths(
            ctx,
            model,
            graph,
            cost,
            scores,
            latency=latency_cost(ctx, model, graph),
            work=work,
            progress=lambda fraction, text: ctx.reporter.update(0.1 * fraction, text),
        )
        plan = graph.plan(allocation.kept)
        atomic_write_text(out / "plan.json", plan.to_json())
        atomic_write_text(out / "pruned.svg", score_picture(scores, graph.groups, allocation.kept))
        apply_plan(model, plan)
        ctx.reporter.update(0.1, "estimating the norms' statistics again")
        reestimate_batchnorm(model, ctx.task, BATCHNORM_BATCHES, ctx.recipe.seed)
        common.save_weights(model, out / "pruned.safetensors")
        ctx.reporter.update(0.3, "evaluating the pruned model")
        accuracy, _ = common.torch_accuracy(ctx, model, 0.3, 0.8)
        measurements = [*accuracy, *common.cost_measurements(model, inputs)]
        details: dict[str, Any] = {
            "budget": {
                "unit": allocation.unit,
                "fraction": allocation.budget,
                "achieved": allocation.achieved,
                "gap": allocation.gap,
                "align": alignment(ctx),
            },
            "choice": choice,
            "removed_blocks": list(allocation.removed_blocks),
            "notes": [*graph.notes, *allocation.notes],
            "groups": [
                {"id": g.id, "branch": g.branch, "width": g.width, "kept": allocation.widths[g.id]}
                for g in graph.groups
            ],
            "branches": self._branches(cost, allocation.widths),
            "pictures": [{"path": "prune/pruned.svg", "title": "What was removed, by modality and layer"}],
        }
        return StageOutput(
            measurements=measurements,
            details=details,
            artifacts={"plan": "plan.json", "weights": "pruned.safetensors"},
        )

    def assess(self, ctx: Context, folder: Path) -> list[Measurement]:
        """Of the model as it is now."""
        return common.probe_latency(ctx, folder)

    @staticmethod
    def _branches(cost: Any, widths: dict[str, int]) -> dict[str, dict[str, float]]:
        before, after = cost.branch_totals(), cost.branch_totals(widths)
        return {
            branch: {
                "macs_before": before[branch]["macs"],
                "macs_after": after[branch]["macs"],
                "params_before": before[branch]["params"],
                "params_after": after[branch]["params"],
            }
            for branch in before
        }
