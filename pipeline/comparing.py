"""Several runs side by side: what each released, which of them no other one beats, and what they differ in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fusepress.pipeline.errors import StoreError, UsageError
from fusepress.pipeline.evidence import Measurement, RunRecord, Verdict, read_run

LATENCY = "latency.mean_ms"
DENSE_LATENCY = "latency.dense.mean_ms"
RECIPE_JSON = "recipe.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One run among others.

    Attributes:
        name: of its folder, with as much of the path as tells it from the others.
        target: device and power mode.
        precision: of the released file.
        verdict: of its gates; None where they were not reached.
        gates: what each gate said.
        metric: the task's primary metric.
        more_is_better: of that metric.
        accuracy: of the released file; None where the run did not get there.
        latency: mean, in milliseconds, on the target.
        dense_accuracy, dense_latency: of the dense model; the latency only where its evidence is of the same kind.
        macs: multiply-accumulates of one sample.
        size_mib: of the released ONNX.
        worst_failure: the sensor failure that the release bears worst, and the metric under it.
        beaten_by: runs for the same target that are no worse in accuracy and latency and better in one.
    """

    name: str
    target: str
    precision: str | None
    verdict: str | None
    gates: tuple[Verdict, ...]
    metric: str
    more_is_better: bool
    accuracy: Measurement | None
    latency: Measurement | None
    dense_accuracy: Measurement | None
    dense_latency: Measurement | None
    macs: float | None
    size_mib: float | None
    worst_failure: tuple[str, float] | None
    beaten_by: tuple[str, ...] = ()

    @property
    def placed(self) -> bool:
        """Whether it has both figures."""
        return self.accuracy is not None and self.latency is not None

    @property
    def on_front(self) -> bool:
        """Whether it has both figures and no other run beats it."""
        return self.placed and not self.beaten_by

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        figures = {
            name: None if figure is None else figure.model_dump(exclude_none=True)
            for name, figure in (
                ("accuracy", self.accuracy),
                ("latency", self.latency),
                ("dense_accuracy", self.dense_accuracy),
                ("dense_latency", self.dense_latency),
            )
        }
        return {
            "name": self.name,
            "target": self.target,
            "precision": self.precision,
            "verdict": self.verdict,
            "gates": {verdict.gate: verdict.verdict for verdict in self.gates},
            "metric": self.metric,
            **figures,
            "macs": self.macs,
            "size_mib": self.size_mib,
            "worst_failure": None if self.worst_failure is None else list(self.worst_failure),
            "pareto": self.on_front,
            "beaten_by": list(self.beaten_by),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Runs of one task.

    Attributes:
        task: its name; "" where the records do not say.
        runs: in the order given.
        recipe: dotted key -> its value in each run, of those that are not the same in all; None where it is missing.
        environment: likewise of versions, machine, seed, and hashes of task and checkpoint.
        notes: what a reader must know before the figures are held against each other.
    """

    task: str
    runs: tuple[Compared, ...]
    recipe: Mapping[str, tuple[Any, ...]]
    environment: Mapping[str, tuple[Any, ...]]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "task": self.task,
            "runs": [run.to_dict() for run in self.runs],
            "recipe": {key: list(values) for key, values in self.recipe.items()},
            "environment": {key: list(values) for key, values in self.environment.items()},
            "notes": list(self.notes),
        }


def compare_runs(folders: Sequence[Path]) -> Comparison:
    """Read runs of one task and find those that no other run for the same target and power mode beats.

    Values are compared as they are; the intervals beside them say how sure that is.

    Args:
        folders: run folders, two or more.

    Raises:
        UsageError: fewer than two, one that is no run, one twice, or runs of different tasks or primary metrics.
        StoreError: a run record or a recipe is damaged.
    """
    if len(folders) < 2:
        raise UsageError(f"expected two or more runs to compare; got {len(folders)}; name another run folder")
    names = _names(folders)
    records = [read_run(folder) for folder in folders]
    _check_one_task(records, folders)
    rows = [_row(record, name) for record, name in zip(records, names, strict=True)]
    recipes = [_recipe(folder) for folder in folders]
    return Comparison(
        task=str(records[0].task.get("name", "")),
        runs=tuple(_with_rivals(row, rows) for row in rows),
        recipe=_differences(recipes),
        environment=_differences([_environment(record) for record in records]),
        notes=tuple(_notes(records, rows, [n for n, r in zip(names, recipes, strict=True) if r is None])),
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that are all different."""
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise UsageError(f"expected each run once; got {twice} twice; name different run folders")
    for length in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _check_one_task(records: Sequence[RunRecord], folders: Sequence[Path]) -> None:
    """Accuracies of different tasks are different quantities, whatever they are called."""
    kinds = [(str(record.task.get("name", "")), *_primary(record)) for record in records]
    for kind, folder in zip(kinds, folders, strict=True):
        if kind != kinds[0]:
            first, other = (
                f"{task or 'a task'} judged by {metric!r} ({way})" for task, metric, way in (kinds[0], kind)
            )
            raise UsageError(
                f"expected runs of one task and primary metric; got {first} at {folders[0]}, and {other} at {folder}; "
                "compare runs of one task"
            )


def _primary(record: RunRecord) -> tuple[str, str]:
    """Primary metric and its direction."""
    metrics: dict[str, str] = record.task.get("metrics", {})
    metric = next(iter(metrics), "")
    return metric, str(metrics.get(metric, "max"))


def _row(record: RunRecord, name: str) -> Compared:
    metric, way = _primary(record)
    mode = record.target_profile.get("power_mode")
    macs, size = _last(record, "macs"), _last(record, "size.onnx_mib")
    latency = _of_release(record, LATENCY)
    return Compared(
        name=name,
        target=f"{record.target} / {mode}" if mode else record.target,
        precision=record.final_precision,
        verdict=record.verdict,
        gates=tuple(verdict for stage in record.stages for verdict in stage.verdicts),
        metric=metric,
        more_is_better=way != "min",
        accuracy=_of_release(record, f"accuracy.{metric}"),
        latency=latency,
        dense_accuracy=_of_stage(record, "baseline", f"accuracy.{metric}"),
        dense_latency=None if latency is None else _dense_latency(record, latency),
        macs=None if macs is None else macs.value,
        size_mib=None if size is None else size.value,
        worst_failure=_worst_failure(record, metric, more_is_better=way != "min"),
    )


def _of_release(record: RunRecord, name: str) -> Measurement | None:
    """The last figure that `verify` has of the released file; a latency of the target, measured before predicted."""
    verify = record.stage("verify")
    found = [] if verify is None else [m for m in verify.measurements if m.name == name]
    if name == LATENCY:
        found = [m for m in found if m.device in (None, record.target)]
        found = [m for m in found if m.kind == "measured"] or found
    return found[-1] if found else None


def _of_stage(record: RunRecord, stage: str, name: str) -> Measurement | None:
    found = record.stage(stage)
    return next((m for m in reversed(found.measurements) if m.name == name), None) if found is not None else None


def _dense_latency(record: RunRecord, latency: Measurement) -> Measurement | None:
    """Timed in turns with the release, else of the baseline; of the same evidence, or the two are no pair."""
    beside = (_of_stage(record, "verify", DENSE_LATENCY), _of_stage(record, "baseline", LATENCY))
    return next((m for m in beside if m is not None and (m.kind, m.device) == (latency.kind, latency.device)), None)


def _last(record: RunRecord, name: str) -> Measurement | None:
    found = [m for stage in record.stages for m in stage.measurements if m.name == name]
    return found[-1] if found else None


def _worst_failure(record: RunRecord, metric: str, *, more_is_better: bool) -> tuple[str, float] | None:
    verify = record.stage("verify")
    under = {}
    for m in verify.measurements if verify is not None else []:
        kind, _, rest = m.name.partition(".")
        if kind == "robustness" and rest.endswith(f".{metric}") and not rest.endswith(f".dense.{metric}"):
            under[rest.removesuffix(f".{metric}")] = m.value
    if not under:
        return None
    worst = min(under, key=lambda name: under[name] if more_is_better else -under[name])
    return worst, under[worst]


def _with_rivals(row: Compared, rows: Sequence[Compared]) -> Compared:
    return replace(row, beaten_by=tuple(other.name for other in rows if other is not row and _beats(other, row)))


def _beats(one: Compared, other: Compared) -> bool:
    if one.target != other.target:
        return False
    if one.accuracy is None or one.latency is None or other.accuracy is None or other.latency is None:
        return False
    sign = 1 if one.more_is_better else -1
    gains = (sign * (one.accuracy.value - other.accuracy.value), other.latency.value - one.latency.value)
    return min(gains) >= 0 and max(gains) > 0


# --------------------------------------------------------------------------------------------------------- differences


def _recipe(folder: Path) -> dict[str, Any] | None:
    """The recipe as the run read it, with its defaults; None where the folder has none."""
    path = folder / RECIPE_JSON
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise StoreError(
            f"expected JSON; got a damaged file at {path} ({error}); run `fusepress compress` again"
        ) from error
    return found if isinstance(found, dict) else None


def _environment(record: RunRecord) -> dict[str, Any]:
    """What a run was made with and on, besides its recipe."""
    return {
        "fusepress": record.fusepress,
        "seed": record.seed,
        "target": record.target,
        "task_sha256": record.task_sha256,
        "checkpoint_sha256": record.checkpoint_sha256,
        "target_profile": record.target_profile,
        "environment": record.environment,
    }


def _differences(mappings: Sequence[Mapping[str, Any] | None]) -> dict[str, tuple[Any, ...]]:
    """Dotted key -> its value in each mapping, where those that there are do not all have the same."""
    flat = [None if mapping is None else _flat(mapping) for mapping in mappings]
    keys = dict.fromkeys(key for one in flat if one is not None for key in one)
    found = {}
    for key in keys:
        values = [one.get(key) for one in flat if one is not None]
        if any(value != values[0] for value in values):
            found[key] = tuple(None if one is None else one.get(key) for one in flat)
    return found


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _notes(records: Sequence[RunRecord], rows: Sequence[Compared], without_recipe: Sequence[str]) -> list[str]:
    notes = []
    if len({record.task_sha256 for record in records}) > 1:
        notes.append("the task's code is not the same in all runs: its metric or its data may have changed in between")
    if len({row.dense_accuracy.value for row in rows if row.dense_accuracy is not None}) > 1:
        notes.append("the dense models' accuracies differ: other checkpoints, or other samples")
    counts = {row.accuracy.n for row in rows if row.accuracy is not None}
    if len(counts) > 1:
        notes.append("the accuracies are of different numbers of samples")
    if len({row.latency.kind for row in rows if row.latency is not None}) > 1:
        notes.append("some latencies are measured and some are not: a difference between them may be the prediction's")
    if without_recipe:
        notes.append(f"no {RECIPE_JSON} in {', '.join(without_recipe)}: recipes are compared without it")
    return notes
