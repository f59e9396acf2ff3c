"""finetune: training that gets the accuracy of the pruned model back."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusepress.pipeline.distributed import broadcast_model_, is_main, on_main
from fusepress.pipeline.evaluate import evaluate, torch_predict
from fusepress.pipeline.evidence import Measurement
from fusepress.pipeline.recipe import FinetuneConfig, TrainingFormat
from fusepress.pipeline.stages import common
from fusepress.pipeline.stages.base import Context, StageOutput, key_parts
from fusepress.pipeline.stages.teachers import expert_models, teacher_inputs
from fusepress.pipeline.store import KeyParts

if TYPE_CHECKING:
    from fusepress.pipeline.recovery.contract import FinetuneResult, Look
    from fusepress.pipeline.recovery.early_stop import EarlyStop

RECONSTRUCTING = 0.05  # of the stage, where it reconstructs


def check_training(ctx: Context) -> None:
    """Check what the training section needs of this machine, before anything is spent.

    Raises:
        UsageError: a logger's package is missing, or there is one process where weights are to be shared.
    """
    config = ctx.recipe.finetune
    if config is None:
        return
    if config.log:
        from fusepress.pipeline.recovery.loggers import check_loggers

        check_loggers(config.log)
    if config.shard != "none":
        from fusepress.pipeline.recovery.sharding import check_processes

        check_processes()


def training_key(ctx: Context, config: FinetuneConfig) -> dict[str, Any]:
    """What of a training section shapes the weights: all but the loggers, and the gate where it stops the run.

    Where the experts' files lie does not count: their content is among the stage's inputs. The number format is the one
    that `auto` is on this machine.
    """
    key = {
        **config.model_dump(mode="json", exclude={"log"}),
        "teachers": dict.fromkeys(config.teachers, ""),
        "precision": format_here(config),
    }
    gate = ctx.recipe.gates.accuracy
    return {**key, "gate": gate.model_dump(mode="json")} if config.early_stop and gate is not None else key


def format_here(config: FinetuneConfig) -> TrainingFormat:
    """The number format that a training section means on this machine, whose models are loaded on the CPU."""
    import torch

    from fusepress.pipeline.recovery.placement import training_device
    from fusepress.pipeline.recovery.precision import resolved_format

    return resolved_format(config.precision, training_device(torch.device("cpu")))


def train(
    ctx: Context,
    model: Any,
    config: FinetuneConfig,
    work: Path,
    masks: Any = None,
    *,
    out: Path | None = None,
    done: float = 0.0,
) -> dict[str, Any]:
    """Fine-tune in place with the recipe's distillation; returns details for the report.

    Args:
        ctx: the run.
        model: trained in place.
        config: how.
        work: for checkpoints and, while training lasts, the files of the recipe's loggers.
        masks: sparsity that holds through training.
        out: where those files end up.
        done: fraction of the stage that is over.
    """
    from fusepress.pipeline.graph.plan import PrunePlan
    from fusepress.pipeline.recovery.finetune import finetune
    from fusepress.pipeline.recovery.loggers import log_folder

    teacher = common.dense_model(ctx) if config.distill else None

    def tell(progress: Any) -> None:
        eta = f", {progress.eta_s:.0f} s left" if progress.eta_s is not None else ""
        loss = sum(progress.losses.values())
        ctx.reporter.update(
            done + (0.8 - done) * progress.step / max(1, progress.steps),
            f"step {progress.step}/{progress.steps} loss {loss:.4f}{eta}",
        )

    for name in config.log:
        ctx.reporter.line(f"{name} logs are in {log_folder(work, name)} while training lasts")
    result = finetune(
        model,
        teacher,
        ctx.task,
        config,
        seed=ctx.recipe.seed,
        workdir=work,
        masks=masks,
        progress=tell,
        stop=_early_stop(ctx) if config.early_stop else None,
        experts=expert_models(ctx, config),
        plan=PrunePlan.read(ctx.artifacts["plan"]) if "plan" in ctx.artifacts else None,
    )
    for name in config.log:
        if out is not None and is_main() and log_folder(work, name).is_dir():  # rank 0 may still write them
            shutil.copytree(log_folder(work, name), out / name)
    return _details(ctx, config, result)


def _reconstruct(ctx: Context, model: Any, config: FinetuneConfig) -> dict[str, Any]:
    """Fit the layers to the dense model's in place, by rank 0 for all; returns details for the report.

    A run that is resumed does it again, to the same bits, for training goes on from the weights that it began with.
    """
    if not (config.reconstruct and config.distill and "plan" in ctx.artifacts):
        return {}
    from fusepress.pipeline.graph.plan import PrunePlan
    from fusepress.pipeline.recovery.reconstruct import reconstruct

    fitted = on_main(
        lambda: reconstruct(
            model,
            common.dense_model(ctx),
            PrunePlan.read(ctx.artifacts["plan"]),
            ctx.task,
            config.reconstruct,
            ctx.recipe.seed,
            progress=lambda done, text: ctx.reporter.update(RECONSTRUCTING * done, text),
        )
    )
    broadcast_model_(model)
    before, after = (
        sum(getattr(layer, when) for layer in fitted) / max(1, len(fitted)) for when in ("before", "after")
    )
    words = (
        f"{len(fitted)} layers fitted to the dense model's on {config.reconstruct} samples: their mean squared error "
        f"went from {before:.2g} to {after:.2g} of the variance"
    )
    return {"reconstruction": words, "reconstructed": [asdict(layer) for layer in fitted]}


def _early_stop(ctx: Context) -> EarlyStop | None:
    from fusepress.pipeline.recovery.early_stop import EarlyStop

    gate = ctx.recipe.gates.accuracy
    if gate is None:
        return None
    dense = evaluate(ctx.task, torch_predict(ctx.task, common.dense_model(ctx)), "calib")
    return EarlyStop(ctx.task, dense, max_drop=gate.max_drop, metric=gate.metric, seed=ctx.recipe.seed)


def _details(ctx: Context, config: FinetuneConfig, result: FinetuneResult) -> dict[str, Any]:
    details: dict[str, Any] = {"steps": result.steps, "final_losses": result.final_losses, "history": result.history}
    if result.precision:
        details["precision"] = result.precision
    if config.compile and result.precision:
        details["compiled"] = result.compiled
    gate = ctx.recipe.gates.accuracy
    if config.early_stop and gate is not None and result.looks:
        details["looks"] = [asdict(look) for look in result.looks]
        details["early_stop"] = early_stop_words(result.looks[-1], config.steps, gate.max_drop)
    return details


def early_stop_words(last: Look, steps: int, limit: float) -> str:
    """How the last look at the calib split went, for the report."""
    bound = "has no bound" if last.high is None else f"is at most {last.high:.4g} (95 %)"
    drop = "undefined" if last.drop is None else f"{last.drop:.4g}"
    found = f"the drop on the calib split, {drop}, {bound}; the gate allows {limit:.4g}"
    return f"stopped after step {last.step} of {steps}: {found}" if last.met else f"did not stop the run: {found}"


class Finetune:
    """Recovery with distillation from the dense model."""

    name = "finetune"
    version = 1
    every_rank = True

    def skip(self, ctx: Context) -> str | None:
        """Optional."""
        return None if ctx.recipe.finetune is not None else "not in the recipe"

    def key_parts(self, ctx: Context) -> KeyParts:
        """The training section, the weights to start from, the plan, the teacher and the data."""
        assert ctx.recipe.finetune is not None
        return key_parts(
            ctx,
            self,
            config={**training_key(ctx, ctx.recipe.finetune), "seed": ctx.recipe.seed},
            inputs=("dense_weights", "weights", "plan", *teacher_inputs(ctx)),
            splits=("train", "calib", "eval"),
            tools=("torch", "numpy"),
            trains=True,
            shards_steps=True,
        )

    def run(self, ctx: Context, out: Path, work: Path) -> StageOutput:
        """Write the recovered weights."""
        assert ctx.recipe.finetune is not None
        model = common.current_model(ctx)
        reconstructed = _reconstruct(ctx, model, ctx.recipe.finetune)
        done = RECONSTRUCTING if reconstructed else 0.0
        details = reconstructed | train(ctx, model, ctx.recipe.finetune, work, out=out, done=done)
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
