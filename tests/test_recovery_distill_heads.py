"""What differences between student and teacher are measured in, and which of them count (recovery/spread.py)."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fusepress.pipeline.errors import TaskError
from fusepress.pipeline.recovery.distill import Distiller, Kind, distill_loss
from fusepress.pipeline.recovery.spread import (
    binary_spread,
    binary_sums,
    class_spread,
    class_sums,
    regression_spread,
    regression_sums,
)
from fusepress.pipeline.task import Batch, LoadedTask, load_task

KINDS: list[Kind] = ["classes", "binary", "regression", "regression_l1"]
CPU = torch.device("cpu")


@pytest.fixture
def task() -> LoadedTask:
    return load_task("recovery_toy.py:Toy", base=Path(__file__).parent)


def models(task: LoadedTask) -> Any:
    return sys.modules[type(task.user).__module__].models()


def normal(seed: int, *shape: int) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- the best student that ignores its input loses 1 --------------------------------------------------------------


def test_the_best_constant_classes_lose_one() -> None:
    teacher = normal(0, 16, 4, 3, 3) + normal(1, 4)[:, None, None]
    mean = (teacher.double() / 2).softmax(1).mean((0, 2, 3))
    constant = (2 * mean.log()).float()[None, :, None, None].expand_as(teacher)
    scale = class_spread(class_sums(teacher, None, 2.0), 2.0)
    assert float(distill_loss(constant, teacher, "classes", temperature=2.0, scale=scale)) == pytest.approx(1, rel=1e-4)
    other = constant + normal(2, 4)[:, None, None]
    assert float(distill_loss(other, teacher, "classes", temperature=2.0, scale=scale)) > 1


def test_the_best_constant_heat_maps_lose_one() -> None:
    teacher = normal(0, 16, 3, 5, 5) + torch.tensor([-6.0, 0.0, 2.0])[:, None, None]
    mean = torch.sigmoid(teacher.double() / 4).mean((0, 2, 3))
    constant = (4 * torch.logit(mean)).float()[None, :, None, None].expand_as(teacher)
    scale = binary_spread(binary_sums(teacher, None, 4.0), 4.0)
    assert float(distill_loss(constant, teacher, "binary", temperature=4.0, scale=scale)) == pytest.approx(1, rel=1e-4)


def test_the_best_constant_boxes_lose_one_in_every_channel() -> None:
    unit = torch.tensor([0.01, 1.0, 300.0])[:, None, None]
    teacher = (normal(0, 16, 3, 5, 5) + 2) * unit
    scale = regression_spread(regression_sums(teacher, None, by_channel=True))
    assert isinstance(scale, Tensor)
    constant = teacher.mean((0, 2, 3), keepdim=True).expand_as(teacher)
    assert float(distill_loss(constant, teacher, "regression", temperature=1, scale=scale)) == pytest.approx(
        1, rel=1e-4
    )
    for channel in range(3):
        off = teacher.clone()
        off[:, channel] = constant[:, channel]
        assert float(distill_loss(off, teacher, "regression", temperature=1, scale=scale)) == pytest.approx(
            1 / 3, rel=1e-4
        )


def test_spreads_add_up_over_batches() -> None:
    whole = normal(0, 12, 4, 3)
    parts = whole[:5], whole[5:]
    summed: list[Callable[[Tensor], Tensor]] = [
        lambda x: class_sums(x, None, 2.0),
        lambda x: binary_sums(x, None, 2.0),
        lambda x: regression_sums(x, None, by_channel=True),
    ]
    for sums in summed:
        torch.testing.assert_close(sums(parts[0]) + sums(parts[1]), sums(whole))


def test_teachers_without_spread_have_a_usable_one() -> None:
    same = torch.ones(6, 3, 2)
    assert class_spread(class_sums(same, None, 2.0), 2.0) == 1.0
    assert binary_spread(binary_sums(same, None, 2.0), 2.0) == 1.0
    sure = torch.full((6, 3, 2), -1e4)
    assert binary_spread(binary_sums(sure, None, 2.0), 2.0) == 1.0
    values = torch.stack([torch.full((6,), -4.0), torch.zeros(6)], 1)
    assert regression_spread(regression_sums(values, None, by_channel=True)).tolist() == [4.0, 1.0]  # type: ignore[union-attr]
    never = regression_sums(values, torch.zeros(6, 1), by_channel=True)
    assert regression_spread(never).tolist() == [1.0, 1.0]  # type: ignore[union-attr]


def test_weighted_spreads_are_those_of_the_weighted_elements_alone() -> None:
    teacher = normal(0, 8, 3, 6)
    mask = torch.zeros(8, 1, 6)
    mask[:4, :, ::2] = 2.0
    alone = teacher[:4, :, ::2]
    pairs: list[tuple[Any, Any]] = [
        (class_spread(class_sums(teacher, mask[:, 0], 2.0), 2.0), class_spread(class_sums(alone, None, 2.0), 2.0)),
        (binary_spread(binary_sums(teacher, mask, 2.0), 2.0), binary_spread(binary_sums(alone, None, 2.0), 2.0)),
        (
            regression_spread(regression_sums(teacher, mask, by_channel=True)),
            regression_spread(regression_sums(alone, None, by_channel=True)),
        ),
    ]
    for masked, expected in pairs:
        torch.testing.assert_close(torch.as_tensor(masked), torch.as_tensor(expected))


# --- kinds --------------------------------------------------------------------------------------------------------


def test_l1_and_l2_are_the_mean_absolute_and_squared_difference() -> None:
    student, teacher = torch.tensor([[1.0, 4.0]]), torch.tensor([[0.0, 0.0]])
    assert float(distill_loss(student, teacher, "regression", temperature=1, scale=2.0)) == (0.25 + 4) / 2
    assert float(distill_loss(student, teacher, "regression_l1", temperature=1, scale=2.0)) == (0.5 + 2) / 2


@pytest.mark.parametrize("kind", KINDS)
def test_weights_choose_the_elements_that_count(kind: Kind) -> None:
    teacher, student = normal(0, 4, 3, 6), normal(1, 4, 3, 6)
    mask = torch.zeros(4, 1, 6)
    mask[..., 1:3] = 3.0  # mean 1
    chosen = distill_loss(student[..., 1:3], teacher[..., 1:3], kind, temperature=2.0, scale=1.5)
    weighed = distill_loss(student, teacher, kind, temperature=2.0, scale=1.5, weight=mask)
    assert float(weighed) == pytest.approx(float(chosen), rel=1e-5)


# --- a task that normalises and masks -----------------------------------------------------------------------------


def distiller_of(task: LoadedTask, **options: Any) -> Distiller:
    teacher = models(task)[1].eval()
    return Distiller(teacher=teacher, task=task, temperature=2.0, **options)


def by_label(self: Any, outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """The size counts only where the class is 1."""
    return {"size": (batch.targets["label"] == 1).float()[:, None]}


@pytest.mark.parametrize("normalise", [False, True])
def test_a_masked_batch_is_the_mean_of_its_samples(
    task: LoadedTask, monkeypatch: pytest.MonkeyPatch, normalise: bool
) -> None:
    monkeypatch.setattr(type(task.user), "distill_masks", by_label, raising=False)
    distiller = distiller_of(task, normalise=normalise)
    distiller.measure_scales(3, CPU)
    batch = next(task.batches("train", 8))
    wanted = distiller.outputs(batch.inputs)
    student = {name: value + normal(5, *value.shape) for name, value in wanted.items()}
    whole = distiller.losses(student, wanted, batch)
    rows = []
    for k in range(batch.size):
        one = Batch(inputs=batch.inputs, targets={n: v[k : k + 1] for n, v in batch.targets.items()})
        mine, theirs = ({n: v[k : k + 1] for n, v in side.items()} for side in (student, wanted))
        rows.append(distiller.losses(mine, theirs, one))
    for name, loss in whole.items():
        assert float(loss) == pytest.approx(math.fsum(float(row[name]) for row in rows) / batch.size, rel=1e-5)
    labels = batch.targets["label"] == 1
    assert 0 < int(labels.sum()) < batch.size
    assert [float(row["distill.size"]) > 0 for row in rows] == labels.tolist()


def test_masked_regressions_are_measured_in_the_spread_of_what_counts(
    task: LoadedTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(task.user), "distill_masks", by_label, raising=False)
    distiller = distiller_of(task)
    distiller.measure_scales(3, CPU)
    seen = list(task.batches("train", 3))[:4]
    assert distiller.teacher is not None
    sizes = torch.cat([distiller.outputs(batch.inputs)["size"][batch.targets["label"] == 1] for batch in seen])
    share = torch.cat([batch.targets["label"] == 1 for batch in seen]).float().mean()
    assert distiller.scales["size"] == pytest.approx(float(sizes.std(correction=0)), rel=1e-4)
    assert distiller.mask_means == {"size": pytest.approx(float(share))}


def test_normalised_heads_start_comparable(task: LoadedTask) -> None:
    plain, normalised = distiller_of(task), distiller_of(task, normalise=True)
    assert plain.teacher is not None
    with torch.no_grad():
        plain.teacher.get_parameter("head.weight").mul_(0.2)  # a head that says little
    losses = []
    for distiller in (plain, normalised):
        distiller.teacher = plain.teacher
        distiller.measure_scales(3, CPU)
        batches = list(task.batches("train", 3))[:4]
        inputs = {name: torch.cat([b.inputs[name] for b in batches]) for name in batches[0].inputs}
        wanted = distiller.outputs(inputs)
        mean = (wanted["logits"] / 2).softmax(1).mean(0, keepdim=True)
        constant = {
            "logits": (2 * mean.log()).expand_as(wanted["logits"]),
            "size": wanted["size"].mean(0, keepdim=True).expand_as(wanted["size"]),
        }
        losses.append({name: float(loss) for name, loss in distiller.losses(constant, wanted).items()})
    assert losses[0]["distill.logits"] < 0.05
    assert losses[0]["distill.size"] == pytest.approx(1, rel=1e-3)
    assert losses[1] == {"distill.logits": pytest.approx(1, rel=1e-2), "distill.size": pytest.approx(1, rel=1e-3)}


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"boxes": torch.ones(6, 1)}, r"weights for \['logits', 'size'\].* got 'boxes' of shape \(6, 1\)"),
        ({"size": torch.ones(6)}, r"got 'size' of shape \(6,\) for \(6, 1\)"),
        ({"logits": torch.ones(6, 3)}, r"classes: 1 in dim 1\); got 'logits' of shape \(6, 3\)"),
        ({"size": -torch.ones(6, 1)}, r"weights of at least 0 from Toy\.distill_masks; got others for 'size'"),
        ({"size": torch.full((6, 1), math.nan)}, r"expected finite weights"),
        ({"size": torch.zeros(6, 1)}, r"to weigh some of 'size' above zero; got zeros on the first 4 training"),
    ],
)
def test_wrong_weights_are_refused(
    task: LoadedTask, monkeypatch: pytest.MonkeyPatch, masks: dict[str, Tensor], message: str
) -> None:
    monkeypatch.setattr(type(task.user), "distill_masks", lambda _s, _o, _b: masks, raising=False)
    with pytest.raises(TaskError, match=message):
        distiller_of(task).measure_scales(3, CPU)
