"""qat: short training under the quantisation of the release, whose ranges and weights the release then has."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusepress.pipeline.distributed import is_main, on_main
from fusepress.pipeline.evaluate import evaluate, torch_predict
from fusepress.pipeline.evidence import Measurement
from fusepress.pipeline.recipe import FinetuneConfig, QatConfig
from fusepress.pipeline.stages import common
from fusepress.pipeline.stages.base import Context, StageOutput, key_parts
from fusepress.pipeline.stages.drafting import calibrate, draft_key, drafted
from fusepress.pipeline.stages.export import PARITY_BATCHES, write_onnx
from fusepress.pipeline.stages.finetune import train, training_key
from fusepress.pipeline.stages.teachers import teacher_inputs
from fusepress.pipeline.store import KeyParts

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fusepress.pipeline.graph.fakequant import FakeQuantised
    from fusepress.pipeline.graph.placement import Placement

SCALES = "scales.json"
PLACED_BY = 2  # calibration samples that the file's tensors are found again by
MOST_NAMED = 8
logger = logging.getLogger(__name__)


def _section(ctx: Context) -> QatConfig:
    assert ctx.recipe.qat is not None
    return ctx.recipe.qat


def training_section(ctx: Context) -> FinetuneConfig:
    """The fine-tuning section with this stage's own steps and rate, norms that keep their statistics, and no early end.

    Layers are not fitted to the dense model's again: `finetune` did that where it was asked for.
    Where channels were permuted, those of the dense model's features are others: only its outputs teach.
    """
    base = ctx.recipe.finetune or FinetuneConfig()
    permuted = ctx.recipe.sparsify is not None and ctx.recipe.sparsify.permute
    own = {
        "steps": _section(ctx).steps,
        "lr": _section(ctx).lr,
        "freeze_batchnorm": True,
        "compile": False,
        "early_stop": False,
        "reconstruct": 0,
    }
    return base.model_copy(update=own | ({"distill_features": 0.0, "distill_points": ()} if permuted else {}))


class Qat:
    """Fake quantisation where the release has Q/DQ, trained from the task's losses under the masks."""

    name = "qat"
    version = 2
    every_rank = True

    def skip(self, ctx: Context) -> str | None:
        """Optional."""
        return None if ctx.recipe.qat is not None else "not in the recipe"

    def key_parts(self, ctx: Context) -> KeyParts:
        """The section, how it trains, the ranges it starts from, the weights and masks."""
        from fusepress.targets.operators import importer_of

        importer = importer_of(ctx.profile)
        return key_parts(
            ctx,
            self,
            config={
                **_section(ctx).model_dump(mode="json"),
                "finetune": training_key(ctx, training_section(ctx)),
                "draft": draft_key(ctx),
                "opset": [ctx.profile.opset, ctx.profile.opset_scatternd],
                "importer": None if importer is None else importer.name,
                "seed": ctx.recipe.seed,
            },
            inputs=("dense_weights", "weights", "plan", "masks", *teacher_inputs(ctx)),
            splits=("train", "calib", "eval"),
            tools=(
                "torch",
                "numpy",
                "nvidia-modelopt",
                "onnx",
                "onnxscript",
                "onnxslim",
                "onnxruntime-gpu",
                "onnx-graphsurgeon",
            ),
            trains=True,
            shards_steps=True,
        )

    def run(self, ctx: Context, out: Path, work: Path) -> StageOutput:
        """Write the trained weights, the scales they were trained under, and the float model as it was before."""
        from fusepress.calib.qat import TrainedScales
        from fusepress.pipeline.graph.fakequant import fake_quantised

        model = common.current_model(ctx)
        learned = _section(ctx).ranges == "learned"
        common.save_weights(model, out / "before.safetensors")
        placement, samples, method, details = on_main(lambda: _placed(ctx, model, out / "before.onnx"))
        with fake_quantised(model, placement, samples, learn=learned) as quantised:
            details |= _followed(ctx, quantised)
            before = evaluate(ctx.task, torch_predict(ctx.task, model), "calib").metrics
            details |= self._train(ctx, model, out, work)
            after = evaluate(ctx.task, torch_predict(ctx.task, model), "calib").metrics
            details["calib"] = {"before": before, "after": after}
            evaluation = common.evaluate_with_progress(ctx, torch_predict(ctx.task, model), 0.85, 0.95)
            scales = quantised.steps()
        trained = learned and details["steps"] > 0
        if not trained:  # bit for bit, which the logarithm of a step and back is not
            scales = {t: float(step) for ts, step in zip(placement.groups, placement.steps, strict=True) for t in ts}
        words = (
            f"{method}, {'then learned in training' if trained else 'trained under'}" if details["steps"] else method
        )
        TrainedScales(precision=placement.grid, method=words, scales=scales).write(out / SCALES)
        common.save_weights(model, out / "qat.safetensors")
        measurements = common.accuracy_measurements(ctx, evaluation, runtime="torch", precision=placement.grid)
        measurements += common.cost_measurements(model, common.example_inputs(ctx))
        return StageOutput(
            measurements=measurements,
            details=details,
            artifacts={
                "weights": "qat.safetensors",
                "scales": SCALES,
                "float_onnx": "before.onnx",
                "float_weights": "before.safetensors",
            },
        )

    def _train(self, ctx: Context, model: nn.Module, out: Path, work: Path) -> dict[str, Any]:
        from fusepress.pipeline.graph.masks import MaskHolder, load_masks

        masks = MaskHolder(load_masks(ctx.artifacts["masks"])) if "masks" in ctx.artifacts else None
        return train(ctx, model, training_section(ctx), work, masks, out=out)

    def assess(self, ctx: Context, folder: Path) -> list[Measurement]:
        """Of the model as it is now, not yet quantised."""
        return common.probe_latency(ctx, folder)


def _placed(
    ctx: Context, model: nn.Module, path: Path
) -> tuple[Placement, list[dict[str, Tensor]], str, dict[str, Any]]:
    """The pairs that `quantize` would place, samples to find them in the model by, the ranges' method, details."""
    import torch

    from fusepress.calib.qat import placement_of

    calibration = calibrate(ctx)
    ctx.reporter.update(0.02, f"calibrating on {len(calibration.card.sample_ids)} samples")
    with tempfile.TemporaryDirectory(prefix="fusepress-") as folder:
        write_onnx(ctx, model, path, Path(folder), common.calib_batches(ctx, PARITY_BATCHES))
    draft, details = drafted(ctx, path, calibration)
    count = min(PLACED_BY, len(calibration.card.sample_ids))
    samples = [
        {name: torch.from_numpy(np.array(array[s : s + 1])) for name, array in calibration.arrays.items()}
        for s in range(count)
    ]
    return placement_of(draft, count), samples, draft.method, details


def _followed(ctx: Context, quantised: FakeQuantised) -> dict[str, Any]:
    """How much of the file's quantisation training sees."""
    lost = quantised.lost
    if lost:
        some = "; ".join(f"{name}: {why}" for name, why in list(lost.items())[:MOST_NAMED])
        note = (
            f"{len(lost)} of {len(lost) + len(quantised.followed)} nodes with Q/DQ are not quantised while the model "
            f"is trained: {some}"
        )
        logger.warning(note)
        if is_main():
            ctx.reporter.warn(note)
    return {"followed_nodes": len(quantised.followed), "not_followed": lost}
