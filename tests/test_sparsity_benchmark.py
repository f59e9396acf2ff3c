"""The sparsity benchmark: its plan, its keys, its tables, and its driver on a tiny task."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from torch import nn

from fusepress.pipeline.errors import StoreError
from fusepress.pipeline.graph.apply import weights_bytes
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
    key = cell.key(protocol, "abc", "def")
    assert key == replace(cell).key(Protocol(), "abc", "def")
    others = {
        replace(cell, seed=7).key(protocol, "abc", "def"),
        cell.key(replace(protocol, steps=1), "abc", "def"),
        cell.key(protocol, "abd", "def"),
        cell.key(protocol, "abc", "deg"),
    }
    assert key not in others
    assert len(others) == 4


def test_a_changed_recipe_is_another_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.sparsity import cells, run

    recipe = ROOT / "examples/street/recipe.yaml"
    bench, cell = run.Bench(tmp_path, cells.Protocol()), cells.Cell()
    before = bench.path(cell)
    monkeypatch.setattr(run.Bench, "_checkpoint", staticmethod(lambda _: recipe.with_name("street.safetensors")))
    assert bench.path(cell) == before
    (tmp_path / "recipe.yaml").write_text(recipe.read_text() + "# changed\n")
    monkeypatch.setitem(cells.MODELS, "street", tmp_path / "recipe.yaml")
    assert bench.path(cell) != before


def test_a_store_takes_cells_of_one_version_of_the_tasks_sources(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.sources import require_sources
    from benchmarks.sparsity.cells import MODELS

    (toy / "cells").mkdir(parents=True)
    (toy / "cells" / "street-24-magnitude-masked-s0-0123.json").write_text("{}")
    recipe = MODELS["street"]
    require_sources(toy, "street", [recipe])
    assert "1 cells of street in" in capsys.readouterr().out
    require_sources(toy, "street", [recipe])
    assert capsys.readouterr().out == ""
    source = recipe.parent / "sparsify_toy.py"
    text = source.read_text()
    source.write_text(text + "# changed\n")
    with pytest.raises(
        StoreError,
        match=r"expected the sources that made the other cells of street; got others in sparsify_toy\.py \(.* it was "
        r".*\) at .*sources-street\.json; put them back, or name another store with --store",
    ):
        require_sources(toy, "street", [recipe])
    source.write_text(text)
    require_sources(toy, "street", [recipe])


@pytest.mark.parametrize("options", [["--seeds", "0"], ["--seeds", "0", "--list"]], ids=["run", "list"])
@pytest.mark.parametrize("name", ["recovery", "sparsity"])
def test_only_runs_that_add_cells_ask_for_the_sources(toy: Path, name: str, options: list[str]) -> None:
    run = importlib.import_module(f"benchmarks.{name}.run")
    toy.mkdir()
    (toy / "sources-street.json").write_text(json.dumps({"gone.py": "0"}))
    given = [*options, "--store", str(toy), "--until", "00:00"]
    if "--list" in options:
        assert run.main(given) == 1
    else:
        with pytest.raises(StoreError, match=r"got others in .*gone\.py"):
            run.main(given)


def test_the_sources_are_those_of_the_street_and_of_what_widens_it() -> None:
    from benchmarks.sources import source_files
    from benchmarks.sparsity.cells import sources

    street = {"task.py", "street_world.py", "street_model.py", "street_pictures.py"}
    assert {file.name for file in source_files(sources("street"))} == street
    assert {file.name for file in source_files(sources("wide"))} == street | {"wide_task.py"}


def finished(cell: Cell, after: float, **facts: Any) -> dict[str, Any]:
    metrics = {"miou": after}
    return {
        "cell": asdict(cell),
        "name": cell.name,
        "protocol": {"steps": 200},
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
        cells.append(finished(Cell(seed=seed), sparse, zeros=0.5, violations_2to4=seed))
        cells.append(finished(Cell(model="wide", recover="twin", seed=seed), 0.1))
    lines = table(cells).splitlines()
    (row,) = [line for line in lines if "masked" in line]
    assert "| 3 | 0.6000 | 0.7000 | -0.0200 (-0.0448 to +0.0048) | 50.0 % | 3 |" in row
    assert sum("twin" in line for line in lines[2:]) == 2
    assert all(line.count("|") == lines[0].count("|") for line in lines)


def test_protocols_are_not_mixed_and_a_cell_is_there_once() -> None:
    from benchmarks.sparsity.cells import Cell
    from benchmarks.sparsity.table import by_protocol, table

    short, long = (finished(Cell(), 0.6), finished(Cell(), 0.7, protocol={"steps": 400}))
    assert by_protocol([short, long]) == {"steps 200": [short], "steps 400": [long]}
    with pytest.raises(ValueError, match=r"expected one result of each cell; got two of street-24-magnitude-masked-s0"):
        table([short, finished(Cell(), 0.5)])


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


def test_the_wide_network_starts_with_the_weights_of_the_narrow_one() -> None:
    from benchmarks.sparsity.wide_task import fill

    narrow, wide = nn.Linear(2, 3), nn.Linear(4, 5)
    random = wide.weight.detach().clone()
    fill(wide, narrow.state_dict())
    assert torch.equal(wide.weight[:3, :2], narrow.weight)
    assert torch.equal(wide.weight[3:], random[3:])
    assert torch.equal(wide.weight[:3, 2:], random[:3, 2:])


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The driver on a tiny task in place of street."""
    from benchmarks.sparsity import cells, run

    project = tmp_path / "toy"
    project.mkdir()
    (project / "sparsify_toy.py").write_text((ROOT / "tests/sparsify_toy.py").read_text())
    task = load_task("sparsify_toy.py:Toy", base=project)
    (project / "dense.safetensors").write_bytes(weights_bytes(task.build_model()))
    recipe = {"task": "sparsify_toy.py:Toy", "checkpoint": "dense.safetensors", "target": "jetson-agx-orin-64gb"}
    (project / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "prune": {"macs": 0.8}, "finetune": {"steps": 1}}))
    monkeypatch.setitem(cells.MODELS, "street", project / "recipe.yaml")
    monkeypatch.setattr(run, "CACHE", tmp_path / "batches")
    monkeypatch.setattr(run, "FAILURES", {"camera_blank": 3, "lidar_blank": 3})
    return tmp_path / "store"


@pytest.mark.long
def test_cells_run_once_keep_their_pattern_or_lose_it_and_make_a_table(
    toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.sparsity import run, table

    options = ["--store", str(toy), "--seeds", "0", "--macs", "0.8", "--start-steps", "2", "--steps", "2"]
    options += ["--samples", "8", "--max-trainable", "0.3", "--precision", "fp32"]
    for suite, name in (
        ("recovery", "street-twin"),
        ("recovery", "sparsegpt-permuted-sparselora"),
        ("recovery", "dense_lora"),
        ("spread", "u40-fusion_spared-magnitude-none"),
        ("spread", "u80-lidar_only-magnitude-none"),
    ):
        assert run.main([*options, "--suite", suite, "--only", name]) == 0
    assert "1 cells done, 0 left" in capsys.readouterr().out
    found = {path.stem.rpartition("-")[0]: json.loads(path.read_text()) for path in (toy / "cells").iterdir()}
    sparse = found["street-24-sparsegpt-permuted-sparselora-s0"]
    assert sparse["violations_2to4"] == sparse["masked_not_zero"] == 0
    assert 0.5 <= sparse["zeros"] < 0.55
    assert sparse["sparselora"]["fraction"] <= 0.3
    lost = found["street-24-magnitude-dense_lora-s0"]
    assert lost["violations_2to4"] > 0
    assert lost["zeros"] < 0.05
    spared = found["street-u40-fusion_spared-magnitude-none-s0"]
    assert spared["spread"]["fusion"] == 0.0
    assert "impossible" in found["street-u80-lidar_only-magnitude-none-s0"]  # too few weights for so many zeros
    before = {path: path.stat().st_mtime_ns for path in (toy / "cells").iterdir()}
    assert run.main([*options, "--suite", "recovery", "--only", "street-twin"]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (toy / "cells").iterdir()}
    assert table.main(["--store", str(toy), "--results", str(toy / "results")]) == 0
    row = "| street | 2:4 | sparsegpt | yes | sparselora | 1 |"
    assert row in capsys.readouterr().out
    assert row in (toy / "results/sparsity.md").read_text()
    assert (
        len(json.loads((toy / "results/sparsity.json").read_text())["cells"]) == len(before) - 1
    )  # but for the impossible one
