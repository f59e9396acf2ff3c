"""What a failing sensor does to a tensor: pure functions of one input, its layout and a severity from 0 to 3.

Severity 0 is a healthy sensor and gives the input back bit for bit; a higher severity never does less. Random choices
(noise, lost returns, lost cameras) are drawn by sample id, so that a sample fails the same way in any batch and
process. `docs/robustness.md` lists the failures; `corrupt.py` names them.

Suffixes: N batch, V views, C channels, H rows, W columns.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fusepress.pipeline.errors import TaskError

Kind = Literal["image", "images", "points", "range", "bev"]
NOISE_STD = (0.0, 0.1, 0.25, 0.5)  # by severity, in standard deviations of the sample
DARK_GAIN = (1.0, 0.5, 0.25, 0.1)
BRIGHT_GAIN = (1.0, 1.5, 2.5, 4.0)
DROP_EVERY = (0, 4, 3, 2)
LOST_VIEWS = (0, 1, 2, 3)
KEPT_VIEW = (1.0, 0.75, 0.5, 0.25)  # central share of the field of view
LOST_RETURNS = (0.0, 0.3, 0.6, 0.85)
ROTATED_DEG = (0.0, 1.0, 2.0, 4.0)
SHIFTED_M = (0.0, 0.1, 0.2, 0.4)
SHIFTED_SHARE = (0.0, 0.01, 0.02, 0.04)  # of an image's width
FULL_TURN_DEG = 360.0
OPTIONS: Mapping[str, frozenset[str]] = {
    "image": frozenset({"black", "white"}),
    "images": frozenset({"black", "white"}),
    "points": frozenset({"ring"}),
    "range": frozenset({"fov_deg"}),
    "bev": frozenset({"cell_m", "sensor", "forward"}),
}
Levels = float | tuple[float, ...] | None  # of all channels, or of each


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What the dimensions of an input mean.

    Attributes:
        kind: image [N, C, H, W]; images [N, V, C, H, W] of several cameras; points [N, ..., F], whose first features
            are x (forward), y (left) and z in metres, a row of zeros being padding; range [N, C, H, W], whose rows are
            beams and whose columns are azimuths; bev [N, C, H, W], a grid seen from above.
        black, white: the darkest and the brightest value that the camera gives (after the task's normalisation), of
            all channels or of each.
        ring: of points: the feature that numbers their beam.
        fov_deg: of a range map: the angle that its columns cover; a full turn wraps around.
        cell_m: of a bev grid: metres a cell.
        sensor: of a bev grid: row and column of the sensor.
        forward: of a bev grid: whether straight ahead is up (its rows fall with x, and its columns with y) or down.
    """

    kind: Kind
    black: Levels = None
    white: Levels = None
    ring: int | None = None
    fov_deg: float = FULL_TURN_DEG
    cell_m: float | None = None
    sensor: tuple[float, float] | None = None
    forward: Literal["up", "down"] = "up"

    @property
    def is_image(self) -> bool:
        """A camera made it."""
        return self.kind in ("image", "images")


def parse_layout(declared: Any, where: str) -> Layout:
    """A layout from what a task declares: its name, or a dict of `layout` and options.

    Raises:
        TaskError: no such layout, or an option that it does not have.
    """
    options = dict(declared) if isinstance(declared, dict) else {"layout": declared}
    kind = options.pop("layout", None)
    if kind not in get_args(Kind):
        raise TaskError(
            f"expected a layout of {', '.join(get_args(Kind))}; got {kind!r} at {where}; correct it, or write None for "
            "an input that failures leave as it is"
        )
    unknown = sorted(options.keys() - OPTIONS[kind])
    if unknown:
        raise TaskError(
            f"expected options of the layout {kind!r}, {sorted(OPTIONS[kind])}; got {unknown} at {where}; correct them"
        )
    for name in ("black", "white", "sensor"):
        if isinstance(options.get(name), list):
            options[name] = tuple(options[name])
    return Layout(kind=kind, **options)


# ------------------------------------------------------------------------------------------------------ any layout


def blank(value: Tensor, severity: int) -> Tensor:
    """A dead sensor gives zeros, whatever the severity above 0."""
    return torch.zeros_like(value) if severity else value


def noise(value: Tensor, severity: int, sample_ids: Sequence[str], name: str) -> Tensor:
    """Gaussian noise in standard deviations of the sample itself."""
    noisy = []
    for sample, sample_id in zip(value, sample_ids, strict=True):
        generator = generator_of(f"{sample_id}\0{name}\0{severity}")
        drawn = torch.randn(sample.shape, generator=generator, dtype=torch.float32).to(sample)
        noisy.append(sample + NOISE_STD[severity] * sample.float().std(correction=0).to(sample) * drawn)
    return torch.stack(noisy)


def drop_every(value: Tensor, severity: int) -> Tensor | None:
    """Every fourth, third or second element along the last dimension but one is zero; None below two dimensions."""
    if value.dim() < 2:
        return None
    dim = max(value.dim() - 2, 1)
    shape = [-1 if d == dim else 1 for d in range(value.dim())]
    return value.masked_fill(_every(torch.arange(value.shape[dim], device=value.device), severity).reshape(shape), 0)


def generator_of(text: str) -> torch.Generator:
    """Random numbers that depend on a text only."""
    seed = hashlib.sha256(text.encode()).digest()[:8]
    return torch.Generator().manual_seed(int.from_bytes(seed, "little") >> 1)


def _every(number: Tensor, severity: int) -> Tensor:
    every = DROP_EVERY[severity]
    return number % every == every - 1 if every else torch.zeros_like(number, dtype=torch.bool)


# --------------------------------------------------------------------------------------------------------- cameras


def expose(value: Tensor, gain: float, layout: Layout) -> Tensor:
    """Light times a gain, between the camera's black and white.

    Undeclared, black is 0 and white the sample's brightest value.

    Raises:
        TaskError: values below 0 with undeclared black: nobody can tell what is dark then.
    """
    black = _levels(0.0 if layout.black is None else layout.black, value)
    if layout.black is None and gain > 1 and bool((value < 0).any()):
        raise TaskError(
            f"expected an image from 0 upwards; got values down to {float(value.min()):.3g}; declare black and white "
            'in input_layouts, e.g. {"layout": "image", "black": [-2.1, -2.0, -1.8], "white": [2.2, 2.4, 2.6]}'
        )
    lit = black + (value - black) * gain if gain != 1 else value
    if gain <= 1:
        return lit
    brightest = value.flatten(1).amax(1).reshape(-1, *[1] * (value.dim() - 1))
    white = brightest if layout.white is None else _levels(layout.white, value)
    return torch.minimum(lit, white.expand_as(lit))


def _levels(level: float | tuple[float, ...], value: Tensor) -> Tensor:
    levels = torch.as_tensor(level, dtype=value.dtype, device=value.device)
    if levels.dim() and len(levels) != value.shape[-3]:
        raise TaskError(
            f"expected black and white of {value.shape[-3]} channels, or one of all; got {len(levels)}; correct "
            "input_layouts"
        )
    return levels.reshape(-1, 1, 1) if levels.dim() else levels


def lose_views(values: dict[str, Tensor], layouts: Mapping[str, Layout], severity: int, ids: Sequence[str]) -> None:
    """Zero one, two or three of a modality's sensors in place, at least one stays; which ones is drawn by sample id.

    Raises:
        TaskError: there is only one.
    """
    views = [
        (name, number)
        for name, value in values.items()
        for number in range(value.shape[1] if layouts[name].kind == "images" else 1)
    ]
    if len(views) < 2:
        raise TaskError(
            f"expected several sensors of one modality, of which one can be lost; got one, {list(values)}; give "
            'several inputs, or declare "images" in input_layouts for [N, V, C, H, W]; `blank` is for a single one'
        )
    for row, sample_id in enumerate(ids):
        order = torch.randperm(len(views), generator=generator_of(f"{sample_id}\0lost"))
        for place in order[: min(LOST_VIEWS[severity], len(views) - 1)].tolist():
            name, number = views[place]
            (values[name][row, number] if layouts[name].kind == "images" else values[name][row]).zero_()


# -------------------------------------------------------------------------------------- geometry, layout by layout


def narrow(value: Tensor, severity: int, layout: Layout) -> Tensor:
    """Only the central 75, 50 or 25 % of the field of view is left.

    Of points, the field of view is what the sample's own points cover on either side of straight ahead.
    """
    if layout.kind in ("points", "bev"):
        azimuth, there = _azimuths(value, layout)
        extent = torch.where(there, azimuth.abs(), 0.0).flatten(1).amax(1)
        seen = azimuth.abs() <= KEPT_VIEW[severity] * extent.reshape(-1, *[1] * (azimuth.dim() - 1))
        return _kept(value, seen, layout)
    width = value.shape[-1]
    outside = (width - max(1, round(KEPT_VIEW[severity] * width))) / 2
    column = torch.arange(width, device=value.device)
    return value.masked_fill((column < math.floor(outside)) | (column >= width - math.ceil(outside)), 0)


def sparse(value: Tensor, severity: int, layout: Layout, sample_ids: Sequence[str], name: str) -> Tensor:
    """30, 60 or 85 % of the returns are lost: points, pixels of a range map, cells of a grid."""
    shape = value.shape[1:-1] if layout.kind == "points" else value.shape[2:]
    luck = torch.stack([torch.rand(shape, generator=generator_of(f"{one}\0{name}\0sparse")) for one in sample_ids])
    return _kept(value, (luck >= LOST_RETURNS[severity]).to(value.device), layout)


def drop_rings(value: Tensor, severity: int, layout: Layout) -> Tensor:
    """Points of every fourth, third or second beam, by the feature that numbers the beams."""
    assert layout.ring is not None
    if not -value.shape[-1] <= layout.ring < value.shape[-1]:
        raise TaskError(
            f"expected a feature of {value.shape[-1]} that numbers the beams; got ring {layout.ring}; correct it in "
            "input_layouts"
        )
    return _kept(value, ~_every(value[..., layout.ring].round().long(), severity), layout)


def rotate(value: Tensor, degrees: float, layout: Layout) -> Tensor:
    """A sensor that is mounted askew: points and grids about the vertical, an image about its axis.

    From x towards y, from rows towards columns; the columns of a range map move by at least one.
    """
    if degrees == 0:
        return value
    if layout.kind == "points":
        return rotate_points(value, degrees)
    if layout.kind == "range":
        columns = max(1, round(degrees / layout.fov_deg * value.shape[-1]))
        return _moved(value, columns, wraps=layout.fov_deg >= FULL_TURN_DEG)
    centre = _sensor_of(value, layout)
    angle = math.radians(degrees)
    cos, sin = math.cos(angle), math.sin(angle)

    def source(row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        row, column = row - centre[0], column - centre[1]
        return cos * row + sin * column + centre[0], cos * column - sin * row + centre[1]

    return _resampled(value, source)


def rotate_points(value: Tensor, degrees: float) -> Tensor:
    """Points [..., F] turned about the vertical from x towards y; other features stay.

    (x, y) -> (x cos a - y sin a, x sin a + y cos a); the negative angle undoes it.
    """
    angle = math.radians(degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = value[..., :1], value[..., 1:2]
    return torch.cat([cos * x - sin * y, sin * x + cos * y, value[..., 2:]], dim=-1)


def shift(value: Tensor, severity: int, layout: Layout) -> Tensor:
    """A sensor that sits 0.1, 0.2 or 0.4 m beside its place; an image that is off by 1, 2 or 4 % of its width.

    Raises:
        TaskError: a range map, whose ranges would change with every point's direction, or a grid without `cell_m`.
    """
    if severity == 0:
        return value
    if layout.kind == "points":
        real = _real(value)[..., None]
        return torch.cat(
            [value[..., :1], value[..., 1:2] + SHIFTED_M[severity] * real.to(value.dtype), value[..., 2:]], dim=-1
        )
    if layout.kind == "range":
        raise TaskError(
            "expected points or a grid to shift; got a range map, in which a shift moves every return differently; "
            "write a corrupt() of your own"
        )
    if layout.kind == "bev":
        if layout.cell_m is None:
            raise TaskError(
                'expected the size of a grid\'s cells to shift it; got none; add "cell_m" to its input_layouts'
            )
        cells = (1 if layout.forward == "down" else -1) * SHIFTED_M[severity] / layout.cell_m
        return _resampled(value, lambda row, column: (row, column - cells))
    return _moved(value, max(1, round(SHIFTED_SHARE[severity] * value.shape[-1])), wraps=False)


def _real(points: Tensor) -> Tensor:
    """Which rows are points and not padding."""
    return (points != 0).any(-1)


def _azimuths(value: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Angles from straight ahead of points or cells, and where there is something."""
    if layout.kind == "points":
        return torch.atan2(value[..., 1], value[..., 0]), _real(value)
    row, column = _sensor_of(value, layout)
    rows_H1 = torch.arange(value.shape[-2], device=value.device, dtype=torch.float32)[:, None]
    columns_W = torch.arange(value.shape[-1], device=value.device, dtype=torch.float32)
    if layout.forward == "up":  # no factor of -1: it would make a -0, which lies behind the sensor
        x_H1, y_W = row - rows_H1, column - columns_W
    else:
        x_H1, y_W = rows_H1 - row, columns_W - column
    azimuth_HW = torch.atan2(*torch.broadcast_tensors(y_W, x_H1))
    return azimuth_HW.expand(value.shape[0], -1, -1), (value != 0).any(1)


def _sensor_of(value: Tensor, layout: Layout) -> tuple[float, float]:
    """Row and column that a picture or grid turns about.

    Raises:
        TaskError: a grid without `sensor`.
    """
    if layout.kind != "bev":
        return (value.shape[-2] - 1) / 2, (value.shape[-1] - 1) / 2
    if layout.sensor is None:
        raise TaskError(
            'expected row and column of the sensor in its grid; got none; add "sensor" to its input_layouts'
        )
    return layout.sensor


def _kept(value: Tensor, kept: Tensor, layout: Layout) -> Tensor:
    """Zeros where something is lost: all features of a point, all channels of a pixel."""
    return value.masked_fill(~(kept[..., None] if layout.kind == "points" else kept[:, None]), 0)


def _moved(value: Tensor, columns: int, *, wraps: bool) -> Tensor:
    moved = value.roll(columns, -1)
    if not wraps:
        moved[..., :columns] = 0
    return moved


def _resampled(value: Tensor, source: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """[N, ..., H, W] read, bilinearly and zero outside, at the row and column that `source` names for each pixel."""
    height, width = value.shape[-2:]
    rows, columns = torch.meshgrid(
        torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64), indexing="ij"
    )
    row, column = source(rows, columns)
    grid_HW2 = torch.stack([(2 * column + 1) / width - 1, (2 * row + 1) / height - 1], dim=-1).float()
    flat = value.reshape(-1, 1, height, width).float()
    found = torch.nn.functional.grid_sample(
        flat, grid_HW2.to(value.device).expand(len(flat), -1, -1, -1), align_corners=False
    ).reshape(value.shape)
    return (found if value.is_floating_point() else found.round()).to(value.dtype)
