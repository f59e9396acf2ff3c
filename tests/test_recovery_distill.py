"""Distillation from outputs (pipeline/recovery/distill.py)."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusepress.pipeline.errors import TaskError
from fusepress.pipeline.recovery.distill import Distiller, Kind, distill_kinds, distill_loss
from fusepress.pipeline.task import LoadedTask, load_task

KINDS: list[Kind] = ["classes", "binary", "regression", "regression_l1"]


@pytest.fixture
def task() -> LoadedTask:
    return load_task("recovery_toy.py:Toy", base=Path(__file__).parent)


def models(task: LoadedTask) -> Any:
    return sys.modules[type(task.user).__module__].models()


def logits(seed: int, *shape: int) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_an_identical_student_has_no_loss_and_no_gradient(kind: Kind) -> None:
    teacher = logits(0, 4, 5, 3, 3)
    student = teacher.clone().requires_grad_()
    loss = distill_loss(student, teacher, kind, temperature=2.0, scale=3.0)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert student.grad is not None
    assert float(student.grad.abs().max()) < 1e-8


@pytest.mark.parametrize("kind", KINDS)
def test_another_student_has_a_positive_loss_that_its_gradient_lowers(kind: Kind) -> None:
    teacher, student = logits(0, 4, 5, 3, 3), logits(1, 4, 5, 3, 3).requires_grad_()
    loss = distill_loss(student, teacher, kind, temperature=2.0, scale=3.0)
    loss.backward()
    assert student.grad is not None
    better = distill_loss(student.detach() - 10 * student.grad, teacher, kind, temperature=2.0, scale=3.0)
    assert 0 < float(better) < float(loss.detach())


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_a_batch_is_the_mean_of_its_samples(kind: Kind) -> None:
    teacher, student = logits(0, 6, 5, 3, 3), logits(1, 6, 5, 3, 3)
    whole = distill_loss(student, teacher, kind, temperature=2.0, scale=3.0)
    rows = [distill_loss(s[None], t[None], kind, temperature=2.0, scale=3.0) for s, t in zip(student, teacher)]  # noqa: B905
    assert float(whole) == pytest.approx(float(torch.stack(rows).mean()), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_reaches_the_teacher(kind: Kind) -> None:
    teacher, student = logits(0, 2, 5).requires_grad_(), logits(1, 2, 5).requires_grad_()
    distill_loss(student, teacher, kind, temperature=2.0).backward()
    assert teacher.grad is None


def test_classes_is_the_softened_divergence_over_dim_1() -> None:
    teacher, student = logits(0, 2, 4, 3), logits(1, 2, 4, 3)
    loss = distill_loss(student, teacher, "classes", temperature=4.0)
    expected = 0.0
    for b in range(2):
        for x in range(3):
            p, q = ((side[b, :, x] / 4).softmax(0) for side in (teacher, student))
            expected += float((p * (p / q).log()).sum()) * 16 / 6
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_binary_is_the_softened_divergence_of_every_element() -> None:
    teacher, student = logits(0, 2, 3), logits(1, 2, 3)
    p, q = (torch.sigmoid(side.double() / 2) for side in (teacher, student))
    expected = 4 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    assert float(distill_loss(student, teacher, "binary", temperature=2.0)) == pytest.approx(float(expected), rel=1e-5)


def test_temperature_squared_keeps_gradients_comparable() -> None:
    teacher = 0.01 * logits(0, 8, 5)
    norms = []
    for temperature in (2.0, 20.0):
        student = (0.01 * logits(1, 8, 5)).requires_grad_()
        distill_loss(student, teacher, "classes", temperature=temperature).backward()
        assert student.grad is not None
        norms.append(float(student.grad.norm()))
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


def test_regression_is_measured_in_the_teachers_spread(task: LoadedTask) -> None:
    _, teacher = models(task)
    teacher.eval()
    distiller = Distiller(teacher=teacher, task=task, temperature=2.0)
    distiller.measure_scales(3, torch.device("cpu"))
    seen = torch.cat([teacher(**batch.inputs)["size"] for batch in list(task.batches("train", 3))[:4]])
    assert set(distiller.scales) == {"size"}
    assert distiller.scales["size"] == pytest.approx(float(seen.detach().std(correction=0)), rel=1e-4)
    outputs = distiller.outputs(next(task.batches("eval", 9)).inputs)
    off = {"logits": outputs["logits"], "size": outputs["size"] + distiller.scales["size"]}
    losses = distiller.losses(off, outputs)
    assert float(losses["distill.size"]) == pytest.approx(1.0)
    assert float(losses["distill.logits"]) == 0.0


@pytest.mark.parametrize(("constant", "scale"), [(0.0, 1.0), (-4.0, 4.0)])
def test_a_constant_output_has_a_usable_scale(task: LoadedTask, constant: float, scale: float) -> None:
    _, teacher = models(task)
    teacher.size.weight.data.zero_()
    teacher.size.bias.data.fill_(constant)
    distiller = Distiller(teacher=teacher, task=task, temperature=2.0)
    distiller.measure_scales(3, torch.device("cpu"))
    assert distiller.scales["size"] == pytest.approx(scale)


def test_an_identical_model_is_taught_nothing(task: LoadedTask) -> None:
    student, _ = models(task)
    student.eval()
    distiller = Distiller(teacher=models(task)[0], task=task, temperature=2.0)
    distiller.measure_scales(0, torch.device("cpu"))
    batch = next(task.batches("train", 0))
    losses = distiller.losses(student(**batch.inputs), distiller.outputs(batch.inputs))
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    assert float(total.detach()) == 0.0
    slopes = [float(p.grad.abs().max()) for p in student.parameters() if p.grad is not None]
    assert max(slopes) < 1e-6
    assert len(slopes) == len(list(student.parameters()))


def test_kinds_default_to_regression(task: LoadedTask) -> None:
    outputs = {"logits": logits(0, 2, 3), "size": logits(1, 2, 1)}
    assert distill_kinds(task, outputs) == {"logits": "classes", "size": "regression"}


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"logit": "classes"}, r"map the outputs \['logits', 'size'\] to one of \['classes', 'binary', 'regression', "),
        ({"logits": "softmax"}, r"got \{'logits': 'softmax'\}"),
        (["classes"], r"got \['classes'\]"),
        ({"size": "classes"}, r"two or more classes in dim 1; got 'size' of shape \(2, 1\)"),
    ],
)
def test_wrong_kinds_are_refused(
    task: LoadedTask, monkeypatch: pytest.MonkeyPatch, declared: object, message: str
) -> None:
    monkeypatch.setattr(type(task.user), "distill_kinds", declared)
    with pytest.raises(TaskError, match=message):
        distill_kinds(task, {"logits": logits(0, 2, 3), "size": logits(1, 2, 1)})


def test_outputs_of_other_shapes_are_refused(task: LoadedTask) -> None:
    distiller = Distiller(teacher=models(task)[1], task=task, temperature=2.0)
    with pytest.raises(TaskError, match=r"the same outputs; got \{'a': \(2, 3\)\} and \{'a': \(2, 4\)\}.*`keep`"):
        distiller.losses({"a": logits(0, 2, 3)}, {"a": logits(0, 2, 4)})


def test_half_precision_outputs_are_compared_in_float32() -> None:
    teacher, student = logits(0, 4, 5), logits(1, 4, 5)
    loss = distill_loss(student.half(), teacher.half(), "classes", temperature=2.0)
    assert loss.dtype == torch.float32
    wanted = 4 * F.kl_div((student / 2).log_softmax(1), (teacher / 2).softmax(1), reduction="batchmean")
    assert math.isclose(float(loss), float(wanted), rel_tol=0.01)
