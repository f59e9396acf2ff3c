"""How the networks of `multi_task.py` are trained: one fit, and the experts as one teacher."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fusepress.pipeline.recipe import FinetuneConfig
from fusepress.pipeline.recovery.finetune import TrainProgress, finetune, reestimate_batchnorm
from fusepress.pipeline.task import LoadedTask

Format = Literal["auto", "fp32", "bf16"]
NORM_BATCHES = 40


class Experts(nn.Module):
    """Experts side by side: every output of each of them.

    Args:
        members: task -> network; their outputs differ in name.
    """

    def __init__(self, members: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleDict(dict(members))

    def forward(self, image: Tensor, points: Tensor, cells: Tensor) -> dict[str, Tensor]:
        """All experts' outputs on the same inputs."""
        outputs: dict[str, Tensor] = {}
        for member in self.members.values():
            outputs.update(member(image=image, points=points, cells=cells))
        return outputs


def fit(
    task: LoadedTask,
    model: nn.Module,
    *,
    steps: int,
    seed: int,
    lr: float = 2e-3,
    teacher: nn.Module | None = None,
    distill_weight: float = 1.0,
    precision: Format = "auto",
    workdir: Path | None = None,
    progress: Callable[[TrainProgress], None] | None = None,
) -> nn.Module:
    """Train a network in place with the library's own loop, then measure its batch norms' statistics afresh.

    Args:
        task: whose losses and training batches are used.
        model: trained in place.
        steps: optimiser steps of AdamW, warm-up and cosine to zero.
        seed: of the batches.
        lr: peak learning rate.
        teacher: what it learns from beside the labels.
        distill_weight: weight of what the teacher says.
        precision: of the arithmetic; auto is float32 on a CPU.
        workdir: keeps checkpoints, from which the same call goes on; None keeps none.
        progress: called after every step.
    """
    config = FinetuneConfig(
        steps=steps,
        lr=lr,
        weight_decay=1e-3,
        distill=teacher is not None,
        distill_weight=distill_weight,
        checkpoint_every=100,
    )
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it; much faster
    with tempfile.TemporaryDirectory() as nowhere:
        finetune(
            model,
            teacher,
            task,
            config,
            seed=seed,
            workdir=workdir or Path(nowhere),
            progress=progress,
            precision=precision,
        )
    # The averaged weights have statistics of their own.
    reestimate_batchnorm(model, task, NORM_BATCHES, seed)
    return model.eval()


def load_backbone(model: nn.Module, path: Path) -> None:
    """Load the parts of a checkpoint that a larger network shares; the others keep their start values.

    Raises:
        RuntimeError: the checkpoint has a tensor that the network lacks, or one of another shape.
    """
    missing, unexpected = model.load_state_dict(load_file(path), strict=False)
    del missing  # the new head's
    if unexpected:
        raise RuntimeError(
            f"expected a checkpoint of a part of {type(model).__name__}; got {unexpected[0]!r} beyond it at {path}; "
            "give the checkpoint of the network that it extends"
        )
