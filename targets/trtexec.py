"""What trtexec prints and writes: banner, summary, warnings, errors, times of inferences, outputs.

Formats from samples/common/sampleReporting.cpp and trtexec.cpp of NVIDIA/TensorRT and from published logs of 8.2 to
11.2. Layers and profiles are read by `fusepress.export.inspector`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fusepress.pipeline.errors import MeasureError

Array = npt.NDArray[np.float64]
ERRORS_KEPT = 3

_NUMBER = r"-?\d+(?:\.\d*)?(?:[eE][+-]?\d+)?"
_BANNER = re.compile(r"&&&& \w+ TensorRT\.trtexec \[TensorRT v(?P<number>[\d.]{1,20})\](?: \[b(?P<build>\d+)\])?")
_END = re.compile(r"^&&&& (PASSED|FAILED) TensorRT\.trtexec", re.MULTILINE)
_LINE = re.compile(r"^\[[^\]]*\] \[(?P<level>[IWEV])\] ?(?P<text>.*)$")
_METRIC = re.compile(
    r"^(?P<name>Latency|End-to-End Host Latency|Enqueue Time|H2D Latency|GPU Compute Time|D2H Latency): (?P<rest>.*)$"
)
_VALUE = re.compile(r"(?P<key>min|max|mean|median|percentile\((?P<p>[\d.]+)%\)) = (?P<ms>" + _NUMBER + r"|inf) ms")
_THROUGHPUT = re.compile(r"^Throughput: (?P<qps>" + _NUMBER + r"|inf) qps")
_UNSTABLE = re.compile(r"GPU compute time is unstable, with coefficient of variance = (?P<percent>" + _NUMBER + r")%")
_PHRASES = re.compile(r"\b(Engine set up failed|Building engine failed|Parsing model failed|Inference set up failed)\b")
# trtexec prints what C++ streams make of these, which is no JSON
_NOT_A_NUMBER = re.compile(r"(?<![\w\"])(-?)(nan|inf)(?:\(\w*\))?(?![\w\"])", re.IGNORECASE)
# what newer versions leave out of the list of times, older ones list with the rest
_NEEDED = ("startComputeMs", "computeMs", "latencyMs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Banner:
    """The version that trtexec names: `version` as 10.3.0, `build` its number where it is printed."""

    version: str
    build: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrtexecLog:
    """One log.

    Attributes:
        banner: None where the log has no first line.
        passed: None where it has no last line: the program was stopped.
        metrics_ms: metric -> statistic (`min`, `mean`, `p99`, ...) -> milliseconds.
        throughput_qps: inferences a second, as trtexec counts.
        unstable_percent: the coefficient of variation that it warns of, None where it does not.
        warnings: its warnings about the measurement.
        errors: what it says went wrong, first causes first.
    """

    banner: Banner | None
    passed: bool | None
    metrics_ms: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    throughput_qps: float | None = None
    unstable_percent: float | None = None
    warnings: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()

    @property
    def reason(self) -> str:
        """Why it failed, in a line: causes before the phrases that every failure ends with."""
        causes = [line for line in self.errors if not _PHRASES.search(line)] or list(self.errors)
        if causes:
            return "; ".join(causes[:ERRORS_KEPT])
        return "no error was printed" if self.passed is not None else "its log ends in the middle"


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Milliseconds of each timed inference [N]: compute alone, and with the copies."""

    compute_ms: Array
    latency_ms: Array


def parse_banner(text: str) -> Banner | None:
    """The version in trtexec's first line: v8502 is 8.5.2, v100300 is 10.3.0; None where there is none."""
    match = _BANNER.search(text)
    if match is None:
        return None
    number = match["number"]
    if "." in number:
        return Banner(version=number, build=match["build"])
    value = int(number)
    parts = (value // 1000, value // 100 % 10, value % 100)
    if value >= 10_000:  # two digits for the minor version
        parts = (value // 10_000, value // 100 % 100, value % 100)
    return Banner(version=".".join(map(str, parts)), build=match["build"])


def parse_log(text: str) -> TrtexecLog:
    """Everything that a log of trtexec says; a log that was cut short gives what it has."""
    metrics: dict[str, dict[str, float]] = {}
    throughput = unstable = None
    warnings, errors = [], []
    for line in text.splitlines():
        found = _LINE.match(line)
        if found is None:
            continue
        level, said = found["level"], found["text"].strip()
        if level == "E":
            errors.append(said)
        elif level == "W" and said.startswith("* "):
            warnings.append(said.removeprefix("* "))
            match = _UNSTABLE.search(said)
            unstable = float(match["percent"]) if match else unstable
        elif level == "I":
            metric, rate = _METRIC.match(said), _THROUGHPUT.match(said)
            if metric:
                metrics[metric["name"]] = {
                    (f"p{v['p']}" if v["p"] else v["key"]): float(v["ms"]) for v in _VALUE.finditer(metric["rest"])
                }
            elif rate:
                throughput = float(rate["qps"])
    end = _END.findall(text)
    return TrtexecLog(
        banner=parse_banner(text),
        passed=end[-1] == "PASSED" if end else None,
        metrics_ms=metrics,
        throughput_qps=throughput,
        unstable_percent=unstable,
        warnings=tuple(warnings),
        errors=tuple(errors),
    )


def parse_times(text: str, *, warmup_ms: float = 0.0, where: str = "the times") -> Times:
    """Times of `--exportTimes`, in their order.

    Args:
        text: the file.
        warmup_ms: inferences that began earlier are left out; versions differ in whether they list them.
        where: named in an error.

    Raises:
        MeasureError: it is not such a file, or lists no inference after the warm-up.
    """
    advice = "measure again; the file is what trtexec --exportTimes writes"
    try:
        rows = json.loads(_plain(text))
    except (ValueError, RecursionError) as error:
        raise MeasureError(f"expected the times of inferences; got no JSON at {where} ({error}); {advice}") from error
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) and set(_NEEDED) <= set(row) for row in rows):
        raise MeasureError(f"expected rows with {', '.join(_NEEDED)}; got something else at {where}; {advice}")
    try:
        table = np.array([[float(row[name]) for name in _NEEDED] for row in rows]).reshape(-1, len(_NEEDED))
    except (TypeError, ValueError, OverflowError) as error:
        raise MeasureError(f"expected times in milliseconds; got {error} at {where}; {advice}") from error
    kept = table[table[:, 0] >= warmup_ms]
    if not len(kept):
        raise MeasureError(
            f"expected inferences after {warmup_ms:g} ms of warm-up; got none of {len(table)} at {where}; {advice}"
        )
    return Times(compute_ms=kept[:, 1], latency_ms=kept[:, 2])


def parse_outputs(text: str, *, where: str = "the outputs") -> dict[str, Array]:
    """Values of `--exportOutput` by name [elements]; nan and inf are kept.

    Raises:
        MeasureError: it is not such a file.
    """
    try:
        rows: Any = json.loads(_plain(text))
        return {str(row["name"]): np.asarray(row["values"], dtype=np.float64).reshape(-1) for row in rows}
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise MeasureError(
            f"expected outputs with names and values; got something else at {where} ({error}); run trtexec "
            "--exportOutput again"
        ) from error


def _plain(text: str) -> str:
    """JSON with the words that Python reads for what is no number."""
    return _NOT_A_NUMBER.sub(lambda m: "NaN" if m[2].lower() == "nan" else f"{m[1]}Infinity", text)
