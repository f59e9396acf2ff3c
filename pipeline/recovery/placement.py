"""Where models and batches lie while they are trained, and all the tensors that a model holds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from fusepress.pipeline.task import Batch


def training_device(home: torch.device) -> torch.device:
    """Where a model that lies at home is trained: on the accelerator, if there is one."""
    return torch.device("cuda") if torch.cuda.is_available() else home


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those outside the state dict too: training may change any of them."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def on_device(batch: Batch, device: torch.device) -> Batch:
    """A batch whose tensors lie on the device."""
    if device.type == "cpu":
        return batch
    moved = {name: value.to(device) for name, value in batch.inputs.items()}
    targets = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in batch.targets.items()}
    return replace(batch, inputs=moved, targets=targets)


@contextlib.contextmanager
def placed(model: nn.Module, device: torch.device, home: torch.device) -> Iterator[None]:
    """The model on the training device; afterwards it is at home again."""
    model.to(device)
    try:
        yield
    finally:
        model.to(home)


@contextlib.contextmanager
def lent(teacher: nn.Module | None, device: torch.device) -> Iterator[nn.Module | None]:
    """The teacher in evaluation mode on the training device; its modes and its device come back."""
    if teacher is None:
        yield None
        return
    home = next(iter(teacher.parameters())).device
    modes = {module: module.training for module in teacher.modules()}
    try:
        yield teacher.to(device).eval()
    finally:
        teacher.to(home)
        for module, training in modes.items():
            module.training = training
