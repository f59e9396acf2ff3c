"""Other people's pruners as they ship: they choose, they cut; training and evaluation are the same as for all."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fusepress.pipeline.graph.cost import count_macs

TRIES = 10


def prune_by_torch_pruning(
    dense: nn.Module,
    inputs: Mapping[str, Tensor],
    budget: float,
    options: Mapping[str, Any],
    *,
    ignored: Sequence[str],
    round_to: int,
    max_ratio: float,
) -> tuple[nn.Module, float]:
    """torch-pruning's own pruner with its own surgery, at the largest network within the budget.

    Its knob is a ratio of channels, so the ratio is found by bisection on the MACs that are left. It rounds widths to
    `round_to`, hence steps, and a gap below the budget that no ratio closes.

    Args:
        dense: the trained network; it is not changed.
        inputs: example inputs by name.
        budget: kept fraction of the dense MACs.
        options: pruner, importance, norm and whether one threshold holds for all layers.
        ignored: module paths that it must leave alone.
        round_to: channel multiple.
        max_ratio: most channels that a layer may lose.

    Returns:
        The pruned network and the channel ratio that made it.

    Raises:
        RuntimeError: not even the largest ratio reaches the budget.
    """
    most = budget * count_macs(dense, inputs)
    low, high = 0.0, 1.0
    best: tuple[nn.Module, float] | None = None
    for _ in range(TRIES):
        ratio = (low + high) / 2
        model = _cut(dense, inputs, ratio, options, ignored, round_to, max_ratio)
        if count_macs(model, inputs) <= most:
            best, high = (model, ratio), ratio
        else:
            low = ratio
    if best is None:
        raise RuntimeError(f"expected torch-pruning to reach {budget:g} of the MACs; got more at every ratio up to 1")
    return best[0].eval(), best[1]


def _cut(
    dense: nn.Module,
    inputs: Mapping[str, Tensor],
    ratio: float,
    options: Mapping[str, Any],
    ignored: Sequence[str],
    round_to: int,
    max_ratio: float,
) -> nn.Module:
    import torch_pruning as tp

    model = copy.deepcopy(dense)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    importance = getattr(tp.importance, options["importance"])(p=options["p"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = getattr(tp.pruner, options["pruner"])(
            model,
            dict(inputs),
            importance=importance,
            global_pruning=options["global"],
            pruning_ratio=ratio,
            max_pruning_ratio=max_ratio,
            ignored_layers=[model.get_submodule(path) for path in ignored],
            round_to=round_to,
        )
        pruner.step()
    model.zero_grad(set_to_none=True)
    return model


FASTNAS_STEP = 0.02  # how much lower the next constraint is where its own count of operations allows more than ours


def prune_by_fastnas(
    dense: nn.Module,
    inputs: Mapping[str, Tensor],
    budget: float,
    options: Mapping[str, Any],
    *,
    score: Callable[[nn.Module], float],
    divisor: int,
) -> tuple[nn.Module, float]:
    """nvidia-modelopt's FastNAS with its own search and surgery (it needs torchprofile 0.0.4 to count operations).

    It measures `score` with every width of every layer alone, and keeps the widths whose loss is below one threshold
    for all layers, found by bisection: a coarse knob, so that its network may lie well below the budget.

    Args:
        dense: the trained network; it is not changed.
        inputs: example inputs by name.
        budget: kept fraction of the dense MACs.
        options: `ratios`, the widths tried as fractions of the dense one.
        score: metric of a candidate, larger = better.
        divisor: channel multiple.

    Returns:
        The pruned network, and the share of the operations that it was asked for.

    Raises:
        RuntimeError: no share gives a network within the budget.
    """
    import modelopt.torch.prune as mtp

    most = budget * count_macs(dense, inputs)
    rules = {
        "nn.Conv2d": {"*": {"channels_ratio": tuple(options["ratios"]), "channel_divisor": divisor}},
        "nn.BatchNorm2d": {"*": {"features_ratio": tuple(options["ratios"]), "feature_divisor": divisor}},
    }
    first = tuple(value[:1] for value in inputs.values())
    memory: dict[str, float] = {}

    share = budget
    while share > 0:
        quiet = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            warnings.simplefilter("ignore")
            model, _ = mtp.prune(
                model=copy.deepcopy(dense),
                mode=[("fastnas", rules)],
                constraints={"flops": f"{100 * share:g}%"},
                dummy_input=first,
                config={"score_func": _remembered(score, memory), "verbose": False},
            )
        if count_macs(model, inputs) <= most:
            return model.eval(), share
        share = round(share - FASTNAS_STEP, 4)
    raise RuntimeError(f"expected FastNAS to reach {budget:g} of the MACs; got more at every share down to 0")


def _remembered(score: Callable[[nn.Module], float], memory: dict[str, float]) -> Callable[[nn.Module], float]:
    """The same candidate is scored once, also in the searches after the first."""

    def remembered(model: nn.Module) -> float:
        from modelopt.torch.nas.utils import get_subnet_config

        key = repr(sorted(get_subnet_config(model, True).items()))
        if key not in memory:
            memory[key] = score(model)
        return memory[key]

    return remembered
