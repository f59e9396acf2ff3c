"""The recipe: its schema, its loader and the overrides of the command line. Nothing here runs anything."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from fusepress.pipeline.errors import RecipeError

Precision = Literal["fp32", "fp16", "int8", "fp8"]
TrainingFormat = Literal["auto", "fp32", "bf16", "fp16"]
LoggerName = Literal["tensorboard", "mlflow"]
Fraction = Annotated[float, Field(gt=0, le=1)]
EVERY_STRATUM = "*"
NO_YAML = (yaml.YAMLError, ValueError, RecursionError)  # the 45th of a month is a ValueError to its reader


def _number_or_auto(value: Any) -> Any:
    """One message instead of one a member of the union."""
    if value == "auto" or (isinstance(value, int | float) and not isinstance(value, bool) and value >= 0):
        return value
    raise ValueError("expected a number of at least 0, or auto")


NumberOrAuto = Annotated[float | Literal["auto"], BeforeValidator(_number_or_auto)]


def _method_or_factors(value: Any) -> Any:
    """One message instead of one a member of the union."""
    if value in ("fixed", "uncertainty", "gradnorm"):
        return value
    if isinstance(value, dict) and all(
        isinstance(n, str) and isinstance(x, int | float) and not isinstance(x, bool) and x >= 0
        for n, x in value.items()
    ):
        return value
    raise ValueError("expected fixed, uncertainty, gradnorm, or factors of at least 0 by loss, e.g. {boxes: 0.5}")


LossWeights = Annotated[
    Literal["fixed", "uncertainty", "gradnorm"] | dict[str, float], BeforeValidator(_method_or_factors)
]


def _quoted(value: Any) -> Any:
    """Unquoted, 2:4 is a number to YAML (minutes and seconds)."""
    if value == 124 and not isinstance(value, str):
        raise ValueError('expected the pattern in quotes, pattern: "2:4"; YAML reads 2:4 as 124 seconds')
    return value


def _spread_choice(value: Any) -> Any:
    """One message instead of one a member of the union."""
    if value in ("equal", "search"):
        return value
    fractions = value.values() if isinstance(value, dict) and value else [None]
    if all(isinstance(f, int | float) and not isinstance(f, bool) and 0 <= f < 1 for f in fractions):
        return value
    raise ValueError("expected equal, search, or a removed fraction from 0 to below 1 for each modality")


Pattern = Annotated[Literal["2:4", "unstructured"], BeforeValidator(_quoted)]
SpreadChoice = Annotated[Literal["equal", "search"] | dict[str, float], BeforeValidator(_spread_choice)]


class Section(BaseModel):
    """Base of all recipe sections: frozen; unknown keys are refused, and numbers that are none or have no end."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Method = Literal[
    "auto",
    "altermoma",
    "taylor",
    "snip",
    "magnitude",
    "group_norm",
    "lamp",
    "imp",
    "grasp",
    "prospr",
    "synflow",
    "random",
]
DATA_FREE = frozenset({"magnitude", "group_norm", "lamp", "synflow", "random"})  # criteria that look at weights only


class ScoreConfig(Section):
    """How channels are scored.

    Attributes:
        method: taylor (squared derivative of a gate), altermoma (arXiv 2409.17728) or another criterion behind the same
            signature; auto tries several and keeps one. The default is what benchmarks/results/pruning/core.md favours.
        alpha: weight of DeCI.
        beta: weight of ReRI; auto is 0, for subtracting it paid in none of the worlds of docs/altermoma.md.
        batches: training batches that gradients are averaged over (|D| / batch size).
        reactivation_batches: B, optimiser steps with one modality masked.
        reactivation_lr: learning rate of those steps.
        reactivation_optimizer: sgd (as derived in the paper) or adam.
        reactivation: masked (the method), or a control that tells what its second term measures: unmasked (the same
            steps, nothing masked), noise (a random step of the same length), permuted (the modality's samples shuffled
            instead of masked).
        normalise: scores by the sum over their branch (the paper), by their parameter, or by branch and cost.
        aggregate: how weight scores become channel scores: gate (after the norm), abs (sum of |.|), literal (|sum|).
        rounds: score, prune a part, score again; 1 = one shot.
        robustness: share of the score that is measured with each modality dead in turn, so that what carries the model
            then is not pruned as redundant; 0: none, 1: nothing else counts (docs/robustness.md).
        candidates: what method auto tries, in order of preference where they tie.
        probe_steps: training steps of each try before it is judged on the calib split.
    """

    method: Method = "taylor"
    alpha: float = Field(default=1.0, ge=0)
    beta: NumberOrAuto = "auto"
    batches: int = Field(default=8, ge=1)
    reactivation_batches: int = Field(default=16, ge=0)
    reactivation_lr: float = Field(default=1e-3, gt=0)
    reactivation_optimizer: Literal["sgd", "adam"] = "sgd"
    reactivation: Literal["masked", "unmasked", "noise", "permuted"] = "masked"
    normalise: Literal["branch", "parameter", "cost"] = "branch"
    aggregate: Literal["gate", "abs", "literal"] = "gate"
    rounds: int = Field(default=1, ge=1)
    robustness: float = Field(default=0.0, ge=0, le=1)
    candidates: tuple[Method, ...] = Field(default=("taylor", "snip", "altermoma", "group_norm"), min_length=1)
    probe_steps: int = Field(default=20, ge=0)

    @field_validator("candidates")
    @classmethod
    def _real_methods(cls, names: tuple[Method, ...]) -> tuple[Method, ...]:
        if "auto" in names or len(set(names)) < len(names):
            raise ValueError("expected different methods, none of them auto; name each once")
        return names

    @model_validator(mode="after")
    def _a_method_that_sees_failures(self) -> ScoreConfig:
        if self.robustness > 0 and self.method in DATA_FREE:
            raise ValueError(
                f"expected a method that reads data with `robustness`; got {self.method}, which looks at weights only "
                "and scores the same with a dead sensor; take for example taylor, or remove robustness"
            )
        return self


class DistortionConfig(Section):
    """Distortion tables of `allocation: distortion` (MMPrune4U).

    Attributes:
        mode: exact (a pass per width on all samples), or approximate (on a fifth of the samples).
        samples: calibration samples that distortion is measured on.
        worst_case: the maximum over samples instead of their mean (as RD-Prune's scripts do).
        eta: weight of the functional Fisher term; 0 is RD-Prune; auto makes the medians of both terms equal.
        reading: B: relative change of each modality's information; A: the paper's sum, taken literally.
        fisher_samples: calibration samples, the first ones, that the information is estimated on.
        fisher_every: widths from one estimate of the information to the next; in between it is taken as linear.
        draws: draws of the noise that the information is estimated with, a forward and a backward pass each.
    """

    mode: Literal["exact", "approximate"] = "exact"
    samples: int = Field(default=64, ge=1)
    worst_case: bool = False
    eta: NumberOrAuto = "auto"
    reading: Literal["A", "B"] = "B"
    fisher_samples: int = Field(default=64, ge=1)
    fisher_every: int = Field(default=3, ge=1)
    draws: int = Field(default=1, ge=1)


class PruneConfig(Section):
    """How many channels go.

    Attributes:
        macs: kept fraction of the dense multiply-accumulates.
        params: kept fraction of the dense parameters.
        latency_ms: predicted latency on the target (give one of the three).
        allocation: global (one threshold on the ranking below), importance (most kept score under the budget, exact),
            or distortion (least damage to the outputs under the budget: MMPrune4U).
        rank: of allocation global: by score per MAC (or parameter) that a channel costs, or by score alone.
        floor: smallest kept fraction of any group.
        min_channels: smallest kept width of any group.
        align: channel multiple; default: the target's.
        keep: module paths that must not be pruned, beside the task's.
        branches: kept-fraction budget for one modality (or "fusion"), in the same unit.
        blocks: whether whole residual blocks may go (allocation importance and distortion).
        distortion: how allocation distortion measures damage.
    """

    macs: Fraction | None = None
    params: Fraction | None = None
    latency_ms: float | None = Field(default=None, gt=0)
    allocation: Literal["global", "importance", "distortion"] = "importance"
    rank: Literal["score_per_cost", "score"] = "score_per_cost"
    floor: float = Field(default=0.1, ge=0, le=1)
    min_channels: int = Field(default=8, ge=1)
    align: int | None = Field(default=None, ge=1)
    keep: tuple[str, ...] = ()
    branches: dict[str, Fraction] = Field(default_factory=dict)
    blocks: bool = False
    distortion: DistortionConfig = DistortionConfig()

    @model_validator(mode="after")
    def _one_budget(self) -> PruneConfig:
        if sum(budget is not None for budget in (self.macs, self.params, self.latency_ms)) != 1:
            raise ValueError(
                "expected exactly one of `macs`, `params` and `latency_ms`; give the kept fraction, e.g. macs: 0.4"
            )
        if self.blocks and self.allocation == "global":
            raise ValueError(
                "expected allocation importance or distortion with `blocks`; got global, which ranks single channels; "
                "change one of the two"
            )
        if self.branches and self.latency_ms is not None:
            raise ValueError(
                "expected no `branches` with `latency_ms`; a latency is of the whole model; give macs or params instead"
            )
        return self


class FinetuneConfig(Section):
    """Recovery training.

    Attributes:
        steps: optimiser steps.
        lr: peak learning rate of AdamW (warm-up, then cosine to zero).
        weight_decay: AdamW's.
        warmup: fraction of the steps that warms up.
        distill: learn from the dense model's outputs too.
        distill_weight: weight of that loss.
        temperature: of the softened class distributions.
        teachers: expert -> its weights (safetensors); each teaches the outputs that the task's `build_expert(name)`
            returns, in place of the dense model.
        distill_normalise: measure every output's loss in its spread, so that heads start comparable (else only
            regressions are, by one number an output).
        distill_features: weight of the loss on the dense model's features at the start; half a cosine to 0.
        distill_points: module paths of those features; default: the branches' and the fuser.
        reconstruct: training samples on which every layer is first fitted, by least squares, to the dense model's
            outputs (no labels, no gradient steps); 0: none.
        loss_weights: of the task's losses: fixed (factors by loss, 1 where none is given), or learned by uncertainty
            (Kendall 2018) or gradnorm (Chen 2018).
        gradnorm_alpha: how strongly losses that lag behind are favoured.
        gradnorm_every: steps between its measurements.
        ema: decay of the weight average that becomes the result; 0 switches it off.
        clip: gradient norm limit.
        modality_dropout: chance that one modality of a batch is blanked.
        checkpoint_every: steps between resumable checkpoints.
        precision: of the forward and backward passes (weights stay fp32): auto is bf16 (else fp16) on an accelerator
            and fp32 on a CPU.
        compile: run the student through torch.compile; where that fails, a warning says why and it runs without.
        accumulate: batches whose gradients make one step.
        freeze_batchnorm: batch norms use and keep their statistics; their weights and biases go on being trained.
        deterministic: the same bits every time on a CPU; on CUDA as far as its kernels go (the log names the others).
        log: loss curves for TensorBoard or MLflow too.
        early_stop: stop when the accuracy gate is safely met on the calib split.
        eval_every: steps between its looks.
        shard: how several processes hold the weights in training: none (each has all), or fsdp2 (each has a share and
            gathers one block at a time), for models that do not fit one device.
    """

    steps: int = Field(default=400, ge=0)
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=1e-4, ge=0)
    warmup: float = Field(default=0.05, ge=0, lt=1)
    distill: bool = True
    distill_weight: float = Field(default=1.0, ge=0)
    temperature: float = Field(default=2.0, gt=0)
    teachers: dict[str, str] = Field(default_factory=dict)
    distill_normalise: bool = False
    distill_features: float = Field(default=0.0, ge=0)
    distill_points: tuple[str, ...] = ()
    reconstruct: int = Field(default=0, ge=0)
    loss_weights: LossWeights = "fixed"
    gradnorm_alpha: float = Field(default=1.5, ge=0)
    gradnorm_every: int = Field(default=5, ge=1)
    ema: float = Field(default=0.99, ge=0, lt=1)
    clip: float = Field(default=5.0, gt=0)
    modality_dropout: float = Field(default=0.0, ge=0, lt=1)
    checkpoint_every: int = Field(default=50, ge=1)
    precision: TrainingFormat = "auto"
    compile: bool = False
    accumulate: int = Field(default=1, ge=1)
    freeze_batchnorm: bool = False
    deterministic: bool = True
    log: tuple[LoggerName, ...] = ()
    early_stop: bool = False
    eval_every: int = Field(default=50, ge=1)
    shard: Literal["none", "fsdp2"] = "none"

    @model_validator(mode="after")
    def _what_shards_can_do(self) -> FinetuneConfig:
        asked = {
            "early_stop": self.early_stop,
            "compile": self.compile,
            "modality_dropout": self.modality_dropout > 0,
            "distill_features": self.distill_features > 0,
            "loss_weights: gradnorm": self.loss_weights == "gradnorm",
            "precision: fp16": self.precision == "fp16",
        }
        found = [name for name, wanted in asked.items() if wanted]
        if self.shard != "none" and found:
            raise ValueError(
                f"expected none of {', '.join(asked)} with `shard: fsdp2`, for they look at whole weights or let "
                f"processes differ in what they run; got {', '.join(found)}; change one of the two"
            )
        return self

    @model_validator(mode="after")
    def _something_to_teach(self) -> FinetuneConfig:
        if not self.distill and (self.teachers or self.distill_features > 0 or self.reconstruct):
            raise ValueError(
                "expected `distill: true` with `teachers`, `distill_features` or `reconstruct`; got false; remove "
                "them, or distill"
            )
        if self.distill_points and self.distill_features == 0:
            raise ValueError(
                "expected `distill_features` above 0 with `distill_points`; got 0; give the weight of their loss"
            )
        if self.compile and (self.distill_features > 0 or self.loss_weights == "gradnorm"):
            raise ValueError(
                "expected `compile: false` with `distill_features` and with `loss_weights: gradnorm`; got true; they "
                "look into the student's graph, which a compiled one hides"
            )
        return self


class SparsifyConfig(Section):
    """Zeros among the weights, and training that keeps them.

    Attributes:
        pattern: "2:4" (at most two non-zeros in four consecutive input channels, which sparse kernels need) or
            unstructured (single weights; smaller, but no faster on the targets).
        sparsity: removed fraction of all weights (unstructured).
        scope: what is ranked together (unstructured): each layer by itself, each branch, or the whole network.
        spread: of the sparsity over the modalities (unstructured): equal, search (on the calib split, at equal zeros),
            or the removed fraction of each, e.g. {camera: 0.9, lidar: 0.7, fusion: 0.0}; those left out stay dense.
        modalities: which of them (and "fusion") get the 2:4 pattern; default: all.
        choose: what decides: magnitude, score (the criterion of the `score` section, of single weights), or sparsegpt
            (what changes each layer's outputs least, with an update of the weights that stay).
        samples: calibration samples of sparsegpt; layers with small feature maps need them all.
        permute: reorder channels first, so that 2:4 keeps more magnitude (or score).
        recover: masked (train all weights under the masks), sparselora (masked low-rank updates), or none.
        rank: of a low-rank update at most.
        lora_alpha: their scale is lora_alpha / rank.
        max_trainable: largest share of the parameters that sparselora trains.
        norms_and_biases: sparselora trains them, too.
        steps: of training.
        lr: its peak learning rate.
    """

    pattern: Pattern = "2:4"
    sparsity: float | None = Field(default=None, gt=0, lt=1)
    scope: Literal["layer", "branch", "global"] = "layer"
    spread: SpreadChoice = "equal"
    modalities: tuple[str, ...] | None = Field(default=None, min_length=1)
    choose: Literal["magnitude", "score", "sparsegpt"] = "magnitude"
    samples: int = Field(default=64, ge=1)
    permute: bool = False
    recover: Literal["masked", "sparselora", "none"] = "masked"
    rank: int = Field(default=8, ge=1)
    lora_alpha: float = Field(default=16.0, gt=0)
    max_trainable: Fraction = 0.1
    norms_and_biases: bool = True
    steps: int = Field(default=200, ge=0)
    lr: float = Field(default=5e-4, gt=0)

    @model_validator(mode="after")
    def _of_one_pattern(self) -> SparsifyConfig:
        two_four = self.pattern == "2:4"
        named = not isinstance(self.spread, str)
        if two_four and (self.sparsity is not None or self.scope != "layer" or self.spread != "equal"):
            raise ValueError(
                "expected no `sparsity`, `scope` or `spread` with 2:4, which is half of every layer; use `modalities`, "
                "or pattern: unstructured"
            )
        if not two_four and (self.modalities is not None or self.permute):
            raise ValueError(
                "expected no `modalities` or `permute` with pattern unstructured; spare a modality with `spread`, e.g. "
                "spread: {camera: 0.8, lidar: 0.8, fusion: 0.0}"
            )
        if not two_four and named == (self.sparsity is not None):
            raise ValueError(
                "expected either `sparsity`, e.g. 0.8, or the sparsity of each modality in `spread`; give one of them"
            )
        if self.choose == "sparsegpt" and self.scope != "layer":
            raise ValueError(
                f"expected scope: layer with choose: sparsegpt, whose layers are pruned one by one; got {self.scope}; "
                "change one of the two"
            )
        if self.scope == "global" and self.spread != "equal":
            raise ValueError("expected no `spread` with scope: global, which ranks all weights; change one of the two")
        return self


class QatConfig(Section):
    """Short training under the quantisation of the release (quantize.precision int8 or fp8).

    The losses, the distillation and all else are those of the `finetune` section (or its defaults); batch norms keep
    their statistics.

    Attributes:
        steps: optimiser steps.
        lr: peak learning rate.
        ranges: of activations: fixed, as calibration gave them, or learned with the weights. Those of weights follow
            the weights.
    """

    steps: int = Field(default=200, ge=0)
    lr: float = Field(default=1e-4, gt=0)
    ranges: Literal["fixed", "learned"] = "fixed"


class QuantizeConfig(Section):
    """Precision of the released ONNX, and how INT8 and FP8 are made.

    Attributes:
        precision: default: fp16, for host-cpu fp32.
        samples: calibration samples.
        method: of the ranges: max, percentile (99.99 %), for INT8 also mse (least squared error) and entropy
            (modelopt's), or auto: of the first three (FP8: two) the one that changes the outputs least.
        exclude: nodes or module paths that stay in floating point.
        search: where all layers quantised lose too much accuracy on the calib split, leave as few as possible in
            floating point, at worst all of them; else all stay quantised whatever they lose.
        max_drop: what quantising may lose of the gate's metric (or the primary one) against the float model; default:
            what gates.accuracy allows against the dense model, else 0.5 % of the metric.
        sensitivity: measure for the report how much every layer and modality minds it, even where nothing is amiss.
    """

    precision: Precision | None = None
    samples: int = Field(default=64, ge=1)
    method: Literal["auto", "max", "percentile", "mse", "entropy"] = "auto"
    exclude: tuple[str, ...] = ()
    search: bool = True
    max_drop: float | None = Field(default=None, ge=0)
    sensitivity: bool = True

    @model_validator(mode="after")
    def _a_limit_that_is_read(self) -> QuantizeConfig:
        if self.max_drop is not None and not self.search:
            raise ValueError("expected `search: true` with `max_drop`, which it is the limit of; got false; remove one")
        return self

    @model_validator(mode="after")
    def _a_method_of_the_precision(self) -> QuantizeConfig:
        if self.precision == "fp8" and self.method in ("mse", "entropy"):
            raise ValueError(
                f"expected method auto, max or percentile with precision fp8; got {self.method}, which counts on "
                "INT8's even steps; change one of the two"
            )
        return self


class VerifyConfig(Section):
    """What `verify` stores for the gates.

    Attributes:
        replicates: bootstrap draws of every metric, paired between the dense and the released model.
    """

    replicates: int = Field(default=2000, ge=200)


class AccuracyGate(Section):
    """Largest allowed drop of a metric, paired, against the dense model.

    Attributes:
        max_drop: largest allowed drop.
        metric: which one; default: the task's primary metric.
    """

    max_drop: float = Field(ge=0)
    metric: str | None = None


class LatencyGate(Section):
    """Limits in milliseconds.

    Attributes:
        mean_ms: of the mean latency of the released file on the target; the upper end of the interval counts.
        p99_ms: of the 99th percentile; counts with measured evidence only.
        parts: limits of mean latencies of branches, of `rest` (fusion and heads), each as an engine of its own, and of
            `e2e`: the pipeline from them and the task's stages outside the network.
        schedule: whether branches run one after the other or at the same time, for `e2e`.
        evidence: which kinds of figures count; a measured one goes before a predicted one.
    """

    mean_ms: float | None = Field(default=None, gt=0)
    p99_ms: float | None = Field(default=None, gt=0)
    parts: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    schedule: Literal["serial", "parallel"] = "serial"
    evidence: tuple[Literal["measured", "predicted"], ...] = ("measured", "predicted")

    @model_validator(mode="after")
    def _some_limit(self) -> LatencyGate:
        if self.mean_ms is None and self.p99_ms is None and not self.parts:
            raise ValueError("expected `mean_ms` or `p99_ms` (or `parts`); give the limit in milliseconds")
        if self.p99_ms is not None and self.mean_ms is None and "measured" not in self.evidence:
            raise ValueError("expected measured evidence for `p99_ms`; a prediction has no tail")
        return self


class RobustnessGate(Section):
    """How much more the compressed model may lose than the dense one under a failure, and an absolute floor.

    Attributes:
        max_extra_drop: largest allowed drop of the primary metric under the failure, beyond what the dense model loses.
        min: least allowed value of the metric under the failure.
        severity: how hard the sensor fails; or it is written behind the failure's name, `camera_noise@2`.
    """

    max_extra_drop: float = Field(ge=0)
    min: float | None = None
    severity: Literal[1, 2, 3] = 3


def failure_parts(name: str, gate: RobustnessGate) -> tuple[str, int]:
    """Failure and severity of a robustness gate: ("camera_noise", 2) of `camera_noise@2`, else the gate's severity."""
    failure, separator, level = name.partition("@")
    return failure, int(level) if separator else gate.severity


def floor_parts(name: str) -> tuple[str, str | None]:
    """Metric and stratum of a floor: ("miou", "night") of `miou@night`, ("miou", None) of `miou`."""
    metric, separator, label = name.partition("@")
    return metric, label if separator else None


class ReleaseGate(Section):
    """What may be lost against a stored release.

    Attributes:
        file: the release's figures, which `fusepress gate RUN --update-baseline` writes; beside the recipe.
        max_drop: metric -> largest allowed drop.
        max_slowdown: largest allowed relative rise of the mean latency: 0.05 is 5 %.
    """

    file: str
    max_drop: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    max_slowdown: float | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _some_limit(self) -> ReleaseGate:
        if not self.max_drop and self.max_slowdown is None:
            raise ValueError("expected `max_drop: {METRIC: LIMIT}` or `max_slowdown`; give a limit")
        return self


class GatesConfig(Section):
    """All gates; a missing number fails its gate.

    Attributes:
        floors: metric, metric@stratum (`strata` of the task) or metric@* (each stratum) -> least allowed value (largest
            where less is better).
        robustness: failure, or failure@severity (1, 2 or 3), -> its limits.
    """

    accuracy: AccuracyGate | None = None
    latency: LatencyGate | None = None
    floors: dict[str, float] = Field(default_factory=dict)
    robustness: dict[str, RobustnessGate] = Field(default_factory=dict)
    release: ReleaseGate | None = None

    @field_validator("robustness")
    @classmethod
    def _severities(cls, gates: dict[str, RobustnessGate]) -> dict[str, RobustnessGate]:
        """A severity is given once, and no failure is judged twice at the same one."""
        for name, gate in gates.items():
            _, separator, level = name.partition("@")
            if separator and level not in ("1", "2", "3"):
                raise ValueError(
                    f"expected a severity of 1, 2 or 3 behind the @; got {name!r}; write for example camera_noise@2"
                )
            if separator and "severity" in gate.model_fields_set and gate.severity != int(level):
                raise ValueError(
                    f"expected one severity; got {level} in {name!r} and severity: {gate.severity}; remove one of them"
                )
        seen = [failure_parts(name, gate) for name, gate in gates.items()]
        twice = [f"{failure}@{severity}" for failure, severity in seen if seen.count((failure, severity)) > 1]
        if twice:
            raise ValueError(
                f"expected every failure and severity once; got {twice[0]} in {twice.count(twice[0])} gates; remove one"
            )
        return gates


class Recipe(Section):
    """A whole recipe: what shapes a result, in one reviewed file.

    Attributes:
        task: the class you wrote, as path/to/file.py:Name or package.module:Name; a path starts at the recipe's folder.
        checkpoint: dense weights (safetensors, or a torch file that loads with weights_only), or an ONNX file, which
            enters at `quantize`.
        target: device profile (`fusepress targets ls`), or a profile's YAML file beside the recipe.
        power_mode: of the device; default: the profile's.
        data: given to the task's __init__.
        seed: of batches, of training and of the bootstrap.
    """

    task: str
    checkpoint: str
    target: str = "host-cpu"
    power_mode: str | None = None
    data: str | None = None
    seed: int = Field(default=0, ge=0)
    score: ScoreConfig = ScoreConfig()
    prune: PruneConfig | None = None
    finetune: FinetuneConfig | None = None
    sparsify: SparsifyConfig | None = None
    qat: QatConfig | None = None
    quantize: QuantizeConfig | None = None
    verify: VerifyConfig = VerifyConfig()
    gates: GatesConfig = GatesConfig()

    @property
    def wants_2to4(self) -> bool:
        """The release carries the pattern that sparse kernels need."""
        return self.sparsify is not None and self.sparsify.pattern == "2:4"

    @field_validator("task")
    @classmethod
    def _names_a_class(cls, value: str) -> str:
        if ":" not in value:
            raise ValueError("expected `path/to/file.py:ClassName`")
        return value

    @model_validator(mode="after")
    def _sections_that_sparsify_reads(self) -> Recipe:
        if self.sparsify is None:
            return self
        if self.sparsify.recover == "sparselora" and self.finetune is not None and self.finetune.shard != "none":
            raise ValueError(
                "expected `finetune.shard: none` with sparsify.recover: sparselora, whose updates are of whole "
                f"weights; got {self.finetune.shard}; change one of the two"
            )
        if self.sparsify.choose == "score" and self.score.method == "auto":
            raise ValueError(
                "expected one criterion in `score.method` with sparsify.choose: score; got auto, which tries channels "
                "only; name a criterion"
            )
        return self

    @model_validator(mode="after")
    def _sections_that_qat_reads(self) -> Recipe:
        if self.qat is None:
            return self
        precision = self.quantize.precision if self.quantize is not None else None
        if precision not in ("int8", "fp8"):
            raise ValueError(
                "expected `quantize.precision` int8 or fp8 with `qat`, which trains under the release's quantisation; "
                f"got {precision or 'none'}; set it, or remove qat"
            )
        if self.finetune is not None and self.finetune.shard != "none":
            raise ValueError(
                "expected `finetune.shard: none` with `qat`, which quantises whole weights; got "
                f"{self.finetune.shard}; change one of the two"
            )
        return self

    @model_validator(mode="after")
    def _a_gate_to_stop_at(self) -> Recipe:
        if self.finetune is not None and self.finetune.early_stop and self.gates.accuracy is None:
            raise ValueError(
                "expected `gates.accuracy` with `finetune.early_stop`, which stops where that gate is met; got none; "
                "add gates.accuracy.max_drop"
            )
        return self


class LoadedRecipe(BaseModel):
    """A recipe and where it came from."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    recipe: Recipe
    path: Path

    @property
    def base(self) -> Path:
        """The folder that relative paths in the recipe start from."""
        return self.path.parent

    def sha256(self) -> str:
        """Hash of the resolved recipe (overrides included), not of comments or key order."""
        text = json.dumps(self.recipe.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def resolve(self, path: str) -> Path:
        """A path named in the recipe: relative to the recipe's folder, else to the working directory."""
        direct = Path(path).expanduser()
        if direct.is_absolute():
            return direct
        beside = self.base / direct
        return beside if beside.exists() or not direct.exists() else direct


def load_recipe(path: Path, overrides: Sequence[str] = (), *, target: str | None = None) -> LoadedRecipe:
    """Read a recipe file, apply `key=value` overrides, check it against the schema.

    Raises:
        RecipeError: the file is missing, is not YAML, has unknown keys or wrong values; all faults are listed.
    """
    try:
        raw = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise RecipeError(
            f"expected a recipe file; got none at {path}; correct the path or run `fusepress init`"
        ) from error
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise RecipeError(f"expected a YAML recipe file; got {path}, which is not one; name the recipe file") from error
    except OSError as error:
        raise RecipeError(f"expected a readable recipe; got {error.strerror} at {path}; correct the path") from error
    except NO_YAML as error:
        raise RecipeError(
            f"expected YAML; got a syntax error at {path}: {str(error).strip()}; mend the file"
        ) from error
    if not isinstance(raw, dict):
        raise RecipeError(f"expected a mapping of recipe keys; got {type(raw).__name__} at {path}; see docs/recipe.md")
    for override in overrides:
        _override(raw, override)
    if target is not None:
        raw["target"] = target
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(_explain(error, path)) from error
    return LoadedRecipe(recipe=recipe, path=path.resolve())


def _override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"expected an override as key=value; got {override!r}; write for example -o prune.macs=0.4")
    *parents, last = key.split(".")
    section = raw
    for parent in parents:
        section = section.setdefault(parent, {}) if section.get(parent) is not None else _fresh(section, parent)
        if not isinstance(section, dict):
            raise RecipeError(f"expected {parent!r} to be a section; got a value, in the override {override!r}")
    try:
        section[last] = yaml.safe_load(text)
    except NO_YAML as error:
        raise RecipeError(f"expected a YAML value; got {text!r} in the override {override!r}") from error


def _fresh(section: dict[str, Any], key: str) -> dict[str, Any]:
    section[key] = {}
    made: dict[str, Any] = section[key]
    return made


def _explain(error: ValidationError, path: Path) -> str:
    lines = []
    for fault in error.errors():
        where = ".".join(str(part) for part in fault["loc"]) or "the recipe"
        if fault["type"] == "extra_forbidden":
            known = _keys_beside(fault["loc"])
            close = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"known keys here: {', '.join(known)}"
            lines.append(f"unknown key `{where}`; {hint}")
        else:
            lines.append(f"`{where}`: {fault['msg'].removeprefix('Value error, ')}; got {_short(fault.get('input'))}")
    return f"expected a recipe that fits the schema; got at {path}:\n  " + "\n  ".join(lines)


def _keys_beside(location: tuple[int | str, ...]) -> list[str]:
    model: Any = Recipe
    for part in location[:-1]:
        if part not in model.model_fields:  # a key of a mapping, whose values are of this section
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        sections = [c for c in candidates if isinstance(c, type) and issubclass(c, Section)]
        if not sections:
            return []
        model = sections[0]
    return sorted(model.model_fields)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
