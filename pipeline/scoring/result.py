"""Scores as they are kept: one float32 vector a coupled group, and a log of how they came about."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fusepress.pipeline.errors import StoreError
from fusepress.pipeline.store import atomic_write_bytes

METADATA = "fusepress_scores"  # one key only: safetensors writes several in no fixed order
SCHEMA = 1
Vector = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreResult:
    """Channel scores.

    Attributes:
        channel: group id -> float32 vector of the group's width; higher = keep.
        log: plain JSON data about the method: losses, passes, statistics, notes.
    """

    channel: dict[str, Vector]
    log: dict[str, Any] = field(default_factory=dict)


def save_scores(result: ScoreResult, path: Path) -> None:
    """Write scores as safetensors, the log as metadata; the same scores give the same bytes.

    Raises:
        StoreError: the file cannot be written.
    """
    atomic_write_bytes(path, scores_to_bytes(result))


def scores_to_bytes(result: ScoreResult) -> bytes:
    """The bytes that `save_scores` writes."""
    from safetensors.numpy import save

    text = json.dumps({"schema": SCHEMA, "log": result.log}, sort_keys=True, separators=(",", ":"), allow_nan=False)
    tensors = {key: np.ascontiguousarray(result.channel[key], dtype=np.float32) for key in sorted(result.channel)}
    return bytes(save(tensors, metadata={METADATA: text}))


def load_scores(path: Path) -> ScoreResult:
    """Read what `save_scores` wrote.

    Raises:
        StoreError: the file is missing, damaged, or no score file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            channel = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"expected a score file (safetensors); got {type(error).__name__}: {error} at {path}; run the score stage "
            "again with --from score"
        ) from error
    _check(channel, metadata, path)
    return ScoreResult(channel=channel, log=json.loads(metadata[METADATA])["log"])


def _check(channel: Mapping[str, Any], metadata: Mapping[str, str], path: Path) -> None:
    wrong = [k for k, v in channel.items() if v.ndim != 1 or v.dtype != np.float32 or not np.isfinite(v).all()]
    if METADATA not in metadata or wrong:
        found = f"{wrong[0]!r}, which is no finite float32 vector" if wrong else "no log in the metadata"
        raise StoreError(
            f"expected one float32 vector a group and a log; got {found} at {path}; run the score stage again with "
            "--from score"
        )
