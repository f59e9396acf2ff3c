"""Pictures of one street sample for a person: sensors, truth, answers."""

from __future__ import annotations

import numpy as np
import street_world as world
from numpy.typing import NDArray

Picture = NDArray[np.uint8]

PALETTE = np.zeros((256, 3), np.uint8)
PALETTE[: len(world.CLASSES)] = [
    [74, 78, 86],  # free
    [245, 245, 240],  # lane
    [226, 60, 60],  # car
    [245, 160, 30],  # truck
    [70, 150, 255],  # pedestrian
    [60, 175, 80],  # bush
]
PALETTE[world.IGNORE] = [24, 25, 28]
_SCALE = 8


def draw(
    image: NDArray[np.float32],
    xyz: NDArray[np.float32],
    real: NDArray[np.bool_],
    truth: NDArray[np.int64],
    dense: NDArray[np.int64],
    compressed: NDArray[np.int64],
) -> dict[str, Picture]:
    """Camera image, LiDAR from above, truth, dense answer, compressed answer, and where the two answers differ.

    Args:
        image: (3, H, W) in [0, 1].
        xyz: (P, M, 3) points in metres; `real` (P, M) marks padding.
        real: see `xyz`.
        truth: (48, 48) labels.
        dense: (48, 48) classes.
        compressed: (48, 48) classes.

    Returns:
        Pictures by name, (H, W, 3) uint8; forward is up.
    """
    pixels = (image.transpose(1, 2, 0) * 255).round().astype(np.uint8)
    unknown = truth == world.IGNORE
    return {
        "camera": _enlarge(pixels, 5),
        "lidar": _bird_view(xyz[real]),
        "truth": _cells(PALETTE[truth]),
        "dense": _cells(_known(PALETTE[dense], unknown)),
        "compressed": _cells(_known(PALETTE[compressed], unknown)),
        "difference": _cells(_difference(truth, dense, compressed)),
    }


def _enlarge(picture: Picture, times: int) -> Picture:
    return picture.repeat(times, axis=0).repeat(times, axis=1)


def _cells(cells: Picture) -> Picture:
    """BEV rows go forward and columns left; a person expects forward up and left on the left."""
    return _enlarge(np.ascontiguousarray(cells[::-1, ::-1]), _SCALE)


def _known(cells: Picture, unknown: NDArray[np.bool_]) -> Picture:
    """Answers where there is a truth to compare with; elsewhere they count for nothing and would only distract."""
    shown = cells.copy()
    shown[unknown] = PALETTE[world.IGNORE]
    return shown


def _difference(truth: NDArray[np.int64], dense: NDArray[np.int64], compressed: NDArray[np.int64]) -> Picture:
    """Grey where the answers agree, green where compression mends a mistake, red where it makes one, else amber."""
    cells = PALETTE[dense] // 3
    cells[truth == world.IGNORE] = PALETTE[world.IGNORE]
    differ = (dense != compressed) & (truth != world.IGNORE)
    cells[differ] = [245, 160, 30]
    cells[differ & (compressed == truth)] = [60, 200, 90]
    cells[differ & (dense == truth)] = [235, 50, 50]
    return cells


def _bird_view(points: NDArray[np.float32]) -> Picture:
    """Points from above at twice the BEV resolution, coloured by height from blue (road) to yellow."""
    times = 2
    size = world.BEV_SIZE * times
    canvas = np.full((size, size, 3), 18, np.uint8)
    place = np.floor((points[:, :2] - [world.BEV_X, world.BEV_Y]) / world.CELL * times).astype(np.int64)
    inside = ((place >= 0) & (place < size)).all(axis=1)
    order = np.argsort(points[inside, 2])
    place, height = place[inside][order], np.clip(points[inside, 2][order] / 2.5, 0.0, 1.0)[:, None]
    colour = np.array([70, 110, 230]) * (1 - height) + np.array([255, 225, 60]) * height
    canvas[place[:, 0], place[:, 1]] = colour.astype(np.uint8)
    return _enlarge(np.ascontiguousarray(canvas[::-1, ::-1]), world.BEV_SIZE * _SCALE // size)
