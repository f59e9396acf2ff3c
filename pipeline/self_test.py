"""`fusepress measure --self-test`: what this machine's TensorRT does with a tiny network, as a record to send back.

Parts of Fusepress that talk to TensorRT 10 and 11 could not be executed where it was written. On a machine that has
one, this record holds what is needed to confirm or mend them: versions, the device, what the importer reads, five
builds with their layers, sparse kernels and latencies. On any other machine it says what is missing. It holds no paths
and no names of users or hosts.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fusepress
from fusepress.pipeline.errors import FusepressError
from fusepress.pipeline.stages.base import tool_versions

if TYPE_CHECKING:
    from fusepress.export.engine import EngineInfo
    from fusepress.targets.measure import LatencyMeasurement

SCHEMA = 1
RUNTIMES = ("tensorrt", "tensorrt_rtx")
TOOLS = ("tensorrt", "tensorrt_rtx", "torch", "onnx", "onnxruntime-gpu", "onnxruntime", "numpy")
AHEAD_OF_TIME = ("8.6", "8.9", "12.0")  # what TensorRT-RTX builds for without a GPU
BUILDS = (("fp32", False), ("fp16", False), ("fp16", True), ("int8", False), ("int8", True))  # kind, sparse kernels
RELEASE = Path("/etc/nv_tegra_release")
COMMANDS = {
    "nvidia-smi": ["--query-gpu=name,compute_cap,driver_version,clocks.max.sm", "--format=csv"],
    "nvpmodel": ["-q"],
    "trtexec": ["--help"],
}
COMMAND_TIMEOUT_S = 30.0
LINES_KEPT = 4

# a path begins a word; names of nodes such as camera/stem/Conv have no slash in front
_FOLDERS = re.compile(r"(?<![\w./-])/(?:[^\s/'\"]+/)+")

Say = Callable[[float, str], None]


def self_test(*, seconds: float = 2.0, say: Say | None = None) -> dict[str, Any]:
    """Find out, build, run; nothing is raised for what a machine cannot do.

    Args:
        seconds: longest time spent on one latency.
        say: called with a fraction and a word as it goes.

    Returns:
        The record, as JSON values.
    """
    tell = say or (lambda _fraction, _word: None)
    record: dict[str, Any] = {"schema": SCHEMA, "fusepress": fusepress.__version__, "machine": _machine()}
    missing: list[str] = []
    with tempfile.TemporaryDirectory(prefix="fusepress-") as name:
        models = _write_models(Path(name))
        tell(0.05, "ONNX Runtime")
        record["onnxruntime"] = {
            kind: _attempt(lambda path=path: _on_onnxruntime(path, seconds))  # type: ignore[misc]
            for kind, path in models.items()
            if kind != "fp16"  # its CPU provider lacks kernels for it
        }
        record["onnxruntime_cuda"] = _cuda(models, seconds, missing)
        for position, runtime in enumerate(RUNTIMES):
            tell(0.1 + 0.45 * position, runtime)
            record[runtime] = _runtime(runtime, models, Path(name), seconds, missing)
    record["missing"] = missing
    found: dict[str, Any] = _without_folders(record)
    return found


def _machine() -> dict[str, Any]:
    from fusepress.targets.host import host_description

    said = {name: _command(name, arguments) for name, arguments in COMMANDS.items()}
    release = RELEASE.read_text(errors="replace").splitlines()[0] if RELEASE.is_file() else None
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "host": {key: value for key, value in host_description().items() if key in ("cpu", "cores")},
        "tools": tool_versions(*TOOLS),
        "tegra_release": release,
        "commands": said,
    }


def _command(name: str, arguments: list[str]) -> str | None:
    """The first lines that a program of NVIDIA's says, None where there is none."""
    found = shutil.which(name) or shutil.which(name, path="/usr/src/tensorrt/bin")
    if found is None:
        return None
    try:
        done = subprocess.run(
            [found, *arguments], capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}"
    return "\n".join((done.stdout + done.stderr).strip().splitlines()[:LINES_KEPT])


def _write_models(folder: Path) -> dict[str, Path]:
    from fusepress.export.onnx import save_onnx
    from fusepress.export.tiny import KINDS, tiny_model

    paths = {kind: folder / f"{kind}.onnx" for kind in KINDS}
    for kind in KINDS:
        save_onnx(tiny_model(kind), paths[kind])
    return {str(kind): path for kind, path in paths.items()}


def _without_folders(value: Any) -> Any:
    """The same without this machine's folders, in whatever a library said: a path becomes the file it ends in."""
    if isinstance(value, str):
        return _FOLDERS.sub("", value)
    if isinstance(value, dict):
        return {key: _without_folders(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(entry) for entry in value]
    return value


def _attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What came of it, or the error and where it was raised.

    Whatever is raised belongs in the record: it is made on machines where this code has never been executed.
    """
    try:
        return {"ok": True, **work()}
    except FusepressError as error:
        return {"ok": False, "error": f"{type(error).__name__}: {error}"}
    except Exception as error:  # noqa: BLE001  see above
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}:{last.lineno} in {last.name}"
        return {"ok": False, "error": f"{type(error).__name__}: {error} ({place})"}


def _on_onnxruntime(path: Path, seconds: float) -> dict[str, Any]:
    from fusepress.export.passes import made_up_batch
    from fusepress.export.runtime import OnnxSession
    from fusepress.targets.measure import measure_latency

    session = OnnxSession(path)
    return _latency(measure_latency(session.timed_callable(made_up_batch(session).inputs), max_seconds=seconds))


def _cuda(models: dict[str, Path], seconds: float, missing: list[str]) -> dict[str, Any]:
    """What ONNX Runtime's CUDA provider makes of the models; the first that fails ends it."""
    found = {}
    for kind, path in models.items():
        found[kind] = _attempt(lambda path=path: _on_cuda(path, seconds))  # type: ignore[misc]
        if not found[kind]["ok"]:
            missing.append(f"onnxruntime_cuda: {found[kind]['error']}")
            break
    return found


def _on_cuda(path: Path, seconds: float) -> dict[str, Any]:
    """Latency on ONNX Runtime's CUDA provider; refused where it falls back to the CPU."""
    from fusepress.export.passes import made_up_batch
    from fusepress.export.runtime_cuda import CudaSession
    from fusepress.targets.measure import measure_latency

    session = CudaSession(path)
    return _latency(measure_latency(session.timed_callable(made_up_batch(session).inputs), max_seconds=seconds))


def _latency(result: LatencyMeasurement) -> dict[str, Any]:
    names = ("mean_ms", "mean_low_ms", "mean_high_ms", "p50_ms", "p99_ms", "n", "cov", "stable")
    return {"latency": {name: getattr(result, name) for name in names}}


def _runtime(runtime: str, models: dict[str, Path], folder: Path, seconds: float, missing: list[str]) -> dict[str, Any]:
    """What a library says of itself, and what it makes of the models."""
    from fusepress.export.engine import why_no_tensorrt
    from fusepress.export.importer_probe import probe_importer

    found: dict[str, Any] = {"importer": probe_importer(runtime)}
    why = found["importer"].get("missing") or (why_no_tensorrt() if runtime == "tensorrt" else None)
    if why:
        missing.append(f"{runtime}: {why}")
        return found
    found["builds"] = {}
    for kind, sparse in BUILDS:
        name = f"{kind} with sparse kernels allowed" if sparse else kind
        plan = folder / f"{runtime}-{kind}-{sparse}.plan"
        found["builds"][name] = _attempt(
            lambda k=kind, s=sparse, p=plan: _build(runtime, models[k], p, s, seconds, missing)  # type: ignore[misc]
        )
    return found


def _build(runtime: str, onnx: Path, plan: Path, sparse: bool, seconds: float, missing: list[str]) -> dict[str, Any]:
    from fusepress.export.engine import BuildOptions, build_rtx_engine, build_tensorrt_engine
    from fusepress.export.sparse_build import count_sparse
    from fusepress.export.sparsity import check_sparsity_2to4

    options = BuildOptions(sparse=sparse, timing_cache_folder=plan.parent / "timings")
    info = (
        build_tensorrt_engine(onnx, plan, options=options)
        if runtime == "tensorrt"
        else build_rtx_engine(onnx, plan, compute_capabilities=AHEAD_OF_TIME, options=options)
    )
    tactics = {layer.name: layer.tactic for layer in info.layers if layer.computes}
    made = info.to_dict() | {"seconds": info.seconds, "tactics": tactics}
    if sparse:
        log = info.log_path.read_text(errors="replace")
        made["sparse"] = count_sparse(check_sparsity_2to4(onnx), log, info.layers).to_dict()
        made["sparse_log"] = [line for line in log.splitlines() if "(Sparsity)" in line]
    if info.layers_path is not None:
        made["inspector"] = info.layers_path.read_text()
    return made | {"run": _attempt(lambda: _on_gpu(info, onnx, seconds, missing))}


def _on_gpu(info: EngineInfo, onnx: Path, seconds: float, missing: list[str]) -> dict[str, Any]:
    """Latency on the GPU of this machine, and how far outputs are from ONNX Runtime's."""
    import torch

    from fusepress.export.engine_run import EngineSession
    from fusepress.export.parity import check_parity
    from fusepress.export.passes import made_up_batch
    from fusepress.export.runtime import OnnxSession
    from fusepress.targets.measure import measure_latency

    if not torch.cuda.is_available():
        why = f"{info.runtime}: engines were built and not run: torch sees no GPU"
        if why not in missing:
            missing.append(why)
        return {"executed": False}
    session = EngineSession(info.path, info.runtime)
    reference = OnnxSession(onnx)
    batch = made_up_batch(reference)
    # distinct places, for what a scatter writes twice to one is not defined
    batch.inputs["index"] = torch.randperm(batch.inputs["index"].numel())[None]
    measured = _latency(measure_latency(session.timed_callable(batch.inputs), max_seconds=seconds))
    parity = check_parity(lambda feeds: reference(feeds), lambda feeds: session(feeds), [batch])
    return {"executed": True, **measured, "parity": parity.to_dict()}
