"""Timing caches: how long kernels took on a device, so that the next build need not try them again.

A cache holds for one library version on one device in one mode, and is a hard error elsewhere; so each has a file of
its own, named by the hash of what it holds for, with the sha256 of its bytes beside it. A file with other bytes is not
used. The sha256 before and after a build belongs to the engine's record: with other timings the builder may choose
other kernels.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fusepress.pipeline.store import atomic_write_bytes, atomic_write_text


@dataclass(frozen=True, slots=True, kw_only=True)
class TimingCacheFile:
    """A cache on disk.

    Attributes:
        folder: of all caches.
        identity: what it holds for: library, version, device, mode, flags.
    """

    folder: Path
    identity: Mapping[str, str]

    @property
    def key(self) -> str:
        """Names the file."""
        text = json.dumps(dict(self.identity), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def path(self) -> Path:
        """The cache; its record is beside it with the suffix .json."""
        return self.folder / f"{self.key}.timing"

    def read(self) -> tuple[bytes, str]:
        """Its bytes (none where it cannot be used), and why."""
        record = self.path.with_suffix(".json")
        if not self.path.is_file() or not record.is_file():
            return b"", "new"
        data = self.path.read_bytes()
        try:
            expected = json.loads(record.read_text()).get("sha256")
        except (json.JSONDecodeError, AttributeError):
            expected = None
        if hashlib.sha256(data).hexdigest() != expected:
            return b"", "damaged, so started anew"
        return data, "reused"

    def write(self, data: bytes) -> str:
        """Keep the bytes; returns their sha256.

        Raises:
            StoreError: the disk is full or the folder not writable.
        """
        sha256 = hashlib.sha256(data).hexdigest()
        # the record last: a kill in between leaves a file that `read` refuses
        atomic_write_bytes(self.path, data)
        atomic_write_text(
            self.path.with_suffix(".json"),
            json.dumps({"sha256": sha256, "identity": dict(self.identity)}, indent=1, sort_keys=True) + "\n",
        )
        return sha256


def default_folder() -> Path:
    """Where caches are kept: they belong to the machine, not to a run."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fusepress" / "timing"
