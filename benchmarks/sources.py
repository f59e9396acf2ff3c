"""Which sources of a task made the cells of a store: the keys of cells hold its recipe and weights, not its code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fusepress.pipeline.errors import StoreError
from fusepress.pipeline.store import atomic_write_text, sha256_file

ROOT = Path(__file__).resolve().parents[1]


def require_sources(store: Path, name: str, recipes: Sequence[Path]) -> None:
    """Refuse to add cells of other sources to a store.

    The first run writes them down, in `sources-NAME.json`. Cells from before there was such a file are taken to be of
    the present ones, which is said.

    Args:
        store: folder of the benchmark, with its `cells`.
        name: of the task in this store.
        recipes: whose tasks' modules, and what those import from their own folders, are meant.

    Raises:
        StoreError: a file is not what it was; it names the files.
    """
    path = store / f"sources-{name}.json"
    present = {_name(file): sha256_file(file) for file in source_files(recipes)}
    if not path.is_file():
        cells = len(list((store / "cells").glob(f"{name}-*.json")))
        if cells:
            print(f"{cells} cells of {name} in {store} are taken to be of the present sources", flush=True)
        atomic_write_text(path, json.dumps(present, indent=1) + "\n")
        return
    stored = json.loads(path.read_text())
    other = sorted(file for file in stored.keys() | present.keys() if stored.get(file) != present.get(file))
    if other:
        was, now = (files.get(other[0], "no such file")[:12] for files in (stored, present))
        raise StoreError(
            f"expected the sources that made the other cells of {name}; got others in {', '.join(other)} ({now}, it "
            f"was {was}) at {path}; put them back, or name another store with --store"
        )


def source_files(recipes: Sequence[Path]) -> list[Path]:
    """The modules of the recipes' tasks and what they import from their own folders."""
    from fusepress.pipeline.recipe import load_recipe
    from fusepress.pipeline.task import load_task

    files: set[Path] = set()
    for recipe in recipes:
        loaded = load_recipe(recipe)
        files.update(load_task(loaded.recipe.task, base=loaded.base).source.files)
    return sorted(files)


def _name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else file.name
