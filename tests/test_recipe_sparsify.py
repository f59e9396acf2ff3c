"""The recipe's sparsify section: what it refuses, and that the pattern alone decides about 2:4 kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fusepress.pipeline.errors import RecipeError
from fusepress.pipeline.recipe import Recipe, load_recipe

GOOD: dict[str, Any] = {"task": "task.py:T", "checkpoint": "c.safetensors"}


def load(folder: Path, section: object, **others: Any) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(section if isinstance(section, str) else yaml.safe_dump({**GOOD, "sparsify": section, **others}))
    return load_recipe(path).recipe


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"pattern": "4:8"}, r"`sparsify.pattern`: .*'2:4' or 'unstructured'; got '4:8'"),
        ({"sparsity": 0.5}, r"no `sparsity`, `scope` or `spread` with 2:4, which is half of every layer"),
        ({"spread": {"camera": 0.5}}, r"no `sparsity`, `scope` or `spread` with 2:4"),
        ({"pattern": "unstructured"}, r"either `sparsity`, e.g. 0.8, or the sparsity of each modality in `spread`"),
        ({"pattern": "unstructured", "sparsity": 0.5, "spread": {"camera": 0.5}}, r"give one of them"),
        ({"pattern": "unstructured", "sparsity": 80}, r"`sparsify.sparsity`: .*less than 1; got 80"),
        ({"pattern": "unstructured", "spread": {"camera": 1.0}}, r"a removed fraction from 0 to below 1 for each"),
        ({"pattern": "unstructured", "sparsity": 0.5, "spread": "even"}, r"expected equal, search, or .*; got 'even'"),
        ({"pattern": "unstructured", "sparsity": 0.5, "permute": True}, r"no `modalities` or `permute` with pattern"),
        ({"pattern": "unstructured", "sparsity": 0.5, "modalities": ["camera"]}, r"no `modalities` or `permute`"),
        (
            {"pattern": "unstructured", "sparsity": 0.5, "scope": "global", "choose": "sparsegpt"},
            r"expected scope: layer with choose: sparsegpt, .*; got global",
        ),
        (
            {"pattern": "unstructured", "sparsity": 0.5, "scope": "global", "spread": "search"},
            r"expected no `spread` with scope: global",
        ),
        ({"recover": "dense_lora"}, r"`sparsify.recover`: .*'sparselora'.*got 'dense_lora'"),
        ({"max_trainable": 0}, r"`sparsify.max_trainable`: .*greater than 0; got 0"),
    ],
)
def test_a_section_that_makes_no_sense_is_refused(tmp_path: Path, section: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(tmp_path, section)


def test_an_unquoted_pattern_is_explained(tmp_path: Path) -> None:
    text = "task: task.py:T\ncheckpoint: c.safetensors\nsparsify: {pattern: 2:4}\n"
    with pytest.raises(RecipeError, match='expected the pattern in quotes, pattern: "2:4"; YAML reads 2:4 as 124'):
        load(tmp_path, text)


def test_weights_are_not_scored_by_a_criterion_that_is_still_to_be_chosen(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"expected one criterion in `score.method` with sparsify.choose: score"):
        load(tmp_path, {"choose": "score"}, score={"method": "auto"})
    assert load(tmp_path, {"choose": "score"}, score={"method": "snip"}).sparsify is not None


def test_low_rank_updates_of_shared_out_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"expected `finetune\.shard: none` with .*sparselora.*got fsdp2"):
        load(tmp_path, {"recover": "sparselora"}, finetune={"shard": "fsdp2"})


@pytest.mark.parametrize(
    ("section", "wanted"),
    [({}, True), ({"pattern": "unstructured", "sparsity": 0.5}, False), (None, False)],
    ids=["2:4", "unstructured", "none"],
)
def test_only_2to4_wants_sparse_kernels(tmp_path: Path, section: dict[str, Any] | None, wanted: bool) -> None:
    assert load(tmp_path, section).wants_2to4 is wanted
