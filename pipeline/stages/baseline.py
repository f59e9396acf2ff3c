"""baseline: the dense model as it came, judged on every figure that later stages are held against."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from fusepress.pipeline.distributed import is_main, on_main
from fusepress.pipeline.errors import CheckpointError
from fusepress.pipeline.evaluate import evaluate
from fusepress.pipeline.evidence import Measurement
from fusepress.pipeline.stages import common
from fusepress.pipeline.stages.base import Context, StageOutput, key_parts
from fusepress.pipeline.stages.export import require_buildable
from fusepress.pipeline.store import KeyParts, sha256_file

RANGE_SAMPLES = 16  # that FP16 ranges are checked on


class Baseline:
    """Loads (or trains) the dense checkpoint, evaluates it, exports it and finds its coupled channel groups."""

    name = "baseline"
    version = 1
    every_rank = True

    def skip(self, ctx: Context) -> str | None:
        """Never: every drop is against the dense model."""
        return None

    def key_parts(self, ctx: Context) -> KeyParts:
        """The checkpoint, the evaluation data and the target; the training data where the task trains it."""
        trains = ctx.checkpoint is None
        return key_parts(
            ctx,
            self,
            config={
                "checkpoint": ctx.checkpoint_sha256,
                "precision": common.stage_precision(ctx),
                "opset": [ctx.profile.opset, ctx.profile.opset_scatternd],
                "keep": sorted(ctx.recipe.prune.keep) if ctx.recipe.prune else [],
                "blocks": ctx.recipe.prune.blocks if ctx.recipe.prune else False,
                "seed": ctx.recipe.seed,
            },
            splits=("train", "calib", "eval") if trains else ("calib", "eval"),
            tools=("torch", "torch-pruning", "onnx", "onnxscript", "onnxruntime-gpu", "numpy"),
            trains=trains,
        )

    def run(self, ctx: Context, out: Path, work: Path) -> StageOutput:
        """Write dense weights, the dense ONNX (the artifact to fall back on), statistics and groups."""
        if ctx.from_onnx:
            return self._from_onnx(ctx, out)
        from fusepress.pipeline.graph.apply import load_checkpoint

        model = ctx.task.build_model()
        load_checkpoint(model, on_main(lambda: self._checkpoint(ctx, work)))
        model.eval()
        common.save_weights(model, out / "dense.safetensors")
        ctx.add_artifact("dense_weights", out / "dense.safetensors")
        accuracy, evaluation = common.torch_accuracy(ctx, model, 0.3, 0.6)
        common.save_stats(evaluation, out / "dense_stats.npz")
        inputs = common.example_inputs(ctx)
        measurements = [*accuracy, *common.cost_measurements(model, inputs)]
        ctx.reporter.update(0.6, "exporting the dense model")
        dense_onnx, details = self._export_dense(ctx, model, out, accuracy[0].value)
        ctx.reporter.update(0.85, "finding coupled channels")
        artifacts = {
            "dense_weights": "dense.safetensors",
            "dense_stats": "dense_stats.npz",
            "dense_onnx": dense_onnx.name,
        }
        if ctx.recipe.prune is not None and is_main():
            details["graph"] = self._groups(ctx, model, inputs, out)
            artifacts["groups"] = "groups.json"
        return StageOutput(measurements=measurements, details=details, artifacts=artifacts)

    def assess(self, ctx: Context, folder: Path) -> list[Measurement]:
        """Of the dense ONNX."""
        return common.latency_measurements(ctx, ctx.artifacts["dense_onnx"], common.stage_precision(ctx))

    def _checkpoint(self, ctx: Context, work: Path) -> Path:
        if ctx.checkpoint is not None:
            return ctx.checkpoint.resolve()
        ctx.reporter.line(
            f"      the checkpoint {ctx.recipe.checkpoint} is absent: {ctx.task.name}.train_dense trains it now"
        )
        path = work / "trained.safetensors"
        if not path.exists():
            aside = work / "training.safetensors"
            ctx.task.user.train_dense(aside, lambda fraction, note: ctx.reporter.update(0.3 * fraction, note))
            if not aside.exists():
                raise CheckpointError(
                    f"expected {ctx.task.name}.train_dense(path, progress) to write the checkpoint; got no file at "
                    "the path it was given; save the weights there as safetensors"
                )
            shutil.move(aside, path)
        return path.resolve()

    def _export_dense(self, ctx: Context, model: Any, out: Path, accuracy: float) -> tuple[Path, dict[str, Any]]:
        """The dense ONNX in the target's plain precision, with its own accuracy: it stays releasable."""
        from fusepress.export.runtime import OnnxSession

        final, sha = on_main(lambda: self._write_dense(ctx, model, out))
        session = OnnxSession(final)
        metrics = evaluate(ctx.task, lambda inputs: session(inputs), "eval").metrics
        details = {
            "dense_onnx": {
                "precision": common.stage_precision(ctx),
                "sha256": sha,
                "metric": ctx.task.primary,
                "value_onnx": metrics[ctx.task.primary],
                "value_torch": accuracy,
            }
        }
        return final, details

    @staticmethod
    def _write_dense(ctx: Context, model: Any, out: Path) -> tuple[Path, str]:
        """Its path, valid for every process while the stage runs, and its sha256."""
        fp32 = out / "dense.onnx"
        common.export_for_target(ctx, model, fp32)
        require_buildable(ctx, fp32)
        final = fp32
        if common.stage_precision(ctx) == "fp16":
            from fusepress.calib.dataset import calibration_arrays, choose_calibration
            from fusepress.export.precision import convert_fp16

            final = out / "dense_fp16.onnx"
            card = choose_calibration(ctx.task, RANGE_SAMPLES, ctx.recipe.seed)
            convert_fp16(fp32, final, arrays=calibration_arrays(ctx.task, card))
            fp32.unlink()
        return final.resolve(), sha256_file(final)

    def _groups(self, ctx: Context, model: Any, inputs: dict[str, Any], out: Path) -> dict[str, Any]:
        from fusepress.pipeline.graph.cost import CostModel
        from fusepress.pipeline.graph.files import save_graph
        from fusepress.pipeline.graph.groups import find_groups

        assert ctx.recipe.prune is not None
        keep = [*ctx.task.keep, *ctx.recipe.prune.keep]
        graph = find_groups(model, inputs, ctx.task.branches, keep, blocks=ctx.recipe.prune.blocks)
        save_graph(graph, out / "groups.json")
        cost = CostModel(graph, model, inputs)
        return {
            "groups": len(graph.groups),
            "channels": sum(group.width for group in graph.groups),
            "frozen": [{"module": frozen.module, "reason": frozen.reason} for frozen in graph.frozen],
            "branches": cost.branch_totals(),
        }

    def _from_onnx(self, ctx: Context, out: Path) -> StageOutput:
        """The recipe starts from an ONNX file: it is the dense model and the model to quantise."""
        from fusepress.export.runtime import OnnxSession

        assert ctx.checkpoint is not None
        shutil.copyfile(ctx.checkpoint, out / "dense.onnx")
        session = OnnxSession(out / "dense.onnx")
        evaluation = common.evaluate_with_progress(ctx, lambda inputs: session(inputs), 0.1, 0.8)
        common.save_stats(evaluation, out / "dense_stats.npz")
        sha = sha256_file(out / "dense.onnx")
        measurements: list[Measurement] = common.accuracy_measurements(
            ctx, evaluation, runtime="onnxruntime-cpu", precision="fp32", artifact_sha256=sha
        )
        artifacts = {"dense_stats": "dense_stats.npz", "dense_onnx": "dense.onnx", "onnx": "dense.onnx"}
        return StageOutput(measurements=measurements, artifacts=artifacts)
