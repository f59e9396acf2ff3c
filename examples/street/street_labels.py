"""Labels of every task of the street from its scenes: objects in 3D, depth of the image, way-points of the ego car.

All of it is a function of the scenes and of their bird's-eye-view labels, so of (split, seed, index). An object counts
where a sensor could know it: where the label of the cell under its centre is its own class, which the world sets only
for what the camera or the LiDAR really saw, in the camera's view. Both tasks then agree about what there is.

The ego car follows a rule. It drives along the street, from its own pose to the middle of its lane, and stops before
the first thing in its way: before anything that its body would touch, and well clear of pedestrians. The lane, and who
is a pedestrian, only the camera knows; how far the obstacle is the LiDAR knows best: the path needs both.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import street_world as world
from numpy.typing import NDArray

Floats = world.Floats

DETECTED = ("car", "truck", "pedestrian")
DETECTED_KINDS = np.array([world.CAR, world.TRUCK, world.PEDESTRIAN])
NO_OBJECT = -1

DEPTH_STRIDE, MAX_DEPTH_M = 4, 40.0
DEPTH_HEIGHT, DEPTH_WIDTH = world.IMAGE_HEIGHT // DEPTH_STRIDE, world.IMAGE_WIDTH // DEPTH_STRIDE

WAYPOINT_TIMES_S = np.array([0.5, 1.0, 1.5, 2.0], np.float32)
SPEED_M_S = 7.0
MERGE_M = 6.0  # within so much of street the car reaches the middle of its lane
HALF_WIDTH_M, CLEARANCE_M, PEDESTRIAN_CLEARANCE_M = 1.0, 0.1, 1.0
STANDOFF_M = 1.5  # from the origin to the bumper, and a little air
CREEP_M = 0.3  # a car that stands too near already creeps: way-points never coincide


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """The truth for N scenes with S object slots.

    Attributes:
        object_class: (N, S) index into `DETECTED`, `NO_OBJECT` for an empty, unknown or other slot.
        box: (N, S, 7) centre x, y, z, length, width, height in metres, yaw in radians; the boxes have no front.
        depth_m: (N, 1, 16, 40) distance ahead of the camera of every fourth pixel, 0 where it is sky or too far.
        depth_object: (N, 1, 16, 40) whether that pixel shows an object (else the ground, which is flat).
        waypoints_m: (N, 4, 2) x and y of the ego car at `WAYPOINT_TIMES_S`.
    """

    object_class: NDArray[np.int64]
    box: Floats
    depth_m: Floats
    depth_object: NDArray[np.bool_]
    waypoints_m: Floats


def source_sha256() -> str:
    """Hash of this file: changed rules are other data."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def label(scenes: world.Scenes, bev_labels: NDArray[np.int64]) -> Labels:
    """All labels but the segmentation.

    Args:
        scenes: N scenes.
        bev_labels: (N, 48, 48) what the world's `sense` says about them.
    """
    known = known_objects(scenes, bev_labels)
    position = np.full(len(world.CLASSES) + 1, NO_OBJECT)
    position[DETECTED_KINDS] = np.arange(len(DETECTED))  # the last entry is for EMPTY, which is -1
    z = scenes.box[..., 5:6] / 2
    depth_m, depth_object = image_depth(scenes)
    return Labels(
        object_class=np.where(known, position[scenes.kind], NO_OBJECT),
        box=np.concatenate([scenes.box[..., :2], z, scenes.box[..., 3:], scenes.box[..., 2:3]], axis=-1),
        depth_m=depth_m,
        depth_object=depth_object,
        waypoints_m=plan(scenes, known),
    )


def cell_of(x: Floats, y: Floats) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Row-major cell of each ground point and whether it lies on the grid (the cell is 0 where it does not)."""
    row = np.floor((x - world.BEV_X) / world.CELL).astype(np.int64)
    column = np.floor((y - world.BEV_Y) / world.CELL).astype(np.int64)
    inside = (row >= 0) & (row < world.BEV_SIZE) & (column >= 0) & (column < world.BEV_SIZE)
    return np.where(inside, row * world.BEV_SIZE + column, 0), inside


def known_objects(scenes: world.Scenes, bev_labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(N, S) whether a sensor could know each object; the smallest box still covers the centre of its own cell."""
    cell, inside = cell_of(scenes.box[..., 0], scenes.box[..., 1])
    here = np.take_along_axis(bev_labels.reshape(len(bev_labels), -1), cell, axis=1)
    known: NDArray[np.bool_] = inside & (scenes.kind != world.EMPTY) & (here == scenes.kind)
    return known


def image_depth(scenes: world.Scenes) -> tuple[Floats, NDArray[np.bool_]]:
    """Depth and whether it is an object's, (N, 1, 16, 40) each, by the rays of the pixels [2::4, 2::4]."""
    directions, slopes = world.camera_rays()
    first = DEPTH_STRIDE // 2
    hits = world._cast(scenes, world.CAMERA_ORIGIN, directions[first::DEPTH_STRIDE], slopes[first::DEPTH_STRIDE])
    depth = hits.depth.transpose(0, 2, 1)[:, None]
    near = depth <= MAX_DEPTH_M
    seen: NDArray[np.bool_] = (hits.slot.transpose(0, 2, 1)[:, None] >= 0) & near
    return np.where(near, depth, 0.0).astype(np.float32), seen


# ------------------------------------------------------------------------------------------------------- planning


def plan(scenes: world.Scenes, known: NDArray[np.bool_]) -> Floats:
    """(N, 4, 2) where the rule takes the ego car; `known` (N, S) are the objects that it minds."""
    way = stopping_distance(scenes, known)[:, None]
    travelled = SPEED_M_S * WAYPOINT_TIMES_S
    # Exponential approach: full speed at first, at rest at the stop, never beyond it.
    short = np.minimum(way, 1e4)
    u = np.where(np.isfinite(way), short * (1.0 - np.exp(-travelled / short)), travelled)
    w = lateral_path(scenes, u) - scenes.across[:, None]
    c, s = np.cos(scenes.heading)[:, None], np.sin(scenes.heading)[:, None]
    return np.stack([c * u - s * w, s * u + c * w], axis=-1).astype(np.float32)


def lane_centre(scenes: world.Scenes) -> Floats:
    """(N,) lateral street position of the middle of the lane nearest to the ego car."""
    centres = (scenes.lines[:, :-1] + scenes.lines[:, 1:]) / 2
    nearest = np.abs(centres - scenes.across[:, None]).argmin(axis=1)
    middle: Floats = np.take_along_axis(centres, nearest[:, None], axis=1)[:, 0]
    return middle


def lateral_path(scenes: world.Scenes, u: Floats) -> Floats:
    """Lateral street position of the path (N, ...) so many metres of street ahead: a cubic, then the lane's middle.

    It starts where the ego car is and points where it points, and ends in the middle of the lane along the street.
    """
    t = np.clip(u / MERGE_M, 0.0, 1.0)
    start, slope, end = (
        value.reshape((-1,) + (1,) * (u.ndim - 1))
        for value in (scenes.across, -np.tan(scenes.heading) * MERGE_M, lane_centre(scenes))
    )
    rest = 2 * t**3 - 3 * t**2 + 1
    path: Floats = rest * start + (t**3 - 2 * t**2 + t) * slope + (1 - rest) * end
    return path


def stopping_distance(scenes: world.Scenes, known: NDArray[np.bool_]) -> Floats:
    """(N,) metres of street that the ego car may still drive; infinite where nothing is in the way."""
    x, y, yaw, length, width = (scenes.box[..., axis] for axis in range(5))
    c, s = np.cos(scenes.heading)[:, None], np.sin(scenes.heading)[:, None]
    u, w = c * x + s * y, -s * x + c * y + scenes.across[:, None]
    turned = yaw - scenes.heading[:, None]
    cos, sin = np.abs(np.cos(turned)), np.abs(np.sin(turned))
    near = u - (cos * length + sin * width) / 2
    gap = np.abs(w - lateral_path(scenes, np.maximum(near, 0.0))) - (sin * length + cos * width) / 2
    clearance = np.where(scenes.kind == world.PEDESTRIAN, PEDESTRIAN_CLEARANCE_M, CLEARANCE_M)
    blocks = known & (near > 0) & (gap < HALF_WIDTH_M + clearance)
    first = np.where(blocks, near, np.inf).min(axis=1)
    way: Floats = np.maximum(first - STANDOFF_M, CREEP_M).astype(np.float32)
    return way
