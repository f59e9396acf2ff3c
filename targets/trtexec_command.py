"""The arguments of trtexec, which mean different things on different versions of TensorRT.

Defaults changed between 10 and 11 (CUDA graph, copies, spin wait), so that the same line would measure something else.
Source: samples/common/sampleOptions.cpp of NVIDIA/TensorRT at release/8.5, release/10.3 and 11.1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from fusepress.pipeline.errors import ExportError, MeasureError

WARMUP_MS = 2000
BENCH_SECONDS = 10


def tensorrt_version(text: str) -> tuple[int, int]:
    """Major and minor of a version such as 10.3 or 8.5.2.

    Raises:
        ExportError: it is not one; it is written into scripts, so nothing else may pass.
    """
    match = re.fullmatch(r"(\d+)\.(\d+)[\w.+-]*", text)
    if match is None:
        raise ExportError(f"expected a TensorRT version such as 10.3; got {text!r}; see `dpkg -l | grep nvinfer` there")
    return int(match.group(1)), int(match.group(2))


def trtexec_build(
    onnx: str, plan: str, version: str, precision: str, *, sparse: bool, timing_cache: str = "timing.cache"
) -> list[str]:
    """The trtexec arguments that build an engine on a TensorRT version."""
    major = tensorrt_version(version)[0]
    arguments = [f"--onnx={onnx}", f"--saveEngine={plan}"]
    if major < 10:  # no strong typing: the flags allow precisions and the builder chooses among them
        arguments += {"fp32": [], "fp16": ["--fp16"], "int8": ["--fp16", "--int8"], "fp8": []}[precision]
    elif major == 10:
        arguments += ["--stronglyTyped", "--skipInference"]
    else:
        arguments += ["--skipInference"]
    arguments += [
        f"--sparsity={'enable' if sparse else 'disable'}",
        f"--timingCacheFile={timing_cache}",
        "--memPoolSize=workspace:2048",
        "--profilingVerbosity=detailed",
        f"--exportLayerInfo={Path(plan).stem}.layers.json",
        "--verbose",
    ]
    return arguments


def trtexec_bench(
    plan: str,
    version: str,
    *,
    seconds: int = BENCH_SECONDS,
    copies: bool = False,
    times: str | None = None,
    streams: int = 1,
) -> list[str]:
    """The trtexec arguments that time an engine with a CUDA graph, on any version.

    Args:
        plan: the engine.
        version: of TensorRT.
        seconds: how long, at least; also at least 1,000 inferences.
        copies: with the copies between host and device; else compute time alone.
        times: file for the time of each inference; named after the plan when None.
        streams: inferences that are under way at the same time.
    """
    several = "--infStreams" if tensorrt_version(version) >= (8, 6) else "--streams"
    modern = tensorrt_version(version)[0] >= 11  # there graph, no copies and spin wait are the defaults
    if modern:
        choice = ["--includeDataTransfers"] if copies else []
    else:
        choice = ["--useCudaGraph", *([] if copies else ["--noDataTransfers"]), "--useSpinWait", "--separateProfileRun"]
    return [
        f"--loadEngine={plan}",
        *choice,
        *([f"{several}={streams}"] if streams > 1 else []),
        f"--warmUp={WARMUP_MS}",
        f"--duration={seconds}",
        "--iterations=1000",
        "--avgRuns=100",
        "--percentile=50,90,95,99",
        f"--exportTimes={times or Path(plan).stem + '.times.json'}",
    ]


def trtexec_profile(plan: str, *, profile: str | None = None) -> list[str]:
    """The trtexec arguments that time every layer of an engine, in a run apart: a profiler slows the whole down."""
    return [
        f"--loadEngine={plan}",
        "--dumpProfile",
        "--separateProfileRun",
        "--iterations=200",
        f"--exportProfile={profile or Path(plan).stem + '.profile.json'}",
    ]


def trtexec_outputs(plan: str, feeds: Mapping[str, str], outputs: str) -> list[str]:
    """The trtexec arguments that run an engine once on given inputs and write what comes out.

    Args:
        plan: the engine.
        feeds: input name -> raw little-endian file.
        outputs: JSON file to write.

    Raises:
        MeasureError: a name holds a comma or a colon, which trtexec cannot tell from its separators.
    """
    for name in feeds:
        if re.search(r"[,:]", name):
            raise MeasureError(
                f"expected input names without ',' and ':'; got {name!r}; trtexec cannot load it by that name: rename "
                "the input in the task"
            )
    return [
        f"--loadEngine={plan}",
        "--loadInputs=" + ",".join(f"{name}:{file}" for name, file in feeds.items()),
        f"--exportOutput={outputs}",
        "--warmUp=0",
        "--duration=0",
        "--iterations=1",
    ]
