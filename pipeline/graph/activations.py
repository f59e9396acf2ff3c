"""What a layer's weights are multiplied with: the inputs of one layer over calibration data, as second moments.

A layer computes Y = W X for a weight matrix W_GRK of G independent groups (1 but for grouped convolutions), R outputs
and K inputs. The K columns of a convolution are ordered (kernel position, input channel): groups of four consecutive
columns then are four input channels at one kernel position, which is the axis of TensorRT's 2:4 rule.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

CHUNK = 2**22  # entries of an unfolded input that exist at once

Inputs = Mapping[str, Tensor]


class Seen(BaseException):
    """Ends a forward pass whose rest is not needed; not an Exception, so that no model swallows it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A weight and where it is used.

    Attributes:
        param: name of the parameter.
        calls: calls a forward pass of the modules that own it.
        order: when it is first called.
        modules: (module, which of its weights).
    """

    param: str
    calls: int
    order: int
    modules: tuple[tuple[nn.Module, str], ...]


def called_layers(model: nn.Module, inputs: Inputs, names: Sequence[str]) -> dict[str, Layer]:
    """The weights that a forward pass uses through their own modules, in the order of their first call.

    Args:
        model: in evaluation mode.
        inputs: of one batch.
        names: parameters of convolutions (not transposed), linear layers and `nn.MultiheadAttention`.

    Returns:
        Parameter name -> layer; weights that no module call uses, or of another kind of layer, are absent.
    """
    owners = _owners(model, names)
    calls: dict[nn.Module, int] = {}
    order: dict[nn.Module, int] = {}

    def note(module: nn.Module, _args: Any, _kwargs: Any) -> None:
        order.setdefault(module, len(order))
        calls[module] = calls.get(module, 0) + 1

    with hooked({module for pairs in owners.values() for module, _ in pairs}, note):
        model(**inputs)
    found = []
    for name, pairs in owners.items():
        used = [module for module, _ in pairs if module in calls]
        if used:
            rank = 2 * min(order[module] for module in used) + (pairs[0][1] == "out_proj")
            count = sum(calls[module] for module in set(used))
            found.append(Layer(param=name, calls=count, order=rank, modules=tuple(pairs)))
    return {layer.param: layer for layer in sorted(found, key=lambda layer: layer.order)}


def _owners(model: nn.Module, names: Sequence[str]) -> dict[str, list[tuple[nn.Module, str]]]:
    """Every module that uses a parameter, and as which of its weights."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    wanted = {id(parameters[name]): name for name in names}
    owners: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in names}
    projections = set()
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            projections.add(module.out_proj)  # it is read, never called
            local = {"in_proj_weight": module.in_proj_weight, "out_proj": module.out_proj.weight}
            local |= {f"{x}_proj_weight": getattr(module, f"{x}_proj_weight") for x in "qkv"}
            for key, projection in local.items():
                if id(projection) in wanted:
                    owners[wanted[id(projection)]].append((module, key))
    for module in model.modules():
        plain = isinstance(module, _ConvNd | nn.Linear) and not isinstance(module, _ConvTransposeNd)
        if plain and module not in projections:
            weight = module.weight
            if isinstance(weight, Tensor) and id(weight) in wanted:
                owners[wanted[id(weight)]].append((module, "weight"))
    return {name: pairs for name, pairs in owners.items() if pairs}


@contextlib.contextmanager
def hooked(modules: set[nn.Module], hook: Callable[[nn.Module, Any, Any], None]) -> Iterator[None]:
    """Modules whose inputs (args, kwargs) a hook sees, in passes without gradients that call every module."""
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it goes past the layers' own forward
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in handles:
            handle.remove()


def second_moments(model: nn.Module, batches: Sequence[Inputs], layer: Layer) -> list[Tensor]:
    """X X^T / n of a layer's inputs, in float64.

    Args:
        model: in evaluation mode.
        batches: calibration inputs by name.
        layer: of `called_layers`; its forward pass ends once the layer was called.

    Returns:
        H_GKK for each part of the weight: one, but for the packed projection of an attention, whose three parts read
        query, key and value.
    """
    sums: list[Tensor] = []
    counts: list[int] = []
    seen = 0

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal seen
        keys = [key for owner, key in layer.modules if owner is module]
        for key in keys:
            for part, chunks in enumerate(columns_of(module, key, args, kwargs)):
                for x_PGK in chunks:
                    x_GPK = x_PGK.detach().to(torch.float64).transpose(0, 1)
                    product = x_GPK.transpose(1, 2) @ x_GPK
                    if part == len(sums):
                        sums.append(torch.zeros_like(product))
                        counts.append(0)
                    sums[part] += product
                    counts[part] += x_GPK.shape[1]
        seen += 1
        if seen == layer.calls:
            raise Seen

    with hooked({module for module, _ in layer.modules}, note):
        for batch in batches:
            seen = 0
            with contextlib.suppress(Seen):
                model(**batch)
    return [total / max(1, count) for total, count in zip(sums, counts, strict=True)]


def columns_of(module: nn.Module, key: str, args: Any, kwargs: Any) -> list[Iterator[Tensor]]:
    """Inputs x_PGK of each part of a weight, in chunks over the P positions."""
    if isinstance(module, nn.MultiheadAttention):
        return [_rows(x) for x in _attention_inputs(module, key, args, kwargs)]
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return [unfolded(module, x) if isinstance(module, _ConvNd) else _rows(x)]


def _rows(x: Tensor) -> Iterator[Tensor]:
    flat = x.reshape(-1, 1, x.shape[-1])
    yield from flat.split(max(1, CHUNK // x.shape[-1]))


def _attention_inputs(module: nn.MultiheadAttention, key: str, args: Any, kwargs: Any) -> list[Tensor]:
    named = {**dict(zip(("query", "key", "value", "key_padding_mask"), args, strict=False)), **kwargs}
    if key == "in_proj_weight":
        return [named["query"], named["key"], named["value"]]
    if key != "out_proj":
        return [named[{"q": "query", "k": "key", "v": "value"}[key[0]]]]
    return [_before_projection(module, args, kwargs)]


def _before_projection(module: nn.MultiheadAttention, args: Any, kwargs: Any) -> Tensor:
    """The heads' outputs: what the attention returns where its last projection is the identity."""
    projection = module.out_proj
    weight, bias = projection.weight, projection.bias
    try:
        projection.weight = nn.Parameter(torch.eye(weight.shape[0]).to(weight), requires_grad=False)
        if bias is not None:
            projection.bias = nn.Parameter(torch.zeros_like(bias), requires_grad=False)
        heads: Tensor = module.forward(*args, **kwargs)[0]  # not the call, whose hook this is
    finally:
        projection.weight, projection.bias = weight, bias
    return heads


def unfolded(module: _ConvNd, x: Tensor) -> Iterator[Tensor]:
    """Inputs of a convolution in any number of dimensions as x_PGK, K ordered (kernel position, channel of the group).

    Args:
        module: with any stride, padding (mode), dilation and groups.
        x: `[N, C, ...]` or `[C, ...]`.
    """
    dims = len(module.kernel_size)
    if x.ndim == dims + 1:
        x = x.unsqueeze(0)
    if module.padding_mode == "zeros":
        x = F.pad(x, module._reversed_padding_repeated_twice)
    else:
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
    for dim in range(dims):
        reach = (module.kernel_size[dim] - 1) * module.dilation[dim] + 1
        x = x.unfold(2 + dim, reach, module.stride[dim])[..., :: module.dilation[dim]]
    entries = math.prod(x.shape[1:])
    for few in x.split(max(1, CHUNK // max(1, entries))):
        n_GC = few.unflatten(1, (module.groups, -1))  # [n, G, C/G, *out, *kernel]
        positions, kernel = list(range(3, 3 + dims)), list(range(3 + dims, 3 + 2 * dims))
        moved = n_GC.permute(0, *positions, 1, *kernel, 2)
        yield moved.reshape(-1, module.groups, math.prod(module.kernel_size) * n_GC.shape[2])


def matrices(weight: Tensor, groups: int = 1, parts: int = 1) -> list[Tensor]:
    """A weight as matrices W_GRK, one a part, in the column order of this module.

    Args:
        weight: `[K, C / groups, *kernel]`.
        groups: of a convolution.
        parts: in which rows read different inputs (packed projections).
    """
    split = weight.unflatten(0, (parts * groups, -1))
    flat = split.movedim(2, -1).flatten(2)
    return list(flat.unflatten(0, (parts, groups)).unbind(0))


def weight_of(matrices_GRK: Sequence[Tensor], like: Tensor) -> Tensor:
    """The inverse of `matrices`: a tensor in the shape of `like`."""
    stacked = torch.cat(list(matrices_GRK)).flatten(0, 1)
    whole: Tensor = stacked.unflatten(1, (*like.shape[2:], like.shape[1]))
    return whole.movedim(-1, 1).reshape(like.shape)


__all__ = [
    "Layer",
    "Seen",
    "called_layers",
    "columns_of",
    "hooked",
    "matrices",
    "second_moments",
    "unfolded",
    "weight_of",
]
