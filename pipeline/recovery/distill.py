"""Distillation: what teachers say of the outputs, and what the dense model holds at named points.

Teachers are the dense model and, where the recipe lists them, experts of single tasks (as DMFuser has them): each
expert teaches the outputs that it returns, and the dense model the others. What an output means, the task may say:
`distill_kinds = {"logits": "classes"}`, by output name ("output" for a model that returns one tensor). For student s,
teacher t and temperature T:

* `classes`: dim 1 holds class logits (segmentation, classification, one-hot heatmaps). T^2 KL(softmax(t/T) ||
  softmax(s/T)), averaged over samples and positions.
* `binary`: every element is a logit of its own (heatmaps of several objects). T^2 KL of the two Bernoulli
  distributions, averaged over all elements.
* `regression`, the default: mean of ((s - t) / scale)^2, where scale is the teacher's standard deviation of that
  output over the first training batches: fixed for the whole run, so that a loss does not depend on its batch.
* `regression_l1`: mean of |s - t| / scale.

With `normalise`, the divergences are divided by their spread too, and regressions channel by channel (spread.py).
Where only some elements of an output mean anything (a box away from any object), the task's `distill_masks(outputs,
batch)` weighs them; the weights are divided by their mean over the first training batches, again a constant.

All are means over equally large samples, so the loss of a batch is the mean of the losses of its samples, however it is
cut. They are zero, with zero gradient, where the student equals the teacher. No gradient reaches a teacher.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusepress.pipeline.errors import TaskError
from fusepress.pipeline.recovery import rng
from fusepress.pipeline.recovery.features import FeatureTeacher
from fusepress.pipeline.recovery.placement import all_tensors, on_device
from fusepress.pipeline.recovery.spread import (
    binary_spread,
    binary_sums,
    class_spread,
    class_sums,
    regression_spread,
    regression_sums,
)
from fusepress.pipeline.task import SINGLE_OUTPUT, Batch, LoadedTask

Kind = Literal["classes", "binary", "regression", "regression_l1"]
SCALE_BATCHES = 4
PREFIX = "distill."  # of the names of all losses made here


def distill_loss(
    student: Tensor,
    teacher: Tensor,
    kind: Kind,
    *,
    temperature: float,
    scale: float | Tensor = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    """How far one output is from the teacher's.

    Args:
        student: output of the student, `[B, ...]`; for classes `[B, C, ...]`.
        teacher: output of the teacher, same shape; it gets no gradient.
        kind: what the output means.
        temperature: T, softens both distributions (classes, binary).
        scale: what differences or divergences are measured in; for regression it may be `[C]`, along dim 1.
        weight: of the elements, in the output's dimensions, of size 1 or the output's; for classes of size 1 in dim 1.

    Returns:
        A scalar >= 0 in float32.
    """
    s, t = student.float(), teacher.detach().float()
    if kind in ("regression", "regression_l1"):
        gap = (s - t) / _along_channels(scale, s)
        return _mean(gap.square() if kind == "regression" else gap.abs(), weight)
    s, t = s / temperature, t / temperature
    if kind == "binary":
        target = torch.sigmoid(t)
        part = None if weight is None else weight.float().expand_as(s)
        cross = F.binary_cross_entropy_with_logits(s, target, part)
        own = F.binary_cross_entropy_with_logits(t, target, part)
        return temperature**2 * (cross - own) / scale
    log_s, log_t = F.log_softmax(s, dim=1), F.log_softmax(t, dim=1)
    divergence = (log_t.exp() * (log_t - log_s)).sum(dim=1)
    return temperature**2 * _mean(divergence, None if weight is None else weight.squeeze(1)) / scale


def _mean(value: Tensor, weight: Tensor | None) -> Tensor:
    return value.mean() if weight is None else (value * weight.float()).mean()


def _along_channels(scale: float | Tensor, like: Tensor) -> float | Tensor:
    if not isinstance(scale, Tensor):
        return scale
    return scale.to(like.device).view(-1, *(1 for _ in like.shape[2:])) if like.dim() > 1 else scale.to(like.device)


@dataclass(slots=True, kw_only=True)
class Distiller:
    """The teachers of a run.

    Attributes:
        teacher: the dense model, in evaluation mode; None where experts alone teach.
        task: says what the outputs mean.
        temperature: of softened distributions.
        experts: models of single tasks by name; each teaches the outputs that it returns. None is ever changed.
        weight: of the losses of the outputs.
        normalise: measure divergences in their spread too, and regressions by channel.
        features: the dense model's features at named points, if they are taught.
        feature_weight: of their losses at the start; it falls to 0 over the run, as half a cosine.
        scales: spread of each output of the teachers that needs one.
        mask_means: mean of each of the task's element weights.
    """

    teacher: nn.Module | None
    task: LoadedTask
    temperature: float
    experts: Mapping[str, nn.Module] = field(default_factory=dict)
    weight: float = 1.0
    normalise: bool = False
    features: FeatureTeacher | None = None
    feature_weight: float = 0.0
    scales: dict[str, float | Tensor] = field(default_factory=dict)
    mask_means: dict[str, float] = field(default_factory=dict)
    _taught: frozenset[str] = frozenset()
    _spared: bool = False

    @property
    def models(self) -> list[nn.Module]:
        """All teachers, the dense model first."""
        return [*([self.teacher] if self.teacher is not None else []), *self.experts.values()]

    def tensors(self) -> dict[str, Tensor]:
        """All that the teachers hold, by names that tell the teachers apart."""
        dense = {} if self.teacher is None else all_tensors(self.teacher)
        named = {f"{name}:{key}": value for name, m in self.experts.items() for key, value in all_tensors(m).items()}
        return {**dense, **named, **(self.features.tensors() if self.features is not None else {})}

    def measure_scales(self, seed: int, device: torch.device, batches: int = SCALE_BATCHES) -> None:
        """Measure the teachers' spreads and the means of the task's weights on the first training batches.

        Raises:
            TaskError: what the teachers return, or what the task says of it, does not fit.
        """
        sums: dict[str, Tensor] = {}
        masked: dict[str, list[float]] = {}
        kinds: dict[str, Kind] = {}
        source = self.task.train_batches(seed)
        for index in range(batches):
            batch = on_device(rng.draw(source, seed, index), device)
            outputs = self.outputs(batch.inputs)
            kinds = self._kinds(outputs)
            masks = distill_masks(self.task, outputs, kinds, batch)
            measured = [n for n, kind in kinds.items() if self.normalise or kind.startswith("regression")]
            if not measured and not masks:
                break
            for name, mask in masks.items():
                masked.setdefault(name, []).append(float(mask.double().mean()))
            for name in measured:
                found = self._sums(outputs[name], kinds[name], masks.get(name))
                sums[name] = sums[name] + found if name in sums else found
        self.mask_means = {name: math.fsum(means) / len(means) for name, means in masked.items()}
        for name, mean in self.mask_means.items():
            if mean == 0:
                raise TaskError(
                    f"expected {self.task.name}.distill_masks to weigh some of {name!r} above zero; got zeros on the "
                    f"first {batches} training batches; weigh what the output means something at"
                )
        self.scales = {name: self._spread(found, kinds[name]) for name, found in sums.items()}
        # where experts teach every output and no features are taught, the dense model need not run
        self._spared = bool(self.experts) and self.features is None and self._taught >= set(kinds)

    def _kinds(self, outputs: Mapping[str, Tensor]) -> dict[str, Kind]:
        return distill_kinds(self.task, outputs, partly=self.teacher is None)

    def _sums(self, output: Tensor, kind: Kind, mask: Tensor | None) -> Tensor:
        if kind == "classes":
            return class_sums(output, None if mask is None else mask.squeeze(1), self.temperature)
        if kind == "binary":
            return binary_sums(output, mask, self.temperature)
        return regression_sums(output, mask, by_channel=self.normalise)

    def _spread(self, sums: Tensor, kind: Kind) -> float | Tensor:
        if kind == "classes":
            return class_spread(sums, self.temperature)
        return binary_spread(sums, self.temperature) if kind == "binary" else regression_spread(sums)

    def outputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The teachers' outputs, without gradient: an expert's where it returns one, else the dense model's.

        Raises:
            TaskError: two experts return the same output, or one returns none of the dense model's.
        """
        with torch.no_grad():
            dense: dict[str, Tensor] = {}
            if self.teacher is not None and not self._spared:
                dense = dict(self.task.as_dict(self.teacher.eval()(**inputs)))
            taught: dict[str, Tensor] = {}
            by: dict[str, str] = {}
            for expert, model in self.experts.items():
                for name, value in _named(model.eval()(**inputs)).items():
                    if name in by:
                        raise TaskError(
                            f"expected each output to have one expert; got {name!r} from {by[name]!r} and {expert!r}; "
                            f"let {self.task.name}.build_expert return models with different outputs"
                        )
                    if dense and name not in dense:
                        raise TaskError(
                            f"expected the expert {expert!r} to return outputs of the dense model, {list(dense)}; got "
                            f"{name!r}; give it the dense model's name"
                        )
                    taught[name], by[name] = value, expert
        self._taught = frozenset(taught)
        return {**dense, **taught}

    def losses(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Batch | None = None
    ) -> dict[str, Tensor]:
        """Loss of each taught output, named `distill.<output>`, without its weight.

        Args:
            student: its outputs.
            teacher: what `outputs` returned.
            batch: what both were given; only the task's weights of elements need it.

        Raises:
            TaskError: student and teacher differ in names or shapes, or `distill_kinds` does not fit the outputs.
        """
        shapes = [{name: tuple(value.shape) for name, value in side.items()} for side in (student, teacher)]
        if self.teacher is None:  # experts may teach some of the outputs
            shapes[0] = {name: shape for name, shape in shapes[0].items() if name in teacher}
        if shapes[0] != shapes[1]:
            raise TaskError(
                f"expected student and {'dense model' if self.teacher is not None else 'experts'} to return the same "
                f"outputs; got {shapes[0]} and {shapes[1]}; keep the layers that shape an output with the task's "
                "`keep`, or switch finetune.distill off"
            )
        kinds = self._kinds(teacher)
        masks = {} if batch is None else distill_masks(self.task, teacher, kinds, batch)
        return {
            f"{PREFIX}{name}": distill_loss(
                student[name],
                value,
                kinds[name],
                temperature=self.temperature,
                scale=self.scales.get(name, 1.0),
                weight=masks[name] / self.mask_means.get(name, 1.0) if name in masks else None,
            )
            for name, value in teacher.items()
        }

    def weighted(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Batch, *, done: float
    ) -> dict[str, Tensor]:
        """All losses of distillation with their weights: outputs, and `distill.features.<point>`.

        Args:
            student: its outputs, of the forward pass before.
            teacher: what `outputs` returned after it.
            batch: what both were given.
            done: share of the run that is over.
        """
        losses = {}
        if self.weight > 0:
            losses = {name: self.weight * loss for name, loss in self.losses(student, teacher, batch).items()}
        if self.features is not None:
            weight = self.feature_weight * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
            for point, loss in self.features.losses().items():
                losses[f"{PREFIX}features.{point}"] = weight * loss
        return losses


def _named(outputs: Any) -> dict[str, Tensor]:
    """An expert's outputs by name; `LoadedTask.as_dict` would take its form for the student's."""
    return dict(outputs) if isinstance(outputs, Mapping) else {SINGLE_OUTPUT: outputs}


def distill_kinds(task: LoadedTask, outputs: Mapping[str, Tensor], *, partly: bool = False) -> dict[str, Kind]:
    """What each output means: the task's `distill_kinds`, "regression" where it says nothing.

    Args:
        task: may declare them.
        outputs: of the teachers.
        partly: whether the task may have more outputs than these.

    Raises:
        TaskError: `distill_kinds` names an unknown output or kind, or classes where there is no dim 1 of 2 or more.
    """
    declared: Any = getattr(task.user, "distill_kinds", {})
    known = get_args(Kind)
    if partly and isinstance(declared, dict):
        declared = {name: kind for name, kind in declared.items() if name in outputs}
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


def distill_masks(
    task: LoadedTask, outputs: Mapping[str, Tensor], kinds: Mapping[str, Kind], batch: Batch
) -> dict[str, Tensor]:
    """How much each element of an output counts: the task's `distill_masks(outputs, batch)`, for those it names.

    Args:
        task: may offer the method.
        outputs: of the teachers.
        kinds: of the outputs.
        batch: that they belong to, on their device.

    Raises:
        TaskError: an unknown output, a shape that does not fit it, or a weight that is negative or not finite.
    """
    if not task.offers("distill_masks"):
        return {}
    masks: dict[str, Tensor] = dict(task.user.distill_masks(task.as_user(outputs), batch))
    for name, mask in masks.items():
        shape = outputs[name].shape if name in outputs else torch.Size()
        wanted = (shape[0], 1, *shape[2:]) if kinds.get(name) == "classes" else tuple(shape)
        fits = mask.dim() == len(wanted) and all(m in (1, n) for m, n in zip(mask.shape, wanted, strict=False))
        if name not in outputs or not fits:
            raise TaskError(
                f"expected {task.name}.distill_masks to return weights for {list(outputs)}, of the output's size or 1 "
                f"in every dimension (classes: 1 in dim 1); got {name!r} of shape {tuple(mask.shape)} for "
                f"{tuple(shape)}; correct it"
            )
        if not bool(torch.isfinite(mask).all()) or bool((mask < 0).any()):
            raise TaskError(
                f"expected finite weights of at least 0 from {task.name}.distill_masks; got others for {name!r}; "
                "clamp them"
            )
    return masks
