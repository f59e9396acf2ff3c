"""quantize: the ONNX file in the precision it is released in."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from fusepress.pipeline.evidence import Measurement
from fusepress.pipeline.recipe import QuantizeConfig
from fusepress.pipeline.stages import common
from fusepress.pipeline.stages.base import Context, StageOutput, key_parts
from fusepress.pipeline.stages.export import confirmed_sparsity
from fusepress.pipeline.store import KeyParts, atomic_write_text, sha256_file


class Quantize:
    """FP16 by autocast, INT8 and FP8 by explicit Q/DQ on a fixed calibration list."""

    name = "quantize"
    version = 1
    every_rank = False

    def skip(self, ctx: Context) -> str | None:
        """FP32 needs no conversion."""
        return "the release precision is fp32" if ctx.precision == "fp32" else None

    def key_parts(self, ctx: Context) -> KeyParts:
        """The precision section, the ONNX file and the calibration data."""
        return key_parts(
            ctx,
            self,
            config={
                **self._config(ctx).model_dump(mode="json"),
                "precision": ctx.precision,
                "seed": ctx.recipe.seed,
                "host": ctx.on_host,
                "half_remainder": self._half_remainder(ctx),
            },
            inputs=("onnx", "masks"),
            splits=("calib", "eval"),
            tools=("nvidia-modelopt", "onnx", "onnxruntime-gpu", "onnxconverter-common", "onnx-graphsurgeon", "numpy"),
        )

    def run(self, ctx: Context, out: Path, work: Path) -> StageOutput:
        """Write model.onnx in the release precision, and calibration.json where it calibrates."""
        final = out / "model.onnx"
        details: dict[str, Any] = {"precision": ctx.precision}
        details |= self._convert(ctx, final, out, work)
        sha = sha256_file(final)
        session = common.onnx_session(ctx, final)
        evaluation = common.evaluate_with_progress(ctx, lambda feeds: session(feeds), 0.5, 0.95)
        measurements = common.accuracy_measurements(
            ctx, evaluation, runtime="onnxruntime-cpu", precision=ctx.precision, artifact_sha256=sha
        )
        if "masks" in ctx.artifacts:
            details["sparsity"] = confirmed_sparsity(final, ctx)
        return StageOutput(measurements=measurements, details=details, artifacts={"onnx": "model.onnx"})

    def assess(self, ctx: Context, folder: Path) -> list[Measurement]:
        """Of the quantised file."""
        return common.latency_measurements(ctx, ctx.artifacts["onnx"], ctx.precision)

    @staticmethod
    def _config(ctx: Context) -> QuantizeConfig:
        return ctx.recipe.quantize or QuantizeConfig()

    def _convert(self, ctx: Context, final: Path, out: Path, work: Path) -> dict[str, Any]:
        from fusepress.calib.dataset import calibration_arrays, choose_calibration

        source, config = ctx.artifacts["onnx"], self._config(ctx)
        card = choose_calibration(ctx.task, config.samples, ctx.recipe.seed)
        atomic_write_text(out / "calibration.json", card.to_json())
        arrays = calibration_arrays(ctx.task, card)
        ctx.reporter.update(0.2, f"calibrating on {len(card.sample_ids)} samples")
        if ctx.precision == "fp16":
            from fusepress.export.precision import convert_fp16

            info = convert_fp16(source, final, arrays=arrays)
            return {
                "calibration": card.summary(),
                "fp32_nodes": list(info.fp32_nodes),
                "ranges_checked": info.ranges_checked,
            }
        from fusepress.calib.quantize import quantize_fp8, quantize_int8

        remainder: Literal["fp16", "fp32"] = "fp16" if self._half_remainder(ctx) else "fp32"
        if ctx.precision == "fp8":
            report = quantize_fp8(source, arrays, final, exclude=config.exclude)
        else:
            report = quantize_int8(
                source, arrays, final, method=config.method, remainder=remainder, exclude=config.exclude
            )
        details: dict[str, Any] = {"calibration": card.summary(), "coverage": report.to_dict()}
        if report.notes:
            details["note"] = "; ".join(report.notes)
        return details

    @staticmethod
    def _half_remainder(ctx: Context) -> bool:
        """Q/DQ with FP16 scales needs opset 19, which TensorRT 8.x cannot read; a CPU gains nothing from FP16."""
        old = ctx.profile.software[0].tensorrt.startswith("8.") if ctx.profile.runtime == "tensorrt" else False
        return not ctx.on_host and not old
