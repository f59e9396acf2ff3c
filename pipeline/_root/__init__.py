"""Fusepress: compress camera-LiDAR fusion checkpoints, and prove that the release still works.

The public names below are loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusepress.pipeline.api import (
        bundle,
        compare,
        compress,
        explain,
        gate,
        measure,
        plan,
        report,
        reproduce,
        verify,
    )
    from fusepress.pipeline.errors import FusepressError
    from fusepress.pipeline.graph.apply import load
    from fusepress.pipeline.task import Batch

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "FusepressError",
    "__version__",
    "bundle",
    "compare",
    "compress",
    "explain",
    "gate",
    "load",
    "measure",
    "plan",
    "report",
    "reproduce",
    "verify",
]

_HOME = {
    "Batch": "fusepress.pipeline.task",
    "FusepressError": "fusepress.pipeline.errors",
    "bundle": "fusepress.pipeline.api",
    "compare": "fusepress.pipeline.api",
    "compress": "fusepress.pipeline.api",
    "explain": "fusepress.pipeline.api",
    "gate": "fusepress.pipeline.api",
    "load": "fusepress.pipeline.graph.apply",
    "measure": "fusepress.pipeline.api",
    "plan": "fusepress.pipeline.api",
    "report": "fusepress.pipeline.api",
    "reproduce": "fusepress.pipeline.api",
    "verify": "fusepress.pipeline.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fusepress' has no attribute {name!r}; its public names are {__all__}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
