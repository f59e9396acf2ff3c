"""Batch norm statistics after surgery: those of the dense model no longer fit what flows in."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fusepress.pipeline.errors import TrainingError
from fusepress.pipeline.recovery import rng
from fusepress.pipeline.task import LoadedTask


def tracking_norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch norms of a model that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def reestimate_batchnorm(model: nn.Module, task: LoadedTask, batches: int, seed: int) -> int:
    """Replace the running statistics by the plain average over training batches.

    Only batch norms run in training mode, so dropout stays off. Nothing but their buffers changes: weights, modes,
    momenta and the caller's random state are what they were.

    Args:
        model: changed in place, on the device it is on.
        task: whose `train` split is read.
        batches: how many batches; 0 leaves the model alone.
        seed: of the split.

    Returns:
        The number of batch norms that were estimated anew.

    Raises:
        TrainingError: the statistics are not finite.
    """
    norms = tracking_norms(model)
    if not norms or batches == 0:
        return 0
    device = next(iter(model.parameters())).device
    modes = {module: module.training for module in model.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    try:
        model.eval()
        for norm in norms:
            norm.train()
            norm.momentum = None  # the cumulative average
            norm.reset_running_stats()
        with rng.scope(seed, device), torch.no_grad():
            source = task.train_batches(seed)
            for index in range(batches):
                batch = rng.draw(source, seed, index)
                model(**{name: value.to(device) for name, value in batch.inputs.items()})
    finally:
        for norm in norms:
            norm.momentum = momenta[norm]
        for module, training in modes.items():
            module.training = training
    _check_finite(model)
    return len(norms)


def _check_finite(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
            finite = torch.isfinite(module.running_mean).all() and torch.isfinite(module.running_var).all()
            if not bool(finite):
                raise TrainingError(
                    f"expected finite batch norm statistics; got NaN or infinity at {name} after estimating them "
                    "anew; check the training inputs and the checkpoint"
                )
