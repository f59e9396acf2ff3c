"""score: one importance per channel of every coupled group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fusepress.pipeline.stages import common
from fusepress.pipeline.stages.base import Context, NoLatency, StageOutput, key_parts
from fusepress.pipeline.store import KeyParts, atomic_write_text


class Score(NoLatency):
    """Runs the recipe's scoring method."""

    name = "score"
    version = 1

    def skip(self, ctx: Context) -> str | None:
        """Nothing to score where nothing is pruned."""
        return None if ctx.recipe.prune is not None else "the recipe prunes nothing"

    def key_parts(self, ctx: Context) -> KeyParts:
        """The scoring section, the dense weights, the groups and the training data."""
        return key_parts(
            ctx,
            self,
            config={**ctx.recipe.score.model_dump(mode="json"), "seed": ctx.recipe.seed},
            inputs=("dense_weights", "groups"),
            splits=("train",),
            tools=("torch", "numpy"),
            trains=True,
        )

    def run(self, ctx: Context, out: Path, work: Path) -> StageOutput:
        """Write scores.safetensors and a picture."""
        from fusepress.pipeline.graph.files import load_graph
        from fusepress.pipeline.scoring.criteria import score_channels
        from fusepress.pipeline.scoring.picture import score_picture
        from fusepress.pipeline.scoring.result import save_scores

        graph = load_graph(ctx.artifacts["groups"])
        model = common.dense_model(ctx)
        result = score_channels(
            model, ctx.task, graph, ctx.recipe.score, seed=ctx.recipe.seed, progress=ctx.reporter.update
        )
        save_scores(result, out / "scores.safetensors")
        atomic_write_text(out / "scores.svg", score_picture(result.channel, graph.groups, None))
        details: dict[str, Any] = {"method": ctx.recipe.score.method, "log": result.log}
        details["pictures"] = [{"path": "score/scores.svg", "title": "Channel scores by modality and layer"}]
        return StageOutput(details=details, artifacts={"scores": "scores.safetensors"})
