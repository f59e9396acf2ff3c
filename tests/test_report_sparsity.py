"""The report's table of masked layers (pipeline/report/sparsity.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fusepress.pipeline.report.html import render
from fusepress.pipeline.report.sparsity import sparse_rows
from tests.test_report import record_of

LAYERS: list[dict[str, Any]] = [
    {
        "param": "camera.stem.weight",
        "branch": "camera",
        "shape": [32, 3, 3, 3],
        "status": "dense",
        "reason": "3 input channels: fewer than 4, as in a first layer",
        "density": 1.0,
    },
    {
        "param": "fuser.0.weight",
        "branch": "fusion",
        "shape": [64, 64, 3, 3],
        "status": "masked",
        "density": 0.5,
        "kept_magnitude": 0.741,
        "kept_before_permuting": 0.72,
        "kept_after_permuting": 0.78,
        "error": 0.012,
        "error_magnitude": 0.034,
    },
]


def test_masked_layers_come_first_with_what_they_kept_and_dense_ones_with_why() -> None:
    record = record_of()
    stage = record.stage("sparsify")
    assert stage is not None
    stage.details["layers"] = LAYERS
    masked, dense = sparse_rows(record)
    assert (masked.shape, masked.density, masked.kept) == ("64 x 64 x 3 x 3", "50 %", "74 %")
    assert (masked.permuting, masked.error, masked.reason) == ("72 %, 78 %", "1.2 %, 3.4 %", "")
    assert (dense.kept, dense.permuting, dense.reason) == ("", "", LAYERS[0]["reason"])
    page = render(record, Path("nowhere"))
    assert page.index("fuser.0.weight") < page.index("camera.stem.weight")
    assert "Masked layers" in page
    assert "fewer than 4, as in a first layer" in page


def test_without_masks_there_is_no_table() -> None:
    assert sparse_rows(record_of()) == []
    assert "Masked layers" not in render(record_of(), Path("nowhere"))
