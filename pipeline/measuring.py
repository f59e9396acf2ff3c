"""Measuring an ONNX file on this host, and judging it against plain budgets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusepress.pipeline.errors import UsageError
from fusepress.pipeline.evidence import GateVerdict, Measurement, Verdict
from fusepress.pipeline.store import sha256_file

BUDGETS = ("mean_ms", "p50_ms", "p99_ms")


def parse_budgets(budgets: Sequence[str]) -> dict[str, float]:
    """`p99_ms=5` as name and number.

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
        if name not in BUDGETS or not limit > 0:
            raise UsageError(
                f"expected a budget such as p99_ms=5, of {', '.join(BUDGETS)}, in milliseconds; got {budget!r}"
            )
        limits[name] = limit
    return limits


def measure_onnx(
    path: Path, device: str, power_mode: str | None, precision: str | None, seconds: float
) -> tuple[list[Measurement], dict[str, Any]]:
    """Latency of an ONNX file on ONNX Runtime CPU with made-up inputs of its own shapes, batch as in the file."""
    from fusepress.export.passes import made_up_batch
    from fusepress.export.runtime import OnnxSession
    from fusepress.pipeline.stages.common import latency_result
    from fusepress.targets.measure import measure_latency

    session = OnnxSession(path)
    result = measure_latency(session.timed_callable(made_up_batch(session).inputs), max_seconds=seconds)
    rows = latency_result(
        result, device=device, power_mode=power_mode, precision=precision, artifact_sha256=sha256_file(path)
    )
    return rows, dict(result.environment)


def budget_verdicts(measurements: Sequence[Measurement], limits: dict[str, float]) -> list[Verdict]:
    """One verdict a budget: PASS only where the whole 95 % interval lies within it."""
    verdicts = []
    for name, limit in limits.items():
        row = next(m for m in measurements if m.name == f"latency.{name}")
        verdict: GateVerdict = "INCONCLUSIVE"
        why = f"the 95 % interval {row.low} to {row.high} ms holds the limit; measure longer"
        if row.high is None:
            why = f"{row.n} runs give no upper bound for {name}; measure longer (--seconds)"
        elif row.high <= limit:
            verdict, why = "PASS", "the whole 95 % interval is within the limit"
        if row.low is not None and row.low > limit:
            verdict, why = "FAIL", "the whole 95 % interval is beyond the limit"
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
