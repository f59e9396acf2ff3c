"""A small synthetic street, ray-cast into a camera image and a LiDAR sweep of the very same scene.

Frame: x forward, y left, z up, metres, origin on the ground below the sensors. Every object is an upright box, so a
column of camera pixels (or of laser shots) shares one ground direction, and a box covers one interval of ray slopes
in that column. That makes ray casting exact and cheap: no ray marching, a few array operations a box.

What only the camera can see: lane markings on the road, and which of the person-sized boxes are pedestrians and which
are bushes (both come from one size distribution; the LiDAR has no intensity channel). What the LiDAR gives and the
camera hardly does: range, and anything at all at night or in fog. A knob can undo that (`sense(scenes, redundancy=r)`):
the camera gets a depth channel, the LiDAR three of surface colour, each mixed with noise in the share 1 - r.

Everything is a function of (split, seed, index); nothing is read from disk.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

VERSION = 1
CLASSES = ("free", "lane", "car", "truck", "pedestrian", "bush")
FREE, LANE, CAR, TRUCK, PEDESTRIAN, BUSH = range(6)
EMPTY = -1
IGNORE = 255
SPLITS = ("train", "calib", "eval")
FRAMES_PER_STREET = 4

BEV_SIZE, CELL, BEV_X, BEV_Y = 48, 0.4, 2.0, -9.6
IMAGE_HEIGHT, IMAGE_WIDTH, FOCAL, CENTRE_U, CENTRE_V = 64, 160, 64.0, 80.0, 20.0
CAMERA_ORIGIN = (0.0, 0.0, 1.6)
LIDAR_ORIGIN = (-0.3, 0.0, 1.9)
LIDAR_RANGE, LIDAR_TOP = 28.0, 4.0
PILLARS, POINTS_PER_PILLAR, POINT_FEATURES = 640, 8, 9
COLOURS = 3  # point features that `redundancy` adds, before the last one
DEPTH_SCALE, KNOB_NOISE = 20.0, 0.5  # metres; standard deviation of what the knob's signals drown in
DUMMY_CELL = BEV_SIZE * BEV_SIZE

# Beams from the top down, so that a pillar with too many points keeps the upper ones (objects, not road).
BEAM_SLOPES = np.concatenate([np.linspace(0.06, -0.05, 6), -LIDAR_ORIGIN[2] / np.geomspace(27.0, 2.9, 18)]).astype(
    np.float32
)
AZIMUTHS = np.deg2rad(np.linspace(52.0, -52.0, 112)).astype(np.float32)

# Slots of candidate objects: vehicles first, they are placed first.
_TRUCK_SLOTS, _CAR_SLOTS, _THIN_SLOTS = 2, 7, 24
_SLOTS = _TRUCK_SLOTS + _CAR_SLOTS + _THIN_SLOTS
_MAX_LINES = 5

_CAR_PAINT = [[0.8, 0.1, 0.1], [0.1, 0.2, 0.7], [0.85, 0.85, 0.85], [0.12, 0.12, 0.14], [0.5, 0.5, 0.55],
              [0.9, 0.6, 0.1], [0.1, 0.35, 0.2], [0.45, 0.1, 0.3]]  # fmt: skip
_TRUCK_PAINT = [[0.9, 0.9, 0.85], [0.2, 0.35, 0.6], [0.75, 0.25, 0.15], [0.55, 0.6, 0.6], [0.85, 0.75, 0.3],
                [0.3, 0.3, 0.3], [0.6, 0.45, 0.35], [0.2, 0.5, 0.5]]  # fmt: skip
_CLOTHES = [[0.85, 0.2, 0.2], [0.2, 0.3, 0.8], [0.9, 0.55, 0.15], [0.85, 0.85, 0.8], [0.55, 0.25, 0.6],
            [0.25, 0.25, 0.3], [0.9, 0.4, 0.6], [0.2, 0.55, 0.75]]  # fmt: skip
_LEAVES = [[0.15, 0.4, 0.12], [0.25, 0.5, 0.15], [0.35, 0.5, 0.2], [0.2, 0.32, 0.15], [0.4, 0.45, 0.15],
           [0.12, 0.3, 0.18], [0.3, 0.42, 0.1], [0.2, 0.45, 0.25]]  # fmt: skip
_PAINT = np.zeros((len(CLASSES), 8, 3), np.float32)
_PAINT[CAR], _PAINT[TRUCK], _PAINT[PEDESTRIAN], _PAINT[BUSH] = _CAR_PAINT, _TRUCK_PAINT, _CLOTHES, _LEAVES


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenes:
    """N scenes as arrays; B object slots each, in the ego frame.

    Attributes:
        keys: (split, seed, index) of each scene; the sensor noise is drawn from it.
        kind: (N, B) class of each object, `EMPTY` where there is none.
        box: (N, B, 6) centre x, y, yaw, length, width, height.
        look: (N, B) number in [0, 1) that picks the colour within the class's palette.
        heading: (N,) direction of the street; `along`, `across` (N,): street coordinates of the ego.
        lines: (N, L) lateral position of each lane marking, infinite where there is none; `dashed` (N, L).
        period: (N,) of the dashes, `phase` (N,); `zebra` (N,) start of a crossing, infinite where there is none.
        markings: (N,) whether the paint is there at all (the tests wash it off).
        ambient: (N,) light; `fog` (N,) per metre; `tint` (N, 3); `sun` (N,) azimuth; `ground` (N, 3) road colour.
        image_noise: (N,) standard deviation; `dropout` (N,) share of laser shots that return nothing.
    """

    keys: tuple[tuple[str, int, int], ...]
    kind: Ints
    box: Floats
    look: Floats
    heading: Floats
    along: Floats
    across: Floats
    lines: Floats
    dashed: Bools
    period: Floats
    phase: Floats
    zebra: Floats
    markings: Bools
    ambient: Floats
    fog: Floats
    tint: Floats
    sun: Floats
    ground: Floats
    image_noise: Floats
    dropout: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Frames:
    """What the sensors saw of N scenes, and the truth.

    Attributes:
        image: (N, 3, H, W) in [0, 1]; with `redundancy` a fourth channel, depth in units of `DEPTH_SCALE`.
        points: (N, F, P, M) features of the points of each pillar; the last feature is 1 for a real point. With
            `redundancy` three more before it: the colour of the surface that was hit, whatever the light.
        cells: (N, P) int32 BEV cell of each pillar, row-major from the near right; `DUMMY_CELL` for padding.
        labels: (N, 48, 48) class of each BEV cell, `IGNORE` where no sensor could know.
        camera_object: (N, H, W) slot of the object seen at each pixel, -1 for none.
        sweep: (N, R, 3) laser returns, NaN where there is none; `sweep_object` (N, R) slot that was hit.
    """

    image: Floats
    points: Floats
    cells: NDArray[np.int32]
    labels: Ints
    camera_object: Ints
    sweep: Floats
    sweep_object: Ints


def source_sha256() -> str:
    """Hash of this file: a changed world is other data."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def bev_centres() -> Floats:
    """(48 * 48, 2) x and y of the cell centres; rows go forward, columns go left."""
    steps = (np.arange(BEV_SIZE) + 0.5) * CELL
    x, y = np.meshgrid(BEV_X + steps, BEV_Y + steps, indexing="ij")
    return np.stack([x.ravel(), y.ravel()], axis=-1).astype(np.float32)


def project(points: Floats) -> Floats:
    """Pixel (u, v) of points (..., 3) in front of the camera."""
    x, y, z = points[..., 0], points[..., 1], points[..., 2]
    u = CENTRE_U - FOCAL * (y - CAMERA_ORIGIN[1]) / (x - CAMERA_ORIGIN[0])
    v = CENTRE_V - FOCAL * (z - CAMERA_ORIGIN[2]) / (x - CAMERA_ORIGIN[0])
    return np.stack([u, v], axis=-1)


# ------------------------------------------------------------------------------------------------ drawing scenes


def _generator(*words: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))


def draw_scenes(split: str, seed: int, indices: list[int]) -> Scenes:
    """Scenes of a split. In calib and eval, four frames in a row show the same street from a moving car.

    Args:
        split: train, calib or eval.
        seed: chooses another training stream; calib and eval do not depend on it.
        indices: sample numbers.
    """
    code = SPLITS.index(split)
    clustered = split != "train"
    seed = 0 if clustered else seed
    per_street = FRAMES_PER_STREET if clustered else 1
    slots = np.empty((len(indices), _SLOTS, 9), np.float32)
    street = np.empty((len(indices), 24), np.float32)
    frame = np.empty((len(indices), 8), np.float32)
    for row, index in enumerate(indices):
        shared = _generator(VERSION, code, seed, 0, index // per_street)
        slots[row] = shared.random((_SLOTS, 9), dtype=np.float32)
        street[row] = shared.random(24, dtype=np.float32)
        frame[row] = _generator(VERSION, code, seed, 1, index).random(8, dtype=np.float32)
    number = np.asarray([index % FRAMES_PER_STREET for index in indices], np.float32)
    keys = tuple((split, seed, index) for index in indices)
    return _scenes_from(keys, slots, street, frame, number)


def _between(u: Floats, low: float, high: float) -> Floats:
    return (low + (high - low) * u).astype(np.float32)


def _scenes_from(
    keys: tuple[tuple[str, int, int], ...], slots: Floats, street: Floats, frame: Floats, number: Floats
) -> Scenes:
    heading = _between(street[:, 0], -0.22, 0.22) + _between(frame[:, 0], -0.04, 0.04)
    along = number * _between(street[:, 1], 0.8, 2.0)
    across = _between(street[:, 2], -1.2, 1.2) + _between(frame[:, 1], -0.2, 0.2)
    spacing = _between(street[:, 3], 3.0, 4.0)
    count = 2 + (street[:, 4] * (_MAX_LINES - 1)).astype(np.int64)
    first = -spacing * (np.floor(street[:, 5] * (count - 1)) + 0.5)
    lines = first[:, None] + spacing[:, None] * np.arange(_MAX_LINES)
    lines = np.where(np.arange(_MAX_LINES) < count[:, None], lines, np.inf).astype(np.float32)
    outermost = (np.arange(_MAX_LINES) == 0) | (np.arange(_MAX_LINES) == count[:, None] - 1)
    night = street[:, 12] < 0.2
    ambient = np.where(night, _between(street[:, 13], 0.04, 0.18), _between(street[:, 13], 0.35, 1.1))
    foggy = street[:, 14] < 0.35
    kind, box = _place(slots, street, heading, along, across)
    return Scenes(
        keys=keys,
        kind=kind,
        box=box,
        look=slots[:, :, 8],
        heading=heading,
        along=along,
        across=across,
        lines=lines,
        dashed=(~outermost) | (street[:, 6, None] < 0.25),
        period=_between(street[:, 7], 4.0, 7.0),
        phase=_between(street[:, 8], 0.0, 7.0),
        zebra=np.where(street[:, 9] < 0.4, _between(street[:, 10], 4.0, 20.0), np.inf).astype(np.float32),
        markings=np.ones(len(keys), np.bool_),
        ambient=ambient.astype(np.float32),
        fog=np.where(foggy, _between(street[:, 15], 0.01, 0.08), 0.0).astype(np.float32),
        tint=_between(street[:, 16:19], 0.85, 1.15),
        sun=_between(street[:, 19], 0.0, 2 * np.pi),
        ground=_between(street[:, 20:21], 0.22, 0.42) * np.ones((1, 3), np.float32),
        image_noise=_between(frame[:, 2], 0.01, 0.06),
        dropout=_between(frame[:, 3] ** 2, 0.02, 0.35),
    )


def _place(slots: Floats, street: Floats, heading: Floats, along: Floats, across: Floats) -> tuple[Ints, Floats]:
    """Candidates in street coordinates, greedily kept where they overlap nobody, then moved to the ego frame."""
    n = slots.shape[0]
    kind = np.empty((n, _SLOTS), np.int64)
    kind[:, :_TRUCK_SLOTS] = TRUCK
    vehicles = _TRUCK_SLOTS + _CAR_SLOTS
    kind[:, _TRUCK_SLOTS:vehicles] = CAR
    kind[:, vehicles:] = np.where(slots[:, vehicles:, 0] < 0.5, PEDESTRIAN, BUSH)
    size = np.empty((n, _SLOTS, 3), np.float32)
    for part, low, high in (
        (slice(0, _TRUCK_SLOTS), (6.0, 2.3, 2.6), (8.0, 2.6, 3.4)),
        (slice(_TRUCK_SLOTS, vehicles), (3.8, 1.7, 1.35), (4.8, 2.0, 1.75)),
        (slice(vehicles, _SLOTS), (0.9, 0.9, 1.2), (1.3, 1.3, 1.95)),
    ):
        for axis in range(3):
            size[:, part, axis] = _between(slots[:, part, 1 + axis], low[axis], high[axis])
    u = _between(slots[:, :, 4], 3.0, 28.0)
    w = _between(slots[:, :, 5], -10.0, 10.0)
    crossing = (slots[:, :, 6] < 0.15) & (kind <= TRUCK)
    turn = _between(slots[:, :, 7], -0.06, 0.06) * np.where(kind <= TRUCK, 1.0, 12.0)
    yaw = turn + np.where(crossing, np.pi / 2, 0.0)
    wanted = slots[:, :, 6] > 0.15 + 0.5 * street[:, 11, None]
    wanted |= crossing & (street[:, 11, None] < 0.7)
    cos, sin = np.abs(np.cos(yaw)).astype(np.float32), np.abs(np.sin(yaw)).astype(np.float32)
    reach_u = (cos * size[..., 0] + sin * size[..., 1]) / 2 + np.float32(0.25)
    reach_w = (sin * size[..., 0] + cos * size[..., 1]) / 2 + np.float32(0.25)
    kept = _greedy(wanted, u, w, reach_u, reach_w)
    c, s = np.cos(heading)[:, None], np.sin(heading)[:, None]
    du, dw = u - along[:, None], w - across[:, None]
    x, y = c * du - s * dw, s * du + c * dw
    # Nothing may stand on the ego car or reach behind the sensors' common field of view.
    kept &= (x > 2.5 + size[..., 0] / 2) | ((np.abs(y) > 1.5 + size[..., 0] / 2) & (x > 0.0))
    box = np.concatenate([np.stack([x, y, yaw + heading[:, None]], axis=-1), size], axis=-1)
    return np.where(kept, kind, EMPTY), box.astype(np.float32)


def _greedy(wanted: Bools, u: Floats, w: Floats, reach_u: Floats, reach_w: Floats) -> Bools:
    clash = (np.abs(u[:, :, None] - u[:, None]) < reach_u[:, :, None] + reach_u[:, None]) & (
        np.abs(w[:, :, None] - w[:, None]) < reach_w[:, :, None] + reach_w[:, None]
    )
    kept = np.zeros_like(wanted)
    for slot in range(wanted.shape[1]):
        kept[:, slot] = wanted[:, slot] & ~(clash[:, slot] & kept).any(axis=1)
    return kept


# ---------------------------------------------------------------------------------------------------- ray casting


@dataclass(frozen=True, slots=True, kw_only=True)
class _Hits:
    """(N, C, R) for C columns of R rays: slot of the nearest box or -1, ray parameter, top face, lengthwise face."""

    slot: Ints
    depth: Floats
    top: Bools
    end_face: Bools


def _cast(scenes: Scenes, origin: tuple[float, float, float], directions: Floats, slopes: Floats) -> _Hits:
    """Cast rays `origin + t * (directions[c], slopes[r])`; boxes do not overlap, so nearest entry wins per column."""
    enter, leave, end_face = _slabs(scenes, origin, directions)
    height = scenes.box[:, None, :, 5]
    low = -origin[2] / enter
    high = (height - origin[2]) / np.where(height > origin[2], enter, leave)
    order = np.argsort(-enter, axis=-1)
    low = np.take_along_axis(low, order, -1).astype(np.float32)
    high = np.take_along_axis(high, order, -1).astype(np.float32)
    slot = np.full((*enter.shape[:2], len(slopes)), -1, np.int64)
    busy = np.isfinite(np.take_along_axis(enter, order, -1)).any(axis=(0, 1))
    for rank in np.flatnonzero(busy):
        seen = (slopes > low[:, :, rank, None]) & (slopes < high[:, :, rank, None])
        np.copyto(slot, order[:, :, rank, None], where=seen)
    return _nearest(scenes, origin, slopes, slot, enter, end_face)


def _slabs(scenes: Scenes, origin: tuple[float, float, float], directions: Floats) -> tuple[Floats, Floats, Bools]:
    """Where each column's ground line enters and leaves each box (N, C, B); infinite where it misses."""
    x, y, yaw = scenes.box[..., 0], scenes.box[..., 1], scenes.box[..., 2]
    c, s = np.cos(yaw), np.sin(yaw)
    ox, oy = origin[0] - x, origin[1] - y
    local_o = (c * ox + s * oy, -s * ox + c * oy)
    dx, dy = directions[None, :, None, 0], directions[None, :, None, 1]
    local_d = (c[:, None] * dx + s[:, None] * dy, -s[:, None] * dx + c[:, None] * dy)
    entries, exits = [], []
    for axis in range(2):
        d = np.where(np.abs(local_d[axis]) < 1e-6, np.float32(1e-6), local_d[axis])
        half = scenes.box[:, None, :, 3 + axis] / 2
        t1, t2 = (-half - local_o[axis][:, None]) / d, (half - local_o[axis][:, None]) / d
        entries.append(np.minimum(t1, t2))
        exits.append(np.maximum(t1, t2))
    enter, leave = np.maximum(*entries), np.minimum(*exits)
    hit = (leave > enter) & (enter > 0) & (scenes.kind != EMPTY)[:, None]
    nowhere = np.float32(np.inf)
    first: Floats = np.where(hit, enter, nowhere).astype(np.float32)
    last: Floats = np.where(hit, leave, nowhere).astype(np.float32)
    return first, last, entries[0] > entries[1]


def _nearest(
    scenes: Scenes, origin: tuple[float, float, float], slopes: Floats, slot: Ints, enter: Floats, end_face: Bools
) -> _Hits:
    there = slot >= 0
    at = np.where(there, slot, 0)
    t_in = np.take_along_axis(enter, at, -1)
    t_in = np.where(there, t_in, np.float32(1.0))
    height = np.take_along_axis(np.broadcast_to(scenes.box[:, None, :, 5], enter.shape), at, -1)
    top = there & (origin[2] + t_in * slopes > height)
    safe = np.where(np.abs(slopes) < 1e-6, np.float32(-1e-6), slopes)
    roof = (height - origin[2]) / safe
    ground = np.where(slopes < 0, -origin[2] / safe, np.float32(np.inf))
    depth = np.where(there, np.where(top, roof, t_in), ground)
    return _Hits(
        slot=slot,
        depth=depth.astype(np.float32),
        top=top,
        end_face=np.take_along_axis(end_face, at, -1) & there,
    )


# ------------------------------------------------------------------------------------------------------- painting


def marking_at(scenes: Scenes, x: Floats, y: Floats) -> Bools:
    """Whether road paint covers the ground points (N, ...)."""
    u, w = _street_coordinates(scenes, x, y)
    shape = (-1,) + (1,) * (x.ndim - 1)
    period, phase = scenes.period.reshape(shape), scenes.phase.reshape(shape)
    dash = np.mod(u + phase, period) < 0.6 * period
    painted = np.zeros(u.shape, np.bool_)
    for number in range(_MAX_LINES):
        line = scenes.lines[:, number].reshape(shape)
        painted |= (np.abs(w - line) < 0.3) & (dash | ~scenes.dashed[:, number].reshape(shape))
    left, right = _road_edges(scenes)
    ahead = u - scenes.zebra.reshape(shape)
    stripe = np.mod(w - left.reshape(shape), 1.6) < 0.8
    inside = (w > left.reshape(shape)) & (w < right.reshape(shape))
    painted |= (ahead > 0) & (ahead < 2.8) & stripe & inside
    return painted & scenes.markings.reshape(shape)


def _street_coordinates(scenes: Scenes, x: Floats, y: Floats) -> tuple[Floats, Floats]:
    shape = (-1,) + (1,) * (x.ndim - 1)
    c, s = np.cos(scenes.heading).reshape(shape), np.sin(scenes.heading).reshape(shape)
    return c * x + s * y + scenes.along.reshape(shape), -s * x + c * y + scenes.across.reshape(shape)


def _road_edges(scenes: Scenes) -> tuple[Floats, Floats]:
    finite = np.where(np.isfinite(scenes.lines), scenes.lines, -np.inf)
    return scenes.lines[:, 0] - 0.5, finite.max(axis=1) + 0.5


def _paint_image(scenes: Scenes, hits: _Hits, directions: Floats, slopes: Floats) -> Floats:
    """(N, C, R, 3) colours in [0, 1], before sensor noise."""
    n, columns, rows = hits.slot.shape
    depth = np.minimum(hits.depth, np.float32(80.0))
    x = depth * directions[None, :, None, 0]
    y = depth * directions[None, :, None, 1]
    z = CAMERA_ORIGIN[2] + depth * slopes
    colour = _ground_colour(scenes, x, y)
    sky = ~np.isfinite(hits.depth)
    colour[sky] = (0.55, 0.7, 0.95)
    there = hits.slot >= 0
    scene = np.broadcast_to(np.arange(n)[:, None, None], (n, columns, rows))[there]
    colour[there] = _object_colour(scenes, scene, hits.slot[there], z[there], hits.top[there], hits.end_face[there])
    head_light = np.exp(-depth / 7.0) * (1.0 - np.minimum(scenes.ambient, 1.0))[:, None, None] * 0.5
    light = scenes.ambient[:, None, None] + np.where(sky, 0.0, head_light)
    colour *= light[..., None] * scenes.tint[:, None, None]
    veil = 1.0 - np.exp(-scenes.fog[:, None, None] * depth)
    grey = (0.75 * scenes.ambient)[:, None, None, None]
    return (colour + (grey - colour) * veil[..., None]).astype(np.float32)


def _ground_colour(scenes: Scenes, x: Floats, y: Floats) -> Floats:
    _, w = _street_coordinates(scenes, x, y)
    left, right = _road_edges(scenes)
    verge = (w < left[:, None, None]) | (w > right[:, None, None])
    colour = np.broadcast_to(scenes.ground[:, None, None], (*x.shape, 3)).copy()
    colour[verge] = (0.34, 0.36, 0.2)
    colour[marking_at(scenes, x, y)] = (0.85, 0.85, 0.8)
    return colour


def _object_colour(scenes: Scenes, scene: Ints, slot: Ints, z: Floats, top: Bools, end_face: Bools) -> Floats:
    kind, box = scenes.kind[scene, slot], scenes.box[scene, slot]
    colour = _PAINT[kind, (scenes.look[scene, slot] * 8).astype(np.int64)]
    part = z / box[:, 5]
    window = (kind == CAR) & (part > 0.55) & (part < 0.88) & ~top
    colour[window] = (0.12, 0.14, 0.18)
    colour[(kind == TRUCK) & (part < 0.22)] = (0.1, 0.1, 0.1)
    colour[(kind == PEDESTRIAN) & (part < 0.45)] *= 0.45
    colour[(kind == PEDESTRIAN) & (part > 0.85)] = (0.8, 0.6, 0.5)
    facing = box[:, 2] + np.where(end_face, 0.0, np.pi / 2)
    # A box has two opposite faces: the lit one is as likely seen as the other, |cos| keeps the shading simple.
    shade = np.where(top, 1.05, 0.6 + 0.4 * np.abs(np.cos(facing - scenes.sun[scene])))
    shaded: Floats = (colour * shade[:, None]).astype(np.float32)
    return shaded


# -------------------------------------------------------------------------------------------------------- sensing


def camera_rays() -> tuple[Floats, Floats]:
    """(W, 2) ground direction of each column for one metre of depth, (H,) slope of each row."""
    u = np.arange(IMAGE_WIDTH, dtype=np.float32) + 0.5
    v = np.arange(IMAGE_HEIGHT, dtype=np.float32) + 0.5
    directions = np.stack([np.ones_like(u), (CENTRE_U - u) / FOCAL], axis=-1)
    return directions.astype(np.float32), ((CENTRE_V - v) / FOCAL).astype(np.float32)


def sense(scenes: Scenes, redundancy: float | None = None) -> Frames:
    """Ray-cast scenes into both sensors and label the ground from above.

    Args:
        scenes: what there is.
        redundancy: None for the plain sensors. A number r from 0 to 1 gives the camera a depth channel and the LiDAR
            three of surface colour, each r * signal + (1 - r) * noise: at 1 each sensor measures what the other does.

    Raises:
        ValueError: the redundancy is not from 0 to 1.
    """
    if redundancy is not None and not 0 <= redundancy <= 1:
        raise ValueError(f"expected a redundancy from 0 to 1, or None; got {redundancy}; correct the knob")
    directions, slopes = camera_rays()
    view = _cast(scenes, CAMERA_ORIGIN, directions, slopes)
    image = _paint_image(scenes, view, directions, slopes)
    image = np.ascontiguousarray(image.transpose(0, 3, 2, 1))
    shots = _cast(scenes, LIDAR_ORIGIN, np.stack([np.cos(AZIMUTHS), np.sin(AZIMUTHS)], -1), BEAM_SLOPES)
    sweep = np.empty((len(scenes.keys), shots.slot[0].size, 3), np.float32)
    for row, key in enumerate(scenes.keys):
        noise = _generator(VERSION, SPLITS.index(key[0]), key[1], 2, key[2])
        image[row] += scenes.image_noise[row] * noise.standard_normal(image[row].shape, dtype=np.float32)
        sweep[row] = _sweep(shots.depth[row], scenes.dropout[row], noise)
    np.clip(image, 0.0, 1.0, out=image)
    colours = None
    if redundancy is not None:
        image = np.concatenate([image, _knob(view.depth.transpose(0, 2, 1)[:, None], scenes, redundancy, 3)], axis=1)
        surface = _surface_colour(scenes, shots).transpose(0, 3, 2, 1).reshape(len(scenes.keys), COLOURS, -1)
        colours = _knob(surface, scenes, redundancy, 4).transpose(0, 2, 1)
    points, cells = pillars(sweep, colours)
    sweep_object = shots.slot.transpose(0, 2, 1).reshape(len(scenes.keys), -1)
    camera_object = np.ascontiguousarray(view.slot.transpose(0, 2, 1))
    depth = view.depth.transpose(0, 2, 1)
    returned = np.isfinite(sweep[..., 0])
    return Frames(
        image=image,
        points=points,
        cells=cells,
        labels=_label(scenes, camera_object, depth, np.where(returned, sweep_object, -1)),
        camera_object=camera_object,
        sweep=sweep,
        sweep_object=np.where(returned, sweep_object, -1),
    )


def _knob(signal: Floats, scenes: Scenes, redundancy: float, stream: int) -> Floats:
    """Mix r * signal + (1 - r) * noise; the noise has a generator of its own, so that the plain sensors do not feel it.

    Args:
        signal: (N, ...); depths (stream 3) are brought to about one first, sky to zero.
        scenes: for the keys.
        redundancy: r.
        stream: 3 for depth, 4 for colour.
    """
    if stream == 3:
        signal = np.where(np.isfinite(signal), np.minimum(signal, np.float32(40.0)) / np.float32(DEPTH_SCALE), 0.0)
    mixed = np.empty(signal.shape, np.float32)
    for row, key in enumerate(scenes.keys):
        noise = _generator(VERSION, SPLITS.index(key[0]), key[1], stream, key[2])
        drawn = noise.standard_normal(signal[row].shape, dtype=np.float32)
        mixed[row] = redundancy * signal[row] + (1.0 - redundancy) * KNOB_NOISE * drawn
    return mixed


def _surface_colour(scenes: Scenes, shots: _Hits) -> Floats:
    """(N, C, R, 3) colour of what each laser shot hits, without sun, lamps and fog: a laser brings its own light."""
    n, columns, rows = shots.slot.shape
    depth = np.minimum(shots.depth, np.float32(80.0))
    x = LIDAR_ORIGIN[0] + depth * np.cos(AZIMUTHS)[None, :, None]
    y = depth * np.sin(AZIMUTHS)[None, :, None]
    z = LIDAR_ORIGIN[2] + depth * BEAM_SLOPES
    colour = _ground_colour(scenes, x, y)
    there = shots.slot >= 0
    scene = np.broadcast_to(np.arange(n)[:, None, None], (n, columns, rows))[there]
    colour[there] = _object_colour(scenes, scene, shots.slot[there], z[there], shots.top[there], shots.end_face[there])
    return colour.astype(np.float32)


def _sweep(depth: Floats, dropout: np.float32, noise: np.random.Generator) -> Floats:
    """Returns (R, 3) of one scene, beams from the top down, NaN where a shot came back empty."""
    reach = depth.T + 0.03 * noise.standard_normal(depth.T.shape, dtype=np.float32)
    # Far and grazing shots are lost more often.
    lost = noise.random(depth.T.shape, dtype=np.float32) < dropout * (
        0.4 + 1.2 * np.minimum(depth.T / LIDAR_RANGE, 1.0)
    )
    reach = np.where(lost | (reach > LIDAR_RANGE), np.float32(np.nan), reach)
    x = LIDAR_ORIGIN[0] + reach * np.cos(AZIMUTHS)
    y = LIDAR_ORIGIN[1] + reach * np.sin(AZIMUTHS)
    z = LIDAR_ORIGIN[2] + reach * BEAM_SLOPES[:, None]
    return np.stack([x, y, z], axis=-1).reshape(-1, 3).astype(np.float32)


def pillars(sweep: Floats, colours: Floats | None = None) -> tuple[Floats, NDArray[np.int32]]:
    """Group returns (N, R, 3) into padded pillars: features (N, F, P, M) and cells (N, P).

    The nearest `PILLARS` rows of cells and the first `POINTS_PER_PILLAR` returns of each are kept. Colours (N, R, 3),
    if any, become three more features before the last.
    """
    n, rays = sweep.shape[:2]
    row = np.floor((np.nan_to_num(sweep[..., 0], nan=-1.0) - BEV_X) / CELL).astype(np.int64)
    column = np.floor((np.nan_to_num(sweep[..., 1], nan=0.0) - BEV_Y) / CELL).astype(np.int64)
    inside = (row >= 0) & (row < BEV_SIZE) & (column >= 0) & (column < BEV_SIZE)
    inside &= np.nan_to_num(sweep[..., 2], nan=np.inf) < LIDAR_TOP
    cell = np.where(inside, row * BEV_SIZE + column, DUMMY_CELL)
    order = np.argsort(cell, axis=1, kind="stable")
    cell = np.take_along_axis(cell, order, 1)
    new = np.ones((n, rays), np.bool_)
    new[:, 1:] = cell[:, 1:] != cell[:, :-1]
    pillar = np.cumsum(new, axis=1) - 1
    position = np.arange(rays)
    within = position - np.maximum.accumulate(np.where(new, position, 0), axis=1)
    keep = (cell < DUMMY_CELL) & (pillar < PILLARS) & (within < POINTS_PER_PILLAR)
    scene = np.nonzero(keep)[0]
    xyz = np.zeros((n, PILLARS, POINTS_PER_PILLAR, 3), np.float32)
    valid = np.zeros((n, PILLARS, POINTS_PER_PILLAR), np.float32)
    cells = np.full((n, PILLARS), DUMMY_CELL, np.int32)
    xyz[scene, pillar[keep], within[keep]] = np.take_along_axis(sweep, order[..., None], 1)[keep]
    valid[scene, pillar[keep], within[keep]] = 1.0
    cells[scene, pillar[keep]] = cell[keep]
    features = pillar_features(xyz, valid, cells)
    if colours is not None:
        seen = np.zeros((n, PILLARS, POINTS_PER_PILLAR, COLOURS), np.float32)
        seen[scene, pillar[keep], within[keep]] = np.take_along_axis(colours, order[..., None], 1)[keep]
        features = np.concatenate([features[:, :-1], seen.transpose(0, 3, 1, 2), features[:, -1:]], axis=1)
    return features, cells


def pillar_features(xyz: Floats, valid: Floats, cells: NDArray[np.int32]) -> Floats:
    """Nine features a point: position, offset from the pillar's mean, offset from its centre, realness.

    Args:
        xyz: (N, P, M, 3) metres.
        valid: (N, P, M) 1 for a real point.
        cells: (N, P).
    """
    count = np.maximum(valid.sum(axis=2), 1.0)
    mean = (xyz * valid[..., None]).sum(axis=2) / count[..., None]
    centres = np.concatenate([bev_centres(), np.zeros((1, 2), np.float32)])[cells]
    features = np.stack(
        [
            xyz[..., 0] / 10.0 - 1.0,
            xyz[..., 1] / 10.0,
            xyz[..., 2],
            *((xyz - mean[:, :, None])[..., axis] * scale for axis, scale in ((0, 5.0), (1, 5.0), (2, 1.0))),
            *((xyz[..., axis] - centres[:, :, None, axis]) * 5.0 for axis in range(2)),
            np.ones_like(valid),
        ],
        axis=1,
    )
    return (features * valid[:, None]).astype(np.float32)


def xyz_of(points: Floats) -> Floats:
    """Invert `pillar_features`: (N, P, M, 3) metres; meaningless where the last feature is 0."""
    x, y, z = (points[:, 0] + 1.0) * 10.0, points[:, 1] * 10.0, points[:, 2]
    return np.stack([x, y, z], axis=-1).astype(np.float32)


def beam_of(xyz: Floats) -> Ints:
    """Number of the laser beam (0 is the top one) that each return (..., 3) came from."""
    reach = np.hypot(xyz[..., 0] - LIDAR_ORIGIN[0], xyz[..., 1] - LIDAR_ORIGIN[1])
    slope = (xyz[..., 2] - LIDAR_ORIGIN[2]) / np.maximum(reach, 1e-3)
    between = (BEAM_SLOPES[1:] + BEAM_SLOPES[:-1]) / 2
    beam: Ints = np.searchsorted(-between, -slope)
    return beam


def _label(scenes: Scenes, camera_object: Ints, depth: Floats, sweep_object: Ints) -> Ints:
    """Class of each cell; ground that the camera cannot see and objects that nobody hit are `IGNORE`."""
    centres = bev_centres()
    n = len(scenes.keys)
    x, y = np.broadcast_to(centres[:, 0], (n, len(centres))), np.broadcast_to(centres[:, 1], (n, len(centres)))
    labels = np.where(marking_at(scenes, x, y), LANE, FREE)
    labels[_hidden_ground(centres, camera_object, depth)] = IGNORE
    for slot in range(scenes.kind.shape[1]):
        present = scenes.kind[:, slot] != EMPTY
        if not present.any():
            continue
        box = scenes.box[:, slot]
        c, s = np.cos(box[:, 2])[:, None], np.sin(box[:, 2])[:, None]
        dx, dy = x - box[:, 0, None], y - box[:, 1, None]
        inside = (np.abs(c * dx + s * dy) < box[:, 3, None] / 2) & (np.abs(c * dy - s * dx) < box[:, 4, None] / 2)
        seen = ((camera_object == slot).sum(axis=(1, 2)) >= 6) | ((sweep_object == slot).sum(axis=1) >= 2)
        value = np.where(seen, scenes.kind[:, slot], IGNORE)
        labels = np.where(inside & present[:, None], value[:, None], labels)
    outside = np.abs(centres[:, 1]) > (IMAGE_WIDTH / 2 / FOCAL) * centres[:, 0]
    labels[:, outside] = IGNORE
    return labels.reshape(n, BEV_SIZE, BEV_SIZE)


def _hidden_ground(centres: Floats, camera_object: Ints, depth: Floats) -> Bools:
    """Whether a box stands between the camera and each cell's ground: looked up in the camera's own ray cast."""
    ground = np.concatenate([centres, np.zeros((len(centres), 1), np.float32)], axis=1)
    pixel = np.floor(project(ground)).astype(np.int64)
    u = np.clip(pixel[:, 0], 0, IMAGE_WIDTH - 1)
    v = np.clip(pixel[:, 1], 0, IMAGE_HEIGHT - 1)
    hidden: Bools = (camera_object[:, v, u] >= 0) & (depth[:, v, u] < centres[:, 0] - CELL)
    return hidden


def with_kinds_swapped(scenes: Scenes) -> Scenes:
    """The same scenes with every pedestrian a bush and every bush a pedestrian."""
    swap = np.arange(-1, len(CLASSES))
    swap[1 + PEDESTRIAN], swap[1 + BUSH] = BUSH, PEDESTRIAN
    return replace(scenes, kind=swap[scenes.kind + 1])


def describe() -> dict[str, Any]:
    """Constants of the world, for fingerprints and reports."""
    return {
        "version": VERSION,
        "classes": list(CLASSES),
        "bev": [BEV_SIZE, CELL, BEV_X, BEV_Y],
        "image": [IMAGE_HEIGHT, IMAGE_WIDTH, FOCAL],
        "lidar": [len(BEAM_SLOPES), len(AZIMUTHS), LIDAR_RANGE],
        "pillars": [PILLARS, POINTS_PER_PILLAR, POINT_FEATURES],
        "scene_fields": [item.name for item in fields(Scenes)],
    }
