"""GridSample as plain arithmetic and Gather, for importers that lack it (TensorRT before 8.5).

Bilinear and nearest, padded by zeros or by the border, batch 1, 4-D. Coordinates as in the ONNX specification: pixel
x = ((g + 1) W - 1) / 2, or (g + 1)(W - 1) / 2 with align_corners. Nearest rounds halves to even, as ONNX's Round.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fusepress.export.hygiene.edit import Editor, attribute, node_named
from fusepress.export.wiring import Wiring

_MODES = {b"linear": "bilinear", b"bilinear": "bilinear", b"nearest": "nearest"}
_FLOAT32 = 1


def find(proto: Any) -> list[str]:
    """Samplings that can be written out."""
    if not any(node.op_type == "GridSample" for node in proto.graph.node):
        return []
    wiring = Wiring(proto)
    return [node.name for node in proto.graph.node if node.op_type == "GridSample" and _can(node, wiring)]


def _can(node: Any, wiring: Wiring) -> bool:
    shape, grid = wiring.shape(node.input[0]), wiring.shape(node.input[1])
    fixed = shape is not None and grid is not None and len(shape) == len(grid) == 4 and shape[0] == 1
    mode = attribute(node, "mode", b"bilinear")
    padding = attribute(node, "padding_mode", b"zeros")
    plain = mode in _MODES and padding in (b"zeros", b"border")
    return fixed and plain and wiring.types.get(node.input[0]) == wiring.types.get(node.input[1]) == _FLOAT32


def apply(proto: Any) -> None:
    """Write them out."""
    for name in find(proto):
        wiring = Wiring(proto)
        node = node_named(proto, name)
        shape, grid = wiring.shape(node.input[0]), wiring.shape(node.input[1])
        assert shape is not None
        assert grid is not None
        _Sampler(proto, node, shape, grid).write()


class _Sampler:
    """One GridSample of x [1, C, H, W] at grid [1, Ho, Wo, 2]."""

    def __init__(self, proto: Any, node: Any, shape: tuple[int, ...], grid: tuple[int, ...]) -> None:
        self.node, self.edit = node, Editor(proto, node.name)
        _, self.channels, self.height, self.width = shape
        self.out = grid[1:3]
        self.align = bool(attribute(node, "align_corners", 0))
        self.border = attribute(node, "padding_mode", b"zeros") == b"border"
        self.bilinear = _MODES[attribute(node, "mode", b"bilinear")] == "bilinear"
        self.zero, self.one = self._number("zero", 0.0), self._number("one", 1.0)

    def _number(self, name: str, value: float) -> str:
        return self.edit.constant(name, np.asarray(value, np.float32))

    def write(self) -> None:
        """Replace the node."""
        add = self.edit.add
        shape = self.edit.constant("flat", np.asarray([1, self.channels, self.height * self.width]))
        self.flat = add("Reshape", self.node.input[0], shape, name="Reshape")
        y, x = self._pixel("y", 1, self.height), self._pixel("x", 0, self.width)
        if self.bilinear:
            total = self._bilinear(y, x)
        else:
            total = self._corner("near", add("Round", y, name="round_y"), add("Round", x, name="round_x"), None)
        back = self.edit.constant("shape", np.asarray([1, self.channels, *self.out]))
        add("Reshape", total, back, name="Reshape_back", output=self.node.output[0])
        self.edit.replace(self.node)

    def _pixel(self, name: str, position: int, size: int) -> str:
        """The coordinate in pixels, flat [P]."""
        edit = self.edit
        index = edit.constant(f"{name}_position", np.asarray(position))
        picked = edit.add("Gather", self.node.input[1], index, name=f"{name}_Gather", axis=3)
        flat = edit.add("Reshape", picked, edit.constant(f"{name}_points", np.asarray([-1])), name=f"{name}_Reshape")
        # (g + 1) size / 2 - 1/2, or (g + 1) (size - 1) / 2
        factor = (size - 1) / 2 if self.align else size / 2
        offset = factor if self.align else factor - 0.5
        scaled = edit.add("Mul", flat, self._number(f"{name}_factor", factor), name=f"{name}_Mul")
        pixel = edit.add("Add", scaled, self._number(f"{name}_offset", offset), name=f"{name}_Add")
        if not self.border:
            return pixel
        return edit.add("Clip", pixel, self.zero, self._number(f"{name}_last", size - 1), name=f"{name}_Clip")

    def _bilinear(self, y: str, x: str) -> str:
        edit, total = self.edit, ""
        y0, x0 = edit.add("Floor", y, name="y_Floor"), edit.add("Floor", x, name="x_Floor")
        parts = {}
        for name, value, floor in (("y", y, y0), ("x", x, x0)):
            after = edit.add("Sub", value, floor, name=f"{name}_share")
            parts[name, 1] = after
            parts[name, 0] = edit.add("Sub", self.one, after, name=f"{name}_rest")
        for down in (0, 1):
            for right in (0, 1):
                name = f"corner{down}{right}"
                row = edit.add("Add", y0, self.one, name=f"{name}_row") if down else y0
                column = edit.add("Add", x0, self.one, name=f"{name}_column") if right else x0
                weight = edit.add("Mul", parts["y", down], parts["x", right], name=f"{name}_weight")
                corner = self._corner(name, row, column, weight)
                total = edit.add("Add", total, corner, name=f"{name}_sum") if total else corner
        return total

    def _corner(self, name: str, row: str, column: str, weight: str | None) -> str:
        """Values at whole pixels [P], zero outside, times a weight [P]; [1, C, P]."""
        edit, inside = self.edit, []
        clipped = {}
        for axis, value, size in (("row", row, self.height), ("column", column, self.width)):
            last = self._number(f"{name}_{axis}_last", size - 1)
            clipped[axis] = edit.add("Clip", value, self.zero, last, name=f"{name}_{axis}_Clip")
            inside.append(edit.add("Equal", value, clipped[axis], name=f"{name}_{axis}_Equal"))
        stride = self._number(f"{name}_stride", self.width)
        start = edit.add("Mul", clipped["row"], stride, name=f"{name}_start")
        place = edit.add("Add", start, clipped["column"], name=f"{name}_place")
        index = edit.add("Cast", place, name=f"{name}_Cast", to=7)  # int64
        value = edit.add("Gather", self.flat, index, name=f"{name}_Gather", axis=2)
        both = edit.add("And", *inside, name=f"{name}_And")
        mask = edit.add("Cast", both, name=f"{name}_mask", to=_FLOAT32)
        factor = mask if weight is None else edit.add("Mul", weight, mask, name=f"{name}_factor")
        return edit.add("Mul", value, factor, name=f"{name}_Mul")
