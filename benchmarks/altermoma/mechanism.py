"""What AlterMOMA's second term measures: rank correlations with curvature, its controls, and what removal really costs.

Per stage (one modality masked) and coupled group, Spearman's correlation over channels; means over groups are kept.
Quantities, one number a channel:

* deci: |theta * g|, nothing masked.
* weak, strong: ReRI after plain SGD 1e-3 x 16 or Adam 1e-4 x 24; noise, unmasked, permuted: the controls (of strong).
* curvature: |theta * H v| in the masked model, H v by a central difference along v, the mean gradient of the batches
  that the reactivation trains on: what ReRI is to first order in the step.
* grasp_masked: the same with v the gradient of the scoring batches; grasp: the same with nothing masked.
* removed: loss of the dense model without the channel, minus its loss. removed_masked, removed_awake: the same in the
  masked model before and after the strong reactivation. woken: removed_awake - removed_masked.
* redundant: removed_awake - removed, how much more the channel matters once the modality is gone and the rest awake.

A channel is removed by zeroing what its readers weigh it with. Loss differences are exact on their samples (float32).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fusepress.pipeline.graph.plan import Group
from fusepress.pipeline.recipe import ScoreConfig
from fusepress.pipeline.scoring.altermoma import Alternation
from fusepress.pipeline.scoring.channels import ChannelScorer, Product
from fusepress.pipeline.scoring.gradients import Passes, batch_loss, mean_gradients, reactivate, scoring_batches
from fusepress.pipeline.scoring.masking import Snapshot, branch_of_parameters, masked, untouched
from fusepress.pipeline.task import Batch, LoadedTask

if TYPE_CHECKING:
    from benchmarks.altermoma.runs import Bench

SEED, SCORING_BATCHES, REMOVAL_BATCHES = 650, 8, 2
CHANNELS_REMOVED = 12  # of each group, at random
RELATIVE_STEP = 1e-3  # of the central difference, in lengths of theta
WEAK = ScoreConfig(beta=1.0, batches=SCORING_BATCHES, reactivation_batches=16)
STRONG = WEAK.model_copy(update={"reactivation_optimizer": "adam", "reactivation_lr": 1e-4, "reactivation_batches": 24})
Vectors = dict[str, np.ndarray[Any, Any]]


def mechanism(bench: Bench) -> dict[str, Any]:
    """All correlations of one world's dense network, by masked modality."""
    graph, _ = bench.graph(bench.task)
    model, task = bench.model, bench.task
    generator = np.random.default_rng(SEED)
    chosen = {
        g.id: np.sort(generator.permutation(g.width)[:CHANNELS_REMOVED]) for g in graph.groups if g.by_role("consumer")
    }
    result: dict[str, Any] = {"world": bench.world.name, "mechanism": {}, "dense_facts": bench.facts}
    with untouched(model, seed=SEED) as snapshot:
        stage = Stage(model, task, list(graph.groups), snapshot, chosen)
        for modality in sorted(task.branches):
            result["mechanism"][modality] = stage.correlations(modality)
    return result


class Stage:
    """One dense network inside `untouched`."""

    def __init__(
        self,
        model: nn.Module,
        task: LoadedTask,
        groups: list[Group],
        snapshot: Snapshot,
        chosen: Mapping[str, np.ndarray[Any, Any]],
    ) -> None:
        self.model, self.task, self.groups, self.snapshot, self.chosen = model, task, groups, snapshot, chosen
        self.scorer = ChannelScorer(model, groups, "gate")
        self.data = scoring_batches(task, SEED, SCORING_BATCHES)
        # other samples than those that anything is trained or scored on
        self.held = list(itertools.islice(task.train_batches(SEED, start=1000), REMOVAL_BATCHES))
        self.branch_of = branch_of_parameters(model, task.branches)

    def correlations(self, modality: str) -> dict[str, Any]:
        """Mean Spearman matrices over the groups outside the masked modality, and facts of the stage."""
        keys = [group.id for group in self.groups if group.branch != modality]
        every: dict[str, Vectors] = {"deci": self._deci(keys), "grasp": self._curvature(keys, None, on_data=True)}
        moved: dict[str, Any] = {}
        for name, config in (
            ("weak", WEAK),
            ("strong", STRONG),
            *((control, STRONG.model_copy(update={"reactivation": control})) for control in CONTROLS),
        ):
            every[name], moved[name] = self._reactivation(modality, keys, config)
        every["curvature"] = self._curvature(keys, modality, on_data=False)
        every["curvature, a quarter of the step"] = self._curvature(keys, modality, on_data=False, step=0.25)
        every["grasp_masked"] = self._curvature(keys, modality, on_data=True)
        truth = self._removals(modality, keys)
        full = {name: vectors for name, vectors in every.items() if name not in truth}
        some = {name: {key: v[key][self.chosen[key]] for key in truth["removed"]} for name, v in full.items()} | truth
        return {
            "all_channels": spearman_matrix(full),
            "some_channels": spearman_matrix(some),
            "groups": len(keys),
            "channels": sum(len(vector) for vector in every["deci"].values()),
            "channels_removed": sum(len(vector) for vector in truth["removed"].values()),
            "stages": moved,
        }

    def _vectors(self, product: Product, keys: Iterable[str]) -> Vectors:
        return {key: value.cpu().numpy() for key, value in self.scorer.scores(product, keys).items()}

    def _product(self, gradient: Mapping[nn.Parameter, Tensor]) -> Product:
        parameters = dict(self.model.named_parameters())

        def product(name: str) -> Tensor:
            parameter = parameters[name]
            theta = self.snapshot.initial[parameter]
            return theta * gradient[parameter] if parameter in gradient else torch.zeros_like(theta)

        return product

    def _gradient(self, batches: list[Batch]) -> dict[nn.Parameter, Tensor]:
        mean_gradients(self.model, self.task, batches, Passes(total=1), "study")
        return {p: p.grad.detach().clone() for p in self.model.parameters() if p.grad is not None}

    def _deci(self, keys: list[str]) -> Vectors:
        return self._vectors(self._product(self._gradient(self.data)), keys)

    def _reactivation(self, modality: str, keys: list[str], config: ScoreConfig) -> tuple[Vectors, dict[str, Any]]:
        run = Alternation(
            model=self.model,
            task=self.task,
            scorer=self.scorer,
            config=config,
            seed=SEED,
            passes=Passes(total=1),
            snapshot=self.snapshot,
        )
        found, log = run.redundancy(modality)
        return {key: found[key].cpu().numpy() for key in keys}, log

    def _curvature(self, keys: list[str], modality: str | None, *, on_data: bool, step: float = 1.0) -> Vectors:
        """|theta * H v|, the channels' sum inside the absolute value as for the gate."""
        batches = (
            self.data
            if on_data
            else list(itertools.islice(self.task.train_batches(SEED, start=SCORING_BATCHES), WEAK.reactivation_batches))
        )
        with self._maybe_masked(modality):
            ahead = self._gradient(batches)
            trained = {p: v for p, v in ahead.items() if self._trains(p, modality)}
            length = sum(float(v.double().square().sum()) for v in trained.values()) ** 0.5
            whole = sum(float(p.detach().double().square().sum()) for p in trained) ** 0.5
            h = step * RELATIVE_STEP * whole / length
            sides = []
            for sign in (1.0, -1.0):
                with torch.no_grad():
                    for p, v in trained.items():
                        p.copy_(self.snapshot.initial[p] + sign * h * v)
                sides.append(self._gradient(self.data))
                self.snapshot.restore_values()
        product = self._product({p: (sides[0][p] - sides[1][p]) / (2 * h) for p in sides[0] if p in sides[1]})
        return self._vectors(product, keys)

    def _trains(self, parameter: nn.Parameter, modality: str | None) -> bool:
        names = {p: name for name, p in self.model.named_parameters()}
        return modality is None or self.branch_of[names[parameter]] != modality

    def _maybe_masked(self, modality: str | None) -> Any:
        return torch.enable_grad() if modality is None else masked(self.model, self.task.branches[modality], modality)

    def _removals(self, modality: str, keys: list[str]) -> dict[str, Vectors]:
        groups = [group for group in self.groups if group.id in keys and group.id in self.chosen]
        found = {"removed": self._rises(groups)}
        others = [p for name, p in self.model.named_parameters() if self.branch_of[name] != modality]
        with masked(self.model, self.task.branches[modality], modality):
            found["removed_masked"] = self._rises(groups)
            stream = self.task.train_batches(SEED, start=SCORING_BATCHES)
            reactivate(
                self.model,
                self.task,
                others,
                itertools.islice(stream, STRONG.reactivation_batches),
                Passes(total=1),
                optimizer="adam",
                lr=STRONG.reactivation_lr,
                where="study",
            )
            found["removed_awake"] = self._rises(groups)
        self.snapshot.restore_values()
        for name, first, second in (
            ("woken", "removed_awake", "removed_masked"),
            ("redundant", "removed_awake", "removed"),
        ):
            found[name] = {key: found[first][key] - found[second][key] for key in found[first]}
        return found

    @torch.no_grad()
    def _rises(self, groups: list[Group]) -> Vectors:
        """How much the loss rises without each of the chosen channels."""
        whole = self._loss()
        return {g.id: np.array([self._loss_without(g, int(c)) - whole for c in self.chosen[g.id]]) for g in groups}

    def _loss_without(self, group: Group, channel: int) -> float:
        parameters = dict(self.model.named_parameters())
        kept: list[tuple[Tensor, int, Tensor, Tensor]] = []
        for member in group.by_role("consumer"):
            weight = parameters[member.param]
            index = torch.tensor(member.indices([channel]))
            before = weight.index_select(member.dim, index)
            weight.index_fill_(member.dim, index, 0.0)
            kept.append((weight, member.dim, index, before))
        loss = self._loss()
        for tensor, dim, index, before in kept:
            tensor.index_copy_(dim, index, before)
        return loss

    def _loss(self) -> float:
        with torch.enable_grad():  # batch_loss wants a graph; nobody goes back through it
            losses = [float(batch_loss(self.model, self.task, batch, "study").detach()) for batch in self.held]
        return float(np.mean(losses))


CONTROLS = ("noise", "unmasked", "permuted")


def spearman_matrix(quantities: Mapping[str, Vectors]) -> dict[str, dict[str, float]]:
    """Mean over groups of the rank correlation between every two quantities."""
    names = list(quantities)
    keys = list(quantities[names[0]])
    tables = []
    for key in keys:
        rows = np.stack([quantities[name][key] for name in names])
        if rows.shape[1] >= 4 and all(np.ptp(row) > 0 for row in rows):
            ranks = np.stack([row.argsort().argsort() for row in rows])
            tables.append(np.corrcoef(ranks))
    mean = np.mean(tables, axis=0)
    return {a: {b: round(float(mean[i, j]), 4) for j, b in enumerate(names)} for i, a in enumerate(names)}


__all__ = ["mechanism", "spearman_matrix"]
