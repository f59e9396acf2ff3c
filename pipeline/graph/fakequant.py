"""Fake quantisation of the user's own model: it computes what an ONNX file with Q/DQ computes, and can be trained.

Where the pairs lie is the file's to say (a `Placement`); here they are found again among the torch functions that the
model calls, and checked by value: each layer's weights must be the file's, and each tensor in front of a pair must have
the largest magnitudes that the file's has on the same samples. What is not found is left in floating point and named.

Batch norms behind quantised convolutions are folded into the weights with their running statistics, as in the file, so
that weights are quantised as they are multiplied; their weights and biases go on being trained through the fold.

Sources: straight-through gradients, Bengio et al., arXiv:1308.3432; learned steps, LSQ, Esser et al., arXiv:1902.08153
(equation 3 and the gradient scale of section 2.2), of their logarithm as in TQT, Jain et al., arXiv:1903.08066; folding
before quantising, Jacob et al., arXiv:1712.05877, section 3.2, with statistics that stay.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from fusepress.pipeline.graph.placement import GRID_MAX, INT8_MIN, LEAST_STEP, Grid, Placement, QuantisedNode
from fusepress.pipeline.graph.recomputation import without_recomputation

NAME = "fusepress_steps"  # of the parameter (their logarithms) or buffer that a model carries while it is quantised
SAME_AMAX = 1e-3  # relative: sums in another order move a largest magnitude by less
SAME_WEIGHT = 1e-4

_KINDS = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), "conv"),
    **dict.fromkeys(("linear", "matmul", "__matmul__", "bmm", "mm"), "matmul"),
    **dict.fromkeys(("add", "__add__", "__radd__", "add_", "__iadd__"), "add"),
    **dict.fromkeys(("cat", "concat", "concatenate"), "concat"),
    **dict.fromkeys(("interpolate", "grid_sample"), "sample"),
    **dict.fromkeys(("max_pool1d", "max_pool2d", "max_pool3d"), "max_pool"),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "avg_pool3d"), "mean"),
    **dict.fromkeys(("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "mean"), "mean"),
    **dict.fromkeys(("reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze"), "shape"),
    **dict.fromkeys(("permute", "transpose"), "shape"),
}
OPERATORS = {
    "Conv": "conv",
    **dict.fromkeys(("Gemm", "MatMul"), "matmul"),
    "Add": "add",
    "Concat": "concat",
    **dict.fromkeys(("Resize", "GridSample"), "sample"),
    "MaxPool": "max_pool",
    **dict.fromkeys(("AveragePool", "GlobalAveragePool", "ReduceMean"), "mean"),
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose"), "shape"),
}
_WEIGHTED = ("conv", "matmul")
_IN_PLACE = ("add_", "__iadd__")


def on_grid(ratio: Tensor, grid: Grid) -> Tensor:
    """The numbers that a QuantizeLinear makes of x / step: rounded half to even, saturated."""
    if grid == "int8":
        return ratio.round().clamp(INT8_MIN, GRID_MAX[grid])
    limit = GRID_MAX[grid]
    return ratio.clamp(-limit, limit).to(torch.float8_e4m3fn).to(ratio.dtype)


class _FakeQuantise(torch.autograd.Function):
    """Quantised and back; gradients as if rounding were the identity, and of the step by LSQ's equation 3."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, grid: Grid) -> Tensor:
        ratio = x / step
        made = on_grid(ratio, grid)
        low = INT8_MIN if grid == "int8" else -GRID_MAX[grid]
        nearest = ratio.round() if grid == "int8" else ratio
        inside = (nearest >= low) & (nearest <= GRID_MAX[grid])
        learned = ctx.needs_input_grad[1]
        ctx.save_for_backward(inside, torch.where(inside, made - ratio, made) if learned else None)
        return made * step

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        inside, by_step = ctx.saved_tensors
        (gradient,) = gradients
        step = None
        if by_step is not None:
            step = (gradient * by_step).sum() / math.sqrt(by_step.numel() * GRID_MAX["int8"])
        return gradient * inside, step, None


def fake_quantise(x: Tensor, step: Tensor, grid: Grid = "int8") -> Tensor:
    """What `DequantizeLinear(QuantizeLinear(x, step), step)` gives, bit for bit, with a gradient.

    The gradient passes where nothing saturates. That of a step of one element is LSQ's: the rounding error inside, the
    limit outside, times 1 / sqrt(elements * 127).

    Args:
        x: any shape; computed in float32.
        step: one element, or one that broadcasts (no gradient then).
        grid: int8 (zero point 0) or fp8 (E4M3).
    """
    made: Tensor = _FakeQuantise.apply(x.float(), step, grid)  # type: ignore[no-untyped-call]
    return made


def weight_step(weight: Tensor, grid: Grid, axis: int | None) -> Tensor:
    """The step by which weights just do not saturate, shaped to broadcast.

    Args:
        weight: any shape.
        grid: their largest magnitude becomes the grid's.
        axis: of the channels that have one each; None: one for all.
    """
    magnitude = weight.detach().abs()
    others = [d for d in range(weight.dim()) if axis is None or d != axis % weight.dim()]
    return (magnitude.amax(others, keepdim=True) / GRID_MAX[grid]).clamp_min(torch.finfo(torch.float32).tiny)


# --- which calls of torch are which nodes -----------------------------------------------------------------------------

_Key = tuple[str, str, int]  # module path, kind, number of the call in a forward pass


@dataclass(slots=True)
class _Call:
    """One call while the model is looked at.

    Attributes:
        amax: operand -> its largest magnitude in each sample.
        weight: the second operand of a layer.
        out_axis: its axis of output channels.
        norm: path of the batch norm that takes its result.
    """

    key: _Key
    amax: dict[int, list[float]] = field(default_factory=dict)
    weight: Tensor | None = None
    out_axis: int = 0
    norm: str | None = None


@dataclass(frozen=True, slots=True)
class _Site:
    """What to do at a call: operand -> group of its step; and how its weights are quantised."""

    groups: dict[int, int]
    weighted: bool
    axis: int | None
    norm: str | None


class _Calls(TorchFunctionMode):
    """Follows the calls of a model; `see` is told each one that can have pairs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.path: list[str] = []
        self.counts: Counter[tuple[str, str]] = Counter()
        self._hooks: list[Any] = []
        for name, module in model.named_modules():
            if module is not model:
                self._hooks.append(module.register_forward_pre_hook(lambda *_, name=name: self.path.append(name)))
                self._hooks.append(module.register_forward_hook(lambda *_: self._leave(), always_call=True))
        # the root's come first and last, whatever else hangs there
        self._hooks.append(model.register_forward_pre_hook(lambda *_: self._begin(), prepend=True))
        self._hooks.append(model.register_forward_hook(lambda *_: self._end(), always_call=True))
        self._entered = False

    def _leave(self) -> None:
        if self.path:
            self.path.pop()

    def _begin(self) -> None:
        self.counts.clear()
        self.path = [""]
        self.__enter__()  # type: ignore[no-untyped-call]
        self._entered = True

    def _end(self) -> None:
        if self._entered:  # `always_call` calls it again where a later hook raises
            self._entered = False
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name == "batch_norm":
            return self.norm(func, args, kwargs)
        kind = _KINDS.get(name)
        if kind is None:
            return func(*args, **kwargs)
        module = self.path[-1]
        self.counts[module, kind] += 1
        return self.see((module, kind, self.counts[module, kind]), name, func, args, kwargs)

    def see(self, key: _Key, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """A call that can have pairs."""
        raise NotImplementedError

    def norm(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A batch norm."""
        raise NotImplementedError


def _operands(kind: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[int, Any]:
    """The tensors that a call works on, in ONNX's order."""
    if kind == "concat":
        return dict(enumerate(args[0] if args else kwargs["tensors"]))
    count = 2 if kind in (*_WEIGHTED, "add") else 1
    names = ("input", "weight" if kind in _WEIGHTED else "other")
    found = {i: args[i] if i < len(args) else kwargs.get(names[i]) for i in range(count)}
    return {i: value for i, value in found.items() if isinstance(value, Tensor)}


class _Look(_Calls):
    """Notes every call's operands; nothing is quantised."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.calls: dict[_Key, _Call] = {}
        self._results: dict[int, tuple[Tensor, _Call]] = {}  # the tensors are kept, so that no id is used twice
        self.modules = dict(model.named_modules())

    def see(self, key: _Key, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        call = self.calls.setdefault(key, _Call(key))
        operands = _operands(key[1], args, kwargs)
        for index, value in operands.items():
            if value.is_floating_point() and value.numel():
                call.amax.setdefault(index, []).append(float(value.detach().abs().max()))
        if key[1] in _WEIGHTED and 1 in operands:
            call.weight = operands[1].detach()
            call.out_axis = 0 if key[1] == "conv" or name == "linear" else -1
        result = func(*args, **kwargs)
        if key[1] == "conv":
            self._results[id(result)] = (result, call)
        return result

    def norm(self, func: Any, args: Any, kwargs: Any) -> Any:
        source = self._results.get(id(args[0] if args else kwargs["input"]))
        if source is not None and isinstance(self.modules.get(self.path[-1]), _BatchNorm):
            source[1].norm = self.path[-1]
        return func(*args, **kwargs)


def _look(model: nn.Module, samples: Sequence[Mapping[str, Tensor]]) -> dict[_Key, _Call]:
    look = _Look(model)
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            for sample in samples:
                model(**sample)
    finally:
        look.close()
        for module, training in modes.items():
            module.training = training
    return look.calls


def _match(
    model: nn.Module, placement: Placement, calls: Mapping[_Key, _Call]
) -> tuple[dict[_Key, _Site], dict[str, str]]:
    """Sites by call; and the nodes that no call is, with the reason."""
    sites: dict[_Key, _Site] = {}
    lost: dict[str, str] = {}
    for node in placement.nodes:
        kind = OPERATORS.get(node.operator)
        if kind is None:
            lost[node.name] = f"{node.operator} has no counterpart that is followed"
            continue
        module, _, last = node.name.rpartition("/")
        number = int(last.rpartition("_")[2]) if last.rpartition("_")[2].isdigit() else 1
        free = [call for key, call in calls.items() if key[1] == kind and key not in sites]
        own = sorted((c for c in free if c.key[0] == module), key=lambda call: abs(call.key[2] - number))
        fitting = [site for call in own if (site := _fit(model, node, call, placement.grid)) is not None][:1]
        if not fitting:  # a function of the module's own code may bear a submodule's name, or the other way round
            fitting = [site for call in free if (site := _fit(model, node, call, placement.grid)) is not None]
        if len(fitting) == 1:
            sites[fitting[0][0]] = fitting[0][1]
        else:
            lost[node.name] = "no call of torch has its weights and magnitudes" if not fitting else "several calls fit"
    return sites, lost


def _fit(model: nn.Module, node: QuantisedNode, call: _Call, grid: Grid) -> tuple[_Key, _Site] | None:
    groups: dict[int, int] = {}
    for wanted in node.inputs:
        order = sorted(call.amax, key=lambda i: i != wanted.index)  # a sum may have its sides exchanged
        same = [i for i in order if i not in groups and _close(call.amax[i], wanted.amax)]
        if not same:
            return None
        groups[same[0]] = wanted.group
    if node.weight is None:
        return call.key, _Site(groups, weighted=False, axis=None, norm=None)
    if call.weight is None:
        return None
    axis = call.out_axis if node.per_channel else None
    for norm in dict.fromkeys((None, call.norm)):
        if _same_weight(model, call, norm, node):
            return call.key, _Site(groups, weighted=True, axis=axis, norm=norm)
    return None


def _close(found: Sequence[float], wanted: Any) -> bool:
    return len(found) == len(wanted) and bool(np.allclose(found, wanted, rtol=SAME_AMAX, atol=1e-6))


def _same_weight(model: nn.Module, call: _Call, norm: str | None, node: QuantisedNode) -> bool:
    assert call.weight is not None
    assert node.weight is not None
    weight = call.weight if norm is None else _folded(call.weight, None, _norm_at(model, norm))[0]
    found = weight.detach().cpu().numpy()
    if node.per_channel:
        found = np.moveaxis(found, call.out_axis, 0)
    scale = float(np.abs(node.weight).max(initial=0.0))
    return found.shape == node.weight.shape and bool(
        np.allclose(found, node.weight, rtol=SAME_WEIGHT, atol=SAME_WEIGHT * scale)
    )


def _norm_at(model: nn.Module, path: str) -> _BatchNorm:
    norm = model.get_submodule(path)
    assert isinstance(norm, _BatchNorm)
    return norm


def _folded(weight: Tensor, bias: Tensor | None, norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """A convolution's weights and bias with the batch norm behind it, by its running statistics."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor_O = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        factor_O = factor_O * norm.weight
    shift_O = (0 if bias is None else bias) - norm.running_mean
    offset_O = shift_O * factor_O
    if norm.bias is not None:
        offset_O = offset_O + norm.bias
    return weight * factor_O.reshape(-1, *[1] * (weight.dim() - 1)), offset_O


# --- quantised passes -------------------------------------------------------------------------------------------------


class _Quantised(_Calls):
    """Quantises operands at its sites, and folds norms."""

    def __init__(self, model: nn.Module, sites: Mapping[_Key, _Site], grid: Grid, learned: bool) -> None:
        super().__init__(model)
        self.model, self.sites, self.grid, self.learned = model, sites, grid, learned
        self.on = True
        self.folded = {site.norm for site in sites.values() if site.norm is not None}
        self._step_G = torch.empty(0)

    def _begin(self) -> None:
        steps = getattr(self.model, NAME)
        self._step_G = torch.exp2(steps).clamp_min(LEAST_STEP) if self.learned else steps
        super()._begin()

    def see(self, key: _Key, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        site = self.sites.get(key)
        if site is None:
            return func(*args, **kwargs)
        made = {i: fake_quantise(v, self._step_G[site.groups[i]], self.grid) for i, v in self._taken(key, args, kwargs)}
        original = args
        args, kwargs = _with_operands(key[1], args, kwargs, made)
        if name in _IN_PLACE and 0 in made:  # what it is called on changes, for whoever else has it
            return original[0].copy_(func(*args, **kwargs))
        if site.weighted:
            args, kwargs = self._with_weights(site, args, kwargs)
        return func(*args, **kwargs)

    def _taken(self, key: _Key, args: Any, kwargs: Any) -> list[tuple[int, Tensor]]:
        operands = _operands(key[1], args, kwargs)
        return [(i, operands[i]) for i in self.sites[key].groups if i in operands]

    def _with_weights(self, site: _Site, args: Any, kwargs: Any) -> tuple[Any, Any]:
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        if site.norm is not None:
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            weight, bias = _folded(weight, bias, _norm_at(self.model, site.norm))
            if len(args) > 2:
                args = (*args[:2], bias, *args[3:])
            else:
                kwargs = {**kwargs, "bias": bias}
        weight = fake_quantise(weight, weight_step(weight, self.grid, site.axis), self.grid)
        return ((args[0], weight, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "weight": weight})

    def norm(self, func: Any, args: Any, kwargs: Any) -> Any:
        if self.path[-1] in self.folded:
            return args[0] if args else kwargs["input"]
        return func(*args, **kwargs)


def _with_operands(kind: str, args: Any, kwargs: Any, made: Mapping[int, Tensor]) -> tuple[Any, Any]:
    if kind == "concat":
        parts = list(args[0] if args else kwargs["tensors"])
        for index, value in made.items():
            parts[index] = value
        return ((parts, *args[1:]), kwargs) if args else (args, {**kwargs, "tensors": parts})
    names = ("input", "weight" if kind in _WEIGHTED else "other")
    args, kwargs = list(args), dict(kwargs)
    for index, value in made.items():
        if index < len(args):
            args[index] = value
        else:
            kwargs[names[index]] = value
    return tuple(args), kwargs


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeQuantised:
    """A model while it is quantised.

    Attributes:
        followed: nodes of the file that the model computes as the file does.
        lost: those that it computes in floating point, with the reason.
    """

    model: nn.Module
    placement: Placement
    learned: bool
    followed: tuple[str, ...]
    lost: dict[str, str]

    def steps(self) -> dict[str, float]:
        """Tensor of the file -> its step, as the model has it now."""
        with torch.no_grad():
            step_G = getattr(self.model, NAME).detach().float().cpu()
            if self.learned:
                step_G = torch.exp2(step_G).clamp_min(LEAST_STEP)
        return {
            tensor: float(step) for group, step in zip(self.placement.groups, step_G, strict=True) for tensor in group
        }


@contextlib.contextmanager
def fake_quantised(
    model: nn.Module, placement: Placement, samples: Sequence[Mapping[str, Tensor]], *, learn: bool = False
) -> Iterator[FakeQuantised]:
    """The model quantised as a file is, inside; afterwards it is what it was, but for what was trained.

    Inside it has one parameter more (`fusepress_steps`, logarithms to base 2) where steps are learned, else a buffer.
    Activation checkpointing is off inside, for what is computed again in a backward pass would not be quantised.

    Args:
        model: the one that the file was exported from, in float32.
        placement: the file's pairs.
        samples: the inputs of the samples that the placement's magnitudes were measured on, each with batch 1.
        learn: the steps of activations are trained, too; those of weights follow the weights.
    """
    device = next(iter(model.parameters())).device
    on_device = [{name: value.to(device) for name, value in sample.items()} for sample in samples]
    sites, lost = _match(model, placement, _look(model, on_device))
    step_G = torch.from_numpy(np.asarray(placement.steps, np.float32).copy()).to(device)
    if learn:
        model.register_parameter(NAME, nn.Parameter(torch.log2(step_G)))
    else:
        model.register_buffer(NAME, step_G)
    calls = _Quantised(model, sites, placement.grid, learn)
    names = tuple(node.name for node in placement.nodes if node.name not in lost)
    try:
        with without_recomputation():
            yield FakeQuantised(model=model, placement=placement, learned=learn, followed=names, lost=lost)
    finally:
        calls.close()
        delattr(model, NAME)
