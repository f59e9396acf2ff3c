"""Where the latency goes: every kernel in running order, by modality, precision and what bounds it.

From the `kernels` that `fusepress explain` leaves in explain.json: predicted for the target, or profiled on this CPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from fusepress.pipeline.evidence import RunRecord
from fusepress.pipeline.report.svg import axis_below, drawing, nice_ticks, rect, text
from fusepress.pipeline.report.view import DASH, FUSION, count, number, percent, three

CONVERSIONS = ("Cast", "QuantizeLinear", "DequantizeLinear")
CONVERTING, UNKNOWN, ALL = "conversions", "unknown", "all"
LANE, GAP = 22.0, 7.0
CHARACTER = 7.0  # width of one in a segment's label
PRECISIONS = ("int8", "fp8", "integer", "fp16", "bf16", "fp32", "floating", "conversion", "other")
BOUNDS = ("compute", "memory", "launch", UNKNOWN)
# colours of the style sheet; a word always stands beside them
PRECISION_COLOURS = {"int8": 0, "fp8": 0, "integer": 0, "fp16": 1, "bf16": 1, "fp32": 2, "floating": 2, "conversion": 4}
BOUND_COLOURS = {"compute": 0, "memory": 2, "launch": 5, UNKNOWN: 4}
OTHER_COLOUR = 5


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel; times in milliseconds."""

    branch: str
    precision: str
    bound: str
    ms: float
    macs: int


@dataclass(frozen=True, slots=True)
class ShareRow:
    """A part of the network: its share of the time, by what bounds it and by precision.

    Attributes:
        colour: of its segments in the drawing; None where it is the whole.
        bounds, precisions: shares, in the order of `Timeline.bounds` and `Timeline.precisions`.
    """

    name: str
    colour: int | None
    kernels: int
    time: str
    share: str
    macs: str
    bounds: list[str]
    precisions: list[str]


@dataclass(frozen=True, slots=True)
class Timeline:
    """The section, ready to print; `bounds` and `precisions` with the colours of their segments."""

    sentence: str
    drawing: Markup
    bounds: dict[str, int]
    precisions: dict[str, int]
    rows: list[ShareRow]


def timeline(record: RunRecord, found: Mapping[str, Any]) -> Timeline | None:
    """The section of an explanation (explain.json); None where it lists no kernels."""
    kernels = _kernels(record, found.get("kernels", []))
    total = sum(kernel.ms for kernel in kernels)
    if total <= 0:
        return None
    bounds = [name for name in BOUNDS if any(kernel.bound == name for kernel in kernels)]
    if bounds == [UNKNOWN]:
        bounds = []
    names = list(dict.fromkeys(kernel.precision for kernel in kernels))
    precisions = sorted(names, key=lambda name: PRECISIONS.index(name) if name in PRECISIONS else len(PRECISIONS))
    branches = list(dict.fromkeys(kernel.branch for kernel in kernels))
    colours = _branch_colours(kernels)
    parts = {name: [kernel for kernel in kernels if kernel.branch == name] for name in branches}
    return Timeline(
        sentence=_sentence(kernels, total, bounds, str(found.get("kind", "predicted"))),
        drawing=strip(kernels, told=bool(bounds)),
        bounds={name: BOUND_COLOURS[name] for name in bounds},
        precisions={name: PRECISION_COLOURS.get(name, OTHER_COLOUR) for name in precisions},
        rows=[
            _row(name, part, total, bounds, precisions, colours.get(name))
            for name, part in ({ALL: kernels} | parts).items()
        ],
    )


def _kernels(record: RunRecord, listed: Iterable[Mapping[str, Any]]) -> list[Kernel]:
    branches: Mapping[str, Sequence[str]] = record.task.get("branches", {})
    return [
        Kernel(
            branch=_branch(str(entry["name"]), str(entry["op"]), branches),
            precision=str(entry["precision"]),
            bound=str(entry.get("bound") or UNKNOWN),
            ms=float(entry["ms"]),
            macs=int(entry.get("macs", 0)),
        )
        for entry in listed
    ]


def _branch(name: str, op: str, branches: Mapping[str, Sequence[str]]) -> str:
    """Nodes are named after modules, camera.stem.0/Conv; those that tools put between them are not."""
    module = name.partition("/")[0]
    for branch, paths in branches.items():
        if any(module == path or module.startswith(f"{path}.") for path in paths):
            return branch
    return CONVERTING if op in CONVERSIONS else FUSION


def _sentence(kernels: Sequence[Kernel], total: float, bounds: Sequence[str], kind: str) -> str:
    """What to know of it: how long, in how many kernels, and what most of it waits for."""
    how = "predicted for the target" if kind == "predicted" else "profiled by ONNX Runtime on the machine that ran it"
    said = f"{three(total)} ms in {len(kernels)} kernels, {how}."
    if not bounds:
        return f"{said} ONNX Runtime does not tell what bounds a kernel."
    shares = {name: sum(kernel.ms for kernel in kernels if kernel.bound == name) / total for name in bounds}
    most = max(shares, key=lambda name: shares[name])
    words = {
        "compute": "in kernels that wait for arithmetic: fewer channels or a narrower precision help",
        "memory": "in kernels that wait for memory: fewer pixels, a narrower precision or fusion help",
        "launch": "in kernels that take longer to start than to run: fewer of them help, fewer channels do not",
        UNKNOWN: "in kernels of which it is not known",
    }
    return f"{said} {percent(shares[most])} of it is {words[most]}."


def _row(
    name: str,
    part: Sequence[Kernel],
    total: float,
    bounds: Sequence[str],
    precisions: Sequence[str],
    colour: int | None,
) -> ShareRow:
    ms, macs = sum(kernel.ms for kernel in part), sum(kernel.macs for kernel in part)

    def share(chosen: Callable[[Kernel], bool]) -> str:
        mine = sum(kernel.ms for kernel in part if chosen(kernel))
        return percent(mine / ms) if mine else DASH

    return ShareRow(
        name=name,
        colour=colour,
        kernels=len(part),
        time=f"{three(ms)} ms",
        share=percent(ms / total),
        macs=count(macs) if macs else DASH,
        bounds=[share(lambda kernel, bound=bound: kernel.bound == bound) for bound in bounds],  # type: ignore[misc]
        precisions=[share(lambda kernel, name=name: kernel.precision == name) for name in precisions],  # type: ignore[misc]
    )


def strip(kernels: Sequence[Kernel], *, told: bool, width: float = 1060.0) -> Markup:
    """Kernels along the time that they take, in up to three lanes; neighbours of one kind are one segment.

    Args:
        kernels: in running order.
        told: whether it is known what bounds them.
        width: of the drawing, in its own units.
    """
    total = sum(kernel.ms for kernel in kernels)
    left, top = 84.0, 4.0
    lanes: list[tuple[str, list[str], Mapping[str, int]]] = [
        ("modality", [kernel.branch for kernel in kernels], _branch_colours(kernels)),
        ("precision", [kernel.precision for kernel in kernels], PRECISION_COLOURS),
    ]
    if told:
        lanes.append(("bound by", [kernel.bound for kernel in kernels], BOUND_COLOURS))
    bottom = top + len(lanes) * (LANE + GAP)

    def x(ms: float) -> float:
        return left + ms / total * (width - left)

    parts = [axis_below(x, nice_ticks(0.0, total, 6), top, bottom, lambda ms: f"{number(ms, 3)} ms")]
    for index, (name, kinds, colours) in enumerate(lanes):
        y = top + index * (LANE + GAP)
        parts.append(text("c-label", 0.0, y + 15, name))
        start = 0.0
        for kind, group in itertools.groupby(zip(kinds, kernels, strict=True), key=lambda pair: pair[0]):
            end = start + sum(kernel.ms for _, kernel in group)
            colour = colours.get(kind, OTHER_COLOUR)
            parts.append(rect(f"c-seg c-seg-{colour}", x(start), y, x(end) - x(start), LANE, radius=0.0))
            if x(end) - x(start) > CHARACTER * len(kind) + 10:
                parts.append(text("c-in", (x(start) + x(end)) / 2, y + 15, kind))
            start = end
    return drawing(
        width, bottom + 20, "Kernels in running order, as wide as the time they take", parts, name="chart wide"
    )


def _branch_colours(kernels: Sequence[Kernel]) -> dict[str, int]:
    """A colour a modality, in order of appearance; conversions are grey."""
    names = [name for name in dict.fromkeys(kernel.branch for kernel in kernels) if name != CONVERTING]
    return {name: index % OTHER_COLOUR for index, name in enumerate(names)} | {CONVERTING: OTHER_COLOUR}
