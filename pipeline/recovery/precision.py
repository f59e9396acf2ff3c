"""Number formats of training: autocast on an accelerator, float32 on a CPU."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from fusepress.pipeline.errors import TrainingError
from fusepress.pipeline.recipe import TrainingFormat

SKIPS_IN_A_ROW = 20


class Amp:
    """Autocast and, for float16, a loss scale.

    Attributes:
        format: fp32, bf16 or fp16; "auto" became one of them: bf16 where the accelerator has it.
    """

    def __init__(self, wanted: TrainingFormat, device: torch.device) -> None:
        self.device = device
        self.format = resolved_format(wanted, device)
        self._scaler = torch.amp.GradScaler(device.type, enabled=self.format == "fp16")
        self._skipped = 0

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context of forward passes."""
        if self.format == "fp32":
            return contextlib.nullcontext()
        dtype = torch.bfloat16 if self.format == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype=dtype)

    def backward(self, total: Tensor) -> None:
        """Add the gradients of a loss, in the present scale: `unscale` brings the sum of all to true scale."""
        self._scaler.scale(total).backward()

    @property
    def scale(self) -> float:
        """What `backward` multiplies a loss by, so that small gradients do not vanish in float16; else 1."""
        return float(self._scaler.get_scale())

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Gradients in true scale; once a step, after its last `backward`."""
        self._scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer, model: nn.Module, clip: float, where: str) -> None:
        """Clip the gradients and step; a float16 overflow lowers the scale and skips the step instead.

        Args:
            optimizer: of the model's parameters.
            model: whose gradients are there, unscaled.
            clip: limit of the gradient norm.
            where: the step, for the message.

        Raises:
            TrainingError: a gradient is not finite (in float16: for many steps in a row).
        """
        parameters = [p for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of gradients that are spread over ranks
        finite = bool(torch.isfinite(norm))
        self._skipped = 0 if finite else self._skipped + 1
        if not finite and (self.format != "fp16" or self._skipped >= SKIPS_IN_A_ROW):
            raise TrainingError(
                f"expected finite gradients; got NaN or infinity in {_first_bad(model)} at {where}; lower finetune.lr "
                "and look for a division by zero, a logarithm or a square root of zero in the model and its losses"
            )
        self._scaler.step(optimizer)
        self._scaler.update()

    def state(self) -> dict[str, Any]:
        """What fits JSON and `load` takes back."""
        return {"scaler": self._scaler.state_dict(), "skipped": self._skipped}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        if self._scaler.is_enabled():
            self._scaler.load_state_dict(state["scaler"])
        self._skipped = int(state["skipped"])


def resolved_format(wanted: TrainingFormat, device: torch.device) -> TrainingFormat:
    """The format itself, or what "auto" is on a device: bf16 (else fp16) on an accelerator, fp32 on a CPU."""
    if wanted != "auto":
        return wanted
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def _first_bad(model: nn.Module) -> str:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            return f"the gradient of {name}"
    return "the norm of all gradients, each of which is finite"
