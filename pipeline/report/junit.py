"""junit.xml: the gates and the stages as test cases, so that any CI system shows them.

FAIL is a failure. INCONCLUSIVE and ANOMALOUS are errors (not failures: the numbers do not say that the model is bad,
but the release is refused all the same). A stage that failed or was interrupted is an error, one that was not reached
or left out is skipped. Without gates there is one skipped case that says so; nothing is green by absence.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

from junitparser import Error, Failure, JUnitXml, Skipped, TestCase, TestSuite

from fusepress.pipeline.evidence import RunRecord, StageRecord, Verdict, read_run
from fusepress.pipeline.gates import NO_GATE
from fusepress.pipeline.report import view
from fusepress.pipeline.store import atomic_write_bytes

JUNIT_XML = "junit.xml"
# XML 1.0 has no way to write these, not even escaped
_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write_junit(run_dir: Path) -> Path:
    """Write junit.xml of a run folder; the same run.json gives the same bytes.

    Args:
        run_dir: the folder that holds run.json.

    Returns:
        The path of the file.

    Raises:
        UsageError: there is no run.json.
        StoreError: run.json is damaged, or the file cannot be written.
    """
    record = read_run(run_dir)
    report = JUnitXml(_clean(f"fusepress {record.name}"))
    report.add_testsuite(_suite("gates", _gate_cases(record)))
    report.add_testsuite(_suite("stages", [_stage_case(record, stage) for stage in record.stages]))
    report.update_statistics()
    buffer = io.BytesIO()
    report.write(buffer, pretty=True)
    path = run_dir / JUNIT_XML
    atomic_write_bytes(path, buffer.getvalue())
    return path


def _suite(name: str, cases: list[TestCase]) -> TestSuite:
    suite = TestSuite(name)
    suite.add_testcases(cases)
    return suite


def _gate_cases(record: RunRecord) -> list[TestCase]:
    verdicts = view.verdicts_of(record)
    if verdicts:
        return [_gate_case(record, verdict) for verdict in verdicts]
    case = _case(record, "gates", "gates")
    case.result = [Skipped(NO_GATE if record.verdict else "the gates were not reached")]
    return [case]


def _gate_case(record: RunRecord, verdict: Verdict) -> TestCase:
    case = _case(record, "gates", verdict.gate)
    why = _clean(verdict.why)
    if verdict.verdict == "FAIL":
        case.result = [Failure(why, verdict.verdict)]
    elif verdict.verdict != "PASS":
        case.result = [Error(why, verdict.verdict)]
    case.system_out = why
    return case


def _stage_case(record: RunRecord, stage: StageRecord) -> TestCase:
    case = _case(record, "stages", stage.name)
    case.time = stage.seconds
    why = _clean(stage.why or stage.status)
    if stage.status in ("failed", "interrupted"):
        case.result = [Error(why, stage.status)]
    elif stage.status in ("skipped", "pending", "running"):
        case.result = [Skipped(why)]
    return case


def _case(record: RunRecord, kind: str, name: str) -> TestCase:
    return TestCase(_clean(name), classname=_clean(f"fusepress.{record.name}.{kind}"))


def _clean(text: str) -> str:
    return _FORBIDDEN.sub("\ufffd", text)
