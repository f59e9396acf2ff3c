"""Activation checkpointing (torch.utils.checkpoint) switched off, for passes that must be seen whole."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils import checkpoint

_REENTRANT, _PLAIN = "CheckpointFunction", "_checkpoint_without_reentrant_generator"


class _Once:
    """In place of the reentrant variant's function."""

    @staticmethod
    def apply(function: Callable[..., Any], _preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


def _around_nothing(*_args: Any, **_kwargs: Any) -> Iterator[None]:
    """In place of what the other variant does before it calls the region, up to the yield, and after that."""
    yield


@contextlib.contextmanager
def without_recomputation() -> Iterator[None]:
    """Inside, checkpointed regions keep their activations and run once, with the same outputs and gradients.

    Otherwise the backward pass runs such a region again by itself, outside of the model's forward pass: whatever
    changes the calls of a forward pass is not there then, and gradients would be those of another function. It costs
    the memory that checkpointing saves.
    """
    stands_in = {_REENTRANT: _Once, _PLAIN: _around_nothing}
    before = {name: getattr(checkpoint, name) for name in stands_in}
    try:
        for name, stand_in in stands_in.items():
            setattr(checkpoint, name, stand_in)
        yield
    finally:
        for name, original in before.items():
            setattr(checkpoint, name, original)
