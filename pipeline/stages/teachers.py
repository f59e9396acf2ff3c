"""Experts of single tasks as teachers: the recipe's weight files and the models that the task builds for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusepress.pipeline.errors import CheckpointError, RecipeError, TaskError
from fusepress.pipeline.recipe import FinetuneConfig
from fusepress.pipeline.stages.base import Context
from fusepress.pipeline.task import first_batch

if TYPE_CHECKING:
    from torch import nn

PREFIX = "teacher."  # of the artifacts that are experts' weights


def find_teachers(ctx: Context) -> None:
    """Make the weights of the recipe's experts known to the stages.

    Raises:
        TaskError: the task does not build experts.
        CheckpointError: a file is missing.
    """
    wanted = ctx.recipe.finetune.teachers if ctx.recipe.finetune is not None else {}
    if wanted and not ctx.task.offers("build_expert"):
        raise TaskError(
            f"expected {ctx.task.name}.build_expert(name), because the recipe's finetune.teachers names "
            f"{', '.join(wanted)}; got none; return each expert's architecture from it, or remove finetune.teachers"
        )
    for name, where in wanted.items():
        path = ctx.loaded.resolve(where)
        if not path.is_file():
            raise CheckpointError(
                f"expected the weights of the expert {name!r}; got no file at {path}; correct finetune.teachers in "
                f"{ctx.loaded.path.name}, or train the expert first"
            )
        ctx.add_artifact(f"{PREFIX}{name}", path)


def check_teaching(ctx: Context) -> None:
    """Check on one batch, before anything is spent, that what the recipe teaches can be taught.

    Raises:
        TaskError: an expert cannot be built, or its outputs are not the dense model's.
        CheckpointError: its weights do not fit it.
        RecipeError: a point is no module of the model.
    """
    config = ctx.recipe.finetune
    if config is None or not (config.teachers or config.distill_points):
        return
    import torch

    from fusepress.pipeline.recovery.distill import Distiller

    dense = ctx.task.build_model().eval()
    known = [name for name, _ in dense.named_modules() if name]
    for point in config.distill_points:
        if point not in known:
            raise RecipeError(
                f"expected `finetune.distill_points` to name modules of the model; got {point!r}; its top modules are "
                f"{[name for name, _ in dense.named_children()]}"
            )
    teachers = Distiller(
        teacher=dense, task=ctx.task, temperature=config.temperature, experts=expert_models(ctx, config)
    )
    batch = first_batch(ctx.task, "train", size=2)
    with torch.no_grad():
        teachers.losses(ctx.task.as_dict(dense(**batch.inputs)), teachers.outputs(batch.inputs), batch)


def teacher_inputs(ctx: Context) -> tuple[str, ...]:
    """The artifacts that a stage which distills reads of the experts."""
    return tuple(name for name in ctx.artifacts if name.startswith(PREFIX))


def expert_models(ctx: Context, config: FinetuneConfig) -> dict[str, nn.Module]:
    """The experts with their weights, in evaluation mode; none where nothing is distilled.

    Raises:
        CheckpointError: a file does not fit the model that the task builds.
    """
    from fusepress.pipeline.graph.apply import load

    if not config.distill:
        return {}
    return {
        name.removeprefix(PREFIX): load(
            ctx.task.build_expert(name.removeprefix(PREFIX)), None, ctx.artifacts[name]
        ).eval()
        for name in teacher_inputs(ctx)
    }
