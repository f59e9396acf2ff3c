"""Read KITTI-format folders and project LiDAR sweeps into the camera image.

Formats (Geiger et al., "Are we ready for autonomous driving?", CVPR 2012, and the development kits of the object,
tracking and odometry benchmarks):

* `image_2/NAME.png`: the left colour camera, rectified.
* `velodyne/NAME.bin`: float32 x, y, z (metres, LiDAR frame: x forward, y left, z up) and reflectance.
* `calib.txt` for a whole drive, or `calib/NAME.txt` for each frame: lines `KEY: numbers`, row by row.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fusepress.pipeline.errors import TaskError

Floats = NDArray[np.floating[Any]]
POINT_BYTES = 16
# The same matrix has another name in each benchmark: object, tracking, odometry.
RECTIFICATION_KEYS = ("R0_rect", "R_rect")
LIDAR_TO_CAMERA_KEYS = ("Tr_velo_to_cam", "Tr_velo_cam", "Tr")


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Geometry of one drive or frame.

    Attributes:
        projection: 3x4, rectified camera coordinates -> homogeneous pixels (P2).
        rectification: 3x3, camera -> rectified camera.
        lidar_to_camera: 3x4, LiDAR -> camera.
    """

    projection: Floats
    rectification: Floats
    lidar_to_camera: Floats

    def project(self, points: Floats) -> Floats:
        """Pixels and depths of LiDAR points.

        Args:
            points: (N, 3) or more columns, metres, LiDAR frame.

        Returns:
            (M, 3): u, v in pixels (0 is the centre of the first pixel) and depth in metres, for the M <= N points in
            front of the camera, in their order.
        """
        homogeneous = np.concatenate([points[:, :3], np.ones((len(points), 1))], axis=1).astype(np.float64)
        camera = self.rectification @ (self.lidar_to_camera @ homogeneous.T)
        pixels = self.projection @ np.concatenate([camera, np.ones((1, len(points)))])
        # P2 moves the origin by a few millimetres along z too: what is projected and what is called depth must agree.
        depth = pixels[2]
        front = depth > 0.1
        return np.stack([pixels[0, front] / depth[front], pixels[1, front] / depth[front], depth[front]], axis=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A crop of the camera image, resized: both the picture and the pixels of the points go through it.

    Attributes:
        box: left, top, right, bottom of the crop, in source pixels counted from the outer edge of the first one.
        height: rows of the result.
        width: columns of the result.
    """

    box: tuple[float, float, float, float]
    height: int
    width: int

    @classmethod
    def fit(cls, source_width: int, source_height: int, height: int, width: int) -> View:
        """The largest crop of the wanted aspect ratio: centred sideways, at the bottom (LiDAR sees no sky)."""
        scale = max(width / source_width, height / source_height)
        crop_width, crop_height = width / scale, height / scale
        left = (source_width - crop_width) / 2
        return cls(
            box=(left, source_height - crop_height, left + crop_width, float(source_height)), height=height, width=width
        )

    @classmethod
    def random(
        cls, source_width: int, source_height: int, height: int, width: int, generator: np.random.Generator
    ) -> View:
        """A zoom of up to 1.4 anywhere inside the largest view: new pixels, new occlusions, new edges."""
        left, top, right, bottom = cls.fit(source_width, source_height, height, width).box
        share = generator.uniform(1 / 1.4, 1.0)
        crop_width, crop_height = share * (right - left), share * (bottom - top)
        left = generator.uniform(left, right - crop_width)
        top = generator.uniform(top, bottom - crop_height)
        return cls(box=(left, top, left + crop_width, top + crop_height), height=height, width=width)

    def image(self, image: Image.Image) -> NDArray[np.uint8]:
        """Crop and resize a picture; (height, width, 3) uint8. Pillow's bilinear filter widens when it shrinks."""
        resized = image.resize((self.width, self.height), Image.Resampling.BILINEAR, box=self.box)
        return np.asarray(resized, dtype=np.uint8)

    def pixels(self, projected: Floats) -> Floats:
        """Move (N, 3) u, v, depth from source to view pixels; depth stays."""
        left, top, right, bottom = self.box
        scale_u, scale_v = self.width / (right - left), self.height / (bottom - top)
        u = (projected[:, 0] + 0.5 - left) * scale_u - 0.5
        v = (projected[:, 1] + 0.5 - top) * scale_v - 0.5
        return np.stack([u, v, projected[:, 2]], axis=1)

    def intrinsics(self, projection: Floats) -> Floats:
        """The 3x4 projection matrix of the view: `View.pixels` of the source's projection, as one matrix."""
        left, top, right, bottom = self.box
        scale_u, scale_v = self.width / (right - left), self.height / (bottom - top)
        change = np.array(
            [
                [scale_u, 0, (0.5 - left) * scale_u - 0.5],
                [0, scale_v, (0.5 - top) * scale_v - 0.5],
                [0, 0, 1],
            ]
        )
        return np.asarray(change @ projection)


def depth_map(pixels: Floats, height: int, width: int, *, near: float, far: float) -> NDArray[np.float32]:
    """Depth image of projected points; where several meet in one pixel, the nearest hides the others.

    Args:
        pixels: (N, 3) u, v, depth.
        height: rows.
        width: columns.
        near: points nearer than this many metres are dropped.
        far: points beyond this many metres are dropped.

    Returns:
        (height, width) metres; 0 where there is no point.
    """
    column, row = np.rint(pixels[:, 0]).astype(np.int64), np.rint(pixels[:, 1]).astype(np.int64)
    depth = pixels[:, 2]
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height) & (depth >= near) & (depth <= far)
    nearest = np.full(height * width, np.inf)
    np.minimum.at(nearest, row[inside] * width + column[inside], depth[inside])
    nearest[np.isinf(nearest)] = 0
    return nearest.reshape(height, width).astype(np.float32)


def split_halves(
    depth: NDArray[np.float32], generator: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Deal the points of a depth map into two random halves: disjoint, together complete, sizes differ by at most one.

    Dealing happens after the z-buffer, so that no pixel of one half is known from the other.
    """
    known = np.flatnonzero(depth)
    chosen = generator.permutation(known)[: (len(known) + 1) // 2]
    first = np.zeros_like(depth)
    first.flat[chosen] = depth.flat[chosen]
    second = depth.copy()
    second.flat[chosen] = 0
    return first, second


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """The files of one moment of one drive."""

    drive: str
    name: str
    image: Path
    cloud: Path
    calibration: Path

    @property
    def sample_id(self) -> str:
        """Unique name of the frame."""
        return f"{self.drive}/{self.name}"

    def sha256(self) -> str:
        """Hash of names, sizes and contents of the three files; where they lie does not matter."""
        digest = hashlib.sha256(self.sample_id.encode())
        for path in (self.image, self.cloud, self.calibration):
            content = _read_bytes(path)
            digest.update(f"\0{path.name}\0{len(content)}\0".encode())
            digest.update(hashlib.sha256(content).digest())
        return digest.hexdigest()

    def read(self) -> tuple[Image.Image, Floats]:
        """Camera image, and (N, 3) u, v, depth of the points inside it, in pixels of that image.

        Raises:
            TaskError: a file is missing, damaged, or no point falls into the image.
        """
        image = read_image(self.image)
        projected = read_calibration(self.calibration).project(read_cloud(self.cloud))
        u, v = projected[:, 0], projected[:, 1]
        inside = (u >= -0.5) & (u < image.width - 0.5) & (v >= -0.5) & (v < image.height - 0.5)
        if np.count_nonzero(inside) < 2:
            raise TaskError(
                f"expected LiDAR points inside the image; got {np.count_nonzero(inside)} of {len(projected)} in front "
                f"of the camera at {self.cloud}; check that {self.calibration} belongs to this frame"
            )
        return image, projected[inside]


def find_drives(root: Path) -> dict[str, list[Frame]]:
    """Frames in time order of each drive at `root`: one drive's folder, or a folder of such folders.

    Raises:
        TaskError: there is no drive, or a frame lacks its sweep or its calibration.
    """
    if (root / "image_2").is_dir():
        return {root.name: _frames(root)}
    drives = {p.name: _frames(p) for p in sorted(root.iterdir()) if (p / "image_2").is_dir()} if root.is_dir() else {}
    if not drives:
        found = sorted(p.name for p in root.iterdir())[:6] if root.is_dir() else "no such folder"
        raise TaskError(
            f"expected a KITTI folder with image_2/, velodyne/ and calib.txt or calib/ (or a folder of such folders); "
            f"got {found} at {root}; correct the recipe's `data`"
        )
    return drives


def _frames(drive: Path) -> list[Frame]:
    images = sorted(p for p in (drive / "image_2").iterdir() if p.suffix.lower() in {".png", ".jpg", ".jpeg"})
    frames = []
    for image in images:
        cloud = drive / "velodyne" / f"{image.stem}.bin"
        own, shared = drive / "calib" / f"{image.stem}.txt", drive / "calib.txt"
        calibration = own if own.is_file() else shared
        for path, what in ((cloud, "a LiDAR sweep"), (calibration, f"a calibration (here, or {own})")):
            if not path.is_file():
                raise TaskError(
                    f"expected {what} for {image.name}; got none at {path}; add the file or remove the image"
                )
        frames.append(Frame(drive=drive.name, name=image.stem, image=image, cloud=cloud, calibration=calibration))
    if not frames:
        raise TaskError(f"expected PNG or JPEG frames; got none at {drive / 'image_2'}; correct the recipe's `data`")
    return frames


def read_calibration(path: Path) -> Calibration:
    """Read `KEY: numbers` lines.

    Raises:
        TaskError: the file is unreadable, a matrix is absent, or it has another number of entries.
    """
    entries: dict[str, str] = {}
    try:
        for line in _read_bytes(path).decode().splitlines():
            key, separator, numbers = line.partition(":")
            if separator:
                entries[key.strip()] = numbers
    except UnicodeDecodeError as error:
        raise TaskError(f"expected a KITTI calibration in text; got binary data at {path}; restore the file") from error
    rectification = next((key for key in RECTIFICATION_KEYS if key in entries), None)
    lidar = next((key for key in LIDAR_TO_CAMERA_KEYS if key in entries), LIDAR_TO_CAMERA_KEYS[0])
    # Odometry's `Tr` leads into the rectified camera already, so that file has no rectification.
    if rectification is None and lidar == "Tr":
        rotation: Floats = np.eye(3)
    else:
        rotation = _matrix(entries, rectification or RECTIFICATION_KEYS[0], (3, 3), path)
    return Calibration(
        projection=_matrix(entries, "P2", (3, 4), path),
        rectification=rotation,
        lidar_to_camera=_matrix(entries, lidar, (3, 4), path),
    )


def _matrix(entries: dict[str, str], key: str, shape: tuple[int, int], path: Path) -> Floats:
    if key not in entries:
        raise TaskError(
            f"expected a KITTI calibration with P2, R0_rect and Tr_velo_to_cam; got only {sorted(entries)} at {path}; "
            f"add the line `{key}: ...`"
        )
    try:
        values = np.array([float(number) for number in entries[key].split()])
    except ValueError as error:
        raise TaskError(f"expected numbers in {key}; got {error} at {path}; restore the file") from error
    if values.size != shape[0] * shape[1] or not np.isfinite(values).all():
        raise TaskError(
            f"expected {shape[0] * shape[1]} finite numbers in {key}; got {values.size} at {path}; restore the file"
        )
    return values.reshape(shape)


def read_cloud(path: Path) -> NDArray[np.float32]:
    """LiDAR sweep, (N, 4) float32: x, y, z in metres and reflectance; points that are not finite are an error.

    Raises:
        TaskError: the file is empty, cut off or holds NaN or infinity.
    """
    raw = _read_bytes(path)
    if not raw or len(raw) % POINT_BYTES:
        raise TaskError(
            f"expected a sweep of {POINT_BYTES}-byte points (float32 x, y, z, reflectance); got {len(raw)} bytes at "
            f"{path}; restore the file or remove the frame"
        )
    points = np.frombuffer(raw, dtype="<f4").reshape(-1, 4)
    bad = int((~np.isfinite(points[:, :3]).all(axis=1)).sum())
    if bad:
        raise TaskError(
            f"expected finite coordinates; got {bad} of {len(points)} points with NaN or infinity at {path}; "
            "restore the file or remove the frame"
        )
    return points


def read_image(path: Path) -> Image.Image:
    """Camera image as RGB, decoded in full.

    Raises:
        TaskError: the file is missing, cut off or no picture.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # Pillow reports damage inside a PNG as SyntaxError
        raise TaskError(
            f"expected a readable camera image; got {type(error).__name__}: {error} at {path}; "
            "restore the file or remove the frame"
        ) from error


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TaskError(f"expected a readable file; got {error.strerror} at {path}; restore the file") from error
