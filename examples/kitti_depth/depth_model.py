"""A small camera-LiDAR network for depth completion: two residual encoders, fusion by concatenation, a decoder.

Only convolutions, batch norm, ReLU, resize, addition and concatenation (ONNX opset 18), and `forward` names no
channel count, so that any of the layers can be narrowed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FAR_METRES = 80.0
# Unit of the correction: small, so that one optimiser step moves the depth by centimetres.
STEP_METRES = 2.0
CANDIDATES = 3
# Side of the window in which the nearest and the farthest known point are candidates for a pixel's depth.
REACH = 5
# Windows that known depths are spread over, and their weight against the next smaller one's.
SPREAD = ((3, 1.0), (5, 0.3), (9, 0.1), (15, 0.03))


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
        met: Tensor = self.lateral1(torch.cat([_double(y), half], 1))
        return met


class LidarBranch(nn.Module):
    """The LiDAR branch: a pyramid over the depth, the mask of known pixels and a smooth guess between them.

    It also hands on three candidates for the depth of every pixel: the smooth guess, the nearest and the farthest
    point close by; the decoder chooses among them and corrects. `carry` scales them and is a layer of the branch, so
    that a LiDAR branch without weights carries nothing.
    """

    def __init__(self, widths: tuple[int, int, int, int], outputs: int) -> None:
        super().__init__()
        self.pyramid = Pyramid(3, widths, outputs)
        self.carry = nn.Conv2d(CANDIDATES, CANDIDATES, 1, bias=False)
        with torch.no_grad():
            self.carry.weight.copy_(torch.eye(CANDIDATES)[:, :, None, None])

    def forward(self, sparse_depth: Tensor) -> tuple[Tensor, Tensor]:
        """Features and candidates.

        Args:
            sparse_depth: (B, 1, H, W) metres, 0 where unknown.

        Returns:
            (B, outputs, H / 2, W / 2), and (B, CANDIDATES, H, W) in units of `FAR_METRES`.
        """
        depth = sparse_depth * (1 / FAR_METRES)
        known = (sparse_depth > 0).to(sparse_depth.dtype)
        guess = _spread(depth, known)
        near, far = _nearest_and_farthest(depth, known, guess)
        return self.pyramid(torch.cat([depth, known, guess], 1)), self.carry(torch.cat([guess, near, far], 1))


class CameraBranch(nn.Module):
    """The camera branch: a pyramid, and one layer at full resolution that tells the decoder where the edges are."""

    def __init__(self, widths: tuple[int, int, int, int], outputs: int) -> None:
        super().__init__()
        self.pyramid = Pyramid(3, widths, outputs)
        self.edges = ConvNorm(3, 16)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> (B, outputs, H / 2, W / 2) and (B, 16, H, W)."""
        return self.pyramid(image), self.edges(image)


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
        self.camera = CameraBranch(camera_widths, meet)
        self.lidar = LidarBranch(lidar_widths, meet)
        self.fuse = ConvNorm(2 * meet, meet)
        self.decoder = nn.Sequential(Residual(meet, meet), ConvNorm(meet, 16))
        self.refine = ConvNorm(16 + 16 + CANDIDATES, 16)
        self.choice = nn.Conv2d(16, CANDIDATES, 3, padding=1)
        self.correction = nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, image: Tensor, sparse_depth: Tensor) -> dict[str, Tensor]:
        """Dense depth.

        Args:
            image: (B, 3, H, W), 0 to 1.
            sparse_depth: (B, 1, H, W) metres, 0 where unknown.

        Returns:
            `depth`: (B, 1, H, W) metres.
        """
        seen, edges = self.camera(image)
        felt, candidates = self.lidar(sparse_depth)
        y = self.decoder(self.fuse(torch.cat([seen, felt], 1)))
        y = self.refine(torch.cat([_double(y), edges, candidates], 1))
        chosen = (torch.softmax(self.choice(y), 1) * candidates).sum(1, keepdim=True)
        return {"depth": chosen * FAR_METRES + self.correction(y) * STEP_METRES}


def _spread(depth: Tensor, known: Tensor) -> Tensor:
    """Mean of the known depths around each pixel: nearly only of the closest window that has any; 0 far from all.

    No parameters: it spares the first layers from learning to divide by how many points a window holds.
    """
    total, weight = depth, known
    for size, share in SPREAD:
        total = total + share * F.avg_pool2d(depth, size, stride=1, padding=size // 2)
        weight = weight + share * F.avg_pool2d(known, size, stride=1, padding=size // 2)
    return total / (weight + 1e-4)


def _nearest_and_farthest(depth: Tensor, known: Tensor, guess: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest known depth within `REACH`; the guess where no point is close."""
    hit = _window_max(known)
    near = (1 - _window_max(known * (1 - depth))) * hit
    far = _window_max(depth)
    elsewhere = guess * (1 - hit)
    return near + elsewhere, far + elsewhere


def _window_max(x: Tensor) -> Tensor:
    return F.max_pool2d(x, REACH, stride=1, padding=REACH // 2)


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
