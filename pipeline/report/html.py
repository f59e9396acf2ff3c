"""report.html: one self-contained page made of run.json and the pictures that stages left in the run folder."""

from __future__ import annotations

import base64
import importlib.resources
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import jinja2
from markupsafe import Markup

from fusepress.pipeline.evidence import Kind, RunRecord, read_run
from fusepress.pipeline.report import charts, training, view
from fusepress.pipeline.report.explain import explain_view
from fusepress.pipeline.report.quantization import quantization
from fusepress.pipeline.report.sparsity import sparse_rows
from fusepress.pipeline.store import atomic_write_text

REPORT_HTML = "report.html"
MOST_LAYERS = 60  # per branch; the table below the charts has them all
TYPES = {".png": "image/png", ".svg": "image/svg+xml", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}
KIND_WORDS: dict[Kind, str] = {
    "measured": "the very artifact ran on the very device",
    "simulated": "the ONNX file or the torch model ran on this CPU instead of the target",
    "predicted": "a model of the target said so; nothing ran",
}


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture inside the page."""

    title: str
    stage: str
    uri: str


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
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    pictures, left_out = _pictures(record, run_dir)
    template = environment.from_string(_resource("report.html.j2"))
    return template.render(
        record=record,
        style=Markup(_resource("style.css")),  # noqa: S704 - our own file
        banner=view.banner(record),
        tiles=view.tiles(record),
        gates=[(row, _gate_picture(row)) for row in view.gate_rows(record)],
        charts=_step_charts(record),
        training=training.panels(record),
        stages=view.stage_rows(record),
        primary=view.primary_of(record),
        branches=[(row, *_shares(row)) for row in view.branch_rows(record)],
        widths=_width_charts(record),
        groups=view.group_rows(record),
        failures=view.failure_rows(record),
        sparse=sparse_rows(record),
        quantized=quantization(record),
        explained=explain_view(record, run_dir),
        pictures=pictures,
        left_out=left_out,
        cards=_cards(record),
        precision=view.precision_of(record),
        target=_pairs(record.target_profile),
        machine=_pairs(record.environment),
        kinds={kind: (charts.legend_mark(kind), words) for kind, words in KIND_WORDS.items()},
        tone_of=view.TONES,
        notes={name: view.artifact_note(record, name) for name in record.artifacts},
        count=view.count,
        quantity=view.quantity,
        number=view.number,
        dash=view.DASH,
    )


def _cards(record: RunRecord) -> list[tuple[str, str, list[tuple[str, list[tuple[str, str]]]]]]:
    """(section word, card title, cards), those that the run has."""
    kinds = (
        ("Choices", "What was tried", "choice"),
        ("Calibration", "Calibration card", "calibration"),
        ("Sparsity", "Sparsity", "sparsity"),
    )
    found = [(word, title, view.cards(record, key)) for word, title, key in kinds]
    return [row for row in found if row[2]]


def _resource(name: str) -> str:
    return importlib.resources.files("fusepress.pipeline.report").joinpath(name).read_text(encoding="utf-8")


def _pairs(mapping: dict[str, Any]) -> list[tuple[str, str]]:
    return [(view.words_of(str(key)), view.plain(value)) for key, value in mapping.items() if value not in ({}, [], "")]


# -------------------------------------------------------------------------------------------------------------- charts


def _step_charts(record: RunRecord) -> list[tuple[str, Markup, str]]:
    """(heading, drawing, remark) of accuracy and latency after each stage."""
    primary = view.primary_of(record)
    made = []
    for name, heading in ((f"accuracy.{primary}", f"Accuracy: {primary}"), (view.LATENCY, "Latency on the target")):
        seen = view.steps(record, name)
        if not seen:
            continue
        limit, label = _step_limit(record, name)
        drawing = charts.step_chart(
            [charts.Step(stage, m.value, m.low, m.high, m.kind) for stage, m in seen],
            title=heading,
            show=lambda value, name=name: view.quantity(name, value),  # type: ignore[misc]
            show_tick=lambda value, unit=" ms" if name == view.LATENCY else "": view.number(value) + unit,  # type: ignore[misc]
            limit=limit,
            limit_label=label,
            from_zero=name == view.LATENCY,
        )
        made.append((heading, drawing, _remark(record, name)))
    return made


def _remark(record: RunRecord, name: str) -> str:
    if name == view.LATENCY:
        return "Batch 1, compute only, without copies to and from the device. Less is better."
    better = "Less" if view.metrics_of(record).get(name.removeprefix("accuracy.")) == "min" else "More"
    return f"On the evaluation split. {better} is better."


def _step_limit(record: RunRecord, name: str) -> tuple[float | None, str]:
    """Where the gate's limit lies on the axis of a step chart."""
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


# ------------------------------------------------------------------------------------------------------------ pictures


def _pictures(record: RunRecord, run_dir: Path) -> tuple[list[Picture], list[str]]:
    """The stages' pictures as data URIs, and what was left out and why."""
    found: list[Picture] = []
    left_out: list[str] = []
    for stage in record.stages:
        for entry in stage.details.get("pictures", []):
            relative, title = str(entry.get("path", "")), str(entry.get("title") or entry.get("path", ""))
            path = _inside(run_dir, stage.name, relative)
            kind = TYPES.get(PurePosixPath(relative).suffix.lower())
            if path is None or kind is None:
                reason = "is not a PNG, JPEG or SVG file" if kind is None else "is not in the run folder"
                left_out.append(f"{relative} of {stage.name} {reason}")
                continue
            data = base64.b64encode(path.read_bytes()).decode()
            found.append(Picture(title=title, stage=stage.name, uri=f"data:{kind};base64,{data}"))
    return found, left_out


def _inside(run_dir: Path, stage: str, relative: str) -> Path | None:
    """An existing file of the run, named from the run folder or from the stage's folder; nothing outside."""
    if not relative or PurePosixPath(relative).is_absolute() or ".." in PurePosixPath(relative).parts:
        return None
    return next((path for path in (run_dir / relative, run_dir / stage / relative) if path.is_file()), None)
