"""From a float model to the INT8 (or FP8) file that is released: the ladder of all in INT8, fewer layers, none.

Accuracy is judged on the calib split, for the eval split is the gates' alone: the upper end of the paired 95 % interval
of the drop must stay within the limit. Where the recipe has an accuracy gate that the float model itself meets, that is
the standard, against the dense model; else INT8 may lose `RELATIVE_DROP` of the float model's own metric.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fusepress.calib.quantize import METHODS, Draft
from fusepress.calib.ranges import OwnMethod
from fusepress.calib.search import Found, Trial, search
from fusepress.calib.sensitivity import PROXY_SAMPLES, Sensitivity, Session, Tries
from fusepress.pipeline.evaluate import Evaluation, Predict, evaluate
from fusepress.pipeline.gates import Replicates, compare, drop_interval
from fusepress.pipeline.graph.placement import Grid
from fusepress.pipeline.task import Batch, LoadedTask

Array = np.ndarray[Any, Any]
REPLICATES = 400
KEPT_BYTES = 2**31
RELATIVE_DROP = 0.005  # of the float model's metric, where no gate says more
MOST_EVALUATIONS = 17  # of the calib split, for sensitivity and trials; with the references fewer than 20
SENSITIVITY_EVALUATIONS = 6  # of them at most for sensitivity, so that ten trials are left


@dataclass(frozen=True, slots=True, kw_only=True)
class Standard:
    """What a variant is held to.

    Attributes:
        reference: the model that drops are counted from, on the calib split.
        metric: the metric.
        max_drop: the limit.
        words: where the limit comes from.
    """

    reference: Evaluation
    metric: str
    max_drop: float
    words: str


@dataclass(slots=True, kw_only=True)
class Judge:
    """Accuracy on the calib split.

    Attributes:
        task: whose metrics count.
        batches: the calib split (`kept_batches`); None: it is read again every time.
        seed: of the bootstrap draws.
        evaluations: how often the split was run.
        samples: of the split; 0 until it was run.
    """

    task: LoadedTask
    batches: Sequence[Batch] | None
    seed: int
    evaluations: int = field(default=0)
    samples: int = field(default=0)

    def evaluate(self, predict: Predict) -> Evaluation:
        """A model on the calib split."""
        self.evaluations += 1
        found = evaluate(self.task, predict, "calib", batches=self.batches)
        self.samples = found.n
        return found

    def trial(self, spared: frozenset[str], found: Evaluation, standard: Standard) -> Trial:
        """Whether an evaluation meets a standard."""
        condition = compare(
            standard.reference.stats,
            found.stats,
            self.task.score,
            found.groups,
            replicates=REPLICATES,
            seed=self.seed,
        )
        replicates = Replicates(clean=condition, samples=found.n, clusters=len(set(found.groups)))
        drop, interval = drop_interval(replicates, standard.metric, self.task.metrics[standard.metric])
        worst = interval.high if interval is not None else drop
        return Trial(
            spared=spared,
            met=math.isfinite(worst) and worst <= standard.max_drop,
            value=_defined(found.metrics[standard.metric]),
            drop=_defined(drop),
            high=None if interval is None else interval.high,
        )

    def standard(
        self,
        floating: Evaluation,
        dense: Evaluation | None,
        *,
        metric: str | None,
        gate_drop: float | None,
        max_drop: float | None,
    ) -> Standard:
        """What INT8 is held to.

        Args:
            floating: the float model that is quantised.
            dense: the dense model, where it is another.
            metric: the gate's; default: the primary one.
            gate_drop: the accuracy gate's limit.
            max_drop: a limit on the drop by quantisation alone, which goes before the gate.
        """
        name = metric or self.task.primary
        reference = floating if dense is None else dense
        if max_drop is not None:
            return Standard(reference=floating, metric=name, max_drop=max_drop, words="quantize.max_drop")
        beyond = "no accuracy gate"
        if gate_drop is not None:
            standard = Standard(reference=reference, metric=name, max_drop=gate_drop, words="the accuracy gate")
            if self.trial(frozenset(), floating, standard).met:
                return standard
            beyond = "the float model misses the accuracy gate on the calib split by itself"
        value = floating.metrics[name]
        return Standard(
            reference=floating,
            metric=name,
            max_drop=RELATIVE_DROP * abs(value) if math.isfinite(value) else 0.0,
            words=f"{RELATIVE_DROP:.1%} of the float model's {name} ({beyond})",
        )


def kept_batches(task: LoadedTask, most_bytes: int = KEPT_BYTES) -> list[Batch] | None:
    """The calib split in memory, for it is run often; None where its inputs alone take more than `most_bytes`."""
    kept, size = [], 0
    for batch in task.batches("calib", 0):
        size += sum(value.numel() * value.element_size() for value in batch.inputs.values())
        if size > most_bytes:
            return None
        kept.append(batch)
    return kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Ladder:
    """Where a search ended, and why.

    Attributes:
        found: the rung, the units left in floating point, the trials.
        standard: what they were held to.
        reason: in words.
        evaluations: runs of the calib split that it took, sensitivity included, the references not.
        precision: int8 or fp8.
    """

    found: Found
    standard: Standard
    reason: str
    evaluations: float
    precision: Grid = "int8"

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "precision": self.precision,
            "rung": self.precision if self.found.rung == "int8" else self.found.rung,
            "reason": self.reason,
            "spared": sorted(self.found.spared),
            "standard": self.standard.words,
            "metric": self.standard.metric,
            "max_drop": self.standard.max_drop,
            "evaluations": self.evaluations,
            "trials": [trial.to_dict() for trial in self.found.trials],
        }


def climb_down(
    draft: Draft,
    judge: Judge,
    standard: Standard,
    session: Session,
    sensitivity: Callable[[], Sensitivity],
    *,
    progress: Callable[[str], None] | None = None,
) -> Ladder:
    """All layers quantised if that meets the standard, else as few as possible in floating point, else all.

    Args:
        draft: with Q/DQ everywhere.
        judge: runs the calib split.
        standard: what is to be met.
        session: opens a file as the target computes it.
        sensitivity: measures it; asked only where all INT8 does not do.
        progress: called with a line for every trial.
    """
    begun = judge.evaluations
    measured: list[Sensitivity] = []

    def try_set(spared: frozenset[str]) -> Trial:
        with tempfile.TemporaryDirectory(prefix="fusepress-") as folder:
            opened = session(draft.write(Path(folder) / "trial.onnx", spared))
            trial = judge.trial(spared, judge.evaluate(lambda inputs: opened(inputs)), standard)
        if progress is not None:
            progress(f"{len(spared)} units in floating point: {'met' if trial.met else 'not met'}")
        return trial

    first = try_set(frozenset())
    if first.met:
        found = Found(rung="int8", spared=frozenset(), trials=(first,))
    else:
        measured.append(sensitivity())
        spent = judge.evaluations - begun + math.ceil(measured[0].runs / judge.samples)
        known = {first.spared: first}
        found = search(
            measured[0].ranking(),
            lambda spared: known.get(spared) or try_set(spared),
            most_trials=max(3, MOST_EVALUATIONS - spent),
        )
        found = worth_releasing(found, draft.layers(), draft.units())
    runs = sum(part.runs for part in measured) / judge.samples
    return Ladder(
        found=found,
        standard=standard,
        reason=_reason(found, standard, len(draft.units()), draft.precision.upper()),
        evaluations=judge.evaluations - begun + runs,
        precision=draft.precision,
    )


def worth_releasing(found: Found, layers: Collection[str], units: Collection[str]) -> Found:
    """The last rung where what was found leaves no layer in INT8: pairs around additions alone only cost time."""
    if not found.spared.issuperset(layers):
        return found
    return replace(found, rung="float", spared=frozenset(units))


def _reason(found: Found, standard: Standard, units: int, precision: str) -> str:
    limit = f"{standard.metric} may drop by {standard.max_drop:.4g} ({standard.words})"
    first = found.trials[0]
    if found.rung == "int8":
        return f"all {units} units in {precision}: {_worst(first)}; {limit}"
    naive = f"with all units in {precision} {_worst(first)}; {limit}"
    if found.rung == "float":
        tried = f"none of {len(found.trials)} sets that were tried meets that with a layer in {precision}"
        return f"nothing in {precision}: {naive}, and {tried}"
    chosen = next(trial for trial in reversed(found.trials) if trial.spared == found.spared)
    return (
        f"{len(found.spared)} of {units} units in floating point: {naive}; with them spared {_worst(chosen)}, and no "
        "cheaper set that was tried meets the limit"
    )


def _worst(trial: Trial) -> str:
    if trial.drop is None:
        return "the metric is undefined"
    return f"it drops by {trial.drop:.4g}" + ("" if trial.high is None else f" (at most {trial.high:.4g})")


def choose_method(draft: Draft, arrays: Mapping[str, Array], session: Session) -> tuple[Draft, dict[str, float]]:
    """The method whose ranges change the outputs least on a few calibration samples; the simplest one among equals.

    Args:
        draft: with measured ranges.
        arrays: input name -> N calibration samples.
        session: opens a file as the target computes it.

    Returns:
        The draft with that method, and the relative squared error of each.
    """
    tries = Tries(draft, arrays, PROXY_SAMPLES, session)
    methods = METHODS[draft.precision]
    drafts: dict[OwnMethod, Draft] = {method: draft.with_method(method) for method in methods}
    errors = {method: tries.error((), drafts[method]) for method in methods}
    best = min(methods, key=lambda method: errors[method])
    return drafts[best], {str(method): error for method, error in errors.items()}


def _defined(value: float) -> float | None:
    return value if math.isfinite(value) else None
