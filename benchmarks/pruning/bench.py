"""Runs one cell: score, allocate, remove, estimate the norms again, train, evaluate. The same for every method."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import inspect
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.pruning.cells import ROOT, SCORING_VERSION, SYNTHETIC, TASKS, Cell, Protocol, Results, digest, identity
from fusepress.pipeline.evaluate import Evaluation, evaluate, torch_predict
from fusepress.pipeline.graph.apply import apply_plan, load_checkpoint
from fusepress.pipeline.graph.cost import CostModel, count_macs, count_params
from fusepress.pipeline.graph.groups import find_groups
from fusepress.pipeline.graph.masks import MaskHolder
from fusepress.pipeline.pruning.allocate import Allocation, allocate
from fusepress.pipeline.pruning.ladders import ladder_widths
from fusepress.pipeline.recipe import FinetuneConfig, PruneConfig, Recipe, ScoreConfig, load_recipe
from fusepress.pipeline.recovery.batchnorm import reestimate_batchnorm
from fusepress.pipeline.recovery.finetune import finetune
from fusepress.pipeline.scoring import criteria
from fusepress.pipeline.scoring.altermoma import weight_masks
from fusepress.pipeline.scoring.result import ScoreResult, load_scores, save_scores
from fusepress.pipeline.stages.base import tool_versions
from fusepress.pipeline.store import sha256_file
from fusepress.pipeline.task import Batch, LoadedTask, Split, load_task

if TYPE_CHECKING:
    from fusepress.pipeline.pruning.curves import DistortionTable

SCORE_KEYS = ("batches", "reactivation_batches", "reactivation_lr")  # taken from the task's own recipe
TABLE_SEED = 0  # of all distortion tables: one takes minutes, and beside the channel scores only its noise is drawn
CACHED_TASKS = ("street",)  # whose training stream is endless and costs more to make than to read


class Skipped(Exception):
    """A cell that cannot be run here, and why."""


class CachedTask:
    """A user's task whose batches are made once and kept in files: every method trains on the same ones.

    Args:
        user: the task itself; all else is passed on to it.
        folder: of the files.
    """

    def __init__(self, user: Any, folder: Path) -> None:
        self._user = user
        self._folder = folder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._user, name)

    def batches(self, split: Split, seed: int, *, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """As the task's own, batch for batch."""
        if world != 1:
            raise ValueError(f"expected one process; got {world}; cache nothing when training is distributed")
        number = start
        while True:
            batch = self._read(split, seed, number)
            if batch is None:
                batch = next(iter(self._user.batches(split, seed, start=number)), None)
                if batch is None:
                    return
                self._write(batch, split, seed, number)
            yield batch
            number += 1

    def _path(self, split: Split, seed: int, number: int) -> Path:
        return self._folder / f"{split}-{seed}-{number:05d}.safetensors"

    def _read(self, split: Split, seed: int, number: int) -> Batch | None:
        path = self._path(split, seed, number)
        names = path.with_suffix(".json")
        if not names.is_file():
            return None
        tensors, said = load_file(path), json.loads(names.read_text())
        return Batch(
            inputs={k.removeprefix("i/"): v for k, v in tensors.items() if k.startswith("i/")},
            targets={k.removeprefix("t/"): v for k, v in tensors.items() if k.startswith("t/")},
            sample_ids=said["ids"],
            groups=said["groups"],
        )

    def _write(self, batch: Batch, split: Split, seed: int, number: int) -> None:
        """The names come last: where they are, the tensors are whole."""
        path = self._path(split, seed, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {f"i/{k}": v for k, v in batch.inputs.items()} | {f"t/{k}": v for k, v in batch.targets.items()}
        aside = path.with_suffix(f".{os.getpid()}.part")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside)
        aside.replace(path)
        said = {"ids": list(batch.sample_ids), "groups": list(batch.groups)}
        aside.write_text(json.dumps(said))
        aside.replace(path.with_suffix(".json"))


class Bench:
    """One task, loaded once: its dense network, its groups and their costs.

    Args:
        name: of the task, or the path of a recipe.
        protocol: what all methods share.
        results: the store.
        cache: folder for batches; None makes them anew every time.
        data: data folder of a task that reads one; a task that makes its data itself is not given it.

    Raises:
        Skipped: the task's checkpoint or data is not here.
    """

    def __init__(
        self, name: str, protocol: Protocol, results: Results, *, cache: Path | None, data: Path | None = None
    ) -> None:
        self.name, self.protocol, self.results = name, protocol, results
        loaded = load_recipe(TASKS.get(name, Path(name)))
        self.recipe: Recipe = loaded.recipe
        given = None if name in SYNTHETIC else data
        folder = given or (loaded.resolve(self.recipe.data) if self.recipe.data else None)
        checkpoint = loaded.resolve(self.recipe.checkpoint)
        if not checkpoint.is_file():
            raise Skipped(f"no dense checkpoint of {name}: train it first (fusepress compress trains where it can)")
        self.task: LoadedTask = load_task(self.recipe.task, base=loaded.base, data=folder)
        self.inputs, data_sha = self._look_at_data()
        self.context: dict[str, Any] = {
            "data": data_sha,
            "checkpoint": sha256_file(checkpoint)[:16],
            "scoring": {key: getattr(self.recipe.score, key) for key in SCORE_KEYS},
        }
        if cache is not None and name in CACHED_TASKS:
            self.task.user = CachedTask(self.task.user, cache / data_sha)
        self.dense = self.task.build_model()
        load_checkpoint(self.dense, checkpoint)
        self.dense.eval()
        self.graph = find_groups(self.dense, self.inputs, self.task.branches, self.task.keep)
        self.cost = CostModel(self.graph, self.dense, self.inputs)
        self.tables: dict[str, DistortionTable] = {}
        self.cut: dict[tuple[str, float], tuple[nn.Module, float]] = {}

    def _look_at_data(self) -> tuple[dict[str, Tensor], str]:
        """Example inputs, and a hash of what the task really yields (a task's source may change, its data not)."""
        sha = hashlib.sha256()
        first: dict[str, Tensor] = {}
        splits: tuple[Split, ...] = ("train", "eval")
        for split in splits:
            batch = next(iter(self.task.batches(split, 0)))
            for value in [*batch.inputs.values(), *batch.targets.values()]:
                sha.update(value.contiguous().numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode())
            first = first or dict(batch.inputs)
        return first, sha.hexdigest()[:16]

    def key(self, cell: Cell) -> str:
        """The content key of a cell."""
        return digest(identity(cell, self.protocol, self.context))

    def missing(self, cell: Cell) -> str | None:
        """Why a cell cannot run with the code as it is, or None."""
        spec = cell.spec
        table = criteria.METHODS if cell.kind == "structured" else criteria.WEIGHT_METHODS
        if spec.source == "ours" and spec.score["method"] not in table:
            return f"no criterion {spec.score['method']} yet"
        if spec.source == "modelopt" and importlib.util.find_spec("torchprofile") is None:
            return "no torchprofile: pip install torchprofile==0.0.4"
        if spec.prune.get("allocation") in ("importance", "distortion"):
            if "distortion" not in inspect.signature(allocate).parameters:
                return f"no allocation {spec.prune['allocation']} yet"
            distortion = importlib.util.find_spec("fusepress.pipeline.pruning.distortion")
            if spec.prune["allocation"] == "distortion" and distortion is None:
                return "no distortion tables yet"
        return None

    def run(self, cell: Cell) -> dict[str, Any]:
        """Run one cell and keep its result.

        Raises:
            Skipped: the method cannot reach the budget.
        """
        clock = Clock()
        pruned = Pruner(self, cell, clock).pruned()
        with clock("batchnorm"):
            if cell.spec.source != "dense":
                reestimate_batchnorm(pruned.model, self.task, self.protocol.batchnorm_batches, cell.seed)
        with clock("evaluate_before"):
            before = self._evaluate(pruned.model)
        after = before
        losses: dict[str, float] = {}
        if cell.spec.train:
            with clock("finetune"):
                losses = self._train(cell, pruned.model, pruned.masks)
            with clock("evaluate"):
                after = self._evaluate(pruned.model)
        result = {
            "cell": {name: getattr(cell, name) for name in cell.__dataclass_fields__},
            "label": cell.spec.label,
            "identity": identity(cell, self.protocol, self.context),
            "achieved": pruned.achieved,
            "widths": pruned.widths,
            "before": before.metrics,
            "after": after.metrics,
            "primary": self.task.primary,
            "better": self.task.metrics[self.task.primary],
            "n": after.n,
            "clusters": len(set(after.groups)),
            "final_losses": losses,
            "log": pruned.log,
            "seconds": clock.seconds,
            "versions": tool_versions("torch", "numpy", "torch-pruning"),
            "commit": commit(),
            "threads": torch.get_num_threads(),
        }
        key = self.key(cell)
        self._keep_samples(self.results.path(cell, key), after)
        self.results.write(cell, key, result)
        return result

    def _evaluate(self, model: nn.Module) -> Evaluation:
        return evaluate(self.task, torch_predict(self.task, model))

    def _train(self, cell: Cell, model: nn.Module, masks: MaskHolder | None) -> dict[str, float]:
        config = FinetuneConfig(steps=self.protocol.steps, lr=self.protocol.lr, distill=False)
        work = self.results.folder / "work" / f"{cell.name}-{self.key(cell)}"
        done = finetune(
            model, None, self.task, config, seed=cell.seed, workdir=work, masks=masks, precision=self.protocol.precision
        )
        shutil.rmtree(work, ignore_errors=True)
        return done.final_losses

    @staticmethod
    def _keep_samples(path: Path, evaluation: Evaluation) -> None:
        """Statistics of every sample, for paired resampling; written before the cell counts as done."""
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".part.npz")
        arrays: dict[str, Any] = {f"stats/{name}": value for name, value in evaluation.stats.items()}
        arrays |= {"sample_ids": np.array(evaluation.sample_ids), "groups": np.array(evaluation.groups)}
        np.savez_compressed(aside, **arrays)
        aside.replace(path.with_suffix(".npz"))


class Clock:
    """Wall seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time a phase."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[phase] = round(self.seconds.get(phase, 0.0) + time.monotonic() - began, 2)


class Pruned:
    """A network that lost channels or weights.

    Attributes:
        model: the network.
        achieved: what is left of the dense MACs, parameters and weights, and what was asked for.
        widths: kept channels by group.
        log: what scoring and allocation said.
        masks: of single weights.
    """

    def __init__(self, model: nn.Module, achieved: dict[str, Any], widths: dict[str, int], log: dict[str, Any]) -> None:
        self.model, self.achieved, self.widths, self.log = model, achieved, widths, log
        self.masks: MaskHolder | None = None


class Pruner:
    """From the dense network to the pruned one by a cell's method."""

    def __init__(self, bench: Bench, cell: Cell, clock: Clock) -> None:
        self.bench, self.cell, self.clock = bench, cell, clock

    def pruned(self) -> Pruned:
        """Prune a copy of the dense network."""
        source = self.cell.spec.source
        if source == "dense":
            return self._measured(copy.deepcopy(self.bench.dense), self.bench.graph.widths, {})
        if self.cell.kind == "unstructured":
            return self._by_weights()
        if source in ("torch_pruning", "modelopt"):
            return self._by_a_rival()
        return self._by_us()

    def _by_us(self) -> Pruned:
        bench, spec = self.bench, self.cell.spec
        with self.clock("score"):
            scores, log = self._scores()
        with self.clock("allocate"):
            allocation = self._allocate(scores, log)
        with self.clock("surgery"):
            model = apply_plan(copy.deepcopy(bench.dense), bench.graph.plan(allocation.kept))
        log["notes"] = list(allocation.notes)
        pruned = self._measured(model, allocation.widths, log)
        if pruned.achieved["macs"] > self.cell.budget + 1e-9:
            raise RuntimeError(f"expected at most {self.cell.budget} of the MACs; got {pruned.achieved} by {spec.name}")
        pruned.achieved["step"] = self._smallest_step(allocation.widths)
        return pruned

    def _smallest_step(self, widths: Mapping[str, int]) -> float:
        """Share of the dense MACs that the cheapest aligned step upwards would cost."""
        cost, align = self.bench.cost, self.bench.protocol.align
        here = cost.macs(widths)
        more = [
            cost.macs({**widths, g.id: min(g.width, widths[g.id] + align)}) - here
            for g in self.bench.graph.groups
            if widths[g.id] < g.width
        ]
        return min(more, default=0) / cost.dense_macs

    def _config(self) -> PruneConfig:
        protocol = self.bench.protocol
        return PruneConfig.model_validate(
            {
                "macs": self.cell.budget,
                "floor": protocol.floor,
                "min_channels": protocol.min_channels,
                "align": protocol.align,
                **self.cell.spec.prune,
            }
        )

    def _score_config(self) -> ScoreConfig:
        return ScoreConfig.model_validate({**self.bench.context["scoring"], **self.cell.spec.score})

    def _scores(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Channel scores, made once a method and seed."""
        bench, spec = self.bench, self.cell.spec
        facts: dict[str, Any] = {**bench.context, "score": dict(spec.score), "seed": self.cell.seed}
        facts["version"] = [SCORING_VERSION, spec.version]
        path = bench.results.folder / "scores" / f"{spec.score['method']}-s{self.cell.seed}-{digest(facts)}.safetensors"
        if not path.is_file():
            began = time.monotonic()
            found = criteria.score_channels(
                bench.dense, bench.task, bench.graph, self._score_config(), seed=self.cell.seed
            )
            log = {**found.log, "seconds": round(time.monotonic() - began, 2)}
            save_scores(ScoreResult(channel=found.channel, log=log), path)
        result = load_scores(path)
        kept = ("method", "passes", "seconds", "stages", "loss", "notes")
        return result.channel, {"score": {key: result.log[key] for key in kept if key in result.log}}

    def _allocate(self, scores: dict[str, Any], log: dict[str, Any]) -> Allocation:
        bench, config = self.bench, self._config()
        align = bench.protocol.align
        if config.allocation != "distortion":
            return allocate(scores, bench.graph, bench.cost, config, align=align)
        table = self._distortion_table(scores, config)
        facts = {"eta": table.eta, "samples": table.samples, "notes": list(table.notes), **table.facts}
        log["distortion"] = {name: value for name, value in facts.items() if value == value}  # NaN is no JSON
        fixed = config.distortion.model_copy(update={"eta": table.eta})
        config = config.model_copy(update={"distortion": fixed})
        return allocate(scores, bench.graph, bench.cost, config, align=align, distortion=table.curves)

    def _distortion_table(self, scores: dict[str, Any], config: PruneConfig) -> DistortionTable:
        """Measured once for the same channel scores; every budget reads the same table."""
        from fusepress.pipeline.pruning.distortion import distortion_table

        bench = self.bench
        version = [SCORING_VERSION, self.cell.spec.version, TABLE_SEED]
        key = digest([{name: value.tolist() for name, value in scores.items()}, str(config.distortion), version])
        if key not in bench.tables:
            align, notes = bench.protocol.align, list[str]()
            ladders = {group.id: ladder_widths(group, config, align, notes) for group in bench.graph.groups}
            bench.tables[key] = distortion_table(
                bench.dense,
                bench.task,
                bench.graph,
                scores,
                ladders,
                config.distortion,
                seed=TABLE_SEED,
                out=bench.results.folder / "tables" / key,
            )
        return bench.tables[key]

    def _by_weights(self) -> Pruned:
        """Masks over all weights of two or more dimensions (norms and biases are too few to save anything)."""
        bench = self.bench
        model = copy.deepcopy(bench.dense)
        with self.clock("score"):
            scores, log = criteria.score_weights(bench.dense, bench.task, self._score_config(), seed=self.cell.seed)
        weights = {name for name, p in bench.dense.named_parameters() if p.ndim >= 2}
        chosen = {name: score for name, score in scores.items() if name in weights}
        masks = MaskHolder(weight_masks(chosen, 1.0 - self.cell.budget))
        masks.apply(model)
        pruned = self._measured(model, bench.graph.widths, {"score": {"method": log.get("method")}})
        pruned.achieved |= {"weights": masks.density(), "by_layer": _densities(masks)}
        pruned.masks = masks
        return pruned

    def _by_a_rival(self) -> Pruned:
        bench = self.bench
        known = (self.cell.method, self.cell.budget)
        with self.clock("surgery"):
            if known not in bench.cut:  # they draw nothing at random, so that every seed gets the same network
                bench.cut[known] = self._cut()
            model, knob = copy.deepcopy(bench.cut[known][0]), bench.cut[known][1]
        return self._measured(model, widths_of(model, bench), {"knob": knob})

    def _cut(self) -> tuple[nn.Module, float]:
        from benchmarks.pruning.rivals import prune_by_fastnas, prune_by_torch_pruning

        bench, spec, budget = self.bench, self.cell.spec, self.cell.budget
        if spec.source == "torch_pruning":
            return prune_by_torch_pruning(
                bench.dense,
                bench.inputs,
                budget,
                spec.prune,
                ignored=bench.task.keep,
                round_to=bench.protocol.align,
                max_ratio=1.0 - bench.protocol.floor,
            )
        batches = list(itertools.islice(bench.task.batches("calib", 0), spec.prune["calib_batches"]))
        sign = 1.0 if bench.task.metrics[bench.task.primary] == "max" else -1.0

        def score(model: nn.Module) -> float:
            found = evaluate(bench.task, torch_predict(bench.task, model), batches=batches)
            return sign * found.metrics[bench.task.primary]

        return prune_by_fastnas(
            bench.dense, bench.inputs, budget, spec.prune, score=score, divisor=bench.protocol.align
        )

    def _measured(self, model: nn.Module, widths: Mapping[str, int], log: dict[str, Any]) -> Pruned:
        dense = self.bench.cost
        macs, params = count_macs(model, self.bench.inputs), count_params(model)
        achieved = {
            "budget": self.cell.budget,
            "macs": macs / dense.dense_macs,
            "params": params / dense.dense_params,
            "macs_count": macs,
            "params_count": params,
        }
        if self.cell.kind == "structured":
            achieved["gap"] = self.cell.budget - achieved["macs"]
        return Pruned(model, achieved, dict(widths), log)


def widths_of(model: nn.Module, bench: Bench) -> dict[str, int]:
    """Widths by our groups of a network that another tool cut; groups whose tensors disagree are left out."""
    parameters = dict(model.named_parameters())
    dense = dict(bench.dense.named_parameters())
    widths = {}
    for group in bench.graph.groups:
        found = set()
        for member in group.by_role("producer"):
            if member.param in parameters and member.dim == 0 and dense[member.param].shape[0] == group.width:
                found.add(int(parameters[member.param].shape[0]))
        if len(found) == 1:
            widths[group.id] = found.pop()
    return widths


def _densities(masks: MaskHolder) -> dict[str, float]:
    return {name: round(float(mask.float().mean()), 5) for name, mask in masks.masks.items()}


def commit() -> str:
    """The revision of the code that ran; a snapshot without history names itself in a file."""
    said = ROOT / ".revision"
    if said.is_file():
        return said.read_text().strip()
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"
