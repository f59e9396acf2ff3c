"""Tensors in temporary files, for what must be kept but is rarely read.

Scoring in rounds keeps the weights to set back and the scores of those that went, while a method holds copies of its
own. In a file they cost no memory that the system cannot take back: pages are written out and read again as needed.
A file has no name from the start, so nothing stays behind, even of a killed process.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from fusepress.pipeline.errors import StageError


def parked_zeros(like: Tensor) -> Tensor:
    """Zeros on the CPU, mapped from a temporary file in `tempfile.gettempdir()` (TMPDIR chooses a disk).

    Args:
        like: of the shape and dtype.

    Raises:
        StageError: the disk has no room. It is taken before anything is written: a mapping that ran out of room later
            would end the process.
    """
    if not like.numel():
        return torch.zeros_like(like, device="cpu")
    size = like.numel() * like.element_size()
    handle, path = tempfile.mkstemp(prefix="fusepress-")
    try:
        os.posix_fallocate(handle, 0, size)
        flat = torch.from_file(path, shared=True, size=like.numel(), dtype=like.dtype)
    except OSError as error:
        raise StageError(
            f"expected room for {size} bytes that scoring in rounds puts aside; got {error.strerror} at "
            f"{tempfile.gettempdir()}; free some space, or set TMPDIR to a disk that has it"
        ) from error
    finally:
        os.close(handle)
        Path(path).unlink()
    return flat.reshape(like.shape)


def parked(value: Tensor) -> Tensor:
    """A copy of a tensor as `parked_zeros` makes them; detached."""
    return parked_zeros(value).copy_(value.detach())
