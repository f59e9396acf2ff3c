"""The import rules of the architecture: arrows only point down, and heavy libraries stay out of light modules."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# from the top down; a module may import its own layer only if it is in the same unit
LAYERS: tuple[tuple[str, ...], ...] = (
    ("pipeline.main",),
    ("pipeline.cli",),
    ("pipeline.text",),
    ("pipeline.api",),
    (
        "pipeline.bundling",
        "pipeline.explaining",
        "pipeline.planning",
        "pipeline.reference",
        "pipeline.measuring",
        "pipeline.on_device",
        "pipeline.scaffold",
        "pipeline.self_test",
        "pipeline.runner",
    ),
    ("pipeline.stages",),
    ("pipeline.scoring", "pipeline.pruning", "pipeline.recovery", "calib", "pipeline.report"),
    ("pipeline.graph", "export"),
    ("targets",),
    (
        "pipeline.comparing",
        "pipeline.console",
        "pipeline.corrupt",
        "pipeline.distributed",
        "pipeline.evaluate",
        "pipeline.evidence",
        "pipeline.gates",
        "pipeline.npz",
        "pipeline.recipe",
        "pipeline.sensors",
        "pipeline.store",
        "pipeline.task",
    ),
    ("pipeline.errors",),
)
SIBLINGS_ALLOWED = {("calib", "export")}
FOUNDATION = 9  # the lowest rooms may use each other; a test below keeps them free of cycles
LIGHT = (
    "targets",
    "pipeline.distributed",
    "pipeline.gates",
    "pipeline.report",
    "pipeline.recipe",
    "pipeline.store",
    "pipeline.evidence",
)
HEAVY = {"torch", "onnx", "onnxruntime", "modelopt", "tensorrt", "tensorrt_rtx", "torch_pruning"}


def _modules() -> dict[str, Path]:
    found = {}
    for room in ("pipeline", "export", "calib", "targets"):
        for path in (ROOT / room).rglob("*.py"):
            if "_root" not in path.parts and "templates" not in path.parts:
                parts = path.relative_to(ROOT).with_suffix("").parts
                found[".".join(part for part in parts if part != "__init__")] = path
    return found


def _unit(module: str) -> tuple[int, str] | None:
    for level, units in enumerate(LAYERS):
        for unit in units:
            if module == unit or module.startswith(unit + "."):
                return level, unit
    return None


def _imports(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("module", sorted(_modules()))
def test_every_module_has_a_place_in_the_layers(module: str) -> None:
    assert module == "pipeline" or _unit(module) is not None


@pytest.mark.parametrize("module", sorted(_modules()))
def test_arrows_only_point_down(module: str) -> None:
    place = _unit(module)
    if place is None:
        return
    level, unit = place
    for imported in _imports(_modules()[module]):
        if not imported.startswith("fusepress."):
            continue
        other = _unit(imported.removeprefix("fusepress."))
        if other is None or other[1] == unit or level == other[0] == FOUNDATION:
            continue
        if (unit, other[1]) == ("pipeline.planning", "pipeline.api"):
            continue  # planning asks the same up-front check
        allowed = other[0] > level or (unit, other[1]) in SIBLINGS_ALLOWED
        assert allowed, f"{module} must not import {imported}"


@pytest.mark.parametrize("module", sorted(m for m in _modules() if m.startswith(LIGHT)))
def test_light_modules_import_nothing_heavy_when_they_are_loaded(module: str) -> None:
    heavy = {name.split(".")[0] for name in _imports(_modules()[module], top_level_only=True)} & HEAVY
    assert not heavy
