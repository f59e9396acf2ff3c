"""How long ONNX Runtime's CPU provider spends in each node, in the graph that it runs after its own fusions."""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fusepress.export.passes import made_up_batch
from fusepress.export.runtime import OnnxSession

if TYPE_CHECKING:
    from torch import Tensor

RUNS = 20
WARM_UP = 3
NodeKind = Literal["integer", "floating", "conversion", "other"]
_INTEGER = re.compile(r"QLinear|QGemm|QAttention|\w*Integer|DynamicQuantize")
_LAYERS = frozenset(["Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"])
_CONVERSIONS = frozenset(["QuantizeLinear", "DequantizeLinear"])
_FUSED_NAME = re.compile(r"_token_\d+$")  # what ONNX Runtime appends to the layer that it fused Q/DQ into


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeTime:
    """One node of the graph that is run.

    Attributes:
        name: of the ONNX node where the fusion kept it.
        op: ONNX Runtime's operator, e.g. QLinearConv or FusedConv.
        ms: median over the runs.
    """

    name: str
    op: str
    ms: float

    @property
    def kind(self) -> NodeKind:
        """A layer in integers or in floating point, a conversion between the two, or something else."""
        if self.op in _CONVERSIONS:
            return "conversion"
        if self.op in _LAYERS:
            return "floating"
        return "integer" if _INTEGER.match(self.op) else "other"


def node_times(
    path: Path, inputs: Mapping[str, Tensor] | None = None, *, threads: int | None = None, runs: int = RUNS
) -> tuple[NodeTime, ...]:
    """Profile a file on this machine, with integer kernels, batch 1.

    Args:
        path: the ONNX file.
        inputs: one sample; noise, and zeros for indices, when None.
        threads: as of `OnnxSession`.
        runs: that are counted.

    Returns:
        Nodes in the order in which they run.

    Raises:
        ExportError: ONNX Runtime cannot run the file.
    """
    with tempfile.TemporaryDirectory(prefix="fusepress-") as folder:
        session = OnnxSession(path, threads, integer_kernels=True, profile=Path(folder) / "profile")
        run: Callable[[], object] = session.timed_callable(made_up_batch(session).inputs if inputs is None else inputs)
        for _ in range(WARM_UP + runs):
            run()
        return read_node_times(session.end_profile().read_text(), skip=WARM_UP)


def read_node_times(text: str, *, skip: int = 0) -> tuple[NodeTime, ...]:
    """Medians of a profile by node.

    Args:
        text: the profile's JSON.
        skip: runs at the beginning that do not count.
    """
    ms: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in json.loads(text):
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            named = _FUSED_NAME.sub("", name.removesuffix("_kernel_time"))
            ms[named, event["args"]["op_name"]].append(event["dur"] / 1000.0)
    return tuple(
        NodeTime(name=name, op=op, ms=statistics.median(values[skip:] or values)) for (name, op), values in ms.items()
    )
