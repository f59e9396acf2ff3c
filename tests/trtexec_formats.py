"""What trtexec prints and writes, by version: shortened logs that users published, and lists in the layout of
samples/common/sampleReporting.cpp. `log` puts figures of one's own into the layout of a version.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

# (number in the banner, build number where it is printed)
BANNERS = {"8.5": ("8502", ""), "10.3": ("100300", ""), "11.1": ("110100", " [b106]")}

LOG_8_2 = """\
&&&& RUNNING TensorRT.trtexec [TensorRT v8203] # trtexec --onnx=rpn.onnx
[03/24/2023-12:57:42] [I] === Performance summary ===
[03/24/2023-12:57:42] [I] Throughput: 424.281 qps
[03/24/2023-12:57:42] [I] Latency: min = 4.13727 ms, max = 4.20911 ms, mean = 4.1715 ms, median = 4.17139 ms, \
percentile(99%) = 4.20166 ms
[03/24/2023-12:57:42] [I] End-to-End Host Latency: min = 4.2 ms, max = 4.6 ms, mean = 4.4 ms, median = 4.4 ms, \
percentile(99%) = 4.5 ms
[03/24/2023-12:57:42] [I] GPU Compute Time: min = 2.33167 ms, max = 2.38287 ms, mean = 2.35166 ms, median = 2.35217 ms\
, percentile(99%) = 2.37775 ms
[03/24/2023-12:57:42] [I] Total Host Walltime: 3.00508 s
&&&& PASSED TensorRT.trtexec [TensorRT v8203] # trtexec --onnx=rpn.onnx
"""
LOG_8_6_UNSTABLE = """\
&&&& RUNNING TensorRT.trtexec [TensorRT v8601] # trtexec --onnx=/tmp/mnist-12.onnx
[01/24/2024-20:02:59] [I] === Performance summary ===
[01/24/2024-20:02:59] [I] GPU Compute Time: min = 0.0151367 ms, max = 0.348145 ms, mean = 0.0171428 ms, median = \
0.0166016 ms, percentile(90%) = 0.0174561 ms, percentile(95%) = 0.0183105 ms, percentile(99%) = 0.0256348 ms
[01/24/2024-20:02:59] [W] * Throughput may be bound by Enqueue Time rather than GPU Compute and the GPU may be \
under-utilized.
[01/24/2024-20:02:59] [W]   If not already in use, --useCudaGraph (utilize CUDA graphs where possible) may increase
[01/24/2024-20:02:59] [W] * GPU compute time is unstable, with coefficient of variance = 29.0605%.
[01/24/2024-20:02:59] [I] Explanations of the performance metrics are printed in the verbose logs.
&&&& PASSED TensorRT.trtexec [TensorRT v8601] # trtexec --onnx=/tmp/mnist-12.onnx
"""
LOG_10_3_FAILED = """\
&&&& RUNNING TensorRT.trtexec [TensorRT v100300] # /usr/src/tensorrt/bin/trtexec --onnx=/tmp/decoder.onnx
[04/27/2026-18:38:45] [E] Error[2]: [convBaseBuilder.cpp::createConvolution::259] Error Code 2: Internal Error \
(Assertion isOpConsistent(convolution.get()) failed. Cask convolution isConsistent check failed.)
[04/27/2026-18:38:45] [E] Engine could not be created from network
[04/27/2026-18:38:45] [E] Building engine failed
[04/27/2026-18:38:45] [E] Failed to create engine from model or file.
[04/27/2026-18:38:45] [E] Engine set up failed
&&&& FAILED TensorRT.trtexec [TensorRT v100300] # /usr/src/tensorrt/bin/trtexec --onnx=/tmp/decoder.onnx
"""
LOG_11_2_FAILED = """\
&&&& RUNNING TensorRT.trtexec [TensorRT v110201] [b3] # trtexec --onnx=model.onnx --stronglyTyped
[09/25/2026-10:00:02] [E] [TRT] ITensor::getDimensions: Error Code 4: API Usage Error (/Sub: ElementWiseOperation SUB \
must have same input types. But they are of types Half and Float.)
[09/25/2026-10:00:02] [E] Failed to parse onnx file
[09/25/2026-10:00:02] [E] Engine set up failed
&&&& FAILED TensorRT.trtexec [TensorRT v110201] [b3] # trtexec --onnx=model.onnx --stronglyTyped
"""


def banner(version: str, command: str = "trtexec --help") -> str:
    number, build = BANNERS[version]
    return f"&&&& RUNNING TensorRT.trtexec [TensorRT v{number}]{build} # {command}"


def log(version: str, compute_ms: Sequence[float], *, unstable: bool = False, passed: bool = True) -> str:
    """The log of a timed run."""
    values = np.sort(np.asarray(compute_ms))
    shown = ", ".join(
        f"{name} = {value:.6g} ms"
        for name, value in (
            ("min", values[0]),
            ("max", values[-1]),
            ("mean", values.mean()),
            ("median", np.median(values)),
            *((f"percentile({p}%)", percentile(values, p)) for p in (50, 90, 95, 99)),
        )
    )
    lines = [
        "[11/21/2026-10:00:00] [I] === Performance summary ===",
        f"[11/21/2026-10:00:00] [I] Throughput: {1000 / values.mean():.6g} qps",
        f"[11/21/2026-10:00:00] [I] Latency: {shown}",
        f"[11/21/2026-10:00:00] [I] GPU Compute Time: {shown}",
    ]
    if unstable:
        cov = 100 * values.std() / values.mean()
        lines.append(
            "[11/21/2026-10:00:00] [W] * GPU compute time is unstable, with coefficient of variance = " + f"{cov:.6g}%."
        )
    number, build = BANNERS[version]
    end = f"&&&& {'PASSED' if passed else 'FAILED'} TensorRT.trtexec [TensorRT v{number}]{build} # trtexec"
    return "\n".join([banner(version, "trtexec"), *lines, end, ""])


def percentile(values: np.ndarray, p: float) -> float:
    """By trtexec's own rule, without interpolation."""
    n = len(values)
    return float(np.sort(values)[max(n - 1 - int((1 - p / 100) * n), 0)])


def times(compute_ms: Sequence[float], *, copies_ms: float = 0.0, start_ms: float = 0.0, old: bool = False) -> str:
    """A list of times; `old` is the layout of 8.x, which has one key more."""
    rows, now = [], start_ms
    for value in compute_ms:
        keys = {
            "startEnqMs": now, "endEnqMs": now + 0.01, "startH2dMs": now, "endH2dMs": now + copies_ms / 2,
            "startComputeMs": now + copies_ms / 2, "endComputeMs": now + copies_ms / 2 + value,
            "startD2hMs": now + copies_ms / 2 + value, "endD2hMs": now + copies_ms + value,
            "h2dMs": copies_ms / 2, "computeMs": value, "d2hMs": copies_ms / 2, "latencyMs": value + copies_ms,
        }  # fmt: skip
        if old:
            keys["endToEndMs"] = value + copies_ms
        rows.append("{ " + ", ".join(f'"{key}" : {number:.9g}' for key, number in keys.items()) + " }")
        now += value + copies_ms
    return "[\n  " + "\n, ".join(rows) + "\n]\n"


def outputs(values: dict[str, Sequence[float]]) -> str:
    """A list of outputs, with what C++ prints for numbers that are none."""
    rows = [
        f'{{ "name" : "{name}"\n  , "dimensions" : "{len(row)}"\n  , "values" : [ '
        + ", ".join(repr(float(v)) for v in row)
        + " ]\n  }"
        for name, row in values.items()
    ]
    return "[\n  " + "\n, ".join(rows) + "\n]\n"


def layers(names: Sequence[str], version: str) -> str:
    """An engine's layers as `--exportLayerInfo` writes them."""
    key, tensors = ("I/O Tensors", [{"Name": "x"}]) if version.startswith("11") else ("Bindings", ["x"])
    return json.dumps({"Layers": [{"Name": name, "LayerType": "CaskConvolution"} for name in names], key: tensors})


def profile(rows: dict[str, float]) -> str:
    """Layers' times; names are not escaped there."""
    total = sum(rows.values())
    lines = [
        f', {{ "name" : "{name}", "timeMs" : {200 * ms:g}, "averageMs" : {ms:g}, "medianMs" : {ms:g}, '
        f'"percentage" : {100 * ms / total:g} }}'
        for name, ms in rows.items()
    ]
    return '[\n  { "count" : 200 }\n' + "\n".join(lines) + "\n]\n"
