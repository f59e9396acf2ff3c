"""The library behind the command line: each verb is one function here."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fusepress
from fusepress.pipeline import distributed
from fusepress.pipeline.console import Reporter
from fusepress.pipeline.errors import (
    CheckpointError,
    FusepressError,
    RecipeError,
    StoreError,
    TaskError,
    UsageError,
)
from fusepress.pipeline.evidence import RUN_JSON, Measurement, RunRecord, Verdict, read_run
from fusepress.pipeline.gates import (
    Baseline,
    Replicates,
    judge,
    load_baseline,
    load_replicates,
    make_baseline,
    overall,
    save_baseline,
)
from fusepress.pipeline.recipe import (
    GatesConfig,
    LoadedRecipe,
    Recipe,
    ReleaseGate,
    failure_parts,
    floor_parts,
    load_recipe,
)
from fusepress.pipeline.store import Store, atomic_write_text, content_key, folder_lock, sha256_file, sha256_tree
from fusepress.targets.legality import check_legality
from fusepress.targets.profile import Profile, load_profile

if TYPE_CHECKING:
    from fusepress.export.explain import Explanation
    from fusepress.pipeline.bundling.make import Bundle
    from fusepress.pipeline.bundling.reproduce import Reproduced
    from fusepress.pipeline.bundling.verify import Verified
    from fusepress.pipeline.comparing import Comparison
    from fusepress.pipeline.measuring import Arrivals, HostSettings
    from fusepress.pipeline.on_device import DeviceSettings
    from fusepress.pipeline.stages.base import Context
    from fusepress.pipeline.task import LoadedTask, Split
    from fusepress.targets.critical_path import Schedule

RECIPE_JSON = "recipe.json"
BASELINE_JSON = "baseline.json"  # the stored release that a run was judged against
HOST = "host-cpu"
REPORT_FILES = ("report.html", "junit.xml", "summary.md")
ENVIRONMENT_TOOLS = (
    "torch",
    "torch-pruning",
    "onnx",
    "onnxscript",
    "onnxruntime-gpu",
    "nvidia-modelopt",
    "tensorrt_rtx",
    "numpy",
    "scipy",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run came to.

    Attributes:
        record: the run record, as in run.json.
        folder: the run folder.
        worked: False when every stage was already there.
    """

    record: RunRecord
    folder: Path
    worked: bool


def compress(
    recipe: str | Path,
    *,
    target: str | None = None,
    run: str | Path | None = None,
    overrides: Sequence[str] = (),
    from_stage: str | None = None,
    reporter: Reporter | None = None,
    command: str = "",
) -> Outcome:
    """Run all stages of a recipe and judge the result.

    Under torchrun (`torchrun --nproc-per-node=N -m fusepress compress ...`) the N processes share the run: each of them
    calls this, rank 0 alone writes and reports, and all return the same outcome.

    Args:
        recipe: the YAML file.
        target: a device profile, in place of the recipe's.
        run: the run folder; default `runs/<recipe>-<target>`.
        overrides: `key=value` changes to the recipe.
        from_stage: make this stage and all later ones anew.
        reporter: where progress goes; default: the terminal.
        command: what was typed, for the report.

    Raises:
        FusepressError: with the exit code of its branch.
    """
    with distributed.session():
        loaded = load_recipe(Path(recipe), overrides, target=target)
        ctx = make_context(loaded, (reporter or Reporter()) if distributed.is_main() else Reporter(quiet=True))
        folder = Path(run) if run is not None else default_run_folder(loaded, ctx.profile)
        if distributed.world() > 1:
            _check_ranks(ctx, folder)
        if not distributed.is_main():
            return _follow(ctx, folder)
        outcome = _lead(ctx, folder, from_stage, command)
        distributed.tell((outcome.record.to_json(), outcome.worked))
        return outcome


def _lead(ctx: Context, folder: Path, from_stage: str | None, command: str) -> Outcome:
    """A run as its only process or as rank 0."""
    from fusepress.pipeline.runner import run_stages
    from fusepress.pipeline.stages import STAGES
    from fusepress.pipeline.stages.finetune import check_training

    check_training(ctx)
    with distributed.alone():
        _refuse_foreign_folder(folder)
        preflight(ctx, Store(folder.parent / ".store"))
        record, recipe_json = new_record(ctx, folder, command), _recipe_json(ctx.loaded, folder)
        record.recipe_json_sha256 = hashlib.sha256(recipe_json.encode()).hexdigest()
        previous = _previous(folder)
    worked = run_stages(ctx, STAGES, record, folder, from_stage=from_stage)
    atomic_write_text(folder / RECIPE_JSON, recipe_json)
    judge_run(record, folder, run_recipe(folder, record).gates)
    _explain_quietly(ctx, folder, worked=worked)
    _write_reports(record, folder, previous, worked=worked)
    return Outcome(record=record, folder=folder, worked=worked)


def _explain_quietly(ctx: Context, folder: Path, *, worked: bool) -> None:
    """Findings for the report; a run does not fail for want of them, and one for this host is measured instead."""
    from fusepress.pipeline.explaining import explain_run
    from fusepress.pipeline.report.explain import EXPLAIN_JSON

    if ctx.on_host or (not worked and (folder / EXPLAIN_JSON).exists()):
        return
    target = ctx.recipe.target
    try:
        # a profile of the user's own is a file beside the recipe
        own = str(ctx.loaded.base / target) if target.endswith((".yaml", ".yml")) else None
        explain_run(folder, target=own, mode=ctx.power_mode)
    except FusepressError as error:
        ctx.reporter.warn(f"the release was not explained: {error}")
    except Exception as error:  # noqa: BLE001  it reads what third parties wrote, after all the work is done
        ctx.reporter.warn(f"the release was not explained: {type(error).__name__}: {error}; report it with the run")


def _follow(ctx: Context, folder: Path) -> Outcome:
    """A run as one of the ranks above 0."""
    from fusepress.pipeline.runner import follow_stages
    from fusepress.pipeline.stages import STAGES

    follow_stages(ctx, STAGES, folder)
    record, worked = distributed.hear()
    return Outcome(record=RunRecord.model_validate_json(record), folder=folder, worked=worked)


def _check_ranks(ctx: Context, folder: Path) -> None:
    """Check that all processes share one folder, recipe, version and data, and that the task deals out its batches.

    Raises:
        UsageError: with the ranks and what differs.
        TaskError: the task's `batches` ignores `rank` and `world`.
    """
    from fusepress.pipeline.task import check_shards

    facts = common_facts(ctx)
    for rank, other in enumerate(distributed.gather_objects(facts)):
        differing = [name for name, value in other.items() if facts[name] != value]
        if differing:
            raise UsageError(
                f"expected every process to have the same {differing[0]}; got {other[differing[0]]!r} on rank {rank} "
                f"and {facts[differing[0]]!r} on rank {distributed.rank()}; install and copy the same on all machines"
            )
    token = distributed.on_main(lambda: _write_token(folder))
    seen = distributed.gather_objects((folder.parent / token).exists())
    distributed.on_main(lambda: (folder.parent / token).unlink())
    if not all(seen):
        raise UsageError(
            f"expected a run folder that all {len(seen)} processes share; got one that rank {seen.index(False)} does "
            f"not see at {folder}; name a folder of a shared file system with --run"
        )
    if not ctx.from_onnx:
        check_shards(ctx.task, distributed.rank(), distributed.world())
    _check_same_data(ctx)
    distributed.barrier()  # so that rank 0 does not begin where another one has refused


def _check_same_data(ctx: Context) -> None:
    """Check that every process reads the same data: keys name that of rank 0, whoever worked on the samples.

    Raises:
        UsageError: with the split, the ranks and their fingerprints.
    """
    splits: tuple[Split, ...] = ("calib", "eval") if ctx.from_onnx else ("train", "calib", "eval")
    seen = distributed.gather_objects({split: ctx.fingerprint(split) for split in splits})
    for split in splits:
        ranks: dict[str, list[str]] = {}
        for rank, fingerprints in enumerate(seen):
            ranks.setdefault(fingerprints[split], []).append(f"rank {rank}")
        if len(ranks) > 1:
            got = " and ".join(f"{data!r} on {', '.join(names)}" for data, names in ranks.items())
            raise UsageError(
                f"expected every process to read the same data; got the fingerprints {got} of the split {split} at "
                f"{ctx.task.source.spec}; give all machines the same data folder, in the same version"
            )


def common_facts(ctx: Context) -> dict[str, str]:
    """What must be the same for all processes that share a run, by name: hashes and versions."""
    from fusepress.pipeline.stages.base import tool_versions

    return {
        "recipe": ctx.loaded.sha256(),
        "task": ctx.task.source.sha256(),
        "checkpoint": ctx.checkpoint_sha256,
        "target profile": hashlib.sha256(ctx.profile.model_dump_json(by_alias=True).encode()).hexdigest(),
        **ctx.shas,  # so far the experts' weights
        "fusepress": fusepress.__version__,
        **tool_versions(*ENVIRONMENT_TOOLS),
    }


def _write_token(folder: Path) -> str:
    name = f".shared-{uuid.uuid4().hex[:12]}"
    atomic_write_text(folder.parent / name, "seen by all processes of a run\n")
    return name


def default_run_folder(loaded: LoadedRecipe, profile: Profile) -> Path:
    """`runs/<recipe>-<target>`; a file called recipe.yaml goes by its folder's name."""
    stem = loaded.path.stem
    name = loaded.path.parent.name if stem == "recipe" else stem
    return Path("runs") / f"{name}-{profile.name}"


def _refuse_foreign_folder(folder: Path) -> None:
    """A run writes and removes stage folders: never in a folder that holds something else."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"expected --run to name a folder; got the file {folder}; name another")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RUN_JSON).exists():
        if {p.name for p in folder.iterdir()} <= {".lock", "log.txt"}:
            return
        raise UsageError(
            f"expected --run to name a run folder or an empty one; got {folder}, which holds other files; name another"
        )


def make_context(loaded: LoadedRecipe, reporter: Reporter) -> Context:
    """Check recipe, target and task against each other; nothing is run yet.

    Raises:
        UsageError: what is illegal for the target, or a broken task, before the first stage.
    """
    recipe = loaded.recipe
    profile = load_profile(recipe.target, base=loaded.base)
    mode = recipe.power_mode or profile.default_mode
    profile.mode(mode)
    precision = release_precision(recipe, profile)
    check_legality(profile, precision, sparsity=recipe.wants_2to4)
    _check_onnx_start(recipe)
    from fusepress.pipeline.stages.base import Context
    from fusepress.pipeline.stages.teachers import find_teachers
    from fusepress.pipeline.task import load_task

    data = loaded.resolve(recipe.data) if recipe.data is not None else None
    if data is not None and not data.exists():
        raise RecipeError(f"expected `data` to name an existing folder; got {data}; correct it or use -o data=FOLDER")
    task = load_task(recipe.task, base=loaded.base, data=data)
    _check_names(recipe, task)
    checkpoint = _find_checkpoint(loaded, task)
    ctx = Context(
        loaded=loaded,
        task=task,
        profile=profile,
        power_mode=mode,
        precision=precision,
        checkpoint=checkpoint,
        checkpoint_sha256=sha256_file(checkpoint) if checkpoint is not None else "train_dense",
        reporter=reporter,
    )
    find_teachers(ctx)
    return ctx


def release_precision(recipe: Recipe, profile: Profile) -> Any:
    """The recipe's precision, else fp16 for GPU targets and fp32 for this host."""
    if recipe.quantize is not None and recipe.quantize.precision is not None:
        return recipe.quantize.precision
    return "fp32" if profile.family == "host" else "fp16"


def _check_onnx_start(recipe: Recipe) -> None:
    asked = [name for name in ("prune", "finetune", "sparsify", "qat") if getattr(recipe, name) is not None]
    if recipe.checkpoint.endswith(".onnx") and asked:
        raise RecipeError(
            f"expected a torch checkpoint for {', '.join(asked)}; got the ONNX file {recipe.checkpoint}; remove these "
            "sections: an ONNX file enters at quantize"
        )


def _check_names(recipe: Recipe, task: LoadedTask) -> None:
    """Metric, branch and failure names of the recipe against what the task has."""
    from fusepress.pipeline.corrupt import failures_of

    gates = recipe.gates
    wanted = [("gates.floors", floor_parts(name)[0]) for name in gates.floors]
    wanted += [("gates.release.max_drop", name) for name in (gates.release.max_drop if gates.release else ())]
    if gates.accuracy is not None and gates.accuracy.metric is not None:
        wanted.append(("gates.accuracy.metric", gates.accuracy.metric))
    for where, name in wanted:
        if name not in task.metrics:
            raise RecipeError(f"expected `{where}` to name a metric of the task, {list(task.metrics)}; got {name!r}")
    stratified = [name for name in gates.floors if floor_parts(name)[1] is not None]
    if stratified and not task.offers("strata"):
        raise RecipeError(
            f"expected a task with strata(batch) for the floor {stratified[0]!r}; got {task.name} without; label the "
            "samples there, or floor the whole split"
        )
    for where, names in _branches_of(recipe).items():
        for branch in names:
            if branch not in {*task.branches, "fusion"}:
                raise RecipeError(
                    f"expected `{where}` to name a branch of the task, {[*task.branches, 'fusion']}; got {branch!r}"
                )
    for key, gate in gates.robustness.items():
        failure, _ = failure_parts(key, gate)
        if failure not in failures_of(task):
            raise RecipeError(
                f"expected `gates.robustness` to name a failure, one of {failures_of(task)}; got {failure!r}"
            )


def _branches_of(recipe: Recipe) -> dict[str, Sequence[str]]:
    """The modalities that a recipe names, by key."""
    named: dict[str, Sequence[str]] = {}
    if recipe.prune is not None:
        named["prune.branches"] = list(recipe.prune.branches)
    if recipe.sparsify is not None:
        named["sparsify.modalities"] = recipe.sparsify.modalities or ()
        named["sparsify.spread"] = [] if isinstance(recipe.sparsify.spread, str) else list(recipe.sparsify.spread)
    return named


def _find_checkpoint(loaded: LoadedRecipe, task: LoadedTask) -> Path | None:
    path = loaded.resolve(loaded.recipe.checkpoint)
    if path.is_file():
        return path
    if task.offers("train_dense"):
        return None
    raise CheckpointError(
        f"expected a checkpoint file; got none at {path}; correct `checkpoint` in {loaded.path.name}, or give the task "
        "a train_dense method that makes it"
    )


def preflight(ctx: Context, store: Store) -> None:
    """Check task, checkpoint and sensor failures on one batch.

    Raises:
        UsageError: with what was expected, what was found and what to do; nothing was written.
    """
    from fusepress.pipeline.stages.verify import check_failures

    _check_task_and_checkpoint(ctx, store)
    check_failures(ctx)


def _check_task_and_checkpoint(ctx: Context, store: Store) -> None:
    """Of the dense model, unless a stored baseline proves that it passed before."""
    from fusepress.pipeline.stages import STAGES
    from fusepress.pipeline.stages.drafting import check_calibration
    from fusepress.pipeline.stages.teachers import check_teaching

    if store.entry_path(content_key(STAGES[0].key_parts(ctx))).exists():
        check_teaching(ctx)
        check_calibration(ctx, whole=False)
        return
    if ctx.from_onnx:
        _check_onnx_file(ctx)
        check_calibration(ctx, whole=True)
        return
    from fusepress.pipeline.graph.apply import load_checkpoint
    from fusepress.pipeline.task import check_task

    try:
        model = ctx.task.build_model()
    except Exception as error:
        raise TaskError(
            f"expected {ctx.task.name}.build_model() to make the dense model; got {type(error).__name__}: {error}; "
            "mend the task (use --debug for the traceback)"
        ) from error
    if ctx.checkpoint is not None:
        load_checkpoint(model, ctx.checkpoint)
    check_task(ctx.task, model)
    check_teaching(ctx)
    check_calibration(ctx, whole=True)


def _check_onnx_file(ctx: Context) -> None:
    from fusepress.export.runtime import OnnxSession
    from fusepress.pipeline.errors import ExportError

    assert ctx.checkpoint is not None
    try:
        OnnxSession(ctx.checkpoint)
    except ExportError as error:
        raise CheckpointError(str(error)) from error


def new_record(ctx: Context, folder: Path, command: str) -> RunRecord:
    """A run record with everything but its stages."""
    from fusepress.pipeline.stages.base import tool_versions

    return RunRecord(
        schema=1,
        name=folder.name,
        fusepress=fusepress.__version__,
        target=ctx.profile.name,
        recipe_sha256=ctx.loaded.sha256(),
        task_sha256=ctx.task.source.sha256(),
        checkpoint_sha256=ctx.checkpoint_sha256,
        seed=ctx.recipe.seed,
        command=command,
        target_profile={
            "family": ctx.profile.family,
            "runtime": ctx.profile.runtime,
            "power_mode": ctx.power_mode,
            "precision": ctx.precision,
            "description": ctx.profile.description,
            "latency_validated": ctx.profile.latency_validated,
            "unconfirmed": list(ctx.profile.unconfirmed),
        },
        task={"name": ctx.task.name, "metrics": dict(ctx.task.metrics), "branches": ctx.task.branches}
        | ({"outside": ctx.task.outside} if ctx.task.outside else {}),
        environment={
            "python": platform.python_version(),
            "platform": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
            "tools": tool_versions(*ENVIRONMENT_TOOLS),
        },
    )


def judge_run(record: RunRecord, folder: Path, gates: GatesConfig) -> None:
    """Judge a run's stored numbers; the verdict, and what stays releasable, go into the record and run.json."""
    baseline = _stored_release(folder, gates.release)
    verdicts = judge(record, _replicates(record, folder), gates, record.task["metrics"], baseline=baseline)
    verify = record.stage("verify")
    assert verify is not None
    verify.verdicts = verdicts
    record.verdict, record.why = overall(verdicts)
    record.released = _released(record)
    atomic_write_text(folder / RUN_JSON, record.to_json())


def _replicates(record: RunRecord, folder: Path) -> Replicates | None:
    path = _artifact(record, folder, "replicates")
    return None if path is None else load_replicates(path)


def _artifact(record: RunRecord, folder: Path, name: str) -> Path | None:
    """A file of the run, as the run recorded it; None where it made none.

    Raises:
        StoreError: its bytes are others.
    """
    stored = record.artifacts.get(name)
    if stored is None:
        return None
    path = folder / stored.path
    if not path.exists() or sha256_tree(path) != stored.sha256:
        found = "other bytes" if path.exists() else "no file"
        raise StoreError(
            f"expected the {name} that the run recorded; got {found} at {path}; run `fusepress compress` again: it "
            "restores the file from the store"
        )
    return path


def _stored_release(folder: Path, gate: ReleaseGate | None) -> Baseline | None:
    """What `gates.release` compares with; a copy stays in the run folder, which is judged again elsewhere."""
    if gate is None:
        return None
    baseline = load_baseline(_beside(folder, gate.file))
    if baseline is not None:
        atomic_write_text(folder / BASELINE_JSON, baseline.to_json())
    return baseline


def _beside(folder: Path, path: str) -> Path:
    return folder / path if (folder / path).exists() or not Path(path).exists() else Path(path)


def _released(record: RunRecord) -> str:
    """What may be released: the run's own artifact, or, where a gate failed, the dense model."""
    if record.verdict == "PASS":
        return next(name for name in ("engine", "build_kit", "onnx") if name in record.artifacts)
    return "dense_onnx"


def _previous(folder: Path) -> RunRecord | None:
    try:
        return read_run(folder)
    except (StoreError, UsageError):
        return None


def _write_reports(record: RunRecord, folder: Path, previous: RunRecord | None, *, worked: bool) -> None:
    """The reports, unless they already tell the same."""
    same = previous is not None and _told(previous) == _told(record)
    if not worked and same and all((folder / name).exists() for name in REPORT_FILES):
        return
    write_reports(folder)


def write_reports(folder: Path) -> None:
    """report.html, junit.xml and summary.md of a run folder."""
    from fusepress.pipeline.report.html import write_report
    from fusepress.pipeline.report.junit import write_junit
    from fusepress.pipeline.report.markdown import write_summary

    write_report(folder)
    write_junit(folder)
    write_summary(folder)


def _told(record: RunRecord) -> str:
    """A record without what changes from run to run when nothing was done."""
    stages = [s.model_copy(update={"status": "done" if s.status == "cached" else s.status}) for s in record.stages]
    plain = record.model_copy(update={"command": "", "stages": stages, "name": ""})
    return hashlib.sha256(plain.to_json().encode()).hexdigest()


def _recipe_json(loaded: LoadedRecipe, folder: Path) -> str:
    """The resolved recipe for the run folder, which the path of the stored release is made relative to."""
    values = loaded.recipe.model_dump(mode="json")
    if loaded.recipe.gates.release is not None:
        stored = loaded.resolve(loaded.recipe.gates.release.file)
        values["gates"]["release"]["file"] = os.path.relpath(stored.absolute(), folder.absolute())
    return json.dumps(values, indent=1, sort_keys=True) + "\n"


def run_recipe(folder: Path, record: RunRecord, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that a run folder was made from, with overrides.

    Raises:
        StoreError: it is missing, or not the one that the run recorded.
    """
    path = folder / RECIPE_JSON
    if not path.exists():
        raise StoreError(
            f"expected {RECIPE_JSON} in the run folder; got none at {folder}; run `fusepress compress` again"
        )
    if record.recipe_json_sha256 not in (None, sha256_file(path)):
        raise StoreError(
            f"expected the recipe that the run recorded; got other bytes at {path}; change the recipe itself and run "
            "`fusepress compress` again, or try another budget with `fusepress gate RUN -o KEY=VALUE`"
        )
    return load_recipe(path, overrides).recipe


def gate(run: str | Path, *, overrides: Sequence[str] = (), baseline: str | Path | None = None) -> Outcome:
    """Judge a finished run again, with another budget if overrides say so; no stage is run, no torch is needed.

    Args:
        run: its folder.
        overrides: `key=value` changes to its recipe.
        baseline: the stored release, in place of the one that `gates.release.file` names.

    Raises:
        StoreError: the folder is not a finished run.
        RecipeError: an override does not fit.
    """
    folder = Path(run)
    record = _finished(folder)
    with folder_lock(folder):
        gates = run_recipe(folder, record, overrides).gates
        if baseline is not None and gates.release is not None:
            release = gates.release.model_copy(update={"file": str(Path(baseline).absolute())})
            gates = gates.model_copy(update={"release": release})
        judge_run(record, folder, gates)
        write_reports(folder)
    return Outcome(record=record, folder=folder, worked=True)


def update_baseline(run: str | Path, baseline: str | Path | None = None) -> tuple[Path, list[str]]:
    """Store a run's figures as the release that later runs are compared with: a file for review.

    Args:
        run: its folder; all its gates but those against an earlier release must have passed.
        baseline: the file; default: what `gates.release.file` of its recipe names.

    Returns:
        The file, and what changed in it, a line each.

    Raises:
        UsageError: another gate did not pass, or no file is named.
        StoreError: the folder is not a finished run.
    """
    folder = Path(run)
    record = _finished(folder)
    release = run_recipe(folder, record).gates.release
    named = baseline if baseline is not None or release is None else _beside(folder, release.file)
    if named is None:
        raise UsageError(
            f"expected a file to store the release in; got none, for {RECIPE_JSON} of {folder} has no gates.release; "
            "name one with --baseline FILE"
        )
    replicates, verify = _replicates(record, folder), record.stage("verify")
    assert verify is not None
    if replicates is None:
        raise StoreError(f"expected bootstrap replicates; got none at {folder}; run compress again from verify")
    made = make_baseline(record, replicates, verify.verdicts, record.task["metrics"])
    return Path(named), save_baseline(Path(named), made)


def _finished(folder: Path) -> RunRecord:
    record = read_run(folder)
    if record.stage("verify") is None or record.stage("verify").status not in ("done", "cached"):  # type: ignore[union-attr]
        raise StoreError(f"expected a finished run; got one without results of verify at {folder}; run compress again")
    return record


def bundle(
    run: str | Path,
    out: str | Path | None = None,
    *,
    key: str | Path | None = None,
    licences: Sequence[str | Path] = (),
    refused: bool = False,
) -> Bundle:
    """Write the release bundle of a run: everything it made, with hashes, a bill of materials and a signature.

    Args:
        run: the run folder.
        out: the file; default: `<run>.bundle.tar` beside it.
        key: Ed25519 private key (PEM) to sign with.
        licences: files to go along, such as the licence of the weights.
        refused: bundle a run that did not pass its gates, too.

    Raises:
        UsageError: the run did not pass, or the key is none.
        StoreError: the run is not finished or its files were changed.
    """
    from fusepress.pipeline.bundling.make import make_bundle

    return make_bundle(
        Path(run),
        None if out is None else Path(out),
        key=None if key is None else Path(key),
        licences=[Path(path) for path in licences],
        refused=refused,
    )


def compare(runs: Sequence[str | Path], *, html: str | Path | None = None) -> Comparison:
    """Several runs of one task side by side: which of them no other one for the same target beats, what differs.

    Args:
        runs: run folders, two or more.
        html: a file for a page with the same and a drawing of accuracy over latency.

    Raises:
        UsageError: fewer than two, one that is no run, one twice, or runs of different tasks or primary metrics.
        StoreError: a run's files are damaged, or the page cannot be written.
    """
    from fusepress.pipeline.comparing import compare_runs

    found = compare_runs([Path(run) for run in runs])
    if html is not None:
        from fusepress.pipeline.report.comparison import write_comparison

        write_comparison(found, Path(html))
    return found


def verify(bundle: str | Path, *, key: str | Path | None = None) -> Verified:
    """Check a bundle, without trust in it.

    Args:
        bundle: the archive, or a folder it was unpacked into.
        key: Ed25519 public key (PEM) that it must be signed with.

    Raises:
        UsageError: there is no such file, or the key is none.
    """
    from fusepress.pipeline.bundling.verify import verify_bundle

    return verify_bundle(Path(bundle), key=None if key is None else Path(key))


def reproduce(
    bundle: str | Path,
    recipe: str | Path,
    *,
    target: str | None = None,
    overrides: Sequence[str] = (),
    reporter: Reporter | None = None,
) -> list[Reproduced]:
    """Run the stages of a bundle again, each from the bundled results of those before it.

    Args:
        bundle: the archive, or a folder it was unpacked into.
        recipe: the user's own recipe, with the task and data that the bundle names by hash.
        target: as for `compress`.
        overrides: as for `compress`.
        reporter: where progress goes; default: the terminal.

    Raises:
        UsageError: recipe, task or checkpoint are not those of the bundle.
        StoreError: the bundle is damaged.
    """
    from fusepress.pipeline.bundling.reproduce import reproduce_bundle

    loaded = load_recipe(Path(recipe), overrides, target=target)
    return reproduce_bundle(Path(bundle), make_context(loaded, reporter or Reporter()))


def report(run: str | Path) -> Path:
    """Write the reports of a run folder again; returns the HTML file."""
    folder = Path(run)
    read_run(folder)
    write_reports(folder)
    return folder / REPORT_FILES[0]


def explain(
    what: str | Path,
    *,
    layers: str | Path | None = None,
    profile: str | Path | None = None,
    target: str | None = None,
    precision: str | None = None,
) -> Explanation:
    """Why a run's release, or an ONNX file, is not faster: findings by predicted gain.

    Args:
        what: a run folder (the findings go into its report) or an ONNX file.
        layers: the builder's list, in place of the run's own: JSON of trtexec --exportLayerInfo, or a verbose log.
        profile: times of the layers, of trtexec --exportProfile.
        target: a device profile; for an ONNX file it is needed.
        precision: what an ONNX file is built in, where it does not carry precision itself.

    Raises:
        UsageError: neither a run nor an ONNX file, or an ONNX file without a target.
        BuildError: the list or the profile is not one.
    """
    from fusepress.pipeline.explaining import explain_onnx, explain_run

    path = Path(what)
    files = (Path(layers) if layers is not None else None, Path(profile) if profile is not None else None)
    if path.suffix == ".onnx":
        return explain_onnx(path, target=target, precision=precision, layers=files[0], profile=files[1])
    found = explain_run(path, layers=files[0], profile=files[1], target=target)
    write_reports(path)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What `measure` found, on this host or on a device.

    Attributes:
        measurements: mean, p50 and p99 in milliseconds.
        verdicts: one for every budget.
        environment: clocks, load and threads at the time.
        record: the run, judged again, where a run folder was measured.
    """

    measurements: list[Measurement]
    verdicts: list[Verdict]
    environment: dict[str, Any]
    record: RunRecord | None = None


def measure(
    what: str | Path,
    *,
    budgets: Sequence[str] = (),
    seconds: float = 10.0,
    arrivals: Arrivals | None = None,
    device: DeviceSettings | None = None,
    target: str | None = None,
    precision: str | None = None,
    parts: Schedule | None = None,
    host: HostSettings | None = None,
    reporter: Reporter | None = None,
) -> Measured:
    """Measure an ONNX file, or the released ONNX of a run, on this host with ONNX Runtime or on a device.

    Args:
        what: a run folder (the measurement is added to it, and it is judged again) or an ONNX file.
        budgets: limits such as `p99_ms=5` or `mean_ms=3`.
        seconds: longest time spent measuring.
        arrivals: measure under work that arrives at a constant rate too; on this host.
        device: a device to build and measure on with TensorRT, over SSH or this machine.
        target: what the device is, a profile's name or file; a run knows its own.
        precision: of an ONNX file for TensorRT before 10, which chooses among the allowed ones.
        parts: of a run: measure each branch and the rest as engines of their own too, and put the whole pipeline
            together from them, with branches one after the other (serial) or at the same time (parallel).
        host: ONNX Runtime's provider on this host, and how many inferences at once.
        reporter: where progress goes; default: nowhere.

    Raises:
        UsageError: neither a run nor an ONNX file, or a budget that is not one.
        DeviceError: the device cannot be reached, is in use, or is not fit.
        BuildError: the device refuses the model.
        MeasureError: the figures cannot be trusted.
    """
    from fusepress.pipeline.measuring import budget_verdicts, measure_onnx, parse_budgets

    limits = parse_budgets(budgets)
    path = Path(what)
    if device is not None and arrivals is not None:
        raise UsageError(
            "expected arrivals at a constant rate on this host with ONNX Runtime; got a device too (--host or "
            "--runtime tensorrt); leave one of them out"
        )
    if parts is not None and host is not None and host.runtime == "cuda":
        raise UsageError(
            "expected parts on a CPU or with TensorRT; got ONNX Runtime's CUDA provider; take --runtime tensorrt, or "
            "leave --parts out"
        )
    if path.is_dir():
        return _measure_run(path, limits, seconds, arrivals, device, target, parts, host, reporter)
    if parts is not None:
        raise UsageError(f"expected a run folder with parts; got {path}; an ONNX file does not say its branches")
    if path.suffix != ".onnx" or not path.is_file():
        raise UsageError(f"expected a run folder or an ONNX file; got {path}; name one of the two")
    if device is not None:
        from fusepress.pipeline.on_device import measure_onnx_there

        profile = load_profile(target) if target is not None else None
        measurements, environment = measure_onnx_there(path, device, profile, precision or "fp16", reporter)
    else:
        measurements, environment = measure_onnx(path, HOST, None, None, seconds, arrivals, host)
    return Measured(measurements=measurements, verdicts=budget_verdicts(measurements, limits), environment=environment)


def self_test(out: str | Path, *, seconds: float = 2.0, reporter: Reporter | None = None) -> dict[str, Any]:
    """Try TensorRT on this machine with a tiny network and write a record of it; what is missing is said.

    Args:
        out: the JSON file to write.
        seconds: longest time spent on one latency.
        reporter: where progress goes; default: nowhere.

    Raises:
        StoreError: the file cannot be written.
    """
    from fusepress.pipeline.self_test import self_test as run_self_test

    reporter = reporter or Reporter(quiet=True)
    reporter.begin("self-test", "1/1")
    try:
        record = run_self_test(seconds=seconds, say=reporter.update)
    finally:
        reporter.end()
    atomic_write_text(Path(out), json.dumps(record, indent=1) + "\n")
    return record


def _measure_run(
    folder: Path,
    limits: dict[str, float],
    seconds: float,
    arrivals: Arrivals | None,
    device: DeviceSettings | None,
    target: str | None,
    parts: Schedule | None,
    host: HostSettings | None,
    reporter: Reporter | None,
) -> Measured:
    from fusepress.pipeline.measuring import budget_verdicts, measure_onnx, measure_parts

    record = read_run(folder)
    if "onnx" not in record.artifacts or record.stage("verify") is None:
        raise StoreError(f"expected a finished run; got one without an ONNX artifact at {folder}; run compress again")
    path, precision = _artifact(record, folder, "onnx"), record.final_precision
    assert path is not None
    if device is not None:
        from fusepress.pipeline.on_device import measure_run_there

        profile = load_profile(target or record.target)
        measurements, environment = measure_run_there(
            record, folder, device, profile, reporter, parts=parts is not None
        )
    else:
        mode = record.target_profile.get("power_mode") if record.target == HOST else None
        measurements, environment = measure_onnx(path, HOST, mode, precision, seconds, arrivals, host)
        if parts is not None:
            measurements += measure_parts(path, record.task["branches"], HOST, mode, precision, seconds)
    if parts is not None:
        measurements, environment = _with_pipeline(record, measurements, environment, parts)
    verify = record.stage("verify")
    assert verify is not None
    places = {(m.name, m.device) for m in measurements}
    verify.measurements = [
        m for m in verify.measurements if not ((m.name, m.device) in places and m.kind == "measured")
    ] + measurements
    judge_run(record, folder, run_recipe(folder, record).gates)
    write_reports(folder)
    return Measured(
        measurements=measurements,
        verdicts=budget_verdicts(measurements, limits),
        environment=environment,
        record=record,
    )


def _with_pipeline(
    record: RunRecord, measurements: list[Measurement], environment: dict[str, Any], schedule: Schedule
) -> tuple[list[Measurement], dict[str, Any]]:
    """The whole pipeline from the mean latencies of its parts, and which part is worth compressing."""
    from fusepress.pipeline.stages.parts import outside_ms, pipeline_of, pipeline_row

    device = measurements[0].device
    assert device is not None
    outside = outside_ms(record.task.get("outside", {}), device)
    branches = list(record.task["branches"])
    found = pipeline_of(measurements, branches, outside, schedule)
    parts = [asdict(part) for part in found.parts]
    return (
        [*measurements, pipeline_row(found, measurements, list(outside))],
        environment | {"pipeline": {"schedule": schedule, "parts": parts}},
    )


def plan(
    recipe: str | Path,
    *,
    target: str | None = None,
    run: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """A dry run: what would be done, what is frozen and why, whether the budget can be reached, at what cost.

    Nothing is trained and nothing is written.
    """
    from fusepress.pipeline.planning import plan_run

    loaded = load_recipe(Path(recipe), overrides, target=target)
    ctx = make_context(loaded, Reporter(quiet=True))
    folder = Path(run) if run is not None else default_run_folder(loaded, ctx.profile)
    return plan_run(ctx, folder)
