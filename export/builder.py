"""The builder's side of export/engine.py: runs in a process of its own, with whichever TensorRT is named.

TensorRT 10, TensorRT 11 and TensorRT-RTX share one Python interface but for what was removed or added; what a library
can do is asked of its classes, never of its version. TensorRT-RTX was run for this project; the branches for TensorRT
10 and 11 were tried on a test double only: not executed by us.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusepress.export.onnx import load_onnx
from fusepress.export.timing_cache import TimingCacheFile
from fusepress.export.worker import answer, read_job, tell_progress
from fusepress.pipeline.errors import StoreError

TELL_EVERY_S = 0.1
_CAPABILITY = re.compile(r"SM\d+")
_DOTTED = re.compile(r"\d+\.\d+")
_BOARD = Path("/proc/device-tree/model")  # of a Jetson, whose nvidia-smi is missing or says less before JetPack 7
_BOARDS = {"Orin": "8.7", "Xavier": "7.2"}  # word of the model -> compute capability


def build(trt: Any, job: Mapping[str, Any]) -> dict[str, Any]:
    """Build an engine and describe what came of it, as JSON values.

    Args:
        trt: the library.
        job: runtime, onnx, out, capabilities, sparse, workspace_mib, shapes, dla_core, dla_memory_bytes, gpu_fallback,
            timing_cache_folder, power_mode; and `progress`, the file for `tell_progress`.

    Returns:
        `refused` (a reason), `unsupported` (GPUs), `parser_errors` or `failed` where there is no engine.
    """
    logger = _recorder(trt)
    builder = trt.Builder(logger)
    refusal = _refusal(trt, builder, job)
    if refusal is not None:
        return refusal
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(job["onnx"]):
        faults = _faults(parser, job["onnx"])
        return {"parser_errors": faults} if faults else {"failed": True, "errors": logger.errors}
    config = builder.create_builder_config()
    _configure(trt, builder, config, job)
    fallback: list[str] = []
    if job["dla_core"] is not None:
        fallback = _use_dla(trt, config, network, job)
        if fallback and not job["gpu_fallback"]:
            return {"fallback": fallback, "refused": "these layers do not run on the DLA: " + ", ".join(fallback)}
    cache = _timing_cache(trt, config, job)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        return {"failed": True, "errors": logger.errors}
    Path(job["out"]).write_bytes(plan)
    return {
        "version": trt.__version__,
        "warnings": logger.warnings,
        "capabilities": job["capabilities"] or gpu()["capability"],
        "fallback": fallback,
        "timing_cache": _keep_timings(config, cache),
        "inspector": _inspect(trt, logger, plan) if job["runtime"] == "tensorrt" else None,
    }


def _refusal(trt: Any, builder: Any, job: Mapping[str, Any]) -> dict[str, Any] | None:
    """What this library cannot do at all."""
    supported = _supported(trt)
    unsupported = [c for c in job["capabilities"] if c not in supported]
    if unsupported:
        return {"unsupported": unsupported, "supported": supported}
    if _strong_flag(trt) is None and hasattr(trt.BuilderFlag, "FP16"):
        return {"refused": f"version {trt.__version__} has no strong typing, so that it would choose precisions itself"}
    if job["sparse"] and not hasattr(trt.BuilderFlag, "SPARSE_WEIGHTS"):
        return {"refused": "this builder has no sparse kernels"}
    cores = int(getattr(builder, "num_DLA_cores", 0))
    if job["dla_core"] is not None and not 0 <= job["dla_core"] < cores:
        return {"refused": f"DLA core {job['dla_core']} was asked for and there are {cores} here"}
    return None


def _configure(trt: Any, builder: Any, config: Any, job: Mapping[str, Any]) -> None:
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if job["capabilities"]:
        config.num_compute_capabilities = len(job["capabilities"])
        for index, capability in enumerate(job["capabilities"]):
            config.set_compute_capability(getattr(trt.ComputeCapability, _enum_name(capability)), index)
    if job["sparse"]:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    if job["workspace_mib"] is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(job["workspace_mib"]) << 20)
    if job["shapes"]:
        profile = builder.create_optimization_profile()
        for name, (least, typical, most) in job["shapes"].items():
            profile.set_shape(name, tuple(least), tuple(typical), tuple(most))
        config.add_optimization_profile(profile)
    if hasattr(trt, "IProgressMonitor"):
        config.progress_monitor = _monitor(trt, job)


def _use_dla(trt: Any, config: Any, network: Any, job: Mapping[str, Any]) -> list[str]:
    """Put everything on a DLA core that runs there; returns the layers that do not."""
    config.default_device_type = trt.DeviceType.DLA
    config.DLA_core = job["dla_core"]
    for name, size in job["dla_memory_bytes"].items():
        config.set_memory_pool_limit(getattr(trt.MemoryPoolType, name), size)
    if job["gpu_fallback"]:
        config.set_flag(trt.BuilderFlag.GPU_FALLBACK)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    return [str(layer.name) for layer in layers if not config.can_run_on_DLA(layer)]


def _flags(job: Mapping[str, Any]) -> str:
    """What of the options timings hold for."""
    memory = "".join(f" {name}={size}" for name, size in job["dla_memory_bytes"].items())
    return f"sparse={job['sparse']} dla={job['dla_core']} workspace={job['workspace_mib']}{memory}"


# --- what it says ----------------------------------------------------------------------------------------------------


def _recorder(trt: Any) -> Any:
    class Recorder(trt.ILogger):  # type: ignore[misc]  # the library may not be there when types are checked
        """Writes everything to the log, and keeps errors and warnings."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            name = str(severity).rpartition(".")[2]
            print(f"[{name}] {message}", flush=True)  # noqa: T201  stdout is the worker's log
            if name in ("ERROR", "INTERNAL_ERROR"):
                self.errors.append(message)
            elif name == "WARNING":
                self.warnings.append(message.strip())

    return Recorder()


def _monitor(trt: Any, job: Mapping[str, Any]) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # as above
        """Turns the builder's nested phases into one fraction; called from several threads."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases = Phases()
            self.lock = threading.Lock()
            self.last = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._tell(lambda: self.phases.start(phase_name, parent_phase, num_steps))

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._tell(lambda: self.phases.step(phase_name, step))
            return True  # go on

        def phase_finish(self, phase_name: str) -> None:
            self._tell(lambda: self.phases.finish(phase_name))

        def _tell(self, change: Any) -> None:
            with self.lock:
                change()
                if time.monotonic() - self.last >= TELL_EVERY_S:
                    self.last = time.monotonic()
                    tell_progress(job, self.phases.fraction, self.phases.name)

    return Monitor()


class Phases:
    """Nested phases of steps as one fraction that never falls.

    A phase with a parent runs within one step of it.
    """

    def __init__(self) -> None:
        self._steps: dict[str, tuple[str | None, int, int]] = {}  # name -> parent, steps, steps done
        self._most = 0.0
        self.name = ""

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase begins."""
        self._steps[name] = (parent or None, max(1, steps), 0)
        self.name = name

    def step(self, name: str, step: int) -> None:
        """Step number `step`, from 0, is done."""
        if name in self._steps:
            parent, steps, _ = self._steps[name]
            self._steps[name] = (parent, steps, min(steps, step + 1))

    def finish(self, name: str) -> None:
        """A phase is over; its parent says that a step is done."""
        self._steps.pop(name, None)

    @property
    def fraction(self) -> float:
        """Of the outermost phase, in [0, 1]."""
        roots = [name for name, (parent, _, _) in self._steps.items() if parent not in self._steps]
        self._most = max([self._most, *(self._done(name) for name in roots)])
        return self._most

    def _done(self, name: str) -> float:
        _, steps, done = self._steps[name]
        inner = max((self._done(n) for n, (parent, _, _) in self._steps.items() if parent == name), default=0.0)
        return min(1.0, (done + inner) / steps)


def _faults(parser: Any, path: str) -> list[dict[str, str]]:
    """What the parser refused; it stops at the first failed assertion, so all its unknown operators are added."""
    found = {}
    for error in (parser.get_error(i) for i in range(parser.num_errors)):
        key = (error.node_operator(), error.node_name())
        found[key] = {"operator": key[0], "node": key[1], "description": error.desc().strip()}
    for node in load_onnx(Path(path)).graph.node:
        key = (node.op_type, node.name)
        if key not in found and not parser.supports_operator(node.op_type):
            found[key] = {"operator": key[0], "node": key[1], "description": ""}
    return list(found.values())


def _inspect(trt: Any, logger: Any, plan: Any) -> str | None:
    """The inspector's JSON; it needs the engine loaded, so a GPU."""
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        return None
    text: str = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return text


# --- what it remembers -----------------------------------------------------------------------------------------------


def _timing_cache(trt: Any, config: Any, job: Mapping[str, Any]) -> tuple[TimingCacheFile, str] | None:
    """Attach the cache of this library and device; a cache that it does not accept is started anew."""
    if job["timing_cache_folder"] is None or not hasattr(config, "create_timing_cache"):
        return None
    device = gpu()
    file = TimingCacheFile(
        folder=Path(job["timing_cache_folder"]),
        identity={
            "runtime": job["runtime"],
            "version": trt.__version__,
            "device": device["name"] if not job["capabilities"] else "ahead of time: " + " ".join(job["capabilities"]),
            "driver": device["driver"] if not job["capabilities"] else "none",
            "power_mode": str(job["power_mode"]),
            "flags": _flags(job),
        },
    )
    data, state = file.read()
    cache = config.create_timing_cache(data)
    if cache is None or not config.set_timing_cache(cache, False):
        state = "not accepted by the builder, so started anew"
        config.set_timing_cache(config.create_timing_cache(b""), False)
    return file, state


def _keep_timings(config: Any, cache: tuple[TimingCacheFile, str] | None) -> dict[str, Any] | None:
    if cache is None:
        return None
    file, state = cache
    kept = config.get_timing_cache()
    data = bytes(kept.serialize()) if kept is not None else b""
    try:
        sha256 = file.write(data)
    except StoreError as error:  # the engine is there: only the next build is slower
        return {"key": file.key, "state": f"{state}; not kept: {error}", "sha256": None, "size": len(data)}
    return {"key": file.key, "state": state, "sha256": sha256, "size": len(data)}


# --- what is here ----------------------------------------------------------------------------------------------------


def _strong_flag(trt: Any) -> Any:
    return getattr(getattr(trt, "NetworkDefinitionCreationFlag", None), "STRONGLY_TYPED", None)


def _network_flags(trt: Any) -> int:
    """Strong typing where it is a choice (TensorRT 10); from 11 on, and in TensorRT-RTX, there is no other."""
    flag = _strong_flag(trt)
    return 0 if flag is None else 1 << int(flag)


def _supported(trt: Any) -> list[str]:
    names = [n for n in dir(getattr(trt, "ComputeCapability", None)) if _CAPABILITY.fullmatch(n)]
    return sorted((f"{n[2:-1]}.{n[-1]}" for n in names), key=float)


def _enum_name(capability: str) -> str:
    return f"SM{capability.replace('.', '')}"


def gpu() -> dict[str, Any]:
    """Name, compute capability and driver of the GPU that this process would use.

    They come from the driver's tool, else from the device tree of a Jetson. Where there are GPUs of several models and
    nothing says which one CUDA takes first, the capability is left out: better none than another one's.
    """
    rows = _gpu_rows()
    row = _first_used(rows)
    board = _BOARD.read_text(errors="replace").strip("\0\n ") if _BOARD.is_file() else ""
    of_board = next((found for word, found in _BOARDS.items() if word in board), "")
    capability = row["capability"] if row else ""
    if not _DOTTED.fullmatch(capability):  # a Jetson's tool may not know
        capability = of_board
    told = row["name"] if row else ", ".join(sorted({r["name"] for r in rows}))
    return {
        "name": (board if of_board else told) or board or "unknown",
        "capability": [capability] if capability else [],
        "driver": row["driver"] if row else "unknown",
    }


def _gpu_rows() -> list[dict[str, str]]:
    tool = shutil.which("nvidia-smi")
    query = [tool or "", "--query-gpu=index,uuid,name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False) if tool else None
    except (OSError, subprocess.TimeoutExpired):
        done = None
    said = done.stdout if done is not None and done.returncode == 0 else ""
    fields = ("index", "uuid", "name", "capability", "driver")
    parts = [[part.strip() for part in line.split(",")] for line in said.splitlines()]
    return [dict(zip(fields, part, strict=True)) for part in parts if len(part) == len(fields)]


def _first_used(rows: Sequence[dict[str, str]]) -> dict[str, str] | None:
    """The GPU that CUDA numbers 0 in this process, None where that cannot be told."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        first = visible.partition(",")[0].strip()
        # numbers are in the tool's order only where CUDA is told so; else the fastest comes first
        by_bus = os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
        named = [r for r in rows if (first and r["uuid"].startswith(first)) or (by_bus and r["index"] == first)]
        if len(named) == 1:
            return named[0]
        if first in ("", "-1"):
            return None
    return rows[0] if len({(r["name"], r["capability"]) for r in rows}) == 1 else None


def _main() -> None:
    job = read_job()
    try:
        result = build(importlib.import_module(job["runtime"]), job)
    except OSError as error:
        result = {"os_error": [error.errno, error.strerror]}
    except MemoryError:
        result = {"out_of_memory": True}
    answer(job, result)


if __name__ == "__main__":
    _main()
