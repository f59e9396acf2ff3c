"""Reconstruction: every layer of the pruned model learns, in closed form, what the dense model's layer says.

After channels are gone, a layer's inputs lack what they carried, and some of it can be told from those that are left.
Layer by layer from front to back, least squares finds the weights with which the layer, on the inputs that the pruned
and already reconstructed layers before it make, comes nearest to the outputs of the dense model's layer (those of its
channels that were kept). That is feature distillation without gradient steps and without labels (He et al., ICCV 2017;
ThiNet, Luo et al., ICCV 2017; here for whole coupled groups, with the inputs of the pruned model).

Batch norms go back to the dense model's statistics first: the outputs they follow are fitted to be the dense ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fusepress.pipeline.graph.activations import Inputs, Layer, called_layers
from fusepress.pipeline.graph.apply import apply_plan, removed_indices
from fusepress.pipeline.graph.plan import PrunePlan
from fusepress.pipeline.graph.regression import fit_layer, moments_with
from fusepress.pipeline.recovery import rng
from fusepress.pipeline.recovery.placement import lent, on_device, placed, training_device
from fusepress.pipeline.task import LoadedTask

DAMPING = 1e-3
Progress = Callable[[float, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """One layer's outputs against the dense model's: squared error over their variance.

    Attributes:
        layer: its module path.
        before: with the weights that pruning left.
        after: with those of least squares; on the same data, which it was fitted to.
    """

    layer: str
    before: float
    after: float


def reconstruct(
    student: nn.Module,
    dense: nn.Module,
    plan: PrunePlan,
    task: LoadedTask,
    samples: int,
    seed: int,
    *,
    damping: float = DAMPING,
    progress: Progress = lambda _fraction, _text: None,
) -> list[Fitted]:
    """Fit the layers of a pruned model to the dense model's, in place.

    Convolutions (not transposed) and linear layers that own their weight alone are fitted, on training inputs; their
    labels are not used. Attention's packed projections and everything else stay as they are.

    Args:
        student: what `apply_plan` made of the dense model; on return in evaluation mode.
        dense: not changed.
        plan: which channels are left.
        task: whose `train` split is read.
        samples: how many samples, rounded up to whole batches.
        seed: of the split.
        damping: towards the weights that there are, in mean diagonal entries of the inputs' second moment.
        progress: called with the fraction done and a text.

    Returns:
        The layers in their order.

    Raises:
        StageError: features are not finite, or the models' layers see different positions.
    """
    home = next(iter(student.parameters())).device
    device = training_device(home)
    with placed(student, device, home), lent(dense, device), rng.scope(seed, device):
        student.eval()
        _take_statistics(student, dense, plan)
        batches = list(_inputs(task, samples, seed, device))
        layers = list(_fittable(student, dense, batches[0]))
        removed = removed_indices(plan)
        fitted = []
        for number, (path, layer) in enumerate(layers):
            progress(number / len(layers), f"reconstruct {path}")
            target = dense.get_submodule(path)
            rows = _kept(target, removed.get((layer.param, 0), []))
            moments = moments_with(student, layer, dense, target, rows, batches)
            before, after = fit_layer(student.get_submodule(path), moments, damping, path)
            fitted.append(Fitted(layer=path, before=before, after=after))
    return fitted


def _take_statistics(student: nn.Module, dense: nn.Module, plan: PrunePlan) -> None:
    fresh = apply_plan(copy.deepcopy(dense), plan)
    with torch.no_grad():
        for own, other in zip(student.buffers(), fresh.buffers(), strict=True):
            own.copy_(other)


def _inputs(task: LoadedTask, samples: int, seed: int, device: torch.device) -> Iterator[Inputs]:
    source = task.train_batches(seed)
    found = 0
    for index in range(samples):
        if found >= samples:
            return
        batch = on_device(rng.draw(source, seed, index), device)
        found += batch.size
        yield batch.inputs


def _fittable(student: nn.Module, dense: nn.Module, inputs: Inputs) -> Iterator[tuple[str, Layer]]:
    """Module path and layer, in the order of their first call; both models must call it alike."""
    paths = {module: path for path, module in student.named_modules()}
    names = [
        f"{path}.weight"
        for module, path in paths.items()
        if isinstance(module, _ConvNd | nn.Linear) and not isinstance(module, _ConvTransposeNd)
    ]
    first = {parameter: name for name, parameter in student.named_parameters()}
    names = [name for name in names if name in first.values()]
    calls = {name: layer.calls for name, layer in called_layers(dense, inputs, names).items()}
    for name, layer in called_layers(student, inputs, names).items():
        alone = len(layer.modules) == 1 and layer.modules[0][1] == "weight"
        if alone and calls.get(name) == layer.calls:
            yield paths[layer.modules[0][0]], layer


def _kept(target: nn.Module, removed: Sequence[int]) -> Tensor:
    weight = target.weight
    assert isinstance(weight, Tensor)
    mask = torch.ones(weight.shape[0], dtype=torch.bool, device=weight.device)
    mask[list(removed)] = False
    return mask.nonzero().flatten()


__all__ = ["Fitted", "reconstruct"]
