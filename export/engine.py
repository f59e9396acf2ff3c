"""Engines: TensorRT-RTX ahead of time without a GPU, TensorRT where it is installed beside a GPU.

The builder runs in a process of its own, for it may crash, and what it says is recorded there. An engine is built, not
executed: nothing here says anything about its latency or about sparse kernels (TensorRT-RTX builds the same bytes with
and without its sparsity flag). Source: TensorRT-RTX 1.7 Python API; behaviour without a GPU as run for this project.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusepress.export.onnx import load_onnx
from fusepress.export.worker import TAIL_LINES, Outcome, answer, read_job, run_job
from fusepress.pipeline.errors import BuildError, TargetError
from fusepress.pipeline.store import atomic_write_bytes, atomic_write_text, sha256_file

TIMEOUT_S = 1200.0
MIN_PLAN_BYTES = 1024  # a plan of even one layer is larger
ADVICE = {
    "ScatterND": "scatter without a reduction: make the indices unique and use index_put without accumulate",
    "ScatterElements": "a max over scattered points: pad to a fixed number of points a pillar and take the max there",
    "Unique": "make the indices unique outside the model",
    "Det": "write the determinant out",
    "BitShift": "multiply or divide by powers of two",
    "DeformConv": "TensorRT-RTX has none; TensorRT has: take a target with TensorRT, or plain convolutions",
    "NonZero": "mask by multiplication instead of selecting",
    "Attention": "export with operator set 18 to 20, which writes attention as MatMul and Softmax",
    "GridSample": "only 4-D input is supported: sample slice by slice",
    "Loop": "unroll the loop",
    "If": "write torch.where for the condition",
}
DEFAULT_ADVICE = "rewrite the module with plain operators, or move it outside the model"
_DATATYPES = {
    "Float": "fp32",
    "Half": "fp16",
    "BFloat16": "bf16",
    "Int8": "int8",
    "FP8": "fp8",
    "Int32": "int32",
    "Int64": "int64",
    "Bool": "bool",
}
_LAYER = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<type>\w+), Inputs: \[(?P<inputs>.*?)\], Constants: \[.*\], "
    r"Outputs: \[(?P<outputs>.*?)\], TacticName: "
)
_COMPUTE = ("correlation", "gemm", "deconv", "runtime_fusion")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLayer:
    """One layer of an engine: its name and kind, the precision it computes in, the ONNX nodes that went into it."""

    name: str
    type: str
    precision: str
    nodes: tuple[str, ...] = ()


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
    executed: bool = False

    def precisions(self) -> dict[str, int]:
        """Precision -> number of layers with weights that compute in it."""
        return dict(sorted(Counter(e.precision for e in self.layers if e.type in _COMPUTE).items()))

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, without times and paths."""
        return {
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


def build_rtx_engine(
    onnx_path: Path,
    out_path: Path,
    *,
    compute_capabilities: Sequence[str],
    timeout_s: float = TIMEOUT_S,
    memory_limit: int | None = None,
) -> EngineInfo:
    """Build a TensorRT-RTX engine ahead of time; it needs no GPU, and runs nothing.

    Args:
        onnx_path: the model; its file decides every precision.
        out_path: the plan; the builder's log goes beside it with the suffix `.log`.
        compute_capabilities: GPUs to build for, as "8.9" (or "89", "sm_89").
        timeout_s: seconds after which the builder is killed.
        memory_limit: bytes that the builder may use.

    Raises:
        TargetError: TensorRT-RTX does not build for one of these GPUs.
        BuildError: it is not installed, refuses the model (every operator is listed with advice), crashes, or runs
            out of time.
    """
    wanted = [_dotted(text) for text in compute_capabilities]
    if not wanted:
        raise TargetError("expected at least one compute capability; got none; name the GPU's, e.g. 8.9")
    if importlib.util.find_spec("tensorrt_rtx") is None:
        raise BuildError("expected TensorRT-RTX; got no Python package tensorrt_rtx; pip install tensorrt-rtx (x86-64)")
    return _build("tensorrt_rtx", onnx_path, out_path, wanted, timeout_s, memory_limit)


def why_no_tensorrt() -> str | None:
    """Why TensorRT proper cannot build here, or None where it can be tried."""
    if importlib.util.find_spec("tensorrt") is None:
        return "the Python package tensorrt is not installed"
    import torch

    return None if torch.cuda.is_available() or shutil.which("nvidia-smi") else "there is no NVIDIA GPU here"


def build_tensorrt_engine(
    onnx_path: Path,
    out_path: Path,
    *,
    sparse: bool = False,
    timeout_s: float = TIMEOUT_S,
    memory_limit: int | None = None,
) -> EngineInfo:
    """Build a TensorRT 10 or 11 engine for the GPU of this machine, strongly typed.

    Args:
        onnx_path: the model; its file decides every precision.
        out_path: the plan; the log goes beside it.
        sparse: allow sparse kernels; whether one was chosen is in the log.
        timeout_s: seconds after which the builder is killed.
        memory_limit: bytes that the builder may use.

    Raises:
        BuildError: there is no TensorRT or no GPU (nothing was tried), or the build failed.
    """
    why = why_no_tensorrt()
    if why is not None:
        raise BuildError(
            f"expected TensorRT and a GPU to build an engine; got neither tried nor built: {why}; run the build kit on "
            "the device, or take a desktop target that TensorRT-RTX builds for"
        )
    return _build("tensorrt", onnx_path, out_path, [], timeout_s, memory_limit, sparse=sparse)


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
    timeout_s: float,
    memory_limit: int | None,
    *,
    sparse: bool = False,
) -> EngineInfo:
    proto = load_onnx(onnx_path)
    out_path.parent.mkdir(parents=True, exist_ok=True)
    log_path = out_path.with_suffix(".log")
    with tempfile.TemporaryDirectory(prefix="fusepress-") as name:
        plan = Path(name) / "plan"
        job = {
            "runtime": runtime,
            "onnx": str(Path(onnx_path).resolve()),
            "out": str(plan),
            "capabilities": capabilities,
            "memory_limit": memory_limit,
            "sparse": sparse,
        }
        outcome, result = run_job(__name__, job, log=Path(name) / "log", timeout_s=timeout_s)
        text = (Path(name) / "log").read_text(errors="replace")
        atomic_write_text(log_path, text)
        _refuse(outcome, result, proto, onnx_path, log_path, timeout_s)
        assert result is not None
        data = plan.read_bytes()
    if len(data) < MIN_PLAN_BYTES:
        raise BuildError(f"expected a plan; got {len(data)} bytes at {onnx_path}; see {log_path}")
    atomic_write_bytes(out_path, data)
    info = EngineInfo(
        path=out_path,
        sha256=sha256_file(out_path),
        size=len(data),
        runtime=runtime,
        runtime_version=str(result["version"]),
        compute_capabilities=tuple(result["capabilities"]),
        layers=parse_layers(text),
        warnings=tuple(dict.fromkeys(result["warnings"])),
        log_path=log_path,
        seconds=outcome.seconds,
    )
    check_plan(out_path, sha256=info.sha256, size=info.size)
    return info


def _refuse(
    outcome: Outcome, result: dict[str, Any] | None, proto: Any, onnx_path: Path, log_path: Path, timeout_s: float
) -> None:
    if result is None:
        raise BuildError(
            f"expected an engine; got {outcome.says(timeout_s)} of the builder at {onnx_path}; see {log_path}, which "
            f"ends with:\n{outcome.tail}"
        )
    if result.get("unsupported"):
        raise TargetError(
            f"expected a GPU of compute capability {', '.join(result['supported'])}, which TensorRT-RTX builds for; "
            f"got {', '.join(result['unsupported'])}; an engine for it is built on the device: use the build kit"
        )
    if result.get("parser_errors"):
        lines = [_parser_line(fault, proto) for fault in result["parser_errors"]]
        raise BuildError(
            f"expected operators that the parser knows; got {len(lines)} that it refuses at {onnx_path}:\n  "
            + "\n  ".join(lines)
        )
    if result.get("failed"):
        errors = "\n  ".join(result["errors"][-TAIL_LINES:]) or "no message"
        raise BuildError(
            f"expected an engine; got none from the builder at {onnx_path}:\n  {errors}\n"
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


def parse_layers(log: str) -> tuple[EngineLayer, ...]:
    """Layers from the builder's verbose dump (`Layers:` and one line a layer).

    The precision of a layer with weights is that of its first input; of any other, of its first output.
    """
    layers = []
    for line in log.splitlines():
        match = _LAYER.search(line)
        if match is None:
            continue
        inputs, outputs = _types(match["inputs"]), _types(match["outputs"])
        order = (inputs, outputs) if match["type"] in _COMPUTE else (outputs, inputs)
        found = next((types[0] for types in order if types), "unknown")
        nodes = tuple(re.findall(r"\[ONNX Layer: ([^\]]+)\]", line))
        layers.append(
            EngineLayer(name=match["name"], type=match["type"], precision=_DATATYPES.get(found, found), nodes=nodes)
        )
    return tuple(layers)


def _types(section: str) -> list[str]:
    return re.findall(r"Datatype: (\w+)", section)


# --- in the worker ---------------------------------------------------------------------------------------------------


def _main() -> None:
    job = read_job()
    trt = importlib.import_module(job["runtime"])
    logger = _recorder(trt)
    builder = trt.Builder(logger)
    supported = _supported(trt) if job["capabilities"] else []
    unsupported = [c for c in job["capabilities"] if c not in supported]
    if unsupported:
        answer(job, {"unsupported": unsupported, "supported": supported})
        return
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(job["onnx"]):
        answer(job, {"parser_errors": _faults(parser, job["onnx"])})
        return
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if job["capabilities"]:
        config.num_compute_capabilities = len(job["capabilities"])
        for index, capability in enumerate(job["capabilities"]):
            config.set_compute_capability(getattr(trt.ComputeCapability, _enum_name(capability)), index)
    if job["sparse"]:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        answer(job, {"failed": True, "errors": logger.errors})
        return
    Path(job["out"]).write_bytes(bytes(plan))
    answer(
        job, {"version": trt.__version__, "warnings": logger.warnings, "capabilities": job["capabilities"] or _gpu()}
    )


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


def _network_flags(trt: Any) -> int:
    """Strong typing where it is a choice (TensorRT 10); from 11 on, and in TensorRT-RTX, there is no other."""
    flag = getattr(getattr(trt, "NetworkDefinitionCreationFlag", None), "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _supported(trt: Any) -> list[str]:
    names = [n for n in dir(trt.ComputeCapability) if re.fullmatch(r"SM\d+", n)]
    return sorted((f"{n[2:-1]}.{n[-1]}" for n in names), key=float)


def _enum_name(capability: str) -> str:
    return f"SM{capability.replace('.', '')}"


def _gpu() -> list[str]:
    import torch

    return [".".join(map(str, torch.cuda.get_device_capability(0)))] if torch.cuda.is_available() else []


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


if __name__ == "__main__":
    _main()
