"""Data-parallel training: what the ranks agree on after each step, on top of `fusepress.pipeline.distributed`.

The mean of the N ranks' gradients is the gradient of the mean of their losses: what one process gets that accumulates
the same N shards with weight 1/N each. Nothing happens in a single process.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from fusepress.pipeline.distributed import all_reduce_, broadcast_, sum_gradients_, world


def mean_gradients_(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the ranks; one that is None on some ranks counts as zero there.

    Raises:
        RankError: a rank failed or was lost.
    """
    every = list(parameters)
    sum_gradients_(every)
    if world() > 1:
        for parameter in every:
            if parameter.grad is not None:
                parameter.grad /= world()


def mean_buffers_(model: nn.Module) -> None:
    """Replace floating-point buffers (batch norm statistics) by their mean over the ranks, others by those of rank 0.

    The mean of the running variances leaves out how far the shards' means lie apart, as it does in torch's own
    data-parallel training without synchronised batch norms.

    Raises:
        RankError: a rank failed or was lost.
    """
    buffers = list(model.buffers())
    all_reduce_([buffer for buffer in buffers if torch.is_floating_point(buffer)], "mean")
    broadcast_([buffer for buffer in buffers if not torch.is_floating_point(buffer)])
