"""torch.compile of a student in training: tried once before the first step, and left out where it does not work."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fusepress.pipeline.recovery import rng
from fusepress.pipeline.recovery.precision import Amp

BACKEND: str | Callable[..., Any] = "inductor"
logger = logging.getLogger(__name__)


def try_compile(model: nn.Module, inputs: Mapping[str, Tensor], amp: Amp) -> Callable[..., Any] | None:
    """A compiled forward of a model, shown to work forwards and backwards on one batch.

    Parameters stay the model's own under their own names. The trial leaves no trace: buffers, gradients and random
    state are what they were.

    Args:
        model: in training mode.
        inputs: of a real batch, on the model's device.
        amp: the number format that it will run in.

    Returns:
        What to call in the model's place, or None (and a warning in the log) where compiling fails.
    """
    buffers = {name: value.detach().clone() for name, value in model.named_buffers()}
    compiled: Callable[..., Any] = torch.compile(model, backend=BACKEND)
    try:
        with rng.kept(amp.device), amp.autocast():
            outputs = compiled(**inputs)
        values = [outputs] if isinstance(outputs, Tensor) else list(outputs.values())
        torch.stack([value.float().sum() for value in values if value.requires_grad]).sum().backward()
    except Exception as error:  # noqa: BLE001 -- compilers fail in every way there is; a fault of the model shows again
        told = " ".join(str(error).strip().partition("\n\n")[0].split())  # advice on debugging the compiler follows
        logger.warning(
            "torch.compile does not take this model (%s: %s); training goes on without", type(error).__name__, told
        )
        return None
    finally:
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, value in model.named_buffers():
                value.copy_(buffers[name])
    return compiled
