"""Loss curves of the stages that train, from the `history` (and the `looks`) in their details.

`history` is a list of points {"step", "lr", "losses": {name: value}, "weights": {name: value}}, the last optional;
`looks` of {"step", "drop", "high"}: what the early stop saw on the calib split, null where it was undefined.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from fusepress.pipeline.evidence import RunRecord, StageRecord
from fusepress.pipeline.report import charts, view

DISTILLED = "distill"
MOST_LINES = len(charts.LINE_STYLES)
LOG_RATIO = 30.0  # losses that span more are drawn on a logarithmic axis


@dataclass(frozen=True, slots=True)
class Panel:
    """One drawing of a stage's training."""

    heading: str
    drawing: Markup
    remark: str


def panels(record: RunRecord) -> list[tuple[str, list[Panel]]]:
    """(stage, drawings) of every stage that recorded two steps or more."""
    made = []
    for stage in record.stages:
        points = stage.details.get("history")
        if isinstance(points, list) and len(points) > 1 and all(isinstance(p, Mapping) and "step" in p for p in points):
            made.append((stage.name, _of_stage(stage, points)))
    return made


def _of_stage(stage: StageRecord, points: list[Mapping[str, Any]]) -> list[Panel]:
    losses = _series(points, "losses")
    own = {name: line for name, line in losses.items() if not name.startswith(DISTILLED)}
    taught = {name.removeprefix(f"{DISTILLED}."): line for name, line in losses.items() if name not in own}
    rate = {"learning rate": [(float(p["step"]), float(p["lr"])) for p in points if "lr" in p]}
    found = [
        _panel(stage.name, "Losses", own, "Of each step's training batches alone."),
        _panel(stage.name, "Distillation losses", taught, "Times their weight in the recipe."),
        _panel(stage.name, "Weights of the losses", _series(points, "weights"), "Learned with the model."),
        _panel(stage.name, "Learning rate", rate, "", straight=True),
        _looks(stage),
    ]
    return [panel for panel in found if panel is not None]


def _series(points: list[Mapping[str, Any]], key: str) -> dict[str, list[tuple[float, float]]]:
    lines: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        for name, value in point.get(key, {}).items():
            lines.setdefault(str(name), []).append((float(point["step"]), float(value)))
    return lines


def _panel(
    stage: str, heading: str, lines: Mapping[str, list[tuple[float, float]]], remark: str, *, straight: bool = False
) -> Panel | None:
    if not any(lines.values()):
        return None
    shown = dict(list(lines.items())[:MOST_LINES])
    values = [value for line in shown.values() for _, value in line]
    logarithmic = not straight and min(values) > 0 and max(values) > LOG_RATIO * min(values)
    notes = [remark, "Logarithmic axis." if logarithmic else ""]
    if len(lines) > len(shown):
        notes.append(f"{len(lines) - len(shown)} more are in run.json.")
    drawing = charts.line_chart(
        shown, title=f"{heading} of {stage}", show=lambda value: view.number(value, 3), logarithmic=logarithmic
    )
    return Panel(heading, drawing, " ".join(note for note in notes if note))


def _looks(stage: StageRecord) -> Panel | None:
    looks = stage.details.get("looks")
    if not isinstance(looks, list) or len(looks) < 2:
        return None
    lines = {
        "drop": [(float(look["step"]), float(look["drop"])) for look in looks if look.get("drop") is not None],
        "95 % bound": [(float(look["step"]), float(look["high"])) for look in looks if look.get("high") is not None],
    }
    if len(lines["drop"]) < 2:
        return None
    told = {name: line for name, line in lines.items() if line}
    return _panel(stage.name, "Drop on the calib split", told, "What the early stop looked at.", straight=True)
