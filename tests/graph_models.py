"""Small models in the shapes that channel groups must see through; every one stands for something users write."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_bn(i: int, o: int, k: int = 3, **options: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, k, padding=k // 2, **options), nn.BatchNorm2d(o), nn.ReLU(inplace=True))  # type: ignore[arg-type]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16)
        self.a = conv_bn(16, 24)
        self.b = nn.Conv2d(24, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.relu(x + self.bn(self.b(self.a(x)))))  # type: ignore[no-any-return]


class Concat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = conv_bn(3, 8)
        self.b = conv_bn(3, 16)
        self.mix = conv_bn(24, 16)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(torch.cat([self.a(x), self.b(x)], 1)))  # type: ignore[no-any-return]


class Flatten(nn.Module):
    """Two classifiers: features flattened channel first and channel last."""

    def __init__(self) -> None:
        super().__init__()
        self.a = conv_bn(3, 8)
        self.first = nn.Linear(8 * 16, 12)
        self.last = nn.Linear(8 * 16, 12)
        self.out = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.a(x), 4)
        y = F.relu(self.first(x.flatten(1))) + F.relu(self.last(x.permute(0, 2, 3, 1).flatten(1)))
        return self.out(y)  # type: ignore[no-any-return]


class SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(width, 8, 1)
        self.up = nn.Conv2d(8, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class Depthwise(nn.Module):
    """Depthwise separable with a channel multiplier of two, squeeze and excite, PReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.act = nn.PReLU(16)
        self.dw = nn.Conv2d(16, 32, 3, padding=1, groups=16)
        self.bn = nn.BatchNorm2d(32)
        self.se = SqueezeExcite(32)
        self.pw = conv_bn(32, 16, 1)
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pw(self.se(self.bn(self.dw(self.act(self.stem(x)))))))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Transposed convolutions (plain and depthwise) and a pixel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.a = conv_bn(3, 16)
        self.up = nn.ConvTranspose2d(16, 12, 2, stride=2)
        self.bn = nn.BatchNorm2d(12)
        self.dw = nn.ConvTranspose2d(12, 12, 2, stride=2, groups=12)
        self.wide = nn.Conv2d(12, 32, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dw(F.relu(self.bn(self.up(self.a(x)))))
        return self.head(F.pixel_shuffle(F.relu(self.wide(x)), 2))  # type: ignore[no-any-return]


class Block(nn.Module):
    """A ConvNeXt-like block: depthwise, LayerNorm over channels, MLP, layer scale that starts at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dw = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 32)
        self.down = nn.Linear(32, width)
        self.gamma = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dw(x).permute(0, 2, 3, 1))
        y = self.gamma * self.down(F.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)  # type: ignore[no-any-return]


class ConvNext(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, stride=4)
        self.blocks = nn.Sequential(Block(16), Block(16))
        self.head = nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))  # type: ignore[no-any-return]


class GroupNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.gn = nn.GroupNorm(4, 16)
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.gn(self.a(x))))  # type: ignore[no-any-return]


class Gated(nn.Module):
    """Gated linear unit: channel c and channel c + 8 of one layer belong together."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.glu(self.a(x), 1))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """One head: queries and keys meet in a product over their channels, values do not."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, 8) for _ in range(3))
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        return self.out(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))  # type: ignore[no-any-return]


class MultiHead(nn.Module):
    """Four heads of a fixed size, so that heads can go: queries and keys of one head meet, and mix its values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, 16) for _ in range(3))
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        q, k, v = (layer(x).unflatten(2, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class PillarNet(nn.Module):
    """Camera and LiDAR in the shape of BEVFusion: Linear and BatchNorm1d over padded points, own scatter, concat."""

    def __init__(self) -> None:
        super().__init__()
        self.camera = nn.Sequential(conv_bn(3, 16), conv_bn(16, 16), nn.AdaptiveAvgPool2d(8))
        self.lidar = nn.ModuleDict({"point": nn.Linear(4, 16), "norm": nn.BatchNorm1d(16), "bev": conv_bn(16, 24)})
        self.fuse = conv_bn(40, 16)
        self.seg = nn.Conv2d(16, 3, 1)
        self.depth = nn.Conv2d(16, 1, 1)

    def forward(self, image: Tensor, points: Tensor, cells: Tensor) -> dict[str, Tensor]:
        n, p, m, _ = points.shape
        f = self.lidar["point"](points.reshape(n * p, m, -1))
        f = F.relu(self.lidar["norm"](f.transpose(1, 2))).max(dim=2).values.view(n, p, -1)
        sheets = []
        for i in range(n):
            canvas = torch.zeros(f.shape[2], 64)
            canvas[:, cells[i]] = f[i].t()
            sheets.append(canvas.view(-1, 8, 8))
        x = self.fuse(torch.cat([self.camera(image), self.lidar["bev"](torch.stack(sheets))], 1))
        return {"seg": self.seg(x), "depth": self.depth(x)}


class Stranger(nn.Module):
    """Two cameras (sharing a backbone or not) and a LiDAR range image, depthwise-separable, added and concatenated."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.shared = shared
        self.eye = nn.Sequential(conv_bn(3, 16), nn.Conv2d(16, 16, 3, padding=1, groups=16), conv_bn(16, 16, 1))
        self.second = nn.Sequential() if shared else nn.Sequential(conv_bn(3, 16), conv_bn(16, 16))
        self.range = nn.Sequential(conv_bn(2, 12), SqueezeExcite(12), conv_bn(12, 16))
        self.fuse = conv_bn(48, 24)
        self.head = nn.Conv2d(24, 4, 1)

    def forward(self, left: Tensor, right: Tensor, scan: Tensor) -> dict[str, Tensor]:
        if self.shared:
            a, b = self.eye(torch.cat([left, right])).chunk(2)
        else:
            a, b = self.eye(left), self.second(right)
        return {"classes": self.head(self.fuse(torch.cat([a, b, self.range(scan)], 1)))}


class Twice(nn.Module):
    """One layer called twice, on its own output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16)
        self.loop = conv_bn(16, 16)
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.loop(self.loop(self.stem(x))))  # type: ignore[no-any-return]


class Stubborn(nn.Module):
    """What cannot be pruned: a written-in size, a grouped and a tied convolution, softmax over channels, no call."""

    def __init__(self) -> None:
        super().__init__()
        self.sized = nn.Conv2d(3, 8, 3, padding=1)
        self.before = nn.Conv2d(8, 8, 1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.soft = nn.Conv2d(8, 8, 1)
        self.tied = nn.Conv2d(8, 8, 1)
        self.twin = nn.Conv2d(8, 8, 1)
        self.twin.weight = self.tied.weight
        self.free = nn.Conv2d(8, 8, 1)
        self.unused = nn.Conv2d(8, 8, 1)
        self.mix = nn.Parameter(torch.randn(8, 8))
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.sized(x)
        x = x.reshape(x.shape[0], 8, -1).reshape(x.shape[0], 8, *x.shape[2:])
        x = self.soft(self.grouped(self.before(x))).softmax(1)
        x = self.free(self.twin(self.tied(x)))
        return self.head(torch.einsum("nchw,cd->ndhw", x, self.mix))  # type: ignore[no-any-return]


class BasicBlock(nn.Module):
    """A residual block that adds in place, with a projection where the shape changes."""

    def __init__(self, i: int, o: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(i, o, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(o)
        self.conv2 = nn.Conv2d(o, o, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(o)
        self.down: nn.Module | None = None
        if stride != 1 or i != o:
            self.down = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += x if self.down is None else self.down(x)
        return F.relu(y, inplace=True)


class Projected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.one = BasicBlock(8, 16, stride=2)
        self.two = BasicBlock(16, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(self.stem(x))).mean((2, 3)))  # type: ignore[no-any-return]


class Bottleneck(nn.Module):
    """1x1, strided 3x3, 1x1 with a projection, then the same with an identity."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16)
        self.first = nn.Sequential(conv_bn(16, 8, 1), conv_bn(8, 12, 3, stride=2), nn.Conv2d(12, 24, 1))
        self.first_bn = nn.BatchNorm2d(24)
        self.short = nn.Conv2d(16, 24, 1, stride=2)
        self.second = nn.Sequential(conv_bn(24, 8, 1), conv_bn(8, 8), nn.Conv2d(8, 24, 1), nn.BatchNorm2d(24))
        self.head = nn.Conv2d(24, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.first_bn(self.first(x)) + self.short(x))
        return self.head(F.relu(self.second(x) + x))  # type: ignore[no-any-return]


class PreActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv1 = nn.Conv2d(16, 12, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return self.head(F.relu(self.norm(x)))  # type: ignore[no-any-return]


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(3, 16), conv_bn(16, 12), conv_bn(12, 16), nn.Conv2d(16, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)  # type: ignore[no-any-return]


class Pyramid(nn.Module):
    """Two levels that are merged by adding or by concatenation, resized to one another."""

    def __init__(self, add: bool) -> None:
        super().__init__()
        self.add = add
        self.fine, self.coarse = conv_bn(3, 16), conv_bn(16, 24, stride=2)
        self.lateral_fine, self.lateral_coarse = conv_bn(16, 12, 1), conv_bn(24, 12, 1)
        self.head = nn.Conv2d(12 if add else 24, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(x)
        up = F.interpolate(self.lateral_coarse(self.coarse(fine)), scale_factor=2.0, mode="nearest")
        near = self.lateral_fine(fine)
        return self.head(near + up if self.add else torch.cat([near, up], 1))  # type: ignore[no-any-return]


class AddedSensors(nn.Module):
    """A camera whose features are added to the LiDAR's: the sum goes on without it, but blind."""

    def __init__(self) -> None:
        super().__init__()
        self.camera = nn.Sequential(conv_bn(3, 16), nn.Conv2d(16, 12, 1))
        self.lidar = conv_bn(2, 12)
        self.head = nn.Conv2d(12, 3, 1)

    def forward(self, image: Tensor, scan: Tensor) -> Tensor:
        return self.head(F.relu(self.camera(image) + self.lidar(scan)))  # type: ignore[no-any-return]


class Parallel(nn.Module):
    """Two paths that are added, either of which may go, but not both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.left = nn.Sequential(conv_bn(8, 16), nn.Conv2d(16, 12, 1))
        self.right = nn.Sequential(conv_bn(8, 16), nn.Conv2d(16, 12, 1))
        self.head = nn.Conv2d(12, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.relu(self.left(x) + self.right(x)))  # type: ignore[no-any-return]


def image(n: int = 2, size: int = 8, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def pillar_inputs() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    cells = torch.stack([torch.randperm(64, generator=g)[:10] for _ in range(2)])
    return {"image": image(), "points": torch.randn(2, 10, 5, 4, generator=g), "cells": cells}


def stranger_inputs() -> dict[str, Tensor]:
    return {"left": image(seed=1), "right": image(seed=2), "scan": image(channels=2, seed=3)}


def settled(model: nn.Module) -> nn.Module:
    """Norm statistics and affine parameters away from their defaults, as after training."""
    g = torch.Generator().manual_seed(7)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.copy_(torch.randn(module.num_features, generator=g) * 0.2)
            module.running_var.copy_(torch.rand(module.num_features, generator=g) + 0.5)
            nn.init.normal_(module.bias, 0, 0.2, generator=g)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=g)
    return model.eval()
