"""What training takes and what it tells: masks, progress, the result."""

from __future__ import annotations

from dataclasses import dataclass, field
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
class Look:
    """One look at the calib split (recovery/early_stop.py).

    Attributes:
        step: optimiser steps done.
        value: the metric, or None where it is undefined (NaN).
        drop: how much worse than the dense model's, negative where it is better; None where either is
            undefined.
        high: upper bound of the drop (95 % interval), or None where it has none.
        met: the bound is within the gate's limit.
    """

    step: int
    value: float | None
    drop: float | None
    high: float | None
    met: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainProgress:
    """Where training is.

    Attributes:
        step: steps done.
        steps: steps in all.
        losses: named losses of the last step.
        lr: its learning rate.
        eta_s: seconds still to go at the present pace.
        look: at the calib split, where this step had one.
    """

    step: int
    steps: int
    losses: dict[str, float]
    lr: float
    eta_s: float
    look: Look | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneResult:
    """What training came to.

    Attributes:
        final_losses: named losses of the last step; empty where no step was made.
        history: at most about 200 points `{"step", "lr", "losses"}`, the last step among them.
        steps: optimiser steps made in all.
        resumed_from: the step of the checkpoint that this process went on from, or None.
        precision: of the passes: fp32, bf16 or fp16; empty where the task trained by itself.
        compiled: the student went through torch.compile.
        looks: at the calib split; the last one stopped the run where it says so.
    """

    final_losses: dict[str, float]
    history: list[dict[str, Any]]
    steps: int
    resumed_from: int | None
    precision: str = ""
    compiled: bool = False
    looks: list[Look] = field(default_factory=list)
