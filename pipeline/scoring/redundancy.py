"""How redundant the modalities of a trained model are, and the beta that follows from it.

Two measures of a modality's redundancy, from four losses on the same batches, which no training step here sees: dense,
masked (the modality's features are zero), reactivated (masked, and the rest of the model trained without it), blind
(all modalities masked).

    won back = (masked - reactivated) / (masked - dense)       of what masking costs, the part that training brings back
    covered  = 1 - (reactivated - dense) / (blind - dense)     of what the sensors tell together, the part that is left

Won back tells how much knowledge lay asleep and can be woken; covered tells how little depends on the modality, whether
the rest had to wake up or was awake already. 0 and 1 are the ends; below 0 the training harmed, above 1 the dense
model was not trained to its end. Unlike the
reactivation inside the score, whose small SGD steps are there for the derivation's sake, this one uses Adam, because
steps that hardly move the loss measure the steps and not the modalities.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
from torch import nn

from fusepress.pipeline.recipe import ScoreConfig
from fusepress.pipeline.scoring.gradients import (
    Passes,
    Progress,
    mean_loss,
    reactivate,
    scoring_batches,
    silent,
    totals_of,
)
from fusepress.pipeline.scoring.masking import Snapshot, branch_of_parameters, check_branches, masked, untouched
from fusepress.pipeline.task import Batch, LoadedTask

PROBE_STEPS = 64
PROBE_LR = 3e-4
UNNEEDED = 0.01  # relative rise of the loss below which masking a modality costs nothing that could be won back

# beta at measured redundancies, linear in between, constant outside; how it was fitted: docs/altermoma.md
BETA_RULE: tuple[tuple[float, float], ...] = ((0.0, 0.0), (1.0, 0.0))


def measure_redundancy(
    model: nn.Module,
    task: LoadedTask,
    config: ScoreConfig,
    *,
    seed: int,
    progress: Progress = silent,
    steps: int = PROBE_STEPS,
    lr: float = PROBE_LR,
) -> dict[str, Any]:
    """Mask each modality in turn, train the rest with Adam, and see how much of the loss comes back.

    The losses are those of the first `config.batches` training batches; the training uses the batches after them. (A
    small training split comes round again: then the batches are new only as far as its augmentation goes.)

    Args:
        model: the trained dense network; comes back bit-identical.
        task: its data, losses and branches.
        config: its `batches` count.
        seed: of the training batches.
        progress: called with the fraction done and a text.
        steps: of Adam, a batch each.
        lr: Adam's.

    Returns:
        `redundancy` (mean of `won_back` over the modalities, each cut to 0..1; None below two modalities), `covered`
        (likewise), `loss_dense`, `loss_blind`, and by modality `loss_masked`, `loss_reactivated`, `won_back` (not cut;
        1 where masking costs nothing) and `covered` (not cut), and how it was measured.

    Raises:
        TrainingError: a loss is NaN or infinite.
        TaskError: a branch cannot be masked, or the training split is empty.
    """
    check_branches(model, task.branches)
    names = sorted(task.branches) if len(task.branches) > 1 else []
    passes = Passes(total=len(names) * steps, progress=progress)
    log: dict[str, Any] = {"optimizer": "adam", "steps": steps, "lr": lr, "seed": seed, "modalities": {}}
    with untouched(model, seed=seed) as snapshot:
        data = scoring_batches(task, seed, config.batches)
        dense = mean_loss(model, task, data, "dense")
        with ExitStack() as stack:
            for name in names:
                stack.enter_context(masked(model, task.branches[name], name))
            blind = mean_loss(model, task, data, "all modalities masked")
        for name in names:
            found = _without(model, task, name, snapshot, data, config.batches, dense, passes, seed, steps, lr)
            left = (found["loss_reactivated"] - dense) / max(blind - dense, 1e-30)
            log["modalities"][name] = found | {"covered": 1.0 - left}
        _, samples = totals_of(data)
    log |= {"loss_dense": dense, "loss_blind": blind, "samples": samples, "passes": passes.done}
    return log | {"redundancy": _mean_of(log, "won_back"), "covered": _mean_of(log, "covered")}


def _mean_of(log: Mapping[str, Any], name: str) -> float | None:
    cut = [min(1.0, max(0.0, found[name])) for found in log["modalities"].values()]
    return math.fsum(cut) / len(cut) if cut else None


def _without(
    model: nn.Module,
    task: LoadedTask,
    modality: str,
    snapshot: Snapshot,
    data: list[Batch],
    batches: int,
    dense: float,
    passes: Passes,
    seed: int,
    steps: int,
    lr: float,
) -> dict[str, float]:
    branch_of = branch_of_parameters(model, task.branches)
    trainable = snapshot.trainable or set(snapshot.initial)
    others = [p for n, p in model.named_parameters() if branch_of[n] != modality and p in trainable]
    others = [p for p in others if p.is_floating_point()]
    where = f"{modality} masked, for its redundancy"
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.is_floating_point() and branch_of[name] != modality)
        with masked(model, task.branches[modality], modality):
            before = mean_loss(model, task, data, where)
            stream = itertools.islice(task.train_batches(seed, start=batches), steps)
            if others:
                reactivate(model, task, others, stream, passes, optimizer="adam", lr=lr, where=where)
            after = mean_loss(model, task, data, where)
    finally:
        snapshot.restore_values()
        for parameter in snapshot.initial:
            parameter.requires_grad_(parameter.is_floating_point())
    cost = before - dense
    won = (before - after) / cost if cost > UNNEEDED * abs(dense) else 1.0
    return {"loss_masked": before, "loss_reactivated": after, "won_back": won}


def resolve_beta(
    model: nn.Module, task: LoadedTask, config: ScoreConfig, *, seed: int, progress: Progress = silent
) -> tuple[float, dict[str, Any]]:
    """What `beta: auto` comes to: the rule's value at the measured redundancy.

    Args:
        model: the trained dense network; comes back bit-identical.
        task: its data, losses and branches.
        config: its `batches` count.
        seed: of the training batches.
        progress: called with the fraction done and a text.

    Returns:
        beta and a log: `beta`, `why`, and what `measure_redundancy` found (nothing is measured below two modalities
        or where no measurement could change the rule's answer).

    Raises:
        TrainingError: a loss is NaN or infinite.
        TaskError: a branch cannot be masked, or the training split is empty.
    """
    if len(task.branches) < 2:
        return 0.0, {"beta": 0.0, "why": "one modality: nothing can be redundant beside another"}
    if len({beta for _, beta in BETA_RULE}) == 1:
        beta = BETA_RULE[0][1]
        why = f"the rule fitted in docs/altermoma.md gives {beta:g} at every redundancy, so none was measured"
        if beta == 0:
            why += "; in that study the second term never paid, however redundant the modalities were"
        return beta, {"beta": beta, "why": why}
    found = measure_redundancy(model, task, config, seed=seed, progress=progress)
    beta, why = beta_of(found["redundancy"])
    return beta, {"beta": beta, "why": why, "measured": found}


def beta_of(redundancy: float) -> tuple[float, str]:
    """The fitted rule.

    Args:
        redundancy: as measured, 0 to 1.

    Returns:
        beta and the reason in words.
    """
    at, values = zip(*BETA_RULE, strict=True)
    beta = float(np.interp(redundancy, at, values))
    measured = f"{redundancy:.2f} of the loss that masking a modality costs was won back"
    return beta, f"{measured}; the rule fitted in docs/altermoma.md gives beta {beta:.2g} there"
