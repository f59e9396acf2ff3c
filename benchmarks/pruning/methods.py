"""The rows of the tables: what every method is, said in full, so that a row's name never changes its meaning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Source = Literal["ours", "dense", "torch_pruning", "modelopt"]
Suite = Literal["core", "variants", "more", "unstructured"]

GLOBAL: Mapping[str, Any] = {"allocation": "global", "rank": "score_per_cost"}
IMPORTANCE: Mapping[str, Any] = {"allocation": "importance"}
DISTORTION: Mapping[str, Any] = {
    "allocation": "distortion",
    "distortion": {
        "mode": "exact",
        "samples": 64,
        "worst_case": False,
        "eta": "auto",
        "reading": "B",
        "fisher_samples": 64,
        "fisher_every": 3,
        "draws": 1,
    },
}
RD_PRUNE: Mapping[str, Any] = {
    "allocation": "distortion",
    "distortion": {"mode": "exact", "samples": 64, "worst_case": False, "eta": 0.0, "reading": "B", "draws": 4},
}
MOMA: Mapping[str, Any] = {
    "method": "altermoma",
    "alpha": 1.0,
    "beta": 1.0,
    "normalise": "branch",
    "aggregate": "gate",
    "reactivation": "masked",
    "reactivation_optimizer": "sgd",
    "rounds": 1,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodSpec:
    """One row.

    Attributes:
        name: in file names and options.
        label: in tables.
        suite: core is the table that the claims are judged by; variants stand in it too, but run later.
        source: whose code chooses the channels.
        score: keys of the recipe's score section; batches and reactivation length come from the task's own recipe.
        prune: keys of the recipe's prune section beside the budget.
        train: false where the fine-tuning is left out (the dense network as it is).
        version: raised by hand when the code behind this row changes its results; finished cells then run again.
    """

    name: str
    label: str
    suite: Suite = "core"
    source: Source = "ours"
    score: Mapping[str, Any] = field(default_factory=dict)
    prune: Mapping[str, Any] = field(default_factory=dict)
    train: bool = True
    version: int = 1

    def identity(self) -> dict[str, Any]:
        """What shapes the row's results, as plain data."""
        return {
            "source": self.source,
            "score": dict(self.score),
            "prune": dict(self.prune),
            "train": self.train,
            "version": self.version,
        }


def _ours(name: str, label: str, score: str | Mapping[str, Any], prune: Mapping[str, Any], **more: Any) -> MethodSpec:
    config = {"method": score} if isinstance(score, str) else score
    return MethodSpec(name=name, label=label, score=config, prune=prune, **more)


_NO_BETA = {**MOMA, "beta": 0.0}
_LITERAL = {**MOMA, "aggregate": "literal"}

ALL: tuple[MethodSpec, ...] = (
    MethodSpec(name="dense", label="dense, as trained", source="dense", train=False),
    _ours("random", "random", "random", GLOBAL),
    _ours("magnitude", "magnitude", "magnitude", GLOBAL),
    _ours("taylor", "Taylor", "taylor", GLOBAL),
    _ours("importance_taylor", "importance under budget, Taylor", "taylor", IMPORTANCE),
    _ours("snip", "SNIP", "snip", GLOBAL),
    MethodSpec(
        name="tp_group_norm",
        label="group norm, torch-pruning's own",
        source="torch_pruning",
        prune={"pruner": "GroupNormPruner", "importance": "GroupMagnitudeImportance", "p": 2, "global": True},
    ),
    _ours("altermoma_literal", "AlterMOMA, literal", _LITERAL, {"allocation": "global", "rank": "score"}),
    _ours("altermoma", "AlterMOMA, gate per MAC", MOMA, GLOBAL),
    _ours("altermoma_b0", "AlterMOMA without its second term (beta 0)", _NO_BETA, GLOBAL, suite="variants"),
    _ours("mmprune4u", "MMPrune4U (magnitude channels)", "magnitude", DISTORTION, version=2),
    _ours("rd_prune", "RD-Prune (MMPrune4U, eta 0)", "magnitude", RD_PRUNE, suite="variants"),
    _ours("mmprune4u_taylor", "MMPrune4U with Taylor channels", "taylor", DISTORTION, suite="variants", version=2),
    _ours("rd_prune_taylor", "RD-Prune with Taylor channels", "taylor", RD_PRUNE, suite="variants"),
    _ours("importance_altermoma", "importance under budget, AlterMOMA", MOMA, IMPORTANCE, suite="variants"),
    _ours(
        "importance_altermoma_b0", "importance under budget, AlterMOMA beta 0", _NO_BETA, IMPORTANCE, suite="variants"
    ),
    MethodSpec(name="dense_trained", label="dense, fine-tuned alike", source="dense", suite="more"),
    _ours("taylor_score", "Taylor, not per MAC", "taylor", {"allocation": "global", "rank": "score"}, suite="more"),
    _ours("group_norm", "group norm, per MAC", "group_norm", GLOBAL, suite="more"),
    _ours("lamp", "LAMP", "lamp", GLOBAL, suite="more"),
    _ours("imp", "IMP, 5 rounds", {"method": "imp", "rounds": 5}, GLOBAL, suite="more"),
    _ours("synflow", "SynFlow", "synflow", GLOBAL, suite="more"),
    _ours("grasp", "GraSP", "grasp", GLOBAL, suite="more"),
    _ours("prospr", "ProsPr", "prospr", GLOBAL, suite="more"),
    _ours("importance_snip", "importance under budget, SNIP", "snip", IMPORTANCE, suite="more"),
    _ours("importance_magnitude", "importance under budget, magnitude", "magnitude", IMPORTANCE, suite="more"),
    MethodSpec(
        name="tp_group_norm_local",
        label="group norm, torch-pruning's own, one ratio for all layers",
        suite="more",
        source="torch_pruning",
        prune={"pruner": "GroupNormPruner", "importance": "GroupMagnitudeImportance", "p": 2, "global": False},
    ),
    MethodSpec(
        name="fastnas",
        label="FastNAS, nvidia-modelopt's own, nearest MACs it reaches",
        suite="more",
        source="modelopt",
        prune={"ratios": [round(0.1 * k, 1) for k in range(1, 11)], "calib_batches": 2},
    ),
    _ours("u_random", "random", "random", {}, suite="unstructured"),
    _ours("u_magnitude", "magnitude", "magnitude", {}, suite="unstructured"),
    _ours("u_lamp", "LAMP", "lamp", {}, suite="unstructured"),
    _ours("u_snip", "SNIP", "snip", {}, suite="unstructured"),
    _ours("u_altermoma", "AlterMOMA (beta 1)", MOMA, {}, suite="unstructured"),
    _ours("u_altermoma_b0", "AlterMOMA (beta 0)", _NO_BETA, {}, suite="unstructured"),
)
BY_NAME: Mapping[str, MethodSpec] = {spec.name: spec for spec in ALL}
