"""How much each of the task's losses counts: as the recipe says, by their uncertainty, or by their gradients.

* fixed: factors from the recipe, 1 where it says nothing.
* uncertainty (Kendall et al. 2018, eq. 7, times two): the sum of exp(-s_i) L_i + s_i, where s_i is a log variance that
  is learned. Its derivative is 1 - exp(-s_i) L_i, so at rest the weight exp(-s_i) is 1 / L_i.
* gradnorm (Chen et al. 2018, Algorithm 1): weights w_i under which the gradients of w_i L_i at the last shared layer
  have norms G_i = mean(G) r_i^alpha, where r_i is how far L_i is from its first value, relative to the others. They
  follow the derivative of sum |G_i - mean(G) r_i^alpha| with the target held constant, and are then scaled to sum to
  the number of losses. (Only for alpha 0 and 1 do the goals sum to what there is; else not all of them can be met.)

Distillation is not balanced: its losses have weights of their own, which an adaptive one would cancel. The learned
numbers step by Adam at the papers' rate, after the model's step and from the same losses and gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from fusepress.pipeline.distributed import gather_objects
from fusepress.pipeline.errors import TaskError
from fusepress.pipeline.recipe import FinetuneConfig
from fusepress.pipeline.recovery import rng
from fusepress.pipeline.recovery.distill import PREFIX
from fusepress.pipeline.recovery.distributed import sum_over_ranks
from fusepress.pipeline.recovery.features import find_fuser
from fusepress.pipeline.recovery.placement import on_device
from fusepress.pipeline.task import LoadedTask

RATE = 0.025  # of Adam, as in GradNorm's experiments
LEAST = 0.01  # a weight of zero would never see a gradient again
Reduce = Callable[[Tensor], Tensor]
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class Weighting(Protocol):
    """Weights of named losses, which may change from step to step."""

    @property
    def weights(self) -> dict[str, float]:
        """The weights that are learned, by loss; none where they are fixed."""

    def total(self, losses: Mapping[str, Tensor], share: float = 1.0, scale: float = 1.0) -> Tensor:
        """The weighted sum of one batch's scalar losses; called once a batch, before its backward pass.

        Args:
            losses: by name.
            share: of the batch in the optimiser step, over all ranks; the sum is not multiplied by it.
            scale: of losses in float16 backward passes; the sum is not multiplied by it either.
        """

    def update(self, over_ranks: Reduce = sum_over_ranks) -> None:
        """Learn from the batches since the last update; called once an optimiser step.

        Args:
            over_ranks: adds a tensor up over the processes that share the step.
        """

    def state(self) -> dict[str, Tensor]:
        """All that `load` needs to go on with the same bits."""

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`."""


class Fixed:
    """Constant factors."""

    def __init__(self, factors: Mapping[str, float], where: str) -> None:
        """Take the factors by loss; `where` names the task's losses in messages."""
        self._factors, self._where = dict(factors), where

    @property
    def weights(self) -> dict[str, float]:
        """None: they are in the recipe."""
        return {}

    def total(self, losses: Mapping[str, Tensor], share: float = 1.0, scale: float = 1.0) -> Tensor:
        """The sum of the losses, each times its factor.

        Raises:
            TaskError: there is a factor of a loss that does not exist.
        """
        unknown = [name for name in self._factors if name not in losses]
        if unknown:
            raise TaskError(
                f"expected finetune.loss_weights to name losses, {list(losses)}; got {unknown[0]!r}; correct it, or "
                f"return that loss from {self._where}"
            )
        return _sum({name: self._factors[name] * x if name in self._factors else x for name, x in losses.items()})

    def update(self, over_ranks: Reduce = sum_over_ranks) -> None:
        """Nothing to learn."""

    def state(self) -> dict[str, Tensor]:
        """Nothing to keep."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to take."""


class _Learned:
    """One learned number a loss, Adam for them, and the losses since the last update."""

    def __init__(self, start: float, where: str) -> None:
        self._start, self._where = start, where
        self._numbers: dict[str, nn.Parameter] = {}
        self._adam: torch.optim.Adam | None = None
        self._sums: dict[str, Tensor] = {}

    def _balanced(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The task's own losses; the first call says which there are, on every rank."""
        mine = {name: loss for name, loss in losses.items() if not name.startswith(PREFIX)}
        if not self._numbers:
            first, *others = gather_objects(list(mine))  # ranks add numbers up by their place
            for names in others:
                self._check_names(names, first)
            self._make(first)
        self._check_names(list(mine), list(self._numbers))
        for name, loss in mine.items():
            if float(loss.detach()) < 0:
                raise TaskError(
                    f"expected losses of at least 0, to balance them; got {name} = {float(loss.detach())} at "
                    f"{self._where}; add a constant, or set finetune.loss_weights: fixed"
                )
        return {name: mine[name] for name in self._numbers}

    def _check_names(self, names: list[str], wanted: list[str]) -> None:
        if set(names) != set(wanted):
            raise TaskError(
                f"expected the same losses in every batch, {wanted}, to balance them; got {names} at {self._where}; "
                "return a zero for one that a batch lacks, or set finetune.loss_weights: fixed"
            )

    def _make(self, names: list[str]) -> None:
        self._numbers = {name: nn.Parameter(torch.tensor(self._start, dtype=torch.float64)) for name in names}
        self._adam = torch.optim.Adam(list(self._numbers.values()), lr=RATE)

    def _record(self, losses: Mapping[str, Tensor], share: float) -> None:
        for name, loss in losses.items():
            value = share * loss.detach().double().reshape(())
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def _means(self, over_ranks: Reduce) -> Tensor:
        """Mean losses since the last update, in the order of the numbers; begins anew."""
        sums = torch.stack([self._sums[name] for name in self._numbers])
        self._sums = {}
        return over_ranks(sums).cpu()

    def _follow(self, slopes: Tensor) -> None:
        assert self._adam is not None
        for number, slope in zip(self._numbers.values(), slopes, strict=True):
            number.grad = slope.detach().clone()
        self._adam.step()

    def state(self) -> dict[str, Tensor]:
        """The numbers and Adam's moments."""
        found = {f"number/{name}": number.detach() for name, number in self._numbers.items()}
        for name, number in self._numbers.items():
            held = self._adam.state[number] if self._adam is not None else {}
            found |= {f"{key}/{name}": held[key] for key in _MOMENTS if key in held}
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`."""
        names = [key.removeprefix("number/") for key in state if key.startswith("number/")]
        if not names:
            return
        self._make(names)
        assert self._adam is not None
        for name, number in self._numbers.items():
            number.data.copy_(state[f"number/{name}"])
            held = {key: state[f"{key}/{name}"].clone() for key in _MOMENTS if f"{key}/{name}" in state}
            if held:
                self._adam.state[number] = held


class Uncertainty(_Learned):
    """Weights exp(-s) with learned log variances s, which start at 0."""

    def __init__(self, where: str) -> None:
        """Take how messages name the task's losses."""
        super().__init__(0.0, where)

    @property
    def weights(self) -> dict[str, float]:
        """exp(-s) by loss."""
        return {name: float(torch.exp(-number.detach())) for name, number in self._numbers.items()}

    def total(self, losses: Mapping[str, Tensor], share: float = 1.0, scale: float = 1.0) -> Tensor:
        """The weighted sum, without the s themselves, on which no parameter of the model depends."""
        mine = self._balanced(losses)
        self._record(mine, share)
        weights = self.weights
        return _sum({name: weights[name] * loss if name in mine else loss for name, loss in losses.items()})

    def update(self, over_ranks: Reduce = sum_over_ranks) -> None:
        """One step of every s along its derivative, 1 - exp(-s) L."""
        means = self._means(over_ranks)
        s = torch.stack([number.detach() for number in self._numbers.values()])
        self._follow(1 - torch.exp(-s) * means)


class GradNorm(_Learned):
    """Weights that balance the norms of the losses' gradients at shared parameters.

    Args:
        shared: the parameters at which norms are measured.
        alpha: how strongly losses that lag behind are favoured; 0 makes all norms equal.
        every: optimiser steps between measurements, each of which costs a backward pass a loss down to `shared`.
        where: how messages name the task's losses.
    """

    def __init__(self, shared: list[nn.Parameter], *, alpha: float, every: int, where: str) -> None:
        super().__init__(1.0, where)
        self._shared, self._alpha, self._every = shared, alpha, every
        self._step = 0
        self._first: dict[str, Tensor] = {}
        self._slopes: dict[str, Tensor] = {}

    @property
    def weights(self) -> dict[str, float]:
        """The weights w by loss."""
        return {name: float(number.detach()) for name, number in self._numbers.items()}

    def total(self, losses: Mapping[str, Tensor], share: float = 1.0, scale: float = 1.0) -> Tensor:
        """The weighted sum; where a measurement is due, each loss's gradient at the shared parameters is added up."""
        mine = self._balanced(losses)
        if self._step % self._every == 0:
            self._record(mine, share)
            for name, loss in mine.items():
                slope = share * self._slope(name, loss, scale)
                self._slopes[name] = self._slopes[name] + slope if name in self._slopes else slope
        weights = self.weights
        return _sum({name: weights[name] * loss if name in mine else loss for name, loss in losses.items()})

    def _slope(self, name: str, loss: Tensor, scale: float) -> Tensor:
        """Gradient at the shared parameters; of the scaled loss, because a small one would vanish in float16."""
        parts = (
            torch.autograd.grad(scale * loss, self._shared, retain_graph=True, allow_unused=True)
            if loss.requires_grad
            else ()
        )
        given = [part.double().flatten() for part in parts if part is not None]
        if not given:
            raise TaskError(
                f"expected every loss to depend on the shared parameters; got {name!r} at {self._where}, which does "
                "not; name parameters that all losses share in the task's `shared`"
            )
        wide = [
            p.new_zeros(p.numel(), dtype=torch.float64) if g is None else g.double().flatten()
            for p, g in zip(self._shared, parts, strict=True)
        ]
        return torch.cat(wide) / scale

    def update(self, over_ranks: Reduce = sum_over_ranks) -> None:
        """Where a measurement was due: one step of every weight, and their scaling to their number."""
        due = self._step % self._every == 0
        self._step += 1
        if not due:
            return
        norm = torch.stack([over_ranks(self._slopes[name]).norm().cpu() for name in self._numbers])
        loss = self._means(over_ranks)
        self._slopes = {}
        if not bool(torch.isfinite(norm).all()):  # a float16 overflow: the model did not step either
            return
        if not self._first:
            self._first = dict(zip(self._numbers, loss, strict=True))
        self._balance(norm, loss)

    def _balance(self, norm: Tensor, loss: Tensor) -> None:
        first = torch.stack(list(self._first.values()))
        if bool((first <= 0).any()):
            found = {name: float(value) for name, value in self._first.items()}
            raise TaskError(
                f"expected losses above 0 in the first batch; got {found} at {self._where}; set "
                "finetune.loss_weights: fixed or uncertainty"
            )
        weight = torch.stack([number.detach() for number in self._numbers.values()])
        progress = loss / first
        rate = progress / progress.mean().clamp_min(torch.finfo(progress.dtype).tiny)
        goal = (weight * norm).mean() * rate**self._alpha
        self._follow(norm * torch.sign(weight * norm - goal))
        with torch.no_grad():
            total = sum(float(number.clamp_(min=LEAST)) for number in self._numbers.values())
            for number in self._numbers.values():
                number.mul_(len(self._numbers) / total)

    def state(self) -> dict[str, Tensor]:
        """The weights, Adam's moments, the first losses and the number of steps."""
        first = {f"first/{name}": value for name, value in self._first.items()}
        return {**super().state(), **first, "steps": torch.tensor(self._step)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`."""
        super().load(state)
        self._step = int(state["steps"])
        self._first = {name: state[f"first/{name}"] for name in self._numbers if f"first/{name}" in state}


def make_weighting(student: nn.Module, task: LoadedTask, config: FinetuneConfig, seed: int) -> Weighting:
    """The weighting that the recipe asks for.

    Raises:
        TaskError: the parameters that GradNorm looks at cannot be found.
    """
    where = f"{task.name}.losses"
    if config.loss_weights == "uncertainty":
        return Uncertainty(where)
    if config.loss_weights == "gradnorm":
        shared = shared_parameters(student, task, seed)
        return GradNorm(shared, alpha=config.gradnorm_alpha, every=config.gradnorm_every, where=where)
    return Fixed({} if config.loss_weights == "fixed" else config.loss_weights, where)


def shared_parameters(student: nn.Module, task: LoadedTask, seed: int) -> list[nn.Parameter]:
    """The parameters that all losses share: the task's `shared`, else the last weight of the fuser.

    Args:
        student: the model that is trained.
        task: `shared` may name parameters, or modules, of which it means the weights; a weight with a low-rank update
            means the update's parameters.
        seed: of the batch that shows where the fuser is.

    Raises:
        TaskError: `shared` names nothing that is trained, or there is no fuser.
    """
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    declared = getattr(task.user, "shared", None)
    if declared is None:
        device = next(iter(student.parameters())).device
        batch = on_device(rng.draw(task.train_batches(seed), seed, 0), device)
        fuser = find_fuser(student, batch.inputs, task.branches)
        inside = [n for n, p in trained.items() if fuser is not None and n.startswith(f"{fuser}.") and p.dim() > 1]
        if not inside:
            raise TaskError(
                "expected a module with trained weights between the branches and the heads, for gradnorm; got "
                f"{fuser!r}; name the last layer that all losses share in {task.name}.shared"
            )
        return [p for name, p in trained.items() if _weight_of(name) == _weight_of(inside[-1])]
    shared = []
    for path in [declared] if isinstance(declared, str) else list(declared):
        found = [
            p
            for name, p in trained.items()
            if _weight_of(name) == path or (name.startswith(f"{path}.") and p.dim() > 1)
        ]
        if not found:
            raise TaskError(
                f"expected {task.name}.shared to name trained parameters, or modules that have some; got {path!r}; the "
                f"model's top modules are {[name for name, _ in student.named_children()]}"
            )
        shared += found
    return shared


def _weight_of(name: str) -> str:
    """The weight that a parameter is or, where a layer computes its weight from others (low-rank updates), makes."""
    module, marker, rest = name.partition("parametrizations.")
    return f"{module}{rest.partition('.')[0]}" if marker else name


def _sum(losses: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([loss.float().reshape(()) for loss in losses.values()]).sum()
