"""score: one importance per channel of every coupled group."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusepress.pipeline.recipe import FinetuneConfig
from fusepress.pipeline.stages import common
from fusepress.pipeline.stages.allocation import alignment, target_of
from fusepress.pipeline.stages.base import Context, NoLatency, StageOutput, key_parts
from fusepress.pipeline.stages.finetune import format_here
from fusepress.pipeline.store import KeyParts, atomic_write_text

if TYPE_CHECKING:
    from fusepress.pipeline.graph.plan import GroupGraph
    from fusepress.pipeline.scoring.result import ScoreResult


class Score(NoLatency):
    """Runs the recipe's scoring method."""

    name = "score"
    version = 2
    every_rank = True

    def skip(self, ctx: Context) -> str | None:
        """Nothing to score where nothing is pruned."""
        return None if ctx.recipe.prune is not None else "the recipe prunes nothing"

    def key_parts(self, ctx: Context) -> KeyParts:
        """The scoring section, the dense weights, the groups and the training data; for trials what they do too."""
        config = {**ctx.recipe.score.model_dump(mode="json"), "seed": ctx.recipe.seed}
        auto = ctx.recipe.score.method == "auto"
        if auto:
            config["trial"] = _trial_config(ctx)
        return key_parts(
            ctx,
            self,
            config=config,
            inputs=("dense_weights", "groups"),
            splits=("train", "calib") if auto else ("train",),
            tools=("torch", "numpy"),
            trains=True,
            shards_steps=auto,  # its trials train
        )

    def run(self, ctx: Context, out: Path, work: Path) -> StageOutput:
        """Write scores.safetensors and a picture."""
        from fusepress.pipeline.graph.files import load_graph
        from fusepress.pipeline.scoring.picture import score_picture
        from fusepress.pipeline.scoring.result import save_scores

        graph = load_graph(ctx.artifacts["groups"])
        details: dict[str, Any] = {"method": ctx.recipe.score.method}
        result = self._score(ctx, graph, details)
        save_scores(result, out / "scores.safetensors")
        atomic_write_text(out / "scores.svg", score_picture(result.channel, graph.groups, None))
        details["log"] = result.log
        details["pictures"] = [{"path": "score/scores.svg", "title": "Channel scores by modality and layer"}]
        return StageOutput(details=details, artifacts={"scores": "scores.safetensors"})

    @staticmethod
    def _score(ctx: Context, graph: GroupGraph, details: dict[str, Any]) -> ScoreResult:
        from fusepress.pipeline.graph.cost import CostModel
        from fusepress.pipeline.scoring.criteria import score_channels
        from fusepress.pipeline.stages.selection import choose_method

        model = common.dense_model(ctx)
        if ctx.recipe.score.method != "auto":
            return score_channels(
                model, ctx.task, graph, ctx.recipe.score, seed=ctx.recipe.seed, progress=ctx.reporter.update
            )
        cost = CostModel(graph, model, common.example_inputs(ctx))
        result, details["choice"] = choose_method(ctx, model, graph, cost)
        return result


def _trial_config(ctx: Context) -> dict[str, Any]:
    assert ctx.recipe.prune is not None
    finetune = ctx.recipe.finetune or FinetuneConfig()
    return {
        "prune": ctx.recipe.prune.model_dump(mode="json"),
        "align": alignment(ctx),
        "finetune": {**finetune.model_dump(mode="json"), "log": [], "precision": format_here(finetune)},
        "target": target_of(ctx),
    }
