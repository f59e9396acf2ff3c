"""Experts of single tasks as teachers: the recipe's weight files and the models that the task builds for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusepress.pipeline.errors import CheckpointError, TaskError
from fusepress.pipeline.recipe import FinetuneConfig
from fusepress.pipeline.stages.base import Context

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
