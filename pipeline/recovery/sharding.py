"""Training of models whose parameters do not fit one device: FSDP2 (torch's `fully_shard`), a block at a time.

The student is copied, and the parameters of the copy are spread over the ranks. Blocks are the topmost modules that a
forward pass calls; each is gathered when it is needed, so a device holds its share of everything and one block in full.
Gradients are summed over the ranks, as in plain data-parallel training, and everything else (optimiser, average, masks)
works on the shares. At the end the student gets the whole values.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fusepress.pipeline.distributed import rank, world
from fusepress.pipeline.errors import TrainingError, UsageError
from fusepress.pipeline.recovery import rng
from fusepress.pipeline.recovery.contract import Masks
from fusepress.pipeline.recovery.placement import all_tensors


def is_sharded(value: Tensor) -> bool:
    """Whether a rank holds a share of the tensor only."""
    return hasattr(value, "full_tensor")


def whole(value: Tensor) -> Tensor:
    """The whole of a sharded tensor, on rank 0's CPU (others get an empty one); other tensors as they are.

    All ranks call it together.
    """
    if not is_sharded(value):
        return value
    full = _gathered(value)
    return full.cpu() if rank() == 0 else full.new_empty(0)


def _gathered(value: Any) -> Tensor:
    full: Tensor = value.detach().full_tensor()
    return full


def put_(value: Tensor, full: Tensor) -> None:
    """Write the whole into a tensor of which this rank may hold a share only; every rank has the whole."""
    value.copy_(_share_of(full, value) if is_sharded(value) else full)


def _share_of(full: Tensor, like: Any) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


class ShardedMasks:
    """Masks that hold on every rank's share of the weights."""

    def __init__(self, masks: Masks, model: nn.Module) -> None:
        """Cut the masks as the model's parameters are cut."""
        self.masks, self._whole = masks.masks, masks
        parameters: dict[str, Any] = dict(model.named_parameters())
        self._dropped = {name: ~_local(_share_of(mask, parameters[name])) for name, mask in masks.masks.items()}

    def apply(self, model: nn.Module) -> None:
        """Zero the masked weights."""
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, dropped in self._dropped.items():
                _local(parameters[name].detach()).masked_fill_(dropped, 0.0)

    def apply_to_gradients(self, model: nn.Module) -> None:
        """Zero the gradients of masked weights."""
        parameters = dict(model.named_parameters())
        for name, dropped in self._dropped.items():
            gradient = parameters[name].grad
            if gradient is not None:
                _local(gradient).masked_fill_(dropped, 0.0)

    def check(self, model: nn.Module) -> None:
        """Raise where a masked weight is not zero; of a model that holds whole weights."""
        self._whole.check(model)


def _local(value: Any) -> Tensor:
    share: Tensor = value.to_local()
    return share


def check_processes() -> None:
    """Whether there is anybody to share weights with.

    Raises:
        UsageError: there is one process only.
    """
    if world() == 1:
        raise UsageError(
            "expected two processes or more for finetune.shard: fsdp2; got one; start with torchrun "
            "--nproc-per-node=N -m fusepress, or set finetune.shard: none"
        )


@contextlib.contextmanager
def spread(student: nn.Module, inputs: Mapping[str, Tensor], device: torch.device) -> Iterator[nn.Module]:
    """A copy of the student, spread over the ranks; what it has become is the student's when the body ends.

    Args:
        student: on the CPU or on the device; it stays where it is.
        inputs: of a batch, on the student's device: they show which modules are called.
        device: that each rank trains on.

    Raises:
        UsageError: there is one process only.
        TrainingError: torch cannot spread this model.
    """
    check_processes()
    model = copy.deepcopy(student)
    try:
        _shard(model, _called(student, inputs), device)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise TrainingError(
            f"expected a model that torch's fully_shard takes; got {type(error).__name__}: {error}; set "
            "finetune.shard: none"
        ) from error
    yield model
    with torch.no_grad():
        found = all_tensors(model)
        for name, value in all_tensors(student).items():
            value.copy_(_gathered(found[name]) if is_sharded(found[name]) else found[name])


def _shard(model: nn.Module, called: set[str], device: torch.device) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh(device.type, (world(),))
    blocks = list(_blocks(model, called))
    _check_apart(blocks)
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)


def _blocks(model: nn.Module, called: set[str], path: str = "") -> Iterator[nn.Module]:
    """The topmost modules below the model that are called and hold parameters."""
    for name, child in model.named_children():
        if f"{path}{name}" in called and any(True for _ in child.parameters()):
            yield child
        else:
            yield from _blocks(child, called, f"{path}{name}.")


def _check_apart(blocks: Sequence[nn.Module]) -> None:
    """Raise ValueError where two blocks share a parameter: torch would say so only in the first forward pass."""
    owner: dict[nn.Parameter, nn.Module] = {}
    for block in blocks:
        for name, parameter in block.named_parameters():
            if owner.setdefault(parameter, block) is not block:
                raise ValueError(f"{name} of a {type(block).__name__} is a parameter of another block, too")


def _called(model: nn.Module, inputs: Mapping[str, Tensor]) -> set[str]:
    """Paths of the modules that a forward pass calls; one that is used without a call cannot be gathered in time."""
    seen: set[str] = set()
    modes = {module: module.training for module in model.modules()}
    hooks = [
        module.register_forward_pre_hook(lambda _m, _i, name=name: seen.add(name))
        for name, module in model.named_modules()
    ]
    try:
        with rng.kept(next(iter(inputs.values())).device), torch.no_grad():
            model.eval()(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    return seen
