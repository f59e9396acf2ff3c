"""export: the torch model as ONNX, proven to be the same function."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusepress.pipeline.errors import ExportError
from fusepress.pipeline.evaluate import evaluate, torch_predict
from fusepress.pipeline.evidence import Measurement
from fusepress.pipeline.stages import common
from fusepress.pipeline.stages.base import Context, StageOutput, key_parts
from fusepress.pipeline.store import KeyParts, sha256_file
from fusepress.pipeline.task import Batch

if TYPE_CHECKING:
    from torch import nn

    from fusepress.export.onnx import ExportInfo
    from fusepress.targets.operators import OperatorFault

PARITY_RELATIVE = 1e-4
METRIC_TOLERANCE = 1e-3
PARITY_BATCHES = 2


class Export:
    """Exports, slims and checks parity on real batches and on the task's metric."""

    name = "export"
    version = 3
    every_rank = False

    def skip(self, ctx: Context) -> str | None:
        """Needless where the recipe starts from ONNX."""
        return "the checkpoint is an ONNX file" if ctx.from_onnx else None

    def key_parts(self, ctx: Context) -> KeyParts:
        """The weights, the plan, the opsets, what the target's importer reads, and the seed."""
        from fusepress.targets.operators import importer_of

        importer = importer_of(ctx.profile)
        return key_parts(
            ctx,
            self,
            config={
                "opset": [ctx.profile.opset, ctx.profile.opset_scatternd],
                # decides what is rewritten, and what the report says is still refused
                "importer": None if importer is None else importer.name,
                "seed": ctx.recipe.seed,  # of the bootstrap behind the intervals; the file itself does not depend on it
            },
            inputs=("dense_weights", "weights", "plan", "masks"),
            splits=("calib", "eval"),
            tools=("torch", "onnx", "onnxscript", "onnxslim", "onnxruntime-gpu"),
        )

    def run(self, ctx: Context, out: Path, work: Path) -> StageOutput:
        """Write model.onnx."""
        from fusepress.export.parity import check_parity, require_parity
        from fusepress.export.runtime import OnnxSession

        model = common.current_model(ctx)
        batches = common.calib_batches(ctx, PARITY_BATCHES)
        exported, rewrites, refused = write_onnx(ctx, model, out / "model.onnx", work, batches)
        session = OnnxSession(out / "model.onnx")
        parity = check_parity(torch_predict(ctx.task, model), lambda feeds: session(feeds), batches)
        require_parity(parity, PARITY_RELATIVE)
        ctx.reporter.update(0.3, "evaluating the ONNX model")
        sha = sha256_file(out / "model.onnx")
        evaluation = common.evaluate_with_progress(ctx, lambda feeds: session(feeds), 0.3, 0.9)
        in_torch = evaluate(ctx.task, torch_predict(ctx.task, model), "eval").metrics
        self._require_equal_metrics(evaluation.metrics, in_torch)
        measurements = common.accuracy_measurements(
            ctx, evaluation, runtime="onnxruntime-cpu", precision="fp32", artifact_sha256=sha
        )
        measurements += parity.measurements()
        details: dict[str, Any] = {
            "opset": exported.opset,
            "warnings": list(exported.warnings),
            "parity": parity.to_dict(),
            "parity_tolerance": PARITY_RELATIVE,
            "metric_tolerance": METRIC_TOLERANCE,
            "metrics_torch": in_torch,
        }
        details |= {"rewrites": rewrites} if rewrites else {}
        details |= {"refused_operators": refused} if refused else {}
        if "masks" in ctx.artifacts:
            details["sparsity"] = confirmed_sparsity(out / "model.onnx", ctx)
        return StageOutput(measurements=measurements, details=details, artifacts={"onnx": "model.onnx"})

    def assess(self, ctx: Context, folder: Path) -> list[Measurement]:
        """Of the exported file."""
        return common.latency_measurements(ctx, ctx.artifacts["onnx"], common.stage_precision(ctx))

    @staticmethod
    def _require_equal_metrics(onnx: dict[str, float], torch: dict[str, float]) -> None:
        for name, value in onnx.items():
            if abs(value - torch[name]) > METRIC_TOLERANCE * max(1.0, abs(torch[name])):
                raise ExportError(
                    f"expected the metric {name} of the ONNX model within {METRIC_TOLERANCE} of torch; got {value:.5f} "
                    f"against {torch[name]:.5f}; the exported graph is not faithful: do not release it"
                )


def write_onnx(
    ctx: Context, model: nn.Module, path: Path, work: Path, batches: list[Batch]
) -> tuple[ExportInfo, list[str], list[str]]:
    """A model as the float32 file that is quantised and released.

    Args:
        ctx: the run.
        model: in evaluation mode.
        path: file to write.
        work: for the file before it is simplified.
        batches: what rewritten and simplified files are checked on.

    Returns:
        What was exported before it was simplified; and as `rewritten_for_target`.
    """
    from fusepress.export.passes import slim

    exported = common.export_for_target(ctx, model, work / "raw.onnx")
    rewrites, refused = rewritten_for_target(ctx, work / "raw.onnx", batches)
    slim(work / "raw.onnx", path, batches)
    return exported, rewrites, refused


def rewritten_for_target(ctx: Context, path: Path, batches: list[Batch] | None = None) -> tuple[list[str], list[str]]:
    """Rewrite in place what the target's importer does not take and an exact pass mends.

    Returns:
        What was done, and what a list that is not confirmed says is still refused.

    Raises:
        ExportError: something is left that the importer is known to refuse: no engine would ever be built.
    """
    from fusepress.export.hygiene import rewrite
    from fusepress.export.onnx import load_onnx
    from fusepress.targets.operators import operator_faults

    passes = list(dict.fromkeys(f.mended_by for f in operator_faults(load_onnx(path), ctx.profile) if f.mended_by))
    done = rewrite(path, path, passes, batches) if passes else []
    faults = operator_faults(load_onnx(path), ctx.profile)
    _refuse_known(ctx, faults)
    left = [fault.line() for fault in faults]
    for line in left:
        ctx.reporter.warn(f"{ctx.profile.name} may not build this: {line}")
    return [f"{r.name}: {', '.join(r.changed)} (largest difference {r.max_rel:.2g})" for r in done], left


def require_buildable(ctx: Context, path: Path) -> None:
    """Refuse an export that the target is known to refuse whatever is rewritten; the file stays as it is.

    Raises:
        ExportError: as `rewritten_for_target`, before anything is compressed.
    """
    from fusepress.export.hygiene import apply_passes, name_all
    from fusepress.export.onnx import load_onnx
    from fusepress.targets.operators import operator_faults

    proto = load_onnx(path)
    name_all(proto)
    apply_passes(proto, list(dict.fromkeys(f.mended_by for f in operator_faults(proto, ctx.profile) if f.mended_by)))
    _refuse_known(ctx, operator_faults(proto, ctx.profile))


def _refuse_known(ctx: Context, faults: Sequence[OperatorFault]) -> None:
    known = [fault.line() for fault in faults if fault.certain]
    if known:
        raise ExportError(
            f"expected operators that {ctx.profile.name} reads; got {len(known)} that it refuses and no rewrite "
            "mends:\n  " + "\n  ".join(known)
        )


def confirmed_sparsity(path: Path, ctx: Context) -> dict[str, Any]:
    """The masks in the file: 2:4 in every masked layer by our checker and by polygraphy; else as many zeros at least.

    Raises:
        ExportError: the two disagree, or a masked layer lost its pattern.
    """
    from fusepress.export.sparsity import (
        check_sparsity_2to4,
        lost_zeros,
        masked_layers_2to4,
        polygraphy_sparse_layers,
    )
    from fusepress.pipeline.graph.masks import load_masks

    masks = load_masks(ctx.artifacts["masks"])
    report = check_sparsity_2to4(path)
    if not ctx.recipe.wants_2to4:
        zeros = {n: 1.0 - float(m.float().mean()) for n, m in masks.items() if n.endswith(".weight")}
        for param, share in lost_zeros(report, zeros).items():
            raise ExportError(
                f"expected {zeros[param]:.4f} of {param} to be zero; got {share:.4f} at {path.name}; the masks did not "
                "survive the export"
            )
        return report.to_dict()
    second = polygraphy_sparse_layers(path)
    if report.valid_weights != second:
        raise ExportError(
            f"expected our 2:4 checker and polygraphy to agree; got {len(report.valid_weights)} layers against "
            f"{len(second)} at {path.name}; the masks did not survive the export"
        )
    statuses = masked_layers_2to4(report, masks)
    lost = [param for param, status in statuses.items() if status == "dense"]
    if lost:
        raise ExportError(
            f"expected 2:4 in every masked layer; got {len(lost)} without it, {lost[0]} among them, at {path.name}; "
            "the masks did not survive the export"
        )
    return report.to_dict() | {
        "masked": len(masks),
        "masked_confirmed": sum(status == "valid" for status in statuses.values()),
        "masked_not_exported": [param for param, status in statuses.items() if status == "absent"],
        "polygraphy_layers": len(second),
    }
