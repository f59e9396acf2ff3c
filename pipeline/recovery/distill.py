"""Distillation from the dense model's outputs.

What an output means, the task may say: `distill_kinds = {"logits": "classes"}`, by output name ("output" for a model
that returns one tensor). For student s, teacher t and temperature T:

* `classes`: dim 1 holds class logits (segmentation, classification, one-hot heatmaps). T^2 KL(softmax(t/T) ||
  softmax(s/T)), averaged over samples and positions.
* `binary`: every element is a logit of its own (heatmaps of several objects). T^2 KL of the two Bernoulli
  distributions, averaged over all elements.
* `regression`, the default: mean of ((s - t) / scale)^2, where scale is the teacher's standard deviation of that
  output over the first training batches: fixed for the whole run, so that a loss does not depend on its batch.

All are means over equally large samples, so the loss of a batch is the mean of the losses of its samples. They are
zero, with zero gradient, where the student equals the teacher. No gradient reaches the teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusepress.pipeline.errors import TaskError
from fusepress.pipeline.recovery import rng
from fusepress.pipeline.task import LoadedTask

Kind = Literal["classes", "binary", "regression"]
SCALE_BATCHES = 4


def distill_loss(student: Tensor, teacher: Tensor, kind: Kind, *, temperature: float, scale: float = 1.0) -> Tensor:
    """How far one output is from the teacher's.

    Args:
        student: output of the student, `[B, ...]`; for classes `[B, C, ...]`.
        teacher: output of the teacher, same shape; it gets no gradient.
        kind: what the output means.
        temperature: T, softens both distributions (classes, binary).
        scale: what differences are measured in (regression).

    Returns:
        A scalar >= 0 in float32.
    """
    s, t = student.float(), teacher.detach().float()
    if kind == "regression":
        return ((s - t) / scale).square().mean()
    s, t = s / temperature, t / temperature
    if kind == "binary":
        target = torch.sigmoid(t)
        cross = F.binary_cross_entropy_with_logits(s, target)
        return temperature**2 * (cross - F.binary_cross_entropy_with_logits(t, target))
    log_s, log_t = F.log_softmax(s, dim=1), F.log_softmax(t, dim=1)
    return temperature**2 * (log_t.exp() * (log_t - log_s)).sum(dim=1).mean()


@dataclass(slots=True, kw_only=True)
class Distiller:
    """The dense model as a teacher of outputs.

    Attributes:
        teacher: in evaluation mode; it is never changed.
        task: says what the outputs mean.
        temperature: of softened distributions.
        scales: standard deviation of each regression output of the teacher.
    """

    teacher: nn.Module
    task: LoadedTask
    temperature: float
    scales: dict[str, float] = field(default_factory=dict)

    def measure_scales(self, seed: int, device: torch.device, batches: int = SCALE_BATCHES) -> None:
        """Measure the teacher's spread on the first training batches; outputs of other kinds need none."""
        sums: dict[str, Tensor] = {}
        source = self.task.train_batches(seed)
        for index in range(batches):
            batch = rng.draw(source, seed, index)
            outputs = self.outputs({name: value.to(device) for name, value in batch.inputs.items()})
            regressions = [n for n, kind in distill_kinds(self.task, outputs).items() if kind == "regression"]
            if not regressions:
                return
            for name in regressions:
                value = outputs[name].double()
                moments = torch.stack([torch.ones_like(value).sum(), value.sum(), value.square().sum()])
                sums[name] = sums[name] + moments if name in sums else moments
        self.scales = {name: _spread(*moments.tolist()) for name, moments in sums.items()}

    def outputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The teacher's outputs, without gradient."""
        with torch.no_grad():
            return self.task.as_dict(self.teacher.eval()(**inputs))

    def losses(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Loss of each output, named `distill.<output>`.

        Raises:
            TaskError: student and teacher differ in names or shapes, or `distill_kinds` does not fit the outputs.
        """
        shapes = [{name: tuple(value.shape) for name, value in side.items()} for side in (student, teacher)]
        if shapes[0] != shapes[1]:
            raise TaskError(
                f"expected student and dense model to return the same outputs; got {shapes[0]} and {shapes[1]}; keep "
                "the layers that shape an output with the task's `keep`, or switch finetune.distill off"
            )
        kinds = distill_kinds(self.task, teacher)
        return {
            f"distill.{name}": distill_loss(
                student[name], value, kinds[name], temperature=self.temperature, scale=self.scales.get(name, 1.0)
            )
            for name, value in teacher.items()
        }


def distill_kinds(task: LoadedTask, outputs: Mapping[str, Tensor]) -> dict[str, Kind]:
    """What each output means: the task's `distill_kinds`, "regression" where it says nothing.

    Raises:
        TaskError: `distill_kinds` names an unknown output or kind, or classes where there is no dim 1 of 2 or more.
    """
    declared: Any = getattr(task.user, "distill_kinds", {})
    known = get_args(Kind)
    if not isinstance(declared, dict) or any(n not in outputs or k not in known for n, k in declared.items()):
        raise TaskError(
            f"expected {task.name}.distill_kinds to map the outputs {list(outputs)} to one of {list(known)}; got "
            f"{declared!r}; correct it"
        )
    for name, kind in declared.items():
        if kind == "classes" and (outputs[name].dim() < 2 or outputs[name].shape[1] < 2):
            raise TaskError(
                f"expected an output with two or more classes in dim 1; got {name!r} of shape "
                f"{tuple(outputs[name].shape)} at {task.name}.distill_kinds; call it 'binary' or 'regression'"
            )
    return {name: declared.get(name, "regression") for name in outputs}


def _spread(count: float, total: float, squares: float) -> float:
    """Standard deviation; for a constant output its size, and 1 for one that is zero throughout."""
    mean_square = squares / count
    variance = mean_square - (total / count) ** 2
    if variance > 1e-6 * mean_square:
        return float(variance**0.5)
    return float(mean_square**0.5) or 1.0
