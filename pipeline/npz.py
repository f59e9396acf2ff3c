"""Arrays from an npz file that may be anybody's: no pickles, and never more memory than the file has bytes."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from fusepress.pipeline.errors import StoreError

Arrays = dict[str, npt.NDArray[Any]]
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def load_npz(path: Path, what: str) -> Arrays:
    """Read the arrays of an npz file as `numpy.savez` writes it.

    Args:
        path: the file.
        what: it holds, for the message.

    Raises:
        FileNotFoundError: there is none.
        StoreError: it is compressed, its members lie over each other or claim another size than they have (all of which
            could take any amount of memory), or it is no such file at all.
    """
    content = path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = archive.infolist()
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise ValueError("compressed members, which could unpack to any size")
            if sum(member.file_size for member in members) > len(content):
                raise ValueError("members that lie over each other, which could unpack to any size")
            return {member.filename.removesuffix(".npy"): _array(archive, member) for member in members}
    except Exception as error:  # zipfile and numpy raise a dozen kinds on bytes that are none of theirs
        raise StoreError(
            f"expected {what}; got a file that does not fit at {path} ({error}); run `fusepress compress` again"
        ) from error


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> npt.NDArray[Any]:
    with archive.open(member) as file:
        shape, by_columns, dtype = _header(file)
        data = file.read()
    if dtype.hasobject:
        raise ValueError("pickled objects")
    count = 1
    for size in shape:
        count *= size  # of any size: Python's numbers have no end
    if count * dtype.itemsize != len(data) or (dtype.itemsize == 0 and count):
        raise ValueError(f"{member.filename} of {len(data)} bytes, which claims the shape {shape}")
    flat = np.frombuffer(data, dtype) if data else np.zeros(0, dtype)
    return flat.reshape(shape, order="F" if by_columns else "C").copy()


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version not in HEADERS:
        raise ValueError(f"npy version {version}")
    return HEADERS[version](file)
