"""The reference of all recipe keys, written from the schema: `python -m fusepress.pipeline.reference FILE`.

Types, defaults, bounds and meanings come from the schema and its docstrings, errors from giving it wrong values. What a
schema cannot know (units, examples, stages, keys that exclude each other) is in the tables below.
"""

from __future__ import annotations

import inspect
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fusepress.pipeline.errors import RecipeError
from fusepress.pipeline.recipe import Recipe, Section, load_recipe
from fusepress.pipeline.store import atomic_write_text

COMMAND = "python -m fusepress.pipeline.reference docs/recipe-reference.md"
BASE = {"task": "task.py:MyTask", "checkpoint": "dense.safetensors"}

STAGES: dict[str, str] = {
    "": "all stages",
    "score": "`score`; `sparsify` too, with `choose: score`",
    "prune": "`prune`; `keep` and `blocks` are read by `baseline` too, which looks for the groups",
    "prune.distortion": "`prune`, with `allocation: distortion`",
    "finetune": "`finetune`; `sparsify` and `qat` take all of it but `steps` and `lr`",
    "sparsify": "`sparsify`",
    "qat": "`qat`",
    "quantize": "`quantize`; the calibration is `qat`'s, too",
    "verify": "`verify`",
    "gates": "read after `verify`, from stored numbers: a change of a gate runs no stage (`fusepress gate`)",
    "gates.accuracy": "as all gates; `max_drop` is read by `quantize` and by `finetune.early_stop`, too",
    "gates.latency": "as all gates; `parts` is read by `verify`, which times them",
    "gates.robustness": "as all gates; `verify` tries the failures that are named",
    "gates.release": "as all gates",
}

UNITS: dict[str, str] = {
    "prune.macs": "fraction of the dense MACs",
    "prune.params": "fraction of the dense parameters",
    "prune.latency_ms": "ms, mean, batch 1",
    "prune.floor": "fraction of the width",
    "prune.min_channels": "channels",
    "prune.align": "channels",
    "prune.branches": "fraction, as the budget",
    "score.batches": "batches",
    "score.reactivation_batches": "steps",
    "score.probe_steps": "steps",
    "score.rounds": "rounds",
    "score.robustness": "fraction of the score",
    "prune.distortion.samples": "samples",
    "prune.distortion.fisher_samples": "samples",
    "prune.distortion.fisher_every": "widths",
    "prune.distortion.draws": "draws",
    "finetune.steps": "steps",
    "finetune.warmup": "fraction of the steps",
    "finetune.reconstruct": "samples",
    "finetune.gradnorm_every": "steps",
    "finetune.modality_dropout": "probability",
    "finetune.checkpoint_every": "steps",
    "finetune.accumulate": "batches",
    "finetune.eval_every": "steps",
    "sparsify.sparsity": "fraction of the weights",
    "sparsify.spread": "fraction of the weights",
    "sparsify.samples": "samples",
    "sparsify.max_trainable": "fraction of the parameters",
    "sparsify.steps": "steps",
    "qat.steps": "steps",
    "quantize.samples": "samples",
    "quantize.max_drop": "the metric's",
    "verify.replicates": "draws",
    "gates.accuracy.max_drop": "the metric's",
    "gates.latency.mean_ms": "ms",
    "gates.latency.p99_ms": "ms",
    "gates.latency.parts": "ms, mean",
    "gates.floors": "the metric's",
    "gates.robustness.max_extra_drop": "the metric's",
    "gates.robustness.min": "the metric's",
    "gates.release.max_drop": "the metric's",
    "gates.release.max_slowdown": "fraction of the latency",
}

# `; ` parts the key's value from other keys of its section that must come with it.
EXAMPLES: dict[str, str] = {
    "task": "task.py:MyTask",
    "checkpoint": "dense.safetensors",
    "target": "jetson-agx-orin-64gb",
    "power_mode": "30W",
    "data": "../kitti",
    "seed": "1",
    "score.method": "altermoma",
    "score.alpha": "1.0",
    "score.beta": "0.5",
    "score.batches": "16",
    "score.reactivation_batches": "32",
    "score.reactivation_lr": "3.0e-3",
    "score.reactivation_optimizer": "adam",
    "score.reactivation": "permuted",
    "score.normalise": "cost",
    "score.aggregate": "abs",
    "score.rounds": "4",
    "score.robustness": "0.5",
    "score.candidates": "[taylor, snip]; method: auto",
    "score.probe_steps": "50; method: auto",
    "prune.macs": "0.4",
    "prune.params": "0.5",
    "prune.latency_ms": "4.0",
    "prune.allocation": "distortion; macs: 0.4",
    "prune.rank": "score; allocation: global; macs: 0.4",
    "prune.floor": "0.25; macs: 0.4",
    "prune.min_channels": "16; macs: 0.4",
    "prune.align": "32; macs: 0.4",
    "prune.keep": "[camera.stem]; macs: 0.4",
    "prune.branches": "{camera: 0.3, lidar: 0.6}; macs: 0.5",
    "prune.blocks": "true; macs: 0.4",
    "prune.distortion.mode": "approximate",
    "prune.distortion.samples": "32",
    "prune.distortion.worst_case": "true",
    "prune.distortion.eta": "0",
    "prune.distortion.reading": "A",
    "prune.distortion.fisher_samples": "32",
    "prune.distortion.fisher_every": "1",
    "prune.distortion.draws": "8",
    "finetune.steps": "800",
    "finetune.lr": "2.0e-3",
    "finetune.weight_decay": "0.0",
    "finetune.warmup": "0.1",
    "finetune.distill": "false",
    "finetune.distill_weight": "4.0",
    "finetune.temperature": "4.0",
    "finetune.teachers": "{boxes: boxes.safetensors}",
    "finetune.distill_normalise": "true",
    "finetune.distill_features": "4.0",
    "finetune.distill_points": "[fuser]; distill_features: 4.0",
    "finetune.reconstruct": "16",
    "finetune.loss_weights": "{boxes: 0.5, distill.boxes: 2.0}",
    "finetune.gradnorm_alpha": "0.5; loss_weights: gradnorm",
    "finetune.gradnorm_every": "20; loss_weights: gradnorm",
    "finetune.ema": "0",
    "finetune.clip": "1.0",
    "finetune.modality_dropout": "0.25",
    "finetune.checkpoint_every": "200",
    "finetune.precision": "fp32",
    "finetune.compile": "true",
    "finetune.accumulate": "4",
    "finetune.freeze_batchnorm": "true",
    "finetune.deterministic": "false",
    "finetune.log": "[tensorboard]",
    "finetune.early_stop": "true",
    "finetune.eval_every": "100",
    "finetune.shard": "fsdp2",
    "sparsify.pattern": '"2:4"',
    "sparsify.sparsity": "0.8; pattern: unstructured",
    "sparsify.scope": "global; pattern: unstructured; sparsity: 0.8",
    "sparsify.spread": "{camera: 0.9, lidar: 0.7, fusion: 0.0}; pattern: unstructured",
    "sparsify.modalities": "[camera]",
    "sparsify.choose": "sparsegpt",
    "sparsify.samples": "128; choose: sparsegpt",
    "sparsify.permute": "true",
    "sparsify.recover": "sparselora",
    "sparsify.rank": "16; recover: sparselora",
    "sparsify.lora_alpha": "32; recover: sparselora",
    "sparsify.max_trainable": "0.05; recover: sparselora",
    "sparsify.norms_and_biases": "false; recover: sparselora",
    "sparsify.steps": "400",
    "sparsify.lr": "1.0e-3",
    "qat.steps": "100",
    "qat.lr": "5.0e-5",
    "qat.ranges": "learned",
    "quantize.precision": "int8",
    "quantize.samples": "128; precision: int8",
    "quantize.method": "mse; precision: int8",
    "quantize.exclude": "[head]; precision: int8",
    "quantize.search": "false; precision: int8",
    "quantize.max_drop": "0.01; precision: int8",
    "quantize.sensitivity": "false; precision: int8",
    "verify.replicates": "5000",
    "gates.accuracy.max_drop": "0.03",
    "gates.accuracy.metric": "iou_car; max_drop: 0.03",
    "gates.latency.mean_ms": "5.0",
    "gates.latency.p99_ms": "8.0",
    "gates.latency.parts": "{camera: 6.0, lidar: 4.0, e2e: 12.0}",
    "gates.latency.schedule": "parallel; parts: {e2e: 12.0}",
    "gates.latency.evidence": "[measured]; mean_ms: 5.0",
    "gates.floors": "{iou_pedestrian: 0.4, miou@night: 0.3}",
    "gates.robustness.max_extra_drop": "0.03",
    "gates.robustness.min": "0.30; max_extra_drop: 0.03",
    "gates.robustness.severity": "2; max_extra_drop: 0.03",
    "gates.release.file": "baseline.json; max_drop: {miou: 0.01}",
    "gates.release.max_drop": "{miou: 0.01}; file: baseline.json",
    "gates.release.max_slowdown": "0.05; file: baseline.json",
}
COMPANY: dict[str, dict[str, Any]] = {  # other sections that must come with it
    "qat": {"quantize": {"precision": "int8"}},
    "finetune.early_stop": {"gates": {"accuracy": {"max_drop": 0.03}}},
}
FAILURE = "camera_blank"  # gates.robustness maps failures to sections
AROUND = {"distortion": "macs: 0.4, allocation: distortion, "}  # what the section's own section must hold

# Values that are right by themselves, and together are refused.
COMBINATIONS: dict[str, tuple[str, ...]] = {
    "": ("task: task.py",),
    "score": ("score: {candidates: [snip, snip]}", "score: {method: magnitude, robustness: 0.5}"),
    "prune": (
        "prune: {}",
        "prune: {macs: 0.4, latency_ms: 4.0}",
        "prune: {macs: 0.4, blocks: true, allocation: global}",
        "prune: {latency_ms: 4.0, branches: {camera: 0.5}}",
    ),
    "finetune": (
        "finetune: {shard: fsdp2, early_stop: true}",
        "finetune: {distill: false, reconstruct: 16}",
        "finetune: {distill_points: [fuser]}",
        "finetune: {compile: true, loss_weights: gradnorm}",
        "finetune: {early_stop: true}",
    ),
    "sparsify": (
        "sparsify: {pattern: 2:4}",
        'sparsify: {pattern: "2:4", sparsity: 0.5}',
        "sparsify: {pattern: unstructured, sparsity: 0.8, modalities: [camera]}",
        "sparsify: {pattern: unstructured}",
        "sparsify: {pattern: unstructured, sparsity: 0.8, choose: sparsegpt, scope: global}",
        "sparsify: {pattern: unstructured, sparsity: 0.8, scope: global, spread: search}",
        "{sparsify: {recover: sparselora}, finetune: {shard: fsdp2}}",
        "{sparsify: {choose: score}, score: {method: auto}}",
    ),
    "qat": ("qat: {}", "{qat: {}, quantize: {precision: int8}, finetune: {shard: fsdp2}}"),
    "quantize": (
        "quantize: {precision: int8, max_drop: 0.01, search: false}",
        "quantize: {precision: fp8, method: mse}",
    ),
    "gates.latency": ("gates: {latency: {}}", "gates: {latency: {p99_ms: 8, evidence: [predicted]}}"),
    "gates.robustness": (
        "gates: {robustness: {camera_noise@9: {max_extra_drop: 0.03}}}",
        "gates: {robustness: {camera_noise@2: {max_extra_drop: 0.03, severity: 3}}}",
        "gates: {robustness: {camera_noise: {max_extra_drop: 0.03}, camera_noise@3: {max_extra_drop: 0.03}}}",
    ),
    "gates.release": ("gates: {release: {file: baseline.json}}",),
}

HEAD = f"""# Recipe reference

Every key, written from the schema; do not edit, run `{COMMAND}`.
How the keys work together: [recipe.md](recipe.md); what the stages do: [stages.md](stages.md).

A section that is left out is a stage that is left out; of a section that is there, keys that are left out have their
defaults. `-o KEY=VALUE` changes a key for one run. "Refused" shows a wrong value and its error, which ends with exit
code 2 before anything runs. An unknown key is refused with the nearest known one.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key of the recipe.

    Attributes:
        path: with dots, e.g. prune.macs; for robustness without the failure's name.
        schema: its JSON schema, with references resolved.
        meaning: the docstring's line.
    """

    path: str
    schema: Mapping[str, Any]
    meaning: str
    required: bool


def sections() -> Iterator[tuple[str, type[Section]]]:
    """Path and class of the recipe and of all its sections, in the order of the schema."""
    yield from _sections("", Recipe)


def _sections(path: str, model: type[Section]) -> Iterator[tuple[str, type[Section]]]:
    yield path, model
    for name in model.model_fields:
        inner = section_of(model, name)
        if inner is not None:
            yield from _sections(f"{path}.{name}".lstrip("."), inner)


def section_of(model: type[Section], name: str) -> type[Section] | None:
    """The section that a key holds, or holds several of (gates.robustness), or None."""
    annotation = model.model_fields[name].annotation
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    found = [c for c in candidates if isinstance(c, type) and issubclass(c, Section)]
    return found[0] if found else None


def keys(path: str, model: type[Section]) -> list[Key]:
    """The keys of one section that hold values, not sections."""
    schema = model.model_json_schema()
    meanings = meanings_of(model)
    return [
        Key(
            path=f"{path}.{name}".lstrip("."),
            schema=_resolved(schema["properties"][name], schema.get("$defs", {})),
            meaning=meanings.get(name, ""),
            required=field.is_required(),
        )
        for name, field in model.model_fields.items()
        if section_of(model, name) is None
    ]


def meanings_of(model: type[Section]) -> dict[str, str]:
    """What the class's docstring says of each attribute."""
    _, _, listed = inspect.cleandoc(model.__doc__ or "").partition("Attributes:\n")
    found: dict[str, str] = {}
    for name, text in re.findall(r"^    (\w+): ((?:.|\n {8})+)", listed, re.MULTILINE):
        found[name] = " ".join(text.split())
    return found


def reference() -> str:
    """The whole document."""
    parts = [HEAD]
    for path, model in sections():
        own = keys(path, model)
        parts.append(_section_text(path, model, own))
    return "\n".join(parts)


def _section_text(path: str, model: type[Section], own: list[Key]) -> str:
    title = f"`{path}`" if path else "The recipe itself"
    first = inspect.cleandoc(model.__doc__ or "").partition("\n\nAttributes:")[0]
    parent, _, name = path.rpartition(".")
    named = meanings_of(dict(sections())[parent]).get(name, "") if path else ""
    about = " ".join([*first.split(), f"Its keys: {named}" if named else ""]).strip()
    lines = [f"## {title}", "", about, "", f"Stage: {STAGES.get(path, '')}.", ""]
    lines += ["| Key | Type | Default | Unit | Meaning | Example |", "| --- | --- | --- | --- | --- | --- |"]
    lines += [_row(key) for key in own]
    lines += ["", "Refused:", "", "| Wrong | Error |", "| --- | --- |"]
    lines += [_refused(nested(key, wrong_value(key.schema)), about=key.path.rpartition(".")[2]) for key in own]
    lines += [_refused(text) for text in COMBINATIONS.get(path, ())]
    return "\n".join([*lines, ""])


def _row(key: Key) -> str:
    name = key.path.rpartition(".")[2]
    default = "required" if key.required else _default_text(key.schema.get("default"))
    cells = (
        f"`{name}`",
        type_text(key.schema),
        default,
        UNITS.get(key.path, ""),
        key.meaning,
        f"`{example_text(key)}`",
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def type_text(schema: Mapping[str, Any]) -> str:
    """A JSON schema in words: `number above 0, at most 1`."""
    if "anyOf" in schema:
        return " or ".join(type_text(option) for option in schema["anyOf"] if option.get("type") != "null")
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type")
    if kind == "array":
        return f"list of {type_text(schema['items'])}"
    if kind == "object":
        return f"mapping to {type_text(schema.get('additionalProperties') or {})}"
    word = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text"}[str(kind)]
    words = {"exclusiveMinimum": "above", "minimum": "at least", "exclusiveMaximum": "below", "maximum": "at most"}
    bounds = [f"{text} {schema[bound]:g}" for bound, text in words.items() if bound in schema]
    return " ".join([word, ", ".join(bounds)]).strip()


def _default_text(value: Any) -> str:
    if value is None or value in ([], {}):
        return "none"
    return "`" + yaml.safe_dump(value, default_flow_style=True, width=1000).replace("\n...", "").strip() + "`"


def example_text(key: Key) -> str:
    """An example as it stands in a recipe, with the keys that must come with it."""
    value, *company = EXAMPLES.get(key.path, "").split("; ")
    return nested(key, value, *company)


def nested(key: Key, value: str, *company: str) -> str:
    """A value as it stands in a recipe: `prune: {macs: 0.4}`."""
    *parents, name = key.path.split(".")
    if parents[:2] == ["gates", "robustness"]:
        parents.append(FAILURE)
    text = ", ".join([f"{name}: {value}", *company])
    for parent in reversed(parents):
        text = f"{AROUND.get(parent, '')}{parent}: {{{text}}}"
    return text


def company_of(key: Key) -> dict[str, Any]:
    """What else a recipe needs for the key's example."""
    return COMPANY.get(key.path) or COMPANY.get(key.path.partition(".")[0]) or {}


def wrong_value(schema: Mapping[str, Any]) -> str:
    """A value that the schema refuses, as YAML."""
    options = [option for option in schema.get("anyOf", ()) if option.get("type") != "null"]
    if options:
        return wrong_value(options[0])
    if "enum" in schema or "const" in schema:
        return "other"
    for bound, beyond in (("exclusiveMinimum", 0), ("minimum", -1)):
        if bound in schema:
            return f"{schema[bound] + beyond:g}"
    simple = {"integer": "many", "number": "much", "boolean": "perhaps", "string": "[1]", "array": "7", "object": "7"}
    return simple[str(schema["type"])]


def _refused(text: str, about: str = "") -> str:
    """A row: the YAML, and what the schema says of it (of one key only, where `about` names it)."""
    said = [line for line in refusals(text) if about in line.partition(":")[0]]
    return f"| `{text}` | {'; '.join(said)} |"


def refusals(text: str) -> list[str]:
    """What the schema says of a wrong recipe, a line a fault; nothing where it is right."""
    try:
        validate(text)
    except RecipeError as error:
        return [line.strip() for line in str(error).splitlines()[1:]]
    return []


def validate(text: str, company: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe that a piece of YAML makes with a task and a checkpoint.

    Raises:
        RecipeError: it does not fit the schema.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump({**BASE, **(company or {}), **yaml.safe_load(text)}))
        return load_recipe(path).recipe


def _resolved(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Mapping[str, Any]:
    if "$ref" in schema:
        return {**definitions[schema["$ref"].rpartition("/")[2]], **{k: v for k, v in schema.items() if k != "$ref"}}
    return schema


def main() -> None:
    """Write the reference into the file that the command line names."""
    atomic_write_text(Path(sys.argv[1]), reference())


if __name__ == "__main__":
    main()
