"""sparsify: 2:4 zeros along the axis that TensorRT wants, held through a short fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fusepress.pipeline.evidence import Measurement
from fusepress.pipeline.recipe import FinetuneConfig
from fusepress.pipeline.stages import common
from fusepress.pipeline.stages.base import Context, StageOutput, key_parts
from fusepress.pipeline.stages.finetune import train
from fusepress.pipeline.stages.teachers import teacher_inputs
from fusepress.pipeline.store import KeyParts


class Sparsify:
    """Magnitude 2:4 with recovery under the masks."""

    name = "sparsify"
    version = 1

    def skip(self, ctx: Context) -> str | None:
        """Optional."""
        return None if ctx.recipe.sparsify is not None else "not in the recipe"

    def key_parts(self, ctx: Context) -> KeyParts:
        """The sparsity section, the weights, and how they are trained."""
        assert ctx.recipe.sparsify is not None
        return key_parts(
            ctx,
            self,
            config={
                **ctx.recipe.sparsify.model_dump(mode="json"),
                "finetune": self._training(ctx).model_dump(mode="json"),
                "seed": ctx.recipe.seed,
            },
            inputs=("dense_weights", "weights", "plan", *teacher_inputs(ctx)),
            splits=("train", "calib", "eval"),
            tools=("torch", "numpy"),
            trains=True,
        )

    def run(self, ctx: Context, out: Path, work: Path) -> StageOutput:
        """Write the masks and the masked weights."""
        from fusepress.pipeline.graph.masks import MaskHolder, magnitude_masks_2to4, save_masks

        assert ctx.recipe.sparsify is not None
        model = common.current_model(ctx)
        masks, skipped = magnitude_masks_2to4(model)
        holder = MaskHolder(masks)
        holder.apply(model)
        details: dict[str, Any] = {
            "masked": sorted(masks),
            "skipped": [{"param": skip.param, "reason": skip.reason} for skip in skipped],
        }
        if ctx.recipe.sparsify.recover == "masked":
            details |= train(ctx, model, self._training(ctx), work, holder)
        holder.check(model)
        save_masks(masks, out / "masks.safetensors")
        common.save_weights(model, out / "sparse.safetensors")
        accuracy, _ = common.torch_accuracy(ctx, model, 0.8, 0.95)
        measurements = [
            *accuracy,
            *common.cost_measurements(model, common.example_inputs(ctx)),
        ]
        return StageOutput(
            measurements=measurements,
            details=details,
            artifacts={"weights": "sparse.safetensors", "masks": "masks.safetensors"},
        )

    def assess(self, ctx: Context, folder: Path) -> list[Measurement]:
        """Of the model as it is now."""
        return common.probe_latency(ctx, folder)

    @staticmethod
    def _training(ctx: Context) -> FinetuneConfig:
        """The fine-tuning section with this stage's own steps and rate."""
        assert ctx.recipe.sparsify is not None
        base = ctx.recipe.finetune or FinetuneConfig()
        return base.model_copy(update={"steps": ctx.recipe.sparsify.steps, "lr": ctx.recipe.sparsify.lr})
