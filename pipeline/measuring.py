"""Measuring an ONNX file on this host, and judging figures against plain budgets."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fusepress.pipeline.errors import UsageError
from fusepress.pipeline.evidence import UNSTABLE, GateVerdict, Measurement, Verdict
from fusepress.pipeline.store import sha256_file
from fusepress.targets.host import gpu_name
from fusepress.targets.latency import THROUGHPUT

STATISTICS = ("mean_ms", "p50_ms", "p90_ms", "p99_ms", "p999_ms")
MISS_RATE = "miss_rate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """Work that arrives at a constant rate, such as a sensor's frames, and when its result is of no use any more."""

    rate_hz: float
    deadline_ms: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSettings:
    """What an ONNX file is run on here.

    Attributes:
        runtime: provider of ONNX Runtime.
        streams: inferences at the same time, for the throughput; 1 to leave it out.
    """

    runtime: Literal["cpu", "cuda"] = "cpu"
    streams: int = 1

    def __post_init__(self) -> None:
        """Refuse streams that are none.

        Raises:
            UsageError: fewer than one.
        """
        check_streams(self.streams)


def check_streams(streams: int) -> int:
    """The number as it is, if it is one of streams.

    Raises:
        UsageError: fewer than one.
    """
    if streams < 1:
        raise UsageError(f"expected at least one stream; got {streams}; raise --streams, or leave it out")
    return streams


def parse_budgets(budgets: Sequence[str]) -> dict[str, float]:
    """`p99_ms=5` as name and number; `camera.mean_ms=6` limits a part, `miss_rate=0.001` late arrivals.

    Raises:
        UsageError: an unknown statistic, or not a positive number.
    """
    limits = {}
    for budget in budgets:
        name, _, text = budget.partition("=")
        try:
            limit = float(text)
        except ValueError:
            limit = -1.0
        if (name.rpartition(".")[2] not in STATISTICS and name != MISS_RATE) or not limit > 0:
            raise UsageError(
                f"expected a budget such as p99_ms=5 or camera.mean_ms=6, of {', '.join(STATISTICS)} in milliseconds, "
                f"or {MISS_RATE}=0.001; got {budget!r}"
            )
        limits[name] = limit
    return limits


def measure_onnx(
    path: Path,
    device: str,
    power_mode: str | None,
    precision: str | None,
    seconds: float,
    arrivals: Arrivals | None = None,
    host: HostSettings | None = None,
) -> tuple[list[Measurement], dict[str, Any]]:
    """Latency of an ONNX file on ONNX Runtime with made-up inputs of its own shapes, batch as in the file.

    On the CUDA provider, without copies, `device` is replaced by what the GPU is called: such a figure is no target's,
    whose engines are TensorRT's.
    """
    from fusepress.pipeline.stages.common import latency_result
    from fusepress.targets.measure import measure_latency

    host = host or HostSettings()
    run = _worker(path, host, None)
    common: dict[str, Any] = {
        "device": device if host.runtime == "cpu" else gpu_name() or "a GPU of this machine",
        "power_mode": power_mode if host.runtime == "cpu" else None,
        "precision": precision,
        "artifact_sha256": sha256_file(path),
        "runtime": f"onnxruntime-{host.runtime}",
    }
    result = measure_latency(run, max_seconds=seconds)
    rows = latency_result(result, tails=True, **common)
    if arrivals is not None:
        rows += _arrival_rows(run, arrivals, seconds, common)
    if host.streams > 1:
        rows += _throughput_rows(path, host, seconds, common)
    return rows, dict(result.environment)


def _worker(path: Path, host: HostSettings, threads: int | None) -> Callable[[], object]:
    """One inference as a callable, with a session of its own."""
    from fusepress.export.passes import made_up_batch
    from fusepress.export.runtime import OnnxSession
    from fusepress.export.runtime_cuda import CudaSession

    session = OnnxSession(path, threads) if host.runtime == "cpu" else CudaSession(path)
    return session.timed_callable(made_up_batch(session).inputs)


def _arrival_rows(
    run: Callable[[], object], arrivals: Arrivals, seconds: float, common: dict[str, Any]
) -> list[Measurement]:
    from fusepress.pipeline.stages.common import latency_result
    from fusepress.targets.measure import measure_arrivals

    found = measure_arrivals(run, arrivals.rate_hz, deadline_ms=arrivals.deadline_ms, max_seconds=seconds)
    rows = latency_result(found.latency, prefix="latency.arrivals", tails=True, **common)
    if found.missed is not None:
        value, low, high = found.missed
        note = None if found.kept_up else f"the queue grows: work comes faster than it ends at {found.rate_hz:g} Hz"
        rows.append(
            Measurement(
                name=f"latency.{MISS_RATE}", value=value, low=low, high=high, n=found.latency.n, unit="1",
                kind="measured", batch=1, note=note, **common,
            )
        )  # fmt: skip
    return rows


def _throughput_rows(path: Path, host: HostSettings, seconds: float, common: dict[str, Any]) -> list[Measurement]:
    """Of as many sessions as streams, which share the cores."""
    from fusepress.pipeline.stages.common import latency_result
    from fusepress.targets.measure import measure_throughput, usable_cores

    threads = max(1, usable_cores() // host.streams)
    found = measure_throughput([_worker(path, host, threads) for _ in range(host.streams)], max_seconds=seconds)
    value, low, high = found.per_second
    note = f"{host.streams} sessions at once" + (f" of {threads} threads each" if host.runtime == "cpu" else "")
    if not found.latency.stable:
        note = f"{UNSTABLE}{found.latency.why_unstable}; {note}"
    whole = Measurement(
        name=THROUGHPUT, value=value, low=low, high=high, n=found.latency.n, unit="1/s", kind="measured", batch=1,
        note=note, **common,
    )  # fmt: skip
    return [whole, *latency_result(found.latency, prefix="latency.streams", **common)]


def measure_parts(
    path: Path,
    branches: Mapping[str, Sequence[str]],
    device: str,
    power_mode: str | None,
    precision: str | None,
    seconds: float,
) -> list[Measurement]:
    """Mean latency of each branch and of the rest as files of their own, in turns, on ONNX Runtime CPU.

    Raises:
        ExportError: the branches exchange tensors midway.
    """
    from fusepress.export.branches import split_branches
    from fusepress.export.passes import made_up_batch
    from fusepress.export.runtime import OnnxSession
    from fusepress.pipeline.stages.common import latency_result
    from fusepress.pipeline.stages.parts import renamed
    from fusepress.targets.measure import measure_interleaved

    sha256 = sha256_file(path)
    with tempfile.TemporaryDirectory(prefix="fusepress-") as folder:
        sessions = {name: OnnxSession(part) for name, part in split_branches(path, branches, Path(folder)).items()}
        runs = {name: session.timed_callable(made_up_batch(session).inputs) for name, session in sessions.items()}
        result = measure_interleaved(runs, max_seconds=seconds)
    rows = []
    for name, found in result.runs.items():
        mean = latency_result(found, device=device, power_mode=power_mode, precision=precision, artifact_sha256=sha256)[
            0
        ]
        rows.append(renamed(mean, name, sha256))
    return rows


def budget_verdicts(measurements: Sequence[Measurement], limits: dict[str, float]) -> list[Verdict]:
    """One verdict a budget: PASS only where the whole 95 % interval lies within it, of figures that can be trusted.

    Raises:
        UsageError: nothing of that name was measured.
    """
    verdicts = []
    for name, limit in limits.items():
        row = next((m for m in measurements if m.name == f"latency.{name}"), None)
        if row is None:
            known = ", ".join(m.name.removeprefix("latency.") for m in measurements if m.name.startswith("latency."))
            raise UsageError(f"expected a budget of what was measured: {known}; got {name!r}; name one of these")
        verdict, why = _judge(row, name, limit)
        verdicts.append(
            Verdict(
                gate=f"latency.{name}",
                verdict=verdict,
                limit=limit,
                value=row.value,
                low=row.low,
                high=row.high,
                why=why + (f" ({row.note})" if row.note else ""),
            )
        )
    return verdicts


def _judge(row: Measurement, name: str, limit: float) -> tuple[GateVerdict, str]:
    if row.note is not None and UNSTABLE in row.note:
        return "INCONCLUSIVE", "the figures cannot be trusted: end other work, let the clocks settle, and measure again"
    if row.low is not None and row.low > limit:
        return "FAIL", "the whole 95 % interval is beyond the limit"
    if row.high is None:
        return "INCONCLUSIVE", f"{row.n} runs give no upper bound for {name}; measure longer (--seconds)"
    if row.high <= limit:
        return "PASS", "the whole 95 % interval is within the limit"
    return "INCONCLUSIVE", f"the 95 % interval {row.low} to {row.high} holds the limit; measure longer"
