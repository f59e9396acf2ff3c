"""Strata of the evaluation samples: the task's labels, in the order of the samples."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusepress.pipeline.errors import TaskError
from fusepress.pipeline.evaluate import evaluate
from fusepress.pipeline.stages.verify import MOST_STRATA, _rows_of_strata
from fusepress.pipeline.task import Batch


class Labelled:
    """As much of a loaded task as `evaluate` looks at; odd samples are of the night."""

    source = SimpleNamespace(spec="task.py:Labelled")

    def __init__(self, *, short: bool = False) -> None:
        self.user = self
        self.short = short

    def offers(self, name: str) -> bool:
        return name == "strata"

    def strata(self, batch: Batch) -> list[str]:
        labels = ["night" if int(name[1:]) % 2 else "day" for name in batch.sample_ids]
        return labels[1:] if self.short else labels

    def batches(self, split: str, seed: int, **_: Any) -> Iterator[Batch]:
        for first in (0, 3):
            names = [f"s{i}" for i in range(first, first + 3)]
            yield Batch(inputs={"x": torch.zeros(3, 1)}, sample_ids=names, groups=names)

    def sample_stats(self, outputs: Any, batch: Batch) -> dict[str, Any]:
        return {"value": outputs["y"].numpy()}

    def score(self, stats: dict[str, Any]) -> dict[str, float]:
        return {"m": float(stats["value"].mean())}


def predict(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"y": inputs["x"]}


def test_every_evaluation_sample_has_its_label() -> None:
    task: Any = Labelled()
    found = evaluate(task, predict, "eval")
    assert found.strata == ("day", "night") * 3
    assert _rows_of_strata(found) == {"day": [0, 2, 4], "night": [1, 3, 5]}
    assert evaluate(task, predict, "calib").strata == ()


def test_a_label_for_each_sample_is_expected() -> None:
    task: Any = Labelled(short=True)
    with pytest.raises(TaskError, match=r"to return 3 labels, one a sample; got 2 at task\.py:Labelled"):
        evaluate(task, predict, "eval")


def test_labels_of_single_samples_are_no_strata() -> None:
    many: Any = SimpleNamespace(strata=tuple(str(i) for i in range(MOST_STRATA + 1)))
    assert _rows_of_strata(many) == {}
