"""Results as text for a terminal."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fusepress.pipeline.evidence import Measurement, Verdict

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from fusepress.export.explain import Explanation
    from fusepress.pipeline.api import Measured, Outcome
    from fusepress.pipeline.bundling.make import Bundle
    from fusepress.pipeline.bundling.reproduce import Reproduced
    from fusepress.pipeline.bundling.verify import Verified
    from fusepress.pipeline.comparing import Compared, Comparison
    from fusepress.targets.doctor import DeviceFacts, Finding
    from fusepress.targets.fit import PersonalFit
    from fusepress.targets.predict import Prediction
    from fusepress.targets.profile import Profile

OPERATOR_BASIS = {
    "run": "as the library itself says",
    "read": "as its documentation says",
    "not confirmed": "by a list that is not confirmed for this version",
}
STYLE = {"PASS": "green", "FAIL": "red", "INCONCLUSIVE": "yellow", "ANOMALOUS": "yellow"}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def print_verdicts(verdicts: Sequence[Verdict]) -> None:
    """The table of gates on standard output, and below it why a gate did not pass."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("gate", "verdict", "limit", "value", "interval"):
        table.add_column(column, no_wrap=True, justify="left" if column in ("gate", "verdict") else "right")
    for v in verdicts:
        interval = f"{_number(v.low)} to {_number(v.high)}" if v.low is not None or v.high is not None else "-"
        style = STYLE[v.verdict]
        table.add_row(escape(v.gate), f"[{style}]{v.verdict}[/{style}]", _number(v.limit), _number(v.value), interval)
    console = _console()
    console.print(table)
    for v in verdicts:
        if v.verdict != "PASS":
            console.print(f"{v.verdict} {v.gate}: {v.why}", markup=False, soft_wrap=True)


def _console() -> Console:
    """Standard output; where it is no terminal, wide enough that no column is cut."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 140)


def outcome_lines(outcome: Outcome) -> list[str]:
    """The end of a run: verdict, what may be released, where to look."""
    record = outcome.record
    lines = [] if outcome.worked else ["nothing to do: every stage was already there"]
    for name, artifact in record.artifacts.items():
        if name in ("onnx", "engine", "build_kit"):
            lines.append(f"{name:<9} {outcome.folder / artifact.path}  sha256 {artifact.sha256[:16]}")
    lines.append(f"report    {outcome.folder / 'report.html'}")
    if record.released == "dense_onnx":
        precision = "fp32" if record.target_profile.get("family") == "host" else "fp16"
        path = outcome.folder / record.artifacts["dense_onnx"].path
        lines.append(f"releasable instead: the dense model in {precision}, {path}")
    lines.append(f"verdict   {record.verdict}: {_first_sentence(record.why)}")
    return lines


def _first_sentence(why: str) -> str:
    return why if len(why) <= 160 else why[:157] + "..."


def print_compared(comparison: Comparison) -> None:
    """The table of runs; below it, which run is beaten by which, and what their recipes and environments differ in."""
    console = _console()
    console.print(_table_of(comparison.runs))
    lines = [f"{row.name} is beaten by {', '.join(row.beaten_by)}" for row in comparison.runs if row.beaten_by]
    for title, differences in (("recipe", comparison.recipe), ("environment", comparison.environment)):
        for key, values in differences.items():
            lines.append(f"{title:<12} {key}: {' | '.join('-' if value is None else str(value) for value in values)}")
    for line in [*lines, *(f"note         {note}" for note in comparison.notes)]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _table_of(rows: Sequence[Compared]) -> Table:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in (
        "",
        "run",
        "target",
        "precision",
        "verdict",
        "accuracy",
        "latency, ms",
        "MMACs",
        "MiB",
        "worst failure",
    ):
        folds = column in ("run", "target", "worst failure")  # figures are never cut
        table.add_column(column, no_wrap=not folds, overflow="fold" if folds else "ignore", min_width=12 * folds)
    for row in rows:
        star = "*" if row.on_front else ""
        worst = "-" if row.worst_failure is None else f"{row.worst_failure[0]} {_number(row.worst_failure[1])}"
        macs = None if row.macs is None else row.macs / 1e6
        figures = (_figure(row.accuracy), _figure(row.latency), _number(macs), _number(row.size_mib), worst)
        table.add_row(star, escape(row.name), escape(row.target), row.precision or "-", row.verdict or "-", *figures)
    return table


def _figure(m: Measurement | None) -> str:
    if m is None:
        return "-"
    interval = "" if m.low is None or m.high is None else f"\n({m.low:.4g} to {m.high:.4g})"
    return f"{m.value:.4g} {m.kind}{interval}"


def bundle_lines(bundle: Bundle) -> list[str]:
    """A bundle that was written."""
    size_mib = bundle.path.stat().st_size / 2**20
    lines = [f"bundle    {bundle.path}  {size_mib:.1f} MiB, {len(bundle.manifest.files)} files"]
    lines += [f"verdict   {bundle.manifest.verdict}"]
    lines += [f"signed    by the key {bundle.signed_by}"] if bundle.signed_by else []
    return lines + [f"note      {note}" for note in bundle.notes]


def verified_lines(found: Verified) -> list[str]:
    """Checks of a bundle, and what none of them can tell; nothing that a bundle holds can begin a line of its own."""
    whole = "every check passed" if found.ok else "do not use it"
    end = f"{found.name}: {whole}; its verdict is {found.verdict}"
    lines = [] if found.ok and found.verdict == "PASS" else [end]  # what matters most, above all else
    lines += [f"{check.status:<12}{check.name:<11}{check.why}" for check in found.checks]
    lines += [f"{'not checked':<12}{why}" for why in found.not_checked]
    return [_plain(line) for line in [*lines, end]]


def _plain(text: str) -> str:
    """Without line breaks, escape sequences or marks that turn the direction of writing."""
    return "".join(character if character.isprintable() else "?" for character in text)


def reproduced_lines(found: Sequence[Reproduced]) -> list[str]:
    """Stages that were run again."""
    lines = [_plain(f"{stage.status:<10}{stage.stage:<10}{stage.why}") for stage in found]
    differing = [stage.stage for stage in found if stage.status == "different"]
    return [*lines, f"different: {', '.join(differing)}" if differing else "reproduced"]


def measured_lines(measured: Measured) -> list[str]:
    """Latency on this host, and the verdicts of the budgets."""
    lines = [_measurement_line(m) for m in measured.measurements]
    lines += _pipeline_lines(measured.environment.get("pipeline"))
    lines += [f"{v.verdict:<13}{v.gate} limit {_number(v.limit)} ms: {v.why}" for v in measured.verdicts]
    if measured.record is not None:
        lines.append(f"added to the run; its verdict is {measured.record.verdict}")
    return lines


def _measurement_line(m: Measurement) -> str:
    high = "no upper bound" if m.high is None else f"{m.high:.4g}"
    note = f"  ({m.note})" if m.note else ""
    if m.unit != "ms":
        return f"{m.name.removeprefix('latency.'):<8}{m.value:9.4g} {m.unit}   {m.kind}{note}"
    return (
        f"{m.name.removeprefix('latency.'):<8}{m.value:9.4g} ms   95 % interval {_number(m.low)} to {high}   "
        f"n {m.n}  {m.kind}{note}"
    )


def _pipeline_lines(pipeline: dict[str, Any] | None) -> list[str]:
    if pipeline is None:
        return []
    lines = [f"{'part':<20}{'ms':>9}{'slack':>9}{'can win':>9}   branches {pipeline['schedule']}"]
    for part in pipeline["parts"]:
        slack = "-" if part["critical"] else _number(part["slack_ms"])
        lines.append(f"{part['name']:<20}{_number(part['span']['value_ms']):>9}{slack:>9}{_number(part['gain_ms']):>9}")
    return lines


def doctor_lines(facts: DeviceFacts, findings: Sequence[Finding]) -> list[str]:
    """What a device is, and what of it matters to a latency."""
    version = facts.tensorrt.version if facts.tensorrt else "unknown"
    lines = [
        f"device    {facts.model or facts.gpu_name or facts.system}",
        f"software  {facts.release or 'no L4T release'}; TensorRT {version}; CUDA {facts.cuda or 'unknown'}",
    ]
    power = facts.power
    clocks = ", ".join(
        f"{name.upper()} {clock.now_mhz:g} MHz{' (locked)' if clock.locked else ''}"
        for name, clock in power.clocks.items()
    )
    heat = "no temperature" if power.hottest_c is None else f"{power.hottest_c:.0f} C"
    lines.append(f"state     power mode {power.mode or 'unknown'}; {clocks or 'no clocks told'}; {heat}")
    lines += [f"{finding.level:<10}{finding.what}: {finding.text}" for finding in findings]
    if not any(finding.level == "refuse" for finding in findings):
        lines.append("fit       a latency can be measured here")
    return lines


def plan_lines(facts: dict[str, Any]) -> list[str]:
    """A dry run as text."""
    lines = [f"run       {facts['run']}", f"target    {facts['target']} ({facts['power_mode']}, {facts['precision']})"]
    lines += [f"stage     {s['name']:<9} {s['state']}{': ' + s['why'] if 'why' in s else ''}" for s in facts["stages"]]
    lines += [f"warning   {warning}" for warning in facts.get("warnings", ())]
    if "modalities" in facts:
        lines.append(f"{'modality':<10}{'MMACs':>9}{'params':>10}{'groups':>8}{'prunable MACs':>15}{'params':>9}")
        lines += [
            f"{name:<10}{row['macs'] / 1e6:>9.1f}{int(row['params']):>10}{row['groups']:>8}"
            f"{100 * row['prunable_macs']:>13.0f} %{100 * row['prunable_params']:>7.0f} %"
            for name, row in facts["modalities"].items()
        ]
        lines += [f"frozen    {row['module']}: {row['reason']}" for row in facts["frozen"]]
    lines += _operator_lines(facts.get("operators"))
    lines += _budget_lines(facts.get("budget"))
    if "finetune_seconds" in facts:
        lines.append(f"finetune  about {facts['finetune_seconds'] / 60:.1f} min on this machine (dense speed)")
    return lines


def _operator_lines(operators: dict[str, Any] | None) -> list[str]:
    if operators is None or not (operators["checked"] or "refused" in operators):
        return []
    if not operators["checked"]:
        return [f"operators {operators['why']}"]
    refused, known = operators["refused"], OPERATOR_BASIS[operators["basis"]]
    if not refused:
        return [f"operators {operators['importer']} reads all of them ({known})"]
    left = [fault for fault in refused if not fault["rewritten"]]
    done = f", {len(refused) - len(left)} of them rewritten on export" if len(left) < len(refused) else ""
    lines = [f"operators {operators['importer']} does not take {len(refused)} node(s) of the dense model{done}"]
    for fault in refused:
        what = f"rewritten by {fault['mended_by']!r}" if fault["rewritten"] else fault["advice"]
        lines.append(f"          {fault['operator']} at {fault['node']}: {fault['why']} [{fault['basis']}]; {what}")
    if not operators["buildable"]:
        lines.append("          the target cannot build this model: nothing is gained by compressing it as it is")
    return lines


def _budget_lines(budget: dict[str, Any] | None) -> list[str]:
    if budget is None:
        return []
    if not budget["reachable"]:
        return [f"budget    cannot be reached: {budget['why']}"]
    lines = [
        (
            f"budget    {budget['unit']} {budget['fraction']:.3f} can be reached: {budget['achieved']:.4f} "
            f"with channels in multiples of {budget['align']}"
        )
    ]
    for key in ("latency_dense_ms", "latency_pruned_ms"):
        if key in budget:
            p = budget[key]
            flag = ", extrapolating" if p["extrapolating"] else ""
            name = key.removeprefix("latency_").removesuffix("_ms")
            lines.append(f"latency   {name} {p['value']:.3g} ms ({p['low']:.3g} to {p['high']:.3g}, predicted{flag})")
    return lines


def explanation_lines(found: Explanation) -> list[str]:
    """Findings, largest predicted gain first."""
    from fusepress.pipeline.report.explain import view_of

    view = view_of(found.to_dict())
    lines = [f"{found.target}, {found.power_mode}, {found.precision}", view.basis]
    if not view.rows:
        lines.append("nothing was found that costs more than 0.2 % of the latency")
    for row in view.rows:
        measured = f", layer measured {row.measured}" if row.measured else ""
        lines.append(f"{row.gain:>12} {row.share:>6}  {row.kind}: {row.where}{measured}")
        lines += [f"{'':21}{row.what}", f"{'':21}{row.advice}"]
    lines += [f"{view.more} more: see --json"] if view.more else []
    lines += [f"below 0.2 % of the latency each: {view.small}"] if view.small else []
    return lines


def self_test_lines(record: dict[str, Any]) -> list[str]:
    """What a self-test found: one line a build, and what is missing."""
    machine = record["machine"]
    lines = [f"machine   {machine['system']}, {machine['host'].get('cpu', 'an unknown CPU')}"]
    lines += [_attempt_line("onnx", kind, attempt) for kind, attempt in record["onnxruntime"].items()]
    lines += [_attempt_line("cuda", kind, attempt) for kind, attempt in record.get("onnxruntime_cuda", {}).items()]
    for runtime in ("tensorrt", "tensorrt_rtx"):
        found = record[runtime]
        if "version" in found["importer"]:
            refused = len(found["importer"]["operators_refused"])
            lines.append(f"{runtime} {found['importer']['version']}: refuses {refused} of the ONNX operators")
        lines += [_attempt_line("build", name, attempt) for name, attempt in found.get("builds", {}).items()]
    return lines + [f"missing   {why}" for why in record["missing"]]


def _attempt_line(what: str, name: str, attempt: dict[str, Any]) -> str:
    if not attempt["ok"]:
        return f"{what:<10}{name}: {attempt['error'].splitlines()[0]}"
    parts = [f"{count} layers in {precision}" for precision, count in attempt.get("precisions", {}).items()]
    if "sparse" in attempt:
        parts += [f"{key} {value}" for key, value in attempt["sparse"].items() if key != "because"]
    ran = attempt.get("run", {})
    latency = attempt.get("latency") or ran.get("latency")
    why = "" if ran.get("ok", True) else f": {ran['error'].splitlines()[0]}"
    parts.append(f"{latency['mean_ms']:.4g} ms" if latency else f"built, not executed{why}")
    return f"{what:<10}{name}: {', '.join(parts)}"


def print_profiles(profiles: Sequence[Profile]) -> None:
    """The table of device profiles."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("target", "family", "runtime", "precisions", "2:4", "power modes"):
        table.add_column(column, no_wrap=column != "power modes")
    for p in profiles:
        modes = ", ".join(f"{name}*" if name == p.default_mode else name for name in p.power_modes)
        table.add_row(p.name, p.family, p.runtime, " ".join(p.precisions), "yes" if p.sparsity_2to4 else "no", modes)
    _console().print(table)


def prediction_json(prediction: Prediction) -> dict[str, Any]:
    """A prediction as outside tools read it."""
    return {
        "latency_ms": prediction.latency_ms,
        "low_ms": prediction.low_ms,
        "high_ms": prediction.high_ms,
        "stream_ms": prediction.stream_ms,
        "extrapolating": prediction.extrapolating,
        "reasons": list(prediction.reasons),
        "device_validated": prediction.device_validated,
        "target": prediction.device,
        "power_mode": prediction.power_mode,
        "precision": prediction.precision,
        "kind": "predicted",
        "layers": [
            {
                "name": layer.name,
                "op": layer.op,
                "precision": layer.precision,
                "ms": layer.ms,
                "bound": layer.bound,
                "macs": layer.macs,
                "bytes": layer.bytes,
            }
            for layer in prediction.layers
        ],
    }


def prediction_lines(prediction: Prediction) -> list[str]:
    """A prediction as text, what it rests on, and the ten costliest layers below it."""
    flag = ", extrapolating" if prediction.extrapolating else ""
    lines = [
        (
            f"{prediction.latency_ms:.4g} ms predicted (90 % interval {prediction.low_ms:.4g} to "
            f"{prediction.high_ms:.4g}{flag})"
        ),
        f"{prediction.device}, {prediction.power_mode}, {prediction.precision}, batch 1, replayed from a CUDA graph",
        f"{prediction.stream_ms:.4g} ms where the host starts every kernel",
    ]
    lines += [f"extrapolating: {reason}" for reason in prediction.reasons]
    if prediction.validated_on and not prediction.device_validated:
        lines.append(f"not validated on this device, but on {', '.join(prediction.validated_on)}")
    costly = sorted(prediction.layers, key=lambda layer: -layer.ms)[:10]
    lines += [f"  {layer.ms:9.5f} ms  {layer.bound:<8} {layer.op:<18} {layer.name}" for layer in costly]
    return lines


def fit_json(fit: PersonalFit, rows: int) -> dict[str, Any]:
    """What a fit of measurements found, as outside tools read it: errors of held-out families only."""
    held = [error for errors in fit.log_errors.values() for error in errors]
    return {
        "rows": rows,
        "families": len(fit.log_errors),
        "calibrated": fit.calibrated,
        "interval_factor": fit.latency["known"],
        "error_before": _mean_error(fit.before),
        "error_held_out": _mean_error(held) if held else None,
        "error_by_family": {name: _mean_error(errors) for name, errors in fit.log_errors.items()},
    }


def fit_lines(fit: PersonalFit, rows: int) -> list[str]:
    """What a fit of measurements found, as text."""
    found = fit_json(fit, rows)
    lines = [f"{rows} measured latencies of {max(1, len(fit.log_errors))} model families"]
    lines.append(f"mean error before  {found['error_before']:.1%}")
    if found["error_held_out"] is None:
        lines.append("mean error now     unknown: one family cannot be held out of its own fit; measure another")
    else:
        lines.append(f"mean error now     {found['error_held_out']:.1%}, each family predicted by a fit without it")
        lines += [f"  {error:6.1%}  {name}" for name, error in found["error_by_family"].items()]
    how = "from held-out families" if fit.calibrated else "kept from before or the largest error: too few rows for 90 %"
    lines.append(f"90 % interval      a factor of {found['interval_factor']:.3g} either way, {how}")
    return lines


def _mean_error(log_errors: Sequence[float]) -> float:
    return sum(abs(math.expm1(error)) for error in log_errors) / len(log_errors)
