"""Checkpoints inside a training stage: safetensors and JSON, no pickle, whole or absent.

The tensors are written first, then a JSON file with their sha256: only a pair that agrees is ever read. The last two
are kept, so that a damaged one costs a few steps, not the run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from fusepress.pipeline.store import atomic_write_bytes, atomic_write_text

SCHEMA = 1
KEPT = 2
PREFIX = "train-"
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """All that a training run needs to go on.

    Attributes:
        step: steps done.
        tensors: by name.
        info: what fits JSON.
    """

    step: int
    tensors: dict[str, Tensor]
    info: dict[str, Any]


def save_checkpoint(workdir: Path, state: TrainState, identity: str) -> None:
    """Write a checkpoint and forget those before the previous one.

    Args:
        workdir: folder of the checkpoints.
        state: what is saved; tensors of any device, shared storage allowed.
        identity: hash of everything that the run's result depends on.

    Raises:
        StoreError: the disk is full or the folder is not writable.
    """
    path = workdir / f"{PREFIX}{state.step:08d}.safetensors"
    data = save_tensors({name: _apart(value) for name, value in state.tensors.items()})
    atomic_write_bytes(path, data)
    sealed = {
        "schema": SCHEMA,
        "identity": identity,
        "step": state.step,
        "sha256": hashlib.sha256(data).hexdigest(),
        "info": state.info,
    }
    atomic_write_text(path.with_suffix(".json"), json.dumps(sealed, allow_nan=False) + "\n")
    for old in _newest_first(workdir)[KEPT:]:
        _remove(old)


def load_checkpoint(workdir: Path, identity: str) -> TrainState | None:
    """The newest intact checkpoint of this very run, or None; what cannot be used is logged and removed."""
    for seal in _newest_first(workdir):
        state = _read(seal, identity)
        if state is not None:
            return state
        _remove(seal)
    return None


def clear_checkpoints(workdir: Path) -> None:
    """Remove every checkpoint of a folder."""
    for path in workdir.glob(f"{PREFIX}*"):
        path.unlink(missing_ok=True)


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hash of names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _newest_first(workdir: Path) -> list[Path]:
    return sorted(workdir.glob(f"{PREFIX}*.json"), reverse=True)


def _read(seal: Path, identity: str) -> TrainState | None:
    try:
        sealed = json.loads(seal.read_text())
        if sealed["schema"] != SCHEMA or sealed["identity"] != identity:
            logger.warning("the checkpoint %s belongs to another training run; it is not used", seal.name)
            return None
        data = seal.with_suffix(".safetensors").read_bytes()
        if hashlib.sha256(data).hexdigest() != sealed["sha256"]:
            raise ValueError("its tensors do not have the stated sha256")
        return TrainState(step=int(sealed["step"]), tensors=load_tensors(data), info=sealed["info"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("the checkpoint %s is damaged (%s); an earlier one is used, or none", seal.name, error)
        return None


def _remove(seal: Path) -> None:
    for path in (seal, seal.with_suffix(".safetensors")):
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _apart(value: Tensor) -> Tensor:
    """A contiguous copy on the CPU: safetensors refuses tensors that share storage."""
    return value.detach().to("cpu", copy=True).contiguous()
