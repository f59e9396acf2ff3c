"""A small network in the shape of BEVFusion: two backbones, one bird's-eye-view (BEV) grid, a concat fuser, a head.

Camera: residual stages, a feature pyramid, then a lift to BEV that looks up each cell at a few heights in the image
with the camera's calibration. LiDAR: a point network over padded pillars, a scatter to the BEV canvas, a BEV backbone.
Every width can be pruned: forward passes read shapes from tensors, never from numbers. `width` scales them all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from street_world import (
    BEV_SIZE,
    CLASSES,
    DUMMY_CELL,
    IMAGE_HEIGHT,
    IMAGE_WIDTH,
    POINT_FEATURES,
    bev_centres,
    project,
)
from torch import Tensor, nn

LIFT_HEIGHTS = (0.0, 0.7, 1.5)


def scaled(channels: int, width: float) -> int:
    """Channels times the width factor, in multiples of four."""
    return max(4, round(channels * width / 4) * 4)


def conv_bn_relu(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Residual(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first = conv_bn_relu(inputs, outputs, stride=stride)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, outputs, H / stride, W / stride)."""
        return F.relu(self.norm(self.second(self.first(x))) + self.shortcut(x))


class Pyramid(nn.Module):
    """Top-down feature pyramid: the finest level with what the coarser ones know added, smoothed."""

    def __init__(self, levels: list[int], width: int, outputs: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(conv_bn_relu(level, width, kernel=1) for level in levels)
        self.smooth = conv_bn_relu(width, outputs)

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Levels from fine to coarse, each half the size of the one before."""
        maps = [lateral(level) for lateral, level in zip(self.laterals, levels, strict=True)]
        top = maps[-1]
        for finer in reversed(maps[:-1]):
            top = finer + F.interpolate(top, scale_factor=2.0, mode="nearest")
        smoothed: Tensor = self.smooth(top)
        return smoothed


class Lift(nn.Module):
    """Looks each BEV cell up in the image features, at a few heights above the ground."""

    def __init__(self, heights: tuple[float, ...] = LIFT_HEIGHTS) -> None:
        super().__init__()
        centres = torch.from_numpy(bev_centres())
        self.names = [f"grid{number}" for number in range(len(heights))]
        for name, height in zip(self.names, heights, strict=True):
            cells = torch.cat([centres, torch.full((len(centres), 1), height)], dim=1)
            pixels = torch.from_numpy(project(cells.numpy()))
            scaled = pixels / torch.tensor([IMAGE_WIDTH, IMAGE_HEIGHT]) * 2 - 1
            # A constant of the calibration, not a weight: it stays out of the checkpoint.
            self.register_buffer(name, scaled.reshape(1, BEV_SIZE, BEV_SIZE, 2), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, h, w) image features -> (N, heights * C, 48, 48)."""
        seen = []
        for name in self.names:
            grid = self.get_buffer(name).to(features.dtype).expand(features.shape[0], -1, -1, -1)
            seen.append(F.grid_sample(features, grid, align_corners=False))
        return torch.cat(seen, dim=1)


class CameraBackbone(nn.Module):
    """Image (N, 3, 64, 160) -> BEV features (N, out, 48, 48)."""

    def __init__(self, out: int = 32, *, width: float = 1.0, channels: int = 3) -> None:
        super().__init__()
        w32, w48, w64, w96, w128 = (scaled(number, width) for number in (32, 48, 64, 96, 128))
        self.stem = conv_bn_relu(channels, w32, stride=2)
        self.stage1 = nn.Sequential(Residual(w32, w64, stride=2), Residual(w64, w64))
        self.stage2 = nn.Sequential(Residual(w64, w96, stride=2), Residual(w96, w96))
        self.stage3 = Residual(w96, w128, stride=2)
        self.pyramid = Pyramid([w32, w64, w96, w128], width=w48, outputs=w32)
        self.lift = Lift()
        self.squeeze = conv_bn_relu(w32 * len(LIFT_HEIGHTS), w48, kernel=1)
        self.down = nn.Sequential(conv_bn_relu(w48, w64, stride=2), Residual(w64, w64))
        self.merge = Pyramid([w48, w64], width=w48, outputs=out)

    def forward(self, image: Tensor) -> Tensor:
        """See the class."""
        stem = self.stem(image)
        first = self.stage1(stem)
        second = self.stage2(first)
        third = self.stage3(second)
        cells = self.squeeze(self.lift(self.pyramid([stem, first, second, third])))
        merged: Tensor = self.merge([cells, self.down(cells)])
        return merged


class PillarEncoder(nn.Module):
    """A network on every point, the maximum over the points of a pillar, scattered to the BEV canvas."""

    def __init__(self, out: int = 32, *, hidden: int = 32, features: int = POINT_FEATURES) -> None:
        super().__init__()
        self.points = nn.Sequential(conv_bn_relu(features, hidden, kernel=1), conv_bn_relu(hidden, out, kernel=1))

    def forward(self, points: Tensor, cells: Tensor) -> Tensor:
        """Points (N, F, P, M) and cells (N, P) -> canvas (N, out, 48, 48)."""
        real = points[:, -1:]
        # After ReLU zero is the smallest value, so that a padded point never wins the maximum.
        pillars = (self.points(points) * real).amax(dim=3).transpose(1, 2)
        n = pillars.shape[0]
        sample = torch.arange(n, device=points.device).unsqueeze(1).expand(-1, pillars.shape[1])
        # Padding goes to one cell more than the canvas has: no accumulation, so it exports as a plain ScatterND.
        canvas = pillars.new_zeros(n, DUMMY_CELL + 1, pillars.shape[2])
        canvas = canvas.index_put((sample, cells.long()), pillars)
        grid: Tensor = canvas[:, :DUMMY_CELL].transpose(1, 2).reshape(n, -1, BEV_SIZE, BEV_SIZE)
        return grid


class LidarBackbone(nn.Module):
    """Pillars -> BEV features (N, out, 48, 48)."""

    def __init__(self, out: int = 32, *, width: float = 1.0, features: int = POINT_FEATURES) -> None:
        super().__init__()
        w32, w48, w96, w128 = (scaled(number, width) for number in (32, 48, 96, 128))
        self.pillars = PillarEncoder(w32, hidden=w32, features=features)
        self.stage1 = conv_bn_relu(w32, w48)
        self.stage2 = nn.Sequential(conv_bn_relu(w48, w96, stride=2), Residual(w96, w96))
        self.stage3 = nn.Sequential(conv_bn_relu(w96, w128, stride=2), Residual(w128, w128))
        self.pyramid = Pyramid([w48, w96, w128], width=w48, outputs=out)

    def forward(self, points: Tensor, cells: Tensor) -> Tensor:
        """See the class."""
        first = self.stage1(self.pillars(points, cells))
        second = self.stage2(first)
        features: Tensor = self.pyramid([first, second, self.stage3(second)])
        return features


class Head(nn.Module):
    """BEV features -> class logits."""

    def __init__(self, inputs: int, hidden: int = 48) -> None:
        super().__init__()
        self.conv = conv_bn_relu(inputs, hidden)
        self.out = nn.Conv2d(hidden, len(CLASSES), 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, 48, 48) -> (N, classes, 48, 48)."""
        logits: Tensor = self.out(self.conv(x))
        return logits


class StreetFusion(nn.Module):
    """Camera and LiDAR, fused by concatenation in BEV.

    Args:
        width: factor on every number of channels.
        image_channels: of the image; 4 with the world's depth channel.
        point_features: of a point; 12 with the world's surface colours.
    """

    def __init__(self, width: float = 1.0, image_channels: int = 3, point_features: int = POINT_FEATURES) -> None:
        super().__init__()
        out, fused = scaled(32, width), scaled(64, width)
        self.camera = CameraBackbone(out, width=width, channels=image_channels)
        self.lidar = LidarBackbone(out, width=width, features=point_features)
        self.fuser = conv_bn_relu(2 * out, fused)
        self.head = Head(fused, scaled(48, width))

    def forward(self, image: Tensor, points: Tensor, cells: Tensor) -> Tensor:
        """Logits (N, classes, 48, 48)."""
        fused = self.fuser(torch.cat([self.camera(image), self.lidar(points, cells)], dim=1))
        logits: Tensor = self.head(fused)
        return logits


class SingleModality(nn.Module):
    """One backbone alone with a neck and head of the same shape: how each backbone is pre-trained.

    It takes all inputs of the fusion network, and ignores the other sensor's.
    """

    def __init__(self, modality: str) -> None:
        super().__init__()
        self.modality = modality
        self.backbone: nn.Module = CameraBackbone(32) if modality == "camera" else LidarBackbone(32)
        self.neck = conv_bn_relu(32, 64)
        self.head = Head(64)

    def forward(self, image: Tensor, points: Tensor, cells: Tensor) -> Tensor:
        """Logits (N, classes, 48, 48)."""
        features = self.backbone(image) if self.modality == "camera" else self.backbone(points, cells)
        logits: Tensor = self.head(self.neck(features))
        return logits
