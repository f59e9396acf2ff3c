"""The calibration card: which samples INT8 ranges are measured on, proven apart from the evaluation data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusepress.pipeline.errors import TaskError
from fusepress.pipeline.store import atomic_write_text
from fusepress.pipeline.task import LoadedTask, Split

if TYPE_CHECKING:
    from torch import Tensor

Array = np.ndarray[Any, Any]
MAX_BATCHES = 100_000  # a `calib` split that never ends is a fault of the task


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
        shared_with_eval: samples of the evaluation split with the same content; a card is only made with none.
    """

    task: str
    seed: int
    available: int
    sample_ids: tuple[str, ...]
    sample_sha256: tuple[str, ...]
    sha256: str
    shared_with_eval: int = 0
    schema: int = 1

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

    def summary(self) -> dict[str, Any]:
        """What a report says about the card."""
        return {
            "samples": len(self.sample_ids),
            "available": self.available,
            "seed": self.seed,
            "sha256": self.sha256,
            "shared_with_eval": self.shared_with_eval,
        }


def choose_calibration(task: LoadedTask, samples: int, seed: int) -> CalibrationCard:
    """Choose calibration samples from the `calib` split, evenly over its groups, by seed.

    Args:
        task: the task.
        samples: how many; all there are if the split has fewer.
        seed: of the choice.

    Raises:
        TaskError: the split is empty or repeats a sample id, or a chosen sample is in the evaluation data too.
    """
    if samples < 1:
        raise TaskError(f"expected at least 1 calibration sample; got {samples}; set quantize.samples")
    listed = [(name, group, content_sha256(inputs)) for name, group, inputs in _samples(task, "calib")]
    names = [name for name, _, _ in listed]
    if not listed or len(set(names)) != len(names):
        found = "no sample" if not listed else f"{len(names) - len(set(names))} repeated sample ids"
        raise TaskError(
            f"expected batches('calib', 0) to yield every sample once; got {found} at {task.source.spec}; "
            "give every sample its own id"
        )
    chosen = _spread([group for _, group, _ in listed], min(samples, len(listed)), seed)
    ids, hashes = tuple(listed[i][0] for i in chosen), tuple(listed[i][2] for i in chosen)
    _require_apart(task, dict(zip(hashes, ids, strict=True)))
    return CalibrationCard(
        task=task.name,
        seed=seed,
        available=len(listed),
        sample_ids=ids,
        sample_sha256=hashes,
        sha256=_total(ids, hashes),
    )


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
    for index, batch in enumerate(task.batches(split, 0)):
        if index >= MAX_BATCHES:
            raise TaskError(
                f"expected batches({split!r}, 0) to end; got {MAX_BATCHES} batches at {task.source.spec}; "
                "only the train split may be endless"
            )
        groups = list(batch.groups) or [""] * batch.size
        for i, name in enumerate(batch.sample_ids):
            yield name, groups[i], {key: value[i] for key, value in batch.inputs.items()}


def _spread(groups: list[str], count: int, seed: int) -> list[int]:
    """Indices, drawn from the groups in turn so that no scene dominates; sorted."""
    generator = np.random.default_rng(seed)
    members = {group: [i for i, g in enumerate(groups) if g == group] for group in dict.fromkeys(groups)}
    queues = [list(generator.permutation(members[group])) for group in sorted(members)]
    generator.shuffle(queues)
    chosen: list[int] = []
    while len(chosen) < count:
        for queue in queues:
            if queue and len(chosen) < count:
                chosen.append(int(queue.pop()))
    return sorted(chosen)


def _require_apart(task: LoadedTask, chosen: dict[str, str]) -> None:
    for name, _, inputs in _samples(task, "eval"):
        twin = chosen.get(content_sha256(inputs))
        if twin is not None:
            raise TaskError(
                f"expected calibration samples that are not in the evaluation data; got {twin!r}, whose content equals "
                f"{name!r} of the eval split, at {task.source.spec}; calibrating on the evaluation data would make "
                "every figure too good: take other samples"
            )


def _total(ids: tuple[str, ...], hashes: tuple[str, ...]) -> str:
    return hashlib.sha256(json.dumps([list(ids), list(hashes)]).encode()).hexdigest()
