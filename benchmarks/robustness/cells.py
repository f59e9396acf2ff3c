"""The cells: street with training data that know dead sensors or do not, AlterMOMA's beta, and the remedies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusepress.pipeline.store import sha256_file
from fusepress.pipeline.task import Batch, Split

ROOT = Path(__file__).resolve().parents[2]
STREET = ROOT / "examples" / "street" / "recipe.yaml"
DENSE = STREET.with_name("street.safetensors")
VERSION = 1  # raised by hand when training changes the results of every cell
MODALITY_DROPOUT = 0.25
MORE_DROPOUT = 0.5
ROBUSTNESS = 0.5
REMEDIES: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "none": {},
    "dropout": {"finetune": {"modality_dropout": MODALITY_DROPOUT}},
    "more dropout": {"finetune": {"modality_dropout": MORE_DROPOUT}},
    "scores": {"score": {"robustness": ROBUSTNESS}},
    "both": {"finetune": {"modality_dropout": MORE_DROPOUT}, "score": {"robustness": ROBUSTNESS}},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One pruned and fine-tuned street network.

    Attributes:
        data: of scoring and fine-tuning: "dead sensors" (the example's: 12 % of the frames without either sensor) or
            "healthy" (the same frames, all of them whole).
        beta: of AlterMOMA.
        remedy: of `REMEDIES`.
        macs: kept fraction.
        steps: of fine-tuning.
        seed: of everything random.
    """

    data: str
    beta: float
    remedy: str
    macs: float
    steps: int
    seed: int

    @property
    def name(self) -> str:
        """For people and folders."""
        parts = [f"m{100 * self.macs:g}", self.data.replace(" ", "-"), f"b{self.beta:g}", self.remedy.replace(" ", "-")]
        return "street-" + "-".join([*parts, f"t{self.steps}", f"s{self.seed}"])

    def overrides(self) -> list[str]:
        """The recipe's changes; the fine-tuning is plain and in bf16, which is quick on a CPU."""
        remedy = REMEDIES[self.remedy]
        score = {"method": "altermoma", "alpha": 1.0, "beta": self.beta, "batches": 4}
        score |= {"reactivation_batches": 4, "reactivation_lr": 3.0e-3}
        finetune = {"steps": self.steps, "lr": 2e-3, "distill": False, "precision": "bf16"}
        return [
            f"seed={self.seed}",
            f"score={json.dumps({**score, **remedy.get('score', {})})}",
            f"prune={json.dumps({'macs': self.macs, 'allocation': 'importance', 'align': 8})}",
            f"finetune={json.dumps({**finetune, **remedy.get('finetune', {})})}",
        ]

    @property
    def key(self) -> str:
        """Hash of what shapes the weights, but for the sources of the task."""
        files = [sha256_file(STREET), sha256_file(DENSE)]
        return hashlib.sha256(json.dumps([VERSION, self.data, self.overrides(), files]).encode()).hexdigest()[:16]


def planned(macs: float, steps: int, seeds: Sequence[int]) -> Iterator[Cell]:
    """What tells most first; one seed before the next."""
    order = [
        ("healthy", 0.0, "none"),
        ("healthy", 1.0, "none"),
        ("healthy", 0.0, "dropout"),
        ("healthy", 0.0, "both"),
        ("healthy", 0.0, "more dropout"),
        ("healthy", 0.25, "none"),
        ("healthy", 0.0, "scores"),
        ("healthy", 1.0, "dropout"),
        ("healthy", 4.0, "none"),
        ("dead sensors", 0.0, "none"),
        ("dead sensors", 1.0, "none"),
        ("dead sensors", 0.25, "none"),
        ("dead sensors", 4.0, "none"),
        ("healthy", 1.0, "scores"),
        ("healthy", 1.0, "both"),
    ]
    for seed in seeds:
        for data, beta, remedy in order:
            yield Cell(data=data, beta=beta, remedy=remedy, macs=macs, steps=steps, seed=seed)


class HealthyTask:
    """The street task whose training frames are all whole: what a team has that never recorded a broken sensor.

    Args:
        user: the street task; all else is passed on to it.
    """

    def __init__(self, user: Any) -> None:
        self._user = user

    def __getattr__(self, name: str) -> Any:
        return getattr(self._user, name)

    def batches(self, split: Split, seed: int, *, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """The street task's frames; those of the training split with both sensors alive."""
        if split != "train":
            yield from self._user.batches(split, seed, start=start, rank=rank, world=world)
            return
        number = start * world + rank
        while True:
            first = number * self._user.batch_size
            yield self._user.make(split, seed, list(range(first, first + self._user.batch_size)), dead=0.0)
            number += world

    def fingerprint(self, split: Split) -> str:
        """The street task's, marked where the data differ."""
        plain = str(self._user.fingerprint(split))
        return plain if split != "train" else hashlib.sha256(f"{plain} without dead sensors".encode()).hexdigest()
