"""Faults of every kind against a small real run: nothing wrong is accepted, nothing committed is lost.

    python -m benchmarks.faults [--kills 100] [--seed 0] [--only kills sigint ...] [--results FOLDER]

The task is the one of `fusepress init`, cut to seconds, with every stage but QAT. Finished rows are kept in the file of
results, so that a campaign that was stopped goes on where it was. Exit code 0 when every row is as it must be.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.faults.kills import chain
from benchmarks.faults.others import FAULTS, Project, corrupted, impossible
from benchmarks.faults.project import compress, make_project, preload, ran, result_sha256
from benchmarks.faults.table import markdown
from fusepress.pipeline.evidence import read_run
from fusepress.pipeline.store import atomic_write_text, sha256_file

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results/faults"
SOURCES = ("pipeline", "export", "calib", "targets", "benchmarks/faults")
VERSIONS = ("torch", "onnx", "onnxruntime-gpu", "nvidia-modelopt", "safetensors", "numpy")


def sources_sha256() -> str:
    """What a finished row belongs to: it is of this code."""
    files = sorted(path for folder in SOURCES for path in (ROOT / folder).rglob("*.py"))
    return hashlib.sha256("".join(sha256_file(path) for path in files).encode()).hexdigest()


class Results:
    """Rows on disk, as they come."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.path, self.text = folder / "faults.json", folder / "faults.md"
        stored = json.loads(self.path.read_text()) if self.path.is_file() else {}
        same = stored.get("sources_sha256") == facts["sources_sha256"]
        self.rows: dict[str, Any] = stored["rows"] if same else {}
        self.facts = facts

    def add(self, name: str, row: Any) -> None:
        """Keep a row."""
        self.rows[name] = row
        result = self.facts | {"rows": self.rows}
        atomic_write_text(self.path, json.dumps(result, indent=1) + "\n")
        atomic_write_text(self.text, markdown(result))


def undisturbed(home: Path) -> tuple[Project, dict[str, float]]:
    """The project, its run, and how long each stage took."""
    recipe = make_project(home / "project")
    run = home / "whole" / "run"
    run.parent.mkdir()
    code, said = ran(compress(recipe, run), home / "log")
    if code not in (0, 4):
        raise RuntimeError(f"expected the undisturbed run to end; got exit code {code}: {said[-2000:]}")
    seconds = {stage.name: stage.seconds for stage in read_run(run).stages if stage.status == "done"}
    scratch = home / "scratch"
    scratch.mkdir()
    return Project(recipe, run, result_sha256(run), scratch), seconds


def kill(project: Project, seconds: dict[str, float], kills: int, seed: int, results: Results) -> None:
    """Chains of kills, until there were enough."""
    done = sum(len(row["kills"]) for name, row in results.rows.items() if name.startswith("chain"))
    number = sum(name.startswith("chain") for name in results.rows)
    while done < kills:
        name = f"chain{number}"
        home = project.scratch / name
        row = chain(project.recipe, home, seconds, kills - done, random.Random(f"{seed} {number}"))
        lost = sum(kill["lost"] for kill in row["kills"])
        row |= {"same": row["sha256"] == project.sha256}
        row["ok"] = row["same"] and not lost and not row["warned"]
        shutil.rmtree(home)
        results.add(name, row)
        done, number = done + len(row["kills"]), number + 1
        print(f"{name}: {done} kills, {'same' if row['same'] else 'ANOTHER RESULT'}, {lost} lost", flush=True)


def main() -> int:
    """Run what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=["kills", "corrupted", *FAULTS], default=None)
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    wanted = given.only or ["corrupted", *FAULTS, "kills"]
    preload()
    facts = {
        "command": f"python -m benchmarks.faults --kills {given.kills} --seed {given.seed}",
        "python": platform.python_version(),
        "versions": _versions(),
        "sources_sha256": sources_sha256(),
    }
    results = Results(given.results, facts)
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        project, seconds = undisturbed(Path(name))
        print(f"undisturbed: {sum(seconds.values()):.1f} s in {len(seconds)} stages, {project.sha256[:16]}", flush=True)
        for fault in wanted:
            if fault == "kills":
                kill(project, seconds, given.kills, given.seed, results)
            elif fault == "corrupted" and fault not in results.rows:
                rows = list(corrupted(project, fault))
                counts = Counter(row["ok"] for row in rows)
                print(f"corrupted: {counts[True]} files found, {counts[False]} not", flush=True)
                results.add(fault, rows)
            elif impossible(fault):
                print(f"{fault}: not tried, it {impossible(fault)}", flush=True)
            elif fault not in results.rows:
                row = FAULTS[fault](project, fault)
                print(
                    f"{fault}: exit code {row['exit_code']}, {'as it must be' if row['ok'] else 'NOT OK'}", flush=True
                )
                results.add(fault, row)
    rows = [row for found in results.rows.values() for row in (found if isinstance(found, list) else [found])]
    return 0 if all(row["ok"] for row in rows) else 1


def _versions() -> dict[str, str]:
    from fusepress.pipeline.stages.base import tool_versions

    return dict(tool_versions(*VERSIONS))


if __name__ == "__main__":
    sys.exit(main())
