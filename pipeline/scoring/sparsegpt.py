"""SparseGPT: which weights go, and how those that stay make up for them (Frantar and Alistarh, arXiv 2301.00774).

A layer's output changes by tr((W - W') H (W - W')^T) with H = X X^T of its inputs. Columns are gone through from left
to right; with U the upper Cholesky factor of H^-1 (H^-1 = U^T U) and the weights as they are by then,

    saliency of column j: w_j^2 / U_jj^2,    a weight that goes: e_j = w_j / U_jj,  w_i -= e_j U_ji for all i > j,

which is the optimal brain surgeon's step for columns that may still change (equations 3 and 5 of the paper). Two
things that public implementations get wrong for convolutions are kept here: the groups of a 2:4 pattern run over input
channels at a fixed kernel position (columns are ordered that way, see `activations`), and the update is applied. As a
column can only make up for those to its left, a few steps of conjugate gradients then bring the kept weights to the
least-squares solution of their mask, from both sides.

Layers are treated from front to back, each on inputs that the sparse layers before it made, and one Hessian is held at
a time: K^2 * 8 bytes for K = input channels * kernel positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fusepress.pipeline.errors import StageError
from fusepress.pipeline.graph.activations import (
    Inputs,
    Layer,
    called_layers,
    matrices,
    second_moments,
    weight_of,
)
from fusepress.pipeline.graph.masks import GROUP, keep_values, top_2to4
from fusepress.pipeline.scoring.altermoma import weight_masks
from fusepress.pipeline.scoring.unstructured import shared

BLOCK = 128  # columns that are finished before the columns to their right are updated; also the unstructured window
DAMPING = 0.01  # of the mean diagonal entry of H
REFINE_STEPS = 16  # of conjugate gradients, each as dear as the whole sweep
Progress = Callable[[float, str], None]
Choose = Callable[[Tensor, int], Tensor]  # saliency_GRB of a window, its first column -> mask_GRB (True = kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerResult:
    """How one layer's outputs changed on the calibration inputs, ||W X - W' X||^2 / ||W X||^2.

    Attributes:
        param: its weight.
        error: with the chosen mask and the update.
        error_without_update: with the chosen mask alone.
        error_magnitude: with the mask that magnitude would choose.
        note: why the layer was treated otherwise (then the errors are None).
    """

    param: str
    error: float | None = None
    error_without_update: float | None = None
    error_magnitude: float | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def prune_with_hessian(
    weight_GRK: Tensor,
    hessian_GKK: Tensor,
    *,
    sparsity: float | None = None,
    mask_GRK: Tensor | None = None,
    damping: float = DAMPING,
    block: int = BLOCK,
    refine_steps: int = REFINE_STEPS,
) -> tuple[Tensor, Tensor]:
    """Remove weights of a layer so that its output changes little.

    Args:
        weight_GRK: G independent groups of R rows (outputs) and K columns (inputs).
        hessian_GKK: X X^T of each group's inputs, up to a factor.
        sparsity: removed fraction, the lowest saliencies of every window of `block` columns; None: 2:4, groups of four
            consecutive columns.
        mask_GRK: a mask that is given (True = kept); then only the update is computed.
        damping: added to the diagonal, times its mean.
        block: columns.
        refine_steps: of conjugate gradients for the kept weights; 0 leaves the paper's update.

    Returns:
        The new weights in float64, exactly zero where removed, and the mask. No row is worse than its mask without the
        update, as H measures it.

    Raises:
        StageError: the Hessian is not finite.
    """
    if not bool(hessian_GKK.isfinite().all()):
        raise StageError(
            "expected a finite Hessian; got NaN or infinity at the inputs of a layer; check the calib split and the "
            "checkpoint for NaN"
        )
    old = weight_GRK.detach().to(torch.float64)
    damped, upper = _inverse_factor(hessian_GKK.to(torch.float64), damping)
    choose, window = _rule(old, sparsity, mask_GRK, block)
    new, mask = _sweep(old.clone(), upper, choose, window, block)
    new = _refined(old, new, mask, damped, refine_steps)
    plain = torch.where(mask, old, 0.0)
    worse = row_errors(old - new, hessian_GKK) > row_errors(old - plain, hessian_GKK)
    return torch.where(worse.unsqueeze(-1), plain, new), mask


def row_errors(difference_GRK: Tensor, hessian_GKK: Tensor) -> Tensor:
    """Squared change of every output, d H d^T, as e_GR."""
    d = difference_GRK.to(torch.float64)
    return ((d @ hessian_GKK.to(torch.float64)) * d).sum(-1)


def _inverse_factor(hessian_GKK: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """H + damping * mean diagonal, and U_GKK, upper, with its inverse = U^T U; more damping where it has none."""
    diagonal = hessian_GKK.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1)
    scale = torch.where(mean > 0, mean, torch.ones_like(mean))  # no input at all: the identity, which is magnitude
    eye = torch.eye(hessian_GKK.shape[1], dtype=torch.float64, device=hessian_GKK.device)
    for _ in range(8):
        damped = hessian_GKK + (damping * scale)[:, None, None] * eye
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed.any()):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not bool(failed.any()):
                return damped, upper
        damping = max(10 * damping, 1e-8)
    raise StageError(
        "expected a Hessian that can be inverted; got one that is not, even damped, at the inputs of a layer; give "
        "more calibration samples (sparsify.samples), or choose by magnitude"
    )


def _rule(old: Tensor, sparsity: float | None, given: Tensor | None, block: int) -> tuple[Choose, int]:
    """How a window of columns is decided, and its width."""
    columns = old.shape[-1]
    if given is not None:
        return lambda saliency, first: given[..., first : first + saliency.shape[-1]], block
    if sparsity is None:
        if columns % GROUP:
            raise StageError(f"expected a multiple of {GROUP} columns for 2:4; got {columns}; leave the layer dense")
        return lambda saliency, _: top_2to4(saliency.flatten(0, 1)).view_as(saliency), GROUP
    rows = old.shape[0] * old.shape[1]
    sizes = [rows * min(block, columns - first) for first in range(0, columns, block)]
    counts = shared(round(sparsity * old.numel()), sizes)

    def lowest(saliency: Tensor, first: int) -> Tensor:
        return weight_masks({"": saliency}, counts[first // block] / saliency.numel())[""]

    return lowest, block


def _sweep(w: Tensor, upper: Tensor, choose: Choose, window: int, block: int) -> tuple[Tensor, Tensor]:
    """The columns from left to right; what a block removes is made up for in the block at once, beyond it at its end.

    Args:
        w: w_GRK, changed in place.
        upper: U_GKK.
        choose: decides a window of columns.
        window: its width; divides `block`.
        block: columns.
    """
    columns = w.shape[-1]
    mask = torch.ones_like(w, dtype=torch.bool)
    pivot = upper.diagonal(dim1=1, dim2=2).unsqueeze(1)  # U_jj as [G, 1, K]
    for first in range(0, columns, block):
        end = min(first + block, columns)
        errors = torch.zeros_like(w[..., first:end])
        for j in range(first, end):
            if (j - first) % window == 0:
                stop = min(j + window, end)
                saliency = (w[..., j:stop] / pivot[..., j:stop]).square()
                mask[..., j:stop] = choose(saliency, j)
            gone = ~mask[..., j]
            error = torch.where(gone, w[..., j] / pivot[..., j], 0.0)
            w[..., j + 1 : end] -= error.unsqueeze(-1) * upper[:, j : j + 1, j + 1 : end]
            w[..., j].masked_fill_(gone, 0.0)
            errors[..., j - first] = error
        w[..., end:] -= errors @ upper[:, first:end, end:]
    return w, mask


def _refined(old: Tensor, new: Tensor, mask: Tensor, hessian_GKK: Tensor, steps: int) -> Tensor:
    """Kept weights nearer to min tr((W - W') H (W - W')^T) over their mask, all rows at once, each with its own step.

    Preconditioned conjugate gradients (Jacobi); the error falls in every step, and K steps reach the minimum.
    """
    scale = hessian_GKK.diagonal(dim1=1, dim2=2).unsqueeze(1)
    residual = torch.where(mask, (old - new) @ hessian_GKK, 0.0)
    towards = z = residual / scale
    strength = (residual * z).sum(-1, keepdim=True)
    floor = 1e-24 * ((old @ hessian_GKK) * old).sum(-1, keepdim=True)
    for _ in range(steps):
        going = strength > floor  # a row that is there stays there
        if not bool(going.any()):
            break
        image = torch.where(mask, towards @ hessian_GKK, 0.0)
        step = torch.where(going, strength / (towards * image).sum(-1, keepdim=True), 0.0)
        new = new + step * towards
        residual = residual - step * image
        z = residual / scale
        before, strength = strength, (residual * z).sum(-1, keepdim=True)
        towards = z + torch.where(going, strength / before, 0.0) * towards
    return new


def sparsify_by_sparsegpt(
    model: nn.Module,
    batches: Sequence[Inputs],
    wanted: Mapping[str, float | None],
    *,
    progress: Progress = lambda _fraction, _text: None,
) -> tuple[dict[str, Tensor], list[LayerResult]]:
    """Prune layers one after the other on calibration inputs; their weights are changed in place.

    Args:
        model: in evaluation mode.
        batches: calibration inputs by name.
        wanted: parameter name -> removed fraction, or None for 2:4.
        progress: called with the fraction done and a text.

    Returns:
        Bool masks by parameter name (True = kept), and how each layer did. A weight that no forward pass uses through
        its own module (and a transposed convolution) is chosen by magnitude, and the note says so.

    Raises:
        StageError: the inputs of a layer are not finite.
        CheckpointError: a weight is not finite.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    keep_values({name: parameters[name] for name in wanted})  # all weights finite
    layers = called_layers(model, batches[0], list(wanted)) if batches else {}
    masks: dict[str, Tensor] = {}
    results: list[LayerResult] = []
    for number, (name, layer) in enumerate(layers.items()):
        progress(number / len(layers), f"SparseGPT: {name}")
        masks[name], result = _treat(model, batches, layer, parameters[name], wanted[name])
        results.append(result)
    for name, sparsity in wanted.items():
        if name not in layers:
            masks[name] = _by_magnitude(parameters[name].detach(), sparsity)
            with torch.no_grad():
                parameters[name].masked_fill_(~masks[name], 0.0)
            note = "by magnitude: the forward pass does not call a layer of this weight that has a Hessian"
            results.append(LayerResult(param=name, note=note))
    return {name: masks[name] for name in wanted}, results


def _treat(
    model: nn.Module, batches: Sequence[Inputs], layer: Layer, parameter: nn.Parameter, sparsity: float | None
) -> tuple[Tensor, LayerResult]:
    hessians = second_moments(model, batches, layer)
    module = layer.modules[0][0]
    groups, parts = module.groups if isinstance(module, _ConvNd) else 1, len(hessians)
    start = parameter.detach().to(torch.float64)
    old = matrices(start, groups, parts)
    done = [prune_with_hessian(w, h, sparsity=sparsity) for w, h in zip(old, hessians, strict=True)]
    new, mask = (weight_of(part, start) for part in zip(*done, strict=True))
    with torch.no_grad():
        parameter.copy_(new)

    def error(weight: Tensor) -> float:
        apart = matrices(start - weight, groups, parts)
        return sum(float(row_errors(d, h).sum()) for d, h in zip(apart, hessians, strict=True))

    whole = error(torch.zeros_like(start)) or 1.0
    return mask, LayerResult(
        param=layer.param,
        error=error(new) / whole,
        error_without_update=error(torch.where(mask, start, 0.0)) / whole,
        error_magnitude=error(torch.where(_by_magnitude(start, sparsity), start, 0.0)) / whole,
    )


def _by_magnitude(weight: Tensor, sparsity: float | None) -> Tensor:
    value = weight.abs()
    return top_2to4(value) if sparsity is None else weight_masks({"": value}, sparsity)[""]


__all__ = ["LayerResult", "prune_with_hessian", "row_errors", "sparsify_by_sparsegpt"]
