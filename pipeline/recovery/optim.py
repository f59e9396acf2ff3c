"""The optimiser of our loop and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from fusepress.pipeline.recipe import FinetuneConfig


def learning_rate(config: FinetuneConfig, step: int) -> float:
    """Rate of a step (counted from 0): linear warm-up to `lr`, then a cosine that would reach 0 after the last step."""
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, config.steps - warmup)))


def adamw(trained: Mapping[str, nn.Parameter], config: FinetuneConfig) -> torch.optim.AdamW:
    """AdamW without decay on what has one dimension or none: norms, biases, scales."""
    decayed = [p for p in trained.values() if p.dim() > 1]
    plain = [p for p in trained.values() if p.dim() <= 1]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr)
