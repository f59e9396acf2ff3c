"""AlterMOMA: alternate modality masking for pruning multi-modal models (arXiv 2409.17728, NeurIPS 2024).

With theta the trained dense weights, D a fixed set of training batches and B reactivation batches:

* DeCI = |theta * g|, g the mean gradient on D, nothing masked (eq. 6): what a weight contributes.
* Per modality m: mask m, take g0 on D, train the other branches and the fusion for B batches, take gB on the same D,
  put theta back. ReRI = |theta * (g0 - gB)| (eq. 10): what wakes up when m falls silent was redundant beside m.
  (Here g0 comes after gB: then either theta or gB is held beside the gradient that accumulates, not both.)
* S = alpha*N(DeCI) - beta*N(ReRI), N dividing by the sum over the branch (eq. 11 to 13). A branch takes the mean of
  N(ReRI) over the stages in which another modality is masked, the fusion over all stages. With two modalities that is
  the paper's formula: one stage for a branch, halves for the fusion. In every branch the scores add up to alpha - beta.

Three options go beyond the paper:

* `normalise`: `parameter` divides by the sum over each key (a weight tensor, or a coupled group) instead. `cost` is
  `branch` times the share of the model's prunable multiply-accumulates (summed over groups: width times what one
  channel costs in the dense model) that the branch holds: then every branch has the same mean score per operation,
  and no branch is favoured for being small.
* `reactivation`: controls that tell what the second term measures. `unmasked` trains the same parameters on the same
  batches with nothing masked. `permuted` feeds the fusion the modality's features of another sample. `noise` masks and
  trains, but then replaces the way that each parameter tensor went by a random direction of the same length.
* `beta: auto` (`redundancy.py`).

Where the paper is silent, and what holds here: both gradients use the same data (with other data ReRI is mostly noise
at small steps); all passes are in evaluation mode (running statistics frozen; in training mode the literal channel
score is identically zero before a BatchNorm); reactivation is plain SGD as in eq. 16, or Adam with a fresh state.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fusepress.pipeline.errors import TaskError, UsageError
from fusepress.pipeline.graph.cost import CostModel
from fusepress.pipeline.graph.plan import Group, GroupGraph
from fusepress.pipeline.recipe import ScoreConfig
from fusepress.pipeline.scoring.channels import ChannelScorer, Product, Scorer, WeightScorer
from fusepress.pipeline.scoring.gradients import (
    Passes,
    Progress,
    mean_gradients,
    reactivate,
    scoring_batches,
    silent,
    totals_of,
)
from fusepress.pipeline.scoring.masking import (
    Snapshot,
    branch_of_parameters,
    check_branches,
    check_masked_gradients,
    masked,
    masking_equals_zeroing,
    shuffled_output,
    untouched,
    zeros_like_output,
)
from fusepress.pipeline.scoring.redundancy import resolve_beta
from fusepress.pipeline.scoring.result import ScoreResult
from fusepress.pipeline.scoring.selection import kth_smallest
from fusepress.pipeline.task import Batch, LoadedTask

KEPT_AT = (0.75, 0.5, 0.25)  # kept fractions at which the log shows each branch's share
BARELY_MOVED = 0.01  # relative change of the masked loss below which the reactivation did too little


class Grouped(Protocol):
    """Whatever has coupled groups (a GroupGraph)."""

    @property
    def groups(self) -> Sequence[Group]:
        """The coupled groups."""


def score_altermoma(
    model: nn.Module,
    task: LoadedTask,
    graph: Grouped,
    config: ScoreConfig,
    *,
    seed: int,
    progress: Progress = silent,
    cost: Mapping[str, float] | None = None,
) -> ScoreResult:
    """AlterMOMA scores of the channels of every coupled group.

    Costs n + M*(2n + B) forward-backward passes for n scoring batches, B reactivation batches and M modalities, and
    two copies of the parameters that are not masked beside the model: theta, then gB, and the gradient that accumulates
    (Adam keeps two more; without the redundancy term, with beta 0, the gradient is all).

    Args:
        model: the trained dense network; comes back bit-identical.
        task: its data, losses and branches.
        graph: its coupled groups.
        config: alpha, beta, batches, reactivation, aggregation.
        seed: of the training batches.
        progress: called with the fraction done and a text.
        cost: group id -> multiply-accumulates of one channel, for `normalise: cost`; counted if not given.

    Raises:
        TrainingError: a loss or gradient is NaN or infinite.
        TaskError: a branch cannot be masked, or the training split is empty.
        UsageError: costs are needed and can neither be found in `cost` nor be counted.
    """
    config, found = _with_beta(model, task, config, seed, progress)
    scorer = ChannelScorer(model, graph.groups, config.aggregate)
    mass = None
    if config.normalise == "cost":
        mass = cost_shares(graph.groups, channel_macs(model, task, graph) if cost is None else cost)
    scores, log = alternate(model, task, scorer, config, seed=seed, mass=mass, progress=progress)
    log |= found | {"aggregate": config.aggregate, "branches": branch_statistics(scores, scorer.branch_of)}
    channel = {key: value.cpu().numpy().astype(np.float32) for key, value in scores.items()}
    return ScoreResult(channel=channel, log=log)


def weight_scores(
    model: nn.Module,
    task: LoadedTask,
    config: ScoreConfig,
    *,
    seed: int,
    order: Sequence[str] | None = None,
    progress: Progress = silent,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """AlterMOMA scores of every single weight, as in the paper (unstructured); knows no `normalise: cost`.

    Costs what `score_altermoma` does, and beside its copies of the parameters holds the scores and, of what is not
    masked in several stages (the fusion, of two modalities), the sum so far: with a part f of the parameters in the
    fusion and a part m in the modality, 1 + 2 (1 - m) + f copies in all.

    Args:
        model: the trained dense network; comes back bit-identical.
        task: its data, losses and branches.
        config: alpha, beta, batches, reactivation.
        seed: of the training batches.
        order: in which the modalities are masked; does not change the result.
        progress: called with the fraction done and a text.

    Returns:
        Parameter name -> scores of its shape, and the log.

    Raises:
        TrainingError: a loss or gradient is NaN or infinite.
        TaskError: a branch cannot be masked, or the training split is empty.
        UsageError: `normalise: cost`.
    """
    config, measured = _with_beta(model, task, config, seed, progress)
    branch_of = branch_of_parameters(model, task.branches)
    floating = {name for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    scorer = WeightScorer({name: branch for name, branch in branch_of.items() if name in floating})
    scores, log = alternate(model, task, scorer, config, seed=seed, order=order, progress=progress)
    return scores, log | measured | {"branches": branch_statistics(scores, scorer.branch_of)}


def _with_beta(
    model: nn.Module, task: LoadedTask, config: ScoreConfig, seed: int, progress: Progress
) -> tuple[ScoreConfig, dict[str, Any]]:
    """The config with beta as a number, and what `beta: auto` adds to the log."""
    if config.beta != "auto":
        return config, {}
    beta, log = resolve_beta(model, task, config, seed=seed, progress=progress)
    return config.model_copy(update={"beta": beta}), {"auto_beta": log}


def channel_macs(model: nn.Module, task: LoadedTask, graph: Grouped) -> dict[str, float]:
    """What one channel of each group costs in the dense model: multiply-accumulates that go when it goes.

    Raises:
        UsageError: the groups came without the graph that costs are counted on.
    """
    if not isinstance(graph, GroupGraph):
        raise UsageError(
            f"expected a GroupGraph to count costs on for score.normalise: cost; got {type(graph).__name__}; pass "
            "cost={group id: MACs of a channel}"
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    batch = next(task.train_batches(0))
    table = CostModel(graph, model, {name: value[:1].to(device) for name, value in batch.inputs.items()})
    return {g.id: table.step_cost("macs", g.id, {}, g.multiple) / g.multiple for g in graph.groups}


def cost_shares(groups: Sequence[Group], cost: Mapping[str, float]) -> dict[str, float]:
    """Branch -> its share of the summed costs of all groups (width times the cost of a channel).

    Raises:
        UsageError: a group has no cost, or nothing costs anything.
    """
    missing = [group.id for group in groups if group.id not in cost]
    totals: dict[str, float] = {}
    for group in groups:
        totals[group.branch] = totals.get(group.branch, 0.0) + group.width * cost.get(group.id, 0.0)
    whole = math.fsum(totals.values())
    if missing or whole <= 0:
        raise UsageError(
            f"expected the cost of a channel for every group, not all zero; got {len(groups) - len(missing)} of "
            f"{len(groups)} at cost; give the multiply-accumulates of one channel"
        )
    return {branch: total / whole for branch, total in totals.items()}


def weight_masks(scores: Mapping[str, Tensor], ratio: float) -> dict[str, Tensor]:
    """Masks that remove exactly round(ratio * N) of all N weights: those with the lowest scores, ties by position.

    Args:
        scores: parameter name -> scores.
        ratio: removed fraction.

    Returns:
        Parameter name -> bool tensor, True = kept.

    Raises:
        UsageError: the ratio is not between 0 and 1.
    """
    if not 0 <= ratio <= 1:
        raise UsageError(f"expected a removed fraction from 0 to 1; got {ratio}; give for example 0.8")
    flat = torch.cat([value.flatten() for value in scores.values()])
    keep = torch.ones_like(flat, dtype=torch.bool)
    keep[torch.argsort(flat, stable=True)[: round(ratio * flat.numel())]] = False
    parts = keep.split([value.numel() for value in scores.values()])
    return {name: part.reshape(scores[name].shape) for (name, part) in zip(scores, parts, strict=True)}


def alternate(
    model: nn.Module,
    task: LoadedTask,
    scorer: Scorer,
    config: ScoreConfig,
    *,
    seed: int,
    order: Sequence[str] | None = None,
    mass: Mapping[str, float] | None = None,
    progress: Progress = silent,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The algorithm itself, whatever a key of the scorer is (a weight tensor or a coupled group).

    Args:
        model: the trained dense network; comes back bit-identical.
        task: its data, losses and branches.
        scorer: what a score belongs to.
        config: with beta as a number.
        seed: of the training batches.
        order: in which the modalities are masked.
        mass: branch -> what its normalised scores add up to, for `normalise: cost`.
        progress: called with the fraction done and a text.

    Returns:
        Key -> S, and the log.

    Raises:
        TrainingError: a loss or gradient is NaN or infinite.
        TaskError: a branch cannot be masked, or the training split is empty.
        UsageError: `normalise: cost` without masses.
    """
    check_branches(model, task.branches)
    if config.normalise == "cost" and mass is None:
        raise UsageError(
            "expected score.normalise: branch or parameter where single weights are scored; got 'cost'; costs are "
            "those of channels"
        )
    pools = {key: key for key in scorer.branch_of} if config.normalise == "parameter" else scorer.branch_of
    stages = _stage_order(task, config, order)
    passes = Passes(
        total=config.batches + len(stages) * (2 * config.batches + config.reactivation_batches), progress=progress
    )
    with untouched(model, seed=seed, keep_values=False) as snapshot:
        run = Alternation(
            model=model, task=task, scorer=scorer, config=config, seed=seed, passes=passes, snapshot=snapshot
        )
        contribution, loss = run.contribution()
        _, samples = totals_of(run.data)
        scores = {key: value.mul_(config.alpha) for key, value in normalise(contribution, pools, mass).items()}
        redundancy = _Redundancy(
            scores=scores,
            beta=fixed_beta(config),
            stages={key: _stages_seen(branch, task.branches) for key, branch in scorer.branch_of.items()},
        )
        logs = []
        for modality in stages:
            found, stage_log = run.redundancy(modality)
            redundancy.add(normalise(found, pools, mass))
            logs.append(stage_log)
            del found  # the next stage needs the room
    return scores, {
        "method": "altermoma",
        "alpha": config.alpha,
        "beta": config.beta,
        "normalise": config.normalise,
        "reactivation": config.reactivation,
        "seed": seed,
        "loss": loss,
        "samples": samples,
        "passes": passes.done,
        "stages": logs,
        "notes": _notes(task, config, logs),
    }


def fixed_beta(config: ScoreConfig) -> float:
    """The recipe's beta as a number.

    Raises:
        UsageError: it is still auto.
    """
    if isinstance(config.beta, str):
        raise UsageError(f"expected score.beta as a number; got {config.beta!r} at the formula; resolve it first")
    return config.beta


def _stage_order(task: LoadedTask, config: ScoreConfig, order: Sequence[str] | None) -> list[str]:
    """Which modalities are masked one after the other; none where ReRI would not count.

    The order is the alphabet's unless given, so that not even rounding depends on how the task lists its branches.
    """
    wanted = sorted(task.branches) if order is None else list(order)
    if sorted(wanted) != sorted(task.branches):
        raise TaskError(f"expected an order of the modalities {sorted(task.branches)}; got {wanted}; name each once")
    return wanted if len(wanted) > 1 and fixed_beta(config) > 0 else []


@dataclass(slots=True, kw_only=True)
class _Redundancy:
    """Takes beta * N(ReRI) off the scores: the mean over a key's stages, as soon as the last of them is over.

    Attributes:
        scores: alpha * N(DeCI); changed in place.
        beta: the weight.
        stages: key -> in how many stages it is not masked.
    """

    scores: Mapping[str, Tensor]
    beta: float
    stages: Mapping[str, int]
    _seen: dict[str, int] = field(default_factory=dict, init=False)
    _sums: dict[str, Tensor] = field(default_factory=dict, init=False)

    def add(self, values: dict[str, Tensor]) -> None:
        """One stage's N(ReRI); the tensors are used up."""
        for key in list(values):
            share = values.pop(key).div_(self.stages[key])
            total = self._sums.pop(key).add_(share) if key in self._sums else share
            self._seen[key] = self._seen.get(key, 0) + 1
            if self._seen[key] == self.stages[key]:
                self.scores[key].sub_(total, alpha=self.beta)
            else:
                self._sums[key] = total


def _stages_seen(branch: str, branches: Mapping[str, Any]) -> int:
    """In how many stages a branch is not the masked one."""
    return len(branches) - 1 if branch in branches else len(branches)


def normalise(
    values: Mapping[str, Tensor], branch_of: Mapping[str, str], mass: Mapping[str, float] | None = None
) -> dict[str, Tensor]:
    """N(v): divide by the sum over the branch; a branch without any mass stays zero instead of 0/0.

    Args:
        values: key -> non-negative numbers; divided in place.
        branch_of: key -> branch (or whatever shares a sum).
        mass: branch -> what its values add up to; default 1.
    """
    sums: dict[str, list[float]] = {}
    for key, value in values.items():
        sums.setdefault(branch_of[key], []).append(float(value.sum(dtype=torch.float64)))
    wanted = dict.fromkeys(sums, 1.0) if mass is None else mass
    totals = {branch: math.fsum(parts) / (wanted[branch] or 1.0) for branch, parts in sums.items()}
    return {key: value.div_(totals[branch_of[key]] or 1.0) for key, value in values.items()}


@dataclass(slots=True, kw_only=True)
class Alternation:
    """The passes that AlterMOMA is made of, on one model inside `untouched`; scores are raw, not normalised.

    Attributes:
        model: the network, in evaluation mode with gradients on.
        task: its data, losses and branches.
        scorer: what a score belongs to.
        config: batches and reactivation.
        seed: of the training batches.
        passes: counts and reports.
        snapshot: sets theta_init back.
        data: the batches D, the same for every gradient; of several processes each has its share.
    """

    model: nn.Module
    task: LoadedTask
    scorer: Scorer
    config: ScoreConfig
    seed: int
    passes: Passes
    snapshot: Snapshot
    data: list[Batch] = field(init=False)

    def __post_init__(self) -> None:
        self.data = scoring_batches(self.task, self.seed, self.config.batches)

    def contribution(self) -> tuple[dict[str, Tensor], float]:
        """DeCI of every key, and the unmasked loss."""
        loss = mean_gradients(self.model, self.task, self.data, self.passes, "contribution, nothing masked")
        return self.scorer.scores(self._product({}), self.scorer.branch_of), loss

    def redundancy(self, modality: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """ReRI of every key outside the masked modality, and the log of the stage; the model is put back."""
        branch_of = branch_of_parameters(self.model, self.task.branches)
        where = f"{modality} {'masked' if self.config.reactivation == 'noise' else self.config.reactivation}"
        equal = masking_equals_zeroing(self.model, self._inputs(), self.task.branches, modality)
        others = [p for name, p in self.model.named_parameters() if branch_of[name] != modality]
        self.model.zero_grad(set_to_none=True)  # what came before needs its gradients no more
        try:
            self._freeze(branch_of, modality)
            with self._silenced(modality):
                with self.snapshot.changing(others):
                    steps = self._reactivate(others, where)
                    if self.config.reactivation == "noise":
                        self._scatter(others, modality)
                    moved = self._moved(others)
                    after = mean_gradients(self.model, self.task, self.data, self.passes, f"{where}, reactivated")
                last = {p: p.grad for p in others if p.grad is not None}
                self.model.zero_grad(set_to_none=True)  # they are `last` now
                before = self._first_gradients(branch_of, modality, where)
            keys = [key for key, branch in self.scorer.branch_of.items() if branch != modality]
            values = self.scorer.scores(self._product(last), keys)
        finally:
            self._unfreeze()
        log = {
            "masked": modality,
            "loss_before": before,
            "loss_after": after,
            "steps": steps,
            "moved": moved,
            "zeroed_parameters_equal": equal,
        }
        return values, log

    def _first_gradients(self, branch_of: Mapping[str, str], modality: str, where: str) -> float:
        """Leave g0 in `grad`, and check that a masked branch has none, for which it may take one. Returns the loss."""
        cut = self.config.reactivation in ("masked", "noise")
        if cut:
            self._unfreeze()
        loss = mean_gradients(self.model, self.task, self.data, self.passes, where)
        if cut:
            check_masked_gradients(self.model, branch_of, modality)
        return loss

    def _silenced(self, modality: str) -> AbstractContextManager[None]:
        """What the stage does to the modality: nothing in the unmasked control."""
        if self.config.reactivation == "unmasked":
            return nullcontext()
        change = shuffled_output if self.config.reactivation == "permuted" else zeros_like_output
        return masked(self.model, self.task.branches[modality], modality, change)

    @torch.no_grad()
    def _scatter(self, parameters: Iterable[nn.Parameter], modality: str) -> None:
        """Replace each tensor's way from theta by a random direction of the same length.

        The directions depend on the seed and the modality, not on the order of the stages.
        """
        words = [self.seed, *modality.encode()]
        generator = torch.Generator().manual_seed(
            int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]) >> 1
        )
        for parameter in parameters:
            theta = self.snapshot.initial[parameter]
            length = (parameter - theta).norm()
            drawn = torch.randn(theta.shape, generator=generator, dtype=torch.float64).to(theta)
            parameter.copy_(theta + drawn.mul_(length / drawn.norm().clamp_min(1e-30)))

    @torch.no_grad()
    def _moved(self, parameters: Iterable[nn.Parameter]) -> float:
        """Length of the way from theta, relative to the length of theta."""
        pairs = [(p, self.snapshot.initial[p]) for p in parameters]
        way = math.fsum(float((p - theta).double().square().sum()) for p, theta in pairs)
        return math.sqrt(way / (math.fsum(float(theta.double().square().sum()) for _, theta in pairs) or 1.0))

    def _inputs(self) -> dict[str, Tensor]:
        device = next(self.model.parameters()).device
        batch = self.data[0] if self.data else next(self.task.train_batches(self.seed))
        return {name: value.to(device) for name, value in batch.inputs.items()}

    def _freeze(self, branch_of: Mapping[str, str], modality: str) -> None:
        """Take the masked branch out of the graph, which spares its activations; its updates are zero anyway."""
        for name, parameter in self.model.named_parameters():
            if branch_of[name] == modality:
                parameter.requires_grad_(False)

    def _reactivate(self, others: Iterable[nn.Parameter], where: str) -> int:
        """B steps on the batches after D. What the user froze stays frozen, unless everything is."""
        trainable = self.snapshot.trainable or set(self.model.parameters())
        chosen = [p for p in others if p in trainable and p.is_floating_point()]
        if not chosen:
            return 0
        stream = self.task.train_batches(self.seed, start=self.config.batches)
        return reactivate(
            self.model,
            self.task,
            chosen,
            itertools.islice(stream, self.config.reactivation_batches),
            self.passes,
            optimizer=self.config.reactivation_optimizer,
            lr=self.config.reactivation_lr,
            where=where,
        )

    def _unfreeze(self) -> None:
        for parameter in self.model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())

    def _product(self, last: dict[nn.Parameter, Tensor]) -> Product:
        """Theta * (g - gB), g in `grad`, or theta * g without gB (the sign does not matter to |.|).

        Where the scorer asks once, both gradients are dropped with their product.
        """
        parameters = dict(self.model.named_parameters(remove_duplicate=False))

        def product(name: str) -> Tensor:
            parameter = parameters[name]
            theta, gradient, g_last = parameter.detach(), parameter.grad, last.get(parameter)
            if self.scorer.asks_once:
                parameter.grad = None
                last.pop(parameter, None)
            if gradient is not None:
                return theta * gradient if g_last is None else (gradient - g_last).mul_(theta)
            return torch.zeros_like(theta) if g_last is None else theta * g_last

        return product


def _notes(task: LoadedTask, config: ScoreConfig, stages: Sequence[Mapping[str, Any]]) -> list[str]:
    notes = []
    if len(task.branches) < 2:
        notes.append(
            f"one modality ({', '.join(task.branches) or 'none'}): nothing can be redundant beside another, so the "
            "score is the contribution (DeCI) alone"
        )
    elif config.beta == 0:
        notes.append("beta is 0: the redundancy term was not computed")
    for stage in stages if config.reactivation != "noise" else ():  # a random step is not meant to lower the loss
        before, after, masked_name = stage["loss_before"], stage["loss_after"], stage["masked"]
        if after > before:
            notes.append(
                f"with {masked_name} masked the loss rose from {before:.4g} to {after:.4g} in the reactivation: "
                "lower score.reactivation_lr"
            )
        elif before - after < BARELY_MOVED * abs(before):
            notes.append(
                f"with {masked_name} masked the loss moved only from {before:.4g} to {after:.4g} in the reactivation: "
                "raise score.reactivation_lr or score.reactivation_batches, or redundancy is mostly noise"
            )
    return notes


def branch_statistics(scores: Mapping[str, Tensor], branch_of: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Per branch: how many scores, their sum and spread, and its kept share under one global threshold.

    Normalising by branch makes scores scale like one over the branch's size, so that small branches keep more; the
    shares show how much.

    Returns:
        Branch -> {count, sum, mean, std, min, max, kept_at: {"0.5": share kept when half of everything is kept}}.
    """
    flat = {key: value.detach().flatten() for key, value in scores.items()}
    if not flat:
        return {}
    kept = _kept_of_keys(flat)
    result: dict[str, dict[str, Any]] = {}
    for branch in dict.fromkeys(branch_of.values()):
        keys = [key for key in flat if branch_of[key] == branch]
        count = sum(flat[key].numel() for key in keys)
        total = math.fsum(float(flat[key].sum(dtype=torch.float64)) for key in keys)
        spread = math.fsum(float((flat[key].double() - total / count).square_().sum()) for key in keys)
        result[branch] = {
            "count": count,
            "sum": total,
            "mean": total / count,
            "std": math.sqrt(spread / count),
            "min": min(float(flat[key].min()) for key in keys),
            "max": max(float(flat[key].max()) for key in keys),
            "kept_at": {f"{f:g}": sum(kept[f][key] for key in keys) / count for f in KEPT_AT},
        }
    return result


def _kept_of_keys(flat: Mapping[str, Tensor]) -> dict[float, dict[str, int]]:
    """For each of KEPT_AT, how many of each key are among the highest of all; ties go to the earlier key."""
    parts = list(flat.values())
    total = sum(part.numel() for part in parts)
    found: dict[float, dict[str, int]] = {}
    for fraction in KEPT_AT:
        count = round(fraction * total)
        limit = kth_smallest(parts, total - count) if count else math.inf
        above = {key: int((value > limit).sum()) for key, value in flat.items()}
        spare = count - sum(above.values())
        for key, value in flat.items():
            ties = min(spare, int((value == limit).sum()))
            above[key] += ties
            spare -= ties
        found[fraction] = above
    return found
