"""A small camera-LiDAR network for depth completion: two residual encoders, fusion by concatenation, a decoder.

Only convolutions, batch norm, ReLU, resize, addition and concatenation (ONNX opset 18), and `forward` names no
channel count, so that any of the layers can be narrowed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FAR_METRES = 80.0
# Depth at which the untrained network starts: about the median of a street scene.
START_METRES = 12.0


class ConvNorm(nn.Module):
    """Convolution, batch norm and (optionally) ReLU; `stride` halves the resolution."""

    def __init__(self, inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1, act: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.act = nn.ReLU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        y: Tensor = self.act(self.norm(self.conv(x)))
        return y


class Residual(nn.Module):
    """Two 3x3 convolutions around a skip connection; the first may halve the resolution and widen."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1) -> None:
        super().__init__()
        self.first = ConvNorm(inputs, outputs, stride=stride)
        self.second = ConvNorm(outputs, outputs, act=False)
        plain = stride == 1 and inputs == outputs
        self.skip = nn.Identity() if plain else ConvNorm(inputs, outputs, kernel=1, stride=stride, act=False)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        y: Tensor = self.act(self.second(self.first(x)) + self.skip(x))
        return y


class Pyramid(nn.Module):
    """Encoder to 1/16 of the resolution and back to 1/2, where the modalities meet.

    Args:
        inputs: channels of the input.
        widths: channels at 1/2, 1/4, 1/8 and 1/16.
        outputs: channels of the map handed to the fusion.
    """

    def __init__(self, inputs: int, widths: tuple[int, int, int, int], outputs: int) -> None:
        super().__init__()
        half, quarter, eighth, sixteenth = widths
        self.stem = ConvNorm(inputs, half, kernel=5, stride=2)
        self.stage2 = Residual(half, quarter, stride=2)
        self.stage3 = Residual(quarter, eighth, stride=2)
        self.stage4 = Residual(eighth, sixteenth, stride=2)
        self.lateral3 = ConvNorm(sixteenth + eighth, eighth, kernel=1)
        self.lateral2 = ConvNorm(eighth + quarter, quarter)
        self.lateral1 = ConvNorm(quarter + half, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / 2, W / 2); H and W divisible by 16."""
        half = self.stem(x)
        quarter = self.stage2(half)
        eighth = self.stage3(quarter)
        y = self.lateral3(torch.cat([_double(self.stage4(eighth)), eighth], 1))
        y = self.lateral2(torch.cat([_double(y), quarter], 1))
        y = self.lateral1(torch.cat([_double(y), half], 1))
        return y


class LidarPyramid(nn.Module):
    """The LiDAR branch: a pyramid over the depth in units of `FAR_METRES` and the mask of known pixels."""

    def __init__(self, widths: tuple[int, int, int, int], outputs: int) -> None:
        super().__init__()
        self.pyramid = Pyramid(2, widths, outputs)

    def forward(self, sparse_depth: Tensor) -> Tensor:
        """(B, 1, H, W) metres, 0 where unknown -> (B, outputs, H / 2, W / 2)."""
        known = (sparse_depth > 0).to(sparse_depth.dtype)
        y: Tensor = self.pyramid(torch.cat([sparse_depth * (1 / FAR_METRES), known], 1))
        return y


class DepthFusionNet(nn.Module):
    """Image and sparse depth in, dense depth out.

    Args:
        camera_widths: channels of the camera branch at 1/2, 1/4, 1/8 and 1/16 of the resolution.
        lidar_widths: the same of the LiDAR branch.
        meet: channels that each branch hands to the fusion.
    """

    def __init__(
        self,
        camera_widths: tuple[int, int, int, int] = (16, 32, 48, 64),
        lidar_widths: tuple[int, int, int, int] = (16, 32, 48, 64),
        meet: int = 32,
    ) -> None:
        super().__init__()
        self.camera = Pyramid(3, camera_widths, meet)
        self.lidar = LidarPyramid(lidar_widths, meet)
        self.fuse = ConvNorm(2 * meet, meet)
        self.decoder = nn.Sequential(Residual(meet, meet), ConvNorm(meet, 16))
        self.refine = ConvNorm(16, 16)
        self.head = nn.Conv2d(16, 1, 3, padding=1)
        nn.init.constant_(self.head.bias, START_METRES / FAR_METRES)  # type: ignore[arg-type]

    def forward(self, image: Tensor, sparse_depth: Tensor) -> dict[str, Tensor]:
        """Dense depth.

        Args:
            image: (B, 3, H, W), 0 to 1.
            sparse_depth: (B, 1, H, W) metres, 0 where unknown.

        Returns:
            `depth`: (B, 1, H, W) metres.
        """
        y = self.fuse(torch.cat([self.camera(image), self.lidar(sparse_depth)], 1))
        y = self.refine(_double(self.decoder(y)))
        return {"depth": F.relu(self.head(y)) * FAR_METRES}


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
