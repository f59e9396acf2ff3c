"""summary.md: a page for a pull request, with the verdict, the gates and the figures of the release."""

from __future__ import annotations

import re
from pathlib import Path

from fusepress.pipeline.evidence import RunRecord, read_run
from fusepress.pipeline.report import view
from fusepress.pipeline.report.robustness import failure_rows
from fusepress.pipeline.store import atomic_write_text

SUMMARY_MD = "summary.md"
MARKS = {"pass": "\u2705", "fail": "\u274c", "inconclusive": "\u2754", "anomalous": "\u26a0\ufe0f", "pending": "\u23f3"}


def write_summary(run_dir: Path) -> Path:
    """Write summary.md of a run folder; the same run.json gives the same bytes.

    Args:
        run_dir: the folder that holds run.json.

    Returns:
        The path of the file.

    Raises:
        UsageError: there is no run.json.
        StoreError: run.json is damaged, or the file cannot be written.
    """
    path = run_dir / SUMMARY_MD
    atomic_write_text(path, render(read_run(run_dir)))
    return path


def render(record: RunRecord) -> str:
    """The page as text."""
    banner = view.banner(record)
    place = [record.target, record.target_profile.get("power_mode"), view.precision_of(record)]
    target = " / ".join(str(part) for part in place if part)
    blocks = [
        f"## {MARKS[banner.tone]} {banner.word}: {_code(record.name)} for {_code(target)}",
        _text(banner.why),
        _gates(record),
        _figures(record),
        _failures(record),
        _artifacts(record),
        _reproduce(record),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _gates(record: RunRecord) -> str:
    rows = [
        [
            f"{MARKS[row.tone]} {row.verdict.verdict}",
            f"{_text(row.title)} {_code(row.verdict.gate)}",
            _spread(row.value, row.spread),
            f"{row.relation} {row.limit}",
            row.kind or view.DASH,
            _text(row.verdict.why),
        ]
        for row in view.gate_rows(record)
    ]
    return _table(["Verdict", "Gate", "Value (95 % interval, predicted 90 %)", "Limit", "Evidence", "Why"], rows)


def _figures(record: RunRecord) -> str:
    rows = []
    for tile in view.tiles(record):
        counted = tile.label in ("MACs", "parameters", "ONNX file")
        evidence = view.DASH if counted else f"{tile.after.kind}{', extrapolating' if tile.after.extrapolating else ''}"
        rows.append(
            [
                _text(tile.label),
                _spread(tile.before.text, tile.before.spread) if tile.before is not None else view.DASH,
                _spread(tile.after.text, tile.after.spread),
                tile.change or view.DASH,
                evidence,
            ]
        )
    return _table(["", "Dense", "Compressed", "Change", "Evidence"], rows)


def _failures(record: RunRecord) -> str:
    metric = _text(view.primary_of(record))
    rows = [
        [
            f"{_text(row.failure)} ({row.severity})",
            row.dense.text if row.dense is not None else view.DASH,
            row.compressed.text if row.compressed is not None else view.DASH,
            row.extra or view.DASH,
            row.verdict.verdict if row.verdict is not None else "no gate",
        ]
        for row in failure_rows(record)
    ]
    return _table(["Failure (severity)", f"Dense {metric}", f"Compressed {metric}", "Extra drop", "Gate"], rows)


def _artifacts(record: RunRecord) -> str:
    rows = [
        [_text(_artifact_name(record, name)), _code(artifact.path), _code(artifact.sha256[:16])]
        for name, artifact in record.artifacts.items()
    ]
    word = "Releasable" if record.verdict == "PASS" else "Releasable instead"
    note = f"{word}: **{_text(view.words_of(record.released))}**" if record.released else ""
    table = _table(["Artifact", "File", "sha256"], rows)
    return "\n\n".join(part for part in (note, table) if part)


def _artifact_name(record: RunRecord, name: str) -> str:
    note = view.artifact_note(record, name)
    return f"{view.words_of(name)} ({note})" if note else view.words_of(name)


def _reproduce(record: RunRecord) -> str:
    if not record.command:
        return ""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", record.command)), default=0))
    return f"{fence}sh\n{record.command}\n{fence}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return ""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _spread(text: str, spread: str) -> str:
    return f"{text} ({spread})" if spread else text


def _text(text: str) -> str:
    """Text that Markdown and HTML leave alone, on one line so that a table holds."""
    escaped = re.sub(r"([\\`*\[\]|])", r"\\\1", " ".join(text.split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _code(text: str) -> str:
    """Text as code within a table cell."""
    plain = " ".join(text.split()).replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", plain)), default=0))
    pad = " " if plain.startswith("`") or plain.endswith("`") else ""
    return f"{fence}{pad}{plain}{pad}{fence}"
