"""3D object detection by centre points: targets, losses, head, decoding, and the street network that has it.

CenterNet (arXiv 1904.07850) and CenterPoint (arXiv 2006.11275) in a bird's-eye view: one heat map a class with a
Gaussian on every centre, and at the centre's cell the box: where in the cell, log length, width and height, the sine
and cosine of twice the yaw (these boxes have no front). They stand on the ground, so z follows from the height.
Decoding (local maxima, the best of them, boxes) is a post-process outside the network.
"""

from __future__ import annotations

import math

import numpy as np
import street_labels as labels
import street_world as world
import torch
import torch.nn.functional as F
from street_model import StreetFusion, conv_bn_relu, scaled
from torch import Tensor, nn

TOP = 32  # detections a sample; the eval split has 12 boxes in a sample at most
MIN_CONFIDENCE = 0.02
BOX = 7  # dx, dy, log l, log w, log h, sin 2 yaw, cos 2 yaw
MIN_SIGMA_CELLS = 0.8
PRIOR = 0.02  # chance of a centre that the heat map starts from


class DetectionHead(nn.Module):
    """BEV features -> heat map logits and boxes, one 1x1 convolution each on a common hidden layer."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.conv = conv_bn_relu(inputs, hidden)
        self.heat = nn.Conv2d(hidden, len(labels.DETECTED), 1)
        self.box = nn.Conv2d(hidden, BOX, 1)
        nn.init.constant_(self.heat.bias, math.log(PRIOR / (1 - PRIOR)))  # type: ignore[arg-type]  # it has a bias

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, C, 48, 48) -> heat (N, classes, 48, 48), box (N, 7, 48, 48)."""
        hidden = self.conv(x)
        return {"heat": self.heat(hidden), "box": self.box(hidden)}


class StreetDetection(StreetFusion):
    """The convolutional street network with a detection head beside its segmentation head."""

    def __init__(self, width: float = 1.0) -> None:
        super().__init__(width)
        self.detection = DetectionHead(scaled(64, width), scaled(48, width))

    def forward(  # type: ignore[override]  # a dict of outputs, in their ONNX order
        self, image: Tensor, points: Tensor, cells: Tensor
    ) -> dict[str, Tensor]:
        """Logits "segmentation" (N, classes, 48, 48), "heat" and "box" of the detection head."""
        fused = self.fuser(torch.cat([self.camera(image), self.lidar(points, cells)], dim=1))
        return {"segmentation": self.head(fused), **self.detection(fused)}


# --------------------------------------------------------------------------------------------------------- targets


def heat_targets(object_class: Tensor, box: Tensor) -> Tensor:
    """Heat maps (N, classes, 48, 48): the largest of the class's Gaussians, exactly 1 at the cells of centres.

    Their deviation is a quarter of the box's width (between the cells' size and the object's), 0.8 cells at least.

    Args:
        object_class: (N, S), negative for none.
        box: (N, S, 7) of `street_labels`.
    """
    row, column = _cells(box)
    sigma = (box[..., 4] / (4 * world.CELL)).clamp_min(MIN_SIGMA_CELLS)[..., None]
    steps = torch.arange(world.BEV_SIZE, dtype=box.dtype, device=box.device)
    ahead = torch.exp(-((steps - row[..., None]) ** 2) / (2 * sigma**2))
    aside = torch.exp(-((steps - column[..., None]) ** 2) / (2 * sigma**2))
    spots = ahead[..., :, None] * aside[..., None, :]
    maps = [(spots * (object_class == number)[..., None, None]).amax(dim=1) for number in range(len(labels.DETECTED))]
    return torch.stack(maps, dim=1)


def box_targets(box: Tensor) -> Tensor:
    """What the head should say (N, S, 7) at the cell of each box."""
    row, column = _cells(box)
    offset = [
        (box[..., axis] - origin) / world.CELL - cell - 0.5
        for axis, origin, cell in ((0, world.BEV_X, row), (1, world.BEV_Y, column))
    ]
    yaw = box[..., 6]
    turn = [torch.sin(2 * yaw), torch.cos(2 * yaw)]
    return torch.stack([*offset, *box[..., 3:6].clamp_min(1e-3).log().unbind(-1), *turn], dim=-1)


def _cells(box: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of the box's centre; clamped, because empty slots lie anywhere."""
    row = ((box[..., 0] - world.BEV_X) / world.CELL).floor()
    column = ((box[..., 1] - world.BEV_Y) / world.CELL).floor()
    return row.clamp(0, world.BEV_SIZE - 1), column.clamp(0, world.BEV_SIZE - 1)


def in_view() -> Tensor:
    """(48, 48) whether the camera looks at each cell; only there can an object's class be known."""
    centres = world.bev_centres()
    seen = np.abs(centres[:, 1]) <= (world.IMAGE_WIDTH / 2 / world.FOCAL) * centres[:, 0]
    return torch.from_numpy(seen.reshape(world.BEV_SIZE, world.BEV_SIZE))


# ---------------------------------------------------------------------------------------------------------- losses


def focal_loss(heat: Tensor, target: Tensor) -> Tensor:
    """CenterNet's penalty-reduced focal loss (alpha 2, beta 4) over the cells in view, a centre.

    Args:
        heat: logits (N, classes, 48, 48).
        target: Gaussians with 1 at the centres, same shape.
    """
    logits = heat.float()
    seen = in_view().to(logits.device)
    log_yes, log_no = F.logsigmoid(logits), F.logsigmoid(-logits)
    centre = (target == 1).float()
    found = (log_no.exp() ** 2) * log_yes * centre
    false = (log_yes.exp() ** 2) * log_no * (1 - target) ** 4 * (1 - centre)
    return -((found + false) * seen).sum() / centre.sum().clamp_min(1.0)


def box_loss(box: Tensor, object_class: Tensor, truth_box: Tensor) -> Tensor:
    """Mean absolute difference of the seven numbers at the cells of the boxes that there are.

    Args:
        box: (N, 7, 48, 48) of the head.
        object_class: (N, S), negative for none.
        truth_box: (N, S, 7).
    """
    row, column = _cells(truth_box)
    cell = (row * world.BEV_SIZE + column).long()
    said = box.float().flatten(2).gather(2, cell[:, None].expand(-1, BOX, -1)).transpose(1, 2)
    there = (object_class >= 0).float()[..., None]
    return ((said - box_targets(truth_box)).abs() * there).sum() / (BOX * there.sum()).clamp_min(1.0)


# -------------------------------------------------------------------------------------------------------- decoding


def decode(heat: Tensor, box: Tensor, top: int = TOP) -> tuple[Tensor, Tensor, Tensor]:
    """The most confident boxes of each sample.

    A cell counts where it is the largest of its 3x3 neighbours in its class (that is the non-maximum suppression) and
    the camera looks at it.

    Args:
        heat: logits (N, classes, 48, 48).
        box: (N, 7, 48, 48).
        top: K.

    Returns:
        Confidence (N, K) from high to low, 0 where there are fewer; class (N, K); box (N, K, 7) of `street_labels`.
    """
    chance = heat.float().sigmoid()
    peak = (chance == F.max_pool2d(chance, 3, stride=1, padding=1)) & in_view().to(chance.device)
    chance = torch.where(peak & (chance >= MIN_CONFIDENCE), chance, 0.0)
    confidence, place = chance.flatten(1).topk(top, dim=1)
    cells = world.BEV_SIZE * world.BEV_SIZE
    category, cell = place // cells, place % cells
    said = box.float().flatten(2).gather(2, cell[:, None].expand(-1, BOX, -1)).transpose(1, 2)
    x = world.BEV_X + (cell // world.BEV_SIZE + 0.5 + said[..., 0]) * world.CELL
    y = world.BEV_Y + (cell % world.BEV_SIZE + 0.5 + said[..., 1]) * world.CELL
    size = said[..., 2:5].clamp(-4.0, 4.0).exp()
    yaw = torch.atan2(said[..., 5], said[..., 6]) / 2
    return confidence, category, torch.stack([x, y, size[..., 2] / 2, *size.unbind(-1), yaw], dim=-1)
