"""The evaluation samples: the task's labels in their order, and the same order for both models."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusepress.pipeline.errors import TaskError
from fusepress.pipeline.evaluate import evaluate
from fusepress.pipeline.stages.verify import MOST_STRATA, _check_paired, _rows_of_strata
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


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"sample_ids": ("s1", "s0", "s2", "s3", "s4", "s5")}, "got 's0', then 's1' at task.py:Labelled"),
        ({"groups": ("a",) * 6}, "got other groups or another number"),
        ({"sample_ids": ("s0",)}, "got other groups or another number"),
    ],
)
def test_both_models_are_judged_on_the_same_samples_in_the_same_order(change: dict[str, Any], told: str) -> None:
    task: Any = Labelled()
    context: Any = SimpleNamespace(task=task)
    dense = evaluate(task, predict, "eval")
    _check_paired(context, dense, replace(dense, strata=()))
    numbered: Any = (1,) * 6
    _check_paired(context, replace(dense, groups=("1",) * 6), replace(dense, groups=numbered))  # read back, it is text
    with pytest.raises(TaskError, match=re.escape(told)):
        _check_paired(context, dense, replace(dense, **change))
