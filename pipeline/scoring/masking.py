"""Modality masking: a branch whose output is zero, and a model that always comes back bit-identical.

AlterMOMA masks a backbone by zeroing all its parameters. Where that yields a zero feature map (every layer ends in
parameters, norm affines included), zeroing the branch's output right before the fusion is the same function and needs
no surgery; `masking_equals_zeroing` says whether it is so for a given branch.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fusepress.pipeline.errors import TaskError
from fusepress.pipeline.graph.plan import FUSION

CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # have no forward of their own: their children are called


def branch_of_parameters(model: nn.Module, branches: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """The branch that every parameter belongs to: a modality, or "fusion".

    A parameter that is tied across branches belongs to the fusion, because no single modality owns it.

    Args:
        model: the whole network.
        branches: modality -> module paths.

    Returns:
        Parameter name -> branch, in the order of `model.named_parameters()`.

    Raises:
        TaskError: a path names no module, two branches overlap, or a modality is called "fusion".
    """
    check_branches(model, branches)
    owners: dict[nn.Parameter, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter, set()).add(_branch_of_name(name, branches))
    return {
        name: next(iter(owners[parameter])) if len(owners[parameter]) == 1 else FUSION
        for name, parameter in model.named_parameters()
    }


def check_branches(model: nn.Module, branches: Mapping[str, Sequence[str]]) -> None:
    """Check that branches name modules of the model and do not contain each other.

    Raises:
        TaskError: with the path at fault.
    """
    if FUSION in branches:
        raise TaskError(
            f"expected modalities other than {FUSION!r}, which means all that is in no branch; got {list(branches)} "
            "at branches; rename the modality"
        )
    names = {name for name, _ in model.named_modules(remove_duplicate=False)}
    for modality, paths in branches.items():
        for path in paths:
            if path not in names:
                raise TaskError(
                    f"expected branches[{modality!r}] to name a module of the model; got {path!r}; the model's top "
                    f"modules are {[name for name, _ in model.named_children()]}"
                )
    flat = [(modality, path) for modality, paths in branches.items() for path in paths]
    for modality, path in flat:
        for other, inner in flat:
            if modality != other and _lies_in(inner, path):
                raise TaskError(
                    f"expected the branches to be apart; got {inner!r} of {other!r} inside {path!r} of {modality!r} "
                    "at branches; list only the modules of one modality up to the fusion input"
                )


def _lies_in(name: str, path: str) -> bool:
    return name == path or path == "" or name.startswith(f"{path}.")


def _branch_of_name(name: str, branches: Mapping[str, Sequence[str]]) -> str:
    for modality, paths in branches.items():
        if any(_lies_in(name, path) for path in paths):
            return modality
    return FUSION


def zeros_like_output(output: Any, *, where: str = "the branch") -> Any:
    """A module's output with every floating-point tensor replaced by zeros; indices and masks stay.

    Zeros are made fresh, not multiplied in: 0 * NaN would keep a NaN, and a product would keep the gradient path.

    Args:
        output: a tensor, or a tuple, list, named tuple, mapping or dataclass of them, nested at will, or an object
            with `features` and `replace_feature` (sparse convolution tensors).
        where: for the error message.

    Raises:
        TaskError: the output is of another kind.
    """
    return _changed(output, torch.zeros_like, where)


def shuffled_output(output: Any, *, where: str = "the branch") -> Any:
    """A module's output with the samples of the batch exchanged: real features, of the wrong sample.

    Every sample moves on by half the batch, so that none keeps its own (from two samples on). Indices stay.

    Args:
        output: as for `zeros_like_output`, but no sparse tensors, whose first dimension is no sample.
        where: for the error message.

    Raises:
        TaskError: the output is of another kind.
    """
    if hasattr(output, "replace_feature"):
        raise TaskError(
            f"expected {where} to return dense tensors with the batch first; got {type(output).__name__}, whose rows "
            "are not samples; use score.reactivation: masked"
        )
    return _changed(output, lambda tensor: tensor.roll(max(1, len(tensor) // 2), 0), where)


Change = Callable[[Tensor], Tensor]


def _changed(output: Any, change: Change, where: str) -> Any:
    """A module's output with every floating-point tensor changed, in the same nesting."""
    if isinstance(output, Tensor):
        return change(output) if output.is_floating_point() or output.is_complex() else output
    if output is None or isinstance(output, (bool, int, float, str, torch.Size)):
        return output
    if isinstance(output, Mapping):
        items = {key: _changed(value, change, where) for key, value in output.items()}
        kind: Any = type(output)
        # an ordered dict that is a dataclass is built from keywords only
        return kind(**items) if dataclasses.is_dataclass(output) else kind(items)
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*(_changed(value, change, where) for value in output))
    if isinstance(output, (tuple, list)):
        return type(output)(_changed(value, change, where) for value in output)
    if hasattr(output, "replace_feature") and isinstance(getattr(output, "features", None), Tensor):
        return output.replace_feature(change(output.features))
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        names = [item.name for item in dataclasses.fields(output) if item.init]
        return dataclasses.replace(output, **{name: _changed(getattr(output, name), change, where) for name in names})
    raise TaskError(
        f"expected {where} to return tensors, or tuples, lists, dicts or dataclasses of them; got "
        f"{type(output).__name__}; name modules in `branches` that return tensors, or score with another method"
    )


@contextmanager
def masked(
    model: nn.Module, paths: Sequence[str], modality: str, change: Callable[..., Any] = zeros_like_output
) -> Iterator[None]:
    """Mask a modality: inside the context every module of its branch returns zeros.

    The last of the listed modules feeds the fusion, so the fusion sees zeros whatever the earlier ones return.

    Args:
        model: the whole network.
        paths: the modality's module paths.
        modality: its name, for messages.
        change: what happens to the outputs instead, e.g. `shuffled_output`; takes the output and `where`.

    Raises:
        TaskError: a forward pass never called any of the modules, so that nothing was masked.
    """
    called: list[str] = []

    def changing(path: str) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            called.append(path)
            return change(output, where=f"branch {modality!r} ({path})")

        return hook

    def check(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        if not called:
            raise TaskError(
                f"expected the forward pass to call a module of branches[{modality!r}]; got no call of {list(paths)}; "
                "list the modules that forward() calls itself, e.g. 'camera.body' where it calls model.camera.body(x)"
            )
        called.clear()

    handles = [module.register_forward_hook(changing(path)) for path, module in _called_modules(model, paths)]
    handles.append(model.register_forward_hook(check))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _called_modules(model: nn.Module, paths: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """The modules at the paths; a container stands for its children, because nobody calls a container."""
    found: list[tuple[str, nn.Module]] = []
    pending = [(path, model.get_submodule(path)) for path in reversed(paths)]
    while pending:
        path, module = pending.pop()
        if isinstance(module, CONTAINERS):
            pending.extend((f"{path}.{name}", child) for name, child in module.named_children())
        else:
            found.append((path, module))
    return found


def check_masked_gradients(model: nn.Module, branch_of: Mapping[str, str], modality: str) -> None:
    """Check after a backward pass that nothing of the masked branch reached the loss.

    Raises:
        TaskError: a parameter of the branch has a gradient other than zero.
    """
    for name, parameter in model.named_parameters():
        if branch_of[name] == modality and parameter.grad is not None and bool(parameter.grad.any()):
            raise TaskError(
                f"expected masking {modality!r} to cut its branch off from the loss; got a gradient at {name}; add to "
                f"branches[{modality!r}] the module through which it reaches the fusion"
            )


@torch.no_grad()
def masking_equals_zeroing(
    model: nn.Module, inputs: Mapping[str, Tensor], branches: Mapping[str, Sequence[str]], modality: str
) -> bool:
    """Whether zeroing a branch's output gives bit for bit what zeroing all its parameters gives.

    It does where zero parameters make a zero feature map. It does not behind a sigmoid, a skip from the input, or a
    division by the feature's own norm; there the masked output is what the method means: the modality says nothing.

    Args:
        model: the whole network, in the mode in which it is to be compared; left as it was.
        inputs: named inputs of one batch.
        branches: modality -> module paths.
        modality: the one to mask.
    """
    branch_of = branch_of_parameters(model, branches)
    with masked(model, branches[modality], modality):
        expected = _tensors(model(**inputs))
    own = [parameter for name, parameter in model.named_parameters() if branch_of[name] == modality]
    kept = [parameter.detach().clone() for parameter in own]
    try:
        for parameter in own:
            parameter.zero_()
        found = _tensors(model(**inputs))
    finally:
        for parameter, value in zip(own, kept, strict=True):
            parameter.copy_(value)
    return len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def _tensors(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    return [tensor for value in values for tensor in _tensors(value)]


class Snapshot:
    """Everything of a model that scoring may disturb: one copy of its parameters and buffers, and its flags.

    Args:
        model: whose.
        keep_values: whether parameters are copied. A method that does not change them needs no copy, only their
            checksums, which tell at the end whether the user's own code did.
        copy: makes the copies, on any device.

    Attributes:
        initial: parameter -> its value when the snapshot was taken (theta_init); if not `keep_values`, of those only
            that may change at the moment (`changing`).
    """

    def __init__(
        self, model: nn.Module, *, keep_values: bool = True, copy: Callable[[Tensor], Tensor] = Tensor.clone
    ) -> None:
        names = {parameter: name for name, parameter in model.named_parameters()}
        self.initial: dict[nn.Parameter, Tensor] = {p: copy(p.detach()) for p in names} if keep_values else {}
        self._checksums = {} if keep_values else {p: (name, _checksum(p)) for p, name in names.items()}
        self._gradients = {p: p.grad for p in names}
        self._trainable = {p: p.requires_grad for p in names}
        self._modes = {module: module.training for module in model.modules()}
        self._buffers = [
            (module, name, buffer, buffer.detach().clone())
            for module in model.modules()
            for name, buffer in module.named_buffers(recurse=False)
        ]

    @property
    def trainable(self) -> set[nn.Parameter]:
        """Parameters that had `requires_grad` when the snapshot was taken."""
        return {parameter for parameter, flag in self._trainable.items() if flag}

    @torch.no_grad()
    def restore_values(self) -> None:
        """Set parameters (where they were kept) and buffers back, bit for bit."""
        for parameter, value in self.initial.items():
            parameter.copy_(value)
        for module, name, buffer, value in self._buffers:
            buffer.copy_(value)
            if getattr(module, name) is not buffer:  # a module may have put another tensor in its place
                setattr(module, name, buffer)

    @contextmanager
    def changing(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """A context in which the given parameters may change; their copies live no longer than it.

        At its end the values (and all buffers) are set back. What is kept anyway is not copied again.
        """
        fresh = {p: p.detach().clone() for p in parameters if p not in self.initial}
        self.initial.update(fresh)
        try:
            yield
        finally:
            self.restore_values()
            for parameter in fresh:
                del self.initial[parameter]

    def restore(self) -> None:
        """Set everything back: values, training modes, `requires_grad` and gradients."""
        self.restore_values()
        for module, mode in self._modes.items():
            module.training = mode
        for parameter, flag in self._trainable.items():
            parameter.requires_grad_(flag)
            parameter.grad = self._gradients[parameter]

    def check_values(self) -> None:
        """Check that parameters which were not kept have their values still.

        Raises:
            TaskError: with the parameters that changed.
        """
        changed = [name for parameter, (name, before) in self._checksums.items() if _checksum(parameter) != before]
        if changed:
            raise TaskError(
                f"expected forward() and losses() to leave the parameters as they are; got other values at "
                f"{changed[:3]} ({len(changed)} in all) after the scoring; compute with a changed copy of a weight "
                "instead of writing into it"
            )


def _checksum(tensor: Tensor) -> int:
    """Of the bytes. Version counters would be cheaper, but they do not see what is written through `.data`."""
    return zlib.crc32(tensor.detach().reshape(-1).view(torch.uint8).cpu().numpy().data)


@contextmanager
def untouched(
    model: nn.Module, *, seed: int = 0, keep_values: bool = True, copy: Callable[[Tensor], Tensor] = Tensor.clone
) -> Iterator[Snapshot]:
    """A context after which the model, and torch's random state, are bit-identical, whatever happened inside.

    Inside, the model is in evaluation mode (running statistics frozen, no dropout), every floating-point parameter
    takes gradients, gradients are recorded, and torch's generators start from `seed`.

    Args:
        model: whose.
        seed: of torch's generators.
        keep_values: whether the body may change any parameter at any time, which takes a copy of them all.
        copy: makes these copies.

    Raises:
        TaskError: parameters changed although they were not kept.
    """
    snapshot = Snapshot(model, keep_values=keep_values, copy=copy)
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        torch.manual_seed(seed)
        try:
            model.eval()
            for parameter in model.parameters():
                parameter.grad = None
                parameter.requires_grad_(parameter.is_floating_point())
            yield snapshot
        finally:
            snapshot.restore()
    snapshot.check_values()
