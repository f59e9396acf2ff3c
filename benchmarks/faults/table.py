"""The results of the campaign as a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any


def markdown(result: Mapping[str, Any]) -> str:
    """A table of faults and outcomes."""
    rows: Mapping[str, Any] = result["rows"]
    chains = [row for name, row in rows.items() if name.startswith("chain")]
    others = {name: row for name, row in rows.items() if not name.startswith("chain") and name != "corrupted"}
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        "# Faults and what came of them",
        "",
        f"`{result['command']}`: the task of `fusepress init`, cut to seconds, for",
        f"jetson-agx-orin-64gb, every stage but QAT. Python {result['python']}, {versions}.",
        "",
        '"Same" is one hash of every file of every stage, every figure and every verdict, against the undisturbed run;',
        '"lost" counts committed results that were gone or damaged afterwards.',
        "",
        "| Fault | Exit code | What was said | Same after the same command | Lost |",
        "| --- | ---: | --- | --- | ---: |",
    ]
    for row in others.values():
        same = "yes" if row["same"] else "NO"
        lines.append(f"| {row['fault']} | {row['exit_code']} | {_cell(row['said'])} | {same} | {row.get('lost', 0)} |")
    if chains:
        lines += ["", *_kills(chains)]
    if "corrupted" in rows:
        lines += ["", *_corrupted(rows["corrupted"])]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _kills(chains: list[Any]) -> list[str]:
    kills = [kill for row in chains for kill in row["kills"]]
    same = sum(row["same"] for row in chains)
    lost = sum(kill["lost"] for kill in kills)
    counts = Counter(kill["in"] for kill in kills)
    lines = [
        f"## SIGKILL, {len(kills)} times",
        "",
        f"{len(chains)} runs were killed {len(kills)} times, once in each stage at a random moment of it, and started",
        f"again after each kill: {same} of {len(chains)} ended with the undisturbed result, and {lost} committed",
        "results were lost.",
        "",
        "| Killed | Times |",
        "| --- | ---: |",
    ]
    return [*lines, *(f"| {name} | {count} |" for name, count in counts.most_common())]


def _corrupted(rows: list[Any]) -> list[str]:
    kinds: dict[str, list[bool]] = {}
    for row in rows:
        kinds.setdefault(row["file"], []).append(row["ok"])
    found = sum(row["ok"] for row in rows)
    lines = [
        f"## One flipped bit in each of {len(rows)} files",
        "",
        f"{found} were found and named: in the store when the result is looked up, in a run folder when it is bundled.",
        "",
        "| File | Files | Found and named |",
        "| --- | ---: | ---: |",
    ]
    return [*lines, *(f"| `{name}` | {len(ok)} | {sum(ok)} |" for name, ok in kinds.items())]
