"""Synthetic evaluations with a known true drop, judged by the gates' own code.

A world deals out frames in clusters. A frame has `either` cells (lognormal, in part common to its cluster), the dense
model has a share of them right that varies from cluster to cluster, and the compressed model has a share `loss` of them
less, which is independent of `either`. The metric is a ratio of sums, as an intersection over union is; its true drop
is the mean of `loss`, whatever the sample.

Many trials share one set of draws, as all runs of a recipe with one seed do. The draws are those of
`bootstrap_replicates`, taken down once as counts, so that the replicates of all trials are two matrix products.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fusepress.pipeline.evidence import Artifact, RunRecord, StageRecord, Verdict
from fusepress.pipeline.gates import Condition, Replicates, bootstrap_replicates, jackknife_values, judge
from fusepress.pipeline.recipe import GatesConfig

Floats = npt.NDArray[np.float64]
METRIC = "iou"
SHA = "0" * 64


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Where the samples come from.

    Attributes:
        clusters: number of clusters; 1 is a single drive, whose frames depend on those before them.
        frames: frames in each.
        drop: true drop of the compressed model.
        cluster_sd: spread of the loss from cluster to cluster (of a single drive: of its slow part).
        frame_sd: from frame to frame.
        losses: shape of the clusters' losses: normal, or skewed (a gamma of shape 2: a few scenes lose much).
        memory: correlation of one frame's slow part with the next one's, in a single drive.
    """

    clusters: int
    frames: int = 4
    drop: float
    cluster_sd: float = 0.05
    frame_sd: float = 0.05
    losses: Literal["normal", "skewed"] = "normal"
    memory: float = 0.9


@dataclass(frozen=True, slots=True)
class Sums:
    """Cells of the units that are drawn (clusters, or frames of a single drive), each (T, K)."""

    dense: Floats
    compressed: Floats
    either: Floats


def simulate(world: World, trials: int, generator: np.random.Generator) -> Sums:
    """Independent evaluations of one world."""
    shape = (trials, world.clusters, world.frames)
    slow = _drive(world, trials, generator) if world.clusters == 1 else _cluster_losses(world, trials, generator)
    loss = world.drop + slow + world.frame_sd * generator.normal(size=shape)
    either = np.exp(0.5 * generator.normal(size=(trials, world.clusters, 1)) + 0.5 * generator.normal(size=shape))
    right = generator.beta(8, 2, size=(trials, world.clusters, 1)) * np.ones(shape)
    parts = [either * right, either * (right - loss), either]
    joined = [part[:, 0] if world.clusters == 1 else part.sum(axis=2) for part in parts]
    return Sums(*joined)


def _cluster_losses(world: World, trials: int, generator: np.random.Generator) -> Floats:
    shape = (trials, world.clusters, 1)
    if world.losses == "normal":
        return world.cluster_sd * generator.normal(size=shape)
    skewed: Floats = world.cluster_sd * (generator.gamma(2.0, size=shape) - 2.0) / np.sqrt(2.0)
    return skewed


def _drive(world: World, trials: int, generator: np.random.Generator) -> Floats:
    """A stationary series of memory `memory`, (T, 1, frames)."""
    noise = generator.normal(size=(trials, world.frames))
    out = np.empty_like(noise)
    out[:, 0] = noise[:, 0]
    for frame in range(1, world.frames):
        out[:, frame] = world.memory * out[:, frame - 1] + np.sqrt(1 - world.memory**2) * noise[:, frame]
    return world.cluster_sd * out[:, None]


@dataclass(frozen=True, slots=True)
class Draws:
    """How often each unit is in each draw (R, K) and in each leave-out (G, K)."""

    bootstrap: Floats
    jackknife: Floats


def draws_of(world: World, replicates: int, seed: int) -> Draws:
    """The draws that the gates' own functions make for such clusters."""
    units = world.frames if world.clusters == 1 else world.clusters
    groups = ["drive"] * units if world.clusters == 1 else [f"s{i}" for i in range(units)]
    stats = {"unit": np.arange(units)}

    def counts(drawn: dict[str, npt.NDArray[Any]]) -> dict[str, float]:
        return {str(i): float(n) for i, n in enumerate(np.bincount(drawn["unit"], minlength=units))}

    tables = (
        bootstrap_replicates(stats, stats, counts, groups, replicates=replicates, seed=seed),
        jackknife_values(stats, stats, counts, groups),
    )
    drawn, left_out = (np.stack([table[str(i)][:, 0] for i in range(units)], axis=1) for table in tables)
    return Draws(drawn, left_out)


def conditions(sums: Sums, draws: Draws) -> Iterator[Condition]:
    """The condition of each trial, as `compare` would make it."""
    points = [part.sum(axis=1) / sums.either.sum(axis=1) for part in (sums.dense, sums.compressed)]
    tables = []
    for counts in (draws.bootstrap, draws.jackknife):
        below = sums.either @ counts.T
        tables.append(np.stack([(part @ counts.T) / below for part in (sums.dense, sums.compressed)], axis=2))
    for trial in range(len(sums.either)):
        yield Condition(
            dense={METRIC: float(points[0][trial])},
            compressed={METRIC: float(points[1][trial])},
            replicates={METRIC: tables[0][trial]},
            jackknife={METRIC: tables[1][trial]},
        )


def replicates_of(world: World, clean: Condition, **failures: Condition) -> Replicates:
    """What `verify` would have stored."""
    return Replicates(
        clean=clean,
        failures={(name, 3): condition for name, condition in failures.items()},
        samples=world.clusters * world.frames,
        clusters=world.clusters,
        artifact_sha256=SHA,
    )


def verdicts_of(stored: Replicates, gates: GatesConfig) -> list[Verdict]:
    """What the gates say."""
    return judge(RECORD, stored, gates, {METRIC: "max"})


def tally(world: World, gates: GatesConfig, *, trials: int, replicates: int, seed: int) -> Counter[str]:
    """How often the (only) gate says what."""
    draws = draws_of(world, replicates, seed)
    sums = simulate(world, trials, np.random.default_rng([seed, world.clusters, world.frames]))
    return Counter(verdicts_of(replicates_of(world, c), gates)[0].verdict for c in conditions(sums, draws))


RECORD = RunRecord(
    schema=1,
    name="trial",
    fusepress="0",
    target="none",
    recipe_sha256="",
    task_sha256="",
    checkpoint_sha256="",
    seed=0,
    stages=[StageRecord(name="verify", status="done")],
    artifacts={"onnx": Artifact(path="model.onnx", sha256=SHA)},
)
