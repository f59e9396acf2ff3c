"""Surgery on the user's own class, its gated twin for the equality test, and checkpoint loading."""

from __future__ import annotations

import copy
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusepress.pipeline.errors import CheckpointError
from fusepress.pipeline.graph.plan import Member, PrunePlan
from fusepress.pipeline.graph.ports import CONVS, TRANSPOSED
from fusepress.pipeline.graph.standins import check_swaps, stand_in

LISTED = 3  # names shown of each kind of mismatch


def architecture_sha256(model: nn.Module) -> str:
    """Hash of the names, shapes and class names of a model; values do not matter."""
    shapes = [[name, list(tensor.shape)] for name, tensor in model.state_dict().items()]
    classes = [[name, type(module).__name__] for name, module in model.named_modules()]
    return hashlib.sha256(json.dumps([shapes, classes]).encode()).hexdigest()


def apply_plan(model: nn.Module, plan: PrunePlan) -> nn.Module:
    """Remove the plan's channels from a dense model, in place; the layers of removed blocks become stand-ins.

    Args:
        model: the dense architecture that the plan was made for; weights of any state.
        plan: what stays.

    Returns:
        The same model.

    Raises:
        CheckpointError: the plan belongs to another architecture; the model is then untouched.
    """
    found = architecture_sha256(model)
    if plan.arch_sha256 != found:
        raise CheckpointError(
            f"expected the architecture {plan.arch_sha256[:12]} that the plan was made for; got {found[:12]} "
            f"at {type(model).__name__}; build the dense model with the options of the compressed run (and apply once)"
        )
    keeps = {key: _keep_index(model, key, gone) for key, gone in removed_indices(plan).items()}
    check_swaps(model, plan.swaps)
    for (param, dim), keep in keeps.items():
        _index(model, param, dim, keep)
    for name in sorted({param.rpartition(".")[0] for param, _ in keeps}):
        _resize(model.get_submodule(name))
    stand_in(model, plan.swaps)
    return model


def gate_model(model: nn.Module, plan: PrunePlan) -> nn.Module:
    """A copy of the dense model in which the removed channels are gated off where they are read.

    The consumers' input slices are zero; norms that average over channels (LayerNorm, GroupNorm) average over the kept
    ones. In evaluation mode it equals the pruned model.
    """
    gated = copy.deepcopy(model)
    normed: dict[str, set[int]] = defaultdict(set)
    with torch.no_grad():
        for group in plan.groups:
            for member in group.members:
                gone = member.indices(group.removed)
                if member.role == "consumer":
                    tensor = _tensor(gated, member.param)
                    tensor.index_fill_(member.dim, torch.tensor(gone, dtype=torch.long, device=tensor.device), 0)
                elif member.role == "norm":
                    normed[member.param.rpartition(".")[0]].update(gone)
    for name, missing in normed.items():
        module = gated.get_submodule(name)
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
            module.forward = masked_norm(module, sorted(missing))  # type: ignore[method-assign, assignment]
    return gated


def masked_norm(module: nn.LayerNorm | nn.GroupNorm, gone: list[int]) -> Callable[[Tensor], Tensor]:
    """The forward pass of a norm over channels as if the channels `gone` were not there; they come out as zeros."""
    layer = isinstance(module, nn.LayerNorm)

    def forward(x: Tensor) -> Tensor:
        flat = x.movedim(-1, 1) if layer else x
        parts = 1 if isinstance(module, nn.LayerNorm) else module.num_groups
        mask = flat.new_ones(flat.shape[1])
        mask[gone] = 0
        shape = (1, -1, *(1 for _ in flat.shape[2:]))
        over = (2,) if layer else tuple(range(2, flat.ndim + 1))
        split = flat.unflatten(1, (parts, -1))
        weight = mask.view(shape).expand_as(flat).unflatten(1, (parts, -1))
        count = weight.sum(over, keepdim=True).clamp_min(1)  # with a removed block none are kept, and none are read
        mean = (split * weight).sum(over, keepdim=True) / count
        var = ((split - mean).square() * weight).sum(over, keepdim=True) / count
        out = ((split - mean) / (var + module.eps).sqrt()).flatten(1, 2)
        if module.weight is not None:
            out = out * module.weight.view(shape)
        if module.bias is not None:
            out = out + module.bias.view(shape)
        back: Tensor = out.movedim(1, -1) if layer else out
        return back

    return forward


def removed_indices(plan: PrunePlan) -> dict[tuple[str, int], list[int]]:
    """Removed indices by (tensor, dimension); where nothing is kept, the stand-in channels stay."""
    removed: dict[tuple[str, int], set[int]] = defaultdict(set)
    for group in plan.groups:
        gone = [c for c in group.removed if c not in group.stand_in]
        for member in group.members:
            removed[member.param, member.dim].update(member.indices(gone))
    return {key: sorted(gone) for key, gone in removed.items() if gone}


def _keep_index(model: nn.Module, key: tuple[str, int], gone: list[int]) -> Tensor:
    param, dim = key
    try:
        tensor = _tensor(model, param)
    except (AttributeError, KeyError):
        raise CheckpointError(
            f"expected a tensor {param!r} of the plan in the model; got none; the plan is damaged"
        ) from None
    if dim >= tensor.ndim or gone[-1] >= tensor.shape[dim]:
        raise CheckpointError(
            f"expected {param} to hold index {gone[-1]} of dimension {dim}; got shape {tuple(tensor.shape)}; "
            "the plan is damaged"
        )
    mask = torch.ones(tensor.shape[dim], dtype=torch.bool)
    mask[gone] = False
    return mask.nonzero().flatten()


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    held: Tensor | None = module._parameters.get(key)
    if held is None:
        held = module._buffers.get(key)
    if held is None:
        raise KeyError(name)
    return held


def _index(model: nn.Module, name: str, dim: int, keep: Tensor) -> None:
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    old = _tensor(model, name)
    new = old.detach().index_select(dim, keep.to(old.device)).clone()
    if module._parameters.get(key) is not None:
        module._parameters[key] = nn.Parameter(new, requires_grad=old.requires_grad)
    else:
        module._buffers[key] = new


def _resize(module: nn.Module) -> None:
    """Make a layer's own size attributes say what its tensors now are."""
    tensors = {**module._parameters, **module._buffers}
    weight = tensors.get("weight")
    if isinstance(module, CONVS + TRANSPOSED):
        assert weight is not None
        across = 0 if isinstance(module, TRANSPOSED) else 1
        if module.groups > 1:  # depthwise: other grouped convolutions are never in a plan
            fan = module.out_channels // module.groups
            module.groups = module.in_channels = weight.shape[0] // (1 if across == 0 else fan)
            module.out_channels = module.groups * fan
        else:
            module.in_channels, module.out_channels = weight.shape[across], weight.shape[1 - across]
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = (module.weight.shape[0],)
    else:
        first = next((t for t in tensors.values() if t is not None and t.ndim == 1), None)
        for attribute in ("num_features", "num_channels", "num_parameters"):
            if first is not None and hasattr(module, attribute):
                setattr(module, attribute, first.shape[0])


def load(model: nn.Module, plan_path: str | Path | None, weights_path: str | Path) -> nn.Module:
    """Turn a dense instance of the user's class into the compressed model: prune by plan, then load the weights.

    Args:
        model: the dense architecture (its weights do not matter), changed in place.
        plan_path: plan.json of the run; None for a model that was not pruned.
        weights_path: its safetensors file.

    Returns:
        The same model, in evaluation mode.

    Raises:
        CheckpointError: a file is missing or damaged, belongs to another architecture, or holds NaN or infinity.
    """
    path = Path(weights_path)
    tensors = _read_tensors(path)
    if plan_path is not None:
        apply_plan(model, PrunePlan.read(Path(plan_path)))
    _load_into(model, tensors, path)
    return model.eval()


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Load a dense checkpoint into a model.

    Args:
        model: the dense architecture.
        path: safetensors, or a torch file (read with weights_only) that holds a state dict, or one under "state_dict"
            or "model"; a leading "module." of every name is dropped.

    Raises:
        CheckpointError: the file is missing or damaged, belongs to another architecture, or holds NaN or infinity.
    """
    path = Path(path)
    _load_into(model, _read_tensors(path), path)


def weights_bytes(model: nn.Module) -> bytes:
    """The model's state as safetensors: equal states are equal bytes."""
    from safetensors.torch import save

    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    return save(state)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"expected a checkpoint; got no file at {path}; correct the path")
    try:
        raw = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    except CheckpointError:
        raise
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"expected a whole checkpoint (safetensors, or a torch file of tensors only); got {first[:160]} at {path}; "
            "copy or save it again"
        ) from error
    return raw


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def _read_torch(path: Path) -> dict[str, Tensor]:
    raw: Any = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model"):
        if isinstance(raw, Mapping) and isinstance(raw.get(key), Mapping):
            raw = raw[key]
            break
    tensors = {str(k): v for k, v in raw.items() if isinstance(v, Tensor)} if isinstance(raw, Mapping) else {}
    if not tensors:
        raise CheckpointError(
            f"expected named tensors; got {type(raw).__name__} without any at {path}; save model.state_dict()"
        )
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def _load_into(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    state = model.state_dict()
    given = {tensor.data_ptr() for name, tensor in state.items() if name in tensors}
    missing = [
        name
        for name, tensor in state.items()
        if name not in tensors and not name.endswith("num_batches_tracked") and tensor.data_ptr() not in given
    ]
    unexpected = [name for name in tensors if name not in state]
    wrong = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in state.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    faults = [_listed("missing", missing), _listed("unexpected", unexpected), _listed("wrong shape", wrong)]
    if any(faults):
        raise CheckpointError(
            f"expected a checkpoint of {type(model).__name__}; got another architecture at {path}: "
            f"{'; '.join(fault for fault in faults if fault)}; name the checkpoint of this model (and its plan)"
        )
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(
                f"expected finite weights; got {count} NaN or infinite values in {name} at {path}; "
                "use a checkpoint from before the training broke"
            )
    model.load_state_dict(tensors, strict=False)


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{what}: {', '.join(names[:LISTED])}{more}"


__all__ = [
    "Member",
    "apply_plan",
    "architecture_sha256",
    "gate_model",
    "load",
    "load_checkpoint",
    "masked_norm",
    "weights_bytes",
]
