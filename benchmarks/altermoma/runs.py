"""One run of the study: score a dense network, prune it to a share of its MACs, fine-tune, measure."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn

from benchmarks.altermoma.worlds import RUNS, World, dense_network, judge, load_world, train
from fusepress.pipeline.graph.apply import apply_plan
from fusepress.pipeline.graph.cost import CostModel
from fusepress.pipeline.graph.groups import find_groups
from fusepress.pipeline.graph.plan import GroupGraph
from fusepress.pipeline.pruning.allocate import allocate
from fusepress.pipeline.recipe import PruneConfig, ScoreConfig
from fusepress.pipeline.recovery.batchnorm import reestimate_batchnorm
from fusepress.pipeline.scoring.criteria import score_channels
from fusepress.pipeline.scoring.result import load_scores, save_scores
from fusepress.pipeline.task import LoadedTask, first_batch

STORE = RUNS / "runs.jsonl"
ALIGN, MACS, STEPS, LR = 4, 0.4, 60, 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What is done to a world's dense network.

    Attributes:
        label: name in tables.
        score: keys of the score section that differ from the defaults.
        seed: of scoring batches and of fine-tuning.
        branches: other module paths of the branches, or None for the task's.
        macs: kept share.
        rank: of the allocation.
        sign: -1 adds the second term instead of subtracting it: keeps what wakes up.
        beyond: a control whose second term is taken off the method's: what wakes up beyond it.
    """

    label: str
    score: Mapping[str, Any]
    seed: int = 0
    branches: Mapping[str, list[str]] | None = None
    macs: float = MACS
    rank: Literal["score_per_cost", "score"] = "score_per_cost"
    sign: float = 1.0
    beyond: str | None = None

    def key(self, world: World) -> str:
        """Names the run."""
        usual = (("rank", "score_per_cost"), ("sign", 1.0), ("beyond", None))
        facts = {name: value for name, value in asdict(self).items() if (name, value) not in usual}
        return json.dumps([world.name, STEPS, facts], sort_keys=True, default=dict)


@dataclass(slots=True)
class Bench:
    """A world with its dense network, and what runs on it share.

    Attributes:
        world: which.
        task: its task.
        model: its dense network.
        facts: of the dense network.
        graphs: groups and costs by branches.
    """

    world: World
    task: LoadedTask
    model: nn.Module
    facts: dict[str, Any]
    graphs: dict[str, tuple[GroupGraph, CostModel]] = field(default_factory=dict)

    @classmethod
    def of(cls, world: World, data: Path | None = None) -> Bench:
        """Load or train."""
        task = load_world(world, data)
        model, facts = dense_network(world, task)
        return cls(world, task, model, facts)

    def graph(self, task: LoadedTask) -> tuple[GroupGraph, CostModel]:
        """Groups and costs."""
        key = json.dumps(task.branches)
        if key not in self.graphs:
            inputs = first_batch(task, "calib").inputs
            graph = find_groups(self.model, inputs, task.branches, task.keep, watchdog_s=900)
            one = {name: value[:1] for name, value in inputs.items()}
            self.graphs[key] = graph, CostModel(graph, self.model, one)
        return self.graphs[key]

    def scores(self, task: LoadedTask, graph: GroupGraph, spec: Spec) -> tuple[dict[str, Any], dict[str, Any]]:
        """Channel scores and the log; S = N(DeCI) - beta * N(ReRI) is put together from its two terms, kept on disk."""
        config = ScoreConfig.model_validate(dict(spec.score))
        seed = 500 + spec.seed
        if config.method != "altermoma" or config.rounds > 1:
            result = score_channels(self.model, task, graph, config, seed=seed)
            return result.channel, result.log
        assert not isinstance(config.beta, str)
        beta = config.beta
        first, log = self._term(task, graph, spec, config.model_copy(update={"alpha": 1.0, "beta": 0.0}), seed)
        if config.beta == 0:
            return first, log
        config = config.model_copy(update={"alpha": 0.0, "beta": 1.0})
        second, log = self._term(task, graph, spec, config, seed)
        if spec.beyond is not None:
            other = config.model_copy(update={"reactivation": spec.beyond})
            control, _ = self._term(task, graph, spec, other, seed)
            second = {key: second[key] - control[key] for key in second}
        return {key: first[key] + np.float32(spec.sign * beta) * second[key] for key in first}, log

    def _term(
        self, task: LoadedTask, graph: GroupGraph, spec: Spec, config: ScoreConfig, seed: int
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        shown = config.model_dump(mode="json")
        if config.beta == 0:  # the first term does not depend on how the second would be found
            shown = {name: value for name, value in shown.items() if not name.startswith("reactivation")}
        key = json.dumps([shown, seed, spec.branches], sort_keys=True, default=dict)
        path = RUNS / "terms" / f"{self.world.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            save_scores(score_channels(self.model, task, graph, config, seed=seed), path)
        result = load_scores(path)
        return result.channel, result.log

    def run(self, spec: Spec) -> dict[str, Any]:
        """Score, prune, fine-tune, measure."""
        began = time.monotonic()
        task = self.task if spec.branches is None else replace(self.task, branches=dict(spec.branches))
        graph, cost = self.graph(task)
        channel, log = self.scores(task, graph, spec)
        scored = time.monotonic()
        config = PruneConfig(macs=spec.macs, rank=spec.rank)
        allocation = allocate(channel, graph, cost, config, align=ALIGN)
        smaller = apply_plan(copy.deepcopy(self.model), graph.plan(allocation.kept))
        reestimate_batchnorm(smaller, self.task, 8, 700 + spec.seed)
        before = judge(smaller, self.task)
        train(smaller, self.task, STEPS, LR, 700 + spec.seed)
        after = judge(smaller, self.task)
        return {
            "world": self.world.name,
            "redundancy_knob": self.world.redundancy,
            "world_seed": self.world.seed,
            "dead": self.world.dead,
            "label": spec.label,
            "spec": json.loads(json.dumps(asdict(spec), default=dict)),
            "dense": self.facts["metrics"],
            "pruned": before,
            "finetuned": after,
            "macs_kept": allocation.achieved,
            "kept_by_branch": _kept_by_branch(graph, allocation.widths),
            "stages": log.get("stages", []),
            "seconds_scoring": round(scored - began, 1),
            "seconds": round(time.monotonic() - began, 1),
        }


def _kept_by_branch(graph: GroupGraph, widths: Mapping[str, int]) -> dict[str, float]:
    names = sorted({group.branch for group in graph.groups})
    whole = {name: sum(g.width for g in graph.groups if g.branch == name) for name in names}
    return {name: sum(widths[g.id] for g in graph.groups if g.branch == name) / whole[name] for name in names}


def stored() -> dict[str, dict[str, Any]]:
    """Runs that were made already, by key."""
    if not STORE.is_file():
        return {}
    rows = [json.loads(line) for line in STORE.read_text().splitlines() if line.endswith("}")]
    return {row["key"]: row for row in rows}


def keep(key: str, row: Mapping[str, Any]) -> None:
    """Append a run; a killed process leaves at most one torn line, which is not read."""
    STORE.parent.mkdir(parents=True, exist_ok=True)
    with STORE.open("a") as file:
        file.write(json.dumps({"key": key, **row}) + "\n")
