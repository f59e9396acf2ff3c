"""Stages: each maps input artifacts to output artifacts."""

from __future__ import annotations

from fusepress.pipeline.stages.base import Stage
from fusepress.pipeline.stages.baseline import Baseline
from fusepress.pipeline.stages.build import Build
from fusepress.pipeline.stages.export import Export
from fusepress.pipeline.stages.finetune import Finetune
from fusepress.pipeline.stages.prune import Prune
from fusepress.pipeline.stages.qat import Qat
from fusepress.pipeline.stages.quantize import Quantize
from fusepress.pipeline.stages.score import Score
from fusepress.pipeline.stages.sparsify import Sparsify
from fusepress.pipeline.stages.verify import Verify

STAGES: tuple[Stage, ...] = (
    Baseline(),
    Score(),
    Prune(),
    Finetune(),
    Sparsify(),
    Qat(),
    Export(),
    Quantize(),
    Build(),
    Verify(),
)
