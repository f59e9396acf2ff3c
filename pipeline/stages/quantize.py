"""quantize: the ONNX file in the precision it is released in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fusepress.pipeline.evaluate import Evaluation
from fusepress.pipeline.evidence import Measurement
from fusepress.pipeline.recipe import QuantizeConfig
from fusepress.pipeline.stages import common
from fusepress.pipeline.stages.base import Context, StageOutput, key_parts
from fusepress.pipeline.stages.export import confirmed_sparsity
from fusepress.pipeline.store import KeyParts, sha256_file

if TYPE_CHECKING:
    from fusepress.calib.dataset import CalibrationCard
    from fusepress.calib.ladder import Judge, Ladder, Standard
    from fusepress.calib.quantize import Draft
    from fusepress.calib.sensitivity import Sensitivity
    from fusepress.export.runtime import OnnxSession

CARD = "calibration.json"


@dataclass(frozen=True, slots=True)
class _Made:
    """What a conversion tells."""

    details: dict[str, Any]
    precision: str


class Quantize:
    """FP16 by autocast, INT8 and FP8 by explicit Q/DQ on a fixed calibration list."""

    name = "quantize"
    version = 3
    every_rank = False

    def skip(self, ctx: Context) -> str | None:
        """FP32 needs no conversion."""
        return "the release precision is fp32" if ctx.precision == "fp32" else None

    def key_parts(self, ctx: Context) -> KeyParts:
        """The precision section, the ONNX file, the calibration data, and what a search is held to."""
        settings = _config(ctx)
        searches = ctx.precision == "int8" and settings.search
        tabulates = ctx.precision == "int8" and settings.sensitivity
        gate = ctx.recipe.gates.accuracy if searches and settings.max_drop is None else None
        read = {"int8": None, "fp8": {"samples", "exclude"}}.get(ctx.precision, {"samples"})
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
            inputs=("onnx", "masks", *(("dense_onnx",) if searches else ())),
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
        return StageOutput(measurements=measurements, details=details, artifacts={"onnx": "model.onnx"})

    def assess(self, ctx: Context, folder: Path) -> list[Measurement]:
        """Of the quantised file."""
        return common.latency_measurements(ctx, ctx.artifacts["onnx"], ctx.final_precision)


def _config(ctx: Context) -> QuantizeConfig:
    return ctx.recipe.quantize or QuantizeConfig()


def _half_remainder(ctx: Context) -> bool:
    """Q/DQ with FP16 scales needs opset 19, which TensorRT 8.x cannot read; a CPU gains nothing from FP16."""
    old = ctx.profile.software[0].tensorrt.startswith("8.") if ctx.profile.runtime == "tensorrt" else False
    return not ctx.on_host and not old


def _convert(ctx: Context, final: Path, out: Path) -> _Made:
    from fusepress.calib.dataset import calibration_arrays, choose_calibration

    source, settings = ctx.artifacts["onnx"], _config(ctx)
    card = choose_calibration(ctx.task, settings.samples, ctx.recipe.seed)
    arrays = calibration_arrays(ctx.task, card)
    ctx.reporter.update(0.1, f"calibrating on {len(card.sample_ids)} samples")
    details: dict[str, Any] = {}
    precision: str = ctx.precision
    if ctx.precision == "int8":
        made = _Int8(ctx, card, arrays)
        details, card = made.write(final), made.card
        precision = made.released
    elif ctx.precision == "fp8":
        from fusepress.calib.quantize import quantize_fp8

        report = quantize_fp8(source, arrays, final, exclude=settings.exclude)
        details = {"coverage": report.to_dict()} | ({"note": "; ".join(report.notes)} if report.notes else {})
    else:
        details = _write_fp16(source, final, arrays)
    card.write(out / CARD)
    return _Made({"calibration": card.summary(), **details}, precision)


def _write_fp16(source: Path, final: Path, arrays: Any) -> dict[str, Any]:
    from fusepress.export.precision import convert_fp16

    info = convert_fp16(source, final, arrays=arrays)
    return {"fp32_nodes": list(info.fp32_nodes), "ranges_checked": info.ranges_checked}


class _Int8:
    """A draft with Q/DQ everywhere, the choice of its ranges, the ladder, and the file that they end in."""

    def __init__(self, ctx: Context, card: CalibrationCard, arrays: Any) -> None:
        self.ctx, self.card, self.arrays = ctx, card, arrays
        self.settings = _config(ctx)
        self.source = ctx.artifacts["onnx"]
        self.remainder: Literal["fp16", "fp32"] = "fp16" if _half_remainder(ctx) else "fp32"
        self.released = "int8"
        self._sensitivity: Sensitivity | None = None

    def write(self, final: Path) -> dict[str, Any]:
        """Write the released file; what the report tells."""
        details: dict[str, Any] = {}
        draft = self._draft(details)
        spared: frozenset[str] = frozenset()
        if self.settings.search:
            ladder = self._climb_down(draft)
            details["ladder"] = ladder.to_dict()
            spared = ladder.found.spared
            if ladder.found.rung != "int8":
                details["note"] = ladder.reason
        if self.settings.sensitivity:
            self._measured(draft)
        if self._sensitivity is not None:
            details["sensitivity"] = self._sensitivity.to_dict()
        if spared and spared >= set(draft.units()):
            return details | self._write_float(final)
        from fusepress.calib.quantize import finish_int8

        report = finish_int8(draft, self.arrays, final, remainder=self.remainder, spared=spared)
        notes = [details["note"]] if "note" in details else []
        notes += report.notes
        return details | {"coverage": report.to_dict()} | ({"note": "; ".join(notes)} if notes else {})

    def _draft(self, details: dict[str, Any]) -> Draft:
        from fusepress.calib.ladder import choose_method
        from fusepress.calib.quantize import draft_int8

        method = self.settings.method
        draft = draft_int8(
            self.source,
            self.arrays,
            method="max" if method == "auto" else method,
            exclude=self.settings.exclude,
            sample_ids=self.card.sample_ids,
        )
        self.card = self.card.with_ranges(draft.ranges.resampling(self.ctx.recipe.seed))
        if method == "auto":
            draft, errors = choose_method(draft, self.arrays, self._session)
            details["choice"] = {
                "ranges_by": draft.method,
                # as the report tells errors everywhere else: the root, in per cent of the outputs' spread
                **{f"output_error_by_{name}_percent": round(100 * error**0.5, 3) for name, error in errors.items()},
            }
        self.ctx.reporter.update(0.25, f"ranges by {draft.method}")
        return draft

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
        floating = self._judged(judge, self.source)
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
                most_runs=SENSITIVITY_EVALUATIONS * self.card.available,
                progress=tell,
            )
        return self._sensitivity

    def _write_float(self, final: Path) -> dict[str, Any]:
        """The last rung."""
        if self.ctx.on_host:
            self.released = "fp32"
            final.write_bytes(self.source.read_bytes())
            return {}
        self.released = "fp16"
        return _write_fp16(self.source, final, self.arrays)
