"""One metric code judges everything: the task's statistics fed by any `predict` callable.

Processes that share a run evaluate a share of the batches each, and all get the whole: the statistics of every sample,
in the order of the split, are those of a single process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fusepress.pipeline.distributed import in_order, rank, share, world
from fusepress.pipeline.errors import TaskError
from fusepress.pipeline.task import Batch, LoadedTask, Split

if TYPE_CHECKING:
    from torch import Tensor, nn

Predict = Callable[[dict[str, "Tensor"]], dict[str, "Tensor"]]
Corrupt = Callable[[Batch], Batch]
# statistics, sample ids, groups and strata of a batch
_Part = tuple[dict[str, np.ndarray[Any, Any]], list[str], list[str], list[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Per-sample statistics of one model on one split.

    Attributes:
        stats: arrays with a leading sample dimension N.
        sample_ids: N names, in the order of the split.
        groups: N cluster names.
        metrics: the task's metrics over all N samples.
        strata: N labels of the task's own (night, rain); empty where it has none, or on another split than `eval`.
    """

    stats: dict[str, np.ndarray[Any, Any]]
    sample_ids: tuple[str, ...]
    groups: tuple[str, ...]
    metrics: dict[str, float]
    strata: tuple[str, ...] = ()

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.sample_ids)


def torch_predict(task: LoadedTask, model: nn.Module) -> Predict:
    """`predict` of a torch model in evaluation mode."""
    import torch

    model.eval()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def predict(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            return task.as_dict(model(**{name: value.to(device) for name, value in inputs.items()}))

    return predict


def evaluate(
    task: LoadedTask,
    predict: Predict,
    split: Split = "eval",
    *,
    batches: Iterable[Batch] | None = None,
    corrupt: Corrupt | None = None,
    limit: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Run `predict` over a split and collect the task's per-sample statistics.

    Processes that share a run call it together, with the same model.

    Args:
        task: the task whose statistics and metrics count.
        predict: maps named input tensors to named output tensors.
        split: which split; its order is fixed.
        batches: batches to use instead of the split's (kept in memory by a caller that evaluates often).
        corrupt: applied to every batch first (a sensor failure).
        limit: stop after this many batches.
        progress: called with the number of samples done; with several processes, with their number times those of this
            one.

    Raises:
        TaskError: the split is empty, repeats a sample, or the outputs are not finite.
    """
    own: list[_Part] = []
    done = 0
    for number, batch in _numbered(task, split, batches):
        if limit is not None and number >= limit:
            break
        seen = corrupt(batch) if corrupt is not None else batch
        outputs = predict(seen.inputs)
        _check_finite(outputs, batch)
        strata = _strata(task, batch) if split == "eval" else []
        own.append((task.sample_stats(outputs, batch), list(batch.sample_ids), list(batch.groups), strata))
        done += batch.size
        if progress is not None:
            progress(done * world())
    every = in_order(own)
    parts = [part for part, *_ in every]
    ids, groups, strata = ([name for part in every for name in part[place]] for place in (1, 2, 3))
    if not parts or len(set(ids)) != len(ids):
        found = "no batch" if not parts else f"{len(ids) - len(set(ids))} repeated sample ids"
        raise TaskError(
            f"expected batches({split!r}, 0) to yield every sample once; got {found} at {task.source.spec}; "
            "give every sample its own id"
        )
    stats = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Evaluation(
        stats=stats, sample_ids=tuple(ids), groups=tuple(groups), metrics=task.score(stats), strata=tuple(strata)
    )


def _numbered(task: LoadedTask, split: Split, batches: Iterable[Batch] | None) -> Iterator[tuple[int, Batch]]:
    """This process's batches with their numbers in the split."""
    if batches is not None:
        yield from share(batches)
        return
    for index, batch in enumerate(task.batches(split, 0, rank=rank(), world=world())):
        yield index * world() + rank(), batch


def _strata(task: LoadedTask, batch: Batch) -> list[str]:
    """The task's label of each sample, for floors of single strata."""
    if not task.offers("strata"):
        return []
    labels = [str(label) for label in task.user.strata(batch)]
    if len(labels) != batch.size:
        raise TaskError(
            f"expected strata(batch) to return {batch.size} labels, one a sample; got {len(labels)} at "
            f"{task.source.spec}; label every sample of calib and eval"
        )
    return labels


def _check_finite(outputs: dict[str, Tensor], batch: Batch) -> None:
    for name, value in outputs.items():
        if not bool(value.isfinite().all()):
            raise TaskError(
                f"expected finite outputs; got NaN or infinity in {name!r} for the samples "
                f"{list(batch.sample_ids)[:3]}; check the checkpoint, or keep overflowing layers out of FP16"
            )
