"""Values in the parameters' place, made for every operator and not held."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fusepress.pipeline.scoring.substitute import Substitution


class Sequence(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        found = self.inner(x) if not isinstance(self.inner, nn.MultiheadAttention) else self.inner(x, x, x)
        return found if isinstance(found, Tensor) else found[0]


class Plainly(nn.Module):
    """Parameters in plain expressions: sliced, transposed, scattered into, twice, unused, and on a dead path."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.scale = nn.Parameter(torch.randn(6))
        self.unused = nn.Parameter(torch.randn(3))
        self.dead = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight.shape == (6, 6)
        x = x.to(self.weight.dtype) @ self.weight.T + self.weight[0] * self.scale.exp()
        (x * self.dead).sum()
        kept = torch.stack([self.scale, self.dead.detach()])
        return torch.cat([x @ self.weight, x * kept.sum(dim=0)])


def tied() -> nn.Module:
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 3, 2)),
        (2, 2, 6, 6),
    ),
    "linear": (lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.PReLU(), nn.Linear(5, 2)), (3, 6)),
    "attention": (lambda: nn.MultiheadAttention(6, 2, batch_first=True), (2, 4, 6)),
    "transformer": (lambda: nn.TransformerEncoderLayer(6, 2, 12, batch_first=True), (2, 4, 6)),
    "recurrent": (lambda: nn.GRU(6, 5, batch_first=True), (2, 4, 6)),
    "expressions": (Plainly, (3, 6)),
    "tied": (tied, (3, 6)),
}


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_those_of_a_functional_call(name: str) -> None:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model = Sequence(make()).eval()
    x = torch.randn(shape, dtype=torch.float64)
    buffers = {n: b.double() for n, b in model.named_buffers() if b.is_floating_point()}
    values = {n: p.detach().double().square().requires_grad_() for n, p in model.named_parameters()}
    expected = functional_call(model, {**values, **buffers}, (x,))
    expected.square().sum().backward()

    names = {p: n for n, p in model.named_parameters()}
    plain = {n: p.detach() for p, n in names.items()}
    gradients: dict[str, Tensor] = {}

    def take(key: str, value: Tensor, gradient: Tensor) -> None:
        assert torch.equal(value, values[key].detach())
        gradients[key] = gradient

    substitution = Substitution(names, lambda n: plain[n].double().square(), take)
    with substitution:
        found = functional_call(model, buffers, (x,))
        found.square().sum().backward()
        substitution.finish()

    assert torch.equal(found, expected)
    reached = {n for n, value in values.items() if value.grad is not None}
    assert set(gradients) == reached
    for key in reached:
        torch.testing.assert_close(gradients[key], values[key].grad, rtol=1e-12, atol=1e-12)
    assert all(p.grad is None and p.dtype == torch.float32 for p in model.parameters())
