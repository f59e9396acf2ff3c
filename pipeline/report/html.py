"""report.html: one self-contained page made of run.json and the pictures that stages left in the run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from fusepress.pipeline.evidence import RunRecord, read_run
from fusepress.pipeline.report import charts, robustness, training, view
from fusepress.pipeline.report.explain import read_explanation, view_of
from fusepress.pipeline.report.pages import page
from fusepress.pipeline.report.pictures import pictures_of
from fusepress.pipeline.report.quantization import quantization
from fusepress.pipeline.report.sparsity import is_count, sparse_numbers, sparse_rows
from fusepress.pipeline.report.timeline import timeline
from fusepress.pipeline.report.waterfall import Step, waterfall
from fusepress.pipeline.store import atomic_write_text

REPORT_HTML = "report.html"
MOST_LAYERS = 60  # per branch; the table below the charts has them all


def write_report(run_dir: Path) -> Path:
    """Write report.html of a run folder; the same run.json and pictures give the same bytes.

    Args:
        run_dir: the folder that holds run.json.

    Returns:
        The path of the page.

    Raises:
        UsageError: there is no run.json.
        StoreError: run.json is damaged, or the page cannot be written.
    """
    path = run_dir / REPORT_HTML
    atomic_write_text(path, render(read_run(run_dir), run_dir))
    return path


def render(record: RunRecord, run_dir: Path) -> str:
    """The page as text."""
    explanation = read_explanation(record, run_dir)
    return page(
        "report.html.j2",
        record=record,
        banner=view.banner(record),
        tiles=view.tiles(record),
        gates=[(row, _gate_picture(row)) for row in view.gate_rows(record)],
        charts=_waterfalls(record),
        training=training.panels(record),
        stages=view.stage_rows(record),
        primary=view.primary_of(record),
        branches=[(row, *_shares(row)) for row in view.branch_rows(record)],
        widths=_width_charts(record),
        groups=view.group_rows(record),
        failures=robustness.failure_rows(record),
        failure_charts=robustness.drawings(record),
        sparse=sparse_rows(record),
        sparse_numbers=sparse_numbers(record),
        quantized=quantization(record),
        explained=None if explanation is None else view_of(explanation),
        timeline=None if explanation is None else timeline(record, explanation),
        pictures=pictures_of(record, run_dir),
        cards=_cards(record),
        precision=view.precision_of(record),
        target=_pairs(record.target_profile),
        machine=_pairs(_tools_apart(record.environment)),
        notes={name: view.artifact_note(record, name) for name in record.artifacts},
        count=view.count,
        quantity=view.quantity,
    )


def _cards(record: RunRecord) -> list[tuple[str, str, list[tuple[str, list[tuple[str, str]]]]]]:
    """(section word, card title, cards), those that the run has."""
    kinds = (
        ("Choices", "What was tried", "choice"),
        ("Calibration", "Calibration card", "calibration"),
        ("Sparsity", "Sparsity", "sparsity"),
    )
    counted = [stage.name for stage in record.stages if is_count(stage.details.get("sparsity"))]
    found = [
        (word, title, [card for card in view.cards(record, key) if key != "sparsity" or card[0] not in counted])
        for word, title, key in kinds
    ]
    return [row for row in found if row[2]]


def _tools_apart(environment: dict[str, Any]) -> dict[str, Any]:
    """A line a tool: a reader looks for one version."""
    tools = environment.get("tools")
    rest = {key: value for key, value in environment.items() if key != "tools"}
    return rest | tools if isinstance(tools, dict) else environment


def _pairs(mapping: dict[str, Any]) -> list[tuple[str, str]]:
    return [(view.words_of(str(key)), view.plain(value)) for key, value in mapping.items() if value not in ({}, [], "")]


# -------------------------------------------------------------------------------------------------------------- charts


def _waterfalls(record: RunRecord) -> list[tuple[str, Markup, str]]:
    """(heading, drawing, remark) of accuracy and latency after each stage."""
    primary = view.primary_of(record)
    made = []
    for name, heading in ((f"accuracy.{primary}", f"Accuracy: {primary}"), (view.LATENCY, "Latency on the target")):
        seen = view.steps(record, name)
        if not seen:
            continue
        limit, label = _step_limit(record, name)
        more = name != view.LATENCY and view.metrics_of(record).get(primary) != "min"
        drawing = waterfall(
            [Step(stage, m.value, m.low, m.high, m.kind) for stage, m in seen],
            title=heading,
            show=lambda value, name=name: view.quantity(name, value),  # type: ignore[misc]
            show_change=lambda value, name=name: view.signed(name, value),  # type: ignore[misc]
            show_tick=lambda value, unit=" ms" if name == view.LATENCY else "": view.number(value) + unit,  # type: ignore[misc]
            more_is_better=more,
            limit=limit,
            limit_label=label,
            from_zero=name == view.LATENCY,
        )
        made.append((heading, drawing, _remark(name, more_is_better=more)))
    return made


def _remark(name: str, *, more_is_better: bool) -> str:
    where = (
        "Batch 1, compute only, without copies to and from the device."
        if name == view.LATENCY
        else "On the evaluation split."
    )
    return (
        f"{where} {'More' if more_is_better else 'Less'} is better. Bars: what the stage changed, green for the better."
    )


def _step_limit(record: RunRecord, name: str) -> tuple[float | None, str]:
    """Where the gate's limit lies on the axis of a waterfall."""
    verdict = next((v for v in view.verdicts_of(record) if v.gate == name), None)
    if verdict is None or verdict.limit is None:
        return None, ""
    if name == view.LATENCY:
        return verdict.limit, f"limit {view.number(verdict.limit)} ms"
    dense = next((m.value for stage, m in view.steps(record, name) if stage == view.BASELINE), None)
    if dense is None:
        return None, ""
    if view.metrics_of(record).get(name.removeprefix("accuracy.")) == "min":
        return dense + verdict.limit, f"highest allowed {view.quantity(name, dense + verdict.limit)}"
    return dense - verdict.limit, f"lowest allowed {view.quantity(name, dense - verdict.limit)}"


def _gate_picture(row: view.GateRow) -> Markup | None:
    verdict = row.verdict
    if verdict.value is None or verdict.limit is None:
        return None
    spread = f", interval {row.spread}" if row.spread else ""
    return charts.gate_chart(
        value=verdict.value,
        low=verdict.low,
        high=verdict.high,
        limit=verdict.limit,
        at_most=row.at_most,
        tone=row.tone,
        title=f"{row.title}: {row.value}{spread}; {row.relation} {row.limit} allowed",
    )


def _shares(row: view.BranchRow) -> tuple[Markup, Markup, str, str]:
    macs = row.macs_after / row.macs_before if row.macs_before else 1.0
    params = row.params_after / row.params_before if row.params_before else 1.0
    return (
        charts.share_bar(macs, f"{view.percent(macs)} of the MACs of {row.name} kept"),
        charts.share_bar(params, f"{view.percent(params)} of the parameters of {row.name} kept"),
        view.percent(macs),
        view.percent(params),
    )


def _width_charts(record: RunRecord) -> list[tuple[str, Markup, int]]:
    """(branch, drawing, layers left out of it); all branches share one scale."""
    rows = view.group_rows(record)
    most = max((row.width for row in rows), default=1)
    made = []
    for branch in dict.fromkeys(row.branch for row in rows):
        mine = [row for row in rows if row.branch == branch]
        shown = [(row.label, row.width, row.kept) for row in mine[:MOST_LAYERS]]
        title = f"Layer widths of {branch} before and after pruning, as in the table below"
        made.append((branch, charts.width_chart(shown, title=title, most=most), len(mine) - len(shown)))
    return made
