"""One check of a bundle, and how a check fails that met what it did not expect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fusepress.pipeline.errors import FusepressError, StoreError

Status = Literal["ok", "failed", "not checked"]


@dataclass(frozen=True, slots=True)
class Check:
    """One check, and what it found."""

    name: str
    status: Status
    why: str


def guarded(name: str, check: Callable[[], Check]) -> Check:
    """A check that meets what it did not expect has failed: a bundle may hold anything."""
    try:
        return check()
    except FusepressError as error:
        return Check(name, "failed", str(error))
    except Exception as error:  # noqa: BLE001  parsers of other libraries, on bytes of a stranger
        return Check(name, "failed", f"{type(error).__name__}: {str(error)[:300]}")


def within(folder: Path, relative: str, what: str) -> Path:
    """A path in a bundle, which may not lead out of it.

    Raises:
        StoreError: it does.
    """
    path = folder / relative
    if not path.resolve().is_relative_to(folder.resolve()):
        raise StoreError(f"expected the {what} within the bundle; got the path {relative!r}; do not use it")
    return path
