"""verify: the released ONNX against the dense model, on accuracy, latency and failed sensors."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusepress.pipeline.corrupt import blank, check_failure, failing, watched
from fusepress.pipeline.distributed import is_main
from fusepress.pipeline.errors import FusepressError, RecipeError, TaskError
from fusepress.pipeline.evaluate import Evaluation, Predict, evaluate, torch_predict
from fusepress.pipeline.evidence import Kind, Measurement
from fusepress.pipeline.gates import Condition, Replicates, Stats, compare, save_replicates
from fusepress.pipeline.recipe import failure_parts
from fusepress.pipeline.stages import common
from fusepress.pipeline.stages.base import Context, StageOutput, key_parts
from fusepress.pipeline.stages.parts import predicted_parts
from fusepress.pipeline.store import KeyParts, atomic_write_bytes, sha256_file

logger = logging.getLogger(__name__)
REFERENCES = "references.safetensors"
HOST_MEASURE_SECONDS = 10.0
PICTURE_SAMPLES = 2
REFERENCE_SAMPLES = 2
MOST_STRATA = 32
CLEAN = ("", 0)
WORST = 3  # severity

Pairs = dict[tuple[str, int], tuple[Evaluation, Evaluation]]


def check_failures(ctx: Context) -> None:
    """Check what the recipe asks of failed sensors on the first eval batch, before anything is spent.

    Raises:
        UsageError: a gate's failure cannot act on the task's inputs, or there is no modality that could be dropped.
    """
    for failure, severity in _gated(ctx):
        check_failure(ctx.task, failure, severity)
    recipe = ctx.recipe
    scored = recipe.prune is not None and recipe.score.robustness > 0
    dropped = recipe.finetune is not None and recipe.finetune.modality_dropout > 0
    if (scored or dropped) and len(ctx.task.branches) < 2:
        raise RecipeError(
            f"expected several modalities for {'score.robustness' if scored else 'finetune.modality_dropout'}; got "
            f"{list(ctx.task.branches)}; remove it"
        )
    if scored:
        _check_blanks(ctx)


def _check_blanks(ctx: Context) -> None:
    """Scoring needs to know what a dead sensor gives; fine-tuning can silence a branch instead."""
    from fusepress.pipeline.task import cut_batch, first_batch

    sample = cut_batch(first_batch(ctx.task, "train"), 1)
    missing = [modality for modality in ctx.task.branches if blank(ctx.task, sample, modality) is None]
    if missing:
        raise TaskError(
            f"expected {ctx.task.name}.inputs_by_modality to name the inputs of {missing} for score.robustness; got "
            f'nothing; add for example inputs_by_modality = {{"{missing[0]}": {[next(iter(sample.inputs))]}}}'
        )


def _gated(ctx: Context) -> list[tuple[str, int]]:
    return [failure_parts(key, gate) for key, gate in ctx.recipe.gates.robustness.items()]


def _tried(ctx: Context) -> list[tuple[str, int]]:
    """Failures and severities: those that gates name, and those that every compressed model is looked at under."""
    gated = _gated(ctx)
    named = {failure for failure, _ in gated}
    return sorted([*gated, *((failure, WORST) for failure in watched(ctx.task) if failure not in named)])


def _tried_here(ctx: Context) -> list[tuple[str, int]]:
    """Those of `_tried` that can act on the task's samples; the log says why one that no gate names cannot."""
    gated, found = _gated(ctx), []
    for failure, severity in _tried(ctx):
        try:
            if (failure, severity) not in gated:  # what is wrong with those was said before the first stage
                check_failure(ctx.task, failure, severity)
            found.append((failure, severity))
        except FusepressError as error:
            logger.warning("robustness to %s is not looked at: %s", failure, error)
    return found


def _failures_key(tried: Sequence[tuple[str, int]]) -> dict[str, int | list[int]]:
    """Failure -> severity, or several."""
    levels: dict[str, list[int]] = {}
    for failure, severity in tried:
        levels.setdefault(failure, []).append(severity)
    return {failure: found[0] if len(found) == 1 else found for failure, found in levels.items()}


def _rows_of_strata(evaluation: Evaluation) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for row, label in enumerate(evaluation.strata):
        rows.setdefault(label, []).append(row)
    if len(rows) > MOST_STRATA:
        logger.warning("strata are not judged one by one: %d of them, more than %d", len(rows), MOST_STRATA)
        return {}
    return rows


def _check_paired(ctx: Context, dense: Evaluation, compressed: Evaluation) -> None:
    """Row i of both must be the same sample: the gates take what the two have in common out of the drop."""
    before, now = ([[str(name) for name in names] for names in (e.sample_ids, e.groups)] for e in (dense, compressed))
    if before == now:
        return
    ids = zip(before[0], now[0], strict=False)
    where = next((f"{one!r}, then {other!r}" for one, other in ids if one != other), "other groups or another number")
    raise TaskError(
        f"expected the same eval samples in the same order as when the dense model was evaluated; got {where} at "
        f"{ctx.task.source.spec}; make batches('eval', 0) give the same order every time"
    )


def _write_references(ctx: Context, predict: Predict, path: Path) -> None:
    """Inputs from the calib split and what the released ONNX makes of them, as `inputs/<name>`, `outputs/<name>`."""
    from safetensors.torch import save

    from fusepress.pipeline.task import cut_batch, first_batch

    inputs = cut_batch(first_batch(ctx.task, "calib"), REFERENCE_SAMPLES).inputs
    kinds = {"inputs": inputs, "outputs": predict(inputs)}
    tensors = {f"{kind}/{name}": t.contiguous().clone() for kind, named in kinds.items() for name, t in named.items()}
    atomic_write_bytes(path, save(tensors))


class Verify:
    """Collects the numbers that gates judge; it judges nothing itself."""

    name = "verify"
    version = 3
    every_rank = True

    def skip(self, ctx: Context) -> str | None:
        """Never: without it no gate has a number."""
        return None

    def key_parts(self, ctx: Context) -> KeyParts:
        """The released ONNX, the dense model, which failures are tried, and the evaluation data."""
        return key_parts(
            ctx,
            self,
            config={
                "replicates": ctx.recipe.verify.replicates,
                "failures": _failures_key(_tried(ctx)),
                "precision": ctx.final_precision,
                "seed": ctx.recipe.seed,
                "host": ctx.on_host,
            },
            inputs=("onnx", "dense_stats", "dense_weights", "dense_onnx"),
            splits=("calib", "eval"),
            tools=("torch", "onnxruntime-gpu", "numpy", "scipy"),
        )

    def run(self, ctx: Context, out: Path, work: Path) -> StageOutput:
        """Write replicates.npz, pictures, and inputs with the released outputs to check a copy by."""
        final = ctx.artifacts["onnx"]
        sha = sha256_file(final)
        session = common.onnx_session(ctx, final)

        def compressed(inputs: Any) -> Any:
            return session(inputs)

        dense = self._dense_predict(ctx)
        clean = common.evaluate_with_progress(ctx, compressed, 0.0, 0.3)
        dense_clean = common.load_stats(ctx.artifacts["dense_stats"], ctx.task.score)
        _check_paired(ctx, dense_clean, clean)
        pairs: Pairs = {CLEAN: (dense_clean, clean)}
        pairs |= self._failures(ctx, dense, compressed)
        constant = common.constant_metrics(ctx, dense) if len(pairs) > 1 else {}
        if not is_main():
            return StageOutput()  # what follows is for the files
        kind: Kind = "measured" if ctx.on_host else "simulated"
        measurements = common.accuracy_measurements(
            ctx, clean, runtime="onnxruntime-cpu", precision=ctx.final_precision, kind=kind, artifact_sha256=sha
        )
        measurements += self._robustness(ctx, pairs, kind, sha)
        ctx.reporter.update(0.85, "bootstrap")
        save_replicates(out / "replicates.npz", self._replicates(ctx, pairs, constant, sha))
        details: dict[str, Any] = {
            "pictures": self._pictures(ctx, dense, compressed, out),
            "failures": [f"{failure}.{severity}" for failure, severity in pairs if failure],
            "constant": constant,
        }
        _write_references(ctx, compressed, out / REFERENCES)
        artifacts = {"replicates": "replicates.npz", "references": REFERENCES}
        return StageOutput(measurements=measurements, details=details, artifacts=artifacts)

    @staticmethod
    def _dense_predict(ctx: Context) -> Predict:
        if ctx.from_onnx:
            session = common.onnx_session(ctx, ctx.artifacts["dense_onnx"])
            return lambda inputs: session(inputs)
        return torch_predict(ctx.task, common.dense_model(ctx))

    @staticmethod
    def _failures(ctx: Context, dense: Predict, compressed: Predict) -> Pairs:
        """Dense and compressed under each failure, on the same corrupted samples."""
        pairs: Pairs = {}
        tried = _tried_here(ctx)
        for index, (failure, severity) in enumerate(tried):
            ctx.reporter.update(0.3 + 0.4 * index / len(tried), f"failure {failure}@{severity}")
            pairs[failure, severity] = (
                evaluate(ctx.task, dense, "eval", corrupt=failing(ctx.task, failure, severity)),
                evaluate(ctx.task, compressed, "eval", corrupt=failing(ctx.task, failure, severity)),
            )
        return pairs

    @staticmethod
    def _robustness(ctx: Context, pairs: Pairs, kind: Kind, sha: str) -> list[Measurement]:
        rows: list[Measurement] = []
        for (failure, severity), (dense, compressed) in pairs.items():
            if not failure:
                continue
            name = f"robustness.{failure}.{severity}"
            rows += common.accuracy_measurements(
                ctx,
                compressed,
                runtime="onnxruntime-cpu",
                precision=ctx.final_precision,
                kind=kind,
                artifact_sha256=sha,
                prefix=name,
            )
            rows += common.accuracy_measurements(
                ctx, dense, runtime="torch", precision="fp32", kind="simulated", prefix=f"{name}.dense"
            )
        return rows

    def assess(self, ctx: Context, folder: Path) -> list[Measurement]:
        """Predicted for a target that is not here; here, measured, and interleaved with the dense model."""
        final, sha = ctx.artifacts["onnx"], ctx.shas["onnx"]
        if not ctx.on_host:
            whole = common.latency_measurements(ctx, final, ctx.final_precision, artifact_sha256=sha)
            return whole + predicted_parts(ctx, final, ctx.final_precision, sha, folder / "parts")
        from fusepress.targets.measure import measure_interleaved

        inputs = common.example_inputs(ctx)
        runs = {
            "dense": common.onnx_session(ctx, ctx.artifacts["dense_onnx"]).timed_callable(inputs),
            "compressed": common.onnx_session(ctx, final).timed_callable(inputs),
        }
        result = measure_interleaved(runs, max_seconds=HOST_MEASURE_SECONDS)
        rows = common.latency_result(
            result.runs["compressed"],
            device=ctx.profile.name,
            power_mode=ctx.power_mode,
            precision=ctx.final_precision,
            artifact_sha256=sha,
        )
        rows += common.latency_result(
            result.runs["dense"],
            device=ctx.profile.name,
            power_mode=ctx.power_mode,
            precision="fp32",
            artifact_sha256=ctx.shas["dense_onnx"],
            prefix="latency.dense",
        )
        speedup = result.speedup("dense", "compressed")
        rows.append(
            Measurement(
                name="latency.speedup",
                value=speedup.value,
                low=speedup.low,
                high=speedup.high,
                unit="x",
                n=result.runs["compressed"].n,
                kind="measured",
                device=ctx.profile.name,
                runtime="onnxruntime-cpu",
            )
        )
        return rows

    @staticmethod
    def _replicates(ctx: Context, pairs: Pairs, constant: dict[str, float], sha: str) -> Replicates:
        def condition(dense: Stats, compressed: Stats, groups: Sequence[str]) -> Condition:
            replicates, seed = ctx.recipe.verify.replicates, ctx.recipe.seed
            return compare(dense, compressed, ctx.task.score, groups, replicates=replicates, seed=seed)

        def stratum(rows: list[int]) -> Replicates:
            dense, compressed = ({name: a[rows] for name, a in e.stats.items()} for e in pairs[CLEAN])
            groups = [clean.groups[row] for row in rows]
            return Replicates(clean=condition(dense, compressed, groups), samples=len(rows), clusters=len(set(groups)))

        clean = pairs[CLEAN][1]  # the dense one's statistics were stored without strata
        return Replicates(
            clean=condition(pairs[CLEAN][0].stats, clean.stats, clean.groups),
            failures={
                where: condition(dense.stats, compressed.stats, dense.groups)
                for where, (dense, compressed) in pairs.items()
                if where != CLEAN
            },
            strata={label: stratum(rows) for label, rows in _rows_of_strata(clean).items()},
            constant=constant,
            samples=clean.n,
            clusters=len(set(clean.groups)),
            artifact_sha256=sha,
        )

    @staticmethod
    def _pictures(ctx: Context, dense: Predict, compressed: Predict, out: Path) -> list[dict[str, str]]:
        """What the task shows of its first eval samples, dense beside compressed."""
        if not ctx.task.offers("pictures"):
            return []
        from PIL import Image

        from fusepress.pipeline.task import cut_batch, first_batch

        shown = []
        batch = cut_batch(first_batch(ctx.task, "eval"), PICTURE_SAMPLES)
        before = {name: value.float().cpu() for name, value in dense(batch.inputs).items()}
        after = {name: value.float().cpu() for name, value in compressed(batch.inputs).items()}
        images = ctx.task.user.pictures(batch, ctx.task.as_user(before), ctx.task.as_user(after))
        for index, (title, image_HWC) in enumerate(images.items()):
            name = f"picture_{index:02d}.png"
            Image.fromarray(image_HWC).save(out / name)
            shown.append({"path": f"verify/{name}", "title": title})
        return shown
