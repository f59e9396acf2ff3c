"""Random state of a training run: seeded, kept apart from the caller's, saved and restored exactly."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusepress.pipeline.task import Batch

_WORD = 2**64
_fill: Any = torch.utils.deterministic  # its flag is a property of the module, which type checkers do not see


def capture(device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State of the global generators of torch, numpy and python (and of the accelerator, if that trains).

    Returns:
        Tensors (bytes and words) and what fits JSON, which `restore` takes back.
    """
    name, words, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 -- users' code draws from it
    version, state, gauss = random.getstate()
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(words).astype(np.int64)),
        "python": torch.tensor(state, dtype=torch.int64),
    }
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    numpy_rest = [str(name), int(position), int(has_gauss), float(cached)]
    return tensors, {"numpy": numpy_rest, "python": [version, gauss]}


def restore(tensors: dict[str, Tensor], info: dict[str, Any], device: torch.device) -> None:
    """Set the global generators to what `capture` returned."""
    torch.set_rng_state(tensors["torch"])
    name, position, has_gauss, cached = info["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    version, gauss = info["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)


def seed_all(seed: int) -> None:
    """Seed the global generators of torch, numpy and python."""
    torch.manual_seed(seed % _WORD)
    np.random.seed(seed % 2**32)  # noqa: NPY002 -- users' code draws from it
    random.seed(seed)


@contextlib.contextmanager
def scope(seed: int, device: torch.device) -> Iterator[None]:
    """Seeded generators and deterministic CPU kernels inside; the caller's state comes back afterwards.

    Without them an indexed gradient is summed in the order in which threads arrive, so a run would not be repeatable.
    Accelerator kernels are left as they are: some have no deterministic form.
    """
    kept = capture(device)
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filling = _fill.fill_uninitialized_memory
    try:
        with warnings.catch_warnings():
            seed_all(seed)
            if device.type == "cpu":
                warnings.filterwarnings("ignore", message=".*deterministic")
                torch.use_deterministic_algorithms(True, warn_only=True)
                _fill.fill_uninitialized_memory = False
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        _fill.fill_uninitialized_memory = filling
        restore(*kept, device)


def draw(batches: Iterator[Batch], seed: int, step: int) -> Batch:
    """The next batch, drawn with generators seeded by (seed, step) that the model's own draws never see.

    A data loader takes numbers from the global generator when it starts, which after a resume is at another step.
    """
    cpu = torch.device("cpu")
    kept = capture(cpu)
    try:
        words = np.random.SeedSequence([seed, step]).generate_state(2, np.uint32)
        torch.default_generator.manual_seed(int(words[0]) << 32 | int(words[1]))
        np.random.seed(int(words[0]))  # noqa: NPY002
        random.seed(int(words[1]))
        return next(batches)
    finally:
        restore(*kept, cpu)
