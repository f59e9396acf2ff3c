"""What takes a layer's place when a whole block goes: zeros, the layer's input, or one constant a channel.

A layer whose whole input is gone returns its bias, whatever its kernel or stride. A norm behind it then has a constant
input too: in training its variance would be zero, so its evaluation-mode output becomes the constant, as a parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fusepress.pipeline.errors import CheckpointError
from fusepress.pipeline.graph.plan import Swap
from fusepress.pipeline.graph.ports import CONVS, TRANSPOSED

LAYERS = (*CONVS, *TRANSPOSED, nn.Linear, nn.Embedding)


class Geometry:
    """A layer's output shape as a function of its input shape, without its weights."""

    def __init__(self, layer: nn.Module) -> None:
        self.transposed = isinstance(layer, TRANSPOSED)
        self.embedding = isinstance(layer, nn.Embedding)
        self.windows: tuple[tuple[int, int, int, int, int], ...] = ()  # kernel, stride, padding (both), dilation, extra
        if isinstance(layer, CONVS + TRANSPOSED):
            self.channels = layer.out_channels
            reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
            if layer.padding == "same":
                padding = reach
            elif isinstance(layer.padding, str):
                padding = [0 for _ in reach]
            else:
                padding = [2 * p for p in layer.padding]
            extra = layer.output_padding if self.transposed else [0 for _ in reach]
            sizes = zip(layer.kernel_size, layer.stride, padding, layer.dilation, extra, strict=True)
            self.windows = tuple((int(k), int(s), int(p), int(d), int(e)) for k, s, p, d, e in sizes)
        else:
            assert isinstance(layer, nn.Linear | nn.Embedding)
            self.channels = layer.embedding_dim if isinstance(layer, nn.Embedding) else layer.out_features

    @property
    def axis(self) -> int:
        """The channel dimension of the output, from the end."""
        return -1 - len(self.windows)

    def __call__(self, shape: Sequence[int], output_size: Sequence[int] | None = None) -> tuple[int, ...]:
        """Output shape for an input shape (torch.nn's own formulas); `output_size` as transposed convolutions take."""
        if self.embedding:
            return (*shape, self.channels)
        if not self.windows:
            return (*shape[:-1], self.channels)
        count = len(self.windows)
        if output_size is not None:
            ahead = tuple(output_size)[-count:]
        else:
            ahead = tuple(self._along(n, *w) for n, w in zip(shape[-count:], self.windows, strict=True))
        return (*shape[: -1 - count], self.channels, *ahead)

    def _along(self, n: int, kernel: int, stride: int, padding: int, dilation: int, extra: int) -> int:
        if self.transposed:
            return (n - 1) * stride - padding + dilation * (kernel - 1) + extra + 1
        return (n + padding - dilation * (kernel - 1) - 1) // stride + 1


class Zeros(nn.Module):
    """Zeros of the shape that a layer would return."""

    zero: Tensor

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.geometry = Geometry(layer)
        self.register_buffer("zero", _one_of(layer).new_zeros(()), persistent=False)

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:  # noqa: A002 - as torch's
        """Zeros for an input of any values."""
        like = input if input.is_floating_point() else self.zero
        return like.new_zeros(self.geometry(input.shape, output_size))


class Constant(nn.Module):
    """One constant a channel, in the place of a layer (its bias) or of the norm behind one.

    Args:
        layer: what it replaces.
        value: (channels,); None is zero.
        fill: whether to return the layer's full output shape; else every dimension but the channels is 1, and whatever
            it is added to broadcasts it.
    """

    bias: Tensor | None
    zero: Tensor

    def __init__(self, layer: nn.Module, value: Tensor | None, *, fill: bool) -> None:
        super().__init__()
        self.geometry = Geometry(layer) if isinstance(layer, LAYERS) else None
        self.fill = fill
        old = layer._parameters.get("bias")
        self.channels = self.geometry.channels if self.geometry is not None else int(getattr(layer, "num_features", 0))
        if value is not None and old is None:
            self.register_buffer("bias", value)
        elif value is not None:
            self.bias = nn.Parameter(value, requires_grad=old is not None and old.requires_grad)
        else:
            self.register_parameter("bias", None)
        self.register_buffer("zero", _one_of(layer).new_zeros(()), persistent=False)

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:  # noqa: A002 - as torch's
        """The constant for an input of any values."""
        axis = min(1, input.ndim - 1) if self.geometry is None else self.geometry.axis
        shape = [1] * input.ndim
        shape[axis] = self.channels
        value = self.zero.new_zeros(shape) if self.bias is None else self.bias.view(shape)
        if self.fill:
            value = value.expand(input.shape if self.geometry is None else self.geometry(input.shape, output_size))
        return value.clone()  # the user's code may change it in place


def _one_of(layer: nn.Module) -> Tensor:
    """Any tensor of a layer, for its type and device."""
    tensors = [*layer._parameters.values(), *layer._buffers.values()]
    return next(t for t in tensors if t is not None and t.is_floating_point())


def norm_constant(norm: _BatchNorm, value: Tensor | None) -> Tensor:
    """Evaluation-mode output (C,) of a batch norm for a constant input (C,), computed in float64; None is zero."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    wide = {name: t.detach().double() for name, t in norm.named_parameters(recurse=False)}
    centred = (0.0 if value is None else value.detach().double()) - norm.running_mean.double()
    out = centred / (norm.running_var.double() + norm.eps).sqrt() * wide.get("weight", 1.0) + wide.get("bias", 0.0)
    return out.to(norm.running_mean.dtype)


def check_swaps(model: nn.Module, swaps: Sequence[Swap]) -> None:
    """Check that every swap names a layer that its stand-in can be made for; nothing is changed.

    Raises:
        CheckpointError: it does not.
    """
    modules = dict(model.named_modules())
    by_name = {swap.module: swap for swap in swaps}
    for swap in swaps:
        layer, source = modules.get(swap.module), modules.get(swap.source)
        if layer is None or swap.module == "":
            raise CheckpointError(
                f"expected a layer {swap.module!r} of a removed block in the model; got none; the plan is damaged"
            )
        if swap.kind == "zeros":
            fits = isinstance(layer, LAYERS)
        elif swap.source:
            tracked = isinstance(layer, _BatchNorm) and layer.running_mean is not None
            fits = tracked and isinstance(source, LAYERS) and swap.source in by_name and swap.kind != "pass"
        else:
            fits = swap.kind == "pass" or isinstance(layer, LAYERS)
        if not fits:
            behind = f" behind {swap.source!r}" if swap.source else ""
            raise CheckpointError(
                f"expected a layer that {swap.kind!r} can stand in for; got {type(layer).__name__}{behind} at "
                f"{swap.module}; the plan is damaged"
            )


def stand_in(model: nn.Module, swaps: Sequence[Swap]) -> None:
    """Put the stand-ins in place; the layers have their pruned widths already."""
    folded = {swap.source for swap in swaps}
    made: Mapping[str, nn.Module] = {swap.module: _made(model, swap, swap.module in folded) for swap in swaps}
    for name, module in made.items():
        path, _, key = name.rpartition(".")
        module.train(model.get_submodule(name).training)
        model.get_submodule(path)._modules[key] = module


def _made(model: nn.Module, swap: Swap, folded: bool) -> nn.Module:
    layer: Any = model.get_submodule(swap.module)
    if swap.kind == "pass":
        return nn.Identity()
    if swap.kind == "zeros":
        return Zeros(layer)
    if swap.source:
        value: Tensor | None = norm_constant(layer, model.get_submodule(swap.source)._parameters.get("bias"))
    else:
        bias = layer._parameters.get("bias")
        value = None if folded or bias is None else bias.detach().clone()
    with torch.no_grad():
        return Constant(layer, value, fill=swap.kind == "filled")
