"""A model's coupled groups as a JSON file, so that stages share one finding of them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from fusepress.pipeline.errors import StoreError
from fusepress.pipeline.graph.plan import Block, Frozen, Group, GroupGraph, Member, Swap
from fusepress.pipeline.store import atomic_write_text

SCHEMA = 1


def save_graph(graph: GroupGraph, path: Path) -> None:
    """Write groups, frozen modules, blocks and notes; the same graph gives the same bytes."""
    text = json.dumps({"schema": SCHEMA, **asdict(graph)}, indent=1)
    atomic_write_text(path, text + "\n")


def load_graph(path: Path) -> GroupGraph:
    """The inverse of `save_graph`.

    Raises:
        StoreError: the file is damaged or of another schema.
    """
    try:
        raw = json.loads(path.read_text())
        if raw["schema"] != SCHEMA:
            raise ValueError(f"schema {raw['schema']}, not {SCHEMA}")
        groups = tuple(
            Group(
                id=g["id"],
                branch=g["branch"],
                width=g["width"],
                multiple=g["multiple"],
                members=tuple(Member(**member) for member in g["members"]),
                producers=tuple(g["producers"]),
            )
            for g in raw["groups"]
        )
        frozen = tuple(Frozen(**f) for f in raw["frozen"])
        branches = {branch: tuple(paths) for branch, paths in raw["branches"].items()}
        blocks = tuple(
            Block(id=b["id"], swaps=tuple(Swap(**swap) for swap in b["swaps"]), dead=tuple(b["dead"]))
            for b in raw.get("blocks", ())  # files of before blocks could go have none
        )
        return GroupGraph(
            groups=groups,
            frozen=frozen,
            arch_sha256=raw["arch_sha256"],
            notes=tuple(raw["notes"]),
            branches=branches,
            blocks=blocks,
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(
            f"expected coupled groups of schema {SCHEMA}; got a file that does not fit at {path} ({error}); run "
            "`fusepress compress --from baseline` again"
        ) from error
