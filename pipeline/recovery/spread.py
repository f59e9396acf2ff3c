"""How far apart a teacher's answers lie: what differences between student and teacher are measured in.

A loss divided by its spread is 1 for the best student that ignores its input, whatever the head's unit or the rarity of
its classes, so heads start comparable:

* regression: the standard deviation, of the whole output or of every channel of dim 1.
* classes, binary: T^2 times the mean divergence of the teacher's softened distributions from their mean, which is the
  entropy of the mean less the mean entropy; the mean of binary is that of each channel of dim 1.

Each is found from sums that add up over batches; where the task weighs the elements of an output, so do the sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALL = 1e-6  # a variance below this part of the mean square is rounding


def regression_sums(value: Tensor, weight: Tensor | None, *, by_channel: bool) -> Tensor:
    """Weight, weighted sum and weighted sum of squares, `[3]` or `[3, C]` (C is dim 1, 1 where there is none)."""
    wide = value.double()
    share = torch.ones_like(wide) if weight is None else weight.double().expand_as(wide)
    parts = [share, share * wide, share * wide.square()]
    return torch.stack([part.sum() for part in parts] if not by_channel else [_over_channels(part) for part in parts])


def regression_spread(sums: Tensor) -> float | Tensor:
    """Standard deviation from `regression_sums`; of what is constant its size, and 1 for what is zero throughout.

    Returns:
        A float, or `[C]` in float32.
    """
    if sums.dim() == 1:
        return _deviation(*sums.tolist())
    return torch.tensor([_deviation(*column) for column in sums.T.tolist()], device=sums.device)


def class_sums(logits: Tensor, weight: Tensor | None, temperature: float) -> Tensor:
    """Weight, weighted negative entropy and weighted probability of each class, `[2 + C]`.

    Args:
        logits: `[B, C, ...]`.
        weight: broadcasts to `[B, ...]`.
        temperature: T, which softens the distributions.
    """
    log_p = torch.log_softmax(logits.double() / temperature, dim=1)
    order = (log_p.exp() * log_p).sum(dim=1)
    share = torch.ones_like(order) if weight is None else weight.double().expand_as(order)
    chances = _over_channels(log_p.exp() * share.unsqueeze(1))
    return torch.cat([share.sum()[None], (share * order).sum()[None], chances])


def class_spread(sums: Tensor, temperature: float) -> float:
    """T^2 times the mean divergence from the mean distribution, from `class_sums`; 1 where all are the same."""
    weight, order, chances = sums[0], sums[1], sums[2:]
    return _divergence(order / weight - _order(chances / weight).sum(), temperature)


def binary_sums(logits: Tensor, weight: Tensor | None, temperature: float) -> Tensor:
    """Weight, weighted negative entropy and weighted probability of each channel of dim 1, `[3, C]`."""
    p = torch.sigmoid(logits.double() / temperature)
    share = torch.ones_like(p) if weight is None else weight.double().expand_as(p)
    return torch.stack(
        [_over_channels(share), _over_channels(share * (_order(p) + _order(1 - p))), _over_channels(share * p)]
    )


def binary_spread(sums: Tensor, temperature: float) -> float:
    """T^2 times the mean divergence from each channel's mean, from `binary_sums`; 1 where all are the same."""
    weight, order, chance = sums
    mean = chance / weight.clamp_min(1e-300)
    own = weight * (_order(mean) + _order(1 - mean))
    return _divergence((order.sum() - own.sum()) / weight.sum(), temperature)


def _over_channels(value: Tensor) -> Tensor:
    """Sum over all but dim 1."""
    wide = value.unsqueeze(1) if value.dim() == 1 else value
    return wide.sum(dim=[d for d in range(wide.dim()) if d != 1])


def _order(p: Tensor) -> Tensor:
    """Negative entropy of single chances: p log p, 0 at 0."""
    order: Tensor = torch.special.xlogy(p, p)
    return order


def _divergence(mean: Tensor, temperature: float) -> float:
    spread = temperature**2 * float(mean)
    return spread if spread > SMALL * temperature**2 else 1.0


def _deviation(count: float, total: float, squares: float) -> float:
    if count == 0:  # a channel that the task never weighs
        return 1.0
    mean_square = squares / count
    variance = mean_square - (total / count) ** 2
    if variance > SMALL * mean_square:
        return float(variance**0.5)
    return float(mean_square**0.5) or 1.0
