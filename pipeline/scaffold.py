"""`fusepress init`: a task and a recipe to edit."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from fusepress.pipeline.errors import UsageError
from fusepress.pipeline.store import atomic_write_text

FILES = ("task.py", "recipe.yaml", "README.md")


def write_scaffold(folder: Path) -> list[Path]:
    """Write the files into a new or empty folder.

    Raises:
        UsageError: one of them exists already; nothing is overwritten.
    """
    paths = [folder / name for name in FILES]
    for path in paths:
        if path.exists():
            raise UsageError(f"expected a folder without {path.name}; got {path}, which exists; name another folder")
    templates = resources.files("fusepress.pipeline") / "templates"
    for path in paths:
        atomic_write_text(path, (templates / f"{path.name}.txt").read_text())
    return paths
