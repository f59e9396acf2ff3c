"""Random state of a training run: seeded, kept apart from the caller's, saved and restored exactly."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusepress.pipeline.task import Batch

_WORD = 2**64
logger = logging.getLogger(__name__)
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


def seed_all(seed: int, *, stream: int = 0) -> None:
    """Seed the global generators of torch, numpy and python; streams of one seed draw different numbers."""
    if stream:
        seed = int(np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)[0])
    torch.manual_seed(seed % _WORD)
    np.random.seed(seed % 2**32)  # noqa: NPY002 -- users' code draws from it
    random.seed(seed)


@contextlib.contextmanager
def scope(seed: int, device: torch.device, *, deterministic: bool = True) -> Iterator[None]:
    """Seeded generators and repeatable kernels inside; the caller's state comes back afterwards.

    On a CPU the same thread count then gives the same bits. Without repeatable kernels an indexed gradient is summed in
    the order in which threads arrive. CUDA promises less: kernels that have a deterministic form use it (slower), those
    without one (the gradients of grid_sample and MaxPool3d, histc and more: see torch.use_deterministic_algorithms)
    sum in any order, and the log names each that was met. Another GPU model, driver or library may give other bits in
    any case.

    Args:
        seed: of all generators.
        device: where the work is done.
        deterministic: False leaves all kernels as they are.
    """
    with kept(device), _repeatable(device) if deterministic else contextlib.nullcontext():
        seed_all(seed)
        yield


@contextlib.contextmanager
def _repeatable(device: torch.device) -> Iterator[None]:
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filling, benchmark = _fill.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS makes its first handle
    try:
        with _named_once():
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.backends.cudnn.benchmark = False  # it would choose kernels by their time
            _fill.fill_uninitialized_memory = False
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        _fill.fill_uninitialized_memory, torch.backends.cudnn.benchmark = filling, benchmark


@contextlib.contextmanager
def _named_once() -> Iterator[None]:
    """What has no deterministic form is told in the log, once each, instead of a warning at every step."""
    seen: set[str] = set()
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=".*deterministic")
        show = warnings.showwarning

        def tell(message: Warning | str, *rest: Any, **named: Any) -> None:
            text = str(message)
            if "deterministic" not in text:
                show(message, *rest, **named)
            elif text not in seen:
                seen.add(text)
                logger.warning("results may differ from run to run: %s", text.partition(". ")[0])

        warnings.showwarning = tell
        yield


@contextlib.contextmanager
def kept(device: torch.device) -> Iterator[None]:
    """Whatever is drawn inside, the generators are afterwards what they were."""
    state = capture(device)
    try:
        yield
    finally:
        restore(*state, device)


def draw(batches: Iterator[Batch], seed: int, step: int) -> Batch:
    """The next batch, drawn with generators seeded by (seed, step) that the model's own draws never see.

    A data loader takes numbers from the global generator when it starts, which after a resume is at another step.
    """
    with kept(torch.device("cpu")):
        words = np.random.SeedSequence([seed, step]).generate_state(2, np.uint32)
        torch.default_generator.manual_seed(int(words[0]) << 32 | int(words[1]))
        np.random.seed(int(words[0]))  # noqa: NPY002
        random.seed(int(words[1]))
        return next(batches)
