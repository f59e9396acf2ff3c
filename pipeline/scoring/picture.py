"""A picture of the scores: per modality and layer, how channels rank and which of them go."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fusepress.pipeline.graph.plan import FUSION, Group
from fusepress.pipeline.scoring.result import Vector

KEPT = "#1b6ca8"
REMOVED = "#e3a857"  # blue and amber stay apart for colour-blind readers and in grey
SPREAD = "#7a7a7a"
ROW_INCHES = 0.2
LABEL_LENGTH = 44


def score_picture(
    scores: Mapping[str, Vector], groups: Sequence[Group], kept: Mapping[str, Sequence[int]] | None = None
) -> str:
    """Draw every coupled group as one row under its modality; the same input gives the same text.

    Left: its channels, kept and removed. Right: where its channels rank among all channels of the model (0 = lowest
    score): the middle half as a bar, the median as a tick, and the whole range as a line.

    Args:
        scores: group id -> vector of shape (width,).
        groups: the groups, in model order.
        kept: group id -> channels that stay (groups left out stay whole), or None before anything is allocated.

    Returns:
        SVG.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rows = _rows(groups)
    ranks = _ranks(scores, groups)
    with mpl.rc_context({"svg.hashsalt": "fusepress", "svg.fonttype": "none", "font.size": 8.0}):
        figure = Figure(figsize=(10.0, 1.2 + ROW_INCHES * max(1, len(rows))), layout="constrained")
        widths, spread = figure.subplots(1, 2, sharey=True, width_ratios=[1.2, 1.0])
        for y, row in enumerate(rows):
            if isinstance(row, Group):
                _draw_width(widths, y, row, kept)
                _draw_ranks(spread, y, ranks[row.id])
        _decorate(widths, spread, rows, kept)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def _rows(groups: Sequence[Group]) -> list[Group | str]:
    """Modality headings and their groups, the fusion last."""
    branches = sorted({group.branch for group in groups}, key=lambda branch: (branch == FUSION, branch))
    rows: list[Group | str] = []
    for branch in branches:
        rows += [branch, *(group for group in groups if group.branch == branch)]
    return rows


def _ranks(scores: Mapping[str, Vector], groups: Sequence[Group]) -> dict[str, np.ndarray[Any, Any]]:
    """Per group, its channels' ranks among all channels, in percent."""
    if not groups:
        return {}
    values = np.concatenate([scores[group.id] for group in groups])
    rank = np.empty(len(values))
    rank[np.argsort(values, kind="stable")] = np.linspace(0.0, 100.0, len(values))
    parts = np.split(rank, np.cumsum([len(scores[group.id]) for group in groups])[:-1])
    return {group.id: part for group, part in zip(groups, parts, strict=True)}


def _kept_count(group: Group, kept: Mapping[str, Sequence[int]] | None) -> int:
    return group.width if kept is None or group.id not in kept else len(kept[group.id])


def _draw_width(axes: Any, y: int, group: Group, kept: Mapping[str, Sequence[int]] | None) -> None:
    stays = _kept_count(group, kept)
    axes.barh(y, stays, height=0.7, color=KEPT)
    axes.barh(y, group.width - stays, left=stays, height=0.7, color=REMOVED)
    label = f" {group.width}" if kept is None else f" {stays} of {group.width}"
    axes.text(group.width, y, label, va="center", fontsize=7)


def _draw_ranks(axes: Any, y: int, ranks: np.ndarray[Any, Any]) -> None:
    low, first, middle, third, high = np.percentile(ranks, [0, 25, 50, 75, 100])
    axes.plot([low, high], [y, y], color=SPREAD, linewidth=0.8)
    axes.barh(y, third - first, left=first, height=0.5, color=SPREAD)
    axes.plot([middle, middle], [y - 0.35, y + 0.35], color="black", linewidth=1.2)


def _decorate(widths: Any, spread: Any, rows: Sequence[Group | str], kept: Mapping[str, Sequence[int]] | None) -> None:
    widths.set_yticks(range(len(rows)), [_label(row, rows, kept) for row in rows])
    for tick, row in zip(widths.get_yticklabels(), rows, strict=True):
        tick.set_fontweight("bold" if isinstance(row, str) else "normal")
    widths.set_ylim(len(rows) - 0.4, -0.6)
    widths.set_xlabel("channels" if kept is None else "channels: kept (blue), removed (amber)")
    widths.margins(x=0.15)
    spread.set_xlim(0, 100)
    spread.set_xlabel("rank of its channels by score, percent (0 = lowest)")
    for axes in (widths, spread):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)


def _label(row: Group | str, rows: Sequence[Group | str], kept: Mapping[str, Sequence[int]] | None) -> str:
    if isinstance(row, Group):
        first, *others = [name.removesuffix(".weight") for name in row.producers] or [row.id]
        text = f"{first} (+{len(others)})" if others else first
        return text if len(text) <= LABEL_LENGTH else f"...{text[-LABEL_LENGTH + 3 :]}"
    members = [group for group in rows if isinstance(group, Group) and group.branch == row]
    total = sum(group.width for group in members)
    return f"{row}: {sum(_kept_count(group, kept) for group in members)} of {total} channels"
