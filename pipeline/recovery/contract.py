"""What training takes and what it tells: masks, progress, the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

HISTORY_POINTS = 200


class Masks(Protocol):
    """What fine-tuning needs of a mask holder (graph/masks.py)."""

    masks: dict[str, Tensor]

    def apply(self, model: nn.Module) -> None:
        """Zero the masked weights."""

    def apply_to_gradients(self, model: nn.Module) -> None:
        """Zero the gradients of masked weights."""

    def check(self, model: nn.Module) -> None:
        """Raise where a masked weight is not zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainProgress:
    """Where training is.

    Attributes:
        step: steps done.
        steps: steps in all.
        losses: named losses of the last step.
        lr: its learning rate.
        eta_s: seconds still to go at the present pace.
    """

    step: int
    steps: int
    losses: dict[str, float]
    lr: float
    eta_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneResult:
    """What training came to.

    Attributes:
        final_losses: named losses of the last step; empty where no step was made.
        history: at most about 200 points `{"step", "lr", "losses"}`, the last step among them.
        steps: optimiser steps made in all.
        resumed_from: the step of the checkpoint that this process went on from, or None.
    """

    final_losses: dict[str, float]
    history: list[dict[str, Any]]
    steps: int
    resumed_from: int | None
