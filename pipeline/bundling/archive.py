"""The container of a bundle: a plain tar file (POSIX ustar) of which only one form is accepted.

There is nothing in it but regular files, uncompressed: no links, folders, devices or extensions, no owners or times.
The reader compares each header with the one header that a file of this name and size can have, and padding with zeros,
so that no byte can change unseen and unpacking cannot write outside its folder or more than the archive's own size.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fusepress.pipeline.errors import StoreError
from fusepress.pipeline.store import disk_error

BLOCK = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK)
CHUNK = 1 << 20
MOST_FILES = 10_000
# no leading dot or dash, nothing that a shell, Windows or a terminal would read as more than a name
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+@=, ()\[\]-]*")


class ArchiveError(StoreError):
    """A container that is not as it was written.

    Args:
        message: what is wrong.
        index: number of the entry that it was found at.
    """

    def __init__(self, message: str, index: int) -> None:
        super().__init__(message)
        self.index = index


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of an archive: its name, and where its bytes are."""

    name: str
    size: int
    offset: int


def unsafe(name: str) -> str | None:
    """Why a name cannot be unpacked, or None."""
    parts = name.split("/")
    if not name or len(name.encode()) > 250:
        return "it is empty or too long"
    if not all(_PART.fullmatch(part) and not part.endswith((".", " ")) for part in parts):
        return "a part of it is no plain file name"
    return None


def write_archive(path: Path, files: Mapping[str, Path]) -> None:
    """Write files under their names, in this order; the same files give the same bytes.

    Raises:
        StoreError: a name cannot be unpacked everywhere, there are more files than are unpacked, or the file cannot be
            written.
    """
    if len(files) > MOST_FILES:
        raise StoreError(
            f"expected at most {MOST_FILES:,} files in a bundle, which is what is unpacked; got {len(files):,} at "
            f"{path.name}; remove from the run folder what the run did not make"
        )
    check_names(list(files))
    aside = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as out:
            for name, source in files.items():
                size = source.stat().st_size
                out.write(_header(name, size))
                _copy(source, out, size)
                out.write(bytes(-size % BLOCK))
            out.write(END)
        aside.replace(path)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        aside.unlink(missing_ok=True)


def _copy(source: Path, out: IO[bytes], size: int) -> None:
    left = size
    with source.open("rb") as file:
        while left and (block := file.read(min(CHUNK, left))):
            out.write(block)
            left -= len(block)
    if left:
        raise StoreError(f"expected {size} bytes; got fewer at {source}, which another process changes; try again")


def check_names(names: list[str]) -> None:
    """Refuse names that cannot be unpacked side by side, on a file system that does not tell case apart either.

    Raises:
        StoreError: with the name.
    """
    seen: set[str] = set()
    for name in names:
        folded = name.casefold()
        reason = unsafe(name)
        if reason is None and folded in seen:
            reason = "it is there twice"
        if reason is not None:
            raise StoreError(f"expected a plain relative file name; got {name!r}, and {reason}; rename the file")
        seen.add(folded)
    for name in seen:
        above = name.split("/")[:-1]
        folders = {"/".join(above[:depth]) for depth in range(1, len(above) + 1)}
        if folders & seen:
            raise StoreError(f"expected files and folders apart; got a file above {name!r}; rename one of them")


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    try:
        return info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
    except (ValueError, UnicodeError) as error:
        raise StoreError(
            f"expected a file of at most 8 GiB with a name that tar can hold; got {name!r} of {size} bytes ({error}); "
            "rename the file, or leave it out"
        ) from error


def read_entries(path: Path) -> Iterator[Entry]:
    """The files of an archive, in order; each is given out only after its header and padding were checked.

    Raises:
        ArchiveError: it is cut short, changed, or no archive of ours.
        StoreError: it cannot be read.
    """
    try:
        total = path.stat().st_size
        with path.open("rb") as file:
            yield from _entries(file, total)
    except OSError as error:
        raise StoreError(f"expected to read the bundle; got {error.strerror} at {path}; check the path") from error


def _entries(file: IO[bytes], total: int) -> Iterator[Entry]:
    index, offset = 0, 0
    names: list[str] = []
    while True:
        file.seek(offset)
        header = file.read(BLOCK)
        if header == END[:BLOCK]:
            if header + file.read(BLOCK + 1) != END:
                raise ArchiveError("expected the archive to end; got other bytes behind its last file", index)
            check_names(names)
            return
        name, size = _read_header(header, index)
        end = offset + BLOCK + size
        padding = -size % BLOCK
        if index >= MOST_FILES:
            raise ArchiveError(f"expected at most {MOST_FILES:,} files; got more", index)
        if end + padding + len(END) > total:
            raise ArchiveError(f"expected {size:,} bytes of {name}; got an archive that is cut short there", index)
        file.seek(end)
        if any(file.read(padding)):
            raise ArchiveError(f"expected zeros behind {name}; got other bytes", index)
        names.append(name)
        yield Entry(name, size, offset + BLOCK)
        index, offset = index + 1, end + padding


def _read_header(header: bytes, index: int) -> tuple[str, int]:
    try:
        info = tarfile.TarInfo.frombuf(header, "ascii", "strict")
        if unsafe(info.name) is None and _header(info.name, info.size) == header:
            return info.name, info.size
        found = f"one that this kind of archive does not hold, for {info.name!r}"
    except (tarfile.HeaderError, ValueError, StoreError) as error:
        found = f"a damaged one ({error})"
    raise ArchiveError(f"expected the header of a plain file; got {found}", index)


def unpack(path: Path, folder: Path) -> list[str]:
    """Unpack into a new folder, which holds no more than the archive's own bytes; returns the names.

    Raises:
        ArchiveError: as `read_entries`; what was unpacked before it stays.
        StoreError: the folder cannot be written.
    """
    names = []
    with path.open("rb") as file:
        for entry in read_entries(path):
            target = folder / entry.name
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("xb") as out:  # never through a link, never over a file
                    file.seek(entry.offset)
                    left = entry.size
                    while left and (block := file.read(min(CHUNK, left))):
                        out.write(block)
                        left -= len(block)
            except OSError as error:
                raise disk_error(error, target) from error
            names.append(entry.name)
    return names
