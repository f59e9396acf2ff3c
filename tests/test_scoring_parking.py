"""Tensors put aside in temporary files."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fusepress.pipeline.errors import StageError
from fusepress.pipeline.recipe import ScoreConfig
from fusepress.pipeline.scoring.criteria import score_weights
from fusepress.pipeline.scoring.parking import parked, parked_zeros
from tests.scoring_toys import ConvToy


@pytest.fixture
def little_room() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.bool, torch.int8])
@pytest.mark.parametrize("shape", [(3, 5), (), (0, 4)])
def test_a_copy_has_the_values_and_leaves_no_file(
    dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    value = (torch.rand(shape) * 9).to(dtype)
    aside = parked(value)
    assert aside.shape == value.shape
    assert aside.dtype == dtype
    assert torch.equal(aside, value)
    value.zero_()
    assert not aside.numel() or bool(aside.any())
    assert not parked_zeros(value).any()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("little_room")
def test_no_room_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert parked_zeros(torch.empty(1024)).numel() == 1024
    with pytest.raises(StageError, match=r"expected room for 4100 bytes .* got .* at .*; free some space, or set TMP"):
        parked_zeros(torch.empty(1025))
    assert list(tmp_path.iterdir()) == []


def test_scores_of_rounds_do_not_stay_in_a_file() -> None:
    toy = ConvToy(dtype=torch.float32)
    scores, _ = score_weights(toy.model, toy.task, ScoreConfig(method="snip", rounds=3, batches=2), seed=0)
    assert all(value.untyped_storage().filename is None for value in scores.values())
