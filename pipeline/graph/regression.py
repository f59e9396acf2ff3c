"""A layer fitted to the outputs of a layer of another model, by least squares on the inputs that it has.

With x the layer's inputs at one position and y the outputs that are wanted there, both over all positions of the
calibration data, W and b minimise E |W x + b - y|^2 + d |W - W0|^2, where W0 is what the layer has and the damping d
keeps weights that the data says nothing about where they are:

    W = W0 + (C - W0 G) (G + d I)^-1,    G = E x x^T,  C = E y x^T

of centred x and y where there is a bias, which then is E y - W E x.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fusepress.pipeline.errors import StageError
from fusepress.pipeline.graph.activations import Inputs, Layer, Seen, columns_of, hooked, matrices, weight_of


@dataclass(slots=True, kw_only=True)
class Moments:
    """Means over positions, in float64, of a layer's inputs x and of wanted outputs y; G groups, R outputs, K inputs.

    Attributes:
        xx: of x x^T, (G, K, K).
        yx: of y x^T, (G, R, K).
        x: of x, (G, K).
        y: of y, (G, R).
        yy: of y squared, (G, R).
        positions: how many there were.
    """

    xx: Tensor
    yx: Tensor
    x: Tensor
    y: Tensor
    yy: Tensor
    positions: int = 0

    @classmethod
    def zeros(cls, groups: int, outputs: int, inputs: int, device: torch.device) -> Moments:
        """Before the first position."""

        def zero(*shape: int) -> Tensor:
            return torch.zeros(groups, *shape, dtype=torch.float64, device=device)

        return cls(
            xx=zero(inputs, inputs),
            yx=zero(outputs, inputs),
            x=zero(inputs),
            y=zero(outputs),
            yy=zero(outputs),
        )

    def add(self, x_PGK: Tensor, y_PGR: Tensor) -> None:
        """Add positions to the means, which are sums until `finish`."""
        # before any product: what centring takes off may be far larger than what it leaves
        x, y = x_PGK.to(torch.float64).transpose(0, 1), y_PGR.to(torch.float64).transpose(0, 1)
        self.xx += x.mT @ x
        self.yx += y.mT @ x
        self.x += x.sum(1)
        self.y += y.sum(1)
        self.yy += y.square().sum(1)
        self.positions += len(x_PGK)

    def finish(self) -> Moments:
        """Make means of the sums."""
        for total in (self.xx, self.yx, self.x, self.y, self.yy):
            total /= max(1, self.positions)
        return self


def moments_with(
    model: nn.Module, layer: Layer, wanted: nn.Module, target: nn.Module, rows: Tensor, batches: Sequence[Inputs]
) -> Moments:
    """The moments of a layer's inputs with what a layer of another model makes of the same data.

    Args:
        model: in evaluation mode.
        layer: of it, of `called_layers`: a convolution or a linear layer that owns its weight alone.
        wanted: the other model, in evaluation mode.
        target: its layer, called as often.
        rows: which of the target's output channels are wanted, in the order of the layer's.
        batches: calibration inputs by name.

    Raises:
        StageError: the two layers see different positions.
    """
    ((module, _),) = layer.modules
    assert isinstance(module, _ConvNd | nn.Linear)
    groups = module.groups if isinstance(module, _ConvNd) else 1
    weight = module.weight
    found = Moments.zeros(groups, weight.shape[0] // groups, weight[0].numel(), weight.device)
    outputs: list[Tensor] = []
    seen = 0

    def keep(_module: nn.Module, _args: Any, output: Tensor) -> None:
        outputs.append(_output_rows(module, output.detach(), rows, groups))
        if len(outputs) == layer.calls:
            raise Seen

    def note(_module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal seen
        begin, y_PGR = 0, outputs[seen]
        for x_PGK in columns_of(module, "weight", args, kwargs)[0]:
            end = begin + len(x_PGK)
            if end <= len(y_PGR):
                found.add(x_PGK.detach(), y_PGR[begin:end])
            begin = end
        if begin != len(y_PGR):
            raise StageError(
                f"expected {layer.param} to be used at the {len(y_PGR)} positions that the dense model uses it at; got "
                f"{begin}; set finetune.reconstruct: 0 for a model whose shapes depend on its features"
            )
        seen += 1
        if seen == layer.calls:
            raise Seen

    handle = target.register_forward_hook(keep)
    try:
        with hooked({module}, note):
            for batch in batches:
                outputs.clear()
                seen = 0
                for network in (wanted, model):
                    with contextlib.suppress(Seen):
                        network(**batch)
    finally:
        handle.remove()
    return found.finish()


def _output_rows(module: nn.Module, output: Tensor, rows: Tensor, groups: int) -> Tensor:
    """Outputs as y_PGR, in the order of positions that the inputs have."""
    if not isinstance(module, _ConvNd):
        return output[..., rows].reshape(-1, 1, len(rows))
    dims = len(module.kernel_size)
    whole = output.unsqueeze(0) if output.ndim == dims + 1 else output
    return whole[:, rows].movedim(1, -1).reshape(-1, groups, len(rows) // groups)


def fit_layer(module: nn.Module, moments: Moments, damping: float, name: str = "a layer") -> tuple[float, float]:
    """Give a layer the weights (and bias) of least squares, in place; one that saw no position stays as it is.

    Args:
        module: a convolution or a linear layer.
        moments: of its inputs with the wanted outputs.
        damping: d, in mean diagonal entries of G.
        name: for messages.

    Returns:
        E |W x + b - y|^2 over the variance of y (over E y^2 without a bias), before and after.

    Raises:
        StageError: the moments are not finite.
    """
    assert isinstance(module, _ConvNd | nn.Linear)
    if not bool(moments.xx.isfinite().all() and moments.yx.isfinite().all()):
        raise StageError(
            f"expected finite features to reconstruct from; got NaN or infinity at the inputs or outputs of {name}; "
            "check the training data and the checkpoint for NaN"
        )
    if moments.positions == 0:
        return 0.0, 0.0
    groups = module.groups if isinstance(module, _ConvNd) else 1
    start = module.weight.detach().to(torch.float64)
    (old_GRK,) = matrices(start, groups)
    xx, yx, yy = moments.xx, moments.yx, moments.yy
    if module.bias is not None:
        x_GK, y_GR = moments.x, moments.y
        xx = xx - x_GK.unsqueeze(2) * x_GK.unsqueeze(1)
        yx = yx - y_GR.unsqueeze(2) * x_GK.unsqueeze(1)
        yy = yy - y_GR.square()
    mean = xx.diagonal(dim1=1, dim2=2).mean(1)
    scale = torch.where(mean > 0, damping * mean, 1.0)  # inputs that are always zero: weights stay
    eye = torch.eye(xx.shape[1], dtype=torch.float64, device=xx.device)
    damped = xx + scale[:, None, None] * eye
    new_GRK = old_GRK + torch.linalg.solve(damped, (yx - old_GRK @ xx).mT).mT
    before = _error(old_GRK, xx, yx, yy)
    with torch.no_grad():
        if module.bias is not None:
            shift = moments.y.flatten() - (old_GRK @ moments.x.unsqueeze(2)).flatten()
            before += float((module.bias.detach().to(torch.float64) - shift).square().sum())
            module.bias.copy_(moments.y.flatten() - (new_GRK @ moments.x.unsqueeze(2)).flatten())
        module.weight.copy_(weight_of([new_GRK], start))
    whole = float(yy.sum()) or 1.0
    return before / whole, _error(new_GRK, xx, yx, yy) / whole


def _error(w_GRK: Tensor, xx_GKK: Tensor, yx_GRK: Tensor, yy_GR: Tensor) -> float:
    return float(yy_GR.sum() - 2 * (w_GRK * yx_GRK).sum() + ((w_GRK @ xx_GKK) * w_GRK).sum())
