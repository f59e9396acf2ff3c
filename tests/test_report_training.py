"""Loss curves in the report: what is drawn, and that it is what was recorded."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusepress.pipeline.evidence import RunRecord
from fusepress.pipeline.report import charts, training
from fusepress.pipeline.report.html import render
from tests.test_report import check_page, record_of

HISTORY = [
    {
        "step": step,
        "lr": 0.01 / step,
        "losses": {"class": 2.0 / step, "<boxes>": 0.5, "distill.logits": 3.0 / step**3},
        "weights": {"class": 1.0, "<boxes>": 1.0 + 0.1 * step},
    }
    for step in range(1, 11)
]
LOOKS = [{"step": step, "value": 0.6, "drop": 0.3 / step, "high": 0.4 / step, "met": step == 10} for step in (5, 10)]


def record_with(**details: Any) -> RunRecord:
    record = record_of()
    stage = record.stage("finetune")
    assert stage is not None
    stage.details |= details
    return record


def points_of(drawing: str) -> list[list[tuple[float, float]]]:
    lines = re.findall(r'<polyline class="c-line [^>]*points="([^"]*)"', drawing)
    return [[(float(x), float(y)) for x, y in (pair.split(",") for pair in line.split())] for line in lines]


def test_losses_distillation_weights_rate_and_looks_each_have_a_drawing() -> None:
    ((stage, panels),) = training.panels(record_with(history=HISTORY, looks=LOOKS))
    assert stage == "finetune"
    headings = [panel.heading for panel in panels]
    wanted = ["Losses", "Distillation losses", "Weights of the losses", "Learning rate", "Drop on the calib split"]
    assert headings == wanted
    own, taught, _, rate, drop = (str(panel.drawing) for panel in panels)
    assert "class from 2 to 0.2" in own
    assert "&lt;boxes&gt; from 0.5 to 0.5" in own
    assert "logits" not in own
    assert "logits from 3 to 0.003" in taught
    assert "learning rate from 0.01 to 0.001" in rate
    assert "95 % bound from 0.08 to 0.04" in drop
    assert [len(line) for line in points_of(own)] == [10, 10]


def test_looks_at_an_undefined_metric_leave_a_gap_or_no_drawing() -> None:
    blind = {"step": 15, "value": None, "drop": None, "high": None, "met": False}
    ((_, panels),) = training.panels(record_with(history=HISTORY, looks=[*LOOKS, blind]))
    assert "95 % bound from 0.08 to 0.04" in str(panels[-1].drawing)
    assert [len(line) for line in points_of(str(panels[-1].drawing))] == [2, 2]
    ((_, panels),) = training.panels(record_with(history=HISTORY, looks=[LOOKS[0], blind]))
    assert panels[-1].heading == "Learning rate"


def test_a_loss_that_falls_by_orders_is_drawn_on_a_logarithmic_axis() -> None:
    ((_, panels),) = training.panels(record_with(history=HISTORY))
    assert "Logarithmic axis." in panels[1].remark
    assert "Logarithmic" not in panels[0].remark
    (line,) = points_of(str(panels[1].drawing))
    ys = [y for _, y in line]
    # the loss is 3 / step^3: equal ratios of steps are equal distances
    assert ys[1] - ys[0] == pytest.approx(ys[3] - ys[1], abs=0.2)
    assert ys[7] - ys[3] == pytest.approx(ys[3] - ys[1], abs=0.2)


@given(values=st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=30))
def test_points_stand_in_the_plot_in_the_order_of_their_values(values: list[float]) -> None:
    line = [(float(step), value) for step, value in enumerate(values)]
    (drawn,) = points_of(str(charts.line_chart({"loss": line}, title="t", show=str)))
    for (_, y), (_, other), value, another in zip(drawn, drawn[1:], values, values[1:], strict=False):
        assert (y - other) * (value - another) <= 0, "more is higher up"
    assert [x for x, _ in drawn] == sorted(x for x, _ in drawn)
    assert all(8 <= y <= 198.1 and 52 <= x <= 402 for x, y in drawn)


@given(wanted=st.lists(st.floats(12, 198), min_size=1, max_size=6))
def test_labels_are_a_line_apart_and_inside(wanted: list[float]) -> None:
    placed = sorted(charts._apart(wanted, 12, 198))
    assert all(later - earlier >= 12.99 for earlier, later in itertools.pairwise(placed))
    assert placed[-1] <= 198
    assert placed[0] >= 12 - 13 * (len(wanted) - 1), "six labels do fit"


def test_lines_beyond_the_styles_are_counted_not_drawn() -> None:
    losses = {f"loss {number}": 1.0 for number in range(9)}
    history = [{"step": step, "lr": 0.1, "losses": losses} for step in (1, 2)]
    ((_, panels),) = training.panels(record_with(history=history))
    assert len(points_of(str(panels[0].drawing))) == len(charts.LINE_STYLES)
    assert "3 more are in run.json" in panels[0].remark


def test_the_page_shows_the_curves_and_stays_valid() -> None:
    page = check_page(render(record_with(history=HISTORY, looks=LOOKS), Path()))
    assert "Distillation losses" in page.words
    assert "history" not in page.words
    assert "Training" not in check_page(render(record_of(), Path())).words


@pytest.mark.parametrize("history", [[], HISTORY[:1], "none", [{"lr": 1}, {"lr": 2}]])
def test_a_history_without_two_steps_draws_nothing(history: Any) -> None:
    assert training.panels(record_with(history=history)) == []
