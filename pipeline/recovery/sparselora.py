"""SparseLoRA: training a sparse network through low-rank updates that respect its masks (He et al., arXiv 2404.02424).

Every adapted weight W is frozen and computed anew in each forward pass as

    W_eff = (W + kappa * B A) * M,      kappa = alpha / rank,

with the mask on the sum, so that the gradients are dB = kappa (G * M) A^T and dA = kappa B^T (G * M) for G = dL/dW_eff.
A convolution's weight is taken as a matrix of `out` rows. A (rank, K) starts as Kaiming's uniform (sqrt 5) and B (out,
rank) as zero, so that training starts from the masked model. Merging writes W_eff into W: exactly the weights that the
last forward pass saw, and exactly zero outside the mask. LoRA without the mask on the sum merges into a dense weight.

Only A, B and, by option, norms and biases are trained. The rank of each layer is the largest that the recipe's rank and
the allowed share of trained parameters leave, spent so that every layer gets a like share of its own parameters.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fusepress.pipeline.errors import RecipeError
from fusepress.pipeline.graph.masks import MaskHolder, weights_unstructured


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraReport:
    """What is trained.

    Attributes:
        trained: parameters that are trained: A, B, norms and biases.
        total: parameters of the model itself, zeros included.
        nonzero: those of them that no mask removes.
        ranks: adapted weight -> its rank.
        frozen: weights that keep their values: rank 0, tied, or frozen by the user.
    """

    trained: int
    total: int
    nonzero: int
    ranks: dict[str, int]
    frozen: tuple[str, ...]

    @property
    def fraction(self) -> float:
        """Trained share of the parameters."""
        return self.trained / self.total

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the report."""
        return {
            "trained": self.trained,
            "total": self.total,
            "fraction": self.fraction,
            "fraction_of_nonzero": self.trained / self.nonzero,
            "ranks": self.ranks,
            "frozen": list(self.frozen),
        }


class MaskedLowRank(nn.Module):
    """The parametrisation of one weight.

    Args:
        weight: in the shape of the layer; taken as `weight.shape[0]` rows.
        mask: True = kept; None: nothing is masked.
        rank: of the update.
        alpha: kappa = alpha / rank.
        generator: of A's start values.
        mask_sum: the mask lies on the sum (SparseLoRA); False: on the weight alone (LoRA), the control that loses the
            pattern.
    """

    def __init__(
        self,
        weight: Tensor,
        mask: Tensor | None,
        *,
        rank: int,
        alpha: float,
        generator: torch.Generator,
        mask_sum: bool = True,
    ) -> None:
        super().__init__()
        start = torch.empty(rank, weight[0].numel(), dtype=weight.dtype)
        nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
        self.a = nn.Parameter(start.to(weight.device))
        self.b = nn.Parameter(torch.zeros(weight.shape[0], rank, dtype=weight.dtype, device=weight.device))
        self.mask: Tensor
        kept = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask.to(weight.device, torch.bool)
        self.register_buffer("mask", kept)
        self.kappa = alpha / rank
        self.mask_sum = mask_sum
        # Training identifies its checkpoints by the tensors that it starts from: those of another scale are not taken.
        self.register_buffer("settings", torch.tensor([self.kappa, float(mask_sum)], device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the layer computes with."""
        with torch.autocast(weight.device.type, enabled=False):  # merging computes in the weight's own type, too
            update = (self.kappa * (self.b @ self.a)).view_as(weight)
            if self.mask_sum:
                return torch.where(self.mask, weight + update, 0.0)
            return torch.where(self.mask, weight, 0.0) + update


class SparseLora:
    """A model with low-rank updates on its weights, until they are merged.

    Attributes:
        model: whose layers are parametrised.
        report: what is trained.
    """

    def __init__(
        self,
        model: nn.Module,
        report: LoraReport,
        flags: Mapping[nn.Parameter, bool],
        order: Mapping[nn.Module, Sequence[str]],
    ) -> None:
        self.model, self.report = model, report
        self._flags, self._order = dict(flags), dict(order)

    def merge(self) -> nn.Module:
        """Write the effective weights into the layers; names, order and `requires_grad` are as before.

        Returns:
            The model; weights are exactly zero outside their masks.
        """
        for name in self.report.ranks:
            module, local = _owner(self.model, name)
            parametrize.remove_parametrizations(module, local, leave_parametrized=True)
        for module, order in self._order.items():  # which is part of the architecture's hash
            for key in order:
                module._parameters[key] = module._parameters.pop(key)
        for parameter, flag in self._flags.items():
            parameter.requires_grad_(flag)
            parameter.grad = None
        return self.model


def attach(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    *,
    rank: int,
    alpha: float,
    max_trainable: float,
    seed: int,
    norms_and_biases: bool = True,
    mask_sum: bool = True,
) -> SparseLora:
    """Mask a model and give its convolutions, linear layers and attention projections low-rank updates.

    Args:
        model: changed in place; weights without a mask get an update without one.
        masks: parameter name -> bool mask (True = kept).
        rank: of an update at most.
        alpha: kappa = alpha / rank of the layer.
        max_trainable: largest share of the model's parameters that is trained.
        seed: of A's start values.
        norms_and_biases: train all parameters of one dimension or none as well.
        mask_sum: False makes plain LoRA, which loses the pattern when it is merged.

    Returns:
        What to merge after training.

    Raises:
        CheckpointError: the model lacks a masked parameter, or has it in another shape.
        RecipeError: `max_trainable` leaves no room for a single update.
    """
    MaskHolder(masks).apply(model)
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    total = sum(parameter.numel() for parameter in flags)
    vectors = [p for p, flag in flags.items() if flag and norms_and_biases and p.ndim <= 1]
    weights, skipped = weights_unstructured(model)
    tied = {skip.reason.rpartition(" ")[2] for skip in skipped if skip.reason.startswith("shares its weight")}
    able = {name: weight for name, weight in weights.items() if weight.requires_grad and name not in tied}
    room = math.floor(max_trainable * total) - sum(vector.numel() for vector in vectors)
    shapes = {name: (int(weight.shape[0]), int(weight[0].numel())) for name, weight in able.items()}
    ranks = {name: value for name, value in choose_ranks(shapes, rank, room).items() if value}
    if not ranks:
        raise RecipeError(
            f"expected room for low-rank updates within sparsify.max_trainable; got {max_trainable} of {total} "
            f"parameters, of which norms and biases take {sum(v.numel() for v in vectors)}, at {type(model).__name__}; "
            "raise max_trainable, or recover with masked"
        )
    for parameter in flags:
        parameter.requires_grad_(False)
    for vector in vectors:
        vector.requires_grad_(True)
    order: dict[nn.Module, list[str]] = {}
    for name, value in ranks.items():
        module, local = _owner(model, name)
        order.setdefault(module, list(module._parameters))
        update = MaskedLowRank(
            able[name].detach(),
            masks.get(name),
            rank=value,
            alpha=alpha,
            generator=_generator(seed, name),
            mask_sum=mask_sum,
        )
        parametrize.register_parametrization(module, local, update.train(module.training))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    report = LoraReport(
        trained=trained,
        total=total,
        nonzero=total - sum(int((~mask).sum()) for mask in masks.values()),
        ranks=ranks,
        frozen=tuple(name for name in weights if name not in ranks),
    )
    return SparseLora(model, report, flags, order)


def choose_ranks(shapes: Mapping[str, tuple[int, int]], most: int, room: int) -> dict[str, int]:
    """Ranks that together fit, rank by rank to the layer whose share of trained parameters would be least.

    Args:
        shapes: name -> rows and columns of the weight as a matrix; a rank costs their sum.
        most: of any layer (and never more than the smaller of its sides).
        room: parameters that A and B may have in all.

    Returns:
        Name -> rank, 0 where there was no room.
    """
    ranks = dict.fromkeys(shapes, 0)

    def share(name: str) -> float:
        rows, columns = shapes[name]
        return (ranks[name] + 1) * (rows + columns) / (rows * columns)

    order = {name: position for position, name in enumerate(shapes)}
    waiting = [(share(name), order[name], name) for name in shapes if most > 0 and min(shapes[name]) > 0]
    heapq.heapify(waiting)
    while waiting:
        _, _, name = heapq.heappop(waiting)
        cost = sum(shapes[name])
        if cost > room:
            continue  # a smaller layer may still fit
        room -= cost
        ranks[name] += 1
        if ranks[name] < min(most, *shapes[name]):
            heapq.heappush(waiting, (share(name), order[name], name))
    return ranks


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, local = name.rpartition(".")
    return model.get_submodule(path), local


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


__all__ = ["LoraReport", "MaskedLowRank", "SparseLora", "attach", "choose_ranks"]
