"""Cells of the sparsity tables: what is masked how, recovered how, and from which seed; their order and their keys."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[2]
MODELS = {"street": ROOT / "examples/street/recipe.yaml", "wide": ROOT / "benchmarks/sparsity/wide.yaml"}
SUITES = ("recovery", "spread", "wide")
VERSION = 1  # raised by hand when masks, training or evaluation change the results of every cell
CHOOSE = ("magnitude", "score", "sparsegpt")
SPREADS = ("equal", "camera_only", "lidar_only", "fusion_spared", "search")
SPARSITIES = (0.4, 0.8)

Recover = Literal["masked", "sparselora", "dense_lora", "none", "twin"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """What all cells share.

    Attributes:
        macs: kept fraction of the dense MACs of the street model that is masked (the wide one is not pruned).
        start_steps: fine-tuning steps of that model before.
        steps: recovery steps.
        lr: their peak learning rate, and that of low-rank updates, whose scale starts from zero.
        lora_lr: of low-rank updates.
        rank: of an update at most.
        max_trainable: largest share of trained parameters.
        samples: calibration samples of SparseGPT.
        precision: of the training arithmetic.
    """

    macs: float = 0.4
    start_steps: int = 400
    steps: int = 200
    lr: float = 1e-3
    lora_lr: float = 3e-3
    rank: int = 16
    max_trainable: float = 0.1
    samples: int = 64
    precision: str = "bf16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One masked, recovered and evaluated network.

    Attributes:
        model: whose recipe.
        pattern: 2:4 or unstructured.
        choose: what decides which weights stay.
        permute: channels first.
        recover: masked, sparselora or none as in recipes; dense_lora loses the pattern when it is merged; twin is the
            model without any mask, trained as long.
        sparsity: removed fraction (unstructured).
        spread: over the modalities (unstructured).
        seed: of everything random.
    """

    model: str = "street"
    pattern: Literal["2:4", "unstructured"] = "2:4"
    choose: str = "magnitude"
    permute: bool = False
    recover: Recover = "masked"
    sparsity: float = 0.5
    spread: str = "equal"
    seed: int = 0

    @property
    def name(self) -> str:
        """For people and file names."""
        if self.recover == "twin":
            return f"{self.model}-twin-s{self.seed}"
        parts = [self.model, "24" if self.pattern == "2:4" else f"u{100 * self.sparsity:g}-{self.spread}", self.choose]
        return "-".join([*parts, *(["permuted"] if self.permute else []), self.recover, f"s{self.seed}"])

    def key(self, protocol: Protocol, checkpoint_sha256: str, recipe_sha256: str) -> str:
        """Content key: everything that its figures depend on, but for the code."""
        facts = {"version": VERSION, "cell": asdict(self), "protocol": asdict(protocol)}
        facts |= {"dense": checkpoint_sha256, "recipe": recipe_sha256}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def overrides(self, protocol: Protocol, spread: dict[str, float] | None = None) -> list[str]:
        """The recipe's sparsify section as `key=value`.

        Args:
            protocol: what all cells share.
            spread: the fractions that the spread's name stands for.
        """
        recover = {"twin": "masked", "dense_lora": "sparselora"}.get(self.recover, self.recover)
        low_rank = recover == "sparselora"
        section: dict[str, Any] = {
            "pattern": self.pattern,
            "choose": self.choose,
            "recover": recover,
            "samples": protocol.samples,
            "rank": protocol.rank,
            "max_trainable": protocol.max_trainable,
            "steps": protocol.steps,
            "lr": protocol.lora_lr if low_rank else protocol.lr,
        }
        if self.pattern == "2:4":
            section["permute"] = self.permute
        elif spread is not None:
            section |= {"spread": spread, "scope": "branch"}
        else:
            section |= {"spread": self.spread, "sparsity": self.sparsity, "scope": "branch"}
        return [f"sparsify={json.dumps(section)}"]


def sources(model: str) -> list[Path]:
    """The recipes whose tasks' code a model's figures depend on: the wide network is the street's, widened."""
    return [MODELS[name] for name in dict.fromkeys((model, "street"))]


def planned(suites: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """Cells by priority: suite by suite, and everything at one seed before the next seed."""
    cells: list[Cell] = []
    for suite in SUITES:
        if suite in suites:
            for seed in seeds:
                cells += _suite(suite, seed)
    return list(dict.fromkeys(cells))


def _suite(suite: str, seed: int) -> Iterator[Cell]:
    if suite == "spread":
        for sparsity, spread, recover in itertools.product(SPARSITIES, SPREADS, ("masked", "none")):
            yield Cell(pattern="unstructured", sparsity=sparsity, spread=spread, recover=recover, seed=seed)  # type: ignore[arg-type]
        return
    model = "wide" if suite == "wide" else "street"
    yield Cell(model=model, recover="twin", seed=seed)
    for recover, choose, permute in itertools.product(("masked", "sparselora", "none"), CHOOSE, (False, True)):
        if suite == "recovery" or (choose, permute) in (("magnitude", False), ("magnitude", True), ("sparsegpt", True)):
            yield Cell(model=model, choose=choose, permute=permute, recover=recover, seed=seed)  # type: ignore[arg-type]
    yield Cell(model=model, recover="dense_lora", seed=seed)
