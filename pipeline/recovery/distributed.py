"""Data-parallel training: what the ranks exchange in a step, on top of `fusepress.pipeline.distributed`.

Every rank runs its own batches through its own copy of the model. A batch counts by its share of all samples of the
step, so the sum of the ranks' gradients is the gradient of the mean over all samples: what one process gets that
accumulates the same shards. Nothing happens in a single process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fusepress.pipeline.distributed import all_reduce_, broadcast_, gather_objects, rank
from fusepress.pipeline.recovery import rng


def sum_over_ranks(value: Tensor) -> Tensor:
    """The tensor, replaced in place by the sum of the ranks' ones.

    Raises:
        RankError: a rank failed or was lost.
    """
    all_reduce_([value])
    return value


def sum_losses(losses: Mapping[str, float]) -> dict[str, float]:
    """Named numbers added up over the ranks; a rank may lack some, as a batch may lack labels.

    Raises:
        RankError: a rank failed or was lost.
    """
    found: dict[str, float] = {}
    for part in gather_objects(dict(losses)):
        for name, value in part.items():
            found[name] = found.get(name, 0.0) + value
    return found


def average_norms_(norms: Sequence[_BatchNorm]) -> None:
    """Replace running means and variances by their means over the ranks.

    The mean of the variances leaves out how far the ranks' means lie apart, as torch's own data-parallel training does
    where batch norms are not synchronised.

    Raises:
        RankError: a rank failed or was lost.
    """
    statistics = [s for norm in norms for s in (norm.running_mean, norm.running_var) if s is not None]
    all_reduce_(statistics, "mean")


def adopt_buffers_(model: nn.Module) -> None:
    """Give every rank the buffers of rank 0: what a model counts or collects by itself is rank 0's.

    Raises:
        RankError: a rank failed or was lost.
    """
    broadcast_(list(model.buffers()))


def draw_apart(seed: int) -> None:
    """Let every rank but the first draw its own numbers from here on: dropout, for one."""
    if rank() > 0:
        rng.seed_all(seed, stream=rank())
