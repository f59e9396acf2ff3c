"""The calibration card: which samples INT8 ranges are measured on, proven apart from the evaluation data.

Samples are chosen evenly over strata: the task's own (`strata(batch)`: night, rain, highway) or, without, its groups;
and within that so that they cover what the inputs look like (coverage.py). All inputs of a sample stay together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusepress.calib.coverage import choose, coverage, sample_features, standardise
from fusepress.pipeline.errors import TaskError
from fusepress.pipeline.store import atomic_write_text
from fusepress.pipeline.task import LoadedTask, Split

if TYPE_CHECKING:
    from torch import Tensor

Array = np.ndarray[Any, Any]
MOST_STRATA = 12  # more are counted in a report, not listed
MAX_BATCHES = 100_000  # a `calib` split that never ends is a fault of the task
SCHEMA = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationCard:
    """A fixed list of calibration samples.

    Attributes:
        task: name of the task's class.
        seed: of the choice.
        available: samples of the `calib` split.
        sample_ids: those chosen, in the order of the split.
        sample_sha256: content hash of each one's inputs.
        sha256: hash over ids and contents: equal cards mean equal data.
        stratified_by: what the strata are: the task's own, its groups, or nothing.
        coverage: how well the chosen samples stand for the split (`coverage.coverage`).
        blank: modality -> chosen samples in which its inputs are constant, as of a dead sensor.
        ranges: how far the ranges move when samples are drawn again (`ranges.resampling`); empty before calibrating.
        shared_with_eval: samples of the evaluation split with the same content; a card is only made with none.
    """

    task: str
    seed: int
    available: int
    sample_ids: tuple[str, ...]
    sample_sha256: tuple[str, ...]
    sha256: str
    stratified_by: str = "nothing"
    coverage: dict[str, Any] = field(default_factory=dict)
    blank: dict[str, int] = field(default_factory=dict)
    ranges: dict[str, Any] = field(default_factory=dict)
    shared_with_eval: int = 0
    schema: int = SCHEMA

    def to_json(self) -> str:
        """The card as JSON text."""
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> CalibrationCard:
        """A card from its JSON text.

        Raises:
            TaskError: the text is not a card, or was changed by hand.
        """
        try:
            raw = json.loads(text)
            raw |= {key: tuple(raw[key]) for key in ("sample_ids", "sample_sha256")}
            card = cls(**raw)
        except (ValueError, TypeError, KeyError) as error:
            raise TaskError(f"expected a calibration card; got {error}; run the quantize stage again") from error
        if card.sha256 != _total(card.sample_ids, card.sample_sha256):
            raise TaskError(
                "expected a calibration card whose hash fits its list; got another at `sha256`; "
                "run the quantize stage again instead of editing the card"
            )
        return card

    def write(self, path: Path) -> None:
        """Write the card, whole or not at all."""
        atomic_write_text(path, self.to_json())

    def with_ranges(self, ranges: dict[str, Any]) -> CalibrationCard:
        """The card with what calibrating found out about its samples."""
        return replace(self, ranges=ranges)

    def summary(self) -> dict[str, Any]:
        """What a report says about the card."""
        strata = self.coverage.get("strata", {})
        within = [row["within"] for row in self.coverage.get("features", {}).values()]
        told: dict[str, Any] = {
            "samples": len(self.sample_ids),
            "available": self.available,
            "seed": self.seed,
            "sha256": self.sha256,
            "shared_with_eval": self.shared_with_eval,
            "stratified_by": self.stratified_by,
            "strata": len(strata),
        }
        if len(strata) <= MOST_STRATA:
            told["chosen_of_each"] = {label: f"{chosen} of {there}" for label, (there, chosen) in strata.items()}
        if within:
            told["least_covered_statistic"] = min(within)
        moves = {name: row["median_width"] for name, row in self.ranges.items() if isinstance(row, dict)}
        told |= {"median_range_moves_by": moves} if moves else {}
        return told | ({"blank_samples": self.blank} if self.blank else {})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """One sample of the split, without its tensors; `constant` and `zero` name inputs that are so throughout."""

    name: str
    stratum: str
    sha256: str
    features: dict[str, float]
    constant: frozenset[str]
    zero: frozenset[str]


def choose_calibration(task: LoadedTask, samples: int, seed: int) -> CalibrationCard:
    """Choose calibration samples from the `calib` split: evenly over strata, covering what the inputs look like.

    Args:
        task: the task.
        samples: how many; all there are if the split has fewer.
        seed: of the choice.

    Raises:
        TaskError: the split is empty or repeats a sample id, a sample lacks an input or holds NaN, a modality is blank
            in all chosen samples, or a sample of the split, chosen or not, is in the evaluation data too.
    """
    if samples < 1:
        raise TaskError(f"expected at least 1 calibration sample; got {samples}; set quantize.samples")
    listed = [_look(task, *sample) for sample in _samples(task, "calib")]
    names = [seen.name for seen in listed]
    if not listed or len(set(names)) != len(names):
        found = "no sample" if not listed else f"{len(names) - len(set(names))} repeated sample ids"
        raise TaskError(
            f"expected batches('calib', 0) to yield every sample once; got {found} at {task.source.spec}; "
            "give every sample its own id"
        )
    features, strata = _paired(task, listed), [seen.stratum for seen in listed]
    table_NF = np.array([list(row.values()) for row in features], dtype=np.float64).reshape(len(listed), -1)
    chosen = choose(standardise(table_NF), strata, min(samples, len(listed)), seed)
    ids, hashes = tuple(listed[i].name for i in chosen), tuple(listed[i].sha256 for i in chosen)
    blank = _blank(task, [listed[i] for i in chosen])
    _require_apart(task, {seen.sha256: seen.name for seen in listed})  # the search is judged on the whole split
    return CalibrationCard(
        task=task.name,
        seed=seed,
        available=len(listed),
        sample_ids=ids,
        sample_sha256=hashes,
        sha256=_total(ids, hashes),
        stratified_by="strata of the task" if task.offers("strata") else "groups" if any(strata) else "nothing",
        coverage=coverage(features, strata, chosen),
        blank=blank,
    )


def _look(task: LoadedTask, name: str, stratum: str, inputs: dict[str, Tensor]) -> _Seen:
    arrays = {key: value.detach().cpu().numpy() for key, value in inputs.items()}
    for key, array in arrays.items():
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            raise TaskError(
                f"expected finite inputs; got NaN or infinity in {key!r} of the calib sample {name!r} at "
                f"{task.source.spec}; mend the data or leave the sample out"
            )
    fields = {key: array for key, array in arrays.items() if array.size > 1}  # a speed or a flag says something
    return _Seen(
        name=name,
        stratum=stratum,
        sha256=content_sha256(inputs),
        features=sample_features(arrays),
        constant=frozenset(key for key, array in fields.items() if (array == array.flat[0]).all()),
        zero=frozenset(key for key, array in fields.items() if not array.any()),
    )


def _paired(task: LoadedTask, listed: list[_Seen]) -> list[dict[str, float]]:
    """The samples' features, which are of the same inputs.

    Raises:
        TaskError: a sample lacks the input of a modality that others have.
    """
    wanted = set().union(*(seen.features for seen in listed))
    for seen in listed:
        absent = sorted({name.rpartition(".")[0] for name in wanted - set(seen.features)})
        if absent:
            raise TaskError(
                f"expected every calibration sample to have the inputs of all modalities; got {seen.name!r} without "
                f"{absent} at {task.source.spec}; leave out samples that are not paired"
            )
    return [seen.features for seen in listed]


def _blank(task: LoadedTask, chosen: list[_Seen]) -> dict[str, int]:
    """Modality -> samples without it.

    Raises:
        TaskError: a modality is blank in all of them, so that its ranges would be those of a dead sensor.
    """
    named = getattr(task.user, "inputs_by_modality", None)
    # unnamed, each input stands for itself, and only zeros are a dead sensor: a mask may well be 1 everywhere
    own = {name: [name] for name in dict.fromkeys(key.rpartition(".")[0] for key in chosen[0].features)}
    counts = {
        name: sum(set(inputs) <= (seen.constant if named else seen.zero) for seen in chosen)
        for name, inputs in (named or own).items()
    }
    dead = [name for name, count in counts.items() if count == len(chosen)]
    if dead:
        raise TaskError(
            f"expected calibration samples with every modality; got {', '.join(dead)} blank in all {len(chosen)} "
            f"of them at {task.source.spec}; ranges measured on them would be those of a dead sensor: let "
            "batches('calib', 0) yield samples with all sensors working"
        )
    return {name: count for name, count in counts.items() if count}


def calibration_arrays(task: LoadedTask, card: CalibrationCard) -> dict[str, Array]:
    """The card's samples as arrays: input name -> (samples, ...), in the card's order.

    Raises:
        TaskError: a sample of the card is gone or its content is another now.
    """
    wanted = dict(zip(card.sample_ids, card.sample_sha256, strict=True))
    found: dict[str, dict[str, Array]] = {}
    for name, _, inputs in _samples(task, "calib"):
        if name not in wanted or name in found:
            continue
        if content_sha256(inputs) != wanted[name]:
            raise TaskError(
                f"expected the calibration sample {name!r} as on the card; got other content at {task.source.spec}; "
                "the data has changed: run the quantize stage again"
            )
        found[name] = {key: value.detach().cpu().numpy() for key, value in inputs.items()}
        if len(found) == len(wanted):
            break
    missing = [name for name in card.sample_ids if name not in found]
    if missing:
        raise TaskError(
            f"expected the calibration samples of the card; got none named {missing[:3]} at {task.source.spec}; "
            "run the quantize stage again"
        )
    first = found[card.sample_ids[0]]
    return {key: np.stack([found[name][key] for name in card.sample_ids]) for key in first}


def content_sha256(inputs: dict[str, Tensor]) -> str:
    """Hash of one sample's inputs: names, kinds, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(inputs):
        array = inputs[name].detach().cpu().contiguous().numpy()
        digest.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _samples(task: LoadedTask, split: Split) -> Iterator[tuple[str, str, dict[str, Tensor]]]:
    """(id, stratum, inputs) of every sample."""
    own = task.offers("strata") and split == "calib"
    for index, batch in enumerate(task.batches(split, 0)):
        if index >= MAX_BATCHES:
            raise TaskError(
                f"expected batches({split!r}, 0) to end; got {MAX_BATCHES} batches at {task.source.spec}; "
                "only the train split may be endless"
            )
        strata = [str(label) for label in task.user.strata(batch)] if own else list(batch.groups) or [""] * batch.size
        if len(strata) != batch.size:
            raise TaskError(
                f"expected strata(batch) to return {batch.size} labels, one a sample; got {len(strata)} at "
                f"{task.source.spec}; name the stratum of every sample"
            )
        for i, name in enumerate(batch.sample_ids):
            yield name, strata[i], {key: value[i] for key, value in batch.inputs.items()}


def _require_apart(task: LoadedTask, calib: dict[str, str]) -> None:
    for name, _, inputs in _samples(task, "eval"):
        twin = calib.get(content_sha256(inputs))
        if twin is not None:
            raise TaskError(
                f"expected calibration samples that are not in the evaluation data; got {twin!r}, whose content equals "
                f"{name!r} of the eval split, at {task.source.spec}; calibrating and choosing layers on the evaluation "
                "data would make every figure too good: leave it out of the calib split"
            )


def _total(ids: tuple[str, ...], hashes: tuple[str, ...]) -> str:
    return hashlib.sha256(json.dumps([list(ids), list(hashes)]).encode()).hexdigest()
