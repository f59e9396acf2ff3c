"""Run the stages of a bundle again, each from the bundled results of the stages before it.

A stage that computes the same bytes everywhere must give the bundled hashes; a stage that trains, whose bytes depend on
the processor and its threads, must give metrics within the bundled interval. Because every stage starts from the
bundled files, one that differs does not make those after it differ.

Task, data and checkpoint are the user's own, named by a recipe of theirs: what is in a bundle is never executed.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fusepress.pipeline.bundling.manifest import faults, read_manifest
from fusepress.pipeline.bundling.model import check_models
from fusepress.pipeline.bundling.verify import bundled_recipe, changed, open_bundle
from fusepress.pipeline.errors import StoreError, UsageError
from fusepress.pipeline.evidence import Measurement, RunRecord, StageRecord, read_run
from fusepress.pipeline.store import sha256_tree

if TYPE_CHECKING:
    from fusepress.pipeline.recipe import Recipe
    from fusepress.pipeline.stages.base import Context, Stage, StageOutput

Status = Literal["equal", "within", "different", "skipped"]

HASHED = ("prune", "export", "quantize")  # the same bytes from the same inputs and tools
SKIPPED = ("build",)  # engines belong to their builder and device
FIGURES = ("accuracy.", "robustness.")


@dataclass(frozen=True, slots=True)
class Reproduced:
    """What running one stage again came to.

    Attributes:
        stage: its name.
        status: equal (hashes), within (metrics within the bundled intervals), different, or skipped.
        why: with the files or metrics.
    """

    stage: str
    status: Status
    why: str


def reproduce_bundle(bundle: Path, ctx: Context) -> list[Reproduced]:
    """Run every stage again.

    Args:
        bundle: the archive or folder.
        ctx: of the user's own recipe, task, data and checkpoint; nothing was run with it yet.

    Raises:
        UsageError: the recipe, task or checkpoint are not those of the bundle.
        StoreError: the bundle is damaged.
    """
    from fusepress.pipeline.stages import STAGES

    with tempfile.TemporaryDirectory(prefix="fusepress-") as scratch:
        folder = open_bundle(bundle, Path(scratch))
        manifest = read_manifest(folder)
        wrong = faults(folder, manifest)
        if wrong:
            name, reason = next(iter(wrong.items()))
            raise StoreError(f"expected the files of the manifest; got others at {name}: {reason}; verify the bundle")
        record = read_run(folder)
        other = changed(record, folder)
        if other is not None:
            raise StoreError(f"expected the {other[0]} that run.json names; got other bytes; verify the bundle")
        whole = check_models(folder, manifest, record, checks=("onnx",))["onnx"]  # the stages would follow a path in it
        if whole.status != "ok":
            raise StoreError(f"{whole.why}; verify the bundle")
        check_same_inputs(folder, record, ctx)
        return [_again(ctx, stage, record, folder, Path(scratch)) for stage in STAGES]


def check_same_inputs(folder: Path, record: RunRecord, ctx: Context) -> None:
    """The user's recipe, task and checkpoint must be those that the bundle names by hash.

    Raises:
        UsageError: with what differs.
    """
    differing = _differing_sections(bundled_recipe(folder), ctx.recipe)
    if differing:
        raise UsageError(
            f"expected the recipe that the bundle was made from; got one that differs in {', '.join(differing)}; "
            "check the same version out, and give the same overrides"
        )
    here = {
        "task": (ctx.task.source.sha256(), record.task_sha256),
        "checkpoint": (ctx.checkpoint_sha256, record.checkpoint_sha256),
        "target": (ctx.profile.name, record.target),
    }
    for name, (own, told) in here.items():
        if own != told:
            raise UsageError(
                f"expected the {name} that the bundle was made from ({told[:16]}); got another ({own[:16]}); "
                "check the same version out"
            )


def _differing_sections(bundled: Recipe, own: Recipe) -> list[str]:
    """Both as the present schema fills them in: a default that is new since then is no difference, nor are gates."""
    there, here = (recipe.model_dump(mode="json", exclude={"gates"}) for recipe in (bundled, own))
    return [key for key in here if here[key] != there[key]]


def _again(ctx: Context, stage: Stage, record: RunRecord, folder: Path, scratch: Path) -> Reproduced:
    stored = record.stage(stage.name)
    reason = stage.skip(ctx)
    if stored is None or stored.status == "skipped" or reason is not None:
        return Reproduced(stage.name, "skipped", reason or "the bundled run left it out")
    if stage.name in SKIPPED:
        return Reproduced(stage.name, "skipped", "what is built belongs to the builder and the device")
    ctx.reporter.begin(stage.name, "reproduce")
    out, work = scratch / "out" / stage.name, scratch / "work" / stage.name
    for made in (out, work):
        made.mkdir(parents=True)
    try:
        output = stage.run(ctx, out, work)
    finally:
        ctx.reporter.end()
    _adopt(ctx, stage.name, output, record, folder)
    return compare_stage(stage.name, output.measurements, stored, changed_files(output, out, folder / stage.name))


def _adopt(ctx: Context, name: str, output: StageOutput, record: RunRecord, folder: Path) -> None:
    """Later stages read the bundled files, whatever was made here."""
    for artifact, relative in output.artifacts.items():
        path = folder / name / relative
        if not path.exists():
            raise StoreError(f"expected {name}/{relative} in the bundle; got none; its run was made by another version")
        ctx.add_artifact(artifact, path)
    if name == "quantize":
        ctx.ended_in = record.final_precision


def changed_files(output: StageOutput, made: Path, bundled: Path) -> dict[str, tuple[str, str]]:
    """Artifacts of other bytes: relative name -> (hash here, hash in the bundle)."""
    changed = {}
    for relative in output.artifacts.values():
        here, there = sha256_tree(made / relative), sha256_tree(bundled / relative)
        if here != there:
            changed[relative] = (here, there)
    return changed


def compare_stage(
    name: str, figures: list[Measurement], stored: StageRecord, changed: dict[str, tuple[str, str]]
) -> Reproduced:
    """Hashes where the stage's bytes are the same everywhere, else the metrics against the bundled intervals."""
    if not changed:
        return Reproduced(name, "equal", "the same bytes")
    listed = "; ".join(f"{file} has {here[:12]}, bundled {there[:12]}" for file, (here, there) in changed.items())
    if name in HASHED:
        return Reproduced(name, "different", f"{listed}; compare the versions of the tools in run.json")
    bundled = {m.name: m for m in stored.measurements}
    beyond, within = [], 0
    for figure in figures:
        there = bundled.get(figure.name)
        if there is None or not figure.name.startswith(FIGURES) or there.low is None or there.high is None:
            continue
        if there.low <= figure.value <= there.high:
            within += 1
        else:
            beyond.append(f"{figure.name} {figure.value:.4g}, bundled {there.low:.4g} to {there.high:.4g}")
    if beyond:
        return Reproduced(name, "different", "; ".join(beyond))
    if within == 0:
        return Reproduced(name, "within", f"{listed}; it makes no metric: what follows was run from the bundled file")
    return Reproduced(name, "within", f"other bytes, and {within} metrics within their bundled 95 % intervals")
