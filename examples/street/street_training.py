"""How the networks of `multi_task.py` are trained, with experts as teachers or from the labels alone."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import nn

from fusepress.pipeline.recipe import FinetuneConfig
from fusepress.pipeline.recovery.finetune import TrainProgress, finetune, reestimate_batchnorm
from fusepress.pipeline.task import LoadedTask

Format = Literal["auto", "fp32", "bf16"]
NORM_BATCHES = 40


def fit(
    task: LoadedTask,
    model: nn.Module,
    *,
    steps: int,
    seed: int,
    lr: float = 2e-3,
    experts: Mapping[str, nn.Module] | None = None,
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
        experts: networks that teach the outputs which they return, beside the labels.
        distill_weight: weight of what they say; every output's loss is measured in its own spread.
        precision: of the arithmetic; auto is float32 on a CPU.
        workdir: keeps checkpoints, from which the same call goes on; None keeps none.
        progress: called after every step.
    """
    config = FinetuneConfig(
        steps=steps,
        lr=lr,
        weight_decay=1e-3,
        distill=bool(experts),
        distill_weight=distill_weight,
        distill_normalise=True,
        checkpoint_every=100,
    )
    if precision == "bf16":
        # Much faster there. In float32 the backward pass of a strided 1x1 convolution with channels last and fewer than
        # 16 of them writes out of bounds (oneDNN of torch 2.13, AVX-512).
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
    with tempfile.TemporaryDirectory() as nowhere:
        finetune(
            model,
            None,
            task,
            config,
            seed=seed,
            workdir=workdir or Path(nowhere),
            progress=progress,
            precision=precision,
            experts=experts,
        )
    # The averaged weights have statistics of their own.
    reestimate_batchnorm(model, task, NORM_BATCHES, seed)
    return model.eval()


def load_backbone(model: nn.Module, path: Path) -> None:
    """Load the parts of a checkpoint that a larger network shares; the others keep their start values.

    Raises:
        ValueError: the checkpoint has a tensor that the network lacks, or one of another shape.
    """
    weights, own = load_file(path), model.state_dict()
    strange = [name for name, value in weights.items() if name not in own or own[name].shape != value.shape]
    if strange:
        raise ValueError(
            f"expected a checkpoint of a part of {type(model).__name__}; got {strange[0]!r}, which it lacks or has in "
            f"another shape, at {path}; give the checkpoint of the network that it extends"
        )
    model.load_state_dict(weights, strict=False)
