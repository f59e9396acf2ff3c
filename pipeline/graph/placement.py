"""Where an ONNX file has Q/DQ pairs, told so that a torch model can be followed by it; and the grids of the pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Array = np.ndarray[Any, Any]
Grid = Literal["int8", "fp8"]
GRID_MAX: dict[Grid, float] = {"int8": 127.0, "fp8": 448.0}  # fp8 is E4M3
INT8_MIN = -128.0  # of a QuantizeLinear; weights never reach it, for their step is their largest magnitude / 127
LEAST_STEP = 2.0**-20  # FP16 still tells it from 0, by which a QuantizeLinear would divide


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantisedInput:
    """A pair in front of one input of a node.

    Attributes:
        index: which input.
        group: of the step.
        amax: (S,), largest magnitude of the tensor in each of S samples.
    """

    index: int
    group: int
    amax: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantisedNode:
    """A node of the file that pairs lie in front of.

    Attributes:
        name: of the node, `<module path>/<operator>` with a number from the second one on.
        operator: of ONNX.
        inputs: its quantised activations.
        weight: its float weights, output channels first (or as they are, where `per_channel` is false); None where it
            has none that are quantised.
        per_channel: a step for every output channel.
    """

    name: str
    operator: str
    inputs: tuple[QuantisedInput, ...]
    weight: Array | None = None
    per_channel: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a file has pairs, and with which steps.

    Attributes:
        grid: int8 or fp8 (E4M3).
        nodes: in the file's order.
        groups: tensors that share a step, G of them.
        steps: (G,), their steps (the scales of ONNX), float32.
    """

    grid: Grid
    nodes: tuple[QuantisedNode, ...]
    groups: tuple[tuple[str, ...], ...]
    steps: Array
