"""The multi-task student beside its experts, and compressed: one table of what has been trained.

    python examples/street/train_multi.py --out runs/multi --seed 0        # about an hour a seed; again for more seeds
    fusepress compress examples/street/multi.yaml --run runs/multi/seed-0/compressed \
        -o checkpoint=runs/multi/seed-0/distilled.safetensors -o finetune.precision=bf16
    # what the same training makes of the dense network, as a control:
    fusepress compress examples/street/multi.yaml -o prune=null -o finetune.reconstruct=0 -o quantize=null \
        -o checkpoint=runs/multi/seed-0/distilled.safetensors -o finetune.precision=bf16 \
        --run runs/multi/seed-0/trained-on
    python -m benchmarks.multi_task [--runs runs/multi] [--results FILE]

Nothing is trained here. Each task's score goes from 0 to 1, and the mean of a row is over its tasks; the parameters of
the experts are those of all in parallel. Task interference is what a student loses against the expert of a task. The
compressed network is judged stage by stage as its run recorded it, with both sensors and with one failing.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "multi_task.json"
COMPRESSED = "compressed"  # run folders beside a seed's networks
TRAINED_ON = "trained-on"
STAGES = ("baseline", "prune", "finetune", "quantize", "verify")
FIGURES = re.compile(r"accuracy\.score|macs|params|robustness\..*\.score")
SCORES = {"segmentation": "miou", "detection": "nds", "depth": "depth_object_delta1", "waypoints": "waypoint_ade_m"}
EXPERTS = tuple(SCORES)  # one a task
STUDENTS = ("student", "distilled")
DISPLACEMENT = SCORES["waypoints"]  # in metres, less is better; its score is 1 less it


def score(task: str, metrics: Mapping[str, float]) -> float:
    """A task's score, 0 to 1, higher is better."""
    value = metrics[SCORES[task]]
    return max(0.0, 1 - value) if SCORES[task] == DISPLACEMENT else value


def seed_rows(records: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Experts and students of one seed: parameters, each task's score, their mean, and what a student loses by task.

    Args:
        records: of train_multi.py, by run; all experts and at least one student.
    """
    own = {task: score(task, records[task]["metrics"]) for task in EXPERTS}
    params = sum(records[task]["params"] for task in EXPERTS)
    rows: dict[str, dict[str, Any]] = {"experts": {"params": params, **own, "mean": statistics.mean(own.values())}}
    for name in STUDENTS:
        if name in records:
            found = {task: score(task, records[name]["metrics"]) for task in EXPERTS}
            rows[name] = {"params": records[name]["params"], **found, "mean": statistics.mean(found.values())}
            rows[name]["fewer_params"] = 1 - records[name]["params"] / params
            rows[name]["lost_to_the_expert"] = {task: own[task] - found[task] for task in EXPERTS}
    return rows


def compressed_row(run: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """What a run measured, by stage."""
    rows = {}
    for stage in run["stages"]:
        found = {
            m["name"]: m["value"]
            for m in stage["measurements"]
            if m["value"] is not None and FIGURES.fullmatch(m["name"])
        }
        if stage["name"] in STAGES and found:
            rows[stage["name"]] = found
    return rows


def collected(runs: Path) -> dict[str, Any]:
    """Everything in the folders of the seeds.

    Raises:
        FileNotFoundError: no seed has all its experts and a student.
    """
    seeds: dict[str, Any] = {}
    for folder in sorted(runs.glob("seed-*")):
        names = [*EXPERTS, *STUDENTS]
        records = {n: json.loads(p.read_text()) for n in names if (p := folder / f"{n}.json").is_file()}
        if not records.keys() >= set(EXPERTS) or not records.keys() & set(STUDENTS):
            continue
        seed = {"rows": seed_rows(records), "commands": [record["command"] for record in records.values()]}
        seed |= {"n": records[EXPERTS[0]]["n"], "versions": records[EXPERTS[0]]["versions"]}
        for name in (COMPRESSED, TRAINED_ON):
            if (run := folder / name / "run.json").is_file():
                seed[name] = compressed_row(json.loads(run.read_text()))
        seeds[folder.name.removeprefix("seed-")] = seed
    if not seeds:
        raise FileNotFoundError(
            f"expected a folder seed-N with the records of {', '.join(EXPERTS)} and a student; got none at {runs}; run "
            "examples/street/train_multi.py first"
        )
    return seeds


def lines(seeds: Mapping[str, Any]) -> list[str]:
    """The table as text: means over the seeds."""
    text = []
    for name in ("experts", *STUDENTS):
        rows = [seed["rows"][name] for seed in seeds.values() if name in seed["rows"]]
        if rows:
            figures = {key: statistics.mean(row[key] for row in rows) for key in ("params", *EXPERTS, "mean")}
            text.append(f"{name:10s} n={len(rows)} " + " ".join(f"{key}={value:.4g}" for key, value in figures.items()))
    for seed, found in seeds.items():
        for name in (COMPRESSED, TRAINED_ON):
            for stage, row in found.get(name, {}).items():
                shown = " ".join(f"{key}={value:.4g}" for key, value in row.items())
                text.append(f"seed {seed} {name:10s} {stage:9s} {shown}")
    return text


def main(words: Sequence[str] | None = None) -> None:
    """Print the table and write its JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "multi")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(words)
    seeds = collected(options.runs)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    found = {"command": "python -m benchmarks.multi_task", "scores": SCORES, "seeds": seeds}
    options.results.write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(lines(seeds)))


if __name__ == "__main__":
    main()
