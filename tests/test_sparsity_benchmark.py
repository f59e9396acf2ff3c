"""The sparsity benchmark's plan, keys and tables (its cells run for minutes and are not run here)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from torch import nn

from fusepress.pipeline.recipe import load_recipe
from fusepress.pipeline.task import load_task

if TYPE_CHECKING:
    from benchmarks.sparsity.cells import Cell

ROOT = Path(__file__).resolve().parent.parent
SUITES = ("recovery", "spread", "wide")


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    """`benchmarks` is a folder of the checkout, not of the installed package."""
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(ROOT))
    yield
    patch.undo()


def test_every_cell_has_a_name_of_its_own_and_a_section_that_the_recipe_takes() -> None:
    from benchmarks.sparsity.cells import Protocol, planned

    cells = planned(SUITES, [0, 1])
    assert len({cell.name for cell in cells}) == len(cells)
    assert {cell.recover for cell in cells} == {"masked", "sparselora", "dense_lora", "none", "twin"}
    for cell in cells:
        spread = {"camera": 0.9, "lidar": 0.0, "fusion": 0.0} if cell.spread == "camera_only" else None
        if cell.spread in ("lidar_only", "fusion_spared"):
            continue
        found = load_recipe(ROOT / "examples/street/recipe.yaml", cell.overrides(Protocol(), spread)).recipe.sparsify
        assert found is not None
        assert (found.pattern, found.choose, found.permute) == (cell.pattern, cell.choose, cell.permute)
        assert found.max_trainable == 0.1


def test_the_first_seed_comes_first_and_the_key_is_of_the_content() -> None:
    from benchmarks.sparsity.cells import Protocol, planned

    cells = planned(["recovery"], [3, 1])
    assert [cell.seed for cell in cells] == sorted((cell.seed for cell in cells), reverse=True)
    cell, protocol = cells[0], Protocol()
    key = cell.key(protocol, "abc")
    assert key == replace(cell).key(Protocol(), "abc")
    others = {
        replace(cell, seed=7).key(protocol, "abc"),
        cell.key(replace(protocol, steps=1), "abc"),
        cell.key(protocol, "abd"),
    }
    assert key not in others
    assert len(others) == 3


def finished(cell: Cell, after: float, **facts: Any) -> dict[str, Any]:
    metrics = {"miou": after}
    return {
        "cell": asdict(cell),
        "primary": "miou",
        "before": {"miou": after - 0.1},
        "after": metrics,
        "failing": {"camera_blank": {"miou": 0.4}, "lidar_half": {"miou": 0.5}},
        **facts,
    }


def test_the_table_pairs_by_seed_with_the_twin_of_the_same_model() -> None:
    from benchmarks.sparsity.cells import Cell
    from benchmarks.sparsity.table import table

    cells = []
    for seed, (twin, sparse) in enumerate([(0.70, 0.69), (0.72, 0.70), (0.74, 0.71)]):
        cells.append(finished(Cell(recover="twin", seed=seed), twin))
        cells.append(finished(Cell(seed=seed), sparse, zeros=0.5))
        cells.append(finished(Cell(model="wide", recover="twin", seed=seed), 0.1))
    lines = table(cells).splitlines()
    (row,) = [line for line in lines if "masked" in line]
    assert "| 3 | 0.6000 | 0.7000 | -0.0200 (-0.0448 to +0.0048) | 50.0 % |" in row
    assert sum("twin" in line for line in lines[2:]) == 2
    assert all(line.count("|") == lines[0].count("|") for line in lines)


def test_differences_are_over_common_seeds_and_have_an_interval_from_three_on() -> None:
    from benchmarks.sparsity.table import difference

    assert difference({0: 1.0, 1: 2.0}, {1: 1.5, 2: 9.0}) == "+0.5000"
    assert difference({0: 1.0}, {1: 1.0}) == ""
    assert "to" in difference({0: 1.0, 1: 2.0, 2: 3.0}, {0: 1.0, 1: 1.0, 2: 1.0})


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_has_cells(suite: str) -> None:
    from benchmarks.sparsity.cells import planned

    assert planned([suite], [0])


def test_the_wide_network_has_convolutions_that_sparse_kernels_like() -> None:
    task = load_task("wide_task.py:WideStreet", base=ROOT / "benchmarks/sparsity")
    layers = [layer for layer in task.build_model().modules() if isinstance(layer, nn.Conv2d)]
    wide = [c for c in layers if c.kernel_size == (3, 3) and min(c.in_channels, c.out_channels) >= 256]
    assert len(wide) >= 2
    assert load_recipe(ROOT / "benchmarks/sparsity/wide.yaml").recipe.prune is None
