"""finetune: training that gets the accuracy of the pruned model back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fusepress.pipeline.evidence import Measurement
from fusepress.pipeline.recipe import FinetuneConfig
from fusepress.pipeline.stages import common
from fusepress.pipeline.stages.base import Context, StageOutput, key_parts
from fusepress.pipeline.store import KeyParts


def train(ctx: Context, model: Any, config: FinetuneConfig, work: Path, masks: Any = None) -> dict[str, Any]:
    """Fine-tune in place with the recipe's distillation; returns details for the report."""
    from fusepress.pipeline.recovery.finetune import finetune

    teacher = common.dense_model(ctx) if config.distill else None

    def tell(progress: Any) -> None:
        eta = f", {progress.eta_s:.0f} s left" if progress.eta_s is not None else ""
        loss = sum(progress.losses.values())
        ctx.reporter.update(
            0.8 * progress.step / max(1, progress.steps), f"step {progress.step}/{progress.steps} loss {loss:.4f}{eta}"
        )

    result = finetune(model, teacher, ctx.task, config, seed=ctx.recipe.seed, workdir=work, masks=masks, progress=tell)
    return {"steps": config.steps, "final_losses": result.final_losses, "history": result.history}


class Finetune:
    """Recovery with distillation from the dense model."""

    name = "finetune"
    version = 1

    def skip(self, ctx: Context) -> str | None:
        """Optional."""
        return None if ctx.recipe.finetune is not None else "not in the recipe"

    def key_parts(self, ctx: Context) -> KeyParts:
        """The training section, the weights to start from, the plan, the teacher and the data."""
        assert ctx.recipe.finetune is not None
        return key_parts(
            ctx,
            self,
            config={
                **ctx.recipe.finetune.model_dump(mode="json"),
                "seed": ctx.recipe.seed,
            },
            inputs=("dense_weights", "weights", "plan"),
            splits=("train", "calib", "eval"),
            tools=("torch", "numpy"),
            trains=True,
        )

    def run(self, ctx: Context, out: Path, work: Path) -> StageOutput:
        """Write the recovered weights."""
        assert ctx.recipe.finetune is not None
        model = common.current_model(ctx)
        details = train(ctx, model, ctx.recipe.finetune, work)
        common.save_weights(model, out / "finetuned.safetensors")
        accuracy, _ = common.torch_accuracy(ctx, model, 0.8, 0.95)
        measurements = [
            *accuracy,
            *common.cost_measurements(model, common.example_inputs(ctx)),
        ]
        return StageOutput(measurements=measurements, details=details, artifacts={"weights": "finetuned.safetensors"})

    def assess(self, ctx: Context, folder: Path) -> list[Measurement]:
        """Of the model as it is now."""
        return common.probe_latency(ctx, folder)
