"""Weight masks: 2:4 along the axis that TensorRT wants, and the holder that keeps any mask through training.

TensorRT's rule (developer guide 6.8): of every 4 consecutive input channels, at fixed output channel and kernel
position, at most 2 weights are non-zero. In torch layouts that axis is dim 1 of a convolution `[K, C/groups, *kernel]`
and of a linear layer `[out, in]`. Folding a batch norm scales whole rows, so a mask survives it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fusepress.pipeline.errors import CheckpointError, StageError, TrainingError
from fusepress.pipeline.store import atomic_write_bytes

GROUP = 4
KEPT = 2
MASKS_FILE = "masks.safetensors"
_METADATA = {"fusepress": "masks/1"}  # one key only: safetensors does not order its metadata


@dataclass(frozen=True, slots=True, kw_only=True)
class Skip:
    """A weight that stays dense, and why."""

    param: str
    reason: str


def weights_2to4(model: nn.Module) -> tuple[dict[str, nn.Parameter], list[Skip]]:
    """The weights that can carry the 2:4 pattern, and those that cannot.

    Args:
        model: convolutions, linear layers and the packed projections of `nn.MultiheadAttention` are looked at.

    Returns:
        Parameters by name; and every other weight of two or more dimensions with the reason.
    """
    return _sorted_out(model, _why_dense)


def weights_unstructured(model: nn.Module) -> tuple[dict[str, nn.Parameter], list[Skip]]:
    """The weights of which single ones can go: as `weights_2to4`, but of any width, transposed and depthwise too."""
    return _sorted_out(model, _why_no_layer)


def masks_2to4(
    model: nn.Module, scores: Mapping[str, Tensor] | None = None, *, dense: Mapping[str, str] | None = None
) -> tuple[dict[str, Tensor], list[Skip]]:
    """2:4 masks that keep the two best of every 4 consecutive input channels.

    Args:
        model: its weights are looked at as `weights_2to4` says.
        scores: of every weight that can carry the pattern, in its shape, higher = keep; default: |w|.
        dense: names of weights that stay dense, with the reason.

    Returns:
        Bool masks by parameter name (True = kept), in the shape of the parameter; and every weight of two or more
        dimensions that stays dense, with the reason.

    Raises:
        CheckpointError: a weight is not finite.
        StageError: a score is missing, has another shape or is not finite.
    """
    eligible, skipped = weights_2to4(model)
    spared = {name: reason for name, reason in (dense or {}).items() if name in eligible}
    skipped += [Skip(param=name, reason=reason) for name, reason in spared.items()]
    chosen = {name: weight for name, weight in eligible.items() if name not in spared}
    values = keep_values(chosen, scores)
    return {name: top_2to4(value) for name, value in values.items()}, skipped


def keep_values(weights: Mapping[str, Tensor], scores: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """What decides which weights are kept: their scores, or |w| where none are given.

    Raises:
        CheckpointError: a weight is not finite.
        StageError: a score is missing, has another shape or is not finite.
    """
    if scores is None:
        return {name: _finite(name, weight).detach().abs() for name, weight in weights.items()}
    values = {}
    for name, weight in weights.items():
        score = scores.get(name)
        if score is None or score.shape != weight.shape or not bool(torch.isfinite(score).all()):
            got = "none" if score is None else f"shape {tuple(score.shape)}, finite: {bool(score.isfinite().all())}"
            raise StageError(
                f"expected finite scores of shape {tuple(weight.shape)} to choose a mask from; got {got} at {name}; "
                "score this very model"
            )
        values[name] = score.detach()
    return values


def top_2to4(score: Tensor) -> Tensor:
    """Mask of the two highest of every 4 consecutive entries along dim 1; of equal ones the earlier is kept.

    Args:
        score: `[K, C, ...]` with C a multiple of 4.

    Returns:
        Bool tensor of the same shape.
    """
    rows, channels = score.shape[:2]
    grouped = score.reshape(rows, channels // GROUP, GROUP, -1)
    order = torch.sort(grouped, dim=2, descending=True, stable=True).indices
    mask = torch.zeros_like(grouped, dtype=torch.bool)
    mask.scatter_(2, order[:, :, :KEPT], value=True)
    return mask.reshape(score.shape)


def violations_2to4(weight: Tensor) -> int:
    """Number of groups of 4 consecutive entries along dim 1 with more than 2 non-zero ones."""
    rows, channels = weight.shape[:2]
    grouped = weight.detach().reshape(rows, channels // GROUP, GROUP, -1)
    return int((grouped.count_nonzero(dim=2) > KEPT).sum())


def save_masks(masks: Mapping[str, Tensor], path: Path) -> None:
    """Write masks as a safetensors file of uint8; the same masks give the same bytes.

    Raises:
        StoreError: the disk is full or the folder is not writable.
    """
    tensors = {name: mask.to(torch.uint8).contiguous().cpu() for name, mask in masks.items()}
    atomic_write_bytes(path, save_tensors(tensors, metadata=_METADATA))


def load_masks(path: Path) -> dict[str, Tensor]:
    """Read masks that `save_masks` wrote: bool tensors by parameter name.

    Raises:
        CheckpointError: the file is missing or damaged, or holds something else than masks.
    """
    try:
        tensors = load_tensors(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"expected a safetensors file of masks; got {type(error).__name__}: {error} at {path}; "
            "run the sparsify stage again"
        ) from error
    for name, mask in tensors.items():
        if mask.dtype != torch.uint8 or bool((mask > 1).any()):
            raise CheckpointError(
                f"expected masks of 0 and 1 as uint8; got {name!r} of {mask.dtype} at {path}; "
                f"name the {MASKS_FILE} of a run"
            )
    return {name: tensors[name].to(torch.bool) for name in sorted(tensors)}


def _weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    for path, module in model.named_modules():
        for local, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.dim() >= 2:
                yield f"{path}.{local}" if path else local, module, local, parameter


def _sorted_out(
    model: nn.Module, why_not: Callable[[nn.Module, str, Tensor], str | None]
) -> tuple[dict[str, nn.Parameter], list[Skip]]:
    """Weights that a rule lets pass, and the others with its reason; a tied weight counts once."""
    chosen: dict[str, nn.Parameter] = {}
    skipped: list[Skip] = []
    owners: dict[int, str] = {}
    for name, owner, local, parameter in _weights(model):
        if id(parameter) in owners:
            skipped.append(Skip(param=name, reason=f"shares its weight with {owners[id(parameter)]}"))
            continue
        owners[id(parameter)] = name
        reason = why_not(owner, local, parameter)
        if reason is None:
            chosen[name] = parameter
        else:
            skipped.append(Skip(param=name, reason=reason))
    return chosen, skipped


def _why_no_layer(owner: nn.Module, local: str, weight: Tensor) -> str | None:
    if isinstance(owner, nn.MultiheadAttention) and local.endswith("proj_weight"):
        return None
    if local != "weight" or not isinstance(owner, _ConvNd | nn.Linear):
        return f"a parameter of {type(owner).__name__}, which is no convolution and no linear layer"
    return None


def _why_dense(owner: nn.Module, local: str, weight: Tensor) -> str | None:
    if isinstance(owner, _ConvTransposeNd):
        return "transposed convolution: TensorRT has no sparse kernels for it"
    reason = _why_no_layer(owner, local, weight)
    if reason is not None:
        return reason
    if isinstance(owner, _ConvNd) and owner.groups > 1 and weight.shape[1] == 1:
        return "depthwise convolution: one input channel a group"
    return _why_not_grouped(weight)


def _why_not_grouped(weight: Tensor) -> str | None:
    channels = int(weight.shape[1])
    if channels < GROUP:
        return f"{channels} input channels: fewer than {GROUP}, as in a first layer"
    if channels % GROUP:
        return f"{channels} input channels (of each group): no multiple of {GROUP}"
    return None


def _finite(name: str, weight: Tensor) -> Tensor:
    if not bool(torch.isfinite(weight).all()):
        raise CheckpointError(
            f"expected finite weights to choose a mask from; got NaN or infinity in {name}; train again or give "
            "an intact checkpoint"
        )
    return weight


class MaskHolder:
    """Masks by parameter name (True = kept), of any pattern, and what it takes to hold them through training.

    Weight decay, momentum and averaging may all revive a masked weight, so `apply` follows every optimiser step, and
    `apply_to_gradients` precedes it, which keeps masked weights out of the gradient norm and the optimiser's moments.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self.masks = {name: masks[name].to(torch.bool) for name in sorted(masks)}
        self._elsewhere: dict[tuple[str, torch.device], Tensor] = {}

    def apply(self, model: nn.Module) -> None:
        """Set every masked weight to exactly zero, in place.

        Raises:
            CheckpointError: the model lacks a masked parameter, or has it in another shape.
        """
        with torch.no_grad():
            for name, parameter in self._parameters(model):
                parameter.masked_fill_(self._drop(name, parameter.device), 0.0)

    def apply_to_gradients(self, model: nn.Module) -> None:
        """Set the gradients of masked weights to zero, in place."""
        for name, parameter in self._parameters(model):
            if parameter.grad is not None:
                parameter.grad.masked_fill_(self._drop(name, parameter.device), 0.0)

    def check(self, model: nn.Module) -> None:
        """Check that every masked weight is exactly zero.

        Raises:
            TrainingError: with the parameter and the number of weights that are not.
            CheckpointError: the model lacks a masked parameter, or has it in another shape.
        """
        for name, parameter in self._parameters(model):
            revived = int(parameter.detach()[self._drop(name, parameter.device)].count_nonzero())
            if revived:
                raise TrainingError(
                    f"expected every masked weight to be zero; got {revived} non-zero of "
                    f"{int((~self.masks[name]).sum())} at {name}; call hooks.after_step() after every optimiser step"
                )

    def density(self) -> float:
        """Kept fraction of the weights under masks; 1.0 where there is no mask."""
        total = sum(mask.numel() for mask in self.masks.values())
        return sum(int(mask.sum()) for mask in self.masks.values()) / total if total else 1.0

    def _parameters(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, mask in self.masks.items():
            parameter = parameters.get(name)
            if parameter is None or parameter.shape != mask.shape:
                found = "no such parameter" if parameter is None else f"shape {tuple(parameter.shape)}"
                raise CheckpointError(
                    f"expected a parameter {name} of shape {tuple(mask.shape)}, which a mask names; got {found} in "
                    f"{type(model).__name__}; the masks belong to another model: make them again"
                )
            yield name, parameter

    def _drop(self, name: str, device: torch.device) -> Tensor:
        """True = dropped: made every time, for what is held would be as large as the masks."""
        mask = self.masks[name]
        if mask.device != device:
            if (name, device) not in self._elsewhere:
                self._elsewhere[name, device] = mask.to(device)
            mask = self._elsewhere[name, device]
        return ~mask
