"""Engines: TensorRT-RTX ahead of time without a GPU, TensorRT 10 and 11 where one is installed beside a GPU.

The builder (export/builder.py) runs in a process of its own, for it may crash, run out of memory or of time, and what
it says is recorded there. An engine is built, not executed: nothing here says anything about its latency. Source:
TensorRT-RTX 1.7 Python API; behaviour without a GPU as run for this project. Building with TensorRT 10 and 11 was not
executed by us: its branches were tried on a test double.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusepress.export.inspector import EngineLayer, parse_inspection, parse_layers
from fusepress.export.onnx import graph_inputs, load_onnx
from fusepress.export.worker import TAIL_LINES, Outcome, Progress, run_job
from fusepress.pipeline.errors import BuildError, TargetError
from fusepress.pipeline.store import atomic_write_text, disk_error, sha256_file
from fusepress.targets.operators import ADVICE, DEFAULT_ADVICE

TIMEOUT_S = 1200.0
MIN_PLAN_BYTES = 1024  # a plan of even one layer is larger
MIN_POOL_BYTES = 4096  # of an accelerator's memory
BUILDER = "fusepress.export.builder"
_OUT_OF_MEMORY = re.compile(
    r"bad_alloc|MemoryError|out of ?memory|Cannot allocate memory|failed to map segment", re.IGNORECASE
)
_TYPES_WITHOUT_HARDWARE = re.compile(r"HW-specific datatypes: (?P<types>[\w, ]+)")
_GPU_FILES = ("/dev/nvidia0", "/dev/nvhost-gpu", "/dev/nvmap")  # the last two on Jetson, which may lack nvidia-smi


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeRange:
    """Least, typical and largest shape of an input with dynamic dimensions; kernels are chosen for the typical one."""

    least: tuple[int, ...]
    typical: tuple[int, ...]
    most: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DlaMemory:
    """Upper bounds of what each part of a network on a deep-learning accelerator takes; None leaves TensorRT's own.

    Each is a power of two of at least 4 KiB (TensorRT's documentation on DLA memory pools). They hold for every part
    by itself: a network that is cut into many takes the sum.

    Attributes:
        sram_kib: managed SRAM, a cache; 1 MiB a core on Orin.
        local_dram_mib: tensors between operations.
        global_dram_mib: weights.
    """

    sram_kib: int | None = None
    local_dram_mib: int | None = None
    global_dram_mib: int | None = None

    def pools(self) -> dict[str, int]:
        """Name of TensorRT's pool -> bytes, of those that are bounded."""
        sizes = {
            "DLA_MANAGED_SRAM": (self.sram_kib, 10),
            "DLA_LOCAL_DRAM": (self.local_dram_mib, 20),
            "DLA_GLOBAL_DRAM": (self.global_dram_mib, 20),
        }
        return {name: size << shift for name, (size, shift) in sizes.items() if size is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """What is asked of a builder; precisions are not, the file carries them.

    Attributes:
        sparse: allow sparse kernels.
        workspace_mib: most scratch memory of a kernel; None leaves it to the builder.
        shapes: input -> range, for every input with a dynamic dimension.
        dla_core: put what it can on this deep-learning accelerator.
        gpu_fallback: let the GPU run what the accelerator cannot; otherwise such a layer is an error.
        dla_memory: bounds of the accelerator's memory.
        timing_cache_folder: where timings are kept between builds; None keeps none.
        power_mode: mode of the device, part of what timings hold for.
        timeout_s: seconds after which the builder is killed.
        memory_limit: bytes that the builder may use.
    """

    sparse: bool = False
    workspace_mib: int | None = None
    shapes: Mapping[str, ShapeRange] = field(default_factory=dict)
    dla_core: int | None = None
    gpu_fallback: bool = True
    dla_memory: DlaMemory = DlaMemory()
    timing_cache_folder: Path | None = None
    power_mode: str | None = None
    timeout_s: float = TIMEOUT_S
    memory_limit: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """What shapes the engine, as plain JSON values."""
        shapes = {n: [list(r.least), list(r.typical), list(r.most)] for n, r in self.shapes.items()}
        return {
            "sparse": self.sparse,
            "workspace_mib": self.workspace_mib,
            "shapes": shapes,
            "dla_core": self.dla_core,
            "dla_memory_bytes": self.dla_memory.pools(),
            "power_mode": self.power_mode,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """An engine that was built.

    Attributes:
        path: the plan.
        sha256: of the plan.
        size: bytes of the plan.
        runtime: tensorrt_rtx or tensorrt.
        runtime_version: of the library that built it.
        compute_capabilities: GPUs that it was built for.
        layers: from the builder's own list; empty where it gave none.
        warnings: what the builder warned about.
        log_path: everything it said.
        seconds: how long it took.
        options: what was asked of the builder.
        fallback: layers that the DLA leaves to the GPU.
        timing_cache: key, state and sha256 of the timings that it used and left.
        layers_path: the inspector's JSON, where the engine could be loaded.
        executed: whether the engine ran; building does not run it.
    """

    path: Path
    sha256: str
    size: int
    runtime: str
    runtime_version: str
    compute_capabilities: tuple[str, ...]
    layers: tuple[EngineLayer, ...]
    warnings: tuple[str, ...]
    log_path: Path
    seconds: float
    options: BuildOptions
    fallback: tuple[str, ...] = ()
    timing_cache: Mapping[str, Any] | None = None
    layers_path: Path | None = None
    executed: bool = False

    def precisions(self) -> dict[str, int]:
        """Precision -> number of layers with weights that compute in it."""
        return dict(sorted(Counter(e.precision for e in self.layers if e.computes).items()))

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, without times and paths."""
        shown = {
            "sha256": self.sha256,
            "size": self.size,
            "runtime": self.runtime,
            "runtime_version": self.runtime_version,
            "compute_capabilities": list(self.compute_capabilities),
            "executed": self.executed,
            "precisions": self.precisions(),
            "warnings": list(self.warnings),
            "layers": [
                {"name": e.name, "type": e.type, "precision": e.precision, "nodes": list(e.nodes)} for e in self.layers
            ],
        }
        asked = self.options.to_dict() | {
            "fallback": list(self.fallback),
            "timing_cache": dict(self.timing_cache or {}),
        }
        return shown | {name: value for name, value in asked.items() if value not in (None, False, {}, [])}


def build_rtx_engine(
    onnx_path: Path,
    out_path: Path,
    *,
    compute_capabilities: Sequence[str],
    options: BuildOptions | None = None,
    progress: Progress | None = None,
) -> EngineInfo:
    """Build a TensorRT-RTX engine ahead of time; it needs no GPU, and runs nothing.

    Args:
        onnx_path: the model; its file decides every precision.
        out_path: the plan; the builder's log goes beside it with the suffix `.log`.
        compute_capabilities: GPUs to build for, as "8.9" (or "89", "sm_89").
        options: shapes and limits. With `sparse` TensorRT-RTX builds the same bytes.
        progress: called with a fraction and the builder's phase.

    Raises:
        TargetError: TensorRT-RTX does not build for one of these GPUs.
        BuildError: it is not installed, refuses the model (every operator is listed with advice), crashes, or runs
            out of time, memory or disk; or the options do not fit the model.
    """
    wanted = [_dotted(text) for text in compute_capabilities]
    if not wanted:
        raise TargetError("expected at least one compute capability; got none; name the GPU's, e.g. 8.9")
    if importlib.util.find_spec("tensorrt_rtx") is None:
        raise BuildError("expected TensorRT-RTX; got no Python package tensorrt_rtx; pip install tensorrt-rtx (x86-64)")
    return _build("tensorrt_rtx", onnx_path, out_path, wanted, options or BuildOptions(), progress)


def why_no_tensorrt() -> str | None:
    """Why TensorRT proper cannot build here, or None where it can be tried."""
    if importlib.util.find_spec("tensorrt") is None:
        return "the Python package tensorrt is not installed"
    if shutil.which("nvidia-smi") or any(Path(name).exists() for name in _GPU_FILES):
        return None
    return "there is no NVIDIA GPU here"


def build_tensorrt_engine(
    onnx_path: Path, out_path: Path, *, options: BuildOptions | None = None, progress: Progress | None = None
) -> EngineInfo:
    """Build a TensorRT 10 or 11 engine for the GPU of this machine, strongly typed. Not executed by us.

    Args:
        onnx_path: the model; its file decides every precision.
        out_path: the plan; the log goes beside it, and the inspector's JSON with the suffix `.layers.json`.
        options: sparse kernels, shapes, accelerator, timing cache and limits.
        progress: called with a fraction and the builder's phase.

    Raises:
        BuildError: there is no TensorRT or no GPU (nothing was tried), or as `build_rtx_engine`.
    """
    why = why_no_tensorrt()
    if why is not None:
        raise BuildError(
            f"expected TensorRT and a GPU to build an engine; got neither tried nor built: {why}; run the build kit on "
            "the device, or take a desktop target that TensorRT-RTX builds for"
        )
    return _build("tensorrt", onnx_path, out_path, [], options or BuildOptions(), progress)


def check_plan(path: Path, *, sha256: str, size: int) -> None:
    """Compare a plan with what was built: without a GPU neither the header nor a deserialisation tells.

    Raises:
        BuildError: the file is missing, has another length, or other bytes.
    """
    found = path.stat().st_size if path.is_file() else None
    if found != size or sha256_file(path) != sha256:
        state = "no file" if found is None else f"{found} bytes" if found != size else "other bytes of that length"
        raise BuildError(
            f"expected a plan of {size} bytes with sha256 {sha256[:12]}; got {state} at {path}; build again"
        )


def _dotted(text: str) -> str:
    match = re.fullmatch(r"(?:sm_?)?(\d+)\.?(\d)", str(text).strip(), re.IGNORECASE)
    if match is None:
        raise TargetError(f"expected a compute capability such as 8.9; got {text!r}; take the GPU's from its profile")
    return f"{match.group(1)}.{match.group(2)}"


def _build(
    runtime: str,
    onnx_path: Path,
    out_path: Path,
    capabilities: list[str],
    options: BuildOptions,
    progress: Progress | None,
) -> EngineInfo:
    proto = load_onnx(onnx_path)
    _check_shapes(proto, options.shapes, onnx_path)
    _check_dla(options, onnx_path)
    log_path = out_path.with_suffix(".log")
    # beside its place, so that the finished plan need not cross file systems
    aside = out_path.with_name(f".{out_path.name}.{os.getpid()}")
    seen = (0.0, "")

    def note(fraction: float, phase: str) -> None:
        nonlocal seen
        seen = (fraction, phase)
        if progress is not None:
            progress(fraction, phase)

    try:
        out_path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="fusepress-") as name:
            log = Path(name) / "log"
            job = _job(runtime, onnx_path, aside, capabilities, options)
            outcome, result = run_job(BUILDER, job, log=log, timeout_s=options.timeout_s, progress=note)
            text = log.read_text(errors="replace")
            atomic_write_text(log_path, text)
        if result is None:
            raise _silence(outcome, onnx_path, log_path, options, seen)
        _refuse(result, proto, onnx_path, log_path, options)
        size = aside.stat().st_size
        if size < MIN_PLAN_BYTES:
            raise BuildError(f"expected a plan; got {size} bytes at {onnx_path}; see {log_path}")
        aside.replace(out_path)
    except OSError as error:
        raise disk_error(error, out_path) from error
    finally:
        aside.unlink(missing_ok=True)
    layers, layers_path = _layers(result, text, out_path)
    info = EngineInfo(
        path=out_path,
        sha256=sha256_file(out_path),
        size=size,
        runtime=runtime,
        runtime_version=str(result["version"]),
        compute_capabilities=tuple(result["capabilities"]),
        layers=layers,
        warnings=tuple(dict.fromkeys(result["warnings"])),
        log_path=log_path,
        seconds=outcome.seconds,
        options=options,
        fallback=tuple(result["fallback"]),
        timing_cache=result["timing_cache"],
        layers_path=layers_path,
    )
    check_plan(out_path, sha256=info.sha256, size=info.size)
    return info


def _job(runtime: str, onnx_path: Path, plan: Path, capabilities: list[str], options: BuildOptions) -> dict[str, Any]:
    """What the worker is told, as JSON values."""
    folder = options.timing_cache_folder
    return options.to_dict() | {
        "runtime": runtime,
        "onnx": str(Path(onnx_path).resolve()),
        "out": str(plan.resolve()),
        "capabilities": capabilities,
        "gpu_fallback": options.gpu_fallback,
        "timing_cache_folder": None if folder is None else str(folder.resolve()),
        "memory_limit": options.memory_limit,
    }


def _layers(result: Mapping[str, Any], log: str, out_path: Path) -> tuple[tuple[EngineLayer, ...], Path | None]:
    """From the inspector where it was asked, else from the log."""
    if result["inspector"] is None:
        return parse_layers(log), None
    path = out_path.with_suffix(".layers.json")
    atomic_write_text(path, result["inspector"])
    return parse_inspection(result["inspector"], where=str(path)).layers, path


def _check_shapes(proto: Any, shapes: Mapping[str, ShapeRange], onnx_path: Path) -> None:
    """Every dynamic input has a range, and every range fits its input."""
    inputs = {v.name: [d.dim_value or None for d in v.type.tensor_type.shape.dim] for v in graph_inputs(proto)}
    strange = sorted(set(shapes) - set(inputs))
    if strange:
        raise BuildError(f"expected shapes of the inputs {sorted(inputs)}; got {strange} at {onnx_path}; correct them")
    for name, dims in inputs.items():
        if None not in dims and name not in shapes:
            continue
        if name not in shapes:
            shown = [size or "?" for size in dims]
            raise BuildError(
                f"expected a range of shapes for the dynamic input {name!r} {shown}; got none at {onnx_path}; give "
                "least, typical and largest shape, or export with fixed sizes"
            )
        chosen = shapes[name]
        rows = (chosen.least, chosen.typical, chosen.most)
        fits = all(len(row) == len(dims) for row in rows) and all(
            0 < low <= middle <= high and (size is None or low == high == size)
            for low, middle, high, size in zip(*rows, dims, strict=True)
        )
        if not fits:
            shown = [size or "?" for size in dims]
            raise BuildError(
                f"expected least <= typical <= largest shape of {name!r} {shown}, fixed sizes as they are; got "
                f"{' / '.join(map(str, rows))} at {onnx_path}; correct the range"
            )


def _check_dla(options: BuildOptions, onnx_path: Path) -> None:
    """Bounds that TensorRT would take and fail on later."""
    pools = options.dla_memory.pools()
    if pools and options.dla_core is None:
        raise BuildError(
            f"expected dla_core with dla_memory; got none at {onnx_path}; name the accelerator, or leave its memory out"
        )
    wrong = {name: size for name, size in pools.items() if size < MIN_POOL_BYTES or size & (size - 1)}
    if wrong:
        raise BuildError(
            f"expected bounds of the accelerator's memory that are powers of two, of {MIN_POOL_BYTES} bytes or more; "
            f"got {wrong} at {onnx_path}; change BuildOptions.dla_memory"
        )


def _silence(
    outcome: Outcome, onnx_path: Path, log_path: Path, options: BuildOptions, seen: tuple[float, str]
) -> BuildError:
    """Why the worker ended without an answer."""
    # the kernel kills without a word where the whole machine runs out of memory
    if _OUT_OF_MEMORY.search(outcome.tail) or outcome.code == -signal.SIGKILL:
        return _out_of_memory(onnx_path, log_path, options)
    fraction, phase = seen
    during = f" (in {phase!r}, {100 * fraction:.0f} % done)" if outcome.code is None and phase else ""
    advice = "give it more time (BuildOptions.timeout_s)" if outcome.code is None else "report it with the model"
    return BuildError(
        f"expected an engine; got {outcome.says(options.timeout_s)} of the builder{during} at {onnx_path}; {advice}; "
        f"see {log_path}, which ends with:\n{outcome.tail}"
    )


def _out_of_memory(onnx_path: Path, log_path: Path, options: BuildOptions) -> BuildError:
    limit = options.memory_limit
    within = "the memory of this machine" if limit is None else f"{limit / 2**20:.0f} MiB of memory"
    return BuildError(
        f"expected the builder to do with {within}; got out of memory at {onnx_path}; raise the limit, lower the "
        f"workspace, or build on a larger machine; see {log_path}"
    )


def _refuse(result: Mapping[str, Any], proto: Any, onnx_path: Path, log_path: Path, options: BuildOptions) -> None:
    """Turn an answer without a plan into an error that says what to do."""
    if result.get("os_error"):
        raise OSError(*result["os_error"])
    errors = "\n  ".join(result.get("errors", ())[-TAIL_LINES:])
    if result.get("out_of_memory") or _OUT_OF_MEMORY.search(errors):
        raise _out_of_memory(onnx_path, log_path, options)
    if result.get("unsupported"):
        raise TargetError(
            f"expected a GPU of compute capability {', '.join(result['supported'])}, which TensorRT-RTX builds for; "
            f"got {', '.join(result['unsupported'])}; an engine for it is built on the device: use the build kit"
        )
    if result.get("refused"):
        raise BuildError(
            f"expected a builder that can do what was asked; got: {result['refused']}; at {onnx_path}; change the "
            "build options, or build elsewhere"
        )
    if result.get("parser_errors"):
        lines = [_parser_line(fault, proto) for fault in result["parser_errors"]]
        raise BuildError(
            f"expected operators that the parser knows; got {len(lines)} that it refuses at {onnx_path}:\n  "
            + "\n  ".join(lines)
        )
    lacking = _TYPES_WITHOUT_HARDWARE.search(errors)
    if lacking is not None:
        raise TargetError(
            f"expected types that every GPU of the build computes in; got {lacking['types']} at {onnx_path}, which one "
            "of them has no hardware for (FP8 needs compute capability 8.9 or newer); take int8 "
            f"(quantize.precision), or build for newer GPUs alone; all of the log is in {log_path}"
        )
    if result.get("failed"):
        raise BuildError(
            f"expected an engine; got none from the builder at {onnx_path}:\n  {errors or 'no message'}\n"
            f"take another precision or rewrite the layer that it names; all of its log is in {log_path}"
        )


def _parser_line(fault: dict[str, Any], proto: Any) -> str:
    operator, node = fault["operator"], fault["node"]
    if not operator:  # some faults name no node: a scatter with a reduction is the known case
        guess = next((n for n in proto.graph.node if _reduces(n)), None)
        operator, node = (guess.op_type, guess.name) if guess is not None else ("an operator", "an unnamed node")
    why = fault["description"] if fault["description"] not in ("", "false") else "not supported"
    return f"{operator} at node {node}: {why}; {ADVICE.get(operator, DEFAULT_ADVICE)}"


def _reduces(node: Any) -> bool:
    return node.op_type.startswith("Scatter") and any(
        a.name == "reduction" and a.s not in (b"", b"none") for a in node.attribute
    )
