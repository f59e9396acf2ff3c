"""sparsify: zeros in a pattern (2:4 along the axis that TensorRT wants, or unstructured), held through recovery."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusepress.pipeline.errors import TrainingError
from fusepress.pipeline.evidence import Measurement
from fusepress.pipeline.recipe import FinetuneConfig, SparsifyConfig
from fusepress.pipeline.stages import common
from fusepress.pipeline.stages.base import Context, StageOutput, key_parts
from fusepress.pipeline.stages.finetune import train, training_key
from fusepress.pipeline.stages.masking import Masked, layer_table, mask_model, sparsity_facts
from fusepress.pipeline.stages.prune import BATCHNORM_BATCHES
from fusepress.pipeline.stages.teachers import teacher_inputs
from fusepress.pipeline.store import KeyParts, atomic_write_text

if TYPE_CHECKING:
    from torch import nn


def section(ctx: Context) -> SparsifyConfig:
    """The recipe's section."""
    assert ctx.recipe.sparsify is not None
    return ctx.recipe.sparsify


def training_section(ctx: Context) -> FinetuneConfig:
    """The fine-tuning section with this stage's own steps and rate."""
    base = ctx.recipe.finetune or FinetuneConfig()
    return base.model_copy(update={"steps": section(ctx).steps, "lr": section(ctx).lr})


def recover(
    ctx: Context, model: nn.Module, found: Masked, work: Path, *, out: Path | None = None, mask_sum: bool = True
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train under the masks as the recipe says, in place and with permuted channels in their former order.

    Args:
        ctx: the run.
        model: masked.
        found: its masks.
        work: for checkpoints.
        out: where the files of the recipe's loggers end up.
        mask_sum: of sparselora; False is plain LoRA, a control that loses the pattern.

    Returns:
        Details of training, and facts about what is trained.
    """
    if section(ctx).recover == "none":
        return {}, {}
    if found.permutation is None:
        return _train(ctx, model, found, work, out, mask_sum)
    with found.permutation.undone(model, found.masks):
        return _train(ctx, model, found, work, out, mask_sum)


def _train(
    ctx: Context, model: nn.Module, found: Masked, work: Path, out: Path | None, mask_sum: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    from fusepress.pipeline.graph.masks import MaskHolder
    from fusepress.pipeline.recovery.sparselora import attach

    config = section(ctx)
    if config.recover == "masked":
        return train(ctx, model, training_section(ctx), work, MaskHolder(found.masks), out=out), {}
    lora = attach(
        model,
        found.masks,
        rank=config.rank,
        alpha=config.lora_alpha,
        max_trainable=config.max_trainable,
        seed=ctx.recipe.seed,
        norms_and_biases=config.norms_and_biases,
        mask_sum=mask_sum,
    )
    details = train(ctx, model, training_section(ctx), work, out=out)
    lora.merge()
    report = lora.report.to_dict()
    return details | {"ranks": report.pop("ranks"), "frozen": report.pop("frozen")}, {"sparselora": report}


class Sparsify:
    """Masks by magnitude, score or SparseGPT, and recovery under them."""

    name = "sparsify"
    version = 2
    every_rank = True

    def skip(self, ctx: Context) -> str | None:
        """Optional."""
        return None if ctx.recipe.sparsify is not None else "not in the recipe"

    def key_parts(self, ctx: Context) -> KeyParts:
        """The sparsity section, the criterion, the weights and groups, and how they are trained."""
        config = section(ctx)
        groups = ("groups",) if config.permute else ()
        return key_parts(
            ctx,
            self,
            config={
                **config.model_dump(mode="json"),
                "score": ctx.recipe.score.model_dump(mode="json") if config.choose == "score" else None,
                "finetune": training_key(ctx, training_section(ctx)),
                "seed": ctx.recipe.seed,
            },
            inputs=("dense_weights", "weights", "plan", *groups, *teacher_inputs(ctx)),
            splits=("train", "calib", "eval"),
            tools=("torch", "numpy"),
            trains=True,
            shards_steps=True,
        )

    def run(self, ctx: Context, out: Path, work: Path) -> StageOutput:
        """Write the masks and the masked weights."""
        from fusepress.pipeline.graph.masks import save_masks
        from fusepress.pipeline.recovery.batchnorm import reestimate_batchnorm

        config = section(ctx)
        model = common.current_model(ctx)
        found = mask_model(ctx, model)
        reestimate_batchnorm(model, ctx.task, BATCHNORM_BATCHES, ctx.recipe.seed)
        details, facts = recover(ctx, model, found, work, out=out)
        self._check(model, found, config)
        save_masks(found.masks, out / "masks.safetensors")
        common.save_weights(model, out / "sparse.safetensors")
        rows = layer_table(model, found)
        details |= {"layers": rows, "sparsity": sparsity_facts(rows, found, config) | facts}
        if found.permutation is not None:
            atomic_write_text(out / "permutation.json", json.dumps(found.permutation.to_dict()) + "\n")
            details["not_permuted"] = found.permutation.to_dict()["refused"]
        if found.search is not None:
            details["spread_search"] = found.search.to_dict()
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

    def _check(self, model: nn.Module, found: Masked, config: SparsifyConfig) -> None:
        """Every masked weight is zero, and in four consecutive input channels at most two are not.

        Raises:
            TrainingError: with the layer where it is not so.
        """
        from fusepress.pipeline.graph.masks import MaskHolder, violations_2to4

        MaskHolder(found.masks).check(model)
        if config.pattern != "2:4":
            return
        for name in found.masks:
            groups = violations_2to4(model.get_parameter(name))
            if groups:
                raise TrainingError(
                    f"expected at most two non-zeros in four input channels; got more in {groups} groups at {name}; "
                    "this is a fault of the masks: report it"
                )

    def assess(self, ctx: Context, folder: Path) -> list[Measurement]:
        """Of the model as it is now."""
        return common.probe_latency(ctx, folder)
