"""The pictures that stages left in the run folder, as data URIs: nothing from outside of it."""

from __future__ import annotations

import base64
import struct
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from fusepress.pipeline.evidence import RunRecord

TYPES = {".png": "image/png", ".svg": "image/svg+xml", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}
OF_LAYERS = ("score", "prune")  # their pictures show layers; those of other stages show samples
PNG = b"\x89PNG\r\n\x1a\n"
WIDE = 1.8  # width over height
MOST_BYTES = 2 * 2**20  # of all pictures, so that the page stays below 3 MB


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture inside the page; a wide one takes the room of two."""

    title: str
    stage: str
    uri: str
    wide: bool


@dataclass(slots=True)
class Pictures:
    """What the page shows, and what it leaves out and why."""

    samples: list[Picture] = field(default_factory=list)
    layers: list[Picture] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def pictures_of(record: RunRecord, run_dir: Path) -> Pictures:
    """The pictures that `details["pictures"]` of the stages name, as long as there is room for them."""
    found = Pictures()
    room = MOST_BYTES
    # pictures of samples are what a reader wants to see, so they take the room first
    for stage in sorted(record.stages, key=lambda stage: stage.name in OF_LAYERS):
        for entry in stage.details.get("pictures", []):
            relative = str(entry.get("path", ""))
            picture = _read(run_dir, stage.name, relative, str(entry.get("title") or relative), room)
            if isinstance(picture, str):
                found.left_out.append(f"{relative} of {stage.name} {picture}")
                continue
            room -= len(picture.uri)
            (found.layers if stage.name in OF_LAYERS else found.samples).append(picture)
    return found


def _read(run_dir: Path, stage: str, relative: str, title: str, room: int) -> Picture | str:
    """The picture, or why it is left out."""
    kind = TYPES.get(PurePosixPath(relative).suffix.lower())
    if kind is None:
        return "is not a PNG, JPEG or SVG file"
    path = _inside(run_dir, stage, relative)
    if path is None:
        return "is not in the run folder"
    if path.stat().st_size * 4 / 3 > room:
        return "does not fit: the pictures of a report may take 2 MiB"
    data = path.read_bytes()
    uri = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    return Picture(title=title, stage=stage, uri=uri, wide=_is_wide(data))


def _is_wide(data: bytes) -> bool:
    """By the header of a PNG file (width and height are its first fields, big-endian); other files are not read."""
    if not data.startswith(PNG) or len(data) < 24:
        return False
    width, height = struct.unpack(">II", data[16:24])
    return bool(width >= WIDE * height)


def _inside(run_dir: Path, stage: str, relative: str) -> Path | None:
    """An existing file of the run, named from the run folder or from the stage's folder; nothing outside."""
    if not relative or PurePosixPath(relative).is_absolute() or ".." in PurePosixPath(relative).parts:
        return None
    return next((path for path in (run_dir / relative, run_dir / stage / relative) if path.is_file()), None)
