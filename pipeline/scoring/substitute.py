"""Run a model with other values in its parameters' place that live only while an operator needs them.

`torch.func.functional_call` holds a whole set of values from the forward pass to the end of the backward pass. Here
every operator that is given a parameter gets its value made for it, and what autograd would save of a value is a note
of how to make it again. So a set of values in float64 takes the room of a layer instead of two copies of the
parameters.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

Make = Callable[[str], Tensor]  # name -> its value, made anew every time, and not of a parameter: those are replaced
Take = Callable[[str, Tensor, Tensor], None]  # (name, its value, the whole gradient by it)


class Substitution(TorchFunctionMode):
    """A context in which operators see values made for parameters, and their gradients are handed over.

    Forward and backward belong inside it. Gradients arrive when a parameter's last use has sent its part; those of
    uses that lead nowhere are known by `finish` only.

    Args:
        names: parameter -> its name, for every parameter to be replaced.
        make: makes a value, of the parameter's shape and of any dtype.
        take: is given the gradients.
    """

    def __init__(self, names: Mapping[nn.Parameter, str], make: Make, take: Take) -> None:
        super().__init__()
        self._names, self._make, self._take = names, make, take
        device = next(iter(names)).device
        self._anchor = torch.zeros((), device=device, requires_grad=True)  # has autograd come back to every value
        self._uses: dict[str, int] = {}
        self._parts: dict[str, Tensor] = {}
        self._live: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        self._recent: tuple[str, Tensor] | None = None  # what an operator on the way back was given last
        self._saving = saved_tensors_hooks(self._pack, self._unpack)

    def __enter__(self) -> Substitution:
        self._saving.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._saving.__exit__(*error)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not _has_parameter(args) and not (kwargs and _has_parameter(kwargs.values())):
            return func(*args, **(kwargs or {}))  # most operators; a tree of arguments takes longer than they do
        if getattr(func, "__name__", "") == "__get__" and args[0] in self._names:
            return self._attribute(func, args)
        new_args, new_kwargs = tree_map_only(nn.Parameter, self._value, (args, kwargs or {}))
        return func(*new_args, **new_kwargs)

    def _attribute(self, func: Any, args: tuple[Any, ...]) -> Any:
        """Shapes and devices are those of the parameter; tensors (transposed, say) and dtypes those of the value."""
        found = func(*args)
        if isinstance(found, (Tensor, torch.dtype)):
            return func(self._value(args[0]), *args[1:])
        return found

    def _value(self, parameter: nn.Parameter) -> Tensor:
        name = self._names.get(parameter)
        if name is None:
            return parameter
        self._uses[name] = self._uses.get(name, 0) + 1
        value: Tensor = _Made.apply(self._anchor, self, name)  # type: ignore[no-untyped-call]
        self._live[value.data_ptr()] = (weakref.ref(value), name)
        return value

    def make(self, name: str) -> Tensor:
        """A parameter's value, outside any graph."""
        with torch.no_grad():
            return self._make(name)

    def receive(self, name: str, gradient: Tensor) -> None:
        """A part of a parameter's gradient, by one of its uses."""
        if name in self._parts:
            gradient = self._parts.pop(name) + gradient
        self._uses[name] -= 1
        if self._uses[name]:
            self._parts[name] = gradient
        else:
            self._hand_over(name, gradient)

    def _hand_over(self, name: str, gradient: Tensor) -> None:
        recent, self._recent = self._recent, None
        value = recent[1] if recent is not None and recent[0] == name else self.make(name)
        self._take(name, value, gradient)

    def finish(self) -> None:
        """Hand over the gradients of parameters some of whose uses led nowhere."""
        for name in list(self._parts):
            self._hand_over(name, self._parts.pop(name))

    def _pack(self, tensor: Tensor) -> Any:
        owner, name = self._live.get(tensor.data_ptr(), (None, ""))
        value = None if owner is None else owner()
        if value is None or value.dtype != tensor.dtype:
            return tensor
        return name, tensor.shape, tensor.stride(), tensor.storage_offset()

    def _unpack(self, kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        name, shape, stride, offset = kept
        self._recent = None
        value = self.make(name)
        self._recent = name, value
        return value.as_strided(shape, stride, offset)


def _has_parameter(values: Iterable[Any]) -> bool:
    return any(
        isinstance(value, nn.Parameter)
        or (isinstance(value, (list, tuple)) and _has_parameter(value))
        or (isinstance(value, dict) and _has_parameter(value.values()))
        for value in values
    )


class _Made(torch.autograd.Function):
    """A value as an operator's input; its gradient goes to the substitution."""

    @staticmethod
    def forward(ctx: Any, _anchor: Tensor, owner: Substitution, name: str) -> Tensor:
        ctx.owner, ctx.name = owner, name
        return owner.make(name)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        ctx.owner.receive(ctx.name, gradient)
        return None, None, None
