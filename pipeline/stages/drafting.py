"""What `qat` and `quantize` do alike: choose calibration samples, and place Q/DQ with ranges measured on them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fusepress.pipeline.errors import TaskError
from fusepress.pipeline.recipe import QuantizeConfig
from fusepress.pipeline.stages import common
from fusepress.pipeline.stages.base import Context
from fusepress.pipeline.task import first_batch

if TYPE_CHECKING:
    from torch import Tensor

    from fusepress.calib.dataset import CalibrationCard
    from fusepress.calib.quantize import Draft
    from fusepress.pipeline.graph.placement import Grid

QUANTISED = ("int8", "fp8")


@dataclass(slots=True, kw_only=True)
class Calibration:
    """The chosen samples.

    Attributes:
        card: which they are; with the ranges' stability once a draft was made.
        arrays: input name -> samples.
    """

    card: CalibrationCard
    arrays: dict[str, Any]


def settings_of(ctx: Context) -> QuantizeConfig:
    """The recipe's section, or its defaults."""
    return ctx.recipe.quantize or QuantizeConfig()


def draft_key(ctx: Context) -> dict[str, Any]:
    """What of the recipe and the target shapes a draft."""
    read = {"samples", "method", "exclude"}
    return {
        **settings_of(ctx).model_dump(mode="json", include=read),
        "precision": ctx.precision,
        "seed": ctx.recipe.seed,
        "host": ctx.on_host,
    }


def check_calibration(ctx: Context, *, whole: bool) -> None:
    """Check before anything is spent that the calib split can be calibrated on, and judged where that is asked for.

    Args:
        ctx: the run.
        whole: choose the samples too, which reads all of the calib and eval splits.

    Raises:
        TaskError: samples cannot be chosen (`choose_calibration`), or the task's statistics cannot be made of them.
    """
    if ctx.precision == "fp32":
        return
    if ctx.precision in QUANTISED and settings_of(ctx).search:
        _check_targets(ctx)
    if whole:
        from fusepress.calib.dataset import choose_calibration

        choose_calibration(ctx.task, settings_of(ctx).samples, ctx.recipe.seed)


def _check_targets(ctx: Context) -> None:
    """The search of layers is judged on the calib split: its samples need what `sample_stats` reads."""
    batch = first_batch(ctx.task, "calib")
    try:
        stats = ctx.task.sample_stats(_outputs(ctx, batch.inputs), batch)
        ctx.task.score(stats)
        rows = {name: value.shape[:1] for name, value in stats.items()}
        wrong = [f"{shape} rows in {name!r}" for name, shape in rows.items() if shape != (batch.size,)]
        found = ", ".join(wrong)
    except Exception as error:  # noqa: BLE001  the user's own code, on data that it was perhaps never run on
        found = f"{type(error).__name__}: {error}"
    if found:
        raise TaskError(
            f"expected targets in the calib split as in eval, for what stays out of {ctx.precision} is chosen by its "
            f"metric; got {found} at batches('calib', 0) of {ctx.task.source.spec}; give its samples targets, or set "
            "quantize.search: false"
        )


def _outputs(ctx: Context, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the ONNX file that the recipe starts from, or of the architecture, whatever its weights."""
    if ctx.from_onnx:
        from fusepress.export.runtime import OnnxSession

        assert ctx.checkpoint is not None
        return OnnxSession(ctx.checkpoint)(inputs)
    from fusepress.pipeline.evaluate import torch_predict

    return torch_predict(ctx.task, ctx.task.build_model())(inputs)


def calibrate(ctx: Context) -> Calibration:
    """Choose the samples.

    Raises:
        TaskError: the calib split cannot be calibrated on.
    """
    from fusepress.calib.dataset import calibration_arrays, choose_calibration

    card = choose_calibration(ctx.task, settings_of(ctx).samples, ctx.recipe.seed)
    return Calibration(card=card, arrays=calibration_arrays(ctx.task, card))


def drafted(
    ctx: Context, source: Path, calibration: Calibration, *, choose: bool = True
) -> tuple[Draft, dict[str, Any]]:
    """Q/DQ on every layer that can have it, ranges by the recipe's method.

    Args:
        ctx: the run.
        source: float32 file.
        calibration: its card learns how far ranges move.
        choose: try the methods of `auto`; False where other scales will replace those of activations.

    Returns:
        The draft; and for the report, where the method was chosen here, each one's error.
    """
    from fusepress.calib.ladder import choose_method
    from fusepress.calib.quantize import draft_qdq

    settings = settings_of(ctx)
    draft = draft_qdq(
        source,
        calibration.arrays,
        precision=cast("Grid", ctx.precision),
        method="max" if settings.method == "auto" else settings.method,
        exclude=settings.exclude,
        sample_ids=calibration.card.sample_ids,
        unsigned=ctx.on_host,  # ONNX Runtime has few integer kernels for Q/DQ as TensorRT wants it
    )
    calibration.card = calibration.card.with_ranges(draft.ranges.resampling(ctx.recipe.seed))
    if settings.method != "auto" or not choose:
        return draft, {}
    draft, errors = choose_method(draft, calibration.arrays, lambda path: common.onnx_session(ctx, path))
    choice = {
        "ranges_by": draft.method,
        # as the report tells errors everywhere else: the root, in per cent of the outputs' spread
        **{f"output_error_by_{name}_percent": round(100 * error**0.5, 3) for name, error in errors.items()},
    }
    return draft, {"choice": choice}
