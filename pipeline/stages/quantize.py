"""quantize: the ONNX file in the precision it is released in."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fusepress.pipeline.evaluate import Evaluation
from fusepress.pipeline.evidence import SPEEDUP_OVER_FP32, Measurement
from fusepress.pipeline.stages import common
from fusepress.pipeline.stages.base import Context, StageOutput, key_parts
from fusepress.pipeline.stages.drafting import QUANTISED, Calibration, calibrate, drafted, settings_of
from fusepress.pipeline.stages.export import confirmed_sparsity
from fusepress.pipeline.store import KeyParts, sha256_file

if TYPE_CHECKING:
    from fusepress.calib.ladder import Judge, Ladder, Standard
    from fusepress.calib.quantize import Draft
    from fusepress.calib.sensitivity import Sensitivity
    from fusepress.export.runtime import OnnxSession
    from fusepress.targets.latency import Speedup

CARD = "calibration.json"
FLOATING = "floating.onnx"
HOST_MEASURE_SECONDS = 2 * common.STAGE_MEASURE_SECONDS  # of two files in turns


@dataclass(frozen=True, slots=True)
class _Made:
    """What a conversion tells."""

    details: dict[str, Any]
    precision: str
    before_qat: bool = False  # the float model of before that training is what came of it


class Quantize:
    """FP16 by autocast, INT8 and FP8 by explicit Q/DQ on a fixed calibration list, under a ladder."""

    name = "quantize"
    version = 4
    every_rank = False

    def skip(self, ctx: Context) -> str | None:
        """FP32 needs no conversion."""
        return "the release precision is fp32" if ctx.precision == "fp32" else None

    def key_parts(self, ctx: Context) -> KeyParts:
        """The precision section, the ONNX file, the calibration data, and what a search is held to."""
        settings = settings_of(ctx)
        searches = ctx.precision in QUANTISED and settings.search
        tabulates = ctx.precision in QUANTISED and settings.sensitivity
        gate = ctx.recipe.gates.accuracy if searches and settings.max_drop is None else None
        read = None if ctx.precision in QUANTISED else {"samples"}
        return key_parts(
            ctx,
            self,
            config={
                **settings.model_dump(mode="json", include=read),
                "precision": ctx.precision,
                "seed": ctx.recipe.seed,
                "host": ctx.on_host,
                "half_remainder": _half_remainder(ctx),
                # layers are weighed by their latency on the target, in a table of sensitivity too
                "target": ctx.target_identity() if searches or tabulates else None,
                # a search stops at the gate
                "gate": None if gate is None else gate.model_dump(mode="json"),
            },
            inputs=("onnx", "masks", "scales", "float_onnx", "float_weights", *(("dense_onnx",) if searches else ())),
            splits=("calib", "eval"),
            tools=("nvidia-modelopt", "onnx", "onnxruntime-gpu", "onnxconverter-common", "onnx-graphsurgeon", "numpy"),
        )

    def run(self, ctx: Context, out: Path, work: Path) -> StageOutput:
        """Write model.onnx in the release precision, and calibration.json."""
        final = out / "model.onnx"
        made = _convert(ctx, final, out)
        sha = sha256_file(final)
        session = common.onnx_session(ctx, final)
        evaluation = common.evaluate_with_progress(ctx, lambda feeds: session(feeds), 0.7, 0.95)
        measurements = common.accuracy_measurements(
            ctx, evaluation, runtime="onnxruntime-cpu", precision=made.precision, artifact_sha256=sha
        )
        details: dict[str, Any] = {"precision": made.precision, **made.details}
        if "masks" in ctx.artifacts:
            details["sparsity"] = confirmed_sparsity(final, ctx)
        artifacts = {"onnx": "model.onnx"}
        if ctx.on_host:  # to be timed beside the file that comes of it
            shutil.copyfile(ctx.artifacts["onnx"], out / FLOATING)
            artifacts["floating_onnx"] = FLOATING
        if made.before_qat:
            shutil.copyfile(ctx.artifacts["float_weights"], out / "weights.safetensors")
            artifacts["weights"] = "weights.safetensors"
        return StageOutput(measurements=measurements, details=details, artifacts=artifacts)

    def assess(self, ctx: Context, folder: Path) -> list[Measurement]:
        """Of the quantised file; on this host measured in turns with the float32 file that it was made of."""
        if ctx.on_host and ctx.shas["onnx"] != ctx.shas["floating_onnx"]:
            return _beside_float(ctx)
        return common.latency_measurements(ctx, ctx.artifacts["onnx"], ctx.final_precision)


def _beside_float(ctx: Context) -> list[Measurement]:
    """Latency, and how many times as fast as in float32 the file is on this machine.

    The release stays what the recipe asks for, whatever the clock says: what a stage writes must not depend on it.
    """
    from fusepress.targets.measure import measure_interleaved

    inputs = common.example_inputs(ctx)
    files = {"fp32": ctx.artifacts["floating_onnx"], "released": ctx.artifacts["onnx"]}
    runs = {name: common.onnx_session(ctx, path).timed_callable(inputs) for name, path in files.items()}
    measured = measure_interleaved(runs, max_seconds=HOST_MEASURE_SECONDS)
    where: dict[str, Any] = {
        "device": ctx.profile.name,
        "power_mode": ctx.power_mode,
        "precision": ctx.final_precision,
        "artifact_sha256": ctx.shas["onnx"],
        "runtime": "onnxruntime-cpu",
    }
    rows = common.latency_result(measured.runs["released"], **where)
    faster = measured.speedup("fp32", "released")
    words = not_faster(faster, ctx.final_precision)
    if words is not None:
        ctx.reporter.warn(words)
    return [
        *rows,
        Measurement(
            name=SPEEDUP_OVER_FP32,
            value=faster.value,
            low=faster.low,
            high=faster.high,
            unit="x",
            n=measured.runs["released"].n,
            kind="measured",
            batch=1,
            note=words,
            **where,
        ),
    ]


def not_faster(faster: Speedup, precision: str) -> str | None:
    """What to say and do where a precision does not pay on this machine; None where it does."""
    if faster.low > 1.0:
        return None
    interval = f"95 % interval {faster.low:.2f} to {faster.high:.2f}"
    found = f"{faster.value:.2f} times as fast as FP32 on this machine ({interval})"
    how = "slower" if faster.high < 1.0 else "not measurably faster"
    return (
        f"{precision.upper()} is {how}: {found}; release in fp32 (-o quantize.precision=fp32), or see what `fusepress "
        "explain RUN` says of it"
    )


def _half_remainder(ctx: Context) -> bool:
    """Q/DQ with FP16 scales needs opset 19, which TensorRT 8.x cannot read; a CPU gains nothing from FP16."""
    old = ctx.profile.software[0].tensorrt.startswith("8.") if ctx.profile.runtime == "tensorrt" else False
    return not ctx.on_host and not old


def _convert(ctx: Context, final: Path, out: Path) -> _Made:
    calibration = calibrate(ctx)
    ctx.reporter.update(0.1, f"calibrating on {len(calibration.card.sample_ids)} samples")
    if ctx.precision in QUANTISED:
        made = _Quantised(ctx, calibration)
        details = made.write(final)
        released, before_qat = made.released, made.before_qat
    else:
        details = _write_fp16(ctx.artifacts["onnx"], final, calibration.arrays)
        released, before_qat = str(ctx.precision), False
    calibration.card.write(out / CARD)
    return _Made({"calibration": calibration.card.summary(), **details}, released, before_qat)


def _write_fp16(source: Path, final: Path, arrays: Any) -> dict[str, Any]:
    from fusepress.export.precision import convert_fp16

    info = convert_fp16(source, final, arrays=arrays)
    return {"fp32_nodes": list(info.fp32_nodes), "ranges_checked": info.ranges_checked}


class _Quantised:
    """A draft with Q/DQ everywhere, the choice of its ranges, the ladder, and the file that they end in.

    Attributes:
        floating: the float32 file that drops are counted from, and that the last rung releases: of the model before it
            was trained under quantisation, where it was.
        released: precision of the file that was written.
    """

    def __init__(self, ctx: Context, calibration: Calibration) -> None:
        self.ctx, self.calibration = ctx, calibration
        self.arrays = calibration.arrays
        self.settings = settings_of(ctx)
        self.floating = ctx.artifacts.get("float_onnx", ctx.artifacts["onnx"])
        self.remainder: Literal["fp16", "fp32"] = "fp16" if _half_remainder(ctx) else "fp32"
        self.released: str = ctx.precision
        self.before_qat = False
        self._sensitivity: Sensitivity | None = None

    def write(self, final: Path) -> dict[str, Any]:
        """Write the released file; what the report tells."""
        draft, details = self._draft()
        spared: frozenset[str] = frozenset()
        notes = details.pop("notes", [])
        if self.settings.search:
            ladder = self._climb_down(draft)
            details["ladder"] = ladder.to_dict()
            spared = ladder.found.spared
            if ladder.found.rung != "int8":
                notes.append(ladder.reason)
        if self.settings.sensitivity:
            self._measured(draft)
        if self._sensitivity is not None:
            details["sensitivity"] = self._sensitivity.to_dict()
        if spared and spared >= set(draft.units()):
            details |= self._write_float(final)
            notes += ["the release is the model of before qat"] if self.before_qat else []
        else:
            from fusepress.calib.quantize import finish_qdq

            report = finish_qdq(draft, self.arrays, final, remainder=self.remainder, spared=spared)
            notes += report.notes
            details["coverage"] = report.to_dict()
        return details | ({"note": "; ".join(notes)} if notes else {})

    def _draft(self) -> tuple[Draft, dict[str, Any]]:
        from fusepress.calib.qat import TrainedScales, with_trained_scales

        if "scales" not in self.ctx.artifacts:
            draft, details = drafted(self.ctx, self.ctx.artifacts["onnx"], self.calibration)
        else:
            draft, _ = drafted(self.ctx, self.ctx.artifacts["onnx"], self.calibration, choose=False)
            draft, without = with_trained_scales(draft, TrainedScales.read(self.ctx.artifacts["scales"]))
            details = {"choice": {"ranges_by": draft.method}}
            if without:
                details["notes"] = [f"the training knew no scale of {', '.join(without)}: theirs are calibrated"]
        self.ctx.reporter.update(0.25, f"ranges by {draft.method}")
        return draft, details

    def _session(self, path: Path) -> OnnxSession:
        return common.onnx_session(self.ctx, path)

    def _climb_down(self, draft: Draft) -> Ladder:
        from fusepress.calib.ladder import Judge, climb_down, kept_batches

        judge = Judge(task=self.ctx.task, batches=kept_batches(self.ctx.task), seed=self.ctx.recipe.seed)
        return climb_down(
            draft,
            judge,
            self._standard(judge),
            self._session,
            lambda: self._measured(draft),
            progress=lambda line: self.ctx.reporter.update(0.5, line),
        )

    def _standard(self, judge: Judge) -> Standard:
        gate = self.ctx.recipe.gates.accuracy
        floating = self._judged(judge, self.floating)
        dense: Evaluation | None = None
        if gate is not None and self.settings.max_drop is None and "dense_onnx" in self.ctx.artifacts:
            dense = self._judged(judge, self.ctx.artifacts["dense_onnx"])
        return judge.standard(
            floating,
            dense,
            metric=None if gate is None else gate.metric,
            gate_drop=None if gate is None else gate.max_drop,
            max_drop=self.settings.max_drop,
        )

    def _judged(self, judge: Judge, path: Path) -> Evaluation:
        session = self._session(path)
        return judge.evaluate(lambda inputs: session(inputs))

    def _measured(self, draft: Draft) -> Sensitivity:
        from fusepress.calib.ladder import SENSITIVITY_EVALUATIONS
        from fusepress.calib.sensitivity import branch_by_modules, measure_sensitivity, spare_costs

        if self._sensitivity is None:

            def tell(done: float) -> None:
                self.ctx.reporter.update(0.3 + 0.2 * done, "sensitivity of layers")

            costs, unit = spare_costs(draft, self.ctx.profile, self.remainder, mode=self.ctx.power_mode)
            self._sensitivity = measure_sensitivity(
                draft,
                self.arrays,
                branch_of=branch_by_modules(self.ctx.task.branches),
                costs=costs,
                cost_unit=unit,
                session=self._session,
                most_runs=SENSITIVITY_EVALUATIONS * self.calibration.card.available,
                progress=tell,
            )
        return self._sensitivity

    def _write_float(self, final: Path) -> dict[str, Any]:
        """The last rung."""
        self.before_qat = "float_onnx" in self.ctx.artifacts
        if self.ctx.on_host:
            self.released = "fp32"
            final.write_bytes(self.floating.read_bytes())
            return {}
        self.released = "fp16"
        return _write_fp16(self.floating, final, self.arrays)
