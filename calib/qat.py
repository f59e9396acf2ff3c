"""Between a draft with Q/DQ and a torch model trained under it: where the pairs are, and the scales that come back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fusepress.calib.qdq import LAYERS, QdqGraph
from fusepress.calib.quantize import Draft
from fusepress.pipeline.errors import QuantizeError
from fusepress.pipeline.graph.placement import Placement, QuantisedInput, QuantisedNode
from fusepress.pipeline.store import atomic_write_text

Array = np.ndarray[Any, Any]
SCHEMA = 1


def placement_of(draft: Draft, samples: int) -> Placement:
    """Where a draft has pairs.

    Args:
        draft: with Q/DQ everywhere.
        samples: S; magnitudes of the first so many calibration samples go with it, to find its tensors again by.
    """
    graph = QdqGraph(draft.proto)
    groups = tuple(tuple(group) for group in graph.scale_groups())
    group_of = {tensor: number for number, group in enumerate(groups) for tensor in group}
    row_of = {tensor: row for row, tensor in enumerate(draft.ranges.tensors)}
    nodes = []
    for node in draft.proto.graph.node:
        sources = {index: source for index, name in enumerate(node.input) if (source := graph.source(name)) is not None}
        inputs = tuple(
            QuantisedInput(index=index, group=group_of[source], amax=draft.ranges.amax[row_of[source], :samples].copy())
            for index, source in sources.items()
            if source in group_of
        )
        if not sources:
            continue
        weight, per_channel = _weight(graph, node, sources.get(1))
        nodes.append(
            QuantisedNode(
                name=str(node.name),
                operator=str(node.op_type),
                inputs=inputs,
                weight=weight,
                per_channel=per_channel,
            )
        )
    steps = np.array([graph.scale(group[0]) for group in groups], dtype=np.float32)
    return Placement(grid=draft.precision, nodes=tuple(nodes), groups=groups, steps=steps)


def _weight(graph: QdqGraph, node: Any, source: str | None) -> tuple[Array | None, bool]:
    """A layer's float weights, output channels first, and whether each of these has a step."""
    if node.op_type not in LAYERS or source is None or source not in graph.weights:
        return None, True
    pair = graph.producer[node.input[1]]
    weight = np.asarray(graph.constant(source))
    if graph.constant(pair.input[1]).size == 1:
        return weight, False
    axis = next((a.i for a in pair.attribute if a.name == "axis"), 1)
    return np.moveaxis(weight, axis, 0), True


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedScales:
    """Scales of activations that a model was trained under.

    Attributes:
        precision: int8 or fp8.
        method: how they were chosen, in a word or two.
        scales: tensor -> scale.
    """

    precision: str
    method: str
    scales: Mapping[str, float]

    def write(self, path: Path) -> None:
        """Write them as JSON, whole or not at all."""
        content = {"schema": SCHEMA, "precision": self.precision, "method": self.method, "scales": dict(self.scales)}
        atomic_write_text(path, json.dumps(content, indent=1, sort_keys=True) + "\n")

    @classmethod
    def read(cls, path: Path) -> TrainedScales:
        """The inverse of `write`.

        Raises:
            QuantizeError: it is missing or not such a file.
        """
        try:
            raw = json.loads(path.read_text())
            scales = {str(name): float(scale) for name, scale in raw["scales"].items()}
            return cls(precision=raw["precision"], method=raw["method"], scales=scales)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise QuantizeError(
                f"expected the scales of the qat stage; got {type(error).__name__}: {error} at {path}; run compress "
                "with --from qat"
            ) from error


def with_trained_scales(draft: Draft, trained: TrainedScales) -> tuple[Draft, list[str]]:
    """A draft under the scales that its weights were trained with.

    Returns:
        The draft; and its tensors that were not among them, whose scales are those of the draft.

    Raises:
        QuantizeError: the scales are of another precision.
    """
    if trained.precision != draft.precision:
        raise QuantizeError(
            f"expected scales of a training in {draft.precision}; got {trained.precision} at {draft.source}; run "
            "compress with --from qat"
        )
    known = [tensor for tensor in draft.ranges.tensors if tensor in trained.scales]
    without = [tensor for tensor in draft.ranges.tensors if tensor not in trained.scales]
    return draft.with_scales({tensor: trained.scales[tensor] for tensor in known}, trained.method), without
