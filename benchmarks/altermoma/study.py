"""AlterMOMA, studied: what its second term measures and when masking pays.

    OMP_NUM_THREADS=1 python -m benchmarks.altermoma.study [--only PART ...] [--data DRIVE] [--until HH:MM]

Parts run in the order of the list below; every run is one line in runs/altermoma/runs.jsonl, and what is there is not
run again. `python -m benchmarks.altermoma.report` makes benchmarks/results/altermoma.json and the plots in docs/.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.altermoma.mechanism import mechanism
from benchmarks.altermoma.runs import Bench, Spec, keep, stored
from benchmarks.altermoma.worlds import World
from fusepress.pipeline.recipe import ScoreConfig
from fusepress.pipeline.scoring.redundancy import measure_redundancy

WEAK: dict[str, Any] = {"reactivation_optimizer": "sgd", "reactivation_lr": 1e-3, "reactivation_batches": 16}
STRONG: dict[str, Any] = {"reactivation_optimizer": "adam", "reactivation_lr": 1e-4, "reactivation_batches": 24}
CAMERA_UP_TO_IMAGE = ["camera.stem", "camera.stage1", "camera.stage2", "camera.stage3", "camera.pyramid"]

FIRST = [World(redundancy=r, seed=0) for r in (1.0, 0.0)]
BETWEEN = [World(redundancy=r, seed=0) for r in (0.5, 0.25, 0.75)]
SECOND = [World(redundancy=r, seed=1) for r in (1.0, 0.0, 0.5)]
NEVER_DEAD = [World(redundancy=r, seed=2, dead=0.0) for r in (1.0, 0.0)]
TWINS = [World(redundancy=1.0, seed=seed, dead=0.0, twins=True) for seed in (0, 1)]
KITTI = [World(redundancy=None, seed=0)]


def altermoma(label: str, beta: float, **score: Any) -> Spec:
    return Spec(label=label, score={"method": "altermoma", "beta": beta, **score})


MAIN = [
    altermoma("beta 0", 0.0),
    altermoma("masked, weak", 1.0, **WEAK),
    altermoma("masked, strong, beta 0.5", 0.5, **STRONG),
    altermoma("masked, strong", 1.0, **STRONG),
    altermoma("masked, strong, beta 0.25", 0.25, **STRONG),
    altermoma("noise", 1.0, **STRONG, reactivation="noise"),
    altermoma("unmasked", 1.0, **STRONG, reactivation="unmasked"),
    altermoma("permuted", 1.0, **STRONG, reactivation="permuted"),
    Spec(label="taylor", score={"method": "taylor"}),
    Spec(label="magnitude", score={"method": "magnitude"}),
    Spec(label="random", score={"method": "random"}),
]
VARIANTS = [
    Spec(label="second term added", score={"method": "altermoma", "beta": 1.0, **STRONG}, sign=-1.0),
    *(
        Spec(
            label=f"masked beyond unmasked, beta {beta:g}",
            score={"method": "altermoma", "beta": beta, **STRONG},
            beyond="unmasked",
        )
        for beta in (0.25, 1.0)
    ),
    *(
        altermoma(f"{aggregate}, beta {beta:g}", beta, **STRONG, aggregate=aggregate)
        for aggregate in ("abs", "literal")
        for beta in (0.0, 1.0)
    ),
    *(
        altermoma(f"by {normalise}, beta {beta:g}", beta, **STRONG, normalise=normalise)
        for normalise in ("parameter", "cost")
        for beta in (0.0, 1.0)
    ),
    Spec(label="ranked by score alone, beta 0", score={"method": "altermoma", "beta": 0.0}, rank="score"),
    Spec(label="ranked by score alone, beta 1", score={"method": "altermoma", "beta": 1.0, **STRONG}, rank="score"),
    altermoma("sgd 1e-2 x 16", 1.0, **{**WEAK, "reactivation_lr": 1e-2}),
    Spec(
        label="camera up to the image features, beta 1",
        score={"method": "altermoma", "beta": 1.0, **STRONG},
        branches={"camera": CAMERA_UP_TO_IMAGE, "lidar": ["lidar"]},
    ),
    Spec(
        label="camera up to the image features, beta 0",
        score={"method": "altermoma", "beta": 0.0},
        branches={"camera": CAMERA_UP_TO_IMAGE, "lidar": ["lidar"]},
    ),
    altermoma("adam 1e-4 x 96", 1.0, **{**STRONG, "reactivation_batches": 96}),
    altermoma("adam 1e-3 x 24", 1.0, **{**STRONG, "reactivation_lr": 1e-3}),
    altermoma("3 rounds, beta 0", 0.0, rounds=3),
    altermoma("3 rounds, beta 1", 1.0, rounds=3, **STRONG),
]
CORE = [MAIN[number] for number in (0, 3, 4, 8, 9)]
CONTROLLED = [MAIN[number] for number in (0, 3, 4, 5, 6, 8, 9)]


def again(specs: list[Spec], seed: int, macs: float = 0.4) -> list[Spec]:
    """The same with other scoring and fine-tuning batches, or another budget."""
    return [replace(spec, seed=seed, macs=macs) for spec in specs]


Job = tuple[World, str, Callable[[Bench], dict[str, Any]]]


def runs_of(worlds: list[World], specs: list[Spec]) -> Iterator[Job]:
    for world in worlds:
        yield world, f'["redundancy", "{world.name}"]', redundancy
        for spec in specs:
            yield world, spec.key(world), partial(Bench.run, spec=spec)


def redundancy(bench: Bench) -> dict[str, Any]:
    found = measure_redundancy(bench.model, bench.task, ScoreConfig(), seed=600)
    return {"world": bench.world.name, "redundancy": found, "dense_facts": bench.facts}


def mechanism_of(worlds: list[World]) -> Iterator[Job]:
    for world in worlds:
        yield world, f'["mechanism", "{world.name}"]', mechanism


PARTS: dict[str, list[Job]] = {
    "main": list(runs_of(FIRST, MAIN)),
    "mechanism-redundant": list(mechanism_of(FIRST[:1])),
    "second-redundant": list(runs_of(SECOND[:1], CONTROLLED)),
    "twins": list(runs_of(TWINS[:1], CONTROLLED)),
    "kitti": list(runs_of(KITTI, CORE)),
    "variants-redundant": list(runs_of(FIRST[:1], VARIANTS)),
    "kitti-again": list(runs_of(KITTI, [*again(CORE, 0, 0.2), *again(CORE[:4], 1), *again(CORE[:4], 1, 0.2)])),
    "second-complementary": list(runs_of(SECOND[1:2], CONTROLLED)),
    "mechanism-complementary": list(mechanism_of(FIRST[1:])),
    "second-twins": list(runs_of(TWINS[1:], CORE)),
    "between": list(runs_of(BETWEEN, CORE)),
    "second-between": list(runs_of(SECOND[2:], CORE)),
    "variants-complementary": list(runs_of(FIRST[1:], VARIANTS)),
    "never-dead": list(runs_of(NEVER_DEAD, CORE)),
    "again": list(runs_of(FIRST, again(CORE, 1))),
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--data", type=Path, help="a KITTI drive; the part kitti is left out without one")
    parser.add_argument("--until", help="start no run after this time of day, HH:MM")
    options = parser.parse_args(arguments)
    done = stored()
    jobs = [job for part in options.only for job in PARTS[part]]
    for world, group in itertools.groupby(jobs, key=lambda job: job[0]):
        missing = [(key, work) for _, key, work in group if key not in done]
        if not missing or (world.redundancy is None and options.data is None):
            continue
        bench = Bench.of(world, options.data)
        for key, work in missing:
            if options.until and f"{datetime.datetime.now():%H:%M}" >= options.until:
                return 0
            began = time.monotonic()
            row = work(bench)
            keep(key, row)
            done[key] = row
            print(f"{time.monotonic() - began:5.0f} s {world.name} {key[:90]} {brief(row)}", flush=True)
    return 0


def brief(row: dict[str, Any]) -> str:
    if "finetuned" in row:
        (name, value), *_ = row["finetuned"].items()
        return f"{row['label']}: {name} {value:.4f} (dense {row['dense'][name]:.4f}, pruned {row['pruned'][name]:.4f})"
    if "redundancy" in row:
        return f"won back {row['redundancy']['redundancy']:.3f}, covered {row['redundancy']['covered']:.3f}"
    return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
