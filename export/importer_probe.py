"""What a TensorRT library on this machine can do, asked of its own classes in a process of its own."""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

from fusepress.export.worker import answer, read_job, run_job

TIMEOUT_S = 300.0
_ENUMS = (
    "BuilderFlag",
    "NetworkDefinitionCreationFlag",
    "MemoryPoolType",
    "HardwareCompatibilityLevel",
    "OnnxParserFlag",
)


def probe_importer(runtime: str) -> dict[str, Any]:
    """Version, enumerations, accelerator cores and refused ONNX operators of a library; or `missing`, and why.

    Args:
        runtime: tensorrt or tensorrt_rtx.
    """
    if importlib.util.find_spec(runtime) is None:
        return {"missing": f"the Python package {runtime} is not installed"}
    with tempfile.TemporaryDirectory(prefix="fusepress-") as name:
        outcome, result = run_job(__name__, {"runtime": runtime}, log=Path(name) / "log", timeout_s=TIMEOUT_S)
    if result is None:
        return {"missing": f"{runtime} is installed and ended with {outcome.says(TIMEOUT_S)}: {outcome.tail}"}
    return result


def ask(trt: Any) -> dict[str, Any]:
    """In the worker: what the module says of itself."""
    from onnx import defs

    names = {enum: sorted(n for n in dir(getattr(trt, enum)) if n.isupper()) for enum in _ENUMS if hasattr(trt, enum)}
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    parser = trt.OnnxParser(builder.create_network(0), logger)
    operators = sorted({s.name for s in defs.get_all_schemas_with_history() if s.domain == ""})
    return {
        "version": trt.__version__,
        "enumerations": names,
        "dla_cores": int(getattr(builder, "num_DLA_cores", 0)),
        "operators_asked": len(operators),
        "operators_refused": [name for name in operators if not parser.supports_operator(name)],
    }


if __name__ == "__main__":
    _job = read_job()
    answer(_job, ask(importlib.import_module(_job["runtime"])))
