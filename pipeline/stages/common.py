"""What several stages do alike: build the model of the moment, judge it, and time it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusepress.pipeline.distributed import gather_objects, is_main, rank, world
from fusepress.pipeline.errors import StoreError
from fusepress.pipeline.evaluate import Evaluation, Predict, evaluate, torch_predict
from fusepress.pipeline.evidence import UNSTABLE, Kind, Measurement
from fusepress.pipeline.gates import Replicates, compare, metric_intervals
from fusepress.pipeline.npz import load_npz
from fusepress.pipeline.stages.base import Context
from fusepress.pipeline.store import atomic_write_bytes
from fusepress.pipeline.task import Batch, first_batch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fusepress.export.onnx import ExportInfo
    from fusepress.export.runtime import OnnxSession
    from fusepress.targets.measure import LatencyMeasurement

STAGE_MEASURE_SECONDS = 2.0
INTERVAL_REPLICATES = 400


def dense_model(ctx: Context) -> nn.Module:
    """The dense model with its trained weights, in evaluation mode."""
    from fusepress.pipeline.graph.apply import load

    return load(ctx.task.build_model(), None, ctx.artifacts["dense_weights"]).eval()


def current_model(ctx: Context) -> nn.Module:
    """The model as the stages so far have left it, in evaluation mode."""
    from fusepress.pipeline.graph.apply import load

    weights = ctx.artifacts.get("weights", ctx.artifacts["dense_weights"])
    return load(ctx.task.build_model(), ctx.artifacts.get("plan"), weights).eval()


def example_inputs(ctx: Context) -> dict[str, Tensor]:
    """The inputs of one real sample (batch of 1), from the calib split."""
    return {name: value.clone() for name, value in first_batch(ctx.task, "calib", size=1).inputs.items()}


def output_names(ctx: Context, model: nn.Module) -> list[str]:
    """The ONNX output names: the keys of the model's dict, or `output`."""
    return list(torch_predict(ctx.task, model)(example_inputs(ctx)))


def save_weights(model: nn.Module, path: Path) -> None:
    """A model's parameters and buffers as safetensors."""
    from fusepress.pipeline.graph.apply import weights_bytes

    atomic_write_bytes(path, weights_bytes(model))


def evaluate_with_progress(ctx: Context, predict: Predict, begin: float, end: float, **options: Any) -> Evaluation:
    """`evaluate` on the eval split, told as the part of the stage between `begin` and `end`."""

    def tell(done: int) -> None:
        ctx.reporter.update(begin + (end - begin) * min(1.0, done / (done + 64)), f"evaluated {done} samples")

    return evaluate(ctx.task, predict, "eval", progress=tell, **options)


def save_stats(evaluation: Evaluation, path: Path) -> None:
    """Per-sample statistics as an npz without pickles."""
    arrays: dict[str, Any] = {f"stat/{name}": value for name, value in evaluation.stats.items()}
    np.savez(path, sample_ids=np.array(evaluation.sample_ids), groups=np.array(evaluation.groups), **arrays)


def load_stats(path: Path, score: Callable[[dict[str, Any]], dict[str, float]]) -> Evaluation:
    """The inverse of `save_stats`.

    Raises:
        StoreError: it is no such file.
    """
    stored = load_npz(path, "per-sample statistics")
    stats = {name.removeprefix("stat/"): array for name, array in stored.items() if name.startswith("stat/")}
    try:
        ids, groups = tuple(map(str, stored["sample_ids"])), tuple(map(str, stored["groups"]))
    except (KeyError, TypeError) as error:
        raise StoreError(
            f"expected sample_ids and groups among per-sample statistics; got {sorted(stored)} at {path}; run "
            "`fusepress compress` again"
        ) from error
    return Evaluation(stats=stats, sample_ids=ids, groups=groups, metrics=score(stats))


def accuracy_measurements(
    ctx: Context,
    evaluation: Evaluation,
    *,
    runtime: str,
    precision: str,
    kind: Kind = "simulated",
    artifact_sha256: str | None = None,
    prefix: str = "accuracy",
) -> list[Measurement]:
    """The task's metrics with 95 % bootstrap intervals, the primary one first."""
    intervals = metric_intervals(_replicates(ctx, evaluation)) if is_main() else {}  # only its figures are kept
    names = [ctx.task.primary, *(name for name in evaluation.metrics if name != ctx.task.primary)]
    return [
        Measurement(
            name=f"{prefix}.{name}",
            value=evaluation.metrics[name],
            low=intervals[name].low if name in intervals else None,
            high=intervals[name].high if name in intervals else None,
            n=evaluation.n,
            kind=kind,
            runtime=runtime,
            precision=precision,
            artifact_sha256=artifact_sha256,
            split="eval",
        )
        for name in names
    ]


def _replicates(ctx: Context, evaluation: Evaluation) -> Replicates:
    """A model against itself: only its own intervals are read."""
    stats = evaluation.stats
    condition = compare(
        stats, stats, ctx.task.score, evaluation.groups, replicates=INTERVAL_REPLICATES, seed=ctx.recipe.seed
    )
    return Replicates(clean=condition, samples=evaluation.n, clusters=len(set(evaluation.groups)))


def torch_accuracy(ctx: Context, model: nn.Module, begin: float, end: float) -> tuple[list[Measurement], Evaluation]:
    """Accuracy of a torch model on the eval split."""
    evaluation = evaluate_with_progress(ctx, torch_predict(ctx.task, model), begin, end)
    return accuracy_measurements(ctx, evaluation, runtime="torch", precision="fp32"), evaluation


def cost_measurements(model: nn.Module, inputs: dict[str, Tensor]) -> list[Measurement]:
    """Multiply-accumulates of one sample and parameters: counted, hence exact."""
    from fusepress.pipeline.graph.cost import count_macs, count_params

    return [
        Measurement(name="macs", value=float(count_macs(model, inputs)), unit="MAC", kind="measured", batch=1),
        Measurement(name="params", value=float(count_params(model)), unit="1", kind="measured"),
    ]


def stage_precision(ctx: Context) -> str:
    """The precision that a not yet quantised model of this run would be released in."""
    return "fp32" if ctx.on_host else "fp16"


def export_for_target(ctx: Context, model: nn.Module, path: Path) -> ExportInfo:
    """Export in the opset that the target reads, which can depend on the operators."""
    from fusepress.export.onnx import export_onnx

    inputs, names = example_inputs(ctx), output_names(ctx, model)
    info = export_onnx(model, inputs, names, path, opset=ctx.profile.opset)
    opset = ctx.profile.opset_for(set(info.ops))
    return info if opset == info.opset else export_onnx(model, inputs, names, path, opset=opset)


def probe_latency(ctx: Context, folder: Path) -> list[Measurement]:
    """Latency of the model as the stages so far have left it, on the target: from a quick ONNX of it."""
    from fusepress.pipeline.graph.probe import probe_onnx

    model = current_model(ctx)
    path = folder / "probe.onnx"
    path.write_bytes(probe_onnx(model, example_inputs(ctx), output_names(ctx, model)))
    try:
        return latency_measurements(ctx, path, stage_precision(ctx))
    finally:
        path.unlink()


def latency_measurements(
    ctx: Context,
    onnx_path: Path,
    precision: str,
    *,
    artifact_sha256: str | None = None,
    seconds: float = STAGE_MEASURE_SECONDS,
) -> list[Measurement]:
    """Mean latency on the target: measured where the target is this host, else predicted."""
    sha = artifact_sha256 or hashlib.sha256(onnx_path.read_bytes()).hexdigest()
    if ctx.on_host:
        return measured_latency(ctx, onnx_path, precision, artifact_sha256=sha, seconds=seconds)
    from fusepress.targets.predict import predict_latency

    prediction = predict_latency(onnx_path, ctx.profile, precision, mode=ctx.power_mode)
    return [
        Measurement(
            name="latency.mean_ms",
            value=prediction.latency_ms,
            low=prediction.low_ms,
            high=prediction.high_ms,
            unit="ms",
            kind="predicted",
            device=ctx.profile.name,
            power_mode=ctx.power_mode,
            runtime="roofline",
            precision=precision,
            artifact_sha256=sha,
            batch=1,
            extrapolating=prediction.extrapolating,
        )
    ]


def measured_latency(
    ctx: Context, onnx_path: Path, precision: str, *, artifact_sha256: str, seconds: float, prefix: str = "latency"
) -> list[Measurement]:
    """Latency of an ONNX file on this host, ONNX Runtime, batch 1."""
    from fusepress.targets.measure import measure_latency

    session = onnx_session(ctx, onnx_path)
    result = measure_latency(session.timed_callable(example_inputs(ctx)), max_seconds=seconds)
    return latency_result(
        result,
        device=ctx.profile.name,
        power_mode=ctx.power_mode,
        precision=precision,
        artifact_sha256=artifact_sha256,
        prefix=prefix,
    )


def onnx_session(ctx: Context, path: Path) -> OnnxSession:
    """The ONNX file as its target computes it: with integer kernels only where ONNX Runtime CPU is the target."""
    from fusepress.export.runtime import OnnxSession

    return OnnxSession(path, integer_kernels=ctx.on_host)


def latency_result(
    result: LatencyMeasurement,
    *,
    device: str,
    power_mode: str | None,
    precision: str | None,
    artifact_sha256: str,
    prefix: str = "latency",
    runtime: str = "onnxruntime-cpu",
    note: str | None = None,
    tails: bool = False,
) -> list[Measurement]:
    """A LatencyMeasurement as records; `tails` adds p90 and p99.9; without a `note`, an unstable one is noted."""
    unstable = None if result.stable else UNSTABLE + result.why_unstable
    rows: list[tuple[str, float, float, float | None]] = [
        ("mean_ms", result.mean_ms, result.mean_low_ms, result.mean_high_ms),
        ("p50_ms", result.p50_ms, result.p50_low_ms, result.p50_high_ms),
        ("p99_ms", result.p99_ms, result.p99_low_ms, result.p99_high_ms),
    ]
    if tails:
        rows.append(("p90_ms", result.p90_ms, result.p90_low_ms, result.p90_high_ms))
        rows.append(("p999_ms", result.p999_ms, result.p999_low_ms, result.p999_high_ms))
    return [
        Measurement(
            name=f"{prefix}.{name}",
            value=value,
            low=low,
            high=high if high is not None and np.isfinite(high) else None,
            n=result.n,
            unit="ms",
            kind="measured",
            device=device,
            power_mode=power_mode,
            runtime=runtime,
            precision=precision,
            artifact_sha256=artifact_sha256,
            batch=1,
            note=unstable if note is None else note,
        )
        for name, value, low, high in rows
    ]


def calib_batches(ctx: Context, count: int) -> list[Batch]:
    """The first batches of the calib split."""
    batches = []
    for index, batch in enumerate(ctx.task.batches("calib", 0)):
        if index >= count:
            break
        batches.append(batch)
    return batches


def constant_metrics(ctx: Context, dense: Predict) -> dict[str, float]:
    """What a prediction that sees no input reaches: the dense model's mean output over the calib split."""
    own: dict[str, Any] = {}
    seen = 0
    for batch in ctx.task.batches("calib", 0, rank=rank(), world=world()):
        for name, value in dense(batch.inputs).items():
            own[name] = own.get(name, 0.0) + value.double().sum(dim=0, keepdim=True)
        seen += batch.size
    parts = gather_objects((own, seen))
    count = sum(samples for _, samples in parts)
    mean = {name: (sum(part[name] for part, _ in parts if name in part) / count).float() for name in parts[0][0]}

    def constant(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        size = next(iter(inputs.values())).shape[0]
        return {name: value.expand(size, *value.shape[1:]) for name, value in mean.items()}

    return evaluate(ctx.task, constant, "eval").metrics
