"""A camera-LiDAR transformer in the shape of TransFuser and DMFuser: two convolutional branches, joined by attention.

At three scales both branches are pooled to tokens, one set of tokens goes through multi-head self-attention and an MLP,
and what they add is scaled up and added to each branch (TransFuser, arXiv 2205.15997). The image features are looked up
in bird's-eye view by calibration, as DMFuser projects its image into a map, and both branches merge there. One shared
backbone serves light heads, one a task; with one task alone, the parts that only other heads read are left out.

What can be pruned follows from the forward passes, which take every width from a tensor: channel j of the image, of the
LiDAR map and of the tokens of one scale are one coupled group, because they are concatenated as tokens and added to
both branches. An attention head goes as a whole: the head size is a constant, the number of heads is not.

Token norms are batch norms, after each linear layer, as in LeViT (arXiv 2104.01136). A LayerNorm averages over the very
channels that pruning removes, so that the other channels would change; a batch norm acts on every channel alone, folds
into the linear layer in front of it, and leaves nothing for INT8 to trip over. The residual stream itself has none.
The way-points come from an MLP over a small map instead of a GRU: an engine keeps a recurrent layer as a loop, and its
gates tie rows of one matrix together in a way that is not a plain channel; four way-points need no loop.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from detection import DetectionHead
from street_labels import WAYPOINT_TIMES_S
from street_model import LIFT_HEIGHTS, Head, Lift, PillarEncoder, Pyramid, Residual, conv_bn_relu, scaled
from torch import Tensor, nn

TASKS = ("segmentation", "detection", "depth", "waypoints")
HEAD_SIZE = 16  # channels of one attention head
IMAGE_TOKENS, BEV_TOKENS = (4, 10), (6, 6)


class TokenLinear(nn.Module):
    """A linear layer on every token, then batch norm over all tokens of the batch."""

    def __init__(self, inputs: int, outputs: int, *, scale: float = 1.0) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)
        self.norm = nn.BatchNorm1d(outputs)
        nn.init.constant_(self.norm.weight, scale)

    def forward(self, x_NTC: Tensor) -> Tensor:
        """(N, T, C) -> (N, T, outputs)."""
        flat = self.norm(self.linear(x_NTC.flatten(0, 1)))
        out: Tensor = flat.unflatten(0, x_NTC.shape[:2])
        return out


class TokenAttention(nn.Module):
    """Multi-head self-attention over all tokens; the number of heads follows from the layers' width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(1, round(channels / HEAD_SIZE)) * HEAD_SIZE
        self.query, self.key, self.value = (TokenLinear(channels, inner) for _ in range(3))
        self.out = TokenLinear(inner, channels, scale=0.1)

    def forward(self, x_NTC: Tensor) -> Tensor:
        """(N, T, C) -> (N, T, C), to be added."""
        q_NHTD, k_NHTD, v_NHTD = (
            layer(x_NTC).unflatten(2, (-1, HEAD_SIZE)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        seen = F.scaled_dot_product_attention(q_NHTD, k_NHTD, v_NHTD)
        out: Tensor = self.out(seen.transpose(1, 2).flatten(2))
        return out


class TokenMlp(nn.Module):
    """Two linear layers on every token."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.up = TokenLinear(channels, hidden)
        self.down = TokenLinear(hidden, channels, scale=0.1)

    def forward(self, x_NTC: Tensor) -> Tensor:
        """(N, T, C) -> (N, T, C), to be added."""
        out: Tensor = self.down(F.relu(self.up(x_NTC)))
        return out


class CrossModalFusion(nn.Module):
    """Lets two feature maps of equal width look at each other, as pooled tokens.

    Args:
        channels: of both maps, and of the tokens.
        hidden: of the MLP.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        tokens = IMAGE_TOKENS[0] * IMAGE_TOKENS[1] + BEV_TOKENS[0] * BEV_TOKENS[1]
        self.position = nn.Parameter(0.02 * torch.randn(1, tokens, channels))
        self.attention = TokenAttention(channels)
        self.mlp = TokenMlp(channels, hidden)

    def forward(self, image_NCHW: Tensor, bev_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Both maps with what the tokens add to them."""
        image_NCT, bev_NCT = _pool(image_NCHW, IMAGE_TOKENS).flatten(2), _pool(bev_NCHW, BEV_TOKENS).flatten(2)
        tokens_NTC = torch.cat([image_NCT, bev_NCT], dim=2).transpose(1, 2) + self.position
        added_NTC = self.attention(tokens_NTC)
        added_NTC = added_NTC + self.mlp(tokens_NTC + added_NTC)
        to_image, to_bev = added_NTC.transpose(1, 2).split([image_NCT.shape[2], bev_NCT.shape[2]], dim=2)
        return image_NCHW + _spread(to_image, IMAGE_TOKENS, image_NCHW), bev_NCHW + _spread(
            to_bev, BEV_TOKENS, bev_NCHW
        )


def _pool(x_NCHW: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean over equal windows; the grids divide every scale's map."""
    return F.avg_pool2d(x_NCHW, (x_NCHW.shape[2] // grid[0], x_NCHW.shape[3] // grid[1]))


def _spread(x_NCT: Tensor, grid: tuple[int, int], like_NCHW: Tensor) -> Tensor:
    """Tokens of a grid as a map of the size of another, bilinear."""
    size = like_NCHW.shape[2:]
    return F.interpolate(x_NCT.unflatten(2, grid), size=size, mode="bilinear", align_corners=False)


class CameraBranch(nn.Module):
    """Stages at 1/4, 1/8 and 1/16 of the image, and a pyramid over them and the stem at 1/2."""

    def __init__(self, widths: tuple[int, int, int, int], out: int) -> None:
        super().__init__()
        stem, first, second, third = widths
        self.stem = conv_bn_relu(3, stem, stride=2)
        self.stages = nn.ModuleList(
            [Residual(stem, first, stride=2), Residual(first, second, stride=2), Residual(second, third, stride=2)]
        )
        self.pyramid = Pyramid([stem, first, second, third], width=out, outputs=out)


class LidarBranch(nn.Module):
    """Pillars on the 48 x 48 grid, then stages at 1, 1/2 and 1/4 of it, and a pyramid over them."""

    def __init__(self, widths: tuple[int, int, int, int], out: int, *, pyramid: bool) -> None:
        super().__init__()
        stem, first, second, third = widths
        self.pillars = PillarEncoder(stem, hidden=stem)
        self.stages = nn.ModuleList(
            [conv_bn_relu(stem, first), Residual(first, second, stride=2), Residual(second, third, stride=2)]
        )
        self.pyramid = Pyramid([first, second, third], width=out, outputs=out) if pyramid else None


class BevNeck(nn.Module):
    """Image features looked up in bird's-eye view, merged with the LiDAR's."""

    def __init__(self, image: int, lidar: int, outputs: int) -> None:
        super().__init__()
        self.lift = Lift()
        self.squeeze = conv_bn_relu(image * len(LIFT_HEIGHTS), lidar, kernel=1)
        self.merge = conv_bn_relu(2 * lidar, outputs)
        self.mix = Residual(outputs, outputs)

    def forward(self, image_NCHW: Tensor, lidar_NCHW: Tensor) -> Tensor:
        """Image features at any size and LiDAR features (N, C, 48, 48) -> (N, outputs, 48, 48)."""
        seen = self.squeeze(self.lift(image_NCHW))
        mixed: Tensor = self.mix(self.merge(torch.cat([seen, lidar_NCHW], dim=1)))
        return mixed


class DepthHead(nn.Module):
    """Image features at 1/2 -> logarithm of the depth in units of 10 m at 1/4."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.conv = conv_bn_relu(inputs, hidden, stride=2)
        self.out = nn.Conv2d(hidden, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, 32, 80) -> (N, 1, 16, 40)."""
        out: Tensor = self.out(self.conv(x))
        return out


class WaypointHead(nn.Module):
    """BEV features -> way-points in units of 10 m: three strided convolutions, then an MLP over the 6 x 6 map left."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            conv_bn_relu(inputs, hidden, stride=2),
            conv_bn_relu(hidden, hidden, stride=2),
            conv_bn_relu(hidden, hidden, stride=2),
        )
        self.hidden = nn.Linear(36 * hidden, 2 * hidden)
        self.out = nn.Linear(2 * hidden, 2 * len(WAYPOINT_TIMES_S))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, 48, 48) -> (N, way-points, 2)."""
        hidden = F.relu(self.hidden(self.convs(x).flatten(1)))
        out: Tensor = self.out(hidden).unflatten(1, (-1, 2))
        return out


class StreetTransformer(nn.Module):
    """One backbone, a head for each task.

    Args:
        tasks: of `TASKS`, in any order; outputs follow the order of `TASKS`.
        width: factor on every number of channels.

    Raises:
        ValueError: a task is unknown, named twice, or there is none.
    """

    def __init__(self, tasks: tuple[str, ...] = TASKS, width: float = 1.0) -> None:
        super().__init__()
        if not tasks or set(tasks) - set(TASKS) or len(set(tasks)) < len(tasks):
            raise ValueError(f"expected different tasks of {', '.join(TASKS)}; got {tasks!r}; correct the names")
        self.tasks = tuple(task for task in TASKS if task in tasks)
        w16, w24, w32, w48, w64, w96 = (scaled(number, width) for number in (16, 24, 32, 48, 64, 96))
        widths = (w24, w32, w64, w96)
        in_bev = any(task != "depth" for task in tasks)
        self.camera = CameraBranch(widths, w32)
        self.lidar = LidarBranch(widths, w32, pyramid=in_bev)
        self.fusions = nn.ModuleList(CrossModalFusion(channels, 2 * channels) for channels in widths[1:])
        self.neck = BevNeck(w32, w32, w48) if in_bev else None
        heads: dict[str, Callable[[], nn.Module]] = {
            "segmentation": lambda: Head(w48, w32),
            "detection": lambda: DetectionHead(w48, w32),
            "depth": lambda: DepthHead(w32, w32),
            "waypoints": lambda: WaypointHead(w48, w16),
        }
        self.heads = nn.ModuleDict({task: heads[task]() for task in self.tasks})

    def forward(self, image: Tensor, points: Tensor, cells: Tensor) -> dict[str, Tensor]:
        """Outputs of each task.

        Args:
            image: (N, 3, 64, 160) in [0, 1].
            points: (N, F, P, M) features of the points of P pillars.
            cells: (N, P) their cells.

        Returns:
            "segmentation" logits (N, classes, 48, 48); "heat" logits (N, detected classes, 48, 48) and "box"
            (N, 7, 48, 48); "depth" (N, 1, 16, 40), log of 10 m; "waypoints" (N, 4, 2), 10 m.
        """
        # The canvas comes with channels last. Strided 1x1 convolutions over fewer than 16 channels would then take a
        # kernel whose backward pass writes out of bounds (oneDNN of torch 2.13, AVX-512, float32).
        image_NCHW, bev_NCHW = self.camera.stem(image), self.lidar.pillars(points, cells).contiguous()
        seen, mapped = [image_NCHW], []
        for camera, lidar, fusion in zip(self.camera.stages, self.lidar.stages, self.fusions, strict=True):
            image_NCHW, bev_NCHW = fusion(camera(image_NCHW), lidar(bev_NCHW))
            seen.append(image_NCHW)
            mapped.append(bev_NCHW)
        image_NCHW = self.camera.pyramid(seen)
        if self.neck is not None and self.lidar.pyramid is not None:
            bev_NCHW = self.neck(image_NCHW, self.lidar.pyramid(mapped))
        outputs: dict[str, Tensor] = {}
        for task, head in self.heads.items():
            said = head(image_NCHW if task == "depth" else bev_NCHW)
            outputs.update(said if isinstance(said, dict) else {task: said})
        return outputs
