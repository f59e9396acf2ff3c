"""build: an engine where one can be built, a build kit where only the device can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fusepress.pipeline.stages import common
from fusepress.pipeline.stages.base import Context, NoLatency, StageOutput, key_parts
from fusepress.pipeline.store import KeyParts

REFERENCE_SAMPLES = 2
BUILD_TIMEOUT_S = 1200


class Build(NoLatency):
    """TensorRT-RTX ahead of time for desktop targets, a build kit for Jetson, DRIVE and other TensorRT targets."""

    name = "build"
    version = 2  # kits time the layers too
    every_rank = False

    def skip(self, ctx: Context) -> str | None:
        """ONNX Runtime runs the ONNX file as it is."""
        return "ONNX Runtime runs the ONNX file itself" if ctx.profile.runtime == "onnxruntime" else None

    def key_parts(self, ctx: Context) -> KeyParts:
        """The released ONNX, the target and the builder."""
        return key_parts(
            ctx,
            self,
            config={"target": ctx.target_identity(), "precision": ctx.precision},
            inputs=("onnx", "masks"),
            splits=("calib",),
            tools=("tensorrt_rtx", "tensorrt", "onnx", "onnxruntime-gpu"),
        )

    def run(self, ctx: Context, out: Path, work: Path) -> StageOutput:
        """Write model.engine, or kit/ for a device that must build for itself."""
        if ctx.profile.runtime == "tensorrt_rtx":
            from fusepress.export.engine import BuildOptions, build_rtx_engine

            assert ctx.profile.compute_capability is not None
            ctx.reporter.update(0.1, "building the TensorRT-RTX engine")
            capabilities = [ctx.profile.compute_capability]
            engine = out / "model.engine"
            info = build_rtx_engine(
                ctx.artifacts["onnx"],
                engine,
                compute_capabilities=capabilities,
                options=BuildOptions(timeout_s=BUILD_TIMEOUT_S),
                progress=lambda fraction, phase: ctx.reporter.update(0.1 + 0.9 * fraction, phase),
            )
            note = "built ahead of time by TensorRT-RTX and not executed"
            return StageOutput(
                details={"engine": info.to_dict(), "executed": info.executed, "note": note},
                artifacts={"engine": engine.name},
            )
        return self._kit(ctx, out)

    def _kit(self, ctx: Context, out: Path) -> StageOutput:
        from fusepress.export.bundle import write_build_kit
        from fusepress.export.engine import why_no_tensorrt

        session = common.onnx_session(ctx, ctx.artifacts["onnx"])
        references = []
        for batch in common.calib_batches(ctx, REFERENCE_SAMPLES):
            inputs = {name: value[:1] for name, value in batch.inputs.items()}
            references.append((inputs, session(inputs)))
        kit = write_build_kit(
            out / "kit",
            ctx.artifacts["onnx"],
            ctx.profile,
            power_mode=ctx.power_mode,
            precision=ctx.precision,
            references=references,
            sparse="masks" in ctx.artifacts and ctx.recipe.wants_2to4,
            dense_onnx=ctx.artifacts.get("dense_onnx"),
        )
        details: dict[str, Any] = {"kit": kit.to_dict(), "executed": False, "tensorrt_here": why_no_tensorrt()}
        details["note"] = f"a build kit for {ctx.profile.name}: no engine was built; the device builds it with build.sh"
        return StageOutput(details=details, artifacts={"build_kit": "kit"})
