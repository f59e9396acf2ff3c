"""replicates.npz: what `verify` stores and the accuracy, floor, robustness and release gates read."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, unquote

import numpy as np
import numpy.typing as npt

from fusepress.pipeline.errors import StoreError
from fusepress.pipeline.gates.bootstrap import Condition, block_length, unit_count
from fusepress.pipeline.gates.intervals import TRUSTED_BLOCKS, TRUSTED_UNITS, Floats, Interval, interval
from fusepress.pipeline.npz import Arrays, load_npz
from fusepress.pipeline.store import atomic_write_bytes

Direction = Literal["max", "min"]

REPLICATES_NPZ = "replicates.npz"
SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Replicates:
    """All that the accuracy, floor and robustness gates read.

    Attributes:
        clean: the undisturbed condition.
        failures: (failure, severity) -> condition, drawn with the same seed and clusters as `clean`.
        strata: the task's label (night, rain) -> the clean condition of the samples that carry it.
        constant: metrics of the best constant prediction; it sees no input, so it holds under every failure.
        samples: number of samples.
        clusters: number of clusters among them.
        artifact_sha256: hash of the ONNX whose outputs are in the compressed columns.
    """

    clean: Condition
    failures: dict[tuple[str, int], Condition] = field(default_factory=dict)
    strata: dict[str, Replicates] = field(default_factory=dict)
    constant: dict[str, float] = field(default_factory=dict)
    samples: int
    clusters: int
    artifact_sha256: str | None = None

    @property
    def units(self) -> int:
        """How many things were drawn from: clusters, or blocks of consecutive samples where there is one cluster."""
        return unit_count(self.samples, self.clusters)

    @property
    def trusted(self) -> bool:
        """There are enough units for a bootstrap interval to hold what it promises."""
        return self.units >= self.least_units

    @property
    def least_units(self) -> int:
        """How many that takes."""
        return TRUSTED_BLOCKS if self.clusters == 1 else TRUSTED_UNITS

    @property
    def note(self) -> str:
        """What a reader must know about the draws; empty when nothing."""
        if self.clusters == 1:
            return f"; all samples are of one cluster, so blocks of {block_length(self.samples)} in a row were drawn"
        return ""

    def spread(self, condition: Condition, metric: str, weights: tuple[int, int]) -> tuple[float, Interval | None]:
        """A weighted sum of both models' metric, with its interval.

        Args:
            condition: one of this object's.
            metric: one of its metrics.
            weights: of the dense and the compressed model: (1, -1) is the drop of a metric of which more is better.

        Returns:
            The value over all samples, and its interval or None where that is undefined.
        """
        value = weights[0] * condition.dense[metric] + weights[1] * condition.compressed[metric]
        if weights[0] == 0:  # a dense metric that is undefined is no matter then
            value = weights[1] * condition.compressed[metric]
        elif weights[1] == 0:
            value = weights[0] * condition.dense[metric]
        left_out = condition.jackknife.get(metric)
        drawn = _weighted(condition.replicates[metric], weights)
        return value, interval(value, drawn, self.units, None if left_out is None else _weighted(left_out, weights))


def _weighted(table_R2: Floats, weights: tuple[int, int]) -> Floats:
    parts = [weight * table_R2[:, column] for column, weight in enumerate(weights) if weight]
    total: Floats = np.sum(parts, axis=0)
    return total


def metric_intervals(replicates: Replicates, *, compressed: bool = True) -> dict[str, Interval]:
    """The interval of every clean metric of one model, for its measurements; undefined ones are left out."""
    weights = (0, 1) if compressed else (1, 0)
    found = {name: replicates.spread(replicates.clean, name, weights)[1] for name in replicates.clean.replicates}
    return {name: value for name, value in found.items() if value is not None}


def drop_interval(replicates: Replicates, metric: str, direction: Direction) -> tuple[float, Interval | None]:
    """How much worse the compressed model is than the dense one, paired; negative where it is better.

    Args:
        replicates: both models, drawn together.
        metric: one of theirs.
        direction: which way the metric is better.

    Returns:
        The drop over all samples, and its 95 % interval or None where that is undefined.
    """
    return replicates.spread(replicates.clean, metric, (1, -1) if direction == "max" else (-1, 1))


def extra_drop_interval(
    replicates: Replicates, condition: Condition, metric: str, direction: Direction
) -> tuple[float, Interval | None]:
    """How much more the compressed model loses under a condition than the dense one does, paired over all four scores.

    Args:
        replicates: of the clean condition.
        condition: drawn with the same seed and clusters.
        metric: one of theirs.
        direction: which way the metric is better.

    Returns:
        The extra drop over all samples, and its 95 % interval or None where that is undefined.
    """
    clean = replicates.clean
    weights = (1, -1) if direction == "max" else (-1, 1)
    left_out = None
    if metric in clean.jackknife and metric in condition.jackknife:
        left_out = _weighted(condition.jackknife[metric] - clean.jackknife[metric], weights)
    value = weights[0] * (
        (condition.dense[metric] - clean.dense[metric]) - (condition.compressed[metric] - clean.compressed[metric])
    )
    drawn = _weighted(condition.replicates[metric] - clean.replicates[metric], weights)
    return value, interval(value, drawn, replicates.units, left_out)


# ---------------------------------------------------------------------------------------------------- the stored file


def save_replicates(path: Path, replicates: Replicates) -> None:
    """Write replicates.npz: the same content gives the same bytes; written aside, then renamed.

    Raises:
        StoreError: a failure's name holds a slash, or the file cannot be written.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, array in sorted(_arrays(replicates).items()):
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            content = io.BytesIO()
            np.lib.format.write_array(content, np.asarray(array), version=(1, 0), allow_pickle=False)
            archive.writestr(entry, content.getvalue())
    atomic_write_bytes(path, buffer.getvalue())


def _arrays(replicates: Replicates) -> Arrays:
    out: Arrays = {
        "meta/schema": np.array(SCHEMA),
        "meta/samples": np.array(replicates.samples),
        "meta/clusters": np.array(replicates.clusters),
    }
    if replicates.artifact_sha256 is not None:
        out["meta/artifact_sha256"] = np.array(replicates.artifact_sha256)
    for name, value in replicates.constant.items():
        out[f"constant_point/{name}"] = np.array(float(value))
    for label, part in replicates.strata.items():
        inner = _arrays(part)
        out |= {f"strata/{quote(label, safe='')}/{name}": array for name, array in inner.items()}
    conditions = {"": replicates.clean}
    for (failure, severity), condition in replicates.failures.items():
        if "/" in failure:
            raise StoreError(f"expected a failure name without '/'; got {failure!r}; rename the failure in the task")
        conditions[f"robustness/{failure}/{severity}/"] = condition
    for prefix, condition in conditions.items():
        for kind, tables in (("", condition.replicates), ("_jackknife", condition.jackknife)):
            for name, table in tables.items():
                for column, model in enumerate(("dense", "compressed")):
                    out[f"{prefix}{model}{kind}/{name}"] = np.ascontiguousarray(table[:, column], dtype=np.float64)
        for model, points in (("dense", condition.dense), ("compressed", condition.compressed)):
            for name, value in points.items():
                out[f"{prefix}{model}_point/{name}"] = np.array(float(value))
    return out


def load_replicates(path: Path) -> Replicates:
    """Read replicates.npz (no pickles).

    Raises:
        StoreError: it is missing, damaged or of another schema.
    """
    what = f"bootstrap replicates of schema {SCHEMA}"
    try:
        arrays = load_npz(path, what)
    except FileNotFoundError as error:
        raise StoreError(
            f"expected bootstrap replicates; got no file at {path}; run `fusepress compress` again"
        ) from error
    try:
        if int(arrays["meta/schema"]) != SCHEMA:
            raise ValueError(f"schema {int(arrays['meta/schema'])}, not {SCHEMA}")
        return _from_arrays(arrays)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise StoreError(
            f"expected {what}; got a file that does not fit at {path} ({error}); "
            "run `fusepress compress --from verify` again"
        ) from error


def _from_arrays(arrays: Mapping[str, npt.NDArray[Any]]) -> Replicates:
    clean: Arrays = {}
    failures: dict[tuple[str, int], Arrays] = {}
    strata: dict[str, Arrays] = {}
    for name, array in arrays.items():
        if name.startswith("robustness/"):
            _, failure, severity, rest = name.split("/", 3)
            failures.setdefault((failure, int(severity)), {})[rest] = array
        elif name.startswith("strata/"):
            _, label, rest = name.split("/", 2)
            strata.setdefault(unquote(label), {})[rest] = array
        else:
            clean[name] = array
    samples, clusters = int(clean["meta/samples"]), int(clean["meta/clusters"])
    if not 1 <= clusters <= samples:
        raise ValueError(f"{clusters} clusters of {samples} samples")
    sha256, whole = clean.get("meta/artifact_sha256"), _condition(clean)
    parts = {label: _from_arrays(part) for label, part in strata.items()}
    for label, part in parts.items():
        if part.clean.replicates.keys() != whole.replicates.keys():
            raise ValueError(f"other metrics in the stratum {label!r}")
    return Replicates(
        clean=whole,
        failures={where: _condition(part) for where, part in failures.items()},
        strata=parts,
        constant=_points(clean, "constant_point/"),
        samples=samples,
        clusters=clusters,
        artifact_sha256=None if sha256 is None else str(sha256),
    )


def _condition(part: Mapping[str, npt.NDArray[Any]]) -> Condition:
    dense, compressed = _points(part, "dense_point/"), _points(part, "compressed_point/")
    replicates, jackknife = _tables(part, ""), _tables(part, "_jackknife")
    lacking = (replicates.keys() | jackknife.keys()) - (dense.keys() & compressed.keys())
    if lacking:
        raise ValueError(f"no metric over all samples of {', '.join(sorted(lacking))}")
    if any(table.ndim != 2 for table in [*replicates.values(), *jackknife.values()]):
        raise ValueError("replicates that are no list of numbers")
    return Condition(dense=dense, compressed=compressed, replicates=replicates, jackknife=jackknife)


def _tables(part: Mapping[str, npt.NDArray[Any]], kind: str) -> dict[str, Floats]:
    names = [name.removeprefix(f"dense{kind}/") for name in part if name.startswith(f"dense{kind}/")]
    return {name: np.stack([part[f"{model}{kind}/{name}"] for model in ("dense", "compressed")], 1) for name in names}


def _points(part: Mapping[str, npt.NDArray[Any]], prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): float(array) for name, array in part.items() if name.startswith(prefix)}
