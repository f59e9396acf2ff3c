"""build: an engine where one can be built, a build kit where only the device can."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusepress.pipeline.errors import BuildError, MeasureError
from fusepress.pipeline.evaluate import evaluate
from fusepress.pipeline.evidence import Measurement
from fusepress.pipeline.stages import common
from fusepress.pipeline.stages.base import Context, NoLatency, StageOutput, key_parts
from fusepress.pipeline.store import KeyParts

if TYPE_CHECKING:
    from fusepress.export.engine import BuildOptions, EngineInfo
    from fusepress.export.sparse_build import SparseCounts, SparseVerdict

ENGINE = "model.engine"
NOT_EXECUTED_BY_US = "built by TensorRT on this machine, by code that was not executed by us: compare it with the kit"
TIMED_BY_CODE_NOT_EXECUTED_BY_US = "timed on the GPU that built it, by code that was not executed by us"
REFERENCE_SAMPLES = 2
BUILDS = 3  # where they can be timed: what a builder chooses differs from build to build
TRIAL_SECONDS = 20.0
BUILD_TIMEOUT_S = 3600  # a Jetson times every kernel itself


class Build(NoLatency):
    """TensorRT-RTX ahead of time for desktop targets, a build kit for Jetson, DRIVE and other TensorRT targets."""

    name = "build"
    version = 4
    every_rank = False

    def skip(self, ctx: Context) -> str | None:
        """ONNX Runtime runs the ONNX file as it is."""
        return "ONNX Runtime runs the ONNX file itself" if ctx.profile.runtime == "onnxruntime" else None

    def key_parts(self, ctx: Context) -> KeyParts:
        """The released ONNX, the dense one that the kit times beside it, the target, the builder and its GPU."""
        from fusepress.export.builder import gpu

        return key_parts(
            ctx,
            self,
            config={
                "target": ctx.target_identity(),
                "precision": ctx.final_precision,
                "sparse": _is_2to4(ctx),
                # an engine and its trial belong to one model of GPU and its driver, not to a compute capability
                "device": gpu() if _builds_here(ctx) else None,
            },
            inputs=("onnx", "dense_onnx", "masks"),
            splits=("calib", "eval") if _builds_here(ctx) else ("calib",),
            tools=("tensorrt_rtx", "tensorrt", "onnx", "onnxruntime-gpu"),
        )

    def run(self, ctx: Context, out: Path, work: Path) -> StageOutput:
        """Write model.engine, or kit/ for a device that must build for itself; both on such a device."""
        if ctx.profile.runtime == "tensorrt_rtx":
            return self._ahead_of_time(ctx, out, work)
        kit = self._kit(ctx, out)
        if not _builds_here(ctx):
            return kit
        here = self._on_the_device(ctx, out, work)
        return StageOutput(
            details=kit.details | here.details,
            artifacts=kit.artifacts | here.artifacts,
            measurements=here.measurements,
        )

    @staticmethod
    def _ahead_of_time(ctx: Context, out: Path, work: Path) -> StageOutput:
        from fusepress.export.engine import build_rtx_engine
        from fusepress.export.sparse_build import judge_bytes, unproven

        assert ctx.profile.compute_capability is not None

        def build(path: Path, options: BuildOptions) -> EngineInfo:
            return build_rtx_engine(
                ctx.artifacts["onnx"],
                path,
                compute_capabilities=[str(ctx.profile.compute_capability)],
                options=options,
                progress=_progress(ctx),
            )

        ctx.reporter.update(0.1, "building the TensorRT-RTX engine")
        info = build(out / ENGINE, _options(ctx))
        details: dict[str, Any] = {
            "engine": info.to_dict(),
            "executed": info.executed,
            "note": "built ahead of time by TensorRT-RTX and not executed",
        }
        if _is_2to4(ctx):
            sparse = build(work / ENGINE, _options(ctx, sparse=True))
            verdict = judge_bytes(info, sparse) or unproven(
                "nothing was run; the engine without sparse kernels is kept"
            )
            details["sparsity"] = _counts(ctx, sparse).to_dict() | verdict.to_dict()
        return StageOutput(details=details, artifacts={"engine": ENGINE})

    @staticmethod
    def _on_the_device(ctx: Context, out: Path, work: Path) -> StageOutput:
        """TensorRT and the target's GPU are here: build, try 2:4 against the same file without it, and time it."""
        from fusepress.export.engine import build_tensorrt_engine

        onnx = ctx.artifacts["onnx"]

        def build(name: str, options: BuildOptions) -> EngineInfo:
            return build_tensorrt_engine(onnx, work / name / ENGINE, options=options, progress=_progress(ctx))

        ctx.reporter.update(0.1, "building the TensorRT engine")
        first = build("plain", _options(ctx))
        details: dict[str, Any] = {"executed": False, "note": NOT_EXECUTED_BY_US}
        if _is_2to4(ctx):
            sparse = build("sparse", _options(ctx, sparse=True))
            verdict = _trial(ctx, first, sparse)
            details |= {
                "executed": verdict.speedup is not None,
                "sparsity": _counts(ctx, sparse).to_dict() | verdict.to_dict(),
            }
            first = sparse if verdict.decision == "kept" else first
        # a timing cache would only repeat the choices of the first build
        anew = replace(first.options, timing_cache_folder=None)
        builds = [first, *(build(f"again{number}", anew) for number in range(1, BUILDS))]
        kept, told, measurements = _timed(ctx, builds)
        for path in (kept.path, kept.log_path, kept.layers_path):
            if path is not None:
                shutil.copyfile(path, out / path.name)
        info = replace(kept, path=out / ENGINE, executed="builds" in told)
        details |= told | {"executed": details["executed"] or info.executed, "engine": info.to_dict()}
        return StageOutput(details=details, artifacts={"engine": ENGINE}, measurements=measurements)

    def _kit(self, ctx: Context, out: Path) -> StageOutput:
        from fusepress.export.bundle import write_build_kit
        from fusepress.export.engine import why_no_tensorrt

        session = common.onnx_session(ctx, ctx.artifacts["onnx"])
        _check_operators(ctx)
        references = []
        for batch in common.calib_batches(ctx, REFERENCE_SAMPLES):
            inputs = {name: value[:1] for name, value in batch.inputs.items()}
            references.append((inputs, session(inputs)))
        refused = _refused(ctx, "dense_onnx")  # the dense model goes into the kit as it is: no pass rewrites it
        kit = write_build_kit(
            out / "kit",
            ctx.artifacts["onnx"],
            ctx.profile,
            power_mode=ctx.power_mode,
            precision=ctx.final_precision,
            references=references,
            sparse=_is_2to4(ctx),
            dense_onnx=None if refused else ctx.artifacts.get("dense_onnx"),
        )
        details: dict[str, Any] = {
            "kit": kit.to_dict(),
            "executed": False,
            "tensorrt_here": why_no_tensorrt() or _other_gpu(ctx),
        }
        details["note"] = f"a build kit for {ctx.profile.name}: no engine was built; the device builds it with build.sh"
        if refused:  # one engine that cannot be built would stop the script
            details["dense model not in the kit"] = refused
        if _is_2to4(ctx):
            from fusepress.export.sparse_build import unproven

            why = "no engine was built here; the kit builds and times it both ways on the device"
            details["sparsity"] = _counts(ctx, None).to_dict() | unproven(why).to_dict()
        return StageOutput(details=details, artifacts={"build_kit": "kit"})


def _check_operators(ctx: Context) -> None:
    """A kit that the device is known to refuse is none; a file that the recipe starts from comes here unchecked."""
    refused = _refused(ctx, "onnx")
    if refused:
        raise BuildError(
            f"expected operators that {ctx.profile.name} reads; got {len(refused)} that it refuses at "
            f"{ctx.artifacts['onnx'].name}:\n  " + "\n  ".join(refused)
        )


def _refused(ctx: Context, artifact: str) -> list[str]:
    """What the target is known to refuse of an ONNX artifact, where there is one."""
    from fusepress.export.onnx import load_onnx
    from fusepress.targets.operators import operator_faults

    if artifact not in ctx.artifacts:
        return []
    return [f.line() for f in operator_faults(load_onnx(ctx.artifacts[artifact]), ctx.profile) if f.certain]


def _is_2to4(ctx: Context) -> bool:
    return "masks" in ctx.artifacts and ctx.recipe.wants_2to4


def _builds_here(ctx: Context) -> bool:
    """TensorRT is installed beside a GPU of the target's kind; which one is known, where there are several."""
    from fusepress.export.builder import gpu
    from fusepress.export.engine import why_no_tensorrt

    if ctx.profile.runtime != "tensorrt":
        return False

    return why_no_tensorrt() is None and gpu()["capability"] == [ctx.profile.compute_capability]


def _other_gpu(ctx: Context) -> str | None:
    """Why no engine is built although TensorRT is here, None where one is."""
    from fusepress.export.builder import gpu

    if _builds_here(ctx):
        return None
    here = gpu()
    capability = ", ".join(here["capability"]) or "unknown"
    return (
        f"the GPU here is {here['name']}, compute capability {capability}; the target's is "
        f"{ctx.profile.compute_capability}"
    )


def _options(ctx: Context, *, sparse: bool = False) -> BuildOptions:
    from fusepress.export.engine import BuildOptions
    from fusepress.export.timing_cache import default_folder

    # ahead of time nothing is timed
    folder = default_folder() if ctx.profile.runtime == "tensorrt" else None
    mode = ctx.power_mode if folder is not None else None
    return BuildOptions(sparse=sparse, timing_cache_folder=folder, power_mode=mode, timeout_s=BUILD_TIMEOUT_S)


def _progress(ctx: Context) -> Callable[[float, str], None]:
    return lambda fraction, phase: ctx.reporter.update(0.1 + 0.9 * fraction, phase)


def _counts(ctx: Context, built: EngineInfo | None) -> SparseCounts:
    """Valid, eligible and picked layers, from the file and from the build with sparse kernels allowed."""
    from fusepress.export.sparse_build import count_sparse
    from fusepress.export.sparsity import check_sparsity_2to4

    report = check_sparsity_2to4(ctx.artifacts["onnx"])
    if built is None:
        return count_sparse(report, None)
    return count_sparse(report, built.log_path.read_text(errors="replace"), built.layers)


def _timed(ctx: Context, builds: list[EngineInfo]) -> tuple[EngineInfo, dict[str, Any], list[Measurement]]:
    """The fastest of several builds, their spread, and its latency; the first one and why where none runs here."""
    from fusepress.export.builder import gpu
    from fusepress.export.engine_run import EngineSession
    from fusepress.export.engine_spread import time_builds
    from fusepress.targets.measure import measure_interleaved

    inputs = common.example_inputs(ctx)
    try:
        spread = time_builds(
            builds,
            lambda engine: EngineSession(engine.path).timed_callable(inputs),
            lambda runs: measure_interleaved(runs, max_seconds=TRIAL_SECONDS),
        )
        kept = spread.fastest
        session = EngineSession(kept.path)
        alone = measure_interleaved({"engine": session.timed_callable(inputs)}, max_seconds=TRIAL_SECONDS)
    except (BuildError, MeasureError) as error:
        return builds[0], {"not timed": str(error)}, []
    timed = alone.runs["engine"]
    # the GPU that is here by its own name: nothing proves that it is the target in its power mode, so no gate counts it
    measurements = common.latency_result(
        timed,
        device=str(gpu()["name"]),
        power_mode=None,
        precision=ctx.final_precision,
        artifact_sha256=kept.sha256,
        runtime=f"{kept.runtime} {kept.runtime_version}",
        note=TIMED_BY_CODE_NOT_EXECUTED_BY_US + ("" if timed.stable else "; unstable"),
    )
    return kept, {"builds": spread.to_dict()}, measurements


def _trial(ctx: Context, plain: EngineInfo, sparse: EngineInfo) -> SparseVerdict:
    """Both engines timed in turns and judged by the task's metric, on the GPU that is here."""
    from fusepress.export.engine_run import EngineSession
    from fusepress.export.sparse_build import judge_bytes, judge_sparse
    from fusepress.targets.measure import measure_interleaved

    same = judge_bytes(plain, sparse)
    if same is not None:
        return same
    sessions = {"plain": EngineSession(plain.path), "sparse": EngineSession(sparse.path)}
    inputs = common.example_inputs(ctx)
    timed = {name: session.timed_callable(inputs) for name, session in sessions.items()}
    speedup = measure_interleaved(timed, max_seconds=TRIAL_SECONDS).speedup("plain", "sparse")
    metric = ctx.task.primary
    direction = ctx.task.metrics[metric]
    found = {name: evaluate(ctx.task, session, "eval").metrics[metric] for name, session in sessions.items()}
    return judge_sparse(speedup, plain_metric=found["plain"], sparse_metric=found["sparse"], direction=direction)
