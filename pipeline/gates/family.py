"""Several gates together: which failures stand, the verdict of a run, its exit code.

A release passes when every gate passes. That is an intersection-union test (Berger 1982): each gate is tested at its
own level, and the chance that a release passes although some gate's true value is beyond its limit is at most that of
the one gate, whatever their number and dependence. No correction is needed, and none is made.

A release fails when any gate fails, so false FAILs add up with the number of gates. Holm's step-down procedure (1979)
holds the chance that any gate whose true value is within its limit says FAIL at 2.5 %, under any dependence: the i-th
smallest of m p-values must be at most 2.5 % / (m - i + 1). A gate that fails by itself but not in this company is
inconclusive. The release is refused all the same: the correction moves the blame, never a PASS.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from fusepress.pipeline.errors import EXIT_GATE_FAILED, EXIT_INCONCLUSIVE, EXIT_RELEASED
from fusepress.pipeline.evidence import GateVerdict, Verdict
from fusepress.pipeline.gates.intervals import ALPHA
from fusepress.pipeline.gates.verdicts import Finding

FailOn = Literal["inconclusive", "anomalous", "fail"]

NO_GATE = "no gate was set: nothing was judged"
WORST_FIRST: tuple[GateVerdict, ...] = ("FAIL", "ANOMALOUS", "INCONCLUSIVE", "PASS")
REFUSED: dict[FailOn, tuple[GateVerdict, ...]] = {
    "inconclusive": ("FAIL", "ANOMALOUS", "INCONCLUSIVE"),
    "anomalous": ("FAIL", "ANOMALOUS"),
    "fail": ("FAIL",),
}


def together(findings: Sequence[Finding]) -> list[Verdict]:
    """The verdicts of gates that are judged together (Holm 1979; see the module).

    Args:
        findings: each gate by itself. Those without a p-value (a missing number) stay as they are and do not count.

    Returns:
        Their verdicts in the same order.
    """
    tested = sorted((i for i, finding in enumerate(findings) if finding.p is not None), key=lambda i: _p(findings[i]))
    kept = list(findings)
    stands = True
    for rank, index in enumerate(tested):
        level = ALPHA / (len(tested) - rank)
        stands = stands and _p(findings[index]) <= level
        if not stands and findings[index].verdict.verdict == "FAIL":
            kept[index] = _doubted(findings[index], len(tested))
    return [finding.verdict for finding in kept]


def _p(finding: Finding) -> float:
    assert finding.p is not None
    return finding.p


def _doubted(finding: Finding, tests: int) -> Finding:
    why = (
        f"{finding.verdict.why}; by itself that would fail (p = {_p(finding):.2g}), but of {tests} gates judged "
        f"together one is this far beyond its limit by chance more often than {ALPHA:.1%}; evaluate on more samples"
    )
    return replace(finding, verdict=finding.verdict.model_copy(update={"verdict": "INCONCLUSIVE", "why": why}))


def overall(verdicts: Sequence[Verdict]) -> tuple[GateVerdict, str]:
    """The verdict of a run and why: FAIL over ANOMALOUS over INCONCLUSIVE over PASS; no gate is a PASS that says so."""
    if not verdicts:
        return "PASS", NO_GATE
    worst = next(level for level in WORST_FIRST if any(v.verdict == level for v in verdicts))
    if worst == "PASS":
        return "PASS", "the gate passed" if len(verdicts) == 1 else f"all {len(verdicts)} gates passed"
    counts = Counter(v.verdict for v in verdicts)
    words = {"FAIL": "failed", "ANOMALOUS": "anomalous", "INCONCLUSIVE": "inconclusive", "PASS": "passed"}
    others = [f"{counts[level]} {words[level]}" for level in WORST_FIRST if counts[level] and level != worst]
    gates = "gate" if len(verdicts) == 1 else "gates"
    tally = ", ".join([f"{counts[worst]} of {len(verdicts)} {gates} {words[worst]}", *others])
    reasons = "; ".join(f"{v.gate}: {v.why}" for v in verdicts if v.verdict == worst)
    return worst, f"{tally}. {reasons}"


def exit_code(verdict: GateVerdict, fail_on: FailOn = "inconclusive") -> int:
    """0 released, 3 a gate failed, 4 inconclusive or anomalous.

    Args:
        verdict: of the run.
        fail_on: the mildest verdict that is not let pass: inconclusive, anomalous or fail.
    """
    if verdict not in REFUSED[fail_on]:
        return EXIT_RELEASED
    return EXIT_GATE_FAILED if verdict == "FAIL" else EXIT_INCONCLUSIVE
